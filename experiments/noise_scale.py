"""Does the noise of the gradient predict the largest batch that is still efficient?

    python -m experiments.noise_scale        (--help lists the flags)

Where every example's gradient g_n scatters about their mean G with the covariance Σ, a batch of

    B_simple = tr Σ / ‖G‖²

has as much noise as signal: the simple noise scale. Larger batches should save few steps, smaller ones waste
few examples. With S(B) steps to a training loss and E = S B examples the theory says

    (S/S_min - 1) (E/E_min - 1) = 1,   that is S = S_min + E_min/B,   B_crit = E_min / S_min ≈ B_simple,

and at B = B_crit both are twice their least.

- S: a network 64-32-10 (relu, softmax cross-entropy) on the handwritten digits, plain stochastic gradient
  descent, the best learning rate of each B, medians over runs: all counted by `batch_size.count_steps`.
- S_min and E_min: fitted to S(B), least squares of log S. Beside it, without any theory: the batch size at
  which the examples are twice the fewest.
- B_simple: `fnn.fit(..., record={"parts": fnn.noise_scale_parts})` in runs at two batch sizes and their best
  rates, up to the median step of the target. Averages of both parts over runs and steps are divided once.
  "run": over all these steps; "end": over the last quarter of them.

The parts estimate the noise and the signal of what the examples are a sample of. The training loss knows its
N = 1437 alone, whose ‖G‖² is larger: in batches drawn from them without replacement the mean of the first
part is s² = Σ_n ‖g_n - G‖² / (N - 1), that of the second ‖G‖² - s²/N (Cochran 1977, §2.5). So here B_simple =
s² / ‖G‖², with s²/N added to the second part. Both means are checked against s² and ‖G‖² of all examples,
from `fnn.example_gradients` in float64.

Expected answer: averaged over a run, within a factor of 2; at the moment when the target is reached, no.

    loss to reach   B_crit   examples double at   B_simple, run   B_simple, end
    0.3                 50                   64              44      102 to 103
    0.1                109                  118        62 to 74      196 to 241
    0.03               102                  172        84 to 99      225 to 509
    0.01                71                  145       92 to 106      177 to 528

(B_simple from runs with batches of 16 and of 64.) The average over a run is 0.57 to 1.5 times B_crit, the
end's 1.8 to 7.4 times (--seed 1: 0.6 to 1.5, and 1.5 to 7.6): the noise scale rises along a run. The law
itself holds within a factor of 1.5. Its bend is too wide: up to B = 16 the best rate is proportional to B and
no example is wasted, at 128 the steps to 0.03 and 0.01 are 0.75 and 0.70 of the fit, and from 256 on few are
saved. The estimates from 4000 batches of 32 are the truth within a standard error, B_simple 190.6 for 193.6;
the mean of the batches' own ratios would be 235.6.

Source: McCandlish et al. (2018), *An Empirical Model of Large-Batch Training*, arXiv:1812.06162, §2 and
appendices A.1 (the estimate) and C (how it depends on the learning rate).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

import fnn
from experiments import batch_size, command, digits
from experiments.batch_size import N, cost
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, N)
QUICK_SIZES, QUICK_TARGETS = (4, 64, N), (0.3, 0.1)
# Batch sizes in whose runs the noise is measured. N mod m is not 1: one example shows no variance.
MEASURED = (16, 64)
CHECKED_SIZE = 32  # of the batches that are checked against all examples
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")


@dataclass(frozen=True)
class Flags(command.Flags):
    """Compares the gradient's noise scale with the batch sizes that are efficient."""

    targets: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01)
    """Training losses to reach, in nats per digit, at most five."""
    runs: int = 9
    """Runs of each setting, an odd number so that one is the median."""
    draws: int = 4000
    """Batches drawn to check the estimates."""
    quick: bool = False
    """Three batch sizes, targets 0.3 and 0.1, at most 3 runs and 500 draws."""

    def check(self) -> None:
        super().check()
        expect("--targets", "one to five numbers", self.targets, 1 <= len(self.targets) <= len(COLORS))
        for target in self.targets:
            expect("--targets", "numbers from 0.01 to 1", target, 0.01 <= target <= 1)
        expect("--runs", "an odd integer of at least 1", self.runs, self.runs >= 1 and self.runs % 2 == 1)
        expect("--draws", "an integer of at least 2", self.draws, self.draws >= 2)


