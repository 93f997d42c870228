"""The judge is judged: wrong gradients caught, right ones passed, and the sentences that say why."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import fnn as package
from fnn import strategies
from fnn.__main__ import main
from fnn.check import LIMIT
from tests.corpus import RIGHT, WRONG, judge, thinned
from tests.strategies import gate_cases, rules

fnn: Any = package  # without types: wrong questions are asked too
rng = np.random.default_rng(0)
X, y, W = (jax.device_put(rng.standard_normal(shape)) for shape in ((8, 3), (8, 2), (2, 3)))
v = jax.device_put(np.array([-1.5, 0.5, 2.0]))


def squares(W, X, y):
    return ((X @ W.T - y) ** 2).sum(axis=1).mean()


def gradient(W, X, y):
    return 2 * (X @ W.T - y).T @ X / len(X)


# All of both corpora: experiments/benchmarks/gradient_checkers.py.
@pytest.mark.parametrize("name", thinned(WRONG, 16))
def test_wrong_gradient_is_caught(name):
    assert not judge(WRONG[name]()), name


@pytest.mark.parametrize("name", thinned(RIGHT, 4))
def test_right_gradient_passes(name):
    report = judge(RIGHT[name]())
    assert report, report


@pytest.mark.parametrize("name", [*rules(package), *gate_cases(package)])
def test_the_packages_own_rules_pass(name):
    case = (rules(package) | gate_cases(package))[name]
    primals = case.draw_one(size=case.sizes[-1])
    report = fnn.check_rule(case.rule, *primals)
    assert report, report
    assert max(leaf.units for leaf in report.leaves) < LIMIT / 4, "right, and far from the limit"


def test_a_whole_network_passes_in_float32():
    cost = fnn.cost(fnn.mlp(fnn.relu), fnn.softmax_cross_entropy_with_integer_labels, l2=1e-2)
    init = partial(fnn.init, sizes=(4, 5, 3), weights=fnn.he_normal, dtype=jnp.float32)
    params = jax.jit(init)(jax.random.key(0))
    X, y = rng.standard_normal((8, 4)).astype("float32"), np.arange(8) % 3
    X, y = jnp.asarray(X, "float32"), jnp.asarray(y, "int64")
    report = fnn.check_value_and_gradient(
        cost, fnn.value_and_grad(cost), params, X, y, batch_axes=(None, 0, 0)
    )
    assert report and "the same for batches of 1, 4, 9" in str(report), report


# What the report says. Each fault is planted, and the sentence read.

ROWS = jax.device_put(np.arange(8) % 3)


def logits_cost(z):
    return -jnp.sum(jax.nn.log_softmax(z)[jnp.arange(8), ROWS]) / 8


def logits_gradient(z):
    return (jax.nn.softmax(z) - jax.nn.one_hot(ROWS, 3, dtype=z.dtype)) / 8


def penalised(p):
    return squares(p["W"], X, y) + 0.05 * jnp.sum(p["W"] ** 2)


def swapped(p):
    return jnp.sum(jnp.sin(p["a"])) + jnp.sum(p["b"] ** 3)


def layers_cost(params, X):
    for W in params:
        X = jnp.tanh(X @ W.T)
    return X.sum()


def layers_gradient(params, X):
    """σ′ forgotten on the way from the last layer to the one before."""
    inputs, outputs = [], []
    for W in params:
        inputs.append(X)
        X = jnp.tanh(X @ W.T)
        outputs.append(X)
    delta, grads = 1 - outputs[-1] ** 2, []
    for l in reversed(range(len(params))):
        grads.append(delta.T @ inputs[l])
        if l:
            delta = (
                delta @ params[l] if l == len(params) - 1 else (delta @ params[l]) * (1 - outputs[l - 1] ** 2)
            )
    return list(reversed(grads))


def layer_cost(p, X, y):
    return jnp.mean(jnp.sum((jnp.tanh(X @ p["W"].T + p["b"][None, :]) - y) ** 2, axis=1))


def layer_gradient(p, X, y, *, weights=None, axis=0):
    """The gradient of one layer's cost, with weights on its examples, and b's summed over any axis."""
    A = jnp.tanh(X @ p["W"].T + p["b"][None, :])
    delta = 2 * (A - y) * (1 - A**2) / len(X)
    delta = delta if weights is None else delta * weights
    return {"W": delta.T @ X, "b": delta.sum(axis)}


def _with(example, weight):
    """Weights of 1, but for one example."""
    weights = np.ones((8, 1))
    weights[example] = weight
    return jax.device_put(weights)


def softplus_gradient(x):
    e = jnp.exp(x)
    return e / (1 + e)


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False).sum()


def times(factor):
    """A wrong factor of the gradient, as an argument: the programs are the same for all."""
    return (
        lambda W, X, y, factor: squares(W, X, y),
        lambda W, X, y, factor: factor * gradient(W, X, y),
        (W, X, y, jnp.asarray(factor, "float64")),
    )


LAYER = {"W": W, "b": jax.device_put(rng.standard_normal(2))}
FIRST_TWO = (LAYER, *jax.device_put((np.asarray(X)[:2], np.asarray(y)[:2])))
SQUARE = jax.device_put(rng.standard_normal((3, 3)))
DEEP = [jax.device_put(rng.standard_normal((3, 3)) / 2) for _ in range(4)]
LOGITS = jax.device_put(np.asarray(y) @ np.asarray(W))
DIAGNOSES = {
    "a factor of 2": (*times(2), "constant factor of 2 in every leaf"),
    "a factor of 1/2": (*times(1 / 2), r"factor of 0.5 \(1/2\)"),
    "the sign": (*times(-1), "constant factor of -1 in every leaf"),
    "1/N dropped": (*times(8), r"factor of 8 \(N = 8\)"),
    "1/N twice": (*times(1 / 8), r"factor of 0.125 \(1/N, N = 8\)"),
    "N - 1 for N": (*times(7 / 8), r"factor of 0.875 \(1 - 1/N, N = 8\)"),
    "zero": (*times(0), "constant factor of 0 in every leaf"),
    "transposed, square": (lambda M: jnp.sum(jnp.sin(M @ v)), lambda M: jnp.outer(v, jnp.cos(M @ v)), (SQUARE,), "transposed"),
    "transposed shape": (squares, lambda *a: gradient(*a).T, (W, X, y), "transposed"),
    "not summed": (
        lambda b: jnp.mean(jnp.sum((X @ W.T + b[None, :] - y) ** 2, axis=1)), lambda b: 2 * (X @ W.T + b[None, :] - y) / 8,
        (jnp.zeros(2),), "not summed over axis 0",
    ),
    "penalty missing": (penalised, lambda p: {"W": gradient(p["W"], X, y)}, ({"W": W},), r"a term 0.1·parameter is missing"),
    "only the last example": (
        logits_cost, lambda z: logits_gradient(z).at[-1].set(0.0), (LOGITS,), "only the last row is wrong, of 8",
    ),
    "only the first example": (
        logits_cost, lambda z: logits_gradient(z).at[0].set(0.3), (LOGITS,), "only the first row is wrong, of 8",
    ),
    "leaves exchanged": (
        swapped, lambda p: {"a": 3 * p["b"] ** 2, "b": jnp.cos(p["a"])}, ({"a": v, "b": v + 1},), "are exchanged",
    ),
    "normalised": (
        lambda x: jnp.sum(x**2), lambda x: 2 * x / jnp.linalg.norm(2 * x), (v,), "right in direction but not in length",
    ),
    "right at zero": (lambda x: jnp.sum(jnp.sin(x)), jnp.ones_like, (v,), "right at zero and nowhere else"),
    "right here only": (
        lambda x: jnp.sum(x**3), lambda x: jnp.asarray([6.75, 0.75, 12.0], x.dtype), (v,), "right at the point given and wrong elsewhere",
    ),
    "gelu's tanh form": (exact_gelu, jax.grad(lambda x: jax.nn.gelu(x, approximate=True).sum()), (v,), "right up to the tanh form of GELU"),
    "over the wrong axis, unseen by shapes": (
        layer_cost, partial(layer_gradient, axis=1), FIRST_TWO, r"'b'\]: summed over axis 1 of \(2, 2\), in place of axis 0",
    ),
    "over the wrong axis": (
        layer_cost, partial(layer_gradient, axis=1), (LAYER, X, y), r"'b'\]: summed over axis 1 of \(8, 2\), in place of axis 0",
    ),
    "a product over the wrong axis": (
        lambda M: jnp.sum((SQUARE @ M) ** 2), lambda M: 2 * SQUARE @ SQUARE @ M, (DEEP[0],),
        r"a product summed over axis \d of \(3, 3\) and \d of \(3, 3\), in place of \d and \d \|",
    ),
    "the last example left out": (
        layer_cost, partial(layer_gradient, weights=_with(-1, 0)), (LAYER, X, y), "'W'.: the last of 8 examples is left out",
    ),
    "the first example left out, of a mean": (
        layer_cost, partial(layer_gradient, weights=_with(0, 0) * 8 / 7), (LAYER, X, y),
        r"'b'.: the first of 8 examples is left out, times 1.14286 \(N/\(N - 1\), N = 8\)",
    ),
    "one example": (
        layer_cost, partial(layer_gradient, weights=_with(3, 1.5)), (LAYER, X, y), "'W'.: only example 3 of 8 is wrong",
    ),
    "float32 on the way": (
        lambda x: jnp.sum(jnp.sin(x)), lambda x: jnp.cos(x.astype(jnp.float32)).astype(x.dtype), (v,), "precision drops to float32",
    ),
    "overflow": (
        lambda x: jnp.sum(jax.nn.softplus(x)), softplus_gradient, (jnp.array([1.0, 800.0]),),
        r"NaN where the truth is finite, in 1 of 2 entries, first at \[1\], where the parameter is 800: "
        r"exp \(test_check.py:\d+, in softplus_gradient\) gives inf, of which div \(.*\) gives NaN",
    ),
    "overflow in float32 alone": (
        lambda x: jnp.sum(jax.nn.softplus(x)), softplus_gradient, (jnp.array([1.0, 100.0], jnp.float32),),
        r"where the parameter is 100: exp \(test_check.py:\d+, in softplus_gradient\) gives inf",
    ),
    "overflow, no NaN": (
        lambda x: jnp.sum(jnp.log(x)), lambda x: x / (x * x), (jnp.array([1.0, 1e-300]),),
        r"NaN|inf where the truth is finite",
    ),
    "digits lost": (
        lambda x: jnp.sum(jax.nn.log_sigmoid(x)), lambda x: 1 - jax.nn.sigmoid(x), (jnp.array([5.0, 6.0], jnp.float32),),
        "loses digits that autodiff keeps",
    ),
    "where the error enters": (
        layers_cost, layers_gradient, (DEEP, X), "layers 3 right, 2 to 0 wrong: the error enters on the way from 3 to 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIAGNOSES)
def test_report_says_what_is_wrong(name):
    f, wrong, args, sentence = DIAGNOSES[name]
    report = fnn.check_gradient(f, wrong, *args)
    assert not report
    found = " | ".join(report.diagnoses)
    assert re.search(sentence, found + " |"), found
    with pytest.raises(AssertionError, match=re.escape(report.diagnoses[0])):
        report.raise_if_wrong()
    assert len(str(report).splitlines()) <= 40, found


def test_report_of_a_right_gradient_raises_nothing_and_is_json():
    report = fnn.check_gradient(squares, gradient, W, X, y, seed=3)
    report.raise_if_wrong()
    assert json.loads(json.dumps(report.to_dict()))["right"] is True
    text = str(report)
    assert (
        text.startswith("check_gradient: right")
        and "autodiff in float64, confirmed" in text
        and "seed=3" in text
    )


def test_report_of_nan_is_json_too():
    report = fnn.check_gradient(lambda x: jnp.sum(x**2), lambda x: x * jnp.nan, v)
    assert json.loads(json.dumps(report.to_dict()))["leaves"][0]["got"] == "nan"


def test_kink_takes_any_slope_between_and_none_outside():
    x = jnp.array([-1.0, 0.0, 2.0])

    def check(slope):  # an argument: the programs are the same for all
        return fnn.check_gradient(
            lambda x, s: jax.nn.relu(x).sum(),
            lambda x, s: jnp.where(x > 0, 1.0, jnp.where(x == 0, s, 0.0)),
            x,
            jnp.asarray(slope, x.dtype),
        )

    for slope in (0.0, 0.3, 1.0):
        assert check(slope)
    note = str(check(0.5))
    assert "at a kink" in note and "autodiff and yours chose 0 and 0.5, both valid" in note
    for slope in (-0.1, 1.1):
        assert not check(slope)


def test_tie_may_go_to_either_but_not_to_both():
    tie = jnp.array([2.0, 2.0, 1.0])
    assert fnn.check_gradient(jnp.max, lambda x: jax.nn.one_hot(jnp.argmax(x), 3, dtype=x.dtype), tie)
    assert not fnn.check_gradient(jnp.max, lambda x: (x == x.max()).astype(x.dtype), tie)


def test_autodiff_at_fault_is_said_and_the_gradient_judged_by_differences():
    def f(x):
        return jnp.sum(jnp.where(x > 0, jnp.sqrt(x), 0.0))

    def right(x):
        return jnp.where(x > 0, 0.5 / jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)

    x = jnp.array([0.0, -1.0, 4.0])[1:]
    assert np.isnan(jax.grad(f)(x)).any()
    assert fnn.check_gradient(f, right, x)
    assert not fnn.check_gradient(f, lambda x: right(x) + jnp.where(x > 0, 0.0, 0.1), x)


def test_rule_that_f_carries_is_not_its_own_judge():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, bar: (bar * 2 * x**2,))

    def f(x):
        return cube(x).sum()

    report = fnn.check_gradient(f, jax.grad(f), v)
    assert not report and "past the custom rule that f carries" in str(report) and "2/3" in str(report)
    assert not fnn.check_rule(cube, v)


def test_rule_that_f_carries_does_not_excuse_lost_digits():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, bar: (bar * ((1000 + x) ** 2 - 1e6 - x**2) / 1000,))

    def f(x):
        return square(x).sum()

    x = jnp.array([0.3, 1.7], jnp.float32)
    report = fnn.check_gradient(f, jax.grad(f), x)
    assert not report and report.leaves[0].verdict == "WRONG: loses digits", report
    assert fnn.check_gradient(f, lambda x: 2 * x, x)


@pytest.mark.parametrize("file", (__file__, str(Path(jax.__file__).parent) + "opt/rules.py"))
def test_users_tangent_rule_is_passed_over_and_jaxs_own_are_not(file):
    """A user's too, where the name of the folder only begins like that of JAX."""
    names: dict[str, Any] = {}
    exec(compile("def square(x): return x * x", file, "exec"), names)
    square = jax.custom_jvp(names["square"])
    square.defjvps(lambda x_dot, out, x: x_dot * jnp.where(x == 2, 7.0, 2 * x))

    def f(x):
        return square(x).sum() + jax.nn.relu(x).sum()

    x = jnp.array([2.0, 1.7])
    report = fnn.check_gradient(f, jax.grad(f), x)
    assert not report and report.leaves[0].expected == 5.0, report
    assert fnn.check_gradient(f, lambda x: 2 * x + jnp.heaviside(x, 0.0), jnp.array([0.0, 1.5]))


