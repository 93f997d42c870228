"""A question to the judge: a function, someone's gradient of it, and arguments taken apart for both.

The arrays among the arguments become the inputs of functions that can be traced, compiled once, and evaluated
at many points; whatever else is in there, such as functions, strings and None, stays where it is.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from .progress import Tell

Function = Callable[..., Any]
Numbers = Any  # NumPy: an array, or a number where the shape is ()


class Point(NamedTuple):
    name: str
    theta: list[Numbers]  # the float leaves that move, in float64


class Broken(Exception):
    """The contract is broken so that no numbers can be compared; what, and the array that came."""

    def __init__(self, problem: str, leaf: int | None = None, got: Any = None):
        super().__init__(problem)
        self.problem, self.leaf, self.got = problem, leaf, got


@dataclass
class Question:
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
    outputs: Function | None = None  # of a jvp: the primals' function; the arguments are weights, x and ẋ
    points: tuple[str, ...] = ()  # where a closer look is wanted; by default the judge chooses
    is_projected: bool = False  # right at the point given, and too large for entries at others
    tell: Tell = lambda what, done, total: None  # progress
    notes: list[str] = field(default_factory=list)
    contract: list[str] = field(default_factory=list)

    def __post_init__(self):
        for name, function in (("f", self.f), ("gradient", self.gradient)):
            if not callable(function):
                raise TypeError(f"{self.what}: {name} needs to be a function, got {type(function).__name__}.")
        self.several = not hasattr(self.argnums, "__index__")
        numbers: Any = self.argnums if self.several else (self.argnums,)
        positions = [index(i) % len(self.args) if self.args else 0 for i in numbers]
        self.order = sorted(range(len(positions)), key=positions.__getitem__)
        self.positions = tuple(sorted(positions))  # inside, gradients stand in the order of the arguments
        if not self.args or any(not -len(self.args) <= index(i) < len(self.args) for i in numbers):
            raise ValueError(
                f"{self.what}: argnums={self.argnums}, but there are {len(self.args)} arguments."
            )

        if len(set(positions)) < len(positions):
            raise ValueError(f"{self.what}: argnums={self.argnums} names an argument twice.")

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

    def value_and_gradient(self, f: Callable[[list[Any]], Any]) -> Callable[[list[Any]], list[Any]]:
        """Autodiff's gradient of a function of the array leaves, for the judged ones, and its value last."""
        judged = [i for i, leaf in enumerate(np.flatnonzero(self.is_array)) if leaf in self.judged]

        def both(arrays):
            def of_judged(xs):
                whole = list(arrays)
                for i, x in zip(judged, xs, strict=True):
                    whole[i] = x
                return f(whole)

            value, gradient = jax.value_and_grad(of_judged)([arrays[i] for i in judged])
            return [*gradient, value]

        return both

    def candidate(self, arrays: Sequence[Any], *, native: bool) -> list[Any]:
        """The gradient's float leaves (and the value, last); raises Broken where they cannot be compared."""
        out, value = self.gradient(*self.build(arrays)), None
        if self.has_value:
            if not isinstance(out, tuple) or len(out) != 2:
                raise Broken(f"needs to return (value, gradient), got {type(out).__name__}")
            value, out = out
            if np.shape(value) != ():
                raise Broken(f"the value needs to be a scalar, got shape {np.shape(value)}")
        if self.is_rule:
            out = self._expanded(out)
        if self.several and isinstance(out, tuple) and len(out) == len(self.order):
            out = tuple(out[k] for k in self.order)
        leaves, tree = jax.tree.flatten(out, is_leaf=lambda x: x is None)
        if tree != self.wanted_tree:
            raise Broken(f"needs the structure of the arguments, {self.wanted_tree}, got {tree}")
        results: list[Any] = []
        for got, wanted in zip(leaves, self.wanted_leaves, strict=True):
            if not isinstance(wanted, jax.Array | np.ndarray | np.generic | float):
                if isinstance(got, jax.Array | np.ndarray | np.generic | float) and not isinstance(
                    wanted, int
                ):
                    kind = "None" if wanted is None else type(wanted).__name__
                    self.contract_breach(f"an argument that is no array ({kind}) needs no gradient, got one")
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
                raise Broken(f"{self.paths[n]} needs an array, got {type(got).__name__}", n)
            if np.shape(got) != np.shape(wanted):
                raise Broken(f"{self.paths[n]} needs shape {np.shape(wanted)}, got {np.shape(got)}", n, got)
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


def wide_array(x: Any, is_float: bool) -> Any:
    return np.asarray(x).astype(np.float64) if is_float else x


