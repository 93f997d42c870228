"""Products in 16 bits of parameters in 32: as right as their roundings allow, and what is wide stays wide."""

from functools import cache, partial

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
    @jax.jit
    def draw(key):
        keys = jax.random.split(key, 3)
        params = fnn.init(keys[0], SIZES, dtype=jnp.float32)
        params = tuple(fnn.Layer(W, jnp.full(len(W), 0.1, W.dtype)) for W, _ in params)
        X = jax.random.normal(keys[1], (64, SIZES[0]), jnp.float32)
        return params, X, jax.random.randint(keys[2], (64,), 0, SIZES[-1])

    return draw(jax.random.key(0))


def cost_in(dtype, activation=fnn.tanh, **options):
    return fnn.cost(
        fnn.mlp(activation, dtype=dtype), fnn.softmax_cross_entropy_with_integer_labels, **options
    )


@cache
def value_and_grad(dtype, **options):
    """Compiled, once for all tests."""
    return jax.jit(fnn.value_and_grad(cost_in(dtype, **options)))


@cache
def float16_net():
    """Forward and pullback of one network, compiled."""
    net = fnn.mlp(fnn.tanh, dtype=jnp.float16)
    return jax.jit(net.forward), jax.jit(net.pullback)


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
    C, gradient = value_and_grad(dtype)(*problem)
    C_wide, wide = value_and_grad(None)(*problem)
    unit = float(jnp.finfo(dtype).eps) / 2
    assert 0 < abs(float(C) - float(C_wide)) < UNITS * unit
    assert distance(gradient, wide) < UNITS * unit
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", NARROW)
def test_gradient_is_no_further_off_than_that_of_autodiff_through_casts(problem, dtype):
    params, X, y = problem

    def cost(params):
        outputs = plain_forward(dtype, params, X)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y).mean()

    _, wide = value_and_grad(None)(*problem)
    _, ours = value_and_grad(dtype)(*problem)
    assert distance(ours, wide) < 1.1 * distance(jax.jit(jax.grad(cost))(params), wide)
    assert jax.eval_shape(fnn.mlp(fnn.tanh, dtype=dtype), params, X).dtype == jnp.float32


@pytest.mark.parametrize("dtype", NARROW)
def test_gradient_has_more_digits_than_16_bits_hold(problem, dtype):
    """The sums of BP3 and BP4 go into the optimiser as they are."""
    _, gradient = value_and_grad(dtype)(*problem)
    numbers = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])
    assert (numbers.astype(dtype).astype(np.float32) != numbers).mean() > 0.9


@jax.jit
def of_squared_error(params, X, y, weight):
    """The sweep's gradient in float16, and in 32 bits."""
    costs = [
        fnn.cost(fnn.mlp(fnn.tanh, dtype=dtype), fnn.half_squared_error) for dtype in (jnp.float16, None)
    ]
    return [fnn.gradient(fnn.backprop(cost, params, X, y, weight)) for cost in costs]


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_the_sweep_of_float16_has_errors_of_any_size(problem, size):
    params, X, _ = problem
    y = np.full((len(X), SIZES[-1]), size, np.float32)
    weight = np.full(len(X), 1 / size, np.float32)
    zero_last = (*params[:-1], jax.tree.map(np.zeros_like, params[-1]))
    assert (
        distance(*of_squared_error(zero_last, X, y, weight)) < UNITS * float(jnp.finfo(jnp.float16).eps) / 2
    )


def test_float16_keeps_errors_far_below_its_smallest_number(problem):
    """A loss divided by 2²⁶, whose errors are below 6·10⁻⁸: the gradient is that of the loss, divided."""
    params, X, y = problem
    _, gradient = value_and_grad(jnp.float16)(params, X, y)
    forward, pullback = float16_net()
    A, residuals = forward(params, X)
    p = np.exp(A)
    A_bar = (p / p.sum(axis=1, keepdims=True) - np.eye(SIZES[-1], dtype=p.dtype)[y]) / len(y)
    small = pullback(residuals, A_bar * 2.0**-26)
    usual = pullback(residuals, A_bar)
    for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(usual), strict=True):
        np.testing.assert_array_equal(np.asarray(a) * 2.0**26, b)
    assert distance(usual[0], gradient) < 1e-5


@pytest.mark.parametrize("value", [0.0, jnp.inf, jnp.nan])
def test_float16_passes_on_what_has_no_size(problem, value):
    params, X, _ = problem
    forward, pullback = float16_net()
    A, residuals = forward(params, X)
    params_bar, X_bar = pullback(residuals, np.full_like(A, value))
    for leaf in map(np.asarray, (X_bar, *jax.tree.leaves(params_bar))):
        assert (leaf == 0).all() if value == 0 else not np.isfinite(leaf).any()


@pytest.mark.parametrize("dtype", NARROW)
def test_the_sweep_gives_the_same_gradient_and_norms(problem, dtype):

    @jax.jit
    def of_sweep(params, X, y):
        sweep = fnn.backprop(cost_in(dtype, l2=1e-2), params, X, y)
        return sweep, fnn.gradient(sweep), fnn.example_norms(sweep), fnn.clipped_gradient(sweep, 0.1)

    sweep, by_sweep, norms, clipped = of_sweep(*problem)
    _, gradient = value_and_grad(dtype, l2=1e-2)(*problem)
    assert {a.dtype for a in (*sweep.inputs, *sweep.errors)} == {jnp.dtype(jnp.float32)}
    unit = float(jnp.finfo(dtype).eps) / 2
    assert distance(by_sweep, gradient) < UNITS * unit
    wide = jax.jit(lambda *problem: fnn.example_norms(fnn.backprop(cost_in(None, l2=1e-2), *problem)))
    assert distance(norms, wide(*problem)) < UNITS * unit
    assert clipped[0].W.dtype == jnp.float32


def test_curvature_is_that_of_32_bits_to_the_last_bit(problem):
    params, X, y = problem
    for function in (fnn.hessian_product, fnn.gauss_newton_product):
        narrow, wide = (
            jax.jit(partial(function, cost_in(dtype)))(params, params, X, y) for dtype in (jnp.bfloat16, None)
        )
        for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
            np.testing.assert_array_equal(a, b)


fit = partial(fnn.fit, batch_size=32, progress=False)


@pytest.fixture(scope="module")
def learned_in_32_bits(problem):
    params, *data = problem
    with jax.numpy_dtype_promotion("standard"):
        return fit(cost_in(None), optax.adam(0.02), params, tuple(data), epochs=20, key=jax.random.key(1))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", NARROW)
def test_small_updates_are_not_lost(problem, learned_in_32_bits, dtype):
    """Steps of 1e-5 on weights near 1 leave 16-bit parameters where they are; these move, and learn."""
    params, X, y = problem
    narrow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype)), params)
    sgd, key = optax.sgd(1e-5), jax.random.key(1)
    mixed = fit(cost_in(dtype), sgd, params, (X, y), epochs=3, key=key).params
    stuck = fit(
        cost_in(None), sgd, narrow, (jnp.asarray(np.asarray(X).astype(dtype)), y), epochs=3, key=key
    ).params

    def kept(after, before):
        pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        return [np.mean(np.asarray(a) == np.asarray(b)) for a, b in pairs]

    assert max(kept(mixed, params)) < 0.1 and np.mean(kept(stuck, narrow)) > 0.7

    learned = fit(cost_in(dtype), optax.adam(0.02), params, (X, y), epochs=20, key=key)
    wide = learned_in_32_bits
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
