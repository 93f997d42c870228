"""Losses at extremes, by name; `test_rules.py` has the property for ordinary numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from tests import reference
from tests.strategies import DTYPES, REGRESSION, named, tolerance

BIG = 1e4


def value_and_gradient(loss, Z, y):
    """One program; operation by operation in 16 bits, where a program may keep digits between operations."""
    of = _value_and_gradient if Z.dtype.itemsize < 4 else _compiled
    return jax.device_get(of(loss, Z, y))


def _value_and_gradient(loss, Z, y):
    losses, residuals = loss.forward(Z, y)
    return losses, loss.pullback(residuals, jnp.ones_like(losses))[0]


_compiled = jax.jit(_value_and_gradient, static_argnums=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_losses_are_exact_at_logits_of_ten_thousand(dtype):
    Z = jnp.array([[BIG, -BIG, 0.0], [-BIG, BIG, 0.0], [BIG, BIG, BIG]], dtype)
    labels, big = jnp.array([0, 0, 1]), float(jnp.asarray(BIG, dtype))
    losses, gradients = [0, 2 * big, math.log(3)], [[0, 0, 0], [-1, 1, 0], [1 / 3, -2 / 3, 1 / 3]]
    one_hot = jax.nn.one_hot(labels, 3, dtype=dtype)
    for loss, y in (
        (fnn.softmax_cross_entropy, one_hot),
        (fnn.softmax_cross_entropy_with_integer_labels, labels),
    ):
        C, gradient = value_and_gradient(loss, Z, y)
        np.testing.assert_allclose(np.asarray(C, float), losses, rtol=tolerance(dtype), atol=0)
        np.testing.assert_allclose(np.asarray(gradient, float), gradients, atol=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_loss_is_exact_at_logits_of_ten_thousand(dtype):
    Z, y = (
        jnp.array([[BIG], [-BIG], [BIG], [-BIG], [0.0]], dtype),
        jnp.array([[1], [0], [0], [1], [0.5]], dtype),
    )
    big = float(jnp.asarray(BIG, dtype))
    C, gradient = value_and_gradient(fnn.sigmoid_binary_cross_entropy, Z, y)
    np.testing.assert_allclose(np.asarray(C, float), [0, 0, big, big, math.log(2)], rtol=tolerance(dtype))
    np.testing.assert_allclose(np.asarray(gradient, float)[:, 0], [0, 0, 1, -1, 0], atol=0)


def test_equal_logits_cost_the_logarithm_of_the_number_of_classes():
    Z, y = jnp.full((2, 7), 3.0), jnp.array([0, 6])
    C, gradient = value_and_gradient(fnn.softmax_cross_entropy_with_integer_labels, Z, y)
    np.testing.assert_allclose(C, math.log(7), rtol=1e-15)
    np.testing.assert_allclose(gradient[0], [1 / 7 - 1] + [1 / 7] * 6, rtol=1e-15)


def test_one_class_only_costs_nothing():
    Z = jnp.array([[5.0], [-3.0]])
    for loss, y in (
        (fnn.softmax_cross_entropy_with_integer_labels, jnp.array([0, 0])),
        (fnn.softmax_cross_entropy, jnp.ones((2, 1))),
    ):
        C, gradient = value_and_gradient(loss, Z, y)
        assert (C == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("name", REGRESSION)
def test_no_error_costs_nothing_and_has_zero_gradient(name):
    """A tie z = y is the kink of the absolute error: its slope there is 0."""
    Z = jnp.array([[1.0, -2.0], [0.0, 3.0]])
    C, gradient = value_and_gradient(named(fnn, name), Z, Z)
    assert (C == 0).all() and (gradient == 0).all()


def test_huber_loss_at_and_around_its_knee():
    e = jnp.array([-3.0, -1.0 - 1e-9, -1.0, 0.5, 1.0, 1.0 + 1e-9, 3.0])
    C, gradient = value_and_gradient(fnn.huber_loss(1.0), e[:, None], jnp.zeros((7, 1)))
    np.testing.assert_allclose(C, [2.5, 0.5 + 1e-9, 0.5, 0.125, 0.5, 0.5 + 1e-9, 2.5], rtol=1e-15)
    np.testing.assert_array_equal(gradient[:, 0], [-1, -1, -1, 0.5, 1, 1, 1])


def test_zero_times_logarithm_of_zero_is_zero():
    """Labels of probability 0 cost nothing, whatever the output; the other way round costs infinity."""
    P, y = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    slopes = ([-1, 0], [-1, 1])  # -y/p; -y/p + (1-y)/(1-p)
    for loss, slope in zip((fnn.categorical_cross_entropy, fnn.binary_cross_entropy), slopes, strict=True):
        C, gradient = value_and_gradient(loss, P, y)
        assert C[0] == 0 and C[1] == jnp.inf
        np.testing.assert_array_equal(gradient[0], slope)
        assert gradient[1, 0] == -jnp.inf
    C, gradient = value_and_gradient(fnn.softmax_cross_entropy, jnp.array([[0.0, -jnp.inf]]), y[:1])
    assert C == 0 and (gradient == 0).all()


def test_soft_labels_need_not_sum_to_one():
    """The rule differentiates its own forward: the gradient is p Σy - y, not p - y."""
    Z, y = jnp.array([[1.0, 2.0, 0.5]]), jnp.array([[0.5, 2.0, 1.5]])
    _, gradient = value_and_gradient(fnn.softmax_cross_entropy, Z, y)
    np.testing.assert_allclose(gradient, jax.nn.softmax(Z) * 4 - y, rtol=1e-14)
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-15)


def test_loss_of_one_example_is_a_row_of_the_batch():
    rng = np.random.default_rng(0)
    for name in reference.LOSSES:
        loss = named(fnn, name)
        Z = rng.uniform(0.1, 0.9, (4, 3))
        integer = name.endswith("integer_labels")
        y = np.arange(4) % 3 if integer else rng.uniform(0.1, 0.9, (4, 3))
        C, gradient = value_and_gradient(loss, Z, y)
        one, gradient_of_one = value_and_gradient(loss, Z[2], y[2])
        assert one.shape == () and gradient_of_one.shape == (3,)
        np.testing.assert_allclose(one, C[2], rtol=1e-15)
        np.testing.assert_allclose(gradient_of_one, gradient[2], rtol=1e-15)


def test_class_numbers_of_any_integer_dtype_select_the_same_output():
    """uint8 too, with more classes than it can count: comparing in uint8 would wrap 261 to 5."""
    Z = np.random.default_rng(0).standard_normal((2, 300))
    wanted = np.log(np.exp(Z).sum(axis=1)) - Z[np.arange(2), [5, 44]]
    for dtype in (np.uint8, np.int16, np.int32, np.int64, np.uint32):
        labels = np.array([5, 44], dtype)
        losses = jax.jit(fnn.softmax_cross_entropy_with_integer_labels)(Z, labels)
        np.testing.assert_allclose(losses, wanted, rtol=1e-14)


def test_class_number_beyond_32_bits_selects_nothing():
    """In 32 bits 2³² would be class 0; traced code cannot refuse it, but it must not be another class."""
    losses = fnn.softmax_cross_entropy_with_integer_labels(jnp.ones((1, 3)), jnp.array([2**32], jnp.int64))
    assert losses == 0


def test_losses_agree_with_optax_where_they_share_a_name():
    import optax

    @jax.jit
    def ours_and_theirs(Z, y, labels):
        p = jax.nn.softmax(y)
        return [
            (fnn.softmax_cross_entropy(Z, p), optax.softmax_cross_entropy(Z, p)),
            (
                fnn.softmax_cross_entropy_with_integer_labels(Z, labels),
                optax.softmax_cross_entropy_with_integer_labels(Z, labels),
            ),
            (fnn.sigmoid_binary_cross_entropy(Z, p), optax.sigmoid_binary_cross_entropy(Z, p).sum(axis=1)),
            (fnn.squared_error(Z, y), optax.squared_error(Z, y).sum(axis=1)),
            (fnn.huber_loss(0.7)(Z, y), optax.huber_loss(Z, y, delta=0.7).mean(axis=1)),
        ]

    Z, y = np.random.default_rng(0).standard_normal((2, 5, 4))
    for ours, theirs in ours_and_theirs(Z, y, np.arange(5) % 4):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)
