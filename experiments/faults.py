"""Do checkpoints and runs survive what happens to processes, bits and disks?

    python -m experiments.faults                    (--help lists the flags)
    python -m experiments.faults --parts flips      one part anew; the table keeps the others as they were

What is done, and what is lost or wrongly accepted:

Kills. A process saves in a loop, arrays of 80 bytes to 2.4 MB, and tells of every save that is done. It is
killed (SIGKILL) at a random moment, and another process restores. Lost: the newest save that was done cannot
be had. Torn: what is had is not what was saved. `numpy.savez` onto one name for comparison.

Bits. One bit of the file is flipped at a random place, and the file loaded: refused, harmless (every bit of
the arrays as it was) or loaded wrong in silence. For comparison numpy.savez, and, where they are installed,
safetensors and Orbax, with its defaults; of the folders of Orbax and of fnn.ShardedCheckpoints any file, and
fewer flips, as they are slower.

A full disk. The save of a larger state is cut short: by a limit on the size of files (RLIMIT_FSIZE), anywhere
in the file, and by a disk of 256 KiB (tmpfs, where one can be mounted). Intact: the checkpoint before can be
restored, and nothing else is left in the folder.

Trainings. `fnn.fit` with a folder for its checkpoints, saving after every compiled call, is stopped at random
moments, by SIGKILL or SIGTERM, and started again by the same call, until it is done. Six optimisers, each
with nothing else, early stopping, records, a callback, skipped steps and `fit_batches`. All that a run
returns, but wall times, is compared bit for bit with what the same run returns that nothing stopped. That it
went on from a checkpoint is seen by `history.jsonl`, whose lines hold wall times: those of before are there
afterwards. Starts share JAX's cache of compiled programs, to be quick; the run that nothing stops compiles
its own.

Pairs. Two processes train together over loopback, two devices each. One is killed, gets SIGTERM, or
raises an exception; measured are the seconds until the other has ended. Then the job is started again, with
two processes, and from a copy of its folder with one. For SIGTERM the seconds are those until both have saved
and ended; for an exception they count from the end of the process that raised it.

Layouts. The same run on eight virtual devices under every layout, and on one device.

Expected answer. Nothing is lost and nothing torn, every flipped bit is refused, and every checkpoint before a
full disk is intact. `numpy.savez` loses what was there if it is killed while it writes. safetensors and Orbax
load numbers with a bit flipped. `numpy.load` looks at a checksum only where it reads to an array's end, which
a header made shorter keeps it from. Every training that was stopped ends with the bits of one that was not,
and so does a pair's; with another number of devices within 1e-5. The other process ends within 2 s.

A killed process is no power failure: what the disk keeps of what was flushed to it is not asked here.

The table goes to faults.txt beside the script, every part with its own versions and date.
"""

import datetime
import hashlib
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fnn
import fnn.resume
from experiments import command
from experiments.command import expect
from fnn.tables import aligned

SIZES = (10, 1_000, 30_000, 300_000)  # numbers of 8 bytes in the states that are saved
PATIENCE = 0.1  # seconds from the child's start to its kill, at most; a save takes a hundredth or so
ORBAX_SHARE = 20  # one flip of its files for so many of the others'
STARTING = 4.0  # seconds in which a training begins, at most; some are stopped in them
AT_ONCE = 2  # trainings
HANGS = 60.0  # seconds after which a process is said not to end by itself

Arrays = dict[str, np.ndarray]
Part = Literal["kills", "flips", "full", "trainings", "pairs", "layouts"]


@dataclass(frozen=True)
class Flags(command.TableFlags):
    """Kills, flipped bits, full disks and stopped runs, and what checkpoints make of them."""

    kills: int = 1000
    """Processes that are killed while they save."""
    flips: int = 10_000
    """Bits that are flipped, one at a time."""
    trainings: int = 100
    """Trainings that are stopped and started again."""
    pairs: int = 5
    """Pairs of processes for each way to stop one of them."""
    parts: tuple[Part, ...] = get_args(Part)
    """What is done; the table's other parts stay as they are."""

    def check(self) -> None:
        super().check()
        expect("--kills", "an integer of at least 1", self.kills, self.kills >= 1)
        expect("--flips", "an integer of at least 1", self.flips, self.flips >= 1)
        expect("--trainings", "an integer of at least 1", self.trainings, self.trainings >= 1)
        expect("--pairs", "an integer of at least 1", self.pairs, self.pairs >= 1)
        expect("--parts", "at least one part", "none", len(self.parts) >= 1)


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


