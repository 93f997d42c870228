"""Are the backward passes right that others have published?

    python -m experiments.published        (--help lists the flags)

JAX and optax carry rules written by hand (`custom_jvp`, `custom_vjp`), for the value at a kink, for 0 · log
0, for speed or for digits. Each is judged by `fnn` in float32, bfloat16 and float16, at ordinary points and
at those that a user would worry about: kinks, ties, zeros, the large and the tiny. Equinox and Flax, where
they are installed, are asked for their parameters too: a gradient derived by hand of an `eqx.nn.MLP`, and one
of the state of an `nnx` model, each once as it should be and once without its 1/N.

A rule that f carries is no witness for itself, so `jax.grad(f)` is judged as the gradient of a reference: of
f without its rules (`plain`), or, where that is as delicate, of the same mathematics in another form.

Expected answer. All are right at ordinary points, except that projection_simplex has no gradient in bfloat16
and float16; and so are the values that the rules choose at kinks and at 0 · log 0, but for xlogy's slope in y
at (0, 0) and a tangent of safe_softmax_cross_entropy. Further out some lose digits: where a rule subtracts
numbers that are nearly equal (erfcx, dawsn, log_ndtr, sinc), or uses a value after it was rounded
(logaddexp). The gradient of the determinant of a singular matrix is 0, not the cofactors, if the zero pivot
is not the last; that of hyp1f1 and hyp2f1 in a is 0 for a = 0, and that of expn for n = 0 is nan.

The table goes to published.txt beside the script, with a line that shows each finding, and the versions.
"""

import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.special as special
import numpy as np
import optax

import fnn
from experiments import command
from fnn.inside import replaced
from fnn.tables import aligned

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
REFUSED, NO_GRADIENT, NOT_ASKED = "refused", "no gradient", "-"
RIGHT, KINK, LOSES, WRONG = "right", "right, kink", "loses digits", "WRONG"


@dataclass(frozen=True)
class Flags(command.TableFlags):
    """The flags of this experiment."""


class Found(NamedTuple):
    """Why a gradient is not right, and a line of code that shows it; of those meant to be wrong, only why."""

    why: str
    code: str = ""
    truth: str = ""


class Row(NamedTuple):
    """A gradient and the points at which it is judged.

    ask: (dtype, seed) -> the report; may raise Refused or NoGradient
    found: what there is to say where it is not right
    """

    package: str
    name: str
    points: str
    ask: Callable[[Any, int], fnn.Report]
    found: Found | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)
    is_quick: bool = False


class Refused(Exception):
    """The package does not take the dtype."""


class NoGradient(Exception):
    """The function takes the dtype, and its gradient does not."""


class Answer(NamedTuple):
    verdict: str
    evidence: str = ""


