"""Sharded checkpoints: every bit comes back on any devices, and nothing gets past the digest."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import fnn as package
from fnn import files, sharded_checkpoint
from fnn.checkpoint import CheckpointError
from tests.test_checkpoint import NAMES, TREES, Pair, assert_same, fails_with, of_name, random_bits

orbax = pytest.importorskip("orbax.checkpoint")
fnn: Any = package  # without types: wrong ones are among the points


def sharded(shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
    """Over the first devices, as many as the mesh's shape needs."""
    count = int(np.prod(shape))
    devices = np.array(jax.devices()[:count]).reshape(shape)
    return NamedSharding(jax.sharding.Mesh(devices, ("data", "model")[: len(shape)]), PartitionSpec(*axes))


LAYOUTS = {
    "8": lambda *axes: sharded((8,), *axes[:1]),
    "4": lambda *axes: sharded((4,), *axes[:1]),
    "2": lambda *axes: sharded((2,), *axes[:1]),
    "1": lambda *axes: sharded((1,), *axes[:1]),
    "4 x 2": lambda *axes: sharded((4, 2), *axes),
    "2 x 4": lambda *axes: sharded((2, 4), *axes),
    "2 x 1": lambda *axes: sharded((2, 1), *axes),
    "one device": lambda *axes: SingleDeviceSharding(jax.devices()[5]),
}


def spread(layout: str) -> Any:
    """A tree with a bit of everything, its arrays on the devices of the layout."""
    of = LAYOUTS[layout]
    put = jax.device_put
    return {
        "rows": put(random_bits(np.dtype("float32"), (16, 3), 1), of("data")),
        "blocks": put(random_bits(np.dtype("float64"), (8, 16), 2), of("data", "model")),
        "columns": put(random_bits(np.dtype(jnp.bfloat16), (3, 8), 3), of(None, "model")),
        "copies": put(random_bits(np.dtype("int8"), (3, 5), 4), of()),
        "-0.0": put(np.full((8, 2), -0.0), of("data")),
        "keys": put(jax.random.split(jax.random.key(3), 8), of("data")),
        "key": put(jax.random.key(4, impl="rbg"), of()),
        "nobody": put(np.zeros((0, 4), np.float32), of()),
        "numpy": Pair(np.float32(0.1), np.arange(6).reshape(2, 3).T),
        "numbers": [None, 3, 0.1, True, 1 - 2j],
        "free": jnp.arange(3),
    }


def abstract(tree: Any) -> Any:
    def of(leaf):
        if not isinstance(leaf, jax.Array) or not leaf.committed:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(of, tree)


