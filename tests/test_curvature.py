"""Curvature against dense matrices made by autodiff, the R-operator written out, and their invariants."""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

import fnn
from fnn.loss_hessians import draw_loss_gradient
from tests.properties import assert_close
from tests.strategies import INSTANCES, REGRESSION, Architecture, network_case, rules

SEEDS = st.integers(0, 2**32 - 1)
LOSSES = {
    name: case for name, case in rules(fnn).items() if "loss" in name or "error" in name or "cross" in name
}
CONSTANT_HESSIAN = tuple(name for name in REGRESSION if "squared" in name)

ARCHITECTURES = {
    "tanh, relu": Architecture(),
    "softmax inside, weights, penalty": Architecture(
        hidden=("softmax", "tanh"),
        loss="softmax_cross_entropy",
        weighted=True,
        reduction="weighted_mean",
        l2=0.1,
    ),
    "no bias, weights": Architecture(
        hidden=("gelu", "silu"), loss="sigmoid_binary_cross_entropy", bias=False, weighted=True
    ),
    "single layer": Architecture(
        widths=(4, 3), hidden=(), loss="softmax_cross_entropy_with_integer_labels", l2=0.1
    ),
    "softmax output": Architecture(
        hidden=("sigmoid", "elu(0.7)"), output="softmax", loss="categorical_cross_entropy"
    ),
    "sigmoid output": Architecture(
        hidden=("softplus", "leaky_relu(0.3)"), output="sigmoid", loss="binary_cross_entropy"
    ),
    "Huber": Architecture(hidden=("gelu_tanh", "tanh"), loss="huber_loss(1.0)"),
    "one example, its weight": Architecture(
        widths=(2, 4, 3), hidden=("softmax",), loss="softmax_cross_entropy", N=1, weighted=True
    ),
}


@cache
def draw(arch: Architecture, seed: int = 0) -> tuple:
    """(cost, (params, X, y[, sample_weight])), drawn once for every architecture and seed."""
    case = network_case(fnn, arch)
    return case.rule, case.draw_one(seed)


def directions(params, seed: int = 0):
    """Two of them, u and v, along a first axis, as NumPy arrays: to take them apart compiles nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.standard_normal((2, *a.shape)).astype(a.dtype), params)


def flat(tree) -> np.ndarray:
    """All numbers in one row, as `ravel_pytree` orders them."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def rows(uv) -> np.ndarray:
    return np.stack([flat(jax.tree.map(lambda a: np.asarray(a)[i], uv)) for i in range(2)])


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def dense_gauss_newton(cost, params, X, y, *weight) -> jax.Array:
    """Σ c_n J_nᵀ H_n J_n with J_n and H_n from autodiff, c_n from their definition."""
    theta, unravel = ravel_pytree(params)

    def output(theta, x):
        return cost.net(unravel(theta), x)

    J = jax.vmap(jax.jacrev(output), (None, 0))(theta, X)
    H = jax.vmap(jax.hessian(cost.loss))(cost.net(params, X), y)
    c = weight[0] if weight else jnp.ones(len(X))
    c = c / (c.sum() if cost.reduction == "weighted_mean" else len(X))
    return jnp.einsum("n,nkp,nkl,nlq->pq", c, J, H, J)


class Curvature(NamedTuple):
    H: Any  # H u and H v, along a first axis
    G: Any  # G u and G v
    Gv: Any  # with the penalty's curvature
    diagonal: Any
    factors: Any


@partial(jax.jit, static_argnums=0)
def curvature(cost, uv, params, *batch) -> Curvature:
    """Everything at once: u and v stand along a first axis of `uv`, and of their products."""
    return Curvature(
        H=jax.vmap(lambda v: fnn.hessian_product(cost, params, v, *batch))(uv),
        G=jax.vmap(lambda v: fnn.gauss_newton_product(cost, params, v, *batch))(uv),
        Gv=fnn.gauss_newton_product(cost, params, last(uv), *batch, penalty=True),
        diagonal=fnn.gauss_newton_diagonal(cost, params, *batch),
        factors=fnn.kronecker_factors(cost, params, *batch),
    )


def last(uv):
    return jax.tree.map(lambda a: a[-1], uv)  # v


@partial(jax.jit, static_argnums=0)
def products(cost, uv, params, *batch) -> tuple:
    """Without a penalty's curvature and with it: G u and G v, along a first axis; H v, and G v."""
    G = jax.vmap(lambda v: fnn.gauss_newton_product(cost, params, v, *batch))(uv)
    Gv = fnn.gauss_newton_product(cost, params, last(uv), *batch, penalty=True)
    return G, fnn.hessian_product(cost, params, last(uv), *batch), Gv


