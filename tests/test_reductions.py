"""Each reduction against its definition, written out with every example's gradient; and what it costs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fnn
from tests.properties import assert_close
from tests.strategies import Architecture, architectures, network_case, tolerance

OF_LAYERS = ("second_moment", "gradient_variance", "signal_to_noise")
OF_EXAMPLES = ("layer_norms", "example_norms", "gram", "example_cosines")
NAMES = (*OF_LAYERS, *OF_EXAMPLES, "clipped_gradient", "noise_scale", "noise_scale_parts")


def cast(primals, dtype):
    """By NumPy, which has nothing to compile."""
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(x).astype(dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        primals,
    )


# Compiled once for each shape: operation by operation, most of a test's time would be compilation.
swept = jax.jit(fnn.backprop, static_argnums=0)
clipped_gradient = jax.jit(fnn.clipped_gradient, static_argnames="per_layer")
example_gradients = jax.jit(fnn.example_gradients)
gradient_of = jax.jit(fnn.gradient)


def draw(arch: Architecture, dtype="float64", seed: int = 0):
    """The cost, its primals and their sweep, all numbers rounded to the dtype."""
    case, primals = drawn(arch, dtype, seed)
    return case, primals, swept(case.rule, *primals)


def drawn(arch: Architecture, dtype, seed: int):
    case = network_case(fnn, arch)
    return case, cast(case.draw_one(seed), dtype)


def reduced(sweep, max_norm: float = 1e-2, max_layer_norm: float = 1e-2):
    """Every reduction of a sweep, in one program, which is the same with bounds given and without."""
    return all_reductions(sweep, max_norm, max_layer_norm)


@jax.jit
def all_reductions(sweep, max_norm, max_layer_norm):
    names = [name for name in NAMES if name != "clipped_gradient"]
    if sweep.losses.size == 1:
        names = [name for name in names if not name.startswith("noise_scale")]
    results = {name: getattr(fnn, name)(sweep) for name in names}
    return results | {
        "clipped_gradient": fnn.clipped_gradient(sweep, max_norm),
        "clipped per layer": fnn.clipped_gradient(sweep, max_layer_norm, per_layer=True),
    }


@partial(jax.jit, static_argnames="names")
def some(sweep, names) -> tuple:
    """A few of them, in the order asked."""
    return tuple(getattr(fnn, name)(sweep) for name in names)


def vector(layers):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(layers)])


class Definitions:
    """Every reduction of a sweep by its definition, in float64, from one gradient per example.

    g: (N, P), the gradients as rows; layer: (P,), the layer each of their entries belongs to
    """

    def __init__(self, sweep):
        examples = jax.device_get(example_gradients(sweep))
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(examples)]
        self.g = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
        self.shapes = jax.tree.map(lambda leaf: leaf.shape[1:], examples)
        sizes = [sum(leaf[0].size for leaf in jax.tree.leaves(layer)) for layer in examples]
        self.layer = np.repeat(range(len(sizes)), sizes)
        self.c = np.asarray(sweep.weights, np.float64)
        self.p = self.c / self.c.sum()
        penalty = sweep.penalty or [np.zeros_like(layer.W[0]) for layer in examples]
        self.penalty = vector(
            [(P, P[:, 0] * 0 if layer.b is not None else ()) for P, layer in zip(penalty, examples)]
        )
        squares = [np.sum(self.g[:, self.layer == l] ** 2, axis=1) for l in range(len(sizes))]
        self.layer_norms = np.sqrt(squares).T
        self.norms = np.sqrt(np.sum(self.g**2, axis=1))

    def check(self, results, bounds, dtype):
        """Every entry of every result within 50 roundings of the sizes of what is summed up to it."""
        eps, g, p, size = tolerance(dtype), self.g, self.p, np.abs(self.g)

        def within(name, want, terms):
            got = vector(results[name]).reshape(want.shape)
            assert np.all(np.abs(got - want) <= eps * terms), name

        within("layer_norms", self.layer_norms, self.layer_norms)
        within("example_norms", self.norms, self.norms)
        within("gram", g @ g.T, size @ size.T)
        for name, bound, norms in (
            ("clipped_gradient", bounds[0], self.norms[:, None]),
            ("clipped per layer", bounds[1], self.layer_norms[:, self.layer]),
        ):
            weights = self.c[:, None] * np.minimum(1, bound / np.where(norms == 0, 1e-300, norms))
            terms = np.sum(weights * size, axis=0) + np.abs(self.penalty)
            within(name, np.sum(weights * g, axis=0) + self.penalty, terms)

        mean, second, summed = p @ g, p @ g**2, p @ size
        variance, terms = p @ (g - mean) ** 2, second + summed**2
        within("second_moment", second, second)
        within("gradient_variance", variance, terms)
        # Where digits cancel the variance is anything within its error, and the ratio with it.
        ratio = vector(results["signal_to_noise"])
        with np.errstate(divide="ignore", invalid="ignore"):
            least = (np.abs(mean) - eps * summed) / np.sqrt(variance + eps * terms)
            most = (np.abs(mean) + eps * summed) / np.sqrt(np.maximum(variance - eps * terms, 0))
        zero = terms == 0
        assert np.all(np.where(zero, ratio == 0, (ratio >= least) & (ratio <= most))), "signal_to_noise"

        lengths = np.linalg.norm(mean), np.linalg.norm(summed)
        nonzero = np.where(self.norms * lengths[0] == 0, np.inf, self.norms * lengths[0])
        within("example_cosines", g @ mean / nonzero, 2 * lengths[1] / (lengths[0] or np.inf))

        if len(g) > 1:
            m, q, s = p @ self.norms**2, lengths[0] ** 2, p @ p
            trace, signal = variance.sum() / (1 - s), (q - s * m) / (1 - s)
            room = np.array([m + lengths[1] ** 2, lengths[1] ** 2 + s * m]) / (1 - s)
            within("noise_scale_parts", np.array([trace, signal]), room)
            if abs(signal) > 2 * eps * room[1]:
                allowed = 2 * eps * (room[0] + np.abs(trace / signal) * room[1]) / np.abs(signal)
                assert abs(float(results["noise_scale"]) - trace / signal) <= allowed, "noise_scale"


def check(sweep, dtype):
    want = Definitions(sweep)
    bounds = [float(jnp.asarray(np.median(norms) or 1.0, dtype)) for norms in (want.norms, want.layer_norms)]
    results = reduced(sweep, *bounds)
    for name in (*OF_LAYERS, "clipped_gradient", "clipped per layer"):
        assert jax.tree.map(jnp.shape, results[name]) == want.shapes
    N, L = want.layer_norms.shape
    assert [results[name].shape for name in OF_EXAMPLES] == [(N, L), (N,), (N, N), (N,)]
    assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(dtype)}
    want.check(results, bounds, dtype)
    return want, results, bounds


def check_examples(case, primals, sweep, dtype):
    """δ_n a_nᵀ and δ_n are autodiff's, of each example's own loss, in float64 on the same numbers."""
    params, X, y, *_ = cast(primals, "float64")
    net, loss = case.rule.net, case.rule.loss
    biased = tuple(fnn.Layer(W, jax.device_put(np.zeros(len(W))) if b is None else b) for W, b in params)

    @partial(jax.jit, static_argnums=0)
    @partial(jax.vmap, in_axes=(None, None, 0, 0))
    def autodiff(cost, params, x, t):
        return jax.grad(lambda params: cost.loss(cost.net(params, x[None]), t[None])[0])(params)

    want = autodiff(fnn.cost(net, loss), biased, X, y)
    got = example_gradients(sweep)
    # A running bound of the rounding: the backward recursion on absolute values, as in `check_sweep`.
    want = jax.device_get(want)
    terms = np.abs(y) if jnp.issubdtype(y.dtype, jnp.floating) else np.ones_like(want[-1].b)
    for l in reversed(range(len(params))):
        terms = np.maximum(terms, np.abs(want[l].b))
        size = float(terms.max() * max(1, np.abs(sweep.inputs[l]).max()))
        assert (got[l].b is None) == (params[l].b is None)
        for a, b in zip(got[l], want[l], strict=True):
            if a is not None:
                assert a.dtype == jnp.dtype(dtype)
                assert_close(a, b, dtype, what=f"gradients of layer {l + 1}", fan_in=16, terms=size)
        terms = terms @ np.abs(params[l].W)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=3, deadline=None)
@given(arch=architectures(), seed=st.integers(0, 2**32 - 1))
def test_reductions_are_those_of_every_examples_gradient(dtype, arch, seed):
    case, primals = drawn(arch, dtype, seed)
    assume(case.smooth(*jax.tree.map(np.float64, primals)))
    sweep = swept(case.rule, *primals)
    check_examples(case, primals, sweep, dtype)
    check(sweep, dtype)


CASES = {
    "softmax hidden layer": Architecture(hidden=("softmax", "tanh"), weighted=True, l2=0.1),
    "square, no bias": Architecture(widths=(4, 4, 4), hidden=("tanh",), N=4, bias=False, weighted=True),
}


@pytest.mark.parametrize("name", CASES)
def test_reductions_where_a_mistake_would_fit(name):
    """An activation of all of its layer's z; shapes that a transposed product has as well."""
    case, primals, sweep = draw(CASES[name])
    check_examples(case, primals, sweep, "float64")
    check(sweep, "float64")


