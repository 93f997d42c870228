r"""Elementary functions right to a few units in the last place (ulp), as activations and losses need them.

A value computed in p digits can be wrong in all of them for three reasons, and each has its remedy here:

- the last operations are done in too few digits: `rounded_once` does those of 16-bit numbers in float32;
- a difference cancels: `expm1` is exp(x) - 1 without it, `difference` returns what z - m rounded away;
- a large argument of exp was rounded, |x|·eps too much or too little, and exp multiplies by that error:
  `scaled_exp` takes x in two parts, and `split`, `product`, `total` compute in two parts.

Of XLA they use exp and log1p alone. Its tanh and erfc are not right to 4 ulp, nor in all versions its expm1
(`tests/test_elementary.py`). Below float32's and float64's smallest normal number the hardware rounds to 0,
and so do these.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from functools import cache, wraps
from math import exp, factorial, floor, frexp, log
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from .rules import is_array

F = TypeVar("F", bound=Callable)
Number = Array | float
Parts = tuple[Number, Number]  # high + low: high has half of the dtype's digits, so that high·high is exact
SMALL = 1024  # numbers in a matrix, whose copy is cheaper than what its product gains by it
LARGE = 2**15  # numbers in an array: between 4,096, of which a selection costs more than a copy, and 2^18


def rounded_once(function: F) -> F:
    """The function with 16-bit floats evaluated in float32; its results are rounded once, to their dtype.

    Every operation in 16 bits would round: three of them lose more than 1 ulp, and in float16 they overflow
    above 65504. Arrays of 32 bits and more pass through untouched.
    """

    @wraps(function)
    def evaluated(*arguments):
        narrow = {x.dtype for x in jax.tree.leaves(arguments) if _is_narrow(x)}
        if len(narrow) != 1:  # none; or two, which the function refuses or promotes as JAX is set
            return function(*arguments)
        (dtype,) = narrow
        wide = jax.tree.map(widened, arguments)
        is_wide = lambda x: is_array(x) and x.dtype == jnp.float32  # noqa: E731
        return jax.tree.map(lambda x: x.astype(dtype) if is_wide(x) else x, function(*wide))

    return evaluated  # pyright: ignore[reportReturnType]


def widened(x: Any) -> Any:
    """x in at least 32 bits, if it is an array of floats."""
    return x.astype(jnp.float32) if _is_narrow(x) else x


def matmul(a: Array, b: Array) -> Array:
    """a @ b, summed and returned in at least 32 bits: bfloat16 does not see 1 more on a sum of 256."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32 if _is_narrow(a) else a.dtype)


def transposed(x: Array) -> Array:
    """xᵀ of a matrix, for a product: on a CPU laid out row by row, at the price of a copy.

    XLA never copies a transpose, but has the product read it as it lies. In bfloat16 a CPU then computes the
    product in float32, as its kernels take two matrices that lie row by row; and in any dtype small matrices
    take longer so than with a copy. The barriers keep that apart from what computes x and from the product.
    """
    if jax.default_backend() != "cpu" or x.ndim != 2:
        return x.T
    if x.dtype == jnp.bfloat16 and not _is_partitioned.get():
        return _by_rows(_by_rows(x).T)
    if x.size <= SMALL:
        return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x).T)
    return x.T


def times_transposed(A: Array, W: Array) -> Array:
    """A Wᵀ, summed and returned in at least 32 bits. In float32 a CPU has a kernel for W as it lies."""
    return matmul(A, transposed(W) if W.dtype == jnp.bfloat16 else W.T)


def _by_rows(x: Array) -> Array:
    return with_layout_constraint(x, Layout((0, 1)))


_is_partitioned, _is_step = ContextVar("is_partitioned", default=False), ContextVar("is_step", default=False)


@contextmanager
def partitioned() -> Iterator[None]:
    """Around the tracing of what XLA splits over devices: an array with a layout to keep it would gather."""
    with _set(_is_partitioned):
        yield


@contextmanager
def step_in_place() -> Iterator[None]:
    """Around the tracing of a gradient from which parameters are updated in their own memory: see `after`."""
    with _set(_is_step):
        yield


