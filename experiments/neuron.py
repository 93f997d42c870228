"""Does gradient descent give one relu neuron the w and b back that made its data?

    python -m experiments.neuron        (--help lists the flags)

The neuron max(0, w·x + b) is the smallest network, fnn.mlp([], output=fnn.relu), and its mean squared error
has a gradient that can be written down. Data are free of noise: targets of a neuron with |w| = 1 and b = ½
on 100 unit normal inputs. Starts are unit normal; full-batch steps of size 0.3, in float64.

Expected answer: to 15 digits, or not at all. Medians of 5 data sets of 200 starts:

    inputs  recovered  dead from the start  switched off on the way  elsewhere
         1     61.5 %               14.0 %                   24.5 %      0.0 %
         2     79.5 %                4.0 %                   16.5 %      0.0 %
        10     98.0 %                0.0 %                    0.0 %      1.5 %

A neuron that is active for no input has a gradient of exactly 0 and stays where it is to the last bit. One
that points the wrong way can be driven to the edge of that region, where all its outputs are 0 too. Of those
that are not dead and point the true way, w·w_true > 0, all but 1 of 1,416 recover. Of the 24 elsewhere, 18
are in another local minimum, with a gradient below 10⁻¹⁴, and 6 still move. The library's gradient and the
closed form are at most 2.7 rounding errors apart. A quarter of a minute on 2 CPU cores.

Source: T. Parr, J. Howard (2018). *The Matrix Calculus You Need For Deep Learning*, arXiv:1802.01528, on the
gradient of the neuron loss function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import fnn
from experiments import command
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

INPUTS, QUICK_INPUTS = (1, 2, 10), (1, 2)  # numbers of inputs; the figure shows the neurons of one
POINTS = 100  # inputs x_n of a data set, unit normal
BIAS = 0.5  # of the neuron that makes the data, whose |w| is 1: two thirds of its targets are above 0
NEGLIGIBLE = 1e-9  # a distance or an output that counts as 0; seeds 0 to 3: below 1e-13 or above 5e-4
SHOWN_STEPS = 400  # in the figure; by then the neurons of one input are where they stay
QUICK_STARTS, QUICK_DATA_SETS = 50, 2

RECOVERED, DEAD, OFF, ELSEWHERE = range(4)
OUTCOMES = "recovered", "dead from the start", "switched off on the way", "elsewhere"
COLORS = "tab:blue", "tab:red", "tab:orange", "tab:purple"


@dataclass(frozen=True)
class Flags(command.Flags):
    """Fits one relu neuron to data that such a neuron made, from many starts."""

    starts: int = 200
    """Starts for each data set."""
    data_sets: int = 5
    """Data sets for each number of inputs."""
    steps: int = 4_000
    """Full-batch steps of gradient descent."""
    learning_rate: float = 0.3
    """Size of a step."""
    quick: bool = False
    """At most 50 starts on 2 data sets, and no neurons of 10 inputs."""

    def check(self) -> None:
        super().check()
        for name in ("starts", "data_sets", "steps"):
            number = getattr(self, name)
            expect(f"--{name.replace('_', '-')}", "an integer of at least 1", number, number >= 1)
        rate = self.learning_rate
        expect("--learning-rate", "a finite number above 0", rate, 0 < rate < inf)


class Fits(NamedTuple):
    """Neurons of n inputs, S starts on each of D data sets, in float64; θ = (w, b), n + 1 numbers."""

    X: np.ndarray  # (D, N, n)
    y: np.ndarray  # (D, N)
    start: np.ndarray  # (D, S, n + 1), θ before the first step
    gradient: np.ndarray  # (D, S, n + 1), the library's ∂C/∂θ there
    end: np.ndarray  # (D, S, n + 1), θ after the last step
    path: np.ndarray  # (D, S, steps + 1, n + 1), all θ from start to end; empty but for a single input


def truth(n: int) -> np.ndarray:
    """The θ that makes the data. Unit normal inputs have no direction, so any w of length 1 will do."""
    return np.append(np.full(n, n**-0.5), BIAS)


def closed_form(theta: np.ndarray, X: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """C and ∂C/∂θ of one neuron, in NumPy; X (N, n), y (N,).

    C = (1/N) Σ (y_n - max(0, w·x_n + b))²
    ∂C/∂w = (2/N) Σ (w·x_n + b - y_n) x_n over the active inputs, those with w·x_n + b > 0
    ∂C/∂b = the same without x_n
    """
    w, b = theta[:-1], theta[-1]
    z = X @ w + b
    e = np.where(z > 0, z - y, 0)
    return np.mean((y - np.maximum(0, z)) ** 2), 2 / len(X) * np.append(e @ X, e.sum())


def magnitudes(theta: np.ndarray, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """∂C/∂θ with the magnitude of every term, so that none cancel: what rounding is relative to."""
    w, b = theta[:-1], theta[-1]
    e = np.where(X @ w + b > 0, np.abs(X) @ np.abs(w) + abs(b) + np.abs(y), 0)
    return 2 / len(X) * np.append(e @ np.abs(X), e.sum())


def as_theta(params: tuple[fnn.Layer, ...]) -> jax.Array:
    """(w, b) of the single unit whose W is (1, n)."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def neuron_cost() -> fnn.Cost:
    """C of one relu unit with its parameters as a library's: W (1, n) and b (1,), X (N, n), y (N, 1)."""
    return fnn.cost(fnn.mlp([], output=fnn.relu), fnn.squared_error)


