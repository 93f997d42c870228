r"""Losses C_n(z_n, y_n), one per example, and their gradients ∂C_n/∂z_n.

A loss maps (Z, y) to one number per example: Z is (N, K) and gives (N,), a single example (K,) gives
a scalar. Sums run over the outputs k = 1..K; the mean over examples is the cost's business
(`network.py`), so no loss contains 1/N. A loss takes the last layer's outputs: logits where its name
says softmax or sigmoid, probabilities for the two at the end of this file.

The pullback gets C̄_n, one number per example, and returns Z̄_n = C̄_n ∂C_n/∂z_n and the same for y.
Integer labels have no gradient: `None`.

Below, p = softmax(z) or σ(z), e = z - y, and sums are over k.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from .activations import sigmoid, softplus
from .elementary import largest, rounded_once, shifted_exponentials, sum_of_others
from .rules import Rule, RuleLike, finite_number, is_array


@rounded_once
def softmax_cross_entropy_forward(Z: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""Cross-entropy of softmax(z) against probabilities y, one per example.

    C_n = -Σ y_k log p_k,  p = softmax(z);  0·log 0 = 0
    ∂C_n/∂z_k = p_k Σ_j y_j - y_k = p_k Σ_{j≠k} y_j - y_k Σ_{j≠k} p_j,  ∂C_n/∂y_k = -log p_k

    Derivation: d log p_k = dz_k - Σ_j p_j dz_j, so dC_n = -Σ y_k dz_k + (Σ_k y_k) Σ_j p_j dz_j; read off
    the factor of dz_k. For labels that sum to one it is p - y. The second form subtracts p_k y_k from both
    terms (Σ p_j = 1), so that nothing cancels where p_k and y_k are both nearly 1.
    Stable: with z_m the largest, log p_k = z_k - z_m - log(1 + Σ_{j≠m} exp(z_j - z_m)), never the
    logarithm of a probability, nor of a sum that has swallowed the small ones.
    Source: Bishop (2006), §4.3.4, eq. 4.108–4.109.

    >>> import fnn, jax.numpy as jnp
    >>> Z, y = jnp.array([[2.0, 0.0, -2.0]]), jnp.array([[0.8, 0.2, 0.0]])
    >>> print(fnn.softmax_cross_entropy(Z, y))
    [0.5429]
    """
    _check_floats("softmax_cross_entropy", Z, y)
    return -jnp.sum(_times_log(y, _log_softmax(Z)), axis=-1), (Z, y)


@rounded_once
def softmax_cross_entropy_pullback(
    residuals: tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]], C_bar: Float[Array, "*batch"]
):
    Z, y = residuals
    e, others = _exponentials_and_others(Z)
    p, rest = e / (e + others), others / (e + others)
    Z_bar = C_bar[..., None] * (p * sum_of_others(y) - y * rest)
    return Z_bar, C_bar[..., None] * -_log_softmax(Z)


softmax_cross_entropy = Rule(softmax_cross_entropy_forward, softmax_cross_entropy_pullback)


@rounded_once
def softmax_cross_entropy_with_integer_labels_forward(
    Z: Float[Array, "*batch K"], y: Integer[Array, "*batch"]
):
    r"""Cross-entropy of softmax(z) against a class number, one per example.

    C_n = -log p_y,  p = softmax(z)
    ∂C_n/∂z = p - e_y  (e_y: one-hot), of which p_y - 1 is computed as -Σ_{j≠y} p_j

    Derivation: d log p_y = dz_y - Σ_j p_j dz_j; read off the factor of dz_n.
    Labels outside 0..K-1 cannot be refused in traced code: they select nothing, and their loss is
    0 with gradient p. `fnn.fit` refuses them.
    Source: Bishop (2006), §4.3.4, eq. 4.109.

    >>> import fnn, jax.numpy as jnp
    >>> Z, y = jnp.array([[2.0, 0.0, -2.0]]), jnp.array([0])
    >>> print(fnn.softmax_cross_entropy_with_integer_labels(Z, y))
    [0.1429]
    """
    _check_class_numbers("softmax_cross_entropy_with_integer_labels", Z, y)
    # Compared in at least 32 bits: class numbers of a uint8 array would wrap at 256.
    dtype = jax.dtypes.canonicalize_dtype(y.dtype if y.dtype.itemsize >= 4 else jnp.int32)
    is_label = jax.lax.broadcasted_iota(dtype, Z.shape, Z.ndim - 1) == y.astype(dtype)[..., None]
    return -jnp.sum(_log_softmax(Z), axis=-1, where=is_label), (Z, is_label)