def assert_placed(got: Any, like: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(theirs, jax.Array):
            assert ours.committed == theirs.committed
            if theirs.committed:
                assert ours.sharding == theirs.sharding


# What comes back.


@pytest.mark.parametrize("saved", ["8", "1", "4 x 2", "one device"])
def test_every_bit_comes_back_on_other_devices(saved, tmp_path):
    checkpoints = fnn.ShardedCheckpoints(tmp_path)
    checkpoints.save(7, spread(saved), {"devices": saved})
    for n, layout in enumerate(LAYOUTS):
        like = spread(layout)
        step, got, metadata = checkpoints.restore(abstract(like) if n % 2 else like)
        assert step == 7 and metadata == {"devices": saved}
        assert_same(got, spread(saved))
        assert_placed(got, like)


def test_a_run_goes_from_8_devices_to_4_to_1_and_back(tmp_path):
    checkpoints = fnn.ShardedCheckpoints(tmp_path)
    tree = spread("8")
    for step, layout in enumerate(["4", "one device", "8"]):
        checkpoints.save(step, tree)
        tree = checkpoints.restore(abstract(spread(layout))).tree
    assert_same(tree, spread("8"))
    assert_placed(tree, spread("8"))


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    rows = sharded((4,), "data")
    tree = {name: [of_name(name, (8, 3)), of_name(name, ())] for name in NAMES}
    tree |= {
        f"{name} of JAX": jax.device_put(of_name(name, (8, 3)), rows)
        for name in NAMES
        if not re.search("float6_|int1$", name)
    }
    checkpoints = fnn.ShardedCheckpoints(tmp_path)
    checkpoints.save(0, tree)
    got = checkpoints.restore(tree).tree
    assert_same(got, tree)
    assert_placed(got, tree)
    on_host = jax.tree.map(np.asarray, tree)  # what was sharded, as NumPy's, and the other way round
    assert_same(checkpoints.restore(on_host).tree, on_host)
    checkpoints.save(1, on_host)
    assert_same(checkpoints.restore(tree).tree, tree)


@pytest.mark.parametrize("tree", [TREES, (), (None, [None]), np.arange(3.0), np.zeros(0)], ids=range(5))
def test_every_structure_comes_back(tree, tmp_path):
    checkpoints = fnn.ShardedCheckpoints(tmp_path)
    checkpoints.save(0, tree)
    assert_same(checkpoints.restore(tree).tree, tree)


def test_free_arrays_and_weak_types_stay_so(tmp_path):
    everywhere, rows = sharded((4,)), sharded((4,), "data")
    weak = jax.jit(lambda x: jnp.full((), 0.1) + 0 * x, out_shardings=everywhere)(0.0)
    tree = {
        "weak": [jnp.asarray(0.1), jnp.asarray(3), weak],
        "weak rows": jax.jit(lambda: jnp.full((4,), 0.1), out_shardings=rows)(),
        "key": jax.random.key(0),
    }
    assert all(leaf.weak_type for leaf in (*tree["weak"], tree["weak rows"]))
    checkpoints = fnn.ShardedCheckpoints(tmp_path)
    checkpoints.save(0, tree)
    got = checkpoints.restore(tree).tree
    assert_same(got, tree)
    assert_placed(got, tree)


@pytest.mark.usefixtures("standard_promotion")
def test_the_next_step_is_the_same_to_the_last_bit(tmp_path):
    """Of a training state that is spread as its parameters are: rows of W over the devices."""
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.01)

    def place(leaf):
        is_matrix = leaf.ndim == 2
        return jax.device_put(leaf, sharded((4,), "data") if is_matrix else sharded((4,)))

    def fresh(seed):
        params = fnn.init(jax.random.key(seed), (4, 8, 4), dtype=jnp.float32)
        return jax.tree.map(place, fnn.train_state(optimizer, params, jax.random.key(seed + 1)))

    X, y = place(jnp.ones((8, 4), jnp.float32)), place(jnp.ones((8, 4), jnp.float32))
    step = jax.jit(fnn.train_step, static_argnums=(0, 1))
    state = fresh(0)
    for _ in range(2):
        state, _ = step(cost, optimizer, state, X, y)
    checkpoints = fnn.ShardedCheckpoints(tmp_path)
    checkpoints.save(state.step, state)
    restored = checkpoints.restore(like=state)
    assert restored.step == 2 and type(restored.tree) is fnn.TrainState
    assert_same(restored.tree, state)
    assert_placed(restored.tree, state)
    assert_same(step(cost, optimizer, restored.tree, X, y), step(cost, optimizer, state, X, y))
    other = fresh(5)
    assert_same(checkpoints.restore(lambda metadata: other).tree, state)


# Damage.


def small(folder: Path, steps: tuple[int, ...] = (1,), **options: Any) -> Any:
    """Checkpoints of a small tree, and the tree of the last."""
    checkpoints, tree = fnn.ShardedCheckpoints(folder, **options), {}
    for step in steps:
        tree = {
            "W": jax.device_put(np.arange(16.0) + step, sharded((8,), "data")),
            "n": step,
            "b": np.ones(2),
        }
        checkpoints.save(step, tree)
    return checkpoints, tree


