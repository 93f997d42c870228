r"""Gates, the leaves of a computational graph: arithmetic and elementary functions with their pullbacks.

A gate is a rule like any other, and any other rule (`fnn.sigmoid`, a loss, a whole graph) may serve as one.
Each knows only its own inputs and output. On the way back it multiplies the gradient that arrives at its
output, z̄ = ∂C/∂z, by its local gradients ∂z/∂x, and that is the chain rule.

Element-wise gates of two inputs, z_i = f(x_i, y_i), have diagonal Jacobians (Parr & Howard 2018, §4.2):

    gate      z      ∂z/∂x        ∂z/∂y
    add       x + y  I            I
    subtract  x - y  I            -I
    multiply  x·y    diag(y)      diag(x)
    divide    x/y    diag(1/y)    diag(-x/y²)
    maximum   max    diag(x > y)  diag(y > x)    ½ at a tie

Of two inputs one may be a single number where the other is an array: it is expanded, z = f(x, y·1), and its
Jacobian is one column, such as ∂z/∂y = 1 for add and x for multiply; so ȳ sums over the entries (§4.3).
`sum` has the Jacobian 1ᵀ, a row of ones (§4.4).

Sources: Parr & Howard (2018), *The Matrix Calculus You Need For Deep Learning*; Li, Karpathy & Johnson
(2016), CS231n, lecture 4; Giles (2008), *Collected matrix derivative results*, for the matrix product.
"""

from functools import cache, partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .params import _outline, check_not_narrowed
from .rules import Rule, finite_number, is_array

X = Float[Array, "..."]


def add_forward(x: Any, y: Any):
    """x + y.  dz = dx + dy: the gradient goes to both inputs as it is."""
    x, y = _check_pair("add", x, y)
    return x + y, (x, y)


def add_pullback(xy: tuple[X, X], z_bar: X):
    x, y = xy
    return _collapse(z_bar, x), _collapse(z_bar, y)


add = Rule(add_forward, add_pullback)


def subtract_forward(x: Any, y: Any):
    """x - y.  dz = dx - dy."""
    x, y = _check_pair("subtract", x, y)
    return x - y, (x, y)


def subtract_pullback(xy: tuple[X, X], z_bar: X):
    x, y = xy
    return _collapse(z_bar, x), _collapse(-z_bar, y)


subtract = Rule(subtract_forward, subtract_pullback)


def multiply_forward(x: Any, y: Any):
    """x·y, entry by entry.  dz = y dx + x dy: each input gets the gradient times the other input."""
    x, y = _check_pair("multiply", x, y)
    return x * y, (x, y)


def multiply_pullback(xy: tuple[X, X], z_bar: X):
    x, y = xy
    return _collapse(z_bar * y, x), _collapse(z_bar * x, y)


multiply = Rule(multiply_forward, multiply_pullback)


def divide_forward(x: Any, y: Any):
    """x/y, entry by entry.  dz = dx/y - z dy/y."""
    x, y = _check_pair("divide", x, y)
    z = x / y
    return z, (x, y, z)


def divide_pullback(xyz: tuple[X, X, X], z_bar: X):
    x, y, z = xyz
    return _collapse(z_bar / y, x), _collapse(-z_bar * z / y, y)


divide = Rule(divide_forward, divide_pullback)


def maximum_forward(x: Any, y: Any):
    """max(x, y), entry by entry: the gradient goes to the larger input.

    At a tie, the kink, each input gets half of it, as in `jax.numpy.maximum`.

    >>> import fnn
    >>> print(fnn.gates.maximum(2.0, -1.0))
    2.0
    """
    x, y = _check_pair("maximum", x, y)
    return jnp.maximum(x, y), (x, y)


def maximum_pullback(xy: tuple[X, X], z_bar: X):
    x, y = xy
    share = jnp.where(x == y, 0.5, 1).astype(z_bar.dtype) * z_bar
    zero = jnp.zeros_like(z_bar)
    return _collapse(jnp.where(x >= y, share, zero), x), _collapse(jnp.where(y >= x, share, zero), y)


maximum = Rule(maximum_forward, maximum_pullback)


def exp_forward(x: Any):
    """exp(x).  dz = z dx."""
    z = jnp.exp(as_floats("gates.exp:", x))
    return z, z


def exp_pullback(z: X, z_bar: X):
    return (z_bar * z,)


