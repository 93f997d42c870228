"""What tests draw: rules with their arguments, whole networks; and how far two numbers may differ.

Every generator takes a NumPy random generator and draws many instances at once, along a first axis, so
that one compilation serves many numbers. Sizes come from a handful.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import fnn as package
import tests.reference as reference

DTYPES = ("float64", "float32", "bfloat16", "float16")
INSTANCES = 16  # instances for each draw, through one vmap
SIZES = ((1, 1), (4, 3), (3, 4), (5, 5), (2, 17))  # (N, K)


def tolerance(dtype, fan_in: int = 1) -> float:
    """How far two right results of one computation may differ, relative to the largest entry.

    50 roundings: a rule is a dozen operations, each off by at most half an eps, seen from autodiff's own
    dozen; times √fan_in, the growth of the rounding error of a sum whose errors are independent.

    Where a test compares float64 numbers by name it is tighter than this, by the number of operations between
    the two: rtol 1e-15 is a few roundings (a closed form), 1e-14 some tens (a chain of gates, a short sum),
    1e-13 some hundreds (one layer), 1e-12 a whole network or training run; of float32, 1e-6 is a few.
    """
    return 50 * float(jnp.finfo(dtype).eps) * max(fan_in, 1) ** 0.5


@dataclass(frozen=True)
class Case:
    """A rule and how to test it."""

    rule: Any
    make: Callable[..., tuple]  # (rng, size) -> primals as NumPy arrays, INSTANCES along the first axis
    value: Callable[..., Any]  # the independent formula, on the primals of one instance
    smooth: Callable[..., Any] = field(default=lambda *primals: True)  # no kink within 1e-3 of the primals
    sizes: tuple = SIZES

    def draw(self, rng, size, dtype) -> tuple:
        """Primals for `INSTANCES` calls of the rule, floats of the dtype."""
        numbers = self.make(rng, size)
        return jax.device_put(jax.tree.map(lambda a: a.astype(dtype) if a.dtype == float else a, numbers))

    def draw_one(self, seed: int = 0, size=None) -> tuple:
        """Primals for a single call, in float64."""
        one = jax.tree.map(lambda a: a[0], self.make(np.random.default_rng(seed), size))
        return jax.device_put(one)  # by which nothing is compiled


def _normal(rng, shape, away_from=None):
    """Unit normal numbers; where there is a kink, none within 0.01 of it."""
    numbers = rng.standard_normal((INSTANCES, *shape))
    return numbers if away_from is None else away_from + numbers + 0.01 * np.sign(numbers)


def _probabilities(rng, shape):
    """Rows that sum to one, no entry below 0.02: logarithms of these are ordinary numbers.
    A single number is the probability of one of two outcomes."""
    K = max(shape[-1], 2)
    spread = min(1.0, np.log(49 / (K - 1)) / 2)  # the smallest of K is at least 1/(1 + (K - 1) e^(2 spread))
    exps = np.exp(rng.uniform(-spread, spread, (INSTANCES, *shape[:-1], K)))
    return (exps / exps.sum(axis=-1, keepdims=True))[..., : shape[-1]]


def _make_activation(rng, size):
    return (_normal(rng, size, away_from=0.0),)


def _make_regression(rng, size):
    """Targets around the outputs, errors on both sides of Huber's knees at 0.5 and 1, off the kink at 0."""
    Z = _normal(rng, size)
    e = 0.05 + rng.uniform(0, 1.9, Z.shape)
    return Z, Z - rng.choice([-1, 1], Z.shape) * e


def _make_logits(rng, size):
    """Soft labels whose rows do not sum to one: a gradient that took Σy for 1 would be wrong."""
    sums = rng.uniform(0.6, 1.4, (INSTANCES, size[0], 1))
    return _normal(rng, size), sums * _probabilities(rng, size)


def _make_probabilities(rng, size):
    return _probabilities(rng, size), _probabilities(rng, size)


def _make_classes(rng, size):
    return _normal(rng, size), rng.integers(0, size[-1], (INSTANCES, size[0]))


