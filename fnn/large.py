r"""Gradients of many entries: judged where they are, and only a few numbers of every leaf come back.

One compiled program takes the gradient of f in float64, measures what rounding does to it
(`rounding.spread`), takes yours, and reduces every leaf to its largest error. It says yes, or where to look
closer; no verdict of WRONG is its own. A gradient too large to be judged entry by entry at more points than
the given one is judged at another by a random projection: for a direction v of random signs, ⟨gradient, v⟩ is
the slope of f along v, which difference quotients of f give.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from .question import Evaluator, Point, Question, compiled_once, program_key, wide_promotion
from .report import RIGHT, Leaf
from .rounding import coarsest, hashed_factors, spread
from .truth import EPS, LIMIT, POINTS, STEPS, Reference, dealt, points_around, richardson

ALL_POINTS = 2e7  # numbers in one run, up to which all points are looked at
SAMPLES = 1  # of Monte-Carlo arithmetic for a first look: entries borrow from their rows and columns


class Largest(NamedTuple):
    """The entry of a leaf with the largest error, in rounding units: its index, yours, the truth."""

    units: Any
    index: Any
    got: Any
    expected: Any


class Look(NamedTuple):
    wide: list[Largest]  # the gradient in float64
    native: list[Largest]  # as it was returned
    is_suspicious: Any
    value: Any
    is_confirmed: Any  # the reference, by differences
    is_inside: Any  # f is finite around the point too


def look_at(
    question: Question,
    reference: Reference,
    mine: Evaluator,
    native: list[Any],
    eps: float,
    eps_native: float,
) -> tuple[tuple[Leaf, ...] | None, list[Point], str]:
    """The verdict on a right gradient: its leaves, their points, and the judge; no leaves if it may be wrong.

    Then those are the points to look at more closely.
    eps: of what the gradient computes with; eps_native: of its own dtype
    """
    rng = np.random.default_rng(question.seed)
    points = points_around(question, rng, POINTS if reference.work <= ALL_POINTS else POINTS[:1])
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in native):
        return None, points[:1], ""
    look, _ = _programs(question, reference, mine, eps, eps_native)
    worst: dict[int, Leaf] = {}
    n_confirmed = n_skipped = 0
    names = question.paths + (["value"] if question.has_value else [])
    for p, point in enumerate(points):
        question.tell("points", p, len(points))
        arrays = dealt(reference, point.theta)
        is_given = point is points[0]
        seen = look(arrays, list(native) if is_given and eps_native > EPS else [])
        if not is_given and not (np.isfinite(seen.value) and seen.is_inside):
            n_skipped += 1
            continue
        if seen.is_suspicious:
            return None, points[:1] if is_given else [points[0], point], ""
        n_confirmed += bool(seen.is_confirmed)
        for found in (seen.wide, seen.native):
            for n, largest in enumerate(found):
                leaf = _leaf(names[n], reference.gradient.out_avals[n].shape, largest, point.name)
                if n not in worst or leaf.units > worst[n].units:
                    worst[n] = leaf
    if n_skipped:
        question.notes.append(
            f"{n_skipped} of {len(points)} points skipped: f is not finite there, or around"
        )
    judge = reference.judge(n_confirmed, len(points))
    return tuple(worst[n] for n in range(len(names))), points, judge


def is_right_by_projection(
    question: Question, reference: Reference, mine: Evaluator, eps: float, eps_native: float
) -> bool:
    """Whether the gradient has the slope of f along one random direction, at one random point."""
    return _programs(question, reference, mine, eps, eps_native)[1](reference.arrays, question.seed)


def _leaf(name: str, shape: tuple[int, ...], largest: Largest, where: str) -> Leaf:
    index = tuple(int(i) for i in np.unravel_index(int(largest.index), shape))
    units, got, expected = float(largest.units), float(largest.got), float(largest.expected)
    return Leaf(name, tuple(shape), RIGHT, units, index, got, expected, where)


def _programs(
    question: Question, of: Reference, mine_: Evaluator, eps: float, eps_native: float
) -> tuple[Callable[[list[Any], list[Any]], Look], Callable[[list[Any], int], bool]]:
    """Two compiled functions of the float64 array leaves: a look at all entries, and the projection."""
    value, traced, wide_jaxpr = of.value, of.gradient, mine_.jaxpr
    reference, mine, f = spread(traced, SAMPLES), jaxpr_as_fun(wide_jaxpr), jaxpr_as_fun(value.jaxpr)
    eps_truth = max(EPS, coarsest(traced))
    of_arrays = np.flatnonzero(question.is_array)
    judged = [i for i, leaf in enumerate(of_arrays) if leaf in question.judged]
    n_gradient = len(judged)

    def first_look(arrays, native, seed):
        exact, noise = reference(*arrays)
        value_unit = noise[-1] + eps_truth * jnp.abs(exact[-1])
        largest = jnp.stack([jnp.abs(g).max() for g in exact[:-1]]).max()
        units = [_unit(u, g, eps_truth, largest) for u, g in zip(noise[:-1], exact[:-1], strict=True)]
        units.append(value_unit)
        got, suspicious, wide, own = mine(*arrays), jnp.zeros((), bool), [], []
        for n, value in enumerate(got):
            unit = units[n] * max(eps / eps_truth, 1.0) + 1e-4 * (
                eps_native if eps_native > EPS else 0
            ) * jnp.abs(exact[n])
            worst = _largest(value, exact[n], unit)
            wide.append(worst)
            suspicious |= ~(worst.units <= LIMIT)
            if n < n_gradient:  # where rounding flips a branch the unit is no rounding any more
                size = jnp.abs(exact[n]) + jnp.mean(jnp.abs(exact[n]))
                suspicious |= jnp.any((unit > 1e-7 * size) & (jnp.abs(value - exact[n]) > 1e-6 * size))
        for n, returned in enumerate(native):
            finfo = jnp.finfo(returned.dtype)
            ulp = max(eps_native, float(finfo.eps))
            unit = units[n] * (ulp / eps_truth) + ulp / 2 * jnp.abs(exact[n]) + float(finfo.tiny)
            worst = _largest(returned.astype(exact[n].dtype), exact[n], unit)
            own.append(worst)
            suspicious |= ~(worst.units <= LIMIT)
        directions = _directions(arrays, seed)
        slope, size = _slope(exact[:n_gradient], directions)
        agrees, inside = _agrees(arrays, directions, slope, size, value_unit)
        return Look(wide, own, suspicious, exact[-1], agrees, inside)

    def _directions(arrays, seed):
        """Random signs in each judged leaf's own size."""
        signs = hashed_factors(
            seed + 1000, [jax.ShapeDtypeStruct(arrays[i].shape, jnp.float64) for i in judged]
        )
        return [jnp.sign(s - 1) * _size(arrays[i]) for s, i in zip(signs, judged, strict=True)]

    def _slope(gradient, directions):
        products = [g * d for g, d in zip(gradient, directions, strict=True)]
        return sum(p.sum() for p in products), sum(jnp.abs(p).sum() for p in products)

    def moved(arrays, directions, h):
        places = list(arrays)
        for i, d in zip(judged, directions, strict=True):
            places[i] = places[i] + h * d
        return places

    def _agrees(arrays, directions, slope, size, value_unit):
        along = jax.lax.map(lambda h: f(*moved(arrays, directions, h))[0], jnp.asarray(STEPS))
        quotient, fine = richardson(along[None])
        doubt = jnp.abs(quotient - fine) + LIMIT * value_unit / STEPS[0] + 1e-9 * size
        return jnp.squeeze(jnp.abs(quotient - slope) <= 10 * doubt), jnp.isfinite(along).all()

    def projection(arrays, seed):
        """Whether the gradient has the slope of f along a random direction, at a random point."""
        places = moved(arrays, _directions(arrays, seed + 1), 1.0)
        directions = _directions(places, seed + 2)
        slope, size = _slope(mine(*places)[:n_gradient], directions)
        value = f(*places)[0]
        unit = 100 * eps_truth * jnp.abs(value) + eps * size * STEPS[0]
        agrees, inside = _agrees(places, directions, slope, size * max(1.0, eps / 1e-9), unit)
        return agrees | ~inside

    key = (program_key(traced), program_key(wide_jaxpr), program_key(value.jaxpr), eps, eps_native)

    # Seeds are arguments: XLA would compute what follows from constants while it compiles.
    def look(arrays, native):
        with wide_promotion():
            compiled = compiled_once(("large", key), lambda: first_look, runs_long=True)
            return jax.device_get(compiled(arrays, native, np.uint32(question.seed)))

    def project(arrays, seed):
        with wide_promotion():
            compiled = compiled_once(("projection", key), lambda: projection, runs_long=True)
            return bool(compiled(arrays, np.uint32(seed)))

    return look, project


