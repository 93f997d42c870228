r"""One backward sweep: the inputs a^{l-1} and errors δ^l of every layer, and what follows from them.

Layer l computes z^l = W^l a^{l-1} + b^l and a^l = σ_l(z^l). Its error is δ^l = ∂C/∂z^l. The four
equations of backpropagation (Nielsen 2015, ch. 2, eq. BP1–BP4), with σ′ the Jacobian ∂a/∂z, which is
diagonal, δ ⊙ σ′(z), for all activations but softmax:

    BP1   δ^L = σ_L′(z^L)ᵀ ∂C/∂a^L
    BP2   δ^l = σ_l′(z^l)ᵀ (W^{l+1})ᵀ δ^{l+1}
    BP3   ∂C/∂b^l = δ^l
    BP4   ∂C/∂W^l = δ^l (a^{l-1})ᵀ

They are `backpropagate_errors` (BP1, BP2) and `layer_gradients` (BP3, BP4, summed over the batch).

Derivation. dC = ⟨ā, da⟩ with ā = ∂C/∂a^l and da = σ′ dz, so dC = ⟨σ′ᵀ ā, dz⟩: δ^l = σ_l′ᵀ ā^l, which is
BP1 for l = L. Then dz = dW a + W da + db with a = a^{l-1}, so dC = ⟨δ aᵀ, dW⟩ + ⟨Wᵀ δ, da⟩ + ⟨δ, db⟩:
BP4, ā^{l-1} = (W^l)ᵀ δ^l and with it BP2, and BP3.

Examples are rows: δ^l is (N, n_l), so (Wᵀ δ_n for every n) is `delta @ W`, and Σ_n δ_n a_nᵀ is
`delta.T @ A`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .elementary import after, matmul, scaled, transposed, widened
from .feedback import DirectFeedback, check_feedback
from .params import Layer, Params
from .rules import RuleLike


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sweep:
    """What one forward and one backward pass know of every example.

    losses:  (N,) C_n, one per example
    inputs:  a^0, ..., a^{L-1}, each (N, n_{l-1})
    errors:  δ^1, ..., δ^L, each (N, n_l), ∂C_n/∂z^l_n: of the example's own loss, without the 1/N of
             the mean, its sample weight or the penalty
    weights: (N,) c_n = ∂C/∂C_n, so 1/N for a plain mean; in at least 32 bits
    penalty: the penalty's gradient with respect to W^1, ..., W^L, or None where there is no penalty
    has_bias: for every layer, whether it has one

    All in the dtype of the parameters, where the network computes in another too. For a single example (n,)
    the batch axis is absent everywhere.
    """

    losses: Array
    inputs: tuple[Array, ...]
    errors: tuple[Array, ...]
    weights: Array
    penalty: tuple[Array, ...] | None
    has_bias: tuple[bool, ...] = field(metadata={"static": True})


def backprop(
    cost: Any,
    params: Params,
    X: Array,
    y: Array,
    sample_weight: Array | None = None,
    *,
    feedback: Params | DirectFeedback | None = None,
) -> Sweep:
    """The sweep of a cost made by `fnn.cost` over a batch: every a^{l-1} and δ^l, one row per example.

    X: (N, n_0), or (n_0,) for a single example; y and sample_weight as for the cost
    feedback: what the way back reads in place of `params`, whose own are the default (`feedback.py`); δ^l is
        then no derivative, and neither is what follows from the sweep

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (3, 5, 2))
    >>> cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> [a.shape for a in sweep.inputs], [delta.shape for delta in sweep.errors]
    ([(4, 3), (4, 5)], [(4, 5), (4, 2)])
    """
    made_by_cost = all(hasattr(cost, part) for part in ("net", "loss", "penalty_gradient"))
    if not made_by_cost or not hasattr(cost.net, "activations"):
        raise TypeError(
            f"backprop: cost needs to be made by fnn.cost, of a network made by fnn.mlp; got {cost!r}. "
            "For any other rule call its forward and pullback."
        )
    _, residuals = cost.forward(params, X, y, sample_weight)
    check_feedback(params, feedback)
    losses = residuals.losses
    # The error of an example's own loss: its adjoint starts from ∂C_n/∂C_n = 1.
    A_bar, *_ = cost.loss.pullback(residuals.loss, jnp.ones_like(losses))
    network, own = residuals.network, params[0].W.dtype
    way_back = params if feedback is None else feedback
    dtype = cost.net.computes_in(own)
    # Every example by a power of its own, as nothing is summed over them here.
    by = power_to_one(A_bar, axis=-1) if has_fewer_exponents(dtype, own) else None
    A_bar = A_bar if by is None else A_bar * by
    errors = backpropagate_errors(cost.net.activations(params), way_back, network.activations, A_bar, dtype)
    errors = tuple(delta.astype(own) for delta in errors)
    return Sweep(
        losses=losses,
        inputs=tuple(A.astype(own) for A in network.inputs),
        errors=errors if by is None else tuple(delta / by for delta in errors),
        weights=residuals.weights,
        penalty=cost.penalty_gradient(params),
        has_bias=tuple(layer.b is not None for layer in params),
    )


def gradient(sweep: Sweep) -> Params:
    """The gradient of the sweep's cost: ∂C/∂W^l = Σ_n c_n δ^l_n (a^{l-1}_n)ᵀ + the penalty's, and for b.

    Equal to `fnn.value_and_grad(cost)` up to rounding: c_n multiplies δ here, the loss's adjoint there.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (3, 5, 2))
    >>> cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.ones((4, 3)), jnp.zeros((4, 2)))
    >>> jax.tree.map(jnp.shape, fnn.gradient(sweep)[0])
    Layer(W=(5, 3), b=(5,))
    """
    if not isinstance(sweep, Sweep):
        raise TypeError(
            f"gradient: needs a sweep, as fnn.backprop makes, got {type(sweep).__name__}. "
            "For the gradient of a cost use fnn.value_and_grad(cost)."
        )
    return weighted_gradient(sweep, [sweep.weights] * len(sweep.errors))


def mean_gradient(sweep: Sweep) -> Params:
    """`gradient` where every c_n is 1/N, which comes after the sums: no weighted errors are kept beside δ."""
    scale = 1 / sweep.losses.size
    layers = layer_gradients(sweep.inputs, sweep.errors, sweep.has_bias, scale)
    return add_penalty(layers, sweep.penalty)


def weighted_gradient(sweep: Sweep, weights: Sequence[Float[Array, "*batch"]]) -> Params:
    """Σ_n w_n δ^l_n (a^{l-1}_n)ᵀ and the penalty's gradient, with weights of about c_n for every layer."""
    unit = weight_unit(sweep.losses.size, sweep.errors[-1].dtype)
    errors = tuple(
        (scaled(w, 1 / unit)[..., None] * widened(delta)).astype(delta.dtype)
        for w, delta in zip(weights, sweep.errors, strict=True)
    )
    layers = layer_gradients(sweep.inputs, errors, sweep.has_bias, unit)
    return add_penalty(layers, sweep.penalty)


