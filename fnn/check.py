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

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from .diagnosis import Evidence, diagnose
from .report import AT_FAULT, KINK, LOST, RIGHT, UNJUDGED, WRONG, Leaf, Report
from .rounding import CUSTOM, CUSTOM_JVP, coarsest, noisy, primitives, without_custom_rules
from .rules import RuleLike

SAMPLES = 8  # runs of Monte-Carlo arithmetic: the spread of 8 is ten times too small once in 10^7
LIMIT = 16.0  # rounding units allowed; what right gradients reach is in experiments/benchmarks
BUDGET = 2e7  # numbers in all runs together; above it fewer points and fewer runs
ENTRIES = 48  # looked at one by one, by differences, where autodiff and the gradient disagree
EPS = float(np.finfo(np.float64).eps)
FAST = {"xla_backend_optimization_level": 0}  # compiled once, run once

Function = Callable[..., Any]
Numbers = Any  # NumPy: an array, or a number where the shape is ()


class _Point(NamedTuple):
    name: str
    theta: list[np.ndarray]  # the float leaves that move, in float64


class _Broken(Exception):
    """The contract is broken so that no numbers can be compared; what, and the array that came."""

    def __init__(self, problem: str, leaf: int | None = None, got: Any = None):
        super().__init__(problem)
        self.problem, self.leaf, self.got = problem, leaf, got


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
    return _check(_Question("check_gradient", f, gradient, args, argnums, seed), batch_axes)


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
    question = _Question("check_value_and_gradient", f, value_and_gradient, args, argnums, seed)
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
            raise _Broken(f"the pullback needs to return a tuple of {len(xs)} adjoints, got {got}")
        return tuple(result)

    name = getattr(rule, "__name__", None) or repr(rule)
    what = "check_rule" if name.startswith(("(", "<")) else f"check_rule({name})"
    question = _Question(what, inner, adjoints, (bars, *primals), tuple(range(1, len(primals) + 1)), seed)
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
            raise _Broken("the jvp needs to return a pair (out, out_dot)")
        return result[1]

    result = jvp(primals, tangents)
    same_output = not isinstance(result, tuple) or len(result) != 2 or _same_outputs(result[0], out)

    question = _Question("check_jvp", inner, candidate, (weights, primals, tangents), 0, seed)
    question.also_moving = (1, 2)
    question.path_names = "out_dot"
    report = _check(question)
    if same_output:
        return report
    problem = "the first output of the jvp is not f's output"
    return replace(report, contract=(*report.contract, problem))


def _output_of(forward: Function) -> Function:
    return lambda *xs: forward(*xs)[0]