@pytest.fixture(scope="module")
def known():
    _, _, sweep = draw(CASES["softmax hidden layer"])
    return sweep, *check(sweep, "float64")


@pytest.mark.parametrize("name", [*NAMES, "clipped per layer"])
def test_the_check_sees_one_thousandth(name, known):
    sweep, want, results, bounds = known
    off = jax.tree.map(lambda x: 1.001 * x, results[name])
    with pytest.raises(AssertionError, match=name):
        want.check(results | {name: off}, bounds, "float64")


def sweep_of(gradients, weights, bias=False):
    """A sweep of one layer with one output, δ = 1, so that every a_n is its gradient."""
    A, c = (x if isinstance(x, jax.Array) else jax.device_put(np.asarray(x)) for x in (gradients, weights))
    losses, delta = jax.device_put((np.zeros(c.shape, c.dtype), np.ones((len(A), 1), A.dtype)))
    return fnn.Sweep(losses, (A,), (delta,), c, None, (bias,))


FLOAT32_HALVES = np.full(2, 0.5, np.float32)


def test_norms_gram_and_moments_of_numbers_known_by_hand():
    sweep = sweep_of([[3.0, 4.0], [1.0, 4.0]], [0.5, 0.5])
    norms, gram, parts, *moments = some(sweep, ("layer_norms", "gram", "noise_scale_parts", *OF_LAYERS))
    np.testing.assert_allclose(norms, [[5], [17**0.5]], rtol=1e-15)
    np.testing.assert_array_equal(gram, [[25, 19], [19, 17]])
    ((second,), (variance,), (ratio,)) = moments
    np.testing.assert_array_equal(second.W, [[5, 16]])
    np.testing.assert_array_equal(variance.W, [[1, 0]])
    np.testing.assert_allclose(ratio.W, [[2, np.inf]], rtol=1e-15)
    np.testing.assert_allclose(parts, (2, 19), rtol=1e-14)
    norms, gram = some(
        sweep_of([[3.0, 4.0], [1.0, 4.0]], [0.5, 0.5], bias=True), names=("layer_norms", "gram")
    )
    np.testing.assert_allclose(norms, [[26**0.5], [18**0.5]], rtol=1e-15)
    np.testing.assert_array_equal(gram, [[26, 20], [20, 18]])


