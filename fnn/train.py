"""Training: a pure step, an epoch as one compiled scan, and `fit` around it on the host.

An epoch visits every example exactly once, in a fresh random order. If N is no multiple of the batch
size m, the last N mod m examples make one more, shorter step after the scan, in the same compiled
program: nothing is dropped, padded or repeated, and that step's cost is the mean over its own examples.

Optimisers are optax's; the gradient is the cost's own pullback. Where something is recorded, a step makes the
sweep and takes its gradient from that, so that what is recorded is of the very a and δ of the step.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .arguments import (
    check_batches,
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
from .params import _outline, check_key, check_not_narrowed
from .progress import progress_bar
from .rules import RuleLike, as_custom_vjp, check_rule_like, is_array, value_and_grad
from .sweep import Sweep, backprop, mean_gradient
from .sweep import gradient as gradient_of

Metric = Callable[..., Array]  # (params, X, y) -> scalar
Record = Callable[[Sweep], Any]  # sweep -> arrays


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: Any
    optimizer_state: Any
    key: Array  # of the next shuffle
    step: Array  # steps taken so far


def train_state(optimizer: optax.GradientTransformation, params: Any, key: Array) -> TrainState:
    """The state before the first step.

    Every array is a copy of its own, as an epoch reuses the memory of the state that it gets, and optimisers
    such as `optax.lbfgs` begin with the parameters themselves in their state.
    """
    check_optimizer("train_state", optimizer)
    check_key("train_state", key)
    for path, leaf in jax.tree.leaves_with_path(params):
        if hasattr(leaf, "dtype"):
            check_not_narrowed(f"train_state: params{jax.tree_util.keystr(path)}", leaf.dtype)
    state = TrainState(params, optimizer.init(params), key, jnp.zeros((), jnp.int32))
    return jax.tree.map(partial(jnp.array, copy=True), state)


def train_step(
    cost: RuleLike, optimizer: optax.GradientTransformation, state: TrainState, *batch: Array
) -> tuple[TrainState, Array]:
    """One step of any optax optimiser on one batch (X, y[, sample_weight]); the cost before the step.

    Pure, for use in `jax.jit` or `jax.lax.scan`. Line searches and schedules that ask for the value, the
    gradient or the function get them (`optax.lbfgs`, `optax.contrib.reduce_on_plateau`).

    >>> import fnn, jax, jax.numpy as jnp, optax
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> params = (fnn.Layer(W=jnp.array([[1.0]]), b=jnp.array([0.0])),)
    >>> state = fnn.train_state(optax.sgd(0.5), params, jax.random.key(0))
    >>> state, C = fnn.train_step(cost, optax.sgd(0.5), state, jnp.array([[2.0]]), jnp.array([[0.0]]))
    >>> print(C, state.params[0].W, state.params[0].b)
    2.0 [[-1.]] [-1.]
    """
    if not isinstance(state, TrainState):
        raise TypeError(
            "train_step: state needs to be a TrainState, as fnn.train_state makes, "
            f"got {type(state).__name__}."
        )
    C, gradient = value_and_grad(cost)(state.params, *batch)
    return _update(cost, optimizer, state, C, gradient, *batch), C


def _recorded_step(cost, optimizer, record, state, *batch):
    """`train_step` from the sweep, and what every function of `record` makes of that."""
    sweep = backprop(cost, state.params, *batch)
    C = cost.forward(state.params, *batch)[0]  # the same forward pass: compiled code has it once
    gradient = mean_gradient(sweep) if len(batch) == 2 else gradient_of(sweep)
    return _update(cost, optimizer, state, C, gradient, *batch), (C, [function(sweep) for function in record])


def _update(cost, optimizer, state, C, gradient, *batch):
    """The state after a step of the optimiser from this gradient."""
    value_of = as_custom_vjp(cost)
    updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
        gradient,
        state.optimizer_state,
        state.params,
        value=C,
        grad=gradient,
        value_fn=lambda params: value_of(params, *batch),
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, optimizer_state, state.key, state.step + 1)


@partial(jax.jit, static_argnames=("cost", "optimizer", "batch_size"), donate_argnames="state")
def train_epoch(
    cost: RuleLike,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: tuple[Array, ...],
    batch_size: int,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """One epoch over `data` (X, y[, sample_weight]) as one compiled scan; the cost of every step.

    The memory of `state` is reused: go on with the one returned.
    """
    return _scan(partial(train_step, cost, optimizer), state, data, batch_size)


def _scan(step_on, state, data, batch_size):
    """An epoch of steps (state, *batch) -> (state, row); the rows along a first axis."""
    batch_size = check_batches("train_epoch", data, batch_size)
    N = len(data[0])
    key, shuffle_key = jax.random.split(state.key)
    order = jax.random.permutation(shuffle_key, N)

    def step(state, rows):
        batch = (a.at[rows].get(mode="promise_in_bounds", unique_indices=True) for a in data)
        return step_on(state, *batch)

    n_full = N - N % batch_size
    state, rows = jax.lax.scan(step, state._replace(key=key), order[:n_full].reshape(-1, batch_size))
    if n_full < N:
        state, last = step(state, order[n_full:])
        rows = jax.tree.map(lambda rows, row: jnp.concatenate([rows, row[None]]), rows, last)
    return state, rows


def accuracy(net: RuleLike) -> Metric:
    """The fraction of examples that a classifier gets right: a metric (params, X, y) -> scalar.

    The network's answer is the largest of its K ≥ 2 outputs; y holds class numbers (N,), or probabilities
    (N, K) whose largest is the class.

    >>> import fnn, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.eye(2), jnp.zeros(2)),)
    >>> X = jnp.array([[3.0, 1.0], [1.0, 3.0], [5.0, 0.0], [0.0, 2.0]])
    >>> print(fnn.accuracy(fnn.mlp([]))(params, X, jnp.array([0, 1, 1, 1])))
    0.75
    """
    check_rule_like("accuracy: the network", net, "params", "X", such_as="fnn.mlp(fnn.relu)")
    return _accuracy(net)


@cache
def _accuracy(net: RuleLike) -> Metric:
    def fraction_right(params, X, y):
        outputs, _ = net.forward(params, X)
        classes = is_array(y) and jnp.issubdtype(y.dtype, jnp.integer)
        shape = outputs.shape[:-1] if classes else outputs.shape
        if not is_array(y) or y.shape != shape or outputs.shape[-1] < 2 or not outputs.size:
            raise ValueError(
                "accuracy: needs two outputs or more, and class numbers (N,) or probabilities (N, K); "
                f"got outputs {outputs.shape} and y {_outline(y)}. Class numbers are integers, "
                "y.astype(int), and no column, y[:, 0]; for a single output write a metric of your own."
            )
        labels = y if classes else jnp.argmax(y, axis=-1)
        answers = jnp.argmax(outputs, axis=-1)
        # The labels get the answers' dtype: an answer in the dtype of uint8 labels would wrap at 256.
        return jnp.mean(answers == labels.astype(answers.dtype), dtype=jnp.float32)

    return fraction_right


@dataclass(frozen=True)
class History:
    """What `fit` returns: the trained parameters, and one number for each epoch.

    params: after the last epoch
    train: "cost", the mean over the epoch's examples of the cost as it was when each was used; and every
        metric on the whole training data after the epoch
    validation: "cost" and every metric on the validation data after the epoch; empty without such data
    seconds: wall time of each epoch; the first includes compilation
    records: name -> what a function of `record` made of each step's sweep: arrays with a first axis of steps
    """

    params: Any
    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    seconds: np.ndarray
    records: Mapping[str, Any] = field(default_factory=dict)


class DivergenceError(FloatingPointError):
    """The cost or the parameters became NaN or infinite. `history` ends with the last good epoch."""

    def __init__(self, message: str, history: History):
        super().__init__(message)
        self.history = history


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
    progress: show a bar

    `params` are left as they were. Everything is compiled once, for a run of any length. Before anything
    runs, arguments are checked, values included: NaN and inf, labels out of range, float64 that JAX would
    narrow in silence. Raises TypeError or ValueError; `DivergenceError` if the run diverges.

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

    functions = [tuple(function for _, function in named) for named in (named_metrics, named_records)]
    run_epoch = _compiled_epoch(cost, optimizer, *functions, batch_size)
    names = ("cost", *(name for name, _ in named_metrics))
    state = train_state(optimizer, params, key)
    train, held_out, seconds, records = [], [], [], []

    def history(params):
        columns = _columns(names, train), _columns(names, held_out)
        recorded = zip((name for name, _ in named_records), zip(*records, strict=True), strict=records != [])
        joined = {name: jax.tree.map(lambda *x: np.concatenate(x), *epochs) for name, epochs in recorded}
        return History(params, *columns, np.array(seconds, float), joined)

    with progress_bar(epochs, names, show=progress) as show:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            state, before, *results = run_epoch(state, data, validation)
            costs, is_finite, recorded, *numbers = jax.device_get(results)
            if not (is_finite and np.isfinite(costs).all()):
                raise DivergenceError(_divergence(costs, epoch), history(before))
            for rows, row in zip((train, held_out), numbers, strict=True):
                rows.append([float(number) for number in row])
            records.append(recorded)
            seconds.append(time.perf_counter() - start)
            show(epoch, train[-1], held_out[-1])
    return history(state.params)


@lru_cache(maxsize=16)  # runs kept compiled; a search over thousands of optimisers would fill the memory
def _compiled_epoch(cost, optimizer, metrics, record, batch_size):
    return jax.jit(partial(_epoch, cost, optimizer, metrics, record, batch_size), donate_argnums=0)


def _epoch(cost, optimizer, metrics, record, batch_size, state, data, validation):
    """An epoch and its evaluation as one program, so that a run compiles once.

    Returns the parameters as they were before the epoch too: what is left if it diverges.
    """
    before, N = state.params, len(data[0])
    if record:
        step = partial(_recorded_step, cost, optimizer, record)
        state, (costs, recorded) = _scan(step, state, data, batch_size)
    else:
        (state, costs), recorded = train_epoch(cost, optimizer, state, data, batch_size), []
    is_finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]).all()
    sizes = np.minimum(batch_size, N - batch_size * np.arange(len(costs)))
    # In at least float32: a mean of bfloat16 costs would show three digits.
    wide = costs if jnp.finfo(costs.dtype).bits >= 32 else costs.astype(jnp.float32)
    train = [jnp.sum(wide * jnp.asarray(sizes / N, wide.dtype))]
    train += [metric(state.params, *data[:2]) for metric in metrics]
    held_out = []
    if validation is not None:
        held_out = [cost.forward(state.params, *validation)[0]]
        held_out += [metric(state.params, *validation[:2]) for metric in metrics]
    return state, before, costs, is_finite, recorded, train, held_out


def _columns(names: Sequence[str], rows: Sequence[Sequence[float]]) -> dict[str, np.ndarray]:
    """name -> its numbers, one for each epoch; none where there is no such data."""
    if rows and not rows[0]:
        return {}
    return {name: np.array([row[i] for row in rows], float) for i, name in enumerate(names)}


def _divergence(costs: np.ndarray, epoch: int) -> str:
    """What went wrong, at which step, and what to do."""
    wrong = np.flatnonzero(~np.isfinite(costs))
    why = "Try a smaller learning rate, or clip gradients with optax.clip_by_global_norm."
    if not len(wrong):
        where = "the parameters became NaN or infinite in the last step"
    else:
        where = f"the cost became {costs[wrong[0]]} at step {wrong[0] + 1} of {len(costs)}"
    if epoch == 1 and len(costs[: wrong[0] if len(wrong) else None]) == 1:
        why = "That was the first update: is the learning rate NaN, infinite, or far too large?"
    elif epoch == 1 and len(wrong) and wrong[0] == 0:
        why = "Nothing was updated yet: the network overflows, or a loss on probabilities met a 0."
    return (
        f"fit: in epoch {epoch} {where}. {why} This error's .history has the {epoch - 1} epochs before, "
        "and the parameters as they were after them."
    )
