"""What a run leaves behind: a number for each epoch, what was recorded, and when that is enough."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from .processes import of_first


@dataclass(frozen=True)
class History:
    """What `fit` returns: the trained parameters, and one number for each epoch.

    params: after the last epoch; with early stopping, after the best one
    train: "cost", the mean over the epoch's examples of the cost as it was when each was used; and every
        metric on the whole training data after the epoch
    validation: "cost" and every metric on the validation data after the epoch; empty without such data
    seconds: wall time of each epoch, an equal part for those of one compiled call; the first includes
        compilation
    records: name -> what a function of `record` made of each step's sweep: arrays with a first axis of steps
    best_epoch: with early stopping the epoch, counted from 1, that `params` are of; otherwise None
    skipped: steps left out because their gradient was not finite, with on_divergence="skip"
    """

    params: Any
    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    seconds: np.ndarray
    records: Mapping[str, Any] = field(default_factory=dict)
    best_epoch: int | None = None
    skipped: int = 0

    def json_lines(self) -> str:
        """One line of JSON for each epoch: its number, those of both parts, seconds; null for NaN and inf."""
        lines = []
        for i, seconds in enumerate(self.seconds):
            train, held_out = (
                {name: _of_json(column[i]) for name, column in part.items()}
                for part in (self.train, self.validation)
            )
            line = {"epoch": i + 1, "train": train, "validation": held_out, "seconds": float(seconds)}
            lines.append(json.dumps(line) + "\n")
        return "".join(lines)


def _of_json(number: Any) -> float | None:
    return float(number) if np.isfinite(number) else None


class DivergenceError(FloatingPointError):
    """The cost or the parameters became NaN or infinite. `history` ends with the last good epoch."""

    def __init__(self, message: str, history: History):
        super().__init__(message)
        self.history = history


@dataclass(frozen=True)
class EarlyStopping:
    """Stop when a number has not become better for `patience` epochs, and return the best parameters.

    monitor: "cost" or the name of a metric, of the validation data if there are any
    patience: epochs without a better number after which to stop
    min_delta: by how much a number needs to be better to count
    larger_is_better: for an accuracy, True
    """

    monitor: str = "cost"
    patience: int = 10
    min_delta: float = 0.0
    larger_is_better: bool = False

    def improves(self, number: float, best: float | None) -> bool:
        if best is None or np.isnan(best):
            return best is None or not np.isnan(number)
        gain = number - best if self.larger_is_better else best - number
        return gain > self.min_delta


class EpochReport(NamedTuple):
    """What a callback of `fit` sees after an epoch."""

    epoch: int  # counted from 1
    step: int  # steps taken so far
    params: Any
    train: Mapping[str, float]
    validation: Mapping[str, float]


Callback = Callable[[EpochReport], Any]


class Rows(NamedTuple):
    """The numbers of an epoch, or of several along a first axis."""

    costs: Any  # (steps,)
    records: Any
    train: Any
    validation: Any


class Numbers:
    """What is known of the epochs so far, as it grows."""

    def __init__(self, names: Sequence[str], records: Sequence[str]):
        self.names, self.record_names = names, records
        self.train: list[list[float]] = []
        self.validation: list[list[float]] = []
        self.seconds: list[float] = []
        self.records: list[Any] = []

    def add(self, rows: Rows, n: int, seconds: float) -> None:
        for into, columns in ((self.train, rows.train), (self.validation, rows.validation)):
            lists = [np.asarray(column[:n], float).tolist() for column in columns]
            into += map(list, zip(*lists, strict=True)) if lists else ([] for _ in range(n))
        self.seconds += [seconds] * n
        if n and self.record_names:
            self.records.append(jax.tree.map(lambda x: np.concatenate(x[:n]), rows.records))

    def tree(self) -> Any:
        """All of it as arrays."""
        records = jax.tree.map(lambda *x: np.concatenate(x), *self.records) if self.records else []
        return np.array(self.train), np.array(self.validation), np.array(self.seconds), records

    def like(self, epochs: int, steps: int, row: Rows) -> Any:
        """The shapes of `tree` after so many epochs and steps, with the numbers of one."""
        columns = [np.zeros((epochs, len(part))) for part in (row.train, row.validation)]
        records = jax.tree.map(lambda x: np.zeros((steps, *x.shape[1:]), x.dtype), row.records)
        return *columns, np.zeros(epochs), records

    def agree(self) -> None:
        """Takes the times of process 0: every process has a clock of its own."""
        self.seconds = of_first(np.array(self.seconds)).tolist()

    def restore(self, tree: Any) -> None:
        train, held_out, seconds, records = tree
        self.train, self.validation, self.seconds = train.tolist(), held_out.tolist(), seconds.tolist()
        self.records = [records] if self.record_names else []

    def report(self, step: int, params: Any) -> EpochReport:
        train, held_out = (
            dict(zip(self.names, rows[-1], strict=False)) for rows in (self.train, self.validation)
        )
        return EpochReport(len(self.seconds), step, params, train, held_out)

    def is_best(self, rule: EarlyStopping, best_epoch: int | None) -> bool:
        """Whether the last epoch is better than the best before it."""
        rows = self.validation if self.validation[-1] else self.train
        column = [row[self.names.index(rule.monitor)] for row in rows]
        return rule.improves(column[-1], None if best_epoch is None else column[best_epoch - 1])

    def history(self, params: Any, best_epoch: int | None, skipped: int) -> History:
        columns = _columns(self.names, self.train), _columns(self.names, self.validation)
        records = {}
        if self.records:
            joined = jax.tree.map(lambda *x: np.concatenate(x), *self.records)
            records = dict(zip(self.record_names, joined, strict=True))
        return History(params, *columns, np.array(self.seconds, float), records, best_epoch, skipped)


def _columns(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """name -> its numbers, one for each epoch; none where there is no such data."""
    if rows and not rows[0]:
        return {}
    kept = names[: len(rows[0])] if rows else names  # of a stream, the training data have the cost alone
    return {name: np.array([row[i] for row in rows], float) for i, name in enumerate(kept)}