def test_norms_neither_overflow_nor_vanish_with_their_squares():
    for size in (1e-30, 1e30):
        sweep = sweep_of(np.array([[3, 4], [1, 4]], np.float32) * np.float32(size), FLOAT32_HALVES)
        norms, cosines, ratio = jax.device_get(
            some(sweep, ("example_norms", "example_cosines", "signal_to_noise"))
        )
        np.testing.assert_allclose(norms / size, [5, 17**0.5], rtol=1e-6)
        np.testing.assert_allclose(cosines[0], 22 / 5 / 20**0.5, rtol=1e-6)
        np.testing.assert_allclose(ratio[0].W[0, 0], 2, rtol=1e-6)
        np.testing.assert_allclose(
            np.asarray(clipped_gradient(sweep, size)[0].W) / size,
            [[(3 / 5 + 1 / 17**0.5) / 2, (4 / 5 + 4 / 17**0.5) / 2]],
            rtol=1e-6,
        )


def test_example_without_gradient_is_neither_clipped_nor_nan():
    case, (params, X, y), _ = draw(Architecture())
    sweep = swept(case.rule, params, X, y)
    others = np.arange(6)[:, None] != 2
    sweep = replace(sweep, errors=tuple(jax.device_put(np.where(others, delta, 0)) for delta in sweep.errors))
    results = reduced(sweep)
    assert results["example_norms"][2] == 0 and results["example_cosines"][2] == 0
    Definitions(sweep).check(results, (1e-2, 1e-2), "float64")


