r"""Curvature of a cost: its Hessian and its Gauss–Newton matrix, as products, a diagonal, Kronecker factors.

For all parameters θ, with J_n = ∂a^L_n/∂θ and H_n = ∂²C_n/∂a^L∂a^Lᵀ (`loss_hessians.py`), the chain rule
taken twice gives, for C = Σ_n c_n C_n + ½ λ Σ_l ‖W^l‖²,

    ∂²C/∂θ² = Σ_n c_n J_nᵀ H_n J_n + Σ_n c_n Σ_k (∂C_n/∂a^L_k) ∂²a^L_k/∂θ² + λ on the weights.

The first sum is the Gauss–Newton matrix G. It has no negative eigenvalue where H_n has none and c_n ≥ 0, so a
step -(G + μ)⁻¹ ∂C/∂θ goes downhill; where a^L is linear in θ it is all there is. Neither matrix is formed. A
direction v is a pytree like the parameters, and so is every product.

H v is the derivative along v of our own gradient: `jax.jvp` of the sweep, forward over reverse. Pearlmutter's
R-operator (1994) is the same written out line by line. It would need σ″ and H_n of every rule, a third
function for each, and come to the same products of matrices; `tests/test_curvature.py` writes it out once.

G v takes no derivative. Tangents go forward, J v = ȧ^L; H_n is in closed form; Jᵀ is the backward sweep.

    ż^l = V^l a^{l-1} + W^l ȧ^{l-1} + v_b^l,   ȧ^l = σ_l′(z^l) ż^l,   ȧ^0 = 0

Derivation: differentiate z^l = W^l a^{l-1} + b^l and a^l = σ_l(z^l) along (V, v_b).

With a root H_n = S_n S_nᵀ, of columns s_k, G = Σ_n c_n Σ_k (J_nᵀ s_k)(J_nᵀ s_k)ᵀ is a sum of squares. A
column sent through the backward sweep in place of ∂C_n/∂a^L comes out as errors δ^{l,k}, and by BP4 the block
of W^l in J_nᵀ s_k is δ^{l,k} (a^{l-1})ᵀ. Diagonal and Kronecker factors are sums over these, by columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .elementary import matmul, scaled, widened
from .loss_hessians import draw_loss_gradient, loss_hessian_product, loss_hessian_root
from .network import Cost, CostResiduals, Network, mlp
from .params import Params, check_key, check_params
from .rules import RuleLike, value_and_grad
from .sweep import add_penalty, backpropagate_errors, layer_gradients, weight_unit


def hessian_product(
    cost: Any, params: Params, v: Params, X: Array, y: Array, sample_weight: Array | None = None
) -> Params:
    """H v, the Hessian ∂²C/∂θ² of a cost made by `fnn.cost` times a direction, its penalty's λ v_W included.

    v: a pytree like params; X, y and sample_weight as for the cost

    About twice the flops of a gradient. A kink, such as relu's, has no curvature.
    Raises TypeError or ValueError for bad arguments.
    Source: Pearlmutter (1994); Bishop (2006), §5.4.6.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (2, 1))
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error, l2=0.1)
    >>> v = (fnn.Layer(W=jnp.array([[1.0, 0.0]]), b=jnp.array([0.0])),)
    >>> print(fnn.hessian_product(cost, params, v, jnp.array([[2.0, 3.0]]), jnp.zeros((1, 1)))[0].W)
    [[4.1 6. ]]
    """
    cost = _checked_cost("hessian_product", cost)
    _check_direction("hessian_product", params, v)

    def gradient(params):
        return value_and_grad(cost)(params, X, y, sample_weight)[1]

    return jax.jvp(gradient, (params,), (v,))[1]


def gauss_newton_product(
    cost: Any,
    params: Params,
    v: Params,
    X: Array,
    y: Array,
    sample_weight: Array | None = None,
    *,
    penalty: bool = False,
) -> Params:
    """G v = Σ_n c_n J_nᵀ H_n J_n v, the Gauss–Newton matrix of a cost times a direction.

    v: a pytree like params; X, y and sample_weight as for the cost
    penalty: whether to add λ v_W, the curvature of the cost's penalty

    A step of Newton's method with G for the Hessian, damped by μ, is a solution by conjugate gradients.
    Raises TypeError or ValueError for bad arguments.
    Source: Schraudolph (2002); Martens (2010), *Deep learning via Hessian-free optimization*.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (3, 5, 2))
    >>> cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    >>> X, y = jax.random.normal(jax.random.key(1), (8, 3)), jnp.ones((8, 2))
    >>> before, gradient = fnn.value_and_grad(cost)(params, X, y)
    >>> def damped(v):
    ...     Gv = fnn.gauss_newton_product(cost, params, v, X, y)
    ...     return jax.tree.map(lambda Gv, v: Gv + 0.1 * v, Gv, v)
    >>> step, _ = jax.scipy.sparse.linalg.cg(damped, gradient)
    >>> bool(cost(jax.tree.map(jnp.subtract, params, step), X, y) < before / 2)
    True
    """
    where = "gauss_newton_product"
    cost = _checked_cost(where, cost)
    _check_direction(where, params, v)
    residuals, outputs = _forward(cost, params, X, y, sample_weight)
    activations, network = cost.net.activations(params), residuals.network
    tangents = _output_tangents(activations, params, v, network.inputs, network.activations)
    # c_n multiplies H_n J_n v, and in 16 bits its small unit the sums, as in `gradient`.
    unit = weight_unit(residuals.losses.size, residuals.losses.dtype)
    weights = scaled(residuals.weights, 1 / unit)[..., None]
    A_bar = weights * widened(loss_hessian_product(cost.loss, outputs, y, tangents))
    errors = backpropagate_errors(activations, params, network.activations, A_bar.astype(outputs.dtype))
    layers = layer_gradients(network.inputs, errors, _has_bias(params), unit)
    return add_penalty(layers, cost.penalty_gradient(v)) if penalty else layers


def gauss_newton_diagonal(
    cost: Any, params: Params, X: Array, y: Array, sample_weight: Array | None = None
) -> Params:
    r"""The diagonal of Σ_n c_n J_nᵀ H_n J_n, exact, as a pytree like params; without the penalty's λ.

    W^l: Σ_n c_n Σ_k (δ^{l,k}_n)² ((a^{l-1}_n)²)ᵀ,   b^l: Σ_n c_n Σ_k (δ^{l,k}_n)²,   squares of entries

    Derivation: the entry of J_nᵀ s_k for W^l_ij is δ_i a_j, and the diagonal of Σ_k (J_nᵀ s_k)(J_nᵀ s_k)ᵀ has
    its square: BP3 and BP4 with squares for factors.

    K backward sweeps, one after another in constant memory. A network of relu and identity alone has this
    diagonal in its Hessian too. Raises TypeError for a loss without a root (`fnn.loss_hessian_root`).
    Source: Dangel et al. (2020), *BackPACK*, DiagGGN.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (2, 1))
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> print(fnn.gauss_newton_diagonal(cost, params, jnp.array([[2.0, 3.0]]), jnp.zeros((1, 1)))[0].W)
    [[4. 9.]]
    """
    cost = _checked_cost("gauss_newton_diagonal", cost)
    residuals, outputs = _forward(cost, params, X, y, sample_weight)
    weights = residuals.weights[..., None]

    def squares(errors):
        return tuple(widened(delta) ** 2 for delta in errors)

    root = loss_hessian_root(cost.loss, outputs, y)
    sums = _sum_over_columns(squares, root, cost.net.activations(params), params, residuals)
    squared_inputs = [widened(A) ** 2 for A in residuals.network.inputs]
    layers = layer_gradients(squared_inputs, [weights * total for total in sums], _has_bias(params))
    return jax.tree.map(lambda diagonal, like: diagonal.astype(like.dtype), layers, params)


class KroneckerFactors(NamedTuple):
    """A layer's block of the Gauss–Newton matrix as G ⊗ A: A of its inputs, G of its errors."""

    A: Float[Array, "m m"]  # m = n_{l-1} + 1, or n_{l-1} without bias
    G: Float[Array, "n n"]  # n = n_l


