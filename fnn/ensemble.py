"""Many networks at once: members along a leading axis, trained side by side in one compiled run.

The parameters of M networks are the pytree of one with every array (M, ...), as `jax.vmap` makes them. All
members see the same data, each in an order of its own, and any hyperparameter that the optimiser has injected
(`optax.inject_hyperparams`) may differ between them. A member is trained as `fit` trains it alone.

An epoch is one program: a loop over chunks of members, and in each chunk `jax.vmap` of `train_epoch`, which
turns the products of a step into batched ones. A chunk is read from the state and written back in place:
beside a state of 3.5 MiB, of 64 networks 64-64-10 under Adam, 8 at once need 0.8 MiB
(experiments/benchmarks/ensembles.py). The data are there once.
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

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
    check_layout,
    check_metrics,
    check_not_traced,
    check_optimizer,
    check_params_values,
    check_scalar,
)
from .params import _outline
from .processes import check_agreed, check_launcher, on_host
from .progress import progress_bar
from .resume import fingerprint
from .rules import RuleLike, check_rule_like
from .sharding import WHOLE, Layout
from .train import Metric, TrainState, all_finite, epoch_numbers, train_epoch, train_state


@dataclass(frozen=True)
class EnsembleHistory:
    """What `fit_ensemble` returns: the trained members, and a number for each of them and each epoch.

    params: after the last epoch, every array (M, ...); NaN for a member that diverged
    train: name -> (M, epochs), "cost" and every metric as in `History`; NaN for a member from the epoch on
        in which it diverged
    validation: the same on the validation data; empty without such data
    diverged: (M,) integers, the epoch in which a member diverged, counted from 1; 0 for never
    seconds: (epochs,) wall time of each, of all members together; the first includes compilation
    """

    params: Any
    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    diverged: np.ndarray
    seconds: np.ndarray


def fit_ensemble(
    cost: RuleLike,
    optimizer: optax.GradientTransformation,
    params: Any,
    data: Sequence[Any],
    *,
    keys: Any,
    epochs: int,
    batch_size: int,
    hyperparameters: Mapping[str, Any] | None = None,
    validation: Sequence[Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    members_at_once: int | None = None,
    layout: Layout | None = None,
    progress: bool = True,
) -> EnsembleHistory:
    """Trains M networks on the same data, each as `fit` would alone with its own key and hyperparameters.

    cost, data, epochs, batch_size, validation, metrics: as in `fit`; the same for all members
    optimizer: any of optax; made by `optax.inject_hyperparams` where members differ in hyperparameters
    params: of all members, every array (M, ...), such as jax.vmap of `fnn.init` makes
    keys: M keys, jax.random.split(key, M); each decides the order of the examples for its member. Equal
        keys give members the same order.
    hyperparameters: name -> M numbers, in place of the one that was injected under that name
    members_at_once: how many are trained side by side, the rest waiting; by default, as measured, on a CPU 4
        of at most 10,000 parameters each, or 1, and on other devices all. It changes time and memory, and
        results by no more than rounding. With a layout, on each device.
    layout: such as `fnn.data_parallel()`; every device then trains its share of the members, M divided by
        the number of devices, and they tell each other nothing
    progress: show a bar, with medians over the members

    A penalty that differs is a hyperparameter too, of `optax.adamw`, or with the meaning of the cost's l2
    but also for biases, and not counted in the cost, of

        optax.chain(optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=0.0), optax.sgd(0.1))

    Injected numbers have the dtype of the parameters, and Adam's b2 of 0.999 is 1 in bfloat16. What is named
    in `static_args` stays a Python float: optax.inject_hyperparams(optax.adam, static_args=("b1", "b2")).

    A member diverges where its cost or parameters become NaN or infinite, for which `fit` raises
    `DivergenceError`. Here the others go on as if nothing had happened; all that is left of the member is NaN
    from that epoch on, `diverged` has the epoch, and a RuntimeWarning at the end says how many there were.
    Those that are left: `good = history.diverged == 0`, `jax.tree.map(lambda a: a[good], history.params)`.

    A member's order of the examples is that of `fit` with keys of JAX's default kind, threefry; those of the
    kind rbg give other numbers under `jax.vmap`. Everything is compiled once, for a run of any length, and
    arguments are checked as `fit` does. Raises TypeError or ValueError.

    >>> import fnn, jax, numpy as np, optax
    >>> X = jax.random.normal(jax.random.key(0), (100, 3))
    >>> y = X @ jax.numpy.array([[1.0], [-2.0], [0.5]])
    >>> keys = jax.random.split(jax.random.key(1), 3)
    >>> params = jax.vmap(lambda key: fnn.init(key, (3, 1)))(keys)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    >>> history = fnn.fit_ensemble(cost, sgd, params, (X, y), keys=keys, epochs=5, batch_size=20,
    ...                            hyperparameters={"learning_rate": [0.0, 0.01, 0.3]}, progress=False)
    >>> history.params[0].W.shape, history.train["cost"].shape
    ((3, 1, 3), (3, 5))
    >>> history.train["cost"][:, -1] < 1e-3
    array([False, False,  True])
    """
    check_rule_like("fit_ensemble: cost", cost, such_as="fnn.cost(net, loss)")
    check_hashable("cost", cost)
    check_not_traced(params, keys, data, validation)
    check_optimizer("fit_ensemble", optimizer)
    check_hashable("optimizer", optimizer)
    M = _check_keys(keys)
    epochs = check_count("fit_ensemble", "epochs", epochs)
    batch_size = check_count("fit_ensemble", "batch_size", batch_size)
    params = check_params_values(params)
    _check_members("fit_ensemble", params, M)
    check_layout("fit_ensemble", layout)
    shares = 1 if layout is None else _shares(layout, M)
    size = _chunk_size(params, M // shares, members_at_once, "fit_ensemble")
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    data = check_data("data", data, cost, one)
    validation = None if validation is None else check_data("validation", validation, cost, one)
    check_batches("fit_ensemble", data, batch_size)
    named_metrics = check_metrics(metrics)
    for name, metric in named_metrics:
        check_scalar(f"metric {name!r}", metric, one, data[:2])

    run_epoch = _compiled_epoch(
        cost, optimizer, tuple(metric for _, metric in named_metrics), batch_size, size, layout
    )
    names = ("cost", *(name for name, _ in named_metrics))
    state = _with_hyperparameters(jax.vmap(partial(train_state, optimizer))(params, keys), hyperparameters)
    if layout is not None:
        check_launcher("fit_ensemble")
        agreed = fingerprint(cost, params, keys, data, validation, batch_size=batch_size, epochs=epochs)
        given = {name: np.asarray(values).tolist() for name, values in (hyperparameters or {}).items()}
        check_agreed("fit_ensemble", agreed | {"hyperparameters": given, "metrics": names, "size": size})
        state = layout.put_rows(state)
        data, validation = layout.put_whole((data, validation))
    diverged = np.zeros(M, int)
    train, held_out, seconds = [], [], []
    medians, N = [f"median {name}" for name in names], len(data[0])
    is_first = layout is None or jax.process_index() == 0
    with progress_bar(
        epochs,
        medians,
        show=progress and is_first,
        steps=-(-N // batch_size),
        examples=M * N,
    ) as show:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            state, *results = run_epoch(state, data, validation)
            is_finite, *numbers = jax.device_get(on_host(results))
            diverged[(diverged == 0) & ~is_finite] = epoch
            for rows, row in zip((train, held_out), numbers, strict=True):
                rows.append([np.where(diverged == 0, column, np.nan) for column in row])
            seconds.append(time.perf_counter() - start)
            last, last_held_out = ([_median(column) for column in rows[-1]] for rows in (train, held_out))
            show(epoch, last, last_held_out, seconds[-1])
    _warn_of(diverged)
    return EnsembleHistory(
        state.params, _columns(names, train), _columns(names, held_out), diverged, np.array(seconds)
    )


def ensemble_prediction(
    net: RuleLike, params: Any, X: Float[Array, "*N n_in"], *, members_at_once: int | None = None
) -> tuple[Float[Array, "*N n_out"], Float[Array, "*N n_out"]]:
    """Mean and standard deviation over M members of a network's outputs, one of each for every output.

    params: of all members, every array (M, ...)
    X: (N, n_0), or a single example (n_0,)
    members_at_once: as in `fit_ensemble`

    The deviation is that of the members themselves, with divisor M: 0 for one member. The mean of classifiers
    is best taken of their probabilities, with a net whose output is `fnn.softmax`. A member that diverged
    makes all NaN; leave it out first. Pure: may be called inside `jax.jit`.

    >>> import fnn, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.array([[[1.0]], [[3.0]]]), jnp.zeros((2, 1))),)  # y = x and y = 3x
    >>> mean, spread = fnn.ensemble_prediction(fnn.mlp([]), params, jnp.array([[1.0], [10.0]]))
    >>> print(mean.T, spread.T)
    [[ 2. 20.]] [[ 1. 10.]]
    """
    check_rule_like("ensemble_prediction: the network", net, "params", "X", such_as="fnn.mlp(fnn.relu)")
    leaves = jax.tree.leaves(params)
    M = leaves[0].shape[0] if leaves and jnp.ndim(leaves[0]) else 0
    _check_members("ensemble_prediction", params, M)
    return _prediction(net, _chunk_size(params, M, members_at_once, "ensemble_prediction"), params, X)


@partial(jax.jit, static_argnums=(0, 1))
def _prediction(net, size, params, X):
    outputs = jax.lax.map(lambda params: net.forward(params, X)[0], params, batch_size=size)
    return jnp.mean(outputs, axis=0), jnp.std(outputs, axis=0)


@lru_cache(maxsize=16)  # as many runs as `fit` keeps compiled
def _compiled_epoch(cost, optimizer, metrics, batch_size, size, layout):
    epoch = partial(_epoch, cost, optimizer, metrics, batch_size, size)
    if layout is not None:
        members = layout.rows_sharding.spec
        # Nothing is summed over members, so there is no sum over devices that could be forgotten.
        epoch = jax.shard_map(
            epoch, mesh=layout.mesh, in_specs=(members, WHOLE, WHOLE), out_specs=members, check_vma=False
        )
    return jax.jit(epoch, donate_argnums=0)


def _epoch(cost, optimizer, metrics, batch_size, size, state, data, validation):
    """An epoch of all members and its evaluation, chunk after chunk, as one program.

    Returns the state, and for every member whether it is finite and its numbers: (M,) each.
    """
    of_member = partial(_member_epoch, cost, optimizer, metrics, batch_size, data, validation)
    M = len(state.step)
    state, results = jax.lax.scan(partial(_chunk, of_member, size), state, size * jnp.arange(M // size))
    results = jax.tree.map(lambda a: a.reshape(-1), results)
    if rest := M % size:
        state, last = _chunk(of_member, rest, state, M - rest)
        results = jax.tree.map(lambda *a: jnp.concatenate(a), results, last)
    return state, *results


def _chunk(of_member, size, state, first):
    """The members first, ..., first + size - 1 side by side, in place."""
    part = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, size), state)
    part, results = jax.vmap(of_member)(part)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
    return jax.tree.map(put, state, part), results


def _member_epoch(cost, optimizer, metrics, batch_size, data, validation, state: TrainState):
    """One member's epoch and numbers. Its parameters become NaN if it diverges, and stay so."""
    state, costs = train_epoch(cost, optimizer, state, data, batch_size)
    is_finite = all_finite((costs, state.params))
    params = jax.tree.map(lambda a: jnp.where(is_finite, a, jnp.full_like(a, jnp.nan)), state.params)
    numbers = epoch_numbers(cost, metrics, params, costs, data, validation, batch_size)
    return state._replace(params=params), (is_finite, *numbers)


