"""Does a checkpoint survive what happens to processes, bits and disks?

    python -m experiments.faults        (--help lists the flags)

Three kinds of faults, each with what is lost or wrongly accepted:

Kills. A process saves in a loop, arrays of 80 bytes to 2.4 MB, and tells of every save that is done. It is
killed (SIGKILL) at a random moment, and another process restores. Lost: the newest save that was done cannot
be had. Torn: what is had is not what was saved. `numpy.savez` onto one name for comparison.

Bits. One bit of the file is flipped at a random place, and the file loaded: refused, harmless (every bit of
the arrays as it was) or loaded wrong in silence. For comparison numpy.savez, and, where they are installed,
safetensors and Orbax, with its defaults; of Orbax's folder any file, and fewer flips, as it is slower.

A full disk. The save of a larger state is cut short: by a limit on the size of files (RLIMIT_FSIZE), anywhere
in the file, and by a disk of 256 KiB (tmpfs, where one can be mounted). Intact: the checkpoint before can be
restored, and nothing else is left in the folder.

Expected answer. Nothing is lost and nothing torn, every flipped bit is refused, and every checkpoint before a
full disk is intact. `numpy.savez` loses what was there if it is killed while it writes. safetensors and Orbax
load numbers with a bit flipped. `numpy.load` looks at a checksum only where it reads to an array's end, which
a header made shorter keeps it from.

A killed process is no power failure: what the disk keeps of what was flushed to it is not asked here.

The table goes to faults.txt beside the script.
"""

import json
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fnn
from experiments import command
from experiments.command import expect
from fnn.tables import aligned

SIZES = (10, 1_000, 30_000, 300_000)  # numbers of 8 bytes in the states that are saved
PATIENCE = 0.1  # seconds from the child's start to its kill, at most; a save takes a hundredth or so
ORBAX_SHARE = 20  # one flip of its files for so many of the others'

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Flags(command.TableFlags):
    """Kills, flipped bits and full disks, and what checkpoints make of them."""

    kills: int = 1000
    """Processes that are killed while they save."""
    flips: int = 10_000
    """Bits that are flipped, one at a time."""

    def check(self) -> None:
        super().check()
        expect("--kills", "an integer of at least 1", self.kills, self.kills >= 1)
        expect("--flips", "an integer of at least 1", self.flips, self.flips >= 1)


def state(step: int, size: int) -> Arrays:
    """What is saved at a step: every number tells of the step, so a mixture of two would show."""
    return {
        "numbers": np.arange(size, dtype=np.float64) + step,
        "step": np.int64(step) * np.ones(3, np.int64),
    }


def equal(one: Arrays, other: Arrays) -> bool:
    """To the last bit, with the same names, dtypes and shapes."""
    return one.keys() == other.keys() and all(
        (a.dtype, a.shape, a.tobytes()) == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name, a in one.items()
    )


# Kills.


class Keeper(NamedTuple):
    """A way to keep the state of a loop.

    save: (folder, step, state)
    restore: (folder, a state of the same shapes) -> the state, of whatever step, or None
    """

    name: str
    save: Callable[[Path, int, Arrays], None]
    restore: Callable[[Path, Arrays], Arrays | None]


def save_ours(folder: Path, step: int, arrays: Arrays) -> None:
    fnn.Checkpoints(folder, keep=2).save(step, arrays)


def restore_ours(folder: Path, like: Arrays) -> Arrays | None:
    restored = fnn.Checkpoints(folder, keep=2).restore(like)
    return None if restored is None else restored.tree


def save_numpys(folder: Path, step: int, arrays: Arrays) -> None:
    np.savez(folder / "latest.npz", allow_pickle=False, **arrays)


def restore_numpys(folder: Path, like: Arrays) -> Arrays | None:
    try:
        return load_numpys(folder / "latest.npz", like)
    except Exception:
        return None


KEEPERS = (
    Keeper("fnn.Checkpoints", save_ours, restore_ours),
    Keeper("numpy.savez", save_numpys, restore_numpys),
)


def save_until_killed(keeper: Keeper, folder: Path, size: int, first: int, reports: Connection) -> None:
    """The child: reports that it runs, and then the step of every save that is done."""
    reports.send(-1)
    for step in count(first):
        keeper.save(folder, step, state(step, size))
        reports.send(step)


class Kills(NamedTuple):
    kills: int = 0
    saves: int = 0
    in_the_middle: int = 0
    lost: int = 0
    torn: int = 0
    passed_over: int = 0


def kill(context: Any, keeper: Keeper, folder: Path, size: int, first: int, patience: float) -> list[int]:
    """Starts the child, kills it after so many seconds, and returns the steps it reported as saved."""
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=save_until_killed, args=(keeper, folder, size, first, sending))
    child.start()
    sending.close()
    receiving.recv()
    time.sleep(patience)
    child.kill()
    child.join()
    steps = []
    try:
        while True:
            steps.append(receiving.recv())
    except EOFError:
        receiving.close()
    return steps


