"""How far do signals get through 20 layers, forward and backward, and what does it cost if they do not?

    python -m experiments.initialization        (--help lists the flags)

Weights start with mean 0 and variance σ², biases at 0. In wide layers of n neurons the mean squares of the
activations a^l and errors δ^l then obey recursions (He et al. 2015, §2.2; Poole et al. 2016; Schoenholz
et al. 2017), with q^l the mean square of z^l and x a unit normal number:

    q^l = nσ² E[(a^{l-1})²],   E[(a^l)²] = E[σ(√q^l x)²]
    E[(δ^l)²] = nσ² E[σ′(√q^l x)²] E[(δ^{l+1})²]

For relu both factors are nσ²/2 a layer, whatever q: He's start nσ² = 2 keeps the signal, LeCun's and
Glorot's nσ² = 1 (the same start, where all widths are equal) halves it. For tanh and small q both are nσ²;
a large q saturates: forward the signal stays, backward it grows where nσ² E[σ′²] > 1.

Measured: every a^l and δ^l of one `fnn.backprop`, for unit normal inputs and errors δ^L. Then the same
starts, 64 neurons wide, learn the handwritten digits by the same stochastic gradient descent; a network that
learns nothing stays at the cost log 10 of a guess. Medians over runs.

Expected answer: factors within 2 % of the theory's, forward and backward. 19 layers down an error's mean
square is 10⁻³⁶ (tanh, std 0.01) or 10³⁴ (relu, std 1) of the last one's. relu learns from He's start alone:
cost 0.02 after 500 steps, 2.30 = log 10 from std 0.01, 2.28 to 2.30 from Glorot's and LeCun's, and from std 1
it diverges. tanh bears more: 0.03 from He's start, 0.08 from Glorot's, 0.10 from LeCun's; 2.30 from std 0.01,
and from std 1, where errors grow 6-fold a layer, 4, worse than a guess.

Sources: besides these, Krizhevsky et al. (2012) for the standard deviation 0.01; Nielsen (2015), ch. 1, for
unit normal weights; LeCun et al. (1998), §4.6; Glorot & Bengio (2010), §4.2.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, log
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import fnn
from experiments import command, digits
from experiments.batch_size import batches
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

LAYERS = 20
EXAMPLES = 100  # behind every mean square
TRAINED_WIDTH = 64  # of the hidden layers of the networks that learn; wider ones tell the same, more slowly
BATCH_SIZE = 64
LAST = 20  # steps whose mean is the cost at the end
BLOCK = 10  # steps whose mean is a point of a curve

# name -> (initialiser, its variance for n inputs and n outputs)
STARTS: dict[str, tuple[Callable[..., jax.Array], Callable[[int], float]]] = {
    "std 0.01": (jax.nn.initializers.normal(0.01), lambda n: 1e-4),
    "LeCun": (fnn.lecun_normal, lambda n: 1 / n),
    "Glorot": (fnn.glorot_normal, lambda n: 1 / n),
    "He": (fnn.he_normal, lambda n: 2 / n),
    "std 1": (fnn.unit_normal, lambda n: 1.0),
}
ACTIVATIONS = {"tanh": fnn.tanh, "relu": fnn.relu}


@dataclass(frozen=True)
class Flags(command.Flags):
    """Signals through 20 layers from five starts, and what they mean for training."""

    width: int = 128
    """Neurons in each layer whose signals are measured."""
    runs: int = 9
    """Networks of each kind; medians over them."""
    learning_rate: float = 0.02
    """Of all trained networks."""
    steps: int = 500
    """Of training."""
    quick: bool = False
    """At most 64 neurons, 3 runs and 200 steps."""

    def check(self) -> None:
        super().check()
        # Narrower layers of relu may be dead; wider ones, of every start and run, would fill gigabytes.
        expect("--width", "an integer from 32 to 512", self.width, 32 <= self.width <= 512)
        expect("--runs", "an integer of at least 1", self.runs, self.runs >= 1)
        expect("--learning-rate", "a finite number above 0", self.learning_rate, 0 < self.learning_rate < inf)
        expect("--steps", f"an integer of at least {LAST}", self.steps, self.steps >= LAST)


class Signals(NamedTuple):
    """Common logarithms of mean squares; the last axis is the layer."""

    activations: Any  # of a^0, ..., a^{L-1}
    errors: Any  # of δ^1, ..., δ^L


class Result(NamedTuple):
    measured: dict[str, Signals]  # by activation, each (starts, runs, L)
    theory: dict[str, Signals]  # (starts, L)
    costs: dict[str, np.ndarray]  # (starts, runs, steps), of the batch before every step


def growth(signals: Signals) -> tuple[np.ndarray, np.ndarray]:
    """The factor per layer, forward and backward: the geometric mean over all layers."""
    layers = signals.activations.shape[-1] - 1
    forward = signals.activations[..., -1] - signals.activations[..., 0]
    backward = signals.errors[..., 0] - signals.errors[..., -1]
    return 10 ** (forward / layers), 10 ** (backward / layers)


def inner_product_forward(Z: jax.Array, y: jax.Array):
    """C_n = ⟨y, z⟩, so that ∂C_n/∂z = y: a loss whose error δ^L is ours to choose."""
    return jnp.sum(Z * y, axis=-1), y


def inner_product_pullback(y: jax.Array, C_bar: jax.Array):
    return C_bar[..., None] * y, None


inner_product = fnn.Rule(inner_product_forward, inner_product_pullback)


def log_mean_square(a: jax.Array) -> jax.Array:
    """log10 of the mean of a², where a² itself may be out of range."""
    largest = jnp.abs(a).max()
    return 2 * jnp.log10(largest) + jnp.log10(jnp.mean((a / largest) ** 2))


def fresh(sizes: tuple[int, ...], runs: int, key: jax.Array) -> tuple[fnn.Layer, ...]:
    """Parameters of every start and run, along two leading axes."""
    # Not compiled as a whole: layers of one shape share a compiled draw.
    networks = [
        jax.vmap(lambda key: fnn.init(key, sizes, weights=weights, dtype=jnp.float32))(
            jax.random.split(key, runs)
        )
        for weights, _ in STARTS.values()
    ]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *networks)


@partial(jax.jit, static_argnames="cost")
def measure_signals(cost: fnn.Cost, params, X: jax.Array, Y: jax.Array) -> Signals:
    """For every start and run; Y is δ^L."""

    def one(params):
        sweep = fnn.backprop(cost, params, X, Y)
        return Signals(*(jnp.stack([log_mean_square(a) for a in s]) for s in (sweep.inputs, sweep.errors)))

    return jax.vmap(jax.vmap(one))(params)


def normal_mean(values: Callable[[np.ndarray], np.ndarray]) -> float:
    """E[f(x)] of a unit normal x, by the trapezoidal rule.

    Gauss–Hermite nodes would be too far apart for tanh′(√q x), a peak of width 1/√q.
    """
    x = np.linspace(-10, 10, 20_001)
    return float(np.trapezoid(values(x) * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), x))


def mean_squares(activation: str, q: float) -> tuple[float, float]:
    """E[σ(√q x)²] and E[σ′(√q x)²] of a unit normal x."""
    if activation == "relu":
        return q / 2, 1 / 2
    return (
        normal_mean(lambda x: np.tanh(np.sqrt(q) * x) ** 2),
        normal_mean(lambda x: (1 - np.tanh(np.sqrt(q) * x) ** 2) ** 2),
    )


def predict(activation: str, gain: float) -> Signals:
    """The recursions for layers of equal, infinite width with nσ² = gain, from E[(a^0)²] = E[(δ^L)²] = 1."""
    a, slopes = [1.0], []
    for _ in range(LAYERS - 1):
        square, slope = mean_squares(activation, gain * a[-1])
        a.append(square)
        slopes.append(slope)
    delta = np.cumprod([1.0, *(gain * slope for slope in reversed(slopes))])[::-1]
    return Signals(np.log10(a), np.log10(delta))


@partial(jax.jit, static_argnames="cost")
def train(cost: fnn.Cost, rate, states, data, rows):
    """The cost of every step, (starts, runs, steps). rows: (runs, steps, m)"""

    def one(state, rows):
        def step(state, batch):
            return fnn.train_step(cost, optax.sgd(rate), state, *(a[batch] for a in data))

        return jax.lax.scan(step, state, rows)[1]

    return jax.vmap(jax.vmap(one), (0, None))(states, rows)


def measure(flags: Flags) -> Result:
    width, runs, steps = flags.width, flags.runs, flags.steps
    if flags.quick:
        width, runs, steps = min(width, 64), min(runs, 3), min(steps, 200)
    weights_key, signal_key, train_key = jax.random.split(jax.random.key(flags.seed), 3)
    params = fresh((width,) * (LAYERS + 1), runs, weights_key)
    X, Y = jax.random.normal(signal_key, (2, EXAMPLES, width), jnp.float32)

    (images, y), _ = digits.load(flags.seed)
    data = jnp.asarray(digits.standardised(images, images)), jnp.asarray(y)
    deep = fresh((64, *(TRAINED_WIDTH,) * (LAYERS - 1), 10), runs, train_key)
    states = jax.vmap(jax.vmap(lambda params: fnn.train_state(optax.sgd(0.0), params, train_key)))(deep)
    rows = [batches(np.random.default_rng((flags.seed, run)), BATCH_SIZE, steps) for run in range(runs)]

    measured, theory, costs = {}, {}, {}
    for name, activation in ACTIVATIONS.items():
        net = fnn.mlp(activation)
        measured[name] = jax.device_get(measure_signals(fnn.cost(net, inner_product), params, X, Y))
        predictions = [predict(name, width * variance(width)) for _, variance in STARTS.values()]
        theory[name] = Signals(*(np.stack(part) for part in zip(*predictions, strict=True)))
        cost = fnn.cost(net, fnn.softmax_cross_entropy_with_integer_labels)
        rate = jnp.float32(flags.learning_rate)
        costs[name] = np.asarray(train(cost, rate, states, data, np.stack(rows)))
    return Result(measured, theory, costs)


def last_costs(result: Result, activation: str) -> np.ndarray:
    """The cost at the end of each start, a median over runs; inf where training diverged."""
    costs = result.costs[activation][:, :, -LAST:].mean(axis=2)
    return np.median(np.where(np.isfinite(costs), costs, inf), axis=1)


def finding(result: Result) -> str:
    """Which starts have learnt: their cost is at most half that of a guess."""
    parts = []
    for activation in ACTIVATIONS:
        last = last_costs(result, activation)
        learnt = [f"{start} {c:.2f}" for start, c in zip(STARTS, last, strict=True) if c <= log(10) / 2]
        parts.append(f"{activation} {', '.join(learnt) or 'none'}")
    steps = result.costs["relu"].shape[-1]
    return f"Starts from which {LAYERS} layers learn, and cost after {steps} steps: {'; '.join(parts)}"


def report(result: Result) -> str:
    rows = [("", "start", "forward", "expected", "backward", "expected", "cost at the end")]
    for activation in ACTIVATIONS:
        forward, backward = (np.median(each, axis=1) for each in growth(result.measured[activation]))
        expected = growth(result.theory[activation])
        last = last_costs(result, activation)
        for i, start in enumerate(STARTS):
            a, a_expected, delta, delta_expected = (
                f"{factor[i]:.3g}" for factor in (forward, expected[0], backward, expected[1])
            )
            end = f"{last[i]:.4f}" if last[i] < inf else "diverged"
            rows.append((activation, start, a, a_expected, delta, delta_expected, end))
    runs, layers = result.measured["relu"].activations.shape[1:]
    return (
        f"Growth factor per layer of the mean square of a^l and of δ^l, {layers} layers, {runs} runs; "
        f"log 10 = {log(10):.4f}\n\n{aligned(rows, '<<>>>>>')}\n\n{finding(result)}."
    )


def draw(result: Result) -> Figure:
    titles = [
        f"{activation}: {what}"
        for activation in ACTIVATIONS
        for what in ("activations", "errors", "training on the digits")
    ]
    figure, panel = panels(finding(result), titles)
    for activation, row in zip(ACTIVATIONS, (panel[:3], panel[3:]), strict=True):
        measured, theory = result.measured[activation], result.theory[activation]
        layers = np.arange(LAYERS)
        for i, start in enumerate(STARTS):
            # Where starts agree the one below still shows: larger dots, a broader line.
            style = {"color": f"C{i}", "label": start, "markersize": (5, 8, 4, 5, 5)[i]}
            width = (6, 3.5, 1.5, 1.5, 1.5)[i]
            for axes, x, logs, lines in (
                (row[0], layers, measured.activations[i], theory.activations[i]),
                (row[1], layers + 1, measured.errors[i], theory.errors[i]),
            ):
                axes.plot(x, 10 ** np.median(logs.astype(float), axis=0), "o", **style)
                axes.plot(x, 10**lines, linewidth=0.8, color="black", label="theory of wide layers")
            costs = result.costs[activation][i]
            blocks = costs[:, : costs.shape[1] // BLOCK * BLOCK].reshape(len(costs), -1, BLOCK).mean(axis=2)
            steps = BLOCK * (np.arange(blocks.shape[1]) + 0.5)
            row[2].plot(steps, np.median(blocks, axis=0), linewidth=width, color=f"C{i}")
            if last_costs(result, activation)[i] == inf:
                text = f"{start}: {np.median(costs[:, 0]):.0e} at the first step, then diverges"
                row[2].text(0.5, 0.93, text, color=f"C{i}", transform=row[2].transAxes, ha="center")
        row[2].axhline(log(10), linestyle=":", color="black", zorder=1, label="cost of a guess, log 10")
        for axes, what in zip(row, ("$a^l$", "$δ^l$"), strict=False):
            axes.set(yscale="log", xlabel="layer l", ylabel=f"mean square of {what}", xlim=(-0.5, 20.5))
            axes.set_xticks(range(0, LAYERS + 1, 5))
        row[2].set(yscale="log", xlabel="step", ylabel="cost (nats per digit)")
        row[2].set_ylim(top=30)
    handles = {}
    for axes in panel[1:3]:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    labels = [*STARTS, *(label for label in handles if label not in STARTS)]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=len(labels))
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