def children() -> Any:
    """Starts processes as children of one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fnn", "experiments.command"])
    return context


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
    context = children()
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
        found += [_orbax(), Format("fnn.ShardedCheckpoints", save_sharded, load_sharded, ORBAX_SHARE)]
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


def save_sharded(path: Path, arrays: Arrays) -> None:
    fnn.ShardedCheckpoints(path).save(1, arrays)


def load_sharded(path: Path, like: Arrays) -> Arrays:
    restored = fnn.ShardedCheckpoints(path).restore(like)
    if restored is None:
        raise FileNotFoundError(path)
    return restored.tree


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


# Trainings.

OPTIMIZERS: tuple[Callable[[], optax.GradientTransformation], ...] = (
    lambda: optax.sgd(0.05),
    lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 400), momentum=0.9, nesterov=True),
    lambda: optax.adam(1e-2),
    lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    lambda: optax.noisy_sgd(0.02, key=0),
)
MANNERS = ("nothing else", "early stopping", "records", "a callback", "skipped steps", "fit_batches")


def training(n: int, seed: int, folder: Path | None) -> fnn.History:
    """The n-th of the trainings, of 400 epochs where several go by in a call, and 60 where each is one."""
    rng = np.random.default_rng((seed, n))
    X = rng.normal(size=(203, 8)).astype(np.float32)
    y = np.argmax(X[:, :4] + rng.normal(size=(203, 4)), axis=1).astype(np.int32)
    manner, optimizer = MANNERS[n % len(MANNERS)], OPTIMIZERS[n // len(MANNERS) % len(OPTIMIZERS)]()
    net = fnn.mlp(fnn.tanh)
    cost = fnn.cost(net, fnn.softmax_cross_entropy_with_integer_labels, l2=1e-3)
    init_key, key = jax.random.split(jax.random.key(seed + n))
    params = fnn.init(init_key, (8, 16, 12, 4), dtype="float32")
    options: dict[str, Any] = dict(
        epochs=400 if manner in ("nothing else", "records", "skipped steps") else 60,
        validation=(X[:40], y[:40]),
        metrics={"accuracy": fnn.accuracy(net)},
        checkpoint=folder,
        progress=False,
    )
    if manner == "fit_batches":
        batches = fnn.Batches((X[40:], y[40:]), key=key, batch_size=32, epochs=60)
        steps = batches.steps_per_epoch
        return fnn.fit_batches(cost, optimizer, params, batches, steps_per_epoch=steps, **options)
    if manner == "early stopping":
        options["early_stopping"] = fnn.EarlyStopping(patience=30)
    if manner == "records":
        options["record"] = {"norm": lambda sweep: jnp.mean(fnn.example_norms(sweep))}
    if manner == "a callback":
        options["callbacks"] = [lambda report: report.epoch == 55]
    if manner == "skipped steps":
        X[50] = 3e38  # its z^1 overflows
        options["on_divergence"] = "skip"
    return fnn.fit(cost, optimizer, params, (X[40:], y[40:]), key=key, batch_size=32, **options)


def digest(history: fnn.History) -> str:
    """Of every bit that a run returns, wall times left out."""
    arrays = (history.params, dict(history.train), dict(history.validation), dict(history.records))
    found = hashlib.sha256(f"{history.best_epoch} {history.skipped} {len(history.seconds)}".encode())
    for path, leaf in jax.tree.leaves_with_path(arrays):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def train_and_tell(n: int, seed: int, folder: Path | None, reports: Connection) -> None:
    """The child: trains, and sends the digest."""
    if folder is not None:
        fnn.resume.SECONDS = 0
        jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    reports.send(digest(training(n, seed, folder)))


class Stopped(NamedTuple):
    """What became of a training; one that ends with an error of its own is not equal."""

    killed: int
    terminated: int
    went_on: int  # starts from a checkpoint
    started_over: int  # though there was one
    is_equal: bool


def lines(folder: Path) -> str:
    """The history that is saved with a run's checkpoints."""
    try:
        return (folder / "history.jsonl").read_text()
    except FileNotFoundError:
        return ""


def wait_for_save(folder: Path, before: str, is_alive: Callable[[], bool]) -> None:
    while is_alive() and lines(folder) == before:
        time.sleep(0.002)


