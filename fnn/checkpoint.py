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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import jax
import numpy as np

from .files import make_folder, replacing
from .leaves import MANIFEST, Leaf, as_like, leaf_of, named_leaves, place, stored
from .params import Layer, Params, _outline, check_params, is_count

FORMAT = 1
DIGEST = 64  # bytes, SHA-256 in hexadecimal
STEP = r"step-([0-9]{8}|[1-9][0-9]{8,})"  # a name in a folder, of files with .npz behind it

T = TypeVar("T")


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
    path = checked_path("save", path)
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
    path = checked_path("load", path)
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
        checked_path("Checkpoints", self.folder)
        if not is_count(self.keep):
            raise ValueError(f"Checkpoints: keep needs to be an integer of at least 1, got {self.keep!r}.")

    def save(self, step: Any, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the tree of a step, and then removes what is older than the newest `keep`.

        step: an integer of at least 0, Python's or an array's
        metadata: what JSON has: a dict of strings, numbers, None, lists and dicts
        """
        where, step = "Checkpoints.save", checked_step("Checkpoints.save", step)
        self._write(where, self._path(step), tree, step, metadata)
        for old in [other for other in self.steps() if other <= step][: -self.keep]:
            self._path(old).unlink(missing_ok=True)

    def save_best(self, step: Any, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the tree as `best.npz` in place of the one before; it stays whatever `save` removes."""
        where, step = "Checkpoints.save_best", checked_step("Checkpoints.save_best", step)
        self._write(where, self._best, tree, step, metadata)

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is undamaged, with the structure of `like`; None if there is none.

        like: as in `fnn.load`; or a function metadata -> like, where the structure depends on those

        A damaged one is passed over with a warning. Raises CheckpointError if all are, or if the newest
        undamaged one is of another structure.
        """
        where = "Checkpoints.restore"
        hint = " There is best.npz: restore_best." if self._best.is_file() else ""
        restored, damages = newest(
            where,
            self.folder,
            self.steps,
            lambda step: self._restored(where, self._path(step), step, like),
            hint,
        )
        if restored is not None:
            for damage in damages:
                warnings.warn(f"{damage} Passed over for step {restored.step}.", stacklevel=2)
        return restored

    def restore_best(self, like: Any) -> Restored | None:
        """What `save_best` saved last; None if there is none. Raises CheckpointError if it is damaged."""
        with suppress(FileNotFoundError):
            return self._restored("Checkpoints.restore_best", self._best, None, like)
        return None

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, damaged ones included; ascending."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            names = [re.fullmatch(STEP + r"\.npz", entry.name) for entry in entries if entry.is_file()]
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
        of_json = checked_metadata(where, metadata)
        make_folder(where, path.parent)
        _save(where, path, tree, step, of_json)

    def _restored(self, where: str, path: Path, step: int | None, like: Any) -> Restored:
        contents = _read(where, path)
        saved = contents.step
        if saved is None or step not in (None, saved):
            what = "no step of a folder" if saved is None else f"step {saved} by its content"
            raise damage_of(where, path, f"it is {what}. Was it copied or renamed?")
        like = with_metadata(like, contents.metadata)
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
    path = checked_path("save_safetensors", path)
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


def checked_path(where: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or not os.fspath(path):
        raise TypeError(f"{where}: path needs to be a str or Path, got {path!r}.")
    return Path(path)


def checked_step(where: str, step: Any) -> int:
    with suppress(TypeError):
        if not isinstance(step, bool) and operator.index(step) >= 0:
            return operator.index(step)
    raise ValueError(f"{where}: step needs to be an integer of at least 0, got {step!r}.")


def checked_metadata(where: str, metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, Mapping | None):
        raise TypeError(f"{where}: metadata needs to be a dict, got {_outline(metadata)}.")
    return _of_json(where, "metadata", dict(metadata or {}))


def with_metadata(like: Any, metadata: dict[str, Any]) -> Any:
    """`like`, or what it makes of the metadata if it is a function; a pytree that is callable is none."""
    return like(metadata) if callable(like) and jax.tree_util.all_leaves([like]) else like


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


# Trees.


class _Contents(NamedTuple):
    """All that a file says: its leaves, the step if it is one of a folder, the metadata."""

    leaves: Sequence[Leaf]
    arrays: Sequence[np.ndarray]  # as NumPy has them: of other dtypes the bits, of None nothing
    step: int | None
    metadata: dict[str, Any]


def _save(where: str, path: Path, tree: Any, step: int | None, metadata: dict[str, Any]) -> None:
    names, values, _ = named_leaves(where, tree)
    leaves = [leaf_of(where, name, value) for name, value in zip(names, values, strict=True)]
    on_host = jax.device_get([_stored(where, *pair) for pair in zip(names, values, strict=True)])
    arrays = [np.asarray(array) for array in on_host]
    arrays = [a if a.dtype.isbuiltin == 1 else a.view(f"u{a.dtype.itemsize}") for a in arrays]
    with replacing(where, path) as file:
        _write(file, _Contents(leaves, arrays, step, metadata))


def _stored(where: str, name: str, value: Any) -> Any:
    array = stored(where, name, value)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{where}: {place(name)} is spread over several processes. Save it with fnn.ShardedCheckpoints, "
            "or gather it first, with jax.experimental.multihost_utils.process_allgather."
        )
    return array


def _filled(where: str, path: Path, contents: _Contents, like: Any) -> Any:
    """The structure of `like` with the values of a file, if names, shapes and dtypes agree."""
    values, structure = matched(where, path, contents.leaves, like)
    saved = {leaf.name: (leaf, array) for leaf, array in zip(contents.leaves, contents.arrays, strict=True)}
    filled = [as_like(where, *saved[name], like=value) for name, value in values.items()]
    return jax.tree.unflatten(structure, filled)


def matched(where: str, path: Path, leaves: Sequence[Leaf], like: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of `like` by name, and its structure, if names, shapes and dtypes are as they were saved."""
    names, values, structure = named_leaves(where, like)
    wanted = {name: leaf_of(where, name, value) for name, value in zip(names, values, strict=True)}
    saved = {leaf.name: leaf for leaf in leaves}
    for name in (*wanted, *saved):
        theirs, ours = saved.get(name), wanted.get(name)
        if theirs != ours:
            raise CheckpointError(
                f"{where}: {path} and `like` differ; {place(name)}: {_difference(theirs, ours)}. Give a "
                "tree such as was saved, of the same network and optimiser, or another file."
            )
    return dict(zip(names, values, strict=True)), structure


def _difference(saved: Leaf | None, wanted: Leaf | None) -> str:
    def words(leaf: Leaf | None) -> str:
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
    values = [as_like(where, leaf, array, None) for leaf, array in zip(leaves, contents.arrays, strict=True)]
    params = tuple(Layer(W, b) for W, b in zip(values[::2], values[1::2], strict=True))
    try:
        check_params(where, params)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} that fit one another. {error} Or use like=.") from None
    return params


