"""Initialisers have the variance of their papers; parameters are a plain pytree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from tests.strategies import DTYPES

N_IN, N_OUT = 500, 300
VARIANCES = {
    "lecun_normal": 1 / N_IN,
    "lecun_uniform": 1 / N_IN,
    "glorot_normal": 2 / (N_IN + N_OUT),
    "glorot_uniform": 2 / (N_IN + N_OUT),
    "he_normal": 2 / N_IN,
    "he_uniform": 2 / N_IN,
    "unit_normal": 1.0,
}


@pytest.mark.parametrize("name", VARIANCES)
def test_initial_weights_have_the_stated_variance(name):
    """150,000 draws: the sample variance of normal numbers is off by √(2/n) = 0.4 %; five times that."""
    W = np.asarray(fnn.init(jax.random.key(1), (N_IN, N_OUT), weights=getattr(fnn, name))[0].W)
    assert W.var() == pytest.approx(VARIANCES[name], rel=0.02)
    assert abs(W.mean()) < 5 * (VARIANCES[name] / W.size) ** 0.5
    bound = (3 * VARIANCES[name]) ** 0.5
    assert (abs(W).max() <= bound) == name.endswith("uniform")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(40, 60), (60, 40), (50, 50)])
def test_orthogonal_weights_are(sizes, dtype):
    (W, _), *_ = fnn.init(jax.random.key(0), sizes, weights=fnn.orthogonal, dtype=dtype)
    assert W.dtype == dtype
    W = np.asarray(W, float)
    small = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    np.testing.assert_allclose(small, np.eye(len(small)), atol=8 * float(jnp.finfo(dtype).eps))


def test_zeros_and_no_bias():
    params = fnn.init(jax.random.key(0), (3, 4, 2), weights=fnn.zeros, bias=None)
    assert all((layer.W == 0).all() and layer.b is None for layer in params)
    assert len(jax.tree.leaves(params)) == 2


def test_every_array_has_a_key_of_its_own():
    params = fnn.init(jax.random.key(0), (5, 5, 5, 5), weights=fnn.unit_normal, bias=fnn.unit_normal)
    numbers = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    assert len(np.unique(numbers)) == numbers.size == 3 * 30


def test_equal_keys_give_equal_parameters():
    first, second = (fnn.init(jax.random.key(7), (3, 4, 2)) for _ in range(2))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, second))
    other = fnn.init(jax.random.key(8), (3, 4, 2))
    assert not (first[0].W == other[0].W).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_init_has_the_shapes_and_dtype_asked_for(dtype):
    params = fnn.init(jax.random.key(0), (4, 7, 1, 3), dtype=dtype)
    assert [layer.W.shape for layer in params] == [(7, 4), (1, 7), (3, 1)]
    assert [layer.b.shape for layer in params if layer.b is not None] == [(7,), (1,), (3,)]
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))


def test_default_dtype_is_that_of_jax():
    assert fnn.init(jax.random.key(0), (2, 2))[0].W.dtype == jnp.float64
    with jax.enable_x64(False):
        assert fnn.init(jax.random.key(0), (2, 2))[0].W.dtype == jnp.float32


def test_members_of_an_ensemble_are_drawn_by_vmap():
    keys = jax.random.split(jax.random.key(0), 3)
    members = jax.vmap(lambda key: fnn.init(key, (4, 5, 2)))(keys)
    alone = fnn.init(keys[1], (4, 5, 2))
    np.testing.assert_array_equal(members[1].W[1], alone[1].W)


def test_summary_counts_every_parameter():
    params = fnn.init(jax.random.key(0), (784, 128, 10), dtype=jnp.bfloat16)
    table = fnn.summary(params)
    assert f"{784 * 128 + 128 + 128 * 10 + 10:,}" in table and "bfloat16" in table and "198.8 KiB" in table
    assert len({len(line) for line in table.splitlines()}) == 1, "columns line up"
    assert "none" in fnn.summary(fnn.init(jax.random.key(0), (2, 3), bias=None))


def test_summary_is_a_table_of_the_layers():
    first = fnn.Layer(jnp.zeros((128, 64), "float32"), jnp.zeros(128, "float32"))
    table = """
layer  W          b       dtype     parameters
    1  (128, 64)  (128,)  float32        8,320
    2  (10, 128)  none    float32        1,280
total                     37.5 KiB       9,600
"""
    assert fnn.summary((first, fnn.Layer(jnp.zeros((10, 128), "float32")))) == table.strip()


@pytest.mark.parametrize(
    "shape, size",
    [
        ((5, 51), "1020 B"),
        ((16, 16), "1 KiB"),
        ((500, 500), "976.6 KiB"),
        ((512, 512), "1 MiB"),
        ((16384, 16384), "1 GiB"),
    ],
)
def test_summary_measures_memory_in_units_of_1024(shape, size):
    W: Any = np.broadcast_to(np.float32(0), shape)  # one number in memory
    assert f"  {size}  " in fnn.summary((fnn.Layer(W),)).splitlines()[-1]
