r"""How much of a result is rounding: Monte-Carlo arithmetic on a traced function.

A function's jaxpr is evaluated several times, every result that is rounded multiplied by 1 ± eps of its own
dtype, the sign drawn at random; so are the inputs, and the terms of every sum, whose order nobody fixes. How
far the outputs then scatter, entry by entry, is what rounding explains of them. Operations that only move
numbers (reshape, transpose, select, max, ...) round nothing.

Sources: Parker (1997), *Monte Carlo Arithmetic*; Higham (2002), *Accuracy and Stability of Numerical
Algorithms*, §2.8 and §26.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from .hashing import hashed

# What moves, compares or selects numbers, and so rounds nothing; negation and abs are exact too.
EXACT = frozenset(
    "abs and argmax argmin broadcast broadcast_in_dim ceil clamp concatenate copy copy_p cummax cummin "
    "dynamic_slice dynamic_update_slice empty2 eq expand_dims floor gather ge gt imag iota is_finite le lt "
    "max min ne neg nextafter not optimization_barrier or pad pvary real reduce_and reduce_max reduce_min "
    "reduce_or reshape rev round scatter select_n sign slice sort split squeeze stop_gradient transpose "
    "xor".split()
)
# Whose custom_jvp is no user's: JAX's, and the slope of max in `elementary.py`.
OWN = str(Path(jax.__file__).parent) + os.sep, str(Path(__file__).with_name("elementary.py")) + ":"
SUMS = frozenset("reduce_sum dot_general conv_general_dilated cumsum scatter-add reduce_window_sum".split())


def noisy(closed: ClosedJaxpr) -> tuple[Callable[..., list[Any]], list[Any]]:
    """The traced function with rounding made audible: (factors, *inputs) -> outputs, and the factors' avals.

    factors: one array for each result that is rounded, of 1 or 1 ± eps; with ones it is the function itself.
    Rules that users gave their functions (`custom_vjp`, `custom_jvp`) are passed over: what they stand for is
    evaluated.
    """

    def run(factors, *inputs):
        return _evaluate(closed.jaxpr, closed.consts, inputs, iter(factors), rounds_inputs=True)

    return run, [*_floats(closed.in_avals), *_rounded(closed.jaxpr)]


def random_factors(rng: np.random.Generator, avals: Sequence[Any], samples: int) -> list[Any]:
    """Factors for `noisy`, for a first run that is exact and `samples` that are not, along a first axis."""
    dealt = []
    for aval in avals:
        signs = 2 * rng.integers(0, 2, (samples + 1, *aval.shape), dtype=np.int8) - 1
        signs[0] = 0
        dealt.append((1 + float(jnp.finfo(aval.dtype).eps) * signs).astype(aval.dtype))
    return dealt


def hashed_factors(seed: Any, avals: Sequence[Any]) -> list[Any]:
    """Factors for one run of `noisy`, made inside a compiled program: as large as they are, none is stored.

    The sign is a bit of the hashed position.
    """
    dealt = []
    for n, aval in enumerate(avals):
        salt = (jnp.asarray(seed, jnp.uint32) + jnp.uint32(977 * n + 1)) * jnp.uint32(0x9E3779B9)
        bits = hashed(jax.lax.iota(jnp.uint32, int(np.prod(aval.shape))) + salt)
        eps = float(jnp.finfo(aval.dtype).eps)
        up, down = jnp.asarray(1 + eps, aval.dtype), jnp.asarray(1 - eps, aval.dtype)
        dealt.append(jnp.where(bits >> jnp.uint32(31), up, down).reshape(aval.shape))
    return dealt


def spread(closed: ClosedJaxpr, samples: int) -> Callable[..., tuple[list[Any], list[Any]]]:
    """The traced function, and the size of what rounding does to every output.

    One run after the other, its signs made in passing: as much memory as two runs, however many. The size is
    the mean distance, which neither overflows nor underflows, times that of a Gaussian's standard deviation.
    """
    run, avals = noisy(closed)

    def exact_and_spread(*inputs):
        exact = jaxpr_as_fun(closed)(*inputs)

        def once(sums, seed):
            rough = run(hashed_factors(seed, avals), *inputs)
            return [s + jnp.abs(r - e) for s, r, e in zip(sums, rough, exact, strict=True)], None

        zeros = [jnp.zeros_like(e) for e in exact]
        sums, _ = jax.lax.scan(once, zeros, jnp.arange(samples, dtype=jnp.uint32))
        return exact, [s * ((np.pi / 2) ** 0.5 / samples) for s in sums]

    return exact_and_spread


def without_custom_rules(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The traced function without the derivatives that users gave to parts of it; JAX's and ours stay."""
    return lambda *inputs: _evaluate(closed.jaxpr, closed.consts, inputs, None)