def kronecker_factors(
    cost: Any,
    params: Params,
    X: Array,
    y: Array,
    sample_weight: Array | None = None,
    *,
    key: Array | None = None,
) -> tuple[KroneckerFactors, ...]:
    r"""K-FAC: for every layer A^l and G^l with G^l ⊗ A^l ≈ its block of the Gauss–Newton matrix.

    A^l = Σ_n p_n ā_n ā_nᵀ,   ā = (a^{l-1}, 1), without the 1 in a layer without bias;  p_n = c_n / Σ c
    G^l = Σ_n c_n Σ_k δ^{l,k}_n (δ^{l,k}_n)ᵀ

    key: instead of the K columns, one backward sweep of a random gradient g_n with E[g_n g_nᵀ] = H_n, for
        a softmax or sigmoid loss that of a label drawn from the network's own p; G^l is right on average

    The block is that of [W^l b^l] (n_l, n_{l-1} + 1), flattened row by row, so `jnp.kron(G, A)`; papers that
    stack columns have A ⊗ G. With (∂C/∂[W b]) in that shape, (G ⊗ A)⁻¹ times it is G⁻¹ (∂C/∂[W b]) A⁻¹.

    Derivation: J_nᵀ s_k has the block δ ⊗ ā, so G's block is Σ_n c_n Σ_k (δ δᵀ) ⊗ (ā āᵀ). K-FAC takes the
    mean of the products for the product of the means; it is exact for one example, and where Σ_k δ δᵀ is the
    same for all, as in a single layer under a squared error. The block of b^l, G^l itself, is always exact.
    Raises TypeError for a loss without a root (`fnn.loss_hessian_root`).
    Source: Martens & Grosse (2015), §3, eq. 1, with a key; Botev et al. (2017), KFLR, without; the latter is
    curvlinops' type-2.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (3, 5, 2))
    >>> cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    >>> factors = fnn.kronecker_factors(cost, params, jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> [(A.shape, G.shape) for A, G in factors]
    [((4, 4), (5, 5)), ((6, 6), (2, 2))]
    """
    cost = _checked_cost("kronecker_factors", cost)
    if key is not None:
        check_key("kronecker_factors", key)
    residuals, outputs = _forward(cost, params, X, y, sample_weight)
    weights = jnp.atleast_1d(residuals.weights)
    total = jnp.sum(weights)
    p = weights / jnp.where(total == 0, 1, total)

    def outer_products(errors):
        return tuple(_weighted_outer_product(weights, delta) for delta in errors)

    if key is None:
        columns = loss_hessian_root(cost.loss, outputs, y)
    else:
        columns = draw_loss_gradient(key, cost.loss, outputs, y)[..., None]
    Gs = _sum_over_columns(outer_products, columns, cost.net.activations(params), params, residuals)
    As = []
    for A, layer in zip(residuals.network.inputs, params, strict=True):
        A = jnp.atleast_2d(A)
        if layer.b is not None:
            A = jnp.concatenate([A, jnp.ones_like(A[:, :1])], axis=1)
        As.append(_weighted_outer_product(p, A))
    dtype = outputs.dtype
    return tuple(KroneckerFactors(A.astype(dtype), G.astype(dtype)) for A, G in zip(As, Gs, strict=True))


