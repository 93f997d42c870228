r"""What a sweep says of every example: one-line products of the pairs (a^{l-1}, δ^l).

The gradient g_n of one example's loss C_n is an outer product in every layer, ∂C_n/∂W^l = δ_n a_nᵀ, with
∂C_n/∂b^l = δ_n (BP3, BP4 before their sum; a_n and δ_n short for a^{l-1}_n and δ^l_n). Written out, N of
them take N times the memory of the parameters. Few questions need that, since inner products of outer
products factorise, and so do their squares, entry by entry:

    ⟨δ_i a_iᵀ, δ_j a_jᵀ⟩ = tr(a_i δ_iᵀ δ_j a_jᵀ) = (a_i·a_j) (δ_i·δ_j)
    (δ_n a_nᵀ) ∘ (δ_n a_nᵀ) = (δ_n ∘ δ_n) (a_n ∘ a_n)ᵀ

A bias is the weight of one more input, the number 1: where a layer has one, a_i·a_j becomes a_i·a_j + 1.

g_n is of the example's own loss: it knows nothing of its weight c_n or the penalty. Moments are over the
examples with probabilities p_n = c_n / Σ_m c_m, which is 1/N for a plain mean. A sweep of a single example
(n,) is taken for a batch of one, N = 1 in the results. Everything is computed in at least 32 bits, and the
results are rounded to the dtype of the losses, which is the parameters': in float16 what is above 65504
becomes inf, and what is below 3·10⁻⁸, as squares often are, 0.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from .elementary import matmul, widened
from .params import Layer, Params
from .sweep import Sweep, layer_gradients, weighted_gradient


def example_gradients(sweep: Sweep) -> Params:
    """g_n for every example, along a first axis: W (N, n_l, n_{l-1}) is δ_n a_nᵀ and b (N, n_l) is δ_n.

    N times the memory of the parameters: for what the other functions of this file do not answer.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (3, 5, 2))
    >>> cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> jax.tree.map(jnp.shape, fnn.example_gradients(sweep)[0])
    Layer(W=(4, 5, 3), b=(4, 5))
    """
    sweep = _rows("example_gradients", sweep)
    return tuple(
        Layer(W=delta[:, :, None] * A[:, None, :], b=delta if has_b else None)
        for A, delta, has_b in zip(sweep.inputs, sweep.errors, sweep.has_bias, strict=True)
    )


def layer_norms(sweep: Sweep) -> Float[Array, "N L"]:
    """‖g_n‖ of every layer on its own, (N, L): ‖δ_n‖ √(‖a_n‖² + 1), without the 1 where there is no bias.

    Derivation: ‖δ aᵀ‖² = tr(a δᵀ δ aᵀ) = ‖δ‖² ‖a‖², and the bias adds ‖δ‖².
    Source: Goodfellow (2015), *Efficient Per-Example Gradient Computations*, arXiv:1510.01799.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.eye(2)), fnn.Layer(jnp.ones((1, 2)), jnp.zeros(1)))
    >>> cost = fnn.cost(fnn.mlp(fnn.identity), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[2.0, 2.0]]), jnp.array([[3.0]]))
    >>> print(fnn.layer_norms(sweep))  # δ² = 1 and a¹ = (2, 2): √(8 + 1) · 1
    [[4. 3.]]
    """
    sweep = _rows("layer_norms", sweep)
    return _layer_norms(sweep).astype(sweep.losses.dtype)


def example_norms(sweep: Sweep) -> Float[Array, " N"]:
    """‖g_n‖ over all parameters, (N,): the root of the sum of squares of `layer_norms`.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.eye(2)), fnn.Layer(jnp.ones((1, 2)), jnp.zeros(1)))
    >>> cost = fnn.cost(fnn.mlp(fnn.identity), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[2.0, 2.0]]), jnp.array([[3.0]]))
    >>> print(fnn.example_norms(sweep))  # 4 and 3 of the layers
    [5.]
    """
    sweep = _rows("example_norms", sweep)
    return _norms(_layer_norms(sweep)).astype(sweep.losses.dtype)


def clipped_gradient(sweep: Sweep, max_norm: float | Array, *, per_layer: bool = False) -> Params:
    """The gradient with every g_n shortened to `max_norm`, where it is longer:

    Σ_n c_n κ_n g_n + the penalty's,   κ_n = min(1, max_norm / ‖g_n‖)

    The factor goes to δ_n, as κ δ aᵀ = (κδ) aᵀ; no g_n is written out. The penalty is no example's, and is
    not clipped. With max_norm = inf this is `fnn.gradient`. A g_n of zero keeps its factor 1.

    max_norm: a number above 0, in the units of ‖g_n‖; it may be traced, and is not checked then
    per_layer: every layer's part of g_n is clipped to max_norm by its own norm; all of g_n is then no longer
        than √L max_norm

    Raises ValueError for any other max_norm.
    Source: Abadi et al. (2016), *Deep Learning with Differential Privacy*, algorithm 1, before its noise.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 2))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([[-1.0], [-1.0]]))
    >>> print(fnn.clipped_gradient(sweep, 1.0)[0].W)  # of (3, 4), shortened to 1, and (0, 1) the mean
    [[0.3 0.9]]
    """
    sweep = _rows("clipped_gradient", sweep)
    norms = _layer_norms(sweep)
    max_norm = _bound(max_norm).astype(norms.dtype)
    if not per_layer:
        norms = jnp.broadcast_to(_norms(norms)[:, None], norms.shape)
    too_long = norms > max_norm
    factors = jnp.where(too_long, max_norm, 1) / jnp.where(too_long, norms, 1)  # of zero and of inf: 1
    return weighted_gradient(sweep, list((sweep.weights[:, None] * factors).T))


def second_moment(sweep: Sweep) -> Params:
    """Σ_n p_n g_n², entry by entry: (δ ∘ δ)ᵀ diag(p) (a ∘ a) for W, and Σ_n p_n δ_n² for b.

    Derivation: (δ_n a_nᵀ)_ji² = δ_nj² a_ni², the entries of an outer product; BP3 and BP4 of the squares.
    Source: Dangel, Kunstner & Hennig (2020), *BackPACK: Packing more into Backprop*, arXiv:1912.10985.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 2))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0, 4.0], [1.0, 4.0]]), jnp.array([[-1.0], [-1.0]]))
    >>> print(fnn.second_moment(sweep)[0].W)  # (9 + 1) / 2 and (16 + 16) / 2
    [[ 5. 16.]]
    """
    sweep = _rows("second_moment", sweep)
    return _rounded(sweep.losses.dtype, _mean(_squares(sweep), _probabilities(sweep)))


def gradient_variance(sweep: Sweep) -> Params:
    """The variance of g_n over the examples, entry by entry: Σ_n p_n g_n² - (Σ_n p_n g_n)², not below 0.

    A penalty would move every g_n alike, and changes nothing. Digits cancel where the variance is small
    beside the squared mean: its error is some eps times the second moment, and below that it is all error.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 2))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0, 4.0], [1.0, 4.0]]), jnp.array([[-1.0], [-1.0]]))
    >>> print(fnn.gradient_variance(sweep)[0].W)  # of 3 and 1, and of 4 and 4
    [[1. 0.]]
    """
    sweep = _rows("gradient_variance", sweep)
    return _rounded(sweep.losses.dtype, jax.tree.map(_variance, *_moments(sweep)))


def signal_to_noise(sweep: Sweep) -> Params:
    """|mean| / standard deviation of g_n over the examples, entry by entry, without the penalty.

    0 where both are 0, inf where only the deviation is. Above about 1/√eps the variance has lost its digits
    (`gradient_variance`), and all the ratio says is that it is large.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 3))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> X = jnp.array([[3.0, 4.0, 0.0], [1.0, 4.0, 0.0]])
    >>> sweep = fnn.backprop(cost, params, X, jnp.array([[-1.0], [-1.0]]))
    >>> print(fnn.signal_to_noise(sweep)[0].W)  # 3 and 1 are 2 ± 1
    [[ 2. inf  0.]]
    """
    sweep = _rows("signal_to_noise", sweep)
    # The ratio has no unit, so that every column of a and δ may have its own: their largest number. Squares
    # of small gradients, below 1e-19 in float32, would otherwise be 0 and the ratio inf.
    inputs, errors = (
        tuple(widened(x) / _largest(widened(x), axis=0) for x in part)
        for part in (sweep.inputs, sweep.errors)
    )
    mean, second = _moments(replace(sweep, inputs=inputs, errors=errors))

    def ratio(mean, second):
        return jnp.abs(mean) / jnp.where(mean == 0, 1, jnp.sqrt(_variance(mean, second)))

    return _rounded(sweep.losses.dtype, jax.tree.map(ratio, mean, second))


def gram(sweep: Sweep) -> Float[Array, "N N"]:
    """All inner products ⟨g_i, g_j⟩ over all parameters, (N, N): Σ_l (A Aᵀ + 1) ∘ (Δ Δᵀ).

    Rows of A and Δ are a_n and δ_n; without the 1 where a layer has no bias. Its diagonal is ‖g_n‖², and for
    weights c the gradient has the squared norm cᵀ G c. Derivation: the first product of this file's head.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 2))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0, 4.0], [2.0, 0.0]]), jnp.array([[-1.0], [1.0]]))
    >>> print(fnn.gram(sweep))  # of (3, 4) and (-2, 0)
    [[25. -6.]
     [-6.  4.]]
    """
    sweep = _rows("gram", sweep)
    G = jnp.zeros((), sweep.weights.dtype)
    for A, delta, has_b in zip(sweep.inputs, sweep.errors, sweep.has_bias, strict=True):
        G = G + (matmul(A, A.T) + int(has_b)) * matmul(delta, delta.T)
    return G.astype(sweep.losses.dtype)


def example_cosines(sweep: Sweep) -> Float[Array, " N"]:
    """The cosine of g_n with the gradient G = Σ_m c_m g_m of the cost without its penalty, (N,).

    ⟨g_n, G⟩ / (‖g_n‖ ‖G‖),   ⟨g_n, G⟩ = Σ_l δ_n·(W̄ a_n + b̄),   W̄ = ∂C/∂W^l, b̄ = ∂C/∂b^l without penalty

    Derivation: ⟨δ aᵀ, W̄⟩ = tr(a δᵀ W̄) = δ·W̄a. 0 where g_n or G is zero.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 2))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0, 1.0], [3.0, 7.0]]), jnp.array([[-1.0], [-1.0]]))
    >>> print(fnn.example_cosines(sweep))  # of (3, 1) and (3, 7) with (3, 4)
    [0.8222 0.9717]
    """
    sweep = _rows("example_cosines", sweep)
    G = _mean(sweep, sweep.weights)
    length = _or_one(_size(G))
    lengths = _or_one(_norms(_layer_norms(sweep)))[:, None]
    cosines = jnp.zeros_like(sweep.weights)
    for A, delta, (W_bar, b_bar) in zip(sweep.inputs, sweep.errors, G, strict=True):
        # Each factor is divided by its own norm first: their product might overflow or vanish.
        slope = matmul(widened(A), (W_bar / length).T)
        slope = slope if b_bar is None else slope + (b_bar / length)[None, :]
        cosines = cosines + jnp.sum(widened(delta) / lengths * slope, axis=1)
    return jnp.clip(cosines, -1, 1).astype(sweep.losses.dtype)  # rounding may leave 1 + eps


def noise_scale(sweep: Sweep) -> Float[Array, ""]:
    """The simple noise scale tr(Σ) / ‖G‖², in examples: the batch size where noise and signal are equal.

    Σ is the covariance of g_n and G its expectation; both are estimated from this batch, as
    `noise_scale_parts` says, and N needs to be at least 2. A ratio of two estimates is biased, and where
    noise dominates the denominator may come out near 0 or negative: then it means nothing. Averages of the
    two parts over many batches, divided once, are better.

    Source: McCandlish et al. (2018), *An Empirical Model of Large-Batch Training*, eq. 2.9 and App. A.1.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 2))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0, 4.0], [1.0, 4.0]]), jnp.array([[-1.0], [-1.0]]))
    >>> print(fnn.noise_scale(sweep))  # 2 / 19
    0.10526316
    """
    sweep = _rows("noise_scale", sweep)
    trace, squared_norm = _noise_scale_parts("noise_scale", sweep)
    return (trace / squared_norm).astype(sweep.losses.dtype)


def noise_scale_parts(sweep: Sweep) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Unbiased estimates of tr(Σ) and ‖G‖², the noise and the signal of `noise_scale`, from norms alone.

    tr(Σ) ≈ (m - q) / (1 - s),   ‖G‖² ≈ (q - s m) / (1 - s)
    m = Σ_n p_n ‖g_n‖²,   q = ‖Σ_n p_n g_n‖²,   s = Σ_n p_n²

    Derivation: for independent examples E m = ‖G‖² + tr Σ and E q = ‖G‖² + s tr Σ; solve for both. Weights
    need to be chosen without regard to g_n. The estimate of ‖G‖² may be negative; both are NaN where one
    example has all the weight. Σ and G are those of what the examples are a sample of: of the M examples of a
    training set themselves, from which batches are drawn without replacement, ‖G‖² is tr(Σ)/M larger.
    Raises ValueError for N = 1, which shows no variance.
    Source: McCandlish et al. (2018), App. A.1, with B_small = 1 and B_big = N, for p_n = 1/N.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.zeros((1, 2))),)
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0, 4.0], [1.0, 4.0]]), jnp.array([[-1.0], [-1.0]]))
    >>> print(*fnn.noise_scale_parts(sweep))  # m = 21, q = 20, s = 1/2
    2.0 19.0
    """
    sweep = _rows("noise_scale_parts", sweep)
    trace, squared_norm = _noise_scale_parts("noise_scale_parts", sweep)
    return trace.astype(sweep.losses.dtype), squared_norm.astype(sweep.losses.dtype)


