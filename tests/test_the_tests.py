"""Do the tests catch what people get wrong? Faults are planted in a copy of the package's source, one at a
time, and the same properties that guard the package must fail on the copy.

`python -m pytest tests/test_the_tests.py -n 0 -s` prints the score.
"""

import ast
import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import fnn as package
from tests.properties import (
    check_feedback,
    check_orders,
    check_rule,
    check_steps,
    check_sweep,
    check_visits,
)
from tests.strategies import Architecture, gate_cases, network_case, rules

pytestmark = pytest.mark.usefixtures("standard_promotion")
SOURCE = Path(package.__file__).parent


@pytest.fixture(scope="module", autouse=True)
def bytecode(tmp_path_factory):
    """A folder for it, also where Python is told to write none: files without a fault are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", False)
        patch.setattr(sys, "pycache_prefix", str(tmp_path_factory.mktemp("bytecode")))
        yield


# Which module each public name comes from; None for a module itself.
HOMES = {
    alias.name: node.module
    for node in ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}


class Copy(ModuleType):
    """The package imported anew, each module when a name of it is first asked for: no check needs them all."""

    def __init__(self, *folders: Path):
        super().__init__("fnn")
        self.__path__ = [str(folder) for folder in folders]  # the first that has a module

    def __getattr__(self, name: str):
        if name not in HOMES:
            raise AttributeError(name)
        module = importlib.import_module(f"fnn.{HOMES[name] or name}")
        return getattr(module, name) if HOMES[name] else module


@contextmanager
def planted(folder: Path, file: str = "", old: str = "", new: str = ""):
    """A copy of the package in which `old`, found once in `file`, is `new`; imported as `fnn`."""
    if file:
        text = (SOURCE / file).read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    # Shape annotations off: numbers have to catch it (and beartype takes the copy's Layer for the original's).
    jaxtyping.config.update("jaxtyping_disable", True)
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "fnn"}
    finders = list(sys.meta_path)
    sys.meta_path[:] = [f for f in finders if type(f).__module__.partition(".")[0] != "jaxtyping"]
    importlib.invalidate_caches()
    sys.modules["fnn"] = copy = Copy(folder, SOURCE)
    try:
        yield copy
        # Read from the file with the fault, if any.
        loaded = sys.modules.get(f"fnn.{file.removesuffix('.py')}")
        assert not file or loaded is not None and loaded.__file__ == str(folder / file)
    finally:
        sys.meta_path[:] = finders
        for name in [name for name in sys.modules if name.partition(".")[0] == "fnn"]:
            del sys.modules[name]
        sys.modules.update(ours)
        jaxtyping.config.update("jaxtyping_disable", False)


# What guards the package, each on one draw. Square networks, of N rows as wide as the layers, where every
# mistake of order or transposition still has the right shape. Of activations that compile quickly.

SQUARE = Architecture(widths=(4, 4, 4, 4), hidden=("sigmoid", "softplus"), output="sigmoid", N=4, l2=0.1)
PLAIN = Architecture(hidden=("sigmoid", "relu"))
WEIGHTED = Architecture(hidden=("sigmoid", "relu"), weighted=True, reduction="weighted_mean", N=5)
FOUR_LAYERS = Architecture(widths=(4, 4, 4, 4, 4), hidden=("sigmoid", "softplus", "sigmoid"), N=4)


class OfARule:
    """The property of all rules for one of a table; `judged` asks `fnn.check_rule` the same."""

    def __init__(self, table: Callable, name: str, size):
        self.table, self.name, self.size = table, name, size

    def __call__(self, fnn):
        check_rule(self.table(fnn)[self.name], self.size, "float64", seed=0)

    def judged(self, fnn) -> package.Report:
        case = self.table(fnn)[self.name]
        return package.check_rule(case.rule, *case.draw_one(size=self.size))


@cache
def rule(name: str, size=(4, 3)):
    return OfARule(rules, name, size)


@cache
def gate(name: str, size=((2, 3), (2, 3))):
    return OfARule(gate_cases, name, size)


def graph(fnn):
    """(x·x + x) σ(x) by hand: x forks into four wires, two of them into one gate."""
    square = fnn.graph(lambda x: (x * x + x) * fnn.node(fnn.sigmoid, x))
    s = 1 / (1 + np.exp(-0.5))
    sweep = square.backprop(0.5)
    np.testing.assert_allclose(sweep.gradients["x"], 2 * s + 0.75 * s * (1 - s), rtol=1e-14)
    np.testing.assert_allclose(sweep.gradients["add"], s, rtol=1e-14)


def jacobians(fnn):
    """Factors that do not commute, and are square."""
    A, B = np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[1.0, 0.0], [3.0, 1.0]])
    first, second = (
        fnn.Rule(lambda x, M=M: (M @ x, None), lambda _, y_bar, M=M: (M.T @ y_bar,)) for M in (A, B)
    )
    product = fnn.jacobian_product(fnn.chain(first, second), jnp.ones(2))
    np.testing.assert_array_equal(product.product, B @ A)
    np.testing.assert_array_equal(fnn.jacobian(fnn.chain(first, second), jnp.ones(2)), B @ A)


@cache
def cost(arch: Architecture = SQUARE):
    return lambda fnn: check_rule(network_case(fnn, arch), None, "float64", seed=0, instances=2)


@cache
def sweep(arch: Architecture = SQUARE):
    def check(fnn):
        case = network_case(fnn, arch)
        check_sweep(fnn, case.rule, *case.draw_one())

    return check


def feedback(fnn):
    case = network_case(fnn, FOUR_LAYERS)
    check_feedback(fnn, case.rule, *case.draw_one())


def steps(fnn):
    check_steps(fnn, network_case(fnn, SQUARE))


def kink(fnn):
    zero = jnp.zeros(1)
    for name, expected in (("relu", 0.0), ("leaky_relu(0.3)", 1.0), ("elu(0.7)", 0.7)):
        rule = rules(fnn)[name].rule
        value, residuals = rule.forward(zero)
        assert rule.pullback(residuals, jnp.ones_like(value))[0] == expected


def tail(fnn):
    """σ′(40), where autodiff has only zeros to compare with."""
    value, residuals = fnn.sigmoid.forward(jnp.full(1, 40.0))
    np.testing.assert_allclose(fnn.sigmoid.pullback(residuals, value)[0], np.exp(-40.0), rtol=1e-12)


def last_bits(fnn):
    """Tails of float32 values, a slope next to its root: what 4 ulp decide."""

    def slope(rule, z):
        value, residuals = rule.forward(z)
        return rule.pullback(residuals, jnp.ones_like(value))[0]

    for z, expected in ((-12.0, -2.1317785e-32), (-9.3, -6.5307128e-20)):  # z Φ(z)
        np.testing.assert_allclose(fnn.gelu.forward(jnp.float32(z))[0], expected, rtol=5e-7)
    np.testing.assert_allclose(slope(fnn.silu, jnp.float32(-1.2784646)), -2.8270397e-9, rtol=1e-6)


def sixteen_bits(fnn):
    """tanh′ to half a unit of float16, where three operations in float16 would lose more."""
    z = np.linspace(0.5, 4, 200).astype("float16")
    value, residuals = fnn.tanh.forward(jnp.asarray(z))
    slopes = fnn.tanh.pullback(residuals, jnp.ones_like(value))[0]
    np.testing.assert_array_equal(slopes, (1 / np.cosh(z.astype(float)) ** 2).astype("float16"))


def small_components(fnn):
    """∂C/∂z = p - 1 of the label is -exp(-40), where p is 1."""
    loss = fnn.softmax_cross_entropy_with_integer_labels
    C, residuals = loss.forward(jnp.array([[40.0, 0.0]]), jnp.array([0]))
    np.testing.assert_allclose(
        loss.pullback(residuals, jnp.ones_like(C))[0], np.exp(-40.0) * np.array([[-1, 1]])
    )


def many_examples(fnn):
    """In float16 an error of 1e-4 divided by N = 4096 is half of the smallest number."""
    params = (fnn.Layer(jnp.zeros((1, 1), "float16")),)
    cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    X, y = jnp.ones((4096, 1), "float16"), jnp.full((4096, 1), 1e-4, "float16")
    _, gradient = jax.jit(fnn.value_and_grad(cost))(params, X, y)
    np.testing.assert_allclose(np.asarray(gradient[0].W, float), -1e-4, rtol=1e-3)


def mixed_precision(fnn):
    """In float16 the gradient is float32's but for roundings, of errors far below its smallest number too."""
    case = network_case(fnn, Architecture(widths=(3, 5, 4), hidden=("sigmoid",), N=4))
    params, X, _ = jax.tree.map(lambda x: np.asarray(x, "float32"), case.draw_one())
    A_bar = np.full((4, 4), 1e-9, "float32")

    @jax.jit
    def both_ways(params, X, A_bar):
        results = []
        for net in (fnn.mlp(fnn.sigmoid), fnn.mlp(fnn.sigmoid, dtype="float16")):
            A, residuals = net.forward(params, X)
            results.append(jax.tree.leaves((A, net.pullback(residuals, A_bar))))
        return results

    bars = jax.device_get(both_ways(params, X, A_bar))
    for wide, narrow in zip(*bars, strict=True):
        np.testing.assert_allclose(narrow, wide, rtol=0, atol=2e-3 * float(np.abs(wide).max()))
    # Outputs and gradients are no numbers of float16: neither was rounded to it.
    for narrow in (bars[1][0], bars[1][1] * 2.0**30):
        assert (narrow.astype("float16").astype("float32") != narrow).any()


