r"""The judge: is a gradient derived by hand right? Anyone's gradient, of any function.

The truth is autodiff in float64. An entry is wrong when it is further from the truth than rounding explains
for *that entry* (`rounding.py`); all errors are given in units of that. In this order:

1. the contract: structure, shapes, dtypes, integers, the same answer twice, arguments left alone;
2. the mathematics, with all arguments in float64, at the point given and at others;
3. the precision asked for: does the gradient in its own dtype lose digits?
4. only where they differ: is it a kink with another valid slope, or does autodiff itself fail there?

Autodiff is not believed blindly: difference quotients of f confirm it along one direction at every point, and
a rule that f carries (`custom_vjp`) is passed over, so that no rule is its own judge.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from .diagnosis import Evidence, diagnose
from .evidence import evidence_of, sizes_of, with_insight
from .large import is_right_by_projection, look_at
from .progress import late_bar
from .question import (
    Broken,
    Evaluator,
    Function,
    Numbers,
    Point,
    Question,
    as_it_is,
    compiled_once,
    name_of,
    program_key,
    trace,
)
from .report import Leaf, Report
from .rounding import coarsest
from .rules import RuleLike
from .truth import EPS, LIMIT, POINTS, Reference, Truth, find_truth, points_around, reference_of
from .verdicts import Verdicts


def check_gradient(
    f: Function,
    gradient: Function,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_axes: Sequence[int | None] | None = None,
    seed: int = 0,
) -> Report:
    """Is `gradient(*args)` the gradient of `f(*args)`, as `jax.grad(f, argnums)` would return it?

    f: returns a float scalar; any pytrees as arguments; JAX inside, or NumPy
    gradient: called with the same arguments; yours, in JAX or NumPy
    argnums: the arguments that are differentiated, as for `jax.grad`
    batch_axes: for each argument the axis that counts examples, or None; the gradient is then judged for
        other batch sizes too
    seed: of the random points

    Returns a `Report`, truthy when right: `report.raise_if_wrong()`, `print(report)`, `report.to_dict()`.
    Raises TypeError or ValueError if the question itself is ill posed: f is no float scalar, an argument is
    complex or empty, nothing can be differentiated.

    >>> import fnn, jax.numpy as jnp
    >>> f = lambda W, x: jnp.sum(jnp.tanh(W @ x))
    >>> wrong = lambda W, x: jnp.outer(1 - jnp.tanh(W @ x), x)  # the square is missing
    >>> W, x = jnp.array([[0.5, -1.0], [2.0, 0.3]]), jnp.array([1.0, 0.2])
    >>> bool(fnn.check_gradient(f, wrong, W, x))
    False
    """
    return _check(Question("check_gradient", f, gradient, args, argnums, seed), batch_axes)


def check_value_and_gradient(
    f: Function,
    value_and_gradient: Function,
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_axes: Sequence[int | None] | None = None,
    seed: int = 0,
) -> Report:
    """As `check_gradient`, for a function that returns (value, gradient) as `jax.value_and_grad` does.

    >>> import fnn, jax.numpy as jnp
    >>> bool(fnn.check_value_and_gradient(jnp.sin, lambda x: (jnp.sin(x), jnp.cos(x)), 0.5))
    True
    """
    question = Question("check_value_and_gradient", f, value_and_gradient, args, argnums, seed)
    question.has_value = True
    return _check(question, batch_axes)


def check_rule(rule: Any, *primals: Any, seed: int = 0) -> Report:
    """Is a rule's pullback the transposed derivative of its forward?

    rule: a `Rule`, a pair (fwd, bwd) as `jax.custom_vjp` takes, or a function that it made; its output may be
        any pytree
    primals: the arguments; integers need None, or float0, as their adjoint

    The pullback is judged as the gradient of ⟨ȳ, forward(x)⟩, which is Jᵀȳ, with a random ȳ at every point:
    a pullback that passes is the adjoint of the derivative, and linear in ȳ.

    >>> import fnn, jax.numpy as jnp
    >>> bool(fnn.check_rule(fnn.softplus, jnp.array([-1.0, 0.0, 30.0])))
    True
    """
    if isinstance(rule, jax.custom_vjp):
        custom: Any = rule
        plain, forward, pullback = custom.fun, custom.fwd, custom.bwd
    elif isinstance(rule, tuple | list) and len(rule) == 2 and all(map(callable, rule)):
        forward, pullback = rule
        plain = _output_of(forward)
    elif isinstance(rule, RuleLike) and not isinstance(rule, type):
        forward, pullback = rule.forward, rule.pullback
        plain = _output_of(forward)
    else:
        raise TypeError(f"check_rule: needs a rule or a pair (fwd, bwd), got {rule!r}.")
    if not primals:
        raise TypeError("check_rule: needs the rule's arguments too, check_rule(rule, *primals).")
    rng = np.random.default_rng(seed)
    outs, out_tree = jax.tree.flatten(plain(*primals))
    is_float = [jnp.issubdtype(jnp.result_type(out), jnp.floating) for out in outs]
    if not any(is_float):
        raise TypeError("check_rule: the rule's output has no floats, so it has no derivative.")
    floats = [out for out, yes in zip(outs, is_float, strict=True) if yes]
    bars = [jnp.asarray(rng.standard_normal(jnp.shape(o)), jnp.result_type(o)) for o in floats]

    def inner(bars, *xs):
        outs = jax.tree.leaves(plain(*xs))
        floats = [out for out, yes in zip(outs, is_float, strict=True) if yes]
        terms = [(bar * out).sum() for bar, out in zip(bars, floats, strict=True)]
        return sum(terms[1:], terms[0])

    def adjoints(bars, *xs):
        dealt = iter(bars)
        bars = [
            next(dealt) if yes else np.zeros(np.shape(out), jax.dtypes.float0)
            for out, yes in zip(outs, is_float, strict=True)
        ]
        result = pullback(forward(*xs)[1], jax.tree.unflatten(out_tree, bars))
        if not isinstance(result, tuple | list) or len(result) != len(xs):
            got = f"{len(result)}" if isinstance(result, tuple | list) else type(result).__name__
            raise Broken(f"the pullback needs to return a tuple of {len(xs)} adjoints, got {got}")
        return tuple(result)

    name = getattr(rule, "__name__", None) or repr(rule)
    what = "check_rule" if name.startswith(("(", "<")) else f"check_rule({name})"
    question = Question(what, inner, adjoints, (bars, *primals), tuple(range(1, len(primals) + 1)), seed)
    question.is_rule = True
    report = _check(question)
    if _same_outputs(forward(*primals)[0], plain(*primals)):
        return report
    return replace(report, contract=(*report.contract, "the output of fwd is not the function's"))


def check_jvp(
    f: Function, jvp: Function, primals: tuple, tangents: tuple | None = None, *, seed: int = 0
) -> Report:
    """Is `jvp(primals, tangents)` equal to `jax.jvp(f, primals, tangents)`: the output and its tangent?

    jvp: a rule as `jax.custom_jvp.defjvp` takes: (primals, tangents) -> (out, out_dot)
    tangents: as the primals; random ones if none are given

    >>> import fnn, jax.numpy as jnp
    >>> jvp = lambda primals, tangents: (jnp.sin(primals[0]), jnp.cos(primals[0]) * tangents[0])
    >>> bool(fnn.check_jvp(jnp.sin, jvp, (jnp.array([0.5, 2.0]),)))
    True
    """
    if not isinstance(primals, tuple) or not primals:
        raise TypeError("check_jvp: primals needs to be a tuple of arguments, such as (x,).")
    rng = np.random.default_rng(seed)
    if tangents is None:
        tangents = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(jnp.shape(x)), jnp.result_type(x)), primals
        )
    if jax.tree.structure(primals) != jax.tree.structure(tangents):
        raise TypeError("check_jvp: tangents needs the structure of primals.")
    out = f(*primals)
    weights = jax.tree.map(lambda o: jnp.asarray(rng.standard_normal(jnp.shape(o)), jnp.result_type(o)), out)

    # Linear in the weights w, with gradient ẏ: ⟨w, J ẋ⟩.
    def inner(weights, primals, tangents):
        _, out_dot = jax.jvp(f, primals, tangents)
        terms = jax.tree.leaves(jax.tree.map(lambda w, o: (w * o).sum(), weights, out_dot))
        return sum(terms[1:], terms[0])

    def candidate(weights, primals, tangents):
        result = jvp(primals, tangents)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Broken("the jvp needs to return a pair (out, out_dot)")
        return result[1]

    result = jvp(primals, tangents)
    same_output = not isinstance(result, tuple) or len(result) != 2 or _same_outputs(result[0], out)

    question = Question("check_jvp", inner, candidate, (weights, primals, tangents), 0, seed)
    question.also_moving = (1, 2)
    question.path_names = "out_dot"
    question.outputs = f
    report = _check(question)
    if same_output:
        return report
    problem = "the first output of the jvp is not f's output"
    return replace(report, contract=(*report.contract, problem))


def _output_of(forward: Function) -> Function:
    return lambda *xs: forward(*xs)[0]


def _check(question: Question, batch_axes: Sequence[int | None] | None = None) -> Report:
    with late_bar() as tell:
        question.tell = tell
        return _checked(question, batch_axes)


def _checked(question: Question, batch_axes: Sequence[int | None] | None) -> Report:
    report = _check_one(question)
    question.tell("the data in reverse order", 1, 2)
    if report:
        report = _with_data_reversed(question, report)
    if batch_axes is None:
        return report
    sizes = _batch_sizes(question, batch_axes)
    N = sizes.pop(0)
    for done, n in enumerate(sizes):
        question.tell("other batch sizes", done, len(sizes))
        args = tuple(
            arg if axis is None else jax.tree.map(partial(_rows, n=n, axis=axis), arg)
            for arg, axis in zip(question.args, batch_axes, strict=True)
        )
        other = replace(question, args=args, notes=[], contract=[])
        other.has_value = question.has_value
        resized = _check_one(other)
        if bool(resized) != bool(report):
            words = ("right", "wrong") if report else ("wrong", "right")
            sentence = f"{words[0]} for a batch of {N} and {words[1]} for one of {n}"
            wrong = resized if report else report
            return replace(wrong, diagnoses=(sentence, *wrong.diagnoses))
    return replace(report, notes=(*report.notes, f"the same for batches of {', '.join(map(str, sizes))}"))


def _with_data_reversed(question: Question, report: Report) -> Report:
    """The verdict once more with the arguments that are not differentiated in reverse order.

    A gradient that takes its data from elsewhere shows. Matrices are reversed along both axes: their rows
    still sum to what they did, and symmetric ones stay so, which a formula may rightly assume of its data.
    """

    def reverse(x):
        if (
            not isinstance(x, jax.Array | np.ndarray)
            or not np.ndim(x)
            or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ):
            return x
        host = np.asarray(x)  # where nothing is compiled
        host = host[::-1, ::-1] if host.ndim == 2 else host[::-1]
        return jax.device_put(host) if isinstance(x, jax.Array) else host

    moving = set(question.positions) | set(question.also_moving) | ({0} if question.is_rule else set())
    args = tuple(x if i in moving else jax.tree.map(reverse, x) for i, x in enumerate(question.args))
    is_projected = question.is_projected
    is_same = all(a is b for a, b in zip(jax.tree.leaves(args), jax.tree.leaves(question.args), strict=True))
    if is_same and not is_projected:
        return report
    other = replace(question, args=args, notes=[], contract=[])
    if is_projected:
        if _agrees_elsewhere(other):
            return replace(report, notes=(*report.notes, "large: elsewhere judged by one random projection"))
        closely = _check_one(replace(question, points=POINTS[:2], notes=[], contract=[]))
        if not closely:
            return closely
    try:
        reversed_ = _check_one(other)
    except (ValueError, TypeError, IndexError):  # such data may make no sense to f
        return report
    if reversed_:
        return report
    sentence = (
        "right with the data given, wrong with the same data in reverse order: are they taken from elsewhere?"
    )
    return replace(reversed_, diagnoses=(sentence, *reversed_.diagnoses))


def _agrees_elsewhere(question: Question) -> bool:
    """Whether the gradient has the slope of f along a random direction, at a random point."""
    question.take_apart()
    try:
        reference = reference_of(question)
        mine = _in_float64(question, reference)
    except (ValueError, TypeError, IndexError):  # such data may make no sense to f
        return False
    if mine is None or mine.jaxpr is None or reference.gradient is None:
        return False
    eps_native = _eps_native(question)
    return is_right_by_projection(question, reference, mine, _eps_of(mine.jaxpr, eps_native), eps_native)


def _batch_sizes(question: Question, batch_axes: Sequence[int | None]) -> list[int]:
    """The batch size given, and others: 1, another, one more."""
    if len(batch_axes) != len(question.args):
        raise ValueError(
            f"{question.what}: batch_axes needs an axis or None for each of {len(question.args)} arguments, "
            f"got {len(batch_axes)}."
        )
    found = {
        np.shape(leaf)[axis]
        for arg, axis in zip(question.args, batch_axes, strict=True)
        if axis is not None
        for leaf in jax.tree.leaves(arg)
    }
    if len(found) != 1:
        raise ValueError(f"{question.what}: the batch axes need one length, got {sorted(found)}.")
    (N,) = found
    return [N, *sorted({1, max(1, N // 2), N + 1} - {N})]


def _rows(x: Any, *, n: int, axis: int) -> Any:
    """The first n rows of an array along its batch axis; from the beginning again if there are fewer."""
    return x.take(np.arange(n) % x.shape[axis], axis=axis)


def _check_one(question: Question) -> Report:
    with np.errstate(all="ignore"):  # overflow is looked for, not warned of
        return _judged(question)


def _judged(question: Question) -> Report:
    question.take_apart()
    rng = np.random.default_rng(question.seed)
    native, native_jaxpr, native_problem = _native_run(question)
    reference = reference_of(question)
    eps_native = _eps_native(question)
    mine = _in_float64(question, reference) if native is not None else None
    points = points_around(question, rng, question.points or (POINTS[:1] if reference.is_large else POINTS))
    is_traced = native is not None and mine is not None and mine.jaxpr is not None
    if reference.is_large and is_traced and not question.points:
        assert native is not None and mine is not None
        eps = _eps_of(mine.jaxpr, eps_native)
        leaves, points, judge = look_at(question, reference, mine, native, eps, eps_native)
        if leaves is not None:
            question.is_projected = len(points) == 1
            return _report(question, leaves, judge)
    truth = find_truth(question, reference, points, rng)
    if not np.isfinite(truth.value[0]):
        raise ValueError(
            f"{question.what}: f is {truth.value[0]} at the arguments given; nothing can be judged."
        )
    if native_problem is not None:
        return _broken_report(question, native_problem, truth, reference)
    assert native is not None

    value = reference.value
    wide = _at_points(question, mine, points)
    wide_jaxpr = mine.jaxpr if mine is not None and wide is not None else None
    judged = Verdicts(question, truth, points, value, eps_native)
    names = question.paths + (["value"] if question.has_value else [])
    if wide is not None:
        eps = _eps_of(wide_jaxpr, eps_native)
        for p in range(len(points)):
            if p == 0 or (np.isfinite(truth.value[p]) and truth.is_inside[p]):
                judged.at_point(p, [np.asarray(got[p]) for got in wide], eps)
            else:
                judged.skipped += 1
    if eps_native > EPS or wide is None:
        judged.in_own_precision(native, eps_native, is_right_wide=wide is not None)
    if judged.skipped:
        question.notes.append(
            f"{judged.skipped} of {len(points)} points skipped: f is not finite there, or around"
        )

    leaves = tuple(judged.worst[n] for n in range(len(names)))
    report = Report(question.what, leaves, tuple(question.contract), limit=LIMIT)
    diagnoses: tuple[str, ...] = ()
    if not report:
        exact = judged.exact[: len(truth.gradient)]
        got = [w[0] for w in wide] if wide is not None else [np.asarray(x, np.float64) for x in native]
        evidence = evidence_of(
            question, truth, exact, points, got, wide, wide_jaxpr, leaves, native, eps_native
        )
        diagnoses = diagnose(with_insight(evidence, question, reference, native_jaxpr, wide_jaxpr))
    return _report(question, leaves, truth.judge, diagnoses)


def _report(
    question: Question, leaves: tuple[Leaf, ...], judge: str, diagnoses: tuple[str, ...] = ()
) -> Report:
    repeat = f"{question.what.partition('(')[0]}(..., seed={question.seed})"
    return Report(
        question.what,
        leaves,
        tuple(question.contract),
        diagnoses,
        tuple(question.notes),
        judge,
        repeat,
        LIMIT,
    )


def _eps_of(jaxpr: Any, eps_native: float) -> float:
    """What the gradient computes with if that is coarser than float64, but never more than it was given."""
    if jaxpr is not None:
        return min(max(EPS, coarsest(jaxpr)), eps_native)
    return min(eps_native, float(np.finfo(np.float32).eps)) if eps_native > EPS else EPS


def _native_run(question: Question) -> tuple[list[Any] | None, Any, Broken | None]:
    """The gradient as the caller would get it, called twice, and its jaxpr; or how it breaks the contract."""
    arrays = question.arrays(None, as_it_is)
    try:
        jaxpr, why = trace(lambda arrays: question.candidate(arrays, native=True), arrays)
        if jaxpr is not None:
            again, _ = trace(lambda arrays: question.candidate(arrays, native=True), arrays)
            if not _same_program(jaxpr, again) and not _same_results(jaxpr, again, arrays):
                question.contract.append(
                    "not the same when called twice: it depends on hidden state or chance"
                )
            if any(isinstance(x, np.ndarray) for x in arrays):
                _call_on_copies(question, arrays)
            function = compiled_once(("native", program_key(jaxpr)), lambda: jaxpr_as_fun(jaxpr))
            return [np.asarray(x) for x in function(*arrays)], jaxpr, None
        first, second = _call_on_copies(question, arrays), _call_on_copies(question, arrays)
        if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
            question.contract.append("not the same when called twice: it depends on hidden state or chance")
        question.notes.append(f"the gradient cannot be traced ({name_of(why)}): jit and vmap were not tried")
        return first, None, None
    except Broken as problem:
        return None, None, _with_numbers(question, arrays, problem)


def _with_numbers(question: Question, arrays: list[Any], problem: Broken) -> Broken:
    """The same breach met with arrays that have values, which a diagnosis needs."""
    try:
        question.candidate(arrays, native=True)
    except Broken as again:
        return again
    except Exception:  # only traced code breaks the contract in this way
        pass
    return problem


def _call_on_copies(question: Question, arrays: list[Any]) -> list[Numbers]:
    """The gradient called as the caller would, on copies of NumPy's arrays, which it must leave alone."""
    copies = [np.array(x) if isinstance(x, np.ndarray) else x for x in arrays]
    results = [np.array(x) for x in question.candidate(copies, native=True)]
    for x, copy in zip(arrays, copies, strict=True):
        if isinstance(x, np.ndarray) and not np.array_equal(x, copy, equal_nan=x.dtype.kind == "f"):
            question.contract_breach("changes its arguments in place")
    return results