@contextmanager
def _set(variable: ContextVar[bool]) -> Iterator[None]:
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def after(x: Any, other: Any) -> Any:
    """x as it is; in a step XLA computes a large one after `other`, as no number is both below and above 0.

    XLA sees no order between the product δ^l W^l and the update of W^l, in W's own memory, from its gradient,
    and so copies W^l first; not if the gradient is known after δ^{l-1}. A barrier would be gone by then.
    Elsewhere the selection would take memory and time: what computes a gradient could not write it in place.
    """
    is_split = _is_partitioned.get()  # then one of its numbers would have to be sent
    if not _is_step.get() or is_split or jnp.size(x) < LARGE or not jnp.size(other):
        return x
    number = jnp.ravel(other)[0]
    return jnp.where((number < 0) & (number > 0), 0, x)


def scaled(x: Array, scale: float) -> Array:
    """scale·x, for a scale known when traced."""
    return x if scale == 1 else scale * x


def _is_narrow(x: Any) -> bool:
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32


def expm1(x: Array) -> Array:
    """exp(x) - 1, also where exp(x) is so near to 1 that the difference cancels.

    Beyond |x| = log 2 exp(x) is below ½ or above 2, and the difference keeps its digits.
    """
    return jnp.where(jnp.abs(x) < log(2), expm1_series(x, log(2)), jnp.exp(x) - 1)


def expm1_series(x: Array, bound: float) -> Array:
    """exp(x) - 1 within |x| < bound, by its Taylor polynomial x + x²/2! + x³/3! + ..."""
    eps = float(jnp.finfo(x.dtype).eps)
    terms = next(n for n in range(2, 30) if bound**n / factorial(n + 1) < eps / 4)
    x = jnp.clip(x, -bound, bound)  # what is beyond is not used, and must not overflow
    series = jnp.full_like(x, 1 / factorial(terms))
    for n in reversed(range(2, terms)):
        series = series * x + 1 / factorial(n)
    return x * (1 + x * series)  # not x + x²·series, which would be +0 at -0


def scaled_exp(x: Array, low: Number = 0.0) -> tuple[Array, Array]:
    """(m, scale) with exp(x + low) = m·scale, for |low| not above the rounding of x.

    Multiply what is to be multiplied by m first, and by scale last: near the smallest number of the dtype
    exp(x) is 0 while t·exp(x) is not. There m = exp(x + shift), whose argument is exact since it has the
    digits of x and is smaller. exp(x + low) = exp(x) (1 + low), as low² is below the rounding; m·low needs
    room above the smallest number as well.
    """
    info = jnp.finfo(x.dtype)
    shift = 64 if x.dtype == jnp.float64 else 32
    far = x < floor(log(info.tiny / info.eps)) + 2
    m = jnp.exp(jnp.where(far, x + shift, x))
    return m + m * low, jnp.where(far, jnp.asarray(exp(-shift), x.dtype), 1)


def difference(z: Array, m: Number) -> tuple[Array, Array]:
    """(d, low): d = z - m as rounded, and what was rounded away, exactly: z - m = d + low.

    Source: Knuth, *The Art of Computer Programming*, vol. 2, §4.2.2, theorem B.
    """
    d = z - m
    back = d - z
    low = (z - (d - back)) - (back + m)
    return d, jnp.where(jnp.isfinite(d), low, 0)


def split(x: Array) -> tuple[Array, Array]:
    """x = high + low, exactly; high is x cut off after half of its digits.

    By its bits, as Dekker's c·x - (c·x - x) is not safe: XLA may fuse a product and a difference.
    """
    info = jnp.finfo(x.dtype)
    integer = jnp.uint64 if info.bits == 64 else jnp.uint32
    kept = integer(2**info.bits - 2 ** (info.nmant - (info.nmant - 1) // 2))
    high = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, integer) & kept, x.dtype)
    return high, x - high


def product(a: tuple[Array, Array], b: Parts) -> tuple[Array, Array]:
    """a·b to one and a half times the dtype's digits. Source: Dekker (1971)."""
    exact, cross = a[0] * b[0], a[0] * b[1] + a[1] * (b[0] + b[1])
    high, _ = split(exact + cross)
    return high, (exact - high) + cross


def total(a: tuple[Array, Array], b: Parts) -> tuple[Array, Array]:
    """a + b, likewise."""
    near, low = difference(a[0], -b[0])
    low = low + (a[1] + b[1])
    high, _ = split(near + low)
    return high, (near - high) + low


def constant(digits: str, dtype: Any) -> tuple[float, float]:
    """A decimal number as the nearest number of the dtype, and the rest."""
    return _near(Fraction(digits), jnp.finfo(dtype).nmant + 1)


