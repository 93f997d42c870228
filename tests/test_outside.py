"""Rules inside other people's JAX code: plain transformations, shard_map, Equinox, Flax; networks to and fro;
batches of other people's loaders.

Equinox, Flax and Grain are in the extra `others`; without them their tests are skipped (`.ci/run` has them).
TensorFlow and PyTorch, which are large, are in none that a test needs.
"""

from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fnn

ACTIVATIONS = {
    "tanh": (fnn.tanh, jnp.tanh),
    "relu": (fnn.relu, jax.nn.relu),
    "softmax": (fnn.softmax, jax.nn.softmax),
    "gelu": (fnn.gelu, partial(jax.nn.gelu, approximate=False)),
    "silu": (fnn.silu, jax.nn.silu),
}
SIZES, N = (4, 6, 5, 3), 8
X, Y = (np.random.default_rng(seed).standard_normal((N, n)) for seed, n in enumerate((4, 3)))
(X, X32), (Y, Y32) = jax.device_put([(numbers, numbers.astype("float32")) for numbers in (X, Y)])


def library(name: str) -> Any:
    """Another library's module, if it is installed."""
    pytest.importorskip(name.partition(".")[0])
    return import_module(name)


def assert_close(got, want, rtol=1e-12):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def problem(dtype="float64"):
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error, l2=0.1)
    return cost, jax.jit(partial(fnn.init, sizes=SIZES, dtype=dtype))(jax.random.key(0))


def test_a_wrong_slope_arrives():
    """Otherwise the tests below could pass without our pullbacks."""
    twice = fnn.Rule(lambda z: (z, None), lambda _, a_bar: (2 * a_bar,))
    assert jax.grad(fnn.as_custom_vjp(twice))(1.0) == 2
    assert jax.grad(fnn.as_custom_jvp(twice))(1.0) == 2
    assert jax.jvp(fnn.as_custom_jvp(twice), (1.0,), (1.0,))[1] == 2


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_go_through_every_transformation_of_jax(name):
    rule, theirs = ACTIVATIONS[name]
    ours = fnn.as_custom_jvp(rule)
    z, v = X, X[::-1]

    def scalar(activation, z):
        return jnp.sum(jnp.sin(jnp.arange(z.size).reshape(z.shape)) * activation(z) ** 2)

    def everything(activation, z):
        f = partial(scalar, activation)
        row = jax.vmap(jax.hessian(f))(z)
        gradient, tangent = jax.jvp(jax.grad(f), (z,), (v,))
        scanned, _ = jax.lax.scan(lambda z, _: (activation(z), None), z, length=3)
        again = jax.grad(jax.checkpoint(f))(z)
        return activation(z), gradient, tangent, row, jax.jacrev(activation)(z[0]), scanned, again

    assert_close(jax.jit(partial(everything, ours))(z), jax.jit(partial(everything, theirs))(z))
    assert_close(ours(z), theirs(z))


def test_costs_go_through_jit_vmap_grad_and_checkpoint():
    cost, params = problem()
    function = fnn.as_custom_vjp(cost)
    expected = jax.jit(jax.grad(cost))(params, X, Y)
    assert_close(jax.jit(jax.grad(function))(params, X, Y), expected)
    assert_close(jax.jit(jax.grad(jax.checkpoint(function)))(params, X, Y), expected)
    each = jax.jit(jax.vmap(jax.grad(function), in_axes=(None, 0, 0)))(params, X[:, None], Y[:, None])
    assert_close(jax.tree.map(lambda g: np.asarray(g).mean(axis=0), each), expected)
    twice = jax.jit(jax.grad(lambda params: function(params, X, Y) ** 2))(params)
    C = float(jax.jit(cost)(params, X, Y))
    assert_close(twice, jax.tree.map(lambda g: 2 * C * np.asarray(g), expected))


