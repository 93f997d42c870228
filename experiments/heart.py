"""Does gradient descent bend a line into a heart, and does it matter when each gradient is taken?

    python -m experiments.heart        (--help lists the flags; --animation heart.gif writes a film)

A 1-6-7-2 network, sigmoid in every layer, takes a position x = i/100, i = 0..99, along a closed curve to a
point of the plane; x = 1 is left out, as it would count the point of x = 0 twice. Weights and biases begin
unit normal. The cost is the mean over the points of the squared distance to the heart. 10,000 full-batch
steps at learning rate 7, by two rules:

    gradient descent   all six gradients are taken, then all six arrays move
    one by one         W³, W², W¹, b³, b², b¹ in turn, each gradient taken after the arrays before it moved

The second is written easily by accident: `W3 = W3 - rate * J_W3(x, y)`, then a J_W2 that reads the new W3.
It is not gradient descent but block coordinate descent.

Expected answer: both draw the heart, but the rule matters. (Medians over 20 starts, on one machine.)
Gradient descent ends at a cost of 0.0017 with ηλ/2 = 0.98, λ the largest eigenvalue of the cost's Hessian.
Above 1 it overshoots along that eigenvector: it lives at the edge of stability, its cost rises in 17 % of the
steps, and small changes grow. Add 1e-14 to every parameter of the start, in float64: at some later step the
curve is more than 0.01 elsewhere, a hundredth of the picture's width, in 16 of 20 runs, in 4 at the end; only
2 runs keep the change below 1e-10, and only from such a start can a run be repeated to many digits elsewhere.
One by one, the cost ends lower, at 0.0013, with ηλ/2 = 1.9, where gradient descent could not stay, and all 20
runs keep the change below 1e-10.

On one CPU core a start and its twin take 0.4 s by gradient descent and 0.7 s one by one, after 1 and 2 s of
compilation; the whole run takes less than a minute.

Sources: the task, its 100 points and the rate 7 are those of the notebook on backpropagation of *Mathematics
for Machine Learning: Multivariate Calculus* (Imperial College London, Coursera). It takes all six gradients
first, each times a random factor 1 + N(0, 1), here 1, and begins at half of a unit normal. Edge of stability:
Cohen et al. (2021), arXiv:2103.00065. Block coordinate descent: Wright (2015), *Coordinate descent
algorithms*.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.flatten_util import ravel_pytree
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

import fnn
from experiments import command
from experiments.command import expect, expect_file
from experiments.figures import new_figure, panels
from fnn.tables import aligned

NET = fnn.mlp(fnn.sigmoid, output=fnn.sigmoid)
COST = fnn.cost(NET, fnn.squared_error)
SIZES = (1, 6, 7, 2)
ORDER = [(l, name) for name in ("W", "b") for l in (2, 1, 0)]  # W³, W², W¹, b³, b², b¹
POINTS = 100
CHANGE = 1e-14  # of a twin's start: some 50 roundings of a number near 1 in float64
VISIBLE = 1e-2  # a hundredth of the picture's width
STABLE = 1e-10  # the change never grows ten-thousandfold; of 48 runs none lay between 3e-11 and 2e-10
QUICK_STEPS, QUICK_STARTS = 2000, 4
SNAPSHOTS = 120  # geometric in the step; those that round to the same step are one
FRAMES_PER_SECOND = 15  # of the film

Step = Callable[[Any, Any], tuple[Any, Any]]  # (optimizer, params) -> (moved params, cost before)


@dataclass(frozen=True)
class Flags(command.Flags):
    """Bends a line into a heart by gradient descent, and by updates of one array after another."""

    steps: int = 10_000
    """Full-batch steps."""
    learning_rate: float = 7.0
    """Learning rate η."""
    starts: int = 20
    """Random starts; the first is drawn, all are counted."""
    animation: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = (
        None
    )
    """Where a film of the first start goes: .gif."""
    quick: bool = False
    """At most 4 starts and 2,000 steps, for a first look."""

    def check(self) -> None:
        super().check()
        expect("--steps", "an integer of at least 10", self.steps, self.steps >= 10)
        rate = self.learning_rate
        expect("--learning-rate", "a finite number above 0", rate, 0 < rate < inf)
        expect("--starts", "an integer from 1 to 1000", self.starts, 1 <= self.starts <= 1000)
        expect_file("--animation", (".gif",), self.animation)


class Runs(NamedTuple):
    """What one rule does from n starts; curves and sharpness along the path are the first start's."""

    costs: np.ndarray  # (n, steps + 1), before each step and after the last
    apart: np.ndarray  # (n, steps + 1), largest distance between a curve and its twin's, in x or y
    curves: np.ndarray  # (snapshots, 100, 2)
    sharpness: np.ndarray  # (snapshots,), ηλ/2
    final_sharpness: np.ndarray  # (n,)


