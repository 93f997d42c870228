"""Products in 16 bits of parameters in 32: as right as their roundings allow, and what is wide stays wide."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn

SIZES = (6, 11, 7, 4)
NARROW = [jnp.bfloat16, jnp.float16]
# A weight, an activation and an error are rounded once each in every layer, by half a unit in the last place.
UNITS = 3 * (len(SIZES) - 1)


@pytest.fixture(scope="module")
def problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = fnn.init(keys[0], SIZES, dtype=jnp.float32)
    params = tuple(fnn.Layer(W, jnp.full(len(W), 0.1, W.dtype)) for W, _ in params)
    X = jax.random.normal(keys[1], (64, SIZES[0]), jnp.float32)
    return params, X, jax.random.randint(keys[2], (64,), 0, SIZES[-1])


def cost_in(dtype, activation=fnn.tanh, **options):
    return fnn.cost(
        fnn.mlp(activation, dtype=dtype), fnn.softmax_cross_entropy_with_integer_labels, **options
    )


def distance(tree, other):
    """‖difference‖ / ‖other‖ over all arrays, in float64."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    squares = [(np.sum((np.float64(a) - np.float64(b)) ** 2), np.sum(np.float64(b) ** 2)) for a, b in pairs]
    difference, size = np.sum(squares, axis=0)
    return np.sqrt(difference / size)


def plain_forward(dtype, params, X):
    """The same network in plain JAX, for autodiff: products of casts, summed in 32 bits."""
    A = X
    for l, (W, b) in enumerate(params):
        Z = jnp.matmul(A.astype(dtype), W.astype(dtype).T, preferred_element_type=jnp.float32) + b[None]
        A = Z if l == len(params) - 1 else jnp.tanh(Z.astype(dtype))
    return A


@pytest.mark.parametrize("dtype", NARROW)
def test_gradient_is_that_of_32_bits_up_to_the_roundings(problem, dtype):
    C, gradient = fnn.value_and_grad(cost_in(dtype))(*problem)
    C_wide, wide = fnn.value_and_grad(cost_in(None))(*problem)
    unit = float(jnp.finfo(dtype).eps) / 2
    assert 0 < abs(C - C_wide) < UNITS * unit
    assert distance(gradient, wide) < UNITS * unit
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", NARROW)
def test_gradient_is_no_further_off_than_that_of_autodiff_through_casts(problem, dtype):
    params, X, y = problem

    def cost(params):
        outputs = plain_forward(dtype, params, X)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    _, wide = fnn.value_and_grad(cost_in(None))(*problem)
    _, ours = fnn.value_and_grad(cost_in(dtype))(*problem)
    assert distance(ours, wide) < 1.1 * distance(jax.grad(cost)(params), wide)
    np.testing.assert_array_equal(fnn.mlp(fnn.tanh, dtype=dtype)(params, X).dtype, jnp.float32)


@pytest.mark.parametrize("dtype", NARROW)
def test_gradient_has_more_digits_than_16_bits_hold(problem, dtype):
    """The sums of BP3 and BP4 go into the optimiser as they are."""
    _, gradient = fnn.value_and_grad(cost_in(dtype))(*problem)
    numbers = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])
    assert (numbers.astype(dtype).astype(jnp.float32) != numbers).mean() > 0.9


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_sweep_of_float16_has_errors_of_any_size(problem, size):
    params, X, _ = problem
    y = jnp.full((len(X), SIZES[-1]), size, jnp.float32)
    weight = jnp.full(len(X), 1 / size, jnp.float32)
    gradients = []
    for dtype in (jnp.float16, None):
        zero_last = (*params[:-1], jax.tree.map(jnp.zeros_like, params[-1]))
        cost = fnn.cost(fnn.mlp(fnn.tanh, dtype=dtype), fnn.half_squared_error)
        gradients.append(fnn.gradient(fnn.backprop(cost, zero_last, X, y, weight)))
    assert distance(*gradients) < UNITS * float(jnp.finfo(jnp.float16).eps) / 2


def test_float16_keeps_errors_far_below_its_smallest_number(problem):
    """A loss divided by 2²⁶, whose errors are below 6·10⁻⁸: the gradient is that of the loss, divided."""
    params, X, y = problem
    _, gradient = fnn.value_and_grad(cost_in(jnp.float16))(params, X, y)
    net = fnn.mlp(fnn.tanh, dtype=jnp.float16)
    A, residuals = net.forward(params, X)
    A_bar = (jax.nn.softmax(A) - jax.nn.one_hot(y, SIZES[-1], dtype=A.dtype)) / len(y)
    small = net.pullback(residuals, A_bar * 2.0**-26)
    usual = net.pullback(residuals, A_bar)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(usual), strict=True):
        np.testing.assert_array_equal(a * 2.0**26, b)
    assert distance(usual[0], gradient) < 1e-5