# The file: zip and .npy by NumPy, and in zip's comment, its last 64 bytes, the digest of all before.


class Damage(CheckpointError):
    """A damaged file, as against one of another structure."""


def damage_of(where: str, path: Path, what: str, writer: str = "fnn.save") -> Damage:
    hint = "Load another checkpoint, or a copy of it."
    return Damage(f"{where}: {path} is damaged or no checkpoint of {writer}: {what} {hint}")


def newest(
    where: str,
    folder: str | os.PathLike[str],
    steps: Callable[[], list[int]],
    read: Callable[[int], T],
    hint: str = "",
) -> tuple[T | None, list[Damage]]:
    """What `read` makes of the newest undamaged step, None without any; and the damages of later ones.

    Raises CheckpointError if all are damaged.
    """
    while True:
        found, damages, gone = steps(), [], False
        for step in reversed(found):
            try:
                return read(step), damages
            except FileNotFoundError:  # another process has saved and removed it since
                gone = True
            except Damage as damage:
                damages.append(damage)
        if not gone:
            break
    if not found:
        return None, []
    raise CheckpointError(
        f"{where}: all {len(found)} checkpoints in {folder} are damaged.{hint} The newest: {damages[0]}"
    )


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
    """The contents of a file, whose digest is right. Raises FileNotFoundError without one, and Damage."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END) - DIGEST
            digest = _digest(file, size)
            if size < 0 or file.read() != digest:
                raise damage_of(where, path, "its bytes are not those that were saved (SHA-256).")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                manifest = json.loads(archive[f"{MANIFEST}.npy"].tobytes())
                if manifest["format"] != FORMAT:
                    what = f"it has format {manifest['format']}, and this version of fnn reads {FORMAT}."
                    raise damage_of(where, path, what)
                leaves = [Leaf(l["name"], tuple(l["shape"]), l["dtype"]) for l in manifest["leaves"]]
                arrays = [archive[f"{leaf.name}.npy"] for leaf in leaves]
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: there is no file {path}.") from None
    except Damage:
        raise
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise damage_of(
            where, path, f"it cannot be read ({getattr(error, 'strerror', None) or error})."
        ) from None
    return _Contents(leaves, arrays, manifest["step"], manifest["metadata"])