def kills(flags: Flags, keeper: Keeper, folder: Path) -> Kills:
    """Kills, each followed by what is found; the next child goes on from there, in the same folder."""
    rng = np.random.default_rng(flags.seed)
    context = multiprocessing.get_context("forkserver")  # children of a process that has imported all
    context.set_forkserver_preload(["fnn", "experiments.command"])
    newest = {size: -1 for size in SIZES}
    total = Kills()
    for n in range(min(flags.kills, 20) if flags.quick else flags.kills):
        size = SIZES[n % len(SIZES)]
        place = folder / str(size)
        place.mkdir(exist_ok=True)
        patience = float(rng.uniform(0, PATIENCE))
        steps = kill(context, keeper, place, size, newest[size] + 1, patience)
        done = max([newest[size], *steps])
        with warnings.catch_warnings(record=True) as passed_over:
            warnings.simplefilter("always")
            left_over = keeper is KEEPERS[0] and any(place.glob(".*"))
            found = keeper.restore(place, state(0, size))
        found_step = -1 if found is None else int(found["step"][0])
        is_torn = found is not None and not equal(found, state(found_step, size))
        total = Kills(
            total.kills + 1,
            total.saves + len(steps),
            total.in_the_middle + left_over,
            total.lost + (found_step < done),
            total.torn + is_torn,
            total.passed_over + len(passed_over),
        )
        newest[size] = max(found_step, -1)
    return total


def kills_table(flags: Flags) -> tuple[str, list[Kills]]:
    rows: list[tuple[str, ...]] = [("saved by", "kills", "saves done", "lost", "torn")]
    totals = []
    for keeper in KEEPERS:
        with tempfile.TemporaryDirectory() as folder:
            total = kills(flags, keeper, Path(folder))
        totals.append(total)
        numbers = (total.kills, total.saves, total.lost, total.torn)
        rows.append((keeper.name, *(f"{number:,}" for number in numbers)))
    ours = totals[0]
    note = (
        f"{ours.in_the_middle:,} kills of fnn.Checkpoints left a half-written temporary file; "
        f"files passed over as damaged: {ours.passed_over}."
    )
    return f"{aligned(rows, '<>>>>')}\n{note}", totals


# Bits.


class Format(NamedTuple):
    """A way to write arrays: save(path, arrays) to a file or folder, load(path, like) -> arrays."""

    name: str
    save: Callable[[Path, Arrays], None]
    load: Callable[[Path, Arrays], Arrays]
    share: int = 1


def load_numpys(path: Path, like: Arrays) -> Arrays:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in like}


def formats() -> tuple[list[Format], list[str]]:
    """Those that are installed, and the names of those that are not."""
    found = [
        Format("fnn.save", fnn.save, lambda path, like: fnn.load(path, like=like)),
        Format("numpy.savez", lambda path, arrays: _savez(path, arrays), load_numpys),
    ]
    missing = []
    try:
        from safetensors.numpy import load_file, save_file

        found.append(
            Format(
                "safetensors",
                lambda path, arrays: save_file(arrays, path),
                lambda path, like: load_file(path),
            )
        )
    except ImportError:
        missing.append("safetensors")
    try:
        found.append(_orbax())
    except ImportError:
        missing.append("orbax")
    return found, missing


def _savez(path: Path, arrays: Arrays) -> None:
    with open(path, "wb") as file:  # given a path, it would append .npz
        np.savez(file, allow_pickle=False, **arrays)


def _orbax() -> Format:
    orbax = import_module("orbax.checkpoint")
    checkpointer = orbax.StandardCheckpointer()

    def save(path, arrays):
        checkpointer.save(path.absolute(), arrays)
        checkpointer.wait_until_finished()

    def load(path, like):
        return {name: np.asarray(a) for name, a in checkpointer.restore(path.absolute(), like).items()}

    return Format("orbax", save, load, ORBAX_SHARE)