def all_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refused(checkpoints: Any, like: Any) -> str:
    with pytest.raises(CheckpointError, match="restore: all 1 checkpoints in .* are damaged.") as info:
        checkpoints.restore(like)
    text = str(info.value)
    assert "step-00000001 is damaged or no checkpoint of fnn.ShardedCheckpoints: " in text, text
    return text


def test_flipped_bits_of_every_file_are_refused_before_orbax_reads(tmp_path, monkeypatch):
    """Of small arrays, which orbax keeps under a checksum of its own, and of larger ones, without any."""
    checkpoints, like = small(tmp_path)
    large = jax.device_put(random_bits(np.dtype("float32"), (8, 1000)), sharded((8,), "data"))
    like |= {"large": large}
    checkpoints.save(1, like)
    monkeypatch.setattr(sharded_checkpoint, "_read", fails_with(AssertionError()))
    rng = np.random.default_rng(0)
    names = all_files(tmp_path)
    assert len(names) > 8 and sum(path.stat().st_size for path in names) > large.nbytes
    for path in names:
        content = path.read_bytes()
        assert content
        places = {0, 8 * len(content) - 1, *rng.integers(0, 8 * len(content), 10).tolist()}
        for place in places:
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            text = refused(checkpoints, like)
            assert path.name in text or "digest.json" == path.name, (path, place)
        path.write_bytes(content)
    monkeypatch.undo()
    assert_same(checkpoints.restore(like).tree, like)


def test_every_bit_of_the_digest_counts(tmp_path):
    checkpoints, like = small(tmp_path)
    path = tmp_path / "step-00000001" / "digest.json"
    content = path.read_bytes()
    assert json.loads(content)["manifest"]["step"] == 1
    assert not sharded_checkpoint._compared(path.parent, 1, content)[1]
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        assert sharded_checkpoint._compared(path.parent, 1, bytes(flipped))[1]
    for other in (b"", content[:-1], content + b"\n", b"\n" + content, 2 * content):
        path.write_bytes(other)
        refused(checkpoints, like)


def test_missing_shortened_and_additional_files_are_refused(tmp_path):
    checkpoints, like = small(tmp_path)
    step = tmp_path / "step-00000001"
    names = [path for path in all_files(tmp_path) if path.name != "digest.json"]
    for path in names:
        content = path.read_bytes()
        path.unlink()
        assert f"{path.name} is missing" in refused(checkpoints, like)
        path.symlink_to("nowhere")
        assert "cannot be read (No such file" in refused(checkpoints, like)
        path.unlink()
        for other in (b"", content[:-1], content + b"\0"):
            path.write_bytes(other)
            assert f"{path.name} are not those" in refused(checkpoints, like)
        path.write_bytes(content)
    arrays = names[0].parent
    for path in (step / "more", arrays / "more", arrays / "d" / "more", arrays / f".1{files.TEMPORARY}"):
        path.write_bytes(b"")
        assert f"{path.name} is one too many" in refused(checkpoints, like)
        path.unlink()
    assert_same(checkpoints.restore(like).tree, like)
    (step / "digest.json").unlink()  # without it there is no step
    assert checkpoints.steps() == [] and checkpoints.restore(like) is None
    (step / "digest.json").mkdir()
    assert checkpoints.steps() == []


def test_an_unreadable_digest_is_damage(tmp_path, monkeypatch):
    checkpoints, like = small(tmp_path)
    error = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", fails_with(error))
    assert "digest.json cannot be read (Permission denied)" in refused(checkpoints, like)


def test_a_newer_format_and_a_renamed_step_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_checkpoint, "FORMAT", 2)
    checkpoints, like = small(tmp_path)
    monkeypatch.undo()
    assert "format 2, and this version of fnn reads 1" in refused(checkpoints, like)
    checkpoints, like = small(tmp_path / "other", (5,))
    os.rename(tmp_path / "other" / "step-00000005", tmp_path / "other" / "step-00000001")
    assert "it is step 5 by its content. Was it copied or renamed?" in refused(checkpoints, like)