class Parts(NamedTuple):
    """`fnn.noise_scale_parts` of many batches."""

    trace: np.ndarray
    squared_norm: np.ndarray

    def scale(self) -> float:
        """s² / ‖G‖² of the N examples that the batches were drawn from: averages, divided once."""
        return scale_of(self.trace.mean(), self.squared_norm.mean())


class Check(NamedTuple):
    """The estimates from batches at fixed parameters, and the truth."""

    parts: Parts  # of every batch
    trace: float  # s² of all examples
    squared_norm: float  # ‖G‖²

    def apart(self) -> tuple[float, float]:
        """The means less the truth, of s² and ‖G‖², in standard errors of the means."""
        signal = self.parts.squared_norm + self.parts.trace / N
        return in_errors(self.parts.trace, self.trace), in_errors(signal, self.squared_norm)


class Target(NamedTuple):
    """Everything about one loss to reach."""

    loss: float
    sizes: np.ndarray  # B
    rates: np.ndarray  # the best learning rate of each B
    steps: np.ndarray  # (B, runs), at that rate
    noise: dict[int, Parts]  # of the runs with batches of a size, (runs, steps), up to the target

    @property
    def medians(self) -> np.ndarray:
        return np.median(self.steps, axis=1)


def scale_of(trace: float, squared_norm: float) -> float:
    """s² / ‖G‖² from the means of the two parts, the second of which is ‖G‖² - s²/N."""
    return float(trace / (squared_norm + trace / N))


def in_errors(estimates: np.ndarray, truth: float) -> float:
    error = estimates.std(ddof=1) / np.sqrt(len(estimates))
    return float((estimates.mean() - truth) / error)


def fit(sizes: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """S_min and E_min of S = S_min + E_min/B, with the least sum of squares of log S: Gauss-Newton."""
    logs = np.log([steps.min(), (steps * sizes).min()])
    for _ in range(100):
        terms = logs - np.outer(np.log(sizes), (0, 1))  # log S_min and log E_min/B
        predicted = np.logaddexp(*terms.T)
        slopes = np.exp(terms - predicted[:, None])
        logs = logs + np.linalg.lstsq(slopes, np.log(steps) - predicted, rcond=None)[0]
    return float(np.exp(logs[0])), float(np.exp(logs[1]))


def doubling(sizes: np.ndarray, steps: np.ndarray) -> float:
    """The batch size from which on the examples are at least twice the fewest; between sizes, by logs."""
    examples = np.log(steps * sizes)
    limit = examples.min() + np.log(2)
    last = np.flatnonzero(examples < limit).max()
    if last + 1 == len(sizes):
        return float(sizes[-1])
    return float(np.exp(np.interp(limit, examples[last : last + 2], np.log(sizes[last : last + 2]))))


def factor(numbers: Any, others: Any) -> tuple[float, float]:
    """The smallest and the largest ratio of one to the other."""
    ratios = np.divide(numbers, others)
    return ratios.min(), ratios.max()


@jax.jit
def every_gradient(params, X, y):
    return fnn.example_gradients(fnn.backprop(cost, params, X, y))


def truth(params, X: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """s² and ‖G‖² from every example's gradient, written out in float64."""
    with jax.enable_x64(True):
        wide, X = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, X))
        leaves = jax.tree.leaves(jax.device_get(every_gradient(wide, X, y)))
    gradients = np.concatenate([leaf.reshape(len(y), -1) for leaf in leaves], axis=1)
    G = gradients.mean(axis=0)
    return float(((gradients - G) ** 2).sum() / (len(y) - 1)), float((G**2).sum())