class Result(NamedTuple):
    learning_rate: float
    times: np.ndarray  # the snapshots' steps, 0 first
    target: np.ndarray  # (100, 2)
    gradient_descent: Runs
    one_by_one: Runs
    seconds: float


def heart() -> tuple[np.ndarray, np.ndarray]:
    """Positions (100, 1) along the curve and its points (100, 2), in the unit square."""
    x = np.arange(POINTS) / POINTS
    t = 2 * np.pi * x
    points = [16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)]
    return x[:, None], (np.stack(points, axis=1) / 20 + 1) / 2


def random_starts(seed: int, n: int) -> Any:
    """n starts along a leading axis; a larger n only adds to them."""
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(n)]
    unit = partial(fnn.init, sizes=SIZES, weights=fnn.unit_normal, bias=fnn.unit_normal, dtype=jnp.float64)
    return jax.tree.map(lambda *arrays: np.stack(arrays), *map(unit, keys))


def gradient_descent(optimizer: optax.GradientTransformation, params: Any) -> tuple[Any, Any]:
    """One step: every gradient is taken before any array moves. Also the cost before."""
    C, gradient = fnn.value_and_grad(COST)(params, *map(jnp.asarray, heart()))
    updates, _ = optimizer.update(gradient, optimizer.init(params))  # plain SGD has nothing to remember
    return optax.apply_updates(params, updates), C


def one_by_one(optimizer: optax.GradientTransformation, params: Any) -> tuple[Any, Any]:
    """One round: each array moves before the next one's gradient is taken. Also the cost before."""
    costs = []
    for l, name in ORDER:
        moved, C = gradient_descent(optimizer, params)
        layer = params[l]._replace(**{name: getattr(moved[l], name)})  # the other five stay
        params = (*params[:l], layer, *params[l + 1 :])
        costs.append(C)
    return params, costs[0]


@partial(jax.jit, static_argnames=("step", "steps"))
def train(step: Step, params: Any, learning_rate: Any, steps: int) -> tuple[Any, ...]:
    """All starts and their changed twins side by side, in one scan.

    Returns costs and distances as `Runs` has them, the first start's parameters before every step and after
    the last, and every start's after the last.
    """
    X, n = jnp.asarray(heart()[0]), len(params[0].W)
    with_twins = jax.tree.map(lambda a: jnp.concatenate([a, a + CHANGE]), params)

    def record_and_step(carry, _):
        params, _ = carry
        curves = jax.vmap(NET, in_axes=(0, None))(params, X)
        moved, costs = jax.vmap(partial(step, optax.sgd(learning_rate)))(params)
        apart = jnp.abs(curves[:n] - curves[n:]).max(axis=(1, 2))
        return (moved, params), (costs[:n], apart, jax.tree.map(lambda a: a[0], params))

    # One round more, for the record after the last step; the step that it takes is dropped.
    carry = with_twins, with_twins
    (_, last), (costs, apart, path) = jax.lax.scan(record_and_step, carry, length=steps + 1)
    return costs.T, apart.T, path, jax.tree.map(lambda a: a[:n], last)


