r"""The chain rule as products of Jacobians.

For f = f_k ∘ ... ∘ f_1 with x_0 = x and x_i = f_i(x_{i-1}), each (n_i,),

    ∂f/∂x = J_k ··· J_2 J_1,   J_i = ∂x_i/∂x_{i-1} of shape (n_i × n_{i-1}),

the vector chain rule. If f depends on t through several x_i, their effects add up: the total derivative

    df/dt = Σ_i (∂f/∂x_i) (dx_i/dt).

A pullback is x̄ = Jᵀȳ without the matrix: backpropagation multiplies the product from the left, one vector
at a time, and never forms a Jacobian. The functions here do form them, for looking at and for checking.

Source: Parr & Howard (2018), *The Matrix Calculus You Need For Deep Learning*, §4.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .gates import as_floats
from .graphs import Graph, shown
from .rules import RuleLike, check_adjoints, check_rule_like, run_forward
from .tables import aligned


def jacobian(rule: RuleLike, *primals: Any, argnum: int = 0) -> Array:
    """∂out/∂x of a rule with respect to argument number `argnum`, shape (*out.shape, *x.shape).

    Row by row: the pullback of the unit vector e_i is Jᵀe_i, the i-th row of J. As `jax.jacobian` gives it.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.jacobian(fnn.gates.multiply, jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])))
    [[3. 0.]
     [0. 5.]]
    """
    check_rule_like("jacobian: the function", rule)
    out, residuals = run_forward(rule, *primals)
    units = jnp.eye(out.size, dtype=out.dtype).reshape(out.size, *out.shape)

    def row(unit):
        adjoint = check_adjoints(rule, rule.pullback(residuals, unit))[argnum]
        if adjoint is None:
            raise TypeError(f"jacobian: argument {argnum} of {rule!r} has no gradient: it holds integers.")
        return adjoint

    rows = jax.vmap(row)(units)
    return rows.reshape(*out.shape, *rows.shape[1:])


@dataclass(frozen=True)
class Chain:
    """Rules of one argument, applied one after the other: a rule x -> f_k(... f_1(x)). Made by `chain`."""

    rules: tuple[RuleLike, ...]

    def forward(self, x: Any) -> tuple[Any, tuple[Any, ...]]:
        """The last rule's output, and what each rule kept."""
        kept = []
        for rule in self.rules:
            x, residuals = run_forward(rule, x)
            kept.append(residuals)
        return x, tuple(kept)

    def pullback(self, residuals: tuple[Any, ...], out_bar: Any) -> tuple[Any]:
        """x̄ = J_1ᵀ ··· J_kᵀ ȳ, from the last rule to the first."""
        for rule, kept in zip(reversed(self.rules), reversed(residuals), strict=True):
            (out_bar,) = check_adjoints(rule, rule.pullback(kept, out_bar), 1)
        return (out_bar,)

    def __call__(self, x: Any) -> Any:
        return self.forward(x)[0]


def chain(*rules: RuleLike) -> Chain:
    """The composition of rules of one argument, in the order in which they are applied.

    >>> import fnn
    >>> from fnn.gates import scale, shift, square
    >>> f = fnn.chain(square, scale(-1.0), shift(1.0), scale(5.0))  # 5(1 - t²)
    >>> value, slope = fnn.value_and_grad(f)(3.0)
    >>> print(value, slope)
    -40.0 -30.0
    """
    if not rules:
        raise TypeError("chain: needs at least one rule, such as fnn.gates.square.")
    for rule in rules:
        check_rule_like("chain: each link", rule, "x", such_as="fnn.gates.square")
    return Chain(tuple(rules))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class JacobianProduct:
    """∂f/∂x = J_k ··· J_1 with its factors. Printed, it shows their shapes.

    factors: J_k, ..., J_1, in the order of the product, each (n_i, n_{i-1})
    product: ∂f/∂x, (n_k, n_0), multiplied from the left, as backpropagation does
    names: of the rules, in the order of the factors
    """

    factors: tuple[Array, ...]
    product: Array
    names: tuple[str, ...] = field(metadata={"static": True})

    def __str__(self) -> str:
        def shape(J):
            return f"({J.shape[0]}×{J.shape[1]})"

        rows = [("factor", "shape", "Jacobian")]
        rows += [(name, shape(J), shown(J)) for name, J in zip(self.names, self.factors, strict=True)]
        shapes = "".join(map(shape, self.factors))
        return aligned(rows, "<<<") + f"\n{shapes} = {shape(self.product)}: {shown(self.product)}"


