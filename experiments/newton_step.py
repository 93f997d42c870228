"""How far does a single Newton-like step go, and how many gradients could be had for its cost?

    python -m experiments.newton_step        (--help lists the flags)

A network 64-64-32-10 (tanh, softmax cross-entropy, penalty of 0.001) on all 1,437 training digits at once, in
float64: in float32, conjugate gradients that go on after they have converged end in NaN. One step is

    θ - d,   (G + μ) d = ∂C/∂θ,   G = Σ_n c_n J_nᵀ H_n J_n + the penalty's λ,

with d by i iterations of conjugate gradients from 0 (`jax.scipy.sparse.linalg.cg`), where G is only ever
multiplied by a vector (`fnn.gauss_newton_product`), and without a search along d. It is taken at three
points: random weights, and those after 100 and 1,000 steps of gradient descent with η = 0.5, for every
damping μ and number of iterations of a grid. Behind it is a quadratic model, C - ⟨∂C/∂θ, d⟩ + ½ ⟨d, G d⟩;
where the cost falls by less than the model says, the step was longer than the model is good for.

Work is counted in gradients: XLA's number of floating-point operations in a product Gv over that in a cost
with its gradient. A step of i iterations is one gradient and i + 1 products, as jax's cg multiplies once
before it iterates. Named is the cheapest step with 95 % of the largest decrease. The searches are not
counted, neither that for μ and i nor that for the constant rate of gradient descent and of Adam, which is
the best of a grid for every number of steps.

Expected answer: not far enough to pay, but for one case. A product is 1.48 gradients. At random weights one
step takes the cost from 2.76 to 0.74 at best, with 2 iterations, the work of 5.4 gradients; gradient descent
and Adam get there in 2 steps. With 32 iterations the step is too long: at μ = 0.01 the cost falls by a tenth
of what the model says, at μ ≤ 0.001 it rises. After 100 steps it goes from 0.164 to 0.099 with μ = 0.001 and
16 iterations, work 26, where gradient descent needs 75 steps: that is the case. Adam needs 7. After 1,000
steps it goes from 0.087 to 0.066 with a single iteration, work 4, which is along the gradient; gradient
descent needs 1 step, at a rate too large for a second one, and Adam 12. With --seed 1 and 2 gradient descent
needs 2, 68 and 1 or 2, 70 and 1 steps, Adam 2, 8 and 13 or 2, 7 and 11.

Sources: Martens (2010), *Deep learning via Hessian-free optimization*, §4, with damping adapted by the ratio
of the decrease to the model's; Schraudolph (2002) for Gv.
"""

from collections.abc import Callable, Sequence
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
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

import fnn
from experiments import command, digits
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # μ
ITERATIONS = (1, 2, 4, 8, 16, 32)  # i
TOLERANCE = 1e-10  # of ‖(G + μ) d - ∂C/∂θ‖ / ‖∂C/∂θ‖, where conjugate gradients stop
RATES = {"gradient descent": 2.0 ** np.arange(-2, 10), "Adam": 2.0 ** np.arange(-9, -1)}
OPTIMIZERS = {"gradient descent": optax.sgd, "Adam": optax.adam}
COLORS = {"gradient descent": "black", "Adam": "0.6"}
BEFORE_RATE = 0.5  # η of the descent to the later points
ENOUGH = 0.95  # of the largest decrease: the cheapest step that has it is the one to compare
QUICK_DIGITS, QUICK_WIDTHS, QUICK_BEFORE, QUICK_STEPS = 300, (16,), 100, 30


@dataclass(frozen=True)
class Flags(command.Flags):
    """Takes one damped Gauss–Newton step and compares it with as many gradient steps as it costs."""

    widths: tuple[int, ...] = (64, 32)
    """Widths of the hidden layers."""
    l2: float = 1e-3
    """Factor λ of the penalty ½ λ ‖W‖² on the weights."""
    before: tuple[int, ...] = (100, 1000)
    """Steps of gradient descent to the later points."""
    steps: int = 150
    """Steps of gradient descent and of Adam that the one step is compared with."""
    quick: bool = False
    """300 digits, one narrow hidden layer, at most 100 steps before and 30 to compare with, fewer rates."""

    def check(self) -> None:
        super().check()
        for width in self.widths:
            expect("--widths", "integers of at least 1", width, width >= 1)
        expect("--l2", "a finite number of at least 0", self.l2, 0 <= self.l2 < inf)
        for before in self.before:
            expect("--before", "integers of at least 1", before, before >= 1)
        expect("--steps", "an integer of at least 1", self.steps, self.steps >= 1)


def damped_product(cost: fnn.Cost, params: Any, damping: Any, X: Any, y: Any) -> Callable[[Any], Any]:
    """v -> (G + μ) v, the penalty's curvature in G."""

    def product(v):
        Gv = fnn.gauss_newton_product(cost, params, v, X, y, penalty=True)
        return jax.tree.map(lambda Gv, v: Gv + damping * v, Gv, v)

    return product


class Step(NamedTuple):
    cost: Any  # after the step
    predicted: Any  # the same by the quadratic model
    residual: Any  # ‖(G + μ) d - ∂C/∂θ‖ / ‖∂C/∂θ‖
    length: Any  # ‖d‖


