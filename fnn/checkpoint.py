"""Checkpoints: every leaf of a pytree to the last bit, in one file that is there whole or not at all.

The file is an .npz, which NumPy and unzip read too: one array for each leaf, named by its place in the tree,
such as `0/W` or `optimizer_state/0/mu/1/W`, and `__manifest__`, JSON as bytes: the format's version, every
leaf's name, shape and dtype, the step and the metadata. The last 64 bytes, the archive's comment, are the
SHA-256 of all bytes before them. It is compared before anything else is read, so a changed bit, a missing
piece or one too many is refused. Nothing in the file is executed. A digest is no signature: whoever can write
the file can make one that is accepted.

dtypes that NumPy lacks (bfloat16, float8, int4) are stored as unsigned integers of their bits, typed PRNG
keys as the words of `jax.random.key_data`; the manifest has the dtype's or the implementation's name.
"""

import hashlib
import json
import operator
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .files import make_folder, replacing
from .params import Layer, Params, _outline, check_not_narrowed, check_params, is_count

FORMAT = 1
MANIFEST = "__manifest__"
ALONE = "array"  # the name of a tree that is a single leaf
MAX_NAME = 60_000  # bytes; zip has room for 65,535
DIGEST = 64  # bytes, SHA-256 in hexadecimal

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
_DTYPES = {
    **{name: np.dtype(name) for name in _OF_NUMPY.split()},
    **{name: np.dtype(getattr(jnp, name)) for name in _OTHERS.split() if hasattr(jnp, name)},
    **{f"Python {name}": np.dtype(dtype) for name, dtype in _PYTHON.items()},
}
_KEY = re.compile(r"key<(\w+)>")
_STEP = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})\.npz")


class CheckpointError(ValueError):
    """A file that cannot be loaded: damaged, of another kind, or not of the structure asked for."""