def as_it_is(x: Any, is_float: bool) -> Any:
    return x


class wide_promotion:
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


@cache
def quick_to_compile() -> dict[str, Any]:
    """Compiler options for programs that run once: no optimisation, and XLA's older loops where it has them.

    On CPU these (the option is gone from jaxlib 0.11) compile the judge's programs in half the time.
    """
    options = {"xla_backend_optimization_level": 0}
    older = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=older).lower().compile()
    except jax.errors.JaxRuntimeError:
        return options
    return older


_PROGRAMS: OrderedDict[Any, Any] = OrderedDict()  # compiled, the latest last


def compiled_once(key: Any, make: Callable[[], Callable], *, runs_long: bool = False) -> Callable:
    """A jitted function, kept for equal questions with other numbers, as a property test asks them."""
    if key not in _PROGRAMS:
        _PROGRAMS[key] = jax.jit(make(), compiler_options=None if runs_long else quick_to_compile())
        while len(_PROGRAMS) > 128:
            _PROGRAMS.popitem(last=False)
    _PROGRAMS.move_to_end(key)
    return _PROGRAMS[key]


def program_key(jaxpr: Any) -> Any:
    """What a traced function computes: its text and its constants."""
    digest = sha256()
    for const in jaxpr.consts:
        digest.update(repr((jnp.shape(const), jnp.result_type(const))).encode())
        digest.update(np.asarray(const).tobytes())
    return str(jaxpr), digest.hexdigest()


def trace(function: Function, arrays: list[Any]) -> tuple[Any, Exception | None]:
    """The function's jaxpr, or why it has none."""
    try:
        return jax.make_jaxpr(function)(arrays), None
    except Broken:
        raise
    except Exception as error:  # NumPy inside, control flow on values, callbacks: whatever is not traceable
        return None, error


def _host(x: Any, like: Any) -> Any:
    """For NumPy functions: float64 in the array type that the caller used."""
    wide = np.asarray(x, np.float64)
    if isinstance(like, float):
        return float(wide)
    return jnp.asarray(wide) if isinstance(like, jax.Array) else wide


class Evaluator:
    """A function of the array leaves, called at many points: compiled if it can be traced, or on the host."""

    def __init__(self, question: Question, function: Callable[[list], list], arrays: list[Any]):
        self.question, self.function = question, function
        self.is_moving = [i in question.moving for i, yes in enumerate(question.is_array) if yes]
        with wide_promotion():
            self.jaxpr, self.error = trace(function, arrays)
        self.arrays = arrays

    @classmethod
    def of_jaxpr(cls, question: Question, jaxpr: Any, arrays: list[Any]) -> "Evaluator":
        function = object.__new__(cls)
        function.question, function.arrays, function.jaxpr, function.error = question, arrays, jaxpr, None
        function.is_moving = [i in question.moving for i, yes in enumerate(question.is_array) if yes]
        return function

    def __call__(self, points: Sequence[list[Numbers]]) -> list[Numbers]:
        """The outputs at every point, stacked along a first axis, as float64."""
        if self.jaxpr is None:
            return self._on_host(points)
        run = jaxpr_as_fun(self.jaxpr)
        stacked = [np.stack(leaves) for leaves in zip(*points, strict=True)]
        dealt = iter(stacked)
        arrays = [next(dealt) if moves else x for moves, x in zip(self.is_moving, self.arrays, strict=True)]
        axes = tuple(0 if moves else None for moves in self.is_moving)
        with wide_promotion():
            make = lambda: jax.vmap(lambda *xs: run(*xs), in_axes=axes)  # noqa: E731
            try:
                compiled = compiled_once(("points", axes, program_key(self.jaxpr)), make)
                return [np.asarray(out, np.float64) for out in compiled(*arrays)]
            except NotImplementedError:  # something that vmap does not know, such as a callback
                pass
            compiled = compiled_once(("point", program_key(self.jaxpr)), lambda: run)
            rows = []
            for n in range(len(points)):
                own = [x[n] if moves else x for moves, x in zip(self.is_moving, arrays, strict=True)]
                rows.append([np.asarray(out, np.float64) for out in compiled(*own)])
            return [np.stack(column) for column in zip(*rows, strict=True)]

    def _on_host(self, points):
        rows = []
        question = self.question
        likes = [x for x, yes in zip(question.leaves, question.is_array, strict=True) if yes]
        with wide_promotion():
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


def name_of(error: Exception | None) -> str:
    return type(error).__name__ if error is not None else "no gradient"