def test_infinite_gradient_has_an_infinite_norm_and_is_not_hidden_by_clipping():
    sweep = sweep_of([[np.inf, 1.0], [1.0, 4.0]], [0.5, 0.5])
    np.testing.assert_allclose(some(sweep, ("example_norms",))[0], [np.inf, 17**0.5], rtol=1e-15)
    np.testing.assert_allclose(clipped_gradient(sweep, 17.0**0.5)[0].W, [[np.nan, 2]], rtol=1e-15)


def test_cosine_of_an_only_example_is_one_and_never_more():
    draws = jnp.asarray(np.random.default_rng(0).standard_normal((200, 1, 5)))
    cosines = jax.jit(jax.vmap(lambda g: fnn.example_cosines(sweep_of(g, [1.0], bias=True))))(draws)
    np.testing.assert_allclose(cosines, 1, rtol=1e-14)
    assert cosines.max() <= 1


def test_no_gradient_at_all_gives_zeros():
    sweep = sweep_of(np.zeros((2, 3), np.float32), FLOAT32_HALVES)
    names = (*OF_LAYERS, "example_norms", "example_cosines")
    for name, result in zip(names, some(sweep, names), strict=True):
        assert not np.any(vector(result)), name
    for bound in (1.0, 1e-60):  # below float32's smallest number, 0
        assert not np.any(vector(clipped_gradient(sweep, bound, per_layer=True)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_without_a_bound_nothing_changes_to_the_last_bit(dtype):
    _, _, sweep = draw(Architecture(weighted=True, reduction="weighted_mean", l2=0.1), dtype)
    plain = jax.tree.leaves(gradient_of(sweep))
    for per_layer, bound in ((False, np.inf), (True, jnp.asarray(1e4, dtype))):
        clipped = clipped_gradient(sweep, bound, per_layer=per_layer)
        for a, b in zip(jax.tree.leaves(clipped), plain, strict=True):
            assert a.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(a, b)


def test_clipping_bounds_what_one_example_can_change():
    """Per layer every layer's part, otherwise all of them together; the direction stays."""
    case, (params, X, y), _ = draw(Architecture())
    sweep = swept(case.rule, params, X[:1], y[:1])
    norms, gradient = some(sweep, ("layer_norms", "gradient"))
    bound = float(np.median(norms))
    of_layers = clipped_gradient(sweep, bound, per_layer=True)
    np.testing.assert_allclose(
        [np.linalg.norm(vector(layer)) for layer in of_layers], np.minimum(norms[0], bound), rtol=1e-13
    )
    clipped, plain = vector(clipped_gradient(sweep, bound)), vector(gradient)
    np.testing.assert_allclose(clipped, bound * plain / np.linalg.norm(plain), rtol=1e-13)


def test_penalty_is_added_after_clipping_and_enters_nothing_else():
    _, (params, *_), sweep = draw(Architecture(l2=0.1))
    penalised, plain = reduced(sweep), reduced(replace(sweep, penalty=None))
    for name in penalised:
        if name.startswith("clipped"):
            for layer, bare, (W, _) in zip(penalised[name], plain[name], params, strict=True):
                np.testing.assert_allclose(layer.W, bare.W + 0.1 * W, rtol=1e-13)
                np.testing.assert_allclose(layer.b, bare.b, rtol=1e-14)
        else:
            np.testing.assert_allclose(vector(penalised[name]), vector(plain[name]), rtol=1e-12)


def test_examples_of_weight_zero_are_as_if_absent():
    _, _, sweep = draw(Architecture(weighted=True, reduction="weighted_mean"))
    kept = np.array([0, 2, 3, 5])
    weights = np.asarray(sweep.weights) * np.isin(range(6), kept)
    with_zeros = replace(sweep, weights=jax.device_put(weights))
    a, b = (
        reduced(with_zeros),
        reduced(jax.tree.map(lambda x: jax.device_put(np.asarray(x)[kept]), with_zeros)),
    )
    for name in (*OF_LAYERS, "clipped_gradient", "clipped per layer", "noise_scale", "noise_scale_parts"):
        np.testing.assert_allclose(vector(a[name]), vector(b[name]), rtol=1e-10, atol=1e-16, err_msg=name)
    for name in ("example_norms", "example_cosines"):
        np.testing.assert_allclose(a[name][kept], b[name], rtol=1e-12)
    assert np.all(a["example_norms"] > 0)  # an example's norm does not know its weight


def test_variance_of_examples_that_are_all_alike_is_rounding_and_not_below_zero():
    one = np.random.default_rng(0).standard_normal((1, 200))
    sweep = sweep_of(np.repeat(one, 3, axis=0), [0.1, 0.3, 0.3])
    variance, ratio = map(vector, some(sweep, ("gradient_variance", "signal_to_noise")))
    assert np.all((variance >= 0) & (variance <= tolerance("float64") * one[0] ** 2))
    assert np.all(ratio >= tolerance("float64") ** -0.5)


def test_single_weight_leaves_no_noise_to_estimate():
    _, _, sweep = draw(Architecture())
    alone = jax.jit(jax.vmap(lambda c: fnn.noise_scale_parts(replace(sweep, weights=c))))
    assert np.all(np.isnan(alone(np.eye(6))))
    nobody = sweep_of([[3.0, 4.0], [1.0, 4.0]], [0.0, 0.0])
    for name, result in zip(OF_LAYERS, some(nobody, OF_LAYERS), strict=True):
        assert not np.any(vector(result)), name


def test_noise_scale_parts_are_unbiased():
    """Their mean over all 4³ batches of three from four examples is tr Σ and ‖G‖² of the four, for any p."""
    gradients = np.random.default_rng(0).standard_normal((4, 5))
    batches = np.stack(np.meshgrid(*[range(4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    G = gradients.mean(axis=0)
    estimate = jax.jit(jax.vmap(lambda g, w: fnn.noise_scale_parts(sweep_of(g, w)), in_axes=(0, None)))
    for weights in ([1 / 3, 1 / 3, 1 / 3], [0.1, 0.5, 0.9]):
        trace, signal = map(np.asarray, estimate(jnp.asarray(gradients[batches]), jnp.array(weights)))
        np.testing.assert_allclose(trace.mean(), np.mean(np.sum((gradients - G) ** 2, axis=1)), rtol=1e-12)
        np.testing.assert_allclose(signal.mean(), G @ G, rtol=1e-12)


def test_reductions_agree_with_one_another():
    _, _, sweep = draw(Architecture(weighted=True))
    results = reduced(sweep)
    G = np.asarray(results["gram"])
    np.testing.assert_allclose(G, G.T, rtol=1e-14)
    np.testing.assert_allclose(np.diag(G), np.square(results["example_norms"]), rtol=1e-13)
    assert np.linalg.eigvalsh(G).min() > -1e-14 * np.trace(G)
    gradient, c = vector(gradient_of(sweep)), np.asarray(sweep.weights)
    np.testing.assert_allclose(c @ G @ c, gradient @ gradient, rtol=1e-12)
    cosines = G @ c / np.sqrt(np.diag(G)) / np.linalg.norm(gradient)
    np.testing.assert_allclose(results["example_cosines"], cosines, rtol=1e-12)
    trace, signal = results["noise_scale_parts"]
    p = c / c.sum()
    np.testing.assert_allclose(vector(results["gradient_variance"]).sum() / (1 - p @ p), trace, rtol=1e-12)
    np.testing.assert_allclose(results["noise_scale"], trace / signal, rtol=1e-13)


def test_single_example_counts_as_a_batch_of_one():
    case, (params, X, y), _ = draw(Architecture(l2=0.1))
    one, row = swept(case.rule, params, X[0], y[0]), swept(case.rule, params, X[:1], y[:1])
    assert one.losses.shape == () and one.inputs[0].shape == (3,)
    a, b = ({"examples": example_gradients(sweep), **reduced(sweep)} for sweep in (one, row))
    for name in a:
        assert jax.tree.map(jnp.shape, a[name]) == jax.tree.map(jnp.shape, b[name])
        if name not in ("gradient_variance", "signal_to_noise"):  # of one example: what rounding leaves
            np.testing.assert_allclose(vector(a[name]), vector(b[name]), rtol=1e-12, atol=1e-15)


def test_reductions_pass_through_vmap():
    """Over single examples, and over bounds, which jit and vmap trace."""
    case, (params, X, y), sweep = draw(Architecture(l2=0.1))

    def of_one(x, t):
        one = fnn.backprop(case.rule, params, x, t)
        return fnn.layer_norms(one)[0], fnn.example_gradients(one)[0].W[0]

    norms, gradients = jax.jit(jax.vmap(of_one))(X, y)
    np.testing.assert_allclose(norms, reduced(sweep)["layer_norms"], rtol=1e-13)
    np.testing.assert_allclose(gradients, example_gradients(sweep)[0].W, rtol=1e-13)
    bounds = np.array([0.01, 0.1, np.inf])
    many = jax.device_get(jax.jit(jax.vmap(fnn.clipped_gradient, in_axes=(None, 0)))(sweep, bounds))
    for i, bound in enumerate(bounds):
        one = reduced(sweep, float(bound))["clipped_gradient"]
        np.testing.assert_allclose(vector(jax.tree.map(lambda x, i=i: x[i], many)), vector(one), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_results_in_16_bits_are_those_in_float32_rounded(dtype):
    """Of the same inputs, errors and weights: one rounding; a second one where errors take up weights."""
    _, _, narrow = draw(Architecture(weighted=True, N=64), dtype)
    wide = cast(narrow, "float32")
    (norms,) = some(wide, ("example_norms",))
    bound, eps = float(np.median(norms)), float(jnp.finfo(dtype).eps)
    got, want = reduced(narrow, bound, bound), reduced(wide, bound, bound)
    got["example_gradients"], want["example_gradients"] = map(example_gradients, (narrow, wide))
    summed = np.asarray(wide.weights) @ np.abs(Definitions(wide).g)
    for name in want:
        a, b = (vector(results[name]) for results in (got, want))
        assert {leaf.dtype for leaf in jax.tree.leaves(got[name])} == {jnp.dtype(dtype)}
        terms = summed if name.startswith("clipped") else np.abs(b)
        assert np.all(np.abs(a - b) <= eps * terms + 1e-6 * np.abs(b).max()), name


def test_squares_in_float16_are_not_taken_there():
    """δ² = 1e-8 would be 0, though (δ a)² = 1e-4 is not."""
    sweep = sweep_of(np.full((2, 1), 100, np.float16), FLOAT32_HALVES)
    sweep = replace(sweep, errors=(jnp.full((2, 1), 1e-4, np.float16),), losses=jnp.zeros(2, np.float16))
    np.testing.assert_allclose(fnn.second_moment(sweep)[0].W, 1e-4, rtol=2e-3)


def test_noise_scale_in_float16_has_parts_beyond_it():
    sweep = sweep_of(np.array([[300, 400], [100, 400]], np.float16), FLOAT32_HALVES)
    sweep = replace(sweep, losses=jnp.zeros(2, np.float16))
    np.testing.assert_array_equal(fnn.noise_scale_parts(sweep), [20_000, np.inf])
    np.testing.assert_allclose(fnn.noise_scale(sweep), 2 / 19, rtol=1e-3)


@pytest.mark.usefixtures("no_shape_annotations")
@pytest.mark.parametrize("name", ["example_gradients", *NAMES])
def test_what_is_no_sweep_is_refused(name):
    arguments = (1.0,) if name == "clipped_gradient" else ()
    with pytest.raises(TypeError, match=f"^{name}: needs a sweep, as fnn.backprop makes, got tuple"):
        getattr(fnn, name)((), *arguments)


@pytest.mark.usefixtures("no_shape_annotations")
@pytest.mark.parametrize(
    "bound",
    [0, -1.0, np.nan, 10**400, "1", None, True, np.float32(0), jnp.array(-1.0), np.ones(1), jnp.ones(3)],
)
def test_bound_that_is_none_is_refused(bound):
    sweep = sweep_of([[3.0, 4.0]], [1.0])
    with pytest.raises(ValueError, match="^clipped_gradient: max_norm needs to be one number above 0.*; got"):
        fnn.clipped_gradient(sweep, bound)


@pytest.mark.parametrize("bound", [2, np.float32(2), np.int64(2), jnp.array(2), jnp.float32(2)])
@pytest.mark.usefixtures("no_shape_annotations")
def test_bound_may_be_any_number(bound):
    np.testing.assert_allclose(fnn.clipped_gradient(sweep_of([[3.0, 4.0]], [1.0]), bound)[0].W, [[1.2, 1.6]])


@pytest.mark.parametrize("name", ["noise_scale", "noise_scale_parts"])
def test_noise_of_one_example_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: needs a sweep over at least two examples.*got N = 1"):
        getattr(fnn, name)(sweep_of([[3.0, 4.0]], [1.0]))


def test_memory_is_that_of_the_gradient():
    """Temporary memory as compiled for 784-512-512-10, N = 256, float32; nothing runs.

    Measured: gradient 1.58 MB, 1.33 times that for norms, 1.00 clipped, 1.51 second moment, 1.66 Gram, and
    694 where clipping writes every example's gradient out (jaxlib 0.10 to 0.12, with conftest's flags or
    without).
    """
    widths, N = (784, 512, 512, 10), 256
    params = jax.eval_shape(lambda key: fnn.init(key, widths, dtype=np.float32), jax.random.key(0))
    X, y = jax.ShapeDtypeStruct((N, widths[0]), np.float32), jax.ShapeDtypeStruct((N,), np.int32)
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels)

    def temporary(f):
        analysis = jax.jit(f).lower(params, X, y).compile().memory_analysis()
        assert analysis
        return analysis.temp_size_in_bytes

    def of(reduction, *arguments):
        return temporary(lambda *primals: reduction(fnn.backprop(cost, *primals), *arguments))

    def written_out(params, X, y):
        one = jax.grad(lambda params, x, t: cost(params, x[None], t[None]))
        g = jax.vmap(one, in_axes=(None, 0, 0))(params, X, y)
        norms = jnp.sqrt(sum(jnp.sum(leaf.reshape(N, -1) ** 2, axis=1) for leaf in jax.tree.leaves(g)))
        factors = jnp.minimum(1, 1 / norms) / N
        return jax.tree.map(lambda leaf: jnp.tensordot(factors, leaf, axes=1), g)

    gradient, clipped = of(fnn.gradient), of(fnn.clipped_gradient, 1.0)
    assert clipped <= 1.1 * gradient
    assert of(fnn.example_norms) <= 1.5 * gradient
    assert of(fnn.second_moment) <= 1.7 * gradient
    assert of(fnn.gram) <= 1.9 * gradient
    assert temporary(written_out) >= 600 * clipped
