"""A whole run on the host: `fit`, what it returns, when it stops.

An epoch and its evaluation are one compiled program, and a loop over epochs around it is compiled with them:
as many as take about a fifth of a second go by in one call, then the host looks at their numbers. So a small
network costs as much per step as in one long scan, and a large one is looked at after every epoch. The number
of epochs in a call is an argument of the program, so that a run of any length compiles once, and how epochs
are grouped changes no number.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from .arguments import (
    check_batches,
    check_callbacks,
    check_count,
    check_data,
    check_hashable,
    check_metrics,
    check_not_traced,
    check_optimizer,
    check_params_values,
    check_record,
    check_scalar,
)
from .divergence import explain
from .params import check_key
from .progress import progress_bar
from .resume import RunFolder, fingerprint, terminated
from .rules import RuleLike, check_rule_like
from .train import (
    Metric,
    Record,
    TrainState,
    epoch_numbers,
    recorded_step,
    scan_epoch,
    train_epoch,
    train_state,
)

SECONDS = 0.2  # of epochs in one compiled call: often enough for a bar, rare enough to cost nothing
EPOCHS, ROW_BYTES = 64, 2**24  # and their largest number, and what their numbers may take in memory
SKIPPED_IN_A_ROW = 10  # steps without a finite gradient after which skipping is no help


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


def fit(
    cost: RuleLike,
    optimizer: optax.GradientTransformation,
    params: Any,
    data: Sequence[Any],
    *,
    key: Any,
    epochs: int,
    batch_size: int,
    validation: Sequence[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    record: Mapping[str, Record] | None = None,
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[Callback] = (),
    on_divergence: str = "raise",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> History:
    """Trains on `data` for a number of epochs, each one compiled scan over freshly shuffled batches.

    cost: a rule (params, X, y[, sample_weight]) -> scalar, such as `fnn.cost` makes
    optimizer: any of optax
    data: (X, y) or (X, y, sample_weight), arrays with the examples along their first axis
    key: decides the order of the examples; equal keys give equal runs to the last bit
    validation: data held out, in the same form; cost and metrics are evaluated on it after every epoch
    metrics: name -> function (params, X, y) -> scalar, such as {"accuracy": fnn.accuracy(net)}
    record: name -> function of the sweep of each step's batch, such as {"layers": fnn.layer_statistics} or
        {"norms": fnn.example_norms}; `history.records` has what they return, an array or a pytree of
        arrays, for every step. The gradient is then the sweep's, equal to the cost's up to rounding.
    early_stopping: such as `fnn.EarlyStopping(patience=10)`; `history.params` are then the best ones
    callbacks: functions called after every epoch with an `EpochReport`; one that returns True ends the run
    on_divergence: "raise" a `DivergenceError`, or "skip" every step whose gradient is not finite, and count
        it; after 10 in a row it raises all the same. Costs that are not finite are left out of the mean.
    checkpoint: a folder for this run, "runs/a". The run is saved there every half minute, after its last
        epoch and on SIGTERM, which then ends the process with status 143; the same call goes on from there,
        and ends with the bits of a run that was not stopped. `epochs` may be larger then. `history.jsonl`
        there has a line for each epoch. Callbacks see only the epochs that are run, and a run that one of
        them ended is over. Another cost, other parameters or other data are refused; an optimiser of the same
        structure with another learning rate, and other metrics of the same names, are not noticed.
    progress: show a bar

    `params` are left as they were. Everything is compiled once, for a run of any length. Before anything
    runs, arguments are checked, values included: NaN and inf, labels out of range, float64 that JAX would
    narrow in silence. Raises TypeError or ValueError; `DivergenceError` if the run diverges, which names the
    step, and the first quantity in it that is not finite.

    >>> import fnn, jax, optax
    >>> X = jax.random.normal(jax.random.key(0), (100, 3))
    >>> y = X @ jax.numpy.array([[1.0], [-2.0], [0.5]])
    >>> params = fnn.init(jax.random.key(1), (3, 1))
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> history = fnn.fit(cost, optax.sgd(0.1), params, (X, y), key=jax.random.key(2),
    ...                   epochs=50, batch_size=32, progress=False)
    >>> print(history.params[0].W.round(3))
    [[ 1.  -2.   0.5]]
    """
    check_rule_like("fit: cost", cost, such_as="fnn.cost(net, loss)")
    check_hashable("cost", cost)
    check_not_traced(params, key, data, validation)
    check_optimizer("fit", optimizer)
    check_hashable("optimizer", optimizer)
    check_key("fit", key)
    epochs = check_count("fit", "epochs", epochs)
    batch_size = check_count("fit", "batch_size", batch_size)
    params = check_params_values(params)
    data = check_data("data", data, cost, params)
    validation = None if validation is None else check_data("validation", validation, cost, params)
    check_batches("fit", data, batch_size)
    named_metrics = check_metrics(metrics)
    for name, metric in named_metrics:
        check_scalar(f"metric {name!r}", metric, params, data[:2])
    named_records = check_record(record, cost, params, data, batch_size)
    names = ("cost", *(name for name, _ in named_metrics))
    _check_early_stopping(early_stopping, names)
    check_callbacks(callbacks)
    if on_divergence not in ("raise", "skip"):
        raise ValueError(f'fit: on_divergence needs to be "raise" or "skip", got {on_divergence!r}.')

    skips = on_divergence == "skip"
    if skips:
        optimizer = _skipping(optimizer)
    functions = [tuple(function for _, function in named) for named in (named_metrics, named_records)]
    run_epoch, run_epochs = _compiled_epochs(cost, optimizer, *functions, batch_size, skips)
    state = train_state(optimizer, params, key)
    numbers = _Numbers(names, tuple(name for name, _ in named_records))
    watches = bool(callbacks) or early_stopping is not None
    best: tuple[int, Any] | None = None
    epoch, folder, stopped = 0, None, False
    if checkpoint is not None:
        run = {"batch_size": batch_size, "numbers": names, "records": numbers.record_names}
        run |= {"on_divergence": on_divergence, "early_stopping": repr(early_stopping)}
        folder = RunFolder(checkpoint, fingerprint(cost, params, key, data, validation, **run))
        _, row = jax.eval_shape(run_epoch, state, data, validation)

        def like(epoch):
            return state, params, 0, False, numbers.like(epoch, row)

        restored = folder.restore(like)
        if restored is not None:
            epoch, (state, best_params, best_epoch, stopped, saved) = restored
            if epoch > epochs:
                raise ValueError(
                    f"fit: {checkpoint} has {epoch} epochs of this run, more than epochs={epochs}; ask for "
                    "at least as many, or use another folder."
                )
            numbers.restore(saved)
            best = (best_epoch, best_params) if best_epoch else None

    def history(params):
        skipped = int(state.optimizer_state.total_notfinite) if skips else 0
        return numbers.history(params, None if best is None else best[0], skipped)

    def save():
        if folder is not None:
            best_epoch, best_params = (0, params) if best is None else best
            tree = state, best_params, best_epoch, stopped, numbers.tree()
            folder.save(epoch, int(state.step), tree, history(None).json_lines())

    def leave_if_terminated():
        if is_terminated():
            save()
            print(f"fit: SIGTERM after epoch {epoch}, saved in {checkpoint}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGTERM)

    catch = terminated() if folder is not None else nullcontext(lambda: False)
    with progress_bar(epochs, names, show=progress) as show, catch as is_terminated:
        at_once, calls = 1, 0
        while epoch < epochs and not stopped:
            start = time.perf_counter()
            n = jnp.int32(min(at_once, epochs - epoch))
            state, before, done, is_finite, rows = run_epochs(state, data, validation, n)
            done, is_finite, rows = jax.device_get((done, is_finite, rows))
            good = int(done) - (not is_finite)
            numbers.add(rows, good, (time.perf_counter() - start) / int(done))
            if not is_finite:
                message = explain(
                    cost, optimizer, before, data, batch_size, rows.costs[good], epoch + good + 1, skips
                )
                raise DivergenceError(message, history(before.params if best is None else best[1]))
            for i in range(good):
                epoch += 1
                show(epoch, numbers.train[epoch - 1], numbers.validation[epoch - 1])
            if watches:  # an epoch for each call
                if early_stopping and numbers.is_best(early_stopping):
                    best = epoch, jax.tree.map(partial(jnp.array, copy=True), state.params)
                copy = jax.tree.map(partial(jnp.array, copy=True), state.params) if callbacks else None
                report = numbers.report(int(state.step), copy)
                stopped = any([callback(report) is True for callback in callbacks])
                if early_stopping and best and epoch - best[0] >= early_stopping.patience:
                    stopped = True
            elif calls:  # the first call compiles
                in_time = int(SECONDS / max(numbers.seconds[-1], 1e-6))
                at_once = max(1, min(in_time, 2 * at_once, len(rows.costs)))
            calls += 1
            leave_if_terminated()
            if folder is not None and folder.is_due:
                save()
        if calls:
            save()
        leave_if_terminated()
    return history(state.params if best is None else best[1])


@lru_cache(maxsize=16)  # one for each optimiser, so that equal runs are compiled once
def _skipping(optimizer):
    return optax.apply_if_finite(optimizer, SKIPPED_IN_A_ROW)


class _Rows(NamedTuple):
    """The numbers of an epoch, or of several along a first axis."""

    costs: Any  # (steps,)
    records: Any
    train: Any
    validation: Any


class _Numbers:
    """What is known of the epochs so far, as it grows."""

    def __init__(self, names: Sequence[str], records: Sequence[str]):
        self.names, self.record_names = names, records
        self.train: list[list[float]] = []
        self.validation: list[list[float]] = []
        self.seconds: list[float] = []
        self.records: list[Any] = []

    def add(self, rows: _Rows, n: int, seconds: float) -> None:
        for into, columns in ((self.train, rows.train), (self.validation, rows.validation)):
            into += [[float(column[i]) for column in columns] for i in range(n)]
        self.seconds += [seconds] * n
        if n and self.record_names:
            self.records.append(jax.tree.map(lambda x: np.concatenate(x[:n]), rows.records))

    def tree(self) -> Any:
        """All of it as arrays."""
        records = jax.tree.map(lambda *x: np.concatenate(x), *self.records) if self.records else []
        return np.array(self.train), np.array(self.validation), np.array(self.seconds), records

    def like(self, epochs: int, row: _Rows) -> Any:
        """The shapes of `tree` after so many epochs, with the numbers of one."""
        columns = [np.zeros((epochs, len(part))) for part in (row.train, row.validation)]
        steps = epochs * len(row.costs)
        records = jax.tree.map(lambda x: np.zeros((steps, *x.shape[1:]), x.dtype), row.records)
        return *columns, np.zeros(epochs), records

    def restore(self, tree: Any) -> None:
        train, held_out, seconds, records = tree
        self.train, self.validation, self.seconds = train.tolist(), held_out.tolist(), seconds.tolist()
        self.records = [records] if self.record_names else []

    def report(self, step: int, params: Any) -> EpochReport:
        train, held_out = (
            dict(zip(self.names, rows[-1], strict=False)) for rows in (self.train, self.validation)
        )
        return EpochReport(len(self.seconds), step, params, train, held_out)

    def is_best(self, rule: EarlyStopping) -> bool:
        """Whether the last epoch is better than all before it."""
        rows = self.validation if self.validation[-1] else self.train
        column, best = [row[self.names.index(rule.monitor)] for row in rows], None
        for number in column[:-1]:
            best = number if rule.improves(number, best) else best
        return rule.improves(column[-1], best)

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
    return {name: np.array([row[i] for row in rows], float) for i, name in enumerate(names)}


def _check_early_stopping(rule: Any, names: Sequence[str]) -> None:
    if rule is None:
        return
    if not isinstance(rule, EarlyStopping):
        raise TypeError(
            f"fit: early_stopping needs to be made by fnn.EarlyStopping(patience=10), got {rule!r}."
        )
    if rule.monitor not in names:
        raise ValueError(
            f"fit: early_stopping monitors {rule.monitor!r}, but the numbers of this run are "
            f"{', '.join(map(repr, names))}; give it as one of metrics."
        )
    check_count("fit", "patience of early_stopping", rule.patience)
    if not (isinstance(rule.min_delta, int | float) and 0 <= rule.min_delta < float("inf")):
        raise ValueError(
            "fit: min_delta of early_stopping needs to be a finite number, at least 0; "
            f"got {rule.min_delta!r}."
        )


@lru_cache(maxsize=16)  # runs kept compiled; a search over thousands of optimisers would fill the memory
def _compiled_epochs(cost, optimizer, metrics, record, batch_size, skips):
    epoch = partial(_epoch, cost, optimizer, metrics, record, batch_size, skips)
    return epoch, jax.jit(partial(_epochs, epoch, skips), donate_argnums=0)


def _epochs(
    epoch: Callable[..., tuple[TrainState, _Rows]],
    skips: bool,
    state: TrainState,
    data: tuple[Array, ...],
    validation: tuple[Array, ...] | None,
    n: Array,
) -> tuple[TrainState, TrainState, Array, Array, _Rows]:
    """At most n epochs, until one is not finite.

    Returns the state, the state before the last epoch, which is what is left if that diverged, how many
    epochs were run, whether all is finite, and their numbers.
    """
    _, row = jax.eval_shape(epoch, state, data, validation)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    capacity = max(1, min(EPOCHS, ROW_BYTES // max(size, 1)))
    rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), row)
    n = jnp.minimum(n, capacity)

    def go_on(carry):
        i, is_finite = carry[-2:]
        return (i < n) & is_finite

    def one(carry):
        before, _, rows, i, _ = carry
        state, row = epoch(before, data, validation)
        rows = jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)
        is_finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()
        if not skips:
            is_finite &= jnp.isfinite(row.costs).all()
        return state, before, rows, i + 1, is_finite

    state, before, rows, i, is_finite = jax.lax.while_loop(
        go_on, one, (state, state, rows, jnp.int32(0), jnp.array(True))
    )
    return state, before, i, is_finite, rows


def _epoch(
    cost, optimizer, metrics, record, batch_size, skips, state, data, validation
) -> tuple[TrainState, _Rows]:
    """An epoch and its evaluation."""
    if record:
        step = partial(recorded_step, cost, optimizer, record)
        state, (costs, recorded) = scan_epoch(step, state, data, batch_size)
    else:
        (state, costs), recorded = train_epoch(cost, optimizer, state, data, batch_size), []
    numbers = epoch_numbers(cost, metrics, state.params, costs, data, validation, batch_size, skips=skips)
    return state, _Rows(costs, recorded, *numbers)
