"""Values and slopes of the activations, and of the losses on logits, against 60 digits, to the last bit.

Every finite number of the 16-bit dtypes is asked; of float32 and float64 numbers of every exponent and those
near what is special. What lies below the smallest normal number of float32 or float64 (bfloat16's is
float32's) is set apart: hardware rounds it to 0, and an input there is 0 to it.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import pytest

import fnn
from experiments.exact import (
    ACTIVATIONS,
    exactly,
    finite_numbers,
    nearest,
    sigmoid_binary_cross_entropy,
    softmax_cross_entropy,
    ulps,
    unit,
)
from tests import correctly_rounded
from tests.strategies import named

NAMES = list(ACTIVATIONS)
NARROW = correctly_rounded.DTYPES
WIDE = {"float32": np.float32, "float64": np.float64}
WHAT = ("value", "slope")


@cache
def compiled():
    """Value and slope of all activations at once."""

    def value_and_slope(rule, z):
        a, residuals = rule.forward(z)
        return a, rule.pullback(residuals, jnp.ones_like(a))[0]

    return jax.jit(lambda z: {name: value_and_slope(named(fnn, name), z) for name in NAMES})


@cache
def computed(dtype_name):
    """At every finite number of a 16-bit dtype."""
    inputs = finite_numbers(NARROW[dtype_name])
    return {key: [np.asarray(x) for x in pair] for key, pair in compiled()(jnp.asarray(inputs)).items()}


def smallest_normal(dtype):
    return float(ml_dtypes.finfo(dtype).smallest_normal)


def exact(name, what, z):
    return getattr(ACTIVATIONS[name], what)(exactly(z))


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype_name", NARROW)
def test_every_16_bit_number_gives_the_correctly_rounded_result(dtype_name, name, what):
    """Or its neighbour, where the truth is all but half way between the two: float32's own error, at most
    4 units of a 2⁻¹³th, decides there. Float16's subnormal numbers are asked like all others."""
    dtype = NARROW[dtype_name]
    inputs, right = finite_numbers(dtype), correctly_rounded.load(dtype_name, name, what)
    ours, tiny = computed(dtype_name)[name][WHAT.index(what)], smallest_normal(dtype)
    assert len(ours) == {"float16": 63_488, "bfloat16": 65_280}[dtype_name]
    differ = np.flatnonzero(ours.astype(float) != right.astype(float))
    misrounded = 0
    for i in differ:
        z, mine, wanted = float(inputs[i]), float(ours[i]), float(right[i])
        if dtype_name == "bfloat16" and abs(z) < tiny:  # taken for 0
            assert abs(mine - nearest(exact(name, what, 0.0), dtype)) <= tiny, z
        elif dtype_name == "bfloat16" and abs(wanted) <= tiny:  # it, or a term of it, is rounded to 0
            assert abs(mine - wanted) <= tiny, z
        else:
            assert ulps(mine, exact(name, what, z), dtype) < 0.5 + 4 * 2**-13, z
            misrounded += 1
    assert misrounded <= 500