@partial(jax.jit, static_argnums=0)
def by_autodiff(cost, v, params, *batch) -> tuple:
    """H v, and the dense Gauss–Newton matrix."""
    _, Hv = jax.jvp(jax.grad(lambda params: cost(params, *batch)), (params,), (v,))
    return Hv, dense_gauss_newton(cost, params, *batch)


def block_of_layer(params, l: int) -> np.ndarray:
    """Where [W^l b^l], flattened row by row, stands among all parameters."""
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    places = [
        np.arange(end - leaf.size, end).reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)
    ]
    W, b = jax.tree.unflatten(structure, places)[l]
    return W if b is None else np.concatenate([W, b[:, None]], axis=1)


def weights_only(v, scale: float):
    """The product of the penalty's Hessian."""
    return tuple(layer._replace(W=scale * layer.W, b=None if layer.b is None else 0 * layer.b) for layer in v)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_products_diagonal_and_factors_are_those_of_the_dense_matrices(name, seed):
    arch = ARCHITECTURES[name]
    cost, (params, *batch) = draw(arch, seed)
    uv = directions(params, seed)
    v = last(uv)
    ours = on_host(curvature(cost, uv, params, *batch))
    Hv, G = by_autodiff(cost, v, params, *batch)
    check_products(ours, uv, Hv, G, arch.l2)
    assert jax.tree.structure(ours.diagonal) == jax.tree.structure(params)
    assert_close(flat(ours.diagonal), np.diag(G), "float64", what="diagonal of G", fan_in=16)
    assert flat(ours.diagonal).min() >= 0
    for l, factors in enumerate(ours.factors):
        check_factors(arch, params, l, factors, G)


def check_products(ours, uv, Hv, G, l2=0.0):
    """H v and G v are the references'; both matrices are symmetric, and G has no negative eigenvalue."""
    v, G = last(uv), np.asarray(G)
    assert jax.tree.structure(ours.H) == jax.tree.structure(ours.Gv) == jax.tree.structure(v)
    # What cancels in an entry of G v is as large as |G||v|.
    close = partial(assert_close, dtype="float64", fan_in=len(G), terms=float((abs(G) @ abs(flat(v))).max()))
    close(flat(last(ours.H)), flat(Hv), what="H v")
    close(flat(last(ours.G)), G @ flat(v), what="G v")
    with_penalty = jax.tree.map(np.add, last(ours.G), of_penalty(v, l2))
    close(flat(ours.Gv), flat(with_penalty), what="G v with the penalty")
    for products in (ours.H, ours.G):
        inner = rows(uv) @ rows(products).T  # ⟨u, M v⟩ above the diagonal, ⟨v, M u⟩ below
        assert_close(inner, inner.T, "float64", what="symmetry", fan_in=len(G), terms=float(abs(G).sum()))
    assert inner[0, 0] >= 0 and inner[1, 1] >= 0


def of_penalty(v, l2: float):
    """The product of the penalty's Hessian: λ on the weights, 0 on the biases."""
    return tuple(fnn.Layer(l2 * W, None if b is None else 0 * b) for W, b in v)


def check_factors(arch, params, l, factors, G):
    """For one example G ⊗ A is the layer's block. G is always that of the bias; no eigenvalue is negative."""
    A, errors = map(np.asarray, factors)
    block, G, what = block_of_layer(params, l), np.asarray(G), f"of layer {l + 1}"
    assert A.shape == (block.shape[1],) * 2 and errors.shape == (block.shape[0],) * 2
    if arch.N == 1:
        whole = G[np.ix_(block.ravel(), block.ravel())]
        assert_close(np.kron(errors, A), whole, "float64", what=f"G ⊗ A {what}", fan_in=16)
    if arch.bias:
        of_bias = G[np.ix_(block[:, -1], block[:, -1])]
        assert_close(errors, of_bias, "float64", what=f"G {what}", fan_in=16)
    for factor in (A, errors):
        assert np.linalg.eigvalsh(factor).min() >= -1e-12 * abs(factor).max()


def test_hessian_columns_are_jax_hessians():
    cost, (params, X, y) = draw(Architecture(l2=0.1))
    columns, dense = by_columns_and_by_autodiff(cost, params, X, y)
    assert_close(columns, dense, "float64", what="H", fan_in=16)


@partial(jax.jit, static_argnums=0)
def by_columns_and_by_autodiff(cost, params, *batch) -> tuple:
    theta, unravel = ravel_pytree(params)
    column = jax.vmap(lambda v: ravel_pytree(fnn.hessian_product(cost, params, unravel(v), *batch))[0])
    return column(jnp.eye(theta.size)), jax.hessian(lambda theta: cost(unravel(theta), *batch))(theta)


