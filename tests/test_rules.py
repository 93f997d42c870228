"""One property for every rule: the formula, the contract, autodiff, adjointness, differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fnn
from tests.properties import check_rule
from tests.strategies import DTYPES, Architecture, architectures, network_case, rules

RULES = rules(fnn)
# Every shape is compiled once for both.
SEEDS = st.tuples(*[st.integers(0, 2**32 - 1)] * 2)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=4, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), seeds=SEEDS)
def test_rule_is_its_formula_and_its_pullback_autodiffs(name, data, dtype, seeds):
    size = data.draw(st.sampled_from(RULES[name].sizes))
    assert all(check_rule(RULES[name], size, dtype, seed) for seed in seeds)


@settings(max_examples=8, deadline=None)
@given(arch=architectures(), dtype=st.sampled_from(DTYPES), seeds=SEEDS)
def test_cost_of_any_network_is_its_formula_and_its_pullback_autodiffs(arch, dtype, seeds):
    case = network_case(fnn, arch)
    judged = [check_rule(case, None, dtype, seed, instances=4) for seed in seeds]
    assume(any(judged))


def test_value_and_grad_reads_like_jax():
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.half_squared_error)
    params, X, y = network_case(fnn, Architecture(widths=(3, 5, 4, 2), N=6)).draw_one()
    numbers = (0, 1, -1, -3, (0, 1), (2,))

    def all_of(value_and_grad):
        return jax.jit(lambda *primals: [value_and_grad(cost, argnums)(*primals) for argnums in numbers])

    pairs = (all_of(f)(params, X, y) for f in (fnn.value_and_grad, jax.value_and_grad))
    for ours, theirs in zip(*pairs, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)


def test_value_and_grad_takes_sample_weight_by_name():
    cost = fnn.cost(fnn.mlp([]), fnn.squared_error)
    params, X, y = fnn.init(jax.random.key(0), (3, 2)), jnp.ones((4, 3)), jnp.zeros((4, 2))
    w = jnp.array([0.5, 1.0, 2.0, 0.0])
    both = jax.jit(fnn.value_and_grad(cost))
    by_name, by_place = both(params, X, y, sample_weight=w), both(params, X, y, w)
    assert jax.tree.all(jax.tree.map(np.array_equal, by_name, by_place))


def test_rule_passes_named_arguments_to_its_forward():
    power = fnn.Rule(lambda x, n=2: (x**n, x), lambda x, y_bar: (y_bar * 2 * x,))
    assert power(3.0) == 9.0 and power(3.0, n=3) == 27.0


def test_rule_shows_its_name_and_its_forward_docstring():
    assert repr(fnn.relu) == "relu" and repr(fnn.leaky_relu(0.2)) == "leaky_relu(0.2)"
    assert "max(0, z)" in str(fnn.relu.__doc__)
    assert "slope·z below" in str(fnn.leaky_relu(0.2).__doc__)
    assert "huber_loss(1.0)" in repr(fnn.cost(fnn.mlp(fnn.relu), fnn.huber_loss(1.0)))


def test_rule_of_another_callable_shows_its_parameters_or_its_class():
    def scaled_forward(scale, shift, x):
        return scale * x + shift, None

    class Cube:
        def __call__(self, x):
            return x**3, x

    assert repr(fnn.Rule(partial(scaled_forward, 2, 0.5), lambda _, y_bar: (2 * y_bar,))) == "scaled(2, 0.5)"
    assert repr(fnn.Rule(Cube(), lambda x, y_bar: (y_bar * 3 * x**2,))) == "Cube"


def test_forward_whose_arguments_python_cannot_tell_is_accepted():
    rule = fnn.Rule(max, min)  # written in C, without a signature
    assert fnn.mlp(rule).hidden is rule


def test_equal_arguments_give_equal_rules_so_that_jit_compiles_once():
    assert fnn.leaky_relu(0.01) == fnn.leaky_relu() and fnn.elu(2) == fnn.elu(2.0)
    assert fnn.elu() == fnn.elu(1.0) and fnn.huber_loss() == fnn.huber_loss(1.0)
    assert fnn.leaky_relu(0.01) != fnn.leaky_relu(0.02)
    first = fnn.cost(fnn.mlp([fnn.tanh, fnn.elu(0.5)]), fnn.huber_loss(2.0), l2=0.1)
    second = fnn.cost(fnn.mlp([fnn.tanh, fnn.elu(0.5)]), fnn.huber_loss(2.0), l2=0.1)
    assert first == second and hash(first) == hash(second)
    assert first != fnn.cost(fnn.mlp([fnn.tanh, fnn.elu(0.5)]), fnn.huber_loss(2.0), l2=0.2)
