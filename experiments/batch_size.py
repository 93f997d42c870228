"""Which batch size reaches a training loss soonest, and how noisy is the gradient of a small batch?

    python -m experiments.batch_size        (--help lists the flags)

A network 64-32-10 (relu, softmax cross-entropy) learns the handwritten digits by plain stochastic gradient
descent, with batches of m = 1, 2, 4, ..., 1437 digits, the last one all of them.

    time to target = steps to target (counted) × time per step (measured)

- Learning rate: for each m the one of a grid, factors of 2 apart, whose median run needs the fewest steps.
- Steps: the loss on the whole training set is evaluated after every 32 digits, or after every step of a
  batch of 32 or more; the first evaluation at or below the target counts. Medians over runs that differ in
  initial weights and order of the digits.
- Time: a compiled scan of many steps of one network, warm, each step reading its batch from the data and
  updating the weights, without evaluations; batch sizes take turns, and the median counts.

The mean gradient of m out of N examples, drawn without replacement, has the variance (Cochran 1977, §2.5)

    E‖g_B - ∇C‖² = (s²/m) (N - m)/(N - 1),   s² = (1/N) Σ_n ‖g_n - ∇C‖².

s² needs no gradient of a single example: g_n = δ_n a_nᵀ has ‖g_n‖² = Σ_l ‖δ^l_n‖² (‖a^{l-1}_n‖² + 1), and
a and δ come from one `fnn.backprop`. Nor do batches: the same sweep with other weights is any batch's
gradient.

Expected answer: batches of 32 to 128, which hardly differ: 1.1 ms, the least at 32 or 128 over seeds 0 to 3.
Twice the batch with twice the rate halves the steps, 2976 at m = 1 and 190 at m = 16; from m = 128 on nothing
is saved, 33 to 36 steps, and the best rate stays at 2. A step takes 2 µs at m = 1, 11 µs at 32 and 400 to
500 µs at 1437 (2 CPU cores), so one digit at a time takes 5 to 6 times as long as the best batch, and all
digits at once 12 to 15 times. The variance is the theory's within 2 standard errors, and 0 for the whole
set.

Sources: Nielsen (2015), ch. 3, on the choice of the mini-batch size; Goyal et al. (2017), learning rate
proportional to m; McCandlish et al. (2018), the noise scale s²/‖∇C‖², beyond which larger batches pay less.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

import fnn
from experiments import command, digits
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

N = digits.TRAINING_DIGITS
SIZES = (*(2**k for k in range(11)), N)
QUICK_SIZES = (1, 16, 256, N)
# From 1/64 to 4: the best rate is inside for every batch size (the table shows it).
RATES = tuple(2.0**k for k in range(-6, 3))
EVERY = 32  # digits from one evaluation to the next, where a batch is not larger
EVALUATIONS = 500  # at most; for target 0.01, the lowest allowed, 163 were the most needed
TIMED_DIGITS = 2**15  # in one timing, tens of milliseconds, so that a clock tick does not matter

cost = fnn.cost(fnn.mlp(fnn.relu), fnn.softmax_cross_entropy_with_integer_labels)


@dataclass(frozen=True)
class Flags(command.Flags):
    """Finds the batch size that reaches a training loss soonest, and the noise of its gradient."""

    target: float = 0.03
    """Training loss to reach, in nats per digit."""
    runs: int = 9
    """Runs of each setting, an odd number so that one is the median."""
    repetitions: int = 15
    """Timings of each batch size."""
    draws: int = 1000
    """Batches drawn to measure the variance."""
    quick: bool = False
    """Four batch sizes, target 0.1, at most 3 runs, 3 timings and 200 draws."""

    def check(self) -> None:
        super().check()
        expect("--target", "a number from 0.01 to 1", self.target, 0.01 <= self.target <= 1)
        expect("--runs", "an odd integer of at least 1", self.runs, self.runs >= 1 and self.runs % 2 == 1)
        expect("--repetitions", "an integer of at least 1", self.repetitions, self.repetitions >= 1)
        expect("--draws", "an integer of at least 2", self.draws, self.draws >= 2)


class Noise(NamedTuple):
    """The gradient of a batch at fixed parameters."""

    variance: np.ndarray  # E‖g_B - ∇C‖² for each batch size, a mean over draws
    error: np.ndarray  # its standard error
    theory: np.ndarray
    squared_gradient: float  # ‖∇C‖²
    scale: float  # s² / ‖∇C‖²


class Result(NamedTuple):
    target: float
    sizes: np.ndarray  # m
    rates: np.ndarray  # the best learning rate of each m
    steps: np.ndarray  # (m, runs), at that rate
    seconds: np.ndarray  # (m, repetitions), of one step
    noise: Noise

    @property
    def seconds_to_target(self) -> np.ndarray:
        """Product of the medians, for each m."""
        return np.median(self.steps, axis=1) * np.median(self.seconds, axis=1)

    @property
    def quartiles_to_target(self) -> np.ndarray:
        """Lower and upper quartile over every run with every timing, (2, m)."""
        products = self.steps[:, :, None] * self.seconds[:, None, :]
        return np.quantile(products.reshape(len(self.sizes), -1), (0.25, 0.75), axis=1)

    @property
    def soonest(self) -> np.ndarray:
        """The sizes that may take the least time: their quartiles meet those of the one that does."""
        low, high = self.quartiles_to_target
        return self.sizes[low <= high[np.argmin(self.seconds_to_target)]]


def initial_params(key):
    return fnn.init(key, (64, 32, 10), weights=fnn.he_normal, dtype=jnp.float32)


def batches(rng: np.random.Generator, m: int, steps: int) -> np.ndarray:
    """The rows of every step, (steps, m): epochs in fresh random orders, each without its last N mod m."""
    in_epoch = N // m
    epochs = -(-steps // in_epoch)
    orders = rng.permuted(np.tile(np.arange(N, dtype=np.int32), (epochs, 1)), axis=1)
    return orders[:, : in_epoch * m].reshape(-1, m)[:steps]


@jax.jit
def train(rate, state, data, rows):
    """The state after a step on each batch, as one scan."""

    def step(state, batch):
        return fnn.train_step(cost, optax.sgd(rate), state, *(a[batch] for a in data))[0], None

    return jax.lax.scan(step, state, rows)[0]


@jax.jit
def steps_to_target(rates, params, keys, data, rows, target):
    """Steps until the training loss is at most the target, (rates, runs); inf where it was not seen.

    rows: (runs, evaluations, steps between them, m)

    Stops when every run has reached the target at the rate whose median run was the first.
    """
    runs, evaluations, between, _ = rows.shape

    def fresh(rate, params, key):
        return fnn.train_state(optax.sgd(rate), params, key)

    def train_and_evaluate(rate, state, rows):
        state = train(rate, state, data, rows)
        return state, cost(state.params, *data)

    def each(f, runs_of):
        """f for every rate and run; arguments after the first two have an axis of runs alone."""
        return jax.vmap(jax.vmap(f, (None, 0, 0)), (0, *runs_of))

    def go_on(carry):
        evaluation, _, steps = carry
        median = jnp.sort(steps, axis=1)[:, runs // 2]
        return (evaluation < evaluations) & ~jnp.isfinite(steps[jnp.argmin(median)]).all()

    def body(carry):
        evaluation, states, steps = carry
        states, losses = each(train_and_evaluate, (0, None))(rates, states, rows[:, evaluation])
        now = ((evaluation + 1) * between).astype(jnp.float32)
        return evaluation + 1, states, jnp.where((losses <= target) & jnp.isinf(steps), now, steps)

    states = each(fresh, (None, None))(rates, params, keys)
    steps = jnp.full((len(rates), runs), jnp.inf, jnp.float32)
    return jax.lax.while_loop(go_on, body, (jnp.int32(0), states, steps))[2]


def count_steps(m: int, target: float, params, keys, data, seed: int) -> tuple[float, np.ndarray]:
    """The best learning rate for batches of m, and the steps of every run at that rate."""
    between = max(1, EVERY // m)
    orders = [np.random.default_rng((seed, m, run)) for run in range(len(keys))]
    rows = np.stack([batches(order, m, EVALUATIONS * between) for order in orders])
    rows = rows.reshape(len(keys), EVALUATIONS, between, m)
    rates = np.asarray(RATES, np.float32)
    steps = np.asarray(steps_to_target(rates, params, keys, data, rows, np.float32(target)))
    best = np.argmin(np.median(steps, axis=1))
    if not np.isfinite(steps[best]).all():
        raise RuntimeError(f"batch_size: with batches of {m}, loss {target} was not reached at any rate.")
    return RATES[best], steps[best]


def time_steps(sizes: Sequence[int], rates: Sequence[float], state, data, repetitions: int) -> np.ndarray:
    """Seconds of one step, (sizes, repetitions)."""
    runs = []
    for m, rate in zip(sizes, rates, strict=True):
        rows = jnp.asarray(batches(np.random.default_rng(0), m, max(16, min(TIMED_DIGITS // m, 4096))))
        runs.append((partial(train, jnp.float32(rate), state, data, rows), len(rows)))
    for run, _ in runs:
        jax.block_until_ready(run())  # compiles
    seconds = np.empty((len(sizes), repetitions))
    for repetition in range(repetitions):  # in turns, so that a busy spell of the machine hits all sizes
        for i, (run, steps) in enumerate(runs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[i, repetition] = (time.perf_counter() - start) / steps
    return seconds


def squared_norms(sweep: fnn.Sweep) -> jax.Array:
    """‖g_n‖² of every example, from ‖δ aᵀ‖² = ‖δ‖² ‖a‖², and ‖δ‖² for the bias."""
    pairs = zip(sweep.inputs, sweep.errors, strict=True)
    terms = [(delta**2).sum(axis=1) * ((a**2).sum(axis=1) + 1) for a, delta in pairs]
    return jnp.stack(terms).sum(axis=0)


def squared_norm(tree) -> jax.Array:
    return jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)]).sum()


@jax.jit
def total_variance(sweep: fnn.Sweep) -> tuple[jax.Array, jax.Array]:
    """‖∇C‖², and s² = (1/N) Σ_n ‖g_n‖² - ‖∇C‖²."""
    squared_gradient = squared_norm(fnn.gradient(sweep))
    return squared_gradient, squared_norms(sweep).mean() - squared_gradient


def batch_gradient_error(sweep: fnn.Sweep, in_batch: jax.Array) -> jax.Array:
    """‖g_B - ∇C‖² for a batch B, given as a mask over the sweep's examples.

    g_B - ∇C = Σ_n (1[n ∈ B]/m - 1/N) g_n: the sweep's gradient with these weights.
    """
    mask = in_batch.astype(sweep.weights.dtype)
    return squared_norm(fnn.gradient(replace(sweep, weights=mask / mask.sum() - 1 / len(mask))))


def theory(s2: float, sizes: np.ndarray, n: int) -> np.ndarray:
    """Variance of the mean of m out of n, drawn without replacement; s2 with divisor n."""
    return s2 / sizes * (n - sizes) / (n - 1)


@jax.jit
def draw_errors(sweep: fnn.Sweep, keys: jax.Array, sizes: jax.Array) -> jax.Array:
    """‖g_B - ∇C‖² of a random batch of each size for each key, (keys, sizes)."""

    def draw(key, m):
        place = jax.random.permutation(key, len(sweep.losses))  # of every example in a random order
        return batch_gradient_error(sweep, place < m)

    return jax.lax.map(lambda key: jax.vmap(draw)(jax.random.split(key, len(sizes)), sizes), keys)


def measure_noise(sweep: fnn.Sweep, sizes: np.ndarray, draws: int, key: jax.Array) -> Noise:
    errors = np.asarray(draw_errors(sweep, jax.random.split(key, draws), sizes), np.float64)
    squared_gradient, s2 = map(float, total_variance(sweep))
    return Noise(
        errors.mean(axis=0),
        errors.std(axis=0, ddof=1) / np.sqrt(draws),
        theory(s2, sizes, len(sweep.losses)),
        squared_gradient,
        s2 / squared_gradient,
    )


def measure(flags: Flags) -> Result:
    sizes, target, runs, repetitions, draws = SIZES, flags.target, flags.runs, flags.repetitions, flags.draws
    if flags.quick:
        sizes, target = QUICK_SIZES, max(target, 0.1)
        runs, repetitions, draws = min(runs, 3), min(repetitions, 3), min(draws, 200)
    (X, y), _ = digits.load(flags.seed)
    data = jnp.asarray(digits.standardised(X, X)), jnp.asarray(y)
    key = jax.random.key(flags.seed)
    keys = jax.random.split(jax.random.fold_in(key, 0), runs)
    params = jax.jit(jax.vmap(initial_params))(keys)
    counted = [count_steps(m, target, params, keys, data, flags.seed) for m in sizes]
    rates = [rate for rate, _ in counted]

    state = fnn.train_state(optax.sgd(0.1), jax.tree.map(lambda a: a[0], params), jax.random.fold_in(key, 1))
    seconds = time_steps(sizes, rates, state, data, repetitions)
    # The noise after one epoch of batches of 32: neither at the start nor where the gradient has vanished.
    epoch = batches(np.random.default_rng(flags.seed), 32, N // 32)
    state = train(jnp.float32(0.1), state, data, epoch)
    sweep = jax.jit(partial(fnn.backprop, cost))(state.params, *data)
    noise = measure_noise(sweep, np.array(sizes), draws, jax.random.fold_in(key, 2))
    steps = np.stack([steps for _, steps in counted])
    return Result(target, np.array(sizes), np.array(rates), steps, seconds, noise)


def where() -> str:
    device = jax.devices()[0]
    cores = f" ({os.cpu_count()} cores)" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, jax {jax.__version__}"


def finding(result: Result) -> str:
    best = np.argmin(result.seconds_to_target)
    steps, seconds = np.median(result.steps[best]), np.median(result.seconds[best])
    first, last = result.soonest[[0, -1]]
    sizes = f"{first} reach the loss soonest,"
    if first < last:
        sizes = f"{first} to {last} reach the loss soonest; {result.sizes[best]}"
    spent = f"{steps:.0f} steps of {1e6 * seconds:.3g} µs, {1e3 * steps * seconds:.2g} ms"
    return f"Batches of {sizes} in {spent}"


def report(result: Result) -> str:
    noise, to_target = result.noise, result.seconds_to_target
    # lower quartile, median and upper quartile of each size
    seconds = np.quantile(result.seconds, (0.25, 0.5, 0.75), axis=1)
    rows = [("m", "η", "steps (all runs)", "µs per step (quartiles)", "ms to target", "variance", "/ theory")]
    for i, m in enumerate(result.sizes):
        steps, (low, median, high) = result.steps[i], 1e6 * seconds[:, i]
        ratio = "both 0"
        if noise.theory[i]:
            ratio = f"{noise.variance[i] / noise.theory[i]:.3f} ± {noise.error[i] / noise.theory[i]:.3f}"
        row = (
            f"{m}",
            f"{result.rates[i]:.3g}",
            f"{np.median(steps):.0f} ({steps.min():.0f} to {steps.max():.0f})",
            f"{median:.3g} ({low:.3g} to {high:.3g})",
            f"{1e3 * to_target[i]:.3g}",
            f"{noise.variance[i]:.3g}",
            ratio,
        )
        rows.append(row)
    runs, repetitions = result.steps.shape[1], result.seconds.shape[1]
    return (
        f"Training loss {result.target:g}; {runs} runs, {repetitions} timings; {where()}\n\n"
        f"{aligned(rows, '>>>>>>>')}\n\n"
        f"{finding(result)}.\n"
        f"m = 1 takes {to_target[0] / to_target.min():.1f} times as long, "
        f"m = {N} takes {to_target[-1] / to_target.min():.1f} times.\n"
        f"Where the variance was measured s²/‖∇C‖² = {noise.scale:.0f}: "
        "the gradient of a batch much smaller than that is mostly noise."
    )


def draw(result: Result) -> Figure:
    sizes, steps, noise = result.sizes, np.median(result.steps, axis=1), result.noise
    titles = (
        f"Time per step: {where()}",
        f"Steps to a training loss of {result.target:g}",
        "Time to target = steps × time per step",
        "Variance of the gradient of a batch",
    )
    figure, axes = panels(finding(result), titles, columns=2)
    time_axes, steps_axes, target_axes, noise_axes = axes
    for panel in axes:
        panel.set(xscale="log", yscale="log", xlabel="batch size m (digits)", xlim=(0.75, 2000))
        panel.xaxis.set_major_locator(FixedLocator([1, 4, 16, 64, 256, N]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for panel in axes[:3]:
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))

    micro = 1e6 * np.quantile(result.seconds, (0.25, 0.5, 0.75), axis=1)
    label = f"median of {result.seconds.shape[1]} timings, and quartiles"
    time_axes.errorbar(sizes, micro[1], np.abs(micro[[0, 2]] - micro[1]), fmt="o-", label=label)
    time_axes.set(ylabel="time per step (µs)")
    time_axes.legend()
    milli = 1e3 * result.seconds_to_target
    best = np.argmin(milli)
    spread = np.abs(1e3 * result.quartiles_to_target - milli)
    target_axes.errorbar(sizes, milli, spread, fmt="o-", label="medians, and quartiles")
    star = f"least: m = {sizes[best]}"
    target_axes.plot(sizes[best], milli[best], "*", markersize=16, color="tab:red", zorder=3, label=star)
    target_axes.set(ylabel="time to target (ms)", ylim=(milli.min() / 1.8, 3 * milli.max()))
    target_axes.legend(loc="upper center")

    spread = np.abs(np.array([result.steps.min(axis=1), result.steps.max(axis=1)]) - steps)
    label = f"median of {result.steps.shape[1]} runs, range; best η"
    steps_axes.errorbar(sizes, steps, spread, fmt="o-", label=label)
    for m, count, rate in zip(sizes, steps, result.rates, strict=True):
        text = f"{rate:g}" if rate >= 1 else f"1/{1 / rate:g}"
        steps_axes.annotate(text, (m, count), (4, 8), textcoords="offset points", fontsize=8)
    shown = steps[0] / sizes > steps.min() / 2
    steps_axes.plot(sizes[shown], (steps[0] / sizes)[shown], "--", color="0.5", label="∝ 1/m")
    steps_axes.set(ylabel="steps", ylim=(steps.min() / 2.2, 7 * steps.max()))
    steps_axes.legend(loc="upper right")

    m = np.geomspace(1, N - 1, 400)
    noise_axes.plot(m, theory(noise.theory[0], m, N), color="0.5", label="theory: (s²/m) (N - m)/(N - 1)")
    partial_batch = sizes < N  # the whole set has variance 0, which has no place on this axis
    points = [a[partial_batch] for a in (sizes, noise.variance, noise.error)]
    noise_axes.errorbar(*points, fmt="o", label="measured, and standard error")
    noise_axes.axhline(noise.squared_gradient, linestyle=":", color="tab:green", label="‖∇C‖²")
    noise_axes.set(ylabel="E‖$g_B$ - ∇C‖²")
    noise_axes.legend(title=f"measured at m = {N}: {noise.variance[-1]:.3g}", alignment="left")
    return figure


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    result = measure(flags)
    print(report(result))
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