def weight_unit(N: int, dtype: Any) -> float:
    """The power of two next to 1/N, where errors have 16 bits; otherwise 1.

    A mean's weights c_n are about 1/N, and c_n δ_n may be below float16's 6·10⁻⁸ where the gradient is not.
    So c_n/unit multiplies the errors, and unit the sums over the batch, before they are rounded. A power of
    two costs no digit.
    """
    return 1.0 if jnp.finfo(dtype).bits >= 32 else 2.0 ** -round(log2(N))


def has_fewer_exponents(dtype: Any, than: Any) -> bool:
    """So has float16, whose smallest number is 6·10⁻⁸; bfloat16 has those of float32."""
    return jnp.finfo(dtype).maxexp < jnp.finfo(than).maxexp


def power_to_one(A_bar: Array, axis: int | None = None) -> Array:
    """The power of two that brings the largest |ā| between ½ and 1; 1 if that is 0 or not finite.

    Multiplying by it is exact, and the pullback is linear: its results, divided by it, depend on it only
    where they underflow.
    """
    sizes = jax.lax.stop_gradient(jnp.abs(A_bar))
    largest = jnp.max(sizes, axis=axis, keepdims=axis is not None, initial=0)
    _, exponent = jnp.frexp(largest)
    power = jnp.ldexp(jnp.ones_like(largest), -jnp.clip(exponent, -100, 100))
    return jnp.where(jnp.isfinite(largest) & (largest > 0), power, jnp.ones_like(power))


def backpropagate_errors(
    activations: Sequence[RuleLike],
    params: Params | DirectFeedback,
    residuals: Sequence[Any],
    A_bar: Float[Array, "*batch n"],
    dtype: Any = None,
) -> tuple[Float[Array, "*batch _"], ...]:
    """δ^1, ..., δ^L from ā^L = ∂C/∂a^L and what every activation kept on the way forward (BP1, BP2).

    params: of the network, or what stands in their place on the way back
    dtype: in which the network computes, if not in that of ā^L
    """
    (delta,) = activations[-1].pullback(residuals[-1], A_bar)  # BP1
    delta = delta if dtype is None else delta.astype(dtype)
    errors = [delta]
    for l in reversed(range(len(activations) - 1)):
        if isinstance(params, DirectFeedback):
            W, delta = params.matrices[l], errors[0]  # from δ^L at once
        else:
            W = params[l + 1].W
        A_bar = matmul(delta, W if dtype is None else W.astype(dtype)).astype(delta.dtype)
        (delta,) = activations[l].pullback(residuals[l], A_bar)  # BP2
        errors.append(delta)
    return tuple(reversed(errors))


def layer_gradients(
    inputs: Sequence[Float[Array, "*batch _"]],
    errors: Sequence[Float[Array, "*batch _"]],
    has_bias: Sequence[bool],
    scale: float = 1.0,
    dtype: Any = None,
) -> Params:
    """∂C/∂b^l = Σ_n δ^l_n and ∂C/∂W^l = Σ_n δ^l_n (a^{l-1}_n)ᵀ (BP3, BP4), times `scale`.

    The sums are in at least 32 bits, and rounded once: to `dtype`, by default that of the inputs.
    """
    layers = []
    for A, delta, has_b, delta_below in zip(inputs, errors, has_bias, (None, *errors[:-1]), strict=True):
        A, delta = jnp.atleast_2d(A), jnp.atleast_2d(delta)  # a single example is a batch of one
        W_bar, b_bar = matmul(transposed(delta), A), widened(delta).sum(axis=0) if has_b else None
        if delta_below is not None:  # which W^l is needed for
            W_bar = after(W_bar, delta_below)
        W_bar, b_bar = jax.tree.map(lambda x: scaled(x, scale).astype(dtype or A.dtype), (W_bar, b_bar))
        layers.append(Layer(W=W_bar, b=b_bar))
    return tuple(layers)


def add_penalty(layers: Params, penalty: Sequence[Float[Array, "_ _"]] | None) -> Params:
    """The gradient with the penalty's, one array per layer, added to the weights'."""
    if penalty is None:
        return layers
    return tuple(layer._replace(W=layer.W + P) for layer, P in zip(layers, penalty, strict=True))
