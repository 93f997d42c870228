"""Processes of one run: they start together, agree, and fail together."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from fnn import processes
from fnn.processes import LAUNCHERS, answers, check_agreed, check_launcher, of_first, on_host, put

ROOT = Path(__file__).parent.parent
PATIENCE = 240  # seconds, after which a process hangs; one takes ten, and ten times that on a busy machine


def started(*call, **environment):
    """A Python process, of no launcher; programs compile as quickly as the tests' own."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    kept |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, call)],
        env=kept,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """Status and output; one that hangs is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, err


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# Alone.


def test_a_process_alone_agrees_with_itself():
    np.testing.assert_array_equal(answers(3, True, -1), [[3, 1, -1]])
    array = np.array([np.nan, -0.0])
    assert of_first(array) is array
    check_agreed("here", {"data": [1, 2], "key": None})
    tree = {"x": jnp.arange(3.0), "n": 4, "key": jax.random.key(0)}
    collected = on_host(tree)
    assert collected["x"] is tree["x"] and collected["n"] == 4


def test_what_is_spread_over_own_devices_comes_back_from_them():
    sharding = fnn.data_parallel().rows_sharding
    for leaf in (jnp.arange(16.0).reshape(8, 2), jax.random.split(jax.random.key(1), 8)):
        placed = put(leaf, sharding)
        assert placed.sharding == sharding and placed.dtype == leaf.dtype
        assert on_host(placed) is placed
        bits = jax.random.key_data if leaf.ndim == 1 else np.asarray
        np.testing.assert_array_equal(bits(placed), bits(leaf))


@pytest.mark.parametrize("given", ({"data": 1, "key": 2}, {"data": 1, "key": 3}))
def test_what_differs_is_named(monkeypatch, given):
    """Of two processes, of which the other has key 2."""
    mine = processes.answers
    other = mine(*mine_of({"data": 1, "key": 2}))
    monkeypatch.setattr(processes, "answers", lambda *numbers: np.concatenate([mine(*numbers), other]))
    if given["key"] == 2:
        return check_agreed("fit", given)
    with pytest.raises(
        ValueError, match="fit: key needs to be the same in every process, but of 2 processes"
    ):
        check_agreed("fit", given)


def mine_of(given):
    """The numbers that `check_agreed` compares."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "answers", lambda *numbers: found.extend(numbers) or np.array([numbers]))
        check_agreed("fit", given)
    return found


