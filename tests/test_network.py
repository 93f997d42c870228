"""Forward, cost and their pullbacks under JAX's transformations; dtypes; dead units; no autodiff inside."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from tests.strategies import DTYPES, tolerance


def problem(N=6, widths=(3, 5, 4, 2), dtype="float64", **options):
    """A cost, parameters and a batch: two hidden layers, softmax one of them."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)  # by NumPy: nothing to compile

    layers = zip(widths[:-1], widths[1:], strict=True)
    params = tuple(
        fnn.Layer(jnp.asarray((2 / n) ** 0.5 * rng.standard_normal((m, n)), dtype), normal(m))
        for n, m in layers
    )
    X, y = normal(N, widths[0]), normal(N, widths[-1])
    return fnn.cost(fnn.mlp([fnn.softmax, fnn.tanh]), fnn.half_squared_error, **options), params, X, y


def assert_same(a, b, rtol=1e-13):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-15)


@cache
def value_and_grad(cost, *argnums):
    """Compiled, once for all tests: operation by operation, most of a test's time would be compilation."""
    return jax.jit(fnn.value_and_grad(cost, *argnums))


def nonzero(tree) -> bool:
    """Whether any number is."""
    return any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


def member(tree, i):
    """The i-th of many, along the first axis."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[i], tree)


def test_jit_gives_the_same_numbers():
    """Where all widths and N are equal, so that fewer single operations have to be compiled."""
    cost, *args = problem(N=3, widths=(3, 3, 3, 3), l2=0.1)
    assert_same(value_and_grad(cost)(*args), fnn.value_and_grad(cost)(*args))


def test_vmap_over_members_gives_each_network_its_own():
    cost, params, X, y = problem(l2=0.1)
    members = jax.tree.map(lambda p: np.stack([p, 2 * np.asarray(p), -np.asarray(p)]), params)
    together = jax.vmap(value_and_grad(cost), in_axes=(0, None, None))(members, X, y)
    for i in range(3):
        alone = value_and_grad(cost)(member(members, i), X, y)
        assert_same(member(together, i), alone)


def test_vmap_over_penalties():
    _, params, X, y = problem()
    net = fnn.mlp([fnn.softmax, fnn.tanh])

    def gradient(l2):
        return fnn.value_and_grad(fnn.cost(net, fnn.half_squared_error, l2=l2))(params, X, y)

    together = jax.jit(jax.vmap(gradient))(jnp.array([0.0, 0.3]))
    for i, l2 in enumerate((0.0, 0.3)):
        alone = value_and_grad(fnn.cost(net, fnn.half_squared_error, l2=l2))(params, X, y)
        assert_same(member(together, i), alone)


def test_vmap_over_examples_averages_to_the_batch():
    cost, params, X, y = problem()
    each = jax.vmap(value_and_grad(cost), in_axes=(None, 0, 0))(params, X, y)
    mean = jax.tree.map(lambda leaf: np.asarray(leaf).mean(axis=0), each)
    assert_same(mean, value_and_grad(cost)(params, X, y))


def test_single_example_is_a_batch_of_one():
    cost, params, X, y = problem(l2=0.1)
    X, y = np.asarray(X), np.asarray(y)
    C, (gradient, x_bar) = value_and_grad(cost, (0, 1))(params, X[0], y[0])
    C_batch, (gradient_batch, X_bar) = value_and_grad(cost, (0, 1))(params, X[:1], y[:1])
    assert_same((C, gradient, x_bar), (C_batch, gradient_batch, np.asarray(X_bar)[0]))


def test_scan_over_batches_equals_the_loop():
    cost, params, X, y = problem()
    batches = (np.asarray(X).reshape(3, 2, 3), np.asarray(y).reshape(3, 2, 2))

    @jax.jit
    def step(params, batch):
        C, gradient = fnn.value_and_grad(cost)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), C

    by_scan = jax.lax.scan(step, params, batches)
    costs = []
    for batch in zip(*batches, strict=True):
        params, C = step(params, batch)
        costs.append(C)
    assert_same(by_scan, (params, np.stack(costs)))


def test_custom_vjp_is_differentiated_by_our_pullback_also_under_checkpoint():
    cost, params, X, y = problem(l2=0.1)
    ours = value_and_grad(cost)(params, X, y)
    function = fnn.as_custom_vjp(cost)
    assert_same(jax.jit(jax.value_and_grad(function))(params, X, y), ours)
    assert_same(jax.jit(jax.value_and_grad(jax.checkpoint(function)))(params, X, y), ours)
    wrong = fnn.Rule(cost.forward, lambda *_: (jax.tree.map(jnp.zeros_like, params), 0 * X, 0 * y))
    zero = jax.jit(jax.grad(fnn.as_custom_vjp(wrong)))(params, X, y)
    assert not nonzero(zero), "jax.grad asks the rule, not the forward"


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

    @jax.jit
    def steps(params, key, X, y):
        states = [(o, fnn.train_state(o, params, key)) for o in (optax.sgd(0.1), optax.adam(0.1))]
        return [fnn.train_step(cost, optimizer, state, X, y) for optimizer, state in states]

    for state, C in steps(params, jax.random.key(0), X, y):
        assert C.dtype == dtype and all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.params))
        assert not np.array_equal(state.params[0].W, params[0].W)


def test_dead_layer_has_zero_gradient_below_and_the_bias_above():
    """Every relu of layer 2 is below its kink: δ² = 0, so layers 1 and 2 rest and layer 3 sees a = 0."""
    net = fnn.mlp(fnn.relu)
    _, params, X, _ = problem()
    params = (params[0], params[1]._replace(b=np.full(4, -100.0)), params[2]._replace(b=np.zeros(2)))
    _, gradient = value_and_grad(fnn.cost(net, fnn.half_squared_error))(params, X, np.ones((6, 2)))
    assert not nonzero(gradient[:2]) and not nonzero(gradient[2].W)
    np.testing.assert_allclose(gradient[2].b, [-1, -1], rtol=1e-15)


def test_weight_two_is_an_example_seen_twice():
    cost, params, X, y = problem(N=3, reduction="weighted_mean", l2=0.1)
    twice = value_and_grad(cost)(params, *(np.asarray(a)[[0, 1, 1, 2]] for a in (X, y)))
    weighted = value_and_grad(cost)(params, X, y, np.array([1.0, 2.0, 1.0]))
    assert_same(weighted, twice)
    scaled = value_and_grad(cost)(params, X, y, np.array([0.5, 1.0, 0.5]))
    assert_same(scaled, twice)


def test_the_two_weighted_means_differ_by_the_sum_of_weights():
    cost, params, X, y = problem(N=4)
    normalised, *_ = problem(N=4, reduction="weighted_mean")
    w = np.array([1.0, 0.0, 3.0, 2.0])
    expected = jax.tree.map(lambda leaf: np.asarray(leaf) * 4 / 6, value_and_grad(cost)(params, X, y, w))
    assert_same(value_and_grad(normalised)(params, X, y, w), expected)
    ones = value_and_grad(normalised)(params, X, y, np.ones(4))
    assert_same(ones, value_and_grad(cost)(params, X, y))


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean"])
def test_batch_of_weight_zero_costs_nothing_and_moves_nothing(reduction):
    cost, params, X, y = problem(reduction=reduction)
    assert not nonzero(value_and_grad(cost)(params, X, y, np.zeros(6)))


def test_weighted_mean_of_one_example_ignores_its_weight():
    cost, params, X, y = problem(N=1, reduction="weighted_mean")
    C, (gradient, w_bar) = value_and_grad(cost, (0, 3))(params, X, y, np.array([3.0]))
    assert_same((C, gradient), value_and_grad(cost)(params, X, y))
    np.testing.assert_allclose(w_bar, 0, atol=1e-16)


def test_penalty_is_half_of_l2_times_the_squared_weights_without_biases():
    _, params, X, y = problem()
    net = fnn.mlp([fnn.softmax, fnn.tanh])
    plain, penalised = (fnn.cost(net, fnn.half_squared_error, l2=l2) for l2 in (0.0, 0.2))
    (C, g), (C_l2, g_l2) = (value_and_grad(cost)(params, X, y) for cost in (plain, penalised))
    g, g_l2, params = jax.device_get((g, g_l2, params))
    np.testing.assert_allclose(float(C_l2) - C, 0.1 * sum((W**2).sum() for W, _ in params), rtol=1e-14)
    for layer, with_l2, (W, _) in zip(g, g_l2, params, strict=True):
        np.testing.assert_allclose(with_l2.W - layer.W, 0.2 * W, atol=1e-15)
        np.testing.assert_array_equal(with_l2.b, layer.b)


def test_deep_linear_network_is_a_product_of_matrices():
    _, params, X, _ = problem()
    params = tuple(layer._replace(b=None) for layer in params)
    A, B, C = (np.asarray(layer.W) for layer in params)
    np.testing.assert_allclose(jax.jit(fnn.mlp(fnn.identity))(params, X), X @ (C @ B @ A).T, rtol=1e-12)


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
    y = np.array([0, 1, 1, 0, 1])
    one_hot = np.eye(2)[y]
    losses = [fnn.sigmoid_binary_cross_entropy, fnn.half_squared_error, fnn.squared_error]
    losses += [fnn.mean_squared_error, fnn.mean_absolute_error, fnn.huber_loss()]
    cases = [(every, fnn.identity, fnn.softmax_cross_entropy, one_hot)]
    cases += [([], fnn.identity, fnn.softmax_cross_entropy_with_integer_labels, y)]
    cases += [([], fnn.identity, loss, one_hot) for loss in losses]
    cases += [([], fnn.softmax, fnn.categorical_cross_entropy, one_hot)]
    cases += [([], fnn.sigmoid, fnn.binary_cross_entropy, one_hot)]

    costs = [fnn.cost(fnn.mlp(inner, output=output), loss, l2=0.1) for inner, output, loss, _ in cases]
    widths = [(3, *[4] * len(inner), 2) for inner, *_ in cases]
    networks = jax.jit(lambda key: [fnn.init(key, each) for each in widths])(jax.random.key(0))
    X = np.random.default_rng(0).standard_normal((5, 3))
    adam = optax.adam(0.1)

    @jax.jit
    def steps(networks, key, X, targets):
        results = []
        for cost, params, y in zip(costs, networks, targets, strict=True):
            gradient = fnn.gradient(fnn.backprop(cost, params, X, y))
            state = fnn.train_state(adam, params, key)
            results.append((fnn.train_step(cost, adam, state, X, y, jnp.ones(5)), gradient))
        return results

    results = steps(networks, jax.random.key(2), X, [target for *_, target in cases])
    for ((state, C), gradient), params in zip(results, networks, strict=True):
        assert np.isfinite(C) and not np.array_equal(state.params[0].W, params[0].W)
        assert np.isfinite(gradient[0].W).all() and nonzero(gradient[0].W)


def test_agreement_holds_where_the_batch_is_as_large_as_a_width():
    """N = n_1 = n_2: a product with the wrong side transposed would have the right shape."""
    cost, params, X, y = problem(N=4, widths=(4, 4, 4, 4))
    autodiff = jax.jit(jax.value_and_grad(cost))(params, X, y)
    assert_same(value_and_grad(cost)(params, X, y), autodiff, rtol=1e-12)


def test_gradient_error_stays_within_rounding_on_a_wide_network():
    """A sum over 784 inputs and 256 examples in float32, against float64."""
    cost, params, X, y = problem(N=256, widths=(784, 64, 32, 10), dtype="float32")
    _, ours = jax.jit(fnn.value_and_grad(cost))(params, X, y)
    wide = jax.tree.map(np.float64, (params, X, y))
    _, exact = jax.jit(jax.value_and_grad(cost))(*wide)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        a, b = np.float64(a), np.asarray(b)
        assert abs(a - b).max() <= tolerance("float32", 784) * abs(b).max()