exp = Rule(exp_forward, exp_pullback)


def log_forward(x: Any):
    """The natural logarithm.  dz = dx/x; at 0, where log is -inf, the slope is inf."""
    x = as_floats("gates.log:", x)
    return jnp.log(x), x


def log_pullback(x: X, z_bar: X):
    return (z_bar / x,)


log = Rule(log_forward, log_pullback)


def reciprocal_forward(x: Any):
    """1/x.  dz = -z² dx."""
    z = 1 / as_floats("gates.reciprocal:", x)
    return z, z


def reciprocal_pullback(z: X, z_bar: X):
    return (-z_bar * z * z,)


reciprocal = Rule(reciprocal_forward, reciprocal_pullback)


def square_forward(x: Any):
    """x².  dz = 2x dx."""
    x = as_floats("gates.square:", x)
    return x * x, x


def square_pullback(x: X, z_bar: X):
    return (2 * z_bar * x,)


square = Rule(square_forward, square_pullback)


def sin_forward(x: Any):
    """sin(x), x in radians.  dz = cos(x) dx."""
    x = as_floats("gates.sin:", x)
    return jnp.sin(x), x


def sin_pullback(x: X, z_bar: X):
    return (z_bar * jnp.cos(x),)


sin = Rule(sin_forward, sin_pullback)


def cos_forward(x: Any):
    """cos(x), x in radians.  dz = -sin(x) dx."""
    x = as_floats("gates.cos:", x)
    return jnp.cos(x), x


def cos_pullback(x: X, z_bar: X):
    return (-z_bar * jnp.sin(x),)


cos = Rule(cos_forward, cos_pullback)


def sum_forward(x: Any):
    """Σ_i x_i over all entries.  dz = 1ᵀ dx: every entry gets the gradient as it is."""
    x = as_floats("gates.sum:", x)
    return x.sum(), x


def sum_pullback(x: X, z_bar: Float[Array, ""]):
    return (jnp.broadcast_to(z_bar, x.shape),)


sum = Rule(sum_forward, sum_pullback)


def squared_norm_forward(x: Any):
    """‖x‖² = Σ_i x_i² over all entries.  dz = 2xᵀ dx."""
    x = as_floats("gates.squared_norm:", x)
    return (x * x).sum(), x


def squared_norm_pullback(x: X, z_bar: Float[Array, ""]):
    return (2 * z_bar * x,)


squared_norm = Rule(squared_norm_forward, squared_norm_pullback)


def dot_forward(x: Any, y: Any):
    """x·y = Σ_i x_i y_i of two vectors (n,).  dz = yᵀdx + xᵀdy."""
    x, y = as_floats("gates.dot:", x), as_floats("gates.dot:", y)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"gates.dot: needs two vectors (n,), got {x.shape} and {y.shape}; see also matmul.")
    _check_dtypes("dot", x, y)
    return x @ y, (x, y)


def dot_pullback(xy: tuple[Float[Array, " n"], Float[Array, " n"]], z_bar: Float[Array, ""]):
    x, y = xy
    return z_bar * y, z_bar * x


dot = Rule(dot_forward, dot_pullback)


def matmul_forward(W: Any, x: Any):
    """W x of a matrix (m, n) and a vector (n,) or a matrix (n, k).

    dz = dW x + W dx.  ⟨z̄, dW x⟩ = ⟨z̄ xᵀ, dW⟩ and ⟨z̄, W dx⟩ = ⟨Wᵀ z̄, dx⟩, so  W̄ = z̄ xᵀ,  x̄ = Wᵀ z̄.
    Source: Giles (2008), §2.2.2.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.gates.matmul(jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.array([3.0, 4.0])))
    [4. 6.]
    """
    W, x = as_floats("gates.matmul:", W), as_floats("gates.matmul:", x)
    if W.ndim != 2 or x.ndim not in (1, 2) or W.shape[1] != x.shape[0]:
        hint = "for two vectors use dot."
        if W.ndim == 2 and x.ndim in (1, 2) and W.shape[0] == x.shape[0]:
            hint = "is the first transposed?"
        raise ValueError(f"gates.matmul: needs (m, n) and (n[, k]), got {W.shape} and {x.shape}; {hint}")
    _check_dtypes("matmul", W, x)
    return W @ x, (W, x)