def jacobian_product(rule: Chain, x: Any) -> JacobianProduct:
    """The Jacobian of a chain of rules at x, as the product of its links' Jacobians.

    Arrays of any shape between the links count as vectors of their entries.

    >>> import fnn, jax.numpy as jnp
    >>> from fnn.gates import exp, square, sum
    >>> print(fnn.jacobian_product(fnn.chain(square, sum), jnp.array([1.0, 2.0])))
    factor  shape  Jacobian
    sum     (1×2)  [[1, 1]]
    square  (2×2)  [[2, 0], [0, 4]]
    (1×2)(2×2) = (1×2): [[2, 4]]
    """
    if not isinstance(rule, Chain):
        raise TypeError(f"jacobian_product: needs a chain of rules, as fnn.chain makes, got {rule!r}.")
    x, factors = as_floats("jacobian_product: x", x), []
    for link in rule.rules:
        out, _ = run_forward(link, x)
        factors.append(jacobian(link, x).reshape(out.size, x.size))
        x = out
    factors = tuple(reversed(factors))
    names = tuple(repr(link) for link in reversed(rule.rules))
    return JacobianProduct(factors, reduce(jnp.matmul, factors), names)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TotalDerivative:
    """df/dt = Σ_i (∂f/∂x_i)(dx_i/dt) with its terms. Printed, it is a table.

    partials: ∂f/∂x_i, each as x_i
    rates: dx_i/dt, each as x_i
    terms: (∂f/∂x_i)(dx_i/dt), numbers
    total: df/dt, their sum
    names: of the x_i
    """

    partials: tuple[Array, ...]
    rates: tuple[Array, ...]
    terms: tuple[Array, ...]
    total: Array
    names: tuple[str, ...] = field(metadata={"static": True})

    def __str__(self) -> str:
        rows = [("x", "∂f/∂x", "dx/dt", "∂f/∂x · dx/dt")]
        columns = zip(self.names, self.partials, self.rates, self.terms, strict=True)
        rows += [(name, shown(p), shown(r), shown(term)) for name, p, r, term in columns]
        rows.append(("df/dt", "", "", shown(self.total)))
        return aligned(rows, "<>>>")


def total_derivative(f: RuleLike, inner: Sequence[RuleLike], t: Any) -> TotalDerivative:
    """df/dt of f(x_1(t), ..., x_k(t)), f a scalar, as the sum over its arguments.

    f: a rule of k arguments; `inner`: k rules of t, one for each. Where f depends on t itself, pass t as one
    more argument, through `fnn.identity`.

    >>> import fnn
    >>> from fnn.gates import multiply, square, shift
    >>> print(fnn.total_derivative(multiply, [square, shift(1.0)], 3.0))  # t²(t + 1)
    x      ∂f/∂x  dx/dt  ∂f/∂x · dx/dt
    x1         4      6             24
    x2         9      1              9
    df/dt                           33
    """
    check_rule_like("total_derivative: f", f, *(f"x{i}" for i in range(1, len(inner) + 1)))
    for rule in inner:
        check_rule_like("total_derivative: each inner function", rule, "t", such_as="fnn.gates.square")
    t = as_floats("total_derivative: t", t)
    if t.shape:
        raise ValueError(
            f"total_derivative: t needs to be a single number, got shape {t.shape}; use jax.vmap."
        )
    xs = [run_forward(rule, t)[0] for rule in inner]
    out, residuals = run_forward(f, *xs)
    if prod(jnp.shape(out)) != 1:
        raise ValueError(
            f"total_derivative: f needs to be a scalar, got shape {out.shape}; see fnn.jacobian."
        )
    partials = check_adjoints(f, f.pullback(residuals, jnp.ones_like(out)), len(xs))
    rates = tuple(jacobian(rule, t) for rule in inner)
    terms = tuple(jnp.vdot(partial, rate) for partial, rate in zip(partials, rates, strict=True))
    names = f.inputs if isinstance(f, Graph) else tuple(f"x{i}" for i in range(1, len(xs) + 1))
    return TotalDerivative(partials, rates, terms, reduce(jnp.add, terms), names)
