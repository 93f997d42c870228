r"""How much of a result is rounding: Monte-Carlo arithmetic on a traced function.

A function's jaxpr is evaluated several times, every result that is rounded multiplied by 1 ± eps of its own
dtype, the sign drawn at random; so are the inputs, and the terms of every sum, whose order nobody fixes. How
far the outputs then scatter, entry by entry, is what rounding explains of them. Operations that only move
numbers (reshape, transpose, select, max, ...) round nothing.

Sources: Parker (1997), *Monte Carlo Arithmetic*; Higham (2002), *Accuracy and Stability of Numerical
Algorithms*, §2.8 and §26.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# What moves, compares or selects numbers, and so rounds nothing; negation and abs are exact too.
EXACT = frozenset(
    "abs and argmax argmin broadcast broadcast_in_dim ceil clamp concatenate copy copy_p cummax cummin "
    "dynamic_slice dynamic_update_slice empty2 eq expand_dims floor gather ge gt imag iota is_finite le lt "
    "max min ne neg nextafter not optimization_barrier or pad pvary real reduce_and reduce_max reduce_min "
    "reduce_or reshape rev round scatter select_n sign slice sort split squeeze stop_gradient transpose "
    "xor".split()
)
SUMS = frozenset("reduce_sum dot_general conv_general_dilated cumsum scatter-add reduce_window_sum".split())


class _Signs:
    """Deals the ±1 that a run needs, array by array; without a hand of them it writes down their shapes."""

    def __init__(self, hand: Sequence[Any] | None = None):
        self.hand = None if hand is None else iter(hand)
        self.shapes: list[tuple[int, ...]] = []

    def draw(self, shape: tuple[int, ...]) -> Any:
        if self.hand is not None:
            return next(self.hand)
        self.shapes.append(shape)
        return jnp.zeros(shape, jnp.int8)


def noisy(closed: ClosedJaxpr) -> tuple[Callable[..., list[Any]], list[tuple[int, ...]]]:
    """The traced function with rounding made audible: (signs, *inputs) -> outputs, and the signs' shapes.

    signs: one array of -1, 0 or 1 for each shape; with zeros it is the function itself. Rules that users gave
    their functions (`custom_vjp`, `custom_jvp`) are passed over: what they stand for is evaluated.
    """

    def run(signs, *inputs):
        return _evaluate(closed.jaxpr, closed.consts, inputs, _Signs(signs), rounds_inputs=True)

    recorder = _Signs()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jax.eval_shape(
            lambda *inputs: _evaluate(closed.jaxpr, closed.consts, inputs, recorder, rounds_inputs=True),
            *closed.in_avals,
        )
    return run, recorder.shapes


def random_signs(rng: np.random.Generator, shapes: Sequence[tuple[int, ...]], samples: int) -> list[Any]:
    """Signs for `noisy`, for a first run that is exact and `samples` that are not, along a first axis."""
    signs = [2 * rng.integers(0, 2, (samples + 1, *shape), dtype=np.int8) - 1 for shape in shapes]
    for sign in signs:
        sign[0] = 0
    return signs


def without_custom_rules(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The traced function with every custom derivative replaced by the function that it is a rule for."""
    return lambda *inputs: _evaluate(closed.jaxpr, closed.consts, inputs, None)


def primitives(closed: ClosedJaxpr) -> set[str]:
    """The names of all primitives of a traced function, those inside its loops and calls included."""
    names = set()
    for eqn in closed.jaxpr.eqns:
        names.add(eqn.primitive.name)
        for inner in _inner(eqn):
            names |= primitives(inner)
    return names


