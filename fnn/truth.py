r"""The truth about a gradient: autodiff in float64, its rounding units, and who confirms it.

At every point the gradient of f is taken in float64, past rules that f carries (`custom_vjp`), so that no
rule is its own judge, and once more with rounding made audible (`rounding.py`): how far it scatters is the
unit in which errors are counted. Difference quotients of f along a random direction confirm it. Where JAX
cannot differentiate f, differences are all there is: Richardson's extrapolation, entry by entry.

Source: Ridders (1982), *Accurate computation of F′(x) and F′(x) F″(x)*, for the extrapolation and its error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from .question import (
    Evaluator,
    Numbers,
    Point,
    Question,
    compiled_once,
    name_of,
    program_key,
    trace,
    wide_array,
    wide_promotion,
)
from .rounding import carries_rules, coarsest, noisy, random_factors, spread, without_custom_rules

SAMPLES = 8  # runs of Monte-Carlo arithmetic: the spread of 8 is ten times too small once in 10^7
LIMIT = 16.0  # rounding units allowed; what right gradients reach is in experiments/benchmarks
BUDGET = 2e7  # numbers in all runs at all points together; what is larger goes to `large.py` first
EPS = float(np.finfo(np.float64).eps)


@dataclass
class Truth:
    """The gradient at every point (first axis), what rounding explains of it, and who says so."""

    gradient: list[Numbers]
    unit: list[Numbers]  # of float64's rounding
    value: Numbers
    value_unit: Numbers
    eps: float  # the coarsest that the reference itself computes with
    is_confirmed: Numbers  # by differences along a direction, for every point
    is_inside: Numbers  # f is finite around the point too
    judge: str
    gradient_at: Evaluator | None  # at other points, by autodiff


POINTS = ("as given", "moved", "moved again", "ten times", "zeros", "mirrored")


def points_around(question: Question, rng: np.random.Generator, names: Sequence[str] = POINTS) -> list[Point]:
    """The point given and others: each leaf moved at random by its own size, ten times, zeros, mirrored."""
    given = [np.asarray(question.leaves[i]).astype(np.float64) for i in question.moving]
    is_judged = [i in question.judged for i in question.moving]

    def size(x):
        return float(rms(x)) or 1.0

    def moved():
        return [np.asarray(x + size(x) * rng.standard_normal(x.shape)) for x in given]

    def each(change):  # cotangents keep their size: they only move at random
        return [np.asarray(change(x)) if judged else x for x, judged in zip(given, is_judged, strict=True)]

    make = {
        "as given": lambda: given,
        "moved": moved,
        "moved again": moved,
        "ten times": lambda: each(lambda x: 10 * x),
        "zeros": lambda: each(np.zeros_like),
        "mirrored": lambda: each(np.negative),
    }
    return [Point(name, make[name]()) for name in names]


@dataclass
class Reference:
    """f and its gradient by autodiff, traced in float64; neither if JAX cannot."""

    value: Evaluator
    arrays: list[Any]
    gradient: Any  # a jaxpr: the gradient's leaves, the value last
    is_past_rules: bool  # f carries rules of a user's, which were passed over

    @cached_property
    def work(self) -> int:
        """How many numbers are rounded in one run."""
        avals = [] if self.gradient is None else noisy(self.gradient)[1]
        return sum(int(np.prod(aval.shape)) for aval in avals)

    @property
    def is_large(self) -> bool:
        """Whether all points at once, with all samples, would be too much."""
        return len(POINTS) * SAMPLES * self.work > BUDGET

    def judge(self, n_confirmed: int, n_points: int) -> str:
        """Who says so, in words."""
        past = ", past the custom rule that f carries" if self.is_past_rules else ""
        by = f"confirmed by differences of f along a direction at {n_confirmed} of {n_points} points"
        return f"autodiff in float64{past}, {by}"


def reference_of(question: Question) -> Reference:
    with wide_promotion():
        arrays = jax.device_put(question.arrays(None, wide_array))
    value = Evaluator(question, lambda arrays: [question.value(arrays)], arrays)
    if (
        value.jaxpr is None
        and isinstance(value.error, ValueError | TypeError)
        and "f needs to return" in str(value.error)
    ):
        raise value.error
    if value.jaxpr is None:
        return Reference(value, arrays, None, False)
    has_rule = carries_rules(value.jaxpr)
    plain = without_custom_rules(value.jaxpr) if has_rule else jaxpr_as_fun(value.jaxpr)
    with wide_promotion():
        traced, _ = trace(question.value_and_gradient(lambda arrays: plain(*arrays)[0]), arrays)
    return Reference(value, arrays, traced, has_rule)


def find_truth(
    question: Question, reference: Reference, points: list[Point], rng: np.random.Generator
) -> Truth:
    """Autodiff in float64 at every point, with its rounding units and its confirmation."""
    value, traced = reference.value, reference.gradient
    if traced is None:
        return _by_differences(question, points, value)
    directions, offsets = _offsets(question, points, rng)
    run = _one_by_one if reference.is_large else _at_once
    exact, spreads, along = run(question, reference, points, offsets, rng)
    exact, values = exact[:-1], exact[-1]
    eps = max(EPS, coarsest(traced))
    value_unit = spreads[-1] + eps * np.abs(values)
    units = _floored(spreads[:-1], exact, eps)
    confirmed = _confirmed(question, along, exact, directions, value_unit)
    judge = reference.judge(int(confirmed.sum()), len(points))
    inside = np.isfinite(along).all(axis=1)
    at_points = Evaluator.of_jaxpr(question, traced, reference.arrays)
    return Truth(exact, units, values, value_unit, eps, confirmed, inside, judge, at_points)


def dealt(reference: Reference, columns: Iterable[Any]) -> list[Any]:
    """All array leaves, those that move taken from the columns."""
    columns = iter(columns)
    is_moving = reference.value.is_moving
    return [next(columns) if moves else x for moves, x in zip(is_moving, reference.arrays, strict=True)]


def _at_once(
    question: Question,
    reference: Reference,
    points: list[Point],
    offsets: list[Numbers],
    rng: np.random.Generator,
):
    """The gradient with its spread at every point, and f around it: one program, all runs along one axis."""
    traced, value = reference.gradient, reference.value
    run, avals = noisy(traced)
    f = jaxpr_as_fun(value.jaxpr)
    axes = [0 if moves else None for moves in value.is_moving]

    def program(factors, arrays, moved):
        samples = jax.vmap(lambda factors, arrays: run(factors, *arrays), in_axes=(0, axes))(factors, arrays)
        return samples, jax.vmap(lambda arrays: f(*arrays)[0], in_axes=(axes,))(moved)

    # Points after points: nested axes would be traced twice.
    n_points, n_runs = len(points), SAMPLES + 1
    at = [np.stack(x) for x in zip(*(point.theta for point in points), strict=True)]
    at = dealt(reference, (np.repeat(x, n_runs, axis=0) for x in at))
    moved = dealt(reference, (x.reshape(-1, *x.shape[2:]) for x in offsets))
    factors = random_factors(rng, avals, SAMPLES)
    factors = [np.tile(x, (n_points,) + (1,) * (x.ndim - 1)) for x in factors]
    with wide_promotion():
        key = ("truth", tuple(axes), program_key(traced), program_key(value.jaxpr))
        runs, along = jax.device_get(compiled_once(key, lambda: program)(factors, at, moved))
    runs = [np.asarray(x, np.float64).reshape(n_points, n_runs, *x.shape[1:]) for x in runs]
    exact = [np.array(x[:, 0]) for x in runs]  # writable: corrected where autodiff is at fault
    return exact, [rms(x[:, 1:] - x[:, :1], axis=1)[:, 0] for x in runs], along.reshape(n_points, -1)


def _one_by_one(
    question: Question,
    reference: Reference,
    points: list[Point],
    offsets: list[Numbers],
    rng: np.random.Generator,
):
    """As `_at_once`, in little memory: point after point and run after run."""
    traced, value = reference.gradient, reference.value
    measured, f = spread(traced, SAMPLES), jaxpr_as_fun(value.jaxpr)
    rows = []
    with wide_promotion():
        at_point = compiled_once(
            ("spread", program_key(traced)), lambda: lambda xs: measured(*xs), runs_long=True
        )
        of_f = compiled_once(("f", program_key(value.jaxpr)), lambda: lambda xs: f(*xs)[0])
        for p, point in enumerate(points):
            exact, spreads = jax.device_get(at_point(dealt(reference, point.theta)))
            around = [dealt(reference, (x[p, step] for x in offsets)) for step in range(len(STEPS))]
            rows.append((exact, spreads, [float(of_f(place)) for place in around]))
            question.tell("a closer look", p + 1, len(points))
    exact, spreads = (
        [np.stack(leaf) for leaf in zip(*(row[k] for row in rows), strict=True)] for k in (0, 1)
    )
    return exact, spreads, np.array([row[2] for row in rows])


STEPS = (1e-4, -1e-4, 5e-5, -5e-5)  # in units of a leaf's size: small, so that few kinks lie between


def _offsets(question: Question, points: list[Point], rng: np.random.Generator):
    """A direction at every point, of each leaf's own size, and the places around it where f is evaluated."""
    directions, offsets = [], []
    for column, i in enumerate(question.moving):
        at = np.stack([point.theta[column] for point in points])
        size = rms(at, tuple(range(1, at.ndim)))
        direction = np.where(size > 0, size, 1.0) * rng.standard_normal(at.shape)
        if i not in question.judged:
            direction = np.zeros_like(at)
        directions.append(direction)
        steps = np.reshape(STEPS, (1, 4) + (1,) * (at.ndim - 1))
        offsets.append(at[:, None] + steps * direction[:, None])
    return directions, offsets


