"""What does it cost in accuracy to clip every example's gradient, and what does the noise of DP-SGD cost?

    python -m experiments.private_training        (--help lists the flags)

A network 64-32-10 (relu, softmax cross-entropy) learns the handwritten digits by the step of Abadi et al.
(2016), algorithm 1: every example's gradient g_n is shortened to a norm of at most C, and the mean of a batch
of m gets Gaussian noise of standard deviation σ C / m in every entry,

    Δθ = -η [ (1/m) Σ_n g_n min(1, C / ‖g_n‖) + (σ C / m) ξ ],   ξ ~ N(0, 1).

No g_n is ever formed: its norm and the clipped mean come from one `fnn.backprop`, by `fnn.clipped_gradient`.
The noise is `optax.add_noise`'s, whose eta is a variance; gamma = 0 keeps it from falling over the steps.

It is the step alone that is studied: no privacy accounting is done and no ε is claimed. Batches come from
shuffled epochs, which is not the Poisson sampling that accounting assumes, and the learning rate is chosen by
looking at the training data: for each C and σ the one of a grid with the best training accuracy, the smallest
of equal ones. The grid is one of η C, as that is all that enters where every g_n is longer than C.

Expected answer (m = 128, 30 epochs, means of 5 runs). Clipping alone costs nothing, even at C = 0.1, which is
a hundredth of the norms at the start: 97.2 % of the test digits, where training without it reads 97.0 %. The
noise does cost, and about the same at C = 0.1 and C = 1, as the rate makes up for C: with σ = 0.5 some 1
point, with σ = 1 1.3 to 1.7, with σ = 2 3, with σ = 4 5 to 6 and with σ = 8 9 to 10 points. C = 10, which is
the median norm at the start and above nearly all at the end, costs more, 2.7 points with σ = 1 and 15 with
σ = 8. The 360 test digits leave an accuracy uncertain by 1 to 2 points.

Sources: Abadi et al. (2016), *Deep Learning with Differential Privacy*, arXiv:1607.00133; the rate in units
of 1/C, De et al. (2022), *Unlocking High-Accuracy Differentially Private Image Classification through Scale*,
arXiv:2204.13650.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import fnn
from experiments import command, digits
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

N = digits.TRAINING_DIGITS
SIZES = (64, 32, 10)
NET = fnn.mlp(fnn.relu)
COST = fnn.cost(NET, fnn.softmax_cross_entropy_with_integer_labels)
ACCURACY = fnn.accuracy(NET)

STEP_LENGTHS = 2.0 ** np.arange(-4, 6)  # η C: the longest that a step can be without noise
PLAIN_RATES = 2.0 ** np.arange(-7, 3)  # η without clipping
QUICK_EPOCHS, QUICK_RUNS, QUICK_NOISE = 5, 2, (0.0, 1.0, 4.0)  # and every other rate


@dataclass(frozen=True)
class Flags(command.Flags):
    """Trains on the handwritten digits with clipped gradients of the examples and noise in their mean."""

    max_norms: tuple[float, ...] = (0.1, 1.0, 10.0)
    """Bounds C on the norm of an example's gradient."""
    noise: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    """Noise multipliers σ, ascending."""
    batch_size: int = 128
    """Examples m in each step."""
    epochs: int = 30
    """Times that training goes through the data."""
    runs: int = 5
    """Runs of each setting; they differ in initial weights, order of the digits and noise."""
    quick: bool = False
    """At most 5 epochs, 2 runs and 3 noise multipliers, the last bound alone, every other rate."""

    def check(self) -> None:
        super().check()
        for C in self.max_norms or (None,):
            expect("--max-norms", "finite numbers above 0", C, C is not None and 0 < C < inf)
        for sigma in self.noise or (None,):
            expect("--noise", "finite numbers of at least 0", sigma, sigma is not None and 0 <= sigma < inf)
        ascending = list(self.noise) == sorted(set(self.noise))
        expect("--noise", "ascending", " ".join(f"{sigma:g}" for sigma in self.noise), ascending)
        what = f"an integer from 1 to {N}, the number of training digits"
        expect("--batch-size", what, self.batch_size, 1 <= self.batch_size <= N)
        expect("--epochs", "an integer of at least 1", self.epochs, self.epochs >= 1)
        expect("--runs", "an integer from 1 to 100", self.runs, 1 <= self.runs <= 100)


