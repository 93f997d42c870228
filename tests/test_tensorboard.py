"""What TensorBoard reads is the history: names, steps and values, after a kill and a second start too."""

import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import fnn
from tests.test_train import fit, problem

pytestmark = pytest.mark.usefixtures("standard_promotion")
ADAM = optax.adam(0.05)


def events(folder):
    """The events of a folder's files in the order of their names, checksums compared."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    messages: Any = event_pb2  # whose names are made at run time
    for file in sorted(Path(folder).iterdir()):
        assert "tfevents" in file.name
        content = file.read_bytes()
        while content:
            (length,), head, data = struct.unpack("<Q", content[:8]), content[8:12], content[12:]
            data, tail, content = data[:length], data[length : length + 4], data[length + 4 :]
            assert struct.unpack("<II", head + tail) == (
                masked_crc32c(struct.pack("<Q", length)),
                masked_crc32c(data),
            )
            yield messages.Event.FromString(data)


def scalars(folder):
    """name -> [(step, value)], without what a later start makes void."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        if event.session_log.status == event.session_log.START:
            found = {name: [row for row in rows if row[0] < event.step] for name, rows in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def of_history(history, steps=5):
    """What `scalars` should find of a run of so many steps in an epoch."""
    parts = {"train": history.train, "validation": history.validation}
    return {
        f"{part}/{name}": [(steps * (i + 1), float(np.float32(number))) for i, number in enumerate(column)]
        for part, numbers in parts.items()
        for name, column in numbers.items()
    }


@pytest.fixture
def run():
    """40 examples in batches of 8, 5 steps an epoch, with one metric."""
    pytest.importorskip("tensorboardX")
    cost, params, data = problem()

    def run(folder, *callbacks, validation=data, **options):
        options = {"epochs": 4, "metrics": {"accuracy": fnn.accuracy(cost.net)}} | options
        callbacks = [fnn.TensorBoard(folder), *callbacks]
        return fit(cost, ADAM, params, data, validation=validation, callbacks=callbacks, **options)

    return run


@pytest.mark.parametrize("with_validation", (False, True))
def test_scalars_are_the_history(run, tmp_path, with_validation):
    history = run(tmp_path / "runs" / "a", **({} if with_validation else {"validation": None}))
    got = scalars(tmp_path / "runs" / "a")
    assert got == of_history(history)
    assert set(got) == {
        f"{p}/{n}" for p in ("train", "validation")[: 1 + with_validation] for n in history.train
    }
    first, *others = events(tmp_path / "runs" / "a")
    assert first.file_version == "brain.Event:2" and not any(event.file_version for event in others)
    times = [event.wall_time for event in (first, *others)]
    assert times == sorted(times)


def test_every_epoch_is_in_the_file_when_it_is_over(run, tmp_path):
    seen = []
    run(tmp_path, lambda report: seen.append([row[0] for row in scalars(tmp_path)["train/cost"]]))
    assert seen == [[5], [5, 10], [5, 10, 15], [5, 10, 15, 20]]


KILLED = """
import os, signal, sys
import fnn

board = fnn.TensorBoard(sys.argv[1])
for epoch in range(1, 4):
    board(fnn.EpochReport(epoch, 5 * epoch, None, {"cost": 1.0 / epoch}, {}))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_lost_when_the_process_is_killed(tmp_path):
    pytest.importorskip("tensorboardX")
    root = Path(__file__).parent.parent
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    assert scalars(tmp_path) == {"train/cost": [(5, 1.0), (10, 0.5), (15, float(np.float32(1 / 3)))]}


def test_resumed_run_goes_on_in_the_same_folder(run, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    run(tmp_path / "board", checkpoint=checkpoint)
    history = run(tmp_path / "board", checkpoint=checkpoint, epochs=7)
    assert scalars(tmp_path / "board") == of_history(history) and len(history.seconds) == 7
    assert len(list((tmp_path / "board").iterdir())) == 2


def test_epochs_that_are_run_again_count_once(tmp_path):
    """A checkpoint may be older than the process's end: the epochs since then come a second time."""
    pytest.importorskip("tensorboardX")

    def report(epoch, cost):
        return fnn.EpochReport(epoch, 5 * epoch, None, {"cost": cost}, {})

    killed, resumed = fnn.TensorBoard(tmp_path), fnn.TensorBoard(tmp_path)
    for epoch in range(1, 7):
        killed(report(epoch, 1.0))
    for epoch in range(4, 6):
        resumed(report(epoch, 0.5))
    assert scalars(tmp_path)["train/cost"] == [(5, 1.0), (10, 1.0), (15, 1.0), (20, 0.5), (25, 0.5)]
    resumed(report(1, 0.25))  # one object, used for a second run
    assert scalars(tmp_path)["train/cost"] == [(5, 0.25)]


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fnn.TensorBoard(tmp_path)(fnn.EpochReport(1, 5, None, {"cost": 1.0}, {}))
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_written_as_they_are(tmp_path):
    pytest.importorskip("tensorboardX")
    board = fnn.TensorBoard(str(tmp_path))
    board(fnn.EpochReport(1, 5, None, {"cost": np.nan, "norm": np.inf, "large": 1e300}, {"cost": -np.inf}))
    got = {name: rows[0][1] for name, rows in scalars(tmp_path).items()}
    np.testing.assert_equal(
        got, {"train/cost": np.nan, "train/norm": np.inf, "train/large": np.inf, "validation/cost": -np.inf}
    )


def test_folder_is_the_same_wherever_the_process_goes(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    board = fnn.TensorBoard("board")
    assert not Path("board").exists(), "made by the first epoch"
    board(fnn.EpochReport(1, 5, None, {"cost": 1.0}, {}))
    monkeypatch.chdir("elsewhere")
    board(fnn.EpochReport(2, 10, None, {"cost": 0.5}, {}))
    assert scalars(tmp_path / "board")["train/cost"] == [(5, 1.0), (10, 0.5)]


def test_without_tensorboardx_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'TensorBoard: .* pip install "fnn\[tensorboard\]"'):
        fnn.TensorBoard(tmp_path)


@pytest.mark.parametrize("folder", (None, 3, b"runs"))
def test_folder_is_a_path(folder, no_shape_annotations):
    with pytest.raises(TypeError, match="TensorBoard: folder needs to be a str or Path"):
        fnn.TensorBoard(folder)


def test_file_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        fnn.TensorBoard(tmp_path / "file")(fnn.EpochReport(1, 5, None, {"cost": 1.0}, {}))


def test_run_with_it_has_the_same_bits(run, tmp_path):
    cost, params, data = problem()
    alone = fit(cost, ADAM, params, data, epochs=4)
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(run(tmp_path).params), strict=True):
        np.testing.assert_array_equal(a, b)
