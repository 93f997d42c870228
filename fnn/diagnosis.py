"""Why a gradient is wrong: the mistakes people make, each tried on the numbers and stated with evidence."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

CLOSE = 1e-6  # relative to the truth's length: how well a hypothesis has to explain the numbers
MOST = 6  # sentences
Numbers = Any  # NumPy: an array, or a number where the shape is ()


@dataclass
class Evidence:
    """What is known when a gradient was found wrong, everything in float64.

    got, truth, params: one array per leaf, at the point given; `got` is None where there is none
    sizes: axis lengths of the arguments, among which a forgotten N may be
    elsewhere: (point, got, truth) at other points
    native: as the gradient was returned, in its own dtype

    What is asked for only when nothing simpler fits:
    sums: the sums and products of the reference, (operation, what went in, what came out)
    tanh_form: the gradient if f had GELU's tanh form where it has erf; None if it has no erf
    origin: where the NaN or inf of a leaf first arises, in words
    """

    paths: list[str]
    got: list
    truth: list
    params: list
    sizes: list[int]
    verdicts: list[str] = field(default_factory=list)
    elsewhere: list[tuple] = field(default_factory=list)
    is_wide: bool = False
    computes_with: float = 0.0
    own_eps: float = 0.0  # of the dtype in which it was returned
    native: list = field(default_factory=list)
    sums: Callable[[], list] = list
    tanh_form: Callable[[], list | None] = lambda: None
    origin: Callable[[int], str] = lambda n: ""


def diagnose(evidence: Evidence) -> tuple[str, ...]:
    """Sentences for what fits, the most telling first."""
    sentences: list[str] = []
    for sentence in _all(evidence):
        if sentence not in sentences:
            sentences.append(sentence)
    return tuple(sentences[:MOST])


def _all(e: Evidence) -> Iterator[str]:
    wrong = [n for n in range(len(e.paths)) if e.got[n] is not None and _is_wrong(e, n)]
    yield from _shapes(e)
    yield from _nonfinite(e, wrong)
    yield from _lost_digits(e, wrong)
    close = 1e-12 if e.is_wide else 1e-9
    anywhere, wrong = wrong, [n for n in wrong if not _same(e.got[n], e.truth[n], close)]
    compared = [n for n in wrong if _comparable(e, n)]
    # Of a single number everything is a multiple: it has no vote where there are others.
    several = [n for n in compared if e.got[n].size > 1] or compared
    factors = {n: _factor(e.got[n], e.truth[n]) for n in several}
    common = {f"{f:.9g}" for f in factors.values() if f is not None}
    explained = set()
    if factors and None not in factors.values() and len(common) == 1:
        factor = next(iter(factors.values()))
        assert factor is not None
        where = "every leaf" if len(factors) == len(e.paths) else ", ".join(e.paths[n] for n in factors)
        yield f"off by a constant factor of {_named(factor, e.sizes)} in {where}"
        explained |= set(factors)
        if not _known(factor, e.sizes) and _factor_varies(e) and e.got[several[0]].size > 1:
            yield "right in direction but not in length: the factor changes from point to point"
    for n in wrong:
        if not _comparable(e, n) or n in explained:
            continue
        for sentence in _leaf(e, n):
            yield f"{e.paths[n]}: {sentence}"
            explained.add(n)
    yield from _exchanged(e, wrong)
    yield from _points(e, anywhere)
    yield from _layers(e, wrong)


def _comparable(e: Evidence, n: int) -> bool:
    got, truth = e.got[n], e.truth[n]
    if got is None or got.shape != truth.shape:
        return False
    return bool(np.isfinite(got).all() and np.isfinite(truth).all())


def _is_wrong(e: Evidence, n: int) -> bool:
    return not e.verdicts or e.verdicts[n].startswith("WRONG")


def _near(a: Numbers, b: Numbers, close: float = CLOSE) -> bool:
    size = float(np.linalg.norm(b))
    return a.shape == b.shape and size > 0 and bool(np.linalg.norm(a - b) <= close * size)


def _explains(hypothesis: Numbers, got: Numbers, truth: Numbers) -> bool:
    """Whether what came is the hypothesis: all but a thousandth of its distance from the truth is gone."""
    error = float(np.linalg.norm(got - truth))
    left = float(np.linalg.norm(got - hypothesis))
    return error > 0 and left <= 1e-3 * error + 1e-13 * float(np.linalg.norm(truth))


def _factor(got: Numbers, truth: Numbers) -> float | None:
    """c if got = c·truth, c ≠ 1."""
    square = float(np.vdot(truth, truth))
    if not square or not np.isfinite(square):
        return None
    c = float(np.vdot(truth, got)) / square
    if c == 0:
        return 0.0 if not got.any() else None
    if abs(c - 1) < 1e-6:
        return None
    return c if _explains(c * truth, got, truth) else None


def _known(c: float, sizes: list[int]) -> str:
    simple = Fraction(c).limit_denominator(4)
    named = [(float(simple), str(simple))] if abs(simple.numerator) <= 4 else []
    for n in sizes:
        named += [(float(n), f"N = {n}"), (1 / n, f"1/N, N = {n}"), (1 - 1 / n, f"1 - 1/N, N = {n}")]
        named += [(n / (n - 1), f"N/(N - 1), N = {n}"), (n**-0.5, f"1/√N, N = {n}"), (n**0.5, f"√N, N = {n}")]
        named += [(2.0 / n, f"2/N, N = {n}"), (n / 2.0, f"N/2, N = {n}"), (n**-2.0, f"1/N², N = {n}")]
    for value, name in named:
        if abs(c - value) <= 1e-6 * max(abs(value), 1e-3):
            return name
    return ""


def _named(c: float, sizes: list[int]) -> str:
    known = _known(c, sizes)
    return f"{c:.6g}" + (f" ({known})" if known and known != f"{c:.6g}" else "")


def _factor_varies(e: Evidence) -> bool:
    factors = []
    for _, got, truth in e.elsewhere:
        for g, t in zip(got, truth, strict=True):
            if np.isfinite(g).all() and np.isfinite(t).all() and t.any():
                c = float(np.vdot(t, g) / np.vdot(t, t))
                if c and _near(g, c * t, 1e-6 * abs(c)):
                    factors.append(c)
    return len({f"{c:.4g}" for c in factors}) > 1


def _shapes(e: Evidence) -> Iterator[str]:
    for n, path in enumerate(e.paths):
        got, truth = e.got[n], e.truth[n]
        if got is None or got.shape == truth.shape:
            continue
        name = path
        if got.ndim == truth.ndim == 2 and got.shape == truth.T.shape and _near(got.T, truth):
            yield f"{name}: transposed"
            continue
        if got.size == truth.size and _near(got.reshape(truth.shape), truth):
            yield f"{name}: right numbers in the wrong shape; it would only broadcast"
            continue
        for axis in range(got.ndim):
            if got.sum(axis=axis).shape == truth.shape and _near(got.sum(axis=axis), truth):
                yield f"{name}: not summed over axis {axis}: it still has one row per example"
                break
            if _near(got.sum(axis=axis, keepdims=True).reshape(-1), truth.reshape(-1)):
                yield f"{name}: not summed over axis {axis}"
                break
        else:
            for sentence in _sums(e, n):
                yield f"{name}: {sentence}"


def _nonfinite(e: Evidence, wrong: list[int]) -> Iterator[str]:
    for n in wrong:
        source = e.native[n] if e.native and not np.isfinite(e.native[n]).all() else e.got[n]
        bad = (
            ~np.isfinite(source) & np.isfinite(e.truth[n])
            if source.shape == e.truth[n].shape
            else np.zeros(0)
        )
        if bad.any():
            at = [int(i) for i in np.argwhere(bad)[0]]
            x = e.params[n][tuple(at)] if at else float(e.params[n])
            kind = "NaN" if np.isnan(source[bad]).any() else "inf"
            origin = e.origin(n) or "an overflow on the way, or 0/0"
            yield (
                f"{e.paths[n]}: {kind} where the truth is finite, in {int(bad.sum())} of {bad.size} entries, "
                f"first at {at}, where the parameter is {x:.4g}: {origin}"
            )


def _lost_digits(e: Evidence, wrong: list[int]) -> Iterator[str]:
    for n in wrong:
        if e.is_wide or not e.native or not np.isfinite(e.native[n]).all():
            continue
        if _same(e.got[n], e.truth[n]):
            apart = np.abs(e.native[n] - e.truth[n]) / np.maximum(np.abs(e.truth[n]), 1e-300)
            if apart.max() <= 16 * e.own_eps:
                continue
            yield (
                f"{e.paths[n]}: right in float64, but off by up to {float(apart.max()):.2g} of an entry in "
                "its own dtype: it loses digits that autodiff keeps, to cancellation or in a long sum"
            )


def _leaf(e: Evidence, n: int) -> Iterator[str]:
    got, truth, params = e.got[n], e.truth[n], e.params[n]
    error = got - truth
    c = _factor(got, truth)
    if c is not None:
        yield f"off by a constant factor of {_named(c, e.sizes)}"
        return
    if got.ndim == 2 and got.shape[0] == got.shape[1] and _explains(truth.T, got, truth):
        yield "transposed"
        return
    k = _proportion(error, params)
    if k is not None:
        yield (
            f"a term {-k:.6g}·parameter is missing: a penalty"
            if k < 0
            else f"a term {k:.6g}·parameter too much"
        )
        return
    if error.size > 1 and error.any() and np.allclose(error, error.flat[0], rtol=1e-6, atol=0):
        yield f"off by the same number everywhere, {error.flat[0]:.6g}"
        return
    if got.ndim >= 1 and got.shape[0] > 1:
        rows = np.abs(error).reshape(len(error), -1).max(axis=1)
        bad = np.flatnonzero(rows > 1e-9 * np.abs(truth).max())
        if len(bad) == 1 and bad[0] in (0, len(rows) - 1):
            which = "last" if bad[0] else "first"
            row = "row" if got.ndim > 1 else "entry"
            left_out = ": an example left out?" if not got[bad[0]].any() else ""
            yield f"only the {which} {row} is wrong, of {len(rows)}{left_out}"
            return
        if len(bad) == 2 and _near(got[bad[::-1]], truth[bad], 1e-6):
            yield f"rows {bad[0]} and {bad[1]} exchanged"
            return
        if got.shape[0] > 2 and _explains(truth[::-1], got, truth):
            yield "in reversed order along axis 0"
            return
    bad = np.abs(error) > 1e-9 * max(float(np.abs(truth).max()), 1e-300)
    if got.size > 2 and bad.sum() == 1:
        yield f"a single entry is wrong, {[int(i) for i in np.argwhere(bad)[0]]}"
        return
    for axis in range(got.ndim):
        mean = truth.mean(axis=axis, keepdims=True)
        if got.shape[axis] > 1 and _near(error, -np.broadcast_to(mean, truth.shape)):
            yield f"the mean over axis {axis} is subtracted"
            return
    if _near(np.abs(got), np.abs(truth)) and (got * truth < 0).any():
        yield f"the sign is wrong in {int((got * truth < 0).sum())} of {got.size} entries, the size is right"
        return
    if (got == 0).all(where=bad) and bad.any():
        yield f"zero in {int(bad.sum())} of {got.size} entries where the truth is not"
        return
    for sentence in _sums(e, n):
        yield sentence
        return
    other = e.tanh_form()
    if other is not None and _explains(other[n], got, truth):
        yield "right up to the tanh form of GELU: f has erf, and yours is the derivative of the approximation"
        return
    size = float(np.linalg.norm(error) / max(float(np.linalg.norm(truth)), 1e-300))
    single = float(np.finfo(np.float32).eps)
    if (
        e.is_wide
        and (e.computes_with >= single / 2 or np.array_equal(got, got.astype(np.float32)))
        and size < 1e-4
    ):
        yield f"precision drops to float32 or less on the way: the relative error is {size:.1e}"
        return
    if 1e-6 < size < 3e-3:
        yield f"right up to a relative error of {size:.1e}: an approximation?"


def _sums(e: Evidence, n: int) -> Iterator[str]:
    """The sum over examples that makes this leaf, done wrong: over another axis, or without some of them."""
    got, truth = e.got[n], e.truth[n]
    for eqn, ins, out in e.sums():
        c = _scale(out, truth)
        if c is None:
            continue
        for words, other in _other_sums(eqn, ins, out):
            factor = _scale(other, got)
            if factor is None:
                continue
            if abs(factor / c - 1) <= CLOSE:
                yield words
                return
            if _known(factor / c, e.sizes):
                yield f"{words}, times {_named(factor / c, e.sizes)}"
                return
        if eqn.primitive.name == "dot_general" and got.shape == truth.shape and got.ndim == 2:
            for factor, axis in zip(ins, _contracted(eqn) or (), strict=False):
                rows = np.moveaxis(factor, axis, 0)
                alone = _only_example(rows, got - truth)
                if alone is not None:
                    yield f"only example {alone} of {len(rows)} is wrong: the error lies along its numbers"
                    return


def _contracted(eqn: Any) -> tuple[int, int] | None:
    """The axes that a product of two arrays sums over, if it is one axis of each and no batch."""
    (left, right), batch = eqn.params["dimension_numbers"]
    return (left[0], right[0]) if len(left) == 1 and not any(batch) else None


def _scale(x: Numbers, y: Numbers) -> float | None:
    """c if y = c·x, up to a transposition and axes of length 1."""
    for shaped in (x, x.T):
        if shaped.size == y.size and np.isfinite(shaped).all() and shaped.any() and np.isfinite(y).all():
            if np.squeeze(shaped).shape == np.squeeze(y).shape:
                shaped = shaped.reshape(y.shape)
                c = float(np.vdot(shaped, y) / np.vdot(shaped, shaped))
                if c and _near(y, c * shaped):
                    return c
    return None


def _other_sums(eqn: Any, ins: list, out: Numbers) -> Iterator[tuple[str, Numbers]]:
    """What a sum, or a matrix product, would be over other axes, and without its first or last term."""
    if eqn.primitive.name == "reduce_sum":
        (x,), axes = ins, tuple(eqn.params["axes"])
        for other in combinations(range(x.ndim), len(axes)):
            if other != axes:
                words = f"summed over axis {_listed(other)} of {x.shape}, in place of axis {_listed(axes)}"
                yield words, x.sum(axis=other)
        for axis in axes:
            for which, place in (("first", 0), ("last", -1)):
                if x.shape[axis] > 1:
                    rest = tuple(a - (a > axis) for a in axes if a != axis)
                    left_out = x.take(place, axis=axis).sum(axis=rest)
                    yield f"the {which} of {x.shape[axis]} examples is left out", out - left_out
        return
    axes = _contracted(eqn)
    if axes is None:
        return
    (x, y), (i, j) = ins, axes
    for k in range(x.ndim):
        for l in range(y.ndim):
            if (k, l) != (i, j) and x.shape[k] == y.shape[l]:
                words = f"a product summed over axis {k} of {x.shape} and {l} of {y.shape}"
                yield f"{words}, in place of {i} and {j}", np.tensordot(x, y, (k, l))
    for which, place in (("first", 0), ("last", -1)):
        if x.shape[i] > 1:
            left_out = np.multiply.outer(x.take(place, axis=i), y.take(place, axis=j))
            yield f"the {which} of {x.shape[i]} examples is left out", out - left_out


def _listed(axes: tuple[int, ...]) -> str:
    return ", ".join(map(str, axes))


def _only_example(rows: Numbers, error: Numbers) -> int | None:
    """n if all rows, or all columns, of an error are multiples of the numbers of example n alone."""
    if rows.ndim != 2 or len(rows) < 2 or not error.any():
        return None
    found = []
    for n, row in enumerate(rows):
        for matrix in (error, error.T):
            if matrix.shape[1] == row.size > 1 and row.any():
                along = np.outer(matrix @ row / (row @ row), row)
                if _near(along, matrix):
                    found.append(n)
    return found[0] if len(found) == 1 else None


def _proportion(error: Numbers, params: Numbers) -> float | None:
    if error.shape != params.shape or not params.any() or error.size < 2:
        return None
    k = float(np.vdot(params, error) / np.vdot(params, params))
    return k if k and _near(error, k * params, 1e-4) else None


def _exchanged(e: Evidence, wrong: list[int]) -> Iterator[str]:
    for i in wrong:
        for j in wrong:
            both = i < j and _comparable(e, i) and _comparable(e, j)
            if both and _near(e.got[i], e.truth[j]) and _near(e.got[j], e.truth[i]):
                yield f"{e.paths[i]} and {e.paths[j]} are exchanged"


def _points(e: Evidence, wrong: list[int]) -> Iterator[str]:
    if not wrong or not e.elsewhere:
        return
    everywhere = [all(_same(g, t) for g, t in zip(got, truth, strict=True)) for _, got, truth in e.elsewhere]
    names = [name for name, _, _ in e.elsewhere]
    here = all(_same(g, t) for g, t in zip(e.got, e.truth, strict=True))
    here_too = all(np.isfinite(x).all() for x in e.native)
    if here and here_too and not all(everywhere):
        bad = [name for name, right in zip(names, everywhere, strict=True) if not right]
        yield f"right at the point given and wrong elsewhere ({', '.join(bad)})"
    elif not here and "zeros" in names and everywhere[names.index("zeros")] and sum(everywhere) == 1:
        _, _, truth = e.elsewhere[names.index("zeros")]
        if any(t.any() for t in truth):
            yield "right at zero and nowhere else"
    elif not here and all(everywhere):
        yield "wrong only at the point given"


def _same(got: Numbers, truth: Numbers, close: float = 1e-9) -> bool:
    """Whether they agree as well as two float64 results do, in size of the leaf."""
    if got.shape != truth.shape:
        return False
    finite = np.isfinite(truth)
    size = float(np.abs(truth[finite]).max(initial=0.0))
    return bool((np.abs(got - truth)[finite] <= close * size + 1e-300).all())


def _layers(e: Evidence, wrong: list[int]) -> Iterator[str]:
    """Where the error enters, on the way back through numbered layers."""
    layer_of = []
    for path in e.paths:
        digits = path.partition("[")[2].partition("]")[0]
        if not digits.isdigit():
            return
        layer_of.append(int(digits))
    bad = sorted({layer_of[n] for n in wrong})
    all_layers = sorted(set(layer_of))
    if (
        len(all_layers) > 1
        and bad
        and bad == [l for l in all_layers if l <= bad[-1]]
        and bad[-1] < all_layers[-1]
    ):
        right = [l for l in all_layers if l > bad[-1]]
        name = f"{right[0]} to {right[-1]}" if len(right) > 1 else f"{right[0]}"
        below = f"{bad[-1]} to {bad[0]}" if len(bad) > 1 else f"{bad[0]}"
        yield f"layers {name} right, {below} wrong: the error enters on the way from {right[0]} to {bad[-1]}"
