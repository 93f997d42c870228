"""Forward, cost and their pullbacks under JAX's transformations; dtypes; dead units; no autodiff inside."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from tests.strategies import DTYPES, tolerance


def problem(N=6, widths=(3, 5, 4, 2), dtype="float64", **options):
    """A cost, parameters and a batch: two hidden layers, softmax one of them."""
    keys = jax.random.split(jax.random.key(3), 3)
    params = fnn.init(keys[0], widths, weights=fnn.he_normal, bias=fnn.unit_normal, dtype=dtype)
    net = fnn.mlp([fnn.softmax, fnn.tanh])
    X = jax.random.normal(keys[1], (N, widths[0]), dtype)
    y = jax.random.normal(keys[2], (N, widths[-1]), dtype)
    return fnn.cost(net, fnn.half_squared_error, **options), params, X, y


def assert_same(a, b, rtol=1e-13):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-15)


def value_and_grad(cost, *argnums):
    """Compiled: operation by operation, most of a test's time would be compilation."""
    return jax.jit(fnn.value_and_grad(cost, *argnums))


def test_jit_gives_the_same_numbers():
    cost, *args = problem(l2=0.1)
    assert_same(jax.jit(fnn.value_and_grad(cost))(*args), fnn.value_and_grad(cost)(*args))


def test_vmap_over_members_gives_each_network_its_own():
    cost, params, X, y = problem(l2=0.1)
    members = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    together = jax.vmap(value_and_grad(cost), in_axes=(0, None, None))(members, X, y)
    for i, scale in enumerate((1, 2, -1)):
        alone = value_and_grad(cost)(jax.tree.map(lambda p, s=scale: s * p, params), X, y)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], together), alone)


def test_vmap_over_penalties():
    _, params, X, y = problem()
    net = fnn.mlp([fnn.softmax, fnn.tanh])

    def gradient(l2):
        return value_and_grad(fnn.cost(net, fnn.half_squared_error, l2=l2))(params, X, y)

    together = jax.vmap(gradient)(jnp.array([0.0, 0.3]))
    assert_same(jax.tree.map(lambda leaf: leaf[1], together), gradient(0.3))
    assert_same(jax.tree.map(lambda leaf: leaf[0], together), gradient(0.0))


def test_vmap_over_examples_averages_to_the_batch():
    cost, params, X, y = problem()
    each = jax.vmap(value_and_grad(cost), in_axes=(None, 0, 0))(params, X, y)
    assert_same(jax.tree.map(lambda leaf: leaf.mean(axis=0), each), value_and_grad(cost)(params, X, y))


def test_single_example_is_a_batch_of_one():
    cost, params, X, y = problem(l2=0.1)
    C, (gradient, x_bar) = value_and_grad(cost, (0, 1))(params, X[0], y[0])
    C_batch, (gradient_batch, X_bar) = value_and_grad(cost, (0, 1))(params, X[:1], y[:1])
    assert_same((C, gradient, x_bar), (C_batch, gradient_batch, X_bar[0]))


def test_scan_over_batches_equals_the_loop():
    cost, params, X, y = problem()
    batches = (X.reshape(3, 2, 3), y.reshape(3, 2, 2))

    def step(params, batch):
        C, gradient = value_and_grad(cost)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), C

    by_scan = jax.lax.scan(step, params, batches)
    costs = []
    for batch in zip(*batches, strict=True):
        params, C = step(params, batch)
        costs.append(C)
    assert_same(by_scan, (params, jnp.stack(costs)))


def test_custom_vjp_is_differentiated_by_our_pullback_also_under_checkpoint():
    cost, params, X, y = problem(l2=0.1)
    ours = value_and_grad(cost)(params, X, y)
    function = fnn.as_custom_vjp(cost)
    assert_same(jax.jit(jax.value_and_grad(function))(params, X, y), ours)
    assert_same(jax.jit(jax.value_and_grad(jax.checkpoint(function)))(params, X, y), ours)
    wrong = fnn.Rule(cost.forward, lambda *_: (jax.tree.map(jnp.zeros_like, params), 0 * X, 0 * y))
    zero = jax.jit(jax.grad(fnn.as_custom_vjp(wrong)))(params, X, y)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(zero)), "jax.grad asks the rule, not the forward"


