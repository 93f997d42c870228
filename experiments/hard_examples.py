"""Are the training examples with the largest gradients the mislabelled ones, and the hard ones?

    python -m experiments.hard_examples        (--help lists the flags)

A network 64-64-10 (relu, softmax cross-entropy, gradient descent with η = 0.1 in batches of 32) learns the
handwritten digits after 2 % of the training digits, chosen at random, have been given a wrong label, chosen
at random too. The k examples with the largest gradients ‖g_n‖ (`fnn.example_norms`, at the labels as given)
are looked up after every epoch:

    precision at k      how many of these k are flipped
    recall at k         how many of the flipped are among these k

At k = the number of flipped ones the two are equal. For comparison: the k largest losses, and k at random.

For a digit that is hard, and not mislabelled by us, there is a mark that knows nothing of the network: its
nearest neighbour among the training digits (Euclidean, pixels) is of another class. 17 of 1,437 are so with
--seed 0.

Expected answer (k = 29, means of 20 runs): the mislabelled ones, yes, once the network has learned something
and before it learns them by heart. Before training norms find 2 % of them, which is chance; after epoch 1
66 %, after epoch 10 92 %, and 99.8 % are among the 2k largest; after epoch 100, when their own norms have
fallen, 80 %. Losses do as well from epoch 10 on, and better before that, 82 % after epoch 1: the norm has no
advantage. The digits that are not flipped and have the largest norms are often hard ones: of the 10 largest
after epoch 10, 50 % have a nearest neighbour of another class, of all digits 1.2 %.

Sources: the norm of g_n as an example's importance, Paul, Ganguli & Dziugaite (2021), *Deep Learning on a
Data Diet*, arXiv:2107.07075; that at initialisation it says little, Kirsch (2023), arXiv:2303.14753.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter

import fnn
from experiments import command, digits
from experiments.command import expect
from experiments.figures import new_figure
from fnn.tables import aligned

N = digits.TRAINING_DIGITS
SIZES = (64, 64, 10)
NET = fnn.mlp(fnn.relu)
COST = fnn.cost(NET, fnn.softmax_cross_entropy_with_integer_labels)
ACCURACY = fnn.accuracy(NET)
OPTIMIZER, BATCH_SIZE = optax.sgd(0.1), 32
QUICK_EPOCHS, QUICK_RUNS = 10, 3
EXAMPLES = 10  # in a row of the figure
COLORS = {"norm": "tab:blue", "loss": "tab:orange", "flipped": "tab:red", "rest": "tab:gray"}


@dataclass(frozen=True)
class Flags(command.Flags):
    """Flips some labels of the handwritten digits and looks for them among the largest gradients."""

    flipped: float = 0.02
    """Share of the training digits that get a wrong label."""
    epochs: int = 100
    """Times that training goes through the data."""
    look: int = 10
    """The epoch after which the largest norms are looked at closely, chosen beforehand."""
    runs: int = 20
    """Runs; they differ in which labels are flipped, initial weights and order of the digits."""
    quick: bool = False
    """At most 10 epochs and 3 runs, for a first look."""

    def check(self) -> None:
        super().check()
        what = f"from {1 / N:.2g}, one digit, to 0.5"
        expect("--flipped", what, self.flipped, 0.5 / N < self.flipped <= 0.5)
        expect("--epochs", "an integer of at least 1", self.epochs, self.epochs >= 1)
        what = f"an integer from 1 to {self.epochs}, the number of epochs"
        expect("--look", what, self.look, 1 <= self.look <= self.epochs)
        expect("--runs", "an integer from 1 to 100", self.runs, 1 <= self.runs <= 100)


def flip(rng: np.random.Generator, y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels with so many of them wrong, and which: a mask. Every wrong class is equally likely."""
    rows = rng.choice(len(y), count, replace=False)
    labels, flipped = y.copy(), np.zeros(len(y), bool)
    labels[rows] = (y[rows] + rng.integers(1, 10, count)) % 10
    flipped[rows] = True
    return labels, flipped


