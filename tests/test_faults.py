"""The experiment on faults: what it says of us, and that it would see a way of saving that is worse."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import faults
from experiments.faults import Flags, Format, Keeper
from fnn.files import replacing

QUICK = Flags(kills=8, flips=60)


def save_halves(folder: Path, step: int, arrays: faults.Arrays) -> None:
    """In place, in two halves: a process killed in between leaves the new first and the old second."""
    for name, array in arrays.items():
        with open(folder / name, "wb") as file:
            file.write(array.tobytes())
            os.fsync(file.fileno())


def restore_halves(folder: Path, like: faults.Arrays) -> faults.Arrays | None:
    if not all((folder / name).exists() for name in like):
        return None
    found = {name: np.frombuffer((folder / name).read_bytes(), array.dtype) for name, array in like.items()}
    return found if all(found[name].shape == like[name].shape for name in like) else None


def save_the_first(folder: Path, step: int, arrays: faults.Arrays) -> None:
    if not (folder / "step").exists():
        save_halves(folder, step, arrays)


def test_killed_processes_lose_nothing_of_ours(tmp_path):
    total = faults.kills(QUICK, faults.KEEPERS[0], tmp_path)
    assert total.kills == 8 and total.saves > 0
    assert (total.lost, total.torn, total.passed_over) == (0, 0, 0)


def test_what_is_lost_is_seen(tmp_path):
    total = faults.kills(Flags(kills=2), Keeper("the first only", save_the_first, restore_halves), tmp_path)
    assert total.lost == 2


def restore_a_mixture(folder: Path, like: faults.Arrays) -> faults.Arrays | None:
    """The numbers of step 3 with the step 4, for one of the sizes."""
    size = len(like["numbers"])
    return {**faults.state(3, size), "step": faults.state(4, size)["step"]} if size == 1_000 else None


def test_what_is_torn_is_seen(tmp_path):
    total = faults.kills(Flags(kills=2), Keeper("mixed", save_the_first, restore_a_mixture), tmp_path)
    assert total.torn == 1
    assert faults.equal(faults.state(3, 5), faults.state(3, 5))
    assert not faults.equal(faults.state(3, 5), faults.state(4, 5))
    assert not faults.equal({"a": np.array([0.0])}, {"a": np.array([-0.0])})


def test_every_flipped_bit_is_refused_by_ours_and_seen_elsewhere(tmp_path):
    found, _ = faults.formats()
    by_name = {form.name: form for form in found}
    total, size = faults.flips(QUICK, by_name["fnn.save"], tmp_path)
    assert total == (60, 60, 0, 0) and size == (tmp_path / "checkpoint").stat().st_size

    def save(path, arrays):
        path.write_bytes(b"unused" * 1000 + b"".join(array.tobytes() for array in arrays.values()))

    def load(path, like):
        content, loaded, place = path.read_bytes(), {}, 6000
        for name, array in like.items():
            loaded[name] = np.frombuffer(content, array.dtype, array.size, place).reshape(array.shape)
            place += array.nbytes
        return loaded

    total, size = faults.flips(QUICK, Format("raw", save, load), tmp_path)
    assert total.refused == 0 and total.harmless + total.wrong == 60
    assert 0.2 < total.harmless / 60 < 0.6, "the unused bytes are 38 % of them"


def test_full_disks_leave_the_checkpoint_before(tmp_path):
    assert faults.limited(tmp_path, [0, 1, 100, 5_000, 399_999]) == (5, 5)
    assert not faults.is_intact(tmp_path, ["another"])
    on_disk = faults.on_tiny_disk()
    if on_disk is None:
        pytest.skip("no small disk can be mounted here")
    assert on_disk == (20, 20)


def test_sharded_checkpoints_refuse_every_flipped_bit(tmp_path):
    form = {form.name: form for form in faults.formats()[0]}["fnn.ShardedCheckpoints"]
    total, _ = faults.flips(Flags(flips=10 * form.share), form, tmp_path)
    assert total == (10, 10, 0, 0)


def train_a_little(n: int, seed: int, folder: Path | None, reports: Connection) -> None:
    """Saves a line for every step from the last one on, and sends where it ended."""
    if folder is None:
        return reports.send("30 steps")
    folder.mkdir(exist_ok=True)
    done = faults.lines(folder) if n != 1 else ""
    while done.count("\n") < 30:
        done += f"{time.time()}\n"
        with replacing("test", folder / "history.jsonl") as file:
            file.write(done.encode())
        time.sleep(0.01)
    reports.send("30 steps" if n != 2 else "others")


def test_stopped_trainings_are_told_apart(tmp_path, monkeypatch):
    """One that goes on, one that always starts over, one that ends with something else."""
    monkeypatch.setattr(faults, "STARTING", 0.1)
    for n in range(3):
        stopped = faults.stopped(train_a_little, n, 0, tmp_path / str(n))
        assert stopped.is_equal == (n != 2)
        assert stopped.killed + stopped.terminated > 0
        assert (stopped.went_on > 0, stopped.started_over > 0) == (n != 1, n == 1)


def test_a_training_goes_on_from_its_folder(tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        history = faults.training(1, 0, tmp_path)
        assert faults.lines(tmp_path).count("\n") == len(history.seconds)
        assert faults.digest(faults.training(1, 0, tmp_path)) == faults.digest(history)
        other = replace(history, train={"cost": history.train["cost"] * (1 + 1e-15)})
    assert faults.digest(other) != faults.digest(history)


def test_a_pair_that_hangs_or_starts_over_is_seen(monkeypatch):
    """Two processes that end by themselves and by a signal, and one that does not end."""

    def process(code):
        return subprocess.Popen([sys.executable, "-c", code])

    both = [process("import os; os.kill(os.getpid(), 9)"), process("import time; time.sleep(1000)")]
    at = faults.ends(both, 5)
    assert at[0] is not None and at[1] is None and [one.returncode for one in both] == [-9, -9]

    def pair(way, n, *args):
        return faults.Pair(None if n else 0.5, (-9, 1), "", 3, n == 0, 0.0, n * 1e-7)

    monkeypatch.setattr(faults, "pair", pair)
    monkeypatch.setattr(faults, "trained", lambda *args: ())
    text, totals = faults.pairs_table(Flags(pairs=2))
    assert list(totals) == list(faults.WAYS)
    assert text.splitlines()[1].split() == "SIGKILL 2 1 0.50 s (-9, 1) 1 0 1e-07".split()


def test_parts_that_are_not_done_stay_in_the_table(tmp_path, monkeypatch):
    made = {
        part: (title, lambda flags, part=part: (f"{part} {flags.seed}", None))
        for part, (title, _) in faults.PARTS.items()
    }
    monkeypatch.setattr(faults, "PARTS", made)
    path = tmp_path / "faults.txt"
    path.write_text(faults.run(Flags(output=path)))
    before = faults.sections(path.read_text())
    assert list(before) == [title for title, _ in made.values()]
    path.write_text(faults.run(Flags(output=path, seed=1, parts=("flips",))))
    after = faults.sections(path.read_text())
    title = made["flips"][0]
    assert after.pop(title).startswith("flips 1\n\nPython") and before.pop(title).startswith("flips 0")
    assert after == before


def test_flags_are_checked():
    wrong = Flags(kills=0), Flags(flips=0), Flags(trainings=0), Flags(pairs=0), Flags(parts=())
    for flags in (*wrong, Flags(seed=-1), Flags(output=Path("faults.png"))):
        with pytest.raises(ValueError, match="needs to be"):
            flags.check()
    Flags().check()


def test_tables_name_what_is_missing(monkeypatch):
    ours, numpys, *_ = faults.formats()[0]
    monkeypatch.setattr(faults, "formats", lambda: ([ours, numpys], ["safetensors", "orbax"]))
    text, totals = faults.flips_table(Flags(flips=5))
    assert text.splitlines()[-1].split() == ["orbax", "not", "installed"]
    assert totals["fnn.save"].refused == totals["fnn.save"].flips == 5