def constant_parts(digits: str, dtype: Any) -> tuple[float, float]:
    """A decimal number in two parts, for `product` and `total`."""
    return _near(Fraction(digits), (jnp.finfo(dtype).nmant + 1) // 2)


def _near(exact: Fraction, bits: int) -> tuple[float, float]:
    unit = Fraction(2) ** (frexp(float(exact))[1] - bits)
    high = round(exact / unit) * unit
    return float(high), float(exact - high)


def rounded(a: tuple[Array, Array]) -> tuple[Array, Array]:
    """(x, low): the parts' sum rounded to the dtype, and the rest."""
    x = a[0] + a[1]
    return x, (a[0] - x) + a[1]


def gaussian(t: Array) -> tuple[Array, Array]:
    """exp(-t²/2) as `scaled_exp` gives it, for |t| below the root of the dtype's largest number."""
    parts = split(t)
    square, low = rounded(product(parts, parts))
    return scaled_exp(-square / 2, -low / 2)


def chebyshev(coefficients: tuple[float, ...], t: Array) -> Array:
    """Σ_k c_k T_k(u) at u = (t - 5)/(t + 5), which maps 0 ≤ t < ∞ to -1 ≤ u < 1.

    A function that is smooth on the whole half-line becomes a short series in u: Shepherd & Laframboise
    (1981), who had exp(x²) erfc(x) in mind. float32 needs the terms above 2·10⁻⁹ alone.
    """
    if t.dtype != jnp.float64:
        coefficients = tuple(c for c in coefficients if abs(c) > 2e-9)
    u = (t - 5) / (t + 5)
    first, *others = reversed(powers(coefficients))
    total = jnp.full_like(t, first)
    for p in others:  # Horner's scheme: one fused multiply-add each
        total = total * u + p
    return total


@cache
def powers(coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """The same polynomial in powers of u: p_k with Σ c_k T_k(u) = Σ p_k u^k, rounded once.

    T_{k+1}(u) = 2u T_k(u) - T_{k-1}(u). For the series here Σ |p_k| is no more than 2.3 times the sum itself.
    """
    p = [Fraction(0)] * len(coefficients)
    before, now = [0, 1], [1]  # T_{-1} = u and T_0 = 1
    for c in coefficients:
        for k, factor in enumerate(now):
            p[k] += Fraction(c) * factor
        doubled = [0, *(2 * factor for factor in now)]
        before = [*before, *[0] * (len(doubled) - len(before))]
        before, now = now, [a - b for a, b in zip(doubled, before, strict=True)]
    return tuple(map(float, p))


def largest(v: Array) -> tuple[Array, Array, Array]:
    """(top, top_sum, rest) over the last axis: which v_k are the largest, their sum, and that of all others.

    There may be none: where v is a product, XLA may compute it once rounded and once within a fused
    multiply-add, and no v_k is its own maximum. Then all are summed, and what follows is right to rounding.
    """
    top = v >= jnp.max(v, axis=-1, keepdims=True)
    top_sum, rest = (jnp.sum(v, axis=-1, keepdims=True, where=part) for part in (top, ~top))
    return top, top_sum, rest


def sum_of_others(v: Array) -> Array:
    """Σ_{j≠k} v_j for every k, over the last axis, for v ≥ 0.

    The sum of all minus v_k would lose the others where v_k is nearly all of it. Only the largest can be, and
    of their sum it is subtracted first. For softmax, 1 - p_k = Σ_{j≠k} p_j.
    """
    _, top_sum, rest = largest(v)
    return rest + (top_sum - v)


def shifted_exponentials(Z: Array) -> tuple[Array, Array]:
    """(d, e): d_k = z_k - max z over the last axis, rounded, and e_k = exp(z_k - max z) ≤ 1 without that."""
    d, low = difference(Z, jnp.broadcast_to(_maximum(Z), Z.shape))
    m, scale = scaled_exp(d, low)
    return d, m * scale


@jax.custom_jvp
def _maximum(Z: Array) -> Array:
    """max z over the last axis, which is kept. Its slope is 1 at the first of the largest z_k.

    JAX shares it among the z_k that equal the maximum. Where XLA computes z once rounded and once within a
    fused multiply-add there may be none, and JAX divides by their number. Softmax does not depend on the
    shift, so that any choice among the largest is right.
    """
    return jnp.max(Z, axis=-1, keepdims=True)


@_maximum.defjvp
def _maximum_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (Z,), (Z_dot,) = primals, tangents
    index = jnp.argmax(Z, axis=-1, keepdims=True)
    is_first = jax.lax.broadcasted_iota(index.dtype, Z.shape, Z.ndim - 1) == index
    return _maximum(Z), jnp.sum(Z_dot, axis=-1, keepdims=True, where=is_first)