# The R-operator, written out.


def r_operator(slopes, params, v, X, y, l2) -> list:
    """H v for half the squared error: R{} of the forward lines, then of the backward ones.

    slopes: for every hidden layer, z -> (a, σ′, σ″)
    Source: Pearlmutter (1994), §3; δ is of the example, and 1/N enters at the end.
    """
    A, RA, inputs, Rinputs, layers = X, np.zeros_like(X), [], [], []
    for l, ((W, b), (V, v_b)) in enumerate(zip(params, v, strict=True)):
        inputs.append(A)
        Rinputs.append(RA)
        Z, RZ = A @ W.T + b, A @ V.T + RA @ W.T + v_b
        if l < len(slopes):
            a, slope, bend = slopes[l](Z)
            layers.append((slope, bend, RZ))
            A, RA = a, slope * RZ
        else:
            A, RA = Z, RZ
    delta, Rdelta, result = A - y, RA, []
    for l in reversed(range(len(params))):
        a, Ra, (W, _), (V, _) = inputs[l], Rinputs[l], params[l], v[l]
        RW = Rdelta.T @ a + delta.T @ Ra
        result.append((RW / len(X) + l2 * V, Rdelta.sum(axis=0) / len(X)))
        if l > 0:
            A_bar, RA_bar = delta @ W, delta @ V + Rdelta @ W
            slope, bend, RZ = layers[l - 1]
            delta, Rdelta = slope * A_bar, bend * RZ * A_bar + slope * RA_bar
    return result[::-1]


def tanh_slopes(z):
    a = np.tanh(z)
    return a, 1 - a**2, -2 * a * (1 - a**2)


def sigmoid_slopes(z):
    a = 1 / (1 + np.exp(-z))
    return a, a * (1 - a), a * (1 - a) * (1 - 2 * a)


@partial(jax.jit, static_argnums=0)
def by_us_and_by_autodiff(cost, v, params, *batch) -> tuple:
    _, Hv = jax.jvp(jax.grad(lambda params: cost(params, *batch)), (params,), (v,))
    return fnn.hessian_product(cost, params, v, *batch), Hv


@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_hessian_product_is_the_r_operator(seed):
    cost, (params, X, y) = draw(Architecture(hidden=("tanh", "sigmoid"), l2=0.1), seed)
    v = last(directions(params, seed))
    as_numpy = on_host([params, v, X, y])
    by_hand = r_operator((tanh_slopes, sigmoid_slopes), *as_numpy, l2=0.1)
    by_hand = np.concatenate([np.ravel(a) for layer in by_hand for a in layer])
    for Hv in by_us_and_by_autodiff(cost, v, params, X, y):
        assert_close(flat(Hv), by_hand, "float64", what="H v", fan_in=54)


# Losses.


@cache
def loss_evaluator(name: str):
    loss = LOSSES[name].rule

    @jax.jit
    @jax.vmap
    def evaluate(Z, y, V):
        dense = jax.vmap(jax.hessian(loss))(Z, y)
        return (
            fnn.loss_hessian_product(loss, Z, y, V),
            fnn.loss_hessian_product(own(loss), Z, y, V),
            fnn.loss_hessian_root(loss, Z, y),
            dense,
        )

    return evaluate


def own(loss):
    """The same loss as somebody else's, of which no closed form is known."""
    return fnn.Rule(lambda Z, y: loss.forward(Z, y), lambda residuals, C_bar: loss.pullback(residuals, C_bar))


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=4, deadline=None)
@given(seed=SEEDS)
def test_loss_hessian_and_its_root_are_autodiffs(name, seed):
    rng = np.random.default_rng(seed)
    Z, y = LOSSES[name].draw(rng, (4, 3), "float64")
    V = rng.standard_normal(Z.shape)
    product, by_jvp, S, dense = on_host(loss_evaluator(name)(Z, y, V))
    assert_close(product, np.einsum("inkl,inl->ink", dense, V), "float64", what="H v")
    assert_close(by_jvp, product, "float64", what="H v by the jvp of the pullback")
    assert S.shape == (INSTANCES, 4, 3, 3)
    assert_close(np.einsum("inkc,inlc->inkl", S, S), dense, "float64", what="S Sᵀ")