@jax.jit
def curves_and_hessians(params: Any) -> tuple[Any, Any]:
    """The curve of each of many networks, and the Hessian of its cost: the gradient's own derivative."""
    X, y = map(jnp.asarray, heart())

    def curve_and_hessian(params):
        flat, unravel = ravel_pytree(params)

        def gradient(flat):
            return ravel_pytree(fnn.value_and_grad(COST)(unravel(flat), X, y)[1])[0]

        directions = jnp.eye(flat.size, dtype=flat.dtype)
        return NET(params, X), jax.vmap(lambda v: jax.jvp(gradient, (flat,), (v,))[1])(directions)

    return jax.lax.map(curve_and_hessian, params)


def measure(flags: Flags) -> Result:
    steps, n = flags.steps, flags.starts
    if flags.quick:
        steps, n = min(steps, QUICK_STEPS), min(n, QUICK_STARTS)
    times = np.unique(np.r_[0, np.round(np.geomspace(1, steps, SNAPSHOTS)).astype(int)])
    began = time.perf_counter()
    runs: list[Runs] = []
    with jax.enable_x64(True):  # in float32 every run meets changes of 1e-7 at every step
        params = random_starts(flags.seed, n)
        for step in (gradient_descent, one_by_one):
            costs, apart, path, last = jax.device_get(train(step, params, flags.learning_rate, steps))
            seen = jax.tree.map(lambda a, b: np.concatenate([a[times], b]), path, last)
            curves, hessians = jax.device_get(curves_and_hessians(seen))
            sharpness = flags.learning_rate / 2 * np.linalg.eigvalsh(hessians)[:, -1]
            m = len(times)
            runs.append(Runs(costs, apart, curves[:m], sharpness[:m], sharpness[m:]))
    return Result(flags.learning_rate, times, heart()[1], runs[0], runs[1], time.perf_counter() - began)


def counts(runs: Runs) -> tuple[int, int, int]:
    """Starts whose twin is visibly elsewhere at some step, at the end, and those that are stable."""
    worst = runs.apart.max(axis=1)
    return int((worst > VISIBLE).sum()), int((runs.apart[:, -1] > VISIBLE).sum()), int((worst < STABLE).sum())


def report(result: Result) -> str:
    rows = [["update", "final cost", "its range", "ηλ/2", "steps up", "visible", "at the end", "stable"]]
    for name, runs in (("gradient descent", result.gradient_descent), ("one by one", result.one_by_one)):
        final = runs.costs[:, -1]
        rows.append([name, f"{np.median(final):.5f}", f"{final.min():.5f} to {final.max():.5f}"])
        rows[-1] += [f"{np.median(runs.final_sharpness):.2f}", f"{np.mean(np.diff(runs.costs) > 0):.1%}"]
        rows[-1] += [str(count) for count in counts(runs)]
    n, steps = result.gradient_descent.costs.shape
    return (
        f"{aligned(rows, '<>>>>>>>')}\n\n"
        f"{n} starts, {steps - 1:,} steps at η = {result.learning_rate:g}; final cost and ηλ/2 are medians.\n"
        f"Each start has a twin, {CHANGE:g} larger in every parameter. Visible: their curves are more than "
        f"{VISIBLE:g} apart\n"
        f"at some step; at the end: after the last one; stable: never more than {STABLE:g} apart."
    )


def finding(result: Result) -> str:
    gd, one = result.gradient_descent, result.one_by_one
    n = len(gd.costs)
    return (
        f"A line bends into a heart, cost {gd.costs[0, 0]:.2g} → {gd.costs[0, -1]:.2g}; {CHANGE:g} more in "
        f"every parameter of the start\nbecomes visible in {counts(gd)[0]} of {n} runs of gradient descent, "
        f"in {counts(one)[0]} of {n} with updates one by one"
    )