def _rows(where: str, sweep: Any) -> Sweep:
    """The sweep with its batch axis, a single example as a batch of one; raises for what is no sweep."""
    if not isinstance(sweep, Sweep):
        raise TypeError(
            f"{where}: needs a sweep, as fnn.backprop makes, got {type(sweep).__name__}. "
            "Make one with fnn.backprop(cost, params, X, y)."
        )
    return replace(
        sweep,
        losses=jnp.atleast_1d(sweep.losses),
        inputs=tuple(jnp.atleast_2d(A) for A in sweep.inputs),
        errors=tuple(jnp.atleast_2d(delta) for delta in sweep.errors),
        weights=jnp.atleast_1d(sweep.weights),
    )


def _bound(max_norm: Any) -> Array:
    """max_norm as a scalar array; raises unless it is above 0, if it has a value yet."""
    scalar = not isinstance(max_norm, bool | str | bytes) and getattr(max_norm, "shape", ()) == ()
    if scalar and isinstance(max_norm, Tracer):
        return max_norm
    try:
        number = float(max_norm) if scalar else 0.0
    except (TypeError, ValueError, OverflowError):
        number = 0.0
    if not number > 0:
        raise ValueError(
            "clipped_gradient: max_norm needs to be one number above 0, such as the median of "
            f"fnn.example_norms(sweep); got {max_norm!r}. To clip nothing use fnn.gradient(sweep)."
        )
    return jnp.asarray(number)


