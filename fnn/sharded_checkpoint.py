"""Checkpoints of state that is spread over many devices and processes: orbax's arrays under our digest.

A step is a folder:

    step-00001234/arrays-0123456789abcdef/    what orbax wrote: an array for each leaf, by its name
    step-00001234/digest.json                 the manifest; of every file there, its size and SHA-256

orbax writes every device's part from where it is, and reads it for other devices; alone, it loads most
changed bits in silence. So digest.json is written after it, whole or not at all, and ends with the SHA-256 of
its own text; all is compared with it before orbax reads anything. A step without it is not there, which is
what a save that was cut short leaves behind. It names the arrays' folder, so that saving a step once more
keeps what was there until the moment that digest.json is replaced. Nothing in a step is executed. A digest is
no signature: whoever can write the files can make one that is accepted.

With several processes (jax.distributed) the first alone looks after the folder, and every error that one
process meets by itself is raised on all, so that none waits for another that has given up.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from .checkpoint import (
    STEP,
    CheckpointError,
    Damage,
    Restored,
    checked_metadata,
    checked_path,
    checked_step,
    damage_of,
    matched,
    newest,
    with_metadata,
)
from .files import TEMPORARY, _flush_folder, make_folder, replacing
from .leaves import KEY, Leaf, as_like, check_kept, leaf_of, named_leaves, place, stored, weak
from .params import is_count

FORMAT = 1
DIGEST_FILE = "digest.json"
_ARRAYS = r"arrays-[0-9a-f]{16}"
_LEFTOVER = re.compile(rf"{_ARRAYS}[^/]*/.*|\.[^/]*{re.escape(TEMPORARY)}")  # of a save that was cut short
_ERRORS = (CheckpointError, OSError, TypeError, ValueError)  # which other processes raise too
# Of others, such as uint4 and float6, the bits go as bytes: tensorstore has not all of them.
_OF_ORBAX = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 "
    "bfloat16 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz int4".split()
)

T = TypeVar("T")


@dataclass(frozen=True)
class ShardedCheckpoints:
    """A folder of checkpoints `step-00001234/`, of which the newest few are kept: `fnn.Checkpoints` by orbax.

    For arrays spread over devices or processes: what was saved on 8 devices comes back on 4, 2 or 1, and the
    other way round, to the same bits. Of several processes all call `save` and `restore`, with equal
    arguments, and see one file system. Needs the package orbax-checkpoint: pip install "fnn[checkpoint]".

    folder: made by the first save. One run at a time saves into it.
    keep: how many, at least 1. Counted back from the step just saved: those of later steps, which are there
        if a run went back, stay.

    >>> import fnn, jax, tempfile
    >>> rows = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P("data"))
    >>> array = jax.device_put(jax.numpy.arange(8.0), rows)
    >>> checkpoints = fnn.ShardedCheckpoints(tempfile.mkdtemp(), keep=2)  # doctest: +SKIP
    >>> for step in (10, 20, 30):  # doctest: +SKIP
    ...     checkpoints.save(step, {"x": array}, {"epoch": step // 10})
    >>> checkpoints.steps()  # doctest: +SKIP
    [20, 30]
    >>> like = {"x": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)}
    >>> step, tree, metadata = checkpoints.restore(like)  # doctest: +SKIP
    >>> step, metadata, tree["x"].sharding == rows  # doctest: +SKIP
    (30, {'epoch': 3}, True)
    """

    folder: str | os.PathLike[str]
    keep: int = field(default=3, kw_only=True)

    def __post_init__(self):
        checked_path("ShardedCheckpoints", self.folder)
        if not is_count(self.keep):
            raise ValueError(
                f"ShardedCheckpoints: keep needs to be an integer of at least 1, got {self.keep!r}."
            )
        _orbax()  # or a run would learn at its first save that there is none

    def save(self, step: Any, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves the tree of a step, and then removes what is older than the newest `keep`.

        step: an integer of at least 0, Python's or an array's
        tree: what `fnn.save` takes, and arrays that are spread over devices and processes. A leaf that every
            process has for itself, an array on its own devices or a number, has to be the same on all.
        metadata: what JSON has: a dict of strings, numbers, None, lists and dicts
        """
        where = "ShardedCheckpoints.save"
        contents, arrays = _everywhere(lambda: _prepared(where, step, tree, metadata))
        _check_equal(where, contents, arrays)
        path = self._path(contents.step)
        folder = path / _of_first(lambda: _made(where, path))
        if arrays:
            orbax = _orbax()
            with orbax.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(folder, args=orbax.args.PyTreeSave(arrays))
        _of_first(lambda: self._finish(where, path, contents._replace(arrays=folder.name)))

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is undamaged, with the structure of `like`; None if there is none.

        like: a tree of the structure that was saved, of arrays or jax.ShapeDtypeStruct, or a function
            metadata -> like. Names, shapes and dtypes have to agree; devices and shardings are those of
            `like`, whatever they were. NumPy arrays and Python numbers come back where `like` has them.

        A damaged one is passed over with a warning. Raises CheckpointError if all are, or if the newest
        undamaged one is of another structure.
        """
        where = "ShardedCheckpoints.restore"
        found = _of_first(lambda: self._newest(where))
        if found is None:
            return None
        contents = _contents(found["manifest"])
        for damage in found["damages"]:
            warnings.warn(f"{damage} Passed over for step {contents.step}.", stacklevel=2)
        path = self._path(contents.step)
        values, structure = _everywhere(lambda: _wanted(where, path, contents, like))
        arrays = _read(contents, path / contents.arrays, values)
        restored = {
            leaf.name: _restored(where, leaf, arrays.get(leaf.name), values[leaf.name])
            for leaf in contents.leaves
        }
        tree = jax.tree.unflatten(structure, [restored[name] for name in values])
        return Restored(contents.step, tree, contents.metadata)

    def steps(self) -> list[int]:
        """The steps of which there are checkpoints, damaged ones included; ascending."""
        return [step for step in self._begun() if (self._path(step) / DIGEST_FILE).is_file()]

    def _begun(self) -> list[int]:
        """The steps that have a folder, complete or not; ascending."""
        with suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            names = [re.fullmatch(STEP, entry.name) for entry in entries if entry.is_dir()]
            return sorted(int(name[1]) for name in names if name)
        return []

    def _path(self, step: int) -> Path:
        return Path(os.path.abspath(self.folder)) / f"step-{step:08d}"  # orbax takes absolute paths alone

    # What the first process does.

    def _finish(self, where: str, path: Path, contents: "_Contents") -> None:
        """Makes the step valid; then removes what it replaces and what is too old."""
        written = {n: file for n, file in _files(path).items() if n.startswith(f"{contents.arrays}/")}
        files = {name: _entry(file) for name, file in written.items()}
        if files:
            _flush(path / contents.arrays)
        with replacing(where, path / DIGEST_FILE) as file:
            file.write(_text(contents, files))
        for other in path.iterdir():
            if other.name not in (DIGEST_FILE, contents.arrays):
                shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
        complete = [step for step in self.steps() if step <= contents.step]
        if len(complete) > self.keep:
            for old in [step for step in self._begun() if step < complete[-self.keep]]:
                (self._path(old) / DIGEST_FILE).unlink(missing_ok=True)  # first: then it is not there
                shutil.rmtree(self._path(old))

    def _newest(self, where: str) -> dict[str, Any] | None:
        """The manifest of the newest undamaged step, and the damages of later ones in words."""
        manifest, damages = newest(
            where, self.folder, self.steps, lambda step: _checked(where, self._path(step), step)
        )
        return None if manifest is None else {"manifest": manifest, "damages": list(map(str, damages))}


def _orbax() -> Any:
    try:
        import orbax.checkpoint as orbax
    except ImportError:
        raise ImportError(
            'ShardedCheckpoints: needs the package orbax-checkpoint: pip install "fnn[checkpoint]".'
        ) from None
    return orbax


# The tree, and what orbax gets of it.


class _Contents(NamedTuple):
    """The manifest of a step: all that it says but for the values."""

    step: int
    metadata: dict[str, Any]
    leaves: list[Leaf]
    arrays: str  # the name of orbax's folder


def _contents(manifest: dict[str, Any]) -> _Contents:
    leaves = [Leaf(l["name"], tuple(l["shape"]), l["dtype"]) for l in manifest["leaves"]]
    return _Contents(manifest["step"], manifest["metadata"], leaves, manifest["arrays"])


def _prepared(where: str, step: Any, tree: Any, metadata: Any) -> tuple[_Contents, dict[str, Any]]:
    """What is saved: the manifest, and the arrays by name, JAX's where they are spread, others NumPy's."""
    step, of_json = checked_step(where, step), checked_metadata(where, metadata)
    names, values, _ = named_leaves(where, tree)
    leaves = [leaf_of(where, name, value) for name, value in zip(names, values, strict=True)]
    arrays = {
        leaf.name: stored(where, leaf.name, value)
        for leaf, value in zip(leaves, values, strict=True)
        if leaf.dtype != "None" and 0 not in leaf.shape  # which orbax refuses; the manifest says it all
    }
    local = {name: array for name, array in arrays.items() if not _is_by_orbax(array)}
    for name, array in local.items():
        if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
            raise TypeError(
                f"{where}: {place(name)} is {array.dtype.name} and spread over several processes, and orbax "
                "has no such dtype. Use .astype to one it has."
            )
    arrays |= {name: _bits(np.asarray(array)) for name, array in jax.device_get(local).items()}
    return _Contents(step, of_json, leaves, ""), arrays


def _is_by_orbax(array: Any) -> bool:
    return isinstance(array, jax.Array) and _is_spread(array.sharding) and array.dtype.name in _OF_ORBAX


def _is_spread(sharding: jax.sharding.Sharding) -> bool:
    """Whether orbax moves an array device by device; else a process has all of it, and it goes by NumPy."""
    if jax.process_count() > 1:
        return not sharding.is_fully_addressable
    return not sharding.is_fully_replicated


def _bits(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.name in _OF_ORBAX else array.view(f"u{array.dtype.itemsize}")


def _wanted(where: str, path: Path, contents: _Contents, like: Any) -> tuple[dict[str, Any], Any]:
    values, structure = matched(where, path, contents.leaves, with_metadata(like, contents.metadata))
    for leaf in contents.leaves:
        if _target(leaf, values[leaf.name]) is not None:
            check_kept(where, leaf)
    return values, structure


def _target(leaf: Leaf, like: Any) -> jax.sharding.Sharding | None:
    """Where orbax is to put the array of a leaf: its sharding, or None if it is read as NumPy's."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True) or leaf.bits.name not in _OF_ORBAX:
        return None
    return sharding if _is_spread(sharding) else None


def _read(contents: _Contents, folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The arrays that orbax has, by name."""
    orbax = _orbax()
    wanted = {}
    for leaf in contents.leaves:
        if leaf.dtype != "None" and 0 not in leaf.shape:
            sharding = _target(leaf, values[leaf.name])
            wanted[leaf.name] = (
                orbax.RestoreArgs(restore_type=np.ndarray)
                if sharding is None
                else orbax.ArrayRestoreArgs(sharding=sharding)
            )
    if not wanted:
        return {}
    with orbax.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder, args=orbax.args.PyTreeRestore(restore_args=wanted))


def _restored(where: str, leaf: Leaf, array: Any, like: Any) -> Any:
    """What was saved, as `like` has it."""
    if not isinstance(array, jax.Array):
        if array is None and leaf.dtype != "None":
            array = np.zeros(leaf.shape, leaf.bits)
        return as_like(where, leaf, np.asarray(array), like)
    if key := KEY.fullmatch(leaf.dtype):
        return jax.device_put(jax.random.wrap_key_data(array, impl=key[1]), like.sharding)
    if getattr(like, "weak_type", False):
        return jax.jit(weak, out_shardings=like.sharding)(array)
    return array


def _made(where: str, path: Path) -> str:
    """Makes the step's folder; the name of a new one in it, for the arrays."""
    make_folder(where, path)
    return f"arrays-{secrets.token_hex(8)}"


# digest.json: {"manifest": ..., "files": ...}, and in its last line the SHA-256 of the lines before.


def _text(contents: _Contents, files: dict[str, Any]) -> bytes:
    leaves = [leaf._asdict() for leaf in contents.leaves]
    manifest = {"format": FORMAT, **contents._asdict(), "leaves": leaves}
    before = json.dumps({"manifest": manifest, "files": files})[:-1] + ",\n"
    return before.encode() + _last_line(before.encode())


def _last_line(before: bytes) -> bytes:
    return f'"sha256": "{hashlib.sha256(before).hexdigest()}"}}'.encode()


def _files(folder: Path) -> dict[str, Path]:
    """All files below a folder by their names in it, links among them."""
    paths = sorted(folder.rglob("*"))
    return {p.relative_to(folder).as_posix(): p for p in paths if p.is_symlink() or not p.is_dir()}


def _entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _flush(folder: Path) -> None:
    """Has the disk keep all that is below a folder, of which orbax says nothing."""
    for path in folder.rglob("*"):
        if path.is_dir():
            _flush_folder(path)
        else:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _checked(where: str, path: Path, step: int) -> dict[str, Any]:
    """The manifest of a step, whose files are as they were saved. Raises FileNotFoundError, and Damage."""

    def damage(what: str) -> Damage:
        return damage_of(where, path, what, "fnn.ShardedCheckpoints")

    try:
        text = (path / DIGEST_FILE).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise damage(f"{DIGEST_FILE} cannot be read ({error.strerror or error}).") from None
    manifest: dict[str, Any] = {}
    try:
        manifest, wrong = _compared(path, step, text)
    except (OSError, KeyError, ValueError) as error:
        wrong = f"it cannot be read ({getattr(error, 'strerror', None) or error})."
    if not wrong:
        return manifest
    if (path / DIGEST_FILE).read_bytes() != text:
        raise FileNotFoundError(path)  # saved once more, or removed, meanwhile
    raise damage(wrong)


def _compared(path: Path, step: int, text: bytes) -> tuple[dict[str, Any], str]:
    """The manifest, and what is wrong with the files, in words."""
    before, newline, last = text.rpartition(b"\n")
    if last != _last_line(before + newline):
        return {}, f"{DIGEST_FILE} is not as it was saved (SHA-256)."
    digest = json.loads(text)
    manifest, files = digest["manifest"], digest["files"]
    if manifest["format"] != FORMAT:
        return {}, f"it has format {manifest['format']}, and this version of fnn reads {FORMAT}."
    if manifest["step"] != step:
        return {}, f"it is step {manifest['step']} by its content. Was it copied or renamed?"
    found = _files(path)
    names = {n for n in found if n.startswith(f"{manifest['arrays']}/") or not _LEFTOVER.fullmatch(n)}
    for name in sorted(names ^ {*files, DIGEST_FILE}):
        return {}, f"the file {name} is {'one too many' if name in names else 'missing'}."
    for name, entry in files.items():
        if found[name].stat().st_size != entry["bytes"] or _entry(found[name]) != entry:
            return {}, f"the bytes of {name} are not those that were saved (SHA-256)."
    return manifest, ""


# Several processes.


def _everywhere(action: Callable[[], T]) -> T:
    """What `action` returns on this process; what it raises on one, on all."""
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    told = None
    if error is not None:
        kind = next((n for n, kind in enumerate(_ERRORS) if isinstance(error, kind)), -1)
        told = [kind, getattr(error, "strerror", None) or str(error), getattr(error, "errno", None)]
    outcomes = [json.loads(text) for text in _gathered(json.dumps(told).encode())]
    if error is not None:
        raise error
    for process, outcome in enumerate(outcomes):
        if outcome is not None:
            kind, text, number = outcome
            text = f"{text} (That was on process {process}.)"
            if number is not None:
                raise OSError(number, text)
            raise (*_ERRORS, RuntimeError)[kind](text)
    return result  # pyright: ignore[reportReturnType]


def _of_first(action: Callable[[], T]) -> T:
    """What `action`, called on the first process alone, returns there, which JSON has; or what it raises."""
    if jax.process_count() == 1:
        return action()
    text = _everywhere(lambda: json.dumps(action()) if jax.process_index() == 0 else "").encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    return json.loads(multihost_utils.broadcast_one_to_all(_padded(text, size)).tobytes()[:size])


def _gathered(text: bytes) -> list[bytes]:
    """The texts of all processes."""
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    rows = multihost_utils.process_allgather(_padded(text, max(sizes)))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def _padded(text: bytes, size: int) -> np.ndarray:
    """As an array of one of few lengths, as each is compiled for."""
    length = max(1024, 1 << (int(size) - 1).bit_length())
    return np.frombuffer(text.ljust(length, b"\0")[:length], np.uint8)


def _check_equal(where: str, contents: _Contents, arrays: dict[str, Any]) -> None:
    """Raises ValueError if processes have different things to save: only the first one's would be."""
    if jax.process_count() == 1:
        return
    parts = {"step": contents.step, "metadata": contents.metadata, "structure": contents.leaves}
    ours = {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}
    for name, array in arrays.items():
        if isinstance(array, np.ndarray):
            ours[place(name)] = hashlib.sha256(array.tobytes()).hexdigest()
        else:
            ours[place(name)] = str(array.sharding)
    first = _of_first(lambda: ours)

    def compare():
        for name in (*ours, *first):
            if ours.get(name) != first.get(name):
                raise ValueError(
                    f"{where}: {name} is another on process {jax.process_index()} than on process 0. What "
                    "differs has to be one global array: jax.make_array_from_process_local_data."
                )

    _everywhere(compare)
