"""Which learning rate suits which width, and how long does it take to train the networks that answer it?

    python -m experiments.sweep        (--help lists the flags)

Networks 64-w-10 (relu, softmax cross-entropy, Adam, batches of 32, 20 epochs) learn the handwritten digits
with 16 learning rates from 2⁻¹⁴ to 2, each with 16 seeds: 256 networks of each width, all members of one
`fnn.fit_ensemble`. A seed decides the initial weights and the order of the digits; it is the same for all
rates. The accuracy is that on the 360 test digits after the last epoch; a network that diverged counts as
one that reads none. As the best rate is the one that is best on the test digits, its accuracy is a little
flattered.

For comparison scikit-learn's MLPClassifier of the same layers, optimiser, batch and epochs is fitted one
network after the other: only 3 of each width, with rates from the middle of the grid, whose mean time is
multiplied by 256. The time of `fit_ensemble` is that of the whole run, compilation included.

Expected answer: the wider, the smaller. The best is 2⁻⁶, 2⁻⁶, 2⁻⁷ and 2⁻⁹ for w = 4, 16, 64 and 256, with
--seed 1 too: from 4 to 256 neurons as 1/√w. From w = 16 on it hardly matters: five rates in a row, from the
smallest to the largest a factor of 16, lose at most a point to the best. At the best rate the mean and the
range of the 16 seeds are 88.2 % (86.1 to 91.1), 96.9 % (96.1 to 97.8), 97.6 % (96.7 to 98.3) and 97.9 %
(97.2 to 98.3). None of the 1,024 networks diverges; with η = 2 those of 256 neurons still read 96 %, those
of 4 only 11 %.

The 1,024 networks take 22 to 25 s on two cores, scikit-learn's would take 155 to 203 s (--seed 0 and 1), 8
to 11, 8 to 11, 7 to 8 and 6 times as long for w = 4, 16, 64 and 256. Its accuracy at the same rates is within
0.6 points of ours. Times differ from machine to machine.

Sources: Kingma & Ba (2015), Adam; that its best rate falls with the width, Yang & Hu (2021), *Tensor Programs
IV*, and Yang et al. (2022), *Tensor Programs V*.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import fnn
from experiments import command, digits
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

RATES = 2.0 ** np.arange(-14, 2)
QUICK_RATES, QUICK_SEEDS, QUICK_EPOCHS = RATES[1::4], 3, 5
CLOSE = 0.01  # of accuracy: rates that lose no more than this to the best one are as good as it

NET = fnn.mlp(fnn.relu)
COST = fnn.cost(NET, fnn.softmax_cross_entropy_with_integer_labels)
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


@dataclass(frozen=True)
class Flags(command.Flags):
    """Trains networks of every learning rate and seed at once, for several widths, on the digits."""

    widths: tuple[int, ...] = (4, 16, 64, 256)
    """Widths of the hidden layer, ascending."""
    seeds: int = 16
    """Networks of each width and learning rate."""
    batch_size: int = 32
    """Examples in each step."""
    epochs: int = 20
    """Times that training goes through the data."""
    timed: int = 3
    """Networks of each width that scikit-learn fits."""
    quick: bool = False
    """The first and the last width, 4 rates, at most 3 seeds and 5 epochs, scikit-learn once a width."""

    def check(self) -> None:
        super().check()
        for width in self.widths or (None,):
            expect("--widths", "integers of at least 1", width, width is not None and width >= 1)
        ascending = list(self.widths) == sorted(set(self.widths))
        expect("--widths", "ascending", " ".join(map(str, self.widths)), ascending)
        for flag, count in (("--seeds", self.seeds), ("--epochs", self.epochs), ("--timed", self.timed)):
            expect(flag, "an integer of at least 1", count, count >= 1)
        what = f"an integer from 1 to {digits.TRAINING_DIGITS}, the number of training digits"
        expect("--batch-size", what, self.batch_size, 1 <= self.batch_size <= digits.TRAINING_DIGITS)


class Result(NamedTuple):
    widths: np.ndarray
    rates: np.ndarray
    accuracy: np.ndarray  # (widths, rates, seeds), of the test digits
    diverged: np.ndarray  # (widths, rates, seeds), whether it did
    seconds: np.ndarray  # (widths,), of all networks of a width
    theirs: np.ndarray  # (widths, timed), seconds of a network by scikit-learn
    their_accuracy: np.ndarray  # (widths, timed)
    our_accuracy: np.ndarray  # (widths, timed), mean over the seeds at the same rates
    epochs: int

    @property
    def networks(self) -> int:
        """Of one width."""
        return self.accuracy[0].size

    @property
    def mean(self) -> np.ndarray:
        """Over the seeds, (widths, rates)."""
        return self.accuracy.mean(axis=-1)

    @property
    def best(self) -> np.ndarray:
        """Which rate has the highest mean, (widths,); of equal ones the smallest."""
        return self.mean.argmax(axis=1)

    @property
    def close(self) -> list[np.ndarray]:
        """For each width the rates that lose at most CLOSE to the best."""
        return [self.rates[mean >= mean.max() - CLOSE] for mean in self.mean]

    @property
    def their_seconds(self) -> np.ndarray:
        """Of as many networks by scikit-learn, extrapolated from the mean, (widths,)."""
        return self.theirs.mean(axis=1) * self.networks


@jax.jit
def accuracies(params: Any, X: Any, y: Any) -> jax.Array:
    """The fraction of examples that each member reads correctly, (M,)."""
    return jax.lax.map(lambda params: fnn.accuracy(NET)(params, X, y), params)


def train(width: int, rates: np.ndarray, flags: Flags, data: Any, test: Any) -> tuple[np.ndarray, ...]:
    """Test accuracy and whether it diverged, (rates, seeds) each, and the seconds of the run."""
    keys = jax.random.split(jax.random.key(flags.seed), flags.seeds)
    init = partial(fnn.init, sizes=(64, width, 10), weights=fnn.he_normal, dtype=jnp.float32)
    members = jnp.tile(keys, len(rates))  # seed by seed, rate after rate
    init_keys, order_keys = (jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(members) for n in (0, 1))
    params = jax.block_until_ready(jax.jit(jax.vmap(init))(init_keys))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # how many diverged is in the report
        history = fnn.fit_ensemble(
            COST,
            ADAM,
            params,
            data,
            keys=order_keys,
            epochs=flags.epochs,
            batch_size=flags.batch_size,
            hyperparameters={"learning_rate": np.repeat(rates, flags.seeds)},
        )
    seconds = time.perf_counter() - start
    diverged = history.diverged > 0
    # The answer of a network of NaN would be class 0.
    accuracy = np.where(diverged, 0, np.asarray(accuracies(history.params, *test), float))
    shape = len(rates), flags.seeds
    return accuracy.reshape(shape), diverged.reshape(shape), np.array(seconds)


def fit_sklearn(
    width: int, rate: float, flags: Flags, seed: int, data: Any, test: Any
) -> tuple[float, float]:
    """Seconds and test accuracy of one network by scikit-learn."""
    batch_size: Any = flags.batch_size  # its annotation knows only "auto"
    classifier = MLPClassifier(
        hidden_layer_sizes=(width,),
        activation="relu",
        solver="adam",
        alpha=0.0,  # no penalty
        batch_size=batch_size,
        learning_rate_init=rate,
        max_iter=flags.epochs,
        tol=0.0,
        n_iter_no_change=flags.epochs + 1,  # never stops early
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is to stop after so many epochs
        start = time.perf_counter()
        classifier.fit(*data)
        seconds = time.perf_counter() - start
    return seconds, float((classifier.predict(test[0]) == test[1]).mean())


def measure(flags: Flags) -> Result:
    rates = RATES
    if flags.quick:
        rates = QUICK_RATES
        seeds, epochs = min(flags.seeds, QUICK_SEEDS), min(flags.epochs, QUICK_EPOCHS)
        widths = tuple(sorted({flags.widths[0], flags.widths[-1]}))
        flags = replace(flags, widths=widths, seeds=seeds, epochs=epochs, timed=1)
    (X, y), (X_test, y_test) = digits.load(flags.seed)
    data, test = (digits.standardised(X, X), y), (digits.standardised(X_test, X), y_test)
    ours = [train(width, rates, flags, data, tuple(map(jnp.asarray, test))) for width in flags.widths]
    accuracy, diverged, seconds = (np.stack(part) for part in zip(*ours, strict=True))
    # Rates around the middle of the grid, where training works; the time hardly depends on it.
    places = [len(rates) // 2 - n % 4 for n in range(flags.timed)]
    theirs = [
        [fit_sklearn(width, rates[i], flags, n, data, test) for n, i in enumerate(places)]
        for width in flags.widths
    ]
    their_seconds, their_accuracy = np.moveaxis(np.array(theirs), -1, 0)
    return Result(
        np.array(flags.widths),
        rates,
        accuracy,
        diverged,
        seconds,
        their_seconds,
        their_accuracy,
        accuracy.mean(axis=-1)[:, places],
        flags.epochs,
    )


def power(rate: Any) -> str:
    """A power of 2 as such."""
    return f"2^{np.log2(rate):.0f}"


def finding(result: Result) -> str:
    first, last = result.best[[0, -1]]
    w, ours, theirs = result.widths, result.seconds.sum(), result.their_seconds.sum()
    best = f"The best learning rate is {result.rates[first]:.2g} for {w[0]} neurons"
    if len(w) > 1:
        best += f" and {result.rates[last]:.2g} for {w[-1]}"
    count = result.accuracy.size
    one_by_one = f"by scikit-learn one by one in {theirs:.0f} s (extrapolated)"
    return f"{best};\n{count:,} networks in {ours:.0f} s, {one_by_one}"


def report(result: Result) -> str:
    head = ("w", "best η", "test, mean", "its range", f"η within {CLOSE:.0%} of it", "diverged")
    rows: list[tuple[str, ...]] = [(*head, "s", "scikit-learn, s", "ratio", "its test", "ours there")]
    for i, w in enumerate(result.widths):
        best = result.accuracy[i, result.best[i]]
        close = result.close[i]
        row = (
            f"{w}",
            power(result.rates[result.best[i]]),
            f"{best.mean():.1%}",
            f"{best.min():.1%} to {best.max():.1%}",
            f"{power(close[0])} to {power(close[-1])}",
            f"{result.diverged[i].sum()}",
            f"{result.seconds[i]:.1f}",
            f"{result.their_seconds[i]:.0f}",
            f"{result.their_seconds[i] / result.seconds[i]:.1f}",
            f"{result.their_accuracy[i].mean():.1%}",
            f"{result.our_accuracy[i].mean():.1%}",
        )
        rows.append(row)
    return (
        f"{result.networks} networks of each width: {len(result.rates)} learning rates, "
        f"{result.accuracy.shape[-1]} seeds; {result.epochs} epochs; jax {jax.__version__} on "
        f"{jax.devices()[0].platform}\n\n{aligned(rows, '>' * len(rows[0]))}\n\n"
        f"s: of all {result.networks}, compilation included; scikit-learn: {result.theirs.shape[1]} "
        f"timed, × {result.networks}; its test: mean accuracy of those, ours there: at the same rates\n\n"
        f"{finding(result)}."
    )


def draw(result: Result) -> Figure:
    titles = ("Test accuracy, mean of the seeds", "Mean and range of the seeds", "Time to train all networks")
    figure, (heat, curves, times) = panels(finding(result), titles)
    draw_heat_map(heat, result)
    for i, w in enumerate(result.widths):
        color = f"C{i}"
        accuracy = result.accuracy[i]
        curves.plot(result.rates, accuracy.mean(axis=1), "o-", color=color, markersize=3, label=f"w = {w}")
        low, high = accuracy.min(axis=1), accuracy.max(axis=1)
        curves.fill_between(result.rates, low, high, color=color, alpha=0.15, linewidth=0)
    curves.set(xlabel="learning rate η", ylabel="test digits read correctly", ylim=(0, 1.02))
    curves.set_xscale("log", base=2)
    curves.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    curves.legend(loc="lower center", fontsize=8)

    places = np.arange(len(result.widths))
    ours = times.bar(places - 0.2, result.seconds, 0.4, label="fit_ensemble, with compilation")
    label = f"scikit-learn, extrapolated from {result.theirs.shape[1]}"
    theirs = times.bar(places + 0.2, result.their_seconds, 0.4, label=label)
    for bars in (ours, theirs):
        times.bar_label(bars, fmt="{:.3g}", fontsize=8)
    times.set_xticks(places, [str(w) for w in result.widths])
    highest = max(result.seconds.max(), result.their_seconds.max())
    times.set(
        yscale="log",
        xlabel="width w",
        ylabel=f"seconds for {result.networks} networks",
        ylim=(None, 6 * highest),
    )
    times.legend(fontsize=8, loc="upper left")
    return figure


def draw_heat_map(axes: Axes, result: Result) -> None:
    """Widths upwards, rates to the right, a number in each cell where there is room, the best one marked."""
    mean = result.mean
    axes.grid(False)
    image = axes.imshow(mean, aspect="auto", origin="lower", cmap="viridis", vmin=0.1, vmax=1)
    colorbar = axes.figure.colorbar(image, ax=axes)
    colorbar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    for i, row in enumerate(mean):
        for j, accuracy in enumerate(row):
            weight = "bold" if j == result.best[i] else "normal"
            color = "black" if accuracy > 0.6 else "white"
            text = f"{100 * accuracy:.0f}"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7, weight=weight)
    axes.plot(result.best, np.arange(len(mean)), "s", markersize=15, markerfacecolor="none", color="tab:red")
    axes.set_yticks(np.arange(len(mean)), [str(w) for w in result.widths])
    shown = np.arange(0, len(result.rates), max(1, len(result.rates) // 5))
    axes.set_xticks(shown, [f"$2^{{{np.log2(rate):.0f}}}$" for rate in result.rates[shown]])
    axes.set(xlabel="learning rate η (square: the best)", ylabel="width w")


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    result = measure(flags)
    print(report(result))
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