def _largest(x: Array, axis: int) -> Array:
    """max |x| along an axis, which is kept; 1 instead of 0 and of what is not finite."""
    top = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    return jnp.where((top > 0) & jnp.isfinite(top), top, 1)


def _norms(x: Float[Array, "*batch n"]) -> Float[Array, " *batch"]:
    """‖x‖ over the last axis, in at least 32 bits.

    Of x divided by its largest entry no square overflows, and none that matters vanishes; in float32 those of
    x would, above 1e19 and below 1e-19.
    """
    x = widened(x)
    unit = _largest(x, axis=-1)
    return unit[..., 0] * jnp.sqrt(jnp.sum((x / unit) ** 2, axis=-1))


def _layer_norms(sweep: Sweep) -> Float[Array, "N L"]:
    """`layer_norms` in at least 32 bits."""
    norms = []
    for A, delta, has_b in zip(sweep.inputs, sweep.errors, sweep.has_bias, strict=True):
        size = _norms(A)
        norms.append(_norms(delta) * (jnp.hypot(size, 1) if has_b else size))
    return jnp.stack(norms, axis=-1)


def _size(layers: Params) -> Float[Array, ""]:
    """The norm of all parameters taken as one vector."""
    return _norms(jnp.stack([_norms(leaf.ravel()) for leaf in jax.tree.leaves(layers)]))