def matmul_pullback(Wx: tuple[Float[Array, "m n"], X], z_bar: X):
    W, x = Wx
    W_bar = jnp.outer(z_bar, x) if x.ndim == 1 else z_bar @ x.T
    return W_bar, W.T @ z_bar


matmul = Rule(matmul_forward, matmul_pullback)


def constant_forward(c: float):
    """The number c, a gate without inputs."""
    return jnp.asarray(c), None  # of weak type: it takes the dtype of what it meets


def constant_pullback(c: float, residuals: None, z_bar: Float[Array, ""]):
    return ()


@cache
def _constant(c: float) -> Rule:
    return Rule(partial(constant_forward, c), partial(constant_pullback, c))


def constant(c: float) -> Rule:
    """The gate without inputs whose output is the number c."""
    return _constant(finite_number("gates.constant", "c", c))


def shift_forward(c: float, x: Any):
    """x + c for a constant c.  dz = dx."""
    return as_floats("gates.shift:", x) + c, None


def shift_pullback(c: float, residuals: None, z_bar: X):
    return (z_bar,)


@cache
def _shift(c: float) -> Rule:
    return Rule(partial(shift_forward, c), partial(shift_pullback, c))


def shift(c: float) -> Rule:
    """The gate x + c.

    >>> import fnn
    >>> print(fnn.gates.shift(1.0)(2.0))
    3.0
    """
    return _shift(finite_number("gates.shift", "c", c))


def scale_forward(c: float, x: Any):
    """c·x for a constant c.  dz = c dx."""
    return c * as_floats("gates.scale:", x), None


def scale_pullback(c: float, residuals: None, z_bar: X):
    return (c * z_bar,)


@cache
def _scale(c: float) -> Rule:
    return Rule(partial(scale_forward, c), partial(scale_pullback, c))


def scale(c: float) -> Rule:
    """The gate c·x."""
    return _scale(finite_number("gates.scale", "c", c))


def power_forward(n: float, x: Any):
    """x^n for a constant n.  dz = n x^(n-1) dx; for n = 0 the slope is 0 everywhere.

    For n between 0 and 1 the slope at 0 is inf; a negative x needs an integer n, as otherwise x^n is no
    real number.
    """
    x = as_floats("gates.power:", x)
    return _power_of(x, n), x


def power_pullback(n: float, x: X, z_bar: X):
    return (z_bar * (n * _power_of(x, n - 1)) if n else jnp.zeros_like(z_bar),)


@cache
def _power(n: float) -> Rule:
    return Rule(partial(power_forward, n), partial(power_pullback, n))


def power(n: float) -> Rule:
    """The gate x^n."""
    return _power(finite_number("gates.power", "n", n))


def _power_of(x: X, n: float) -> X:
    return x ** (int(n) if n == int(n) else n)  # an integer power is a few products, and exact


def as_floats(where: str, x: Any) -> X:
    """x as an array of floats; a number of Python's takes the dtype of what it meets (a weak type)."""
    if type(x) in (int, float):
        return jnp.asarray(float(x))
    if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{where} needs floats, got {_outline(x)}; use jnp.asarray(x, float).")
    check_not_narrowed(where, x.dtype)
    return jnp.asarray(x)


def _check_pair(gate: str, x: Any, y: Any) -> tuple[X, X]:
    """Two arrays of floats of equal shapes, or one of them a single number."""
    x, y = as_floats(f"gates.{gate}:", x), as_floats(f"gates.{gate}:", y)
    x, y = (x.astype(y.dtype) if x.weak_type else x), (y.astype(x.dtype) if y.weak_type else y)
    if x.shape != y.shape and x.shape and y.shape:
        raise ValueError(
            f"gates.{gate}: needs equal shapes, or one input a single number, got {x.shape} and {y.shape}. "
            "To reuse one array for many rows, go through jax.vmap."
        )
    _check_dtypes(gate, x, y)
    return x, y


def _check_dtypes(gate: str, x: X, y: X) -> None:
    if x.dtype != y.dtype:
        raise TypeError(
            f"gates.{gate}: needs inputs of one dtype, got {x.dtype} and {y.dtype}; use x.astype({y.dtype})."
        )


def _collapse(z_bar: X, x: X) -> X:
    """The adjoint of an input: summed over the entries if a single number was expanded to them."""
    return z_bar if x.shape == z_bar.shape else z_bar.sum()