@dataclass
class _Question:
    what: str
    f: Function
    gradient: Function
    args: tuple
    argnums: int | Sequence[int]
    seed: int
    has_value: bool = False
    is_rule: bool = False  # argument 0 holds cotangents, and None stands for a zero adjoint
    also_moving: tuple[int, ...] = ()
    path_names: str = ""
    notes: list[str] = field(default_factory=list)
    contract: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name, function in (("f", self.f), ("gradient", self.gradient)):
            if not callable(function):
                raise TypeError(f"{self.what}: {name} needs to be a function, got {type(function).__name__}.")
        self.several = not hasattr(self.argnums, "__index__")
        numbers: Any = self.argnums if self.several else (self.argnums,)
        self.positions = tuple(index(i) % len(self.args) if self.args else 0 for i in numbers)
        if not self.args or any(not -len(self.args) <= index(i) < len(self.args) for i in numbers):
            raise ValueError(
                f"{self.what}: argnums={self.argnums}, but there are {len(self.args)} arguments."
            )

    def take_apart(self) -> None:
        """Sorts the leaves of the arguments: arrays and others, floats that move, floats that are judged."""
        with_paths, self.treedef = jax.tree_util.tree_flatten_with_path(self.args)
        self.leaves = [leaf for _, leaf in with_paths]
        self.is_array = [isinstance(x, jax.Array | np.ndarray | np.generic | float) for x in self.leaves]
        self.is_float, self.judged, self.moving, self.paths = [], [], [], []
        judged_at = set(self.positions)
        moving_at = judged_at | set(self.also_moving) | ({0} if self.is_rule else set())
        for i, (path, leaf) in enumerate(with_paths):
            is_array = self.is_array[i]
            if is_array and jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
                raise TypeError(
                    f"{self.what}: argument {path[0].idx} is complex; only real gradients are checked."
                )
            is_float = is_array and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            self.is_float.append(is_float)
            if is_float and path[0].idx in moving_at:
                if not np.size(leaf):
                    raise ValueError(
                        f"{self.what}: argument {path[0].idx} has an empty array, {np.shape(leaf)}."
                    )
                self.moving.append(i)
            if is_float and path[0].idx in judged_at:
                self.judged.append(i)
                name = jax.tree_util.keystr(path[1:])
                several = len(self.positions) > 1
                first = path[0].idx - (1 if self.is_rule else 0)
                base = self.path_names or (f"argument {first}" if several or not name else "")
                self.paths.append(f"{base}{name}")
        if not self.judged:
            raise TypeError(f"{self.what}: the differentiated arguments hold no float arrays.")
        wanted = tuple(self.args[i] for i in self.positions)
        self.wanted_leaves, self.wanted_tree = jax.tree.flatten(
            wanted if self.several else wanted[0], is_leaf=lambda x: x is None
        )

    def arrays(self, theta: Sequence[Any] | None, cast: Callable[[Any, bool], Any]) -> list[Any]:
        """All array leaves in order, the moving ones replaced by theta."""
        replaced = dict(zip(self.moving, theta, strict=True)) if theta is not None else {}
        return [
            replaced[i] if i in replaced else cast(leaf, self.is_float[i])
            for i, leaf in enumerate(self.leaves)
            if self.is_array[i]
        ]

    def build(self, arrays: Sequence[Any]) -> tuple:
        dealt = iter(arrays)
        leaves = [
            next(dealt) if is_array else x for x, is_array in zip(self.leaves, self.is_array, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def value(self, arrays: Sequence[Any]) -> Any:
        out = self.f(*self.build(arrays))
        if jnp.shape(out) != ():
            raise ValueError(f"{self.what}: f needs to return a scalar, got shape {jnp.shape(out)}.")
        if not jnp.issubdtype(jnp.result_type(out), jnp.floating):
            raise TypeError(f"{self.what}: f needs to return a float, got {jnp.result_type(out)}.")
        return out

    def candidate(self, arrays: Sequence[Any], *, native: bool) -> list[Any]:
        """The gradient's float leaves (and the value, last); raises _Broken where they cannot be compared."""
        out, value = self.gradient(*self.build(arrays)), None
        if self.has_value:
            if not isinstance(out, tuple) or len(out) != 2:
                raise _Broken(f"needs to return (value, gradient), got {type(out).__name__}")
            value, out = out
            if np.shape(value) != ():
                raise _Broken(f"the value needs to be a scalar, got shape {np.shape(value)}")
        if self.is_rule:
            out = self._expanded(out)
        leaves, tree = jax.tree.flatten(out, is_leaf=lambda x: x is None)
        if tree != self.wanted_tree:
            raise _Broken(f"needs the structure of the arguments, {self.wanted_tree}, got {tree}")
        results: list[Any] = []
        for got, wanted in zip(leaves, self.wanted_leaves, strict=True):
            if not isinstance(wanted, jax.Array | np.ndarray | np.generic | float):
                continue
            dtype, n = jnp.result_type(wanted), len(results)
            if not jnp.issubdtype(dtype, jnp.floating):
                if got is not None and getattr(got, "dtype", None) != jax.dtypes.float0:
                    kind = getattr(got, "dtype", type(got).__name__)
                    self.contract_breach(
                        f"an argument of {dtype} needs None or float0 as its gradient, got {kind}"
                    )
                continue
            if got is None and self.is_rule:
                got = jnp.zeros(np.shape(wanted), dtype)
            if not isinstance(got, jax.Array | np.ndarray | np.generic | float | int):
                raise _Broken(f"{self.paths[n]} needs an array, got {type(got).__name__}", n)
            if np.shape(got) != np.shape(wanted):
                raise _Broken(f"{self.paths[n]} needs shape {np.shape(wanted)}, got {np.shape(got)}", n, got)
            is_python = type(got) in (float, int)
            if native and not is_python and type(wanted) is not float and jnp.result_type(got) != dtype:
                self.contract_breach(f"{self.paths[n]} needs dtype {dtype}, got {jnp.result_type(got)}")
            results.append(got)
        return results + ([value] if self.has_value else [])

    def _expanded(self, adjoints: tuple) -> tuple:
        """None for a whole argument stands for a zero adjoint of all its leaves."""
        return tuple(
            jax.tree.map(lambda _: None, arg) if bar is None else bar
            for bar, arg in zip(adjoints, self.args[1:], strict=True)
        )

    def contract_breach(self, problem: str) -> None:
        if problem not in self.contract:
            self.contract.append(problem)


def _wide(x: Any, is_float: bool) -> Any:
    return np.asarray(x).astype(np.float64) if is_float else x


def _native(x: Any, is_float: bool) -> Any:
    return x


class _Standard:
    """JAX's default promotion, for code that a strict caller's configuration would refuse in float64."""

    def __enter__(self):
        self.contexts = [
            jax.enable_x64(True),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ]
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error):
        for context in reversed(self.contexts):
            context.__exit__(*error)


_PROGRAMS: OrderedDict[Any, Any] = OrderedDict()  # compiled, the latest last


def _compiled(key: Any, make: Callable[[], Callable]) -> Callable:
    """A jitted function, kept for equal questions with other numbers, as a property test asks them."""
    if key not in _PROGRAMS:
        _PROGRAMS[key] = jax.jit(make(), compiler_options=FAST)
        while len(_PROGRAMS) > 128:
            _PROGRAMS.popitem(last=False)
    _PROGRAMS.move_to_end(key)
    return _PROGRAMS[key]


def _key(jaxpr: Any) -> Any:
    """What a traced function computes: its text and its constants."""
    digest = sha256()
    for const in jaxpr.consts:
        digest.update(repr((jnp.shape(const), jnp.result_type(const))).encode())
        digest.update(np.asarray(const).tobytes())
    return str(jaxpr), digest.hexdigest()


def _trace(function: Function, arrays: list[Any]) -> tuple[Any, Exception | None]:
    """The function's jaxpr, or why it has none."""
    try:
        return jax.make_jaxpr(function)(arrays), None
    except _Broken:
        raise
    except Exception as error:  # NumPy inside, control flow on values, callbacks: whatever is not traceable
        return None, error


def _host(x: Any, like: Any) -> Any:
    """For NumPy functions: float64 in the array type that the caller used."""
    wide = np.asarray(x, np.float64)
    if isinstance(like, float):
        return float(wide)
    return jnp.asarray(wide) if isinstance(like, jax.Array) else wide


class _Function:
    """A function of the array leaves, called at many points: compiled if it can be traced, or on the host."""

    def __init__(self, question: _Question, function: Callable[[list], list], arrays: list[Any]):
        self.question, self.function = question, function
        self.is_moving = [i in question.moving for i, yes in enumerate(question.is_array) if yes]
        with _Standard():
            self.jaxpr, self.error = _trace(function, arrays)
        self.arrays = arrays

    @classmethod
    def of_jaxpr(cls, question: _Question, jaxpr: Any, arrays: list[Any]) -> "_Function":
        function = object.__new__(cls)
        function.question, function.arrays, function.jaxpr, function.error = question, arrays, jaxpr, None
        function.is_moving = [i in question.moving for i, yes in enumerate(question.is_array) if yes]
        return function

    def __call__(self, points: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """The outputs at every point, stacked along a first axis, as float64."""
        if self.jaxpr is None:
            return self._on_host(points)
        run = jaxpr_as_fun(self.jaxpr)
        stacked = [np.stack(leaves) for leaves in zip(*points, strict=True)]
        dealt = iter(stacked)
        arrays = [next(dealt) if moves else x for moves, x in zip(self.is_moving, self.arrays, strict=True)]
        axes = tuple(0 if moves else None for moves in self.is_moving)
        with _Standard():
            make = lambda: jax.vmap(lambda *xs: run(*xs), in_axes=axes)  # noqa: E731
            try:
                compiled = _compiled(("points", axes, _key(self.jaxpr)), make)
                return [np.asarray(out, np.float64) for out in compiled(*arrays)]
            except NotImplementedError:  # something that vmap does not know, such as a callback
                self.cannot_vmap = True
            compiled = _compiled(("point", _key(self.jaxpr)), lambda: run)
            rows = []
            for n in range(len(points)):
                own = [x[n] if moves else x for moves, x in zip(self.is_moving, arrays, strict=True)]
                rows.append([np.asarray(out, np.float64) for out in compiled(*own)])
            return [np.stack(column) for column in zip(*rows, strict=True)]

    def _on_host(self, points):
        rows = []
        question = self.question
        likes = [x for x, yes in zip(question.leaves, question.is_array, strict=True) if yes]
        with _Standard():
            for theta in points:
                dealt = iter(theta)
                arrays = [
                    next(dealt) if moves else x for moves, x in zip(self.is_moving, self.arrays, strict=True)
                ]
                given = [
                    _host(x, like) if jnp.issubdtype(jnp.result_type(like), jnp.floating) else x
                    for x, like in zip(arrays, likes, strict=True)
                ]
                rows.append([np.asarray(out, np.float64) for out in self.function(given)])
        return [np.stack(column) for column in zip(*rows, strict=True)]


@dataclass
class _Truth:
    """The gradient at every point (first axis), what rounding explains of it, and who says so."""

    gradient: list[Numbers]
    unit: list[Numbers]  # of float64's rounding
    value: Numbers
    value_unit: Numbers
    eps: float  # the coarsest that the reference itself computes with
    is_confirmed: Numbers  # by differences along a direction, for every point
    is_inside: Numbers  # f is finite around the point too
    judge: str
    gradient_at: Callable[[list[list[Numbers]]], list[Numbers]]  # at other points, by autodiff


def _points(question: _Question, rng: np.random.Generator) -> list[_Point]:
    given = [np.asarray(question.leaves[i]).astype(np.float64) for i in question.moving]
    is_judged = [i in question.judged for i in question.moving]

    def size(x):
        return float(_rms(x)) or 1.0

    def moved():
        return [x + size(x) * rng.standard_normal(x.shape) for x in given]

    def each(change):  # cotangents keep their size: they only move at random
        return [change(x) if judged else x for x, judged in zip(given, is_judged, strict=True)]

    return [
        _Point("as given", given),
        _Point("moved", moved()),
        _Point("moved again", moved()),
        _Point("ten times", each(lambda x: 10 * x)),
        _Point("zeros", each(np.zeros_like)),
    ]


def _reference(
    question: _Question, points: list[_Point], rng: np.random.Generator
) -> tuple[_Truth, _Function]:
    """Autodiff in float64 at every point, with its rounding units and its confirmation."""
    arrays = question.arrays([x for x in points[0].theta], _wide)
    with _Standard():
        arrays = [jnp.asarray(x) for x in arrays]
    value = _Function(question, lambda arrays: [question.value(arrays)], arrays)
    if (
        value.jaxpr is None
        and isinstance(value.error, ValueError | TypeError)
        and "f needs to return" in str(value.error)
    ):
        raise value.error
    judged_of_arrays = [
        i for i, leaf in enumerate(np.flatnonzero(question.is_array)) if leaf in question.judged
    ]
    traced = None
    if value.jaxpr is not None:
        plain = (
            without_custom_rules(value.jaxpr)
            if primitives(value.jaxpr) & CUSTOM
            else jaxpr_as_fun(value.jaxpr)
        )

        def value_and_gradient(arrays):
            def of_judged(judged):
                whole = list(arrays)
                for i, x in zip(judged_of_arrays, judged, strict=True):
                    whole[i] = x
                return plain(*whole)[0]

            value, gradient = jax.value_and_grad(of_judged)([arrays[i] for i in judged_of_arrays])
            return [*gradient, value]

        with _Standard():
            traced, _ = _trace(value_and_gradient, arrays)
    directions, offsets = _offsets(question, points, rng)
    if traced is None:
        return _by_differences(question, points, value), value
    with _Standard():
        run, shapes = noisy(traced)
    work = sum(int(np.prod(shape)) for shape in shapes) * len(points)
    samples = SAMPLES if work * SAMPLES < BUDGET else 3
    signs = [
        (2 * rng.integers(0, 2, (samples + 1, *shape), dtype=np.int8) - 1).astype(np.int8) for shape in shapes
    ]
    for sign in signs:
        sign[0] = 0
    is_moving = value.is_moving
    axes = [0 if moves else None for moves in is_moving]
    f = jaxpr_as_fun(value.jaxpr)

    def program(signs, arrays, moved):
        samples = jax.vmap(
            lambda arrays: jax.vmap(lambda signs: run(signs, *arrays))(signs), in_axes=(axes,)
        )(arrays)
        along = jax.vmap(jax.vmap(lambda arrays: f(*arrays)[0], in_axes=(axes,)), in_axes=(axes,))(moved)
        return samples, along

    def stacked(columns):
        dealt = iter(columns)
        return [next(dealt) if moves else x for moves, x in zip(is_moving, arrays, strict=True)]

    at = stacked([np.stack(x) for x in zip(*(point.theta for point in points), strict=True)])
    moved = stacked(offsets)
    with _Standard():
        compiled = _compiled(("truth", tuple(is_moving), _key(traced), _key(value.jaxpr)), lambda: program)
        samples_, along = jax.device_get(compiled(signs, at, moved))
    *gradient, values = (np.asarray(x, np.float64) for x in samples_)
    eps = max(EPS, coarsest(traced))
    units = [_rms(g[:, 1:] - g[:, :1], axis=1)[:, 0] for g in gradient]
    value_unit = _rms(values[:, 1:] - values[:, :1], axis=1)[:, 0] + eps * np.abs(values[:, 0])
    exact = [np.array(g[:, 0]) for g in gradient]  # writable: corrected where autodiff is at fault
    units = _floored(units, exact, eps)
    confirmed = _confirmed(question, along, exact, units, directions, value_unit)
    passed = primitives(value.jaxpr) & CUSTOM if value.jaxpr is not None else set()
    judge = "autodiff in float64" + (", past the custom rule that f carries" if passed else "")
    judge += f", confirmed by differences of f along a direction at {confirmed.sum()} of {len(points)} points"
    inside = np.isfinite(along).all(axis=1)
    at_points = _Function.of_jaxpr(question, traced, arrays)
    return _Truth(exact, units, values[:, 0], value_unit, eps, confirmed, inside, judge, at_points), value


STEPS = (1e-4, -1e-4, 5e-5, -5e-5)  # in units of a leaf's size: small, so that few kinks lie between


def _offsets(question: _Question, points: list[_Point], rng: np.random.Generator):
    """A direction at every point, of each leaf's own size, and the places around it where f is evaluated."""
    directions, offsets = [], []
    for column, i in enumerate(question.moving):
        at = np.stack([point.theta[column] for point in points])
        size = _rms(at, tuple(range(1, at.ndim)))
        direction = np.where(size > 0, size, 1.0) * rng.standard_normal(at.shape)
        if i not in question.judged:
            direction = np.zeros_like(at)
        directions.append(direction)
        steps = np.reshape(STEPS, (1, 4) + (1,) * (at.ndim - 1))
        offsets.append(at[:, None] + steps * direction[:, None])
    return directions, offsets


def _confirmed(question, along, exact, units, directions, value_unit) -> Numbers:
    """Whether Richardson's difference quotient agrees with autodiff along the direction, point by point."""
    h = STEPS[0]
    coarse, fine = (along[:, 0] - along[:, 1]) / (2 * h), (along[:, 2] - along[:, 3]) / h
    quotient = (4 * fine - coarse) / 3
    judged = [d for d, i in zip(directions, question.moving, strict=True) if i in question.judged]
    slope = sum((g * d).reshape(len(g), -1).sum(axis=1) for g, d in zip(exact, judged, strict=True))
    size = sum(np.abs(g * d).reshape(len(g), -1).sum(axis=1) for g, d in zip(exact, judged, strict=True))
    doubt = np.abs(quotient - fine) + LIMIT * value_unit / h + 1e-9 * size
    return np.abs(quotient - slope) <= 10 * doubt


def _floored(units: list[Numbers], exact: list[Numbers], eps: float) -> list[Numbers]:
    """Rounding units with a floor: half an eps of the entry, the leaf's median, 0.1 eps of its largest.

    A leaf of nothing but zeros takes a thousandth of an eps of the largest entry of all leaves.
    """

    def largest(g):
        finite = np.where(np.isfinite(g), np.abs(g), 0)
        return finite.max(axis=tuple(range(1, g.ndim)), keepdims=True)

    of_all = np.max([np.ravel(largest(g)) for g in exact], axis=0)
    floored = []
    for unit, g in zip(units, exact, strict=True):
        unit = np.where(np.isfinite(unit), unit, 0)
        median = np.median(unit, axis=tuple(range(1, g.ndim)), keepdims=True)
        own = eps / 2 * np.where(np.isfinite(g), np.abs(g), 0)
        unit = np.maximum.reduce(
            [unit, np.broadcast_to(median, g.shape), own, 0.1 * eps * largest(g) + 0 * own]
        )
        least = 1e-3 * eps * of_all.reshape(median.shape) + 1e-300
        floored.append(np.where(unit > 0, unit, least))
    return floored


def _by_differences(question: _Question, points: list[_Point], value: _Function) -> _Truth:
    """Where autodiff cannot serve: central differences of f, extrapolated twice, entry by entry."""
    question.notes.append(f"f cannot be differentiated by JAX ({_short(value.error)}); judged by differences")
    used = points[:2]
    gradients, units, values, value_units = [], [], [], []
    for point in used:
        (at,) = value([point.theta])
        noise = 8 * EPS * abs(float(at[0]))
        per_leaf, per_unit = [], []
        for column, i in enumerate(question.moving):
            if i not in question.judged:
                continue
            x = point.theta[column]
            rms = float(_rms(x)) or 1.0
            gradient, unit = np.zeros(x.size), np.zeros(x.size)
            for entry in range(x.size):
                h = 0.02 * max(abs(x.flat[entry]), rms)
                table: list[list[float]] = []
                best, error = 0.0, np.inf
                for level in range(7):
                    step = h / 2**level
                    places = []
                    for sign in (1, -1):
                        moved = x.copy()
                        moved.flat[entry] += sign * step
                        places.append([moved if c == column else t for c, t in enumerate(point.theta)])
                    up, down = value(places)[0]
                    row = [(up - down) / (2 * step)]
                    for order, last in enumerate(table[-1] if table else [], start=1):
                        row.append(row[-1] + (row[-1] - last) / (4**order - 1))
                    if table:
                        gap = max(abs(row[-1] - row[-2]), abs(row[-1] - table[-1][-1])) + noise / step
                        if gap < error:
                            best, error = row[-1], gap
                    table.append(row)
                gradient[entry], unit[entry] = best, error
            per_leaf.append(gradient.reshape(x.shape))
            per_unit.append(unit.reshape(x.shape) / 3)
        gradients.append(per_leaf)
        units.append(per_unit)
        values.append(float(at[0]))
        value_units.append(noise)
    del points[len(used) :]
    exact = [np.stack(leaves) for leaves in zip(*gradients, strict=True)]
    stacked = _floored([np.stack(leaves) for leaves in zip(*units, strict=True)], exact, EPS)
    judge = "extrapolated central differences of f in float64"
    return _Truth(
        exact,
        stacked,
        np.array(values),
        np.array(value_units),
        EPS,
        np.ones(len(used), bool),
        np.ones(len(used), bool),
        judge,
        lambda points: [],
    )


def _short(error: Exception | None) -> str:
    return type(error).__name__ if error is not None else "no gradient"


def _check(question: _Question, batch_axes: Sequence[int | None] | None = None) -> Report:
    report = _check_one(question)
    if report:
        report = _with_data_reversed(question, report)
    if batch_axes is None:
        return report
    sizes = _batch_sizes(question, batch_axes)
    N = sizes.pop(0)
    for n in sizes:
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


def _with_data_reversed(question: _Question, report: Report) -> Report:
    """The verdict once more with the arguments that are not differentiated in reverse order.

    A gradient that takes its targets from elsewhere shows. Reversed, rows still sum to what they did, and
    square matrices, reversed along both axes, stay symmetric: what a formula may rightly assume of its data.
    """

    def reverse(x):
        if (
            not isinstance(x, jax.Array | np.ndarray)
            or not np.ndim(x)
            or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        ):
            return x
        return x[::-1, ::-1] if x.ndim == 2 and x.shape[0] == x.shape[1] else x[::-1]

    moving = set(question.positions) | set(question.also_moving) | ({0} if question.is_rule else set())
    args = tuple(x if i in moving else jax.tree.map(reverse, x) for i, x in enumerate(question.args))
    if all(a is b for a, b in zip(jax.tree.leaves(args), jax.tree.leaves(question.args), strict=True)):
        return report
    other = replace(question, args=args, notes=[], contract=[])
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


def _batch_sizes(question: _Question, batch_axes: Sequence[int | None]) -> list[int]:
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


def _check_one(question: _Question) -> Report:
    with np.errstate(all="ignore"):  # overflow is looked for, not warned of
        return _judged(question)


def _judged(question: _Question) -> Report:
    question.take_apart()
    rng = np.random.default_rng(question.seed)
    points = _points(question, rng)
    native, native_problem = _native_run(question)
    truth, value = _reference(question, points, rng)
    if not np.isfinite(truth.value[0]):
        raise ValueError(
            f"{question.what}: f is {truth.value[0]} at the arguments given; nothing can be judged."
        )
    if native_problem is not None:
        return _broken_report(question, native_problem, truth, points)
    assert native is not None

    wide, wide_function = _wide_run(question, points)
    eps_native = _eps_native(question)
    judged = _Verdicts(question, truth, points, value, eps_native)
    names = question.paths + (["value"] if question.has_value else [])
    if wide is not None:
        # What the gradient computes with if that is coarser than float64, but never more than it was given.
        eps = EPS
        if wide_function.jaxpr is not None:
            eps = min(max(EPS, coarsest(wide_function.jaxpr)), eps_native)
        elif eps_native > EPS:
            eps = min(eps_native, float(np.finfo(np.float32).eps))
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
        diagnoses = diagnose(
            _evidence(question, truth, exact, points, got, wide, wide_function, leaves, native)
        )
    return Report(
        question.what,
        leaves,
        tuple(question.contract),
        diagnoses,
        tuple(question.notes),
        truth.judge,
        f"{question.what.partition('(')[0]}(..., seed={question.seed})",
        LIMIT,
    )


def _native_run(question: _Question) -> tuple[list[Any] | None, _Broken | None]:
    """The gradient as the caller would get it, called twice; or how it breaks the contract."""
    arrays = question.arrays(None, _native)
    try:
        jaxpr, why = _trace(lambda arrays: question.candidate(arrays, native=True), arrays)
        if jaxpr is not None:
            again, _ = _trace(lambda arrays: question.candidate(arrays, native=True), arrays)
            if not _same_program(jaxpr, again):
                question.contract.append(
                    "not the same when called twice: it depends on hidden state or chance"
                )
            if any(isinstance(x, np.ndarray) for x in arrays):
                _call_on_copies(question, arrays)
            function = _compiled(("native", _key(jaxpr)), lambda: jaxpr_as_fun(jaxpr))
            return [np.asarray(x) for x in function(*arrays)], None
        first, second = _call_on_copies(question, arrays), _call_on_copies(question, arrays)
        if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
            question.contract.append("not the same when called twice: it depends on hidden state or chance")
        question.notes.append(f"the gradient cannot be traced ({_short(why)}): jit and vmap were not tried")
        return first, None
    except _Broken as problem:
        return None, _with_numbers(question, arrays, problem)


def _with_numbers(question: _Question, arrays: list[Any], problem: _Broken) -> _Broken:
    """The same breach met with arrays that have values, which a diagnosis needs."""
    try:
        question.candidate(arrays, native=True)
    except _Broken as again:
        return again
    except Exception:  # only traced code breaks the contract in this way
        pass
    return problem


def _call_on_copies(question: _Question, arrays: list[Any]) -> list[Numbers]:
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


def _wide_run(question: _Question, points: list[_Point]) -> tuple[list[Numbers] | None, "_Function"]:
    """The gradient at all points in float64; None if it refuses float64."""
    with _Standard():
        arrays = [jnp.asarray(x) for x in question.arrays(points[0].theta, _wide)]

    def candidate(arrays):
        return question.candidate(arrays, native=False)

    try:
        function = _Function(question, candidate, arrays)
        return function([point.theta for point in points]), function
    except _Broken as problem:
        question.contract.append(f"with float64 arguments: {problem.problem}")
    except Exception as error:  # a kernel that takes one dtype only
        question.notes.append(
            f"the gradient does not run in float64 ({_short(error)}); judged in its own dtype"
        )
    function = object.__new__(_Function)
    function.jaxpr = None
    return None, function


def _eps_native(question: _Question) -> float:
    """The coarsest precision of the arguments and of f as the caller calls it."""
    eps = EPS
    for x, is_float in zip(question.leaves, question.is_float, strict=True):
        if is_float:
            eps = max(eps, float(jnp.finfo(jnp.result_type(x)).eps))
    jaxpr, _ = _trace(lambda arrays: [question.value(arrays)], question.arrays(None, _native))
    return max(eps, coarsest(jaxpr)) if jaxpr is not None else eps


class _Verdicts:
    """The worst that was found of every leaf, over all points."""

    def __init__(
        self, question: _Question, truth: _Truth, points: list[_Point], value: _Function, eps_native: float
    ):
        self.question, self.truth, self.points, self.value = question, truth, points, value
        self.exact = list(truth.gradient) + ([truth.value] if question.has_value else [])
        self.unit = list(truth.unit) + ([truth.value_unit] if question.has_value else [])
        self.names = question.paths + (["value"] if question.has_value else [])
        self.worst: dict[int, Leaf] = {}
        self.kinks: list[tuple] = []  # at one point: is it convex, leaf, column, entries, steps, value, truth
        self.skipped = 0
        self.eps_native = 0.0 if eps_native <= EPS else eps_native
        # A wrong rule inside f shows at most points; a kink, at which differences fail too, at few.
        rules = value.jaxpr is not None and primitives(value.jaxpr) & CUSTOM_JVP
        self.doubts_autodiff = bool(rules) and truth.is_confirmed[:3].sum() <= 1

    def record(self, n: int, p: int, verdict: str, units: Numbers, got: Numbers, expected: Numbers) -> None:
        where = np.unravel_index(int(np.argmax(np.where(np.isnan(units), np.inf, units))), units.shape)
        leaf = Leaf(
            self.names[n],
            tuple(expected.shape),
            verdict,
            float(np.nan_to_num(units[where], nan=np.inf, posinf=np.inf)),
            tuple(int(i) for i in where),
            float(got[where]),
            float(expected[where]),
            self.points[p].name,
        )
        before = self.worst.get(n)
        if before is None or _severity(leaf) > _severity(before):
            self.worst[n] = leaf

    def at_point(self, p: int, got: list[Numbers], eps: float) -> None:
        """Judges the gradient's float64 values at a point; at kinks any valid slope will do."""
        self.kinks = []
        for n, value in enumerate(got):
            exact = np.asarray(self.exact[n][p])
            # Of what is used in float32, nobody needs the eleventh digit: f itself may be made for float32.
            unit = self.unit[n][p] * eps / self.truth.eps + 1e-4 * self.eps_native * _finite_size(exact)
            units = _units(value, exact, unit)
            suspicious = units > LIMIT
            is_gradient = n < len(self.truth.gradient)
            if is_gradient:
                # Where rounding flips a branch, as at a tie, the unit is no rounding any more.
                size = np.abs(exact) + np.median(np.abs(exact))
                suspicious |= (unit > 1e-7 * size) & (np.abs(value - exact) > 1e-6 * size)
                if self.doubts_autodiff and not self.truth.is_confirmed[p] and not suspicious.any():
                    suspicious = np.ones_like(units, bool)  # both may be wrong
            verdict = RIGHT
            if suspicious.any():
                verdict = WRONG
                if is_gradient:
                    verdict, units, exact = self.look_closer(
                        n, p, value, exact, unit, units, suspicious, 1e-4
                    )
                    self.exact[n][p] = exact  # corrected where autodiff is at fault
            self.record(n, p, verdict, units, value, exact)
        is_wrong = any(
            leaf.where == self.points[p].name and not leaf.is_right for leaf in self.worst.values()
        )
        for is_convex in (True, False):
            kinks = [kink[1:] for kink in self.kinks if kink[0] == is_convex]
            if kinks and not is_wrong and not self.is_subgradient(p, kinks):
                for n, _, _, _, value, exact in kinks:
                    self.record(n, p, WRONG, np.where(value == exact, 0.0, np.inf), value, exact)

    def in_own_precision(self, native: list[Any], eps: float, *, is_right_wide: bool) -> None:
        """Judges the gradient as it was returned at the point given: does it lose digits, or overflow?"""
        refined = None
        for n, returned in enumerate(native):
            if n in self.worst and not self.worst[n].is_right:
                continue
            dtype = jnp.result_type(returned)
            value, exact = np.asarray(returned).astype(np.float64), np.asarray(self.exact[n][0])
            own = max(eps, float(jnp.finfo(dtype).eps)) if jnp.issubdtype(dtype, jnp.floating) else eps
            tiny = float(jnp.finfo(dtype).tiny) if jnp.issubdtype(dtype, jnp.floating) else 0.0
            unit = self.unit[n][0] * own / self.truth.eps + tiny + own / 2 * _finite_size(exact)
            units = np.asarray(_units(value, exact, unit))
            too_large = np.abs(exact) > 0.5 * float(jnp.finfo(dtype).max)
            units = np.where(too_large, 0.0, units)
            if (units > LIMIT).any():
                if refined is None:
                    refined = self.autodiff_in_own_precision()
                unit = np.maximum(unit, np.nan_to_num(refined[n], nan=0.0, posinf=0.0))
                units = np.where(too_large, 0.0, _units(value, exact, unit))
            verdict = RIGHT
            if (units > LIMIT).any():
                verdict = LOST if is_right_wide else WRONG
                if n < len(self.truth.gradient):
                    reach = min(max(1e-4, 64 * own), 0.05)
                    closer, units, exact = self.look_closer(
                        n, 0, value, exact, unit, units, units > LIMIT, reach
                    )
                    verdict = closer if closer != WRONG else verdict
            self.record(n, 0, verdict, units, value, exact)

    def autodiff_in_own_precision(self) -> list[Numbers]:
        """What autodiff itself loses in the dtype given, by its error and by Monte-Carlo arithmetic."""
        question = self.question
        arrays = question.arrays(None, _native)
        judged = [i for i, leaf in enumerate(np.flatnonzero(question.is_array)) if leaf in question.judged]

        def gradient(arrays):
            def of_judged(xs):
                whole = list(arrays)
                for i, x in zip(judged, xs, strict=True):
                    whole[i] = x
                return question.value(whole)

            value, gradient = jax.value_and_grad(of_judged)([arrays[i] for i in judged])
            return [*gradient, value]

        jaxpr, _ = _trace(gradient, arrays)
        if jaxpr is None:
            return [np.zeros_like(exact[0]) for exact in self.exact]
        run, shapes = noisy(jaxpr)
        rng = np.random.default_rng(question.seed)
        signs = [rng.choice(np.array([-1, 1], np.int8), (SAMPLES + 1, *shape)) for shape in shapes]
        for sign in signs:
            sign[0] = 0
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            axes = (0,) + (None,) * len(arrays)
            compiled = _compiled(("own", axes, _key(jaxpr)), lambda: jax.vmap(run, in_axes=axes))
            samples = compiled(signs, *arrays)
        results = []
        for sample, exact in zip(samples, self.exact, strict=False):
            wide = np.asarray(sample).astype(np.float64)
            spread = np.sqrt(np.mean((wide[1:] - wide[:1]) ** 2, axis=0))
            results.append(np.maximum(spread, np.abs(wide[0] - exact[0])))
        return results

    def look_closer(self, n, p, value, exact, unit, units, suspicious, reach):
        """One-sided derivatives of f at suspicious entries: is it a kink, or is autodiff at fault?

        Returns the verdict, and units and truth with those corrected.
        """
        if self.value.jaxpr is None:
            return WRONG, units, exact
        entries = np.flatnonzero(suspicious)
        worst = entries[np.argsort(-np.nan_to_num(units.flat[entries], nan=np.inf), kind="stable")]
        entries = (
            worst[:ENTRIES]
            if len(worst) <= ENTRIES
            else np.concatenate([worst[:32], worst[32 :: max(1, len(worst) // 16)]])[:ENTRIES]
        )
        column = self.question.moving.index(self.question.judged[n])
        x = self.points[p].theta[column]
        rms = float(_rms(x)) or 1.0
        steps = reach * np.maximum(np.abs(x.flat[entries]), rms)
        left, right, doubt = self.one_sided(p, [[(column, [e], [1.0])] for e in entries], steps)
        nearby: list[Numbers] = []  # gradients at points around, made when a kink is met
        units, exact = np.array(units, float), np.array(exact, float)
        verdicts = set()
        for k, e in enumerate(entries):
            low, high = min(left[k], right[k]), max(left[k], right[k])
            jump = high - low
            room = doubt[k] + LIMIT * unit.flat[e]
            is_finite = np.isfinite([left[k], right[k]]).all()
            if not is_finite:
                both_infinite = not np.isfinite(exact.flat[e]) and not np.isfinite(value.flat[e])
                if both_infinite or not np.isfinite(exact.flat[e]):
                    units.flat[e] = 0.0
                    verdicts.add(UNJUDGED)
                else:
                    verdicts.add(WRONG)
                continue
            is_kink = jump > 20 * doubt[k] and jump > 1e-3 * max(abs(low), abs(high))
            if is_kink:
                if not nearby:
                    nearby.append(self.gradients_nearby(n, p, steps))
                low, high = nearby[0][:, e].min(initial=low), nearby[0][:, e].max(initial=high)
                slack = room + 1e-2 * jump
                if low - slack <= value.flat[e] <= high + slack:
                    units.flat[e] = 0.0
                    verdicts.add(KINK)
                else:
                    verdicts.add(WRONG)
                continue
            middle = (low + high) / 2
            if doubt[k] > 0.02 * max(abs(low), abs(high), abs(value.flat[e])) and not np.isfinite(
                exact.flat[e]
            ):
                units.flat[e] = 0.0  # an infinite slope, or no slope at all
                verdicts.add(UNJUDGED)
                continue
            near = 1e-8 * abs(middle)
            agrees = np.isfinite(exact.flat[e]) and abs(exact.flat[e] - middle) <= 10 * room + near
            if agrees:
                verdicts.add(WRONG if units.flat[e] > LIMIT else RIGHT)
                continue
            exact.flat[e] = middle
            units.flat[e] = abs(value.flat[e] - middle) / (room + near + 1e-300)
            verdicts.add(AT_FAULT if units.flat[e] <= LIMIT else WRONG)
        if KINK in verdicts:
            for is_convex in (True, False):
                of = (right > left) == is_convex
                if of.any():
                    self.kinks.append((is_convex, n, column, entries[of], steps[of], value, exact))
        if WRONG in verdicts:
            return WRONG, units, exact
        units = np.where(suspicious, np.minimum(units, LIMIT), units)
        for verdict in (AT_FAULT, KINK, UNJUDGED):
            if verdict in verdicts:
                chosen = f"{exact.flat[entries[0]]:g} and {value.flat[entries[0]]:g}"
                if verdict == KINK:
                    where = f"{self.names[n]} is at a kink"
                    note = f"{where} ({self.points[p].name}): autodiff and yours chose {chosen}, both valid"
                    if (
                        not any(where in other for other in self.question.notes)
                        and len(self.question.notes) < 6
                    ):
                        self.question.notes.append(note)
                return verdict, units, exact
        return RIGHT, units, exact

    def gradients_nearby(self, n: int, p: int, steps: Numbers) -> Numbers:
        """The gradients of a leaf at 32 points around, a row each: Clarke's subdifferential is their hull.

        Of a tie among many, as in a sort, moving one entry meets only the first and the last place.
        """
        rng = np.random.default_rng(0)
        reach = 1e-3 * float(np.min(steps))
        theta, places = self.points[p].theta, []
        for _ in range(32):
            places.append([x + reach * rng.standard_normal(x.shape) for x in theta])
        gradient = self.truth.gradient_at(places)[n]
        rows = gradient.reshape(len(places), -1)
        return rows[np.isfinite(rows).all(axis=1)]

    def is_subgradient(self, p: int, kinks: list[tuple]) -> bool:
        """Whether ⟨g, v⟩ lies between the one-sided derivatives along v, for directions v over all kinks.

        Entry by entry each may be valid while together they are not, as (1, 1) at a tie of max(x, y). This
        is asked of convex kinks and of concave ones, each by themselves: of both together it is not true.
        """
        rng = np.random.default_rng(0)
        count = sum(len(entries) for _, _, entries, *_ in kinks)
        signs = [np.ones(count)] + [rng.choice([-1.0, 1.0], count) for _ in range(7)]
        lengths = np.concatenate([steps for _, _, _, steps, *_ in kinks])
        places = np.cumsum([0] + [len(entries) for _, _, entries, *_ in kinks])
        moves, ours, theirs = [], [], []
        for sign in signs:
            along = sign * lengths / lengths.max()
            parts = [along[i:j] for i, j in zip(places[:-1], places[1:], strict=True)]
            moves.append([(k[1], k[2], part) for k, part in zip(kinks, parts, strict=True)])
            for slopes, which in ((ours, 4), (theirs, 5)):
                terms = [np.dot(k[which].flat[k[2]], part) for k, part in zip(kinks, parts, strict=True)]
                slopes.append(float(sum(terms)))
        left, right, doubt = self.one_sided(p, moves, np.full(len(signs), lengths.max()))
        slack = 10 * doubt + 1e-2 * np.abs(right - left) + 1e-6 * np.maximum(np.abs(left), np.abs(right))
        if not ((right >= left - slack).all() or (right <= left + slack).all()):
            return True  # other kinks interfere
        low, high = np.minimum(left, right) - slack, np.maximum(left, right) + slack
        for k in range(len(signs)):
            if low[k] <= theirs[k] <= high[k] and not low[k] <= ours[k] <= high[k]:
                return False
        return True

    def one_sided(self, p: int, moves: list[list[tuple]], steps: Numbers) -> tuple[Numbers, ...]:
        """Left and right derivatives of f along sparse directions, extrapolated, and their doubt.

        moves: for each direction its parts (column, entries, values)
        steps: how far along each
        """
        theta, stages, rows = self.points[p].theta, (1.0, 0.5, 0.25), []
        for parts, step in zip(moves, steps, strict=True):
            for sign in (1, -1):
                for stage in stages:
                    moved = list(theta)
                    for column, entries, values in parts:
                        moved[column] = moved[column].copy()
                        moved[column].flat[entries] += sign * stage * step * np.asarray(values)
                    rows.append(moved)
        n = len(rows)
        values = self.value(rows + [theta] * (_padded(n + 1) - n))[0]
        table = values[:n].reshape(len(moves), 2, len(stages))
        h = np.asarray(steps)[:, None, None] * np.asarray(stages)
        slopes = (table - values[-1]) / h * np.array([1, -1])[:, None]
        coarse = 2 * slopes[..., 1] - slopes[..., 0]
        fine = 2 * slopes[..., 2] - slopes[..., 1]
        best = (4 * fine - coarse) / 3
        noise = LIMIT * self.truth.value_unit[p] / (np.asarray(steps) * stages[-1])
        doubt = np.abs(best - fine).max(axis=1) + noise
        return best[:, 1], best[:, 0], doubt


def _rms(x: Numbers, axis: Any = None) -> Numbers:
    """The root of the mean square, which does not overflow; 0 for an array of zeros."""
    largest = np.max(np.abs(x), axis=axis, keepdims=True)
    scaled = x / np.where(largest > 0, largest, 1.0)  # of NaN and inf: NaN
    rms = largest * np.sqrt(np.mean(scaled**2, axis=axis, keepdims=True))
    return np.asarray(rms if axis is not None else rms.reshape(()))


def _finite_size(x: Numbers) -> Numbers:
    return np.where(np.isfinite(x), np.abs(x), 0.0)


def _padded(n: int) -> int:
    """A size from a handful, as every new one would be compiled."""
    size = 64
    while size < n:
        size *= 2
    return size


def _severity(leaf: Leaf) -> tuple[bool, bool, float]:
    """Wrong before right, at the point given before others, kinks before plain right, large before small."""
    here = leaf.where == "as given"
    return not leaf.is_right, here and leaf.verdict != RIGHT, leaf.units


def _units(value: Numbers, exact: Numbers, unit: Numbers) -> Numbers:
    """Errors in rounding units; inf where one is finite and the other not."""
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    units = np.abs(value - exact) / unit
    same = (value == exact) | (np.isnan(value) & np.isnan(exact))
    return np.where(same, 0.0, np.where(np.isfinite(value) & np.isfinite(exact), units, np.inf))


def _broken_report(question: _Question, problem: _Broken, truth: _Truth, points: list[_Point]) -> Report:
    contract = (*question.contract, problem.problem)
    evidence = Evidence(
        paths=question.paths,
        got=[None if i != problem.leaf else _as_wide(problem.got) for i in range(len(question.paths))],
        truth=[g[0] for g in truth.gradient],
        params=[np.asarray(question.leaves[i]).astype(np.float64) for i in question.judged],
        sizes=_sizes(question),
    )
    return Report(question.what, (), contract, diagnose(evidence), tuple(question.notes), truth.judge)


def _as_wide(x: Any) -> Numbers | None:
    try:
        return None if x is None else np.asarray(jax.device_get(x)).astype(np.float64)
    except Exception:  # a tracer: shapes are all that is known
        return None


def _sizes(question: _Question) -> list[int]:
    """Axis lengths of all arrays: candidates for an N that was forgotten."""
    return sorted(
        {
            n
            for leaf, yes in zip(question.leaves, question.is_array, strict=True)
            if yes
            for n in np.shape(leaf)
        }
        - {1}
    )


def _evidence(question, truth, exact, points, got, wide, wide_function, leaves, native) -> Evidence:
    n_gradient = len(truth.gradient)
    return Evidence(
        paths=question.paths,
        got=list(got[:n_gradient]),
        truth=[g[0] for g in exact],
        unit=[
            u[0] * max(1.0, _eps_native(question) / truth.eps if wide is None else 1.0) for u in truth.unit
        ],
        params=[points[0].theta[question.moving.index(i)] for i in question.judged],
        sizes=_sizes(question),
        verdicts=[leaf.verdict for leaf in leaves[:n_gradient]],
        elsewhere=[
            (points[p].name, [w[p] for w in wide[:n_gradient]], [g[p] for g in exact])
            for p in range(1, len(points))
            if wide is not None and np.isfinite(truth.value[p])
        ],
        is_wide=all(jnp.result_type(question.leaves[i]) == np.float64 for i in question.judged),
        computes_with=coarsest(wide_function.jaxpr) if wide_function.jaxpr is not None else EPS,
        native=[np.asarray(x).astype(np.float64) for x in native[:n_gradient]],
    )