def test_rules_inside_a_custom_vjp_compose_with_autodiff_around_them():
    cost, params, X, y = problem()
    net = fnn.as_custom_vjp(cost.net)
    forward = cost.net.forward

    def around(params):
        return jnp.sum(jnp.sin(net(params, 2 * X)) ** 2)

    def plain(params):
        return jnp.sum(jnp.sin(forward(params, 2 * X)[0]) ** 2)

    assert_same(jax.jit(jax.grad(around))(params), jax.jit(jax.grad(plain))(params))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_survives_gradient_and_update(dtype, standard_promotion):
    cost, params, X, y = problem(dtype=dtype, l2=0.1)
    for optimizer in (optax.sgd(0.1), optax.adam(0.1)):
        state = fnn.train_state(optimizer, params, jax.random.key(0))
        state, C = jax.jit(fnn.train_step, static_argnums=(0, 1))(cost, optimizer, state, X, y)
        assert C.dtype == dtype and all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.params))
        assert not (state.params[0].W == params[0].W).all()


def test_dead_layer_has_zero_gradient_below_and_the_bias_above():
    """Every relu of layer 2 is below its kink: δ² = 0, so layers 1 and 2 rest and layer 3 sees a = 0."""
    net = fnn.mlp(fnn.relu)
    params = fnn.init(jax.random.key(0), (3, 5, 4, 2))
    params = (params[0], params[1]._replace(b=jnp.full(4, -100.0)), params[2])
    X, y = jax.random.normal(jax.random.key(1), (6, 3)), jnp.ones((6, 2))
    _, gradient = value_and_grad(fnn.cost(net, fnn.half_squared_error))(params, X, y)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient[:2]))
    assert (gradient[2].W == 0).all()
    np.testing.assert_allclose(gradient[2].b, [-1, -1], rtol=1e-15)


def test_weight_two_is_an_example_seen_twice():
    cost, params, X, y = problem(N=3, reduction="weighted_mean", l2=0.1)
    twice = value_and_grad(cost)(params, X[jnp.array([0, 1, 1, 2])], y[jnp.array([0, 1, 1, 2])])
    weighted = value_and_grad(cost)(params, X, y, jnp.array([1.0, 2.0, 1.0]))
    assert_same(weighted, twice)
    scaled = value_and_grad(cost)(params, X, y, jnp.array([0.5, 1.0, 0.5]))
    assert_same(scaled, twice)


def test_the_two_weighted_means_differ_by_the_sum_of_weights():
    cost, params, X, y = problem(N=4)
    normalised, *_ = problem(N=4, reduction="weighted_mean")
    w = jnp.array([1.0, 0.0, 3.0, 2.0])
    C, gradient = value_and_grad(cost)(params, X, y, w)
    expected = jax.tree.map(lambda leaf: leaf * 4 / 6, (C, gradient))
    assert_same(value_and_grad(normalised)(params, X, y, w), expected)
    ones = value_and_grad(normalised)(params, X, y, jnp.ones(4))
    assert_same(ones, value_and_grad(cost)(params, X, y))


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
def test_batch_of_weight_zero_costs_nothing_and_moves_nothing(reduction):
    cost, params, X, y = problem(reduction=reduction)
    C, gradient = value_and_grad(cost)(params, X, y, jnp.zeros(6))
    assert C == 0 and all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_weighted_mean_of_one_example_ignores_its_weight():
    cost, params, X, y = problem(N=1, reduction="weighted_mean")
    C, (gradient, w_bar) = value_and_grad(cost, (0, 3))(params, X, y, jnp.array([3.0]))
    assert_same((C, gradient), value_and_grad(cost)(params, X, y))
    np.testing.assert_allclose(w_bar, 0, atol=1e-16)


def test_penalty_is_half_of_l2_times_the_squared_weights_without_biases():
    _, params, X, y = problem()
    net = fnn.mlp([fnn.softmax, fnn.tanh])
    plain, penalised = (fnn.cost(net, fnn.half_squared_error, l2=l2) for l2 in (0.0, 0.2))
    (C, g), (C_l2, g_l2) = (value_and_grad(cost)(params, X, y) for cost in (plain, penalised))
    np.testing.assert_allclose(C_l2 - C, 0.1 * sum((W**2).sum() for W, _ in params), rtol=1e-14)
    for layer, with_l2, (W, _) in zip(g, g_l2, params, strict=True):
        np.testing.assert_allclose(with_l2.W - layer.W, 0.2 * W, atol=1e-15)
        np.testing.assert_array_equal(with_l2.b, layer.b)