def test_a_launchers_tasks_that_jax_does_not_know_are_refused(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    check_launcher("fit")
    for name in LAUNCHERS:
        for tasks in ("1", "", "none"):
            monkeypatch.setenv(name, tasks)
            check_launcher("fit")
        monkeypatch.setenv(name, "4")
        with pytest.raises(RuntimeError, match=f"fit: {name}=4, but JAX knows of one process: 4 separate"):
            check_launcher("fit")
        monkeypatch.delenv(name)


ALONE = """
import sys, fnn, jax, optax
hook = sys.excepthook
fnn.join_processes()
assert sys.excepthook is hook, "alone, errors stay as they were"
X = jax.numpy.ones((4, 2))
def train():
    cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    params = fnn.init(jax.random.key(0), (2, 1))
    return fnn.fit(cost, optax.sgd(0.1), params, (X, X[:, :1]), key=jax.random.key(0), epochs=1, batch_size=4,
                   layout=fnn.data_parallel(), progress=False)
print(len(train().seconds), jax.process_count())
for address in ((), ("127.0.0.1:1", 1, 0)):
    try:
        fnn.join_processes(*address)
    except RuntimeError as error:
        print(error)
jax.process_count = lambda: 3
from fnn.processes import _end_at_once
sys.excepthook = _end_at_once
import atexit
atexit.register(print, "an exit as usual")
raise ZeroDivisionError("of the test")
"""


def test_join_alone_does_nothing_and_an_error_among_several_ends_at_once():
    status, out, err = ended(started("-c", ALONE))
    lines = out.splitlines()
    assert lines[0] == "1 1", err
    assert len(lines) == 3 and all("must be called before any JAX calls" in line for line in lines[1:]), out
    assert status == 1
    assert "ZeroDivisionError: of the test" in err
    assert err.splitlines()[-1] == "Process 0 of 3 ends at once, so that the others end too."
    assert "If a link broke" not in err


def test_join_refuses_a_launchers_tasks(monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv(LAUNCHERS[0], "2")
    with pytest.raises(RuntimeError, match=f"join_processes: {LAUNCHERS[0]}=2, but JAX knows of one process"):
        fnn.join_processes()


# Two processes.


def ends(both):
    """When each ended; those that hang are killed."""
    at = [np.inf, np.inf]
    until = time.monotonic() + PATIENCE
    while np.inf in at and time.monotonic() < until:
        for i, process in enumerate(both):
            if at[i] == np.inf and process.poll() is not None:
                at[i] = time.monotonic()
        time.sleep(0.01)
    for process in both:
        process.kill()
    return at


def two(folder):
    """What both found, in scenes one after the other, and how they ended: process 1 raises in the last."""
    port = free_port()
    both = [started("-m", "tests.two_processes", folder, i, port) for i in range(2)]
    at = ends(both)
    outcomes = [ended(process) for process in both]
    paths = [folder / f"{i}.json" for i in range(2)]
    assert all(path.exists() for path in paths), outcomes
    return [json.loads(path.read_text()) for path in paths], outcomes, at


def params_of(path):
    like = fnn.init(jax.random.key(0), (64, 32, 10), dtype="float32")
    return jax.tree.leaves(fnn.load(path, like=like))


@pytest.mark.usefixtures("standard_promotion")
def test_two_processes(tmp_path):
    """All in one test, as their start takes as long as the rest of this file."""
    for name in ("sklearn", "matplotlib", "tyro"):
        pytest.importorskip(name)
    found, outcomes, at = two(tmp_path)
    check_answers_are_collected_and_the_first_is_heard(found)
    check_data_that_differ_are_refused_in_both(found)
    check_uneven_batches_end_with_the_fewer(found)
    check_the_other_ends_when_one_raises(outcomes, at)
    check_the_experiment_is_that_on_one(tmp_path, outcomes)


def check_the_experiment_is_that_on_one(folder, outcomes):
    """And its folder goes on in one process, with another layout and other many devices."""
    from experiments.distributed import Flags, run

    (_, ours, _), (_, theirs, _) = outcomes
    assert "Devices:  4 in 2 processes, layout data" in ours and "of the digits" in ours
    assert "Devices" not in theirs
    shutil.copytree(folder / "run", folder / "before")
    options: Any = dict(widths=(32,), batch_size=500)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        run(Flags(layout="none", epochs=2, save=folder / "alone", **options))
        run(Flags(layout="sharded", epochs=4, checkpoint=folder / "run", **options))
    for a, b in zip(params_of(folder / "params"), params_of(folder / "alone"), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    before, after = ((folder / name / "history.jsonl").read_text().splitlines() for name in ("before", "run"))
    assert len(before) == 2 and len(after) == 4 and after[:2] == before, "with the wall times of before"


def check_answers_are_collected_and_the_first_is_heard(both):
    bits = np.array([np.pi, -0.0, np.nan])
    for found in both:
        assert found["processes"] == [2, 4]
        assert found["answers"] == [[0, 7], [1, 6]]
        assert found["of_first"] == [bits.tobytes().hex(), "float64"]
        assert found["on_host"] == [[[0.0] * 3] * 2 + [[1.0] * 3] * 2, [1.0], 4]


def check_data_that_differ_are_refused_in_both(both):
    for found in both:
        assert "fit: data needs to be the same in every process" in found["refused"]


def check_uneven_batches_end_with_the_fewer(both):
    ours, theirs = (found["uneven"] for found in both)
    assert len(ours["costs"]) == 5
    assert ours["costs"] == theirs["costs"] and ours["params"] == theirs["params"]
    assert any("another process has fewer batches" in warning for warning in ours["warnings"])


def check_the_other_ends_when_one_raises(outcomes, at):
    (first, _, of_first), (last, _, of_last) = outcomes
    assert last == 1 and "RuntimeError: as --fail-at 2 asks for" in of_last
    assert "Process 1 of 2 ends at once" in of_last
    assert first != 0 and "as --fail-at" not in of_first
    assert at[0] - at[1] < 10, "it waited for the one that raised"