def test_rule_of_jaxs_is_doubted_where_differences_do_not_confirm_it():
    def cofactors(A):
        return jnp.stack([jnp.cross(A[1], A[2]), jnp.cross(A[2], A[0]), jnp.cross(A[0], A[1])])

    det, A = jnp.linalg.det, jnp.diag(jnp.array([1.0, 0.0, 3.0]))
    assert fnn.check_gradient(det, cofactors, A)
    if jax.grad(det)(A)[1, 1] == 0:  # as in jax 0.10 to 0.12; the cofactor is 3
        report = fnn.check_gradient(det, jax.grad(det), A)
        assert not report and report.leaves[0].expected == pytest.approx(3.0), report


def test_nan_is_wrong_where_there_is_a_slope_though_autodiff_has_nan_too():
    def sinc(x):
        return jnp.where(x != 0, jnp.sin(x) / x, 1.0)

    report = fnn.check_gradient(sinc, jax.grad(sinc), jnp.array(0.0))
    assert np.isnan(jax.grad(sinc)(0.0)) and not report and report.leaves[0].expected == 0.0, report
    right = fnn.check_gradient(sinc, lambda x: jnp.where(x != 0, jax.grad(sinc)(x), 0.0), jnp.array(0.0))
    assert right and right.leaves[0].verdict == "right; autodiff is at fault", right
    assert not fnn.check_gradient(jnp.linalg.norm, jax.grad(jnp.linalg.norm), jnp.zeros(3))
    assert fnn.check_gradient(jnp.linalg.norm, lambda x: x / jnp.linalg.norm(x), v), "NaN at zeros is f's own"


