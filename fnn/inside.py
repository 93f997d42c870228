"""Inside a traced function: what goes into every operation and what comes out, and where NaN first arises."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from .question import quick_to_compile, wide_promotion
from .rounding import called

Instead = dict[str, Callable[..., Any]]  # name of a primitive -> what is evaluated in its place


class Step(NamedTuple):
    """One operation. `makers`: for each argument the step that made it, None for an input or a constant."""

    eqn: Any
    callers: tuple[Any, ...]  # the calls that it lies in, the outermost first
    makers: list[int | None]
    ins: list[Any]
    outs: list[Any]


def walk(
    closed: ClosedJaxpr, inputs: Sequence[Any], instead: Instead | None = None
) -> tuple[list, list[Step]]:
    """Evaluates a traced function: its outputs, each with its maker, and all steps.

    Calls are unfolded; loops and branches are one step each.
    """
    steps: list[Step] = []

    def run(jaxpr, consts, arguments, callers):
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, [(const, None) for const in consts], strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom):
            return (atom.val, None) if isinstance(atom, Literal) else values[atom]

        for eqn in jaxpr.eqns:
            read_in = [read(atom) for atom in eqn.invars]
            inner = called(eqn)
            if inner is not None:
                made = run(inner.jaxpr, inner.consts, read_in, (*callers, eqn))
            else:
                ins = [value for value, _ in read_in]
                other = (instead or {}).get(eqn.primitive.name)
                out = other(*ins) if other else eqn.primitive.bind(*ins, **eqn.params)
                outs = list(out) if eqn.primitive.multiple_results else [out]
                made = [(out, len(steps)) for out in outs]
                steps.append(Step(eqn, callers, [maker for _, maker in read_in], ins, outs))
            values.update(zip(eqn.outvars, made, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    return run(closed.jaxpr, closed.consts, [(x, None) for x in inputs], ()), steps


def replaced(closed: ClosedJaxpr, instead: Instead) -> Callable[..., list[Any]]:
    """The traced function with some of its primitives replaced."""
    return lambda *inputs: [out for out, _ in walk(closed, inputs, instead)[0]]


def steps_of(closed: ClosedJaxpr, inputs: Sequence[Any], names: set[str]) -> list[tuple[Any, list[Any], Any]]:
    """(operation, what went in, what came out) for all primitives of these names, with their numbers."""
    eqns: list[Any] = []

    def run(*inputs):
        wanted = [step for step in walk(closed, inputs)[1] if step.eqn.primitive.name in names]
        eqns[:] = [step.eqn for step in wanted]
        return [(step.ins, step.outs[0]) for step in wanted]

    with wide_promotion():
        numbers = jax.device_get(jax.jit(run, compiler_options=quick_to_compile())(*inputs))
    return [(eqn, ins, out) for eqn, (ins, out) in zip(eqns, numbers, strict=True)]


def origin_of_nonfinite(closed: ClosedJaxpr, inputs: Sequence[Any], output: int) -> str:
    """Which operation makes the first NaN or inf on the way to an output, and in which line; or nothing."""
    seen: dict[str, Any] = {}

    def run(*inputs):
        outs, steps = walk(closed, inputs)
        seen["maker"] = outs[output][1]
        seen["steps"] = [step._replace(ins=[], outs=[]) for step in steps]
        return [(_any(jnp.isnan, step.outs), _any(jnp.isinf, step.outs)) for step in steps]

    flags = jax.device_get(jax.jit(run, compiler_options=quick_to_compile())(*inputs))
    steps, at = seen["steps"], seen["maker"]

    def first(at: int, kind: int) -> int:
        """Back from a step with NaN (kind 0) or inf (1) to the one that made it of other numbers."""
        while True:
            before = [m for m in steps[at].makers if m is not None and flags[m][kind]]
            if not before:
                return at
            at = before[0]

    if at is None or not any(flags[at]):
        return ""
    if not flags[at][0]:
        return f"{_described(steps[first(at, 1)])} gives inf"
    at = first(at, 0)
    infinite = [m for m in steps[at].makers if m is not None and flags[m][1]]
    text = f"{_described(steps[at])} gives NaN"
    return f"{_described(steps[first(infinite[0], 1)])} gives inf, of which {text}" if infinite else text


def _any(test: Callable, arrays: list[Any]) -> Any:
    floats = [x for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return jnp.any(jnp.stack([test(x).any() for x in floats])) if floats else jnp.zeros((), bool)


def _described(step: Step) -> str:
    """The operation and the line of the user's code that it stands in: `exp (mine.py:12, in gradient)`."""
    name, place = step.eqn.primitive.name, None
    path = [*step.callers, step.eqn]
    for k, eqn in enumerate(path):
        frame = _frame(eqn)
        # JAX keeps the trace of its own functions; the lines of what is inside are those of their first call.
        if k and frame and not frame.function_name.endswith(str(path[k - 1].params.get("name"))):
            name += f" inside {path[k - 1].params.get('name', path[k - 1].primitive.name)}"
            break
        place = frame or place
    if place is None:
        return name
    return f"{name} ({Path(place.file_name).name}:{place.line_num}, in {place.function_name.split('.')[-1]})"


_JUDGES = ("inside.py", "check.py", "question.py", "truth.py", "rounding.py")
_NOT_A_USERS = (str(Path(jax.__file__).parent), *(str(Path(__file__).with_name(name)) for name in _JUDGES))


def _frame(eqn: Any) -> Any:
    """The innermost frame of the traceback that lies in code that is neither JAX's nor the judge's."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback is not None else []
    return next((f for f in frames if not f.file_name.startswith(_NOT_A_USERS)), None)
