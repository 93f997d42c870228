"""Training on data that come in batches: larger than memory, or made on the way.

`fit_batches` is `fit` for any iterable of batches of host arrays: a generator over a NumPy memmap, a loader
of grain, a tf.data.Dataset through `as_numpy_iterator`. While the device works on some steps, a thread reads
and checks the batches of the next. `Batches` are those that `fit` would take, in its order, from arrays of
which only the rows of a batch need to be in memory.
"""

import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from .arguments import (
    check_batches,
    check_callbacks,
    check_count,
    check_data,
    check_fits,
    check_form,
    check_hashable,
    check_layout,
    check_metrics,
    check_not_traced,
    check_numbers,
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
from .processes import alone, answers, on_host
from .resume import fingerprint
from .rules import RuleLike, check_rule_like
from .sharding import WHOLE, Layout
from .train import (
    Metric,
    Record,
    TrainState,
    all_finite,
    held_out_numbers,
    laid_out_step,
    step_with_rows,
)

STEPS, BYTES = 64, 2**26  # of one compiled call at most, unless a single batch has more bytes
AHEAD = 2  # calls whose batches are ready while the device works
SECONDS = 1.0  # at the end for the thread to end too


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of `fit`, in its order, read from arrays row by row.

    data: arrays of one row for each example, (X, y) or (X, y, sample_weight); `numpy.load(path,
        mmap_mode="r")`, anything of NumPy's form that takes an array of row numbers
    key: decides the order, as in `fit`
    batch_size: examples in a batch; the last of an epoch has those that are left

    An epoch takes as much memory as the order of its examples.

    >>> import fnn, jax, numpy as np
    >>> X, y = np.arange(10.0).reshape(5, 2), np.arange(5)
    >>> batches = fnn.Batches((X, y), key=jax.random.key(0), batch_size=2, epochs=3)
    >>> len(batches), [len(y) for _, y in batches][:3]
    (9, [2, 2, 1])
    """

    data: Sequence[Any]
    key: Any
    batch_size: int
    epochs: int

    def __post_init__(self):
        check_key("Batches", self.key)
        check_batches("Batches", self.data, self.batch_size)
        for array in self.data:
            if not hasattr(array, "dtype"):
                raise TypeError(
                    "Batches: data needs to be arrays, which give rows for an array of their numbers; got "
                    f'{type(array).__name__}. Use numpy.asarray, or numpy.load(path, mmap_mode="r").'
                )
        check_count("Batches", "epochs", self.epochs)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.data[0]) // self.batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return self.after(0)

    def after(self, step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """The batches from a step on, counted from 0; those before are not read."""
        key, m, N = self.key, self.batch_size, len(self.data[0])
        for epoch in range(self.epochs):
            key, order = shuffle(key, N)
            first = step - epoch * self.steps_per_epoch
            if first >= self.steps_per_epoch:
                continue
            order = np.asarray(order)
            for start in range(max(first, 0) * m, N, m):
                yield tuple(np.asarray(array[order[start : start + m]]) for array in self.data)


def fit_batches(
    cost: RuleLike,
    optimizer: optax.GradientTransformation,
    params: Any,
    batches: Iterable[Sequence[Any]],
    *,
    steps_per_epoch: int,
    epochs: int | None = None,
    validation: Sequence[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    record: Mapping[str, Record] | None = None,
    early_stopping: EarlyStopping | None = None,
    callbacks: Sequence[Callback] = (),
    on_divergence: str = "raise",
    checkpoint: Any = None,
    layout: Layout | None = None,
    progress: bool = True,
) -> History:
    """Trains on batches as they come, one step on each: `fit` for data larger than memory.

    batches: any iterable of (X, y) or (X, y, sample_weight), arrays of one row for each example; batches may
        differ in length, and every other length is compiled once more
    steps_per_epoch: how many steps make a row of the history, after which the validation data are looked at,
        callbacks called and checkpoints saved
    epochs: after which to stop; by default, when the batches end. Steps left at their end make a last,
        shorter epoch.
    validation: (X, y) in memory; metrics are of these alone
    checkpoint: a folder, as in `fit`. A run that goes on needs the same batches again: those that were used
        are passed over, by `batches.after(step)` where there is such a method, as `Batches` and by reading
        them elsewhere.
    layout: as in `fit`. Of several processes each gives its own rows of every batch, as many as the others;
        when one process has no more, all stop.

    All else as in `fit`, which gives the same parameters to the last bit for the same batches in memory.
    Every batch is checked as `fit` checks its data: NaN and inf, labels out of range, float64 that JAX would
    narrow; an error says which one it is. Raises TypeError, ValueError, `DivergenceError`, and whatever
    `batches` raises.

    >>> import fnn, jax, numpy as np, optax
    >>> rng = np.random.default_rng(0)
    >>> def batches():
    ...     while True:
    ...         X = rng.standard_normal((32, 3), np.float32)
    ...         yield X, X @ np.array([[1.0], [-2.0], [0.5]], np.float32)
    >>> params = fnn.init(jax.random.key(1), (3, 1))
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> history = fnn.fit_batches(cost, optax.sgd(0.1), params, batches(), steps_per_epoch=50, epochs=3,
    ...                           progress=False)
    >>> print(history.params[0].W.round(3))
    [[ 1.  -2.   0.5]]
    """
    check_rule_like("fit_batches: cost", cost, such_as="fnn.cost(net, loss)")
    check_hashable("cost", cost)
    check_not_traced(params, None, validation)
    check_optimizer("fit_batches", optimizer)
    check_hashable("optimizer", optimizer)
    steps_per_epoch = check_count("fit_batches", "steps_per_epoch", steps_per_epoch)
    epochs = None if epochs is None else check_count("fit_batches", "epochs", epochs)
    params = check_params_values(params)
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"fit_batches: batches needs to be an iterable of (X, y), got {type(batches).__name__}; call it, "
            "if it is a function that makes one."
        )
    validation = None if validation is None else check_data("validation", validation, cost, params)
    named_metrics = check_metrics(metrics)
    if named_metrics and validation is None:
        raise ValueError(
            f"fit_batches: metrics are of the validation data, as the others are not kept; got metrics "
            f"{[name for name, _ in named_metrics]} and no validation."
        )
    if validation is not None:
        for name, metric in named_metrics:
            check_scalar(f"metric {name!r}", metric, params, validation[:2])
    names = ("cost", *(name for name, _ in named_metrics))
    check_early_stopping(early_stopping, names)
    check_callbacks(callbacks)
    check_layout("fit_batches", layout)
    check_on_divergence(on_divergence)
    named_records = check_record(record)

    skips = on_divergence == "skip"
    if skips:
        optimizer = skipping(optimizer)
    run = {}
    if checkpoint is not None or layout is not None:
        run = fingerprint(cost, params, None, (), validation, steps_per_epoch=steps_per_epoch)
        run |= {"shuffle": KIND} if isinstance(batches, Batches) else {}
    options: dict[str, Any] = {
        "epochs": epochs,
        "names": names,
        "records": tuple(name for name, _ in named_records),
        "early_stopping": early_stopping,
        "callbacks": callbacks,
        "skips": skips,
        "checkpoint": checkpoint,
    }
    key = jax.random.key(0)  # of no use: the batches come in their order
    state, placed = begin("fit_batches", optimizer, params, key, validation, layout, run, options)
    if layout is not None and jax.process_count() > 1:
        layout.check_own_rows("fit_batches")
    metric_functions, functions = (tuple(f for _, f in named) for named in (named_metrics, named_records))
    compiled = _compiled(cost, optimizer, metric_functions, functions, layout, skips)
    reader = _Reader(batches, steps_per_epoch, None if epochs is None else epochs * steps_per_epoch)
    source = _Stream(cost, optimizer, params, reader, placed, named_records, layout, skips, *compiled)
    with closing(reader):
        history = follow(source, state, run=run, together=layout is not None, progress=progress, **options)
    if not len(history.seconds):
        raise ValueError("fit_batches: batches gave no batch; an iterator can be used once only.")
    if source.has_ended and epochs is not None and len(history.seconds) < epochs:
        warnings.warn(
            f"fit_batches: the batches ended after epoch {len(history.seconds)} of {epochs}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return history


class _Batch(NamedTuple):
    number: int  # counted from 0
    arrays: tuple[np.ndarray, ...]

    @property
    def form(self) -> tuple[Any, ...]:
        return tuple((array.shape, array.dtype) for array in self.arrays)


class _Reader:
    """Reads batches ahead in a thread, in groups of one compiled call: equal shapes, in one epoch."""

    def __init__(self, batches: Iterable[Any], steps_per_epoch: int, end: int | None):
        self.batches, self.steps_per_epoch, self.end = batches, steps_per_epoch, end
        self._groups: queue.Queue[Any] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._first: list[_Batch] = []
        self._rest: Iterator[Any] | None = None

    def first(self) -> _Batch | None:
        """The first batch of all; it is not used up. Before `start`."""
        if not self._first:
            self._rest = iter(self.batches)
            self._first = [_checked(0, arrays) for arrays in islice(self._rest, 1)]
        return self._first[0] if self._first else None

    def start(self, step: int) -> None:
        """Begins to read, from the batch of a step on."""
        # A thread has JAX's settings as they are everywhere, not those of a `with` around this call.
        x64 = jax.dtypes.canonicalize_dtype(np.int64) == np.int64
        self._thread = threading.Thread(target=self._read, args=(step, x64), name="fit_batches", daemon=True)
        self._thread.start()

    def group(self) -> list[_Batch]:
        """The next batches; none at the end. Raises what reading them raised."""
        group = self._groups.get()
        if isinstance(group, BaseException):
            raise group
        return group

    def close(self) -> None:
        """Ends the thread, unless it waits for a batch: then it ends with that."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(SECONDS)

    def _from(self, step: int) -> Iterator[Any]:
        rest = None if self.end is None else max(self.end - step, 0)  # those behind may be long in coming
        if self._rest is None or (step and hasattr(self.batches, "after")):
            after = getattr(self.batches, "after", None)
            return islice(after(step), rest) if after else islice(self.batches, step, self.end)
        return islice(chain((batch.arrays for batch in self._first), self._rest), step, self.end)

    def _read(self, step: int, x64: bool) -> None:
        with jax.enable_x64(x64):
            self._read_from(step)

    def _read_from(self, step: int) -> None:
        try:
            group, taken, end = [], 0, self.steps_per_epoch
            for number, arrays in enumerate(self._from(step), start=step):
                batch = _checked(number, arrays)
                if group and batch.form != group[0].form:
                    self._put(group)
                    group = []
                group.append(batch)
                taken += 1
                size = sum(array.nbytes for array in batch.arrays)
                if taken == end or len(group) == max(1, min(STEPS, BYTES // max(size, 1))):
                    self._put(group)
                    group, taken = [], taken % end
                if self._closed.is_set():
                    return
            if group:
                self._put(group)
            self._put([])
        except BaseException as error:  # raised again where the batches are used
            self._put(error)

    def _put(self, group: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._groups.put(group, timeout=0.05)
            except queue.Full:
                continue


def _checked(number: int, batch: Any) -> _Batch:
    check_form(f"batch {number}", batch)
    # Copies, as a loader may reuse its memory; not np.array, which other libraries' tensors warn of.
    return _Batch(number, tuple(np.asarray(array).copy() for array in batch))


@dataclass
class _Stream:
    """Epochs of so many steps on batches that are read ahead."""

    cost: RuleLike
    optimizer: optax.GradientTransformation
    params: Any  # as at the start, for their shapes
    reader: _Reader
    validation: tuple[Array, ...] | None
    record: Sequence[tuple[str, Record]]
    layout: Layout | None
    skips: bool
    run_steps: Callable[..., Any]
    evaluate: Callable[..., Any]
    has_ended: bool = False
    _forms: dict[Any, int] = field(default_factory=dict)  # shapes and dtypes that fit -> rows
    _next: tuple[list[_Batch], tuple[Array, ...]] = ([], ())
    _has_begun: bool = False
    _error: Exception | None = None  # of the next batches, for the epoch that needs them
    _bad: tuple[TrainState, tuple[Array, ...], np.ndarray, int] | None = None

    @property
    def examples(self) -> int:
        return 0

    @property
    def steps(self) -> int:
        return self.reader.steps_per_epoch

    def row(self, state: TrainState) -> Rows:
        batch = self.reader.first()
        if batch is None:
            return Rows(np.zeros(0), [], [0.0], self._held_out_shapes(state))
        self._check(batch)
        chunk = tuple(jax.ShapeDtypeStruct((1, *a.shape), jnp.asarray(a[:0]).dtype) for a in batch.arrays)
        _, costs, recorded, _ = jax.eval_shape(self.run_steps, state, chunk)
        return Rows(costs, recorded, [0.0], self._held_out_shapes(state))

    def _held_out_shapes(self, state: TrainState) -> list[Any]:
        return [] if self.validation is None else jax.eval_shape(self.evaluate, state.params, self.validation)

    def advance(self, state: TrainState, n: int, keep: bool) -> Advance:
        """One epoch, as at its end the host has work in any case. It keeps the states that it needs."""
        if not self._has_begun:
            self._has_begun = True
            self.reader.start(int(state.step))
            self._take()
        costs, sizes, records, steps, start = [], [], [], 0, time.perf_counter()
        at_beginning = state._replace(optimizer_state=None)  # what is left if this epoch diverges
        while steps < self.steps and not self.has_ended:
            if self._error is not None:
                raise self._error
            (group, chunk), before = self._next, state
            state, *out = self.run_steps(before, chunk)
            self._take()  # while the device works
            some, recorded, is_finite = jax.device_get(out)
            if not is_finite:
                self._bad = before, chunk, some, steps
                rows = Rows(some[None], [], [np.zeros(1)], [np.zeros(1)])
                return Advance(state, at_beginning, 1, 0.0, rows)
            costs.append(some)
            sizes += [chunk[0].shape[1]] * len(group)
            records.append(recorded)
            steps += len(group)
        if not steps:
            return Advance(state, None, 0, 0.0, Rows(np.zeros((0, 0)), [], [], []))
        held_out = []
        if self.validation is not None:
            held_out = jax.device_get(self.evaluate(state.params, self.validation))
        everything = np.concatenate(costs)
        recorded = jax.tree.map(lambda *x: np.concatenate(x)[None], *records)
        train = [_mean_cost(everything, np.array(sizes), self.skips)]
        rows = Rows(everything[None], recorded, [np.array([c]) for c in train], [c[None] for c in held_out])
        return Advance(state, None, 1, time.perf_counter() - start, rows)

    def _take(self) -> None:
        """The next group, placed on the devices: as many steps as every process has."""
        try:
            group = self.reader.group()
            for batch in group:
                self._check(batch)
        except Exception as error:
            if self.layout is not None and jax.process_count() > 1:  # where others wait for this one
                raise
            self._error = error
            return
        rows = len(group[0].arrays[0]) if group else 0
        everyone = (alone if self.layout is None else answers)(len(group), rows)
        steps, lengths = int(everyone[:, 0].min()), set(everyone[everyone[:, 0] > 0, 1].tolist())
        if len(lengths) > 1:
            raise ValueError(
                "fit_batches: every process needs to give as many rows of a batch as the others, "
                f"got {sorted(lengths)}."
            )
        self.has_ended = steps == 0
        if steps < len(group):
            group = group[:steps]
            warnings.warn(
                "fit_batches: another process has fewer batches; this one's last are not used.",
                RuntimeWarning,
                stacklevel=2,
            )
        if group:
            stacked = (np.stack(arrays) for arrays in zip(*(batch.arrays for batch in group), strict=True))
            self._next = group, tuple(self._placed(array) for array in stacked)
        else:
            self._next = [], ()

    def _placed(self, array: np.ndarray) -> Array:
        """(steps, rows, ...) on the devices; with several processes these are the rows of this one."""
        if self.layout is None:
            return jnp.asarray(array)
        sharding = NamedSharding(self.layout.mesh, PartitionSpec(None, self.layout.batch))
        if jax.process_count() > 1:
            return jax.make_array_from_process_local_data(sharding, array)
        if array.shape[1] % self.layout.mesh.shape[self.layout.batch]:
            return jax.device_put(array, NamedSharding(self.layout.mesh, WHOLE))
        return jax.device_put(array, sharding)

    def _check(self, batch: _Batch) -> None:
        name = f"batch {batch.number}"
        if batch.form not in self._forms:
            arrays = tuple(map(jnp.asarray, batch.arrays))
            check_fits(name, arrays, self.cost, self.params)
            self._forms[batch.form] = len(batch.arrays[0])
            sizes = tuple(set(self._forms.values()))
            check_recorded_shapes(self.record, self.cost, self.params, arrays, sizes)
        check_numbers(name, batch.arrays, self.cost, self.params)

    def explain(self, advance: Advance, epoch: int) -> str:
        assert self._bad is not None
        before, chunk, costs, steps_before = self._bad
        before, chunk = on_host((before, chunk))
        where = {"steps_before": steps_before, "steps_in_all": self.steps}
        return explain(
            self.cost,
            self.optimizer,
            before,
            lambda i: tuple(array[i] for array in chunk),
            costs,
            epoch,
            self.skips,
            **where,
        )


def _mean_cost(costs: np.ndarray, sizes: np.ndarray, skips: bool) -> float:
    """Over the examples of an epoch; with `skips` over those of steps whose cost is finite."""
    taken = np.isfinite(costs) if skips else np.ones(len(costs), bool)
    if not taken.any():
        return np.nan
    return float(np.sum(costs[taken].astype(float) * sizes[taken]) / np.sum(sizes[taken]))


@lru_cache(maxsize=16)  # as many runs as `fit` keeps compiled
def _compiled(cost, optimizer, metrics, record, layout, skips):
    steps = partial(_steps, cost, optimizer, record, layout, skips)
    held_out = partial(_held_out, cost, metrics, layout)
    if layout is not None:
        steps, held_out = partitioned()(steps), partitioned()(held_out)
    return jax.jit(steps), jax.jit(held_out)


def _held_out(cost, metrics, layout, params, validation):
    if layout is not None:
        params, validation = layout.gathered(params), layout.rows(validation)
    return held_out_numbers(cost, metrics, params, validation)


def _steps(cost, optimizer, record, layout, skips, state, chunk):
    """A step on each batch of a chunk (steps, rows, ...).

    Returns the state, the costs, what is recorded, and whether all is finite.
    """
    step = step_with_rows(cost, optimizer, record, layout)
    if layout is not None:
        step = layout.on_gathered(step)
    state, (costs, recorded) = jax.lax.scan(partial(laid_out_step, step, layout), state, chunk)
    if layout is not None:  # in the scan XLA may have found another place
        state = layout.placed(state.params, state)
    is_finite = all_finite(state.params)
    if not skips:
        is_finite &= jnp.isfinite(costs).all()
    return state, costs, recorded, is_finite