def stopped(train: Callable[..., None], n: int, seed: int, folder: Path) -> Stopped:
    """A training, stopped one to three times and then left alone, beside one that runs through."""
    context, rng = children(), np.random.default_rng((seed, n, 1))

    def start(folder: Path | None) -> tuple[Any, Connection]:
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=train, args=(n, seed, folder, sending))
        child.start()
        sending.close()
        return child, receiving

    def told(child: Any, reports: Connection) -> str | None:
        child.join()
        try:
            return reports.recv()
        except EOFError:
            return None
        finally:
            reports.close()

    whole, result = told(*start(None)), None
    statuses, went_on, started_over = [], 0, 0
    stops = int(rng.integers(1, 4))
    for i in count():
        before = lines(folder)
        child, reports = start(folder)
        if i < stops:
            if rng.random() < 0.9:
                wait_for_save(folder, before, child.is_alive)
                time.sleep(rng.uniform(0, PATIENCE))
            else:
                time.sleep(rng.uniform(0, STARTING))
            child.terminate() if rng.random() < 0.3 else child.kill()
        result = told(child, reports)
        after = lines(folder)
        if before and after != before:
            went_on += after.startswith(before)
            started_over += not after.startswith(before)
        if result is not None or i >= stops:
            break
        statuses.append(child.exitcode)
    killed, terminated = statuses.count(-9), statuses.count(-15) + statuses.count(143)
    is_equal = whole is not None and whole == result and killed + terminated == len(statuses)
    return Stopped(killed, terminated, went_on, started_over, is_equal)


def trainings_table(flags: Flags) -> tuple[str, list[Stopped]]:
    n = min(flags.trainings, len(MANNERS)) if flags.quick else flags.trainings
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        stop = partial(stopped, train_and_tell)
        totals = list(pool.map(stop, range(n), [flags.seed] * n, (Path(folder) / str(i) for i in range(n))))
    rows: list[tuple[str, ...]] = [("with", "trainings", "SIGKILL", "SIGTERM", "went on", "same bits")]
    for i, name in enumerate((*MANNERS, "all")):
        some = totals[i :: len(MANNERS)] if i < len(MANNERS) else totals
        numbers = (
            len(some),
            sum(one.killed for one in some),
            sum(one.terminated for one in some),
            sum(one.went_on for one in some),
            sum(one.is_equal for one in some),
        )
        rows.append((name, *(f"{number:,}" for number in numbers)))
    over = sum(one.started_over for one in totals)
    note = (
        "Starts that did not go on: no checkpoint yet, or stopped before the next one. "
        f"Started over in spite of one: {over}."
    )
    return f"{aligned(rows, '<>>>>>')}\n{note}", totals


# Pairs.

PAIR = """
import json, sys
import jax, numpy as np, optax
import fnn, fnn.resume
job = json.loads(sys.argv[1])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
fnn.resume.SECONDS = 0
fnn.join_processes(**job["join"])
rng = np.random.default_rng(job["seed"])
X = rng.normal(size=(512, 8)).astype(np.float32)
y = np.argmax(X[:, :4] + rng.normal(size=(512, 4)), axis=1)
params = fnn.init(jax.random.key(job["seed"]), (8, 16, 4))
cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels)
def fail(report):
    if report.epoch == job["fail_at"] and jax.process_index() == job["victim"]:
        raise RuntimeError("made for this purpose")
history = fnn.fit(
    cost, optax.adam(1e-2), params, (X, y), key=jax.random.key(1), epochs=job["epochs"], batch_size=128,
    checkpoint=job["checkpoint"], callbacks=[fail] if job["fail_at"] else [],
    layout=fnn.data_parallel() if job["join"] else None, progress=False,
)
trained = fnn.on_host(history.params)
if jax.process_index() == 0:
    fnn.save(job["save"], trained)
"""
EPOCHS = 60  # of a pair; a few are done when it is stopped
WAYS = ("SIGKILL", "SIGTERM", "an exception")