def descend(flags: Flags, params: tuple[fnn.Layer, ...], X: jax.Array, y: jax.Array):
    """The gradient at the start, θ after the last step, and every θ from start to end."""
    cost, optimizer = neuron_cost(), optax.sgd(flags.learning_rate)

    def step(state, _):
        return fnn.train_step(cost, optimizer, state, X, y)[0], as_theta(state.params)

    _, gradient = fnn.value_and_grad(cost)(params, X, y)
    state = fnn.train_state(optimizer, params, jax.random.key(0))  # a key that nothing uses
    state, path = jax.lax.scan(step, state, length=flags.steps)
    end = as_theta(state.params)
    return as_theta(gradient), end, jnp.append(path, end[None], axis=0)


def fit(flags: Flags, n: int) -> Fits:
    """Neurons of n inputs: all starts on all data sets as one compiled program."""
    D = min(flags.data_sets, QUICK_DATA_SETS) if flags.quick else flags.data_sets
    S = min(flags.starts, QUICK_STARTS) if flags.quick else flags.starts
    X = np.stack([np.random.default_rng((flags.seed, n, d)).standard_normal((POINTS, n)) for d in range(D)])
    y = np.maximum(0, X @ truth(n)[:-1] + truth(n)[-1])

    def run(keys, X, y):
        def one(key):
            params = fnn.init(key, (n, 1), weights=fnn.unit_normal, bias=fnn.unit_normal, dtype=jnp.float64)
            gradient, end, path = descend(flags, params, X, y)
            return as_theta(params), gradient, end, path if n == 1 else path[:0]

        return jax.vmap(one)(keys)

    with jax.enable_x64(True):  # float64, to see how many digits come back
        keys = jax.random.split(jax.random.key(flags.seed), (D, S))
        results = jax.device_get(jax.jit(jax.vmap(run))(keys, X, y[..., None]))
    fits = Fits(X, y, *results)
    diverged = int(np.sum(~np.isfinite(fits.end).all(axis=-1)))
    if diverged:
        raise SystemExit(
            f"neuron: with {n} input{'s' * (n > 1)} {diverged} of {D * S} neurons became NaN or infinite. "
            "Try a smaller --learning-rate."
        )
    return fits


def measure(flags: Flags) -> dict[int, Fits]:
    """Number of inputs -> all neurons of as many inputs."""
    return {n: fit(flags, n) for n in (QUICK_INPUTS if flags.quick else INPUTS)}