REGRESSION = (
    "half_squared_error",
    "squared_error",
    "mean_squared_error",
    "mean_absolute_error",
    "huber_loss(1.0)",
    "huber_loss(0.5)",
)
KINKED = ("relu", "leaky_relu(0.01)", "leaky_relu(0.3)", "elu(0.7)")
MAKE_LOSS = dict.fromkeys(REGRESSION, _make_regression) | {
    "softmax_cross_entropy": _make_logits,
    "sigmoid_binary_cross_entropy": _make_logits,
    "softmax_cross_entropy_with_integer_labels": _make_classes,
    "categorical_cross_entropy": _make_probabilities,
    "binary_cross_entropy": _make_probabilities,
}


def named(fnn, name: str):
    """The rule of that name, with its parameter, in the given copy of the package."""
    stem, _, parameter = name.rstrip(")").partition("(")
    rule = getattr(fnn, stem)
    return rule(float(parameter)) if parameter else rule


def rules(fnn) -> dict[str, Case]:
    """The table of leaf rules; a new rule is a new row in `reference`, and one here for its arguments."""
    table = [(name, _make_activation, reference.of_activation(name)) for name in reference.ACTIVATIONS]
    table += [(name, MAKE_LOSS[name], reference.of_loss(name)) for name in reference.LOSSES]
    return {
        # The softmax of one number is the constant 1: nothing but rounding is left to compare.
        name: Case(
            *(named(fnn, name), make, value, partial(_off_bends, name)),
            sizes=SIZES[1:] if name.startswith("softmax") else SIZES,
        )
        for name, make, value in table
    }


def _off_bends(name: str, z, *y) -> bool:
    """Whether no number is next to where the slope jumps or bends: differences have no meaning there."""
    stem, _, parameter = name.rstrip(")").partition("(")
    if stem in ("relu", "leaky_relu", "elu"):
        distances = z
    elif stem in ("huber_loss", "mean_absolute_error"):
        distances = np.abs(z - y[0]) - float(parameter or 0)
    else:
        return True
    return bool(np.abs(distances).min() > 1e-3)


# Gates: their domains, and the shapes of their inputs; pairs also with a single number that is expanded.
POSITIVE, NONZERO = ("log", "power(0.5)", "power(-2.0)"), ("reciprocal", "divide")
PAIRS = ("add", "subtract", "multiply", "divide", "maximum")
GATE_SHAPES = ((), (3,), (2, 3))
PAIRS_OF_SHAPES = (*((shape, shape) for shape in GATE_SHAPES), ((3,), ()), ((), (2, 3)))


def _make_gate(name: str):
    def entries(rng, shape):
        if name in POSITIVE:
            return rng.uniform(0.5, 2, (INSTANCES, *shape))
        if name in NONZERO:
            return rng.choice([-1, 1], (INSTANCES, *shape)) * rng.uniform(0.5, 2, (INSTANCES, *shape))
        return _normal(rng, shape)

    def make(rng, size):
        if name == "dot":
            return _normal(rng, (5,)), _normal(rng, (5,))
        if name == "matmul":  # square, where a transposed factor would fit
            return _normal(rng, (3, 3)), _normal(rng, (3, 3))
        return tuple(entries(rng, shape) for shape in size) if name in PAIRS else (entries(rng, size),)

    return make


def _off_ties(x, y):
    return np.abs(x - y).min() > 1e-3


def gate_cases(fnn) -> dict[str, Case]:
    """The table of gates."""
    return {
        name: Case(
            named(fnn.gates, name),
            _make_gate(name),
            reference.of_gate(name),
            _off_ties if name == "maximum" else lambda *primals: True,
            PAIRS_OF_SHAPES if name in PAIRS else GATE_SHAPES,
        )
        for name in (*reference.ENTRYWISE, *reference.WHOLE)
    }


@dataclass(frozen=True)
class Architecture:
    """A network, its cost and the size of its data: all that decides what is compiled."""

    widths: tuple[int, ...] = (3, 5, 4, 2)
    hidden: tuple[str, ...] = ("tanh", "relu")
    output: str = "identity"
    loss: str = "half_squared_error"
    bias: bool = True
    N: int = 6
    weighted: bool = False
    reduction: str = "mean"
    l2: float = 0.0

    @property
    def activations(self) -> tuple[str, ...]:
        return (*self.hidden, self.output)


# At least two hidden layers, all widths different; one with a width of 1 in every place; a deep one.
WIDTHS = ((3, 5, 4, 2), (1, 3, 5, 4), (4, 1, 3, 2), (5, 3, 4, 1), (2, 4, 3, 6, 5))