@pytest.mark.parametrize(
    "z", [(40.0, 0.0, -40.0), (0.0, 300.0, -300.0), (5.0, 5.0, -30.0), (700.0, 0.0, 0.0)]
)
def test_softmax_hessian_keeps_its_digits_where_one_class_has_it_all(z):
    e = [math.exp(v - max(z)) for v in z]
    p = [v / math.fsum(e) for v in e]
    others = [math.fsum(e[:k] + e[k + 1 :]) / math.fsum(e) for k in range(3)]
    want = [[p[k] * others[k] if k == j else -p[k] * p[j] for j in range(3)] for k in range(3)]
    for loss, y in (
        (fnn.softmax_cross_entropy, np.array([0.5, 0.25, 0.25])),
        (fnn.softmax_cross_entropy_with_integer_labels, np.array(1)),
    ):
        S, rows = on_host(root_and_rows(loss, np.array(z), y))
        np.testing.assert_allclose(S @ S.T, want, rtol=1e-13)
        np.testing.assert_allclose(rows, want, rtol=1e-13)


@partial(jax.jit, static_argnums=0)
def root_and_rows(loss, z, y) -> tuple:
    """The loss's Hessian at one z: its root, and its products with the unit vectors."""
    rows = jax.vmap(lambda e: fnn.loss_hessian_product(loss, z, y, e))(jnp.eye(z.size))
    return fnn.loss_hessian_root(loss, z, y), rows


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels"])
def test_hessian_product_is_right_at_equal_logits(loss):
    """As a last layer that starts from zero gives them: no way of finding the largest may leave a trace."""
    cost, (params, X, y) = draw(Architecture(widths=(4, 3), hidden=(), loss=loss))
    params, v = jax.tree.map(np.zeros_like, on_host(params)), last(directions(params))
    _, Hv, Gv = products(cost, jax.tree.map(lambda a: a[None], v), params, X, y)
    np.testing.assert_allclose(flat(Hv), flat(Gv), rtol=1e-13)


def test_sigmoid_hessian_keeps_its_digits():
    S = np.asarray(root(fnn.sigmoid_binary_cross_entropy, np.array([40.0, -40.0, 0.0, -700.0]), np.ones(4)))
    want = [math.exp(-40) / (1 + math.exp(-40)) ** 2] * 2 + [0.25, math.exp(-700)]
    np.testing.assert_allclose(np.diag(S @ S.T), want, rtol=1e-14)


root = jax.jit(fnn.loss_hessian_root, static_argnums=0)
product = jax.jit(fnn.loss_hessian_product, static_argnums=0)


def test_losses_on_probabilities_have_no_curvature_where_a_label_has_no_share():
    P, y = jnp.array([[0.0, 0.5, 0.5]]), jnp.array([[0.0, 0.0, 1.0]])
    ones = jnp.ones_like(P)
    got = fnn.loss_hessian_product(fnn.categorical_cross_entropy, P, y, ones)
    np.testing.assert_array_equal(got, [[0, 0, 4]])
    got = fnn.loss_hessian_product(fnn.binary_cross_entropy, P, y, ones)
    np.testing.assert_array_equal(got, [[1, 4, 4]])


def test_huber_bends_within_its_knees_and_absolute_errors_nowhere():
    e, ones = np.array([[0.0, -0.4, 0.5, 3.0]]), np.ones((1, 4))
    for loss, want in (
        (fnn.huber_loss(0.5), [[0.25, 0.25, 0, 0]]),
        (fnn.mean_absolute_error, [[0, 0, 0, 0]]),
    ):
        np.testing.assert_array_equal(product(loss, e, 0 * e, ones), want)
        diagonal = np.asarray(root(loss, e, 0 * e))[0].diagonal()
        np.testing.assert_array_equal(diagonal, np.sqrt(want[0]))


waves = fnn.Rule(  # curved both ways, each output by the next
    lambda z, y: (jnp.sum(jnp.cos(z) * jnp.roll(z, 1, axis=-1), axis=-1), (z, y)),
    lambda residuals, C_bar: (
        C_bar[..., None]
        * (
            -jnp.sin(residuals[0]) * jnp.roll(residuals[0], 1, axis=-1)
            + jnp.roll(jnp.cos(residuals[0]), -1, axis=-1)
        ),
        jnp.zeros_like(residuals[1]),
    ),
)