@pytest.mark.parametrize("check_vma", (True, False))
def test_costs_and_activations_go_through_shard_map(check_vma):
    """Parameters equal on all devices, a quarter of the batch on each; with the check of axes and without."""
    cost, params = problem()
    function, activation = fnn.as_custom_vjp(cost), fnn.as_custom_jvp(fnn.gelu)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    expected = jax.jit(jax.grad(cost))(params, X, Y)

    def over_devices(f, out_specs):
        in_specs = (P(), P("devices"), P("devices"))
        return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)

    mean = over_devices(lambda *args: jax.lax.pmean(function(*args), "devices"), P())
    assert_close(jax.jit(jax.grad(mean))(params, X, Y), expected)

    def inside(f):
        """jax.grad on every device; with the check of axes JAX adds the parts up, without it nobody does."""

        def gradient(*args):
            g = jax.grad(f)(*args)
            return jax.tree.map(lambda g: g / 4 if check_vma else jax.lax.pmean(g, "devices"), g)

        return jax.jit(over_devices(gradient, P()))(params, X, Y)

    assert_close(inside(cost), expected)
    assert_close(inside(function), expected)

    def by_hand(*args):
        return jax.lax.pmean(fnn.value_and_grad(cost)(*args)[1], "devices")

    assert_close(jax.jit(over_devices(by_hand, P()))(params, X, Y), expected)
    norms = over_devices(lambda *args: fnn.example_norms(fnn.backprop(cost, *args)), P("devices"))
    assert_close(
        jax.jit(norms)(params, X, Y),
        jax.jit(lambda *a: fnn.example_norms(fnn.backprop(cost, *a)))(params, X, Y),
    )
    slopes = over_devices(lambda _, X, Y: jax.grad(lambda X: jnp.sum(activation(X)))(X), P("devices"))
    assert_close(jax.jit(slopes)(params, X, Y), jax.jit(jax.grad(lambda X: jnp.sum(fnn.gelu(X))))(X))


# Equinox: its MLP has weights (n_out, n_in) and biases, one example at a time.


def equinox_mlp(use_bias: bool) -> Any:
    eqx = library("equinox")
    activation, key = fnn.as_custom_jvp(fnn.gelu), jax.random.key(0)
    options = dict(use_bias=use_bias, use_final_bias=use_bias, dtype=jnp.float32)
    return eqx, eqx.nn.MLP(4, 3, 5, depth=2, activation=activation, key=key, **options)


def parts(model: Any) -> list[Any]:
    return [part for layer in model.layers for part in (layer.weight, layer.bias)]


@pytest.mark.parametrize("use_bias", (True, False))
def test_equinox_networks_become_ours_and_come_back(use_bias):
    eqx, model = equinox_mlp(use_bias)
    params = tuple(fnn.Layer(layer.weight, layer.bias) for layer in model.layers)
    net = fnn.mlp(fnn.gelu)
    assert_close(jax.jit(net)(params, X32), jax.vmap(model)(X32), 1e-6)

    changed = jax.tree.map(lambda x: 2 * x + 1, params)
    back = eqx.tree_at(
        parts, model, [part for layer in changed for part in layer], is_leaf=lambda x: x is None
    )
    assert_close(jax.vmap(back)(X32), jax.jit(net)(changed, X32), 1e-5)
    assert_close(tuple(fnn.Layer(layer.weight, layer.bias) for layer in back.layers), changed, 0)


def test_filter_grad_of_equinox_calls_our_pullbacks():
    eqx, model = equinox_mlp(True)

    def plain(model, X, Y):
        return jnp.mean(jax.vmap(lambda x, y: 0.5 * jnp.sum((model(x) - y) ** 2))(X, Y))

    loss = fnn.as_custom_vjp(fnn.half_squared_error)

    def with_our_loss(model, X, Y):
        return jnp.mean(loss(jax.vmap(model)(X), Y))

    gradients = [eqx.filter_jit(eqx.filter_grad(f))(model, X32, Y32) for f in (plain, with_our_loss)]
    params = tuple(fnn.Layer(layer.weight, layer.bias) for layer in model.layers)
    _, ours = fnn.value_and_grad(fnn.cost(fnn.mlp(fnn.gelu), fnn.half_squared_error))(params, X32, Y32)
    for gradient in gradients:
        assert_close(tuple(fnn.Layer(layer.weight, layer.bias) for layer in gradient.layers), ours, 1e-5)
    # The norm of every example's gradient, of a network that was written there.
    norms = fnn.example_norms(
        fnn.backprop(fnn.cost(fnn.mlp(fnn.gelu), fnn.half_squared_error), params, X32, Y32)
    )
    one = eqx.filter_grad(plain)(model, X32[:1], Y32[:1])
    expected = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(eqx.filter(one, eqx.is_array))))
    np.testing.assert_allclose(norms[0], expected, rtol=1e-5)