def _same_outputs(a: Any, b: Any) -> bool:
    """Whether two evaluations of one function agree, but for rounding."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if np.shape(x) != np.shape(y) or jnp.result_type(x) != jnp.result_type(y):
            return False
        x, y, dtype = np.asarray(x), np.asarray(y), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            if not np.array_equal(x, y):
                return False
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        size = np.abs(np.where(np.isfinite(y), y, 0)).max(initial=0.0)
        if not np.allclose(x, y, rtol=0, atol=4 * LIMIT * float(jnp.finfo(dtype).eps) * size, equal_nan=True):
            return False
    return True


def _same_program(a: Any, b: Any) -> bool:
    if a is None or b is None or str(a) != str(b) or len(a.consts) != len(b.consts):
        return False
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a.consts, b.consts, strict=True))


def _same_results(a: Any, b: Any, arrays: list[Any]) -> bool:
    """Whether two traces give the same numbers, as where a table is made first and kept afterwards."""
    if a is None or b is None:
        return False
    pairs = zip(jaxpr_as_fun(a)(*arrays), jaxpr_as_fun(b)(*arrays), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)


def _as_wide(x: Any) -> Numbers | None:
    try:
        return None if x is None else np.asarray(jax.device_get(x)).astype(np.float64)
    except Exception:  # a tracer: shapes are all that is known
        return None


def _in_float64(question: Question, reference: Reference) -> Evaluator | None:
    """The gradient as a function of float64 arrays, or None where that breaks the contract."""
    try:
        return Evaluator(question, lambda arrays: question.candidate(arrays, native=False), reference.arrays)
    except Broken as problem:
        question.contract.append(f"with float64 arguments: {problem.problem}")
        return None


def _at_points(question: Question, mine: Evaluator | None, points: list[Point]) -> list[Numbers] | None:
    """The gradient at all points in float64, None if it refuses float64."""
    if mine is None:
        return None
    try:
        return mine([point.theta for point in points])
    except Broken as problem:
        question.contract.append(f"with float64 arguments: {problem.problem}")
    except Exception as error:  # a kernel that takes one dtype only
        question.notes.append(
            f"the gradient does not run in float64 ({name_of(error)}); judged in its own dtype"
        )
    return None


def _eps_native(question: Question) -> float:
    """The coarsest precision of the arguments and of f as the caller calls it."""
    eps = EPS
    for x, is_float in zip(question.leaves, question.is_float, strict=True):
        if is_float:
            eps = max(eps, float(jnp.finfo(jnp.result_type(x)).eps))
    jaxpr, _ = trace(lambda arrays: [question.value(arrays)], question.arrays(None, as_it_is))
    return max(eps, coarsest(jaxpr)) if jaxpr is not None else eps


def _broken_report(question: Question, problem: Broken, truth: Truth, reference: Reference) -> Report:
    contract = (*question.contract, problem.problem)
    evidence = Evidence(
        paths=question.paths,
        got=[None if i != problem.leaf else _as_wide(problem.got) for i in range(len(question.paths))],
        truth=[g[0] for g in truth.gradient],
        params=[np.asarray(question.leaves[i]).astype(np.float64) for i in question.judged],
        sizes=sizes_of(question),
    )
    evidence = with_insight(evidence, question, reference, None, None)
    return Report(question.what, (), contract, diagnose(evidence), tuple(question.notes), truth.judge)
