"""Right derivatives that fixed tolerances, finite differences or autodiff would call wrong.

Every candidate is derived by hand: right in exact arithmetic, as stable as a careful person writes it, and
at a kink one of the valid slopes. `RIGHT` maps a case in words to a builder, which makes its arrays anew.
Written for x64, and for strict promotion of dtypes and ranks.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.corpus_wrong import Case, Draw

RIGHT: dict[str, Callable[[], Case]] = {}


def right(name: str, *dtypes: str):
    """Enters a builder into `RIGHT`, once per dtype; float64 goes without saying."""

    def enter(build: Callable[[Draw], Case]):
        for dtype in dtypes or ("float64",):
            key = name if dtype == "float64" else f"{name}, {dtype}"
            if key in RIGHT:
                raise KeyError(f"two cases are named {key!r}")
            RIGHT[key] = partial(lambda dtype: build(Draw(name, dtype)), dtype)
        return build

    return enter


def case(name: str, f, candidate, data, *dtypes: str, argnums: int | tuple[int, ...] = 0, kind="gradient"):
    """A case of one line; `data` takes a `Draw` and returns the arguments."""
    right(name, *dtypes)(lambda draw: Case(kind, f, candidate, data(draw), argnums))


def sigma(z):
    """1/(1+e^-z), and no exponential of a positive number."""
    e = jnp.exp(-abs(z))
    return jnp.where(z >= 0, 1 / (1 + e), e / (1 + e))


def softmax(z):
    e = jnp.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# Multilayer perceptrons, X in rows, backpropagated by hand.

TANH = (jnp.tanh, lambda z, a, a_bar: a_bar * (1 - a) * (1 + a))
SIGMOID = (jax.nn.sigmoid, lambda z, a, a_bar: a_bar * a * sigma(-z))
RELU = (jax.nn.relu, lambda z, a, a_bar: jnp.where(z > 0, a_bar, 0))
SOFTMAX = (jax.nn.softmax, lambda z, a, a_bar: a * (a_bar - (a * a_bar).sum(axis=1, keepdims=True)))


def gelu_pullback(z, a, a_bar):
    Phi = 0.5 * jax.lax.erfc(-z / math.sqrt(2))
    return a_bar * (Phi + z * jnp.exp(-z * z / 2) / math.sqrt(2 * math.pi))


GELU = (partial(jax.nn.gelu, approximate=False), gelu_pullback)


def integer_labels(z, y):
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - z[jnp.arange(len(y)), y])


def integer_labels_delta(z, y):
    return (softmax(z) - jax.nn.one_hot(y, z.shape[1], dtype=z.dtype)) / len(y)


def soft_labels(z, y):
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(z), axis=1))


def soft_labels_delta(z, y):
    return (y.sum(axis=1, keepdims=True) * softmax(z) - y) / len(y)


def half_squares(z, y):
    return 0.5 * jnp.mean(jnp.sum((z - y) ** 2, axis=1))


def half_squares_delta(z, y):
    return (z - y) / len(y)


def forward(params, X, act):
    zs, acts = [], [X]
    for W, b in params:
        zs.append(acts[-1] @ W.T + b[None, :])
        acts.append(act(zs[-1]))
    return zs, acts


def mlp(activation, loss, delta, l2=0.0):
    """The cost of a network and its gradient; the last layer is linear."""
    act, pullback = activation

    def cost(params, X, y):
        penalty = sum((jnp.sum(W * W) for W, _ in params), 0.0)
        return loss(forward(params, X, act)[0][-1], y) + l2 / 2 * penalty

    def gradient(params, X, y):
        zs, acts = forward(params, X, act)
        d, gradients = delta(zs[-1], y), []
        for l in reversed(range(len(params))):
            W, _ = params[l]
            gradients.append((d.T @ acts[l] + l2 * W, d.sum(axis=0)))
            if l:
                d = pullback(zs[l - 1], acts[l], d @ W)
        return gradients[::-1]

    return cost, gradient


def layers(draw, *sizes):
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return [(draw.normal(n, m, scale=m**-0.5), draw.normal(n, scale=0.1)) for m, n in pairs]


def classes(draw):
    return layers(draw, 4, 6, 5, 3), draw.normal(8, 4), draw.integers(3, 8)


def targets(draw):
    return layers(draw, 4, 6, 5, 3), draw.normal(8, 4), draw.probabilities(8, 3)


INTEGER, SOFT, SQUARES = (
    (integer_labels, integer_labels_delta),
    (soft_labels, soft_labels_delta),
    (half_squares, half_squares_delta),
)
case("network: tanh, labels, l2", *mlp(TANH, *INTEGER, 0.1), classes, "float64", "float16")
case("network: sigmoid, squares", *mlp(SIGMOID, *SQUARES), targets, "bfloat16")
case("network: relu, soft labels, l2", *mlp(RELU, *SOFT, 0.01), targets, "float32")
case("network: gelu, labels", *mlp(GELU, *INTEGER), classes, "float32")
case("network: softmax inside", *mlp(SOFTMAX, *SQUARES), targets)


@right("network: all units dead, gradients exactly 0", "bfloat16")
def _(draw):
    cost, gradient = mlp(RELU, *SQUARES)
    (W, b), last = layers(draw, 4, 6, 3)
    return Case("gradient", cost, gradient, ([(W, b - 100), last], draw.normal(8, 4), draw.normal(8, 3)))


@right("network: X = 0, relu slope 1 at 0")
def _(draw):
    cost, gradient = mlp((jax.nn.relu, lambda z, a, g: jnp.where(z >= 0, g, 0)), *SQUARES)
    (W, b), last = layers(draw, 4, 6, 3)
    params = [(W, 0 * b), last]
    return Case("gradient", cost, gradient, (params, 0 * draw.normal(5, 4), draw.normal(5, 3)))


# Activations, saturated: f = Σ w σ(z).

ENDS = (-100, -40, -20, -8, -2, -0.5, 0, 0.3, 1, 4, 12, 20, 40, 100)


def activation(name, act, slope, *dtypes):
    @right(f"{name}, saturated", *dtypes)
    def _(draw):
        data = draw.of(ENDS), draw.normal(len(ENDS))
        return Case("gradient", lambda z, w: jnp.sum(w * act(z)), lambda z, w: w * slope(z), data)


def sech_squared(z):
    e = jnp.exp(-2 * abs(z))
    return 4 * e / (1 + e) ** 2


activation("sigmoid", jax.nn.sigmoid, lambda z: sigma(z) * sigma(-z), "float16", "bfloat16")
activation("tanh", jnp.tanh, sech_squared, "float32")
activation("log sigmoid", jax.nn.log_sigmoid, lambda z: sigma(-z), "float16")
activation("softplus", jax.nn.softplus, sigma, "bfloat16")
activation("silu", jax.nn.silu, lambda z: sigma(z) * (1 + z * sigma(-z)), "float32")
activation("elu", jax.nn.elu, lambda z: jnp.exp(jnp.minimum(z, 0)), "float16")

case(
    "binary cross-entropy of saturated logits",
    lambda z, y: jnp.sum(jnp.where(y, jax.nn.softplus(-z), jax.nn.softplus(z))),
    lambda z, y: jnp.where(y, -sigma(-z), sigma(z)),
    lambda draw: (draw.of(ENDS), jnp.arange(len(ENDS)) % 2 == 0),
    "float16",
)


@right("cross-entropy of sure logits: p - 1 as minus the sum of the others", "float32")
def _(draw):
    def gradient(z, y):
        hit = jnp.arange(z.shape[1])[None, :] == y[:, None]
        others = jnp.where(hit, 0, softmax(z))
        return jnp.where(hit, -others.sum(axis=1, keepdims=True), others) / len(y)

    z = np.random.default_rng(1).normal(size=(4, 5)) * 2
    z[range(4), [0, 2, 2, 4]] += [10, 20, 40, 60]
    return Case("gradient", integer_labels, gradient, (draw.of(z), jnp.array([0, 2, 2, 4])))


# Kinks, and another valid slope than autodiff's.


def kink(name, f, gradient, at, *dtypes):
    case(name, f, gradient, lambda draw: tuple(draw.of(x) for x in at), *dtypes)


W6 = (0.7, -1.3, 2.0, 0.4, -0.6, 1.1)
ZEROS = (0.0, -1.5, 0.0, 2.0, 0.5, 0.0)


def step_with(value):
    """The step function with this value at 0."""
    return lambda x: jnp.where(x > 0, 1.0, jnp.where(x < 0, 0.0, value))


def sign_with(value):
    return lambda x: jnp.where(x == 0, value, jnp.sign(x))


def weighted_relu(x, w):
    return jnp.sum(w * jnp.maximum(x, 0))


kink(
    "relu at 0: slope 1",
    *(weighted_relu, lambda x, w: jnp.where(x >= 0, w, 0), (ZEROS, W6)),
    *("float64", "bfloat16"),
)
kink(
    "relu at 0: slope 1/2",
    lambda x, w: jnp.sum(w * jax.nn.relu(x)),
    lambda x, w: w * step_with(0.5)(x).astype(w.dtype),
    *((ZEROS, W6), "float16"),
)
kink("|x| at 0: slope 1", lambda x: jnp.sum(abs(x)), lambda x: 1 - 2 * (x < 0).astype(x.dtype), (ZEROS,))
kink(
    "|x| at 0: slope -1/2",
    lambda x, w: jnp.sum(w * abs(x)),
    lambda x, w: w * sign_with(-0.5)(x).astype(w.dtype),
    *((ZEROS, W6), "float32"),
)
kink(
    "leaky relu at 0: the right-hand slope, and -0.0",
    lambda x: jnp.sum(jnp.where(x > 0, x, 0.1 * x)),
    lambda x: jnp.where(x < 0, jnp.full_like(x, 0.1), 1),
    ((0.0, -0.0, 1.0, -2.0),),
)
kink(
    "maximum(x, y) in a tie: all to x",
    lambda x, y: jnp.sum(jnp.maximum(x, y) ** 2),
    lambda x, y: jnp.where(x >= y, 2 * x, 0),
    *(((1.0, 2.0, 3.0), (1.0, 2.5, 3.0)), "float16"),
)
kink(
    "largest entry in a tie of three: all to the last",
    lambda x: jnp.max(x),
    lambda x: jnp.zeros_like(x).at[len(x) - 1 - jnp.argmax(x[::-1])].set(1),
    *(((2.0, -1.0, 2.0, 0.5, 2.0),), "float32"),
)
kink(
    "max-pool ties: all to the first of the window",
    lambda x: jnp.sum(jnp.sin(x.reshape(-1, 3).max(axis=1))),
    lambda x: (
        jax.nn.one_hot(x.reshape(-1, 3).argmax(axis=1), 3, dtype=x.dtype) * jnp.cos(x.reshape(-1, 3))
    ).ravel(),
    *(((1.0, 1.0, 0.5, 0.2, 0.8, 0.8, -1.0, -1.0, -1.0, 0.0, 2.0, 1.0),), "bfloat16"),
)
kink(
    "sort with equal entries, in the other order",
    lambda x, w: jnp.sum(w * jnp.sort(x)),
    lambda x, w: jnp.zeros_like(x).at[jnp.argsort(-x, stable=True)[::-1]].set(w),
    ((1.0, -2.0, 1.0, 0.5, -2.0, 3.0), W6),
)
kink(
    "Huber's knee and relu6's corners",
    lambda x: jnp.sum(jnp.where(abs(x) <= 1, x * x / 2, abs(x) - 0.5) + jnp.clip(x, 0, 6)),
    lambda x: jnp.clip(x, -1, 1) + jnp.where((x >= 0) & (x <= 6), jnp.ones_like(x), 0),
    *(((-1.0, 1.0, 0.0, 6.0, 3.0, -0.2, 8.0),), "float32"),
)
kink(
    "clip at its bounds: slope 1 and 0",
    lambda x: jnp.sum(jnp.clip(x, -1, 1) * 3),
    lambda x: jnp.where((x > -1) & (x <= 1), jnp.full_like(x, 3), 0),
    *(((-1.0, 1.0, 0.25, -3.0, 1.0),), "float16"),
)
kink(
    "relu(W x) at x = 0: all on",
    lambda x, W: jnp.sum(jax.nn.relu(W @ x)),
    lambda x, W: W.T @ jnp.where(W @ x >= 0, jnp.ones_like(W @ x), 0),
    ((0.0, 0.0, 0.0), np.arange(-6.0, 6.0).reshape(4, 3) / 4),
)
kink(
    "hinge at its edge: inside",
    lambda w, X, y: jnp.mean(jnp.maximum(0, 1 - y * (X @ w))),
    lambda w, X, y: -(X.T @ jnp.where(y * (X @ w) <= 1, y, 0)) / len(y),
    ((1.0, -2.0), ((1.0, 0.0), (1.0, 1.0), (0.5, 0.25), (3.0, 1.0)), (1.0, -1.0, -1.0, 1.0)),
)
kink(
    "L1 penalty at weights of 0: slope 1/3",
    lambda w, X: jnp.mean((X @ w - 1) ** 2) + 0.1 * jnp.sum(abs(w)),
    lambda w, X: 2 * X.T @ (X @ w - 1) / len(X) + 0.1 * sign_with(1 / 3)(w).astype(w.dtype),
    *(((0.0, 0.5, 0.0), np.sin(np.arange(15.0)).reshape(5, 3)), "float32"),
)
kink(
    "total variation of a flat signal: sign of 0 is 1",
    lambda x: jnp.sum(abs(jnp.diff(x))),
    lambda x: -jnp.diff(sign_with(1.0)(jnp.diff(x)), prepend=0, append=0).astype(x.dtype),
    ((1.0, 1.0, 2.0, 2.0, 2.0, -1.0),),
)
kink(
    "within rounding of a kink: the other order of addition is on the other side",
    lambda x: jax.nn.relu(((x[0] + x[1]) + x[2]) - 0.6),
    lambda x: jnp.where((x[0] + (x[1] + x[2])) - 0.6 > 0, jnp.ones_like(x), 0),
    ((0.1, 0.2, 0.3),),
)


@right("within rounding of a kink: relu(W x + b), b = -W x as NumPy rounds it", "float32")
def _(draw):
    rng = np.random.default_rng(2)
    W, x = (rng.normal(size=s).astype(np.float32) for s in ((30, 50), 50))
    b = -np.array([sum(row[::-1] * x[::-1]) for row in W], np.float32)

    def gradient(b, W, x):
        return jnp.where(jnp.sum(W[:, ::-1] * x[None, ::-1], axis=1) + b > 0, jnp.ones_like(b), 0)

    return Case("gradient", lambda b, W, x: jnp.sum(jax.nn.relu(W @ x + b)), gradient, (b, W, x))


# Autodiff at fault: NaN from the branch not taken, from 0/0, from 0 times infinity.


def safe_unit(x, axis=-1):
    """x/‖x‖, and 0 where x = 0."""
    n = jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True))
    return jnp.where(n > 0, x / jnp.where(n > 0, n, 1), 0)


case(
    "where: square root of negative numbers",
    lambda x: jnp.sum(jnp.where(x > 0, x * jnp.sqrt(x), 0)),
    lambda x: 1.5 * jnp.sqrt(jnp.maximum(x, 0)),
    lambda draw: (draw.of((-1.0, 0.25, 2.0, -0.5, 3.0)),),
)
case(
    "where: logarithm of zeros behind a mask",
    lambda p, seen: -jnp.sum(jnp.where(seen, jnp.log(p), 0)),
    lambda p, seen: jnp.where(seen, -1 / jnp.where(seen, p, 1), 0),
    lambda draw: (draw.of((0.0, 0.25, 0.75, 0.0)), jnp.array([False, True, True, False])),
    "float16",
)


def sinc_slope(x):
    """(x cos x - sin x)/x²; up to |x| = 1 its series Σ (-1)ᵏ 2k x²ᵏ⁻¹/(2k+1)!."""
    terms = [(-1) ** k * 2 * k / math.factorial(2 * k + 1) for k in range(1, 12)]
    inner, outer = jnp.where(abs(x) < 1, x, 0), jnp.where(abs(x) < 1, 1, x)
    series = jnp.zeros_like(x)
    for term in reversed(terms):
        series = series * inner**2 + term
    return jnp.where(abs(x) < 1, inner * series, (jnp.cos(outer) - jnp.sin(outer) / outer) / outer)


case(
    "where: sin x / x at 0",
    lambda x: jnp.sum(jnp.where(x == 0, 1, jnp.sin(x) / x)),
    sinc_slope,
    lambda draw: (draw.of((0.0, 0.5, -2.0, 0.0, 1e-3)),),
    "float32",
)
case(
    "where: softplus, overflow in the branch not taken",
    lambda x: jnp.sum(jnp.where(x > 30, x, jnp.log1p(jnp.exp(x)))),
    sigma,
    lambda draw: (draw.of((1000.0, -1000.0, 0.5, 31.0, -3.0)),),
    "float32",
)
case(
    "norm at 0: subgradient 0",
    lambda x: jnp.sqrt(jnp.sum(x * x)),
    safe_unit,
    lambda draw: (draw.of(np.zeros(4)),),
    "float16",
)
case(
    "norms of rows, one of them 0",
    lambda X: jnp.sum(jnp.linalg.norm(X, axis=1)),
    safe_unit,
    lambda draw: (draw.normal(5, 3).at[2].set(0),),
    "float32",
)
case(
    "squared norm by way of the norm, at 0",
    lambda X: jnp.sum(jnp.linalg.norm(X, axis=1) ** 2),
    lambda X: 2 * X,
    lambda draw: (draw.normal(4, 3).at[1].set(0),),
    "bfloat16",
)
case(
    "x ** y at x = 0",
    lambda x, y: jnp.sum(x**y),
    lambda x, y: (y * x ** (y - 1), jnp.where(x > 0, x**y * jnp.log(jnp.where(x > 0, x, 1)), 0)),
    lambda draw: (draw.of((0.0, 0.5, 0.0, 2.0)), draw.of((2.0, 1.5, 3.0, 0.5))),
    argnums=(0, 1),
)


@right("distances of all pairs, the diagonal left out", "float32")
def _(draw):
    def f(X):
        D = jnp.sqrt(jnp.sum((X[:, None] - X[None, :]) ** 2, axis=2))
        return jnp.sum(jnp.where(jnp.eye(len(X), dtype=bool), 0, D))

    return Case(
        "gradient", f, lambda X: 2 * safe_unit(X[:, None] - X[None, :]).sum(axis=1), (draw.normal(5, 3),)
    )


@right("attention: a row with every key masked", "float32")
def _(draw):
    def weights(S, mask):
        some = mask.any(axis=1, keepdims=True)
        return jnp.where(some, softmax(jnp.where(mask, S, jnp.where(some, -jnp.inf, 0))), 0)

    def f(S, C, mask):
        P = softmax(jnp.where(mask, S, -jnp.inf))  # NaN in the row of -inf
        return jnp.sum(C * jnp.where(mask.any(axis=1, keepdims=True), P, 0))

    def gradient(S, C, mask):
        P = weights(S, mask)
        return P * (C - (P * C).sum(axis=1, keepdims=True))

    mask = jnp.tril(jnp.ones((5, 5), bool), -1)
    return Case("gradient", f, gradient, (draw.normal(5, 5), draw.normal(5, 5), mask))


@right("means of groups, one of them empty")
def _(draw):
    def f(x, members):
        n = members.sum(axis=1).astype(x.dtype)
        return jnp.sum(jnp.where(n > 0, (members.astype(x.dtype) @ x) / n, 0) ** 2)

    def gradient(x, members):
        m, n = members.astype(x.dtype), jnp.maximum(members.sum(axis=1), 1).astype(x.dtype)
        return m.T @ (2 * (m @ x) / n**2)

    members = jnp.arange(6)[None, :] % 4 == jnp.array([0, 1, 5])[:, None]
    return Case("gradient", f, gradient, (draw.normal(6), members))


# Scales, cancellation, long sums and products.

case(
    "1e-20 and 1e+20 in one tree",
    lambda p: jnp.sum(p["tiny"] ** 2) + jnp.sum(p["huge"] ** 2),
    lambda p: {"huge": 2 * p["huge"], "tiny": 2 * p["tiny"]},
    lambda draw: ({"huge": draw.normal(3, scale=1e20), "tiny": draw.normal(4, scale=1e-20)},),
)
case(
    "scales undone inside: 1e+15 and 1e-15",
    lambda p: jnp.sum(jnp.sin(p[0] * 1e15)) * jnp.sum(jnp.cos(p[1] * 1e-15)),
    lambda p: [
        1e15 * jnp.cos(p[0] * 1e15) * jnp.sum(jnp.cos(p[1] * 1e-15)),
        -1e-15 * jnp.sin(p[1] * 1e-15) * jnp.sum(jnp.sin(p[0] * 1e15)),
    ],
    lambda draw: ([draw.normal(3, scale=1e-15), draw.normal(2, scale=1e15)],),
    "float32",
)
case(
    "log cosh of huge and tiny numbers",
    lambda x: jnp.sum(abs(x) + jnp.log1p(jnp.exp(-2 * abs(x))) - math.log(2)),
    jnp.tanh,
    lambda draw: (draw.of((1e30, -1e30, 1e-30, -1e-8, 3.0, -0.2)),),
    "float32",
)
case(
    "length of a vector of 1e+200: autodiff divides by its square",
    lambda x: jnp.max(abs(x)) * jnp.sqrt(jnp.sum((x / jnp.max(abs(x))) ** 2)),
    lambda x: safe_unit(x / jnp.max(abs(x))),
    lambda draw: (draw.normal(5, scale=1e200),),
)
case(
    "a constant of 1e6 drowns f",
    lambda x: 1e6 + jnp.sum(jnp.sin(x)),
    jnp.cos,
    lambda draw: (draw.normal(6),),
    "float32",
)
case(
    "variance as E x² - (E x)²",
    lambda x: jnp.mean(x * x) - jnp.mean(x) ** 2,
    lambda x: 2 * (x - jnp.mean(x)) / len(x),
    lambda draw: (100 + draw.normal(20),),
    "float32",
)
case(
    "f = 0 at the minimum: residuals of rounding size",
    lambda w, X, y: 0.5 * jnp.sum((X @ w - y) ** 2),
    lambda w, X, y: X.T @ (X @ w - y),
    lambda draw: (lambda w, X: (w, X, X @ w))(draw.normal(4), draw.normal(10, 4)),
)
case(
    "mean of 4096 squares",
    lambda w, X, y: 0.5 * jnp.mean((X @ w - y) ** 2),
    lambda w, X, y: X.T @ ((X @ w - y) / len(y)),
    lambda draw: (draw.normal(3), draw.normal(4096, 3), draw.normal(4096)),
    "bfloat16",
)
case(
    "a bias of 4096 examples, positive terms",
    lambda b, x: jnp.mean(jax.nn.softplus(x + b)),
    lambda b, x: jnp.mean(sigma(x + b)),
    lambda draw: (draw.of(0.3), draw.normal(4096)),
    "bfloat16",
)


@right("sums in other order: blocks, last first", "float32")
def _(draw):
    def gradient(w, X):
        total = jnp.zeros_like(w)
        for block in reversed(jnp.split(X, 16)):
            t = jnp.tanh(block @ w)
            total += block.T @ ((1 - t) * (1 + t)) / len(X)
        return total

    return Case(
        "gradient", lambda w, X: jnp.mean(jnp.tanh(X @ w)), gradient, (draw.normal(4), draw.normal(512, 4))
    )


@right("product of 60 numbers, one of them 0", "float32")
def _(draw):
    def gradient(x):
        before = jnp.cumprod(jnp.concatenate([jnp.ones_like(x[:1]), x[:-1]]))
        after = jnp.cumprod(jnp.concatenate([jnp.ones_like(x[:1]), x[:0:-1]]))[::-1]
        return before * after

    return Case("gradient", jnp.prod, gradient, (draw.uniform(0.8, 1.25, 60).at[17].set(0),))


case(
    "cumulative sums: their weights summed from the end",
    lambda x, w: jnp.sum(w * jnp.cumsum(x) ** 2),
    lambda x, w: jnp.cumsum((2 * w * jnp.cumsum(x))[::-1])[::-1],
    lambda draw: (draw.normal(200), draw.normal(200)),
    "float32",
)
case(
    "Cox's partial likelihood",
    lambda eta: jnp.sum(jax.lax.cumlogsumexp(eta) - eta),
    lambda eta: jnp.exp(eta) * jnp.cumsum((1 / jnp.cumsum(jnp.exp(eta)))[::-1])[::-1] - 1,
    lambda draw: (draw.normal(30),),
)
case(
    "linear: the gradient is constant",
    lambda x, w: x @ w,
    lambda x, w: w,
    lambda draw: (draw.normal(7), draw.normal(7, scale=1e3)),
    "float16",
)


# Closed forms.


@right("logistic regression: dict, a bias of None, an activation among the settings", "float32")
def _(draw):
    def f(params, settings, X, y):
        z = settings["link"](X @ params["w"])
        penalty = settings["l2"] / 2 * jnp.sum(params["w"] ** 2)
        return jnp.mean(jax.nn.softplus(z) - jnp.where(y, z, 0)) + penalty

    def gradient(params, settings, X, y):
        z = settings["link"](X @ params["w"])
        d = jnp.where(y, -sigma(-z), sigma(z)) * (1 - jnp.tanh(X @ params["w"]) ** 2) / len(y)
        return {"w": X.T @ d + settings["l2"] * params["w"], "b": None}

    settings = {"link": jnp.tanh, "name": "logistic", "l2": 0.1}
    params = {"w": draw.normal(4), "b": None}
    return Case("gradient", f, gradient, (params, settings, draw.normal(20, 4), jnp.arange(20) % 3 == 0))


case(
    "ridge regression: the penalty's weight, a Python float, is differentiated too",
    lambda w, X, y, l2: jnp.sum((X @ w - y) ** 2) / 2 + l2 / 2 * (w @ w),
    lambda w, X, y, l2: (X.T @ X @ w - X.T @ y + l2 * w, w @ w / 2),
    lambda draw: (draw.normal(4), draw.normal(9, 4), draw.normal(9), 0.3),
    argnums=(0, 3),
)
case(
    "Poisson regression: counts are integers",
    lambda counts, X, w: jnp.mean(jnp.exp(X @ w) - counts.astype(w.dtype) * (X @ w)),
    lambda counts, X, w: X.T @ (jnp.exp(X @ w) - counts.astype(w.dtype)) / len(counts),
    lambda draw: (draw.integers(5, 12), draw.normal(12, 3), draw.normal(3, scale=0.3)),
    "float16",
    argnums=2,
)
case(
    "Gaussian likelihood: mean and log σ from 1e-3 to 1e3",
    lambda mu, s, y: jnp.mean(((y - mu) * jnp.exp(-s)) ** 2 / 2 + s),
    lambda mu, s, y: (
        (mu - y) * jnp.exp(-2 * s) / len(y),
        (1 - ((y - mu) * jnp.exp(-s)) ** 2) / len(y),
    ),
    lambda draw: (draw.normal(7), draw.of(np.linspace(-7, 7, 7)), draw.normal(7)),
    "float32",
    argnums=(0, 1),
)
case(
    "KL of Gaussians next to 0, compiled",
    lambda mu, s: 0.5 * jnp.sum(mu**2 + jnp.exp(2 * s) - 1 - 2 * s),
    jax.jit(lambda mu, s: (mu, jnp.expm1(2 * s))),
    lambda draw: (draw.normal(5, scale=1e-6), draw.normal(5, scale=1e-5)),
    "float32",
    argnums=(0, 1),
)
case(
    "Student-t: outliers of 1e6, location of size 1",
    lambda mu, y: 2.5 * jnp.sum(jnp.log1p((y - mu) ** 2 / 4)),
    lambda mu, y: jnp.sum(5 * (mu - y) / (4 + (y - mu) ** 2), keepdims=True),
    lambda draw: (draw.normal(1), draw.of((1e6, -0.5, 0.3, -1e6, 2.0, 1.0))),
    "float32",
)


def temperature_gradient(c, z, T):
    p = softmax(z / T)
    d = p * (c - p @ c) / T
    return (d, -(d @ z) / T)


case(
    "softmax with a temperature",
    lambda c, z, T: c @ jax.nn.softmax(z / T),
    temperature_gradient,
    lambda draw: (draw.normal(6), draw.normal(6, scale=3), draw.of(0.5)),
    argnums=(1, 2),
)


def focal(z, y):
    s = jnp.where(y, z, -z)
    return -jnp.mean(jax.nn.sigmoid(-s) ** 2 * jax.nn.log_sigmoid(s))


def focal_gradient(z, y):
    """γ = 2, p = σ(±z): ±(1 - p)² (2 p log p - (1 - p)) / N."""
    s = jnp.where(y, z, -z)
    log_p = jnp.minimum(s, 0) - jnp.log1p(jnp.exp(-abs(s)))
    d = sigma(-s) ** 2 * (2 * sigma(s) * log_p - sigma(-s)) / len(z)
    return jnp.where(y, d, -d)


case(
    "focal loss, saturated",
    *(focal, focal_gradient),
    lambda draw: (draw.of((-30.0, -3.0, 0.2, 4.0, 15.0, 30.0)), jnp.array([True, False] * 3)),
    "float32",
)


@right("InfoNCE: keys and queries in nested lists", "float32")
def _(draw):
    def scores(p):
        return p[0] @ p[1][0].T / 0.2

    def gradient(p):
        d = (softmax(scores(p)) - jnp.eye(len(p[0]), dtype=p[0].dtype)) / (0.2 * len(p[0]))
        return [d @ p[1][0], [d.T @ p[0]]]

    def f(p):
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(scores(p))))

    return Case("gradient", f, gradient, ([draw.normal(6, 3), [draw.normal(6, 3)]],))


def cosine_gradient(x, y):
    nx, ny = jnp.sqrt(x @ x), jnp.sqrt(y @ y)
    u, v = x / nx, y / ny
    c = u @ v
    return (v - c * u) / nx, (u - c * v) / ny


case(
    "cosine similarity",
    lambda x, y: x @ y / (jnp.linalg.norm(x) * jnp.linalg.norm(y)),
    cosine_gradient,
    lambda draw: (draw.normal(8), draw.normal(8)),
    "float16",
    argnums=(0, 1),
)


def standardised(x, axis, eps=1e-5):
    centred = x - x.mean(axis=axis, keepdims=True)
    r = 1 / jnp.sqrt((centred**2).mean(axis=axis, keepdims=True) + eps)
    return centred * r, r


def normalisation(p, x, c, axis):
    return jnp.sum(c * (p["scale"][None, :] * standardised(x, axis)[0] + p["shift"][None, :]))


def normalisation_gradient(p, x, c, axis):
    h, r = standardised(x, axis)
    g = c * p["scale"][None, :]
    means = [m.mean(axis=axis, keepdims=True) for m in (g, g * h)]
    return {"scale": (c * h).sum(axis=0), "shift": c.sum(axis=0)}, r * (g - means[0] - h * means[1])


def normalisation_value_and_gradient(*args):
    return normalisation(*args), normalisation_gradient(*args)


def normalisation_data(axis, offset):
    def data(draw):
        p = {"scale": draw.normal(6), "shift": draw.normal(6)}
        return p, offset + draw.normal(5, 6), draw.normal(5, 6), axis

    return data


case(
    "layer norm: value and gradient",
    *(normalisation, normalisation_value_and_gradient, normalisation_data(1, 0.0), "float32"),
    argnums=(0, 1),
    kind="value",
)
case(
    "batch norm: an offset of 1000",
    *(normalisation, normalisation_gradient, normalisation_data(0, 1000.0), "float32"),
    argnums=(0, 1),
)


def rms_gradient(x, c):
    r = 1 / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))
    return r * (c - x * r * jnp.mean(c * x * r, axis=1, keepdims=True))


case(
    "RMS norm",
    lambda x, c: jnp.sum(c * x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))),
    rms_gradient,
    lambda draw: (draw.normal(4, 8), draw.normal(4, 8)),
    "bfloat16",
)


@right("causal attention", "float32")
def _(draw):
    def weights(Q, K):
        return softmax(jnp.where(jnp.tri(len(Q), dtype=bool), Q @ K.T / 2, -jnp.inf))

    def gradient(Q, K, V, C):
        P, P_bar = weights(Q, K), C @ V.T
        S_bar = P * (P_bar - (P * P_bar).sum(axis=1, keepdims=True)) / 2
        return S_bar @ K, S_bar.T @ Q, P.T @ C

    args = tuple(draw.normal(5, 4) for _ in range(4))
    return Case("gradient", lambda Q, K, V, C: jnp.sum(C * (weights(Q, K) @ V)), gradient, args, (0, 1, 2))


def convolution_gradient(x, w, c):
    g = c * jnp.cos(jnp.convolve(x, w, "valid"))
    return jnp.convolve(g, w[::-1], "full"), jnp.correlate(x, g, "valid")[::-1]


case(
    "convolution: the adjoint is a correlation",
    lambda x, w, c: jnp.sum(c * jnp.sin(jnp.convolve(x, w, "valid"))),
    convolution_gradient,
    lambda draw: (draw.normal(20), draw.normal(4), draw.normal(17)),
    "float32",
    argnums=(0, 1),
)
case(
    "embedding: indices repeated, rows never used",
    lambda ids, E, T: 0.5 * jnp.sum((E[ids] - T) ** 2),
    lambda ids, E, T: jnp.zeros_like(E).at[ids].add(E[ids] - T),
    lambda draw: (jnp.array([1, 4, 1, 1, 0, 4]), draw.normal(7, 3), draw.normal(6, 3)),
    "float32",
    argnums=1,
)


class Recurrent(NamedTuple):
    W: Any
    U: Any
    h0: Any


def recurrent_data(draw):
    return Recurrent(draw.normal(4, 4, scale=0.5), draw.normal(4, 3, scale=0.3), draw.normal(4)), draw.normal(
        9, 3
    )


def recurrent(p, xs):
    h = p.h0
    for x in xs:
        h = jnp.tanh(p.W @ h + p.U @ x)
    return 0.5 * (h @ h)


def recurrent_by_loop(p, xs):
    hs = [p.h0]
    for x in xs:
        hs.append(jnp.tanh(p.W @ hs[-1] + p.U @ x))
    W, U, h_bar = jnp.zeros_like(p.W), jnp.zeros_like(p.U), hs[-1]
    for t in reversed(range(len(xs))):
        d = h_bar * (1 - hs[t + 1]) * (1 + hs[t + 1])
        W, U, h_bar = W + jnp.outer(d, hs[t]), U + jnp.outer(d, xs[t]), p.W.T @ d
    return Recurrent(W, U, h_bar)


def recurrent_by_scan(p, xs):
    def ahead(h, x):
        new = jnp.tanh(p.W @ h + p.U @ x)
        return new, (h, new, x)

    def back(carry, kept):
        (grads, h_bar), (h, new, x) = carry, kept
        d = h_bar * (1 - new) * (1 + new)
        return ((grads[0] + jnp.outer(d, h), grads[1] + jnp.outer(d, x)), p.W.T @ d), None

    last, kept = jax.lax.scan(ahead, p.h0, xs)
    zeros = jnp.zeros_like(p.W), jnp.zeros_like(p.U)
    (grads, h_bar), _ = jax.lax.scan(back, (zeros, last), kept, reverse=True)
    return Recurrent(*grads, h_bar)


case("recurrent network, by a Python loop", recurrent, recurrent_by_loop, recurrent_data)
case("recurrent network, by scan", recurrent, recurrent_by_scan, recurrent_data, "float32")

case(
    "log determinant",
    lambda A: jnp.linalg.slogdet(A)[1],
    lambda A: jnp.linalg.inv(A).T,
    lambda draw: (draw.invertible(5),),
)


def inverse_gradient(A, C):
    inverse = jnp.linalg.inv(A)
    return -(inverse @ C.T @ inverse).T


case(
    "inverse",
    lambda A, C: jnp.sum(C * jnp.linalg.inv(A)),
    inverse_gradient,
    lambda draw: (draw.invertible(4), draw.normal(4, 4)),
    "float32",
)


def cholesky_solve(B, b):
    L = jnp.linalg.cholesky(B @ B.T + jnp.eye(len(B), dtype=B.dtype))
    return jax.scipy.linalg.cho_solve((L, True), b)


def cholesky_gradient(B, b):
    x = cholesky_solve(B, b)
    return -jnp.outer(x, x @ B), x


case(
    "½ bᵀ (B Bᵀ + I)⁻¹ b by Cholesky",
    lambda B, b: 0.5 * (b @ cholesky_solve(B, b)),
    cholesky_gradient,
    lambda draw: (draw.normal(5, 5), draw.normal(5)),
    argnums=(0, 1),
)


def mahalanobis_gradient(mu, L, x):
    v = L.T @ (x - mu)
    u = v / jnp.sqrt(v @ v)
    return -(L @ u), jnp.outer(x - mu, u)


case(
    "Mahalanobis distance",
    lambda mu, L, x: jnp.linalg.norm(L.T @ (x - mu)),
    mahalanobis_gradient,
    lambda draw: (draw.normal(4), draw.normal(4, 4), draw.normal(4)),
    argnums=(0, 1),
)


def top_eigenvector(A):
    v = jnp.linalg.eigh((A + A.T) / 2)[1][:, -1]
    return jnp.outer(v, v)


case(
    "largest eigenvalue",
    *(lambda A: jnp.linalg.eigvalsh((A + A.T) / 2)[-1], top_eigenvector),
    lambda draw: (draw.normal(5, 5),),
)


@right("fixed point z = tanh(W z + x), by the implicit function theorem")
def _(draw):
    def solve(W, x):
        small = jnp.tanh(W) / (2 * len(x))
        return jax.lax.fori_loop(0, 70, lambda _, z: jnp.tanh(small @ z + x), jnp.zeros_like(x)), small

    def gradient(W, x, c):
        z, small = solve(W, x)
        slope = (1 - z) * (1 + z)
        d = slope * jnp.linalg.solve(jnp.eye(len(x), dtype=x.dtype) - small.T * slope[None, :], c)
        return jnp.outer(d, z) * (1 - jnp.tanh(W) ** 2) / (2 * len(x)), d

    args = draw.normal(4, 4), draw.normal(4), draw.normal(4)
    return Case("gradient", lambda W, x, c: c @ solve(W, x)[0], gradient, args, (0, 1))


@right("Euler's method and its adjoint, by fori_loop")
def _(draw):
    steps, h = 25, 0.05

    def path(x, k):
        def step(t, xs):
            return xs.at[t + 1].set(xs[t] + h * jnp.sin(k @ xs[t]))

        return jax.lax.fori_loop(0, steps, step, jnp.zeros((steps + 1, len(x)), x.dtype).at[0].set(x))

    def gradient(x, k):
        xs = path(x, k)

        def back(i, carry):
            x_bar, k_bar = carry
            now = xs[steps - 1 - i]
            d = h * jnp.cos(k @ now) * x_bar
            return x_bar + k.T @ d, k_bar + jnp.outer(d, now)

        return jax.lax.fori_loop(0, steps, back, (xs[-1], jnp.zeros_like(k)))

    def f(x, k):
        return 0.5 * jnp.sum(path(x, k)[-1] ** 2)

    return Case("gradient", f, gradient, (draw.normal(3), draw.normal(3, 3)), (0, 1))


case(
    "power of a Fourier transform",
    lambda x, h: jnp.sum(h * abs(jnp.fft.fft(x)) ** 2),
    lambda x, h: 2 * len(x) * jnp.fft.ifft(jax.lax.complex(h, 0 * h) * jnp.fft.fft(x)).real,
    lambda draw: (draw.normal(16), draw.uniform(0.5, 2, 16)),
    "float32",
)


def horner_gradient(c, x):
    slope = jnp.zeros_like(x)
    for k in range(len(c) - 1, 0, -1):
        slope = slope * x + k * c[k]
    return jnp.cumprod(jnp.full_like(c, x).at[0].set(1)), slope


def horner(c, x):
    return jax.lax.fori_loop(1, len(c), lambda k, value: value * x + c[len(c) - 1 - k], c[-1])


case(
    "polynomial of degree 12 by Horner: coefficients and point",
    *(horner, horner_gradient, lambda draw: (draw.normal(13), draw.of(-0.9))),
    argnums=(0, 1),
)


class Mixture(NamedTuple):
    logits: Any
    mean: Any
    log_sigma: Any


def mixture_terms(p, x):
    r = (x[:, None] - p.mean[None, :]) * jnp.exp(-p.log_sigma)[None, :]
    return (jax.nn.log_softmax(p.logits) - p.log_sigma)[None, :] - r**2 / 2, r


def mixture_gradient(p, x):
    terms, r = mixture_terms(p, x)
    share = softmax(terms)
    return Mixture(
        len(x) * softmax(p.logits) - share.sum(axis=0),
        -(share * r).sum(axis=0) * jnp.exp(-p.log_sigma),
        (share * (1 - r * r)).sum(axis=0),
    )


case(
    "Gaussian mixture: NamedTuple",
    lambda p, x: -jnp.sum(jax.nn.logsumexp(mixture_terms(p, x)[0], axis=1)),
    mixture_gradient,
    lambda draw: (Mixture(draw.normal(3), draw.normal(3, scale=2), draw.normal(3)), draw.normal(15)),
)

# Keys, callbacks, NumPy, control flow, a rule inside f.


def dropped(key, W, x):
    keep = jax.random.bernoulli(key, 0.7, x.shape)
    return jnp.where(keep, x / 0.7, 0)


case(
    "dropout: the key is an argument",
    lambda key, W, x: jnp.sum(jnp.tanh(W @ dropped(key, W, x))),
    lambda key, W, x: jnp.outer(1 - jnp.tanh(W @ dropped(key, W, x)) ** 2, dropped(key, W, x)),
    lambda draw: (jax.random.key(3), draw.normal(4, 6), draw.normal(6)),
    argnums=1,
)


def noisy(mu, s, key):
    return mu + jnp.exp(s) * jax.random.normal(key, mu.shape, mu.dtype)


case(
    "reparametrised noise, drawn in the dtype of the parameters, an old key",
    lambda mu, s, key: 0.5 * jnp.sum(noisy(mu, s, key) ** 2),
    lambda mu, s, key: (noisy(mu, s, key), noisy(mu, s, key) * (noisy(mu, s, key) - mu)),
    lambda draw: (draw.normal(5), draw.normal(5), jax.random.PRNGKey(4)),
    *("float64", "float32"),
    argnums=(0, 1),
)


@right("f has a right custom_vjp inside, with a finite slope where autodiff has NaN", "float32")
def _(draw):
    @jax.custom_vjp
    def length(x):
        return jnp.sqrt(jnp.sum(x * x))

    length.defvjp(lambda x: (length(x), x), lambda x, bar: (bar * safe_unit(x),))

    def gradient(x):
        return jnp.concatenate([safe_unit(x[:3]), safe_unit(x[3:])])

    return Case(
        "gradient", lambda x: length(x[:3]) + length(x[3:]), gradient, (draw.normal(6).at[:3].set(0),)
    )


@right("f asks the host: pure_callback, without a rule")
def _(draw):
    def f(x):
        shape = jax.ShapeDtypeStruct((), x.dtype)
        return jnp.cos(jax.pure_callback(lambda x: np.sum(np.tanh(x)).astype(x.dtype), shape, x))

    def gradient(x):
        return -jnp.sin(jnp.sum(jnp.tanh(x))) * sech_squared(x)

    return Case("gradient", f, gradient, (draw.normal(5),))


def numpy_arguments(*shapes):
    return lambda draw: tuple(np.array(draw.normal(*shape)) for shape in shapes)


case(
    "NumPy alone: neither f nor its gradient can be traced",
    lambda W, x: np.sum(np.logaddexp(0, np.asarray(W) @ np.asarray(x))),
    lambda W, x: np.outer(1 / (1 + np.exp(-(np.asarray(W) @ np.asarray(x)))), np.asarray(x)),
    numpy_arguments((4, 3), (3,)),
)


def loop_in_numpy(x):
    total = np.zeros((), x.dtype)
    for number in np.asarray(x):
        total = total * 0.5 + np.sin(number) if number > 0 else total + number**2
    return total


def loop_in_numpy_gradient(x):
    x, bar = np.asarray(x), 1.0
    gradient = np.zeros_like(x)
    for n in reversed(range(len(x))):
        gradient[n] = bar * (np.cos(x[n]) if x[n] > 0 else 2 * x[n])
        bar *= 0.5 if x[n] > 0 else 1.0
    return gradient


case(
    "NumPy alone: a loop with branches",
    loop_in_numpy,
    loop_in_numpy_gradient,
    numpy_arguments((6,)),
    "float32",
)
case(
    "f in JAX, gradient in NumPy",
    lambda X: jnp.sum(jax.nn.logsumexp(X, axis=1)),
    lambda X: (
        np.exp(np.asarray(X) - np.max(X, axis=1, keepdims=True))
        / np.exp(np.asarray(X) - np.max(X, axis=1, keepdims=True)).sum(axis=1, keepdims=True)
    ),
    lambda draw: (draw.normal(4, 5),),
    "float32",
)
case(
    "0 and 1 go through float32 inside a float64 gradient",
    lambda z, w: jnp.sum(w * jax.nn.relu(z) ** 2),
    lambda z, w: 2 * w * z * (z > 0).astype(jnp.float32).astype(z.dtype),
    lambda draw: (draw.normal(9), draw.normal(9)),
)


@right("y + exp y = x: Newton in f, a Python while in the gradient")
def _(draw):
    def step(y, x):
        return y - (y + jnp.exp(y) - x) / (1 + jnp.exp(y))

    def f(x):
        return jnp.sum(jax.lax.fori_loop(0, 40, lambda _, y: step(y, x), jnp.zeros_like(x)))

    def gradient(x):
        y, new, count = jnp.ones_like(x), jnp.zeros_like(x), 0
        while float(abs(new - y).max()) > 1e-15 and count < 100:
            y, new, count = new, step(new, x), count + 1
        return 1 / (1 + jnp.exp(new))

    return Case("gradient", f, gradient, (draw.normal(6),))


@right("cond on a value", "float32")
def _(draw):
    def f(x, s):
        return jnp.where(s > 0, jnp.sum(jnp.sin(x)) * s, jnp.sum(x * x))

    def gradient(x, s):
        return jax.lax.cond(
            s > 0,
            lambda: (s * jnp.cos(x), jnp.sum(jnp.sin(x))),
            lambda: (2 * x, jnp.zeros_like(s)),
        )

    return Case("gradient", f, gradient, (draw.normal(4), draw.of(1.5)), (0, 1))


case(
    "Rosenbrock's valley: Python floats",
    lambda a, b: (1 - a) ** 2 + 100 * (b - a * a) ** 2,
    lambda a, b: (
        (1 - a) ** 2 + 100 * (b - a * a) ** 2,
        (2 * (a - 1) - 400 * a * (b - a * a), 200 * (b - a * a)),
    ),
    lambda draw: (-1.2, 1.0),
    argnums=(0, 1),
    kind="value",
)
case(
    "quadratic form of a matrix that is not symmetric",
    lambda x, A, b: 0.5 * (x @ A @ x) - b @ x,
    lambda x, A, b: 0.5 * (A @ x + A.T @ x) - b,
    lambda draw: (draw.normal(5), draw.normal(5, 5), draw.normal(5)),
    "bfloat16",
)


# Rules.


def rule(name, fwd, bwd, data, *dtypes):
    case(name, (fwd, bwd), None, data, *dtypes, kind="rule")


rule(
    "rule: two outputs of a dense layer",
    lambda W, b, X: ({"z": X @ W.T + b[None, :], "size": jnp.sum(W * W)}, (W, X)),
    lambda kept, bar: (
        bar["z"].T @ kept[1] + 2 * bar["size"] * kept[0],
        bar["z"].sum(axis=0),
        bar["z"] @ kept[0],
    ),
    lambda draw: (draw.normal(3, 4), draw.normal(3), draw.normal(5, 4)),
    "bfloat16",
)
rule(
    "rule: maximum and where it is, an integer output",
    lambda x: ((jnp.max(x, axis=1), jnp.argmax(x, axis=1)), (x, jnp.argmax(x, axis=1))),
    lambda kept, bars: (jnp.zeros_like(kept[0]).at[jnp.arange(len(kept[0])), kept[1]].set(bars[0]),),
    lambda draw: (draw.normal(4, 5),),
    "float32",
)
rule(
    "rule: integer labels get None",
    lambda z, y: (jax.nn.logsumexp(z, axis=1) - z[jnp.arange(len(y)), y], (z, y)),
    lambda kept, bar: (
        bar[:, None] * integer_labels_delta(*kept) * len(kept[1]),
        None,
    ),
    lambda draw: (draw.normal(5, 4), draw.integers(4, 5)),
    "float32",
)
rule(
    "rule: None for an argument that does not matter",
    lambda x, unused: (jnp.cos(x) + jnp.round(jnp.ones_like(unused)), x),
    lambda x, bar: (-bar * jnp.sin(x), None),
    lambda draw: (draw.normal(5), draw.normal(5)),
)
rule(
    "rule: softmax",
    lambda z: (jax.nn.softmax(z), jax.nn.softmax(z)),
    lambda p, bar: (p * (bar - (p * bar).sum(axis=-1, keepdims=True)),),
    lambda draw: (draw.normal(3, 6, scale=2),),
    "float16",
)
rule(
    "rule: linear solve",
    lambda A, b: (jnp.linalg.solve(A, b), (A, jnp.linalg.solve(A, b))),
    lambda kept, bar: (lambda y, x: (-jnp.outer(y, x), y))(jnp.linalg.solve(kept[0].T, bar), kept[1]),
    lambda draw: (draw.invertible(4), draw.normal(4)),
)


def jvp_case(name, f, jvp, data, *dtypes):
    case(name, f, jvp, data, *dtypes, kind="jvp")


def softmax_jvp(primals, tangents):
    p = softmax(primals[0])
    return p, p * (tangents[0] - (p * tangents[0]).sum(axis=-1, keepdims=True))


def solve_jvp(primals, tangents):
    (A, b), (dA, db) = primals, tangents
    x = jnp.linalg.solve(A, b)
    return x, jnp.linalg.solve(A, db - dA @ x)


def polar_jvp(primals, tangents):
    x, y = primals[0]["x"], primals[0]["y"]
    r, (dx, dy) = jnp.hypot(x, y), (tangents[0]["x"], tangents[0]["y"])
    return (r, jnp.atan2(y, x)), (x / r * dx + y / r * dy, (x / r * dy - y / r * dx) / r)


jvp_case("jvp: softmax", jax.nn.softmax, softmax_jvp, lambda draw: (draw.normal(3, 5),), "bfloat16")
jvp_case(
    "jvp: linear solve",
    *(jnp.linalg.solve, solve_jvp, lambda draw: (draw.invertible(4), draw.normal(4)), "float32"),
)
jvp_case(
    "jvp: polar coordinates, dict to pair",
    lambda p: (jnp.sqrt(p["x"] ** 2 + p["y"] ** 2), jnp.atan2(p["y"], p["x"])),
    polar_jvp,
    lambda draw: ({"x": draw.normal(4), "y": draw.normal(4)},),
    "float32",
)
jvp_case(
    "jvp: sigmoid, saturated",
    jax.nn.sigmoid,
    lambda p, t: (sigma(p[0]), sigma(p[0]) * sigma(-p[0]) * t[0]),
    lambda draw: (draw.of(ENDS),),
    "float16",
)