@rounded_once
def softmax_cross_entropy_with_integer_labels_pullback(
    residuals: tuple[Float[Array, "*batch K"], Bool[Array, "*batch K"]], C_bar: Float[Array, "*batch"]
):
    Z, is_label = residuals
    e, others = _exponentials_and_others(Z)
    return C_bar[..., None] * (jnp.where(is_label, -others, e) / (e + others)), None


softmax_cross_entropy_with_integer_labels = Rule(
    softmax_cross_entropy_with_integer_labels_forward, softmax_cross_entropy_with_integer_labels_pullback
)


@rounded_once
def sigmoid_binary_cross_entropy_forward(Z: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""Cross-entropy of σ(z) against probabilities y, summed over outputs, one per example.

    C_n = -Σ [y_k log σ(z_k) + (1 - y_k) log σ(-z_k)] = Σ [softplus(z_k) - y_k z_k]
    ∂C_n/∂z_k = σ(z_k) - y_k = (1 - y_k) σ(z_k) - y_k σ(-z_k),  ∂C_n/∂y_k = -z_k

    Derivation: log σ(z) = z - softplus(z) and log σ(-z) = -softplus(z); softplus′ = σ.
    Stable: of the two logarithms it takes -y log σ(z) - (1-y) log σ(-z) as they stand, since
    softplus(z) - y z cancels for large z. So does σ - y where both are nearly 1; its second form does not.
    Source: Nielsen (2015), ch. 3, eq. 57 and 61; Bishop (2006), eq. 4.90–4.91.

    >>> import fnn, jax.numpy as jnp
    >>> Z, y = jnp.array([[2.0, -2.0]]), jnp.array([[1.0, 1.0]])
    >>> print(fnn.sigmoid_binary_cross_entropy(Z, y))
    [2.2539]
    """
    _check_floats("sigmoid_binary_cross_entropy", Z, y)
    losses = y * softplus(-Z) + (1 - y) * softplus(Z)
    return jnp.sum(losses, axis=-1), (Z, y)


@rounded_once
def sigmoid_binary_cross_entropy_pullback(
    residuals: tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]], C_bar: Float[Array, "*batch"]
):
    Z, y = residuals
    slopes = (1 - y) * sigmoid(Z) - y * sigmoid(-Z)
    return C_bar[..., None] * slopes, C_bar[..., None] * -Z


sigmoid_binary_cross_entropy = Rule(
    sigmoid_binary_cross_entropy_forward, sigmoid_binary_cross_entropy_pullback
)


@rounded_once
def half_squared_error_forward(Z: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""½ Σ (z_k - y_k)², one per example: the quadratic cost of the textbooks.

    ∂C_n/∂z = z - y
    Source: Nielsen (2015), ch. 2, eq. 27.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.half_squared_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])))
    [2.5]
    """
    _check_floats("half_squared_error", Z, y)
    e = Z - y
    return jnp.sum(e**2, axis=-1) / 2, e


@rounded_once
def half_squared_error_pullback(e: Float[Array, "*batch K"], C_bar: Float[Array, "*batch"]):
    Z_bar = C_bar[..., None] * e
    return Z_bar, -Z_bar


half_squared_error = Rule(half_squared_error_forward, half_squared_error_pullback)


@rounded_once
def squared_error_forward(Z: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""Σ (z_k - y_k)², one per example.

    ∂C_n/∂z = 2 (z - y)
    Source: Bishop (2006), eq. 1.2, there with the factor ½ of `half_squared_error`.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.squared_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])))
    [5.]
    """
    _check_floats("squared_error", Z, y)
    e = Z - y
    return jnp.sum(e**2, axis=-1), e


@rounded_once
def squared_error_pullback(e: Float[Array, "*batch K"], C_bar: Float[Array, "*batch"]):
    Z_bar = C_bar[..., None] * 2 * e
    return Z_bar, -Z_bar


squared_error = Rule(squared_error_forward, squared_error_pullback)


@rounded_once
def mean_squared_error_forward(Z: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""(1/K) Σ (z_k - y_k)², one per example.

    ∂C_n/∂z = (2/K) (z - y)
    Source: Goodfellow et al. (2016), eq. 5.4.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.mean_squared_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])))
    [2.5]
    """
    _check_floats("mean_squared_error", Z, y)
    e = Z - y
    return jnp.mean(e**2, axis=-1), e


