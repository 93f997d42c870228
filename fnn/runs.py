"""A whole run on the host: `fit`.

An epoch and its evaluation are one compiled program, and a loop over epochs around it is compiled with them:
as many as take about a fifth of a second go by in one call, then the host looks at their numbers. So a small
network costs as much per step as in one long scan, and a large one is looked at after every epoch. The number
of epochs in a call is an argument of the program, so that a run of any length compiles once, and how epochs
are grouped changes no number.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
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
from .history import Callback, DivergenceError, EarlyStopping, History, Numbers, Rows
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
    numbers = Numbers(names, tuple(name for name, _ in named_records))
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
                if early_stopping and numbers.is_best(early_stopping, best and best[0]):
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
    epoch: Callable[..., tuple[TrainState, Rows]],
    skips: bool,
    state: TrainState,
    data: tuple[Array, ...],
    validation: tuple[Array, ...] | None,
    n: Array,
) -> tuple[TrainState, TrainState, Array, Array, Rows]:
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
) -> tuple[TrainState, Rows]:
    """An epoch and its evaluation."""
    if record:
        step = partial(recorded_step, cost, optimizer, record)
        state, (costs, recorded) = scan_epoch(step, state, data, batch_size)
    else:
        (state, costs), recorded = train_epoch(cost, optimizer, state, data, batch_size), []
    numbers = epoch_numbers(cost, metrics, state.params, costs, data, validation, batch_size, skips=skips)
    return state, Rows(costs, recorded, *numbers)
