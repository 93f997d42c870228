"""The sweep's a^{l-1} and δ^l, example by example, and the gradient made of them."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fnn
from tests import reference
from tests.properties import check_sweep
from tests.strategies import Architecture, architectures, network_case

backprop = jax.jit(fnn.backprop, static_argnums=0)
gradient = jax.jit(fnn.gradient)


def draw_batch(arch: Architecture, seed: int = 0):
    case = network_case(fnn, arch)
    primals = case.draw_one(seed)
    return case, primals, jax.tree.map(np.asarray, primals)


@settings(max_examples=8, deadline=None)
@given(arch=architectures(), seed=st.integers(0, 2**32 - 1))
def test_sweep_has_every_error_and_its_gradient_is_the_costs(arch, seed):
    case, primals, numbers = draw_batch(arch, seed)
    assume(case.smooth(*numbers))
    check_sweep(fnn, case.rule, *primals)


def test_inputs_are_the_activations_of_the_layer_before():
    arch = Architecture(hidden=("tanh", "softmax"))
    case, (params, X, y), (params_, X_, _) = draw_batch(arch)
    sweep = backprop(case.rule, params, X, y)
    np.testing.assert_array_equal(sweep.inputs[0], X)
    forward = reference.network(arch.activations, params_, X_)
    for n, (zs, _) in enumerate(forward):
        for l, name in enumerate(arch.hidden, start=1):
            np.testing.assert_allclose(sweep.inputs[l][n], reference.ACTIVATIONS[name](zs[l - 1]), rtol=1e-13)


def test_errors_follow_layer_order():
    arch = Architecture()
    case, (params, X, y), _ = draw_batch(arch)
    sweep = backprop(case.rule, params, X, y)
    assert [delta.shape[1] for delta in sweep.errors] == list(arch.widths[1:])
    assert [A.shape[1] for A in sweep.inputs] == list(arch.widths[:-1])


def test_last_error_of_squared_error_is_output_minus_target():
    case, (params, X, y), _ = draw_batch(Architecture())
    sweep = backprop(case.rule, params, X, y)
    np.testing.assert_allclose(sweep.errors[-1], case.rule.net(params, X) - y, rtol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
def test_errors_know_nothing_of_weights_and_penalty_but_the_gradient_does(reduction):
    arch = Architecture(weighted=True, l2=0.1, reduction=reduction)
    case, (params, X, y, w), _ = draw_batch(arch)
    sweep = backprop(case.rule, params, X, y, w)
    plain = backprop(case.rule, params, X, y)
    for a, b in zip(sweep.errors, plain.errors, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(sweep.weights, w / (len(X) if reduction == "mean" else w.sum()), rtol=1e-15)
    np.testing.assert_allclose(plain.weights, 1 / len(X), rtol=1e-15)
    check_sweep(fnn, case.rule, params, X, y, w)


def test_sweep_of_one_example_has_no_batch_axis():
    case, (params, X, y), _ = draw_batch(Architecture(l2=0.1))
    sweep = backprop(case.rule, params, X[0], y[0])
    rows = backprop(case.rule, params, X[:1], y[:1])
    assert sweep.losses.shape == () and sweep.errors[0].shape == (5,) and sweep.inputs[0].shape == (3,)
    np.testing.assert_allclose(sweep.errors[1], rows.errors[1][0], rtol=1e-14)
    for a, b in zip(jax.tree.leaves(gradient(sweep)), jax.tree.leaves(gradient(rows)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)


def test_sweep_passes_through_jit_and_vmap():
    case, (params, X, y), _ = draw_batch(Architecture(l2=0.1))
    sweep = fnn.backprop(case.rule, params, X, y)
    compiled = jax.jit(fnn.backprop, static_argnums=0)(case.rule, params, X, y)
    assert jax.tree.structure(compiled) == jax.tree.structure(sweep)
    each = jax.jit(jax.vmap(lambda x, t: fnn.backprop(case.rule, params, x, t)))(X, y)
    for a, b, c in zip(compiled.errors, sweep.errors, each.errors, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13)
        np.testing.assert_allclose(c, b, rtol=1e-13)


def test_gradient_keeps_layers_without_bias():
    case, (params, X, y), _ = draw_batch(Architecture(bias=False))
    without = jax.eval_shape(lambda *args: fnn.gradient(fnn.backprop(case.rule, *args)), params, X, y)
    assert all(layer.b is None for layer in without)