def test_loop_that_ends_at_its_own_time_for_every_entry():
    def halved(x):
        return jax.lax.while_loop(lambda x: x > 1, lambda x: x / 2, x)

    def f(x):
        return jnp.sum(jax.vmap(halved)(x) ** 2)

    def right(x):
        small = jax.vmap(halved)(x)
        return jnp.where(x > 0, 2 * small * small / jnp.where(x > 0, x, 1.0), 2 * small)

    x = jnp.array([0.7, 3.0, 20.0])
    assert fnn.check_gradient(f, right, x)
    assert not fnn.check_gradient(f, lambda x: 1.001 * right(x), x)


def test_tangent_at_a_kink_takes_any_slope_between_and_none_outside():
    def jvp_of_maximum(share):
        def jvp(primals, tangents):
            (x, y), (x_dot, y_dot) = primals, tangents
            tie = share * x_dot + (1 - share) * y_dot
            return jnp.maximum(x, y), jnp.where(x > y, x_dot, jnp.where(x < y, y_dot, tie))

        return jvp

    primals = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 1.0, 5.0])
    for share, is_right in ((0.0, True), (0.3, True), (1.0, True), (1.5, False), (-0.5, False)):
        assert bool(fnn.check_jvp(jnp.maximum, jvp_of_maximum(share), primals)) == is_right, share


