r"""Activations a = σ(z) and their pullbacks z̄ = (∂a/∂z)ᵀ ā.

An activation may use all of its layer's z: the last axis is the layer, any axes before it are
examples. For an element-wise σ the Jacobian is diagonal and the pullback is z̄ = σ′(z) ā.

Values and slopes are right to 4 units in the last place in float32 and float64. In the 16-bit dtypes, whose
numbers are evaluated in float32 (`elementary.py`), they are correctly rounded: right to half a unit, at every
number there is (`tests/test_accuracy.py`). Three ways to write a formula see to that, with t = |z|:

- in e = exp(-t) ≤ 1, which cannot overflow: σ(z) = 1/(1+e) or e/(1+e), and σ′ = e/(1+e)²;
- the smooth relus are max(0, z) and a bump that is small and even, since σ(z) - σ(-z) = z for silu, gelu and
  gelu_tanh, and log(1 + eᶻ) - log(1 + e⁻ᶻ) = z; so σ′(z) = 1 - σ′(-z), and only -t need be looked at;
- where such a slope has a root, a factor t - t₀ is taken out of it.

What a pullback keeps is z. The value a would often do (σ′ = a (1 - a), tanh′ = 1 - a²) and cost no memory, as
the next layer keeps it anyway; but a is rounded, and as it nears 1 the digits of 1 - a are gone. That slope
of σ is off by 0.05 % in float32 at z = 10, by 44 % at 17, and 0 from 18 on; in float16 it is 0 from 8.4 on,
and in bfloat16 from 6.3, where it should be 0.002. Keeping z costs the memory of one array more a layer.

Slopes at kinks are those of `jax.nn`. At ±∞ value and slope are their limits.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .elementary import (
    chebyshev,
    constant,
    constant_parts,
    expm1,
    expm1_series,
    gaussian,
    largest,
    product,
    rounded,
    rounded_once,
    scaled_exp,
    shifted_exponentials,
    split,
    sum_of_others,
    total,
)
from .rules import Rule, finite_number

Z = Float[Array, "*batch n"] | Float[Array, ""]  # a layer's inputs, or a single number


# Called outside of compiled code, an activation is compiled as a whole: one by one, its operations would be
# some forty programs. Inside it stands as if written there.
def _compiled(function, **options):
    return jax.jit(rounded_once(function), inline=True, **options)


_compiled_with_parameter = partial(_compiled, static_argnums=0)


def identity_forward(z: Z):
    """a = z: the output layer of a network whose loss takes logits, or of a regression."""
    return z, None


def identity_pullback(residuals: None, a_bar: Z):
    return (a_bar,)


identity = Rule(identity_forward, identity_pullback)


@_compiled
def sigmoid_forward(z: Z):
    """σ(z) = 1 / (1 + exp(-z)), the logistic function.

    With e = exp(-|z|): σ = 1/(1+e) for z ≥ 0 and e/(1+e) below, so
    σ′ = σ(z) σ(-z) = e / (1+e)²
    Source: Nielsen (2015), ch. 1, eq. 3.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.sigmoid(jnp.array([-1.0, 0.0, 1.0])))
    [0.2689 0.5    0.7311]
    """
    e = jnp.exp(-_magnitude(z))
    return jnp.where(z < 0, e, 1) / (1 + e), z


@_compiled
def sigmoid_pullback(z: Z, a_bar: Z):
    e = jnp.exp(-_magnitude(z))
    return (a_bar * (e / (1 + e * (2 + e))),)


sigmoid = Rule(sigmoid_forward, sigmoid_pullback)


@_compiled
def tanh_forward(z: Z):
    """tanh(z) = (exp(z) - exp(-z)) / (exp(z) + exp(-z)).

    It is odd; for z = t ≥ 0, divided through by exp(t), tanh(t) = -m / (2 + m) with m = exp(-2t) - 1.
    tanh′ = 1 / cosh² = 4 / (exp(z) + exp(-z))² = 4e / (1+e)²,  e = exp(-2|z|)
    Source: LeCun et al. (1998), *Efficient BackProp*, §4.4, who prefer it to σ for being odd.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.tanh(jnp.array([-1.0, 0.0, 1.0])))
    [-0.7616  0.      0.7616]
    """
    m = expm1(-2 * _magnitude(z))
    return jnp.where(z < 0, m, -m) / (2 + m), z


@_compiled
def tanh_pullback(z: Z, a_bar: Z):
    m, scale = scaled_exp(-2 * _magnitude(z))
    e = m * scale
    return (a_bar * (4 * m / (1 + e * (2 + e)) * scale),)


tanh = Rule(tanh_forward, tanh_pullback)


def relu_forward(z: Z):
    """max(0, z).

    σ′ = 1 for z > 0, else 0; at the kink z = 0 the slope is 0, as in `jax.nn.relu`.
    Kept: a, which is positive where z is; a network keeps it anyway, as the next layer's input.
    Source: Nair & Hinton (2010).

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.relu(jnp.array([-1.0, 0.0, 1.0])))
    [0. 0. 1.]
    """
    a = jax.nn.relu(z)
    return a, a


def relu_pullback(a: Z, a_bar: Z):
    return (jnp.where(a > 0, a_bar, 0 * a),)  # 0·a: NaN where a is


relu = Rule(relu_forward, relu_pullback)


@_compiled_with_parameter
def leaky_relu_forward(slope: float, z: Z):
    """z for z ≥ 0, slope·z below.

    σ′ = 1 for z ≥ 0, else slope; at the kink z = 0 the right-hand slope 1, as in `jax.nn.leaky_relu`.
    Source: Maas et al. (2013).
    """
    return jnp.where(z >= 0, z, slope * z), z


@_compiled_with_parameter
def leaky_relu_pullback(slope: float, z: Z, a_bar: Z):
    return (a_bar * jnp.where(jnp.isnan(z), z, jnp.where(z >= 0, 1, slope)),)


@cache
def _leaky_relu(slope: float) -> Rule:
    return Rule(partial(leaky_relu_forward, slope), partial(leaky_relu_pullback, slope))


def leaky_relu(slope: float = 0.01) -> Rule:
    """The rule of max(0, z) with a small slope below zero (0.01: Maas et al. 2013).

    Equal parameters give the same rule, so it may be static under `jax.jit`.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.leaky_relu(0.1)(jnp.array([-1.0, 0.0, 1.0])))
    [-0.1  0.   1. ]
    """
    return _leaky_relu(finite_number("leaky_relu", "slope", slope))


@_compiled_with_parameter
def elu_forward(alpha: float, z: Z):
    """z for z > 0, alpha·(exp(z) - 1) below.

    σ′ = 1 for z > 0, else alpha·exp(z), which is an ordinary number where exp(z) - 1 has rounded to -1;
    at z = 0 the left-hand slope alpha, as in `jax.nn.elu` (a kink unless alpha = 1).
    Source: Clevert et al. (2016), eq. 15.
    """
    return jnp.where(z > 0, z, alpha * expm1(jnp.minimum(z, 0))), z


@_compiled_with_parameter
def elu_pullback(alpha: float, z: Z, a_bar: Z):
    # exp only where it is used: exp(1000) is inf, and the branch not taken must not meet it.
    m, scale = scaled_exp(jnp.minimum(z, 0))
    return (a_bar * jnp.where(z > 0, 1, alpha * m * scale),)


@cache
def _elu(alpha: float) -> Rule:
    return Rule(partial(elu_forward, alpha), partial(elu_pullback, alpha))


def elu(alpha: float = 1.0) -> Rule:
    """The rule of the exponential linear unit, which tends to -alpha (1: Clevert et al. 2016).

    Equal parameters give the same rule, so it may be static under `jax.jit`.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.elu(1.0)(jnp.array([-1.0, 0.0, 1.0])))
    [-0.6321  0.      1.    ]
    """
    return _elu(finite_number("elu", "alpha", alpha))


@_compiled
def softplus_forward(z: Z):
    """log(1 + exp(z)) = max(0, z) + log(1 + exp(-|z|)), a smooth relu.

    σ′ = exp(z) / (1 + exp(z)), the logistic function.
    Source: Dugas et al. (2001).

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.softplus(jnp.array([-1.0, 0.0, 1.0])))
    [0.3133 0.6931 1.3133]
    """
    return jnp.where(z < 0, 0, z) + jnp.log1p(jnp.exp(-_magnitude(z))), z


@_compiled
def softplus_pullback(z: Z, a_bar: Z):
    e = jnp.exp(-_magnitude(z))
    return (a_bar * (jnp.where(z < 0, e, 1) / (1 + e)),)


softplus = Rule(softplus_forward, softplus_pullback)


@_compiled
def silu_forward(z: Z):
    """z·s(z), s the logistic function; also called swish.

    = max(0, z) - t s(-t),  s(-t) = e/(1+e),  t = |z|, e = exp(-t)

    σ′ = s + z s′ = s(z) (1 + z s(-z)), as s′ = s(z) s(-z); so, for t ≥ 0,
    σ′(-t) = e n(t) / (1+e)²,  n = 1 + e - t,  and σ′(t) = 1 - σ′(-t).

    n has a root at t₀ = 1.278..., where e = t₀ - 1 = e₀. There 1 + e - t cancels; subtracting n(t₀) = 0,
    n = e₀ (exp(d) - 1) + d with d = t₀ - t, two terms of one sign.
    Source: Elfwing et al. (2018), eq. 5; Hendrycks & Gimpel (2016).

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.silu(jnp.array([-1.0, 0.0, 1.0])))
    [-0.2689  0.      0.7311]
    """
    t = jnp.minimum(_magnitude(z), 1000)
    m, scale = scaled_exp(-t)
    return jnp.where(z < 0, 0, z) - t * m / (1 + m * scale) * scale, z


@_compiled
def silu_pullback(z: Z, a_bar: Z):
    t = jnp.minimum(_magnitude(z), 1000)
    m, scale = scaled_exp(-t)
    e = m * scale
    root, rest = constant(SILU_ROOT, t.dtype)
    d = root - t
    e_root = float(SILU_ROOT_EXP)
    n = d + jnp.where(jnp.abs(d) < 0.25, e_root * expm1_series(d, 0.25), e - e_root) + rest * (1 + e)
    return (a_bar * _of_both_signs(z, m * n / (1 + e * (2 + e)) * scale),)


SILU_ROOT = "1.278464542761073795109358739022980155439"  # 1 + t - t exp(t) = 0: t = 1 + W(1/e), Lambert's W
SILU_ROOT_EXP = "0.278464542761073795109358739022980155439"  # exp(-t₀) = t₀ - 1

silu = Rule(silu_forward, silu_pullback)


@_compiled
def gelu_forward(z: Z):
    """z·Φ(z), Φ the distribution function of the unit normal: the exact (erf) form.

    = max(0, z) - t Φ(-t),  t = |z|,  Φ(-t) = M(t) exp(-t²/2)

    M(t) = exp(t²/2) erfc(t/√2) / 2 falls smoothly from ½ like 1/(t√2π): a series for (t + 1.15625) M(t).
    (With this number the leading coefficients all but need no rounding, which would bias the sum.)

    σ′ = Φ(z) + z φ(z),  φ(z) = Φ′(z) = exp(-z²/2) / √(2π); so, for t ≥ 0,
    σ′(-t) = (M(t) - t/√2π) exp(-t²/2) = -(t - t₀) K(t) exp(-t²/2),  and σ′(t) = 1 - σ′(-t),
    with the root t₀ = 0.7517... taken out of the bracket; K > 0 is smooth and tends to 1/√2π: a series too.

    t² is taken in two parts: rounded, it would shift exp(-t²/2) by t²/2 roundings, 700 at t = 38.
    Source: Hendrycks & Gimpel (2016), §2; Shepherd & Laframboise (1981) for the series.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.gelu(jnp.array([-1.0, 0.0, 1.0])))
    [-0.1587  0.      0.8413]
    """
    t = jnp.minimum(_magnitude(z), 40)  # exp(-40²/2) is 0 in every dtype
    m, scale = gaussian(t)
    M = chebyshev(GELU_M, t) / (t + 1.15625)
    return jnp.where(z < 0, 0, z) - t * M * m * scale, z


@_compiled
def gelu_pullback(z: Z, a_bar: Z):
    t = jnp.minimum(_magnitude(z), 40)
    m, scale = gaussian(t)
    K = chebyshev(GELU_K, t)
    root, rest = constant(GELU_ROOT, t.dtype)
    return (a_bar * _of_both_signs(z, ((root - t) * K + rest * K) * m * scale),)


GELU_ROOT = "0.751791524693564457457904946779524039664"
# Chebyshev coefficients of (t + 1.15625) M(t) and of K(t); `tests/test_elementary.py` makes them again.
GELU_M = (
    0.4863110565665593,
    -0.09953848484134276,
    0.008017843746552624,
    0.007878333887483647,
    -0.005267260013061037,
    0.0019743760194675885,
    -0.0005185449611818983,
    9.476707320295903e-05,
    -9.736573170738988e-06,
    -3.225903725865601e-07,
    2.856673262791128e-07,
    -3.061227073441438e-08,
    -4.255391451453789e-09,
    1.3062703280758206e-09,
    2.1569320831023682e-11,
    -4.309832389985418e-11,
    1.6091595302767957e-12,
    1.4254895327954874e-12,
    -9.926697623431177e-14,
    -5.12318984038038e-14,
    4.172757635354882e-15,
    2.0414492276961994e-15,
    -1.439406693320668e-16,
    -8.86621799355199e-17,
    3.454432672310461e-18,
)
GELU_K = (
    0.48907062712404814,
    -0.1212536609715865,
    0.040217019986598074,
    -0.011307596661473327,
    0.0026524499989152395,
    -0.0005011769744012647,
    7.031283979361125e-05,
    -5.5589981152528526e-06,
    -2.6104869194805633e-07,
    1.3804750782011604e-07,
    -1.1562162085705361e-08,
    -1.8197249187356083e-09,
    4.402773828621291e-10,
    1.2519327335156285e-11,
    -1.2703745159303577e-11,
    2.9226651070995185e-13,
    3.702109795288263e-13,
    -1.967764886441231e-14,
    -1.1809036561614357e-14,
    7.628032634666373e-16,
    4.201693491226225e-16,
    -2.330450113554955e-17,
    -1.6395719566540518e-17,
)

gelu = Rule(gelu_forward, gelu_pullback)


@_compiled
def gelu_tanh_forward(z: Z):
    """z·(1 + tanh u)/2 with u = √(2/π)·(z + 0.044715 z³), an approximation of `gelu`.

    (1 + tanh u)/2 = s(2u), s the logistic function, so with w(t) = 2u = α t + β t³ it is
    max(0, z) - t s(-w),  s(-w) = e/(1+e),  t = |z|, e = exp(-w)

    σ′ = s(w) + z w′ s(w) s(-w); so, for t ≥ 0,
    σ′(-t) = e n(t) / (1+e)²,  n = 1 + e - t w′,  t w′ = α t + 3β t³,  and σ′(t) = 1 - σ′(-t).

    n has a root t₀ = 0.7524... With e₀ = exp(-w(t₀)), d = t₀ - t and S = t² + t t₀ + t₀², so t₀³ - t³ = d S,
    n = n - n(t₀) = e₀ (exp(d (α + β S)) - 1) + d (α + 3β S), two terms of one sign.

    w is taken in two parts, as t² for `gelu`. Beyond t = 30 every e is 0.
    Source: Hendrycks & Gimpel (2016), §2, where 0.044715 comes from.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.gelu_tanh(jnp.array([-1.0, 0.0, 1.0])))
    [-0.1588  0.      0.8412]
    """
    t = jnp.minimum(_magnitude(z), 30)
    (w, low), _ = _gelu_tanh_argument(t)
    m, scale = scaled_exp(-w, -low)
    return jnp.where(z < 0, 0, z) - t * m / (1 + m * scale) * scale, z


@_compiled
def gelu_tanh_pullback(z: Z, a_bar: Z):
    t = jnp.minimum(_magnitude(z), 30)
    (w, w_low), (cube, cube_low) = _gelu_tanh_argument(t)
    m, scale = scaled_exp(-w)
    e = m * scale
    far, far_low = rounded((w, 2 * cube))  # t w′ = w + 2β t³
    far, far_rest = 1 - far, e - (far_low + w_low + 2 * cube_low)
    alpha, beta, e_root = float(GELU_ALPHA), float(GELU_BETA), float(GELU_TANH_ROOT_EXP)
    root, rest = constant(GELU_TANH_ROOT, t.dtype)  # t₀ = root + rest
    d, S = root - t, t * (t + root) + root**2
    near = d * (alpha + 3 * beta * S) + e_root * expm1_series(d * (alpha + beta * S), 0.3)
    near_rest = rest * (alpha + 9 * beta * t * t + e * (alpha + 3 * beta * t * t))
    is_near = jnp.abs(d) < 0.15
    n, n_rest = jnp.where(is_near, near, far), jnp.where(is_near, near_rest, far_rest)
    n = n + (n_rest - n * w_low)  # exp(-w_low) = 1 - w_low is missing in m
    return (a_bar * _of_both_signs(z, m * n / (1 + e * (2 + e)) * scale),)


def _gelu_tanh_argument(t: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """w = α t + β t³ as a rounded number and the rest, and β t³ in two parts."""
    parts = split(t)
    cube = product(parts, product(product(parts, parts), constant_parts(GELU_BETA, t.dtype)))
    return rounded(total(cube, product(parts, constant_parts(GELU_ALPHA, t.dtype)))), cube


GELU_ALPHA = "1.595769121605730711759784239737527473903"  # √(8/π)
GELU_BETA = "0.071354816272600248776338752279863540996"  # 0.044715 √(8/π)
GELU_TANH_ROOT = "0.7524614220710162584879544432889160906054"
GELU_TANH_ROOT_EXP = "0.2919552119147671345949768332781258058422"

gelu_tanh = Rule(gelu_tanh_forward, gelu_tanh_pullback)


@_compiled
def softmax_forward(z: Z):
    """a_k = exp(z_k) / Σ_j exp(z_j) over the last axis; unchanged by adding a constant to z.

    The Jacobian is full, ∂a_j/∂z_k = a_j (1[j=k] - a_k), and never formed:
    z̄_k = Σ_j ā_j a_j (1[j=k] - a_k) = a_k (ā_k - Σ_j ā_j a_j)
    The bracket cancels where one a_j is nearly 1. As Σ_j a_j = 1, it is the same of ā - c for any c, and with
    c = ā at the largest a the term that cancels is gone.
    Source: Nielsen (2015), ch. 3, eq. 78; Bishop (2006), eq. 4.106.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.softmax(jnp.array([0.0, 1.0, 2.0])))
    [0.09   0.2447 0.6652]
    """
    _, e = shifted_exponentials(z)
    return e / (e + sum_of_others(e)), z


@_compiled
def softmax_pullback(z: Z, a_bar: Z):
    _, e = shifted_exponentials(z)
    a = e / (e + sum_of_others(e))
    top, n, _ = largest(e)  # the largest e are 1, and their sum their number
    a_bar = a_bar - jnp.sum(a_bar, axis=-1, keepdims=True, where=top) / jnp.maximum(n, 1)
    return (a * (a_bar - jnp.sum(a_bar * a, axis=-1, keepdims=True)),)


softmax = Rule(softmax_forward, softmax_pullback)


def _magnitude(z: Z) -> Array:
    """|z|, of slope 1 at 0, where that of `jnp.abs` is 0: autodiff of a forward then finds σ′(0) too."""
    return jnp.where(z < 0, -z, z)


def _of_both_signs(z: Z, slope: Array) -> Array:
    """σ′(z) from the slope at -|z|, for the activations with σ(z) - σ(-z) = z, so σ′(z) = 1 - σ′(-z)."""
    return jnp.where(z < 0, slope, 1 - slope)