def test_loss_of_ones_own_has_products_of_either_sign_and_no_root():
    rng = np.random.default_rng(0)
    Z, V = (jnp.asarray(rng.standard_normal((5, 3)), "float64") for _ in range(2))
    dense, got = jax.jit(
        lambda Z, V: (jax.vmap(jax.hessian(waves))(Z, Z), fnn.loss_hessian_product(waves, Z, Z, V))
    )(Z, V)
    assert_close(got, np.einsum("nkl,nl->nk", dense, V), "float64", what="H v")
    cost = fnn.cost(fnn.mlp(fnn.tanh), waves)
    params = draw(Architecture(widths=(3, 4, 3)))[1][0]
    v = last(directions(params))
    _, G = by_autodiff(cost, v, params, Z, Z)
    Gv = jax.jit(partial(fnn.gauss_newton_product, cost))(params, v, Z, Z)
    assert_close(flat(Gv), G @ flat(v), "float64", what="G v", fan_in=31)
    for call in (fnn.gauss_newton_diagonal, fnn.kronecker_factors):
        with pytest.raises(
            TypeError, match="loss_hessian_root: needs a loss of fnn.*negative curvature there is none"
        ):
            jax.eval_shape(partial(call, cost), params, Z, Z)


# Networks.

running_sums = fnn.Rule(  # a Jacobian that is not symmetric
    lambda z: (jnp.cumsum(jnp.sin(z), axis=-1), z),
    lambda z, a_bar: (jnp.cos(z) * jnp.cumsum(a_bar[..., ::-1], axis=-1)[..., ::-1],),
)
straight_through = fnn.Rule(lambda z: (jnp.round(z), None), lambda residuals, a_bar: (a_bar,))


def test_gauss_newton_is_right_for_an_activation_whose_jacobian_is_not_symmetric():
    _, (params, X, y) = draw(Architecture())
    cost = fnn.cost(fnn.mlp(running_sums), fnn.half_squared_error)
    uv = directions(params)
    ours = on_host(curvature(cost, uv, params, X, y))
    Hv, G = by_autodiff(cost, last(uv), params, X, y)
    check_products(ours, uv, Hv, G)
    assert_close(flat(ours.diagonal), np.diag(G), "float64", what="diagonal", fan_in=16)


def test_gauss_newton_is_symmetric_for_a_pullback_that_is_not_the_derivative():
    _, (params, X, y) = draw(Architecture())
    cost = fnn.cost(fnn.mlp([straight_through, fnn.tanh]), fnn.half_squared_error)
    uv = directions(params)
    G, _, Gv = on_host(products(cost, uv, params, X, y))
    (_, uGv), (vGu, vGv) = rows(uv) @ rows(G).T
    np.testing.assert_allclose(uGv, vGu, rtol=1e-12)
    assert vGv > 0 and abs(Gv[0].W).min() > 0


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "huber_loss(1.0)"])
def test_gauss_newton_is_the_hessian_where_the_network_is_linear(loss):
    arch = Architecture(widths=(4, 3), hidden=(), loss=loss, weighted=True, l2=0.1)
    cost, (params, *batch) = draw(arch)
    _, Hv, Gv = products(cost, directions(params), params, *batch)
    assert_close(flat(Gv), flat(Hv), "float64", what="G v", fan_in=16)


def test_diagonals_of_gauss_newton_and_hessian_agree_where_the_network_is_piecewise_linear():
    cost, (params, X, y) = draw(Architecture(hidden=("relu", "identity"), loss="softmax_cross_entropy"))

    @jax.jit
    def run(params):
        theta, unravel = ravel_pytree(params)
        hessian = jax.hessian(lambda theta: cost(unravel(theta), X, y))(theta)
        G = dense_gauss_newton(cost, params, X, y)
        return fnn.gauss_newton_diagonal(cost, params, X, y), hessian, G

    diagonal, dense, G = on_host(run(params))
    assert abs(dense - G).max() > 0.01
    assert_close(flat(diagonal), np.diag(dense), "float64", what="diagonal", fan_in=16)


@pytest.mark.parametrize("loss", CONSTANT_HESSIAN)
def test_kronecker_factors_of_a_single_layer_under_a_squared_error_are_exact(loss):
    cost, (params, X, y, w) = draw(Architecture(widths=(4, 3), hidden=(), loss=loss, weighted=True))
    ((A, G),), dense = jax.jit(
        lambda *args: (fnn.kronecker_factors(cost, *args), dense_gauss_newton(cost, *args))
    )(params, X, y, w)
    block = block_of_layer(params, 0).ravel()
    dense = np.asarray(dense)[np.ix_(block, block)]
    assert_close(np.kron(G, A), dense, "float64", what="G ⊗ A", fan_in=16)


def test_kronecker_inverse_is_applied_from_both_sides():
    cost, (params, X, y) = draw(Architecture(widths=(4, 3), hidden=(), N=7))
    ((A, G),) = on_host(jax.jit(partial(fnn.kronecker_factors, cost))(params, X, y))
    gradient = np.arange(15.0).reshape(3, 5)
    whole = np.linalg.solve(np.kron(G, A), gradient.ravel()).reshape(3, 5)
    np.testing.assert_allclose(np.linalg.solve(G, gradient) @ np.linalg.inv(A), whole, rtol=1e-9)