def damage(folder: Path, step: int) -> None:
    path = all_files(folder / f"step-{step:08d}")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_damaged_ones_are_passed_over_with_a_warning(tmp_path):
    checkpoints, like = small(tmp_path, (1, 2, 3))
    damage(tmp_path, 3)
    damage(tmp_path, 2)
    with pytest.warns(UserWarning) as caught:
        step, tree, _ = checkpoints.restore(like)
    assert step == 1 and tree["n"] == 1 and tree["W"][0] == 1
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and all("Passed over for step 1." in text for text in texts)
    assert "step-00000003 is damaged" in texts[0] and "step-00000002 is damaged" in texts[1]
    damage(tmp_path, 1)
    with pytest.raises(CheckpointError, match="all 3 checkpoints in .* are damaged. The newest: .*00000003"):
        checkpoints.restore(like)


# Another structure.

ROWS = sharded((8,), "data")


@pytest.mark.parametrize(
    "like, text",
    [
        ({"n": 1, "b": np.ones(2)}, "the leaf W: file float64 (16,), like has no such leaf"),
        ({"W": 0, "n": 1, "b": np.ones(2)}, "the leaf W: file float64 (16,), like Python int"),
        ({"W": np.ones(16), "n": 1, "b": np.ones(3)}, "the leaf b: file (2,), like (3,)"),
        (
            {"W": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=ROWS), "n": 1, "b": np.ones(2)},
            "the leaf W: file float64 (16,), like float32 (16,)",
        ),
        (
            {"W": jax.ShapeDtypeStruct((8,), jnp.float64, sharding=ROWS), "n": 1, "b": np.ones(2)},
            "the leaf W: file (16,), like (8,)",
        ),
    ],
)
def test_the_first_difference_is_named(like, text, tmp_path):
    checkpoints, _ = small(tmp_path)
    with pytest.raises(CheckpointError) as info:
        checkpoints.restore(like)
    assert f"step-00000001 and `like` differ; {text}. Give a tree" in str(info.value)


def test_float64_is_refused_where_jax_would_narrow_it(tmp_path):
    checkpoints, like = small(tmp_path)
    with jax.enable_x64(False):
        with pytest.raises(TypeError, match="restore: the leaf W is float64, which JAX would narrow"):
            checkpoints.restore(abstract(like))
        on_host = jax.tree.map(np.asarray, like) | {"n": 1}
        assert checkpoints.restore(on_host).tree["W"].dtype == np.float64


# Saves that are cut short.

CUTS = {
    "orbax writes": (orbax.PyTreeCheckpointHandler, "finalize"),
    "files are digested": (sharded_checkpoint, "_entry"),
    "files are flushed": (sharded_checkpoint, "_flush"),
    "digest.json is renamed": (files.os, "replace"),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_is_cut_short_is_not_there(cut, error, tmp_path, monkeypatch):
    checkpoints, like = small(tmp_path, (1, 2), keep=2)
    before = {path: path.read_bytes() for path in all_files(tmp_path)}
    for step in (2, 3):  # in place of one that is there, and a new one
        monkeypatch.setattr(*CUTS[cut], fails_with(error))
        with pytest.raises(type(error)):
            checkpoints.save(step, like | {"n": -1})
        monkeypatch.undo()
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(like).tree, like)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(all_files(tmp_path)) > len(before)
    for step in (2, 3, 4):
        checkpoints.save(step, like | {"n": step})
        assert checkpoints.restore(like).tree["n"] == step
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]
    for step in tmp_path.iterdir():
        assert len(os.listdir(step)) == 2  # no leftovers