def carries_rules(closed: ClosedJaxpr) -> bool:
    """Whether users gave derivatives to parts of a traced function, by `custom_vjp` or `custom_jvp`."""
    return any(_is_users_rule(eqn) or any(map(carries_rules, _inner(eqn))) for eqn in closed.jaxpr.eqns)


def _is_users_rule(eqn: Any) -> bool:
    if eqn.primitive.name in CUSTOM_JVP:
        info = getattr(_closed(eqn.params["call_jaxpr"]).jaxpr, "debug_info", None)
        _, _, file = str(getattr(info, "func_src_info", "")).partition(" at ")
        return not file.startswith(OWN)
    return eqn.primitive.name in CUSTOM


def _with_its_rule(jaxpr: Any, eqn: Any, ins: list[Any]) -> list[Any]:
    """A call, evaluated so that it keeps the derivative it was given."""
    of = {atom: x for atom, x in zip(eqn.invars, ins, strict=True) if not isinstance(atom, Literal)}
    consts = {} if not hasattr(jaxpr, "consts") else {"consts": ()}
    alone = jaxpr.replace(constvars=[], invars=list(of), outvars=list(eqn.outvars), eqns=[eqn], **consts)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*of.values())


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


def _floats(avals: Sequence[Any]) -> list[Any]:
    return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals if jnp.issubdtype(a.dtype, jnp.floating)]


def _rounded(jaxpr: Any) -> list[Any]:
    """What `_evaluate` multiplies by a factor, in its order: shapes and dtypes."""
    avals: list[Any] = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "scan":
            own = _rounded(_closed(eqn.params["jaxpr"]).jaxpr)
            avals += [jax.ShapeDtypeStruct((eqn.params["length"], *a.shape), a.dtype) for a in own]
        elif name == "while":
            avals += _rounded(_closed(eqn.params["body_jaxpr"]).jaxpr)
        elif name == "cond":
            for branch in eqn.params["branches"]:
                avals += _rounded(_closed(branch).jaxpr)
        elif (inner := called(eqn)) is not None:
            avals += _rounded(inner.jaxpr)
        else:
            if name in SUMS:
                avals += _floats([eqn.invars[0].aval])
            if name not in EXACT and not _is_exact_conversion(eqn):
                avals += _floats([out.aval for out in eqn.outvars])
    return avals