def test_sample_weights_of_zero_leave_nothing():
    arch = Architecture(weighted=True, reduction="weighted_mean", loss="softmax_cross_entropy")
    cost, (params, X, y, w) = draw(arch)
    for leaf in jax.tree.leaves(curvature(cost, directions(params), params, X, y, 0 * np.asarray(w))):
        np.testing.assert_array_equal(leaf, 0)


# Draws.

KEYS = 2000


def check_mean(draws, want):
    """Their mean within four standard errors of what is wanted."""
    draws = np.asarray(draws)
    error = draws.std(axis=0) / len(draws) ** 0.5
    assert (abs(draws.mean(axis=0) - want) <= 4 * error + 1e-12).all()


@pytest.mark.parametrize("name", LOSSES)
def test_drawn_loss_gradients_have_mean_zero_and_the_hessian_for_covariance(name):
    loss = LOSSES[name].rule
    Z, y = (np.asarray(a)[0, :2] for a in LOSSES[name].draw(np.random.default_rng(1), (4, 3), "float64"))

    @jax.jit
    def run(key, Z, y):
        draws = jax.vmap(lambda key: draw_loss_gradient(key, loss, Z, y))(jax.random.split(key, KEYS))
        return draws, fnn.loss_hessian_root(loss, Z, y)

    g, S = on_host(run(jax.random.key(0), Z, y))
    check_mean(g, 0)
    check_mean(g[..., :, None] * g[..., None, :], S @ S.swapaxes(1, 2))


def test_drawn_gradients_on_logits_are_those_of_drawn_labels():
    loss = fnn.softmax_cross_entropy_with_integer_labels

    @jax.jit
    def run(key, Z, y):
        g = draw_loss_gradient(key, loss, Z, y)
        labels = jnp.argmin(g, axis=-1)
        losses, residuals = loss.forward(Z, labels)
        return g, labels, loss.pullback(residuals, jnp.ones_like(losses))[0]

    g, labels, expected = run(jax.random.key(3), np.array([[1.0, 0.0, -1.0]] * 50), np.zeros(50, int))
    assert set(labels.tolist()) == {0, 1, 2}
    np.testing.assert_allclose(g, expected, rtol=1e-14)


def test_drawn_kronecker_factors_are_the_exact_ones_on_average():
    arch = Architecture(widths=(3, 4, 2), hidden=("tanh",), loss="softmax_cross_entropy", weighted=True)
    cost, (params, *batch) = draw(arch)

    @jax.jit
    def run(key, *args):
        keys = jax.random.split(key, KEYS)
        drawn = jax.vmap(lambda key: fnn.kronecker_factors(cost, *args, key=key))(keys)
        return fnn.kronecker_factors(cost, *args), drawn

    exact, drawn = on_host(run(jax.random.key(0), params, *batch))
    for (A, G), (As, Gs) in zip(exact, drawn, strict=True):
        np.testing.assert_allclose(As[0], A, rtol=1e-13)
        check_mean(Gs, G)


# Shapes, dtypes, transformations.

SHALLOW = Architecture(widths=(3, 5, 2), hidden=("softmax",), loss="sigmoid_binary_cross_entropy", l2=0.1)