@partial(jax.jit, static_argnames="cost")
def newton_step(
    cost: fnn.Cost, params: Any, damping: Any, iterations: Any, X: Any, y: Any
) -> tuple[Any, Step]:
    """The parameters after one step, and what is to be known of it."""
    before, gradient = fnn.value_and_grad(cost)(params, X, y)
    product = damped_product(cost, params, damping, X, y)
    d, _ = jax.scipy.sparse.linalg.cg(product, gradient, tol=TOLERANCE, maxiter=iterations)
    after = optax.tree.sub(params, d)
    damped = product(d)
    curvature = optax.tree.vdot(d, damped) - damping * optax.tree.vdot(d, d)
    predicted = before - optax.tree.vdot(gradient, d) + curvature / 2
    residual = optax.tree.norm(optax.tree.sub(damped, gradient)) / optax.tree.norm(gradient)
    return after, Step(cost(after, X, y), predicted, residual, optax.tree.norm(d))


@partial(jax.jit, static_argnames=("cost", "make_optimizer", "steps"))
def descend(
    cost: fnn.Cost, make_optimizer: Callable, rates: Any, params: Any, X: Any, y: Any, steps: int
) -> tuple[Any, Any]:
    """Parameters after so many full-batch steps, one run for each rate, and costs (rates, steps + 1)."""

    def run(rate):
        optimizer = make_optimizer(rate)

        def step(state, _):
            return fnn.train_step(cost, optimizer, state, X, y)

        state = fnn.train_state(optimizer, params, jax.random.key(0))  # full batch: the key is not used
        state, costs = jax.lax.scan(step, state, length=steps)
        return state.params, jnp.append(costs, cost(state.params, X, y))

    return jax.lax.map(run, rates)


def flops(f: Callable, *args: Any) -> float:
    """Floating-point operations of f at these arguments, as XLA counts them in what it has compiled."""
    analysis: Any = jax.jit(f).lower(*args).compile().cost_analysis()
    return analysis["flops"]


class Point(NamedTuple):
    """What the step does at one point, and what descent does from there."""

    name: str
    cost: float
    steps: Step  # arrays (dampings, iterations)
    descents: dict[str, np.ndarray]  # optimiser -> (rates, steps + 1), costs

    def least(self, name: str) -> np.ndarray:
        """(steps + 1,) the cost after every number of steps at the rate that is best for this number."""
        return np.nan_to_num(self.descents[name], nan=inf).min(axis=0)

    def best(self) -> tuple[int, int]:
        """Damping and iterations, as indices, of the cheapest step with nearly the largest decrease."""
        costs = np.nan_to_num(self.steps.cost, nan=inf)
        enough = self.cost - costs >= ENOUGH * (self.cost - costs.min())
        j = enough.any(axis=0).argmax()
        return int(costs[:, j].argmin()), int(j)

    def ratios(self) -> np.ndarray:
        """Decrease of the cost over the model's, after the most iterations, for each damping."""
        return (self.cost - self.steps.cost[:, -1]) / (self.cost - self.steps.predicted[:, -1])


class Result(NamedTuple):
    points: tuple[Point, ...]
    gradient: float  # flops
    product: float  # flops

    def work(self, iterations: Any) -> Any:
        """Of a step, in gradients."""
        return 1 + (iterations + 1) * self.product / self.gradient


def steps_to(costs: np.ndarray, target: float) -> float:
    """The first number of steps after which the cost is at most the target; inf if it never is."""
    reached = costs <= target
    return float(reached.argmax()) if reached.any() else inf


def measure_point(name: str, cost: fnn.Cost, params: Any, data: Any, flags: Flags) -> Point:
    steps = []
    for damping in DAMPINGS:
        for iterations in ITERATIONS:
            steps.append(jax.device_get(newton_step(cost, params, damping, iterations, *data)[1]))
    shape = len(DAMPINGS), len(ITERATIONS)
    every = 3 if flags.quick else 1
    descents = {
        name: np.asarray(
            descend(cost, OPTIMIZERS[name], jnp.asarray(rates[::every]), params, *data, flags.steps)[1]
        )
        for name, rates in RATES.items()
    }
    arrays = (np.reshape(values, shape) for values in zip(*steps, strict=True))
    return Point(name, float(cost(params, *data)), Step(*arrays), descents)


def measure(flags: Flags) -> Result:
    if flags.quick:
        before = tuple(min(before, QUICK_BEFORE) for before in flags.before[:1])
        flags = replace(flags, widths=QUICK_WIDTHS, before=before, steps=min(flags.steps, QUICK_STEPS))
    model = digits.Flags(seed=flags.seed, widths=flags.widths, activation="tanh", l2=flags.l2)
    (X, y), _ = digits.load(flags.seed)
    if flags.quick:
        X, y = X[:QUICK_DIGITS], y[:QUICK_DIGITS]
    with jax.enable_x64(True):
        data = jnp.asarray(digits.standardised(X, X), float), jnp.asarray(y)
        _, cost, params = digits.model(model)
        params = jax.tree.map(lambda a: a.astype(float), params)
        rate = jnp.array([BEFORE_RATE])
        points = [measure_point("at random weights", cost, params, data, flags)]
        for before in flags.before:
            later, _ = descend(cost, optax.sgd, rate, params, *data, before)
            later = jax.tree.map(lambda a: a[0], later)
            points.append(measure_point(f"after {before:,} steps", cost, later, data, flags))
        gradient = flops(fnn.value_and_grad(cost), params, *data)
        product = flops(partial(fnn.gauss_newton_product, cost, penalty=True), params, params, *data)
    return Result(tuple(points), gradient, product)


