"""Checkpoints: every bit comes back, a damaged file is refused, and a save that fails leaves the old file."""

import errno
import hashlib
import io
import json
import os
import re
import resource
import stat
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec

import fnn as package
from fnn import checkpoint, files
from fnn.checkpoint import CheckpointError
from fnn.leaves import DTYPES

fnn: Any = package  # without types: wrong ones are among the points

NAMES = [name for name in DTYPES if not name.startswith("Python ")]
SMALL = [
    name for name in NAMES if re.search(r"int[124]$|float[46]_", name)
]  # less than a byte, but stored as one


class Pair(NamedTuple):
    first: Any
    second: Any


def random_bits(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bits that the dtype has: NaNs of every payload, -0.0, subnormal numbers."""
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    if dtype.kind == "b":
        raw &= 1
    return raw.view(dtype).reshape(shape)


def of_name(name: str, shape: tuple[int, ...] = (5, 3)) -> np.ndarray:
    dtype = DTYPES[name]
    return np.ones(shape).astype(dtype) if name in SMALL else random_bits(dtype, shape)


def bits(leaf: Any) -> tuple:
    """All there is to compare of a leaf."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", leaf.dtype, *bits(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    kind = "JAX" if isinstance(leaf, jax.Array) else type(leaf)
    return kind, array.dtype, array.shape, array.tobytes(), getattr(leaf, "weak_type", None)


def assert_same(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert [bits(leaf) for leaf in jax.tree.leaves(got)] == [bits(leaf) for leaf in jax.tree.leaves(expected)]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "checkpoint"


@pytest.fixture
def params() -> Any:
    return fnn.init(jax.random.key(0), (4, 3, 2), bias=fnn.unit_normal, dtype=jnp.float32)


def round_trip(path: Path, tree: Any, like: Any = None) -> Any:
    fnn.save(path, tree)
    return fnn.load(path, like=tree if like is None else like)


# What comes back.


@pytest.mark.parametrize("name", NAMES)
def test_every_dtype_comes_back_bit_for_bit(name, path):
    in_numpy = [of_name(name, shape) for shape in [(), (0,), (5, 3), (2, 0, 3)]]
    assert_same(round_trip(path, in_numpy), in_numpy)
    if not re.search("float6_|int1$", name):  # in NumPy's memory only
        in_jax = jax.device_put(in_numpy)
        assert_same(round_trip(path, in_jax), in_jax)


def test_dtypes_are_all_that_jax_has():
    has = {name for name in dir(jnp) if re.fullmatch(r"(bfloat|float|u?int|complex)\d+(_e\w+)?|bool", name)}
    assert {"bfloat16", "int4", "float8_e4m3fn"} < has <= set(DTYPES)


def test_nan_payloads_and_the_sign_of_zero_are_kept(path):
    words = np.array([0x7FC12345, 0x7F812345, 0xFFFFFFFF, 0x80000000, 0x00000001], np.uint32)
    for tree in (words.view(np.float32), jnp.asarray(words.view(np.float32))):
        assert np.asarray(round_trip(path, tree)).view(np.uint32).tolist() == words.tolist()


@pytest.mark.parametrize("number", [True, 0, -(2**63), 2**63 - 1, -0.0, float("inf"), 0.1, 1 - 2j])
def test_python_numbers_stay_pythons(number, path):
    got = round_trip(path, {"rate": number})["rate"]
    assert type(got) is type(number) and repr(got) == repr(number)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_both_styles_come_back(impl, path):
    keys = {
        "typed": jax.random.key(7, impl=impl),
        "many": jax.random.split(jax.random.key(7, impl=impl), (2, 3)),
        "old": jax.random.PRNGKey(7),
    }
    assert_same(round_trip(path, keys), keys)
    assert_same(round_trip(path, keys, like=jax.eval_shape(lambda: keys)), keys)


TREES = {
    "an array alone": np.arange(3.0),
    "nothing": (),
    "None alone in it": (None, [None], {}),
    "empty tuples": ((), np.ones(2), optax.EmptyState(), {"x": ()}),
    "a named tuple": Pair(np.float32(1), Pair(None, np.zeros((2, 2)))),
    "keys that zip or paths could misread": {
        "a/b": 1,
        "..": 2,
        "": 3,
        "\\": 4,
        "\0%": 5,
        "δ ü": 6,
        ".npy": 7,
    },
    "a slash is no level": {"a/b": np.ones(1), "a": {"b": np.zeros(1)}},
    "numbers as keys": {1: np.ones(2), 10: {2: np.zeros(1)}},
    "an ordered dict": OrderedDict(b=np.ones(2), a=np.zeros(3)),
    "columns in memory order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "every second number": np.arange(10)[::2],
    "a scalar of NumPy": [np.float64(0.1), np.int8(3), np.bool(True)],
}


@pytest.mark.parametrize("name", TREES)
def test_every_structure_comes_back(name, path):
    assert_same(round_trip(path, TREES[name]), TREES[name])


ARRAYS = st.builds(
    lambda dtype, shape, seed: random_bits(np.dtype(dtype), shape, seed),
    st.sampled_from(
        ["float32", "float64", "float16", "int8", "uint64", "bool", jnp.bfloat16, jnp.float8_e5m2]
    ),
    numpy_strategies.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    st.integers(0, 2**32 - 1),
)
LEAVES = st.one_of(ARRAYS, st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats())
PYTREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), children, max_size=3),
        st.builds(Pair, children, children),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    tree=PYTREES,
    metadata=st.dictionaries(st.text(), st.one_of(st.none(), st.floats(), st.text()), max_size=2),
)
def test_any_tree_and_metadata_come_back(tree, metadata, tmp_path_factory):
    checkpoints = fnn.Checkpoints(tmp_path_factory.getbasetemp() / "any_tree", keep=1)
    checkpoints.save(3, tree, metadata)
    step, got, got_metadata = checkpoints.restore(like=tree)
    assert step == 3 and repr(got_metadata) == repr(metadata)
    assert_same(got, tree)


