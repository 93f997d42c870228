"""Does a network learn whose errors come back through random weights, and so are no derivatives?

    python -m experiments.feedback_alignment        (--help lists the flags)

Networks 64-128-64-32-10 (tanh, softmax cross-entropy, plain stochastic gradient descent in batches of 32)
learn the handwritten digits. On the way back, ā^l is made from the errors with other weights than those of
the way forward; every layer then takes δ^l and a^{l-1} for its gradient as ever:

    backpropagation             ā^l = (W^{l+1})ᵀ δ^{l+1}
    sign symmetry               ā^l = (F^{l+1})ᵀ δ^{l+1}, F = sign(W), as large as W's entries on average
    feedback alignment          the same, F fixed and random
    direct feedback alignment   ā^l = (D^l)ᵀ δ^L, D fixed and random
    last layer alone            the hidden layers stay as they began: do the others use theirs at all?
    no hidden layer             64-10: what can be learned without any?

Before each step two gradients of its batch are compared, the rule's and the true one, layer by layer: below
90° a small step along the rule's goes downhill. Beside it, whether the weights of the way forward have become
like those of the way back: the angle of W^{l+1} and F^{l+1}, or of W^L ⋯ W^{l+1} and D^l.

Each rule has the learning rate of a grid, factors of 2 apart, with the best accuracy on 287 of the training
digits that are held out for this (mean over runs); the test digits have no part in it. Runs differ in their
weights and the order of the digits, which are the same for all rules.

Expected answer: yes. With fixed random feedback the rule's gradient is at first at right angles to the true
one, 80° to 100° off in a hidden layer. Then it turns, since the weights of the way forward turn towards those
of the way back: layers 1, 2 and 3 end at 77°, 56° and 36° by feedback alignment, at 65°, 52° and 40° by the
direct kind. After the first epoch all steps are below 90°, but for 1 % in layer 1 by feedback alignment; the
weights that lead back to it are still 85° off at the end. Sign symmetry begins at 57°, 47° and 34°, and ends
at 32°, 28° and 20°.

What that is worth, in test digits read correctly, means of 10 runs (360 digits: one is 0.3 %):
backpropagation, sign symmetry and direct feedback alignment 97.0 %, feedback alignment 96.6 %, the last layer
alone 92.0 %. So the hidden layers do learn. But digits are easy: a network without any reads 95.7 %, and with
--seed 1, another split and other weights, 96.5 %, where backpropagation reads 97.3 % and feedback alignment
96.6 %: there its three hidden layers are worth next to nothing. With --activation relu random feedback does
worse than none: 94.9 %, direct 95.2 %, no hidden layer 95.8 %, backpropagation 96.9 %.

Sources: Lillicrap et al. (2016), *Random synaptic feedback weights support error backpropagation for deep
learning*, fig. 2 and 3; Liao, Leibo & Poggio (2016), *How important is weight symmetry in backpropagation?*;
Nøkland (2016), *Direct feedback alignment provides learning in deep neural networks*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import fnn
from experiments import command, digits
from experiments.command import expect
from experiments.figures import panels
from fnn.tables import aligned

SIZES, SINGLE = (64, 128, 64, 32, 10), (64, 10)
TRUE, SIGNS, RANDOM, DIRECT = (
    "backpropagation",
    "sign symmetry",
    "feedback alignment",
    "direct feedback alignment",
)
LAST, NONE = "last layer alone", "no hidden layer"
RULES = (TRUE, SIGNS, DIRECT, RANDOM, LAST, NONE)
OTHERS = (SIGNS, DIRECT, RANDOM)  # whose errors come back by other weights
QUICK_RULES = (TRUE, DIRECT, RANDOM, LAST)
COLORS: dict[str, str] = {
    TRUE: "black",
    SIGNS: "tab:blue",
    DIRECT: "tab:green",
    RANDOM: "tab:orange",
    LAST: "tab:red",
    NONE: "tab:gray",
}
LAYER_COLORS = ("tab:purple", "tab:olive", "tab:cyan")
RATES = tuple(2.0**k for k in range(-5, 4))
QUICK_RATES, QUICK_RUNS, QUICK_EPOCHS = (0.25, 1.0), 2, 5
BATCH_SIZE = 32
HELD_OUT = 287  # of 1437 training digits, a fifth
WINDOWS = 24  # points of a curve, evenly along the logarithm of the steps


@dataclass(frozen=True)
class Flags(command.Flags):
    """Trains networks whose errors come back through other weights, and measures where they point."""

    activation: Literal["tanh", "relu"] = "tanh"
    """Activation of the hidden layers."""
    epochs: int = 20
    """Times that training goes through the data."""
    runs: int = 10
    """Runs of each rule and rate."""
    quick: bool = False
    """Four of the rules, at most 2 runs and 5 epochs, and two learning rates, for a first look."""

    def check(self) -> None:
        super().check()
        expect("--epochs", "an integer from 2 to 1000", self.epochs, 2 <= self.epochs <= 1000)
        expect("--runs", "an integer from 1 to 100", self.runs, 1 <= self.runs <= 100)


class Runs(NamedTuple):
    """What `train` records; of every rate and run, along the first two axes."""

    gradient_angles: np.ndarray  # (rates, runs, steps, L), degrees, before each step; none where all are 0
    weight_angles: np.ndarray  # (rates, runs, steps, L - 1), likewise
    accuracies: np.ndarray  # (rates, runs, epochs, 3), of training, held-out and test digits


class Outcome(NamedTuple):
    """The runs of one rule at its best rate."""

    rate: float
    at_edge: bool  # of the grid of rates
    gradient_angles: np.ndarray  # (runs, steps, L)
    weight_angles: np.ndarray
    accuracies: np.ndarray  # (runs, epochs, 3)

    @property
    def test(self) -> np.ndarray:
        """(runs,), at the end."""
        return self.accuracies[:, -1, 2]


def network(activation: str) -> tuple[fnn.Network, fnn.Cost]:
    net = fnn.mlp(getattr(fnn, activation))
    return net, fnn.cost(net, fnn.softmax_cross_entropy_with_integer_labels)


@partial(jax.jit, static_argnames=("activation", "sizes"))
def draw_params(keys, activation: str, sizes: tuple[int, ...] = SIZES) -> Any:
    """Random parameters for every key."""
    weights = fnn.he_normal if activation == "relu" else fnn.lecun_normal
    return jax.vmap(lambda key: fnn.init(key, sizes, weights=weights, dtype=jnp.float32))(keys)


def starts(keys, activation: str) -> dict[str, tuple[Any, Any]]:
    """Of every rule and run: the parameters, the same for all rules with hidden layers, and what the rule
    draws once for its way back, None for most."""
    params_keys, feedback_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    params = draw_params(params_keys, activation)
    fixed = {
        RANDOM: draw_params(feedback_keys, activation),
        DIRECT: jax.vmap(fnn.direct_feedback)(feedback_keys, params),
    }
    begin = {rule: (params, fixed.get(rule)) for rule in RULES}
    return {**begin, NONE: (draw_params(params_keys, activation, SINGLE), None)}


def feedback(rule: str, params: Any, fixed: Any) -> Any:
    """What the way back reads in the next step."""
    if rule == SIGNS:
        return jax.tree.map(lambda leaf: jnp.mean(jnp.abs(leaf)) * jnp.sign(leaf), params)
    return params if fixed is None else fixed


def angle(a: Any, b: Any) -> jax.Array:
    """The angle in degrees of two pytrees taken as vectors; NaN if one is 0.

    2 atan2(‖u - v‖, ‖u + v‖) of the unit vectors, exactly 0 for equal ones, where an arccos loses half of
    the digits: Kahan (2006), *How Futile are Mindless Assessments of Roundoff*, §12.
    """
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    u, v = a / jnp.linalg.norm(a), b / jnp.linalg.norm(b)
    return jnp.degrees(2 * jnp.atan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v)))


def gradient_angles(gradient: Any, truth: Any) -> jax.Array:
    """(L,), of W and b of a layer together."""
    return jnp.array([angle(*layers) for layers in zip(gradient, truth, strict=True)])


def weight_angles(params: Any, way_back: Any) -> jax.Array:
    """(L - 1,): of F^{l+1} and W^{l+1}, or of D^l and the whole way forward from layer l, W^L ⋯ W^{l+1}."""
    forward = [layer.W for layer in params[1:]]
    if isinstance(way_back, fnn.DirectFeedback):
        for l in reversed(range(len(forward) - 1)):
            forward[l] = forward[l + 1] @ forward[l]
        back = way_back.matrices
    else:
        back = [layer.W for layer in way_back[1:]]
    return jnp.array([angle(F, W) for F, W in zip(back, forward, strict=True)])


def rule_gradient(rule: str, cost: fnn.Cost, params: Any, way_back: Any, *batch: Any) -> Any:
    """The gradient by which a rule steps."""
    gradient = fnn.gradient(fnn.backprop(cost, params, *batch, feedback=way_back))
    if rule == LAST:
        return *jax.tree.map(jnp.zeros_like, gradient[:-1]), gradient[-1]
    return gradient


@partial(jax.jit, static_argnames=("rule", "activation"))
def train(rule: str, activation: str, rates, params, fixed, rows, parts) -> tuple[jax.Array, ...]:
    """`Runs`: every rate with every run, side by side in one scan.

    params, fixed: how each run starts, and its `fixed_feedback`
    rows: (runs, epochs, steps, m), of the first of `parts`
    parts: (X, y) of the training, the held-out and the test digits
    """
    net, cost = network(activation)
    data, ends = parts[0], np.cumsum([len(y) for _, y in parts])
    X, y = (jnp.concatenate(arrays) for arrays in zip(*parts, strict=True))

    def run(rate, params, fixed, rows):
        optimizer = optax.sgd(rate)

        def step(carry: Any, batch_rows):
            params, optimizer_state = carry
            batch = [a[batch_rows] for a in data]
            way_back = feedback(rule, params, fixed)
            gradient = rule_gradient(rule, cost, params, way_back, *batch)
            angles = jnp.zeros(0), jnp.zeros(0)
            if rule in OTHERS:  # the true gradient shares the forward pass, which compiled code has once
                truth = fnn.gradient(fnn.backprop(cost, params, *batch))
                angles = gradient_angles(gradient, truth), weight_angles(params, way_back)
            updates, optimizer_state = optimizer.update(gradient, optimizer_state)
            moved: Any = optax.apply_updates(params, updates)
            return (moved, optimizer_state), angles

        def epoch(carry, rows):
            carry, angles = jax.lax.scan(step, carry, rows)
            right = jnp.argmax(net(carry[0], X), axis=-1) == y  # one pass for all parts: it compiles faster
            accuracies = jnp.array(
                [jnp.mean(part, dtype=jnp.float32) for part in jnp.split(right, ends[:-1])]
            )
            return carry, (*angles, accuracies)

        _, (gradients, weights, accuracies) = jax.lax.scan(epoch, (params, optimizer.init(params)), rows)
        steps = rows.shape[0] * rows.shape[1]
        return gradients.reshape(steps, -1), weights.reshape(steps, -1), accuracies

    return jax.vmap(jax.vmap(run, (None, 0, 0, 0)), (0, None, None, None))(rates, params, fixed, rows)


def best(runs: Runs, rates: Sequence[float]) -> Outcome:
    """The rate whose runs end with the best mean accuracy on the held-out digits; the smallest of equals."""
    i = int(np.argmax(runs.accuracies[:, :, -1, 1].mean(axis=1)))
    return Outcome(rates[i], i in (0, len(rates) - 1), *(array[i] for array in runs))


def measure(flags: Flags) -> dict[str, Outcome]:
    rules, rates, n, epochs = RULES, RATES, flags.runs, flags.epochs
    if flags.quick:
        rules, rates, n, epochs = QUICK_RULES, QUICK_RATES, min(n, QUICK_RUNS), min(epochs, QUICK_EPOCHS)
    (X, y), (X_test, y_test) = digits.load(flags.seed)  # already in a random order
    N = len(y) - HELD_OUT
    parts = [(digits.standardised(Z, X[:N]), labels) for Z, labels in ((X, y), (X_test, y_test))]
    parts = [(parts[0][0][:N], y[:N]), (parts[0][0][N:], y[N:]), parts[1]]
    keys = jax.random.split(jax.random.key(flags.seed), n)
    steps = N // BATCH_SIZE
    rng = np.random.default_rng(flags.seed)
    orders = [[rng.permutation(N)[: steps * BATCH_SIZE] for _ in range(epochs)] for _ in range(n)]
    rows = np.array(orders, np.int32).reshape(n, epochs, steps, BATCH_SIZE)
    outcomes = {}
    begin = starts(keys, flags.activation)
    for rule in rules:
        params, fixed = begin[rule]
        runs = train(rule, flags.activation, np.asarray(rates, np.float32), params, fixed, rows, parts)
        outcomes[rule] = best(Runs(*jax.device_get(runs)), rates)
    return outcomes


def windows(steps: int) -> np.ndarray:
    """Edges of windows of steps, 0 to `steps`, evenly along the logarithm but a step long at least."""
    return np.unique(np.append(0, np.geomspace(1, steps, WINDOWS).round().astype(int)))


def averaged(angles: np.ndarray) -> np.ndarray:
    """Means over windows of steps, (runs, windows, layers) from (runs, steps, layers).

    A step without an angle, at which a batch's gradient is 0, is left out.
    """
    edges = windows(angles.shape[1])
    return np.stack(
        [np.nanmean(angles[:, a:b], axis=1) for a, b in zip(edges, edges[1:], strict=False)], axis=1
    )


def spread(numbers: np.ndarray, form: str) -> str:
    return f"{numbers.mean():{form}} ({numbers.min():{form}} to {numbers.max():{form}})"


def report(outcomes: dict[str, Outcome]) -> str:
    runs, epochs, _ = outcomes[TRUE].accuracies.shape
    rows = [("rule", "η", "training digits right", "test digits right")]
    for rule, outcome in outcomes.items():
        training = spread(outcome.accuracies[:, -1, 0], ".1%")
        rate = f"{outcome.rate:g}{'*' if outcome.at_edge else ''}"
        rows.append((rule, rate, training, spread(outcome.test, ".1%")))
    lines = [
        f"{runs} runs of {epochs} epochs each, mean and range; * at the edge of the grid of rates",
        "",
        aligned(rows, "<>>>"),
        "",
        "Angle of a rule's gradient and the true one",
    ]
    gradients = [["rule", "layer", "first step", "last epoch", "below 90° after epoch 1"]]
    weights = [["rule", "into layer", "first step", "last epoch"]]
    for rule, outcome in outcomes.items():
        if rule not in OTHERS:
            continue
        epoch = outcome.gradient_angles.shape[1] // epochs
        for l in range(len(SIZES) - 2):
            for rows, angles in ((gradients, outcome.gradient_angles), (weights, outcome.weight_angles)):
                ends = angles[:, 0, l], np.nanmean(angles[:, -epoch:, l], axis=1)
                rows.append([rule, f"{l + 1}", *(spread(end, ".0f") for end in ends)])
            later = outcome.gradient_angles[:, epoch:, l]
            gradients[-1].append(f"{(later[np.isfinite(later)] < 90).mean():.2%} of the steps")
    lines += [aligned(gradients, "<>>>>"), "", "Angle of the weights of the way back and of the way forward"]
    return "\n".join([*lines, aligned(weights, "<>>>"), "", finding(outcomes)])


def finding(outcomes: dict[str, Outcome]) -> str:
    last = outcomes[RANDOM].gradient_angles.shape[1] // outcomes[RANDOM].accuracies.shape[1]
    angles = [
        np.nanmean(outcomes[rule].gradient_angles[:, -last:, :-1], axis=(0, 1)) for rule in (RANDOM, DIRECT)
    ]
    low, high = np.min(angles), np.max(angles)
    right = [f"{rule} {outcome.test.mean():.1%}" for rule, outcome in outcomes.items()]
    return (
        f"By random feedback, gradients end {low:.0f}° to {high:.0f}° off the true ones.\n"
        f"Test digits read correctly: {', '.join(right[:3])},\n{', '.join(right[3:])}"
    )


def draw(outcomes: dict[str, Outcome]) -> Figure:
    drawn = [rule for rule in OTHERS if rule in outcomes]
    titles = (
        *(f"{rule.capitalize()}: off the gradient" for rule in drawn),
        "Weights of the way back and of the way forward",
        "Accuracy along training, mean",
        "Accuracy at the end",
    )
    figure, axes = panels(finding(outcomes), titles)
    layers = len(SIZES) - 2
    *angle_axes, weight_axes, accuracy_axes, end_axes = axes
    for panel, rule in zip(angle_axes, drawn, strict=True):
        for l in range(layers):
            _draw_angles(panel, outcomes[rule].gradient_angles[:, :, l], LAYER_COLORS[l], f"layer {l + 1}")
        panel.legend(title="mean and range of the runs", loc="lower left", ncols=layers, fontsize=8)
    for rule, style in ((RANDOM, "-"), (DIRECT, "--")):
        for l in range(layers):
            angles = outcomes[rule].weight_angles[:, :, l]
            _draw_angles(weight_axes, angles, LAYER_COLORS[l], f"{rule}, into {l + 1}", style)
    weight_axes.legend(fontsize=7, loc="lower left")

    for i, (rule, outcome) in enumerate(outcomes.items()):
        means = outcome.accuracies[:, :, 2].mean(axis=0)
        accuracy_axes.plot(np.arange(1, len(means) + 1), means, color=COLORS[rule], label=rule)
        end_axes.plot(outcome.test, np.full(len(outcome.test), i), "o", color=COLORS[rule], alpha=0.5)
        end_axes.plot(outcome.test.mean(), i, "|", color=COLORS[rule], markersize=22, markeredgewidth=2)
    worst = min(outcome.test.min() for outcome in outcomes.values())
    accuracy_axes.set(xlabel="epoch", ylabel="test digits read correctly", ylim=(min(0.8, worst - 0.02), 1))
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    accuracy_axes.legend(fontsize=8, loc="lower right")
    labels = [f"{rule}\nη = {outcome.rate:g}" for rule, outcome in outcomes.items()]
    end_axes.set(xlabel="test digits read correctly, every run and the mean")
    end_axes.set_yticks(range(len(outcomes)), labels, fontsize=8)
    end_axes.set_ylim(len(outcomes) - 0.4, -0.6)
    end_axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    return figure


def _draw_angles(axes: Axes, angles: np.ndarray, color: str, label: str, style: str = "-") -> None:
    """Mean and range of (runs, steps), over windows of steps."""
    edges = windows(angles.shape[1])
    middles = (edges[:-1] + 1 + edges[1:]) / 2
    means = averaged(angles[:, :, None])[:, :, 0]
    axes.plot(middles, means.mean(axis=0), style, color=color, label=label)
    axes.fill_between(middles, means.min(axis=0), means.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.axhline(90, color="black", linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="step", ylabel="angle (degrees)", ylim=(0, 110), yticks=range(0, 91, 15))


def run(flags: Flags) -> Figure:
    """The whole experiment: prints its findings and draws them."""
    outcomes = measure(flags)
    print(report(outcomes))
    return draw(outcomes)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