def deviation(noise: Any, max_norm: Any, batch_size: int) -> jax.Array:
    """σ C / m; 0 for σ = 0, also where C is infinite."""
    return jnp.where(noise == 0, 0, noise * max_norm / batch_size)


def noisy_sgd(rate: Any, deviation: Any, key: jax.Array) -> optax.GradientTransformation:
    """Gradient descent after noise of that standard deviation, the same in every step, in every entry."""
    return optax.chain(optax.add_noise(deviation**2, 0, key), optax.sgd(rate))


def private_step(
    optimizer: optax.GradientTransformation, max_norm: Any, state: tuple[Any, Any], X: Any, y: Any
) -> tuple[Any, Any]:
    """(parameters, optimiser's state) after one step on a batch."""
    params, optimizer_state = state
    mean: Any = fnn.clipped_gradient(fnn.backprop(COST, params, X, y), max_norm)
    updates, optimizer_state = optimizer.update(mean, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state


class Runs(NamedTuple):
    """Training runs along the first axes, (settings, rates, runs) once they are arranged."""

    test: np.ndarray  # (..., epochs), test accuracy after each epoch
    accuracy: np.ndarray  # (...), training accuracy at the end
    before: np.ndarray  # (..., N), ‖g_n‖ of the training digits before training
    after: np.ndarray  # (..., N), and after it


@partial(jax.jit, static_argnames=("batch_size", "epochs"))
def train(
    noise: Any, max_norms: Any, rates: Any, keys: Any, data: Any, test: Any, batch_size: int, epochs: int
) -> tuple[Any, ...]:
    """`Runs`: one for each member of the first four arguments, side by side in one scan.

    An epoch is N // m batches in a fresh random order; the N mod m digits left over are others every time.
    """

    def norms(params):
        return fnn.example_norms(fnn.backprop(COST, params, *data))

    def run(sigma, max_norm, rate, key):
        init_key, order_key, noise_key = jax.random.split(key, 3)
        optimizer = noisy_sgd(rate, deviation(sigma, max_norm, batch_size), noise_key)

        def step(state, rows):
            return private_step(optimizer, max_norm, state, *(a[rows] for a in data)), None

        def epoch(state, key):
            order = jax.random.permutation(key, N)[: N // batch_size * batch_size]
            state, _ = jax.lax.scan(step, state, order.reshape(-1, batch_size))
            return state, ACCURACY(state[0], *test)

        start: Any = fnn.init(init_key, SIZES, weights=fnn.he_normal, dtype=jnp.float32)
        state = start, optimizer.init(start)
        (params, _), curve = jax.lax.scan(epoch, state, jax.random.split(order_key, epochs))
        return curve, ACCURACY(params, *data), norms(start), norms(params)

    return jax.vmap(run)(noise, max_norms, rates, keys)


def best_rate(accuracies: np.ndarray) -> int:
    """Which of the rates (rates, runs) has the highest mean accuracy; of equal ones the first."""
    return int(accuracies.mean(axis=1).argmax())


class Result(NamedTuple):
    noise: np.ndarray  # σ
    max_norms: np.ndarray  # C
    batch_size: int
    plain: Runs  # without clipping and noise: arrays (runs, ...)
    plain_rate: float  # η
    private: Runs  # arrays (C, σ, runs, ...)
    lengths: np.ndarray  # η C of each (C, σ)
    at_edge: list[str]  # settings whose best rate is the first or the last of its grid

    @property
    def accuracies(self) -> np.ndarray:
        """Mean test accuracy at the end, (C, σ)."""
        return self.private.test[..., -1].mean(axis=-1)

    @property
    def plain_accuracy(self) -> float:
        return float(self.plain.test[..., -1].mean())


def measure(flags: Flags) -> Result:
    lengths, plain_rates = STEP_LENGTHS, PLAIN_RATES
    if flags.quick:
        lengths, plain_rates = lengths[::2], plain_rates[1::2]
        noise = tuple(sigma for sigma in flags.noise if sigma in QUICK_NOISE) or flags.noise[:1]
        epochs, runs = min(flags.epochs, QUICK_EPOCHS), min(flags.runs, QUICK_RUNS)
        flags = replace(flags, max_norms=flags.max_norms[-1:], noise=noise, epochs=epochs, runs=runs)
    (X, y), (X_test, y_test) = digits.load(flags.seed)
    data = jnp.asarray(digits.standardised(X, X)), jnp.asarray(y)
    test = jnp.asarray(digits.standardised(X_test, X)), jnp.asarray(y_test)
    keys = jax.random.split(jax.random.key(flags.seed), flags.runs)

    # The first setting is without clipping and noise; the others follow C by C.
    settings = [(inf, 0.0), *((C, sigma) for C in flags.max_norms for sigma in flags.noise)]
    rates = np.array([plain_rates, *(lengths / C for C, _ in settings[1:])])
    each = rates.shape[1] * flags.runs
    max_norms, noise = (np.repeat(a, each).astype(np.float32) for a in zip(*settings, strict=True))
    members = np.repeat(rates.ravel(), flags.runs).astype(np.float32)
    runs = train(
        noise, max_norms, members, jnp.tile(keys, rates.size), data, test, flags.batch_size, flags.epochs
    )
    runs = Runs(*(a.reshape(*rates.shape, flags.runs, *a.shape[1:]) for a in jax.device_get(runs)))
    best = np.array([best_rate(accuracies) for accuracies in runs.accuracy])
    runs = Runs(*(a[np.arange(len(best)), best] for a in runs))
    at_edge = [
        f"C = {C:g}, σ = {sigma:g}"
        for (C, sigma), i in zip(settings, best, strict=True)
        if i in (0, rates.shape[1] - 1)
    ]
    shape = len(flags.max_norms), len(flags.noise)
    return Result(
        np.array(flags.noise),
        np.array(flags.max_norms),
        flags.batch_size,
        Runs(*(a[0] for a in runs)),
        float(plain_rates[best[0]]),
        Runs(*(a[1:].reshape(*shape, *a.shape[1:]) for a in runs)),
        lengths[best[1:]].reshape(shape),
        at_edge,
    )


def finding(result: Result) -> str:
    def span(accuracies):
        low, high = 100 * accuracies.min(), 100 * accuracies.max()
        return f"{low:.1f} %" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f} %"

    parts = [f"{100 * result.plain_accuracy:.1f} % without clipping and noise"]
    noisy = list(np.flatnonzero(result.noise > 0))
    if result.noise[0] == 0:
        parts.append(f"{span(result.accuracies[:, 0])} with clipping alone")
    for j in noisy if len(noisy) < 3 else (noisy[(len(noisy) - 1) // 2 - 1], noisy[-1]):
        parts.append(f"{span(result.accuracies[:, j])} with noise of σ = {result.noise[j]:g}")
    n, C = len(parts), result.max_norms
    bounds = f"C = {C[0]:g}" if len(C) == 1 else f"C from {C.min():g} to {C.max():g}"
    return (
        f"Test digits read correctly, {bounds}: {', '.join(parts[: n // 2])},\n{', '.join(parts[n // 2 :])}"
    )


def report(result: Result) -> str:
    rows = [("C", "σ", "σ C / m", "η C", "training", "test, mean", "its range", "below plain")]
    plain, curves = result.plain_accuracy, result.private.test[..., -1]
    for i, C in enumerate(result.max_norms):
        for j, sigma in enumerate(result.noise):
            row = (
                f"{C:g}",
                f"{sigma:g}",
                f"{sigma * C / result.batch_size:.2g}",
                f"{result.lengths[i, j]:g}",
                f"{result.private.accuracy[i, j].mean():.1%}",
                f"{curves[i, j].mean():.1%}",
                f"{curves[i, j].min():.1%} to {curves[i, j].max():.1%}",
                f"{100 * (plain - curves[i, j].mean()):+.1f}",
            )
            rows.append(row)
    runs, epochs = result.plain.test.shape
    lowest, highest = result.plain.test[:, -1].min(), result.plain.test[:, -1].max()
    lines = [
        f"Batches of {result.batch_size}, {epochs} epochs, {runs} runs; no privacy accounting is done",
        f"Without clipping and noise, η = {result.plain_rate:g}: {plain:.1%} of the test digits "
        f"({lowest:.1%} to {highest:.1%})\n",
        aligned(rows, ">>>>>>>>"),
        "",
    ]
    before, after = result.plain.before, result.plain.after
    for when, norms in (("before", before), ("after", after)):
        clipped = ", ".join(f"{(norms > C).mean():.0%} above C = {C:g}" for C in result.max_norms)
        lines.append(f"Norms {when} training without clipping: median {np.median(norms):.2g}, {clipped}")
    if result.at_edge:
        lines.append(f"The best rate was at the edge of its grid: {'; '.join(result.at_edge)}.")
    return "\n".join((*lines, finding(result)))


def draw(result: Result) -> Figure:
    shown = len(result.max_norms) // 2  # the bound whose training is drawn
    titles = (
        "Test accuracy, mean and range of the runs",
        f"Test accuracy while training, C = {result.max_norms[shown]:g}",
        "Gradients' norms, training without clipping",
    )
    figure, (accuracy, curves, norms) = panels(finding(result), titles)
    accuracy.axhline(result.plain_accuracy, color="black", linestyle="--", label="without clipping and noise")
    places = np.arange(len(result.noise))
    for i, C in enumerate(result.max_norms):
        ends = result.private.test[i, :, :, -1]
        accuracy.plot(places, ends.mean(axis=1), "o-", color=f"C{i}", markersize=4, label=f"C = {C:g}")
        accuracy.fill_between(
            places, ends.min(axis=1), ends.max(axis=1), color=f"C{i}", alpha=0.15, linewidth=0
        )
    accuracy.set_xticks(places, [f"{sigma:g}" for sigma in result.noise])
    accuracy.set(xlabel="noise multiplier σ (at 0: clipping alone)", ylabel="test digits read correctly")
    accuracy.legend(fontsize=8)

    epochs = np.arange(1, result.plain.test.shape[-1] + 1)
    curves.plot(epochs, result.plain.test.mean(axis=0), "k--", label="plain")
    for j, sigma in enumerate(result.noise):
        curve = result.private.test[shown, j].mean(axis=0)
        curves.plot(epochs, curve, color=_shade(j, len(result.noise)), label=f"σ = {sigma:g}")
    lowest = result.private.test[shown].mean(axis=1)[:, min(2, len(epochs) - 1) :].min()
    curves.set(xlabel="epoch", ylabel="test digits read correctly, mean of runs", ylim=(lowest - 0.03, 1))
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.legend(fontsize=8, ncols=2, loc="lower right")
    for axes in (accuracy, curves):
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    draw_norms(norms, result)
    return figure


def _shade(j: int, n: int) -> tuple[float, float, float]:
    """From light to dark red with more noise."""
    share = j / max(n - 1, 1)
    return 1 - 0.55 * share, 0.7 * (1 - share), 0.6 * (1 - share)


def draw_norms(axes: Axes, result: Result) -> None:
    smallest = 1e-6  # norms below it are counted there
    bins = np.geomspace(smallest, 100, 49).tolist()
    for values, color, name in (
        (result.plain.before, "tab:gray", "before training"),
        (result.plain.after, "tab:blue", "after it"),
    ):
        values = np.maximum(values, smallest).ravel()
        weights = np.full(values.size, 1 / values.size)
        axes.hist(values, bins, weights=weights, color=color, alpha=0.6, label=name)
    for i, C in enumerate(result.max_norms):
        axes.axvline(C, color=f"C{i}", linestyle="--", label=f"C = {C:g}")
    axes.set(
        xscale="log", xlabel="norm of an example's gradient (nats)", ylabel="share of the training digits"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.legend(fontsize=8, loc="upper left")


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    result = measure(flags)
    print(report(result))
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
