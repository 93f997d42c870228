r"""The activations and their slopes to 60 digits, by mpmath, and how far from them a number is.

The truth for `experiments/accuracy.py` and the tests: written from the definitions, with no part of JAX.
A number in a dtype is given exactly; its distance from the truth is counted in units in the last place (ulp),
the spacing of the dtype's numbers around the truth. Correctly rounded is at most half a unit.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import mpmath
import numpy as np
from mpmath import erfc, exp, expm1, log1p, mp, mpf, pi, sqrt

mp.dps = 60

Real = Any  # an mpf


class Function(NamedTuple):
    """An element-wise activation and its derivative, and what both tend to at -∞ and ∞."""

    value: Callable[[Real], Real]
    slope: Callable[[Real], Real]
    limits: tuple[float, float]
    slope_limits: tuple[float, float]


def logistic(z: Real) -> Real:
    return 1 / (1 + exp(-z))


def normal_cdf(z: Real) -> Real:
    if z < -1e6:  # below 10 to the power of -10¹¹, where mpmath's own integers overflow
        return mpf(0)
    return erfc(-z / sqrt(2)) / 2


def normal_density(z: Real) -> Real:
    return exp(-z * z / 2) / sqrt(2 * pi)


def gelu_tanh_argument(z: Real) -> Real:
    """2u: (1 + tanh u)/2 is the logistic function of it."""
    return sqrt(8 / pi) * (z + mpf("0.044715") * z**3)


def gelu_tanh_slope(z: Real) -> Real:
    w, w_slope = gelu_tanh_argument(z), sqrt(8 / pi) * (1 + 3 * mpf("0.044715") * z**2)
    return logistic(w) + z * w_slope * logistic(w) * logistic(-w)


def leaky_relu(slope: float) -> Function:
    return Function(
        lambda z: z if z >= 0 else mpf(slope) * z,
        lambda z: mpf(1) if z >= 0 else mpf(slope),
        (-math.inf, math.inf),
        (slope, 1),
    )


def elu(alpha: float) -> Function:
    return Function(
        lambda z: z if z > 0 else mpf(alpha) * expm1(z),
        lambda z: mpf(1) if z > 0 else mpf(alpha) * exp(z),
        (-alpha, math.inf),
        (0, 1),
    )


DIGITS_OF_PROBABILITIES = 400  # 1 - p is wanted to 60 digits also where it is 10⁻³⁰⁸, float64's smallest

RELU_LIKE = (0, math.inf), (0, 1)
ACTIVATIONS = {
    "sigmoid": Function(logistic, lambda z: logistic(z) * logistic(-z), (0, 1), (0, 0)),
    "tanh": Function(mpmath.tanh, lambda z: 4 * logistic(2 * z) * logistic(-2 * z), (-1, 1), (0, 0)),
    "relu": Function(lambda z: max(z, mpf(0)), lambda z: mpf(z > 0), *RELU_LIKE),
    "leaky_relu(0.01)": leaky_relu(0.01),
    "leaky_relu(0.3)": leaky_relu(0.3),
    "elu(1.0)": elu(1.0),
    "elu(0.7)": elu(0.7),
    "softplus": Function(lambda z: max(z, mpf(0)) + log1p(exp(-abs(z))), logistic, *RELU_LIKE),
    "silu": Function(lambda z: z * logistic(z), lambda z: logistic(z) * (1 + z * logistic(-z)), *RELU_LIKE),
    "gelu": Function(
        lambda z: z * normal_cdf(z), lambda z: normal_cdf(z) + z * normal_density(z), *RELU_LIKE
    ),
    "gelu_tanh": Function(lambda z: z * logistic(gelu_tanh_argument(z)), gelu_tanh_slope, *RELU_LIKE),
}


def exactly(z: Any) -> Real:
    """A number of any float dtype as it is."""
    return mpf(float(z))


def unit(exact: Real, dtype: Any) -> Real:
    """One ulp: the spacing of the dtype's numbers around this one, with that of the smallest at 0."""
    info = ml_dtypes.finfo(dtype)
    exponent = mpmath.frexp(exact)[1] if exact else -math.inf
    return mpmath.ldexp(1, int(max(exponent, info.minexp + 1)) - info.nmant - 1)


def ulps(number: Any, exact: Real, dtype: Any) -> float:
    """How many ulp a number is from the exact one; infinity if it is not finite."""
    return float(abs(exactly(number) - exact) / unit(exact, dtype)) if np.isfinite(number) else math.inf


def nearest(exact: Real, dtype: Any) -> float:
    """The number of the dtype next to the exact one, the even one of two; infinity beyond the largest."""
    spacing = unit(exact, dtype)
    number = float(mpmath.nint(exact / spacing) * spacing)
    return number if abs(number) <= float(ml_dtypes.finfo(dtype).max) else math.copysign(math.inf, number)


def finite_numbers(dtype: Any) -> np.ndarray:
    """All finite numbers of a 16-bit dtype, from the most negative up."""
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # converting a NaN
        as_float64 = numbers.astype(np.float64)
    order = np.argsort(as_float64, kind="stable")
    return numbers[order][np.isfinite(as_float64[order])]


class Loss(NamedTuple):
    """The loss of one example, a sum of nothing negative, and its gradient with respect to z.

    terms: for every ∂C/∂z_k the larger of the two terms whose difference it is
    """

    value: Real
    gradient: list[Real]
    terms: list[Real]


def softmax_cross_entropy(z: list[Real], y: list[Real]) -> Loss:
    """-Σ y_k log p_k and p_k Σ y_j - y_k; for y with a single 1, p - 1 is a sum of the other p_j."""
    with mpmath.workdps(DIGITS_OF_PROBABILITIES):
        log_sum = max(z) + mpmath.log(sum(exp(v - max(z)) for v in z))
        value = sum(t * (log_sum - v) for t, v in zip(y, z, strict=True))
        p, total = [exp(v - log_sum) for v in z], sum(y)
        one_hot = sorted(y)[-2:] == [0, 1]
        gradient = [q * total - t for q, t in zip(p, y, strict=True)]
        terms = [abs(g) if one_hot else max(q * total, t) for g, q, t in zip(gradient, p, y, strict=True)]
    return Loss(value, gradient, terms)


def sigmoid_binary_cross_entropy(z: list[Real], y: list[Real]) -> Loss:
    """Σ -y_k log σ(z_k) - (1 - y_k) log σ(-z_k) and σ(z_k) - y_k, which for y of 0 or 1 is σ or -σ(-z)."""
    softplus, terms = ACTIVATIONS["softplus"].value, []
    with mpmath.workdps(DIGITS_OF_PROBABILITIES):
        value = sum(t * softplus(-v) + (1 - t) * softplus(v) for t, v in zip(y, z, strict=True))
        gradient = [logistic(v) - t for t, v in zip(y, z, strict=True)]
        for g, t, v in zip(gradient, y, z, strict=True):
            terms.append(abs(g) if t in (0, 1) else max((1 - t) * logistic(v), t * logistic(-v)))
    return Loss(value, gradient, terms)