def draw(result: Result) -> Figure:
    titles = (
        "The path of gradient descent from the first start",
        "Cost, from that start",
        "Sharpness, from that start",
        "Every start and its changed twin",
    )
    figure, (plane, cost, sharp, apart) = panels(finding(result), titles, columns=2, height=4.2)
    draw_plane(plane, result)
    rules = (
        ("gradient descent", result.gradient_descent, "tab:blue"),
        ("one by one", result.one_by_one, "tab:orange"),
    )
    steps = np.arange(result.gradient_descent.costs.shape[1])
    for name, runs, color in rules:
        cost.plot(steps, runs.costs[0], color=color, linewidth=1, label=name)
        sharp.plot(result.times, runs.sharpness, color=color, linewidth=1, label=name)
        apart.plot(steps, runs.apart.T, color=color, linewidth=0.5, alpha=0.5)
        apart.plot([], [], color=color, label=name)
    sharp.axhline(
        1, color="black", linestyle="--", linewidth=1, label="above it, gradient descent overshoots"
    )
    apart.axhline(VISIBLE, color="black", linestyle="--", linewidth=1, label="above it, visible")
    cost.set(yscale="log", ylabel="cost (mean squared distance)")
    sharp.set(ylabel=f"ηλ/2   (η = {result.learning_rate:g}, λ: largest Hessian eigenvalue)")
    sharp.set_ylim(
        0, 1.3 * max(1, result.gradient_descent.sharpness.max(), result.one_by_one.sharpness.max())
    )
    apart.set(yscale="log", ylabel="largest distance between the two curves", ylim=(1e-16, 10))
    for axes in (cost, sharp, apart):
        axes.set_xscale("symlog", linthresh=1)  # linear up to the first step, so that step 0 is there
        axes.set(xlabel="step", xlim=(0, steps[-1]))
    cost.legend()
    sharp.legend(loc="upper left", fontsize=9)
    apart.legend(loc=(0.03, 0.5), fontsize=9)
    return figure


def draw_plane(axes: Axes, result: Result) -> None:
    curves, times = result.gradient_descent.curves, result.times
    colors = ScalarMappable(LogNorm(1, times[-1]), "viridis")
    for t, curve in zip(times[1:-1], curves[1:-1], strict=True):
        axes.plot(*curve.T, color=colors.to_rgba(t), alpha=0.4, linewidth=0.8)
    axes.plot(*closed(result.target).T, color="black", linestyle="--", linewidth=1, label="target")
    axes.plot(*curves[-1].T, color="tab:red", linewidth=2, label=f"after {times[-1]:,} steps")
    axes.set(xlabel="first output", ylabel="second output", xlim=(0, 1), ylim=(-0.12, 1), aspect="equal")
    axes.legend(fontsize=8, loc="lower center", ncols=2)
    axes.figure.colorbar(colors, ax=axes, label="step of the snapshot", shrink=0.8)


def closed(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, points[:1]])


def animate(result: Result, path: Path) -> None:
    """The first start's path as a film, a frame for each snapshot; it rests on the last."""
    figure = new_figure("A line bends into a heart", 4, 4.4)
    axes = figure.subplots()
    axes.plot(*closed(result.target).T, color="black", linestyle="--", linewidth=1)
    (line,) = axes.plot([], [], color="tab:red", linewidth=2)
    axes.set(xlabel="first output", ylabel="second output", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_title("step 0")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for all frames
    writer = PillowWriter(fps=FRAMES_PER_SECOND)
    with writer.saving(figure, str(path), dpi=100):
        frames = list(zip(result.times, result.gradient_descent.curves, strict=True))
        for t, curve in frames + frames[-1:] * FRAMES_PER_SECOND * 2:
            line.set_data(*curve.T)
            axes.set_title(f"step {t:,}")
            writer.grab_frame()


def run(flags: Flags) -> Figure:
    result = measure(flags)
    print(report(result))
    print(f"\nTime:     {result.seconds:.1f} s for both rules, with compilation")
    if flags.animation is not None:
        animate(result, flags.animation)
        print(f"Film:     {os.path.relpath(flags.animation)}")
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
