"""Parameters: a tuple of layers (W^l, b^l), how they start, and a table of them.

`W` is (n_l, n_{l-1}), one row for each neuron of layer l; `b` is (n_l,), or `None` for a layer without
bias. They are a pytree like any other: optax, orbax and `jax.tree` need nothing from us.

An initialiser is a function (key, shape, dtype) -> array, as in `jax.nn.initializers`. Those below are
JAX's own with the axes set for weights of shape (n_out, n_in). Called from there without
`in_axis=-1, out_axis=-2`, they would take n_out for n_in.
"""

from collections.abc import Callable, Sequence
from math import prod
from operator import index
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .rules import is_array
from .tables import aligned


class Layer(NamedTuple):
    """One layer's weights W (n_out, n_in) and biases b (n_out,), `None` for no bias."""

    W: Float[Array, "n_out n_in"]
    b: Float[Array, " n_out"] | None = None


Params = tuple[Layer, ...]
Initializer = Callable[[Any, tuple[int, ...], Any], Array]

# Variances: LeCun et al. (1998) 1/n_in; Glorot & Bengio (2010) 2/(n_in + n_out); He et al. (2015) 2/n_in.
lecun_normal = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
lecun_uniform = jax.nn.initializers.lecun_uniform(in_axis=-1, out_axis=-2)
glorot_normal = jax.nn.initializers.glorot_normal(in_axis=-1, out_axis=-2)
glorot_uniform = jax.nn.initializers.glorot_uniform(in_axis=-1, out_axis=-2)
he_normal = jax.nn.initializers.he_normal(in_axis=-1, out_axis=-2)
he_uniform = jax.nn.initializers.he_uniform(in_axis=-1, out_axis=-2)
unit_normal = jax.nn.initializers.normal(stddev=1.0)  # the textbooks' randn: Nielsen (2015), ch. 1
zeros = jax.nn.initializers.zeros