def test_tie_of_two_arguments_takes_a_share_of_each_and_no_more():
    x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 1.0, 5.0])
    for share, is_right in ((0.0, True), (0.3, True), (1.0, True), (1.2, False), (-0.2, False)):
        got = lambda x, y, s: jnp.where(x > y, 1.0, jnp.where(x == y, s, 0.0))  # noqa: E731
        f = lambda x, y, s: jnp.maximum(x, y).sum()  # noqa: E731
        report = fnn.check_gradient(f, got, x, y, jnp.asarray(share, x.dtype))
        assert bool(report) == is_right, share


@pytest.fixture(params=[0, np.inf], ids=["by projection elsewhere", "entry by entry"])
def large(request, monkeypatch):
    """Every question is treated as a large one."""
    monkeypatch.setattr("fnn.truth.BUDGET", 0)
    monkeypatch.setattr("fnn.large.ALL_POINTS", request.param)


@pytest.mark.parametrize("name", [*thinned(WRONG, 128), *thinned(RIGHT, 28)])
def test_large_gradients_get_the_same_verdict(name, large):
    assert bool(judge((WRONG | RIGHT)[name]())) == (name in RIGHT)


def test_large_gradient_wrong_elsewhere_or_of_other_data_is_caught(large):
    assert fnn.check_gradient(squares, gradient, W, X, y)
    here = np.asarray(W)
    elsewhere = lambda W, X, y: gradient(W, X, y) * jnp.where((W != here).any(), 1.001, 1.0)  # noqa: E731
    assert not fnn.check_gradient(squares, elsewhere, W, X, y)
    given = X
    captured = fnn.check_gradient(squares, lambda W, X, y: gradient(W, given, y), W, X, y)
    assert not captured and "in reverse order" in captured.diagnoses[0], captured
    one = fnn.check_gradient(squares, lambda W, X, y: gradient(W, X, y).at[1, 2].multiply(1.001), W, X, y)
    assert not one and one.leaves[0].index == (1, 2), one