def coarsest(closed: ClosedJaxpr) -> float:
    """The largest eps of any float that a traced function computes with."""
    eps = 0.0
    for eqn in closed.jaxpr.eqns:
        for out in eqn.outvars:
            dtype = getattr(out.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
                eps = max(eps, float(jnp.finfo(dtype).eps))
        for inner in _inner(eqn):
            eps = max(eps, coarsest(inner))
    return eps


def _inner(eqn: Any) -> list[ClosedJaxpr]:
    """The functions inside an operation: of a jit, a loop, a branch, a custom rule."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                found.append(_closed(item))
    return found


def _closed(jaxpr: Any) -> Any:
    """A jaxpr with its constants. Since jax 0.11 every jaxpr has them; before, some inner ones had none."""
    return jaxpr if hasattr(jaxpr, "consts") else ClosedJaxpr(jaxpr, ())


def _evaluate(jaxpr, consts, inputs, signs: _Signs | None, *, rounds_inputs: bool = False) -> list:
    values: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    def perturbed(x):
        if signs is None or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x
        eps = jnp.asarray(jnp.finfo(x.dtype).eps, x.dtype)
        return x * (1 + eps * signs.draw(x.shape).astype(x.dtype))

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    if rounds_inputs:
        for var in jaxpr.invars:
            values[var] = perturbed(values[var])
    for eqn in jaxpr.eqns:
        ins, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
        if name == "scan":
            outs = _scan(eqn, ins, signs)
        elif name == "while":
            outs = _while(eqn, ins, signs)
        elif name == "cond":
            outs = _cond(eqn, ins, signs)
        elif (inner := _called(eqn)) is not None:
            outs = _evaluate(inner.jaxpr, inner.consts, ins, signs)
        else:
            if name in SUMS:  # the order of a sum is free: its terms are perturbed, and the result
                ins = [perturbed(ins[0]), *ins[1:]]
            out = eqn.primitive.bind(*ins, **eqn.params)
            outs = list(out) if eqn.primitive.multiple_results else [out]
            if name not in EXACT and not _is_exact_conversion(eqn):
                outs = [perturbed(out) for out in outs]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_exact_conversion(eqn: Any) -> bool:
    if eqn.primitive.name != "convert_element_type":
        return False
    old, new = eqn.invars[0].aval.dtype, eqn.params["new_dtype"]
    if not jnp.issubdtype(old, jnp.floating):
        return True
    return not jnp.issubdtype(new, jnp.floating) or bool(jnp.finfo(new).eps <= jnp.finfo(old).eps)


CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call"}
)
CUSTOM = frozenset({"custom_vjp_call", "custom_vjp_call_jaxpr"})
CUSTOM_JVP = frozenset({"custom_jvp_call"})


def _called(eqn: Any) -> ClosedJaxpr | None:
    """What a call stands for; None for an operation that is no call."""
    if eqn.primitive.name not in CALLS | CUSTOM:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if isinstance(inner, ClosedJaxpr | Jaxpr):
            return _closed(inner)
    return None


def _recorded(closed: ClosedJaxpr, signs: _Signs | None) -> list[tuple[int, ...]]:
    """The shapes of the signs that one run of an inner function needs."""
    if signs is None:
        return []
    recorder = _Signs()
    jax.eval_shape(lambda *x: _evaluate(closed.jaxpr, closed.consts, x, recorder), *closed.in_avals)
    return recorder.shapes


def _scan(eqn: Any, ins: list, signs: _Signs | None) -> list:
    params, body = eqn.params, _closed(eqn.params["jaxpr"])
    # Of the body's arguments those of the loop itself have one axis more, as have its stacked results.
    n_xs = sum(x.aval.ndim > inner.ndim for x, inner in zip(eqn.invars, body.in_avals, strict=True))
    n_carry = sum(x.aval.ndim == inner.ndim for x, inner in zip(eqn.outvars, body.out_avals, strict=True))
    n_consts = len(ins) - n_xs - n_carry
    consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    length, shapes = params["length"], _recorded(body, signs)
    dealt = [signs.draw((length, *shape)) for shape in shapes] if signs else []

    def step(carry, x):
        own, x = x
        inner = None if signs is None else _Signs(own)
        outs = _evaluate(body.jaxpr, body.consts, [*consts, *carry, *x], inner)
        return outs[:n_carry], outs[n_carry:]

    carry, ys = jax.lax.scan(step, carry, (dealt, xs), length=length, reverse=params["reverse"])
    return [*carry, *ys]


def _while(eqn: Any, ins: list, signs: _Signs | None) -> list:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond, body = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    for_cond, for_body, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    dealt = [signs.draw(shape) for shape in _recorded(body, signs)] if signs else []  # the same each time

    def step(carry):
        return _evaluate(
            body.jaxpr, body.consts, [*for_body, *carry], None if signs is None else _Signs(dealt)
        )

    return list(
        jax.lax.while_loop(
            lambda carry: _evaluate(cond.jaxpr, cond.consts, [*for_cond, *carry], None)[0], step, list(carry)
        )
    )


def _cond(eqn: Any, ins: list, signs: _Signs | None) -> list:
    index, *operands = ins
    branches = []
    for branch in map(_closed, eqn.params["branches"]):
        dealt = [signs.draw(shape) for shape in _recorded(branch, signs)] if signs else []

        def run(*operands, branch=branch, dealt=dealt):
            return _evaluate(branch.jaxpr, branch.consts, operands, None if signs is None else _Signs(dealt))

        branches.append(run)
    return list(jax.lax.switch(index, branches, *operands))
