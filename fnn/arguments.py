"""Arguments of host-level functions, checked before anything runs.

Shapes and dtypes are checked wherever code is traced. Values can only be looked at here, on the host: NaN,
labels out of range, numbers that JAX would narrow in silence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from .losses import check_labels
from .params import Layer, _outline, check_not_narrowed, is_count
from .rules import accepts, check_rule_like
from .sharding import Layout
from .sweep import backprop


def check_optimizer(where: str, optimizer: Any) -> None:
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        name = getattr(optimizer, "__name__", "")
        hint = f"call it: optax.{name}(learning_rate)" if name.isidentifier() else "such as optax.adam(1e-3)"
        raise TypeError(
            f"{where}: optimizer needs to be one of optax, {hint}; got {name or _outline(optimizer)}."
        )


def check_not_traced(params: Any, key: Any, *data: Any) -> None:
    """Raises TypeError inside jit, vmap or grad, where arrays have no values yet."""
    arrays = [array for part in data if isinstance(part, tuple | list) for array in part]
    if any(isinstance(array, Tracer) for array in (*jax.tree.leaves(params), key, *arrays)):
        raise TypeError(
            "fit: needs arrays with values, got traced ones: it runs on the host, outside jit, vmap, grad. "
            "Inside them use fnn.train_step or fnn.train_epoch."
        )


def check_params_values(params: Any) -> Any:
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise TypeError(f"fit: params holds no arrays, got {params!r}; make them with fnn.init.")
    for path, leaf in leaves:
        where = "params" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"fit: {where} needs to be an array, got {_outline(leaf)}; "
                "make params with fnn.init, or take them from history.params."
            )
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # spread over processes
            if not bool(jnp.isfinite(leaf).all()):
                raise ValueError(f"fit: {where} needs to be finite, and has values that are NaN or infinite.")
        else:
            check_values(where, leaf)
    return jax.tree.map(jnp.asarray, params)


def check_data(name: str, data: Any, cost: Any, params: Any) -> tuple[Array, ...]:
    """The arrays on the device, after checking their values on the host."""
    check_form(name, data)
    arrays = tuple(jnp.asarray(array) for array in data)
    check_fits(name, arrays, cost, params)
    check_numbers(name, data, cost, params)
    return arrays


def check_form(name: str, data: Any) -> None:
    """Raises unless these are arrays of one row for each example, of values that JAX has; no tracing."""
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        got = f"{len(data)} of them" if isinstance(data, tuple | list) else type(data).__name__
        raise TypeError(f"fit: {name} needs to be (X, y) or (X, y, sample_weight), got {got}.")
    names = [f"{part} of {name}" for part in ("X", "y", "sample_weight")]
    for part, array in zip(names, data, strict=False):
        if not all(hasattr(array, attribute) for attribute in ("dtype", "shape", "__array__")):
            hint = "leave it out"
            if array is not None:
                hint = "use numpy.asarray, or .toarray() of a sparse matrix"
            raise TypeError(f"fit: {part} needs to be an array, got {type(array).__name__}; {hint}.")
        if not array.shape:
            raise ValueError(f"fit: {part} needs examples along its first axis, got a scalar.")
    lengths = [array.shape[0] for array in data]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"fit: the arrays of {name} need one row per example, got {lengths} rows. "
            "Is one of them transposed?"
        )
    if lengths[0] == 0:
        raise ValueError(f"fit: {name} is empty, X {data[0].shape}; it needs at least one example.")
    for part, array in zip(names, data, strict=False):
        check_values(part, array)


def check_fits(name: str, arrays: Any, cost: Any, params: Any) -> None:
    """Raises unless the cost takes arrays of these shapes and dtypes."""
    arguments = ("params", "X", "y", "sample_weight")[: 1 + len(arrays)]
    check_rule_like("fit: cost", cost, *arguments, such_as="fnn.cost(net, loss)")
    if _of_network(cost, params) and arrays[0].ndim == 1:  # one example for it, many rows for the shuffle
        raise ValueError(
            f"fit: X of {name} needs shape (N, n_0), examples as rows; got {arrays[0].shape}. "
            "Did you mean X[:, None]?"
        )
    with _about(name):
        check_scalar("cost", _value_of(cost), params, arrays)


@lru_cache(maxsize=16)  # one function for each cost, so that JAX keeps what its trace gave
def _value_of(cost: Any) -> Any:
    return lambda *arguments: cost.forward(*arguments)[0]


def check_numbers(name: str, data: Any, cost: Any, params: Any) -> None:
    """Raises unless labels are classes of the network and weights are weights. Their shapes have to fit."""
    if _of_network(cost, params):
        with _about(name):
            check_labels(cost.loss, np.asarray(data[1]), params[-1].W.shape[0])
    if len(data) == 3:
        weights = np.asarray(data[2])
        if (weights < 0).any() or not weights.any():
            raise ValueError(
                f"fit: sample_weight of {name} needs to be at least 0, and not 0 for every example; "
                f"got numbers from {weights.min()} to {weights.max()}."
            )


def _of_network(cost: Any, params: Any) -> bool:
    return hasattr(cost, "loss") and isinstance(params, tuple) and isinstance(params[-1], Layer)


@contextmanager
def _about(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        error.add_note(f"This is about the {name} given to fit.")
        raise


def check_values(what: str, array: Any) -> None:
    """Raises if values are NaN or infinite, or if JAX would change them in silence."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f"fit: {what} needs to hold real numbers, got PRNG keys; they go to key=.")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"fit: {what} is a masked array; fill it, .filled(value), or drop those examples.")
    array = np.asarray(array)
    dtype = array.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_):
        hint = "Numbers of rows of one length become floats by .astype"
        if dtype.kind in "US":
            hint = "Names of classes become their numbers by numpy.unique(y, return_inverse=True)[1]"
        raise TypeError(f"fit: {what} needs to hold real numbers, got dtype {dtype}. {hint}.")
    if not dtype.isnative or dtype.itemsize > 8:
        raise TypeError(
            f"fit: {what} has dtype {dtype.str}, which JAX does not know: another byte order or more than "
            "64 bits. Use .astype with a dtype such as float32 or int32."
        )
    kept = jax.dtypes.canonicalize_dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(kept)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise TypeError(
                f"fit: {what} is {dtype} with numbers that do not fit {kept}, which JAX makes of it. "
                'Use smaller ones, or jax.config.update("jax_enable_x64", True).'
            )
    check_not_narrowed(f"fit: {what}", dtype)
    is_finite = np.isfinite(array)
    if not is_finite.all():
        wrong = ~is_finite
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"fit: {what} needs to be finite, got {array[first]} at index {first} "
            f"({wrong.sum():,} of {wrong.size:,} values are NaN or infinite). Remove or replace them first."
        )