def weighted_inputs(fits: Fits, theta: np.ndarray) -> np.ndarray:
    """w·x + b of every neuron for every input, (D, S, N)."""
    return np.einsum("dsi,dni->dsn", theta[..., :-1], fits.X) + theta[..., -1:]


def distances(theta: np.ndarray) -> np.ndarray:
    """‖θ - truth‖, over the last axis."""
    return np.linalg.norm(theta - truth(theta.shape[-1] - 1), axis=-1)


def outcomes(fits: Fits) -> np.ndarray:
    """What became of every neuron, (D, S): an index into OUTCOMES."""
    recovered = distances(fits.end) <= NEGLIGIBLE
    dead = (weighted_inputs(fits, fits.start) <= 0).all(axis=-1)
    off = (weighted_inputs(fits, fits.end) <= NEGLIGIBLE).all(axis=-1)
    return np.select([recovered, dead, off], range(3), default=3)


def rounding_errors(fits: Fits) -> float:
    """The largest difference of the library's gradients from the closed form, in rounding errors.

    One is eps times the sum of the terms' magnitudes.
    """
    worst = 0.0
    for X, y, starts, gradients in zip(fits.X, fits.y, fits.start, fits.gradient, strict=True):
        for theta, gradient in zip(starts, gradients, strict=True):
            difference = np.abs(gradient - closed_form(theta, X, y)[1])
            unit = np.finfo(float).eps * magnitudes(theta, X, y)
            units = np.divide(difference, unit, out=np.where(difference > 0, inf, 0.0), where=unit > 0)
            worst = max(worst, float(units.max()))
    return worst


def never_moved(fits: Fits) -> np.ndarray:
    """Is the gradient exactly 0 at the start, and the end the start to the last bit? (D, S)"""
    return (fits.gradient == 0).all(axis=-1) & (fits.end == fits.start).all(axis=-1)


def points_right(fits: Fits) -> np.ndarray:
    """Has w at the start a positive product with the true w? (D, S)"""
    w = fits.start[..., :-1]
    return w @ truth(w.shape[-1])[:-1] > 0


def report(result: dict[int, Fits]) -> str:
    """The table, and how exact gradients, dead neurons and recovered parameters are."""
    rows: list[tuple[str, ...]] = [("inputs", *OUTCOMES)]
    for n, fits in result.items():
        shares = [np.mean(outcomes(fits) == k, axis=1) for k in range(len(OUTCOMES))]
        cells = [f"{np.median(share):.1%} ({share.min():.1%}–{share.max():.1%})" for share in shares]
        rows.append((str(n), *cells))

    def all_of(numbers):
        return np.concatenate([np.ravel(numbers(fits)) for fits in result.values()])

    became, away = all_of(outcomes), all_of(lambda fits: distances(fits.end))
    is_dead, is_recovered = became == DEAD, became == RECOVERED
    right = all_of(points_right) & ~is_dead
    D, S = result[1].start.shape[:2]
    return "\n".join(
        (
            f"What becomes of a neuron: shares of {S} starts, the median of {D} data sets (lowest–highest)",
            aligned(rows, "><<<<"),
            "",
            "Gradient:   the library's and the closed form are at most "
            f"{max(map(rounding_errors, result.values())):.1f} rounding errors apart",
            f"Dead:       {np.sum(is_dead & all_of(never_moved)):,} of {is_dead.sum():,} have a gradient of "
            "exactly 0 and stay where they are to the last bit",
            f"Recovered:  (w, b) is off by at most {away[is_recovered].max(initial=0):.0e}; "
            f"of all others by at least {away[~is_recovered].min(initial=inf):.0e}",
            f"Direction:  {np.sum(right & is_recovered):,} of the {right.sum():,} that start with "
            "w·w_true > 0, and not dead, recover",
        )
    )