def _size(x: Any) -> Any:
    size = jnp.mean(jnp.abs(x))
    return jnp.where(size > 0, size, 1.0)


def _unit(noise: Any, exact: Any, eps: float, largest_of_all: Any) -> Any:
    """Rounding units with the floors of `truth.py`, and one that makes up for few samples.

    Where noise varies it mostly does so by rows and columns, as δ aᵀ does: an entry takes at least the
    mean noise of all, times that of its slice along every axis in relation to it.
    """
    size = jnp.abs(exact)
    whole = jnp.mean(noise)
    shared = jnp.broadcast_to(whole, noise.shape)
    for axis in range(noise.ndim if noise.ndim > 1 else 0):
        others = tuple(a for a in range(noise.ndim) if a != axis)
        share = jnp.mean(noise, axis=others, keepdims=True) / jnp.where(whole > 0, whole, 1.0)
        shared = shared * share
    unit = jnp.maximum(jnp.maximum(noise, shared), jnp.maximum(eps / 2 * size, 0.1 * eps * size.max()))
    return jnp.where(unit > 0, unit, 1e-3 * eps * largest_of_all + 1e-300)


def _largest(got: Any, exact: Any, unit: Any) -> Largest:
    units = jnp.where(got == exact, 0.0, jnp.abs(got - exact) / unit)
    units = jnp.ravel(jnp.where(jnp.isfinite(got) & jnp.isfinite(exact), units, jnp.inf))
    at = jnp.argmax(units)
    return Largest(units[at], at, jnp.ravel(got)[at], jnp.ravel(exact)[at])
