"""What a check found: truthy when right, printed as at most 40 lines, the most important first."""

from dataclasses import dataclass
from typing import Any

from .tables import aligned

RIGHT, WRONG, KINK, LOST, AT_FAULT, UNJUDGED = (
    "right",
    "WRONG",
    "right, at a kink",
    "WRONG: loses digits",
    "right; autodiff is at fault",
    "not judged",
)
LINES = 40


@dataclass(frozen=True)
class Leaf:
    """One array of the gradient, where its error is largest.

    units: the error in units of what rounding explains; `limit` of the report is what is allowed
    """

    path: str
    shape: tuple[int, ...]
    verdict: str
    units: float
    index: tuple[int, ...]
    got: float
    expected: float
    where: str  # the point: "as given", "moved", ...

    @property
    def is_right(self) -> bool:
        return not self.verdict.startswith(WRONG)


@dataclass(frozen=True)
class Report:
    """The verdict on a gradient, with its evidence.

    >>> import fnn, jax.numpy as jnp
    >>> report = fnn.check_gradient(lambda x: jnp.sum(x**3), lambda x: 3 * x**2, jnp.array([1.0, -2.0]))
    >>> bool(report)
    True
    """

    what: str
    leaves: tuple[Leaf, ...]
    contract: tuple[str, ...] = ()  # what is wrong with types, shapes, state
    diagnoses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    judge: str = ""
    repeat: str = ""
    limit: float = 16.0

    def __bool__(self) -> bool:
        return not self.contract and all(leaf.is_right for leaf in self.leaves)

    def __str__(self) -> str:
        wrong = [leaf for leaf in self.leaves if not leaf.is_right]
        head = f"{self.what}: {'right' if self else 'WRONG'}"
        if self.leaves:
            worst = max(self.leaves, key=lambda leaf: (not leaf.is_right, leaf.units))
            head += f"; largest error {_units(worst.units)} rounding units, {self.limit:g} are allowed"
        lines = [head, *(f"  contract: {problem}" for problem in self.contract)]
        lines += [f"  diagnosis: {diagnosis}" for diagnosis in self.diagnoses]
        rows = [("leaf", "shape", "units", "at", "yours", "truth", "point", "verdict")]
        order = wrong + [leaf for leaf in self.leaves if leaf.is_right]
        room = LINES - len(lines) - len(self.notes) - 6
        for leaf in order[: max(room, 3)]:
            shape, at = ("×".join(map(str, axes)) or "()" for axes in (leaf.shape, ()))
            at = str(list(leaf.index)) if leaf.index else "-"
            row = (leaf.path, shape, _units(leaf.units), at, f"{leaf.got:.6g}", f"{leaf.expected:.6g}")
            rows.append((*row, leaf.where, leaf.verdict))
        if len(rows) > 1:
            lines += ["  " + line for line in aligned(rows, "<<><>><<").split("\n")]
        if len(order) > len(rows) - 1:
            lines.append(f"  ... and {len(order) - len(rows) + 1} more")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  judge: {self.judge}"] * bool(self.judge)
        lines += [f"  repeat: {self.repeat}"] * bool(self.repeat)
        return "\n".join(lines[:LINES])

    def raise_if_wrong(self) -> None:
        """Raises AssertionError with the report as its text unless all is right."""
        __tracebackhide__ = True  # in pytest: the report once, without the frames of this file
        if not self:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain Python values, ready for `json.dumps`."""
        leaves = [
            {
                "path": leaf.path,
                "shape": list(leaf.shape),
                "verdict": leaf.verdict,
                "right": leaf.is_right,
                "rounding_units": _plain(leaf.units),
                "index": list(leaf.index),
                "got": _plain(leaf.got),
                "expected": _plain(leaf.expected),
                "point": leaf.where,
            }
            for leaf in self.leaves
        ]
        return {
            "what": self.what,
            "right": bool(self),
            "limit": self.limit,
            "leaves": leaves,
            "contract": list(self.contract),
            "diagnoses": list(self.diagnoses),
            "notes": list(self.notes),
            "judge": self.judge,
            "repeat": self.repeat,
        }


def _units(units: float) -> str:
    return f"{units:.2g}" if units < 1000 else f"{units:.1e}" if units < float("inf") else "inf"


def _plain(x: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return float(x) if abs(x) < float("inf") else str(x)
