r"""The forward pass of a network, its cost, and the pullbacks of both.

    z^l = W^l a^{l-1} + b^l,   a^l = σ_l(z^l),   a^0 = x,   l = 1..L
    C = Σ_n c_n C_n(a^L_n, y_n) + ½ λ Σ_l ‖W^l‖²

C_n is the loss of example n and c_n its weight, 1/N for a plain mean: the only place where a 1/N
stands. With rows as examples the first line is `A @ W.T + b`; books with examples as columns write its
transpose, Z = W A + b. Both are rules. Their pullbacks are the backward sweep of `sweep.py`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from .activations import identity
from .elementary import matmul, scaled, times_transposed, widened
from .params import Params, check_not_narrowed, check_params
from .rules import RuleLike, check_adjoints, check_rule_like, is_array
from .sweep import (
    add_penalty,
    backpropagate_errors,
    has_fewer_exponents,
    layer_gradients,
    power_to_one,
    weight_unit,
)


class NetworkResiduals(NamedTuple):
    params: Params
    inputs: tuple[Array, ...]  # a^0, ..., a^{L-1}
    activations: tuple[Any, ...]  # what σ_1, ..., σ_L kept


@dataclass(frozen=True)
class Network:
    """A fully connected network as a rule: (params, X) -> a^L. Made by `mlp`.

    hidden: the activation of every hidden layer, or a tuple with one for each
    output: the activation of the last layer
    dtype: in which products are computed, if not in that of the parameters
    """

    hidden: RuleLike | tuple[RuleLike, ...]
    output: RuleLike
    dtype: Any = None

    def activations(self, params: Params) -> tuple[RuleLike, ...]:
        """σ_1, ..., σ_L for a network of as many layers as `params`."""
        n_hidden = len(params) - 1
        hidden = self.hidden if isinstance(self.hidden, tuple) else (self.hidden,) * n_hidden
        if len(hidden) != n_hidden:
            raise ValueError(
                f"mlp: params has {n_hidden} hidden layers, but mlp was given {len(hidden)} activations. "
                "Give one for each hidden layer, or one rule for all; the last layer's is output=."
            )
        return (*hidden, self.output)

    def forward(
        self, params: Params, X: Float[Array, "*batch n_in"]
    ) -> tuple[Float[Array, "*batch n_out"], NetworkResiduals]:
        """a^L for a batch (N, n_0) or a single example (n_0,), and what the pullback needs."""
        check_params("mlp", params)
        _check_inputs(params, X)
        dtype, inputs, kept = self.computes_in(X.dtype), [], []
        A = X.astype(dtype)
        # What the loss reads is not rounded to `dtype`.
        kept_in = (*[dtype] * (len(params) - 1), X.dtype)
        for (W, b), activation, own in zip(params, self.activations(params), kept_in, strict=True):
            Z = times_transposed(A, W.astype(dtype))
            if b is not None:
                Z = Z + jnp.broadcast_to(b.astype(Z.dtype), Z.shape)
            inputs.append(A)
            A, residuals = activation.forward(Z.astype(own))
            kept.append(residuals)
        return A, NetworkResiduals(params, tuple(inputs), tuple(kept))

    def pullback(
        self, residuals: NetworkResiduals, A_bar: Float[Array, "*batch n_out"], scale: float = 1.0
    ) -> tuple[Params, Float[Array, "*batch n_in"]]:
        """∂C/∂params and ∂C/∂X from ā^L: the errors (BP1, BP2), then the gradients (BP3, BP4).

        scale: multiplies them before they are rounded to the dtype of the parameters
        """
        params, inputs, kept = residuals
        has_bias = [layer.b is not None for layer in params]
        own = params[0].W.dtype
        dtype = self.computes_in(own)
        by = power_to_one(A_bar) if has_fewer_exponents(dtype, own) else None
        A_bar = A_bar if by is None else A_bar * by
        errors = backpropagate_errors(self.activations(params), params, kept, A_bar, dtype)
        params_bar = layer_gradients(inputs, errors, has_bias, scale, own)
        X_bar = scaled(matmul(errors[0], params[0].W.astype(dtype)), scale).astype(own)
        if by is None:
            return params_bar, X_bar
        return jax.tree.map(lambda x: x / by, (params_bar, X_bar))

    def computes_in(self, own: Any) -> Any:
        """The dtype of products, for parameters of dtype `own`."""
        if self.dtype is None:
            return own
        if jnp.finfo(self.dtype).bits > jnp.finfo(own).bits:
            raise TypeError(
                f"mlp: dtype, in which products are computed, needs no more bits than the parameters, "
                f"got {jnp.dtype(self.dtype)} and parameters {own}. Leave dtype out."
            )
        return self.dtype

    def __call__(self, params: Params, X: Float[Array, "*batch n_in"]) -> Float[Array, "*batch n_out"]:
        return self.forward(params, X)[0]


def mlp(
    activation: RuleLike | list[Any] | tuple[RuleLike, ...], output: RuleLike = identity, *, dtype: Any = None
) -> Network:
    """A fully connected network: a rule (params, X) -> a^L for `params` of any depth and widths.

    activation: one rule for all hidden layers, or a list with one for each; [] for a single layer
    output: the activation of the last layer; the identity gives logits, as the stable losses take
    dtype: mixed precision. jnp.bfloat16 or jnp.float16 for products in 16 bits of parameters in 32, which
        stay so, and with them the optimiser, as do the sums within products, biases, the outputs, and the
        gradient: its sums are not rounded to 16 bits, as they are where autodiff passes back through a cast.
        What is rounded are weights, activations and errors, each once, by 2⁻⁹ of itself at most in bfloat16
        and 2⁻¹² in float16. The errors' size is taken care of: the pullback is linear, so in float16 it
        multiplies them by the power of two that brings ∂C/∂a^L next to 1, and divides its results, as
        `backprop` does for every example. No loss scale needs to be chosen or adapted. Inputs, activations
        and weights above 65504 are infinite in float16. Second derivatives (`hessian_product` and its kin)
        are computed in the dtype of the parameters.

    Equal arguments give equal networks, so a network may be static under `jax.jit`.

    >>> import fnn, jax, jax.numpy as jnp
    >>> net = fnn.mlp([fnn.tanh, fnn.relu], output=fnn.softmax)
    >>> params = fnn.init(jax.random.key(0), (4, 8, 6, 3))
    >>> net(params, jnp.ones((5, 4))).shape
    (5, 3)
    >>> net(params, jnp.ones(4)).shape
    (3,)
    """
    hidden = tuple(activation) if isinstance(activation, list | tuple) else activation
    for rule in hidden if isinstance(hidden, tuple) else (hidden,):
        check_rule_like("mlp: an activation", rule, "z", such_as="fnn.relu or fnn.leaky_relu(0.01)")
    check_rule_like("mlp: the output activation", output, "z", such_as="fnn.softmax")
    if dtype is not None:
        try:
            dtype = jnp.dtype(dtype)
            is_float = jnp.issubdtype(dtype, jnp.floating) and 16 <= jnp.finfo(dtype).bits <= 32
        except (TypeError, ValueError):
            is_float = False
        if not is_float:
            raise TypeError(f"mlp: dtype needs to be jnp.bfloat16, float16 or float32, got {dtype!r}.")
    return Network(hidden, output, dtype)


class CostResiduals(NamedTuple):
    network: Any
    loss: Any
    losses: Array  # C_n
    weights: Array  # c_n = ∂C/∂C_n, in at least 32 bits
    weight_slope: Array | None  # ∂C/∂w_n, None without sample weights
    params: Any


@dataclass(frozen=True)
class Cost:
    """The cost of a network over a batch as a rule: (params, X, y[, sample_weight]) -> C. Made by `cost`."""

    net: RuleLike
    loss: RuleLike
    l2: float | Array
    reduction: str

    def forward(
        self, params: Any, X: Array, y: Array, sample_weight: Array | None = None
    ) -> tuple[Float[Array, ""], CostResiduals]:
        A, network = self.net.forward(params, X)
        losses, loss = self.loss.forward(A, y)
        if isinstance(self.net, Network) and jnp.shape(losses) != A.shape[:-1]:
            raise ValueError(
                f"cost: the loss needs to return one number per example, shape {A.shape[:-1]} for outputs "
                f"{A.shape}; {self.loss!r} returned {jnp.shape(losses)}. The mean over them is the cost's."
            )
        if losses.size == 0:
            raise ValueError(f"cost: the batch is empty, X {jnp.shape(X)}; it needs at least one example.")
        L, N, dtype = widened(losses), losses.size, losses.dtype
        if sample_weight is None:
            # C = (1/N) Σ C_n
            weights, weight_slope = jnp.full_like(L, 1 / N), None
            C = jnp.mean(L)
        elif self.reduction == "mean":
            # C = (1/N) Σ w_n C_n,  ∂C/∂w_n = C_n / N
            _check_sample_weight(sample_weight, losses)
            w = widened(sample_weight)
            weights, weight_slope = w / N, (L / N).astype(dtype)
            C = jnp.mean(w * L)
        else:
            # C = Σ w_n C_n / Σ w_n,  ∂C/∂w_n = (C_n - C) / Σ w_n;  0 if all w_n are 0
            _check_sample_weight(sample_weight, losses)
            w = widened(sample_weight)
            total = jnp.sum(w)
            total = jnp.where(total == 0, 1, total)
            C = jnp.sum(w * L) / total
            weights, weight_slope = w / total, ((L - C) / total).astype(dtype)
        residuals = CostResiduals(network, loss, losses, weights, weight_slope, params)
        if self._has_penalty:
            for W in _weights(params):
                C = C + _as(self.l2, C) / 2 * jnp.sum(widened(W) ** 2).astype(C.dtype)  # ½ λ ‖W^l‖²
        return C.astype(dtype), residuals

    def pullback(self, residuals: CostResiduals, C_bar: Float[Array, ""]) -> tuple[Any, ...]:
        """The adjoints of params, X and y, and of sample_weight if there was one."""
        net, dtype = self.net, residuals.losses.dtype
        # Weights are about 1/N, which in float16 could push the errors below the smallest number. Since the
        # pullback is linear they keep their size, and this factor comes after the sums over the batch.
        unit = weight_unit(residuals.losses.size, dtype) if isinstance(net, Network) else 1.0
        C_bars = scaled(widened(C_bar) * residuals.weights, 1 / unit).astype(dtype)
        A_bar, y_bar = check_adjoints(self.loss, self.loss.pullback(residuals.loss, C_bars), 2)
        if isinstance(net, Network):
            params_bar, X_bar = net.pullback(residuals.network, A_bar, unit)
        else:
            params_bar, X_bar = net.pullback(residuals.network, A_bar)
        if y_bar is not None:
            y_bar = scaled(y_bar, unit)
        penalty = self.penalty_gradient(residuals.params)
        if penalty is not None:
            params_bar = add_penalty(params_bar, tuple(C_bar * P for P in penalty))
        if residuals.weight_slope is None:
            return params_bar, X_bar, y_bar
        return params_bar, X_bar, y_bar, C_bar * residuals.weight_slope

    def penalty_gradient(self, params: Params) -> tuple[Array, ...] | None:
        """λ W^l, the gradient of ½ λ Σ ‖W^l‖² for every layer; None if there is no penalty."""
        return tuple(_as(self.l2, W) * W for W in _weights(params)) if self._has_penalty else None

    @property
    def _has_penalty(self) -> bool:
        return isinstance(self.l2, jax.Array) or self.l2 != 0

    def __call__(
        self, params: Any, X: Array, y: Array, sample_weight: Array | None = None
    ) -> Float[Array, ""]:
        return self.forward(params, X, y, sample_weight)[0]


def cost(net: RuleLike, loss: RuleLike, *, l2: float | Array = 0.0, reduction: str = "mean") -> Cost:
    """The cost of a network over a batch: a rule (params, X, y[, sample_weight]) -> scalar.

    C = mean of the losses + ½ l2 Σ_l ‖W^l‖²  (biases are not penalised)

    net: made by `mlp`, or any rule (params, X) -> a
    loss: a rule (a, y) -> one number per example
    l2: λ ≥ 0
    reduction: what `sample_weight` (N,) means; without one both are the plain mean
        "mean"            (1/N) Σ w_n C_n, the default: an example of weight 2 counts as if it stood
                          twice, but the divisor stays N, so weights need not sum to anything
        "weighted_mean"   Σ w_n C_n / Σ w_n: only ratios of weights matter; 0 if all are 0

    Shapes and dtypes are checked when called; y's values (labels out of range) by `fit`.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = fnn.init(jax.random.key(0), (3, 5, 2))
    >>> cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels, l2=1e-4)
    >>> cost(params, jnp.ones((4, 3)), jnp.array([0, 1, 1, 0])).shape
    ()
    """
    check_rule_like("cost: the network", net, "params", "X", such_as="fnn.mlp(fnn.relu)")
    check_rule_like("cost: the loss", loss, "a", "y", such_as="fnn.squared_error or fnn.huber_loss(1.0)")
    if isinstance(loss, Network):
        raise TypeError(
            "cost: the network comes first, then the loss, as in fnn.cost(net, fnn.squared_error); "
            f"got {loss!r} as the loss."
        )
    if reduction not in ("mean", "weighted_mean"):
        raise ValueError(f'cost: reduction needs to be "mean" or "weighted_mean", got {reduction!r}.')
    traced = isinstance(l2, Tracer)  # a penalty per member under vmap: its value is not known here
    try:
        number = 0.0 if traced and jnp.shape(l2) == () else float(l2)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if isinstance(l2, bool | str | bytes) or not 0 <= number < float("inf"):
        raise ValueError(f"cost: l2 needs to be a finite number, at least 0, such as 1e-4; got {l2!r}.")
    l2 = l2 if traced else number
    return Cost(net, loss, l2, reduction)


def _weights(params: Any) -> list[Array]:
    check_params("cost: a penalty l2 reads W^l of every layer, so", params)
    return [layer.W for layer in params]


def _as(number: float | Array, like: Array) -> Array:
    return jnp.asarray(number).astype(like.dtype)


def _check_inputs(params: Params, X: Any) -> None:
    n, dtype = params[0].W.shape[1], params[0].W.dtype
    if not is_array(X):
        raise TypeError(f"mlp: X needs to be an array (N, {n}), got {type(X).__name__}; use jnp.asarray(X).")
    if X.ndim not in (1, 2) or X.shape[-1] != n:
        hint = "are params of another network?"
        if X.ndim > 2:
            hint = "flatten each example, X.reshape(len(X), -1)."
        elif X.ndim < 2 and n == 1:
            hint = "examples are rows; did you mean X.reshape(-1, 1)?"
        elif X.ndim == 2 and X.shape[0] == n:
            hint = "examples are rows; did you mean X.T?"
        raise ValueError(
            f"mlp: X needs shape (N, {n}), or ({n},) for a single example, to fit W of layer 1 "
            f"{params[0].W.shape}; got {X.shape}: {hint}"
        )
    if X.dtype != dtype:
        raise TypeError(
            f"mlp: X and params need the same dtype, got X {X.dtype} and params {dtype}. "
            f"Nothing is cast in silence: use X.astype({dtype}), or params of X's dtype."
        )
    check_not_narrowed("mlp: X, as params,", dtype)


def _check_sample_weight(sample_weight: Any, losses: Array) -> None:
    if not is_array(sample_weight) or sample_weight.shape != losses.shape:
        got = sample_weight.shape if is_array(sample_weight) else type(sample_weight).__name__
        raise ValueError(
            f"cost: sample_weight needs to be an array with one weight per example, shape {losses.shape}; "
            f"got {got}."
        )
    if sample_weight.dtype != losses.dtype:
        raise TypeError(
            f"cost: sample_weight needs the losses' dtype {losses.dtype}, got {sample_weight.dtype}; "
            f"use sample_weight.astype({losses.dtype})."
        )