@pytest.mark.parametrize("value", [0.0, jnp.inf, jnp.nan])
def test_float16_passes_on_what_has_no_size(problem, value):
    params, X, _ = problem
    net = fnn.mlp(fnn.tanh, dtype=jnp.float16)
    A, residuals = net.forward(params, X)
    params_bar, X_bar = net.pullback(residuals, jnp.full_like(A, value))
    for leaf in (X_bar, *jax.tree.leaves(params_bar)):
        assert (leaf == 0).all() if value == 0 else not jnp.isfinite(leaf).any()


@pytest.mark.parametrize("dtype", NARROW)
def test_the_sweep_gives_the_same_gradient_and_norms(problem, dtype):
    cost = cost_in(dtype, l2=1e-2)
    sweep = fnn.backprop(cost, *problem)
    _, gradient = fnn.value_and_grad(cost)(*problem)
    assert {a.dtype for a in (*sweep.inputs, *sweep.errors)} == {jnp.dtype(jnp.float32)}
    unit = float(jnp.finfo(dtype).eps) / 2
    assert distance(fnn.gradient(sweep), gradient) < UNITS * unit
    wide = fnn.example_norms(fnn.backprop(cost_in(None, l2=1e-2), *problem))
    assert distance(fnn.example_norms(sweep), wide) < UNITS * unit
    assert fnn.clipped_gradient(sweep, 0.1)[0].W.dtype == jnp.float32


def test_curvature_is_that_of_32_bits_to_the_last_bit(problem):
    params, X, y = problem
    for function in (fnn.hessian_product, fnn.gauss_newton_product):
        narrow, wide = (function(cost_in(dtype), params, params, X, y) for dtype in (jnp.bfloat16, None))
        for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", NARROW)
def test_small_updates_are_not_lost(problem, dtype):
    """Steps of 1e-5 on weights near 1 leave 16-bit parameters where they are; these move, and learn."""
    params, X, y = problem
    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    options: dict[str, Any] = dict(key=jax.random.key(1), batch_size=32, progress=False)
    sgd = optax.sgd(1e-5)
    mixed = fnn.fit(cost_in(dtype), sgd, params, (X, y), epochs=3, **options).params
    stuck = fnn.fit(cost_in(None), sgd, narrow, (X.astype(dtype), y), epochs=3, **options).params
    moved = [np.mean(a != b) for a, b in zip(jax.tree.leaves(mixed), jax.tree.leaves(params), strict=True)]
    kept = [np.mean(a == b) for a, b in zip(jax.tree.leaves(stuck), jax.tree.leaves(narrow), strict=True)]
    assert min(moved) > 0.9 and np.mean(kept) > 0.7

    learned = fnn.fit(cost_in(dtype), optax.adam(0.02), params, (X, y), epochs=20, **options)
    wide = fnn.fit(cost_in(None), optax.adam(0.02), params, (X, y), epochs=20, **options)
    assert abs(learned.train["cost"][-1] - wide.train["cost"][-1]) < 0.05 * wide.train["cost"][0]


def test_all_products_of_a_step_are_of_two_narrow_matrices_that_lie_row_by_row(problem):
    """So on a CPU in bfloat16, whose kernels take no others: 3 L - 1 products, no transposed operand."""
    params, X, y = problem

    def text(dtype):
        gradient = jax.jit(lambda params: fnn.value_and_grad(cost_in(dtype))(params, X, y)[1])
        text = gradient.lower(params).compile().as_text()
        return [line for line in (text or "").splitlines() if " dot(" in line]

    plain = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert all(plain in line for line in text(jnp.bfloat16))
    assert not all(plain in line for line in text(None))


@pytest.mark.parametrize(
    "dtype, message",
    [
        (jnp.int32, "jnp.bfloat16, float16 or float32, got dtype"),
        ("bf17", "jnp.bfloat16, float16 or float32, got 'bf17'"),
        (jnp.complex64, "jnp.bfloat16, float16 or float32"),
    ],
)
def test_other_dtypes_are_refused(dtype, message):
    with pytest.raises(TypeError, match=f"mlp: dtype needs to be {message}"):
        fnn.mlp(fnn.tanh, dtype=dtype)


def test_wider_products_than_parameters_are_refused(problem):
    params, X, _ = problem
    params, X = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, X))
    with pytest.raises(TypeError, match="parameters, got float32 and parameters bfloat16"):
        fnn.mlp(fnn.tanh, dtype=jnp.float32)(params, X)
