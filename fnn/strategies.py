"""Hypothesis strategies for whoever tests a gradient: arrays, pytrees, parameters, batches, whole networks.

A property in one line, over shapes, dtypes and values, that shrinks to a smallest failing case:

    @given(fnn.strategies.arrays())
    def test_rule(x):
        fnn.check_rule(rule, x).raise_if_wrong()

Needs Hypothesis, in the extra `test`. Import it as `from fnn import strategies`.

Numbers are odd multiples of 1/32 up to 4: exact in every dtype, and never on a kink by accident (0, ±1, a tie
only if two are drawn alike). Shapes come from a handful, as each new one is compiled. They shrink to few
entries near 0.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from .activations import elu, gelu, identity, leaky_relu, relu, sigmoid, silu, softmax, softplus, tanh
from .losses import (
    half_squared_error,
    huber_loss,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
)
from .network import Cost, cost, mlp
from .params import Layer

SHAPES = ((1,), (3,), (1, 1), (2, 3), (4, 2), ())
DTYPES = ("float32", "bfloat16", "float16")
HIDDEN = (tanh, relu, sigmoid, softplus, silu, gelu, elu(1.0), leaky_relu(0.01), softmax)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """A shape from a handful, scalars and axes of length 1 included."""
    return st.sampled_from(SHAPES)


def dtypes() -> st.SearchStrategy[Any]:
    """float32, bfloat16 or float16, which every configuration of JAX has."""
    return st.sampled_from(DTYPES)


@st.composite
def arrays(draw, shape: Any = None, dtype: Any = None, *, positive: bool = False):
    """A JAX array of numbers without accidental kinks.

    shape, dtype: fixed, or a strategy, or drawn if not given
    positive: greater than 0, for logarithms, roots and variances
    """
    shape, dtype = _drawn(draw, shape, shapes()), _drawn(draw, dtype, dtypes())
    halves = draw(hnp.arrays(np.int64, shape, elements=st.integers(0 if positive else -64, 63)))
    return jnp.asarray((2 * halves + 1) / 32.0, dtype)


@st.composite
def pytrees(draw, dtype: Any = None, *, max_leaves: int = 4):
    """Arrays of one dtype in nested dicts, lists and tuples."""
    dtype = _drawn(draw, dtype, dtypes())
    leaf = arrays(dtype=dtype)
    names = st.sampled_from(("W", "b", "scale"))
    nest = lambda inner: st.one_of(  # noqa: E731
        st.lists(inner, min_size=1, max_size=2),
        st.tuples(inner, inner),
        st.dictionaries(names, inner, min_size=1, max_size=2),
    )
    return draw(st.recursive(leaf, nest, max_leaves=max_leaves))


@st.composite
def parameters(
    draw, widths: Sequence[int] | None = None, dtype: Any = "float32", *, bias: bool | None = None
):
    """The parameters of a network, a tuple of `Layer`, its widths such that nothing transposed fits."""
    widths = tuple(widths or draw(st.sampled_from(((3, 2), (2, 4, 3), (3, 5, 4, 2), (1, 3, 1)))))
    with_bias = draw(st.booleans()) if bias is None else bias
    layers = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        W = draw(arrays((n_out, n_in), dtype))
        layers.append(Layer(W, draw(arrays((n_out,), dtype)) if with_bias else None))
    return tuple(layers)


@st.composite
def batches(draw, n_in: int, n_out: int, dtype: Any = "float32", *, classes: bool = False):
    """(X, y): a few examples, with targets of n_out numbers, or class numbers below n_out."""
    N = draw(st.sampled_from((1, 2, 5)))
    X = draw(arrays((N, n_in), dtype))
    if classes:
        return X, jnp.asarray(draw(hnp.arrays(np.int32, (N,), elements=st.integers(0, n_out - 1))))
    return X, draw(arrays((N, n_out), dtype))


@st.composite
def networks(draw, dtype: Any = "float32"):
    """(cost, params, X, y): a network of random depth, widths and activations, its cost, and a batch."""
    params = draw(parameters(dtype=dtype))
    n_hidden, n_out = len(params) - 1, params[-1].W.shape[0]
    hidden = [draw(st.sampled_from(HIDDEN)) for _ in range(n_hidden)]
    losses = (half_squared_error, squared_error, huber_loss(1.0), softmax_cross_entropy_with_integer_labels)
    loss = draw(st.sampled_from(losses))
    classes = loss is softmax_cross_entropy_with_integer_labels
    X, y = draw(batches(params[0].W.shape[1], n_out, dtype, classes=classes))
    made: Cost = cost(mlp(hidden, output=identity), loss, l2=draw(st.sampled_from((0.0, 0.5))))
    return made, params, X, y


def _drawn(draw, given: Any, default: st.SearchStrategy) -> Any:
    if given is None:
        return draw(default)
    return draw(given) if isinstance(given, st.SearchStrategy) else given