def test_millions_of_entries_are_judged_where_they_are():
    x = jnp.asarray(rng.standard_normal(3_000_000), jnp.float32)
    f = lambda x: jnp.sum((x + 2) * x)  # noqa: E731
    right = lambda x: 2 * x + 2  # noqa: E731
    report = fnn.check_gradient(f, right, x)
    assert report and "large: elsewhere judged by one random projection" in report.notes, report
    wrong = fnn.check_gradient(f, lambda x: right(x).at[777_777].add(1e-3), x)
    assert not wrong and wrong.leaves[0].index == (777_777,), wrong


def test_arguments_are_named_in_any_order():
    f = lambda a, b: jnp.sum(a) * jnp.sum(b**2)  # noqa: E731
    of_a, of_b = lambda a, b: jnp.full_like(a, (b**2).sum()), lambda a, b: 2 * a.sum() * b  # noqa: E731
    args = v[:3], v[:2] + 1
    assert fnn.check_gradient(f, lambda a, b: (of_b(a, b), of_a(a, b)), *args, argnums=(1, 0))
    assert not fnn.check_gradient(f, lambda a, b: (of_a(a, b), of_b(a, b)), *args, argnums=(1, 0))
    assert not fnn.check_gradient(f, lambda a, b: (2 * of_b(a, b), of_a(a, b)), *args, argnums=(-1, 0))
    with pytest.raises(ValueError, match=r"argnums=\(0, 0\) names an argument twice"):
        fnn.check_gradient(f, lambda a, b: (of_a(a, b), of_a(a, b)), *args, argnums=(0, 0))


