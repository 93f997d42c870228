"""Wrong derivatives, of the kinds people make who derive them by hand.

Every case is wrong: by mathematics at the point given or elsewhere, by digits lost in its own dtype, or by
contract. `WRONG` maps a mistake in words to a builder, which makes its arrays anew: some candidates change
their argument, or remember. Written for x64, and for strict promotion of dtypes and ranks.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln


class Case(NamedTuple):
    kind: str  # "gradient", "value", "rule", "jvp"
    f: Any  # the function; for "rule" the pair (fwd, bwd)
    candidate: Callable | None  # the gradient, the (value, gradient) or the jvp; None for "rule"
    args: tuple
    argnums: int | tuple[int, ...] = 0


WRONG: dict[str, Callable[[], Case]] = {}
ALL = ("float64", "float32", "bfloat16", "float16")
FULL = ("float64", "float32")  # where linear algebra exists, or 16 bits would round the mistake away


class Draw:
    """Arrays of one dtype, from a seed that belongs to the case."""

    def __init__(self, name: str, dtype: str):
        self.dtype = jnp.dtype(dtype)
        self._rng = np.random.default_rng(zlib.crc32(name.encode()))

    def of(self, numbers) -> jax.Array:
        return jax.device_put(np.asarray(numbers, np.float64).astype(self.dtype))  # which compiles nothing

    def normal(self, *shape: int, scale: float = 1.0) -> jax.Array:
        return self.of(scale * self._rng.normal(size=shape))

    def uniform(self, low: float, high: float, *shape: int) -> jax.Array:
        return self.of(self._rng.uniform(low, high, size=shape))

    def integers(self, n: int, *shape: int) -> jax.Array:
        return jax.device_put(self._rng.integers(n, size=shape))

    def probabilities(self, *shape: int) -> jax.Array:
        p = np.exp(self._rng.normal(size=shape))
        return self.of(p / p.sum(axis=-1, keepdims=True))

    def positive_definite(self, n: int) -> jax.Array:
        a = self._rng.normal(size=(n, n))
        return self.of(a @ a.T / n + np.eye(n))

    def invertible(self, n: int) -> jax.Array:
        return self.of(self._rng.normal(size=(n, n)) / np.sqrt(n) + 2 * np.eye(n))


def wrong(name: str, *dtypes: str):
    """Enters a builder into `WRONG`, once per dtype; float64 goes without saying."""

    def enter(build: Callable[[Draw], Case]):
        for dtype in dtypes or ("float64",):
            key = name if dtype == "float64" else f"{name}, {dtype}"
            if key in WRONG:
                raise KeyError(f"two cases are named {key!r}")
            WRONG[key] = partial(lambda dtype: build(Draw(name, dtype)), dtype)
        return build

    return enter


# Constants of a mean of squares.


def regression(w, X, y):
    """½ mean (X w - y)²; its gradient is Xᵀ(X w - y) / N."""
    return 0.5 * jnp.mean((X @ w - y) ** 2)


def regression_gradient(w, X, y):
    return X.T @ (X @ w - y) / X.shape[0]


def regression_data(draw: Draw):
    return draw.normal(5), draw.normal(8, 5), draw.normal(8)


def scaled_regression(name: str, factor: float, *dtypes: str):
    @wrong(name, *dtypes)
    def _(draw):
        def gradient(w, X, y):  # the factor itself is not rounded to 16 bits
            wide = jnp.float64 if w.dtype == jnp.float64 else jnp.float32
            return (regression_gradient(*(a.astype(wide) for a in (w, X, y))) * factor).astype(w.dtype)

        return Case("gradient", regression, gradient, regression_data(draw))


scaled_regression("relative error 1e-4", 1 + 1e-4, "float32")
scaled_regression("relative error 1e-6", 1 + 1e-6, "float64")
scaled_regression("relative error 1e-9", 1 + 1e-9, "float64")
scaled_regression("relative error 1e-3", 1 + 1e-3, "bfloat16", "float16")
scaled_regression("relative error 5e-2", 1 + 5e-2, "bfloat16", "float16")
scaled_regression("wrong sign", -1.0, *ALL)
scaled_regression("1/N twice", 1 / 8, "float64", "bfloat16")
scaled_regression("½ of the square forgotten", 2.0, "float32", "float16")
scaled_regression("½ counted twice", 0.5, "float64")
scaled_regression("zero everywhere", 0.0, "float64")


@wrong("1/N dropped", *ALL)
def _(draw):
    return Case("gradient", regression, lambda w, X, y: X.T @ (X @ w - y), regression_data(draw))


@wrong("1/N over features instead of examples")
def _(draw):
    return Case("gradient", regression, lambda w, X, y: X.T @ (X @ w - y) / X.shape[1], regression_data(draw))


@wrong("1/(N-1) for 1/N", "float64")
def _(draw):
    return Case(
        "gradient", regression, lambda w, X, y: X.T @ (X @ w - y) / (X.shape[0] - 1), regression_data(draw)
    )


@wrong("target's sign: y added", "float32")
def _(draw):
    return Case("gradient", regression, lambda w, X, y: X.T @ (X @ w + y) / 8, regression_data(draw))


@wrong("last example left out", *ALL)
def _(draw):
    def gradient(w, X, y):
        return X[:-1].T @ (X[:-1] @ w - y[:-1]) / X.shape[0]

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("first example left out", "float32")
def _(draw):
    def gradient(w, X, y):
        return X[1:].T @ (X[1:] @ w - y[1:]) / X.shape[0]

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("only the first example of the batch", "float32", "bfloat16")
def _(draw):
    return Case("gradient", regression, lambda w, X, y: X[0] * (X[0] @ w - y[0]), regression_data(draw))


@wrong("mean of the residual before the product", "float32")
def _(draw):
    def gradient(w, X, y):
        return jnp.mean(X, axis=0) * jnp.mean(X @ w - y)

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("two entries swapped", "float64", "float16")
def _(draw):
    def gradient(w, X, y):
        return regression_gradient(w, X, y)[jnp.array([0, 2, 1, 3, 4])]

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("one entry zero", "float32")
def _(draw):
    return Case(
        "gradient", regression, lambda *a: regression_gradient(*a).at[3].set(0.0), regression_data(draw)
    )


@wrong("entries shifted by one", "float32")
def _(draw):
    return Case(
        "gradient", regression, lambda *a: jnp.roll(regression_gradient(*a), 1), regression_data(draw)
    )


@wrong("one entry of 300 off by 1%", "float64")
def _(draw):
    def f(x, c):
        return jnp.sum(c * jnp.sin(x))

    def gradient(x, c):
        g = c * jnp.cos(x)
        return g.at[217].multiply(1.01)

    return Case("gradient", f, gradient, (draw.normal(300), draw.uniform(0.5, 2, 300)))


@wrong("normalised to length one", "float64", "bfloat16")
def _(draw):
    def gradient(w, X, y):
        g = regression_gradient(w, X, y)
        return g / jnp.sqrt(jnp.sum(g * g))

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("clipped by norm")
def _(draw):
    def gradient(w, X, y):
        g = regression_gradient(w, X, y)
        return g * jnp.minimum(1.0, 0.1 / jnp.sqrt(jnp.sum(g * g)))

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("clipped entry by entry", "float32")
def _(draw):
    def gradient(w, X, y):
        return jnp.clip(regression_gradient(w, X, y), -0.1, 0.1)

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("sign of the gradient")
def _(draw):
    return Case("gradient", regression, lambda *a: jnp.sign(regression_gradient(*a)), regression_data(draw))


@wrong("preconditioned: a Newton step", "float32")
def _(draw):
    def gradient(w, X, y):
        return regression_gradient(w, X, y) / jnp.mean(X**2, axis=0)

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("weights updated first, gradient at the new weights", "float32")
def _(draw):
    def gradient(w, X, y):
        return regression_gradient(w - 0.01 * regression_gradient(w, X, y), X, y)

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("one-sided difference with a large step", "float32")
def _(draw):
    def gradient(w, X, y):
        steps = 0.05 * jnp.eye(w.size, dtype=w.dtype)
        return jnp.stack([(regression(w + h, X, y) - regression(w, X, y)) / 0.05 for h in steps])

    return Case("gradient", regression, gradient, regression_data(draw))


# A network, z^l = a^{l-1} W^lᵀ + b^l, tanh but in the last layer, ½ mean square plus ½ λ ‖W‖².

LAMBDA = 0.1


def mlp_forward(params, X):
    Z, A = [], [X]
    for W, b in params:
        Z.append(A[-1] @ W.T + b[None, :])
        A.append(jnp.tanh(Z[-1]) if len(Z) < len(params) else Z[-1])
    return Z, A


def mlp_cost(params, X, y):
    penalty = sum(jnp.sum(W**2) for W, _ in params)
    return 0.5 * jnp.sum((mlp_forward(params, X)[1][-1] - y) ** 2) / X.shape[0] + 0.5 * LAMBDA * penalty


def mlp_gradient(
    params,
    X,
    y,
    slope=lambda z, a: 1 - a**2,
    slope_at=lambda l: l,
    last_slope=lambda z, a: jnp.ones_like(z),
    back=lambda delta, W: delta @ W,
    weights=lambda delta, a: delta.T @ a,
    input_of=lambda l: l,
    bias=lambda delta: jnp.sum(delta, axis=0),
    penalty=lambda W, b: (LAMBDA * W, jnp.zeros_like(b)),
):
    """Right as it stands; a case replaces one piece."""
    Z, A = mlp_forward(params, X)
    delta = (A[-1] - y) / X.shape[0] * last_slope(Z[-1], A[-1])
    gradient = []
    for l in reversed(range(len(params))):
        W, b = params[l]
        dW, db = penalty(W, b)
        gradient.append((weights(delta, A[input_of(l)]) + dW, bias(delta) + db))
        if l > 0:
            k = slope_at(l - 1)
            delta = back(delta, W) * slope(Z[k], A[k + 1])
    return gradient[::-1]


def mlp_data(draw: Draw, sizes=(4, 4, 4, 4), n=4):
    params = [
        (draw.normal(o, i, scale=0.7), draw.normal(o, scale=0.5))
        for i, o in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    return params, draw.normal(n, sizes[0]), draw.normal(n, sizes[-1])


def wrong_piece(name: str, *dtypes: str, sizes=(4, 4, 4, 4), n=4, **pieces):
    @wrong(name, *dtypes)
    def _(draw):
        return Case("gradient", mlp_cost, partial(mlp_gradient, **pieces), mlp_data(draw, sizes, n))


wrong_piece("W not transposed, square layers", *ALL, back=lambda delta, W: delta @ W.T)
wrong_piece("∂C/∂W transposed, square layers", "float32", "float16", weights=lambda delta, a: a.T @ delta)
wrong_piece(
    "bias summed over the wrong axis, N = width", "float64", bias=lambda delta: jnp.sum(delta, axis=1)
)
wrong_piece("bias averaged", *ALL, sizes=(3, 5, 4, 2), n=6, bias=lambda delta: jnp.mean(delta, axis=0))
wrong_piece(
    "bias not summed",
    sizes=(3, 5, 4, 2),
    n=6,
    bias=lambda delta: delta,
    penalty=lambda W, b: (LAMBDA * W, 0.0),
)
wrong_piece("bias gradient of the first row", sizes=(3, 5, 4, 2), n=6, bias=lambda delta: delta[0])
wrong_piece(
    "bias gradient keeps its row axis",
    "float32",
    bias=lambda d: jnp.sum(d, axis=0, keepdims=True),
    penalty=lambda W, b: (LAMBDA * W, 0.0),
)
wrong_piece("tanh' of z instead of a", *ALL, sizes=(3, 5, 4, 2), slope=lambda z, a: 1 - z**2)
wrong_piece("tanh' of a where z belongs", sizes=(3, 5, 4, 2), slope=lambda z, a: 1 - jnp.tanh(a) ** 2)
wrong_piece("tanh' without the square", "float32", sizes=(3, 5, 4, 2), slope=lambda z, a: 1 - a)
wrong_piece("sigmoid' for tanh'", "float32", sizes=(3, 5, 4, 2), slope=lambda z, a: a * (1 - a))
wrong_piece("σ' forgotten", "float32", "bfloat16", sizes=(3, 5, 4, 2), slope=lambda z, a: jnp.ones_like(z))
wrong_piece("σ' of the wrong layer", "float64", "float16", slope_at=lambda l: min(l + 1, 1))
wrong_piece(
    "σ' at the linear output", "float32", sizes=(3, 5, 4, 2), last_slope=lambda z, a: 1 - jnp.tanh(z) ** 2
)
wrong_piece("a of the layer itself, not of the one before", "float64", "bfloat16", input_of=lambda l: l + 1)
wrong_piece("input X in every layer", "float32", input_of=lambda l: 0)
wrong_piece(
    "W updated before the error passes it", "float64", "float32", back=lambda delta, W: delta @ (0.99 * W)
)
wrong_piece("error not passed on", sizes=(3, 5, 4, 2), back=lambda delta, W: jnp.zeros_like(delta @ W))
wrong_piece("l2 missing", *ALL, sizes=(3, 5, 4, 2), penalty=lambda W, b: (0 * W, 0 * b))
wrong_piece(
    "l2 on the bias too",
    "float32",
    "float16",
    sizes=(3, 5, 4, 2),
    penalty=lambda W, b: (LAMBDA * W, LAMBDA * b),
)
wrong_piece("l2 without ½", "float64", sizes=(3, 5, 4, 2), penalty=lambda W, b: (2 * LAMBDA * W, 0 * b))
wrong_piece("l2 over N", sizes=(3, 5, 4, 2), n=6, penalty=lambda W, b: (LAMBDA / 6 * W, 0 * b))
wrong_piece("l1 for l2", "float32", sizes=(3, 5, 4, 2), penalty=lambda W, b: (LAMBDA * jnp.sign(W), 0 * b))
wrong_piece("error times the weights' mean", "float32", back=lambda d, W: d @ W - jnp.mean(d @ W))


@wrong("layers in the order of the sweep", "float32", "bfloat16")
def _(draw):
    return Case("gradient", mlp_cost, lambda *a: mlp_gradient(*a)[::-1], mlp_data(draw))


@wrong("two biases exchanged", "float64", "float16")
def _(draw):
    def gradient(params, X, y):
        (W1, b1), (W2, b2), last = mlp_gradient(params, X, y)
        return [(W1, b2), (W2, b1), last]

    return Case("gradient", mlp_cost, gradient, mlp_data(draw))


@wrong("first layer frozen", "float32")
def _(draw):
    def gradient(params, X, y):
        first, *rest = mlp_gradient(params, X, y)
        return [jax.tree.map(jnp.zeros_like, first), *rest]

    return Case("gradient", mlp_cost, gradient, mlp_data(draw, (3, 5, 4, 2)))


@wrong("activations of the previous batch", "float32")
def _(draw):
    params, X, y = mlp_data(draw)
    before = draw.normal(4, 4)

    def gradient(params, X, y):
        return mlp_gradient(params, before.astype(X.dtype), y)

    return Case("gradient", mlp_cost, gradient, (params, X, y))


@wrong("gradient of the input without its last W", "float32")
def _(draw):
    def f(X, W, V):
        return jnp.sum(jnp.tanh(X @ W.T) @ V.T)

    def gradient(X, W, V):
        return (1 - jnp.tanh(X @ W.T) ** 2) @ W

    return Case("gradient", f, gradient, (draw.normal(6, 3), draw.normal(4, 3), draw.normal(2, 4)))


@wrong("skip connection forgotten on the way back", "float64", "bfloat16")
def _(draw):
    def f(x, W):
        return jnp.sum((x + jnp.tanh(x @ W.T)) ** 2)

    def gradient(x, W):
        a = jnp.tanh(x @ W.T)
        return (2 * (x + a) * (1 - a**2)) @ W

    return Case("gradient", f, gradient, (draw.normal(5, 4), draw.normal(4, 4)))


@wrong("shared weights counted in one place only", "float32", "float16")
def _(draw):
    def f(W, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ W.T) @ W.T))

    def gradient(W, x):
        a = jnp.tanh(x @ W.T)
        return (1 - jnp.tanh(a @ W.T) ** 2).T @ a

    return Case("gradient", f, gradient, (draw.normal(4, 4, scale=0.5), draw.normal(5, 4)))


@wrong("tied embeddings: the output side forgotten", "float32")
def _(draw):
    def f(E, x, v):
        return jnp.sum(v * jnp.tanh((x @ E) @ E.T))

    def gradient(E, x, v):
        d = v * (1 - jnp.tanh((x @ E) @ E.T) ** 2)
        return x.T @ (d @ E)

    return Case("gradient", f, gradient, (draw.normal(6, 3), draw.normal(4, 6), draw.normal(4, 6)))


# Softmax and cross-entropy.


def cross_entropy(Z, Y):
    return -jnp.mean(jnp.sum(Y * jax.nn.log_softmax(Z, axis=-1), axis=-1))


@wrong("softmax Jacobian: the diagonal only", *ALL)
def _(draw):
    def f(z, v):
        return jnp.sum(v * jax.nn.softmax(z))

    def gradient(z, v):
        p = jax.nn.softmax(z)
        return v * p * (1 - p)

    return Case("gradient", f, gradient, (draw.normal(6), draw.normal(6)))


@wrong("softmax Jacobian: the diagonal missing", "float32")
def _(draw):
    def gradient(z, v):
        p = jax.nn.softmax(z)
        return -p * jnp.sum(p * v)

    return Case(
        "gradient",
        lambda z, v: jnp.sum(v * jax.nn.softmax(z)),
        gradient,
        (draw.normal(6), draw.normal(6)),
    )


@wrong("softmax over the wrong axis", "float64")
def _(draw):
    def gradient(Z, Y):
        return (jax.nn.softmax(Z, axis=0) - Y) / Z.shape[0]

    return Case("gradient", cross_entropy, gradient, (draw.normal(5, 4), draw.probabilities(5, 4)))


@wrong("p - y though the soft labels do not sum to 1", "float32", "bfloat16")
def _(draw):
    def gradient(Z, Y):
        return (jax.nn.softmax(Z, axis=-1) - Y) / Z.shape[0]

    return Case("gradient", cross_entropy, gradient, (draw.normal(5, 4), draw.uniform(0.1, 1, 5, 4)))


@wrong("cross-entropy: y - p", "float16")
def _(draw):
    def gradient(Z, Y):
        return (Y - jax.nn.softmax(Z, axis=-1)) / Z.shape[0]

    return Case("gradient", cross_entropy, gradient, (draw.normal(5, 4), draw.probabilities(5, 4)))


@wrong("cross-entropy: stops at ∂C/∂p = -y/p", "float32")
def _(draw):
    def gradient(Z, Y):
        return -Y / jax.nn.softmax(Z, axis=-1) / Z.shape[0]

    return Case("gradient", cross_entropy, gradient, (draw.normal(5, 4), draw.probabilities(5, 4)))


@wrong("cross-entropy: softmax' applied once more", "float32")
def _(draw):
    def gradient(Z, Y):
        p = jax.nn.softmax(Z, axis=-1)
        return (p - Y) * p * (1 - p) / Z.shape[0]

    return Case("gradient", cross_entropy, gradient, (draw.normal(5, 4), draw.probabilities(5, 4)))


def cross_entropy_with_numbers(Z, y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(Z, axis=-1), y[:, None], axis=-1))


@wrong("class numbers off by one", "float64", "float16")
def _(draw):
    def gradient(Z, y):
        hot = jax.nn.one_hot((y + 1) % Z.shape[1], Z.shape[1], dtype=Z.dtype)
        return (jax.nn.softmax(Z, axis=-1) - hot) / Z.shape[0]

    return Case("gradient", cross_entropy_with_numbers, gradient, (draw.normal(6, 4), draw.integers(4, 6)))


@wrong("1 subtracted from the whole columns, not from each row's label", "float32")
def _(draw):
    def gradient(Z, y):
        return jax.nn.softmax(Z, axis=-1).at[:, y].add(-1.0) / Z.shape[0]

    return Case("gradient", cross_entropy_with_numbers, gradient, (draw.normal(6, 4), draw.integers(4, 6)))


@wrong("p - y with hardened p")
def _(draw):
    def gradient(Z, y):
        top = jax.nn.one_hot(jnp.argmax(Z, axis=-1), Z.shape[1], dtype=Z.dtype)
        return (top - jax.nn.one_hot(y, Z.shape[1], dtype=Z.dtype)) / Z.shape[0]

    return Case("gradient", cross_entropy_with_numbers, gradient, (draw.normal(6, 4), draw.integers(4, 6)))


@wrong("label smoothing forgotten on the way back", "float64")
def _(draw):
    def f(Z, Y):
        return cross_entropy(Z, 0.9 * Y + 0.1 / Y.shape[1])

    def gradient(Z, Y):
        return (jax.nn.softmax(Z, axis=-1) - Y) / Z.shape[0]

    return Case("gradient", f, gradient, (draw.normal(5, 4), draw.probabilities(5, 4)))


@wrong("temperature forgotten on the way back", "float32")
def _(draw):
    def f(Z, Y):
        return cross_entropy(Z / 2, Y)

    def gradient(Z, Y):
        return (jax.nn.softmax(Z / 2, axis=-1) - Y) / Z.shape[0]

    return Case("gradient", f, gradient, (draw.normal(5, 4), draw.probabilities(5, 4)))


@wrong("class weights forgotten", "float32")
def _(draw):
    def f(Z, Y, w):
        return cross_entropy(Z, Y * w[None, :])

    def gradient(Z, Y, w):
        return (jax.nn.softmax(Z, axis=-1) - Y) / Z.shape[0]

    return Case(
        "gradient", f, gradient, (draw.normal(5, 4), draw.probabilities(5, 4), draw.uniform(0.5, 2, 4))
    )


@wrong("ignored examples counted in N", "float32")
def _(draw):
    def f(Z, Y, keep):
        return -jnp.sum(keep * jnp.sum(Y * jax.nn.log_softmax(Z, axis=-1), axis=-1)) / jnp.sum(keep)

    def gradient(Z, Y, keep):
        return keep[:, None] * (jax.nn.softmax(Z, axis=-1) - Y) / Z.shape[0]

    return Case(
        "gradient", f, gradient, (draw.normal(5, 4), draw.probabilities(5, 4), draw.of([1, 0, 1, 1, 0]))
    )


@wrong("log-softmax: Σv taken for 1", "float64", "bfloat16")
def _(draw):
    def f(z, v):
        return jnp.sum(v * jax.nn.log_softmax(z))

    def gradient(z, v):
        return v - jax.nn.softmax(z)

    return Case("gradient", f, gradient, (draw.normal(6), draw.normal(6)))


def binary_cross_entropy(z, y):
    return jnp.mean(jax.nn.softplus(z) - y * z)


@wrong("sigmoid' applied to the logits' error", "float32", "float16")
def _(draw):
    def gradient(z, y):
        p = jax.nn.sigmoid(z)
        return (p - y) * p * (1 - p) / z.size

    return Case("gradient", binary_cross_entropy, gradient, (draw.normal(7), draw.uniform(0, 1, 7)))


@wrong("binary cross-entropy: the 1-y term missing", "float32")
def _(draw):
    def gradient(z, y):
        return -y * (1 - jax.nn.sigmoid(z)) / z.size

    return Case("gradient", binary_cross_entropy, gradient, (draw.normal(7), draw.uniform(0, 1, 7)))


@wrong("weight of the positives forgotten", "float32")
def _(draw):
    def f(z, y):
        return jnp.mean(3 * y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z))

    return Case(
        "gradient",
        f,
        lambda z, y: (jax.nn.sigmoid(z) - y) / z.size,
        (draw.normal(7), draw.uniform(0, 1, 7)),
    )


# Activations, f = Σ c σ(x).


def wrong_slope(name: str, sigma: Callable, slope: Callable, *dtypes: str, points=None):
    @wrong(name, *dtypes)
    def _(draw):
        x = draw.of(np.linspace(-3.05, 2.95, 13) if points is None else points)
        return Case(
            "gradient",
            lambda x, c: jnp.sum(c * sigma(x)),
            lambda x, c: c * slope(x),
            (x, draw.uniform(0.5, 2, x.size)),
        )


def normal_cdf(x):
    return 0.5 * (1 + jax.scipy.special.erf(x / np.sqrt(2.0).item()))


def tanh_gelu_slope(x):
    k = np.sqrt(2 / np.pi).item()
    t = jnp.tanh(k * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * k * (1 + 3 * 0.044715 * x**2)


wrong_slope("relu: slope on the wrong side", jax.nn.relu, lambda x: jnp.where(x < 0, 1.0, 0.0), *ALL)
wrong_slope("relu: slope everywhere", jax.nn.relu, jnp.ones_like)
wrong_slope("relu: value for slope", jax.nn.relu, jax.nn.relu, "float32")
wrong_slope(
    "leaky relu: sign", jax.nn.leaky_relu, lambda x: jnp.where(x > 0, 1.0, -0.01), "float64", "float32"
)
wrong_slope(
    "leaky relu: zero on the left", jax.nn.leaky_relu, lambda x: jnp.where(x > 0, 1.0, 0.0), "float64"
)
wrong_slope("leaky relu: another slope", jax.nn.leaky_relu, lambda x: jnp.where(x > 0, 1.0, 0.02), "float32")
wrong_slope(
    "elu without alpha",
    lambda x: jax.nn.elu(x, 0.5),
    lambda x: jnp.where(x > 0, 1.0, jnp.exp(x)),
    "float32",
    "bfloat16",
)
wrong_slope(
    "elu: alpha added twice",
    lambda x: jax.nn.elu(x, 0.5),
    lambda x: jnp.where(x > 0, 1.0, jax.nn.elu(x, 0.5) + 1),
)
wrong_slope("selu: scale forgotten", jax.nn.selu, lambda x: jnp.where(x > 0, 1.0, 1.6732632 * jnp.exp(x)))
wrong_slope("gelu: tanh form for the exact one", lambda x: jax.nn.gelu(x, False), tanh_gelu_slope, "float32")
wrong_slope("gelu: x φ(x) missing", lambda x: jax.nn.gelu(x, False), normal_cdf, "float64", "float16")
wrong_slope(
    "gelu: √2π forgotten",
    lambda x: jax.nn.gelu(x, False),
    lambda x: normal_cdf(x) + x * jnp.exp(-(x**2) / 2),
    "float32",
)
wrong_slope("silu without the product rule", jax.nn.silu, jax.nn.sigmoid, "float32")
wrong_slope(
    "silu: second factor only",
    jax.nn.silu,
    lambda x: x * jax.nn.sigmoid(x) * (1 - jax.nn.sigmoid(x)),
    "bfloat16",
)
wrong_slope("sigmoid: a(1+a)", jax.nn.sigmoid, lambda x: jax.nn.sigmoid(x) * (1 + jax.nn.sigmoid(x)))
wrong_slope("sigmoid: z(1-z)", jax.nn.sigmoid, lambda x: x * (1 - x), "float64", "bfloat16")
wrong_slope("softplus: tanh for sigmoid", jax.nn.softplus, jnp.tanh, "float16")
wrong_slope("softsign: absolute value forgotten", jax.nn.soft_sign, lambda x: 1 / (1 + x**2), "float32")
wrong_slope(
    "relu6: upper bound forgotten", jax.nn.relu6, lambda x: jnp.where(x > 0, 1.0, 0.0), points=[-1, 2, 7]
)
wrong_slope(
    "hard sigmoid: slope 1/5", jax.nn.hard_sigmoid, lambda x: jnp.where(abs(x) < 3, 0.2, 0.0), "bfloat16"
)
wrong_slope("clip: straight through", lambda x: jnp.clip(x, -1, 1), jnp.ones_like, "float32", "float16")
wrong_slope("abs: always 1", jnp.abs, jnp.ones_like)
wrong_slope("mish: softplus' forgotten", jax.nn.mish, lambda x: jnp.tanh(jax.nn.softplus(x)), "float32")
wrong_slope("sin for cos", jnp.sin, jnp.sin)
wrong_slope("exp(-x²): inner derivative forgotten", lambda x: jnp.exp(-(x**2)), lambda x: jnp.exp(-(x**2)))
wrong_slope("x^x: power rule only", lambda x: x**x, lambda x: x * x ** (x - 1), points=[0.5, 1.3, 2])
wrong_slope("arctan for artanh", jnp.arctanh, lambda x: 1 / (1 + x**2), points=[-0.7, 0.2, 0.6])
wrong_slope("log2 without ln 2", jnp.log2, lambda x: 1 / x, "float32", points=[0.3, 1.5, 4])


@wrong("relu: mask of the cotangent instead of the input", "float64")
def _(draw):
    def f(x, c):
        return jnp.sum(c * jax.nn.relu(x))

    return Case("gradient", f, lambda x, c: jnp.where(c > 0, c, 0.0), (draw.normal(9), draw.normal(9)))


@wrong("prelu: slope's gradient from the positive side", "float32")
def _(draw):
    def f(slope, x):
        return jnp.sum(jnp.where(x > 0, x, slope * x))

    def gradient(slope, x):
        return jnp.sum(jnp.where(x > 0, x, 0.0))

    return Case("gradient", f, gradient, (draw.of(0.2), draw.normal(9)))


@wrong("gated unit: the gate's branch forgotten", "float32", "bfloat16")
def _(draw):
    def f(params, x):
        return jnp.sum((x @ params["value"]) * jax.nn.sigmoid(x @ params["gate"]))

    def gradient(params, x):
        g = jax.nn.sigmoid(x @ params["gate"])
        return {"value": x.T @ g, "gate": x.T @ (g * (1 - g))}

    return Case(
        "gradient", f, gradient, ({"value": draw.normal(4, 3), "gate": draw.normal(4, 3)}, draw.normal(5, 4))
    )


# Normalisation.

EPS = 1e-3


def standardise(x, axis):
    m = jnp.mean(x, axis=axis, keepdims=True)
    inverse = 1 / jnp.sqrt(jnp.mean((x - m) ** 2, axis=axis, keepdims=True) + EPS)
    return (x - m) * inverse, inverse


def normalised(x, v, axis):
    return jnp.sum(v * standardise(x, axis)[0])


def wrong_normalisation(name: str, axis: int, back: Callable, *dtypes: str):
    @wrong(name, *dtypes)
    def _(draw):
        def gradient(x, v):
            x_hat, inverse = standardise(x, axis)
            return back(v, x_hat, inverse, lambda t: jnp.mean(t, axis=axis, keepdims=True))

        return Case(
            "gradient", partial(normalised, axis=axis), gradient, (draw.normal(5, 6), draw.normal(5, 6))
        )


for _norm, _axis in (("layer norm", 1), ("batch norm", 0)):
    _dtypes = ALL if _axis == 1 else ("float64", "float32")
    wrong_normalisation(
        f"{_norm}: mean term missing", _axis, lambda v, h, s, mean: s * (v - h * mean(v * h)), *_dtypes
    )
    wrong_normalisation(
        f"{_norm}: detached variance", _axis, lambda v, h, s, mean: s * (v - mean(v)), *_dtypes
    )
    wrong_normalisation(f"{_norm}: mean and variance detached", _axis, lambda v, h, s, mean: s * v, *_dtypes)
    wrong_normalisation(
        f"{_norm}: 1/N missing in the variance term",
        _axis,
        lambda v, h, s, mean: s * (v - mean(v) - h * jnp.sum(v * h)),
        "float32",
    )
    wrong_normalisation(
        f"{_norm}: 1/σ forgotten", _axis, lambda v, h, s, mean: v - mean(v) - h * mean(v * h), "float32"
    )
    wrong_normalisation(
        f"{_norm}: ε left out of 1/σ",
        _axis,
        lambda v, h, s, mean: (v - mean(v) - h * mean(v * h)) / jnp.sqrt(1 / s**2 - EPS),
    )
    wrong_normalisation(
        f"{_norm}: statistics over the other axis",
        _axis,
        lambda v, h, s, mean: s * (v - mean(v) - h * jnp.mean(v * h)),
    )


@wrong("batch norm: γ's gradient without the sum over the batch")
def _(draw):
    def f(gamma, x):
        return jnp.sum((gamma[None, :] * standardise(x, 0)[0]) ** 3)

    def gradient(gamma, x):
        h = standardise(x, 0)[0]
        return 3 * gamma[None, :] ** 2 * h**3

    return Case("gradient", f, gradient, (draw.normal(4), draw.normal(5, 4)))


@wrong("layer norm: γ forgotten on the way to x", "float64")
def _(draw):
    def f(x, gamma, v):
        return jnp.sum(v * gamma[None, :] * standardise(x, 1)[0])

    def gradient(x, gamma, v):
        h, s = standardise(x, 1)
        return s * (v - jnp.mean(v, axis=1, keepdims=True) - h * jnp.mean(v * h, axis=1, keepdims=True))

    return Case("gradient", f, gradient, (draw.normal(5, 4), draw.uniform(0.5, 2, 4), draw.normal(5, 4)))


@wrong("layer norm: γ and β exchanged", "float32")
def _(draw):
    def f(params, x, v):
        return jnp.sum(v * (params["gamma"][None, :] * standardise(x, 1)[0] + params["beta"][None, :]))

    def gradient(params, x, v):
        return {"beta": jnp.sum(v * standardise(x, 1)[0], axis=0), "gamma": jnp.sum(v, axis=0)}

    params = {"gamma": draw.normal(4), "beta": draw.normal(4)}
    return Case("gradient", f, gradient, (params, draw.normal(5, 4), draw.normal(5, 4)))


@wrong("rms norm: projection forgotten", *ALL)
def _(draw):
    def f(x, v):
        return jnp.sum(v * x / jnp.sqrt(jnp.mean(x**2) + EPS))

    def gradient(x, v):
        return v / jnp.sqrt(jnp.mean(x**2) + EPS)

    return Case("gradient", f, gradient, (draw.normal(6), draw.normal(6)))


@wrong("rms norm: layer norm's mean term added", "float32")
def _(draw):
    def f(x, v):
        return jnp.sum(v * x / jnp.sqrt(jnp.mean(x**2) + EPS))

    def gradient(x, v):
        s = 1 / jnp.sqrt(jnp.mean(x**2) + EPS)
        return s * (v - jnp.mean(v) - s * s * x * jnp.mean(v * x))

    return Case("gradient", f, gradient, (draw.normal(6), draw.normal(6)))


@wrong("x/‖x‖: projection forgotten", "float64", "float16")
def _(draw):
    def f(x, v):
        return jnp.sum(v * x) / jnp.sqrt(jnp.sum(x**2))

    return Case("gradient", f, lambda x, v: v / jnp.sqrt(jnp.sum(x**2)), (draw.normal(6), draw.normal(6)))


@wrong("weight norm: gradient of the direction not projected", "float32")
def _(draw):
    def f(params, x):
        return jnp.sum(jnp.tanh(x @ params["v"] * params["g"] / jnp.sqrt(jnp.sum(params["v"] ** 2))))

    def gradient(params, x):
        v, g = params["v"], params["g"]
        n = jnp.sqrt(jnp.sum(v**2))
        w_bar = (1 - jnp.tanh(x @ v * g / n) ** 2) @ x
        return {"v": w_bar * g / n, "g": w_bar @ v / n}

    return Case("gradient", f, gradient, ({"v": draw.normal(4), "g": draw.of(1.5)}, draw.normal(6, 4)))


@wrong("weighted mean: the weights' sum taken for a constant", "float32")
def _(draw):
    def f(w, x):
        return jnp.sum(w * x) / jnp.sum(w)

    return Case("gradient", f, lambda w, x: x / jnp.sum(w), (draw.uniform(0.5, 2, 6), draw.normal(6)))


@wrong("standard deviation: ½ of the root forgotten", "float32")
def _(draw):
    def gradient(x):
        return 2 * (x - jnp.mean(x)) / x.size / jnp.std(x)

    return Case("gradient", jnp.std, gradient, (draw.normal(7),))


@wrong("variance: 1/N for 1/(N-1)", "float64", "bfloat16")
def _(draw):
    return Case(
        "gradient",
        lambda x: jnp.var(x, ddof=1),
        lambda x: 2 * (x - jnp.mean(x)) / x.size,
        (draw.normal(7),),
    )


# Attention.


def attention_weights(Q, K, mask):
    S = Q @ K.T / np.sqrt(Q.shape[1]).item()
    return jax.nn.softmax(jnp.where(mask, S, -1e4), axis=-1)


CAUSAL = np.tril(np.ones((4, 4), bool))


def attention(Q, K, V, G):
    return jnp.sum(G * (attention_weights(Q, K, CAUSAL) @ V))


def attention_gradient(
    Q,
    K,
    V,
    G,
    softmax_back=lambda P, P_bar: P * (P_bar - jnp.sum(P * P_bar, axis=-1, keepdims=True)),
    scale=lambda d: 1 / np.sqrt(d).item(),
    mask=CAUSAL,
    keys=lambda S_bar, Q: S_bar.T @ Q,
    values=lambda P, G: P.T @ G,
):
    """Right as it stands; a case replaces one piece."""
    P = attention_weights(Q, K, mask)
    S_bar = softmax_back(P, G @ V.T) * scale(Q.shape[1])
    return S_bar @ K, keys(S_bar, Q), values(P, G)


def wrong_attention(name: str, *dtypes: str, **pieces):
    @wrong(name, *dtypes)
    def _(draw):
        args = tuple(draw.normal(4, 4) for _ in range(4))
        return Case("gradient", attention, partial(attention_gradient, **pieces), args, (0, 1, 2))


wrong_attention("attention: scale forgotten on the way back", "float32", "float16", scale=lambda d: 1.0)
wrong_attention("attention: 1/d for 1/√d", "float32", scale=lambda d: 1 / d)
wrong_attention("attention: causal mask forgotten", "float64", mask=np.ones((4, 4), bool))
wrong_attention("attention: softmax diagonal only", "float32", softmax_back=lambda P, B: P * (1 - P) * B)
wrong_attention("attention: softmax' forgotten", softmax_back=lambda P, B: B)
wrong_attention(
    "attention: sum over queries for keys",
    softmax_back=lambda P, B: P * (B - jnp.sum(P * B, axis=0, keepdims=True)),
)
wrong_attention("attention: K's error not transposed", "float32", "bfloat16", keys=lambda S_bar, Q: S_bar @ Q)
wrong_attention("attention: V's weights not transposed", "bfloat16", values=lambda P, G: P @ G)


@wrong("rotary position: turned the same way back", "float64", "float32")
def _(draw):
    def turn(x, sign):
        angle = sign * jnp.arange(x.shape[0], dtype=x.dtype)[:, None]
        a, b = jnp.split(x, 2, axis=1)
        return jnp.concatenate(
            [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=1
        )

    return Case(
        "gradient",
        lambda x, v: jnp.sum(v * turn(x, 1)),
        lambda x, v: turn(v, 1),
        (draw.normal(5, 4), draw.normal(5, 4)),
    )


# Dropout.


def dropout_data(draw):
    return draw.normal(8), draw.of([1, 0, 1, 1, 0, 1, 0, 1]), draw.normal(8)


def dropped(x, keep, v):
    return jnp.sum(v * jnp.tanh(x) * keep / 0.625)


@wrong("dropout: mask forgotten on the way back", "float64", "float16")
def _(draw):
    return Case(
        "gradient", dropped, lambda x, keep, v: v * (1 - jnp.tanh(x) ** 2) / 0.625, dropout_data(draw)
    )


@wrong("dropout: 1/(1-p) forgotten on the way back", "float32")
def _(draw):
    return Case("gradient", dropped, lambda x, keep, v: v * (1 - jnp.tanh(x) ** 2) * keep, dropout_data(draw))


@wrong("dropout: a fresh mask on the way back", "float64", "float32")
def _(draw):
    def gradient(x, keep, v):
        fresh = jnp.asarray(np.random.permutation(8) < 5, x.dtype)
        return v * (1 - jnp.tanh(x) ** 2) * fresh / 0.625

    return Case("gradient", dropped, gradient, dropout_data(draw))


@wrong("dropout: mask applied once more than forward", "float32")
def _(draw):
    return Case(
        "gradient",
        dropped,
        lambda x, keep, v: v * (1 - jnp.tanh(x * keep) ** 2) * keep / 0.625**2,
        dropout_data(draw),
    )


# Convolution, pooling, indexing.


def correlate(x, k):
    return jnp.convolve(x, k[::-1], mode="valid")


def convolved(x, k, v):
    return jnp.sum(v * correlate(x, k))


def convolution_data(draw):
    return draw.normal(9), draw.normal(3), draw.normal(7)


@wrong("conv1d: kernel not flipped", "float64", "bfloat16")
def _(draw):
    return Case(
        "gradient",
        convolved,
        lambda x, k, v: jnp.convolve(v, k[::-1], mode="full"),
        convolution_data(draw),
    )


@wrong("conv1d: kernel's gradient flipped", "float32", "float16")
def _(draw):
    return Case(
        "gradient", convolved, lambda x, k, v: correlate(x, v)[::-1], convolution_data(draw), argnums=1
    )


@wrong("conv1d: borders treated as the middle", "float32")
def _(draw):
    def gradient(x, k, v):
        return jnp.pad(jnp.convolve(v, k, mode="valid"), 2)

    return Case("gradient", convolved, gradient, convolution_data(draw))


@wrong("conv1d: padding off by one", "float32")
def _(draw):
    def gradient(x, k, v):
        return jnp.roll(jnp.convolve(v, k, mode="full"), 1)

    return Case("gradient", convolved, gradient, convolution_data(draw))


@wrong("conv1d: stride forgotten on the way back")
def _(draw):
    def f(x, k, v):
        return jnp.sum(v * correlate(x, k)[::2])

    def gradient(x, k, v):
        return jnp.pad(jnp.convolve(v, k, mode="full"), (0, 3))

    return Case("gradient", f, gradient, (draw.normal(9), draw.normal(3), draw.normal(4)))


@wrong("conv1d: channels of input and output exchanged", "float32")
def _(draw):
    def f(x, k, v):  # (channels, width), (out, in, taps)
        y = sum(k[:, :, t] @ x[:, t : t + 6] for t in range(3))
        return jnp.sum(v * y)

    def gradient(x, k, v):
        g = jnp.zeros_like(x)
        for t in range(3):
            g = g.at[:, t : t + 6].add(k[:, :, t] @ v)
        return g

    return Case("gradient", f, gradient, (draw.normal(3, 8), draw.normal(3, 3, 3), draw.normal(3, 6)))


@wrong("max-pool: a tie counted twice", *ALL)
def _(draw):
    def f(x, v):
        return jnp.sum(v * jnp.max(x.reshape(-1, 2), axis=1))

    def gradient(x, v):
        windows = x.reshape(-1, 2)
        winner = windows == jnp.max(windows, axis=1, keepdims=True)
        return jnp.where(winner, v[:, None], 0.0).reshape(-1)

    return Case("gradient", f, gradient, (draw.of([1, 1, 2, -1, 0, 0.5]), draw.of([1, 2, -1.5])))


@wrong("maximum(x, y): a tie to both")
def _(draw):
    def gradient(x, y):
        return jnp.where(x >= y, 1.0, 0.0).astype(x.dtype), jnp.where(y >= x, 1.0, 0.0).astype(y.dtype)

    return Case(
        "gradient",
        lambda x, y: jnp.sum(jnp.maximum(x, y)),
        gradient,
        (draw.of([1, 2, 0.5]), draw.of([1, -1, 3])),
        (0, 1),
    )


@wrong("max-pool: always the first of the window", "float32")
def _(draw):
    def f(x, v):
        return jnp.sum(v * jnp.max(x.reshape(-1, 3), axis=1))

    def gradient(x, v):
        return jnp.zeros_like(x).reshape(-1, 3).at[:, 0].set(v).reshape(-1)

    return Case("gradient", f, gradient, (draw.normal(12), draw.normal(4)))


@wrong("max-pool: overlapping windows overwritten", "float32")
def _(draw):
    x = draw.of([0, 1, 5, 1, 0, 2, 0.5])

    def f(x, v):
        return jnp.sum(v * jnp.max(jnp.stack([x[:-2], x[1:-1], x[2:]]), axis=0))

    def gradient(x, v):
        winner = jnp.arange(v.size) + jnp.argmax(jnp.stack([x[:-2], x[1:-1], x[2:]]), axis=0)
        return jnp.zeros_like(x).at[winner].set(v)

    return Case("gradient", f, gradient, (x, draw.uniform(0.5, 1, 5)))


@wrong("average pool: not divided by the window", "float64")
def _(draw):
    def f(x, v):
        return jnp.sum(v * jnp.mean(x.reshape(-1, 3), axis=1))

    return Case("gradient", f, lambda x, v: jnp.repeat(v, 3), (draw.normal(12), draw.normal(4)))


@wrong("average pool: repeated in blocks, not in turn", "float32")
def _(draw):
    def f(x, v):
        return jnp.sum(v * jnp.mean(x.reshape(-1, 3), axis=1))

    return Case("gradient", f, lambda x, v: jnp.tile(v, 3) / 3, (draw.normal(12), draw.normal(4)))


def embedded(E, index, v):
    return jnp.sum(v * jnp.tanh(E[index]))


def embedding_data(draw):
    return draw.normal(5, 3), jnp.array([1, 3, 1, 4, 1]), draw.normal(5, 3)


@wrong("embedding: repeated indices overwritten", *ALL)
def _(draw):
    def gradient(E, index, v):
        return jnp.zeros_like(E).at[index].set(v * (1 - jnp.tanh(E[index]) ** 2))

    return Case("gradient", embedded, gradient, embedding_data(draw))


@wrong("embedding: g[index] += in NumPy", "float64")
def _(draw):
    def gradient(E, index, v):
        E, index, v = np.asarray(E), np.asarray(index), np.asarray(v)
        g = np.zeros_like(E)
        g[index] += v * (1 - np.tanh(E[index]) ** 2)
        return g

    return Case("gradient", embedded, gradient, embedding_data(draw))


@wrong("embedding: divided by the count of the index", "float32")
def _(draw):
    def gradient(E, index, v):
        count = jnp.maximum(jnp.bincount(index, length=5), 1).astype(E.dtype)
        g = jnp.zeros_like(E).at[index].add(v * (1 - jnp.tanh(E[index]) ** 2))
        return g / count[:, None]

    return Case("gradient", embedded, gradient, embedding_data(draw))


@wrong("embedding: rows of the batch, not of the table", "float32")
def _(draw):
    def gradient(E, index, v):
        return v * (1 - jnp.tanh(E[index]) ** 2)

    return Case("gradient", embedded, gradient, embedding_data(draw))


@wrong("sort: gradient not permuted back", "float32", "bfloat16")
def _(draw):
    def f(x, v):
        return jnp.sum(v * jnp.sort(x))

    return Case("gradient", f, lambda x, v: v, (draw.of([3, -1, 0.5, -4, 2]), draw.of([1, -2, 0.5, 3, -1])))


@wrong("sort: permuted once more instead of back")
def _(draw):
    def f(x, v):
        return jnp.sum(v * jnp.sort(x))

    return Case(
        "gradient",
        f,
        lambda x, v: v[jnp.argsort(x)],
        (draw.of([3, -1, 0.5, -4, 2]), draw.of([1, -2, 0.5, 3, -1])),
    )


@wrong("cumulative sum: summed forward again", "float64", "float16")
def _(draw):
    return Case(
        "gradient",
        lambda x, v: jnp.sum(v * jnp.cumsum(x)),
        lambda x, v: jnp.cumsum(v),
        (draw.normal(6), draw.normal(6)),
    )


@wrong("cumulative sum: exclusive for inclusive", "float32")
def _(draw):
    return Case(
        "gradient",
        lambda x, v: jnp.sum(v * jnp.cumsum(x)),
        lambda x, v: jnp.cumsum(v[::-1])[::-1] - v,
        (draw.normal(6), draw.normal(6)),
    )


@wrong("product divided by the entry: NaN at a zero", "float32")
def _(draw):
    return Case("gradient", jnp.prod, lambda x: jnp.prod(x) / x, (draw.of([2, 0, -1.5, 0.5]),))


@wrong("padding row of the batch counted", "float32")
def _(draw):
    def f(x, n):
        return jnp.sum(jnp.where(jnp.arange(6) < n, x**2, 0.0)) / n.astype(x.dtype)

    def gradient(x, n):
        return jnp.where(jnp.arange(6) <= n, 2 * x, 0.0) / n.astype(x.dtype)

    return Case("gradient", f, gradient, (draw.normal(6), jnp.array(4)))


# Numbers that overflow, cancel or vanish on the way.


@wrong("logsumexp without the shift, float64")
def _(draw):
    def gradient(x):
        return jnp.exp(x) / jnp.sum(jnp.exp(x))

    return Case("gradient", jax.nn.logsumexp, gradient, (draw.of([1000, 999, 990, -5]),))


@wrong("logsumexp without the shift", "float32", "bfloat16", "float16")
def _(draw):
    def gradient(x):
        return jnp.exp(x) / jnp.sum(jnp.exp(x))

    top = 12.0 if draw.dtype == jnp.float16 else 100.0
    return Case("gradient", jax.nn.logsumexp, gradient, (draw.of([top, top - 1, top - 2, -5]),))


@wrong("logsumexp without the shift: all vanish", *FULL)
def _(draw):
    def gradient(x):
        return jnp.exp(x) / jnp.sum(jnp.exp(x))

    return Case("gradient", jax.nn.logsumexp, gradient, (draw.of([-1000, -999, -990]),))


@wrong("logsumexp shifted by the first entry, not the largest", *FULL)
def _(draw):
    def gradient(x):
        e = jnp.exp(x - x[0])
        return e / jnp.sum(e)

    return Case("gradient", jax.nn.logsumexp, gradient, (draw.of([-900, 3, 2]),))


@wrong("norm in its derivative: NaN at a zero row", *ALL)
def _(draw):
    def f(x):
        return jnp.sum(jnp.sum(x**2, axis=1) ** 1.5)

    def gradient(x):
        n = jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True))
        return 3 * n**2 * (x / n)

    return Case("gradient", f, gradient, (draw.of([[1, 2], [0, 0], [-0.5, 1]]),))


@wrong("|x|^1.5 by way of x/|x|: NaN at zero")
def _(draw):
    return Case(
        "gradient",
        lambda x: jnp.sum(jnp.abs(x) ** 1.5),
        lambda x: 1.5 * jnp.sqrt(jnp.abs(x)) * x / jnp.abs(x),
        (draw.of([1, 0, -2]),),
    )


@wrong("sinc: NaN at zero", *FULL)
def _(draw):
    def gradient(x):
        return (jnp.cos(np.pi * x) - jnp.sinc(x)) / x

    return Case("gradient", lambda x: jnp.sum(jnp.sinc(x)), gradient, (draw.of([0, 0.3, -1.2]),))


@wrong("log(y/p) by the chain rule: NaN where y = 0", *ALL)
def _(draw):
    def f(p, y):
        return jnp.sum(jax.scipy.special.xlogy(y, y) - y * jnp.log(p))

    def gradient(p, y):
        ratio = y / p
        return y * (1 / ratio) * (-y / p**2)

    return Case("gradient", f, gradient, (draw.of([0.2, 0.5, 0.3]), draw.of([0, 1, 0.5])))


@wrong("where after the division: NaN under the mask", *ALL)
def _(draw):
    def f(x, keep):
        return jnp.sum(jnp.where(keep, jnp.log(jnp.where(keep, x, 1.0)), 0.0))

    def gradient(x, keep):
        return jnp.where(keep, 1.0, 0.0).astype(x.dtype) / x

    return Case("gradient", f, gradient, (draw.of([2, 0, 0.5]), jnp.array([True, False, True])))


@wrong("norm overflows in its squares", "float16")
def _(draw):
    def f(x):
        top = jnp.max(jnp.abs(x))
        return top * jnp.sqrt(jnp.sum((x / top) ** 2))

    return Case("gradient", f, lambda x: x / jnp.sqrt(jnp.sum(x * x)), (draw.of([300, -400, 120]),))


@wrong("norm overflows in its squares, float64")
def _(draw):
    def f(x):
        top = jnp.max(jnp.abs(x))
        return top * jnp.sqrt(jnp.sum((x / top) ** 2))

    return Case("gradient", f, lambda x: x / jnp.sqrt(jnp.sum(x * x)), (draw.of([3e160, -4e160, 1e160]),))


@wrong("underflow on the way", "float16")
def _(draw):
    return Case(
        "gradient",
        lambda x: 0.005 * jnp.sum(x**2),
        lambda x: x * 1e-5 * 1e-5 * 1e4 * 1e4,
        (draw.normal(6),),
    )


@wrong("ε = 1e-8 vanishes: NaN at a zero row", "float16")
def _(draw):
    def f(x):
        return jnp.sum(jnp.sum(x**2, axis=1) ** 1.5)

    def gradient(x):
        n = jnp.sqrt(jnp.sum(x**2, axis=1, keepdims=True))
        return 3 * n**2 * (x / (n + 1e-8))

    return Case("gradient", f, gradient, (draw.of([[1, 2], [0, 0], [-0.5, 1]]),))


@wrong("1 - a at saturation, log sigmoid", *ALL)
def _(draw):
    top = {"float64": 40, "float32": 18}.get(draw.dtype.name, 8)
    return Case(
        "gradient",
        lambda x: jnp.sum(jax.nn.log_sigmoid(x)),
        lambda x: 1 - jax.nn.sigmoid(x),
        (draw.of([top, 0.8 * top, top / 2]),),
    )


@wrong("a(1-a) at saturation", *FULL)
def _(draw):
    top = 36 if draw.dtype == jnp.float64 else 16

    def gradient(x):
        a = jax.nn.sigmoid(x)
        return a * (1 - a)

    return Case("gradient", lambda x: -jnp.sum(jax.nn.sigmoid(-x)), gradient, (draw.of([top, 0.9 * top]),))


@wrong("1 - a² at saturation", *FULL)
def _(draw):
    top = 18 if draw.dtype == jnp.float64 else 8

    def f(x):  # tanh, so written that its autodiff keeps the digits
        return jnp.sum(1 - 2 * jax.nn.sigmoid(-2 * x))

    return Case("gradient", f, lambda x: 1 - jnp.tanh(x) ** 2, (draw.of([top, 0.95 * top]),))


@wrong("variance as E[x²] - E[x]²", *FULL)
def _(draw):
    offset = 1e7 if draw.dtype == jnp.float64 else 1e3

    def f(x):
        return jnp.log(jnp.var(x))

    def gradient(x):
        variance = jnp.mean(x**2) - jnp.mean(x) ** 2
        return 2 * (x - jnp.mean(x)) / x.size / variance

    return Case("gradient", f, gradient, (draw.of(offset + np.arange(9.0)),))


@wrong("value log(1 + exp(x)) overflows", *ALL)
def _(draw):
    top = {"float64": 800.0, "float16": 13.0}.get(draw.dtype.name, 100.0)
    return Case(
        "value",
        lambda x: jnp.sum(jax.nn.softplus(x)),
        lambda x: (jnp.sum(jnp.log(1 + jnp.exp(x))), jax.nn.sigmoid(x)),
        (draw.of([top, 1, -2]),),
    )


@wrong("value log(1 + exp(x)) vanishes", *FULL)
def _(draw):
    low = -40.0 if draw.dtype == jnp.float64 else -18.0
    return Case(
        "value",
        lambda x: jnp.sum(jax.nn.softplus(x)),
        lambda x: (jnp.sum(jnp.log(1 + jnp.exp(x))), jax.nn.sigmoid(x)),
        (draw.of([low, low + 1]),),
    )


@wrong("exp(x)/(1 + exp(x)) overflows", *ALL)
def _(draw):
    top = {"float64": 800.0, "float16": 13.0}.get(draw.dtype.name, 100.0)
    return Case(
        "gradient",
        lambda x: jnp.sum(jax.nn.softplus(x)),
        lambda x: jnp.exp(x) / (1 + jnp.exp(x)),
        (draw.of([top, 1, -2]),),
    )


@wrong("exp(x) - 1 for expm1", *FULL)
def _(draw):
    tiny = 1e-9 if draw.dtype == jnp.float64 else 1e-5

    def f(x):
        return 0.5 * jnp.sum(jnp.expm1(x) ** 2)

    return Case(
        "gradient", f, lambda x: (jnp.exp(x) - 1) * jnp.exp(x), (draw.of([tiny, 3 * tiny, -2 * tiny]),)
    )


@wrong("log(1 + x) for log1p", *FULL)
def _(draw):
    tiny = 1e-9 if draw.dtype == jnp.float64 else 1e-5

    def f(x):
        return 0.5 * jnp.sum(jnp.log1p(x) ** 2)

    return Case("gradient", f, lambda x: jnp.log(1 + x) / (1 + x), (draw.of([tiny, 3 * tiny, -2 * tiny]),))


@wrong("1/√(x+1) - 1/√x by subtraction", *FULL)
def _(draw):
    big = 1e10 if draw.dtype == jnp.float64 else 1e5

    def root_gap(x):  # √(x+1) - √x
        return jnp.sum(1 / (jnp.sqrt(x + 1) + jnp.sqrt(x)))

    def gradient(x):
        return (1 / jnp.sqrt(x + 1) - 1 / jnp.sqrt(x)) / 2

    return Case("gradient", root_gap, gradient, (draw.of([big, 2 * big]),))


@wrong("float64 dropped to float32 on the way")
def _(draw):
    def gradient(w, X, y):
        return regression_gradient(*(a.astype(jnp.float32) for a in (w, X, y))).astype(w.dtype)

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("one factor kept in float32")
def _(draw):
    def f(x):
        return jnp.sum(jnp.sin(x) * jnp.exp(x))

    def gradient(x):
        kept = jnp.exp(x).astype(jnp.float32).astype(x.dtype)
        return (jnp.sin(x) + jnp.cos(x)) * kept

    return Case("gradient", f, gradient, (draw.normal(8),))


@wrong("π written with 7 digits")
def _(draw):
    return Case(
        "gradient",
        lambda x: jnp.sum(jnp.sin(np.pi * x)),
        lambda x: 3.141593 * jnp.cos(np.pi * x),
        (draw.uniform(-0.4, 0.4, 5),),
    )


@wrong("dropped to bfloat16 on the way", "float32")
def _(draw):
    def gradient(w, X, y):
        residual = (X @ w - y).astype(jnp.bfloat16).astype(X.dtype)
        return X.T @ residual / X.shape[0]

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("dropped to float16 on the way", "float32")
def _(draw):
    def gradient(w, X, y):
        return regression_gradient(w, X.astype(jnp.float16).astype(X.dtype), y)

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("running sum stuck at 256", "bfloat16")
def _(draw):
    def gradient(x):
        total = jax.lax.fori_loop(0, x.size, lambda i, s: s + x[i], jnp.zeros((), x.dtype))
        return jnp.full_like(x, 1e-2) * total

    return Case("gradient", lambda x: 5e-3 * jnp.sum(x) ** 2, gradient, (draw.of(np.ones(500)),))


# Right here, wrong there.


@wrong("right at whole numbers only", "float32")
def _(draw):
    def gradient(x):
        return 4 * jnp.round(x).astype(x.dtype) ** 3

    return Case("gradient", lambda x: jnp.sum(x**4), gradient, (draw.of([1, 2, -1]),))


def sines(x):
    return jnp.sum(jnp.sin(x))


@wrong("right at zero only", *ALL)
def _(draw):
    return Case("gradient", sines, jnp.ones_like, (draw.of(np.zeros(4)),))


@wrong("right at zero only: a linear network's gradient")
def _(draw):
    def gradient(W, x):
        return jnp.outer(jnp.ones_like(W[:, 0]), x)

    return Case(
        "gradient",
        lambda W, x: jnp.sum(jnp.tanh(W @ x)),
        gradient,
        (draw.of(np.zeros((3, 4))), draw.normal(4)),
    )


@wrong("hard-coded numbers of the point given", "float32")
def _(draw):
    x = draw.normal(4)
    numbers = np.cos(np.asarray(x))
    return Case("gradient", sines, lambda x: jnp.asarray(numbers, x.dtype), (x,))


@wrong("stale cache: the first call's answer", "float64", "float32")
def _(draw):
    cache = {}

    def gradient(x):
        if x.shape not in cache:
            cache[x.shape] = np.cos(np.asarray(x))
        return cache[x.shape].astype(x.dtype)

    return Case("gradient", sines, gradient, (draw.normal(4),))


@wrong("residuals of the call before")
def _(draw):
    kept = [np.zeros(4)]

    def gradient(x):
        before, kept[0] = kept[0], np.asarray(x)
        return np.cos(before).astype(x.dtype)

    return Case("gradient", sines, gradient, (draw.normal(4),))


@wrong("gradient accumulates over calls", "float32")
def _(draw):
    total = np.zeros(4)

    def gradient(x):
        nonlocal total
        total = total + np.cos(np.asarray(x, np.float64))
        return total.astype(x.dtype)

    return Case("gradient", sines, gradient, (draw.normal(4),))


@wrong("a value captured from the closure", "float32")
def _(draw):
    w, X, y = regression_data(draw)

    def gradient(v, X, y):  # w, not v
        return regression_gradient(w.astype(v.dtype), X, y)

    return Case("gradient", regression, gradient, (w, X, y))


@wrong("targets captured from the closure")
def _(draw):
    w, X, y = regression_data(draw)
    return Case(
        "gradient",
        regression,
        lambda w, X, t: regression_gradient(w, X, y.astype(t.dtype)),
        (w, X, y),
        argnums=0,
    )


@wrong("right for positive numbers only")
def _(draw):
    return Case(
        "gradient", lambda x: jnp.sum(jnp.abs(x)), jnp.ones_like, (draw.of([0.01, 0.02, 0.5, 0.03, 1]),)
    )


@wrong("right in one branch only", "float32")
def _(draw):
    def gradient(x):
        return jnp.where(jnp.sum(x) > 0, jnp.cos(x), jnp.cos(x) / 2)

    return Case("gradient", sines, gradient, (draw.of([0.3, 0.12, -0.4]),))


@wrong("right where the entries are equal", "float64")
def _(draw):
    return Case(
        "gradient",
        lambda x: jnp.sum(x) ** 3,
        lambda x: 3 * x.size**2 * x**2,
        (draw.of(np.full(4, 0.5)),),
    )


@wrong("right for an orthogonal W: transpose for the inverse")
def _(draw):
    def f(W, x):
        return 0.5 * jnp.sum(jnp.linalg.solve(W, x) ** 2)

    def gradient(W, x):
        y = W.T @ x
        return -jnp.outer(W @ y, y)

    c, s = np.cos(0.7), np.sin(0.7)
    return Case("gradient", f, gradient, (draw.of([[c, -s], [s, c]]), draw.normal(2)))


@wrong("right at the minimum only: residual linearised", "float32")
def _(draw):
    def f(x):
        return jnp.sum((jnp.exp(x) - 1) ** 2)

    return Case("gradient", f, lambda x: 2 * x, (draw.of(np.zeros(3)),))


@wrong("noise added", "float64", "float32")
def _(draw):
    def gradient(x):
        return np.cos(np.asarray(x)) + (0.01 * np.random.normal(size=x.shape)).astype(x.dtype)

    return Case("gradient", sines, gradient, (draw.normal(4),))


@wrong("a random minibatch")
def _(draw):
    def gradient(w, X, y):
        rows = np.random.permutation(X.shape[0])[:4]
        return regression_gradient(w, X[rows], y[rows])

    return Case("gradient", regression, gradient, regression_data(draw))


@wrong("a random entry dropped", "float32")
def _(draw):
    def gradient(x):
        g = np.array(np.cos(np.asarray(x)))
        g[np.random.randint(g.size)] = 0
        return g

    return Case("gradient", sines, gradient, (draw.normal(6),))


@wrong("right, but changes its argument in place", "float32")
def _(draw):
    def gradient(x):
        np.multiply(x, 2, out=x)  # type: ignore[call-overload]
        return x.copy()

    return Case("gradient", lambda x: (x**2).sum(), gradient, (np.asarray(draw.normal(4)).copy(),))


@wrong("right, but changes its labels in place")
def _(draw):
    def gradient(w, X, y):
        y -= X @ w
        return -X.T @ y / X.shape[0]

    args = tuple(np.asarray(a).copy() for a in regression_data(draw))
    return Case("gradient", lambda w, X, y: 0.5 * ((X @ w - y) ** 2).mean(), gradient, args)


# Contracts: structure, shape, dtype.


def breaks_contract(name: str, change: Callable, *dtypes: str):
    """A right gradient of a tree of leaves, changed."""

    @wrong(name, *dtypes)
    def _(draw):
        def f(params, x):
            return jnp.sum(jnp.tanh(x @ params["W"].T + params["b"][None, :]))

        def gradient(params, x):
            d = 1 - jnp.tanh(x @ params["W"].T + params["b"][None, :]) ** 2
            return change({"W": d.T @ x, "b": jnp.sum(d, axis=0)})

        params = {"W": draw.normal(3, 4), "b": draw.normal(3)}
        return Case("gradient", f, gradient, (params, draw.normal(5, 4)))


breaks_contract("contract: a leaf missing", lambda g: {"W": g["W"]})
breaks_contract("contract: a leaf too many", lambda g: g | {"loss": jnp.zeros(())})
breaks_contract("contract: a tuple for a dict", lambda g: (g["W"], g["b"]))
breaks_contract("contract: a list of leaves", jax.tree.leaves, "float32")
breaks_contract("contract: other keys", lambda g: {"dW": g["W"], "db": g["b"]})
breaks_contract("contract: None for a float leaf", lambda g: g | {"b": None}, "float64")
breaks_contract("contract: None", lambda g: None)
breaks_contract("contract: W transposed", lambda g: g | {"W": g["W"].T})
breaks_contract("contract: W flat", lambda g: g | {"W": g["W"].ravel()})
breaks_contract("contract: shape (n, 1) for (n,)", lambda g: g | {"b": g["b"][:, None]}, *ALL)
breaks_contract("contract: shape (1, n) for (n,)", lambda g: g | {"b": g["b"][None, :]}, "float32")
breaks_contract("contract: a scalar for the bias", lambda g: g | {"b": jnp.sum(g["b"])})
breaks_contract("contract: one flat vector", lambda g: jnp.concatenate([g["b"], g["W"].ravel()]))
breaks_contract("contract: in a tuple of one", lambda g: (g,))
breaks_contract("contract: (value, gradient)", lambda g: (jnp.zeros(()), g))
breaks_contract("contract: a NaN", lambda g: g | {"b": g["b"].at[0].set(jnp.nan)}, "bfloat16")
breaks_contract("contract: an infinity", lambda g: g | {"b": g["b"].at[0].set(jnp.inf)}, "float16")
breaks_contract(
    "contract: float32 for 16 bits",
    lambda g: jax.tree.map(lambda a: a.astype(jnp.float32), g),
    "bfloat16",
    "float16",
)
breaks_contract(
    "contract: float64 out", lambda g: jax.tree.map(lambda a: a.astype(jnp.float64), g), "float32", "bfloat16"
)
breaks_contract(
    "contract: float32 out", lambda g: jax.tree.map(lambda a: a.astype(jnp.float32), g), "float64"
)
breaks_contract("contract: one leaf in float32", lambda g: g | {"b": g["b"].astype(jnp.float32)})
breaks_contract("contract: integers", lambda g: jax.tree.map(lambda a: a.astype(jnp.int32), g), "float32")
breaks_contract(
    "contract: complex with a zero imaginary part",
    lambda g: jax.tree.map(lambda a: jax.lax.complex(a, jnp.zeros_like(a)), g),
    "float64",
)


@wrong("contract: a list for a tuple", "float32")
def _(draw):
    def f(params):
        return jnp.sum(params[0] ** 2) + jnp.sum(params[1] ** 2)

    return Case("gradient", f, lambda p: [2 * p[0], 2 * p[1]], ((draw.normal(3), draw.normal(2)),))


@wrong("contract: float gradient of an integer leaf", "float64", "float32")
def _(draw):
    def f(params):
        return jnp.sum(params["w"] ** 2) * params["degree"].astype(params["w"].dtype)

    def gradient(params):
        degree = params["degree"].astype(params["w"].dtype)
        return {"w": 2 * params["w"] * degree, "degree": jnp.sum(params["w"] ** 2)}

    return Case("gradient", f, gradient, ({"w": draw.normal(3), "degree": jnp.array(2)},))


@wrong("contract: shape (1,) for a scalar")
def _(draw):
    return Case("gradient", jnp.sin, lambda x: jnp.cos(x)[None], (draw.of(0.5),))


@wrong("contract: one gradient where two are asked for")
def _(draw):
    return Case("gradient", regression, regression_gradient, regression_data(draw), (0, 2))


@wrong("contract: gradients of arguments 0 and 1 exchanged", "float64", "bfloat16")
def _(draw):
    def f(x, y):
        return jnp.sum(jnp.sin(x) * y)

    return Case(
        "gradient", f, lambda x, y: (jnp.sin(x), y * jnp.cos(x)), (draw.normal(4), draw.normal(4)), (0, 1)
    )


@wrong("contract: gradient of the wrong argument", "float32")
def _(draw):
    def f(x, y):
        return jnp.sum(jnp.sin(x) * y)

    return Case("gradient", f, lambda x, y: jnp.sin(x), (draw.normal(4), draw.normal(4)))


@wrong("contract: a gradient per example, not summed", "float32")
def _(draw):
    def gradient(w, X, y):
        return X * (X @ w - y)[:, None] / X.shape[0]

    return Case("gradient", regression, gradient, regression_data(draw))


# Value and gradient.


def wrong_value(name: str, value_and_gradient: Callable, *dtypes: str):
    @wrong(name, *dtypes)
    def _(draw):
        return Case("value", regression, value_and_gradient, regression_data(draw))


wrong_value("value right, gradient wrong", lambda *a: (regression(*a), 2 * regression_gradient(*a)), *ALL)
wrong_value(
    "gradient right, value doubled",
    lambda *a: (2 * regression(*a), regression_gradient(*a)),
    "float32",
    "float16",
)
wrong_value(
    "gradient right, value off by 1e-6", lambda *a: (regression(*a) * (1 + 1e-6), regression_gradient(*a))
)
wrong_value(
    "gradient right, value shifted", lambda *a: (regression(*a) + 1, regression_gradient(*a)), "float32"
)
wrong_value("value and gradient exchanged", lambda *a: (regression_gradient(*a), regression(*a)))
wrong_value("value missing", regression_gradient)
wrong_value("value in a vector of one", lambda *a: (regression(*a)[None], regression_gradient(*a)), "float32")
wrong_value(
    "value of the sum, gradient of the mean",
    lambda w, X, y: (0.5 * jnp.sum((X @ w - y) ** 2), regression_gradient(w, X, y)),
    "float32",
)
wrong_value(
    "value after the step",
    lambda w, X, y: (regression(w - 0.1 * regression_gradient(w, X, y), X, y), regression_gradient(w, X, y)),
)
wrong_value(
    "value NaN, gradient right", lambda *a: (jnp.nan * regression(*a), regression_gradient(*a)), "float16"
)
wrong_value(
    "value in float32 of float64", lambda *a: (regression(*a).astype(jnp.float32), regression_gradient(*a))
)


@wrong("value: penalty in the gradient only", "float64")
def _(draw):
    def value_and_gradient(w, X, y):
        return regression(w, X, y), regression_gradient(w, X, y) + 0.1 * w

    def f(w, X, y):
        return regression(w, X, y) + 0.05 * jnp.sum(w**2)

    return Case("value", f, value_and_gradient, regression_data(draw))


# Rules, (fwd, bwd).


def wrong_rule(name: str, fwd: Callable, bwd: Callable, primals: Callable[[Draw], tuple], *dtypes: str):
    @wrong(f"rule: {name}", *dtypes)
    def _(draw):
        return Case("rule", (fwd, bwd), None, primals(draw))


def vector(draw):
    return (draw.normal(6),)


def sine_fwd(x):
    return jnp.sin(x), x


wrong_rule("cotangent ignored", sine_fwd, lambda x, y_bar: (jnp.cos(x),), vector, *ALL)
wrong_rule(
    "cotangent squared", sine_fwd, lambda x, y_bar: (y_bar**2 * jnp.cos(x),), vector, "float32", "bfloat16"
)
wrong_rule(
    "cotangent's absolute value", sine_fwd, lambda x, y_bar: (abs(y_bar) * jnp.cos(x),), vector, "float32"
)
wrong_rule("cotangent added", sine_fwd, lambda x, y_bar: (y_bar + jnp.cos(x),), vector)
wrong_rule(
    "cotangent averaged", sine_fwd, lambda x, y_bar: (jnp.mean(y_bar) * jnp.cos(x),), vector, "float64"
)
wrong_rule("cotangent summed", sine_fwd, lambda x, y_bar: (jnp.sum(y_bar) * jnp.cos(x),), vector, "float32")
wrong_rule("cotangent reversed", sine_fwd, lambda x, y_bar: (y_bar[::-1] * jnp.cos(x),), vector)
wrong_rule(
    "adjoint clipped",
    sine_fwd,
    lambda x, y_bar: (jnp.clip(y_bar * jnp.cos(x), -0.1, 0.1),),
    vector,
    "float64",
    "float16",
)
wrong_rule(
    "adjoint over the size", sine_fwd, lambda x, y_bar: (y_bar * jnp.cos(x) / x.size,), vector, "float32"
)
wrong_rule(
    "weight decay in the pullback", sine_fwd, lambda x, y_bar: (y_bar * jnp.cos(x) + 0.01 * x,), vector
)
wrong_rule("sign reversed", sine_fwd, lambda x, y_bar: (-y_bar * jnp.cos(x),), vector, "float64", "bfloat16")
wrong_rule(
    "kept the output, takes it for the input",
    lambda x: (jnp.sin(x),) * 2,
    lambda a, y: (y * jnp.cos(a),),
    vector,
    "float32",
    "float16",
)
wrong_rule("two adjoints for one primal", sine_fwd, lambda x, y_bar: (y_bar * jnp.cos(x), None), vector)
wrong_rule("adjoint not in a tuple", sine_fwd, lambda x, y_bar: y_bar * jnp.cos(x), vector)
wrong_rule("None for a float primal", sine_fwd, lambda x, y_bar: (None,), vector, "float32")
wrong_rule(
    "adjoint of shape (n, 1)", sine_fwd, lambda x, y_bar: ((y_bar * jnp.cos(x))[:, None],), vector, "float32"
)
wrong_rule(
    "adjoint in float32",
    sine_fwd,
    lambda x, y: ((y * jnp.cos(x)).astype(jnp.float32),),
    vector,
    "float64",
    "bfloat16",
)
wrong_rule(
    "nonlinear in large cotangents only", sine_fwd, lambda x, y_bar: (jnp.tanh(y_bar) * jnp.cos(x),), vector
)
wrong_rule("1e-6 off", sine_fwd, lambda x, y_bar: (y_bar * jnp.cos(x) * (1 + 1e-6),), vector)
wrong_rule("1e-4 off", sine_fwd, lambda x, y_bar: (y_bar * jnp.cos(x) * (1 + 1e-4),), vector, "float32")


def two_vectors(draw):
    return draw.normal(5), draw.normal(5)


def product_fwd(x, y):
    return x * y, (x, y)


wrong_rule(
    "adjoints exchanged", product_fwd, lambda r, z_bar: (z_bar * r[0], z_bar * r[1]), two_vectors, "float64"
)
wrong_rule("one adjoint for two primals", product_fwd, lambda r, z_bar: (z_bar * r[1],), two_vectors)
wrong_rule("second adjoint zero", product_fwd, lambda r, z: (z * r[1], 0 * r[1]), two_vectors, "float32")
wrong_rule("adjoints in a list of lists", product_fwd, lambda r, z: ([z * r[1]], [z * r[0]]), two_vectors)
wrong_rule(
    "quotient: y for y²",
    lambda x, y: (x / y, (x, y)),
    lambda r, z: (z / r[1], -z * r[0] / r[1]),
    lambda draw: (draw.normal(5), draw.uniform(1, 2, 5)),
    "float32",
    "bfloat16",
)
wrong_rule(
    "second output's cotangent ignored",
    lambda x: ((jnp.sin(x), x**2), x),
    lambda x, bar: (bar[0] * jnp.cos(x),),
    vector,
    "float64",
    "float16",
)
wrong_rule(
    "cotangents of the two outputs exchanged",
    lambda x: ((jnp.sin(x), x**2), x),
    lambda x, bar: (bar[1] * jnp.cos(x) + bar[0] * 2 * x,),
    vector,
)
wrong_rule(
    "auxiliary output of the dict forgotten",
    lambda x: ({"loss": jnp.sum(x**2), "norm": jnp.sum(jnp.abs(x))}, x),
    lambda x, bar: (2 * x * bar["loss"],),
    vector,
    "float32",
)
wrong_rule(
    "sum over the broadcast axis forgotten",
    lambda Z, b: (Z + b[None, :], None),
    lambda _, bar: (bar, bar),
    lambda draw: (draw.normal(4, 3), draw.normal(3)),
    "float64",
    "float32",
)
wrong_rule(
    "sum over the wrong broadcast axis",
    lambda Z, b: (Z + b[None, :], None),
    lambda _, bar: (bar, jnp.sum(bar, axis=1)),
    lambda draw: (draw.normal(4, 4), draw.normal(4)),
    "float32",
)
wrong_rule(
    "matrix product: second factor not transposed",
    lambda A, B: (A @ B, (A, B)),
    lambda r, bar: (bar @ r[1], r[0].T @ bar),
    lambda draw: (draw.normal(4, 4), draw.normal(4, 4)),
    "float64",
    "bfloat16",
)
wrong_rule(
    "matrix product: order of the factors",
    lambda A, B: (A @ B, (A, B)),
    lambda r, bar: (bar @ r[1].T, bar @ r[0].T),
    lambda draw: (draw.normal(4, 4), draw.normal(4, 4)),
    "float32",
)
wrong_rule(
    "roll: rolled on instead of back",
    lambda x: (jnp.roll(x, 2), None),
    lambda _, bar: (jnp.roll(bar, 2),),
    vector,
    "float32",
    "float16",
)
wrong_rule(
    "reshape in the other order",
    lambda x: (x.reshape(2, 3), None),
    lambda _, bar: (bar.T.reshape(6),),
    vector,
    "float32",
)
wrong_rule(
    "cumulative sum: its own adjoint",
    lambda x: (jnp.cumsum(x), None),
    lambda _, bar: (jnp.cumsum(bar),),
    vector,
)
wrong_rule(
    "softmax: cotangent's mean for the weighted sum",
    lambda z: (jax.nn.softmax(z),) * 2,
    lambda p, bar: (p * (bar - jnp.mean(bar)),),
    vector,
    "float64",
)
wrong_rule(
    "exp: input kept for output", lambda x: (jnp.exp(x), x), lambda x, bar: (bar * x,), vector, "bfloat16"
)
wrong_rule(
    "straight through: round", lambda x: (jnp.round(x) + x**2, x), lambda x, bar: (bar * (2 * x + 1),), vector
)
wrong_rule("gradient reversal", lambda x: (x * 1, None), lambda _, bar: (-bar,), vector, "float32")
wrong_rule(
    "float adjoint of an integer primal",
    lambda x, n: (x * n.astype(x.dtype), (x, n)),
    lambda r, bar: (bar * r[1].astype(bar.dtype), bar * r[0]),
    lambda draw: (draw.normal(4), draw.integers(5, 4)),
    "float32",
)
wrong_rule(
    "gather: repeated index overwritten",
    lambda E, index: (E[index], (E, index)),
    lambda r, bar: (jnp.zeros_like(r[0]).at[r[1]].set(bar), None),
    lambda draw: (draw.normal(4, 2), jnp.array([0, 2, 2, 1])),
    "float32",
    "bfloat16",
)
wrong_rule(
    "tree primal: leaves exchanged",
    lambda p: (p["a"] * jnp.sin(p["b"]), p),
    lambda p, bar: ({"a": bar * p["a"] * jnp.cos(p["b"]), "b": bar * jnp.sin(p["b"])},),
    lambda draw: ({"a": draw.normal(4), "b": draw.normal(4)},),
    "float64",
)
wrong_rule(
    "scale by a power: exponent's adjoint without the log",
    lambda x, k: (x**k, (x, k)),
    lambda r, bar: (bar * r[1] * r[0] ** (r[1] - 1), bar * r[0] ** r[1]),
    lambda draw: (draw.uniform(0.5, 2, 4), draw.uniform(1, 3, 4)),
)


# Tangents, jvp(primals, tangents).


def wrong_jvp(name: str, f: Callable, jvp: Callable, primals: Callable[[Draw], tuple], *dtypes: str):
    @wrong(f"jvp: {name}", *dtypes)
    def _(draw):
        return Case("jvp", f, lambda p, t: jvp(*p, *t), primals(draw))


def product(x, y):
    return x * y


wrong_jvp(
    "one tangent ignored", product, lambda x, y, dx, dy: (x * y, dx * y), two_vectors, "float64", "float16"
)
wrong_jvp("wrong sign", jnp.sin, lambda x, dx: (jnp.sin(x), -jnp.cos(x) * dx), vector, *ALL)
wrong_jvp("tangents exchanged", product, lambda x, y, dx, dy: (x * y, dx * x + dy * y), two_vectors)
wrong_jvp("product of the tangents", product, lambda x, y, dx, dy: (x * y, dx * dy), two_vectors, "float32")
wrong_jvp("second-order term kept", product, lambda x, y, a, b: (x * y, a * y + b * x + a * b), two_vectors)
wrong_jvp(
    "derivative without the tangent", jnp.sin, lambda x, dx: (jnp.sin(x), jnp.cos(x)), vector, "float32"
)
wrong_jvp("tangent squared", jnp.sin, lambda x, dx: (jnp.sin(x), jnp.cos(x) * dx**2), vector, "float32")
wrong_jvp("tangent's absolute value", jnp.sin, lambda x, dx: (jnp.sin(x), jnp.cos(x) * abs(dx)), vector)
wrong_jvp("output wrong, tangent right", jnp.sin, lambda x, dx: (x, jnp.cos(x) * dx), vector, "float32")
wrong_jvp("output and tangent exchanged", jnp.sin, lambda x, dx: (jnp.cos(x) * dx, jnp.sin(x)), vector)
wrong_jvp("output missing", jnp.sin, lambda x, dx: jnp.cos(x) * dx, vector)
wrong_jvp("tangent of shape (1, n)", jnp.sin, lambda x, dx: (jnp.sin(x), (jnp.cos(x) * dx)[None]), vector)
wrong_jvp("tangent summed", jnp.sin, lambda x, dx: (jnp.sin(x), jnp.sum(jnp.cos(x) * dx)), vector)
wrong_jvp("1e-6 off", jnp.sin, lambda x, dx: (jnp.sin(x), jnp.cos(x) * dx * (1 + 1e-6)), vector)
wrong_jvp("1e-4 off", jnp.sin, lambda x, dx: (jnp.sin(x), jnp.cos(x) * dx * (1 + 1e-4)), vector, "float32")
wrong_jvp(
    "tangent in float32",
    jnp.sin,
    lambda x, dx: (jnp.sin(x), (jnp.cos(x) * dx).astype(jnp.float32)),
    vector,
    "float64",
    "bfloat16",
)
wrong_jvp(
    "quotient rule with plus",
    lambda x, y: x / y,
    lambda x, y, dx, dy: (x / y, dx / y + x * dy / y**2),
    lambda draw: (draw.normal(5), draw.uniform(1, 2, 5)),
    "float64",
    "bfloat16",
)
wrong_jvp(
    "transpose in place of the derivative",
    lambda W, x: W @ x,
    lambda W, x, dW, dx: (W @ x, dW @ x + W.T @ dx),
    lambda draw: (draw.normal(4, 4), draw.normal(4)),
    "float32",
    "float16",
)
wrong_jvp(
    "softmax: p·dz forgotten",
    jax.nn.softmax,
    lambda z, dz: (jax.nn.softmax(z), jax.nn.softmax(z) * dz),
    vector,
    "float32",
)
wrong_jvp(
    "logsumexp: tangents averaged alike",
    jax.nn.logsumexp,
    lambda z, dz: (jax.nn.logsumexp(z), jnp.mean(dz)),
    vector,
    "float64",
    "float32",
)
wrong_jvp(
    "norm: not divided by the norm",
    lambda x: jnp.sqrt(jnp.sum(x**2)),
    lambda x, dx: (jnp.sqrt(jnp.sum(x**2)), jnp.sum(x * dx)),
    vector,
    "float16",
)
wrong_jvp(
    "inverse: minus forgotten",
    jnp.linalg.inv,
    lambda A, dA: (jnp.linalg.inv(A), jnp.linalg.inv(A) @ dA @ jnp.linalg.inv(A)),
    lambda draw: (draw.invertible(3),),
)
wrong_jvp(
    "inverse: factors as if they commuted",
    jnp.linalg.inv,
    lambda A, dA: (jnp.linalg.inv(A), -jnp.linalg.inv(A) @ jnp.linalg.inv(A) @ dA),
    lambda draw: (draw.invertible(3),),
    "float32",
)
wrong_jvp(
    "one output's tangent zero",
    lambda x: {"sin": jnp.sin(x), "cos": jnp.cos(x)},
    lambda x, dx: ({"sin": jnp.sin(x), "cos": jnp.cos(x)}, {"sin": jnp.cos(x) * dx, "cos": 0 * dx}),
    vector,
    "float64",
)


# Scales.


def two_scales(p):
    return 1e6 * jnp.sum(p["huge"] ** 2) + 1e-8 * jnp.sum(jnp.sin(p["tiny"]))


@wrong("only the tiny leaf wrong: factor 2", "float32")
def _(draw):
    def gradient(p):
        return {"huge": 2e6 * p["huge"], "tiny": 2e-8 * jnp.cos(p["tiny"])}

    return Case("gradient", two_scales, gradient, ({"huge": 1e3 * draw.normal(5), "tiny": draw.normal(4)},))


@wrong("only the tiny leaf wrong: zero", "float64", "float32")
def _(draw):
    def gradient(p):
        return {"huge": 2e6 * p["huge"], "tiny": 0 * p["tiny"]}

    return Case("gradient", two_scales, gradient, ({"huge": 1e3 * draw.normal(5), "tiny": draw.normal(4)},))


@wrong("only the tiny leaf wrong: one entry")
def _(draw):
    def gradient(p):
        tiny = 1e-8 * jnp.cos(p["tiny"])
        return {"huge": 2e6 * p["huge"], "tiny": tiny.at[2].multiply(1.001)}

    return Case("gradient", two_scales, gradient, ({"huge": 1e3 * draw.normal(5), "tiny": draw.normal(4)},))


def weighted_sines(x, c):
    return jnp.sum(c * jnp.sin(x))


@wrong("wrong entry 1e-12 of the others", "float32")
def _(draw):
    c = draw.of([1, 2, -1.5, 0.7, 1e-12, 1, 3])

    def gradient(x, c):
        return (c * jnp.cos(x)).at[4].multiply(2.0)

    return Case("gradient", weighted_sines, gradient, (draw.normal(7), c))


@wrong("sign of an entry 1e-12 of the others", "float32")
def _(draw):
    c = draw.of([1, 2, -1.5, 0.7, 1e-12, 1, 3])

    def gradient(x, c):
        return (c * jnp.cos(x)).at[4].multiply(-1.0)

    return Case("gradient", weighted_sines, gradient, (draw.normal(7), c))


@wrong("entry 1e-3 of the others zeroed", "bfloat16", "float16")
def _(draw):
    c = draw.of([1, 2, -1.5, 0.7, 1e-3, 1, 3])
    return Case("gradient", weighted_sines, lambda x, c: (c * jnp.cos(x)).at[4].set(0.0), (draw.normal(7), c))


@wrong("everything tiny, factor 2", "float64")
def _(draw):
    return Case(
        "gradient",
        lambda x: 1e-20 * jnp.sum(jnp.sin(x)),
        lambda x: 2e-20 * jnp.cos(x),
        (draw.normal(5),),
    )


@wrong("everything huge, factor 1.001", "float32")
def _(draw):
    return Case(
        "gradient",
        lambda x: 1e20 * jnp.sum(jnp.sin(x)),
        lambda x: 1.001e20 * jnp.cos(x),
        (draw.normal(5),),
    )


@wrong("small gradients thresholded away")
def _(draw):
    def gradient(x, c):
        g = c * jnp.cos(x)
        return jnp.where(jnp.abs(g) < 1e-8, 0.0, g)

    return Case("gradient", weighted_sines, gradient, (draw.normal(6), draw.of([1, 1e-9, 2, 1e-10, -1, 0.5])))


@wrong("1e-8 added to a small denominator")
def _(draw):
    return Case(
        "gradient", lambda x: jnp.sum(jnp.log(x)), lambda x: 1 / (x + 1e-8), (draw.of([1e-4, 1e-3, 0.5]),)
    )


# Recurrences.


def rnn_states(params, xs):
    h = [jnp.zeros_like(params["W"][0])]
    for t in range(xs.shape[0]):
        h.append(jnp.tanh(params["W"] @ h[-1] + params["U"] @ xs[t]))
    return h


def rnn(params, xs, v):
    return jnp.sum(v * jnp.stack(rnn_states(params, xs)[1:]))


def rnn_gradient(
    params,
    xs,
    v,
    steps=None,
    carried=lambda W, d: W.T @ d,
    state=lambda t: t,
    output=lambda t: t + 1,
    start=0,
):
    """Right as it stands, back through time; a case replaces one piece."""
    h = rnn_states(params, xs)
    W_bar, U_bar = jnp.zeros_like(params["W"]), jnp.zeros_like(params["U"])
    d = jnp.zeros_like(h[0])
    last = xs.shape[0] - 1
    for t in range(last, start - 1, -1):
        if steps is not None and (last - t) % steps == 0:
            d = jnp.zeros_like(d)
        d = (v[t] + d) * (1 - h[output(t)] ** 2)
        W_bar, U_bar = W_bar + jnp.outer(d, h[state(t)]), U_bar + jnp.outer(d, xs[t])
        d = carried(params["W"], d)
    return {"W": W_bar, "U": U_bar}


def wrong_recurrence(name: str, *dtypes: str, **pieces):
    @wrong(name, *dtypes)
    def _(draw):
        params = {"W": draw.normal(3, 3, scale=0.7), "U": draw.normal(3, 2)}
        return Case(
            "gradient", rnn, partial(rnn_gradient, **pieces), (params, draw.normal(5, 2), draw.normal(5, 3))
        )


wrong_recurrence("through time: one step only", "float64", steps=1)
wrong_recurrence("through time: truncated at 3 steps", "float64", "float32", steps=3)
wrong_recurrence("through time: h_t for h_{t-1}", "float32", "bfloat16", state=lambda t: t + 1)
wrong_recurrence("through time: σ' of the step before", "float64", "float16", output=lambda t: t)
wrong_recurrence("through time: W not transposed", "float32", carried=lambda W, d: W @ d)
wrong_recurrence("through time: first step left out", "float32", start=1)
wrong_recurrence("through time: carry detached", "bfloat16", carried=lambda W, d: 0 * d)


@wrong("leaky integrator: decay forgotten on the way back", "float64", "bfloat16")
def _(draw):
    def f(x, v):
        s, total = jnp.zeros_like(x[0]), jnp.zeros_like(x[0])
        for t in range(6):
            s = 0.8 * s + x[t]
            total = total + v[t] * s
        return total

    return Case("gradient", f, lambda x, v: jnp.cumsum(v[::-1])[::-1], (draw.normal(6), draw.normal(6)))


@wrong("leaky integrator: exponent off by one", "float32")
def _(draw):
    def f(x, v):
        powers = jnp.asarray(
            [[0.8 ** (t - k) if t >= k else 0.0 for k in range(6)] for t in range(6)], x.dtype
        )
        return jnp.sum(v * (powers @ x))

    def gradient(x, v):
        powers = jnp.asarray(
            [[0.8 ** (t - k + 1) if t >= k else 0.0 for k in range(6)] for t in range(6)], x.dtype
        )
        return powers.T @ v

    return Case("gradient", f, gradient, (draw.normal(6), draw.normal(6)))


@wrong("memory cell: path through the forget gate missing", "float32")
def _(draw):
    def cell(c, f_t, x):
        return jax.nn.sigmoid(f_t) * c + (1 - jax.nn.sigmoid(f_t)) * jnp.tanh(x)

    def f(gate, x):
        c = jnp.ones_like(gate)
        for t in range(4):
            c = cell(c, gate, x[t])
        return jnp.sum(c**2)

    def gradient(gate, x):
        cs = [jnp.ones_like(gate)]
        for t in range(4):
            cs.append(cell(cs[-1], gate, x[t]))
        g = jax.nn.sigmoid(gate)
        c_bar, gate_bar = 2 * cs[-1], jnp.zeros_like(gate)
        for t in reversed(range(4)):
            gate_bar = gate_bar - c_bar * jnp.tanh(x[t]) * g * (1 - g)
            c_bar = c_bar * g
        return gate_bar

    return Case("gradient", f, gradient, (draw.normal(3), draw.normal(4, 3)))


@wrong("Euler steps: adjoint of the continuous equation", "float64")
def _(draw):
    h = 0.1

    def f(x, a):
        for _ in range(10):
            x = x + h * a * jnp.sin(x)
        return jnp.sum(x)

    def gradient(x, a):
        path = [x]
        for _ in range(10):
            path.append(path[-1] + h * a * jnp.sin(path[-1]))
        lam = jnp.ones_like(x)
        for x_t in path[:0:-1]:  # at the end of each step, not at its start
            lam = lam + h * lam * a * jnp.cos(x_t)
        return lam

    return Case("gradient", f, gradient, (draw.normal(4), draw.normal(4)))


@wrong("fixed point: one step for the implicit derivative", "float32")
def _(draw):
    def solve(a):
        x = jnp.zeros_like(a)
        for _ in range(60):
            x = 0.5 * jnp.cos(x) + a
        return x

    return Case("gradient", lambda a: jnp.sum(solve(a) ** 2), lambda a: 2 * solve(a), (draw.normal(4),))


@wrong("Newton's square root: derivative of the last step only", "float32")
def _(draw):
    def root(a):
        x = a
        for _ in range(3):
            x = 0.5 * (x + a / x)
        return x

    def gradient(a):
        x = a
        for _ in range(2):
            x = 0.5 * (x + a / x)
        return 0.5 / x

    return Case("gradient", lambda a: jnp.sum(root(a)), gradient, (draw.uniform(4, 9, 4),))


# Formulas of papers, with one slip.


def wrong_formula(
    name: str, f: Callable, gradient: Callable, args: Callable[[Draw], tuple], *dtypes: str, argnums=0
):
    @wrong(name, *dtypes)
    def _(draw):
        return Case("gradient", f, gradient, args(draw), argnums)


def residuals_and_positive(draw):
    return draw.normal(6, scale=2.0), draw.uniform(0.5, 2, 6)


wrong_formula(
    "Gaussian KL: -1 inside the ½ lost",
    lambda q: 0.5 * jnp.sum(jnp.exp(q["logvar"]) + q["mu"] ** 2 - 1 - q["logvar"]),
    lambda q: {"mu": q["mu"], "logvar": 0.5 * jnp.exp(q["logvar"]) - 1},
    lambda draw: ({"mu": draw.normal(4), "logvar": draw.normal(4)},),
    "float32",
    "float16",
)
wrong_formula(
    "Gaussian KL: σ's gradient given for log σ²",
    lambda q: 0.5 * jnp.sum(jnp.exp(q["logvar"]) + q["mu"] ** 2 - 1 - q["logvar"]),
    lambda q: {"mu": q["mu"], "logvar": jnp.exp(q["logvar"] / 2) - jnp.exp(-q["logvar"] / 2)},
    lambda draw: ({"mu": draw.normal(4), "logvar": draw.normal(4)},),
    "float32",
)
wrong_formula(
    "Gaussian NLL: r²/σ² for r²/σ³",
    lambda s, r: jnp.sum(jnp.log(s) + r**2 / (2 * s**2)),
    lambda s, r: 1 / s - r**2 / s**2,
    lambda draw: residuals_and_positive(draw)[::-1],
    "float64",
)
wrong_formula(
    "Poisson NLL: rate for log rate",
    lambda eta, y: jnp.mean(jnp.exp(eta) - y * eta),
    lambda eta, y: (1 - y / jnp.exp(eta)) / eta.size,
    lambda draw: (draw.normal(6), draw.of([0, 1, 3, 2, 5, 0])),
    "float32",
    "bfloat16",
)
wrong_formula(
    "Poisson NLL: y without the rate",
    lambda rate, y: jnp.mean(rate - y * jnp.log(rate)),
    lambda rate, y: (1 - y) / rate.size,
    lambda draw: (draw.uniform(0.5, 3, 6), draw.of([0, 1, 3, 2, 5, 0])),
    "float32",
)
wrong_formula(
    "Student-t NLL: ν for ν+1",
    lambda r, nu: jnp.sum((nu + 1) / 2 * jnp.log1p(r**2 / nu)),
    lambda r, nu: nu * r / (nu + r**2),
    lambda draw: (draw.normal(6, scale=2.0), draw.of(4.0)),
    "float64",
    "float16",
)
wrong_formula(
    "Student-t NLL: ν's gradient without the digammas' ½",
    lambda nu, r: jnp.sum(
        gammaln(nu / 2) - gammaln((nu + 1) / 2) + 0.5 * jnp.log(nu) + (nu + 1) / 2 * jnp.log1p(r**2 / nu)
    ),
    lambda nu, r: jnp.sum(
        digamma(nu / 2)
        - digamma((nu + 1) / 2)
        + 0.5 / nu
        + 0.5 * jnp.log1p(r**2 / nu)
        - (nu + 1) / 2 * r**2 / (nu * (nu + r**2))
    ),
    lambda draw: (draw.of(4.0), draw.normal(6)),
)
wrong_formula(
    "gamma NLL: the shape's digamma forgotten",
    lambda k, x: jnp.sum(gammaln(k) - (k - 1) * jnp.log(x) + x),
    lambda k, x: -jnp.log(x),
    lambda draw: (draw.uniform(1, 3, 5), draw.uniform(0.5, 2, 5)),
    "float64",
    "float32",
)
wrong_formula(
    "Dirichlet NLL: digamma of the sum forgotten",
    lambda a, p: jnp.sum(gammaln(a)) - gammaln(jnp.sum(a)) - jnp.sum((a - 1) * jnp.log(p)),
    lambda a, p: digamma(a) - jnp.log(p),
    lambda draw: (draw.uniform(1, 3, 4), draw.probabilities(4)),
)


def focal(z, gamma=2.0):
    return -jnp.sum(jax.nn.sigmoid(-z) ** gamma * jax.nn.log_sigmoid(z))


wrong_formula(
    "focal loss: modulating factor taken for a constant",
    focal,
    lambda z: -(jax.nn.sigmoid(-z) ** 3),
    lambda draw: (draw.normal(6),),
    "float32",
)
wrong_formula(
    "focal loss: γ lost in the second term",
    focal,
    lambda z: (
        -(jax.nn.sigmoid(-z) ** 3) + jax.nn.sigmoid(-z) ** 2 * jax.nn.sigmoid(z) * jax.nn.log_sigmoid(z)
    ),
    lambda draw: (draw.normal(6),),
    "float32",
)


def contrastive(Q, K):
    S = Q @ K.T / 0.5
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(S, axis=1)))


def contrastive_error(Q, K, axis=1):
    return (jax.nn.softmax(Q @ K.T / 0.5, axis=axis) - jnp.eye(Q.shape[0], dtype=Q.dtype)) / Q.shape[0]


def two_views(draw):
    return draw.normal(4, 3, scale=0.5), draw.normal(4, 3, scale=0.5)


wrong_formula(
    "InfoNCE: pull of the positives only",
    contrastive,
    lambda Q, K: -K / Q.shape[0] / 0.5,
    two_views,
    "float64",
    "bfloat16",
)
wrong_formula(
    "InfoNCE: temperature forgotten",
    contrastive,
    lambda Q, K: contrastive_error(Q, K) @ K,
    two_views,
    "float32",
    "float16",
)
wrong_formula(
    "InfoNCE: softmax over queries for keys",
    contrastive,
    lambda Q, K: contrastive_error(Q, K, axis=0) @ K / 0.5,
    two_views,
    "float32",
)
wrong_formula(
    "InfoNCE: keys' error not transposed",
    contrastive,
    lambda Q, K: contrastive_error(Q, K) @ Q / 0.5,
    two_views,
    "float32",
    argnums=1,
)
wrong_formula(
    "InfoNCE of one set: gradient of the queries only",
    lambda Z: contrastive(Z, Z),
    lambda Z: contrastive_error(Z, Z) @ Z / 0.5,
    lambda draw: (draw.normal(4, 3, scale=0.5),),
    "float32",
)


def huber(r):
    return jnp.sum(jnp.where(jnp.abs(r) < 1.5, 0.5 * r**2, 1.5 * (jnp.abs(r) - 0.75)))


FAR_AND_NEAR = (0.3, -1.0, 2.5, -4.0, 1.2)
wrong_formula(
    "Huber: r beyond the knee", huber, lambda r: r, lambda draw: (draw.of(FAR_AND_NEAR),), "float64"
)
wrong_formula(
    "Huber: sign without δ beyond the knee",
    huber,
    lambda r: jnp.where(jnp.abs(r) < 1.5, r, jnp.sign(r)),
    lambda draw: (draw.of(FAR_AND_NEAR),),
    "float32",
    "bfloat16",
)
wrong_formula(
    "Huber: sign lost beyond the knee",
    huber,
    lambda r: jnp.minimum(r, 1.5),
    lambda draw: (draw.of(FAR_AND_NEAR),),
    "float32",
)
wrong_formula(
    "Huber: knee at 1",
    huber,
    lambda r: jnp.clip(r, -1, 1),
    lambda draw: (draw.of(FAR_AND_NEAR),),
    "float32",
)
wrong_formula(
    "smooth L1: β forgotten",
    lambda r: jnp.sum(jnp.where(jnp.abs(r) < 0.5, r**2 / (2 * 0.5), jnp.abs(r) - 0.25)),
    lambda r: jnp.clip(r, -1, 1),
    lambda draw: (draw.of([0.2, -0.3, 2.0, -0.7]),),
    "float32",
)


def quantile_loss(q, y):
    return jnp.mean(jnp.where(y > q, 0.9 * (y - q), 0.1 * (q - y)))


wrong_formula(
    "quantile loss: the wrong side",
    quantile_loss,
    lambda q, y: jnp.where(y > q, -0.1, 0.9).astype(q.dtype) / q.size,
    lambda draw: (draw.normal(6), draw.normal(6)),
    "float64",
    "float16",
)
wrong_formula(
    "quantile loss: sign",
    quantile_loss,
    lambda q, y: jnp.where(y > q, 0.9, -0.1).astype(q.dtype) / q.size,
    lambda draw: (draw.normal(6), draw.normal(6)),
    "float16",
)
wrong_formula(
    "log cosh: derivative of cosh only",
    lambda r: jnp.sum(jnp.log(jnp.cosh(r))),
    jnp.sinh,
    lambda draw: (draw.normal(6),),
    "float32",
)


def cosine(x, y):
    return jnp.sum(x * y) / jnp.sqrt(jnp.sum(x**2) * jnp.sum(y**2))


wrong_formula(
    "cosine similarity: projection forgotten",
    cosine,
    lambda x, y: y / jnp.sqrt(jnp.sum(x**2) * jnp.sum(y**2)),
    two_vectors,
    "float64",
    "bfloat16",
)
wrong_formula(
    "cosine similarity: ‖x‖ for ‖x‖² in the projection",
    cosine,
    lambda x, y: y / jnp.sqrt(jnp.sum(x**2) * jnp.sum(y**2)) - cosine(x, y) * x / jnp.sqrt(jnp.sum(x**2)),
    two_vectors,
    "float32",
)


def vector_and_matrix(draw):
    return draw.normal(4), draw.normal(4, 4)


wrong_formula(
    "Mahalanobis: 2Ax with an unsymmetric A",
    lambda x, A: x @ A @ x,
    lambda x, A: 2 * A @ x,
    vector_and_matrix,
    "float32",
    "float16",
)
wrong_formula(
    "Mahalanobis: half of A + Aᵀ",
    lambda x, A: x @ A @ x,
    lambda x, A: 0.5 * (A + A.T) @ x,
    vector_and_matrix,
    "float32",
)
wrong_formula(
    "Mahalanobis distance: ½ of the root forgotten",
    lambda x, A: jnp.sqrt(x @ A @ x),
    lambda x, A: 2 * A @ x / jnp.sqrt(x @ A @ x),
    lambda draw: (draw.normal(4), draw.positive_definite(4)),
)


def square(draw):
    return (draw.invertible(4),)


def with_weights(draw):
    return draw.invertible(4), draw.normal(4, 4)


wrong_formula("log det: X⁻¹ for X⁻ᵀ", lambda X: jnp.linalg.slogdet(X)[1], jnp.linalg.inv, square, "float64")
wrong_formula("det: X⁻ᵀ without det X", jnp.linalg.det, lambda X: jnp.linalg.inv(X).T, square)
wrong_formula(
    "det: adjugate not transposed",
    jnp.linalg.det,
    lambda X: jnp.linalg.det(X) * jnp.linalg.inv(X),
    square,
    "float32",
)


def inverse_sum(X, G):
    return jnp.sum(G * jnp.linalg.inv(X))


wrong_formula(
    "inverse: without the transposes",
    inverse_sum,
    lambda X, G: -jnp.linalg.inv(X) @ G @ jnp.linalg.inv(X),
    with_weights,
    "float32",
)
wrong_formula(
    "inverse: sign", inverse_sum, lambda X, G: jnp.linalg.inv(X).T @ G @ jnp.linalg.inv(X).T, with_weights
)
wrong_formula(
    "inverse: -1/X² entry by entry",
    inverse_sum,
    lambda X, G: -G * jnp.linalg.inv(X) ** 2,
    with_weights,
    "float32",
)
wrong_formula(
    "solve: outer product transposed",
    lambda A, b, v: v @ jnp.linalg.solve(A, b),
    lambda A, b, v: -jnp.outer(jnp.linalg.solve(A, b), jnp.linalg.solve(A.T, v)),
    lambda draw: (draw.invertible(4), draw.normal(4), draw.normal(4)),
    "float64",
    "float32",
)
wrong_formula(
    "solve: A not transposed for the adjoint",
    lambda b, A, v: v @ jnp.linalg.solve(A, b),
    lambda b, A, v: jnp.linalg.solve(A, v),
    lambda draw: (draw.normal(4), draw.invertible(4), draw.normal(4)),
    "float32",
)
wrong_formula(
    "trace of a cube: not transposed", lambda X: jnp.trace(X @ X @ X), lambda X: 3 * X @ X, square, "float64"
)
wrong_formula(
    "matrix cube: 3X² as if G commuted",
    lambda X, G: jnp.sum(G * (X @ X @ X)),
    lambda X, G: 3 * (X.T @ X.T) @ G,
    with_weights,
    "float64",
)
wrong_formula(
    "matrix square: one of the two terms",
    lambda X, G: jnp.sum(G * (X @ X)),
    lambda X, G: X.T @ G,
    with_weights,
    "float32",
    "bfloat16",
)
wrong_formula(
    "XᵀX: transposed term missing",
    lambda X, G: jnp.sum(G * (X.T @ X)),
    lambda X, G: X @ G,
    lambda draw: (draw.normal(5, 3), draw.normal(3, 3)),
    "float64",
    "float16",
)


def cholesky_sum(A, G):
    return jnp.sum(G * jnp.linalg.cholesky(A))


def cholesky_gradient(A, G, diagonal=0.5, symmetric=True):
    """L⁻ᵀ Φ(Lᵀ Ḡ) L⁻¹, symmetrised; Φ: the lower triangle with half of the diagonal (Murray 2016, eq. 9)."""
    L = jnp.linalg.cholesky(A)
    P = L.T @ jnp.tril(G)
    P = jnp.tril(P) - (1 - diagonal) * jnp.diag(jnp.diagonal(P))
    S = jnp.linalg.solve(L.T, P) @ jnp.linalg.inv(L)
    return 0.5 * (S + S.T) if symmetric else jnp.tril(S)


def covariance_and_weights(draw):
    return draw.positive_definite(4), draw.normal(4, 4)


wrong_formula(
    "Cholesky: ½ of the diagonal forgotten",
    cholesky_sum,
    partial(cholesky_gradient, diagonal=1.0),
    covariance_and_weights,
    "float32",
)
wrong_formula(
    "Cholesky: lower triangle instead of the symmetric part",
    cholesky_sum,
    partial(cholesky_gradient, symmetric=False),
    covariance_and_weights,
)
wrong_formula(
    "Cholesky: as if L were A's square root",
    cholesky_sum,
    lambda A, G: 0.5 * jnp.linalg.inv(jnp.linalg.cholesky(A)).T @ G,
    covariance_and_weights,
    "float32",
)
wrong_formula(
    "Gaussian NLL: covariance's quadratic term dropped",
    lambda S, x: 0.5 * (jnp.linalg.slogdet(S)[1] + x @ jnp.linalg.solve(S, x)),
    lambda S, x: 0.5 * jnp.linalg.inv(S).T,
    lambda draw: (draw.positive_definite(4), draw.normal(4)),
    "float64",
    "float32",
)
wrong_formula(
    "nuclear norm: VUᵀ for UVᵀ",
    lambda X: jnp.sum(jnp.linalg.svd(X, compute_uv=False)),
    lambda X: (lambda U, _, Vt: (U @ Vt).T)(*jnp.linalg.svd(X)),
    square,
)
wrong_formula(
    "Frobenius norm: not divided by the norm",
    lambda X: jnp.sqrt(jnp.sum(X**2)),
    lambda X: X,
    square,
    "bfloat16",
)
wrong_formula(
    "multi-class hinge: the true class pushed once, not per violation",
    lambda z: jnp.sum(jnp.maximum(0, 1 + z[1:] - z[0])),
    lambda z: jnp.concatenate(
        [-jnp.ones_like(z[:1]), jnp.where(1 + z[1:] - z[0] > 0, 1.0, 0.0).astype(z.dtype)]
    ),
    lambda draw: (draw.of([0.2, 0.5, -0.1, -2.0, 0.9]),),
    "float32",
)
wrong_formula(
    "hinge: margin left out of the test",
    lambda z, y: jnp.mean(jnp.maximum(0, 1 - y * z)),
    lambda z, y: jnp.where(y * z < 0, -y, 0.0) / z.size,
    lambda draw: (draw.of([0.5, -0.5, 2, -2, 0.3]), draw.of([1, -1, 1, 1, -1])),
    "float64",
    "bfloat16",
)
wrong_formula(
    "triplet: anchor's gradient misses the negative",
    lambda a, p, n: jnp.maximum(0, jnp.sum((a - p) ** 2) - jnp.sum((a - n) ** 2) + 20),
    lambda a, p, n: 2 * (a - p),
    lambda draw: (draw.normal(4), draw.normal(4), draw.normal(4)),
    "float32",
)
wrong_formula(
    "Dice loss: quotient rule's second term missing",
    lambda p, y: 1 - 2 * jnp.sum(p * y) / (jnp.sum(p) + jnp.sum(y)),
    lambda p, y: -2 * y / (jnp.sum(p) + jnp.sum(y)),
    lambda draw: (draw.uniform(0, 1, 6), draw.of([1, 0, 1, 1, 0, 0])),
    "float32",
    "float16",
)
wrong_formula(
    "reparametrised sample: ½ of log σ² forgotten",
    lambda q, noise: jnp.sum(jnp.tanh(q["mu"] + jnp.exp(0.5 * q["logvar"]) * noise)),
    lambda q, noise: (lambda s, d: {"mu": d, "logvar": d * s * noise})(
        jnp.exp(0.5 * q["logvar"]),
        1 - jnp.tanh(q["mu"] + jnp.exp(0.5 * q["logvar"]) * noise) ** 2,
    ),
    lambda draw: ({"mu": draw.normal(4), "logvar": draw.normal(4)}, draw.normal(4)),
    "float64",
)
wrong_formula(
    "clipped policy ratio: gradient where the clip holds",
    lambda logp, old, A: (
        -jnp.mean(jnp.minimum(jnp.exp(logp - old) * A, jnp.clip(jnp.exp(logp - old), 0.8, 1.2) * A))
    ),
    lambda logp, old, A: -jnp.exp(logp - old) * A / A.size,
    lambda draw: (draw.normal(8), draw.normal(8), draw.normal(8)),
    "float32",
)
wrong_formula(
    "preference loss: β forgotten",
    lambda r: -jnp.mean(jax.nn.log_sigmoid(0.3 * (r["chosen"] - r["rejected"]))),
    lambda r: (lambda d: {"chosen": -d, "rejected": d})(
        jax.nn.sigmoid(-0.3 * (r["chosen"] - r["rejected"])) / r["chosen"].size
    ),
    lambda draw: ({"chosen": draw.normal(5), "rejected": draw.normal(5)},),
    "float32",
    "bfloat16",
)
wrong_formula(
    "mixture: responsibilities forgotten",
    lambda mu, x: -jnp.sum(jax.nn.logsumexp(-0.5 * (x[:, None] - mu[None, :]) ** 2, axis=1)),
    lambda mu, x: jnp.sum(mu[None, :] - x[:, None], axis=0),
    lambda draw: (draw.normal(3), draw.normal(6)),
    "float64",
)
wrong_formula(
    "coupling layer: log-determinant term missing",
    lambda s, x: jnp.sum(0.5 * (x * jnp.exp(s)) ** 2 - s),
    lambda s, x: (x * jnp.exp(s)) ** 2,
    two_vectors,
    "float64",
    "float16",
)
wrong_formula(
    "entropy: +1 forgotten",
    lambda p: -jnp.sum(p * jnp.log(p)),
    lambda p: -jnp.log(p),
    lambda draw: (draw.probabilities(5),),
    "float32",
)
wrong_formula(
    "KL(p‖q): gradient of the other argument",
    lambda q, p: jnp.sum(p * jnp.log(p / q)),
    lambda q, p: jnp.log(q / p) + 1,
    lambda draw: (draw.probabilities(5), draw.probabilities(5)),
    "float32",
)
wrong_formula(
    "kernel: bandwidth's square forgotten",
    lambda x, y: jnp.exp(-jnp.sum((x - y) ** 2) / (2 * 1.5**2)),
    lambda x, y: -(x - y) / 1.5 * jnp.exp(-jnp.sum((x - y) ** 2) / (2 * 1.5**2)),
    two_vectors,
    "float32",
)
wrong_formula(
    "pairwise distances: each pair counted once",
    lambda X: 0.5 * jnp.sum((X[:, None, :] - X[None, :, :]) ** 2),
    lambda X: jnp.sum(X[:, None, :] - X[None, :, :], axis=1),
    lambda draw: (draw.normal(4, 2),),
    "float64",
    "bfloat16",
)
wrong_formula(
    "graph layer: adjacency not transposed",
    lambda X, A, v: jnp.sum(v * jnp.tanh(A @ X)),
    lambda X, A, v: A @ (v * (1 - jnp.tanh(A @ X) ** 2)),
    lambda draw: (draw.normal(4, 3), draw.of(np.triu(np.ones((4, 4)))), draw.normal(4, 3)),
    "float32",
)
wrong_formula(
    "polynomial: exponent lowered, factor forgotten",
    lambda c, x: jnp.sum(c[0] + c[1] * x + c[2] * x**2),
    lambda c, x: jnp.stack([jnp.ones_like(c[0]), jnp.sum(x), jnp.sum(x**2)]),
    lambda draw: (draw.normal(3), draw.normal(5)),
    "float32",
)
wrong_formula(
    "total variation: right neighbour only",
    lambda x: jnp.sum((x[1:] - x[:-1]) ** 2),
    lambda x: jnp.concatenate([-2 * (x[1:] - x[:-1]), jnp.zeros_like(x[:1])]),
    lambda draw: (draw.normal(6),),
    "float64",
    "float32",
)


# Functions that carry a wrong rule of their own; the plain function inside is right.


def carries_vjp(
    name: str, plain: Callable, bwd: Callable, *dtypes: str, wrap=lambda g: lambda x: jnp.sum(g(x))
):
    @wrong(f"inside f, custom_vjp: {name}", *dtypes)
    def _(draw):
        inner = jax.custom_vjp(plain)
        inner.defvjp(lambda x: (plain(x), x), bwd)
        f = wrap(inner)
        return Case("gradient", f, jax.grad(f), (draw.normal(6),))


def carries_jvp(
    name: str, plain: Callable, jvp: Callable, *dtypes: str, wrap=lambda g: lambda x: jnp.sum(g(x))
):
    @wrong(f"inside f, custom_jvp: {name}", *dtypes)
    def _(draw):
        inner = jax.custom_jvp(plain)
        inner.defjvp(lambda primals, tangents: (plain(*primals), jvp(*primals, *tangents)))
        f = wrap(inner)
        return Case("gradient", f, jax.grad(f), (draw.normal(6),))


def softplus(x):
    return jnp.logaddexp(x, 0.0)


carries_vjp(
    "softplus with tanh for sigmoid", softplus, lambda x, bar: (bar * jnp.tanh(x),), "float32", "float16"
)
carries_vjp("sign", jnp.sin, lambda x, bar: (-bar * jnp.cos(x),), "float32")
carries_vjp(
    "cotangent ignored", jnp.sin, lambda x, bar: (jnp.cos(x),), wrap=lambda g: lambda x: jnp.sum(g(x) ** 2)
)
carries_vjp("clipped gradient", lambda x: x**2, lambda x, bar: (jnp.clip(2 * x * bar, -1, 1),), "float32")
carries_vjp(
    "gradient reversal", lambda x: x * 1, lambda x, bar: (-bar,), wrap=lambda g: lambda x: jnp.sum(g(x) ** 2)
)
carries_vjp("1e-6 off", jnp.sin, lambda x, bar: (bar * jnp.cos(x) * (1 + 1e-6),))
carries_vjp("1e-4 off", jnp.sin, lambda x, bar: (bar * jnp.cos(x) * (1 + 1e-4),), "float32")
carries_vjp(
    "under jit",
    jnp.sin,
    lambda x, bar: (bar * 2 * jnp.cos(x),),
    "float64",
    wrap=lambda g: jax.jit(lambda x: jnp.sum(g(x))),
)
carries_vjp(
    "under vmap",
    jnp.sin,
    lambda x, bar: (bar * 2 * jnp.cos(x),),
    wrap=lambda g: lambda x: jnp.sum(jax.vmap(g)(x)),
)
carries_vjp(
    "in a scan",
    jnp.sin,
    lambda x, bar: (bar * jnp.sin(x),),
    "float32",
    wrap=lambda g: lambda x: jnp.sum(jax.lax.scan(lambda c, _: (g(c), None), x, None, length=3)[0]),
)
carries_vjp(
    "in a branch",
    jnp.sin,
    lambda x, bar: (bar * jnp.sin(x),),
    wrap=lambda g: lambda x: jnp.sum(jax.lax.cond(jnp.sum(x**2) > 0, g, jnp.cos, x)),
)
carries_vjp(
    "rematerialised",
    jnp.sin,
    lambda x, bar: (bar * jnp.sin(x),),
    wrap=lambda g: lambda x: jnp.sum(jax.checkpoint(g)(x)),
)
carries_jvp("factor 2", jnp.sin, lambda x, dx: 2 * jnp.cos(x) * dx, "float64")
carries_jvp("tangent passed through", jnp.tanh, lambda x, dx: dx, "float64", "float32")
carries_jvp("sigmoid: a(1+a)", jax.nn.sigmoid, lambda x, dx: jax.nn.sigmoid(x) * (1 + jax.nn.sigmoid(x)) * dx)
carries_jvp("1e-6 off", jnp.sin, lambda x, dx: jnp.cos(x) * dx * (1 + 1e-6))
carries_jvp("zero tangent", jnp.sin, lambda x, dx: 0 * dx, "float32")
carries_jvp(
    "under jit",
    jnp.sin,
    lambda x, dx: 2 * jnp.cos(x) * dx,
    "float32",
    wrap=lambda g: jax.jit(lambda x: jnp.sum(g(x))),
)
carries_jvp(
    "in a scan",
    jnp.sin,
    lambda x, dx: jnp.sin(x) * dx,
    wrap=lambda g: lambda x: jnp.sum(jax.lax.scan(lambda c, _: (g(c), None), x, None, length=3)[0]),
)
carries_jvp(
    "in a loop of fixed length",
    jnp.sin,
    lambda x, dx: jnp.sin(x) * dx,
    "float32",
    wrap=lambda g: lambda x: jnp.sum(jax.lax.fori_loop(0, 3, lambda i, c: g(c), x)),
)


@wrong("inside f, custom_vjp: two arguments, adjoints exchanged", "float64")
def _(draw):
    product = jax.custom_vjp(lambda x, y: x * y)
    product.defvjp(lambda x, y: (x * y, (x, y)), lambda r, bar: (bar * r[0], bar * r[1]))

    def f(x, y):
        return jnp.sum(jnp.sin(product(x, y)))

    return Case("gradient", f, jax.grad(f, (0, 1)), (draw.normal(5), draw.normal(5)), (0, 1))


@wrong("inside f, custom_vjp: deep in a network, W not transposed", "float32")
def _(draw):
    affine = jax.custom_vjp(lambda x, W: x @ W.T)
    affine.defvjp(lambda x, W: (x @ W.T, (x, W)), lambda r, bar: (bar @ r[1].T, bar.T @ r[0]))

    def f(W, x):
        return jnp.sum(jnp.tanh(affine(jnp.tanh(affine(x, W)), W)))

    return Case("gradient", f, jax.grad(f), (draw.normal(4, 4), draw.normal(5, 4)))