def test_one_example_is_a_batch_of_one():
    cost, (params, X, y) = draw(SHALLOW)
    uv = directions(params)
    X, y = np.asarray(X), np.asarray(y)
    one, rows = (curvature(cost, uv, params, *batch) for batch in ((X[0], y[0]), (X[:1], y[:1])))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(rows), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def test_vmap_over_networks_changes_nothing():
    cost, (params, X, y) = draw(SHALLOW)
    uv, networks = directions(params), (params, jax.tree.map(lambda a: 2 * a, on_host(params)))
    each = stack(*(curvature(cost, uv, params, X, y) for params in networks))
    together = jax.vmap(partial(curvature, cost), (None, 0, None, None))(uv, stack(*networks), X, y)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def stack(*trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_dtypes_are_kept_and_near_float64(dtype):
    cost, (params, *batch) = draw(SHALLOW)
    given = on_host((last(directions(params)), params, *batch))
    narrow = jax.tree.map(lambda a: a.astype(jnp.dtype(dtype)), given)
    wide = jax.tree.map(lambda a: a.astype("float64"), narrow)
    got, want = with_hessian(cost, *narrow), with_hessian(cost, *wide)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.dtype(dtype)
        assert_close(a, b, dtype, what=dtype, fan_in=9, terms=1.0)  # inputs, and what cancels, are about 1


@partial(jax.jit, static_argnums=0)
def with_hessian(cost, v, params, *batch) -> tuple:
    return fnn.hessian_product(cost, params, v, *batch), of_gauss_newton(cost, v, params, *batch)


def of_gauss_newton(cost, v, params, *batch) -> tuple:
    return (
        fnn.gauss_newton_product(cost, params, v, *batch),
        fnn.gauss_newton_diagonal(cost, params, *batch),
        fnn.kronecker_factors(cost, params, *batch),
    )


def test_float16_keeps_the_curvature_of_a_large_batch():
    """c_n = 2⁻¹⁴ times a small error is below float16's smallest number; their sum over the batch is not."""
    N = 2**14
    params = (fnn.Layer(jnp.ones((1, 1), jnp.float16), jnp.zeros(1, jnp.float16)),)
    v = jax.tree.map(lambda a: jnp.full_like(a, 2.0**-12), params)
    cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    Gv = fnn.gauss_newton_product(
        cost, params, v, jnp.ones((N, 1), jnp.float16), jnp.zeros((N, 1), jnp.float16)
    )
    np.testing.assert_array_equal(flat(Gv), 2.0**-11)


def test_gauss_newton_uses_no_autodiff(monkeypatch):
    cost, (params, *batch) = draw(ARCHITECTURES["softmax inside, weights, penalty"])
    v = last(directions(params))

    def refuse(*args, **kwargs):
        raise AssertionError("autodiff")

    for name in ("grad", "value_and_grad", "vjp", "jvp", "linearize", "jacfwd", "jacrev", "hessian"):
        monkeypatch.setattr(jax, name, refuse)
    with pytest.raises(AssertionError, match="autodiff"):
        jax.eval_shape(partial(fnn.hessian_product, cost), params, v, *batch)

    @jax.jit
    def run(v, params, *batch):
        drawn = fnn.kronecker_factors(cost, params, *batch, key=jax.random.key(0))
        return of_gauss_newton(cost, v, params, *batch), drawn

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(v, params, *batch)))


def test_diagonal_needs_a_four_hundredth_of_the_memory_of_jacobians():
    """784-128-128-10, softmax cross-entropy, 64 examples: what XLA sets aside, from compilation alone."""
    net = fnn.mlp(fnn.tanh)
    cost = fnn.cost(net, fnn.softmax_cross_entropy)
    params = jax.eval_shape(partial(fnn.init, sizes=(784, 128, 128, 10), dtype="float32"), jax.random.key(0))
    X, y = (jax.ShapeDtypeStruct((64, n), jnp.float32) for n in (784, 10))

    needs = jax.jit(partial(fnn.gauss_newton_diagonal, cost)).lower(params, X, y).compile().memory_analysis()
    Js = jax.eval_shape(jax.vmap(jax.jacrev(net), (None, 0)), params, X)
    size = sum(J.size * J.dtype.itemsize for J in jax.tree.leaves(Js))
    assert needs is not None and size >= 400 * needs.temp_size_in_bytes


def test_five_damped_newton_steps_beat_fifty_gradient_steps_of_any_size():
    """(G + μ) step = ∂C/∂θ by conjugate gradients, on inputs of three scales."""
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)

    @jax.jit
    def problem():
        X = jax.random.normal(jax.random.key(1), (32, 3)) * jnp.array([[1.0, 10.0, 0.1]])
        y = fnn.mlp(fnn.tanh)(fnn.init(jax.random.key(2), (3, 4, 2)), X)
        return X, y, fnn.init(jax.random.key(0), (3, 8, 2))

    X, y, start = problem()

    def newton(params, _):
        C, gradient = fnn.value_and_grad(cost)(params, X, y)

        def damped(v):
            Gv = fnn.gauss_newton_product(cost, params, v, X, y)
            return jax.tree.map(lambda Gv, v: Gv + 0.01 * v, Gv, v)

        step, _ = jax.scipy.sparse.linalg.cg(damped, gradient, maxiter=50)
        return jax.tree.map(jnp.subtract, params, step), C

    def descend(size):
        def step(params, _):
            _, gradient = fnn.value_and_grad(cost)(params, X, y)
            return jax.tree.map(lambda p, g: p - size * g, params, gradient), None

        return cost(jax.lax.scan(step, start, length=50)[0], X, y)

    @jax.jit
    def run(start, sizes):
        end, costs = jax.lax.scan(newton, start, length=5)
        return jnp.append(costs, cost(end, X, y)), jax.vmap(descend)(sizes)

    costs, descended = on_host(run(start, 2.0 ** np.arange(-8.0, 3.0)))
    assert (np.diff(costs) < 0).all() and costs[-1] < costs[0] / 100
    assert costs[-1] < descended.min() / 2