def _chunk_size(params: Any, M: int, members_at_once: Any, where: str) -> int:
    """How many members run side by side: at most so many as asked for, in chunks as equal as they can be."""
    if members_at_once is None:
        at_once = _default_at_once(params, M)
    else:
        at_once = check_count(where, "members_at_once", members_at_once)
    chunks = -(-M // at_once)
    return -(-M // chunks)


def _default_at_once(params: Any, M: int) -> int:
    """On a CPU 4 networks of at most 10,000 parameters, otherwise 1; on other devices all.

    Measured on two cores, the time of an epoch with 4 at once, in times with 1 at once: with batches of 32
    0.82 to 0.84 for 16 to 256 networks 64-64-10 (4,810 parameters), but 1.06 for 64-128-64-10 (17,226); all
    at once 0.82 to 1.04. For 784-256-256-10 with batches of 128 it was 0.82, and 0.75 with 2 at once, for 4
    and 2 times the memory (experiments/benchmarks/ensembles.py). Where between 4,810 and 17,226 it turns is a
    guess, and so is all at once on a device that a product of small matrices leaves idle.
    """
    if jax.default_backend() != "cpu":
        return M
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) // M
    return 4 if size <= 10_000 else 1


def _shares(layout: Layout, M: int) -> int:
    shares = layout.mesh.shape[layout.batch]
    if M % shares:
        raise ValueError(
            f"fit_ensemble: the {M} members need to divide by the {shares} devices of the layout's axis "
            f"{layout.batch!r}; add {-M % shares}, or give it fewer devices."
        )
    return shares


def _with_hyperparameters(state: TrainState, hyperparameters: Any) -> TrainState:
    """The state with each member's own hyperparameters in place of the optimiser's."""
    if hyperparameters is None:
        return state
    if not isinstance(hyperparameters, Mapping) or not all(isinstance(name, str) for name in hyperparameters):
        raise TypeError(
            "fit_ensemble: hyperparameters needs to be a dict of name -> one number for each member, such as "
            f'{{"learning_rate": rates}}; got {_outline(hyperparameters)}.'
        )
    _check_injected(state.optimizer_state, hyperparameters)

    def own(path, leaf):
        # An injected hyperparameter stands in the state at ....hyperparams[name].
        if len(path) < 2 or getattr(path[-2], "name", None) != "hyperparams":
            return leaf
        name = path[-1].key
        return _numbers(name, hyperparameters[name], leaf) if name in hyperparameters else leaf

    optimizer_state = jax.tree.map_with_path(own, state.optimizer_state)
    return state._replace(optimizer_state=optimizer_state)


def _check_injected(optimizer_state: Any, names: Any) -> None:
    """Raises ValueError unless each name is a number that the optimiser has injected in one place."""
    found = list(_injected(optimizer_state))
    numbers = [name for state in found for name in state.hyperparams if name not in state.hyperparams_states]
    scheduled = {name for state in found for name in state.hyperparams_states}
    for name in names:
        if name in scheduled:
            raise ValueError(
                f"fit_ensemble: {name!r} follows a schedule of the optimizer, which would overwrite the "
                "members' numbers; inject a number in its place."
            )
        if name not in numbers:
            has = f"only {', '.join(sorted(set(numbers)))}" if numbers else "none"
            raise ValueError(
                f"fit_ensemble: hyperparameters needs names that the optimizer has injected, {has}; got "
                f"{name!r}. Make it as optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)."
            )
        if numbers.count(name) > 1:
            raise ValueError(
                f"fit_ensemble: {name!r} is injected in {numbers.count(name)} places of the optimizer, so it "
                "is not known which one is meant; inject it in one of them only."
            )


def _injected(optimizer_state: Any) -> Iterator[Any]:
    """The states that `optax.inject_hyperparams` made, at any depth."""

    def is_injected(node):
        return hasattr(node, "hyperparams") and hasattr(node, "hyperparams_states")

    for node in jax.tree.leaves(optimizer_state, is_leaf=is_injected):
        if is_injected(node):
            yield node
            yield from _injected(node.inner_state)


def _numbers(name: str, values: Any, injected: Array) -> Array:
    """The members' values of a hyperparameter, in the dtype of the injected ones (M,)."""
    M, what = len(injected), f"fit_ensemble: hyperparameter {name!r}"
    try:
        numbers = np.asarray(values)
        wide = numbers.astype(float) if numbers.dtype.kind != "c" else None
    except (TypeError, ValueError):
        numbers, wide = np.asarray(None), None
    if wide is None or numbers.dtype == bool or numbers.dtype.kind in "USO":
        raise TypeError(f"{what} needs real numbers, one for each member; got {_outline(values)}.")
    if wide.shape != (M,):
        raise ValueError(
            f"{what} needs one number for each of the {M} members, shape ({M},); got shape {wide.shape}."
        )
    broken = wide[wide != np.round(wide)]
    if jnp.issubdtype(injected.dtype, jnp.integer) and len(broken):
        raise TypeError(
            f"{what} was injected as an integer, got {broken[0]} for a member; inject a float, {name}=1.0."
        )
    with np.errstate(over="ignore"):  # what is too large is told below
        cast = wide.astype(injected.dtype)
    wrong = np.flatnonzero(~np.isfinite(cast.astype(float)))
    if len(wrong):
        raise ValueError(
            f"{what} needs to be finite in {injected.dtype}, as it was injected; got {wide[wrong[0]]} for "
            f"member {wrong[0]} ({len(wrong)} of {M})."
        )
    return jnp.asarray(cast)


def _check_keys(keys: Any) -> int:
    """How many keys there are; raises unless they are PRNG keys of JAX along one axis, of either style."""
    dtype: Any = getattr(keys, "dtype", None)
    shape: Any = getattr(keys, "shape", ())
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    raw = dtype == jnp.uint32 and shape[1:] == jax.eval_shape(jax.random.PRNGKey, 0).shape
    if not (typed and len(shape) == 1 or raw) or not shape[0]:
        hint = "split one with jax.random.split(key, M)"
        if isinstance(keys, list | tuple):
            hint = "stack them with jnp.stack"
        raise TypeError(
            f"fit_ensemble: keys needs to be M PRNG keys of JAX, one for each member, got {_outline(keys)}; "
            f"{hint}."
        )
    return shape[0]


def _check_members(where: str, params: Any, M: int) -> None:
    """Raises ValueError unless every array of `params` has M members along its first axis."""
    for path, leaf in jax.tree.leaves_with_path(params):
        shape = jnp.shape(leaf)
        if not shape or shape[0] != M or not M:
            members = f"{M} members, as many as keys," if where == "fit_ensemble" else "all members"
            raise ValueError(
                f"{where}: params{jax.tree_util.keystr(path)} needs {members} along its first axis, got "
                f"shape {shape}. Make params with jax.vmap(lambda key: fnn.init(key, sizes))(keys)."
            )


def _columns(names: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    """name -> (M, epochs); nothing where there are no such data."""
    if not rows[0]:
        return {}
    return {name: np.stack([row[i] for row in rows], axis=1, dtype=float) for i, name in enumerate(names)}


def _median(column: np.ndarray) -> float:
    """Of the members that have not diverged."""
    good = column[~np.isnan(column)]
    return float(np.median(good)) if len(good) else np.nan


def _warn_of(diverged: np.ndarray) -> None:
    if diverged.any():
        members = np.flatnonzero(diverged)
        first = members[diverged[members].argmin()]
        warnings.warn(
            f"fit_ensemble: {len(members)} of {len(diverged)} members diverged, the first of them member "
            f"{first} in epoch {diverged[first]}; they are NaN from then on. history.diverged has the epoch "
            "of each. Try smaller learning rates, or clip gradients with optax.clip_by_global_norm.",
            RuntimeWarning,
            stacklevel=3,
        )
