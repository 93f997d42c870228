"""Activations at kinks, and softmax, by name.

`test_rules.py` has the property for ordinary numbers, `test_accuracy.py` asks for the last bit of every one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from experiments.exact import ACTIVATIONS
from tests.strategies import DTYPES, KINKED, named, tolerance


def slope(rule, z):
    value, residuals = rule.forward(z)
    return rule.pullback(residuals, jnp.ones_like(value))[0]


@pytest.mark.parametrize("name", KINKED)
def test_slope_at_the_kink_is_that_of_jax_nn(name):
    """relu 0, leaky_relu its right-hand slope, elu its left-hand one; the sign of zero does not matter."""
    jax_nn = {
        "relu": jax.nn.relu,
        "leaky_relu(0.01)": lambda z: jax.nn.leaky_relu(z, 0.01),
        "leaky_relu(0.3)": lambda z: jax.nn.leaky_relu(z, 0.3),
        "elu(0.7)": lambda z: jax.nn.elu(z, 0.7),
    }
    for zero in (0.0, -0.0):
        ours = float(slope(named(fnn, name), jnp.asarray(zero)))
        assert ours == float(jax.grad(jax_nn[name])(zero)) == float(ACTIVATIONS[name].slope(zero))


def test_saturated_sigmoid_keeps_the_digits_that_autodiff_loses():
    """σ(40) rounds to 1, so a(1 - a) is 0, while σ′(40) = e⁻⁴⁰ is an ordinary number."""
    ours = float(slope(fnn.sigmoid, jnp.asarray(40.0)))
    assert ours == pytest.approx(math.exp(-40), rel=1e-14)
    assert float(jax.grad(jax.nn.sigmoid)(40.0)) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_at_extremes(dtype):
    z = jnp.array([[0.0, 0.0, 0.0, 0.0], [1e4, 1e4, -1e4, -1e4], [1e4, -1e4, 0.0, 50.0]], dtype)
    a, residuals = fnn.softmax.forward(z)
    expected = [[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(np.asarray(a, float), expected, atol=tolerance(dtype))
    (z_bar,) = fnn.softmax.pullback(residuals, jnp.array([[1.0, 2.0, 3.0, 4.0]] * 3, dtype))
    # a ⊙ (ā - Σ ā a): means 2.5, 1.5 and 1
    expected = [[-0.375, -0.125, 0.125, 0.375], [-0.25, 0.25, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(np.asarray(z_bar, float), expected, atol=tolerance(dtype))


def test_softmax_gradient_sums_to_zero_and_ignores_shifts():
    z, a_bar = jax.random.normal(jax.random.key(0), (2, 6, 5))
    shifted = [fnn.softmax.pullback(fnn.softmax.forward(z + c)[1], a_bar)[0] for c in (0.0, 100.0)]
    np.testing.assert_allclose(shifted[0].sum(axis=1), 0, atol=1e-15)
    # z + 100 is rounded, by up to 7e-15.
    np.testing.assert_allclose(shifted[0], shifted[1], rtol=0, atol=3e-14)


def test_softmax_of_a_single_layer_or_more_axes_is_that_of_each_row():
    z, a_bar = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
    a, residuals = fnn.softmax.forward(z)
    (z_bar,) = fnn.softmax.pullback(residuals, a_bar)
    for i in np.ndindex(2, 3):
        one, kept = fnn.softmax.forward(z[i])
        np.testing.assert_allclose(a[i], one, rtol=1e-15)  # the same sums, perhaps in another order
        np.testing.assert_allclose(z_bar[i], fnn.softmax.pullback(kept, a_bar[i])[0], rtol=1e-13)


def test_softmax_of_one_number_is_one_with_zero_gradient():
    a, residuals = fnn.softmax.forward(jnp.array([[3.0]]))
    assert a == 1 and fnn.softmax.pullback(residuals, jnp.array([[5.0]]))[0] == 0


def test_softmax_never_forms_its_jacobian():
    """No array of the compiled pullback has as much as K² elements."""
    K = 512
    jaxpr = jax.make_jaxpr(fnn.softmax.pullback)(jnp.ones((2, K)), jnp.ones((2, K)))
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) <= 2 * K
