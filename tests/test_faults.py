"""The experiment on faults: what it says of us, and that it would see a way of saving that is worse."""

import os
from pathlib import Path

import numpy as np
import pytest

from experiments import faults
from experiments.faults import Flags, Format, Keeper

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


def test_flags_are_checked():
    for flags in (Flags(kills=0), Flags(flips=0), Flags(seed=-1), Flags(output=Path("faults.png"))):
        with pytest.raises(ValueError, match="needs to be"):
            flags.check()
    Flags().check()


def test_tables_name_what_is_missing(monkeypatch):
    ours, numpys, *_ = faults.formats()[0]
    monkeypatch.setattr(faults, "formats", lambda: ([ours, numpys], ["safetensors", "orbax"]))
    text, totals = faults.flips_table(Flags(flips=5))
    assert text.splitlines()[-1].split() == ["orbax", "not", "installed"]
    assert totals["fnn.save"].refused == totals["fnn.save"].flips == 5