def orthogonal(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Weights with orthonormal rows, or columns if there are fewer of them (Saxe et al. 2014).

    Factorised in at least float32, as 16-bit dtypes have no QR decomposition, and then rounded.
    """
    wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
    return jax.nn.initializers.orthogonal()(key, shape, wide).astype(dtype)


def init(
    key: Any,
    sizes: Sequence[int],
    *,
    weights: Initializer = lecun_normal,
    bias: Initializer | None = zeros,
    dtype: Any = None,
) -> Params:
    """Fresh parameters of a network with the given widths, input first: (n_0, n_1, ..., n_L).

    weights, bias: initialisers (key, shape, dtype) -> array, the bias's for shape (n_l,);
        `bias=None` for layers without bias
    dtype: any float dtype; by default JAX's, float32 (float64 if 64-bit is enabled)

    Every array gets a key of its own. Raises TypeError or ValueError for bad arguments.

    >>> import fnn, jax
    >>> params = fnn.init(jax.random.key(0), (64, 128, 10), weights=fnn.he_normal)
    >>> [layer.W.shape for layer in params]
    [(128, 64), (10, 128)]
    """
    check_key("init", key)
    if isinstance(sizes, str | bytes) or not isinstance(sizes, Sequence) or len(sizes) < 2:
        raise ValueError(
            f"init: sizes needs the widths of input, hidden and output layers, such as (64, 128, 10); "
            f"got {sizes!r}."
        )
    for n in sizes:
        if not is_count(n):
            raise ValueError(f"init: sizes needs to hold positive integers, got {n!r} in {tuple(sizes)}.")
    try:
        dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    except TypeError:
        raise TypeError(f"init: dtype needs to be one such as jnp.float32, got {dtype!r}.") from None
    if dtype not in [jnp.dtype(name) for name in ("float32", "float64", "bfloat16", "float16")]:
        raise TypeError(
            f"init: dtype needs to be a float dtype of 16 to 64 bits, such as jnp.float32, got {dtype}."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(
            f'init: dtype {dtype} needs 64-bit JAX: call jax.config.update("jax_enable_x64", True) first, '
            "or use float32."
        )

    layers = []
    for l, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
        key, W_key, b_key = jax.random.split(key, 3)
        W = _initialise(f"W of layer {l}", "weights", weights, W_key, (n_out, n_in), dtype)
        b = None if bias is None else _initialise(f"b of layer {l}", "bias", bias, b_key, (n_out,), dtype)
        layers.append(Layer(W, b))
    return tuple(layers)


def _initialise(what: str, name: str, initializer: Initializer, key, shape, dtype) -> Array:
    if not callable(initializer):
        raise TypeError(
            f"init: {name} needs a function (key, shape, dtype) -> array such as fnn.he_normal or "
            f"fnn.zeros, got {initializer!r}."
        )
    try:
        array = initializer(key, shape, dtype)
    except (TypeError, ValueError, IndexError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        hint = "It needs to be a function (key, shape, dtype) -> array such as fnn.he_normal"
        if len(shape) == 1:
            hint = "Those that count inputs have no meaning for a bias; use fnn.zeros"
        raise kind(f"init: the initialiser of {what}, shape {shape}, failed: {error}. {hint}.") from error
    if not is_array(array):
        raise TypeError(
            f"init: the initialiser of {what} returned no array but {array!r}. Those of jax.nn.initializers "
            "are made by a call, such as he_normal(in_axis=-1, out_axis=-2)."
        )
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"init: the initialiser of {what} needs to return shape {shape} and dtype {dtype}, "
            f"got {array.shape} and {array.dtype}."
        )
    return array


def summary(params: Params) -> str:
    """A table of the layers, their shapes and numbers of parameters, as text.

    >>> import fnn, jax
    >>> print(fnn.summary(fnn.init(jax.random.key(0), (64, 128, 10))))
    layer  W          b       dtype      parameters
        1  (128, 64)  (128,)  float32         8,320
        2  (10, 128)  (10,)   float32         1,290
    total                     37.54 KiB       9,610
    """
    check_params("summary", params)
    size = sum(array.size for array in jax.tree.leaves(params))
    n_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(params))
    rows = [("layer", "W", "b", "dtype", "parameters")]
    for l, layer in enumerate(params, start=1):
        b = "none" if layer.b is None else str(layer.b.shape)
        count = sum(array.size for array in jax.tree.leaves(layer))
        rows.append((str(l), str(layer.W.shape), b, str(layer.W.dtype), f"{count:,}"))
    rows.append(("total", "", "", _bytes(n_bytes), f"{size:,}"))
    return aligned(rows, "><<<>")


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def check_params(where: str, params: Any) -> None:
    """Raises unless `params` is a tuple of layers that fit one another, of one float dtype.

    Looks at shapes and dtypes only, so it costs nothing in compiled code.
    """
    if not isinstance(params, tuple) or not params or not all(isinstance(l, Layer) for l in params):
        hint = "Convert pairs with tuple(fnn.Layer(W, b) for W, b in pairs)."
        if isinstance(params, Layer):
            hint = "A single layer is the tuple (layer,)."
        raise TypeError(
            f"{where}: params needs to be a tuple of fnn.Layer(W, b), as fnn.init makes; "
            f"got {_outline(params)}. {hint}"
        )
    first = params[0].W
    for l, (W, b) in enumerate(params, start=1):
        if not is_array(W) or not jnp.issubdtype(W.dtype, jnp.floating):
            raise TypeError(
                f"{where}: W of layer {l} needs to be a float array, got {_outline(W)}; "
                "use jnp.asarray(W, float)."
            )
        if W.ndim != 2:
            hint = "W of a single output is (1, n_in)."
            if W.ndim > 2:
                hint = "Parameters of many networks along a leading axis go through jax.vmap."
            raise ValueError(f"{where}: W of layer {l} needs shape (n_out, n_in), got {W.shape}. {hint}")
        if not prod(W.shape):
            raise ValueError(f"{where}: W of layer {l} is empty, {W.shape}; widths need to be at least 1.")
        if b is not None and (not is_array(b) or b.shape != W.shape[:1]):
            hint = "A layer without bias has b=None."
            if is_array(b) and b.shape == W.shape[1:]:
                hint = "W is (n_out, n_in): is it transposed?"
            raise ValueError(
                f"{where}: b of layer {l} needs to be an array of shape {W.shape[:1]}, as W's rows; "
                f"got {_outline(b)}. {hint}"
            )
        for name, array in (("W", W), ("b", b)):
            if array is not None and array.dtype != first.dtype:
                raise TypeError(
                    f"{where}: all parameters need one dtype; W of layer 1 is {first.dtype}, "
                    f"{name} of layer {l} {array.dtype}. Cast with jax.tree.map and astype."
                )
        if l > 1 and W.shape[1] != params[l - 2].W.shape[0]:
            raise ValueError(
                f"{where}: W of layer {l} needs {params[l - 2].W.shape[0]} columns, the width of layer "
                f"{l - 1}, got {W.shape}. W is (n_out, n_in): is it transposed, or from another network?"
            )


def is_count(n: Any) -> bool:
    """Whether n is a positive integer, Python's or NumPy's; True is none."""
    try:
        return not isinstance(n, bool) and index(n) >= 1
    except TypeError:
        return False


def check_not_narrowed(what: str, dtype: Any) -> None:
    """Raises TypeError if JAX would narrow an array of this float dtype; `what` begins the message."""
    kept = jax.dtypes.canonicalize_dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating) and kept != dtype:
        raise TypeError(
            f"{what} is {dtype}, which JAX would narrow to {kept} in silence. Use "
            f'.astype("{kept}"), or jax.config.update("jax_enable_x64", True).'
        )


def check_key(where: str, key: Any) -> None:
    """Raises TypeError unless `key` is one of JAX's PRNG keys, of either style."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if typed and shape == ():
        return
    if not typed and dtype == jnp.uint32 and shape == jax.eval_shape(jax.random.PRNGKey, 0).shape:
        return
    hint = "of many keys, take one, or use jax.vmap" if typed else "make one with jax.random.key(seed)"
    raise TypeError(f"{where}: key needs to be one PRNG key of JAX, got {_outline(key)}; {hint}.")


def _outline(x: Any) -> str:
    """What an argument is, in few words: dtype and shape of an array, otherwise its type."""
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{x.dtype} {tuple(x.shape)}"
    if isinstance(x, tuple) and not x:
        return "()"
    return repr(x) if isinstance(x, int | float | str | None) else type(x).__name__
