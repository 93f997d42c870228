"""The leaves of a pytree as a checkpoint has them: by name, with shape and dtype, and all of their bits.

A leaf's name is its place in the tree, such as `0/W` or `optimizer_state/0/mu/1/W`. What is stored is an
array: of a typed PRNG key the words of `jax.random.key_data`, of None nothing. `as_like` is the way back.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .params import _outline, check_not_narrowed
from .processes import put

MANIFEST = "__manifest__"  # what no leaf is called: the name of the manifest beside them
ALONE = "array"  # the name of a tree that is a single leaf
MAX_NAME = 60_000  # bytes; zip has room for 65,535

_OF_NUMPY = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
)
_OTHERS = (
    "bfloat16 float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 "
    "float8_e5m2fnuz float8_e8m0fnu float6_e2m3fn float6_e3m2fn float4_e2m1fn "
    "int1 int2 int4 uint1 uint2 uint4"
)
_PYTHON = {"bool": np.bool, "int": np.int64, "float": np.float64, "complex": np.complex128}
# The dtype's name in the manifest -> its bits in memory; those of JAX's dtypes that this version of it has.
DTYPES = {
    **{name: np.dtype(name) for name in _OF_NUMPY.split()},
    **{name: np.dtype(getattr(jnp, name)) for name in _OTHERS.split() if hasattr(jnp, name)},
    **{f"Python {name}": np.dtype(dtype) for name, dtype in _PYTHON.items()},
}
KEY = re.compile(r"key<(\w+)>")


class Leaf(NamedTuple):
    """A leaf as the manifest has it. The shape is that of the stored array: of a PRNG key's words."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bits(self) -> np.dtype:
        """dtype of the leaf in memory."""
        return np.dtype(np.uint32) if KEY.fullmatch(self.dtype) else DTYPES[self.dtype]


def named_leaves(where: str, tree: Any) -> tuple[list[str], list[Any], Any]:
    """Names, leaves and structure; None is a leaf here, so that the file knows of it."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    names = [_name(path) for path, _ in pairs]
    seen = {MANIFEST}
    for name in names:
        if name in seen or len(name.encode()) > MAX_NAME:
            why = "the manifest's" if name == MANIFEST else "that of two" if name in seen else "too long"
            raise ValueError(f"{where}: a leaf's name, {name[:80]!r}, is {why}; use other keys in the tree.")
        seen.add(name)
    return names, [leaf for _, leaf in pairs], structure


def _name(path: tuple[Any, ...]) -> str:
    """Keys with slashes between them. In a key what zip could misread, and %, are %XX."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    escaped = [
        re.sub(
            r"[%/\\\x00-\x1f\x7f\ud800-\udfff]|^\.+$", lambda m: "".join(f"%{ord(c):02X}" for c in m[0]), key
        )
        for key in keys
    ]
    return "/".join(key or "%" for key in escaped) if keys else ALONE


def leaf_of(where: str, name: str, value: Any) -> Leaf:
    """Name, shape and dtype of an array, a ShapeDtypeStruct or a number; nothing is computed."""
    if value is None:
        return Leaf(name, (), "None")
    if type(value) in (bool, int, float, complex):
        return Leaf(name, (), f"Python {type(value).__name__}")
    if isinstance(value, Tracer):
        raise TypeError(
            f"{where}: {place(name)} has no value yet: call it on the host, outside jit, vmap, grad."
        )
    dtype: Any = getattr(value, "dtype", None)
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        implementations: list[str] = []

        def words(key):
            implementations.append(str(jax.random.key_impl(key)))
            return jax.random.key_data(key)

        shape = jax.eval_shape(words, jax.ShapeDtypeStruct(value.shape, dtype)).shape
        return Leaf(name, tuple(shape), f"key<{implementations[0]}>")
    is_array = isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)
    if not is_array or isinstance(value, np.ma.MaskedArray) or dtype.name not in DTYPES or not dtype.isnative:
        hint = "Convert it with numpy.asarray; what is no array belongs elsewhere."
        if is_array:
            hint = (
                "Use .astype to one of JAX's dtypes, in the machine's byte order; of a masked array .filled."
            )
        raise TypeError(
            f"{where}: {place(name)} needs to be an array of JAX or NumPy, a Python number, a PRNG key or "
            f"None; got {_outline(value)}. {hint}"
        )
    return Leaf(name, tuple(value.shape), dtype.name)


def place(name: str) -> str:
    """A leaf in words: of `optimizer_state/0/mu/1/W`, "W of layer 2 in optimizer_state/0/mu"."""
    match = re.fullmatch(r"(?:(.*)/)?(\d+)/([Wb])", name)
    if not match:
        return f"the leaf {name}"
    return f"{match[3]} of layer {int(match[2]) + 1}" + (f" in {match[1]}" if match[1] else "")


def stored(where: str, name: str, value: Any) -> Any:
    """A leaf as the array that is stored, JAX's still on its device: of a key its words, of None nothing."""
    if isinstance(value, jax.Array):
        if value.is_deleted():
            raise ValueError(
                f"{where}: the memory of {place(name)} was given away, as fnn.train_epoch does with the "
                "state it gets. Save the state that it returned."
            )
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(value) if is_key else value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{where}: {place(name)} is a jax.ShapeDtypeStruct, which has no values to save.")
    if type(value) in (bool, int, float, complex):
        try:
            return np.asarray(value, _PYTHON[type(value).__name__])
        except OverflowError:
            raise ValueError(f"{where}: {place(name)}, {value}, has more than 64 bits.") from None
    return np.zeros(0, np.uint8) if value is None else np.asarray(value)


def as_like(where: str, leaf: Leaf, array: np.ndarray, like: Any) -> Any:
    """What was saved, as `like` has it: Python's, NumPy's, or JAX's on its devices."""
    if leaf.dtype == "None":
        return None
    array = array.view(leaf.bits)
    if leaf.dtype.startswith("Python "):
        return array.item()
    if isinstance(like, np.ndarray | np.generic):
        return array if isinstance(like, np.ndarray) else array[()]
    check_kept(where, leaf)
    sharding = getattr(like, "sharding", None)
    if sharding is None or getattr(like, "committed", True):
        here = _of_jax(leaf, array, like)
        return jax.device_put(here) if sharding is None else put(here, sharding)
    # On the same device, and as free to follow other arrays to theirs as `like` is.
    with jax.default_device(next(iter(sharding.device_set))):
        return jax.device_put(_of_jax(leaf, array, like))


def _of_jax(leaf: Leaf, array: np.ndarray, like: Any) -> Any:
    """What `jax.device_put` needs to make the leaf: an array of NumPy, a key, or a number of weak type."""
    if key := KEY.fullmatch(leaf.dtype):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=key[1])
    return weak(array) if getattr(like, "weak_type", False) else array


def weak(array: np.ndarray | jax.Array) -> Any:
    """As the array that JAX makes of a Python number, whose dtype gives way to others'; optax has such."""
    zeros = jnp.full(array.shape, {"f": 0.0, "i": 0, "c": 0j}.get(array.dtype.kind, False))
    return zeros.at[...].set(array) if zeros.dtype == array.dtype else array


def check_kept(where: str, leaf: Leaf) -> None:
    """Raises TypeError if JAX would narrow the leaf."""
    what = f"{where}: {place(leaf.name)}"
    check_not_narrowed(what, leaf.bits)
    if jax.dtypes.canonicalize_dtype(leaf.bits) != leaf.bits:
        raise TypeError(
            f"{what} is {leaf.dtype}, which JAX would narrow in silence. Use a NumPy array in `like`, or "
            'jax.config.update("jax_enable_x64", True).'
        )