def test_parameters_come_back_without_like(path, params):
    fnn.save(path, params)
    assert_same(fnn.load(path), params)
    assert all(isinstance(layer, fnn.Layer) for layer in fnn.load(str(path)))
    no_bias = fnn.init(jax.random.key(0), (4, 3, 2), bias=None, dtype=jnp.bfloat16)
    assert_same(round_trip(path, no_bias), no_bias)
    assert_same(fnn.load(path), no_bias)
    in_numpy = jax.tree.map(np.asarray, params)
    fnn.save(path, in_numpy)
    assert_same(fnn.load(path), params)


def test_the_path_given_is_the_file(tmp_path, params):
    for name in ("params", "a.b", "params.npz", "x" * 250):
        fnn.save(tmp_path / name, params)
    assert sorted(os.listdir(tmp_path)) == ["a.b", "params", "params.npz", "x" * 250]


def test_numpy_and_zip_read_the_file(path, params, standard_promotion):
    state = fnn.train_state(optax.adam(1e-3), params, jax.random.key(0))
    fnn.save(path, state)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with np.load(path, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["params/0/W"], params[0].W)
        np.testing.assert_array_equal(arrays["optimizer_state/0/mu/1/b"], np.zeros(2))
        assert arrays["optimizer_state/0/mu/1/b"].dtype == np.float32 and arrays["step"].shape == ()
        manifest = json.loads(arrays["__manifest__"].tobytes())
        assert {leaf["name"] for leaf in manifest["leaves"]} == set(arrays.files) - {"__manifest__"}
    assert {"name": "key", "shape": [2], "dtype": "key<threefry2x32>"} in manifest["leaves"]


def test_equal_trees_make_equal_files(tmp_path, params):
    for name in "ab":
        fnn.save(tmp_path / name, params)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("abstract", [False, True])
def test_arrays_get_the_sharding_of_like(path, abstract):
    mesh = jax.make_mesh((4,), ("x",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    tree = {
        "rows": jax.device_put(np.arange(8.0), rows),
        "copies": jax.device_put(np.float32(3), everywhere),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), 4), rows),
        "on the third": jax.device_put(np.ones(2), jax.devices()[2]),
        "numpy": np.ones(2),
    }
    like: Any = tree
    if abstract:
        like = {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) if name != "numpy" else a
            for name, a in tree.items()
        }
    got = round_trip(path, tree, like)
    assert_same(got, tree)
    for name in ("rows", "copies", "keys", "on the third"):
        assert got[name].sharding == tree[name].sharding, name


