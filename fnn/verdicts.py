r"""The verdict on every leaf of a gradient: right, wrong, at a kink, or autodiff at fault.

An error within the rounding units is none. Only where there is one is f looked at more closely: if its left
and right derivatives differ the point is a kink, and every slope between them is right; if they agree with
each other and not with autodiff, autodiff is at fault.

Source: Clarke (1983), *Optimization and Nonsmooth Analysis*, §2.1 and §2.5, for what is right at a kink.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .question import Evaluator, Numbers, Point, Question, as_it_is, compiled_once, program_key, trace
from .report import AT_FAULT, KINK, LOST, RIGHT, UNJUDGED, WRONG, Leaf
from .rounding import CUSTOM_JVP, carries_rules, noisy, primitives, random_factors, without_custom_rules
from .truth import EPS, LIMIT, SAMPLES, Truth, rms

STAGES = (1.0, 0.5, 0.25)  # of a step, from which a slope is extrapolated
ENTRIES = 48  # looked at one by one, by differences, where autodiff and the gradient disagree


class Verdicts:
    """The worst that was found of every leaf, over all points."""

    def __init__(
        self, question: Question, truth: Truth, points: list[Point], value: Evaluator, eps_native: float
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
        has_rule = value.jaxpr is not None and bool(primitives(value.jaxpr) & CUSTOM_JVP)
        is_often_doubtful = truth.is_confirmed[:3].sum() <= 1
        self.doubts_autodiff = [
            has_rule and not confirmed and (p == 0 or is_often_doubtful)
            for p, confirmed in enumerate(truth.is_confirmed)
        ]

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
            unit = self.unit[n][p] * max(eps / self.truth.eps, 1.0) + 1e-4 * self.eps_native * _finite_size(
                exact
            )
            units = _units(value, exact, unit)
            suspicious = units > LIMIT
            is_gradient = n < len(self.truth.gradient)
            if is_gradient:
                if p == 0:  # elsewhere NaN of both is nobody's question
                    suspicious |= ~np.isfinite(exact)
                elif not self.truth.is_confirmed[p]:  # nor is NaN alone where f is not smooth
                    suspicious &= ~np.isnan(value)
                    units = np.where(np.isnan(value), 0.0, units)
                # Where rounding flips a branch, as at a tie, the unit is no rounding any more.
                size = np.abs(exact) + np.median(np.abs(exact))
                suspicious |= (unit > 1e-7 * size) & (np.abs(value - exact) > 1e-6 * size)
                if self.doubts_autodiff[p] and not suspicious.any():
                    suspicious = np.ones_like(units, bool)  # both may be wrong
            verdict = RIGHT
            if suspicious.any():
                verdict = WRONG
                if is_gradient:
                    verdict, units, exact = self.look_closer(
                        n, p, value, exact, unit, units, suspicious, 1e-4, eps
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
            before = self.worst.get(n)
            is_wrong = before is not None and not before.is_right
            if before is not None and is_wrong and before.where == self.points[0].name:
                continue
            dtype = jnp.result_type(returned)
            if not jnp.issubdtype(dtype, jnp.floating):  # integers, which are a breach of contract
                dtype = jnp.dtype(np.float64)
            value, exact = np.asarray(returned).astype(np.float64), np.asarray(self.exact[n][0])
            own = max(eps, float(jnp.finfo(dtype).eps))
            unit = self.unit[n][0] * own / self.truth.eps + own / 2 * _finite_size(exact)
            unit = unit + float(jnp.finfo(dtype).tiny)
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
                verdict = LOST if is_right_wide and not is_wrong else WRONG
                if n < len(self.truth.gradient):
                    reach = min(max(1e-4, 64 * own), 0.05)
                    closer, units, exact = self.look_closer(
                        n, 0, value, exact, unit, units, units > LIMIT, reach, own
                    )
                    verdict = closer if closer != WRONG else verdict
            self.record(n, 0, verdict, units, value, exact)

    def autodiff_in_own_precision(self) -> list[Numbers]:
        """What autodiff itself loses in the dtype given, by its error and by Monte-Carlo arithmetic."""
        question = self.question
        arrays = question.arrays(None, as_it_is)
        f, _ = trace(lambda arrays: [question.value(arrays)], arrays)
        plain = question.value
        if f is not None and carries_rules(f):
            without = without_custom_rules(f)
            plain = lambda arrays: without(*arrays)[0]  # noqa: E731
        jaxpr, _ = trace(question.value_and_gradient(plain), arrays)
        if jaxpr is None:
            return [np.zeros_like(exact[0]) for exact in self.exact]
        run, avals = noisy(jaxpr)
        factors = random_factors(np.random.default_rng(question.seed), avals, SAMPLES)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            axes = (0,) + (None,) * len(arrays)
            compiled = compiled_once(("own", axes, program_key(jaxpr)), lambda: jax.vmap(run, in_axes=axes))
            samples = compiled(factors, *arrays)
        results = []
        for sample, exact in zip(samples, self.exact, strict=False):
            wide = np.asarray(sample).astype(np.float64)
            spread = np.sqrt(np.mean((wide[1:] - wide[:1]) ** 2, axis=0))
            results.append(np.maximum(spread, np.abs(wide[0] - exact[0])))
        return results

    def look_closer(self, n, p, value, exact, unit, units, suspicious, reach, eps):
        """One-sided derivatives of f at suspicious entries: is it a kink, or is autodiff at fault?

        Returns the verdict, and units and truth with those corrected.
        """
        entries = np.flatnonzero(suspicious)
        worst = entries[np.argsort(-np.nan_to_num(units.flat[entries], nan=np.inf), kind="stable")]
        n_moving = sum(x.size for x in self.points[p].theta)
        most = int(min(ENTRIES, max(1, 3e7 // (6 * n_moving))))  # each is looked at in six copies of all
        entries = worst
        if len(worst) > most:  # the worst, and a few of all
            first = max(1, 2 * most // 3)
            entries = np.concatenate(
                [worst[:first], worst[first :: max(1, len(worst) // (most - first + 1))]]
            )[:most]
        column = self.question.moving.index(self.question.judged[n])
        x = self.points[p].theta[column]
        size = float(rms(x)) or 1.0
        steps = reach * np.maximum(np.abs(x.flat[entries]), size)
        if self.question.outputs is not None:
            left, right, doubt = self.along_tangent(n, p, entries, reach)
        else:
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
            both_nan = np.isnan(value.flat[e]) and np.isnan(exact.flat[e])
            if both_nan and p > 0:
                verdicts.add(UNJUDGED)
                continue
            if is_kink:
                if not nearby and self.truth.gradient_at is not None:
                    nearby.append(self.gradients_nearby(n, p, steps))
                if nearby:
                    low, high = nearby[0][:, e].min(initial=low), nearby[0][:, e].max(initial=high)
                # The unit knows the kink too, where rounding flips its branch: it is no slack.
                rounding = LIMIT * min(unit.flat[e], eps * max(abs(low), abs(high)))
                slack = doubt[k] + rounding + 1e-2 * jump
                if low - slack <= value.flat[e] <= high + slack:
                    units.flat[e] = 0.0
                    verdicts.add(KINK)
                else:
                    if both_nan:
                        units.flat[e], exact.flat[e] = np.inf, (low + high) / 2
                    verdicts.add(WRONG)
                continue
            middle = (low + high) / 2
            largest = max(abs(low), abs(high), float(np.nan_to_num(abs(value.flat[e]), posinf=0.0)))
            rounding = 4 * LIMIT * self.truth.value_unit[p] / steps[k]
            is_doubtful = doubt[k] > max(0.02 * largest, 4 * rounding)
            if is_doubtful and not np.isfinite(exact.flat[e]):
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
            is_right = RIGHT if self.truth.gradient_at is None else AT_FAULT
            verdicts.add(is_right if units.flat[e] <= LIMIT else WRONG)
        if KINK in verdicts and self.question.outputs is None:
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
            places.append([np.asarray(x + reach * rng.standard_normal(x.shape)) for x in theta])
        assert self.truth.gradient_at is not None
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
        theta, rows = self.points[p].theta, []
        for parts, step in zip(moves, steps, strict=True):
            for sign in (1, -1):
                for stage in STAGES:
                    moved = list(theta)
                    for column, entries, values in parts:
                        moved[column] = np.array(moved[column])
                        moved[column].flat[entries] += sign * stage * step * np.asarray(values)
                    rows.append(moved)
        n = len(rows)
        is_large = sum(x.size for x in theta) > 1e5
        values = self.value(rows + [theta] * (1 if is_large else _padded(n + 1) - n))[0]
        table = values[:n].reshape(len(moves), 2, len(STAGES))
        return _slopes(table, values[-1], np.asarray(steps), LIMIT * self.truth.value_unit[p])

    def along_tangent(self, n: int, p: int, entries: Numbers, reach: float) -> tuple[Numbers, ...]:
        """As `one_sided`, of entries of a function's output along the tangent ẋ of its arguments x."""
        question, theta = self.question, self.points[p].theta
        n_weights, n_primals = len(question.judged), (len(theta) - len(question.judged)) // 2
        xs, x_dots = theta[n_weights:][:n_primals], theta[n_weights + n_primals :]
        size = max((float(rms(x_dot)) / (float(rms(x)) or 1.0) for x, x_dot in zip(xs, x_dots, strict=True)))
        step, rows = reach / (size or 1.0), []
        for t in [sign * stage * step for sign in (1, -1) for stage in STAGES] + [0.0]:
            moved = [np.asarray(x + t * x_dot) for x, x_dot in zip(xs, x_dots, strict=True)]
            rows.append([*theta[:n_weights], *moved, *x_dots])

        def outputs(arrays):
            assert question.outputs is not None
            out = question.outputs(*question.build(arrays)[1])
            return [o for o in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(o), jnp.floating)]

        values = Evaluator(question, outputs, self.value.arrays)(rows)[n].reshape(len(rows), -1)[:, entries]
        table = values[:-1].T.reshape(len(entries), 2, len(STAGES))
        at = values[-1]
        noise = LIMIT * EPS * np.maximum(np.abs(at), np.abs(table).max(axis=(1, 2)))
        return _slopes(table, at[:, None, None], np.full(len(entries), step), noise)


def _slopes(table: Numbers, at: Numbers, steps: Numbers, noise: Numbers) -> tuple[Numbers, ...]:
    """Left and right slopes from values (entry, side, stage), extrapolated, and their doubt."""
    h = steps[:, None, None] * np.asarray(STAGES)
    slopes = (table - at) / h * np.array([1, -1])[:, None]
    coarse = 2 * slopes[..., 1] - slopes[..., 0]
    fine = 2 * slopes[..., 2] - slopes[..., 1]
    best = (4 * fine - coarse) / 3
    doubt = np.abs(best - fine).max(axis=1) + noise / (steps * STAGES[-1])
    return best[:, 1], best[:, 0], doubt


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