def check_hashable(what: str, value: Any) -> None:
    """Raises TypeError unless compiled code can be kept for the value."""
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(
            f"fit: {what} needs to be hashable, {error}. Make a dataclass of yours frozen, and put arrays "
            "into params."
        ) from None


def check_count(where: str, name: str, value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"{where}: {name} needs to be a positive integer, got {value!r}.")
    return index(value)


def check_batches(where: str, data: Any, batch_size: Any) -> int:
    """The batch size as an int, after checking that the data have rows for it. Looks at shapes only."""
    batch_size = check_count(where, "batch_size", batch_size)
    lengths = [len(array) for array in data] if isinstance(data, tuple | list) else []
    if not lengths or len(set(lengths)) > 1 or not lengths[0]:
        got = f"arrays of {lengths} rows" if lengths else _outline(data)
        raise ValueError(
            f"{where}: data needs to be arrays (X, y) of one row for each example, at least one; got {got}."
        )
    if batch_size > lengths[0]:
        raise ValueError(
            f"{where}: batch_size {batch_size} is larger than the data, N = {lengths[0]}; "
            f"for full batches use batch_size={lengths[0]}."
        )
    return batch_size


def check_metrics(metrics: Any) -> tuple[tuple[str, Callable[..., Array]], ...]:
    if metrics is None:
        return ()
    if not isinstance(metrics, Mapping) or not all(callable(metric) for metric in metrics.values()):
        raise TypeError(
            "fit: metrics needs to be a dict of name -> function (params, X, y) -> scalar, "
            f'such as {{"accuracy": fnn.accuracy(net)}}; got {metrics!r}.'
        )
    for name, metric in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"fit: a metric's name needs to be a string, got {name!r}; use {str(name)!r}.")
        check_hashable(f"the metric {name!r}", metric)
        if not accepts(metric, "params", "X", "y"):
            raise TypeError(
                f"fit: the metric {name!r} needs to be a function (params, X, y) -> scalar, "
                f"got {metric!r}, which takes other arguments. "
                "If it makes a metric, call it, as fnn.accuracy(net)."
            )
    if "cost" in metrics:
        raise ValueError('fit: the name "cost" is taken by the cost itself; give the metric another.')
    return tuple(metrics.items())


