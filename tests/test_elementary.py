"""What the activations and losses are evaluated with: each part against 60 digits, or in exact fractions."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf

from experiments.exact import ulps
from fnn import activations, elementary

mp.dps = 60
DTYPES = ("float32", "float64")
RNG = np.random.default_rng(0)


def sample(low, high, dtype, n=400):
    return RNG.uniform(low, high, n).astype(dtype)


def worst(ours, inputs, truth, dtype):
    return max(ulps(y, truth(mpf(float(x))), dtype) for y, x in zip(np.asarray(ours), inputs, strict=True))


def sum_of(parts, i):
    return sum(Fraction(float(part[i])) for part in parts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expm1_is_right_to_2_ulp_near_0_and_where_it_changes_over(dtype):
    near = sample(-0.02, 0.02, dtype, 100) ** 3
    x = np.concatenate([sample(-1, 1, dtype), sample(-40, 40, dtype), near, [0.0]]).astype(dtype)
    assert worst(jax.jit(elementary.expm1)(x), x, mpmath.expm1, dtype) <= 2
    assert np.signbit(elementary.expm1(jnp.asarray(-0.0, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_exp_reaches_below_the_smallest_exp_and_takes_a_low_part(dtype):
    bottom = {"float32": -87.3, "float64": -708.3}[dtype]
    x = sample(bottom - 8, bottom + 20, dtype)  # t·exp(-t) is 0 beyond
    low = (RNG.uniform(-0.5, 0.5, x.shape) * np.spacing(x)).astype(dtype)
    m, scale = map(np.asarray, jax.jit(elementary.scaled_exp)(x, low))
    assert (m > np.finfo(dtype).tiny * 1e3).all()
    for i in range(len(x)):
        truth = mpmath.exp(mpf(float(x[i])) + mpf(float(low[i])))
        assert abs(mpf(float(m[i])) * mpf(float(scale[i])) / truth - 1) <= 3 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_exact_and_their_product_and_total_have_half_as_many_digits_more(dtype):
    a, b = sample(0.1, 8, dtype), sample(0.1, 8, dtype)
    bits = np.finfo(dtype).nmant + 1

    @jax.jit
    def evaluate(a, b):
        pair = elementary.split(a), elementary.split(b)
        results = elementary.product(*pair), elementary.total(*pair)
        return *pair, *results, *map(elementary.rounded, results), elementary.difference(a, b)

    a_parts, b_parts, ab, sum_, ab_rounded, sum_rounded, difference = evaluate(a, b)
    for i in range(len(a)):
        x, y = Fraction(float(a[i])), Fraction(float(b[i]))
        assert sum_of(a_parts, i) == x and sum_of(b_parts, i) == y
        assert Fraction(float(a_parts[0][i] * a_parts[0][i])) == Fraction(float(a_parts[0][i])) ** 2
        assert sum_of(difference, i) == x - y
        for parts, truth in ((ab, x * y), (ab_rounded, x * y), (sum_, x + y), (sum_rounded, x + y)):
            assert abs(sum_of(parts, i) / truth - 1) < Fraction(2) ** -(3 * bits // 2 - 2)
        assert abs(ab_rounded[1][i]) <= np.spacing(ab_rounded[0][i]) / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_are_split_to_more_digits_than_the_dtype_has(dtype):
    bits = np.finfo(dtype).nmant + 1
    for digits in (activations.GELU_ALPHA, activations.SILU_ROOT):
        for parts, more in ((elementary.constant, bits), (elementary.constant_parts, bits // 2)):
            high, low = parts(digits, dtype)
            assert float(np.dtype(dtype).type(high)) == high
            rounded_low = Fraction(float(np.dtype(dtype).type(low)))
            assert abs((Fraction(high) + rounded_low) / Fraction(digits) - 1) < Fraction(2) ** -(
                more + bits - 2
            )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian_is_right_to_3_ulp_where_the_square_has_lost_that_many_digits(dtype):
    t = sample(0, {"float32": 13, "float64": 37.5}[dtype], dtype)
    m, scale = jax.jit(elementary.gaussian)(t)
    assert worst(m * scale, t, lambda t: mpmath.exp(-t * t / 2), dtype) <= 3


def mills(t):
    """M(t) = exp(t²/2) erfc(t/√2) / 2"""
    return mpmath.exp(t * t / 2) * mpmath.erfc(t / mpmath.sqrt(2)) / 2


def roots():
    """Of the slopes of silu, gelu and gelu_tanh at -t, by Newton's method on the definitions."""
    alpha = mpmath.sqrt(8 / mp.pi)
    beta = alpha * mpf("0.044715")
    silu = mpmath.findroot(lambda t: 1 + mpmath.exp(-t) - t, 1.28)
    gelu = mpmath.findroot(lambda t: mills(t) - t / mpmath.sqrt(2 * mp.pi), 0.75)
    tanh = mpmath.findroot(
        lambda t: 1 + mpmath.exp(-alpha * t - beta * t**3) - alpha * t - 3 * beta * t**3, 0.75
    )
    return alpha, beta, silu, gelu, tanh


