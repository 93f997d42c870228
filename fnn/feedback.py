r"""What may stand in place of the weights on the way back.

Backpropagation sends errors back through the transposes of the very weights that sent the activations
forward: ā^l = (W^{l+1})ᵀ δ^{l+1} (BP2). No brain is known to have such a pair, and networks learn without it:

    feedback alignment          ā^l = (F^{l+1})ᵀ δ^{l+1}, F fixed and random
    sign symmetry               the same with F = sign(W)
    direct feedback alignment   ā^l = (D^l)ᵀ δ^L, D fixed and random

F^{l+1} has the shape of W^{l+1}, so `backprop(..., feedback=F)` takes parameters of the same network:
`fnn.init(key, sizes)` for fixed random ones, `jax.tree.map(jnp.sign, params)` for signs. Only F^2, ..., F^L
are read, not their biases. `feedback=params` is backpropagation itself, to the last bit. D^l leads from layer
L to layer l and is (n_L, n_l): `direct_feedback` makes them.

Sources: Lillicrap et al. (2016), *Random synaptic feedback weights support error backpropagation for deep
learning*; Liao, Leibo & Poggio (2016), *How important is weight symmetry in backpropagation?*; Nøkland
(2016), *Direct feedback alignment provides learning in deep neural networks*.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from .params import Initializer, Layer, Params, check_key, check_params, init, lecun_normal
from .rules import is_array


class DirectFeedback(NamedTuple):
    """D^1, ..., D^{L-1} of direct feedback alignment, D^l (n_L, n_l)."""

    matrices: tuple[Float[Array, "n_last n"], ...]


def direct_feedback(key: Any, params: Params, *, weights: Initializer = lecun_normal) -> DirectFeedback:
    """Random matrices for direct feedback alignment in a network of these parameters, of their dtype.

    weights: an initialiser (key, shape, dtype) -> array, called with the shapes (n_L, n_l)

    >>> import fnn, jax
    >>> params = fnn.init(jax.random.key(0), (64, 32, 16, 10))
    >>> [D.shape for D in fnn.direct_feedback(jax.random.key(1), params).matrices]
    [(10, 32), (10, 16)]
    """
    check_key("direct_feedback", key)
    check_params("direct_feedback", params)
    n_last, dtype = params[-1].W.shape[0], params[-1].W.dtype
    keys = jax.random.split(key, len(params))
    return DirectFeedback(
        tuple(
            init(own, (layer.W.shape[0], n_last), weights=weights, bias=None, dtype=dtype)[0].W
            for own, layer in zip(keys[:-1], params[:-1], strict=True)
        )
    )


def check_feedback(params: Params, feedback: Any) -> None:
    """Raises unless feedback is None, or its matrices fit the network of `params` in number, shape, dtype."""
    if feedback is None:
        return
    if isinstance(feedback, DirectFeedback):
        matrices, first = feedback.matrices, 1
        shapes = [(params[-1].W.shape[0], layer.W.shape[0]) for layer in params[:-1]]
        hint = "fnn.direct_feedback(key, params) makes such."
    elif isinstance(feedback, tuple) and feedback and all(isinstance(layer, Layer) for layer in feedback):
        matrices, first = [layer.W for layer in feedback[1:]], 2
        shapes = [layer.W.shape for layer in params[1:]]
        hint = "Each has the shape of W, not of its transpose."
    else:
        raise TypeError(
            "backprop: feedback needs to be parameters of the same network, such as fnn.init(key, sizes), or "
            f"what fnn.direct_feedback(key, params) makes; got {type(feedback).__name__}."
        )
    if len(matrices) != len(shapes):
        raise ValueError(
            f"backprop: feedback needs {len(shapes)} matrices to lead back through {len(params)} layers, got "
            f"{len(matrices)}. {hint}"
        )
    for l, (matrix, shape) in enumerate(zip(matrices, shapes, strict=True), start=first):
        dtype = params[0].W.dtype
        if not is_array(matrix) or matrix.shape != shape or matrix.dtype != dtype:
            got = f"{matrix.dtype} {matrix.shape}" if is_array(matrix) else type(matrix).__name__
            raise ValueError(
                f"backprop: feedback's matrix of layer {l} needs to be {dtype} {shape}, got {got}. {hint}"
            )