# Bad input.

NET = fnn.mlp(fnn.tanh)
COST: Any = fnn.cost(NET, fnn.half_squared_error)


def layers(*widths: int) -> Any:
    shapes = zip(widths[1:], widths[:-1], strict=True)
    return tuple(fnn.Layer(jnp.ones(shape), jnp.ones(shape[0])) for shape in shapes)


@pytest.mark.parametrize("product", [fnn.hessian_product, fnn.gauss_newton_product])
@pytest.mark.parametrize(
    ("v", "error", "message"),
    [
        (lambda p: p[:1], TypeError, "v needs to be a tuple of fnn.Layer like params"),
        (lambda p: [*p], TypeError, "v needs to be a tuple of fnn.Layer like params"),
        (lambda p: tuple(fnn.Layer(W) for W, _ in p), TypeError, "with b=None where they have it"),
        (lambda p: None, TypeError, "v needs to be a tuple of fnn.Layer like params"),
        (lambda p: layers(3, 4, 2), ValueError, r"v\[0\].W needs to be like params', float64 \(5, 3\)"),
        (lambda p: (p[0], p[1]._replace(W=p[1].W.T)), ValueError, r"v\[1\].W .* got float64 \(5, 2\)"),
        (lambda p: jax.tree.map(lambda a: a.astype("float32"), p), ValueError, r"got float32 \(5, 3\)"),
        (lambda p: jax.tree.map(lambda a: a.astype(int), p), ValueError, r"got int64 \(5, 3\)"),
    ],
)
def test_direction_unlike_the_parameters_is_refused(no_shape_annotations, product, v, error, message):
    params = layers(3, 5, 2)
    with pytest.raises(error, match=rf"^{product.__name__}: .*{message}"):
        product(COST, params, v(params), jnp.ones((4, 3)), jnp.ones((4, 2)))


@pytest.mark.parametrize("function", [fnn.hessian_product, fnn.gauss_newton_product])
def test_arguments_of_the_cost_are_checked_by_the_cost(no_shape_annotations, function):
    params = layers(3, 5, 2)
    with pytest.raises(ValueError, match="mlp: X needs shape"):
        function(COST, params, params, jnp.ones((4, 4)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="half_squared_error: z and y need equal shapes"):
        function(COST, params, params, jnp.ones((4, 3)), jnp.ones((4, 3)))
    with pytest.raises(TypeError, match=f"{function.__name__}: params needs to be a tuple"):
        function(COST, [], [], jnp.ones((4, 3)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    "cost",
    [NET, fnn.half_squared_error, None, lambda params, X, y: 0.0]
    + [fnn.cost(fnn.Rule(lambda params, X: (X, None), lambda r, A_bar: (None, A_bar)), fnn.squared_error)],
)
def test_what_is_no_cost_of_an_mlp_is_refused(no_shape_annotations, cost):
    params, X, y = layers(3, 5, 2), jnp.ones((4, 3)), jnp.ones((4, 2))
    message = ": cost needs to be made by fnn.cost, of a network made by fnn.mlp; got"
    for product in (fnn.hessian_product, fnn.gauss_newton_product):
        with pytest.raises(TypeError, match=f"^{product.__name__}{message}"):
            product(cost, params, params, X, y)
    for function in (fnn.gauss_newton_diagonal, fnn.kronecker_factors):
        with pytest.raises(TypeError, match=f"^{function.__name__}{message}"):
            function(cost, params, X, y)


def test_wrong_arguments_of_the_losses_hessians_are_refused(no_shape_annotations):
    Z, y = jnp.ones((4, 3)), jnp.ones((4, 3))
    directions: Any = (Z[0], Z.T, Z.astype("float32"), 1.0)
    for V in directions:
        with pytest.raises(
            ValueError, match=r"loss_hessian_product: V needs to be like Z.*float64 \(4, 3\); got"
        ):
            fnn.loss_hessian_product(fnn.squared_error, Z, y, V)
    bad: Any = jnp.sin
    with pytest.raises(TypeError, match="loss_hessian_root: the loss needs to be a rule"):
        fnn.loss_hessian_root(bad, Z, y)
    with pytest.raises(ValueError, match="squared_error: z and y need equal shapes"):
        fnn.loss_hessian_root(fnn.squared_error, Z, y[0])


def test_key_that_is_none_is_refused(no_shape_annotations):
    bad: Any = 0
    with pytest.raises(TypeError, match="kronecker_factors: key needs to be one PRNG key"):
        fnn.kronecker_factors(COST, layers(3, 5, 2), jnp.ones((4, 3)), jnp.ones((4, 2)), key=bad)
