"""Errors sent back by other matrices than the weights' transposes; by the weights', backpropagation's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from tests.properties import check_feedback
from tests.strategies import Architecture, drawn, network_case

backprop = jax.jit(fnn.backprop, static_argnums=0)


@pytest.mark.parametrize("hidden", (("tanh",), ("tanh", "relu"), ("sigmoid", "softmax", "gelu")))
def test_errors_are_those_of_autodiff_with_other_slopes(hidden):
    widths = (3, 5, 4, 6, 2)[: len(hidden) + 1] + (2,)
    case = network_case(fnn, Architecture(widths=widths, hidden=hidden, loss="softmax_cross_entropy"))
    check_feedback(fnn, case.rule, *case.draw_one())


@pytest.mark.parametrize("N", (1, 7, 32))
@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
def test_with_the_weights_for_feedback_every_bit_is_backpropagations(dtype, N):
    """Passed as an array of its own, which the compiler cannot know to be W."""
    rng = np.random.default_rng(0)
    params = drawn(rng, (64, 100, 33, 1, 10), dtype=dtype)
    X, y = rng.standard_normal((N, 64)).astype(dtype), np.ones((N, 10), dtype)
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error, l2=0.1)
    plain = backprop(cost, params, X, y)
    fed = backprop(cost, params, X, y, feedback=jax.tree.map(np.copy, params))
    assert jax.tree.structure(plain) == jax.tree.structure(fed)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(fed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_the_matrices_above_the_first_layer_are_read():
    case = network_case(fnn, Architecture())
    params, X, y = case.draw_one()
    other = jax.tree.map(np.ones_like, params)
    sweep = backprop(case.rule, params, X, y, feedback=other)
    unread = tuple(layer._replace(b=None) for layer in (fnn.Layer(jnp.zeros((1, 1))), *other[1:]))
    again = backprop(case.rule, params, X, y, feedback=unread)
    for a, b in zip(jax.tree.leaves(sweep), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_with_one_hidden_layer_direct_feedback_is_feedback():
    case = network_case(fnn, Architecture(widths=(3, 5, 2), hidden=("tanh",)))
    params, X, y = case.draw_one()
    direct = fnn.direct_feedback(jax.random.key(0), params)
    other = (params[0], fnn.Layer(direct.matrices[0]))
    a, b = (backprop(case.rule, params, X, y, feedback=matrices) for matrices in (direct, other))
    np.testing.assert_array_equal(a.errors[0], b.errors[0])
    assert not np.array_equal(a.errors[0], backprop(case.rule, params, X, y).errors[0])


def test_direct_feedback_is_drawn_anew_for_every_layer_and_key():
    params = fnn.init(jax.random.key(0), (5, 4, 4, 4, 3), dtype="float32")
    matrices = fnn.direct_feedback(jax.random.key(1), params).matrices
    others = fnn.direct_feedback(jax.random.key(2), params).matrices
    assert [(D.shape, str(D.dtype)) for D in matrices] == [((3, 4), "float32")] * 3
    assert len({D.tobytes() for D in (*matrices, *others)}) == 6
    one = fnn.direct_feedback(
        jax.random.key(1), params, weights=lambda key, shape, dtype: jnp.ones(shape, dtype)
    )
    np.testing.assert_array_equal(np.stack(one.matrices), 1)


def test_single_layer_has_nothing_to_feed_back():
    case = network_case(fnn, Architecture(widths=(3, 2), hidden=()))
    params, X, y = case.draw_one()
    plain = backprop(case.rule, params, X, y)
    for feedback in (params, fnn.direct_feedback(jax.random.key(0), params)):
        fed = backprop(case.rule, params, X, y, feedback=feedback)
        np.testing.assert_array_equal(fed.errors[0], plain.errors[0])


def test_feedback_is_a_pytree_that_passes_through_vmap():
    case = network_case(fnn, Architecture())
    params, X, y = case.draw_one()
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def errors(key):
        direct = fnn.direct_feedback(key, params)
        return fnn.backprop(case.rule, params, X, y, feedback=direct).errors

    each = [errors(key) for key in keys]
    for l, together in enumerate(jax.vmap(errors)(keys)):
        np.testing.assert_allclose(together, np.stack([one[l] for one in each]), rtol=1e-13)