def found(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many of the wanted are among the k largest scores, for k = 1, ..., N: (..., N)."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    return np.take_along_axis(wanted, order, axis=-1).cumsum(axis=-1)


def has_stranger_next(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether the nearest neighbour of an example is of another class, (N,)."""
    X = X.astype(float)
    squares = (X**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * X @ X.T
    np.fill_diagonal(distances, inf)
    return y[distances.argmin(axis=1)] != y


class Runs(NamedTuple):
    """Per run and epoch, the first before training."""

    norms: np.ndarray  # (runs, epochs + 1, N), ‖g_n‖
    losses: np.ndarray  # (runs, epochs + 1, N), C_n
    answers: np.ndarray  # (runs, epochs + 1, N), the class that the network gives
    accuracy: np.ndarray  # (runs, epochs + 1), of the test digits, whose labels are right


@partial(jax.jit, static_argnames="epochs")
def train(keys: Any, X: Any, labels: Any, test: Any, epochs: int) -> tuple[Any, ...]:
    """`Runs`: one for each key and its labels (runs, N), side by side."""

    def look(params, y):
        sweep = fnn.backprop(COST, params, X, y)
        answers = jnp.argmax(NET(params, X), axis=1)
        return fnn.example_norms(sweep), sweep.losses, answers, ACCURACY(params, *test)

    def run(key, y):
        init_key, order_key = jax.random.split(key)
        params = fnn.init(init_key, SIZES, weights=fnn.he_normal, dtype=jnp.float32)
        state = fnn.train_state(OPTIMIZER, params, order_key)

        def epoch(state, _):
            seen = look(state.params, y)
            state, _ = fnn.train_epoch(COST, OPTIMIZER, state, (X, y), BATCH_SIZE)
            return state, seen

        return jax.lax.scan(epoch, state, length=epochs + 1)[1]  # the last epoch's training is not looked at

    return jax.vmap(run)(keys, labels)


class Result(NamedTuple):
    X: np.ndarray  # (N, 64), pixels from 0 to 1
    y: np.ndarray  # (N,), the true labels
    labels: np.ndarray  # (runs, N), as given
    flipped: np.ndarray  # (runs, N)
    hard: np.ndarray  # (N,), the nearest neighbour is of another class
    runs: Runs
    look: int

    @property
    def k(self) -> int:
        """The number of flipped labels in each run."""
        return int(self.flipped[0].sum())

    def precisions(self, scores: np.ndarray) -> np.ndarray:
        """Precision at k of scores (runs, epochs + 1, N), (runs, epochs + 1)."""
        wanted = np.broadcast_to(self.flipped[:, None], scores.shape)
        return found(scores, wanted)[..., self.k - 1] / self.k

    @property
    def unflipped_norms(self) -> np.ndarray:
        """‖g_n‖ at the epoch looked at, -inf for the flipped, (runs, N)."""
        return np.where(self.flipped, -inf, self.runs.norms[:, self.look])


def measure(flags: Flags) -> Result:
    epochs, runs, look = flags.epochs, flags.runs, flags.look
    if flags.quick:
        epochs, runs = min(epochs, QUICK_EPOCHS), min(runs, QUICK_RUNS)
        look = min(look, epochs)
    (X, y), (X_test, y_test) = digits.load(flags.seed)
    test = jnp.asarray(digits.standardised(X_test, X)), jnp.asarray(y_test)
    count = round(flags.flipped * N)
    pairs = [flip(np.random.default_rng((flags.seed, run)), y, count) for run in range(runs)]
    labels, flipped = (np.stack(part) for part in zip(*pairs, strict=True))
    keys = jax.random.split(jax.random.key(flags.seed), runs)
    trained = train(keys, jnp.asarray(digits.standardised(X, X)), jnp.asarray(labels), test, epochs)
    return Result(X, y, labels, flipped, has_stranger_next(X, y), Runs(*jax.device_get(trained)), look)


def hard_share(result: Result, k: int) -> float:
    """Of the k largest norms of digits that are not flipped, the share that is hard; a mean over runs."""
    hard = np.broadcast_to(result.hard, result.flipped.shape) & ~result.flipped
    return float(found(result.unflipped_norms, hard)[:, k - 1].mean() / k)


def finding(result: Result) -> str:
    by_norm = result.precisions(result.runs.norms)[:, result.look].mean()
    by_loss = result.precisions(result.runs.losses)[:, result.look].mean()
    return (
        f"Of the {result.k} digits with the largest gradients after epoch {result.look}, {by_norm:.0%} are "
        f"mislabelled (by loss {by_loss:.0%}, at random {result.k / N:.0%});\n"
        f"of the {EXAMPLES} largest among the rest, {hard_share(result, EXAMPLES):.0%} have a nearest "
        f"neighbour of another class, as have {result.hard.mean():.1%} of all"
    )


def report(result: Result) -> str:
    epochs = result.runs.accuracy.shape[1] - 1
    by_norm, by_loss = result.precisions(result.runs.norms), result.precisions(result.runs.losses)
    rows = [("epoch", "by norm", "range of runs", "by loss", "median norm, flipped", "others", "test")]
    for epoch in sorted({e for e in (0, 1, 2, 3, 5, 10, 20, 30, 50, result.look, epochs) if e <= epochs}):
        norms = result.runs.norms[:, epoch]
        row = (
            f"{epoch}",
            f"{by_norm[:, epoch].mean():.1%}",
            f"{by_norm[:, epoch].min():.0%} to {by_norm[:, epoch].max():.0%}",
            f"{by_loss[:, epoch].mean():.1%}",
            f"{np.median(norms[result.flipped]):.3g}",
            f"{np.median(norms[~result.flipped]):.3g}",
            f"{result.runs.accuracy[:, epoch].mean():.1%}",
        )
        rows.append(row)
    wide = []
    for name, scores in (("norms", result.runs.norms), ("losses", result.runs.losses)):
        recall = found(scores[:, result.look], result.flipped)[:, 2 * result.k - 1].mean() / result.k
        wide.append(f"{recall:.1%} of them are among the {2 * result.k} largest {name}")
    labels = result.runs.answers[:, result.look][result.flipped]
    true = np.broadcast_to(result.y, result.labels.shape)[result.flipped]
    hard = ", ".join(f"{hard_share(result, k):.0%} of the {k} largest" for k in (EXAMPLES, result.k))
    return "\n".join(
        (
            f"{result.k} of {N} labels flipped, {len(result.flipped)} runs; precision and recall at "
            f"k = {result.k}",
            aligned(rows, ">>>>>>>"),
            f"\nAfter epoch {result.look}: {'; '.join(wide)}.",
            f"The network's answer is the true class for {np.mean(labels == true):.1%} of the flipped.",
            f"Norms of the others: {hard} have a nearest neighbour of another class,",
            f"as have {result.hard.sum()} of all {N} ({result.hard.mean():.1%}).",
            "",
            finding(result),
        )
    )


def draw(result: Result) -> Figure:
    heights = (3.7, 3.6)
    figure = new_figure(finding(result), 13.8, 0.6 + sum(heights))
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
    when, which, norms = top.subplots(1, 3)
    draw_epochs(when, result)
    draw_recall(which, result)
    draw_norms(norms, result)
    for axes in (when, which, norms):
        axes.grid(alpha=0.3)
    draw_digits(bottom, result)
    return figure


def draw_epochs(axes: Axes, result: Result) -> None:
    for name, scores in (("norm", result.runs.norms), ("loss", result.runs.losses)):
        precisions = result.precisions(scores)
        epochs = np.arange(precisions.shape[1])
        axes.plot(epochs, precisions.mean(axis=0), color=COLORS[name], label=f"by {name}")
        axes.fill_between(
            epochs, precisions.min(axis=0), precisions.max(axis=0), color=COLORS[name], alpha=0.2, linewidth=0
        )
    axes.axhline(result.k / N, color="black", linestyle="--", linewidth=1, label="at random")
    axes.axvline(result.look, color="0.7", linewidth=1)
    axes.set(title=f"Flipped among the {result.k} largest, mean and range", xlabel="epoch", ylim=(0, 1))
    axes.set(ylabel="precision = recall", xlim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(loc="lower right")


def draw_recall(axes: Axes, result: Result) -> None:
    k = np.arange(1, 4 * result.k + 1)
    k = k[k <= N]
    axes.plot(k, np.minimum(k / result.k, 1), color="0.6", label="the best there can be")
    for name, scores in (("norm", result.runs.norms), ("loss", result.runs.losses)):
        recall = found(scores[:, result.look], result.flipped)[:, : len(k)] / result.k
        axes.plot(k, recall.mean(axis=0), color=COLORS[name], label=f"by {name}")
    axes.plot(k, k / N, color="black", linestyle="--", linewidth=1, label="at random")
    axes.set(title=f"Recall after epoch {result.look}, mean", xlabel="k largest looked at (digits)")
    axes.set(ylabel="flipped ones found", ylim=(0, 1.03), xlim=(0, k[-1]))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(loc="center right")


def draw_norms(axes: Axes, result: Result) -> None:
    norms = np.maximum(result.runs.norms[:, result.look], 1e-4)  # smaller ones are counted there
    hard = np.broadcast_to(result.hard, norms.shape) & ~result.flipped
    bins = np.geomspace(1e-4, 100, 61).tolist()
    for wanted, color, name in (
        (~result.flipped & ~hard, COLORS["rest"], "other digits"),
        (hard, "tab:green", "nearest neighbour of another class"),
        (result.flipped, COLORS["flipped"], "label flipped"),
    ):
        axes.hist(
            norms[wanted],
            bins,
            weights=np.full(wanted.sum(), 1 / wanted.sum()),
            color=color,
            alpha=0.6,
            label=name,
        )
    axes.set(title=f"Gradients' norms after epoch {result.look}", xscale="log", xlabel="‖g_n‖ (nats)")
    axes.set(ylabel="share of each kind")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(fontsize=8, loc="upper left")


def draw_digits(panel: SubFigure, result: Result) -> None:
    """Of the first run the largest norms of all, and the largest of those that are not flipped."""
    norms, answers = result.runs.norms[0, result.look], result.runs.answers[0, result.look]
    panel.suptitle(
        "First run: label given → the network's answer, and ‖g_n‖. "
        "Above the largest of all, flipped ones in red; below the largest of those not flipped",
        fontsize=11,
    )
    rows = (norms, result.unflipped_norms[0])
    for axes_row, scores in zip(panel.subplots(2, EXAMPLES), rows, strict=True):
        for axes, n in zip(axes_row, np.argsort(-scores, kind="stable")[:EXAMPLES], strict=True):
            axes.imshow(result.X[n].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
            flipped = result.flipped[0, n]
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color=COLORS["flipped"] if flipped else "0.8", linewidth=2 if flipped else 1)
            truth = f" (is {result.y[n]})" if flipped else ""
            title = f"{result.labels[0, n]} → {answers[n]}{truth}\n{norms[n]:.3g}"
            axes.set_title(title, fontsize=10, color=COLORS["flipped"] if flipped else "black")


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    result = measure(flags)
    print(report(result))
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