def test_numpy_functions_have_kinks_and_a_precision_of_their_own():
    relu = lambda w: float(np.maximum(w, 0).sum())  # noqa: E731
    w = np.array([0.0, 1.0, -1.0])
    assert fnn.check_gradient(relu, lambda w: (w >= 0) * 1.0, w)
    assert not fnn.check_gradient(relu, lambda w: (w >= 0) + 1.0 * (w == 0), w)
    single = lambda w: float(np.sum(np.sin(w.astype(np.float32)) ** 2))  # noqa: E731
    w = np.array([0.3, 1.2, -0.4])
    assert fnn.check_gradient(single, lambda w: np.sin(2 * w), w)
    assert not fnn.check_gradient(single, lambda w: 1.01 * np.sin(2 * w), w)


def test_gradient_may_be_more_exact_than_the_function():
    f = lambda w, X: jnp.mean((X.astype("float16") @ w.astype("float16")).astype("float32") ** 2)  # noqa: E731
    args = v.astype("float32")[:3], X.astype("float32")
    assert fnn.check_gradient(f, lambda w, X: 2 * X.T @ (X @ w) / len(X), *args)
    assert not fnn.check_gradient(f, lambda w, X: 3 * X.T @ (X @ w) / len(X), *args)


def test_infinite_slope_on_both_sides_is_nobodys_mistake():
    f = lambda x: jnp.cbrt(x).sum()  # noqa: E731
    assert fnn.check_gradient(f, jax.grad(f), jnp.array([0.0, 1.0, 8.0]))


def test_gradient_right_for_positive_numbers_only_is_caught():
    for seed in range(5):
        wrong = fnn.check_gradient(jax.nn.softplus, lambda x: jax.nn.sigmoid(abs(x)), 3.0, seed=seed)
        assert not wrong, seed


def test_table_made_at_the_first_call_is_no_hidden_state():
    table: list[Any] = []

    def right(x):
        if not table:
            table.append(np.arange(3.0))
            return 2 * x * jnp.arange(3.0)
        return 2 * x * table[0]

    x = jnp.array([1.0, 2.0, 3.0])
    assert fnn.check_gradient(lambda x: jnp.sum(jnp.arange(3.0) * x**2), right, x)


def test_what_is_no_array_has_no_gradient():
    p = {"W": v, "b": None}
    f = lambda p: jnp.sum(p["W"] ** 2)  # noqa: E731
    assert fnn.check_gradient(f, lambda p: {"W": 2 * p["W"], "b": None}, p)
    report = fnn.check_gradient(f, lambda p: {"W": 2 * p["W"], "b": 7.0}, p)
    assert not report and "needs no gradient" in report.contract[0]


def test_numpy_functions_are_judged_by_differences():
    def f(x):
        return float(np.sum(np.asarray(x) ** 3))

    x = np.array([-1.5, 0.5, 2.0])
    report = fnn.check_gradient(f, lambda x: 3 * x**2, x)
    assert report and "differences of f" in report.judge, report
    assert not fnn.check_gradient(f, lambda x: 3.001 * x**2, x)