@pytest.mark.parametrize("function", ["rmtree", "unlink"])
def test_a_removal_that_is_cut_short_leaves_the_new_one(function, tmp_path, monkeypatch):
    checkpoints, like = small(tmp_path, (1,), keep=1)
    where = sharded_checkpoint.shutil if function == "rmtree" else Path
    monkeypatch.setattr(where, function, fails_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, like | {"n": 2})
    monkeypatch.undo()
    assert checkpoints.restore(like).tree["n"] == 2
    checkpoints.save(3, like | {"n": 3})
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_what_is_saved_or_removed_meanwhile_is_looked_for_again(tmp_path, monkeypatch):
    checkpoints, like = small(tmp_path, (1, 2), keep=1)
    compared, calls = sharded_checkpoint._compared, []

    def late(path, step, text):
        calls.append(step)
        if len(calls) < 3:
            checkpoints.save(2 if len(calls) == 1 else 3, like | {"n": len(calls)})
        return compared(path, step, text)

    monkeypatch.setattr(sharded_checkpoint, "_compared", late)
    assert checkpoints.restore(like).tree["n"] == 2
    assert calls == [2, 2, 3]


# Folders.


def test_the_newest_are_kept_and_those_of_later_steps(tmp_path):
    checkpoints = fnn.ShardedCheckpoints(tmp_path / "runs" / "first", keep=2)
    assert checkpoints.steps() == [] and checkpoints.restore(0) is None and not os.listdir(tmp_path)
    for step in (1, 5, 200_000_000, 30, 31, np.int32(32)):
        checkpoints.save(step, int(step), {"cost": float("inf")})
    assert checkpoints.steps() == [31, 32, 200_000_000]
    assert sorted(os.listdir(checkpoints.folder)) == ["step-00000031", "step-00000032", "step-200000000"]
    assert checkpoints.restore(0) == (200_000_000, 200_000_000, {"cost": float("inf")})
    assert checkpoints == fnn.ShardedCheckpoints(tmp_path / "runs" / "first", keep=2)
    for name in ("step-1", "step-000000033", "step-00000034.npz"):
        os.rename(Path(checkpoints.folder) / "step-00000031", Path(checkpoints.folder) / name)
        assert checkpoints.steps() == [32, 200_000_000]
        os.rename(Path(checkpoints.folder) / name, Path(checkpoints.folder) / "step-00000031")


def test_folders_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = fnn.ShardedCheckpoints("runs")
    checkpoints.save(1, np.ones(2))
    assert_same(checkpoints.restore(np.ones(2)).tree, np.ones(2))


def deleted() -> jax.Array:
    array = jax.device_put(np.ones(8), ROWS)
    array.delete()
    return array