@partial(jax.jit, static_argnames=("draws",))
def draw_parts(params, X, y, key, draws: int):
    """`fnn.noise_scale_parts` of so many random batches, each without replacement."""

    def one(key):
        rows = jax.random.permutation(key, len(y))[:CHECKED_SIZE]
        return fnn.noise_scale_parts(fnn.backprop(cost, params, X[rows], y[rows]))

    return jax.lax.map(one, jax.random.split(key, draws), batch_size=100)


def check_estimate(params, data, draws: int, key: jax.Array) -> Check:
    parts = draw_parts(params, *data, key, draws)
    return Check(Parts(*(np.asarray(part, np.float64) for part in parts)), *truth(params, *data))


def record_noise(m: int, rate: float, steps: int, starts, data, key: jax.Array) -> Parts:
    """The parts of every step of one run from each start, (runs, steps)."""
    optimizer, rows = optax.sgd(rate), []
    for run, params in enumerate(starts):
        history = fnn.fit(
            cost,
            optimizer,
            params,
            data,
            key=jax.random.fold_in(key, run),
            epochs=-(-steps // -(-N // m)),
            batch_size=m,
            record={"parts": fnn.noise_scale_parts},
            progress=False,
        )
        rows.append(history.records["parts"])
    trace, squared_norm = (np.asarray(part, np.float64)[:, :steps] for part in zip(*rows, strict=True))
    return Parts(trace, squared_norm)


def until(parts: Parts, steps: float, since: float = 0) -> Parts:
    """The steps from `since` to `steps`, both as counted from the start of the runs."""
    return Parts(*(part[:, int(since) : int(steps)] for part in parts))


def run_and_end(target: Target, m: int) -> tuple[float, float]:
    """B_simple over the whole of the runs to the target, and over the last quarter of their steps."""
    parts = target.noise[m]
    steps = parts.trace.shape[1]
    return parts.scale(), until(parts, steps, 3 * steps // 4).scale()


def measure(flags: Flags) -> tuple[Check, list[Target]]:
    sizes, targets, runs, draws = SIZES, flags.targets, flags.runs, flags.draws
    if flags.quick:
        sizes, targets, runs, draws = QUICK_SIZES, QUICK_TARGETS, min(runs, 3), min(draws, 500)
    (X, y), _ = digits.load(flags.seed)
    data = jnp.asarray(digits.standardised(X, X)), jnp.asarray(y)
    key = jax.random.key(flags.seed)
    keys = jax.random.split(jax.random.fold_in(key, 0), runs)
    params = jax.jit(jax.vmap(batch_size.initial_params))(keys)
    starts = [jax.tree.map(lambda leaf: leaf[run], params) for run in range(runs)]

    # Checked after one epoch of batches of 32: neither at the start nor where the gradient has vanished.
    state = fnn.train_state(optax.sgd(0.1), starts[0], jax.random.fold_in(key, 1))
    epoch = batch_size.batches(np.random.default_rng(flags.seed), 32, N // 32)
    state = batch_size.train(jnp.float32(0.1), state, data, epoch)
    check = check_estimate(state.params, data, draws, jax.random.fold_in(key, 2))

    counted = {
        t: [batch_size.count_steps(m, t, params, keys, data, flags.seed) for m in sizes] for t in targets
    }
    measured = [m for m in MEASURED if m in sizes]
    needed = {}  # (m, rate) -> the most steps that a target takes with it
    for m in measured:
        for counts in counted.values():
            rate, steps = counts[sizes.index(m)]
            needed[m, rate] = max(int(np.median(steps)), needed.get((m, rate), 0))
    noise_key = jax.random.fold_in(key, 3)
    recorded = {
        (m, rate): record_noise(m, rate, steps, starts, data, noise_key)
        for (m, rate), steps in needed.items()
    }
    results = []
    for target, counts in counted.items():
        rates, steps = np.array([rate for rate, _ in counts]), np.stack([steps for _, steps in counts])
        noise = {}
        for m in measured:
            i = sizes.index(m)
            noise[m] = until(recorded[m, counts[i][0]], np.median(steps[i]))
        results.append(Target(target, np.array(sizes), rates, steps, noise))
    return check, results


def finding(targets: Sequence[Target]) -> str:
    critical = [E_min / S_min for S_min, E_min in (fit(t.sizes, t.medians) for t in targets)]
    scales = np.array([[run_and_end(t, m) for t in targets] for m in targets[0].noise])  # (m, targets, 2)
    run, end = (factor(scales[:, :, i], critical) for i in (0, 1))
    return (
        f"The noise scale averaged over a run is {run[0]:.2g} to {run[1]:.2g} times the critical batch size,"
        f"\nat the end of the run {end[0]:.2g} to {end[1]:.2g} times"
    )


def report(check: Check, targets: Sequence[Target]) -> str:
    parts = check.parts
    signal = parts.squared_norm.mean() + parts.trace.mean() / N
    ratio = np.mean(parts.trace / (parts.squared_norm + parts.trace / N))
    apart = check.apart()
    lines = [
        f"{len(parts.trace)} batches of {CHECKED_SIZE} after one epoch, against all {N} examples in float64:",
        f"  s²    {parts.trace.mean():.4g}, truth {check.trace:.4g}: {apart[0]:+.1f} standard errors",
        f"  ‖G‖²  {signal:.4g}, truth {check.squared_norm:.4g}: {apart[1]:+.1f} standard errors",
        f"  B_simple {parts.scale():.1f}, truth {check.trace / check.squared_norm:.1f}; "
        f"the mean of the batches' ratios would be {ratio:.1f}",
        "",
    ]
    rows = [["B", *(cell for t in targets for cell in (f"η, loss {t.loss:g}", "steps", "examples", "/ fit"))]]
    for i, m in enumerate(targets[0].sizes):
        row = [f"{m}"]
        for t in targets:
            S_min, E_min = fit(t.sizes, t.medians)
            S = t.medians[i]
            row += [f"{t.rates[i]:.3g}", f"{S:.0f}", f"{S * m:.0f}", f"{S / (S_min + E_min / m):.2f}"]
        rows.append(row)
    lines += [aligned(rows, ">" * len(rows[0])), ""]
    head = ["loss", "S_min", "E_min", "B_crit", "examples double at"]
    rows = [[*head, *(f"B_simple {part}, B = {m}" for m in targets[0].noise for part in ("run", "end"))]]
    for t in targets:
        S_min, E_min = fit(t.sizes, t.medians)
        cells = [f"{t.loss:g}", f"{S_min:.3g}", f"{E_min:.4g}", f"{E_min / S_min:.0f}"]
        cells += [f"{doubling(t.sizes, t.medians):.0f}"]
        rows.append(cells + [f"{scale:.0f}" for m in t.noise for scale in run_and_end(t, m)])
    lines += [aligned(rows, ">" * len(rows[0])), "", finding(targets) + "."]
    return "\n".join(lines)


def draw(targets: Sequence[Target]) -> Figure:
    titles = (
        "Noise scale along training",
        f"Steps to a training loss: median of {targets[0].steps.shape[1]} runs",
        "Steps against examples",
        "Noise scale against critical batch size",
    )
    figure, (noise_axes, steps_axes, plane_axes, scale_axes) = panels(finding(targets), titles, columns=2)
    for axes in (noise_axes, steps_axes, plane_axes, scale_axes):
        axes.set(xscale="log", yscale="log")

    longest = max(targets, key=lambda t: t.medians[0])
    for m, color in zip(longest.noise, COLORS, strict=False):
        parts = longest.noise[m]
        total = parts.trace.shape[1]
        edges = np.unique(np.geomspace(1, total, 13).astype(int))
        pieces = list(zip((0, *edges[1:-1]), edges[1:], strict=True))
        scales = [until(parts, last, first).scale() for first, last in pieces]
        middles = [m * (first + last) / 2 for first, last in pieces]
        label = f"batches of {m}, η = {longest.rates[list(longest.sizes).index(m)]:g}"
        noise_axes.plot(middles, scales, "o-", color=color, markersize=4, label=label)
    noise_axes.set(xlabel="examples used", ylabel="$B_{simple}$ = s²/‖G‖² (digits)")
    noise_axes.legend()

    for t, color in zip(targets, COLORS, strict=False):
        S_min, E_min = fit(t.sizes, t.medians)
        B = np.geomspace(t.sizes[0], t.sizes[-1], 200)
        spread = np.abs(np.array([t.steps.min(axis=1), t.steps.max(axis=1)]) - t.medians)
        steps_axes.errorbar(
            t.sizes, t.medians, spread, fmt="o", markersize=4, color=color, label=f"{t.loss:g}"
        )
        steps_axes.plot(B, S_min + E_min / B, color=color, linewidth=1)
        steps_axes.plot(E_min / S_min, 2 * S_min, "*", color=color, markersize=13, markeredgecolor="black")
        plane_axes.plot(t.medians / S_min, t.medians * t.sizes / E_min, "o", markersize=4, color=color)
    steps_axes.plot([], [], "k-", linewidth=1, label="$S_{min} + E_{min}/B$")
    steps_axes.plot([], [], "*", color="white", markeredgecolor="black", markersize=13, label="$B_{crit}$")
    steps_axes.set(xlabel="batch size B (digits)", ylabel="steps S")
    steps_axes.legend(title="loss (nats)", alignment="left")
    S = 1 + np.geomspace(0.002, 500, 300)
    plane_axes.plot(
        S, 1 + 1 / (S - 1), color="black", linewidth=1, label="$(S/S_{min} - 1)\\,(E/E_{min} - 1) = 1$"
    )
    plane_axes.plot(2, 2, "*", color="white", markeredgecolor="black", markersize=13)
    plane_axes.set(xlabel="S / $S_{min}$", ylabel="E / $E_{min}$", xlim=(0.5, 300), ylim=(0.5, 60))
    plane_axes.legend()

    losses = [t.loss for t in targets]
    fits = [fit(t.sizes, t.medians) for t in targets]
    critical = [E_min / S_min for S_min, E_min in fits]
    scale_axes.plot(losses, critical, "k*-", markersize=12, label="$B_{crit}$, fitted")
    doubled = [doubling(t.sizes, t.medians) for t in targets]
    scale_axes.plot(losses, doubled, "kx:", label="examples are twice the fewest")
    for m, color in zip(longest.noise, COLORS, strict=False):
        run, end = zip(*(run_and_end(t, m) for t in targets), strict=True)
        scale_axes.plot(losses, run, "o-", color=color, label=f"$B_{{simple}}$, run, batches of {m}")
        scale_axes.plot(
            losses, end, "o--", color=color, mfc="white", label=f"$B_{{simple}}$, end, batches of {m}"
        )
    scale_axes.set(xlabel="training loss to reach (nats per digit)", ylabel="batch size (digits)")
    scale_axes.set_ylim(top=10 * scale_axes.get_ylim()[1])  # room for the legend
    scale_axes.invert_xaxis()
    scale_axes.legend(fontsize=8)
    for axes, locations in ((steps_axes, (1, 4, 16, 64, 256, N)), (scale_axes, sorted(losses))):
        axes.xaxis.set_major_locator(FixedLocator(locations))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for axes in (noise_axes, scale_axes, plane_axes, steps_axes):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axes is not steps_axes else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    check, targets = measure(flags)
    print(report(check, targets))
    return draw(targets)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