def test_deep_linear_network_is_a_product_of_matrices():
    params = fnn.init(jax.random.key(0), (3, 5, 4, 2), bias=None)
    X = jax.random.normal(jax.random.key(1), (6, 3))
    product = params[2].W @ params[1].W @ params[0].W
    np.testing.assert_allclose(fnn.mlp(fnn.identity)(params, X), X @ product.T, rtol=1e-12)


def test_a_whole_step_uses_no_autodiff(monkeypatch, standard_promotion):
    """With JAX's differentiation made to raise, a step of every rule's pullback still runs."""

    def refuse(*args, **kwargs):
        raise AssertionError("autodiff inside fnn")

    for name in (
        "grad",
        "value_and_grad",
        "vjp",
        "jvp",
        "linearize",
        "jacobian",
        "jacfwd",
        "jacrev",
        "hessian",
    ):
        monkeypatch.setattr(jax, name, refuse)
    with pytest.raises(AssertionError, match="autodiff"):
        jax.grad(jnp.sum)(1.0)
    every = [fnn.sigmoid, fnn.tanh, fnn.relu, fnn.leaky_relu(), fnn.elu(), fnn.softplus, fnn.silu]
    every += [fnn.gelu, fnn.gelu_tanh, fnn.softmax, fnn.identity]
    y = jnp.array([0, 1, 1, 0, 1])
    one_hot = jax.nn.one_hot(y, 2)
    losses = [fnn.sigmoid_binary_cross_entropy, fnn.half_squared_error, fnn.squared_error]
    losses += [fnn.mean_squared_error, fnn.mean_absolute_error, fnn.huber_loss()]
    cases = [(every, fnn.identity, fnn.softmax_cross_entropy, one_hot)]
    cases += [([], fnn.identity, fnn.softmax_cross_entropy_with_integer_labels, y)]
    cases += [([], fnn.identity, loss, one_hot) for loss in losses]
    cases += [([], fnn.softmax, fnn.categorical_cross_entropy, one_hot)]
    cases += [([], fnn.sigmoid, fnn.binary_cross_entropy, one_hot)]

    @partial(jax.jit, static_argnums=0)
    def step(cost, state, X, y):
        gradient = fnn.gradient(fnn.backprop(cost, state.params, X, y))
        return fnn.train_step(cost, optax.adam(0.1), state, X, y, jnp.ones(5)), gradient

    for activations, output, loss, target in cases:
        cost = fnn.cost(fnn.mlp(activations, output=output), loss, l2=0.1)
        params = fnn.init(jax.random.key(0), (3, *range(4, 4 + len(activations)), 2))
        state = fnn.train_state(optax.adam(0.1), params, jax.random.key(2))
        X = jax.random.normal(jax.random.key(1), (5, 3))
        (state, C), gradient = step(cost, state, X, target)
        assert jnp.isfinite(C) and not (state.params[0].W == params[0].W).all()
        assert jnp.isfinite(gradient[0].W).all() and gradient[0].W.any()


def test_agreement_holds_where_the_batch_is_as_large_as_a_width():
    """N = n_1 = n_2: a product with the wrong side transposed would have the right shape."""
    cost, params, X, y = problem(N=4, widths=(4, 4, 4, 4))
    autodiff = jax.jit(jax.value_and_grad(cost))(params, X, y)
    assert_same(value_and_grad(cost)(params, X, y), autodiff, rtol=1e-12)


def test_gradient_error_stays_within_rounding_on_a_wide_network():
    """A sum over 784 inputs and 256 examples in float32, against float64."""
    cost, params, X, y = problem(N=256, widths=(784, 64, 32, 10), dtype="float32")
    _, ours = jax.jit(fnn.value_and_grad(cost))(params, X, y)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, X, y))
    _, exact = jax.jit(jax.value_and_grad(cost))(*wide)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert abs(a.astype(jnp.float64) - b).max() <= tolerance("float32", 784) * abs(b).max()
