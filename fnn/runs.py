"""A whole run on the host: `fit`.

An epoch and its evaluation are one compiled program, and a loop over epochs around it is compiled with them:
as many as take about a fifth of a second go by in one call, or five seconds without a bar and a checkpoint,
then the host looks at their numbers. So a small network's run is 0.6 per cent longer than its calls
(experiments/benchmarks/overhead.py), and a large one is looked at after every epoch or a few. The number of
epochs in a call is an argument of the program, so that a run of any length compiles once, and how epochs are
grouped changes no number. A call writes the state where it was; the epoch that diverges is found from a copy,
made anew after the first call that ends ten seconds later.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

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
    check_layout,
    check_metrics,
    check_not_traced,
    check_on_divergence,
    check_optimizer,
    check_params_values,
    check_record,
    check_recorded_shapes,
    check_scalar,
)
from .divergence import explain
from .elementary import partitioned
from .history import Callback, EarlyStopping, History, Rows
from .host_loop import Advance, begin, check_early_stopping, follow, skipping
from .orders import KIND, shuffle
from .params import check_key
from .processes import on_host
from .resume import fingerprint
from .rules import RuleLike, check_rule_like
from .sharding import Layout
from .train import (
    Metric,
    Record,
    TrainState,
    all_finite,
    copied,
    epoch_numbers,
    scan_epoch,
    step_with_rows,
    train_epoch,
)

EPOCHS, ROW_BYTES = 256, 2**24  # in one compiled call at most, and what their numbers may take in memory


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
    layout: Layout | None = None,
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
        structure with another learning rate, and other metrics of the same names, are not noticed. At the end
        `history.png` there shows the run, if matplotlib is installed.
    layout: such as `fnn.data_parallel()`, for a run on all devices of all processes, which all call `fit`
        with equal arguments; every device has the whole data. Results are those of one device up to
        rounding, and a run that is resumed may have another layout. With several processes the checkpoints
        are `ShardedCheckpoints`.
    progress: show a line with the numbers, examples per second and the time left

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
    named_records = check_record(record)
    last = len(data[0]) % batch_size or batch_size
    check_recorded_shapes(named_records, cost, params, data, (batch_size, last))
    names = ("cost", *(name for name, _ in named_metrics))
    check_early_stopping(early_stopping, names)
    check_callbacks(callbacks)
    check_layout("fit", layout)
    check_on_divergence(on_divergence)

    skips = on_divergence == "skip"
    if skips:
        optimizer = skipping(optimizer)
    run = {}
    if checkpoint is not None or layout is not None:
        run = fingerprint(cost, params, key, data, validation, batch_size=batch_size, shuffle=KIND)
    options: dict[str, Any] = {
        "epochs": epochs,
        "names": names,
        "records": tuple(name for name, _ in named_records),
        "early_stopping": early_stopping,
        "callbacks": callbacks,
        "skips": skips,
        "checkpoint": checkpoint,
    }
    state, placed = begin("fit", optimizer, params, key, (data, validation), layout, run, options)
    functions = [tuple(function for _, function in named) for named in (named_metrics, named_records)]
    compiled = compiled_epochs(cost, optimizer, *functions, batch_size, skips, layout)
    source = _InMemory(cost, optimizer, placed[0], placed[1], batch_size, skips, *compiled)
    return follow(source, state, run=run, together=layout is not None, progress=progress, **options)


@dataclass
class _InMemory:
    """Epochs over data that the devices have whole."""

    cost: RuleLike
    optimizer: optax.GradientTransformation
    data: tuple[Array, ...]
    validation: tuple[Array, ...] | None
    batch_size: int
    skips: bool
    run_epoch: Callable[..., Any]
    run_epochs: Callable[..., Any]
    _kept: TrainState | None = None
    _since: int = 0  # epochs

    @property
    def examples(self) -> int:
        return len(self.data[0])

    @property
    def steps(self) -> int:
        return -(-self.examples // self.batch_size)

    def row(self, state: TrainState) -> Rows:
        return jax.eval_shape(self.run_epoch, state, self.data, self.validation)[1]

    def advance(self, state: TrainState, n: int, keep: bool) -> Advance:
        start = time.perf_counter()
        if keep:
            self._kept, self._since = state, 0
            state = copied(state)
        state, is_finite, rows = self._run(state, n)
        done = min(n, len(rows.costs))
        seconds = (time.perf_counter() - start) / done
        if is_finite:
            self._since += done
            return Advance(state, None, done, seconds, rows)
        # Somewhere in these: from the state that was kept again, and these one by one.
        state, left, is_finite = copied(self._kept), self._since, True
        while left and is_finite:
            state, is_finite, rows = self._run(state, left)
            left -= min(left, len(rows.costs))
        before, each = None, []
        while not before and len(each) < done:
            # Where sums depend on the order of threads, it may diverge before it did.
            at_beginning = copied(state) if is_finite else self._kept
            state, is_finite, rows = self._run(state, 1)
            each.append(jax.tree.map(lambda x: x[:1], rows))
            before = None if is_finite else at_beginning
        self._since += len(each)
        rows = jax.tree.map(lambda *x: np.concatenate(x), *each)
        return Advance(state, before, len(each), seconds, rows)

    def _run(self, state: TrainState, n: int) -> tuple[TrainState, bool, Rows]:
        """n epochs at most. The memory of `state` is reused."""
        after, *rest = self.run_epochs(state, self.data, self.validation, np.int32(n))
        is_finite, rows = jax.device_get(rest)
        return after, bool(is_finite), rows

    def explain(self, advance: Advance, epoch: int) -> str:
        before, data = on_host((advance.before, self.data))
        _, order = shuffle(before.key, self.examples)
        costs, m = advance.rows.costs[advance.done - 1], self.batch_size

        def batch_at(i):
            return tuple(array[order[i * m : (i + 1) * m]] for array in data)

        return explain(self.cost, self.optimizer, before, batch_at, costs, epoch, self.skips)


@lru_cache(maxsize=16)  # runs kept compiled; a search over thousands of optimisers would fill the memory
def compiled_epochs(cost, optimizer, metrics, record, batch_size, skips, layout):
    epoch = partial(_epoch, cost, optimizer, metrics, record, batch_size, skips, layout)
    if layout is not None:
        epoch = partitioned()(epoch)
    return epoch, jax.jit(partial(_epochs, epoch, skips), donate_argnums=0)


def _epochs(
    epoch: Callable[..., tuple[TrainState, Rows]],
    skips: bool,
    state: TrainState,
    data: tuple[Array, ...],
    validation: tuple[Array, ...] | None,
    n: Array,
) -> tuple[TrainState, Array, Rows]:
    """n epochs, or as many as there are rows for their numbers.

    Returns the state, whether all is finite, and the rows.
    """
    _, row = jax.eval_shape(epoch, state, data, validation)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(row))
    capacity = max(1, min(EPOCHS, ROW_BYTES // max(size, 1)))
    rows = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), row)

    def one(i, carry):
        state, rows = carry
        state, row = epoch(state, data, validation)
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), rows, row)

    state, rows = jax.lax.fori_loop(0, jnp.minimum(n, capacity), one, (state, rows))
    # Once for all epochs: a parameter that is NaN or infinite stays so, whatever is added to it.
    is_finite = all_finite(state.params)
    if not skips:
        is_finite &= jnp.isfinite(rows.costs).all()
    return state, is_finite, rows


def _epoch(
    cost, optimizer, metrics, record, batch_size, skips, layout, state, data, validation
) -> tuple[TrainState, Rows]:
    """An epoch and its evaluation."""
    if not record and layout is None:
        (state, costs), recorded = train_epoch(cost, optimizer, state, data, batch_size), []
    else:
        step = step_with_rows(cost, optimizer, record, layout)
        if layout is not None:  # else the rows below would split the data in the scan too
            step, data = layout.on_gathered(step), layout.whole(data)
        state, (costs, recorded) = scan_epoch(step, state, data, batch_size, layout)
    params = state.params
    if layout is not None:
        state = layout.placed(params, state)
        params, (data, validation) = layout.gathered(params), layout.rows((data, validation))
    numbers = epoch_numbers(cost, metrics, params, costs, data, validation, batch_size, skips=skips)
    return state, Rows(costs, recorded, *numbers)
