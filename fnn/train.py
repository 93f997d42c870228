"""Training: a pure step, and an epoch as one compiled scan. `fit`, around it on the host, is in `runs.py`.

An epoch visits every example exactly once, in a fresh random order. If N is no multiple of the batch
size m, the last N mod m examples make one more, shorter step after the scan, in the same compiled
program: nothing is dropped, padded or repeated, and that step's cost is the mean over its own examples.

Optimisers are optax's; the gradient is the cost's own pullback. Where something is recorded, a step makes the
sweep and takes its gradient from that, so that what is recorded is of the very a and δ of the step.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from .arguments import check_batches, check_optimizer
from .elementary import after, step_in_place, widened
from .orders import shuffle
from .params import _outline, check_key, check_not_narrowed
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

    Every array is a copy of its own, as `train_epoch` reuses the memory of the state that it gets, and
    optimisers such as `optax.lbfgs` begin with the parameters themselves in their state.
    """
    return copied(first_state(optimizer, params, key))


def copied(tree: Any) -> Any:
    """Every array in memory of its own, where it was placed."""
    return jax.tree.map(partial(jnp.array, copy=True), tree)


def all_finite(tree: Any) -> Array:
    """Whether no number of any array is NaN or infinite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def first_state(optimizer: optax.GradientTransformation, params: Any, key: Array) -> TrainState:
    """Likewise without copies: some of its arrays may be the caller's, whose memory is not to be reused."""
    check_optimizer("train_state", optimizer)
    check_key("train_state", key)
    for path, leaf in jax.tree.leaves_with_path(params):
        if hasattr(leaf, "dtype"):
            check_not_narrowed(f"train_state: params{jax.tree_util.keystr(path)}", leaf.dtype)
    return TrainState(params, optimizer.init(params), key, jnp.zeros((), jnp.int32))


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
    with step_in_place():
        C, gradient = value_and_grad(cost)(state.params, *batch)
    return _update(cost, optimizer, state, C, gradient, *batch), C


def recorded_step(cost, optimizer, record, layout, state, *batch):
    """`train_step` from the sweep, and what every function of `record` makes of that.

    layout: with layers whose gradient is computed from factors that every device has, or None
    """
    sweep = backprop(cost, state.params, *batch)
    C = cost.forward(state.params, *batch)[0]  # the same forward pass: compiled code has it once
    pairs = sweep if layout is None else layout.with_factors_gathered(sweep)
    with step_in_place():
        gradient = mean_gradient(pairs) if len(batch) == 2 else gradient_of(pairs)
    return _update(cost, optimizer, state, C, gradient, *batch), (C, [function(sweep) for function in record])


def step_with_rows(cost: RuleLike, optimizer: Any, record: Sequence[Record], layout: Any) -> Callable:
    """The step (state, *batch) -> (state, (cost, what is recorded)), from the sweep where that is needed."""
    if record or (layout is not None and layout.factors):
        return partial(recorded_step, cost, optimizer, record, layout)

    def step(state, *batch):
        state, C = train_step(cost, optimizer, state, *batch)
        return state, (C, [])

    return step


def _update(cost, optimizer, state, C, gradient, *batch):
    """The state after a step of the optimiser from this gradient."""
    value_of = as_custom_vjp(cost)
    with step_in_place():  # a penalty reads the weights
        gradient = jax.tree.map(lambda leaf: after(leaf, C), gradient)
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
    return scan_epoch(partial(train_step, cost, optimizer), state, data, batch_size)


def scan_epoch(
    step_on: Callable, state: TrainState, data: tuple[Array, ...], batch_size: int, layout: Any = None
) -> tuple[TrainState, Any]:
    """An epoch of steps (state, *batch) -> (state, row); the rows along a first axis.

    layout: a `Layout` of batches and state over several devices, which have the data whole
    """
    batch_size = check_batches("train_epoch", data, batch_size)
    N = len(data[0])
    key, order = shuffle(state.key, N)

    def step(state, rows):
        rows = rows if layout is None else layout.whole(rows)  # or XLA splits the order and sends parts of it
        batch = tuple(a.at[rows].get(mode="promise_in_bounds", unique_indices=True) for a in data)
        return laid_out_step(step_on, layout, state, batch)

    n_full = N - N % batch_size
    state, rows = jax.lax.scan(step, state._replace(key=key), order[:n_full].reshape(-1, batch_size))
    if n_full < N:
        state, last = step(state, order[n_full:])
        rows = jax.tree.map(lambda rows, row: jnp.concatenate([rows, row[None]]), rows, last)
    return state, rows


def laid_out_step(
    step_on: Callable, layout: Any, state: TrainState, batch: tuple[Array, ...]
) -> tuple[TrainState, Any]:
    """A step (state, *batch) -> (state, row) whose batch and state are placed as the layout says."""
    if layout is None:
        return step_on(state, *batch)
    state, row = step_on(state, *layout.rows(batch))
    return layout.placed(state.params, state), layout.whole(row)


def epoch_numbers(
    cost: RuleLike,
    metrics: Sequence[Metric],
    params: Any,
    costs: Float[Array, " steps"],
    data: tuple[Array, ...],
    validation: tuple[Array, ...] | None,
    batch_size: int,
    *,
    skips: bool = False,
) -> tuple[list[Array], list[Array]]:
    """Cost and metrics after an epoch on the training data, and on the validation data if there are any.

    costs: of the epoch's steps; the training cost is their mean over its examples
    skips: leaves out steps whose cost is not finite
    """
    N = len(data[0])
    sizes = np.minimum(batch_size, N - batch_size * np.arange(len(costs)))
    # In at least float32: a mean of bfloat16 costs would show three digits.
    wide = widened(costs)
    shares = jnp.asarray(sizes / N, wide.dtype)
    if skips:
        taken = jnp.isfinite(wide)
        wide, shares = jnp.where(taken, wide, 0), jnp.where(taken, shares, 0) / jnp.sum(shares, where=taken)
    train = [jnp.sum(wide * shares), *(metric(params, *data[:2]) for metric in metrics)]
    if validation is None:
        return train, []
    return train, held_out_numbers(cost, metrics, params, validation)


def held_out_numbers(
    cost: RuleLike, metrics: Sequence[Metric], params: Any, validation: tuple[Array, ...]
) -> list[Array]:
    """Cost and metrics on the validation data."""
    return [cost.forward(params, *validation)[0], *(metric(params, *validation[:2]) for metric in metrics)]


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