def test_uncommitted_arrays_stay_so(path):
    """A step counter on the first device still follows parameters that are on others."""
    with jax.default_device(jax.devices()[3]):
        there = jnp.ones(2)
    tree = {"there": there, "key": jax.random.key(0), "step": jnp.zeros((), jnp.int32)}
    got = round_trip(path, tree)
    assert got["there"].devices() == {jax.devices()[3]}
    assert not any(leaf.committed for leaf in got.values())
    assert (got["step"] + jax.device_put(np.int32(1), jax.devices()[5])).devices() == {jax.devices()[5]}


def test_weak_types_are_kept(path):
    """optax.inject_hyperparams has such: times bfloat16 they give bfloat16."""
    tree = [jnp.asarray(0.1), jnp.asarray(3), jnp.full((2,), 0.5), jnp.float32(0.1)]
    assert [leaf.weak_type for leaf in tree] == [True, True, True, False]
    assert_same(round_trip(path, tree), tree)
    assert_same(fnn.load(path, like=jax.eval_shape(lambda: tree)), tree)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_next_step_is_the_same_to_the_last_bit(dtype, tmp_path):
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    optimizer = optax.adam(0.01)
    state = fnn.train_state(optimizer, fnn.init(jax.random.key(0), (4, 5, 3), dtype=dtype), jax.random.key(1))
    X, y = jax.random.normal(jax.random.key(2), (6, 4), dtype), jnp.ones((6, 3), dtype)
    step = jax.jit(fnn.train_step, static_argnums=(0, 1))
    for _ in range(3):
        state, _ = step(cost, optimizer, state, X, y)
    checkpoints = fnn.Checkpoints(tmp_path)
    checkpoints.save(state.step, state)
    fresh = fnn.train_state(optimizer, fnn.init(jax.random.key(9), (4, 5, 3), dtype=dtype), jax.random.key(8))
    restored = checkpoints.restore(like=fresh)
    assert restored.step == 3 and type(restored.tree) is fnn.TrainState
    assert_same(restored.tree, state)
    assert_same(step(cost, optimizer, restored.tree, X, y), step(cost, optimizer, state, X, y))


# Damage.


def tiny(path: Path) -> tuple[Any, bytes]:
    tree = {"W": np.arange(4, dtype=np.float32), "b": None}
    fnn.save(path, tree)
    return tree, path.read_bytes()


def refused(path: Path, content: bytes, like: Any) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as info:
        fnn.load(path, like=like)
    text = str(info.value)
    assert text.startswith(f"load: {path} is damaged or no checkpoint of fnn.save: "), text
    assert text.endswith("Load another checkpoint, or a copy of it.")
    return text


def test_every_flipped_byte_and_many_bits_are_refused(path):
    tree, content = tiny(path)
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        refused(path, bytes(flipped), tree)
    path.write_bytes(content)
    assert_same(fnn.load(path, like=tree), tree)


def test_all_truncations_and_additions_are_refused(path):
    tree, content = tiny(path)
    for length in range(len(content)):
        refused(path, content[:length], tree)
    half = len(content) // 2
    for more in (content + b"\0", b"\0" + content, 2 * content, content[:half] + b"\0" + content[half:]):
        refused(path, more, tree)


def test_other_files_are_refused(path, tmp_path):
    np.savez(tmp_path / "numpy.npz", W=np.ones(3))
    assert "SHA-256" in refused(path, (tmp_path / "numpy.npz").read_bytes(), {"W": np.ones(3)})
    refused(path, b"", ())
    refused(path, np.random.default_rng(0).bytes(1000), ())
    with pytest.raises(FileNotFoundError, match="load: there is no file .*nothing"):
        fnn.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="cannot be read .Is a directory"):
        fnn.load(tmp_path)


def test_names_that_end_like_members_are_kept_apart(path):
    tree = {"a": np.zeros(2), "a.npy": np.ones(2)}
    fnn.save(path, tree)
    assert_same(fnn.load(path, like=tree), tree)