class Restored(NamedTuple):
    """A checkpoint of a folder: the step it was saved at, its tree and its metadata."""

    step: int
    tree: Any
    metadata: dict[str, Any]


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Saves a pytree to a file, whole or not at all.

    path: the file; nothing is appended to it. One that is there is replaced.
    tree: JAX and NumPy arrays, Python numbers, PRNG keys of both styles and None, in any structure

    Raises TypeError or ValueError for a leaf that cannot be saved, and OSError if it cannot be written; then
    what was at `path` still is.

    >>> import fnn, jax, tempfile
    >>> path = tempfile.mkdtemp() + "/params.npz"
    >>> fnn.save(path, fnn.init(jax.random.key(0), (64, 128, 10)))
    >>> [layer.W.shape for layer in fnn.load(path)]
    [(128, 64), (10, 128)]
    """
    path = _checked_path("save", path)
    _save("save", path, tree, None, {})


def load(path: str | os.PathLike[str], like: Any = None) -> Any:
    """The parameters saved in a file; or, with `like`, any pytree.

    like: a tree of the structure that was saved, such as a fresh `fnn.train_state`, of arrays or
        jax.ShapeDtypeStruct. Names, shapes and dtypes have to agree. NumPy arrays and Python numbers come
        back where `like` has them; JAX arrays elsewhere, on the devices of `like`'s with their sharding.

    Raises CheckpointError if the file is damaged or holds something else, and FileNotFoundError if there is
    none.

    >>> import fnn, jax, optax, tempfile
    >>> params = fnn.init(jax.random.key(0), (4, 3, 2))
    >>> state = fnn.train_state(optax.adam(1e-3), params, jax.random.key(1))
    >>> path = tempfile.mkdtemp() + "/state.npz"
    >>> fnn.save(path, state)
    >>> fnn.load(path, like=state).params[0].W.shape
    (3, 4)
    """
    path = _checked_path("load", path)
    contents = _read("load", path)
    return _params("load", path, contents) if like is None else _filled("load", path, contents, like)


@dataclass(frozen=True)
class Checkpoints:
    """A folder of checkpoints `step-00001234.npz`, of which the newest few are kept, and `best.npz`.

    folder: made by the first save
    keep: how many, at least 1. Counted back from the step just saved: those of later steps, which are there
        if a run went back, stay.

    >>> import fnn, jax, tempfile
    >>> params = fnn.init(jax.random.key(0), (4, 3, 2))
    >>> checkpoints = fnn.Checkpoints(tempfile.mkdtemp(), keep=2)
    >>> for step in (10, 20, 30):
    ...     checkpoints.save(step, params, {"epoch": step // 10})
    >>> checkpoints.steps()
    [20, 30]
    >>> step, params, metadata = checkpoints.restore(like=params)
    >>> step, metadata
    (30, {'epoch': 3})
    """

    folder: str | os.PathLike[str]
    keep: int = field(default=3, kw_only=True)

    def __post_init__(self):
        _checked_path("Checkpoints", self.folder)
        if not is_count(self.keep):
            raise ValueError(f"Checkpoints: keep needs to be an integer of at least 1, got {self.keep!r}.")

    def save(self, step: Any, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the tree of a step, and then removes what is older than the newest `keep`.

        step: an integer of at least 0, Python's or an array's
        metadata: what JSON has: a dict of strings, numbers, None, lists and dicts
        """
        where, step = "Checkpoints.save", _checked_step("Checkpoints.save", step)
        self._write(where, self._path(step), tree, step, metadata)
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            self._path(old).unlink(missing_ok=True)

    def save_best(self, step: Any, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the tree as `best.npz` in place of the one before; it stays whatever `save` removes."""
        where, step = "Checkpoints.save_best", _checked_step("Checkpoints.save_best", step)
        self._write(where, self._best, tree, step, metadata)

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is undamaged, with the structure of `like`; None if there is none.

        like: as in `fnn.load`; or a function metadata -> like, where the structure depends on those

        A damaged one is passed over with a warning. Raises CheckpointError if all are, or if the newest
        undamaged one is of another structure.
        """
        while True:
            steps, damages, gone = self.steps(), [], False
            for step in reversed(steps):
                try:
                    restored = self._restored("Checkpoints.restore", self._path(step), step, like)
                except FileNotFoundError:  # another process has saved and removed it since
                    gone = True
                except _Damage as damage:
                    damages.append(damage)
                else:
                    for damage in damages:
                        warnings.warn(f"{damage} Passed over for step {restored.step}.", stacklevel=2)
                    return restored
            if not gone:
                break
        if not steps:
            return None
        best = " There is best.npz: restore_best." if self._best.is_file() else ""
        raise CheckpointError(
            f"Checkpoints.restore: all {len(steps)} checkpoints in {self.folder} are damaged.{best} "
            f"The newest: {damages[0]}"
        )

    def restore_best(self, like: Any) -> Restored | None:
        """What `save_best` saved last; None if there is none. Raises CheckpointError if it is damaged."""
        with suppress(FileNotFoundError):
            return self._restored("Checkpoints.restore_best", self._best, None, like)
        return None

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, damaged ones included; ascending."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            names = [_STEP.fullmatch(entry.name) for entry in entries if entry.is_file()]
            return sorted(int(name[1]) for name in names if name)
        return []

    def _path(self, step: int) -> Path:
        return Path(self.folder) / f"step-{step:08d}.npz"

    @property
    def _best(self) -> Path:
        return Path(self.folder) / "best.npz"

    def _write(
        self, where: str, path: Path, tree: Any, step: int, metadata: Mapping[str, Any] | None
    ) -> None:
        if not isinstance(metadata, Mapping | None):
            raise TypeError(f"{where}: metadata needs to be a dict, got {_outline(metadata)}.")
        of_json = _of_json(where, "metadata", dict(metadata or {}))
        make_folder(where, path.parent)
        _save(where, path, tree, step, of_json)

    def _restored(self, where: str, path: Path, step: int | None, like: Any) -> Restored:
        contents = _read(where, path)
        saved = contents.step
        if saved is None or step not in (None, saved):
            what = "no step of a folder" if saved is None else f"step {saved} by its content"
            raise _damage(where, path, f"it is {what}. Was it copied or renamed?")
        if callable(like) and jax.tree_util.all_leaves([like]):  # a pytree that is callable is none
            like = like(contents.metadata)
        return Restored(saved, _filled(where, path, contents, like), contents.metadata)


def save_safetensors(path: str | os.PathLike[str], params: Params) -> None:
    """Saves parameters for others to read, in the format of Hugging Face's safetensors; whole or not at all.

    Layer l is `layers.{l-1}.weight` (n_out, n_in) and `layers.{l-1}.bias` (n_out,), absent for no bias: the
    names and axes of a PyTorch module whose `layers` is a ModuleList of Linear. The format has no digest.
    Raises ImportError without the package.

    >>> import fnn, jax, tempfile
    >>> path = tempfile.mkdtemp() + "/params.safetensors"
    >>> fnn.save_safetensors(path, fnn.init(jax.random.key(0), (64, 10)))  # doctest: +SKIP
    """
    try:
        from safetensors.numpy import save as serialised
    except ImportError:
        raise ImportError(
            'save_safetensors: needs the package safetensors: pip install "fnn[safetensors]".'
        ) from None
    path = _checked_path("save_safetensors", path)
    check_params("save_safetensors", params)
    arrays = {}
    for l, layer in enumerate(params):
        for name, array in zip(("weight", "bias"), layer, strict=True):
            if array is not None:
                arrays[f"layers.{l}.{name}"] = _stored("save_safetensors", f"{l}/{name}", array)
    arrays = {name: np.ascontiguousarray(array) for name, array in jax.device_get(arrays).items()}
    with replacing("save_safetensors", path) as file:
        file.write(serialised(arrays))


# Arguments.


def _checked_path(where: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise TypeError(f"{where}: path needs to be a str or Path, got {path!r}.")
    return Path(path)


def _checked_step(where: str, step: Any) -> int:
    with suppress(TypeError):
        if not isinstance(step, bool) and operator.index(step) >= 0:
            return operator.index(step)
    raise ValueError(f"{where}: step needs to be an integer of at least 0, got {step!r}.")


def _of_json(where: str, place: str, value: Any) -> Any:
    """The value, if JSON gives it back as it is."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: keys of {place} need to be strings, got {key!r}; use str(key).")
        return {str(key): _of_json(where, f"{place}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list):
        return [_of_json(where, f"{place}[{n}]", item) for n, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(
        f"{where}: {place} needs to be something JSON has, a string, number, None, list or dict; got "
        f"{_outline(value)}. Arrays belong in the tree; of one number use float(x), of a tuple list(x)."
    )


# Leaves.


class _Leaf(NamedTuple):
    """A leaf as the manifest has it. The shape is that of the stored array: of a PRNG key's words."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def bits(self) -> np.dtype:
        """dtype of the leaf in memory."""
        return np.dtype(np.uint32) if _KEY.fullmatch(self.dtype) else _DTYPES[self.dtype]


def _named_leaves(where: str, tree: Any) -> tuple[list[str], list[Any], Any]:
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


def _leaf(where: str, name: str, value: Any) -> _Leaf:
    """Name, shape and dtype of an array, a ShapeDtypeStruct or a number; nothing is computed."""
    if value is None:
        return _Leaf(name, (), "None")
    if type(value) in (bool, int, float, complex):
        return _Leaf(name, (), f"Python {type(value).__name__}")
    if isinstance(value, Tracer):
        raise TypeError(
            f"{where}: {_place(name)} has no value yet: call it on the host, outside jit, vmap, grad."
        )
    dtype: Any = getattr(value, "dtype", None)
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        implementations: list[str] = []

        def words(key):
            implementations.append(str(jax.random.key_impl(key)))
            return jax.random.key_data(key)

        shape = jax.eval_shape(words, jax.ShapeDtypeStruct(value.shape, dtype)).shape
        return _Leaf(name, tuple(shape), f"key<{implementations[0]}>")
    is_array = isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic)
    if (
        not is_array
        or isinstance(value, np.ma.MaskedArray)
        or dtype.name not in _DTYPES
        or not dtype.isnative
    ):
        hint = "Convert it with numpy.asarray; what is no array belongs elsewhere."
        if is_array:
            hint = (
                "Use .astype to one of JAX's dtypes, in the machine's byte order; of a masked array .filled."
            )
        raise TypeError(
            f"{where}: {_place(name)} needs to be an array of JAX or NumPy, a Python number, a PRNG key or "
            f"None; got {_outline(value)}. {hint}"
        )
    return _Leaf(name, tuple(value.shape), dtype.name)


def _place(name: str) -> str:
    """A leaf in words: of `optimizer_state/0/mu/1/W`, "W of layer 2 in optimizer_state/0/mu"."""
    match = re.fullmatch(r"(?:(.*)/)?(\d+)/([Wb])", name)
    if not match:
        return f"the leaf {name}"
    return f"{match[3]} of layer {int(match[2]) + 1}" + (f" in {match[1]}" if match[1] else "")


def _stored(where: str, name: str, value: Any) -> Any:
    """A leaf as the array that is stored, JAX's still on its device: of a key its words, of None nothing."""
    if isinstance(value, jax.Array):
        if value.is_deleted():
            raise ValueError(
                f"{where}: the memory of {_place(name)} was given away, as fnn.train_epoch does with the "
                "state it gets. Save the state that it returned."
            )
        if not value.is_fully_addressable:
            raise ValueError(
                f"{where}: {_place(name)} is spread over several processes. Gather it first, with "
                "jax.experimental.multihost_utils.process_allgather."
            )
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(value) if is_key else value
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(f"{where}: {_place(name)} is a jax.ShapeDtypeStruct, which has no values to save.")
    if type(value) in (bool, int, float, complex):
        try:
            return np.asarray(value, _PYTHON[type(value).__name__])
        except OverflowError:
            raise ValueError(f"{where}: {_place(name)}, {value}, has more than 64 bits.") from None
    return np.zeros(0, np.uint8) if value is None else np.asarray(value)


def _value(where: str, leaf: _Leaf, array: np.ndarray, like: Any) -> Any:
    """What was saved, as `like` has it: Python's, NumPy's, or JAX's on its devices."""
    if leaf.dtype == "None":
        return None
    array = array.view(leaf.bits)
    if leaf.dtype.startswith("Python "):
        return array.item()
    if isinstance(like, np.ndarray | np.generic):
        return array if isinstance(like, np.ndarray) else array[()]
    _check_kept(where, leaf)
    sharding = getattr(like, "sharding", None)
    if sharding is None or getattr(like, "committed", True):
        return jax.device_put(_of_jax(leaf, array, like), sharding)
    # On the same device, and as free to follow other arrays to theirs as `like` is.
    with jax.default_device(next(iter(sharding.device_set))):
        return jax.device_put(_of_jax(leaf, array, like))


def _of_jax(leaf: _Leaf, array: np.ndarray, like: Any) -> Any:
    """What `jax.device_put` needs to make the leaf: an array of NumPy, a key, or a number of weak type."""
    if key := _KEY.fullmatch(leaf.dtype):
        return jax.random.wrap_key_data(jnp.asarray(array), impl=key[1])
    return _weak(array) if getattr(like, "weak_type", False) else array


def _weak(array: np.ndarray) -> Any:
    """As the array that JAX makes of a Python number, whose dtype gives way to others'; optax has such."""
    zeros = jnp.full(array.shape, {"f": 0.0, "i": 0, "c": 0j}.get(array.dtype.kind, False))
    return zeros.at[...].set(array) if zeros.dtype == array.dtype else array


def _check_kept(where: str, leaf: _Leaf) -> None:
    """Raises TypeError if JAX would narrow the leaf."""
    what = f"{where}: {_place(leaf.name)}"
    check_not_narrowed(what, leaf.bits)
    if jax.dtypes.canonicalize_dtype(leaf.bits) != leaf.bits:
        raise TypeError(
            f"{what} is {leaf.dtype}, which JAX would narrow in silence. Use a NumPy array in `like`, or "
            'jax.config.update("jax_enable_x64", True).'
        )


# Trees.


class _Contents(NamedTuple):
    """All that a file says: its leaves, the step if it is one of a folder, the metadata."""

    leaves: Sequence[_Leaf]
    arrays: Sequence[np.ndarray]  # as NumPy has them: of other dtypes the bits, of None nothing
    step: int | None
    metadata: dict[str, Any]


def _save(where: str, path: Path, tree: Any, step: int | None, metadata: dict[str, Any]) -> None:
    names, values, _ = _named_leaves(where, tree)
    leaves = [_leaf(where, name, value) for name, value in zip(names, values, strict=True)]
    on_host = jax.device_get([_stored(where, *pair) for pair in zip(names, values, strict=True)])
    arrays = [np.asarray(array) for array in on_host]
    arrays = [a if a.dtype.isbuiltin == 1 else a.view(f"u{a.dtype.itemsize}") for a in arrays]
    with replacing(where, path) as file:
        _write(file, _Contents(leaves, arrays, step, metadata))


def _filled(where: str, path: Path, contents: _Contents, like: Any) -> Any:
    """The structure of `like` with the values of a file, if names, shapes and dtypes agree."""
    names, values, structure = _named_leaves(where, like)
    wanted = {name: _leaf(where, name, value) for name, value in zip(names, values, strict=True)}
    saved = {leaf.name: (leaf, array) for leaf, array in zip(contents.leaves, contents.arrays, strict=True)}
    for name in (*wanted, *saved):
        theirs, ours = saved[name][0] if name in saved else None, wanted.get(name)
        if theirs != ours:
            raise CheckpointError(
                f"{where}: {path} and `like` differ; {_place(name)}: {_difference(theirs, ours)}. Give a "
                "tree such as was saved, of the same network and optimiser, or another file."
            )
    filled = [_value(where, *saved[name], like=value) for name, value in zip(names, values, strict=True)]
    return jax.tree.unflatten(structure, filled)


def _difference(saved: _Leaf | None, wanted: _Leaf | None) -> str:
    def words(leaf: _Leaf | None) -> str:
        if leaf is None:
            return "has no such leaf"
        if saved and wanted and saved.dtype == wanted.dtype:
            return str(leaf.shape)
        is_single = leaf.dtype == "None" or leaf.dtype.startswith("Python ")
        return leaf.dtype if is_single else f"{leaf.dtype} {leaf.shape}"

    return f"file {words(saved)}, like {words(wanted)}"


def _params(where: str, path: Path, contents: _Contents) -> Params:
    """The layers that a file holds."""
    leaves = contents.leaves
    names = [name for l in range(len(leaves) // 2) for name in (f"{l}/W", f"{l}/b")]
    what = f"{where}: {path} holds no network parameters, a tuple of fnn.Layer(W, b)"
    if not leaves or [leaf.name for leaf in leaves] != names:
        first = ", ".join(leaf.name for leaf in leaves[:3]) + ", ..." * (len(leaves) > 3)
        raise CheckpointError(f"{what}, but {first or 'nothing'}. Use like= with a tree such as was saved.")
    values = [_value(where, leaf, array, None) for leaf, array in zip(leaves, contents.arrays, strict=True)]
    params = tuple(Layer(W, b) for W, b in zip(values[::2], values[1::2], strict=True))
    try:
        check_params(where, params)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} that fit one another. {error} Or use like=.") from None
    return params


# The file: zip and .npy by NumPy, and in zip's comment, its last 64 bytes, the digest of all before.


class _Damage(CheckpointError):
    """A damaged file, as against one of another structure."""


def _damage(where: str, path: Path, what: str) -> _Damage:
    hint = "Load another checkpoint, or a copy of it."
    return _Damage(f"{where}: {path} is damaged or no checkpoint of fnn.save: {what} {hint}")


def _write(file: IO[bytes], contents: _Contents) -> None:
    manifest = json.dumps(
        {
            "format": FORMAT,
            "step": contents.step,
            "metadata": contents.metadata,
            "leaves": [leaf._asdict() for leaf in contents.leaves],
        }
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = b"0" * DIGEST
        arrays = zip([leaf.name for leaf in contents.leaves], contents.arrays, strict=True)
        for name, array in ((MANIFEST, np.frombuffer(manifest.encode(), np.uint8)), *arrays):
            member = zipfile.ZipInfo(f"{name}.npy")  # of 1980, so that equal trees give equal files
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    file.seek(-DIGEST, os.SEEK_END)
    size = file.tell()
    digest = _digest(file, size)
    file.seek(size)
    file.write(digest)


def _digest(file: IO[bytes], size: int) -> bytes:
    """SHA-256 of the first `size` bytes, in hexadecimal."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, 2**20))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest().encode()


def _read(where: str, path: Path) -> _Contents:
    """The contents of a file, whose digest is right. Raises FileNotFoundError without one, and _Damage."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END) - DIGEST
            digest = _digest(file, size)
            if size < 0 or file.read() != digest:
                raise _damage(where, path, "its bytes are not those that were saved (SHA-256).")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                manifest = json.loads(archive[f"{MANIFEST}.npy"].tobytes())
                if manifest["format"] != FORMAT:
                    what = f"it has format {manifest['format']}, and this version of fnn reads {FORMAT}."
                    raise _damage(where, path, what)
                leaves = [_Leaf(l["name"], tuple(l["shape"]), l["dtype"]) for l in manifest["leaves"]]
                arrays = [archive[f"{leaf.name}.npy"] for leaf in leaves]
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: there is no file {path}.") from None
    except _Damage:
        raise
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise _damage(
            where, path, f"it cannot be read ({getattr(error, 'strerror', None) or error})."
        ) from None
    return _Contents(leaves, arrays, manifest["step"], manifest["metadata"])
