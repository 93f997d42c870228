"""A run's folder: its state between two compiled calls, so that a run that was stopped goes on from there.

What is saved is all that the rest of a run depends on: parameters, the optimiser's state, the key of the next
shuffle, the step, and the history so far. An epoch is the same compiled program whenever it runs, so a run
that was stopped and resumed ends, on the same machine, with the bits of one that was not.
"""

import json
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from .checkpoint import CheckpointError, Checkpoints
from .curves import draw_history
from .files import replacing
from .history import History
from .sharded_checkpoint import ShardedCheckpoints

SECONDS = 30.0  # between two checkpoints, at least


def fingerprint(
    cost: Any,
    params: Any,
    key: Any,
    data: Sequence[Array],
    validation: Sequence[Array] | None,
    **options: Any,
) -> dict[str, Any]:
    """What a run has to have in common with the one that it goes on with, in words of JSON.

    Parameters and data by checksums; a cost by what it prints, or its type if that has an address in memory.
    Optimisers are told apart by the structure of their state alone, functions by the names that `fit` gets.
    """
    name = repr(cost) if " at 0x" not in repr(cost) else type(cost).__name__
    options |= {"cost": name, "params": _checksums(jax.tree.leaves(params))}
    if key is not None and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    parts = {"key": None if key is None else np.asarray(key).tolist(), "data": _checksums(data)}
    return {**parts, "validation": None if validation is None else _checksums(validation), **options}


def _checksums(arrays: Sequence[Array]) -> list[str]:
    return [_checksum(array) for array in arrays]


def _checksum(array: Array) -> str:
    outline = f"{array.dtype} {array.shape}"
    if not array.is_fully_addressable:  # spread over processes: no one has its bytes
        return outline
    return f"{outline} {zlib.crc32(np.asarray(array).tobytes()):08x}"


class RunFolder:
    """The checkpoints of one run, `config.json`, `history.jsonl`, and at its end `history.png`.

    A process alone writes `Checkpoints`, several write `ShardedCheckpoints`; both go on from the newest of
    either.
    """

    def __init__(self, folder: Any, run: dict[str, Any]):
        kind = ShardedCheckpoints if jax.process_count() > 1 else Checkpoints
        self.checkpoints, self.run = kind(folder), json.loads(json.dumps(run))
        self.saved_at = time.monotonic()

    def restore(self, like: Callable[[int, int], Any]) -> tuple[int, Any] | None:
        """(epochs done, the tree) of the newest checkpoint; None in a new folder.

        like: of the numbers of epochs and steps done, the tree that was saved
        Raises CheckpointError if it is another run's, or damaged.
        """
        newest = _newest(self.checkpoints.folder)
        restored = newest.restore(lambda metadata: like(self._epoch(metadata), metadata["step"]))
        return None if restored is None else (self._epoch(restored.metadata), restored.tree)

    def _epoch(self, metadata: dict[str, Any]) -> int:
        theirs = metadata.get("run", {})
        for name in (*self.run, *theirs):
            if self.run.get(name) != theirs.get(name):
                raise CheckpointError(
                    f"fit: the checkpoints in {self.checkpoints.folder} are of another run: {name} was "
                    f"{theirs.get(name)}, and is {self.run.get(name)}. Use another folder, equal arguments, "
                    "or the version of fnn that began it."
                )
        return metadata["epoch"]

    def save(self, epoch: int, step: int, tree: Any, history: str) -> None:
        self.checkpoints.save(step, tree, {"epoch": epoch, "step": step, "run": self.run})
        if jax.process_index() == 0:
            self._write("history.jsonl", history)
            if not self._path("config.json").exists():
                self._write("config.json", json.dumps(self.run | _machine(), indent=2) + "\n")
        self.saved_at = time.monotonic()

    def draw(self, history: History) -> None:
        """The learning curves, where matplotlib is installed."""
        if jax.process_index() == 0 and len(history.seconds):
            try:
                draw_history(history, self._path("history.png"))
            except ImportError:
                pass
            except Exception as error:  # no picture is worth a trained network
                warnings.warn(f"fit: could not draw the run: {error}", RuntimeWarning, stacklevel=2)

    def _path(self, name: str) -> Path:
        return Path(self.checkpoints.folder) / name

    def _write(self, name: str, text: str) -> None:
        with replacing("fit", self._path(name)) as file:
            file.write(text.encode())

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self.saved_at > SECONDS


def _machine() -> dict[str, Any]:
    """What a run began on, for whoever reads its folder later; a run may go on elsewhere."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} {devices[0].device_kind} of {jax.process_count()} processes",
        "versions": {module.__name__: module.__version__ for module in (jax, optax, np)},
    }


def _newest(folder: Any) -> Checkpoints | ShardedCheckpoints:
    """The kind of checkpoints that has the latest step in a folder."""
    alone = Checkpoints(folder)
    if not any(Path(folder).glob("step-*/")):  # those of several processes need orbax to look at
        return alone
    spread = ShardedCheckpoints(folder)
    return spread if max(spread.steps(), default=-1) > max(alone.steps(), default=-1) else alone


@contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has come; meanwhile it ends nothing by itself.

    Only the main thread gets signals; in others the answer is always no.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.set())
    is_handled = False
    try:
        yield came.is_set
    except SystemExit:
        is_handled = True
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        if came.is_set() and not is_handled:
            signal.raise_signal(signal.SIGTERM)
