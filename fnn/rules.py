"""A rule: a function together with its pullback, derived by hand.

A rule's forward computes the output and keeps what the way back will need; its pullback carries
the adjoint of the output, ȳ = ∂C/∂y, back to the adjoints of the inputs. For y = f(x) the chain rule
says

    dC = ⟨ȳ, dy⟩ = ⟨ȳ, J dx⟩ = ⟨Jᵀ ȳ, dx⟩,   so   x̄ = Jᵀ ȳ,   J = ∂f/∂x.

Activations, losses, networks and costs are all rules, and everything in this file serves any of them.

Source: Griewank & Walther (2008), *Evaluating Derivatives*, §3.2; the pair of functions is the one
that `jax.custom_vjp` takes.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np


@runtime_checkable
class RuleLike(Protocol):
    """Whatever has a rule's two functions: a `Rule`, a network, a cost, or an object of yours."""

    @property
    def forward(self) -> Callable[..., tuple[Any, Any]]: ...

    @property
    def pullback(self) -> Callable[[Any, Any], tuple[Any, ...]]: ...


@dataclass(frozen=True, repr=False)
class Rule:
    """A function and its hand-derived pullback; called, it is the function.

    forward:  (*primals) -> (out, residuals)
    pullback: (residuals, out_bar) -> one adjoint per primal, a tuple; `None` for integers

    Residuals are a pytree of arrays. A rule is hashable, so it may be static under `jax.jit`.

    >>> import fnn
    >>> import jax.numpy as jnp
    >>> cube = fnn.Rule(lambda x: (x**3, x), lambda x, y_bar: (y_bar * 3 * x**2,))
    >>> print(cube(2.0))
    8.0
    >>> value, slope = fnn.value_and_grad(cube)(jnp.float32(2.0))
    >>> print(value, slope)
    8.0 12.0
    """

    forward: Callable[..., tuple[Any, Any]]
    pullback: Callable[[Any, Any], tuple[Any, ...]]

    def __post_init__(self):
        for name in ("forward", "pullback"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Rule: {name} needs to be a function, got {getattr(self, name)!r}.")
        function = self.forward.func if isinstance(self.forward, partial) else self.forward
        object.__setattr__(self, "__doc__", function.__doc__)

    def __call__(self, *primals, **named):
        return run_forward(self, *primals, **named)[0]

    def __repr__(self):
        """The name of the function, with its parameters: `relu`, `leaky_relu(0.01)`."""
        function, parameters = self.forward, ""
        if isinstance(function, partial):
            function, parameters = function.func, f"({', '.join(map(repr, function.args))})"
        name = getattr(function, "__name__", type(function).__name__)
        return name.removesuffix("_forward") + parameters


def is_array(x: Any) -> bool:
    """Whether x is an array of JAX's, traced or not, or of NumPy's; much else has a dtype and a shape.

    Masked arrays are none: JAX would use the numbers behind the mask.
    """
    return isinstance(x, jax.Array | np.ndarray | np.generic) and not isinstance(x, np.ma.MaskedArray)


def finite_number(rule: str, name: str, value: Any) -> float:
    """The parameter of a rule as a Python float, hashable; raises unless it is a finite number."""
    if is_array(value) and value.shape:
        raise ValueError(
            f"{rule}: {name} needs to be a number, got an array {value.shape}. "
            f"fnn.{rule}(0.01) makes the rule; call that with arrays."
        )
    if not isinstance(value, bool | str | bytes):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if abs(number) < float("inf"):
                return number
    raise ValueError(f"{rule}: {name} needs to be a finite number such as 0.01, got {value!r}.")


def accepts(function: Callable, *arguments: Any) -> bool:
    """Whether a function takes these arguments; True where Python cannot tell."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


def check_rule_like(where: str, rule: Any, *arguments: str, such_as: str = "fnn.squared_error") -> None:
    """Raises TypeError unless `rule` has a pullback, and a forward that takes arguments of these names.

    `where` begins the message.
    """
    if not isinstance(rule, RuleLike) or isinstance(rule, type):
        is_function = callable(rule) and hasattr(rule, "__name__")
        what = f"the function {rule.__name__}" if is_function else repr(rule)
        raise TypeError(
            f"{where} needs to be a rule, a forward with its hand-derived pullback, such as {such_as}; "
            f"got {what}. If it is a function that makes a rule, call it; "
            "make your own with fnn.Rule(forward, pullback)."
        )
    if arguments and not accepts(rule.forward, *arguments):
        raise TypeError(
            f"{where} needs to be a rule called with ({', '.join(arguments)}), such as {such_as}; "
            f"got {rule!r}, whose forward takes other arguments."
        )


def run_forward(rule: RuleLike, *primals: Any, **named: Any) -> tuple[Any, Any]:
    """(out, residuals); a bare array, which would unpack along its first axis, is refused."""
    result = rule.forward(*primals, **named)
    if not isinstance(result, tuple) or len(result) != 2:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise TypeError(
            f"{rule!r}: forward needs to return a pair (out, residuals), got {got}; "
            "return (out, None) if the pullback needs nothing."
        )
    return result


def check_adjoints(rule: RuleLike, adjoints: Any, n: int | None = None) -> tuple[Any, ...]:
    """What a pullback returned; raises TypeError unless it is a tuple, of n adjoints if n is given."""
    if not isinstance(adjoints, tuple) or n not in (None, len(adjoints)):
        got = f"a tuple of {len(adjoints)}" if isinstance(adjoints, tuple) else type(adjoints).__name__
        raise TypeError(
            f"{rule!r}: pullback needs to return a tuple with one adjoint for each argument of forward, "
            f"got {got}; for a single argument return (x_bar,), and None for integers."
        )
    return adjoints


def value_and_grad(rule: RuleLike, argnums: int | Sequence[int] = 0) -> Callable[..., tuple[Any, Any]]:
    """The value of a scalar rule and its gradient, by the rule's own pullback.

    Called and read like `jax.value_and_grad`: the gradient is with respect to argument number
    `argnums`, or a tuple of gradients if `argnums` is a sequence. The pullback starts from ∂C/∂C = 1.

    Raises TypeError if the rule's value is no float scalar, or if an argument has no gradient (integers).

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (3, 5, 2))
    >>> cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    >>> X, y = jnp.ones((4, 3)), jnp.zeros((4, 2))
    >>> value, (gradient, X_bar) = fnn.value_and_grad(cost, argnums=(0, 1))(params, X, y)
    >>> gradient[1].W.shape, X_bar.shape
    ((2, 5), (4, 3))
    """
    check_rule_like("value_and_grad: the function", rule)
    several = not hasattr(argnums, "__index__")
    try:
        positions = tuple(index(i) for i in argnums) if isinstance(argnums, Sequence) else (index(argnums),)
    except TypeError:
        raise TypeError(
            "value_and_grad: argnums needs to be the number of an argument, counted from 0, or a tuple of "
            f"them; got {argnums!r}."
        ) from None

    def value_and_gradient(*primals, **named):
        value, residuals = run_forward(rule, *primals, **named)
        if jnp.shape(value) != ():
            raise TypeError(
                f"value_and_grad: {rule!r} needs to return a scalar, got shape {jnp.shape(value)}. "
                "Make a cost of it with fnn.cost, or start from a cotangent of your own with rule.pullback."
            )
        dtype = jnp.result_type(value)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"value_and_grad: {rule!r} needs to return a float, got {dtype}; pass floats.")
        adjoints = check_adjoints(rule, rule.pullback(residuals, jnp.ones_like(value)))
        gradients = []
        for i in positions:
            if not -len(adjoints) <= i < len(adjoints):
                raise ValueError(
                    f"value_and_grad: argnums={i}, but {rule!r} has {len(adjoints)} arguments; "
                    f"they are counted from 0 to {len(adjoints) - 1}."
                )
            if adjoints[i] is None:
                raise TypeError(
                    f"value_and_grad: argument {i} of {rule!r} has no gradient: it holds integers. "
                    "Differentiate with respect to another, or pass floats."
                )
            gradients.append(adjoints[i])
        return value, tuple(gradients) if several else gradients[0]

    return value_and_gradient


def as_custom_vjp(rule: RuleLike) -> Callable[..., Any]:
    """The rule as a plain JAX function, which `jax.grad` differentiates by the rule's own pullback.

    Use it inside other people's JAX code, under jit, vmap and shard_map. Arguments are positional. It has no
    forward mode (jvp, hessian); for activations `as_custom_jvp` has.

    >>> import fnn, jax, jax.numpy as jnp
    >>> print(jax.grad(fnn.as_custom_vjp(fnn.softplus))(jnp.float32(0)))
    0.5
    """
    check_rule_like("as_custom_vjp: the rule", rule)

    @jax.custom_vjp
    def custom(*primals):
        return run_forward(rule, *primals)[0]

    custom.defvjp(rule.forward, rule.pullback)

    def function(*primals):
        return custom(*_of_equal_axes(primals))

    return function


def _of_equal_axes(primals: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arrays, marked as different on every device where one of them is. Outside shard_map nothing.

    In shard_map parameters are the same on all devices while a batch is not. A pullback's adjoint of the
    parameters then is a part of a sum on each, and JAX takes the sum where it goes back through this mark.
    """
    axes = frozenset[Any]().union(*(_varying(leaf) for leaf in jax.tree.leaves(primals)))

    def mark(leaf):
        missing = axes - _varying(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(mark, primals) if axes else primals


def _varying(leaf: Any) -> frozenset[Any]:
    """The axes of shard_map along which an array differs from device to device."""
    return jax.typeof(leaf).mat.varying


def as_custom_jvp(rule: RuleLike) -> Callable[[Any], Any]:
    """An activation as a plain JAX function, which JAX differentiates by the rule's own pullback.

    Forward, reverse and any order, under jit and vmap: ȧ = σ′ ż, and σ′ ż is the pullback at ż, since the
    Jacobian of an activation is symmetric: diagonal, or softmax's a_j (1[j=k] - a_k). For a rule of one
    argument whose Jacobian is not, use `as_custom_vjp`. A second derivative differentiates the pullback.

    >>> import fnn, jax, jax.numpy as jnp
    >>> gelu = fnn.as_custom_jvp(fnn.gelu)
    >>> z = jnp.float16(200)
    >>> print(jax.grad(gelu)(z), jax.grad(jax.grad(gelu))(jnp.float32(0)))
    1.0 0.7978846
    """
    check_rule_like("as_custom_jvp: the activation", rule, "z", such_as="fnn.gelu")

    @jax.custom_jvp
    def function(z):
        return run_forward(rule, z)[0]

    @function.defjvp
    def tangent(primals, tangents):
        a, residuals = run_forward(rule, *primals)
        (a_dot,) = check_adjoints(rule, rule.pullback(residuals, *tangents), 1)
        return a, a_dot

    return function
