r"""The Hessian H_n = ∂²C_n/∂z_n∂z_nᵀ of a loss in the outputs of its example: products, roots and draws.

Every loss of `losses.py` has it in closed form. With p = softmax(z) or σ(z) and e = z - y:

    softmax_cross_entropy                        (Σ_k y_k) (diag p - p pᵀ)
    softmax_cross_entropy_with_integer_labels    diag p - p pᵀ
    sigmoid_binary_cross_entropy                 diag p (1 - p)
    half_squared_error, squared_error            1 and 2 times the identity
    mean_squared_error, mean_absolute_error      2/K and 0 times the identity
    huber_loss(delta)                            diag 1[|e| < delta] / K
    categorical_cross_entropy                    diag y / p²
    binary_cross_entropy                         diag y / p² + (1 - y) / (1 - p)²

Derivation: differentiate the slopes ∂C_n/∂z of `losses.py` once more. Of the losses on logits they are linear
in p, so H_n is the Jacobian ∂p/∂z of softmax, times Σ y, or of σ. Both are symmetric: H_n v is a call of that
activation's pullback, whose digits survive where p is nearly 0 or 1. At an absolute error's kink and Huber's
knees, where the slope jumps or bends, H_n is 0, as on the outer side.
Source: Bishop (2006), eq. 4.97 and 4.110, where it stands between the inputs.

Z and V are (N, K), or (K,) for a single example. A term with numerator 0 is 0, as in the losses.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .activations import sigmoid, softmax
from .elementary import rounded_once, sum_of_others
from .losses import (
    _ratio,
    binary_cross_entropy,
    categorical_cross_entropy,
    half_squared_error,
    huber_loss_forward,
    mean_absolute_error,
    mean_squared_error,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
)
from .params import _outline
from .rules import RuleLike, check_rule_like, is_array


def loss_hessian_product(
    loss: RuleLike, Z: Float[Array, "*batch K"], y: Array, V: Float[Array, "*batch K"]
) -> Float[Array, "*batch K"]:
    r"""H_n v_n for every example, (N, K): in closed form where the table above has one.

    For a loss of yours it is the tangent of ∂C_n/∂z along v_n, `jax.jvp` of the loss's own pullback.

    Raises TypeError or ValueError for what the loss refuses, and unless V is like Z.

    >>> import fnn, jax.numpy as jnp
    >>> Z, y, V = jnp.array([[1.0, -1.0]]), jnp.array([0]), jnp.array([[1.0, 0.0]])
    >>> print(fnn.loss_hessian_product(fnn.softmax_cross_entropy_with_integer_labels, Z, y, V))
    [[ 0.105 -0.105]]
    """
    _check("loss_hessian_product", loss, Z, y)
    if not is_array(V) or V.shape != Z.shape or V.dtype != Z.dtype:
        raise ValueError(
            f"loss_hessian_product: V needs to be like Z, one direction for each example, {_outline(Z)}; "
            f"got {_outline(V)}."
        )
    product = _closed_form_product(loss, Z, y, V)
    if product is not None:
        return product

    def slopes(Z):
        losses, residuals = loss.forward(Z, y)
        return loss.pullback(residuals, jnp.ones_like(losses))[0]

    return jax.jvp(slopes, (Z,), (V,))[1]


def loss_hessian_root(loss: RuleLike, Z: Float[Array, "*batch K"], y: Array) -> Float[Array, "*batch K K"]:
    r"""S_n with H_n = S_n S_nᵀ for every example, (N, K, K), its columns along the last axis.

    softmax:  S = √(Σ y) (diag √p - p √pᵀ), so S_kj = √(Σ y) √p_j (1[k=j] - p_k)
    a diagonal H:  S = diag √H_kk

    Derivation: with s = √p, sᵀs = Σ p = 1, (diag s - p sᵀ)(diag s - p sᵀ)ᵀ = diag p - 2 p pᵀ + p (sᵀs) pᵀ.
    What 1 - p_k loses where p_k is nearly 1 does not show in S Sᵀ, to which the other columns add far more.

    A root exists where H_n has no negative eigenvalue: for every loss above with labels that are
    probabilities. Raises TypeError for a loss of yours, of which that is not known.
    Source: Dangel et al. (2020), *BackPACK*, who send its columns through the backward sweep.

    >>> import fnn, jax.numpy as jnp
    >>> S = fnn.loss_hessian_root(fnn.squared_error, jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)))
    >>> print(S[0] @ S[0].T)
    [[2. 0.]
     [0. 2.]]
    """
    _check("loss_hessian_root", loss, Z, y)
    return _root(loss, Z, y)


def draw_loss_gradient(
    key: Array, loss: RuleLike, Z: Float[Array, "*batch K"], y: Array
) -> Float[Array, "*batch K"]:
    r"""g_n, (N, K), one random gradient for each example with E[g_n] = 0 and E[g_n g_nᵀ] = H_n.

    on logits: the loss's gradient for a label ŷ ~ p that the network itself would give, √(Σ y) (p - e_ŷ) or
        p - ŷ; its covariance is that of ŷ, diag p - p pᵀ or diag p (1 - p)
    others:    √H_kk ε_k with ε_k unit normal; for half the squared error, its gradient for ŷ ~ N(z, 1)
    Source: Martens & Grosse (2015), §5; Kunstner et al. (2019) on why not the given labels' gradients.
    """
    _check("draw_loss_gradient", loss, Z, y)
    return _draw(key, loss, Z, y)


ON_SOFTMAX = (softmax_cross_entropy, softmax_cross_entropy_with_integer_labels)


@rounded_once
def _closed_form_product(loss: RuleLike, Z: Array, y: Array, V: Array) -> Array | None:
    if loss in ON_SOFTMAX:
        return _sum_of_labels(loss, Z, y) * softmax.pullback(softmax.forward(Z)[1], V)[0]
    diagonal = _diagonal(loss, Z, y)
    return None if diagonal is None else diagonal * V


@rounded_once
def _root(loss: RuleLike, Z: Array, y: Array) -> Array:
    K = Z.shape[-1]
    on_diagonal = jnp.broadcast_to(jnp.eye(K, dtype=bool), (*Z.shape, K))
    if loss in ON_SOFTMAX:
        p = softmax(Z)
        columns = (on_diagonal.astype(Z.dtype) - p[..., :, None]) * jnp.sqrt(p)[..., None, :]
        return jnp.sqrt(_sum_of_labels(loss, Z, y))[..., None] * columns
    return jnp.where(on_diagonal, jnp.sqrt(_diagonal_or_error(loss, Z, y))[..., None], 0)


@rounded_once
def _draw(key: Array, loss: RuleLike, Z: Array, y: Array) -> Array:
    if loss in ON_SOFTMAX:
        p = softmax(Z)
        drawn = jax.nn.one_hot(jax.random.categorical(key, Z), Z.shape[-1], dtype=bool)
        gradient = jnp.where(drawn, -sum_of_others(p), p)
        return jnp.sqrt(_sum_of_labels(loss, Z, y)) * gradient
    if loss == sigmoid_binary_cross_entropy:
        drawn = jax.random.bernoulli(key, sigmoid(Z))
        return jnp.where(drawn, -sigmoid(-Z), sigmoid(Z))
    return jnp.sqrt(_diagonal_or_error(loss, Z, y)) * jax.random.normal(key, Z.shape, Z.dtype)


def _diagonal(loss: RuleLike, Z: Array, y: Array) -> Array | None:
    """H_kk, (N, K), where the rest of H_n is zero; None for a loss not known here."""
    K = Z.shape[-1]
    if loss == sigmoid_binary_cross_entropy:
        return sigmoid.pullback(sigmoid.forward(Z)[1], jnp.ones_like(Z))[0]
    if loss == categorical_cross_entropy:
        return _ratio(_ratio(y, Z), Z)  # y/p/p: p² underflows long before p
    if loss == binary_cross_entropy:
        return _ratio(_ratio(y, Z), Z) + _ratio(_ratio(1 - y, 1 - Z), 1 - Z)
    if isinstance(loss.forward, partial) and loss.forward.func is huber_loss_forward:
        (delta,) = loss.forward.args
        return jnp.where(jnp.abs(Z - y) < delta, jnp.full_like(Z, 1 / K), 0)
    multiples = (
        (half_squared_error, 1.0),
        (squared_error, 2.0),
        (mean_squared_error, 2 / K),
        (mean_absolute_error, 0.0),
    )
    for known, multiple in multiples:
        if loss == known:
            return jnp.full_like(Z, multiple)
    return None


def _diagonal_or_error(loss: RuleLike, Z: Array, y: Array) -> Array:
    diagonal = _diagonal(loss, Z, y)
    if diagonal is None:
        raise TypeError(
            f"loss_hessian_root: needs a loss of fnn, whose Hessian has a root in closed form; got {loss!r}. "
            "Where a loss has negative curvature there is none. fnn.gauss_newton_product needs no root."
        )
    return diagonal


def _sum_of_labels(loss: RuleLike, Z: Array, y: Array) -> Array:
    """Σ_k y_k, (N, 1); 1 for a class number."""
    return jnp.sum(y, axis=-1, keepdims=True) if loss == softmax_cross_entropy else jnp.ones_like(Z[..., :1])


def _check(where: str, loss: Any, Z: Array, y: Array) -> None:
    """Raises for what the loss itself refuses, without computing it."""
    check_rule_like(f"{where}: the loss", loss, "Z", "y")
    jax.eval_shape(lambda Z, y: loss.forward(Z, y)[0], Z, y)