def _or_one(norm: Array) -> Array:
    return jnp.where(norm == 0, 1, norm)


def _mean(sweep: Sweep, weights: Float[Array, " N"]) -> Params:
    """Σ_n w_n g_n in at least 32 bits, without the penalty."""
    errors = [weights[:, None] * widened(delta) for delta in sweep.errors]
    return layer_gradients([widened(A) for A in sweep.inputs], errors, sweep.has_bias)


def _probabilities(sweep: Sweep) -> Float[Array, " N"]:
    """p_n = c_n / Σ_m c_m; 0 if all c_n are 0."""
    return sweep.weights / _or_one(jnp.sum(sweep.weights))


def _squares(sweep: Sweep) -> Sweep:
    """Every a and δ squared, in at least 32 bits: their products are the squares of g_n's entries."""
    inputs, errors = (tuple(widened(x) ** 2 for x in part) for part in (sweep.inputs, sweep.errors))
    return replace(sweep, inputs=inputs, errors=errors)


def _moments(sweep: Sweep) -> tuple[Params, Params]:
    """Σ_n p_n g_n and Σ_n p_n g_n² in at least 32 bits."""
    p = _probabilities(sweep)
    return _mean(sweep, p), _mean(_squares(sweep), p)


def _variance(mean: Array, second: Array) -> Array:
    return jnp.maximum(second - mean**2, 0)


def _noise_scale_parts(where: str, sweep: Sweep) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`noise_scale_parts` in at least 32 bits."""
    if sweep.losses.size < 2:
        raise ValueError(
            f"{where}: needs a sweep over at least two examples, since one shows no variance; got N = 1. "
            "Use a larger batch, and one whose size leaves no last batch of one."
        )
    p = _probabilities(sweep)
    m = jnp.sum(p * _norms(_layer_norms(sweep)) ** 2)
    q = _size(_mean(sweep, p)) ** 2
    s = jnp.sum(p**2)
    rest = jnp.where(s < 1, 1 - s, jnp.nan)
    return jnp.maximum(m - q, 0) / rest, (q - s * m) / rest


def _rounded(dtype: Any, layers: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), layers)