@pytest.mark.parametrize("name", NAMES)
def test_table_of_correctly_rounded_numbers_is_what_60_digits_give(name):
    rng = np.random.default_rng(0)
    for dtype_name, dtype in NARROW.items():
        inputs = finite_numbers(dtype)
        ordinary = np.flatnonzero((abs(inputs.astype(float)) > 1e-3) & (abs(inputs.astype(float)) < 100))
        for what in WHAT:
            table = correctly_rounded.load(dtype_name, name, what)
            for i in np.concatenate([rng.integers(0, len(inputs), 20), rng.choice(ordinary, 40)]):
                assert float(table[i]) == nearest(exact(name, what, inputs[i]), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_exact_slope_is_the_derivative_of_the_exact_value(name):
    """By differences in 60 digits; the values are the definitions'."""
    value, slope, *_ = ACTIVATIONS[name]
    for z in (-30.5, -6.0, -1.3, -0.75, -0.01, 0.02, 1.25, 9.0):
        difference = mpmath.diff(value, mpmath.mpf(z))
        assert abs(difference - slope(mpmath.mpf(z))) <= mpmath.mpf(10) ** -25 * abs(difference)
    for limits, f in ((ACTIVATIONS[name].limits, value), (ACTIVATIONS[name].slope_limits, slope)):
        for limit, far in zip(limits, (-1e6, 1e6), strict=True):
            number = f(mpmath.mpf(far))
            assert abs(number) > 1e3 if math.isinf(limit) else abs(number - limit) < 1e-30


def special_numbers(dtype):
    """Numbers of every exponent and sign, and more near kinks, roots, saturation, underflow and overflow."""
    rng, info = np.random.default_rng(0), np.finfo(dtype)
    exponents = np.arange(info.minexp, info.maxexp)
    mantissas = np.concatenate([[np.ones(len(exponents))], rng.uniform(1, 2, (1, len(exponents)))])
    numbers = [(mantissas.astype(dtype) * np.ldexp(dtype(1), exponents).astype(dtype)).ravel()]
    numbers += [[0.0, info.max, info.tiny, np.nextafter(info.tiny, dtype(1))]]
    # Where exponentials saturate and underflow: ±40, ±88, ±104, ±710 and what lies between.
    for center in (10, 17, 37, 40, 88, 92, 104, 710, 716, 13.1, 38.5):
        numbers.append(center + rng.uniform(-1, 1, 20) * center / 40)
    numbers += [rng.uniform(0, 8, 600)]
    for root in (1.2784645427610738, 0.7517915246935645, 0.7524614220710163):  # of three slopes
        step = np.exp(rng.uniform(np.log(info.eps), np.log(0.5), 60)) * rng.choice([-1, 1], 60)
        numbers += [root * (1 + step), [root], np.nextafter(dtype(root), dtype([0, 2]))]
    positive = np.concatenate([np.asarray(x, dtype) for x in numbers])
    return np.unique(np.concatenate([positive, -positive]))


def surely_within_4_ulp(ours, truths, dtype):
    """Most of what is, found by arithmetic that is a hundred times as fast as that of 60 digits.

    Rounding the truth to float64 loses half an ulp, and where it becomes a power of 2 its own ulp may be half
    of the spacing there: 2 · 1.5 + 0.5 < 4.
    """
    rounded = np.array([float(truth) for truth in truths])
    with np.errstate(over="ignore", invalid="ignore"):  # at infinity, which is not sure
        spacing = np.spacing(np.abs(rounded).astype(dtype)).astype(float)
        near = np.abs(ours.astype(float) - rounded) <= 1.5 * spacing
    return near & (np.abs(rounded) >= 2 * smallest_normal(dtype))


@pytest.mark.parametrize("dtype_name", WIDE)
def test_32_and_64_bit_numbers_give_results_within_4_ulp(dtype_name):
    dtype = WIDE[dtype_name]
    inputs, tiny = special_numbers(dtype), smallest_normal(dtype)
    results, exact_inputs = compiled()(jnp.asarray(inputs)), [exactly(z) for z in inputs]
    for name in NAMES:
        for what, ours in zip(WHAT, map(np.asarray, results[name]), strict=True):
            truths = [getattr(ACTIVATIONS[name], what)(z) for z in exact_inputs]
            for i in np.flatnonzero(~surely_within_4_ulp(ours, truths, dtype)):
                truth, mine, z = truths[i], ours[i], inputs[i]
                if abs(truth) < tiny:  # or a term of it, are rounded to 0
                    assert abs(exactly(mine) - truth) <= tiny, (name, what, z)
                else:
                    assert ulps(mine, truth, dtype) <= 4, (name, what, z)


@pytest.mark.parametrize("dtype_name", [*WIDE, *NARROW])
def test_nan_gives_nan_and_infinity_the_limit(dtype_name):
    z = jnp.asarray([jnp.nan, -jnp.inf, jnp.inf], dtype_name)
    for name, results in compiled()(z).items():
        for limits, (nan, *ours) in zip(ACTIVATIONS[name][2:], np.asarray(results, float), strict=True):
            assert math.isnan(nan), name
            assert ours == [float(jnp.asarray(limit, dtype_name)) for limit in limits], name


def logits_and_labels(dtype, K):
    """Logits 1e-6 to 1e4 apart, around 0 and elsewhere, each with a label for every place and a soft one."""
    rng = np.random.default_rng(K)
    Z, Y = [], []
    for gap in 10.0 ** np.arange(-6, 5):
        for center in (0.0, 3.7, -120.0):
            z = center + gap * np.concatenate([[0], rng.permutation([1, *rng.uniform(-1, 1, K - 2)])])
            soft = rng.dirichlet(np.ones(K))
            for y in (np.eye(K)[0], np.eye(K)[K - 1], soft):
                Z.append(z)
                Y.append(y)
    Z.append(np.zeros(K))  # all equal
    Y.append(np.eye(K)[1])
    return np.array(Z).astype(dtype), np.array(Y).astype(dtype)


@pytest.mark.parametrize("K", (2, 10))
@pytest.mark.parametrize("dtype_name", [*WIDE, *NARROW])
def test_losses_on_logits_are_right_to_4_ulp_of_their_largest_term(dtype_name, K):
    """Small components of the gradient too: with a label of one class, every one to 4 ulp of itself.

    In 16 bits all of them to half a unit.
    """
    allowed = 4 if dtype_name in WIDE else 0.5 + 4 * 2**-13
    dtype = (WIDE | NARROW)[dtype_name]
    Z, Y = logits_and_labels(dtype, K)
    flushed = smallest_normal(dtype) if dtype_name != "float16" else 0  # float32 has its subnormal numbers

    @jax.jit
    def evaluate(Z, Y):
        results = []
        for loss, y in (
            (fnn.softmax_cross_entropy, Y),
            (fnn.softmax_cross_entropy_with_integer_labels, jnp.argmax(Y, axis=1)),
            (fnn.sigmoid_binary_cross_entropy, Y),
        ):
            C, residuals = loss.forward(Z, y)
            results.append((C, loss.pullback(residuals, jnp.ones_like(C))[0]))
        return results

    softmax, sigmoid = (
        [truth_of([exactly(v) for v in z], [exactly(v) for v in y]) for z, y in zip(Z, Y, strict=True)]
        for truth_of in (softmax_cross_entropy, sigmoid_binary_cross_entropy)
    )
    for i, ((C, gradient), truths) in enumerate(
        zip(evaluate(Z, Y), (softmax, softmax, sigmoid), strict=True)
    ):
        for z, y, truth, *ours in zip(Z, Y, truths, np.asarray(C), np.asarray(gradient), strict=True):
            if i == 1 and y.max() < 1:  # no class number
                continue
            numbers = (ours[0], *ours[1]), (truth.value, *truth.gradient), (truth.value, *truth.terms)
            for mine, right, term in zip(*numbers, strict=True):
                error = abs(exactly(mine) - right)
                assert error <= max(allowed * unit(term, dtype), flushed), (i, z, y)