def check_on_divergence(value: Any) -> None:
    if value not in ("raise", "skip"):
        raise ValueError(f'fit: on_divergence needs to be "raise" or "skip", got {value!r}.')


def check_layout(where: str, layout: Any) -> None:
    if layout is None:
        return
    if not isinstance(layout, Layout):
        raise TypeError(
            f"{where}: layout needs to be one such as fnn.data_parallel() makes; got {_outline(layout)}."
        )
    check_hashable("layout", layout)


def check_callbacks(callbacks: Any) -> None:
    if not isinstance(callbacks, Sequence) or not all(callable(callback) for callback in callbacks):
        raise TypeError(
            f"fit: callbacks needs to be a list of functions of a report, such as [print]; got {callbacks!r}."
        )
    for callback in callbacks:
        if not accepts(callback, "report"):
            raise TypeError(
                f"fit: a callback needs to be a function of one argument, the report; got {callback!r}."
            )


def check_record(record: Any) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    if record is None or record == {}:
        return ()
    named = isinstance(record, Mapping) and all(isinstance(name, str) for name in record)
    if not named or not all(callable(function) for function in record.values()):
        raise TypeError(
            "fit: record needs to be a dict of name -> function of a sweep, such as "
            f'{{"norms": fnn.example_norms}}; got {record!r}.'
        )
    for name, function in record.items():
        check_hashable(f"the function {name!r} of record", function)
    return tuple(record.items())


def check_recorded_shapes(
    record: Sequence[tuple[str, Any]], cost: Any, params: Any, data: Sequence[Any], sizes: Sequence[int]
) -> None:
    """Raises unless batches of these sizes give equal shapes.

    data: arrays, or their shapes, whose first axis is that of the examples
    """
    for name, function in record:
        rows = []
        for size in sizes:
            batch = [jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype) for array in data]
            rows.append(jax.eval_shape(lambda *args: function(backprop(cost, *args)), params, *batch))
        if len(set(map(str, rows))) > 1:
            raise ValueError(
                f"fit: the function {name!r} of record needs to return equal shapes for every batch, but one "
                f"batch has {min(sizes)} examples, another {max(sizes)}. Use a batch_size that divides the "
                "number of examples, or record a mean or a quantile."
            )


def check_scalar(what: str, function: Any, params: Any, data: Sequence[Array]) -> None:
    """Traces the function on the whole data's shapes, so that its own errors come first and alone."""
    out = jax.eval_shape(function, params, *data)
    if getattr(out, "shape", None) != ():
        shape = f"shape {out.shape}" if hasattr(out, "shape") else _outline(out)
        raise TypeError(f"fit: the {what} needs to be a scalar, got {shape}; return one number, as the mean.")
    if jnp.issubdtype(out.dtype, jnp.complexfloating):
        raise TypeError(f"fit: the {what} needs to be real, got {out.dtype}; take jnp.real or jnp.abs.")
