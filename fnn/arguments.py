"""Arguments of host-level functions, checked before anything runs.

Shapes and dtypes are checked wherever code is traced. Values can only be looked at here, on the host: NaN,
labels out of range, numbers that JAX would narrow in silence.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .losses import check_labels
from .params import Layer


def check_optimizer(optimizer: Any) -> None:
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        name = getattr(optimizer, "__name__", None)
        hint = f"call it: optax.{name}(learning_rate)" if name else "such as optax.adam(1e-3)"
        raise TypeError(f"fit: optimizer needs to be one of optax, {hint}; got {name or repr(optimizer)}.")


def check_params_values(params: Any) -> Any:
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise TypeError(f"fit: params holds no arrays, got {params!r}; make them with fnn.init.")
    for path, leaf in leaves:
        where = "params" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"fit: {where} needs to be an array, got {leaf!r}.")
        check_values(where, np.asarray(leaf))
    return jax.tree.map(jnp.asarray, params)


def check_data(name: str, data: Any, cost: Any, params: Any) -> tuple[Array, ...]:
    """The arrays on the device, after checking their values on the host."""
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        got = f"{len(data)} of them" if isinstance(data, tuple | list) else type(data).__name__
        raise TypeError(f"fit: {name} needs to be (X, y) or (X, y, sample_weight), got {got}.")
    names = [f"{part} of {name}" for part in ("X", "y", "sample_weight")]
    for part, array in zip(names, data, strict=False):
        if not (hasattr(array, "dtype") and hasattr(array, "shape")):
            raise TypeError(
                f"fit: {part} needs to be an array, got {type(array).__name__}; use numpy.asarray."
            )
        if not array.shape:
            raise ValueError(f"fit: {part} needs examples along its first axis, got a scalar.")
    lengths = [array.shape[0] for array in data]
    if len(set(lengths)) > 1:
        raise ValueError(f"fit: the arrays of {name} need one row per example, got {lengths} rows.")
    if lengths[0] == 0:
        raise ValueError(f"fit: {name} is empty, X {data[0].shape}; training needs at least one example.")
    for part, array in zip(names, data, strict=False):
        check_values(part, np.asarray(array))
    arrays = tuple(jnp.asarray(array) for array in data)
    # Shapes and dtypes first: labels of the wrong shape have no values to speak of.
    check_scalar("cost", lambda *batch: cost.forward(*batch)[0], params, arrays)
    if hasattr(cost, "loss") and isinstance(params, tuple) and isinstance(params[-1], Layer):
        check_labels(cost.loss, np.asarray(data[1]), params[-1].W.shape[0])
    if len(data) == 3:
        weights = np.asarray(data[2])
        if (weights < 0).any() or not weights.any():
            raise ValueError(
                f"fit: sample_weight of {name} needs to be at least 0, and not 0 for every example; "
                f"got numbers from {weights.min()} to {weights.max()}."
            )
    return arrays


def check_values(what: str, array: np.ndarray) -> None:
    """Raises if values are NaN or infinite, or if JAX would change them in silence."""
    dtype = array.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer) or dtype == np.bool_):
        raise TypeError(f"fit: {what} needs to hold real numbers, got dtype {dtype}.")
    kept = jax.dtypes.canonicalize_dtype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(kept)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise TypeError(
                f"fit: {what} is {dtype} with numbers that do not fit {kept}, which JAX makes of it."
            )
    elif kept != dtype:
        raise TypeError(
            f"fit: {what} is {dtype}, which JAX would narrow to {kept} in silence. Use "
            f'.astype("{kept}"), or jax.config.update("jax_enable_x64", True).'
        )
    wrong = ~np.isfinite(array)
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"fit: {what} needs to be finite, got {array[first]} at index {first} "
            f"({wrong.sum():,} of {wrong.size:,} values are NaN or infinite)."
        )


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"fit: {name} needs to be a positive integer, got {value!r}.")


def check_metrics(metrics: Any) -> tuple[tuple[str, Callable[..., Array]], ...]:
    if metrics is None:
        return ()
    if not isinstance(metrics, Mapping) or not all(callable(metric) for metric in metrics.values()):
        raise TypeError(
            "fit: metrics needs to be a dict of name -> function (params, X, y) -> scalar, "
            f'such as {{"accuracy": fnn.accuracy(net)}}; got {metrics!r}.'
        )
    if "cost" in metrics:
        raise ValueError('fit: the name "cost" is taken by the cost itself; give the metric another.')
    return tuple(metrics.items())


def check_scalar(what: str, function: Any, params: Any, data: Sequence[Array]) -> None:
    """Traces the function on the whole data's shapes, so that its own errors come first and alone."""
    shape = jax.eval_shape(lambda *args: function(*args), params, *data).shape
    if shape != ():
        raise TypeError(f"fit: the {what} needs to be a scalar, got shape {shape}; take the mean.")