def draw(result: dict[int, Fits]) -> Figure:
    """Neurons of one input: their functions, their ways in the plane (w, b), and distances; one data set."""
    fits = result[1]
    became = outcomes(fits)
    recovered, dead, off = (np.mean(became == k) for k in (RECOVERED, DEAD, OFF))
    finding = f"One relu neuron, {became.size:,} starts: {recovered:.0%} recover the true w and b"
    if recovered:
        worst = distances(fits.end)[became == RECOVERED].max() / np.linalg.norm(truth(1))
        finding += f" to {-np.log10(max(worst, np.finfo(float).eps)):.0f} digits"
    finding += f",\n{dead:.0%} are dead from the start and never move, {off:.0%} switch off on the way"
    titles = (
        "Data set 1, a trained neuron of each kind",
        f"Data set 1, ways of (w, b) from {len(became[0])} starts",
        "Data set 1, distance of (w, b) to the truth",
    )
    figure, (functions, plane, curves) = panels(finding, titles, height=4.4)
    _draw_functions(functions, fits, became[0])
    _draw_plane(plane, fits, became[0])
    _draw_distances(curves, fits, became[0])
    figure.legend(*plane.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def _draw_functions(axes: Axes, fits: Fits, became: np.ndarray) -> None:
    """Targets, and the first neuron of every outcome, from a little outside the inputs."""
    X, y = fits.X[0, :, 0], fits.y[0]
    x = np.linspace(X.min() - 0.5, X.max() + 0.5, 500)
    axes.scatter(X, y, s=18, color="0.6", edgecolors="black", linewidths=0.4, label="data")
    for k in np.unique(became):
        w, b = fits.end[0, np.argmax(became == k)]
        axes.plot(x, np.maximum(0, w * x + b), color=COLORS[k], zorder=3 - k / 4)
    w, b = truth(1)
    axes.plot(x, np.maximum(0, w * x + b), "k--", linewidth=1, label="true neuron", zorder=4)
    axes.set(xlabel="input x", ylabel="output max(0, wx + b)", xlim=(x[0], x[-1]))
    axes.legend(loc="upper left")


def _draw_plane(axes: Axes, fits: Fits, became: np.ndarray) -> None:
    """The way of every neuron from its start, a dot. In the wedge a neuron is active for no input."""
    for k in np.unique(became):
        paths = fits.path[0, became == k, : SHOWN_STEPS + 1]
        axes.plot(*np.moveaxis(paths, -1, 0).swapaxes(1, 2), color=COLORS[k], linewidth=0.6, alpha=0.6)
        axes.plot(*paths[:, 0].T, "o", markersize=2.5, color=COLORS[k], label=f"{OUTCOMES[k]}: {len(paths)}")
    X = fits.X[0, :, 0]
    w, (low, high) = np.linspace(*axes.get_xlim(), 200), axes.get_ylim()
    edge = -np.maximum(w * X.min(), w * X.max())  # below it wx + b ≤ 0 for all x
    axes.fill_between(w, low, edge, color="tab:red", alpha=0.12, linewidth=0, label="active for no input")
    axes.plot(*truth(1), "k*", markersize=11, linestyle="none", label="true (w, b)")
    axes.set(xlabel="weight w", ylabel="bias b", xlim=(w[0], w[-1]), ylim=(low, high))


def _draw_distances(axes: Axes, fits: Fits, became: np.ndarray) -> None:
    """Of every neuron; and larger, the first steps of some that do not recover."""
    inset = axes.inset_axes((0.6, 0.42, 0.38, 0.4))
    inset.set_title("some of the others", fontsize=10)
    for k in np.unique(became)[::-1]:
        away = distances(fits.path[0, became == k, : SHOWN_STEPS + 1]).T
        axes.plot(away, color=COLORS[k], linewidth=0.6, alpha=0.6)
        if k != RECOVERED:
            inset.plot(away[:31, :12], color=COLORS[k], linewidth=0.8)
    inset.grid(alpha=0.3)
    axes.set(xlabel="step", ylabel="‖(w, b) - truth‖", yscale="log", ylim=(1e-17, None))


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    result = measure(flags)
    print(report(result))
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
