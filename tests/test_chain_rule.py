"""The chain rule as products of Jacobians, on the cases of the textbooks and against `jax.jacobian`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn as package

fnn: Any = package  # without types: wrong ones are tried too
gates, node = fnn.gates, fnn.node


def to_pair_forward(t):
    """t ↦ (t, t²), a (2×1) Jacobian."""
    return jnp.stack([t, t**2]), t


to_pair = fnn.Rule(to_pair_forward, lambda t, bar: (bar[0] + bar[1] * 2 * t,))


def mix_forward(x):
    """(x, y) ↦ (xy, x + 3y), a (2×2) Jacobian."""
    return jnp.stack([x[0] * x[1], x[0] + 3 * x[1]]), x


mix = fnn.Rule(mix_forward, lambda x, bar: (jnp.stack([bar[0] * x[1] + bar[1], bar[0] * x[0] + bar[1] * 3]),))


def test_chain_of_one_by_two_two_by_two_two_by_one():
    chain = fnn.chain(to_pair, mix, gates.squared_norm)
    t = jnp.array(0.7)
    product = fnn.jacobian_product(chain, t)
    assert [J.shape for J in product.factors] == [(1, 2), (2, 2), (2, 1)]
    assert "(1×2)(2×2)(2×1) = (1×1)" in str(product)
    pair, mixed = to_pair(t), mix(to_pair(t))
    for J, expected in zip(
        product.factors, ([2 * mixed], [[pair[1], pair[0]], [1.0, 3.0]], [[1.0], [2 * 0.7]]), strict=True
    ):
        np.testing.assert_allclose(J, np.asarray(expected), rtol=1e-15)
    # f = t⁶ + (t + 3t²)², so f′ = 6t⁵ + 2(t + 3t²)(1 + 6t)
    expected = 6 * 0.7**5 + 2 * (0.7 + 3 * 0.7**2) * (1 + 6 * 0.7)
    np.testing.assert_allclose(product.product, [[expected]], rtol=1e-14)
    np.testing.assert_allclose(fnn.value_and_grad(chain)(t)[1], expected, rtol=1e-14)
    np.testing.assert_allclose(jax.grad(chain)(t), expected, rtol=1e-14)


def test_five_x_after_one_minus_u_after_t_squared_is_minus_ten_t():
    f = fnn.chain(gates.square, gates.scale(-1.0), gates.shift(1.0), gates.scale(5.0))
    for t in (-1.5, 0.0, 2.0):
        assert fnn.value_and_grad(f)(t) == (5 * (1 - t**2), -10 * t)
        assert fnn.jacobian_product(f, t).product == -10 * t


def test_vector_chain_rule_equals_jax_jacobian():
    matrix = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.1, 4.0]])
    linear = fnn.Rule(lambda x: (matrix @ x, None), lambda _, bar: (matrix.T @ bar,))
    f = fnn.chain(gates.sin, linear, fnn.softmax)
    x = jnp.array([0.2, -0.5, 1.0])
    product = fnn.jacobian_product(f, x)
    assert [J.shape for J in product.factors] == [(2, 2), (2, 3), (3, 3)]
    np.testing.assert_allclose(product.product, jax.jacobian(f)(x), rtol=1e-13)
    np.testing.assert_allclose(fnn.jacobian(f, x), jax.jacobian(f)(x), rtol=1e-13)


def test_arrays_between_links_count_as_vectors():
    f = fnn.chain(gates.square, gates.sum)
    product = fnn.jacobian_product(f, jnp.arange(6.0).reshape(2, 3))
    assert [J.shape for J in product.factors] == [(1, 6), (6, 6)]
    np.testing.assert_array_equal(product.product, [2 * np.arange(6.0)])


@fnn.graph
def wave(x, y, z):
    """sin(x)·exp(y z²)"""
    return node(gates.sin, x) * node(gates.exp, y * z**2)


@pytest.mark.parametrize("t", (0.5, 1.0, 3.0))
def test_total_derivative_of_sine_times_exponential_is_e_cos(t):
    """x = t - 1, y = t², z = 1/t: y z² = 1, so f = e sin(t - 1)."""
    result = fnn.total_derivative(wave, [gates.shift(-1.0), gates.square, gates.reciprocal], t)
    np.testing.assert_allclose(result.total, np.e * np.cos(t - 1), rtol=1e-14)
    terms = np.e * np.array([np.cos(t - 1), 2 / t * np.sin(t - 1), -2 / t * np.sin(t - 1)])
    np.testing.assert_allclose(result.terms, terms, rtol=1e-13, atol=1e-15)
    assert result.names == ("x", "y", "z")
    assert str(result).splitlines()[-1].startswith("df/dt")


def test_total_derivative_adds_over_vectors_and_counts_t_itself():
    dot = fnn.Rule(gates.dot.forward, gates.dot.pullback)
    result = fnn.total_derivative(dot, [to_pair, to_pair], 2.0)  # t² + t⁴
    np.testing.assert_allclose(result.total, 2 * 2.0 + 4 * 2.0**3, rtol=1e-15)
    direct = fnn.total_derivative(gates.multiply, [fnn.identity, gates.exp], 0.5)  # t exp(t)
    np.testing.assert_allclose(direct.total, 1.5 * np.exp(0.5), rtol=1e-15)


def test_total_derivative_under_vmap_is_that_of_each_time():
    inner = [gates.shift(-1.0), gates.square, gates.reciprocal]
    t = jnp.array([0.5, 1.0, 3.0])
    batched = jax.jit(jax.vmap(lambda t: fnn.total_derivative(wave, inner, t)))(t)
    np.testing.assert_allclose(batched.total, np.e * np.cos(t - 1), rtol=1e-14)
    assert [term.shape for term in batched.terms] == [(3,)] * 3


def test_jacobian_works_under_jit_and_vmap():
    batched = jax.jit(jax.vmap(lambda x: fnn.jacobian(fnn.softmax, x)))(jnp.arange(6.0).reshape(2, 3))
    for x, J in zip(jnp.arange(6.0).reshape(2, 3), batched, strict=True):
        p = np.asarray(fnn.softmax(x))
        np.testing.assert_allclose(J, np.diag(p) - np.outer(p, p), rtol=1e-12, atol=1e-16)
    product = jax.jit(lambda x: fnn.jacobian_product(fnn.chain(gates.sin, gates.sum), x))(jnp.zeros(2))
    np.testing.assert_array_equal(product.product, [[1, 1]])


def test_jacobian_in_16_bits_keeps_the_dtype():
    assert fnn.jacobian(gates.exp, jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda: fnn.chain(), TypeError, "at least one rule"),
        (lambda: fnn.chain(jnp.sin), TypeError, "each link needs to be a rule"),
        (lambda: fnn.chain(gates.add), TypeError, r"called with \(x\)"),
        (lambda: fnn.jacobian(jnp.sin, 1.0), TypeError, "function needs to be a rule"),
        (lambda: fnn.jacobian_product(gates.exp, 1.0), TypeError, "needs a chain of rules"),
        (lambda: fnn.jacobian_product(fnn.chain(gates.exp), np.arange(2)), TypeError, "x needs floats"),
        (lambda: fnn.total_derivative(gates.add, [gates.exp], 1.0), TypeError, r"called with \(x1\)"),
        (
            lambda: fnn.total_derivative(gates.exp, [gates.exp], np.ones(2)),
            ValueError,
            r"single number, got shape",
        ),
        (lambda: fnn.total_derivative(gates.exp, [to_pair], 1.0), ValueError, r"f needs to be a scalar"),
        (
            lambda: fnn.jacobian(
                fnn.softmax_cross_entropy_with_integer_labels, np.eye(3), np.arange(3), argnum=1
            ),
            TypeError,
            "argument 1 of softmax_cross.* has no gradient",
        ),
    ),
)
def test_wrong_input_is_refused(no_shape_annotations, call, error, message):
    with pytest.raises(error, match=message):
        call()