def test_a_newer_format_is_named(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    fnn.save(path, [1.0])
    content = path.read_bytes()
    monkeypatch.undo()
    assert "format 2, and this version of fnn reads 1" in refused(path, content, [1.0])


def test_nothing_is_executed_even_if_the_digest_fits(path, tmp_path):
    """Whoever can compute a digest can make a file; an array of objects in it, a pickle, is refused."""
    fnn.save(path, {"W": np.zeros(1)})

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    with np.load(path) as archive:
        manifest = archive[checkpoint.MANIFEST]
    made = io.BytesIO()
    np.savez(made, **{checkpoint.MANIFEST: manifest, "W": np.array([Harm()], object)})  # pyright: ignore
    content = made.getvalue()[:-2] + struct.pack("<H", checkpoint.DIGEST)
    digest = hashlib.sha256(content).hexdigest().encode()
    assert "Object arrays cannot be loaded" in refused(path, content + digest, {"W": np.zeros(1)})
    assert not (tmp_path / "harm").exists()


def test_members_that_the_manifest_does_not_name_are_refused(path):
    tree, content = tiny(path)
    path.write_bytes(content)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # of a duplicate name
        archive.writestr("W.npy", b"")
    refused(path, path.read_bytes(), tree)


# Another structure.

LAYERS = (
    fnn.Layer(np.ones((5, 4), "f4"), np.ones(5, "f4")),
    fnn.Layer(np.ones((3, 5), "f4"), np.ones(3, "f4")),
)


def without(tree, l, **changes):
    return tuple(layer._replace(**changes) if n == l else layer for n, layer in enumerate(tree))


@pytest.mark.parametrize(
    "tree, like, text",
    [
        (LAYERS, without(LAYERS, 1, W=np.ones((3, 6), "f4")), "W of layer 2: file (3, 5), like (3, 6)"),
        (LAYERS, without(LAYERS, 1, b=np.ones(3)), "b of layer 2: file float32 (3,), like float64 (3,)"),
        (LAYERS, without(LAYERS, 0, b=None), "b of layer 1: file float32 (5,), like None"),
        (without(LAYERS, 0, b=None), LAYERS, "b of layer 1: file None, like float32 (5,)"),
        (LAYERS, LAYERS[:1], "W of layer 2: file float32 (3, 5), like has no such leaf"),
        (LAYERS[:1], LAYERS, "W of layer 2: file has no such leaf, like float32 (3, 5)"),
        ({"params": LAYERS}, LAYERS, "W of layer 1: file has no such leaf, like float32 (5, 4)"),
        ({"p": LAYERS}, {"p": LAYERS[:1]}, "W of layer 2 in p: file float32 (3, 5), like has no such leaf"),
        ([1], [1.0], "the leaf 0: file Python int, like Python float"),
        ([1], [np.int64(1)], "the leaf 0: file Python int, like int64 ()"),
        ({"a/b": 1}, {"a": {"b": 1}}, "the leaf a/b: file has no such leaf, like Python int"),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(tree, like, text, path):
    fnn.save(path, tree)
    with pytest.raises(CheckpointError) as info:
        fnn.load(path, like=like)
    assert f"load: {path} and `like` differ; {text}. Give a tree" in str(info.value)


def test_another_implementation_of_keys_is_another_structure(path):
    fnn.save(path, jax.random.key(0))
    with pytest.raises(CheckpointError, match=r"file key<threefry2x32> \(2,\), like key<rbg> \(4,\)"):
        fnn.load(path, like=jax.random.key(0, impl="rbg"))
    with pytest.raises(CheckpointError, match=r"file key<threefry2x32> \(2,\), like uint32 \(2,\)"):
        fnn.load(path, like=jax.random.PRNGKey(0))


@pytest.mark.parametrize(
    "tree, text",
    [
        ({"a": 1.0}, "holds no network parameters, a tuple of fnn.Layer(W, b), but a. Use like="),
        ((), "but nothing. Use like="),
        ({"params": LAYERS}, "but params/0/W, params/0/b, params/1/W, .... Use like="),
        (without(LAYERS, 1, W=np.ones((3, 6), "f4")), "needs 5 columns, the width of layer 1, got (3, 6)"),
        (without(LAYERS, 0, b=np.ones(5)), "all parameters need one dtype"),
        (tuple((np.ones((2, 5, 4)), np.ones((2, 5))) for _ in "ab"), "but 0/0, 0/1, 1/0, .... Use like="),
        ((fnn.Layer(np.ones((2, 5, 4)), np.ones((2, 5))),), "through jax.vmap. Or use like="),
    ],
)  # fmt: skip
def test_what_is_no_parameters_needs_like(tree, text, path, no_shape_annotations):
    fnn.save(path, tree)
    with pytest.raises(CheckpointError) as info:
        fnn.load(path)
    assert text in str(info.value)


def test_float64_is_refused_where_jax_would_narrow_it(path):
    fnn.save(path, (fnn.Layer(np.ones((2, 3)), np.ones(2)),))
    fnn.save(str(path) + "_int", jnp.arange(3))
    with jax.enable_x64(False):
        with pytest.raises(
            TypeError, match="load: W of layer 1 is float64, which JAX would narrow to float32"
        ):
            fnn.load(path)
        with pytest.raises(CheckpointError, match="W of layer 1: file float64 .*, like float32"):
            fnn.load(path, like=(fnn.Layer(jnp.ones((2, 3)), jnp.ones(2)),))
        with pytest.raises(TypeError, match="the leaf array is int64, which JAX would narrow"):
            fnn.load(str(path) + "_int", like=jax.ShapeDtypeStruct((3,), jnp.dtype("int64")))
        kept = fnn.load(path, like=(fnn.Layer(np.zeros((2, 3)), np.zeros(2)),))  # NumPy's stay
    assert kept[0].W.dtype == np.float64 and (kept[0].W == 1).all()


# Bad input.


def deleted() -> jax.Array:
    array = jnp.ones(3)
    array.delete()
    return array


folder = fnn.Checkpoints
BAD: list[tuple[Any, Any, str]] = [
    (lambda p: fnn.save(3, ()), TypeError, "save: path needs to be a str or Path, got 3."),
    (lambda p: fnn.save("", ()), TypeError, "save: path needs to be a str or Path, got ''."),
    (lambda p: fnn.load(None), TypeError, "load: path needs to be a str or Path, got None."),
    (lambda p: fnn.save(p, {"a": "text"}), TypeError, "the leaf a needs to be an array of JAX"),
    (lambda p: fnn.save(p, [np.array("x")]), TypeError, "the leaf 0 needs to be an array .* got <U1"),
    (lambda p: fnn.save(p, [np.array([None])]), TypeError, "got object .1,.. Use .astype"),
    (lambda p: fnn.save(p, [np.ones(2, ">f4")]), TypeError, "in the machine's byte order"),
    (lambda p: fnn.save(p, [np.ma.masked_array([1.0])]), TypeError, "of a masked array .filled"),
    (lambda p: fnn.save(p, [np.ones(2, np.longdouble)]), TypeError, "Use .astype to one of JAX's dtypes"),
    (lambda p: fnn.save(p, [jax.ShapeDtypeStruct((2,), "f4")]), TypeError, "which has no values to save"),
    (lambda p: fnn.save(p, [deleted()]), ValueError, "the leaf 0 was given away"),
    (lambda p: fnn.save(p, [2**63]), ValueError, "0, 9223372036854775808, has more than"),
    (lambda p: fnn.save(p, {"__manifest__": 1}), ValueError, "name, '__manifest__', is the manifest's"),
    (lambda p: fnn.save(p, {"x" * 70_000: 1}), ValueError, "x', is too long; use other keys"),
    (lambda p: jax.jit(lambda x: fnn.save(p, [x]))(1.0), TypeError, "0 has no value yet: call it on"),
    (lambda p: folder(p, keep=0), ValueError, "keep needs to be an integer of at least 1, got 0."),
    (lambda p: folder(p, keep=1.5), ValueError, "keep needs to be an integer of at least 1, got 1.5."),
    (lambda p: folder(3), TypeError, "Checkpoints: path needs to be a str or Path, got 3."),
    (lambda p: folder(p).save(-1, ()), ValueError, "step needs to be an integer of at least 0, got -1."),
    (lambda p: folder(p).save(1.0, ()), ValueError, "Checkpoints.save: step needs to be an integer"),
    (lambda p: folder(p).save_best(True, ()), ValueError, "Checkpoints.save_best: step needs to be"),
    (lambda p: folder(p).save(1, (), [1]), TypeError, "metadata needs to be a dict, got list"),
    (lambda p: folder(p).save(1, (), {1: 2}), TypeError, "keys of metadata need to be"),
    (lambda p: folder(p).save(1, (), {"a": [(1,)]}), TypeError, r"metadata\['a'\]\[0\] needs to be"),
    (lambda p: folder(p).save(1, (), {"a": np.ones(1)}), TypeError, "Arrays belong in the tree"),
    (lambda p: fnn.save_safetensors(p, ()), (TypeError, ImportError), "params needs to be a tuple|pip"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, text", BAD)
def test_bad_input_says_what_to_do(call, kind, text, path, no_shape_annotations):
    with pytest.raises(kind, match=text):
        call(path)
    assert not path.exists() and not list(path.parent.iterdir())


def test_two_leaves_of_one_name_are_refused(path):
    class Twice:
        pass

    keys = jax.tree_util.DictKey("a"), jax.tree_util.GetAttrKey("a")
    jax.tree_util.register_pytree_with_keys(
        Twice, lambda tree: (zip(keys, (1, 2), strict=True), None), lambda aux, leaves: Twice()
    )
    with pytest.raises(ValueError, match="a leaf's name, 'a', is that of two; use other keys"):
        fnn.save(path, Twice())


# Saves that fail.


def fails_with(error: BaseException):
    def call(*args, **options):
        raise error

    return call


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file(function, error, path, params, monkeypatch):
    fnn.save(path, params)
    before = path.read_bytes()
    where = files if function == "open" else files.os
    monkeypatch.setattr(where, function, fails_with(error), raising=False)
    other = jax.tree.map(lambda a: a + 1, params)
    with pytest.raises(type(error)) as info:
        fnn.save(path, other)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert info.value.errno == errno.ENOSPC
        text = f"save: could not write {path}: No space left on device. What was there before still is."
        assert text in str(info.value)
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == before
    assert_same(fnn.load(path), params)


def test_a_save_whose_folder_is_not_flushed_says_so(path, params, monkeypatch):
    fnn.save(path, jax.tree.map(jnp.zeros_like, params))
    monkeypatch.setattr(files, "_flush_folder", fails_with(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="The new file is there, but may not outlive a power failure"):
        fnn.save(path, params)
    assert_same(fnn.load(path), params)


def test_file_and_folder_are_flushed_around_the_renaming(path, params, monkeypatch):
    """In this order: the file's content, its name, the folder."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        size = os.fstat(descriptor).st_size
        calls.append("folder" if is_folder else size)
        fsync(descriptor)

    def noted_replace(old, new):
        calls.append("rename")
        assert Path(old).parent == Path(new).parent == path.parent
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", noted_fsync)
    monkeypatch.setattr(files.os, "replace", noted_replace)
    fnn.save(path, params)
    assert calls == [path.stat().st_size, "rename", "folder"]


LIMITED = """
import resource, sys
import numpy as np
import fnn
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    fnn.save(sys.argv[1], np.ones(10_000))
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(path):
    """The limit on a file's size acts as a full disk: the first write is cut short, the next fails."""
    fnn.save(path, np.zeros(3))
    root = Path(package.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, env=environment, check=True
    )
    assert f"save: could not write {path}: File too large. What was there before still is." in run.stdout
    assert os.listdir(path.parent) == [path.name]
    assert_same(fnn.load(path, like=np.zeros(3)), np.zeros(3))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_places_that_cannot_be_written_are_refused(tmp_path, params):
    with pytest.raises(FileNotFoundError, match="its folder does not exist, make it first"):
        fnn.save(tmp_path / "none" / "x", params)
    with pytest.raises(IsADirectoryError, match="a folder or a device is there"):
        fnn.save(tmp_path, params)
    with pytest.raises(OSError, match="a folder or a device is there"):
        fnn.save("/dev/null", params)
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match="file is no folder but a file"):
        fnn.Checkpoints(tmp_path / "file").save(1, params)
    assert os.listdir(tmp_path) == ["file"]


def test_links_and_permissions_are_kept(tmp_path, params):
    fnn.save(tmp_path / "file", ())
    os.chmod(tmp_path / "file", 0o640)
    (tmp_path / "link").symlink_to("file")
    fnn.save(tmp_path / "link", params)
    assert (tmp_path / "link").is_symlink() and stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert_same(fnn.load(tmp_path / "file"), params)


# Folders.


def test_the_newest_are_kept_and_the_best(tmp_path, params):
    checkpoints = fnn.Checkpoints(tmp_path / "runs" / "first", keep=2)
    assert checkpoints.steps() == [] and checkpoints.restore(params) is None
    assert checkpoints.restore_best(params) is None and not os.listdir(tmp_path)
    for step in (1, 5, 30, 200_000_000):
        checkpoints.save(step, {"step": step}, {"cost": 1 / step})
        if step == 5:
            checkpoints.save_best(np.int32(5), {"step": 5})
    names = ["best.npz", "step-00000030.npz", "step-200000000.npz"]
    assert sorted(os.listdir(checkpoints.folder)) == names and checkpoints.steps() == [30, 200_000_000]
    assert checkpoints.restore({"step": 0}) == (200_000_000, {"step": 200_000_000}, {"cost": 5e-9})
    assert checkpoints.restore_best({"step": 0}) == (5, {"step": 5}, {})
    checkpoints.save_best(30, {"step": 30})
    assert checkpoints.restore_best({"step": 0}).step == 30
    assert checkpoints == fnn.Checkpoints(tmp_path / "runs" / "first", keep=2)


def test_the_structure_may_depend_on_the_metadata(tmp_path):
    checkpoints = fnn.Checkpoints(tmp_path)
    checkpoints.save(1, np.arange(3.0), {"epochs": 3})
    assert_same(checkpoints.restore(lambda metadata: np.zeros(metadata["epochs"])).tree, np.arange(3.0))
    callable_tree = jax.tree_util.Partial(fails_with(AssertionError()), 5)
    checkpoints.save(2, callable_tree)
    assert checkpoints.restore(callable_tree).tree.args == (5,)


def test_a_run_that_went_back_keeps_what_it_saves(tmp_path):
    """Also with keep=1: step 20 is damaged, so the run goes on from 10 and saves 15."""
    checkpoints = fnn.Checkpoints(tmp_path, keep=1)
    for step in (20, 10, 15):
        checkpoints.save(step, step)
    assert checkpoints.steps() == [15, 20]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(bytes(content))


def test_damaged_ones_are_passed_over_with_a_warning(tmp_path):
    checkpoints = fnn.Checkpoints(tmp_path, keep=4)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, step)
    damage(tmp_path / "step-00000004.npz")
    (tmp_path / "step-00000003.npz").write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        assert checkpoints.restore(0) == (2, 2, {})
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "step-00000004.npz is damaged or no checkpoint of fnn.save: its" in texts[0]
    assert "step-00000003.npz is damaged" in texts[1] and "Passed over for step 2." in texts[1]
    assert checkpoints.steps() == [1, 2, 3, 4]
    for step in (1, 2):
        damage(tmp_path / f"step-{step:08d}.npz")
    with pytest.raises(CheckpointError, match="all 4 checkpoints in .* are damaged. The newest: .*00000004"):
        checkpoints.restore(0)
    checkpoints.save_best(2, 2)
    with pytest.raises(CheckpointError, match="There is best.npz: restore_best."):
        checkpoints.restore(0)
    damage(tmp_path / "best.npz")
    with pytest.raises(CheckpointError, match="best.npz is damaged"):
        checkpoints.restore_best(0)


def test_another_networks_is_not_passed_over(tmp_path):
    checkpoints = fnn.Checkpoints(tmp_path)
    checkpoints.save(1, LAYERS)
    checkpoints.save(2, LAYERS[:1])
    with pytest.raises(
        CheckpointError, match="step-00000002.npz and `like` differ; W of layer 2: file has no"
    ):
        checkpoints.restore(LAYERS)


def test_a_renamed_one_is_no_checkpoint_of_that_step(tmp_path):
    checkpoints = fnn.Checkpoints(tmp_path)
    checkpoints.save(1, 1)
    (tmp_path / "step-00000007.npz").write_bytes((tmp_path / "step-00000001.npz").read_bytes())
    fnn.save(tmp_path / "step-00000008.npz", 1)
    with pytest.warns(UserWarning) as caught:
        assert checkpoints.restore(0).step == 1
    newest, older = (str(warning.message) for warning in caught)
    assert "step-00000008.npz" in newest and "it is no step of a folder. Was it copied" in newest
    assert "step-00000007.npz" in older and "it is step 1 by its content. Was it copied" in older


def test_other_names_are_no_checkpoints(tmp_path):
    checkpoints = fnn.Checkpoints(tmp_path)
    for name in (
        "step-1.npz",
        "step-000000001.npz",
        "step-00000001.npz.bak",
        "step-00000001",
        "step-0000000٣.npz",
        "best.npz",
    ):
        fnn.save(tmp_path / name, 1)
    (tmp_path / "step-00000002.npz").mkdir()
    (tmp_path / "step-00000003.npz").symlink_to("nowhere")
    assert checkpoints.steps() == [] and checkpoints.restore(0) is None


def test_what_vanishes_meanwhile_is_looked_for_again(tmp_path, monkeypatch):
    """Another process saves and removes between the list and the reading."""
    checkpoints = fnn.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, 1)
    read = checkpoint._read

    def late(where, path):
        if path.name == "step-00000001.npz":
            checkpoints.save(2, 2)
        return read(where, path)

    monkeypatch.setattr(checkpoint, "_read", late)
    assert checkpoints.restore(0) == (2, 2, {})


def test_leftovers_go_at_the_next_save_and_what_is_being_written_stays(tmp_path):
    checkpoints = fnn.Checkpoints(tmp_path)
    (tmp_path / f".0123456789abcdef{files.TEMPORARY}").write_bytes(b"half")
    assert checkpoints.steps() == [] and checkpoints.restore(0) is None
    with files._temporary(tmp_path) as file:  # of a save that goes on elsewhere
        file.write(b"half")
        checkpoints.save(1, 1)
        assert sorted(os.listdir(tmp_path)) == sorted([Path(file.name).name, "step-00000001.npz"])
    assert os.listdir(tmp_path) == ["step-00000001.npz"]


def test_a_temporary_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    lock, removed = files._lock, []

    def late(file):
        if not removed:
            removed.append(file.name)
            files._remove_leftovers(tmp_path)  # by another process, before the lock is there
        lock(file)

    monkeypatch.setattr(files, "_lock", late)
    fnn.save(tmp_path / "x", 1)
    assert removed and os.listdir(tmp_path) == ["x"] and fnn.load(tmp_path / "x", like=0) == 1


def test_savers_of_one_folder_do_not_tear_each_others_files(tmp_path):
    """Two at a time, on the same names, while a third restores."""
    size, errors = 20_000, []
    checkpoints = fnn.Checkpoints(tmp_path, keep=2)
    checkpoints.save(0, np.zeros(size))

    def save(value):
        try:
            for step in range(1, 15):
                checkpoints.save(step, np.full(size, value))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(float(value),)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        restored = checkpoints.restore(np.zeros(size))  # a warning would be an error
        assert len(set(restored.tree)) == 1
    assert not errors and checkpoints.restore(np.zeros(size)).step == 14
    assert not [name for name in os.listdir(tmp_path) if not name.startswith("step-")]


# For others.


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_safetensors_has_names_and_axes_of_torch(dtype, path):
    safetensors = pytest.importorskip("safetensors")
    params = fnn.init(jax.random.key(0), (4, 3, 2), bias=fnn.unit_normal, dtype=dtype)
    params = (params[0], params[1]._replace(b=None))
    fnn.save_safetensors(path, params)
    tensors = dict(safetensors.deserialize(path.read_bytes()))
    assert set(tensors) == {"layers.0.weight", "layers.0.bias", "layers.1.weight"}
    names = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16"}
    for name, array in (("layers.0.weight", params[0].W), ("layers.0.bias", params[0].b)):
        assert tensors[name]["dtype"] == names[dtype] and tensors[name]["shape"] == list(array.shape)
        assert bytes(tensors[name]["data"]) == np.asarray(array).tobytes()
    assert tensors["layers.1.weight"]["shape"] == [2, 3] and os.listdir(path.parent) == [path.name]


def test_torch_loads_safetensors(path):
    torch = pytest.importorskip("torch")
    torch_of = pytest.importorskip("safetensors.torch")
    params = fnn.init(jax.random.key(0), (4, 3, 2), bias=fnn.unit_normal, dtype=jnp.float32)
    fnn.save_safetensors(path, params)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)])
    model.load_state_dict(torch_of.load_file(path))
    X = np.random.default_rng(0).standard_normal((5, 4)).astype("f4")
    with torch.no_grad():
        ours = model.layers[1](torch.tanh(model.layers[0](torch.tensor(X)))).numpy()
    np.testing.assert_allclose(ours, fnn.mlp(fnn.tanh)(params, jnp.asarray(X)), rtol=1e-5, atol=1e-6)


def test_without_safetensors_the_extra_is_named(path, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r'pip install "fnn\[safetensors\]"'):
        fnn.save_safetensors(path, params)
