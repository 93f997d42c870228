r"""Activations a = σ(z) and their pullbacks z̄ = (∂a/∂z)ᵀ ā.

An activation may use all of its layer's z: the last axis is the layer, any axes before it are
examples. For an element-wise σ the Jacobian is diagonal and the pullback is z̄ = σ′(z) ā.

Slopes are evaluated from z in a form that neither cancels nor overflows, rather than from a: near
saturation a(1 - a) has lost the digits of 1 - a that σ′ consists of. With e = exp(-|z|) ≤ 1,

    sigmoid:  σ(z) = 1/(1+e) or e/(1+e),  so  σ′ = σ(1-σ) = e / (1+e)²,
    tanh:     tanh(z) = 2σ(2z) - 1,       so  tanh′ = 4σ′(2z) = 4e² / (1+e²)².

Values are those of `jax.nn`, and so are the slopes at kinks.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .rules import Rule, finite_number

Z = Float[Array, "*batch n"] | Float[Array, ""]  # a layer's inputs, or a single number


def identity_forward(z: Z):
    """a = z: the output layer of a network whose loss takes logits, or of a regression."""
    return z, None


def identity_pullback(residuals: None, a_bar: Z):
    return (a_bar,)


identity = Rule(identity_forward, identity_pullback)


def sigmoid_forward(z: Z):
    """σ(z) = 1 / (1 + exp(-z)), the logistic function.

    σ′ = σ(1 - σ) = e / (1 + e)²,  e = exp(-|z|)
    Source: Nielsen (2015), ch. 1, eq. 3.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.sigmoid(jnp.array([-1.0, 0.0, 1.0])))
    [0.2689 0.5    0.7311]
    """
    return jax.nn.sigmoid(z), z


def sigmoid_pullback(z: Z, a_bar: Z):
    e = jnp.exp(-jnp.abs(z))
    return (a_bar * (e / (1 + e) ** 2),)


sigmoid = Rule(sigmoid_forward, sigmoid_pullback)


def tanh_forward(z: Z):
    """tanh(z) = (exp(z) - exp(-z)) / (exp(z) + exp(-z)).

    tanh′ = 1 - tanh² = 4e / (1 + e)²,  e = exp(-2|z|)
    Source: LeCun et al. (1998), *Efficient BackProp*, §4.4, who prefer it to σ for being odd.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.tanh(jnp.array([-1.0, 0.0, 1.0])))
    [-0.7616  0.      0.7616]
    """
    return jnp.tanh(z), z


def tanh_pullback(z: Z, a_bar: Z):
    e = jnp.exp(-2 * jnp.abs(z))
    return (a_bar * (4 * e / (1 + e) ** 2),)


tanh = Rule(tanh_forward, tanh_pullback)


def relu_forward(z: Z):
    """max(0, z).

    σ′ = 1 for z > 0, else 0; at the kink z = 0 the slope is 0, as in `jax.nn.relu`.
    Kept: where z > 0.
    Source: Nair & Hinton (2010).

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.relu(jnp.array([-1.0, 0.0, 1.0])))
    [0. 0. 1.]
    """
    return jax.nn.relu(z), z > 0


def relu_pullback(is_positive, a_bar: Z):
    return (jnp.where(is_positive, a_bar, 0),)


relu = Rule(relu_forward, relu_pullback)


def leaky_relu_forward(slope: float, z: Z):
    """z for z ≥ 0, slope·z below.

    σ′ = 1 for z ≥ 0, else slope; at the kink z = 0 the right-hand slope 1, as in `jax.nn.leaky_relu`.
    Source: Maas et al. (2013).
    """
    return jax.nn.leaky_relu(z, slope), z >= 0


def leaky_relu_pullback(slope: float, is_right, a_bar: Z):
    return (jnp.where(is_right, a_bar, slope * a_bar),)


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


def elu_forward(alpha: float, z: Z):
    """z for z > 0, alpha·(exp(z) - 1) below.

    σ′ = 1 for z > 0, else alpha·exp(z); at z = 0 the left-hand slope alpha, as in `jax.nn.elu`
    (a kink unless alpha = 1).
    Source: Clevert et al. (2016), eq. 15.
    """
    return jax.nn.elu(z, alpha), z


def elu_pullback(alpha: float, z: Z, a_bar: Z):
    # exp only where it is used: exp(1000) is inf, and the branch not taken must not meet it.
    slope = jnp.where(z > 0, 1, alpha * jnp.exp(jnp.minimum(z, 0)))
    return (a_bar * slope,)


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


def softplus_forward(z: Z):
    """log(1 + exp(z)), a smooth relu.

    σ′ = exp(z) / (1 + exp(z)), the logistic function.
    Source: Dugas et al. (2001).

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.softplus(jnp.array([-1.0, 0.0, 1.0])))
    [0.3133 0.6931 1.3133]
    """
    return jax.nn.softplus(z), z


def softplus_pullback(z: Z, a_bar: Z):
    return (a_bar * jax.nn.sigmoid(z),)


softplus = Rule(softplus_forward, softplus_pullback)


def silu_forward(z: Z):
    """z·s(z), s the logistic function; also called swish.

    σ′ = s + z s′ = s(z) (1 + z s(-z)),  for s′ = s(z) s(-z)
    Source: Elfwing et al. (2018), eq. 5; Hendrycks & Gimpel (2016).

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.silu(jnp.array([-1.0, 0.0, 1.0])))
    [-0.2689  0.      0.7311]
    """
    return jax.nn.silu(z), z


def silu_pullback(z: Z, a_bar: Z):
    slope = jax.nn.sigmoid(z) * (1 + z * jax.nn.sigmoid(-z))
    return (a_bar * slope,)


silu = Rule(silu_forward, silu_pullback)


def gelu_forward(z: Z):
    """z·Φ(z), Φ the distribution function of the unit normal: the exact (erf) form.

    σ′ = Φ(z) + z φ(z),  φ(z) = Φ′(z) = exp(-z²/2) / √(2π)
    Source: Hendrycks & Gimpel (2016), §2.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.gelu(jnp.array([-1.0, 0.0, 1.0])))
    [-0.1587  0.      0.8413]
    """
    return jax.nn.gelu(z, approximate=False), z


def gelu_pullback(z: Z, a_bar: Z):
    cdf = jax.lax.erfc(-z * 0.5**0.5) / 2
    pdf = jnp.exp(-z * z / 2) * (2 * jnp.pi) ** -0.5
    return (a_bar * (cdf + z * pdf),)


gelu = Rule(gelu_forward, gelu_pullback)


def gelu_tanh_forward(z: Z):
    """z·(1 + tanh u)/2 with u = √(2/π)·(z + 0.044715 z³), an approximation of `gelu`.

    (1 + tanh u)/2 = s(2u), s the logistic function, so
    σ′ = s(2u) + z·2u′·s′(2u),  u′ = √(2/π)·(1 + 3·0.044715 z²),  s′(2u) = e/(1+e)², e = exp(-2|u|)

    Beyond |z| = 30 the second term is below the smallest number of every dtype (e < 10⁻⁸⁵⁰); it is
    evaluated at the clipped z, so that z³ cannot overflow.
    Source: Hendrycks & Gimpel (2016), §2, where 0.044715 comes from.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.gelu_tanh(jnp.array([-1.0, 0.0, 1.0])))
    [-0.1588  0.      0.8412]
    """
    return jax.nn.gelu(z, approximate=True), z


def gelu_tanh_pullback(z: Z, a_bar: Z):
    t = jnp.clip(z, -30, 30)
    c = (2 / jnp.pi) ** 0.5
    u = c * (t + 0.044715 * t**3)
    u_slope = c * (1 + 3 * 0.044715 * t**2)
    e = jnp.exp(-2 * jnp.abs(u))
    slope = jax.nn.sigmoid(2 * u) + t * 2 * u_slope * (e / (1 + e) ** 2)
    return (a_bar * slope,)


gelu_tanh = Rule(gelu_tanh_forward, gelu_tanh_pullback)


def softmax_forward(z: Z):
    """a_k = exp(z_k) / Σ_j exp(z_j) over the last axis; unchanged by adding a constant to z.

    The Jacobian is full, ∂a_j/∂z_k = a_j (1[j=k] - a_k), and never formed:
    z̄_k = Σ_j ā_j a_j (1[j=k] - a_k) = a_k (ā_k - Σ_j ā_j a_j)
    Source: Nielsen (2015), ch. 3, eq. 78; Bishop (2006), eq. 4.106.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.softmax(jnp.array([0.0, 1.0, 2.0])))
    [0.09   0.2447 0.6652]
    """
    a = jax.nn.softmax(z, axis=-1)
    return a, a


def softmax_pullback(a: Z, a_bar: Z):
    return (a * (a_bar - jnp.sum(a_bar * a, axis=-1, keepdims=True)),)


softmax = Rule(softmax_forward, softmax_pullback)