def _forward(
    cost: Any, params: Params, X: Array, y: Array, sample_weight: Array | None
) -> tuple[CostResiduals, Array]:
    """What the cost's forward kept, and a^L, which it did not: the last layer alone, once more."""
    _, residuals = cost.forward(params, X, y, sample_weight)
    last = mlp([], output=cost.net.output)
    return residuals, last(params[-1:], residuals.network.inputs[-1])


def _output_tangents(
    activations: Sequence[RuleLike], params: Params, v: Params, inputs: Sequence[Array], kept: Sequence[Any]
) -> Array:
    """ȧ^L = J_n v, one row for each example, by the recursion at the top of this file."""
    A_dot = None
    for l, (A, (V, v_b)) in enumerate(zip(inputs, v, strict=True)):
        Z_dot = matmul(A, V.T)  # V^l a^{l-1}
        if A_dot is not None:
            Z_dot = Z_dot + matmul(A_dot, params[l].W.T)  # W^l ȧ^{l-1}
        if v_b is not None:
            Z_dot = Z_dot + jnp.broadcast_to(v_b.astype(Z_dot.dtype), Z_dot.shape)
        A_dot = _tangent(activations[l], kept[l], Z_dot.astype(A.dtype))
    assert A_dot is not None
    return A_dot


def _tangent(activation: RuleLike, kept: Any, Z_dot: Array) -> Array:
    """ȧ = σ′ ż, by the transpose of the activation's own pullback, which is ā -> σ′ᵀ ā.

    Where σ′ is symmetric, as an element-wise σ's and softmax's, the pullback itself would do; an activation
    of yours need not be. Transposed, its J is the one that the backward sweep has: G is symmetric even if a
    pullback differs from σ′ on purpose, as a straight-through estimator's does.
    """

    def pullback(A_bar):
        (Z_bar,) = activation.pullback(kept, A_bar)
        return Z_bar

    (A_dot,) = jax.linear_transpose(pullback, Z_dot)(Z_dot)
    return A_dot


