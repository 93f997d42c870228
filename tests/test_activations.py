"""Activations at kinks and extremes, by name; `test_rules.py` has the property for ordinary numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from tests import reference
from tests.strategies import DTYPES, KINKED, named, tolerance

ELEMENTWISE = [name for name in reference.ACTIVATIONS if name != "softmax"]
EXTREMES = (0.0, -0.0, 1e-300, -1e-300, 1e-6, -1e-6, 0.5, -0.5, 20.0, -20.0, 50.0, -50.0, 1e4, -1e4)


def _sech2(v):
    return 0.0 if abs(v) > 300 else 1 / math.cosh(v) ** 2


def _cdf(v):
    return 0.5 * math.erfc(-v / math.sqrt(2))


def _gelu_tanh_slope(v):
    u = math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
    u_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v**2)
    return 0.5 * (1 + math.tanh(u)) + 0.5 * v * _sech2(u) * u_slope


def _silu_slope(v):
    s = reference._sigmoid(v)
    return s + v * _sech2(v / 2) / 4


# Derivatives from the definitions, in other forms than the library's: σ′ = sech²(z/2)/4, tanh′ = sech².
SLOPES = {
    "identity": lambda v: 1.0,
    "sigmoid": lambda v: _sech2(v / 2) / 4,
    "tanh": _sech2,
    "relu": lambda v: 1.0 if v > 0 else 0.0,
    "leaky_relu(0.01)": lambda v: 1.0 if v >= 0 else 0.01,
    "leaky_relu(0.3)": lambda v: 1.0 if v >= 0 else 0.3,
    "elu(1.0)": lambda v: 1.0 if v > 0 else math.exp(v),
    "elu(0.7)": lambda v: 1.0 if v > 0 else 0.7 * math.exp(v),
    "softplus": lambda v: 0.5 * (1 + math.tanh(v / 2)),
    "silu": _silu_slope,
    "gelu": lambda v: _cdf(v) + v * math.exp(-min(v * v, 1400) / 2) / math.sqrt(2 * math.pi),
    "gelu_tanh": _gelu_tanh_slope,
}


def slope(rule, z):
    value, residuals = rule.forward(z)
    return rule.pullback(residuals, jnp.ones_like(value))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_value_and_slope_at_extremes(name, dtype):
    z = jnp.array(EXTREMES, dtype)
    rule = named(fnn, name)
    rounded = [float(v) for v in z]  # 1e-300 is 0 in float32, 1e4 is 9984 in bfloat16
    values, slopes = (
        np.array([f(v) for v in rounded])
        for f in (lambda v: reference.ACTIVATIONS[name]([v])[0], SLOPES[name])
    )
    # Rounding z moves σ by |z σ′(z)|: what counts where σ is a tail, as gelu's φ(z) at -20.
    allowed = tolerance(dtype) * (abs(values) + abs(np.array(rounded) * slopes))
    spacing = 2 * float(jnp.finfo(dtype).smallest_normal) * tolerance(dtype)  # of numbers next to 0
    error = abs(np.asarray(rule(z), float) - values)
    assert np.all(error <= allowed + spacing), error
    np.testing.assert_allclose(np.asarray(slope(rule, z), float), slopes, rtol=0, atol=tolerance(dtype))


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
        assert ours == float(jax.grad(jax_nn[name])(zero)) == SLOPES[name](zero)


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
    shifted = [fnn.softmax.pullback(fnn.softmax(z + c), a_bar)[0] for c in (0.0, 100.0)]
    np.testing.assert_allclose(shifted[0].sum(axis=1), 0, atol=1e-15)
    np.testing.assert_allclose(shifted[0], shifted[1], atol=1e-14)


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