def _confirmed(question, along, exact, directions, value_unit) -> Numbers:
    """Whether Richardson's difference quotient agrees with autodiff along the direction, point by point."""
    quotient, fine = richardson(along)
    judged = [d for d, i in zip(directions, question.moving, strict=True) if i in question.judged]
    slope = sum((g * d).reshape(len(g), -1).sum(axis=1) for g, d in zip(exact, judged, strict=True))
    size = sum(np.abs(g * d).reshape(len(g), -1).sum(axis=1) for g, d in zip(exact, judged, strict=True))
    doubt = np.abs(quotient - fine) + LIMIT * value_unit / STEPS[0] + 1e-9 * size
    return np.abs(quotient - slope) <= 10 * doubt


def richardson(along: Any) -> tuple[Any, Any]:
    """The extrapolated difference quotient, from values of f at all STEPS (last axis), and the finer one."""
    h = STEPS[0]
    coarse, fine = (along[:, 0] - along[:, 1]) / (2 * h), (along[:, 2] - along[:, 3]) / h
    return (4 * fine - coarse) / 3, fine


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


def _by_differences(question: Question, points: list[Point], value: Evaluator) -> Truth:
    """Where autodiff cannot serve: central differences of f, extrapolated twice, entry by entry."""
    question.notes.append(
        f"f cannot be differentiated by JAX ({name_of(value.error)}); judged by differences"
    )
    used = points[:2]
    gradients, units, values, value_units = [], [], [], []
    n_done, n_all = 0, len(used) * sum(np.size(question.leaves[i]) for i in question.judged)
    for point in used:
        (at,) = value([point.theta])
        noise = max(8 * EPS * abs(float(at[0])), _noise(point, value))
        per_leaf, per_unit = [], []
        for column, i in enumerate(question.moving):
            if i not in question.judged:
                continue
            x = point.theta[column]
            size = float(rms(x)) or 1.0
            gradient, unit = np.zeros(x.size), np.zeros(x.size)
            for entry in range(x.size):
                h = 0.02 * max(abs(x.flat[entry]), size)
                table: list[list[float]] = []
                best, error = 0.0, np.inf
                for level in range(7):
                    step = h / 2**level
                    places = []
                    for sign in (1, -1):
                        moved = np.array(x)
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
                n_done += 1
                question.tell("differences of f", n_done, n_all)
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
    return Truth(
        exact,
        stacked,
        np.array(values),
        np.array(value_units),
        EPS,
        np.ones(len(used), bool),
        np.ones(len(used), bool),
        judge,
        None,
    )


def _noise(point: Point, value: Evaluator) -> float:
    """How far values of f scatter on a short way: its own rounding, float32's perhaps.

    By the median of the second differences, in which a curve as good as vanishes and a kink counts once.
    """
    rng = np.random.default_rng(0)
    directions = [(float(rms(x)) or 1.0) * rng.choice([-1.0, 1.0], x.shape) for x in point.theta]
    near = [
        [np.asarray(x + 1e-7 * k * d) for x, d in zip(point.theta, directions, strict=True)]
        for k in range(-4, 5)
    ]
    second = np.abs(np.diff(value(near)[0], 2))
    return 4 * float(np.median(second)) if np.isfinite(second).all() else 0.0


def rms(x: Numbers, axis: Any = None) -> Numbers:
    """The root of the mean square, which does not overflow; 0 for an array of zeros."""
    largest = np.max(np.abs(x), axis=axis, keepdims=True)
    scaled = x / np.where(largest > 0, largest, 1.0)  # of NaN and inf: NaN
    rms = largest * np.sqrt(np.mean(scaled**2, axis=axis, keepdims=True))
    return np.asarray(rms if axis is not None else rms.reshape(()))