@rounded_once
def mean_squared_error_pullback(e: Float[Array, "*batch K"], C_bar: Float[Array, "*batch"]):
    Z_bar = C_bar[..., None] * (2 / e.shape[-1]) * e
    return Z_bar, -Z_bar


mean_squared_error = Rule(mean_squared_error_forward, mean_squared_error_pullback)


@rounded_once
def mean_absolute_error_forward(Z: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""(1/K) Σ |z_k - y_k|, one per example.

    ∂C_n/∂z = sign(z - y) / K; at the kink z = y the slope is 0, as in `jnp.abs`.
    Source: Goodfellow et al. (2016), §6.2.1.2, eq. 6.16.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.mean_absolute_error(jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 4.0]])))
    [1.5]
    """
    _check_floats("mean_absolute_error", Z, y)
    e = Z - y
    return jnp.mean(jnp.abs(e), axis=-1), jnp.sign(e)


@rounded_once
def mean_absolute_error_pullback(sign: Float[Array, "*batch K"], C_bar: Float[Array, "*batch"]):
    Z_bar = C_bar[..., None] / sign.shape[-1] * sign
    return Z_bar, -Z_bar


mean_absolute_error = Rule(mean_absolute_error_forward, mean_absolute_error_pullback)


@rounded_once
def huber_loss_forward(delta: float, Z: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""(1/K) Σ h(z_k - y_k),  h(e) = ½e² for |e| ≤ delta, else delta (|e| - ½ delta).

    ∂C_n/∂z = clip(e, -delta, delta) / K; h′ is continuous, so the knee is no kink.
    Source: Huber (1964); `optax.huber_loss` is its h.
    """
    _check_floats("huber_loss", Z, y)
    e = Z - y
    inside = jnp.clip(e, -delta, delta)
    # ½ inside² within, delta (|e| - ½ delta) beyond, as one formula: inside·(e - ½ inside)
    return jnp.mean(inside * (e - inside / 2), axis=-1), inside


@rounded_once
def huber_loss_pullback(delta: float, inside: Float[Array, "*batch K"], C_bar: Float[Array, "*batch"]):
    Z_bar = C_bar[..., None] / inside.shape[-1] * inside
    return Z_bar, -Z_bar


@cache
def _huber_loss(delta: float) -> Rule:
    return Rule(partial(huber_loss_forward, delta), partial(huber_loss_pullback, delta))


def huber_loss(delta: float = 1.0) -> Rule:
    """The rule of the squared error that grows linearly beyond `delta`, mean over outputs.

    Equal parameters give the same rule, so it may be static under `jax.jit`.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.huber_loss(1.0)(jnp.array([[0.5, 2.0]]), jnp.array([[0.0, 4.0]])))
    [0.8125]
    """
    delta = finite_number("huber_loss", "delta", delta)
    if delta <= 0:
        raise ValueError(f"huber_loss: delta needs to be positive, got {delta}.")
    return _huber_loss(delta)


