"""Where a run stopped being finite: its last steps are run again up to the one, which is then taken apart."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from .network import Cost, Network
from .rules import RuleLike, value_and_grad
from .sweep import backprop
from .train import TrainState, train_step


def explain(
    cost: RuleLike,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch_at: Callable[[int], tuple[Array, ...]],
    costs: np.ndarray,
    epoch: int,
    skips: bool,
    *,
    steps_before: int = 0,
    steps_in_all: int | None = None,
) -> str:
    """What went wrong in an epoch, at which step, in which quantity first, and what to do.

    state: before the first of some steps of the epoch
    batch_at: i -> the batch of step i of these, counted from 0
    costs: of these steps
    skips: whether steps were skipped: then what counts are the parameters, not the costs
    steps_before: of the epoch, before these
    steps_in_all: of the epoch; by default these
    """
    wrong = np.flatnonzero(~np.isfinite(costs)) if not skips else np.empty(0, int)
    step = int(wrong[0]) if len(wrong) else len(costs) - 1
    state, batch, step = _replay(cost, optimizer, state, batch_at, step, not len(wrong))
    first = next(_not_finite(cost, optimizer, state, batch), None)
    where = f"at step {steps_before + step + 1} of {steps_in_all or len(costs)}"
    if len(wrong):
        where = f"the cost became {costs[step]} {where}"
    else:
        where = f"the parameters became NaN or infinite {where}"
    found = "" if first is None else f" First not finite there: {first}."
    why = "Try a smaller learning rate, or clip gradients with optax.clip_by_global_norm."
    step += steps_before
    if epoch == 1 and step == (1 if len(wrong) else 0):
        why = "That was the first update: is the learning rate NaN, infinite, or far too large?"
    elif epoch == 1 and len(wrong) and step == 0:
        why = "Nothing was updated yet: the network overflows, or a loss on probabilities met a 0."
    return (
        f"fit: in epoch {epoch} {where}.{found} {why} This error's .history has the {epoch - 1} epochs "
        "before, and the parameters as they were after them."
    )


def _replay(
    cost: RuleLike,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch_at: Callable[[int], tuple[Array, ...]],
    step: int,
    by_params: bool,
) -> tuple[TrainState, tuple[Array, ...], int]:
    """The state before a step, the step's batch, and its number, counted from 0.

    by_params: whether it is the first one after which parameters are not finite, `step` being the last
    """
    take = jax.jit(partial(train_step, cost, optimizer))
    for i in range(step + 1):
        batch = batch_at(i)
        after, _ = take(state, *batch)
        if i == step or (by_params and next(_bad("", after.params), None) is not None):
            return state, batch, i
        state = after
    raise AssertionError("there is a step")


def _not_finite(
    cost: RuleLike, optimizer: optax.GradientTransformation, state: TrainState, batch: tuple[Array, ...]
) -> Iterator[str]:
    """The quantities of a step that are not finite, in the order in which they are computed."""
    params = state.params
    yield from _bad("params", params)
    if isinstance(cost, Cost) and isinstance(cost.net, Network):
        A = cost.net.forward(params, batch[0])[0]
        sweep = backprop(cost, params, *batch)
        for l, a in enumerate((*sweep.inputs[1:], A), start=1):
            yield from _bad(f"a^{l}, the output of layer {l}", a)
        yield from _bad("the losses", sweep.losses)
        for l in reversed(range(len(sweep.errors))):
            yield from _bad(f"δ^{l + 1}, the error of layer {l + 1}", sweep.errors[l])
    C, gradient = value_and_grad(cost)(params, *batch)
    yield from _bad("the cost", C)
    yield from _bad("the gradient", gradient)
    state, _ = train_step(cost, optimizer, state, *batch)
    yield from _bad("the parameters after the update", state.params)


def _bad(what: str, tree: Any) -> Iterator[str]:
    """`what`, with the name of the leaf in a pytree and the first index of a number that is not finite."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        wrong = np.argwhere(~np.asarray(jnp.isfinite(leaf)))
        if len(wrong):
            index = tuple(map(int, wrong[0]))
            at = f" at index [{', '.join(map(str, index))}]" if index else ""
            yield f"{what}{jax.tree_util.keystr(path)}{at}, {np.asarray(leaf)[index]}"