def test_arguments_of_any_kind_pass_through():
    args = ({"W": W, "none": None, "name": "tanh"}, jnp.tanh, jnp.arange(3), jax.random.key(0), 0.5)

    def f(p, function, index, key, scale):
        return scale * function(p["W"][:, index]).sum() + 0 * jax.random.normal(key)

    def right(p, function, index, key, scale):
        slope = scale * (1 - jnp.tanh(p["W"][:, index]) ** 2)
        return {"W": jnp.zeros_like(p["W"]).at[:, index].add(slope), "none": None, "name": None}

    assert fnn.check_gradient(f, right, *args)


def test_wrong_batch_size_is_named():
    report = fnn.check_gradient(
        squares, lambda W, X, y: 2 * (X @ W.T - y).T @ X / 8, W, X, y, batch_axes=(None, 0, 0)
    )
    assert not report and "right for a batch of 8 and wrong for one of 1" in report.diagnoses


def test_a_thousand_entries_do_not_hide_a_wrong_sign():
    x = jnp.asarray(rng.standard_normal(1000), jnp.float32)
    assert not fnn.check_gradient(lambda x: jnp.sum(jnp.sin(x)), lambda x: jnp.cos(x).at[500].multiply(-1), x)


def test_relative_error_of_1e_4_in_float32_does_not_pass():
    x = v.astype(jnp.float32)
    assert not fnn.check_gradient(lambda x: jnp.sum(jnp.sin(x)), lambda x: jnp.cos(x) * (1 + 1e-4), x)


def test_integers_as_a_gradient_are_a_breach_of_contract():
    report = fnn.check_gradient(
        lambda x: jnp.sum(2 * x), lambda x: jnp.full(x.shape, 2, jnp.int32), v.astype(jnp.float32)
    )
    assert report.contract == ("argument 0 needs dtype float32, got int32",)


def test_jvp_is_judged_with_its_output():
    def right(primals, tangents):
        return jnp.sin(primals[0]), jnp.cos(primals[0]) * tangents[0]

    assert fnn.check_jvp(jnp.sin, right, (v,))
    assert not fnn.check_jvp(jnp.sin, lambda p, t: (right(p, t)[0], 1.001 * right(p, t)[1]), (v,))
    report = fnn.check_jvp(jnp.sin, lambda p, t: (jnp.cos(p[0]), right(p, t)[1]), (v,))
    assert not report and "not f's output" in str(report)


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda: fnn.check_gradient(lambda x: x, lambda x: x, v), ValueError, r"return a scalar, got shape \(3,\)"),
        (lambda: fnn.check_gradient(lambda x: 1, lambda x: x, v), TypeError, "return a float"),
        (lambda: fnn.check_gradient(jnp.sum, lambda x: x, np.ones(3) * 1j), TypeError, "complex"),
        (lambda: fnn.check_gradient(jnp.sum, lambda x: x, jnp.zeros((0, 3))), ValueError, r"empty array, \(0, 3\)"),
        (lambda: fnn.check_gradient(jnp.sum, lambda x: x, jnp.arange(3)), TypeError, "no float arrays"),
        (lambda: fnn.check_gradient(jnp.sum, lambda x: x, v, argnums=1), ValueError, "argnums=1, but there are 1"),
        (lambda: fnn.check_gradient(jnp.sum, lambda x: x), ValueError, "there are 0 arguments"),
        (lambda: fnn.check_gradient(3.0, lambda x: x, v), TypeError, "f needs to be a function, got float"),
        (lambda: fnn.check_gradient(jnp.sum, None, v), TypeError, "gradient needs to be a function"),
        (lambda: fnn.check_gradient(lambda x: jnp.sum(x) / 0, jnp.ones_like, v), ValueError, "f is inf"),
        (lambda: fnn.check_gradient(squares, gradient, W, X, y, batch_axes=(None, 0)), ValueError, "each of 3"),
        (lambda: fnn.check_rule(jnp.sin, v), TypeError, "needs a rule or a pair"),
        (lambda: fnn.check_rule(fnn.relu), TypeError, "the rule's arguments too"),
        (lambda: fnn.check_rule((lambda x: (jnp.argmax(x), None), lambda r, b: (b,)), v), TypeError, "no floats"),
        (lambda: fnn.check_jvp(jnp.sin, lambda p, t: p, v), TypeError, "primals needs to be a tuple"),
        (lambda: fnn.check_jvp(jnp.sin, lambda p, t: p, (v,), (v, v)), TypeError, "structure of primals"),
    ),
)  # fmt: skip
def test_ill_posed_question_is_refused(no_shape_annotations, call, error, message):
    with pytest.raises(error, match=message):
        call()