folder = fnn.ShardedCheckpoints
BAD: list[tuple[Any, Any, str]] = [
    (lambda p: folder(3), TypeError, "ShardedCheckpoints: path needs to be a str or Path, got 3."),
    (lambda p: folder(p, keep=0), ValueError, "ShardedCheckpoints: keep needs to be an integer of at least"),
    (lambda p: folder(p).save(-1, ()), ValueError, "ShardedCheckpoints.save: step needs to be an integer"),
    (lambda p: folder(p).save(1, (), [1]), TypeError, "metadata needs to be a dict, got list"),
    (lambda p: folder(p).save(1, (), {"a": (1,)}), TypeError, r"metadata\['a'\] needs to be something JSON"),
    (lambda p: folder(p).save(1, ["text"]), TypeError, "the leaf 0 needs to be an array of JAX"),
    (lambda p: folder(p).save(1, [deleted()]), ValueError, "the leaf 0 was given away"),
    (lambda p: folder(p).save(1, [jax.ShapeDtypeStruct((2,), "f4")]), TypeError, "which has no values"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, text", BAD)
def test_bad_input_says_what_to_do(call, kind, text, tmp_path, no_shape_annotations):
    with pytest.raises(kind, match=text):
        call(tmp_path / "folder")
    assert not os.listdir(tmp_path)


def test_without_orbax_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "fnn\[checkpoint\]"'):
        fnn.ShardedCheckpoints(tmp_path)


# Several processes.

PROCESS = """
import sys, warnings
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_num_cpu_devices", 2)
number, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=number)
import fnn
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("data",))
rows, columns, everywhere = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("data",), (None, "data"), ()))

def spread(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

def tree(step, first=rows):
    return {
        "W": spread(np.arange(32, dtype=np.float32).reshape(8, 4) + step, first),
        "copies": spread(np.arange(3, dtype=np.float32), everywhere),
        "keys": jax.jit(lambda: jax.random.split(jax.random.key(5), 8), out_shardings=rows)(),
        "own": jax.numpy.arange(3),
        "numpy": np.arange(5),
        "nobody": spread(np.zeros((0, 4)), everywhere),
        "number": step,
        "none": None,
    }

def same(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if isinstance(b, jax.Array):
            assert a.sharding == b.sharding and a.dtype == b.dtype
            if jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            for mine, theirs in zip(a.addressable_shards, b.addressable_shards, strict=True):
                assert mine.index == theirs.index
                assert np.asarray(mine.data).tobytes() == np.asarray(theirs.data).tobytes()
        else:
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

def raises(kind, text, call, *args):
    try:
        call(*args)
    except kind as error:
        assert type(error) is kind and text in str(error), repr(error)
    else:
        raise AssertionError(text)

checkpoints = fnn.ShardedCheckpoints(folder / "run", keep=2)
assert checkpoints.restore(tree(0)) is None
for step in (1, 2):
    checkpoints.save(step, tree(step), {"step": step})
assert checkpoints.steps() == [1, 2]
step, got, metadata = checkpoints.restore(tree(0, columns))
assert step == 2 and metadata == {"step": 2}
same(got, tree(2, columns))

# What one process alone has wrong, all learn of.
own = {"numpy": np.full(2, number)}
raises(ValueError, "the leaf numpy is another on process 1 than on process 0", checkpoints.save, 9, own)
raises(ValueError, "structure is another on process 1", checkpoints.save, 9, {"a": 1} if number else {"b": 1})
raises(TypeError, "the leaf 0 needs to be an array", checkpoints.save, 9, ["text" if number else 1])
like = tree(0) | ({"number": 0.5} if number else {})
raises(fnn.CheckpointError, "the leaf number: file Python int, like Python float", checkpoints.restore, like)
if number == 0:
    (folder / "file").write_text("")
sync_global_devices("file")
beneath_a_file = fnn.ShardedCheckpoints(folder / "file" / "run")
raises(FileExistsError, "is no folder but a file", beneath_a_file.save, 1, tree(1))

# Damage is found by the first alone.
def flip(step):
    if number == 0:
        for path in (folder / "run" / f"step-{step:08d}").rglob("manifest.ocdbt"):
            content = bytearray(path.read_bytes())
            content[-3] ^= 1
            path.write_bytes(content)
    sync_global_devices(f"flip {step}")

flip(2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    step, got, _ = checkpoints.restore(tree(0))
assert step == 1 and ["Passed over for step 1." in str(w.message) for w in caught] == [True]
same(got, tree(1))
flip(1)
raises(fnn.CheckpointError, "all 2 checkpoints in", checkpoints.restore, tree(0))
flip(2)
print("done", jax.process_count(), jax.device_count())
"""


def test_two_processes_save_together_and_one_restores_alone(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    root = Path(package.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", PROCESS, str(number), str(port), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for number in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "done 2 4" in output, "\n\n".join(outputs)
    W = jnp.arange(32, dtype=jnp.float32).reshape(8, 4) + 2
    tree = {
        "W": jax.device_put(W, sharded((4, 2), "data", "model")),
        "copies": jnp.arange(3, dtype=jnp.float32),
        "keys": jax.device_put(jax.random.split(jax.random.key(5), 8), sharded((2,), "data")),
        "own": jnp.arange(3, dtype=jnp.int32),
        "numpy": np.arange(5),
        "nobody": np.zeros((0, 4), np.float32),
        "number": 2,
        "none": None,
    }
    step, got, _ = fnn.ShardedCheckpoints(tmp_path / "run").restore(tree)
    assert step == 2
    assert_same(got, tree)
    assert_placed(got, tree)
