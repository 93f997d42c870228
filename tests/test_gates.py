"""Gates: every one by the property of all rules, and its Jacobian by the table of matrix calculus."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fnn as package
from tests.properties import check_rule
from tests.strategies import DTYPES, gate_cases

fnn: Any = package  # without types: wrong ones are tried too
gates = fnn.gates

GATES = gate_cases(fnn)


@pytest.mark.parametrize("name", GATES)
@settings(max_examples=3, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32 - 1))
def test_gate_is_its_formula_and_its_pullback_autodiffs(name, data, dtype, seed):
    assert check_rule(GATES[name], data.draw(st.sampled_from(GATES[name].sizes)), dtype, seed)


def test_every_gate_is_in_the_table():
    public = {name for name, value in vars(gates).items() if isinstance(value, package.Rule)}
    made = {"shift", "scale", "power"}  # by a function; `constant`, without inputs, has a test of its own
    assert public | made == {name.partition("(")[0] for name in GATES}


ones = np.ones(3)
x, y, z = np.array([2.0, -1.0, 0.5]), np.array([3.0, 4.0, -2.0]), np.array(-3.0)
# gate, its inputs, and its Jacobians as Parr & Howard's tables have them (§4.2 to §4.4)
TABLE = {
    "add": (gates.add, (x, y), (np.eye(3), np.eye(3))),
    "subtract": (gates.subtract, (x, y), (np.eye(3), -np.eye(3))),
    "multiply": (gates.multiply, (x, y), (np.diag(y), np.diag(x))),
    "divide": (gates.divide, (x, y), (np.diag(1 / y), np.diag(-x / y**2))),
    "maximum": (gates.maximum, (x, y), (np.diag([0.0, 0, 1]), np.diag([1.0, 1, 0]))),
    "add a scalar": (gates.add, (x, z), (np.eye(3), ones)),
    "subtract a scalar": (gates.subtract, (x, z), (np.eye(3), -ones)),
    "multiply by a scalar": (gates.multiply, (x, z), (z * np.eye(3), x)),
    "divide by a scalar": (gates.divide, (x, z), (np.eye(3) / z, -x / z**2)),
    "a scalar divided": (gates.divide, (z, x), (1 / x, np.diag(-z / x**2))),
    "sum": (gates.sum, (x,), (ones,)),
    "dot": (gates.dot, (x, y), (y, x)),
    "squared norm": (gates.squared_norm, (x,), (2 * x,)),
    "exp": (gates.exp, (x,), (np.diag(np.exp(x)),)),
}


@pytest.mark.parametrize("name", TABLE)
def test_jacobian_is_the_table_of_matrix_calculus_and_jaxs(name):
    gate, primals, jacobians = TABLE[name]
    argnums = tuple(range(len(primals)))

    @jax.jit
    def both(*primals):
        ours = [fnn.jacobian(gate, *primals, argnum=argnum) for argnum in argnums]
        return ours, jax.jacobian(gate, argnums=argnums)(*primals)

    for ours, jaxs, expected in zip(*both(*primals), jacobians, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-15)  # two roundings
        np.testing.assert_allclose(ours, jaxs, rtol=1e-15)


def test_tie_in_maximum_gives_half_to_each():
    value, residuals = gates.maximum.forward(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0]))
    x_bar, y_bar = gates.maximum.pullback(residuals, jnp.array([4.0, 4.0]))
    np.testing.assert_array_equal(x_bar, [2, 0])
    np.testing.assert_array_equal(y_bar, [2, 4])


def test_power_of_zero_is_flat_and_power_of_one_is_the_identity_at_zero():
    for n, slope in ((0, 0.0), (1, 1.0), (2, 0.0)):
        assert fnn.value_and_grad(gates.power(n))(0.0)[1] == slope


def test_constant_has_no_inputs():
    value, residuals = gates.constant(2.5).forward()
    assert value == 2.5 and gates.constant(2.5).pullback(residuals, jnp.ones(())) == ()


def test_matmul_takes_a_matrix_or_a_vector():
    W, X = jnp.arange(6.0).reshape(2, 3), jnp.arange(12.0).reshape(3, 4)
    for right in (X, X[:, 0]):
        out, vjp = jax.vjp(gates.matmul, W, right)
        ours = gates.matmul.pullback(gates.matmul.forward(W, right)[1], jnp.ones_like(out))
        for a, b in zip(ours, vjp(jnp.ones_like(out)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_number_takes_the_dtype_of_what_it_meets():
    half = jnp.ones(3, jnp.float16)
    assert gates.multiply(2.0, half).dtype == gates.add(half, 1).dtype == jnp.float16
    assert gates.shift(1.0)(half).dtype == gates.scale(0.1)(half).dtype == jnp.float16


def test_equal_numbers_make_equal_gates():
    assert gates.shift(1) == gates.shift(1.0) != gates.shift(2.0)
    assert repr(gates.power(3)) == "power(3.0)"


@pytest.mark.parametrize(
    "call, error, message",
    (
        (
            lambda: gates.add(ones, np.ones(4)),
            ValueError,
            r"gates\.add: needs equal shapes.*\(3,\) and \(4,\)",
        ),
        (
            lambda: gates.add(ones, np.ones(3, np.float32)),
            TypeError,
            r"one dtype, got float64 and float32; use",
        ),
        (lambda: gates.exp(np.arange(3)), TypeError, r"gates\.exp: needs floats, got int64 \(3,\); use"),
        (lambda: gates.log("x"), TypeError, r"gates\.log: needs floats, got 'x'"),
        (lambda: gates.exp(True), TypeError, r"gates\.exp: needs floats, got True"),
        (
            lambda: gates.matmul(np.ones((2, 3)), np.ones(2)),
            ValueError,
            r"\(2, 3\) and \(2,\); is the first tr",
        ),
        (lambda: gates.matmul(ones, ones), ValueError, r"got \(3,\) and \(3,\); for two vectors use dot"),
        (lambda: gates.dot(np.eye(3), ones), ValueError, r"two vectors \(n,\), got \(3, 3\) and \(3,\)"),
        (lambda: gates.shift(np.nan), ValueError, r"gates\.shift: c needs to be a finite number"),
        (lambda: gates.scale(ones), ValueError, r"gates\.scale: c needs to be a number, got an array"),
    ),
)
def test_wrong_input_is_refused(no_shape_annotations, call, error, message):
    with pytest.raises(error, match=message):
        call()
