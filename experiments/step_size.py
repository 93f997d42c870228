"""How large may a step be, and what if every step is as long as the last?

    python -m experiments.step_size        (--help lists the flags)

Gradient descent, Δw = -η ∇C, and the normalised step, Δw = -ε ∇C/‖∇C‖ with the norm over all parameters, full
batch, on two costs:

    quadratic   a linear neuron with two weights, half the squared error, 50 points, all targets 0:
                C = ½ wᵀHw, H = XᵀX/N; the minimum is w = 0 and the eigenvalues λ of H are known
    network     2-8-8-8-1, sigmoid, cross-entropy with a penalty of 0.001, on 100 points of two half moons; it
                begins on a plateau, where all outputs are nearly equal

Expected answer. On the quadratic ‖w‖ changes by the factor max |1 - ηλ| in a step, so gradient descent
diverges from η = 2/λ on, λ the largest: it converges at 0.999995 of that and diverges at 1.000005. On the
network it crawls below η = 0.03, ends within a tenth of its lowest cost for η from 0.4 to 2.5, and ends above
the cost that it began with from η = 10 on.

Steps of a fixed length ε do not stop at the minimum: they end in a hop from one side of it to the other and
back, along the eigenvector of the largest λ, with the far side between ½ and 0.9 ε away and the near side the
rest of ε. In exchange they cross a plateau at full speed. If both rules begin with a step of 0.03, gradient
descent's steps shrink to 0.06 of that and it leaves the plateau at step 262, normalised steps at step 69
(medians of 5 starts; with --seed 1 at steps 146 and 67). Their final cost is within a tenth of its lowest for
ε from 0.01 to 0.4: a factor of 40, where η has one of 6.

Sources: the limit 2/λ_max, LeCun et al. (1998), *Efficient BackProp*, §5.1; normalised gradient descent,
Nesterov (2004), *Introductory Lectures on Convex Optimization*, §3.2.3, there with ε falling.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import make_moons

import fnn
from experiments import command
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

QUADRATIC = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
NETWORK = fnn.cost(fnn.mlp(fnn.sigmoid), fnn.sigmoid_binary_cross_entropy, l2=1e-3)
SIZES = (2, 8, 8, 8, 1)
POINTS = 100

# ηλ/2 for the largest λ: a sweep across, and a fine one at the limit, 1e-5 apart.
ACROSS, FINE = np.linspace(0.025, 1.175, 24), 1 + 1e-5 * (np.arange(-10, 10) + 0.5)
LENGTHS = (0.3, 0.1, 0.03)  # ε on the quadratic
QUADRATIC_STEPS = 200

# η and ε on the network; from crawling to divergence.
RATES, NORMALISED_RATES = np.geomspace(1e-2, 1e2, 21), np.geomspace(1e-3, 10, 21)
QUICK_STEPS, QUICK_STARTS = 1000, 3  # and every fourth rate
LEFT_PLATEAU = 0.9  # of the first cost; the plateau lies at 0.98 of it

# Added to the norm, so that a gradient of 0 makes a step of 0: the root of float32's smallest normal number.
# The squares of entries below it vanish, and with them the norm; a norm above 1e-12 stays what it is.
ZERO = float(np.sqrt(np.finfo(np.float32).tiny))

PLAIN, NORMALISED = "tab:blue", "tab:orange"


@dataclass(frozen=True)
class Flags(command.Flags):
    """Sweeps the step size of gradient descent, and of steps that all have the same length."""

    steps: int = 2000
    """Full-batch steps of the network."""
    starts: int = 5
    """Random starts of the network."""
    length: float = 0.03
    """ε of the runs on the network that are shown step by step."""
    quick: bool = False
    """At most 3 starts and 1,000 steps, and a quarter of the rates, for a first look."""

    def check(self) -> None:
        super().check()
        expect("--steps", "an integer of at least 100", self.steps, self.steps >= 100)
        expect("--starts", "an integer from 1 to 100", self.starts, 1 <= self.starts <= 100)
        expect("--length", "a finite number above 0", self.length, 0 < self.length < inf)


def normalised(length: Any) -> optax.GradientTransformation:
    """Δw = -length ∇C/‖∇C‖, and 0 where the gradient is 0.

    `optax.contrib.normalize` gives NaN there. The default eps of `normalize_by_update_norm`, 1e-6, gives 0,
    but shortens other steps too, to a half where the norm is 1e-6.
    """
    return optax.chain(optax.normalize_by_update_norm(eps=ZERO), optax.sgd(length))


class Runs(NamedTuple):
    costs: np.ndarray  # (members, steps), before each step
    lengths: np.ndarray  # (members, steps), ‖Δw‖
    neuron: np.ndarray  # (members, steps, 2), weights of the first neuron before each step


@partial(jax.jit, static_argnames=("cost", "make_optimizer", "steps"))
def train(
    cost: fnn.Cost, make_optimizer: Callable, rates: Any, params: Any, X: Any, y: Any, steps: int
) -> tuple[Any, ...]:
    """`Runs`: one for each pair of a rate and a start, side by side in one scan."""

    def run(rate, params):
        optimizer = make_optimizer(rate)  # optax takes a traced rate

        def step(state, _):
            moved, C = fnn.train_step(cost, optimizer, state, X, y)
            length = optax.tree.norm(optax.tree.sub(moved.params, state.params))
            return moved, (C, length, state.params[0].W[0])

        state = fnn.train_state(optimizer, params, jax.random.key(0))  # full batch: the key is not used
        return jax.lax.scan(step, state, length=steps)[1]

    return jax.vmap(run)(rates, params)


class Quadratic(NamedTuple):
    eigenvalues: np.ndarray  # (2,), of H, ascending
    directions: np.ndarray  # (2, 2), eigenvectors as columns
    ratios: np.ndarray  # (rates,), ηλ/2
    growth: np.ndarray  # (rates,), factor by which ‖w‖ changes in a step, measured
    theory: np.ndarray  # (rates,), the largest |1 - ηλ|
    best: np.ndarray  # (steps, 2), w at the best rate, η = 2 / (λ_min + λ_max)
    normalised: np.ndarray  # (lengths, steps, 2), w

    def distances(self) -> np.ndarray:
        """‖w‖/ε of the normalised runs, (lengths, steps)."""
        return np.linalg.norm(self.normalised, axis=-1) / np.array(LENGTHS)[:, None]


def measure_quadratic(seed: int) -> Quadratic:
    rng = np.random.default_rng(seed)
    mix = np.array([[1, 0.6], [0, 0.5]])  # correlates the inputs, so that the eigenvalues differ some 8-fold
    X, y = (rng.standard_normal((50, 2)) @ mix).astype(np.float32), np.zeros((50, 1), np.float32)
    eigenvalues, directions = np.linalg.eigh(X.astype(float).T @ X.astype(float) / len(X))
    start = np.sqrt(2).astype(np.float32) * directions.sum(axis=1).astype(
        np.float32
    )  # equal parts of both, at a distance of 2

    def run(make_optimizer, rates):
        rates = np.asarray(rates, np.float32)
        params = (fnn.Layer(jnp.tile(start, (len(rates), 1, 1))),)
        runs = Runs(*train(QUADRATIC, make_optimizer, rates, params, X, y, QUADRATIC_STEPS))
        return np.asarray(runs.neuron, float)

    ratios = np.concatenate([ACROSS, FINE])
    rates = np.append(ratios * 2 / eigenvalues[1], 2 / eigenvalues.sum())
    *sweep, best = run(optax.sgd, rates)
    # From step 50, where the smaller part has died out, to 100, before the smallest numbers underflow.
    distances = np.linalg.norm(sweep, axis=-1)
    growth = (distances[:, 100] / distances[:, 50]) ** (1 / 50)
    theory = np.abs(1 - rates[:-1, None] * eigenvalues).max(axis=1)
    return Quadratic(eigenvalues, directions, ratios, growth, theory, best, run(normalised, LENGTHS))


class NetworkRuns(NamedTuple):
    rates: np.ndarray  # (rates,), η
    finals: np.ndarray  # (rates, starts), mean cost of the last twentieth of the steps
    normalised_rates: np.ndarray  # (rates,), ε
    normalised_finals: np.ndarray
    start: float  # median of the first cost
    plain: Runs  # one run for each start, whose first step has the length ε of the normalised ones
    normalised: Runs


def measure_network(flags: Flags) -> NetworkRuns:
    steps, n, stride = flags.steps, flags.starts, 1
    if flags.quick:
        steps, n, stride = min(steps, QUICK_STEPS), min(n, QUICK_STARTS), 4
    X, y = map(np.asarray, make_moons(POINTS, noise=0.2, random_state=flags.seed))
    X, y = (jnp.asarray(a, jnp.float32) for a in ((X - X.mean(axis=0)) / X.std(axis=0), y[:, None]))
    keys = [jax.random.fold_in(jax.random.key(flags.seed), i) for i in range(n)]
    params = [fnn.init(key, SIZES, dtype=jnp.float32) for key in keys]
    starts = jax.tree.map(lambda *arrays: np.stack(arrays), *params)

    @jax.jit
    @jax.vmap
    def gradient_norm(params):
        return optax.tree.norm(fnn.value_and_grad(NETWORK)(params, X, y)[1])

    # Member r n + s of a sweep has rate r and start s; the n runs shown step by step come last.
    def run(make_optimizer, rates, shown):
        params = jax.tree.map(lambda a: np.tile(a, (len(rates) + 1,) + (1,) * (a.ndim - 1)), starts)
        members = np.concatenate([np.repeat(rates, n), shown]).astype(np.float32)
        runs = Runs(*jax.device_get(train(NETWORK, make_optimizer, members, params, X, y, steps)))
        finals = runs.costs[:-n, -(steps // 20) :].mean(axis=1).reshape(-1, n)
        return np.nan_to_num(finals, nan=inf), Runs(*(array[-n:] for array in runs))

    rates, lengths = RATES[::stride], NORMALISED_RATES[::stride]
    finals, shown = run(optax.sgd, rates, flags.length / np.asarray(gradient_norm(starts)))
    normalised_finals, steady = run(normalised, lengths, np.full(n, flags.length))
    start = float(np.median(shown.costs[:, 0]))
    return NetworkRuns(rates, finals, lengths, normalised_finals, start, shown, steady)


def last_and_first(quadratic: Quadratic) -> tuple[float, float]:
    """The largest ηλ/2 that converges and the smallest that diverges."""
    ratios, growth = quadratic.ratios, quadratic.growth
    return ratios[growth < 1].max(), ratios[growth > 1].min()


def good(rates: np.ndarray, finals: np.ndarray) -> np.ndarray:
    """The rates whose median final cost is within a tenth of the lowest."""
    medians = np.median(finals, axis=1)
    return rates[medians <= 1.1 * medians.min()]


def plateau(runs: Runs) -> int:
    """The step by which half of the runs have left the plateau; their number of steps if they have not."""
    left = runs.costs < LEFT_PLATEAU * runs.costs[:, :1]
    return int(np.median(np.where(left.any(axis=1), left.argmax(axis=1), left.shape[1])))


def report(flags: Flags, quadratic: Quadratic, network: NetworkRuns) -> str:
    growth = [("ηλ/2", "‖w‖ per step", "theory")]
    for ratio in (0.025, 0.525, 0.975, 0.999905, 0.999995, 1.000005, 1.000095, 1.125):
        i = np.abs(quadratic.ratios - ratio).argmin()
        growth.append((f"{ratio:.6f}", f"{quadratic.growth[i]:.6f}", f"{quadratic.theory[i]:.6f}"))
    hops = [("ε", "near side", "far side")]
    for length, distances in zip(LENGTHS, quadratic.distances()[:, -50:], strict=True):
        hops.append((f"{length:g}", f"{distances.min():.3f} ε", f"{distances.max():.3f} ε"))
    finals = [["η", "final cost", "its range", "ε", "final cost", "its range"]]
    plain, steady = network.finals, network.normalised_finals
    for i in range(0, len(plain), 1 if flags.quick else 2):
        finals.append([])
        for rate, costs in ((network.rates[i], plain[i]), (network.normalised_rates[i], steady[i])):
            finals[-1] += [
                f"{rate:.3g}",
                f"{np.median(costs):.4g}",
                f"{costs.min():.4g} to {costs.max():.4g}",
            ]

    last, first = last_and_first(quadratic)
    low, high = quadratic.eigenvalues
    eta, epsilon = good(network.rates, plain), good(network.normalised_rates, steady)
    worse = network.rates[np.median(plain, axis=1) > network.start].min(initial=inf)
    shortest = np.median(network.plain.lengths.min(axis=1)) / flags.length
    n, steps = network.plain.costs.shape
    return "\n".join(
        (
            f"Quadratic, λ = {low:.4f} and {high:.4f}: gradient descent",
            aligned(growth, ">>>"),
            f"It converges at η = {last:.6f} · 2/λ and diverges at {first:.6f} · 2/λ, λ the larger one.",
            f"\nQuadratic: distance of normalised steps to the minimum, the last 50 of {QUADRATIC_STEPS}",
            aligned(hops, ">>>"),
            f"\nNetwork: {n} starts, {steps:,} steps, first cost {network.start:.4g}",
            aligned(finals, ">>>>>>"),
            f"Within a tenth of the lowest median: η from {eta.min():.3g} to {eta.max():.3g}, "
            f"ε from {epsilon.min():.3g} to {epsilon.max():.3g}.",
            f"Above the first cost at the end: η from {worse:.3g} on.",
            f"\nNetwork, first step of length {flags.length:g} by both rules, medians of the {n} starts:",
            f"gradient descent's shortest step is {shortest:.2g} of the first;",
            f"it leaves the plateau at step {plateau(network.plain)}, "
            f"normalised steps at step {plateau(network.normalised)}.",
        )
    )


def finding(quadratic: Quadratic, network: NetworkRuns) -> str:
    last, first = last_and_first(quadratic)
    far = quadratic.distances()[:, -50:].max(axis=1)
    return (
        "On a quadratic, gradient descent "
        f"converges at η = {last:.6f} · 2/λ and diverges at {first:.6f} · 2/λ.\n"
        "Steps of fixed length ε end hopping across the minimum, "
        f"{far.min():.2f} to {far.max():.2f} ε away on the far side;\n"
        f"they leave a plateau at step {plateau(network.normalised)}, "
        f"gradient descent at step {plateau(network.plain)}"
    )


def draw(flags: Flags, quadratic: Quadratic, network: NetworkRuns) -> Figure:
    titles = (
        "Quadratic: growth in a step of gradient descent",
        "Quadratic: distance to the minimum",
        "Quadratic: the plane of its two weights",
        f"Network: cost after {network.plain.costs.shape[1]:,} steps, median and range",
        "Network: cost, both with the same first step",
        "Network: length of the steps, the same runs",
    )
    figure, (growth, distance, plane, final, cost, length) = panels(finding(quadratic, network), titles)
    ratios = np.linspace(0, 1.2, 241)
    theory = np.abs(1 - 2 * ratios[:, None] * quadratic.eigenvalues / quadratic.eigenvalues[1]).max(axis=1)
    n = len(ACROSS)
    growth.plot(ratios, theory, color="0.6", label="theory: largest |1 - ηλ|")
    growth.plot(quadratic.ratios[:n], quadratic.growth[:n], "o", color=PLAIN, markersize=4, label="measured")
    growth.axhline(1, color="black", linestyle="--", linewidth=1)
    growth.set(xlabel="ηλ/2, λ the largest eigenvalue", ylabel="factor of the distance in a step")
    growth.legend()

    distance.plot(np.linalg.norm(quadratic.best, axis=1), color=PLAIN, label="gradient descent, best η")
    far = np.linalg.norm(quadratic.normalised, axis=-1)
    for epsilon, distances, color in zip(LENGTHS, far, ("tab:orange", "tab:red", "tab:brown"), strict=True):
        distance.plot(distances, color=color, linewidth=1, label=f"normalised, ε = {epsilon:g}")
        distance.axhline(epsilon, color=color, linestyle=":", linewidth=1)
    distance.set(yscale="log", ylim=(1e-3, 30), xlim=(0, 120), xlabel="step")
    distance.set(ylabel="distance to the minimum (dotted: ε)")
    distance.legend(fontsize=8, ncols=2, loc="upper center")
    draw_plane(plane, quadratic)
    draw_finals(final, network)

    for runs, color, name in (
        (network.plain, PLAIN, "gradient descent"),
        (network.normalised, NORMALISED, f"normalised, ε = {flags.length:g}"),
    ):
        steps = np.arange(1, runs.costs.shape[1] + 1)
        for axes, curves in ((cost, runs.costs), (length, runs.lengths / flags.length)):
            axes.plot(steps, curves.T, color=color, linewidth=1, alpha=0.7)
            axes.plot([], [], color=color, label=name)
            axes.set(xscale="log", xlabel="step")
            axes.legend()
    cost.set(ylabel="cost (nats per point)")
    length.set(yscale="log", ylabel="‖Δw‖ / ε")
    return figure


def draw_plane(axes: Axes, quadratic: Quadratic) -> None:
    H = quadratic.directions @ np.diag(quadratic.eigenvalues) @ quadratic.directions.T
    path, best = quadratic.normalised[0], quadratic.best
    w = np.stack(np.meshgrid(*[np.linspace(-5, 5, 200)] * 2), axis=-1)
    C = np.einsum("...i,ij,...j->...", w, H, w) / 2
    levels = np.geomspace(0.01, 10, 10)
    axes.contour(w[..., 0], w[..., 1], C, levels=levels, colors="0.8", linewidths=0.8)
    axes.plot(*best.T, "o-", color=PLAIN, markersize=3, linewidth=1, label="gradient descent, best η")
    axes.plot(
        *path.T, "o-", color=NORMALISED, markersize=3, linewidth=1, label=f"normalised, ε = {LENGTHS[0]:g}"
    )
    axes.plot(0, 0, "k+", markersize=10, label="minimum")
    axes.set(xlabel="w₁", ylabel="w₂", xlim=(-3.1, 3.1), ylim=(-2.4, 2.4), aspect="equal")
    axes.legend(fontsize=8)


def draw_finals(axes: Axes, network: NetworkRuns) -> None:
    for rates, finals, color, name in (
        (network.rates, network.finals, PLAIN, "gradient descent, against η"),
        (network.normalised_rates, network.normalised_finals, NORMALISED, "normalised, against ε"),
    ):
        axes.plot(rates, np.median(finals, axis=1), "o-", color=color, markersize=3, label=name)
        axes.fill_between(rates, finals.min(axis=1), finals.max(axis=1), color=color, alpha=0.2, linewidth=0)
    axes.axhline(network.start, color="black", linestyle="--", linewidth=1, label="before the first step")
    axes.set(xscale="log", yscale="log", xlabel="η or ε")
    axes.set(ylabel="final cost (nats per point)")
    axes.legend(fontsize=8)


def run(flags: Flags) -> Figure:
    quadratic, network = measure_quadratic(flags.seed), measure_network(flags)
    print(report(flags, quadratic, network))
    return draw(flags, quadratic, network)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