def test_a_wrong_slope_arrives_through_equinox():
    eqx = library("equinox")
    twice = fnn.Rule(lambda z: (z, None), lambda _, a_bar: (2 * a_bar,))
    model = eqx.nn.MLP(
        2, 1, 2, depth=1, activation=fnn.as_custom_jvp(twice), key=jax.random.key(0), dtype=jnp.float32
    )
    right = eqx.tree_at(lambda m: m.activation, model, lambda z: z, is_leaf=lambda x: x is model.activation)
    gradients = [eqx.filter_grad(lambda m: m(jnp.ones(2, jnp.float32))[0])(m) for m in (model, right)]
    np.testing.assert_allclose(gradients[0].layers[0].weight, 2 * gradients[1].layers[0].weight, rtol=1e-6)


# Flax NNX: a Linear's kernel is (n_in, n_out).


def flax_linears(use_bias: bool) -> Any:
    nnx = library("flax.nnx")
    rngs = nnx.Rngs(0)
    return nnx, [nnx.Linear(a, b, use_bias=use_bias, rngs=rngs) for a, b in zip(SIZES, SIZES[1:])]


def flax_output(linears, activation, X):
    for linear in linears[:-1]:
        X = activation(linear(X))
    return linears[-1](X)


@pytest.mark.parametrize("use_bias", (True, False))
def test_flax_networks_become_ours_and_go_back(use_bias, standard_promotion):
    _, linears = flax_linears(use_bias)
    params = tuple(fnn.Layer(l.kernel[...].T, l.bias[...] if l.use_bias else None) for l in linears)
    net = fnn.mlp(fnn.tanh)
    assert_close(jax.jit(net)(params, X32), flax_output(linears, jnp.tanh, X32), 1e-6)

    changed = jax.tree.map(lambda x: 2 * x + 1, params)
    for linear, (W, b) in zip(linears, changed, strict=True):
        linear.kernel[...] = W.T
        if b is not None:
            linear.bias[...] = b
    assert_close(flax_output(linears, jnp.tanh, X32), jax.jit(net)(changed, X32), 1e-5)


def test_nnx_grad_calls_our_pullbacks(standard_promotion):
    nnx, linears = flax_linears(True)
    params = tuple(fnn.Layer(l.kernel[...].T, l.bias[...]) for l in linears)
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    _, expected = fnn.value_and_grad(cost)(params, X32, Y32)
    activation, loss = fnn.as_custom_jvp(fnn.tanh), fnn.as_custom_vjp(fnn.half_squared_error)

    class Model(nnx.Module):
        def __init__(self):
            self.linears = nnx.List(linears)

        def __call__(self, X):
            return flax_output(self.linears, activation, X)

    gradient = nnx.jit(nnx.grad(lambda model: jnp.mean(loss(model(X32), Y32))))(Model())
    got = tuple(fnn.Layer(l.kernel[...].T, l.bias[...]) for _, l in sorted(gradient.linears.items()))
    assert_close(got, expected, 1e-5)

    twice = fnn.as_custom_jvp(fnn.Rule(lambda z: (z, None), lambda _, a_bar: (2 * a_bar,)))
    doubled, single = (
        nnx.grad(lambda m: jnp.sum(flax_output(m.linears[:2], f, X32)))(Model())  # noqa: B023
        for f in (twice, lambda z: z)
    )
    np.testing.assert_allclose(doubled.linears[0].kernel[...], 2 * single.linears[0].kernel[...], rtol=1e-5)


# Loaders of data


def grain_batches(x, y):
    return library("grain").MapDataset.source(list(zip(x, y, strict=True))).batch(8)


def tf_batches(x, y):
    return library("tensorflow").data.Dataset.from_tensor_slices((x, y)).batch(8)


def torch_batches(x, y):
    data = library("torch.utils.data")
    tensors = (library("torch").tensor(array) for array in (x, y))
    return data.DataLoader(data.TensorDataset(*tensors), batch_size=8)


@pytest.mark.parametrize("loader", (grain_batches, tf_batches, torch_batches))
def test_batches_of_a_loader_train_as_the_same_arrays_do(loader, standard_promotion):
    """To the last bit; the last batch has 4 examples."""
    x = np.random.default_rng(0).standard_normal((36, 4)).astype("float32")
    y = np.arange(36, dtype="int32") % 3
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels)
    params = fnn.init(jax.random.key(0), SIZES, dtype="float32")

    def trained(batches):
        options: dict[str, Any] = dict(steps_per_epoch=5, progress=False)
        return fnn.fit_batches(cost, optax.adam(0.1), params, batches, **options)

    loaded = trained(loader(x, y))
    arrays = trained([(x[i : i + 8], y[i : i + 8]) for i in range(0, 36, 8)])
    assert len(loaded.seconds) == 1 and np.isfinite(loaded.train["cost"]).all()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, arrays.params)
