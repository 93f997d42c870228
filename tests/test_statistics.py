"""Statistics of a and δ: their definitions in NumPy, their limits, and what it takes to record them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn.runs import _epoch, _epochs
from tests.strategies import Architecture, drawn, network_case, tolerance

EDGES = (1e-3, 0.2, 1.0)
backprop = jax.jit(fnn.backprop, static_argnums=0)


def swept(dtype="float64", N=40, widths=(3, 9, 6, 2)):
    rng = np.random.default_rng(0)
    first, *others = drawn(rng, widths, dtype=dtype)
    first = first._replace(b=np.where(np.arange(widths[1]) == 2, -100, 0).astype(dtype))  # it never acts
    X, Y = rng.standard_normal((N, widths[0])).astype(dtype), np.ones((N, widths[-1]), dtype)
    cost = fnn.cost(fnn.mlp([fnn.relu, fnn.tanh]), fnn.half_squared_error)
    return backprop(cost, (first, *others), X, Y)


@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
def test_statistics_are_their_definitions(dtype):
    sweep = swept(dtype)
    statistics = jax.device_get(jax.jit(partial(fnn.layer_statistics, edges=EDGES))(sweep))
    wide = max(jnp.dtype(dtype), jnp.dtype("float32"), key=lambda d: d.itemsize)
    for got, layers in zip(statistics, (sweep.inputs, sweep.errors), strict=True):
        assert {part.dtype for part in got} == {wide}
        for l, x in enumerate(layers):
            x = np.asarray(x, np.float64)
            size = tolerance(wide, x.size)
            np.testing.assert_allclose(got.rms[l], np.sqrt((x**2).mean()), rtol=size)
            np.testing.assert_allclose(got.mean[l], x.mean(), atol=size * np.abs(x).mean())
            assert got.dead[l] == np.asarray((x == 0).all(axis=0).mean(), wide)
            # Edges are numbers of the wide dtype, as x is in the comparison.
            bins = np.searchsorted(np.asarray(EDGES, wide), np.abs(x).ravel(), side="right")
            np.testing.assert_allclose(got.histogram[l], np.bincount(bins, minlength=4) / x.size, atol=size)
    # a¹ and δ¹ of the dead relu, one of nine; nothing else is 0 throughout.
    np.testing.assert_allclose(statistics.inputs.dead, [0, 1 / 9, 0], rtol=1e-6)
    np.testing.assert_allclose(statistics.errors.dead, [1 / 9, 0, 0], rtol=1e-6)


def test_numbers_known_by_hand_and_an_edge_belongs_to_the_bin_above():
    sweep = fnn.Sweep(
        losses=jnp.zeros(2),
        inputs=(jnp.array([[3.0, 0.0], [-4.0, 0.0]]),),
        errors=(jnp.array([[1.0], [-1.0]]),),
        weights=jnp.full(2, 0.5),
        penalty=None,
        has_bias=(True,),
    )
    inputs, errors = jax.device_get(fnn.layer_statistics(sweep, (1.0, 3.0, 3.5)))
    assert (inputs.mean[0], inputs.rms[0], inputs.dead[0]) == (-0.25, 2.5, 0.5)
    assert (errors.mean[0], errors.rms[0], errors.dead[0]) == (0, 1, 0)
    np.testing.assert_array_equal(inputs.histogram, [[0.5, 0, 0.25, 0.25]])
    np.testing.assert_array_equal(errors.histogram, [[0, 1, 0, 0]])


@pytest.mark.parametrize("size", (1e-30, 1e30))
def test_squares_neither_overflow_nor_vanish(size):
    x = jnp.array([[3.0, 4.0]], jnp.float32) * jnp.float32(size)
    sweep = fnn.Sweep(jnp.zeros(1, jnp.float32), (x,), (x,), jnp.ones(1, jnp.float32), None, (True,))
    statistics = fnn.layer_statistics(sweep)
    np.testing.assert_allclose(statistics.errors.rms[0], np.sqrt(12.5) * size, rtol=1e-6)
    np.testing.assert_allclose(statistics.errors.mean[0], 3.5 * size, rtol=1e-6)


@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_sizes_are_right_on_either_side_of_every_change_of_scale(dtype):
    """A number of every power of two that is neither subnormal nor near overflow, beside smaller ones."""
    info = jnp.finfo(dtype)
    exponents = np.arange(info.minexp + 8, info.maxexp - 8, max(1, info.maxexp // 64))

    @jax.jit
    @jax.vmap
    def of(x):
        sweep = fnn.Sweep(jnp.zeros(16, dtype), (x,), (x,), jnp.ones(16, dtype), None, (True,))
        return fnn.layer_statistics(sweep).errors

    parts = np.random.default_rng(0).uniform(0.1, 1, (16, 500))
    x = np.ldexp(parts[None], exponents[:, None, None]).astype(dtype)
    got = jax.device_get(of(x))
    with np.errstate(all="ignore"):
        exact = np.ldexp(np.sqrt((parts**2).mean()), exponents), np.ldexp(parts.mean(), exponents)
    np.testing.assert_allclose(got.rms[:, 0], exact[0], rtol=20 * float(info.eps))
    np.testing.assert_allclose(got.mean[:, 0], exact[1], rtol=20 * float(info.eps))


def test_nan_and_inf_are_seen():
    x = jnp.array([[1.0, jnp.nan], [jnp.inf, 0.0]])
    sweep = fnn.Sweep(jnp.zeros(2), (x,), (x[:, :1],), jnp.ones(2), None, (True,))
    inputs, errors = fnn.layer_statistics(sweep, (0.5, 2.0))
    assert np.isnan(inputs.rms[0]) and np.isnan(inputs.mean[0])
    assert np.isinf(errors.rms[0]) and np.isinf(errors.mean[0])
    np.testing.assert_array_equal(inputs.histogram, [[0.25, 0.25, 0.5]])


def test_all_zero_is_dead_and_single_examples_count_as_a_batch():
    case = network_case(fnn, Architecture())
    params, X, y = case.draw_one()
    nothing = jax.tree.map(np.zeros_like, (params, X, y))
    dead = fnn.layer_statistics(backprop(case.rule, *nothing))
    for part in dead:
        np.testing.assert_array_equal(part.rms, 0)
        np.testing.assert_array_equal(part.dead, 1)
        np.testing.assert_array_equal(np.asarray(part.histogram)[:, 0], 1)
    X, y = np.asarray(X), np.asarray(y)
    one = fnn.layer_statistics(backprop(case.rule, params, X[0], y[0]))
    rows = fnn.layer_statistics(backprop(case.rule, params, X[:1], y[:1]))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(rows), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


def test_recording_along_a_run_takes_no_memory_but_its_own(standard_promotion):
    """Temporary memory of an epoch as compiled for 784-512-512-10, batch 128, float32; nothing runs.

    Measured: 3.33 MB without, 1.007 times that with statistics recorded in every step (jaxlib 0.10 to 0.12).
    """
    cost = fnn.cost(fnn.mlp(fnn.relu), fnn.softmax_cross_entropy_with_integer_labels)
    optimizer = optax.adam(1e-3)

    def temporary(*record):
        def state():
            params = fnn.init(jax.random.key(0), (784, 512, 512, 10), dtype=np.float32)
            return fnn.train_state(optimizer, params, jax.random.key(0))

        data = jax.ShapeDtypeStruct((1024, 784), np.float32), jax.ShapeDtypeStruct((1024,), np.int32)
        epoch = partial(_epoch, cost, optimizer, (), record, 128, False, None)
        run = jax.jit(partial(_epochs, epoch, False))
        analysis = run.lower(jax.eval_shape(state), data, None, jnp.int32(1)).compile().memory_analysis()
        assert analysis
        return analysis.temp_size_in_bytes

    assert temporary(fnn.layer_statistics) <= 1.01 * temporary()