def _evaluate(jaxpr, consts, inputs, factors: Iterator[Any] | None, *, rounds_inputs: bool = False) -> list:
    values: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, Literal) else values[atom]

    def perturbed(x, aval):
        if factors is None or not jnp.issubdtype(aval.dtype, jnp.floating):
            return x
        return jax.lax.mul(jnp.asarray(x, aval.dtype), next(factors))

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    if rounds_inputs:
        for var in jaxpr.invars:
            values[var] = perturbed(values[var], var.aval)
    for eqn in jaxpr.eqns:
        ins, name = [read(atom) for atom in eqn.invars], eqn.primitive.name
        if name == "scan":
            outs = _scan(eqn, ins, factors)
        elif name == "while":
            outs = _while(eqn, ins, factors)
        elif name == "cond":
            outs = _cond(eqn, ins, factors)
        elif factors is None and name in CUSTOM_JVP and not _is_users_rule(eqn):
            outs = _with_its_rule(jaxpr, eqn, ins)
        elif (inner := called(eqn)) is not None:
            outs = _evaluate(inner.jaxpr, inner.consts, ins, factors)
        else:
            if name in SUMS:  # the order of a sum is free: its terms are perturbed, and the result
                ins = [perturbed(ins[0], eqn.invars[0].aval), *ins[1:]]
            out = eqn.primitive.bind(*ins, **eqn.params)
            outs = list(out) if eqn.primitive.multiple_results else [out]
            if name not in EXACT and not _is_exact_conversion(eqn):
                outs = [perturbed(out, var.aval) for out, var in zip(outs, eqn.outvars, strict=True)]
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


def called(eqn: Any) -> ClosedJaxpr | None:
    """What a call stands for; None for an operation that is no call."""
    if eqn.primitive.name not in CALLS | CUSTOM:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(key)
        if isinstance(inner, ClosedJaxpr | Jaxpr):
            return _closed(inner)
    return None


def _dealt(factors: Iterator[Any] | None, jaxpr: Any) -> list[Any] | None:
    """The factors that an inner function needs, of the hand."""
    return None if factors is None else list(islice(factors, len(_rounded(jaxpr))))


def _again(dealt: list[Any] | None) -> Iterator[Any] | None:
    return None if dealt is None else iter(dealt)


def _scan(eqn: Any, ins: list, factors: Iterator[Any] | None) -> list:
    params, body = eqn.params, _closed(eqn.params["jaxpr"])
    # Of the body's arguments those of the loop itself have one axis more, as have its stacked results.
    n_xs = sum(x.aval.ndim > inner.ndim for x, inner in zip(eqn.invars, body.in_avals, strict=True))
    n_carry = sum(x.aval.ndim == inner.ndim for x, inner in zip(eqn.outvars, body.out_avals, strict=True))
    n_consts = len(ins) - n_xs - n_carry
    consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]

    def step(carry, x):
        own, x = x
        outs = _evaluate(body.jaxpr, body.consts, [*consts, *carry, *x], _again(own))
        return outs[:n_carry], outs[n_carry:]

    dealt = _dealt(factors, body.jaxpr)
    carry, ys = jax.lax.scan(step, carry, (dealt, xs), length=params["length"], reverse=params["reverse"])
    return [*carry, *ys]


def _while(eqn: Any, ins: list, factors: Iterator[Any] | None) -> list:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond, body = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    for_cond, for_body, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]
    dealt = _dealt(factors, body.jaxpr)  # the same in every round

    def step(carry):
        return _evaluate(body.jaxpr, body.consts, [*for_body, *carry], _again(dealt))

    def goes_on(carry):
        return _evaluate(cond.jaxpr, cond.consts, [*for_cond, *carry], None)[0]

    def each_goes_on(carry):
        """Under vmap, where some have ended and others go on."""
        going, stepped = goes_on(carry), step(carry)
        return [
            jnp.where(going.reshape(going.shape + (1,) * (jnp.ndim(new) - going.ndim)), new, old)
            for new, old in zip(stepped, carry, strict=True)
        ]

    is_batched = cond.out_avals[0].shape != ()
    advance = each_goes_on if is_batched else step
    return list(jax.lax.while_loop(lambda carry: jnp.any(goes_on(carry)), advance, list(carry)))


def _cond(eqn: Any, ins: list, factors: Iterator[Any] | None) -> list:
    index, *operands = ins
    branches = []
    for branch in map(_closed, eqn.params["branches"]):
        dealt = _dealt(factors, branch.jaxpr)

        def run(*operands, branch=branch, dealt=dealt):
            return _evaluate(branch.jaxpr, branch.consts, operands, _again(dealt))

        branches.append(run)
    return list(jax.lax.switch(index, branches, *operands))