# With Hypothesis and pytest, and from the shell.


@settings(max_examples=10, deadline=None)
@given(strategies.arrays())
def test_a_rule_over_shapes_dtypes_and_values_in_one_line(x):
    fnn.check_rule(fnn.silu, x).raise_if_wrong()


@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # the run-time type checks do
@settings(max_examples=5, deadline=None)
@given(strategies.networks())
def test_whole_networks_are_drawn(case):
    cost, params, X, y = case
    fnn.check_gradient(cost, lambda *args: fnn.value_and_grad(cost)(*args)[1], params, X, y).raise_if_wrong()


@settings(max_examples=20, deadline=None)
@given(strategies.pytrees(), strategies.arrays((3,), "float32", positive=True))
def test_drawn_numbers_lie_on_no_kink(tree, positive):
    for leaf in map(np.asarray, jax.tree.leaves(tree)):
        assert (leaf != 0).all() and (abs(leaf) != 1).all() and (abs(leaf) < 4.1).all()
    assert (np.asarray(positive) > 0).all()


def test_failing_check_in_pytest_shows_the_report_once(tmp_path):
    (tmp_path / "test_wrong.py").write_text(
        "import fnn, jax.numpy as jnp\n"
        "def test_it():\n"
        "    fnn.check_gradient(jnp.sum, lambda x: 2 * jnp.ones_like(x), jnp.ones(3)).raise_if_wrong()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_wrong.py"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=_environment(), timeout=120
    )
    assert result.returncode == 1
    # Where CI is set, pytest repeats every message, uncut, in its summary of failures.
    traceback = result.stdout.partition("short test summary")[0]
    assert traceback.count("diagnosis: off by a constant factor of 2") == 1, result.stdout
    assert "site-packages" not in traceback and "report.py" not in traceback.replace("fnn/report.py:", "")


def _environment():
    import os

    root = str(Path(package.__file__).parent.parent)
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}  # no xdist, nothing slow to import
    return os.environ | plain | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def test_shell_prints_the_report_and_exits_by_it(capsys, tmp_path):
    assert main(["check", "jax.numpy:sin", "jax.numpy:cos", "--shapes", "()"]) == 0
    assert "right" in capsys.readouterr().out
    assert main(["check", "jax.numpy:sin", "jax.numpy:sin", "--shapes", "()", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["right"] is False
    file = tmp_path / "mine.py"
    file.write_text("import jax.numpy as jnp\nf = jnp.sum\ngradient = jnp.ones_like\nargs = jnp.ones(3)\n")
    assert main(["check", str(file)]) == 0
    capsys.readouterr()
    for bad in (
        ["jax.numpy:sin"],
        ["jax.numpy:sin", "jax.numpy:cos"],
        ["jax.numpy:no", "jax.numpy:cos", "--shapes", "3"],
    ):
        assert main(["check", *bad]) == 2
        assert capsys.readouterr().err.startswith("fnn check: ")


def test_partial_functions_and_jitted_ones_are_functions():
    assert fnn.check_gradient(jax.jit(squares), jax.jit(gradient), W, X, y)
    assert fnn.check_gradient(partial(squares, X=X, y=y), partial(gradient, X=X, y=y), W)


def test_a_bar_is_shown_to_who_waits_and_to_no_other(monkeypatch, capsys):
    from fnn.progress import late_bar

    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal
    with late_bar(after=60.0) as tell:
        tell("differences of f", 1, 9)
    assert "differences" not in capsys.readouterr().err
    with late_bar(after=0.0) as tell:
        tell("differences of f", 1, 9)
        tell("differences of f", 7, 9)
    assert "differences of f" in capsys.readouterr().err