def gradient(fnn):
    case = network_case(fnn, PLAIN)
    one = case.draw_one()
    ours, theirs = (jax.jit(f(case.rule))(*one) for f in (fnn.value_and_grad, jax.value_and_grad))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def variance(fnn):
    W = fnn.init(jax.random.key(1), (500, 300), weights=fnn.he_normal)[0].W
    assert float(W.var()) == pytest.approx(2 / 500, rel=0.02)


def keys(fnn):
    params = fnn.init(jax.random.key(0), (5, 5, 5), weights=fnn.unit_normal)
    assert not (params[0].W == params[1].W).any()


def short_batches(fnn):
    check_visits(fnn, N=24, batch_size=7)


@dataclass(frozen=True)
class Fault:
    what: str
    file: str
    old: str
    new: str
    caught_by: Callable


A, L, N, S, R, T, P, G, H, J, E = (
    f"{name}.py"
    for name in (
        *("activations", "losses", "network", "sweep", "rules", "train", "params"),
        *("gates", "graphs", "chain_rule", "elementary"),
    )
)
FAULTS = [
    # Activations
    Fault("σ′ without its square", A, "(e / (1 + e * (2 + e))),)\n\n\nsigmoid", "(e / (1 + e)),)\n\n\nsigmoid", rule("sigmoid")),
    Fault("σ′ of a instead of z", A, "    return jnp.where(z < 0, e, 1) / (1 + e), z", "    return jnp.where(z < 0, e, 1) / (1 + e), jnp.where(z < 0, e, 1) / (1 + e)", rule("sigmoid")),
    Fault("σ′ as a(1 - a), which cancels", A, "(e / (1 + e * (2 + e))),)\n\n\nsigmoid", "jax.nn.sigmoid(z) * (1 - jax.nn.sigmoid(z)),)\n\n\nsigmoid", tail),
    Fault("tanh′ with a wrong exponent", A, "scaled_exp(-2 * _magnitude(z))", "scaled_exp(-_magnitude(z))", rule("tanh")),
    Fault("relu passes everything", A, "jnp.where(a > 0, a_bar, 0 * a)", "jnp.where(a > 0, a_bar, a_bar)", rule("relu")),
    Fault("relu has slope 1 at 0", A, "jnp.where(a > 0, a_bar, 0 * a)", "jnp.where(a >= 0, a_bar, 0 * a)", kink),
    Fault("leaky slope has the wrong sign", A, "jnp.where(z >= 0, 1, slope))", "jnp.where(z >= 0, 1, -slope))", rule("leaky_relu(0.3)")),
    Fault("elu′ forgets alpha", A, "alpha * m * scale", "m * scale", rule("elu(0.7)")),
    Fault("softplus′ mirrored", A, "(jnp.where(z < 0, e, 1) / (1 + e)),)", "(jnp.where(z < 0, 1, e) / (1 + e)),)", rule("softplus")),
    Fault("silu′ without the product rule", A, "n = d + jnp.where(jnp.abs(d) < 0.25, e_root * expm1_series(d, 0.25), e - e_root) + rest * (1 + e)", "n = 1 + e", rule("silu")),
    Fault("gelu′ without z φ(z)", A, "((root - t) * K + rest * K)", "(chebyshev(GELU_M, t) / (t + 1.15625))", rule("gelu")),
    Fault("gelu′ of the tanh form, z³ not differentiated", A, "far, far_low = rounded((w, 2 * cube))", "far, far_low = w, w_low", rule("gelu_tanh")),
    Fault("gelu′ off by a factor of 1.001", A, "((root - t) * K + rest * K)", "1.001 * ((root - t) * K + rest * K)", rule("gelu")),
    Fault("softmax Jacobian's diagonal only", A, "a * (a_bar - jnp.sum(a_bar * a, axis=-1, keepdims=True))", "a_bar * a * (1 - a)", rule("softmax")),
    Fault("softmax sums over the batch", A, "a * (a_bar - jnp.sum(a_bar * a, axis=-1, keepdims=True))", "a * (a_bar - jnp.sum(a_bar * a, axis=0, keepdims=True))", rule("softmax")),
    Fault("16 bits evaluated in 16 bits", E, "wide = jax.tree.map(widened, arguments)", "wide = arguments", sixteen_bits),
    Fault("the square's low part forgotten", E, "scaled_exp(-square / 2, -low / 2)", "scaled_exp(-square / 2)", last_bits),
    Fault("silu's root not taken out", A, "e_root * expm1_series(d, 0.25), e - e_root", "e - e_root, e - e_root", last_bits),
    # Losses
    Fault("1 - p_y as a difference", E, "rest + (top_sum - v)", "rest + top_sum - v", small_components),
    Fault("cross-entropy takes Σy for 1", L, "(p * sum_of_others(y) - y * rest)", "(p - y)", rule("softmax_cross_entropy")),
    Fault("cross-entropy has p + e_y", L, "jnp.where(is_label, -others, e)", "jnp.where(is_label, 2 * e + others, e)", rule("softmax_cross_entropy_with_integer_labels")),
    Fault("labels off by one", L, "== y.astype(dtype)[..., None]", "== (y.astype(dtype) + 1)[..., None]", rule("softmax_cross_entropy_with_integer_labels")),
    Fault("labels' adjoint has the wrong sign", L, "C_bar[..., None] * -Z", "C_bar[..., None] * Z", rule("sigmoid_binary_cross_entropy")),
    Fault("half squared error differentiated as if whole", L, "Z_bar = C_bar[..., None] * e\n", "Z_bar = C_bar[..., None] * 2 * e \n", rule("half_squared_error")),
    Fault("squared error without its 2", L, "Z_bar = C_bar[..., None] * 2 * e\n", "Z_bar = C_bar[..., None] * e \n", rule("squared_error")),
    Fault("mean over outputs forgotten", L, "(2 / e.shape[-1])", "2", rule("mean_squared_error")),
    Fault("absolute error loses its sign", L, "jnp.mean(jnp.abs(e), axis=-1), jnp.sign(e)", "jnp.mean(jnp.abs(e), axis=-1), jnp.ones_like(e)", rule("mean_absolute_error")),
    Fault("Huber's slope not clipped", L, "jnp.mean(inside * (e - inside / 2), axis=-1), inside", "jnp.mean(inside * (e - inside / 2), axis=-1), e", rule("huber_loss(0.5)")),
    Fault("log p differentiated with the wrong sign", L, "C_bar[..., None] * -_ratio(y, P)", "C_bar[..., None] * _ratio(y, P)", rule("categorical_cross_entropy")),
    Fault("log(1 - p) differentiated as log p", L, "_ratio(1 - y, 1 - P)", "_ratio(1 - y, P)", rule("binary_cross_entropy")),
    # Network and cost
    Fault("W not transposed, in a square layer", N, "Z = times_transposed(A, W.astype(dtype))", "Z = matmul(A, W.astype(dtype))", cost()),
    Fault("bias forgotten", N, "Z = Z + jnp.broadcast_to(b.astype(Z.dtype), Z.shape)", "Z = Z + 0 * jnp.broadcast_to(b.astype(Z.dtype), Z.shape)", cost()),
    Fault("stale cache: a^l kept instead of a^{l-1}", N, "            inputs.append(A)\n            A, residuals = activation.forward(Z.astype(own))\n", "            A, residuals = activation.forward(Z.astype(own))\n            inputs.append(A)\n", cost()),
    Fault("gradient with respect to X forgotten", N, "X_bar = scaled(", "X_bar = 0 * scaled(", cost()),
    Fault("1/N dropped", N, "jnp.full_like(L, 1 / N)", "jnp.full_like(L, 1.0)", cost()),
    Fault("1/N twice", N, "jnp.full_like(L, 1 / N)", "jnp.full_like(L, 1 / N**2)", cost()),
    Fault("float16: errors raised, results not lowered", N, "x / by", "x", mixed_precision),
    Fault("float16: errors not raised", N, "A_bar * by", "A_bar", mixed_precision),
    Fault("float16: outputs rounded to it", N, "(len(params) - 1), X.dtype)", "len(params),)", mixed_precision),
    Fault("float16: gradients rounded to it", N, "has_bias, scale, own)", "has_bias, scale)", mixed_precision),
    Fault("1/N before the sums, in float16", N, "weight_unit(residuals.losses.size, dtype) if", "1.0 if", many_examples),
    Fault("sample weight not applied", N, "widened(C_bar) * residuals.weights,", "widened(C_bar) * jnp.full_like(residuals.weights, 1 / residuals.weights.size),", cost(WEIGHTED)),
    Fault("weighted mean divided by N on the way back", N, "w / total, ((L", "w / N, ((L", cost(WEIGHTED)),
    Fault("slope of a sample weight without the mean's", N, "(L - C) / total", "L / total", cost(WEIGHTED)),
    Fault("penalty missing from the gradient", N, "if penalty is not None:", "if False:", cost()),
    Fault("penalty's gradient without the ½ in mind", N, "_as(self.l2, W) * W for", "2 * _as(self.l2, W) * W for", cost()),
    Fault("penalty ignores the cotangent", N, "tuple(C_bar * P for P in penalty)", "penalty", cost()),
    Fault("biases penalised", S, "layer._replace(W=layer.W + P)", "layer._replace(W=layer.W + P, b=layer.b + P.sum(axis=1))", cost()),
    # The backward sweep
    Fault("layer order reversed", S, "tuple(reversed(errors))", "tuple(errors)", cost()),
    Fault("σ′ at the wrong layer", S, "activations[l].pullback(residuals[l], A_bar", "activations[l].pullback(residuals[l + 1], A_bar", cost()),
    Fault("σ′ of another layer's function", S, "activations[l].pullback(", "activations[l + 1].pullback(", cost()),
    Fault("W of the wrong layer", S, "params[l + 1].W", "params[l].W", cost()),
    Fault("W transposed on the way back", S, "W = params[l + 1].W", "W = params[l + 1].W.T", cost()),
    Fault("σ′ of the last layer forgotten", S, "(delta,) = activations[-1].pullback(residuals[-1], A_bar)", "delta = A_bar", cost()),
    Fault("bias summed over the wrong axis", S, "widened(delta).sum(axis=0)", "widened(delta).sum(axis=1)", cost()),
    Fault("bias averaged instead of summed", S, "widened(delta).sum(axis=0)", "widened(delta).mean(axis=0)", cost()),
    Fault("last example ignored", S, "matmul(transposed(delta), A)", "matmul(transposed(delta[:-1]), A[:-1])", cost()),
    Fault("outer product transposed, in a square layer", S, "matmul(transposed(delta), A)", "matmul(transposed(A), delta)", cost()),
    Fault("weight gradient off by a factor of 1.001", S, "matmul(transposed(delta), A)", "1.001 * matmul(transposed(delta), A)", cost()),
    Fault("weight gradient's sign flipped", S, "matmul(transposed(delta), A)", "-matmul(transposed(delta), A)", cost()),
    Fault("errors of the batch's mean instead of each example's loss", S, "jnp.ones_like(losses)", "residuals.weights", sweep()),
    Fault("sweep's gradient without the weights", S, "[sweep.weights] * len", "[jnp.full_like(sweep.weights, 1 / len(sweep.weights))] * len", sweep(WEIGHTED)),
    Fault("sweep's gradient without the penalty", S, "penalty=cost.penalty_gradient(params)", "penalty=None", sweep()),
    Fault("feedback ignored", S, "way_back = params if feedback is None else feedback", "way_back = params", feedback),
    Fault("direct feedback from the layer above", S, "params.matrices[l], errors[0]", "params.matrices[l], delta", feedback),
    Fault("direct feedback of another layer", S, "params.matrices[l], errors[0]", "params.matrices[-1 - l], errors[0]", feedback),
    # Gates, graphs, Jacobians
    Fault("product's factors not exchanged", G, "_collapse(z_bar * y, x), _collapse(z_bar * x, y)", "_collapse(z_bar * x, x), _collapse(z_bar * y, y)", gate("multiply")),
    Fault("difference loses its sign", G, "_collapse(-z_bar, y)", "_collapse(z_bar, y)", gate("subtract")),
    Fault("quotient without its minus", G, "_collapse(-z_bar * z / y, y)", "_collapse(z_bar * z / y, y)", gate("divide")),
    Fault("maximum gives to the smaller", G, "_collapse(jnp.where(x >= y, share, zero), x)", "_collapse(jnp.where(x <= y, share, zero), x)", gate("maximum")),
    Fault("an expanded number gets the mean instead of the sum", G, "else z_bar.sum()", "else z_bar.mean()", gate("multiply", ((3,), ()))),
    Fault("sine for cosine", G, "(z_bar * jnp.cos(x),)", "(z_bar * jnp.sin(x),)", gate("sin", (3,))),
    Fault("W̄ transposed, square", G, "z_bar @ x.T", "x @ z_bar.T", gate("matmul", (3,))),
    Fault("x̄ without Wᵀ, square", G, "W_bar, W.T @ z_bar", "W_bar, W @ z_bar", gate("matmul", (3,))),
    Fault("exponent not lowered", G, "_power_of(x, n - 1)", "_power_of(x, n)", gate("power(3.0)", (3,))),
    Fault("gradients replaced at forks", H, "contribution if before is None else before + contribution", "contribution", graph),
    Fault("local gradient without the one from above", H, "gate.pullback(kept, gradients[name])", "gate.pullback(kept, jnp.ones_like(gradients[name]))", graph),
    Fault("Jacobians in the order of application", J, "factors = tuple(reversed(factors))", "factors = tuple(factors)", jacobians),
    Fault("chain's pullbacks from the first to the last", J, "zip(reversed(self.rules), reversed(residuals), strict=True)", "zip(self.rules, residuals, strict=True)", jacobians),
    # Rules, initialisers, training
    Fault("the cotangent starts from 2", R, "jnp.ones_like(value)", "2 * jnp.ones_like(value)", gradient),
    Fault("fan-out taken for fan-in", P, "he_normal(in_axis=-1, out_axis=-2)\n", "he_normal()\n", variance),
    Fault("one key for all layers", P, "key, W_key, b_key =", "_, W_key, b_key =", keys),
    Fault("last, short batch dropped", T, "if n_full < N:", "if False:", short_batches),
    Fault("examples drawn with replacement", "orders.py", "permutation(shuffle_key, N, rounds(N))", "jax.random.randint(shuffle_key, (N,), 0, N)", short_batches),
    Fault("not shuffled", "orders.py", "permutation(shuffle_key, N, rounds(N))", "jnp.arange(N)", check_orders),
    Fault("an example swapped without its partner", "orders.py", "jnp.maximum(x, partner) ^ salt", "x ^ salt", check_orders),
    Fault("the same order every epoch", T, "state._replace(key=key)", "state", check_orders),
    Fault("parameters not updated", T, "return TrainState(params, optimizer_state, state.key", "return TrainState(state.params, optimizer_state, state.key", steps),
    Fault("optimiser's state not kept", T, "return TrainState(params, optimizer_state, state.key", "return TrainState(params, state.optimizer_state, state.key", steps),
]  # fmt: skip
CAUGHT = []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_planted_fault_is_caught(fault, tmp_path):
    with planted(tmp_path, fault.file, fault.old, fault.new) as copy:
        with pytest.raises(AssertionError):  # numbers that differ; any other error would be the fault's own
            fault.caught_by(copy)
        # The judge that users have sees it too, unless it is another function with the right gradient of it.
        if isinstance(fault.caught_by, OfARule) and fault.what != "labels off by one":
            assert not fault.caught_by.judged(copy)
    CAUGHT.append(fault.what)


def test_copy_without_a_fault_passes_every_check(tmp_path):
    with planted(tmp_path) as copy:
        for check in {fault.caught_by for fault in FAULTS}:
            check(copy)


def test_score_is_printed():
    """A fault planted twice would count twice."""
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS) >= 30
    print(f"\nplanted faults: {len(FAULTS)}; caught: {len(CAUGHT)}")