class Pair(NamedTuple):
    """What became of a pair of which one was stopped.

    seconds: until the other had ended; None if it did not
    statuses: of the one that was stopped, and of the other
    output: what the other printed at its end
    epochs: saved when it ended
    went_on: whether the jobs that were started again did, of two processes and of one
    of_two, of_one: the largest difference of their parameters from those of the run that nothing stopped
    """

    seconds: float | None
    statuses: tuple[int | None, int | None]
    output: str
    epochs: int
    went_on: bool
    of_two: float
    of_one: float


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(folder: Path, processes: int, seed: int, **fault: int) -> list[subprocess.Popen[bytes]]:
    """The job of two processes with two devices each, or of one with one; what they print goes to files."""
    folder.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {"seed": seed, "epochs": EPOCHS, "fail_at": None, **fault}
    job |= {"checkpoint": str(folder / "run"), "save": str(folder / "params"), "join": {}}
    address, found = f"127.0.0.1:{free_port()}", []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for i in range(processes):
        if processes > 1:
            job["join"] = {"coordinator_address": address, "num_processes": processes, "process_id": i}
        with open(folder / f"{i}.log", "w") as log:
            call = [sys.executable, "-c", PAIR, json.dumps(job)]
            found.append(subprocess.Popen(call, stdout=log, stderr=log, env=environment))
    return found