class Flips(NamedTuple):
    flips: int = 0
    refused: int = 0
    harmless: int = 0
    wrong: int = 0


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """The file with one bit changed, and afterwards as it was."""

    def flip():
        with open(path, "r+b") as file:
            file.seek(bit // 8)
            byte = file.read(1)[0] ^ 1 << bit % 8
            file.seek(bit // 8)
            file.write(bytes([byte]))

    flip()
    try:
        yield
    finally:
        flip()


def flips(flags: Flags, form: Format, folder: Path) -> tuple[Flips, int]:
    """What becomes of flipped bits; and how many bytes there are."""
    rng = np.random.default_rng(flags.seed)
    params = fnn.init(jax.random.key(flags.seed), (64, 32, 10), bias=fnn.unit_normal, dtype="float32")
    arrays = {
        f"{name}{l}": np.array(a)
        for l, layer in enumerate(params, 1)
        for name, a in zip("Wb", layer, strict=True)
    }
    path = folder / "checkpoint"
    form.save(path, arrays)
    if not equal(form.load(path, arrays), arrays):
        raise RuntimeError(f"{form.name} does not give back what it got")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    sizes = np.array([file.stat().st_size for file in files])
    n = max(min(flags.flips, 300) if flags.quick else flags.flips, form.share) // form.share
    total = Flips()
    for place in rng.choice(8 * sizes.sum(), min(n, 8 * sizes.sum()), replace=False):
        file = int(np.searchsorted(8 * np.cumsum(sizes), place, side="right"))
        with flipped(files[file], int(place - 8 * sizes[:file].sum())):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    verdict = "harmless" if equal(form.load(path, arrays), arrays) else "wrong"
            except Exception:
                verdict = "refused"
        total = total._replace(flips=total.flips + 1, **{verdict: getattr(total, verdict) + 1})
    return total, int(sizes.sum())


def flips_table(flags: Flags) -> tuple[str, dict[str, Flips]]:
    rows: list[tuple[str, ...]] = [("written by", "bytes", "flips", "refused", "harmless", "loaded wrong")]
    totals = {}
    found, missing = formats()
    for form in found:
        with tempfile.TemporaryDirectory() as folder:
            totals[form.name], size = flips(flags, form, Path(folder))
        rows.append((form.name, f"{size:,}", *(f"{number:,}" for number in totals[form.name])))
    rows += [(name, "not installed", "", "", "", "") for name in missing]
    return aligned(rows, "<>>>>>"), totals


# Full disks.


class Full(NamedTuple):
    """Saves that were cut short, and after how many of them all was intact."""

    cut_short: int
    intact: int


def is_intact(folder: Path, names: Sequence[str]) -> bool:
    restored = fnn.Checkpoints(folder).restore(state(0, 1_000))
    is_same = restored is not None and equal(restored.tree, state(1, 1_000))
    return is_same and sorted(os.listdir(folder)) == sorted(names)


def is_cut_short(folder: Path, size: int) -> bool:
    try:
        fnn.Checkpoints(folder).save(2, state(2, size))
    except OSError:
        return True
    return False


def limited(folder: Path, limits: Sequence[int]) -> Full:
    """Saves under limits on the size of a file, in this process."""
    fnn.Checkpoints(folder).save(1, state(1, 1_000))
    names = os.listdir(folder)
    cut_short = intact = 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            failed = is_cut_short(folder, 50_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        cut_short += failed
        intact += failed and is_intact(folder, names)
    return Full(cut_short, intact)


TINY_DISK = """
import json, subprocess, sys
from pathlib import Path
from experiments import faults
disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
    raise SystemExit("none can be mounted")
print(json.dumps(faults.full_disk(disk / "checkpoints")))
"""


def full_disk(folder: Path) -> Full:
    """Saves of states that a small disk has no room for."""
    fnn.Checkpoints(folder).save(1, state(1, 1_000))
    names = os.listdir(folder)
    cut_short = intact = 0
    for size in range(40_000, 60_000, 1_000):  # from 320 kB
        failed = is_cut_short(folder, size)
        cut_short += failed
        intact += failed and is_intact(folder, names)
    return Full(cut_short, intact)


def on_tiny_disk() -> Full | None:
    """`full_disk` in a mount namespace of its own, which needs no root; None where there is none."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-Urm", sys.executable, "-c", TINY_DISK, folder]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        try:
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
        except OSError:
            return None
    if run.returncode:
        if "none can be mounted" in run.stderr or run.stderr.startswith("unshare"):
            return None
        raise RuntimeError(f"the saves on a small disk ended with an error:\n{run.stderr}")
    return Full(*json.loads(run.stdout.splitlines()[-1]))


def full_table(flags: Flags) -> tuple[str, dict[str, Full | None]]:
    with tempfile.TemporaryDirectory() as folder:
        size = state(0, 50_000)["numbers"].nbytes
        by_limit = limited(
            Path(folder), np.linspace(0, size, 10 if flags.quick else 200).astype(int).tolist()
        )
    totals = {"a limit on the size of a file": by_limit, "a disk of 256 KiB": on_tiny_disk()}
    rows: list[tuple[str, ...]] = [("cut short by", "saves", "intact")]
    for name, total in totals.items():
        numbers = ("cannot be mounted here", "") if total is None else map(str, total)
        rows.append((name, *numbers))
    return aligned(rows, "<>>"), totals


def versions() -> str:
    parts = [f"Python {sys.version.split()[0]}"]
    for package in ("numpy", "safetensors", "orbax-checkpoint"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join(parts)


def run(flags: Flags) -> str:
    logging.disable(logging.WARNING)  # Orbax's
    try:
        parts = [table(flags)[0] for table in (kills_table, flips_table, full_table)]
    finally:
        logging.disable(logging.NOTSET)
    names = ("Kills", "One flipped bit", "A full disk")
    text = "\n\n".join(f"{name}\n\n{part}" for name, part in zip(names, parts, strict=True))
    return f"{text}\n\n{versions()}, seed {flags.seed}\n"


def main(args: Sequence[str] | None = None) -> None:
    command.table_main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