def plain(f: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without the rules it carries."""
    return lambda *xs: replaced(jax.make_jaxpr(f)(*xs), {})(*xs)[0]


def of(f: Callable[..., Any], *args: Any, reference: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Asks whether `jax.grad` of the sum of f is the gradient of the sum of the reference.

    args: in any dtype, cast to the one that is asked about
    """

    def total(*xs):
        return jnp.sum(f(*xs))

    def wanted(*xs):
        return jnp.sum(reference(*xs)) if reference else plain(total)(*xs)

    def ask(dtype, seed):
        xs = [jnp.asarray(x, dtype) for x in args]
        argnums = tuple(range(len(xs)))
        gradient = jax.grad(total, argnums)
        for call, problem in ((f, Refused), (gradient, NoGradient)):
            try:
                jax.eval_shape(call, *xs)
            except TypeError as error:
                raise problem(str(error)) from None
        return fnn.check_gradient(wanted, gradient, *xs, argnums=argnums, seed=seed)

    return ask


def weighted(f: Callable[..., Any]) -> Callable[..., Any]:
    """f with its outputs times 1, 2, 3, ...: their plain sum may be constant."""

    def g(*xs):
        out = f(*xs)
        return out * jnp.arange(1, out.size + 1, dtype=out.dtype).reshape(out.shape)

    return g


# The same mathematics in another form, for where the package's own form is delicate.


def sinc(x):
    """sin(πx)/(πx); its power series where |πx| < 1, with the first omitted term below 10^-17."""
    t, near = jnp.square(jnp.pi * x), jnp.abs(x) < 1 / np.pi
    series, term = jnp.ones_like(x), jnp.ones_like(x)
    for k in range(1, 10):
        term = -term * t / ((2 * k) * (2 * k + 1))
        series = series + term
    away = jnp.pi * jnp.where(near, jnp.ones_like(x), x)
    return jnp.where(near, series, jnp.sin(away) / away)


def i0(x):
    """Σ (x²/4)^k / k!²: thirty terms are enough for |x| < 8."""
    sum_, term = jnp.ones_like(x), jnp.ones_like(x)
    for k in range(1, 31):
        term = term * jnp.square(x / 2) / k**2
        sum_ = sum_ + term
    return sum_


def erfcx(x):
    """exp(x²) erfc(x) for x < 3; beyond it the trapezoidal rule on x/π ∫ exp(-t²)/(x² + t²) dt.

    With a step of 1/2 its error is below 10^-16 for x > 3 (Goodwin 1949, for integrals of exp(-t²) f(t)).
    """
    is_large = x > 3
    small, large = jnp.where(is_large, jnp.zeros_like(x), x), jnp.where(is_large, x, jnp.ones_like(x))
    terms = [np.exp(-((k / 2) ** 2)) / (jnp.square(large) + (k / 2) ** 2) for k in range(-12, 13)]
    return jnp.where(
        is_large, large / (2 * np.pi) * sum(terms), jnp.exp(jnp.square(small)) * jax.lax.erfc(small)
    )


def log_ndtr(x):
    """log Φ(x): -x²/2 + log erfcx(-x/√2) - log 2 for x < 0, and log(1 - erfc(x/√2)/2) elsewhere."""
    is_left = x < 0
    left, right = jnp.where(is_left, x, -jnp.ones_like(x)), jnp.where(is_left, jnp.ones_like(x), x)
    tail = -jnp.square(left) / 2 + jnp.log(erfcx(-left / np.sqrt(2))) - np.log(2)
    return jnp.where(is_left, tail, jnp.log1p(-jax.lax.erfc(right / np.sqrt(2)) / 2))


def jax_rows() -> list[Row]:
    nn, mixed, positive = jax.nn, [-2.0, -0.7, 0.3, 1.9], [0.2, 0.7, 1.3, 2.9]
    single = ("float32",)
    softmax = weighted(nn.softmax)
    M = np.random.default_rng(0).standard_normal((4, 4))
    doubled = (lambda t: jnp.logaddexp(t, t), lambda t: t + np.log(2))

    def row(name, points, ask, found=None, dtypes=tuple(DTYPES), is_quick=False):
        return Row("jax", name, points, ask, found, dtypes, is_quick)

    return [
        row("nn.relu", "ordinary", of(nn.relu, mixed, reference=lambda x: jnp.maximum(x, 0))),
        row("nn.relu", "0, -0, 10⁻³⁰", of(nn.relu, [0.0, -0.0, 1e-30, 6]), is_quick=True),
        row("nn.relu6", "0, 6", of(nn.relu6, [0.0, 6, -6, 3])),
        row("nn.log1mexp", "ordinary", of(nn.log1mexp, [0.3, 0.7, 2, 5])),
        row("nn.log1mexp", "log 2, 0.001, 20", of(nn.log1mexp, [np.log(2), 0.001, 20.0])),
        row("nn.softmax", "ordinary", of(softmax, mixed)),
        row("nn.softmax", "ties, ±100", of(softmax, [100.0, 100, -100, 3])),
        row("numpy.logaddexp", "ordinary", of(jnp.logaddexp, mixed, [1.0, -0.5, 0.3, 2])),
        row(
            "numpy.logaddexp",
            "(t, t), t to 1000",
            of(doubled[0], [1.0, 100, 500, 1000], reference=doubled[1]),
            Found(
                "logaddexp(t, t) = t + log 2 has the derivative 1. The rule takes exp(t - out) of the "
                "rounded out, and so the rounding of a large out becomes an error of the gradient.",
                "jax.grad(lambda t: jnp.logaddexp(t, t))(jnp.bfloat16(500))",
                "1",
            ),
            is_quick=True,
        ),
        row("numpy.logaddexp2", "ordinary", of(jnp.logaddexp2, mixed, [1.0, -0.5, 0.3, 2])),
        row("numpy.sinc", "ordinary", of(jnp.sinc, mixed, reference=sinc)),
        row("numpy.sinc", "0, 1", of(jnp.sinc, [0.0, 1], reference=sinc), is_quick=True),
        row(
            "numpy.sinc",
            "0.01, 0.001",
            of(jnp.sinc, [0.01, 0.001], reference=sinc),
            Found(
                "The rule is for 0 alone. Beside it the gradient, about -π²x/3, is a difference of cos(πx)/x "
                "and sin(πx)/(πx²). jax 0.11.2 has it right.",
                "jax.grad(jnp.sinc)(jnp.float16(0.001))",
                "-0.00329",
            ),
            is_quick=True,
        ),
        row("numpy.i0", "ordinary, 0", of(jnp.i0, [*mixed, 0.0], reference=i0)),
        row(
            "numpy.i0",
            "0.001, 0.0001",
            of(jnp.i0, [0.001, 0.0001], reference=i0),
            Found(
                "The gradient I₁(x), about x/2, is made of two terms of size 1 that cancel.",
                "jax.grad(jnp.i0)(jnp.float32(1e-4))",
                "5e-05",
            ),
        ),
        row("numpy.linalg.det", "a regular 4×4", of(jnp.linalg.det, M, reference=leibniz), dtypes=single),
        row(
            "numpy.linalg.det",
            "diag(1, 2, 3, 0)",
            of(jnp.linalg.det, np.diag([1.0, 2, 3, 0]), reference=leibniz),
            dtypes=single,
        ),
        row(
            "numpy.linalg.det",
            "diag(1, 2, 0, 3)",
            of(jnp.linalg.det, np.diag([1.0, 2, 0, 3]), reference=leibniz),
            Found(
                "The rule expects the zero pivot of a singular matrix in the last place, as in "
                "diag(1, 2, 3, 0). Where it is elsewhere, the gradient is 0 and not the cofactors. This is "
                "from 4×4 on; for 2×2 and 3×3 the determinant is written out.",
                "jnp.diag(jax.grad(jnp.linalg.det)(jnp.diag(jnp.array([1.0, 2, 0, 3]))))",
                "0, 0, 1·2·3 = 6, 0",
            ),
            single,
            True,
        ),
        row("numpy.linalg.slogdet", "4×4", of(lambda a: jnp.linalg.slogdet(a)[1], M), dtypes=single),
        row("numpy.linalg.pinv", "4×2", of(weighted(jnp.linalg.pinv), M[:, :2]), dtypes=single),
        row("numpy.frexp", "ordinary", of(lambda x: jnp.frexp(x)[0], [0.3, 5, -7])),
        row("scipy.special.logit", "ordinary", of(special.logit, [0.1, 0.4, 0.9])),
        row("scipy.special.xlogy", "ordinary", of(special.xlogy, mixed, positive)),
        row("scipy.special.xlogy", "x = 0", of(special.xlogy, [0.0, 0], [0.5, 2]), is_quick=True),
        row(
            "scipy.special.xlogy",
            "x = 0, y = 0; in y",
            of(lambda y: special.xlogy(jnp.zeros_like(y), y), 0.0, reference=jnp.zeros_like),
            Found(
                "xlogy(0, y) is 0 for every y; of y the rule makes x/y, which is 0/0 here.",
                "jax.grad(special.xlogy, 1)(0.0, 0.0)",
                "0",
            ),
        ),
        row("scipy.special.xlog1py", "x = 0", of(special.xlog1py, [0.0, 0], [0.5, 2])),
        row("scipy.special.entr", "ordinary", of(special.entr, positive)),
        row("scipy.special.kl_div", "ordinary, a tie", of(special.kl_div, positive, [0.2, 1, 1, 2])),
        row("scipy.special.zeta", "ordinary", of(special.zeta, [2.5, 4, 1.5], [0.5, 2, 3])),
        row(
            "scipy.special.zeta",
            "zeta(20, 2)",
            of(special.zeta, [20.0], [2.0]),
            Found(
                "The series of the rule leaves the range of float16; zeta itself, 9.5e-07, does not.",
                "jax.grad(special.zeta)(jnp.float16(20), jnp.float16(2))",
                "-6.61e-07",
            ),
        ),
        row(
            "scipy.special.log_ndtr",
            "ordinary",
            of(special.log_ndtr, [-1.5, -0.7, 0.3, 1.9], reference=log_ndtr),
        ),
        row(
            "scipy.special.log_ndtr",
            "-100, -1000",
            of(special.log_ndtr, [-100.0, -1000], reference=log_ndtr),
            Found(
                "The gradient, about -x, is the exp of a difference of two numbers of size x²/2.",
                "jax.grad(special.log_ndtr)(jnp.float32(-10000))",
                "10000.0001",
            ),
        ),
        row("scipy.special.erfcx", "ordinary", of(special.erfcx, mixed, reference=erfcx)),
        row(
            "scipy.special.erfcx",
            "9.3",
            of(special.erfcx, [9.3], reference=erfcx),
            Found(
                "It is the value that is off, and the gradient follows: in float32, in which all three "
                "dtypes are computed, erfc underflows between 9.2 and 9.4; from 9.42 on there is a series.",
                "special.erfcx(jnp.float32(9.3))",
                "0.0603208",
            ),
        ),
        row(
            "scipy.special.erfcx",
            "30, 100",
            of(special.erfcx, [30.0, 100], reference=erfcx),
            Found(
                "2x erfcx(x) - 2/√π is a difference of two numbers near 1.13.",
                "jax.grad(special.erfcx)(jnp.bfloat16(100))",
                "-5.64e-05",
            ),
        ),
        row("scipy.special.dawsn", "ordinary, 0", of(special.dawsn, [*mixed, 0.0])),
        row(
            "scipy.special.dawsn",
            "30, 100",
            of(special.dawsn, [30.0, 100]),
            Found(
                "1 - 2x dawsn(x) is a difference of two numbers near 1.",
                "jax.grad(special.dawsn)(jnp.float32(1000))",
                "-5e-07",
            ),
        ),
        row("scipy.special.expi", "0.7", of(special.expi, 0.7)),
        row("scipy.special.expn", "n = 2, x = 0.7", of(lambda x: special.expn(2, x), 0.7)),
        row(
            "scipy.special.expn",
            "n = 0, x = 0.7",
            of(lambda x: special.expn(0, x), 0.7, reference=lambda x: jnp.exp(-x) / x),
            Found(
                "E₀(x) = exp(-x)/x. The rule asks for E₋₁, which expn answers with nan.",
                "jax.grad(lambda x: special.expn(0, x))(1.0)",
                "-2/e = -0.735759",
            ),
        ),
        row("scipy.special.sici", "Si: ordinary, 0", of(lambda x: special.sici(x)[0], [*mixed, 0.0])),
        row("scipy.special.sici", "Ci: ordinary", of(lambda x: special.sici(x)[1], positive)),
        row("scipy.special.poch", "ordinary", of(special.poch, positive, [0.5, 1.5, 2, 3])),
        row("scipy.special.poch", "m = 0", of(special.poch, positive, [0.0, 0, 0, 0])),
        row("scipy.special.hyp1f1", "ordinary", of(special.hyp1f1, 0.5, 1.5, 0.3)),
        row(
            "scipy.special.hyp1f1",
            "a = 0",
            of(special.hyp1f1, 0.0, 0.5, 0.3),
            Found(
                "The first term of the rule's series has a as a factor. For a = 0 the loop ends with it, and "
                "the gradient in a is 0.",
                "jax.grad(special.hyp1f1)(0.0, 0.5, 0.3)",
                "Σ xᵏ/(k (b)ₖ) = 0.665126",
            ),
        ),
        row(
            "scipy.special.hyp2f1",
            "a = 0",
            of(special.hyp2f1, 0.0, 1.2, 1.7, 0.3),
            Found(
                "As with hyp1f1.",
                "jax.grad(special.hyp2f1)(0.0, 1.2, 1.7, 0.3)",
                "Σ (b)ₖ xᵏ/(k (c)ₖ) = 0.243281",
            ),
            single,
        ),
    ]


def leibniz(a):
    """The determinant of a 4×4 matrix, along its first row and the 3×3 minors written out."""

    def minor(j):
        x = jnp.delete(a[1:], j, axis=1, assume_unique_indices=True)
        return sum(
            x[0, i] * (x[1, (i + 1) % 3] * x[2, (i + 2) % 3] - x[1, (i + 2) % 3] * x[2, (i + 1) % 3])
            for i in range(3)
        )

    return sum((-1) ** j * a[0, j] * minor(j) for j in range(4))


def optax_rows() -> list[Row]:
    mixed, labels = [-2.0, -0.7, 0.3, 1.9], [0.5, 0, 0.5, 0]
    cross_entropy = optax.losses.safe_softmax_cross_entropy
    simplex = weighted(optax.projections.projection_simplex)
    no_gradient = Found(
        "Of an array in bfloat16 or float16 the projection is float32 and the rule's tangent is not, which "
        "JAX refuses.",
        "jax.grad(lambda x: optax.projections.projection_simplex(x)[0])(jnp.ones(3, jnp.bfloat16))",
        "2/3, -1/3, -1/3",
    )

    def entropy(x):
        return cross_entropy(x, jnp.asarray(labels, x.dtype))

    def forward_mode(dtype, seed):
        x = jnp.asarray([1.0, -np.inf, 2, 0.5], dtype)
        return fnn.check_jvp(plain(entropy), lambda x, v: jax.jvp(entropy, x, v), (x,), seed=seed)

    def row(name, points, ask, found=None, is_quick=False):
        return Row("optax", name, points, ask, found, is_quick=is_quick)

    return [
        row("safe_softmax_cross_entropy", "both", of(cross_entropy, mixed, [0.2, 0.3, 0.1, 0.4])),
        row("safe_softmax_cross_entropy", "a label 0", of(cross_entropy, mixed, [0, 0.3, 0.3, 0.4])),
        row("safe_softmax_cross_entropy", "ties, ±100", of(entropy, [100.0, -100, 100, 3])),
        row("safe_softmax_cross_entropy", "a logit -inf", of(entropy, [1.0, -np.inf, 2, 0.5])),
        row(
            "safe_softmax_cross_entropy",
            "-inf, forward",
            forward_mode,
            Found(
                "jax.grad is right at a logit of -inf whose label is 0. In forward mode the rule multiplies "
                "the labels' tangent, 0, by log 0.",
                "jax.jvp(lambda x: optax.losses.safe_softmax_cross_entropy(x, jnp.array([1.0, 0])), "
                "(jnp.array([2, -jnp.inf]),), (jnp.ones(2),))[1]",
                "0",
            ),
        ),
        row("projection_simplex", "ordinary", of(simplex, mixed), no_gradient),
        row("projection_simplex", "a tie", of(simplex, [1.0, 1, 0, 0]), no_gradient),
        row("projection_simplex", "a corner", of(simplex, [1.0, 0, 0, 0]), no_gradient, is_quick=True),
        row("scale_gradient", "by 1", of(lambda x: optax.scale_gradient(x, 1.0), mixed)),
        row(
            "scale_gradient",
            "by 3",
            of(lambda x: optax.scale_gradient(x, 3.0), mixed),
            Found("As it is meant to be: the function is x and its gradient, on purpose, 3."),
            is_quick=True,
        ),
    ]


def data(dtype: Any, seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((4, 3)), dtype), jnp.asarray(rng.standard_normal((4, 2)), dtype)


LEFT_OUT = Found("As it is meant to be: the 1/N was left out of this one, to see whether that shows.")


def equinox_rows() -> list[Row]:
    eqx: Any = import_module("equinox")
    while_loop = import_module("equinox.internal").while_loop

    def mlp(is_mean, dtype, seed):
        model = eqx.nn.MLP(3, 2, 5, 2, activation=jnp.tanh, dtype=dtype, key=jax.random.key(seed))
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def cost(params, X, Y):
            outputs = jax.vmap(eqx.combine(params, static))(X)
            return jnp.mean(jnp.sum((outputs - Y) ** 2, axis=1)) / 2

        def by_hand(params, X, Y):
            layers, activations, gradient = params.layers, [X], []
            for layer in layers[:-1]:
                activations.append(jnp.tanh(activations[-1] @ layer.weight.T + layer.bias))
            delta = activations[-1] @ layers[-1].weight.T + layers[-1].bias - Y
            delta = delta / len(X) if is_mean else delta
            for A, layer in zip(reversed(activations), reversed(layers), strict=True):
                gradient[:0] = [delta.T @ A, delta.sum(axis=0)]
                delta = (delta @ layer.weight) * (1 - A**2)  # not used below the first layer
            return eqx.tree_at(lambda m: [x for l in m.layers for x in (l.weight, l.bias)], params, gradient)

        return fnn.check_gradient(cost, by_hand, params, *data(dtype, seed), seed=seed)

    def loop(x):
        """Five rounds of a ← sin a + x."""
        return while_loop(
            lambda carry: carry[0] < 5,
            lambda carry: (carry[0] + 1, jnp.sin(carry[1]) + x),
            (0, x),
            max_steps=8,
            kind="checkpointed",
        )[1]

    def written_out(x):
        a = x
        for _ in range(5):
            a = jnp.sin(a) + x
        return a

    def row(name, points, ask, found=None):
        return Row("equinox", name, points, ask, found)

    return [
        row("nn.MLP, parameters", "by hand", lambda dtype, seed: mlp(True, dtype, seed)),
        row("nn.MLP, parameters", "1/N left out", lambda dtype, seed: mlp(False, dtype, seed), LEFT_OUT),
        row("internal.while_loop", "checkpointed", of(loop, [0.3, 1.2], reference=written_out)),
    ]


def flax_rows() -> list[Row]:
    nnx: Any = import_module("flax.nnx")
    fp8_ops: Any = import_module("flax.linen.fp8_ops")

    def network(is_mean, dtype, seed):
        rngs = nnx.Rngs(seed)
        first, last = (nnx.Linear(*sizes, param_dtype=dtype, rngs=rngs) for sizes in ((3, 5), (5, 2)))
        graph, state = nnx.split(nnx.Sequential(first, jnp.tanh, last))
        tree = jax.tree.structure(state)  # bias and kernel of the one, then of the other

        def cost(state, X, Y):
            return jnp.mean(jnp.sum((nnx.merge(graph, state)(X) - Y) ** 2, axis=1)) / 2

        def by_hand(state, X, Y):
            c, V, b, W = jax.tree.leaves(state)
            A = jnp.tanh(X @ V + c)
            delta = A @ W + b - Y
            delta = delta / len(X) if is_mean else delta
            below = (delta @ W.T) * (1 - A**2)
            leaves = [below.sum(axis=0), X.T @ below, delta.sum(axis=0), A.T @ delta]
            return jax.tree.unflatten(tree, leaves)

        return fnn.check_gradient(cost, by_hand, state, *data(dtype, seed), seed=seed)

    def product(A, B):
        return fp8_ops.dot_general_with_precision(A, B, (((1,), (0,)), ((), ())))

    X, Y = (np.asarray(x) for x in data(jnp.float32, 0))

    def row(name, points, ask, found=None):
        return Row("flax", name, points, ask, found)

    return [
        row("nnx state, parameters", "by hand", lambda dtype, seed: network(True, dtype, seed)),
        row(
            "nnx state, parameters", "1/N left out", lambda dtype, seed: network(False, dtype, seed), LEFT_OUT
        ),
        row("dot_general_with_precision", "ordinary", of(weighted(product), X.T, Y)),
    ]


OPTIONAL = {"equinox": equinox_rows, "flax": flax_rows}


@contextmanager
def as_a_user_has_it() -> Iterator[None]:
    """JAX's defaults, whatever the caller set; float16 overflows here and there, which is no news."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def answer(row: Row, dtype: str, seed: int) -> Answer:
    if dtype not in row.dtypes:
        return Answer(NOT_ASKED)
    with as_a_user_has_it():
        try:
            report = row.ask(DTYPES[dtype], seed)
        except NoGradient:
            return Answer(NO_GRADIENT)
        except Refused:
            return Answer(REFUSED)
    if report:
        at_kink = any("kink" in leaf.verdict for leaf in report.leaves)
        return Answer(KINK if at_kink else RIGHT)
    worst = max((leaf for leaf in report.leaves if not leaf.is_right), key=lambda leaf: leaf.units)
    where = "" if worst.where == "as given" else f", at another point ({worst.where})"
    loses = any("loses digits" in words for words in (worst.verdict, *report.diagnoses))
    evidence = f"{dtype} {worst.got:.6g} for {worst.expected:.6g}{where}"
    return Answer(LOSES if loses else WRONG, evidence)


def rows_of(flags: Flags) -> tuple[list[Row], list[str]]:
    """The rows of what is installed, and the names of what is not."""
    rows, missing = [*jax_rows(), *optax_rows()], []
    for package, make in OPTIONAL.items():
        if find_spec(package) is None:
            missing.append(package)
        elif not flags.quick:
            rows += make()
    return [row for row in rows if row.is_quick] if flags.quick else rows, missing


def measure(flags: Flags, rows: Sequence[Row]) -> list[dict[str, Answer]]:
    answers = []
    for row in rows:
        answers.append({dtype: answer(row, dtype, flags.seed) for dtype in DTYPES})
    return answers


def is_right(verdict: str) -> bool:
    return verdict in (RIGHT, KINK, REFUSED, NOT_ASKED)


def tried(code: str) -> str:
    """What a line of code of `Found` gives."""
    with as_a_user_has_it():
        try:
            numbers = np.ravel(np.asarray(eval(code), np.float64))
        except TypeError:
            return "raises TypeError"
    return "gives " + ", ".join(f"{x:.6g}" for x in numbers)


def table(rows: Sequence[Row], answers: Sequence[dict[str, Answer]], missing: Sequence[str]) -> str:
    """The verdicts, and below them what was found, once for each reason."""
    lines, notes = [("package", "function", "points", *DTYPES, "")], {}
    for row, verdicts in zip(rows, answers, strict=True):
        found = row.found or Found("Not explained yet.")
        number = ""
        if not all(is_right(one.verdict) for one in verdicts.values()):
            notes.setdefault(found, "; ".join(one.evidence for one in verdicts.values() if one.evidence))
            number = f"[{list(notes).index(found) + 1}]"
        cells = (one.verdict for one in verdicts.values())
        lines.append((row.package, row.name, row.points, *cells, number))
    lines += [(package, "not installed", "", "", "", "", "") for package in missing]
    text = [
        aligned(lines, "<<<<<<<"),
        "\nBy number: why, the judge's worst entries, and a line that shows it.",
    ]
    for n, (found, evidence) in enumerate(notes.items(), start=1):
        words = f"[{n}] {found.why}" + f" Found: {evidence}." * bool(evidence)
        text.append(textwrap.fill(words, 110, subsequent_indent=" " * 4, break_on_hyphens=False))
        if found.code:
            code = textwrap.fill(found.code, 110, initial_indent=" " * 4, subsequent_indent=" " * 8)
            text += [code, f"    {tried(found.code)}; the truth: {found.truth}"]
    return "\n".join(text)


def versions() -> str:
    parts = []
    for package in ("jax", "optax", *OPTIONAL):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return ", ".join((*parts, jax.devices()[0].platform))


def run(flags: Flags) -> str:
    rows, missing = rows_of(flags)
    answers = measure(flags, rows)
    verdicts = [one.verdict for verdicts in answers for one in verdicts.values()]
    asked = [verdict for verdict in verdicts if verdict not in (REFUSED, NOT_ASKED)]
    right = sum(map(is_right, asked))
    planted = sum(
        not is_right(one.verdict)
        for row, verdicts in zip(rows, answers, strict=True)
        for one in verdicts.values()
        if row.found and not row.found.code
    )
    head = (
        f"{len(rows)} questions in up to three dtypes, {len(asked)} verdicts: {right} right, "
        f"{planted} wrong as they are meant to be, {len(asked) - right - planted} otherwise."
    )
    return f"{head}\n\n{table(rows, answers, missing)}\n\n{versions()}, seed {flags.seed}\n"


def main(args: Sequence[str] | None = None) -> None:
    command.table_main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