@rounded_once
def categorical_cross_entropy_forward(P: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""-Σ y_k log p_k of probabilities p, as after a softmax output layer; one per example.

    ∂C_n/∂p_k = -y_k / p_k, and 0 where y_k = 0 (0·log 0 = 0);  ∂C_n/∂y_k = -log p_k

    A probability that has underflowed to 0 gives an infinite loss. Prefer `softmax_cross_entropy` on
    logits, with the identity as output layer: the same function, stable, and its gradient is p - y.
    Source: Goodfellow et al. (2016), §6.2.2.3.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.categorical_cross_entropy(jnp.array([[0.5, 0.25, 0.25]]), jnp.array([[1.0, 0.0, 0.0]])))
    [0.6931]
    """
    _check_floats("categorical_cross_entropy", P, y)
    return -jnp.sum(_times_log(y, jnp.log(P)), axis=-1), (P, y)


@rounded_once
def categorical_cross_entropy_pullback(
    residuals: tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]], C_bar: Float[Array, "*batch"]
):
    P, y = residuals
    return C_bar[..., None] * -_ratio(y, P), C_bar[..., None] * -jnp.log(P)


categorical_cross_entropy = Rule(categorical_cross_entropy_forward, categorical_cross_entropy_pullback)


@rounded_once
def binary_cross_entropy_forward(P: Float[Array, "*batch K"], y: Float[Array, "*batch K"]):
    r"""-Σ [y_k log p_k + (1 - y_k) log(1 - p_k)] of probabilities p, as after a sigmoid output layer.

    ∂C_n/∂p_k = -y_k/p_k + (1 - y_k)/(1 - p_k), where a term with numerator 0 is 0;
    ∂C_n/∂y_k = log(1 - p_k) - log p_k

    A saturated sigmoid (p exactly 0 or 1) gives an infinite loss for the other label. Prefer
    `sigmoid_binary_cross_entropy` on logits, with the identity as output layer: the same function,
    stable, and its gradient is σ(z) - y.
    Source: Nielsen (2015), ch. 3, eq. 57.

    >>> import fnn, jax.numpy as jnp
    >>> print(fnn.binary_cross_entropy(jnp.array([[0.5, 0.25]]), jnp.array([[1.0, 0.0]])))
    [0.9808]
    """
    _check_floats("binary_cross_entropy", P, y)
    losses = _times_log(y, jnp.log(P)) + _times_log(1 - y, jnp.log1p(-P))
    return -jnp.sum(losses, axis=-1), (P, y)


@rounded_once
def binary_cross_entropy_pullback(
    residuals: tuple[Float[Array, "*batch K"], Float[Array, "*batch K"]], C_bar: Float[Array, "*batch"]
):
    P, y = residuals
    P_bar = C_bar[..., None] * (_ratio(1 - y, 1 - P) - _ratio(y, P))
    return P_bar, C_bar[..., None] * (jnp.log1p(-P) - jnp.log(P))


binary_cross_entropy = Rule(binary_cross_entropy_forward, binary_cross_entropy_pullback)


@partial(jax.jit, inline=True)
def _log_softmax(Z: Array) -> Array:
    d, e = shifted_exponentials(Z)
    _, top_sum, rest = largest(e)
    return d - jnp.log1p(rest + (top_sum - 1))  # log Σ e, of which the largest is 1


@partial(jax.jit, inline=True)
def _exponentials_and_others(Z: Array) -> tuple[Array, Array]:
    """e_k and Σ_{j≠k} e_j, for p_k = e_k / Σ_j e_j and 1 - p_k."""
    _, e = shifted_exponentials(Z)
    return e, sum_of_others(e)


def _times_log(y: Array, log_p: Array) -> Array:
    """y·log p with 0·log 0 = 0, its limit. The inner `where` keeps an infinity off the branch not taken,
    so that whoever differentiates this by autodiff gets no NaN."""
    return y * jnp.where(y == 0, 0, log_p)


def _ratio(y: Array, p: Array) -> Array:
    """y/p, and 0 where y = 0: the slope of 0·log p, also at p = 0."""
    return jnp.where(y == 0, 0, y / p)


def _check_floats(name: str, Z: Array, y: Array) -> None:
    """Raises unless Z and y are float arrays of one shape and dtype."""
    _check_outputs(name, Z)
    if not is_array(y):
        raise TypeError(f"{name}: y needs to be an array, got {type(y).__name__}; use jnp.asarray(y).")
    if Z.shape != y.shape:
        hint = "Broadcasting would pair every output with every target."
        if y.shape == Z.shape[:-1]:
            hint = "Did you mean y[..., None]?"
            if Z.shape[-1] > 1:
                classes = jnp.issubdtype(y.dtype, jnp.integer) or name.startswith(("softmax", "categorical"))
                hint = "For one target per example the network needs a last width of 1."
                hint = _LABELS.format(name=name, K=Z.shape[-1]) if classes else hint
        elif Z.shape == y.shape[:-1]:
            hint = "Did you mean y[..., 0], or an output for each target?"
        elif Z.shape[1:] == y.shape[1:]:
            hint = "Are X and y of the same examples?"
        elif Z.shape == y.shape[::-1]:
            hint = "Examples are rows; did you mean y.T?"
        raise ValueError(f"{name}: z and y need equal shapes, got z {Z.shape} and y {y.shape}. {hint}")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise TypeError(
            f"{name}: y needs to be floats as z, {Z.dtype}, got {y.dtype}; use y.astype(z.dtype)."
        )
    if y.dtype != Z.dtype:
        raise TypeError(
            f"{name}: z and y need the same dtype, got z {Z.dtype} and y {y.dtype}; use y.astype(z.dtype)."
        )


_LABELS = (
    "For class numbers use fnn.softmax_cross_entropy_with_integer_labels, or one-hot labels, "
    "jax.nn.one_hot(y, {K}), with {name}."
)


def _check_class_numbers(name: str, Z: Array, y: Array) -> None:
    """Raises unless y is an integer array of Z's batch shape."""
    _check_outputs(name, Z)
    if not is_array(y):
        raise TypeError(f"{name}: y needs to be an array, got {type(y).__name__}; use jnp.asarray(y).")
    if not jnp.issubdtype(y.dtype, jnp.integer):
        probabilities = y.shape == Z.shape
        hint = "For probabilities use fnn.softmax_cross_entropy" if probabilities else "Use y.astype(int)"
        raise TypeError(f"{name}: y needs to be integers, class numbers; got {y.dtype} {y.shape}. {hint}.")
    if y.shape != Z.shape[:-1]:
        hint = "Are X and y of the same examples?"
        if y.shape == (*Z.shape[:-1], 1):
            hint = "Did you mean y[..., 0]?"
        elif y.shape == Z.shape:
            hint = "Did you mean y.argmax(axis=-1), if y is one-hot?"
        raise ValueError(
            f"{name}: y needs one class number per example, shape {Z.shape[:-1]} for z {Z.shape}; "
            f"got y {y.shape}. {hint}"
        )