def test_constants_of_the_activations_are_what_their_definitions_say():
    alpha, beta, silu, gelu, tanh = roots()
    for digits, truth in (
        (activations.GELU_ALPHA, alpha),
        (activations.GELU_BETA, beta),
        (activations.SILU_ROOT, silu),
        (activations.SILU_ROOT_EXP, mpmath.exp(-silu)),
        (activations.GELU_ROOT, gelu),
        (activations.GELU_TANH_ROOT, tanh),
        (activations.GELU_TANH_ROOT_EXP, mpmath.exp(-alpha * tanh - beta * tanh**3)),
    ):
        assert abs(mpf(digits) - truth) < 1e-37


@pytest.mark.parametrize("which", ("GELU_M", "GELU_K"))
def test_chebyshev_coefficients_are_those_of_the_function(which):
    """c_k = (2/n) Σ_j f(u_j) cos(kπ(j+½)/n) over n Chebyshev nodes u_j, and half of that for k = 0."""
    root = roots()[3]
    f = {
        "GELU_M": lambda t: (t + mpf("1.15625")) * mills(t),
        "GELU_K": lambda t: (t / mpmath.sqrt(2 * mp.pi) - mills(t)) / (t - root),
    }[which]
    n = 64
    angles = [mp.pi * (j + mpf(1) / 2) / n for j in range(n)]
    values = [f(5 * (1 + mpmath.cos(angle)) / (1 - mpmath.cos(angle))) for angle in angles]
    for k, ours in enumerate(getattr(activations, which)):
        terms = (v * mpmath.cos(k * angle) for v, angle in zip(values, angles, strict=True))
        truth = mpmath.fsum(terms) * (2 if k else 1) / n
        assert ours == float(truth) or abs(ours - truth) < 1e-18 * abs(truth) + 1e-24


def test_16_bit_arguments_are_evaluated_in_float32_and_others_as_they_are():
    seen = []

    @elementary.rounded_once
    def f(number, x, pair):
        seen.append((x.dtype, pair[0].dtype, pair[1].dtype))
        return number * x, (x, pair[1])

    for dtype in ("bfloat16", "float16", "float32", "float64"):
        y, (x, integers) = f(1 / 3, jnp.ones(2, dtype), (jnp.ones(2, dtype), jnp.arange(2)))
        assert y.dtype == x.dtype == dtype and integers.dtype == jnp.arange(2).dtype
        assert float(y[0]) == float(jnp.asarray(1 / 3, dtype))
    assert [str(x) for x, *_ in seen] == ["float32", "float32", "float32", "float64"]


@pytest.mark.parametrize("dtype", (*DTYPES, "bfloat16", "float16"))
def test_sum_of_others_keeps_the_small_ones(dtype):
    v = jnp.array([[1.0, 2**-12, 2**-13, 0.0], [0.5, 0.5, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype)
    others = jax.jit(elementary.sum_of_others)(v)
    exact = np.asarray(v, float).sum(axis=1, keepdims=True) - np.asarray(v, float)
    np.testing.assert_allclose(np.asarray(others, float), exact, rtol=float(jnp.finfo(dtype).eps))
    top, top_sum, rest = elementary.largest(v)
    assert np.asarray(top).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, False, False],
    ]
    assert np.asarray(top_sum, float).tolist() == [[1], [1], [1]]
    np.testing.assert_allclose(np.asarray(rest, float), [[3 * 2**-13], [0.25], [0]])