def compared(result: Result, point: Point) -> dict[str, Any]:
    """The best step from a point, and what the others do for its work."""
    i, j = point.best()
    cost, work = point.steps.cost[i, j], result.work(ITERATIONS[j])
    same, needed = {}, {}
    for name in OPTIMIZERS:
        costs = point.least(name)
        same[name] = costs[min(int(work), len(costs) - 1)]
        steps = steps_to(costs, cost)
        needed[name] = f"{steps:.0f}" if steps < inf else f"more than {len(costs) - 1}"
    return {"μ": DAMPINGS[i], "i": ITERATIONS[j], "cost": cost, "work": work, "same": same, "needed": needed}


def finding(result: Result) -> str:
    lines = ["One Gauss–Newton step, its work in gradients, and how many others need to get as far"]
    for point in result.points:
        best = compared(result, point)
        needed = ", ".join(f"{name} {steps}" for name, steps in best["needed"].items())
        lines.append(
            f"{point.name}: cost {point.cost:.2g} to {best['cost']:.2g}, work {best['work']:.2g}; {needed}"
        )
    return "\n".join(lines)


def report(result: Result) -> str:
    ratio = result.product / result.gradient
    lines = [
        f"A gradient is {result.gradient:,.0f} flops, a Gauss–Newton product {result.product:,.0f}: "
        f"{ratio:.2f} gradients",
    ]
    for point in result.points:
        rows = [("μ", *(f"i = {i}" for i in ITERATIONS), "residual", "‖d‖", "decrease / model's")]
        for i, (damping, ratio) in enumerate(zip(DAMPINGS, point.ratios(), strict=True)):
            costs = (f"{cost:.3g}" for cost in point.steps.cost[i])
            residual, length = point.steps.residual[i, -1], point.steps.length[i, -1]
            rows.append((f"{damping:g}", *costs, f"{residual:.1g}", f"{length:.3g}", f"{ratio:.2f}"))
        work = (f"{result.work(i):.1f}" for i in ITERATIONS)
        rows.append(("work", *work, "", "", ""))
        best = compared(result, point)
        lines += [
            f"\n{point.name}: cost {point.cost:.4g}; after one step:",
            aligned(rows, ">" * len(rows[0])),
            f"Best: μ = {best['μ']:g}, i = {best['i']}, cost {best['cost']:.4g} "
            f"for the work of {best['work']:.1f} gradients. "
            f"With {int(best['work'])} gradients, each at its best rate,",
        ]
        for name, cost in best["same"].items():
            lines.append(f"{name} is at {cost:.4g}; it gets as far as the step with {best['needed'][name]}.")
    return "\n".join((*lines, "", finding(result)))


def draw(result: Result) -> Figure:
    titles = (*(f"Cost {point.name}" for point in result.points), "Is the model good so far out?")
    figure, (*costs, model) = panels(finding(result), titles, columns=2, height=4)
    for axes, point in zip(costs, result.points, strict=True):
        draw_costs(axes, result, point)
    figure.legend(*costs[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    for point, marker in zip(result.points, "os^vD*" * len(result.points)):
        model.plot(DAMPINGS, point.ratios(), f"{marker}-", markersize=5, label=point.name)
    model.axhline(1, color="black", linestyle="--", linewidth=1, label="as the model says")
    model.axhline(0, color="0.7", linewidth=1)
    model.set(xscale="log", xlabel="damping μ", ylabel=f"decrease / model's, i = {ITERATIONS[-1]}")
    model.legend(fontsize=8)
    return figure


def draw_costs(axes: Axes, result: Result, point: Point) -> None:
    work = result.work(np.array(ITERATIONS))
    for i, damping in enumerate(DAMPINGS):
        axes.plot(
            work, point.steps.cost[i], "o-", color=f"C{i}", markersize=4, label=f"step, μ = {damping:g}"
        )
    for name in OPTIMIZERS:
        costs = point.least(name)
        axes.plot(np.arange(1, len(costs)), costs[1:], color=COLORS[name], label=f"{name}, best rate")
    axes.axhline(point.cost, color="black", linestyle=":", linewidth=1, label="before the step")
    axes.set(xscale="log", yscale="log", xlabel="work (gradients)", ylabel="cost (nats per digit)")
    low, high = axes.get_ylim()
    shown = (1, 2, 5) if high > 10 * low else (1, 1.5, *range(2, 10))
    for axis, subs in ((axes.xaxis, (1, 2, 5)), (axes.yaxis, shown)):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    result = measure(flags)
    print(report(result))
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