@st.composite
def architectures(draw):
    widths = draw(st.sampled_from(WIDTHS))

    def names(table, n):  # the softmax of one number is the constant 1, and every gradient behind it zero
        return st.sampled_from([name for name in table if n > 1 or not name.startswith("softmax")])

    losses = [l for l in reference.LOSSES if widths[-1] > 1 or l != "categorical_cross_entropy"]
    loss = draw(names(losses, widths[-1]))
    output = draw(names(reference.ACTIVATIONS, widths[-1]))
    if loss == "categorical_cross_entropy":  # the losses on probabilities need an output that gives them
        output = "softmax"
    if loss == "binary_cross_entropy":
        output = "sigmoid"
    N = draw(st.sampled_from((1, 4, 7)))  # 4 is also a width: a transposed product would fit
    # The weighted mean of one example does not depend on its weight.
    reduction = draw(st.sampled_from(("mean", "weighted_mean"))) if N > 1 else "mean"
    return Architecture(
        widths=widths,
        hidden=tuple(draw(names(reference.ACTIVATIONS, n)) for n in widths[1:-1]),
        output=output,
        loss=loss,
        bias=draw(st.booleans()),
        N=N,
        weighted=draw(st.booleans()),
        reduction=reduction,
        l2=draw(st.sampled_from((0.0, 0.1))),
    )


def network_cost(fnn, arch: Architecture):
    net = fnn.mlp([named(fnn, name) for name in arch.hidden], output=named(fnn, arch.output))
    return fnn.cost(net, named(fnn, arch.loss), l2=arch.l2, reduction=arch.reduction)


def network_case(fnn, arch: Architecture) -> Case:
    """The cost of a network, with parameters and data drawn as its primals."""

    def make(rng, size):
        params = tuple(
            fnn.Layer(_normal(rng, (n_out, n_in)) / n_in**0.5, _normal(rng, (n_out,)) if arch.bias else None)
            for n_in, n_out in zip(arch.widths[:-1], arch.widths[1:], strict=True)
        )
        if arch.loss == "binary_cross_entropy":  # a σ that 16 bits round to 1 would make it infinite
            params = (*params[:-1], jax.tree.map(lambda x: x / 4, params[-1]))
        X = _normal(rng, (arch.N, arch.widths[0]))
        _, y = MAKE_LOSS[arch.loss](rng, (arch.N, arch.widths[-1]))
        weight = (rng.uniform(0.1, 2, (INSTANCES, arch.N)),) if arch.weighted else ()
        return params, X, y, *weight

    def value(params, X, y, *weight):
        return reference.cost(
            arch.activations, arch.loss, params, X, y, *weight, l2=arch.l2, reduction=arch.reduction
        )

    def smooth(params, X, y, *weight):
        for n, (zs, a) in enumerate(reference.network(arch.activations, params, X)):
            for name, z in zip(arch.activations, zs, strict=True):
                if not _off_bends(name, np.asarray(z)):
                    return False
            if not _off_bends(arch.loss, np.asarray(a), np.asarray(y[n])):
                return False
        return True

    return Case(network_cost(fnn, arch), make, value, smooth)


def instance(primals, i: int):
    """The i-th instance of device arrays, as NumPy arrays with floats in float64."""

    def number(leaf):
        one = np.asarray(leaf)[i]
        return one if np.issubdtype(one.dtype, np.integer) else one.astype(np.float64)

    return jax.tree.map(number, primals)


def drawn(rng, widths, *, bias: float | None = 0.0, dtype="float64", members=()):
    """Parameters of a network, (members, ...), W of variance 1/n_in; by NumPy, of which nothing is compiled.

    bias: its standard deviation; None for layers without
    """
    layers = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        W = rng.standard_normal((*members, n_out, n_in)) / n_in**0.5
        b = None if bias is None else bias * rng.standard_normal((*members, n_out))
        layers.append(jax.tree.map(lambda x: x.astype(dtype), package.Layer(W, b)))
    return jax.device_put(tuple(layers))


def signs(N: int, n: int = 3, dtype="float64"):
    """N examples with n numbers each, and whether the first two have the same sign."""
    X = np.random.default_rng(0).standard_normal((N, n))
    return jax.device_put((X.astype(dtype), (X[:, 0] * X[:, 1] > 0).astype("int32")))