def _check_outputs(name: str, Z: Array) -> None:
    """Raises unless Z is a float array with an axis of outputs."""
    if not is_array(Z) or not jnp.issubdtype(Z.dtype, jnp.floating):
        raise TypeError(
            f"{name}: z needs to be a float array, got {Z.dtype if is_array(Z) else type(Z).__name__}; "
            "use jnp.asarray(z, float)."
        )
    if Z.ndim == 0 or Z.shape[-1] == 0:
        raise ValueError(
            f"{name}: z needs shape (N, K), or (K,) for a single example, with K ≥ 1; got {Z.shape}."
        )


def check_labels(loss: RuleLike, y: np.ndarray, n_outputs: int) -> None:
    """Raises ValueError if y holds labels that `loss` has no meaning for.

    Values cannot be checked in traced code; `fnn.fit` checks them here, on the host. Class numbers
    must lie in 0..n_outputs-1; probabilities in [0, 1], and for the softmax losses sum to one.

    >>> import fnn, numpy as np
    >>> fnn.check_labels(fnn.softmax_cross_entropy_with_integer_labels, np.array([0, 3, -1]), 3)
    Traceback (most recent call last):
        ...
    ValueError: softmax_cross_entropy_with_integer_labels: labels need to lie in 0..2, \
one for each of the 3 outputs; got 3 at index 1 (2 of 3 are outside). Count classes from 0.
    """
    of_softmax = (softmax_cross_entropy, softmax_cross_entropy_with_integer_labels, categorical_cross_entropy)
    if loss in of_softmax and n_outputs < 2:
        raise ValueError(
            f"{loss!r}: needs two outputs or more, got {n_outputs}: the softmax of one number is always 1. "
            "For two classes and one output use fnn.sigmoid_binary_cross_entropy."
        )
    y = np.asarray(y)
    if loss == softmax_cross_entropy_with_integer_labels:
        wrong = (y < 0) | (y >= n_outputs)
        what = f"labels need to lie in 0..{n_outputs - 1}, one for each of the {n_outputs} outputs"
        hint = "Count classes from 0."
    elif loss in (sigmoid_binary_cross_entropy, binary_cross_entropy):
        wrong = ~((y >= 0) & (y <= 1))
        what = "labels are probabilities and need to lie in [0, 1]"
        hint = "Labels -1 and 1 become 0 and 1 by (y + 1) / 2."
    elif loss in (softmax_cross_entropy, categorical_cross_entropy):
        # Sums of rounded probabilities: K terms, each off by at most one rounding.
        rounding = float(jnp.finfo(y.dtype).eps) if jnp.issubdtype(y.dtype, jnp.floating) else 0.0
        slack = 4 * n_outputs * rounding
        sums = y.astype(np.float64).sum(axis=-1, keepdims=True)
        wrong = ~((y >= 0) & (abs(sums - 1) <= slack))
        what = "labels are probabilities: at least 0, and every row needs to sum to 1"
        hint = "Divide every row by its sum, y / y.sum(axis=-1, keepdims=True)."
    else:
        return
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        place = first[0] if len(first) == 1 else first
        raise ValueError(
            f"{loss!r}: {what}; got {y[first]} at index {place} "
            f"({wrong.sum():,} of {wrong.size:,} are outside). {hint}"
        )