def _sum_over_columns(
    reduce: Callable[[tuple[Array, ...]], tuple[Array, ...]],
    columns: Float[Array, "*batch n K"],
    activations: Sequence[RuleLike],
    params: Params,
    residuals: CostResiduals,
) -> tuple[Array, ...]:
    """Σ_k reduce(δ^{1,k}, ..., δ^{L,k}): the first column of every example through the sweep, then the next.

    One after another, so that the memory is that of one column, whatever K.
    """

    def of_column(A_bar):
        return reduce(backpropagate_errors(activations, params, residuals.network.activations, A_bar))

    def add(total, A_bar):
        return jax.tree.map(jnp.add, total, of_column(A_bar)), None

    columns = jnp.moveaxis(columns, -1, 0)
    shapes = jax.eval_shape(of_column, columns[0])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, columns)
    return total


def _weighted_outer_product(weights: Float[Array, "N"], A: Array) -> Float[Array, "n n"]:
    """Σ_n w_n a_n a_nᵀ, in at least 32 bits."""
    A = widened(jnp.atleast_2d(A))
    return matmul((weights[:, None] * A).T, A)


def _has_bias(params: Params) -> list[bool]:
    return [layer.b is not None for layer in params]


def _checked_cost(where: str, cost: Any) -> Cost:
    """The cost, computed in the dtype of the parameters: second derivatives have no digits to spare."""
    if not isinstance(cost, Cost) or not isinstance(cost.net, Network):
        raise TypeError(
            f"{where}: cost needs to be made by fnn.cost, of a network made by fnn.mlp; got {cost!r}."
        )
    return replace(cost, net=replace(cost.net, dtype=None))


def _check_direction(where: str, params: Params, v: Any) -> None:
    """Raises unless v has the layers, shapes and dtype of params."""
    check_params(where, params)
    if jax.tree.structure(v) != jax.tree.structure(params):
        raise TypeError(
            f"{where}: v needs to be a tuple of fnn.Layer like params, with b=None where they have it: "
            f"{jax.tree.structure(params)}; got {jax.tree.structure(v)}. Make one with jax.tree.map."
        )
    for (path, p), d in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(v), strict=True):
        if jnp.shape(d) != p.shape or jnp.result_type(d) != p.dtype:
            raise ValueError(
                f"{where}: v{jax.tree_util.keystr(path)} needs to be like params', {p.dtype} {p.shape}; "
                f"got {jnp.result_type(d)} {jnp.shape(d)}."
            )