def ends(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> list[float | None]:
    """When each ended by itself; the others are killed."""
    at: list[float | None] = [None] * len(processes)
    until = time.monotonic() + patience
    while time.monotonic() < until and None in at:
        for i, process in enumerate(processes):
            if at[i] is None and process.poll() is not None:
                at[i] = time.monotonic()
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.wait()
    return at


def trained(folder: Path, processes: int, seed: int) -> fnn.Params:
    """What a job that nothing stops ends with."""
    job = started(folder, processes, seed)
    ends(job, 10 * HANGS)
    if any(process.returncode for process in job):
        raise RuntimeError(f"a job ended with an error:\n{(folder / '0.log').read_text()}")
    return fnn.load(folder / "params", like=fnn.init(jax.random.key(0), (8, 16, 4)))


def pair(way: str, n: int, seed: int, folder: Path, whole: fnn.Params) -> Pair:
    """Stops one of two processes, process 0 and 1 in turn, and starts the job again."""
    victim = n % 2
    fault = {"fail_at": 3, "victim": victim} if way == "an exception" else {}
    job, run = started(folder / "pair", 2, seed, **fault), folder / "pair" / "run"
    wait_for_save(run, "", lambda: all(process.poll() is None for process in job))
    time.sleep(np.random.default_rng((seed, n)).uniform(0, 3 * PATIENCE))
    begin = time.monotonic()
    if way == "SIGKILL":
        job[victim].kill()
    elif way == "SIGTERM":
        job[victim].terminate()
    at = ends(job, HANGS)
    ended = [moment for moment in at if moment is not None]
    last = at[1 - victim] if way == "SIGKILL" else max(ended) if len(ended) == 2 else None
    if way == "an exception":
        begin = min(ended, default=begin)
    output, before = (folder / "pair" / f"{1 - victim}.log").read_text(), lines(run)
    alone = folder / "alone" / "run"
    shutil.copytree(run, alone)
    again = trained(folder / "pair", 2, seed), trained(folder / "alone", 1, seed)
    return Pair(
        None if last is None else last - begin,
        (job[victim].returncode, job[1 - victim].returncode),
        output,
        before.count("\n"),
        all(after != before and after.startswith(before) for after in (lines(run), lines(alone))),
        difference(again[0], whole),
        difference(again[1], whole),
    )


def difference(params: Any, others: Any) -> float:
    """The largest, of all parameters."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True)
    return max(float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max()) for a, b in pairs)


def pairs_table(flags: Flags) -> tuple[str, dict[str, list[Pair]]]:
    n = 1 if flags.quick else flags.pairs
    ways = [(way, i) for way in WAYS for i in range(n)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        whole = trained(Path(folder) / "whole", 2, flags.seed)

        def stop(way: str, i: int) -> Pair:
            return pair(way, i, flags.seed, Path(folder) / f"{way} {i}", whole)

        found = pool.map(stop, *zip(*ways, strict=True))
        totals = {way: list(islice(found, n)) for way in WAYS}
    head = ("one gets", "pairs", "other ended", "in at most", "statuses", "went on", "off, two", "off, one")
    rows: list[tuple[str, ...]] = [head]
    for way, some in totals.items():
        seconds = [one.seconds for one in some if one.seconds is not None]
        rows.append(
            (
                way,
                f"{len(some)}",
                f"{len(seconds)}",
                f"{max(seconds, default=np.nan):.2f} s",
                " ".join(sorted({str(one.statuses) for one in some})),
                f"{sum(one.went_on for one in some)}",
                f"{max(one.of_two for one in some):.1g}",
                f"{max(one.of_one for one in some):.1g}",
            )
        )
    note = (
        "Off: the largest difference of any parameter from the run that nothing stopped, at the end of the "
        "job\nstarted again with two processes, and with one."
    )
    return f"{aligned(rows, '<>>>>>>>')}\n{note}", totals


# Layouts.


def compare_layouts(seed: int, quick: bool, results: Connection) -> None:
    """The child: {layout: {optimiser: the largest difference of its parameters from one device's}}."""
    jax.config.update("jax_num_cpu_devices", 8)
    from experiments import digits

    (X, y), _ = digits.load(seed)
    data = digits.standardised(X, X), y
    init_key, key = jax.random.split(jax.random.key(seed))
    params = fnn.init(init_key, (64, 256, 128, 10), weights=fnn.he_normal)
    cost = fnn.cost(fnn.mlp(fnn.relu), fnn.softmax_cross_entropy_with_integer_labels)
    mesh = fnn.tensor_parallel(4).mesh
    layouts: dict[str, fnn.Layout] = {
        "data_parallel()": fnn.data_parallel(),
        "data_parallel(factors=(1, 2, 3))": fnn.data_parallel(factors=(1, 2, 3)),
        "fully_sharded()": fnn.fully_sharded(),
        **{f"tensor_parallel({n})": fnn.tensor_parallel(n) for n in (2, 4, 8)},
        "tensor_parallel(4), fully sharded": fnn.Layout(mesh, model="model", state="data"),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in layouts}
    for name, optimizer in {"sgd": optax.sgd(0.02, momentum=0.9), "adam": optax.adam(1e-3)}.items():

        def train(layout):
            options: Any = dict(epochs=1 if quick else 10, batch_size=128, layout=layout, progress=False)
            return jax.device_get(fnn.fit(cost, optimizer, params, data, key=key, **options).params)

        alone = train(None)
        for layout in layouts:
            found[layout][name] = difference(train(layouts[layout]), alone)
    results.send(found)


def layouts_table(flags: Flags) -> tuple[str, dict[str, dict[str, float]]]:
    receiving, sending = children().Pipe(duplex=False)
    child = children().Process(target=compare_layouts, args=(flags.seed, flags.quick, sending))
    child.start()
    sending.close()
    totals = receiving.recv()
    child.join()
    rows = [("layout", "SGD with momentum", "Adam")]
    rows += [(name, f"{of['sgd']:.1e}", f"{of['adam']:.1e}") for name, of in totals.items()]
    return aligned(rows, "<>>"), totals


PARTS: dict[Part, tuple[str, Callable[[Flags], tuple[str, Any]]]] = {
    "kills": ("Kills", kills_table),
    "flips": ("One flipped bit", flips_table),
    "full": ("A full disk", full_table),
    "trainings": ("Trainings that were stopped", trainings_table),
    "pairs": ("Two processes, of which one is stopped", pairs_table),
    "layouts": ("Parameters on eight devices and on one, largest difference", layouts_table),
}


def versions() -> str:
    parts = [f"Python {sys.version.split()[0]}"]
    for package in ("jax", "numpy", "safetensors", "orbax-checkpoint"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join(parts)


def sections(text: str) -> dict[str, str]:
    """The parts of a table by their headings."""
    titles = "|".join(re.escape(title) for title, _ in PARTS.values())
    _, *found = re.split(rf"^({titles})\n\n", text, flags=re.MULTILINE)
    return {title: part.strip() for title, part in zip(found[::2], found[1::2], strict=True)}


def run(flags: Flags) -> str:
    path = flags.output or Path(__file__).with_name(f"faults{'_quick' * flags.quick}.txt")
    found = sections(path.read_text(encoding="utf-8")) if path.exists() else {}
    logging.disable(logging.WARNING)  # Orbax's
    try:
        for part in flags.parts:
            title, table = PARTS[part]
            today = datetime.date.today()
            found[title] = f"{table(flags)[0]}\n\n{versions()}, seed {flags.seed}, {today}"
    finally:
        logging.disable(logging.NOTSET)
    titles = [title for title, _ in PARTS.values() if title in found]
    return "\n\n\n".join(f"{title}\n\n{found[title]}" for title in titles) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    command.table_main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