def test_exponentials_of_differences_do_not_feel_their_rounding():
    """80.3 - 0.1234 rounds: half a unit of 80 would be 40 units of exp(-80)."""
    Z = RNG.uniform(-40, 40, (50, 6)).astype(np.float32)
    _, e = jax.jit(elementary.shifted_exponentials)(Z)
    for row, ours in zip(Z, np.asarray(e), strict=True):
        for z, mine in zip(row, ours, strict=True):
            assert ulps(mine, mpmath.exp(mpf(float(z)) - mpf(float(row.max()))), np.float32) <= 2


@pytest.mark.parametrize("level", (0, 3))
def test_shifted_exponentials_have_a_slope_where_no_z_equals_the_maximum(level):
    """XLA without optimisation has z twice, once by a fused multiply-add: JAX's own slope of max is 0/0."""
    x, w, b, y = (np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(SHAPES))

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": level})
    @partial(jax.grad, argnums=2)
    def slope_in_b(x, w, b, y):
        e = elementary.shifted_exponentials(x * w + b)[1]
        return jnp.sum(e / jnp.sum(e, axis=-1, keepdims=True) * y)

    p = np.exp(x * w + b)
    p /= p.sum(axis=-1, keepdims=True)
    truth = np.sum(p * (y - np.sum(p * y, axis=-1, keepdims=True)), axis=0, keepdims=True)
    np.testing.assert_allclose(slope_in_b(x, w, b, y), truth, rtol=1e-12)
    # The slope of max z alone: 1 at the first of the largest.
    slope = jax.grad(lambda z: jnp.sum(z - elementary.shifted_exponentials(z)[0], axis=-1).sum() / 3)
    z = jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 4.0], [-jnp.inf, 0.0, -jnp.inf]])
    np.testing.assert_array_equal(slope(z), [[0, 1, 0], [1, 0, 0], [0, 1, 0]])


SHAPES = (32, 1), (1, 10), (1, 10), (32, 10)


def test_matmul_of_16_bits_sums_in_float32():
    """4096 ones: bfloat16 would stop at 256, float16 at 2048."""
    for dtype in ("bfloat16", "float16"):
        ones = jnp.ones((1, 4096), dtype)
        product = elementary.matmul(ones, ones.T)
        assert product.dtype == jnp.float32 and product == 4096
    jaxpr = jax.make_jaxpr(partial(elementary.matmul, jnp.ones((2, 2), "bfloat16")))(
        jnp.ones((2, 2), "bfloat16")
    )
    assert jaxpr.eqns[-1].params["preferred_element_type"] == jnp.float32


def test_functions_of_xla_that_are_not_used_are_off_by_more_than_4_ulp():
    """On a CPU: float32's tanh near 4, and erfc in its tail, where x² was rounded."""
    z = np.linspace(4.0, 4.05, 20_000).astype(np.float32)
    errors = np.abs(np.asarray(jax.jit(jnp.tanh)(z), float) - np.tanh(z.astype(float))) / 2.0**-24
    assert errors.max() > 4
    x = np.linspace(5, 25, 50)
    assert worst(jax.jit(jax.lax.erfc)(x), x, mpmath.erfc, "float64") > 50


def test_slope_from_the_value_has_lost_digits_where_the_value_nears_one():
    """σ′ = a (1 - a) in float32: off by 0.05 % at z = 10 and 44 % at 17, and 0 at 18; in 16 bits sooner."""
    for z, dtype, low, high in (
        (10, "float32", 4e-4, 5e-4),
        (17, "float32", 0.43, 0.45),
        (18, "float32", 1, 1),
        (8.4, "float16", 1, 1),
        (6.3, "bfloat16", 1, 1),
    ):
        exact = float(1 / (2 + 2 * mpmath.cosh(z)))
        a = jnp.asarray(float(1 / (1 + mpmath.exp(-z))), dtype)
        assert low <= abs(float(a * (1 - a)) / exact - 1) <= high
    assert exact == pytest.approx(0.002, rel=0.1)
