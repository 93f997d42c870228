"""The step solves the damped system, lands on the minimum of a quadratic, and its work is counted."""

import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from experiments import newton_step
from experiments.newton_step import DAMPINGS, ITERATIONS, Point, Result, Step
from tests.strategies import drawn


@pytest.fixture(scope="module")
def problem():
    """A small network in float64, with a penalty."""
    rng = np.random.default_rng(0)
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels, l2=0.01)
    params = drawn(rng, (4, 5, 3))
    return cost, params, jnp.asarray(rng.standard_normal((30, 4))), jnp.asarray(rng.integers(0, 3, 30))


@pytest.fixture(scope="module")
def value_and_gradient(problem):
    """(params, X, y) -> cost and gradient by autodiff."""
    return jax.jit(jax.value_and_grad(problem[0]))


@pytest.fixture(scope="module")
def curvature(problem):
    """The Gauss–Newton matrix without damping."""
    cost, params, X, y = problem
    return matrix(newton_step.damped_product(cost, params, 0.0, X, y), params)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


def matrix(product, params) -> np.ndarray:
    """The matrix of a linear map of parameters, column by column."""
    vector, unravel = jax.flatten_util.ravel_pytree(params)
    columns = jax.jit(jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0]))
    return np.asarray(columns(np.eye(vector.size)))


@pytest.mark.parametrize("damping", (1e-2, 1.0))
def test_step_solves_the_damped_system(problem, value_and_gradient, curvature, damping):
    cost, params, X, y = problem
    after, step = newton_step.newton_step(cost, params, damping, 500, X, y)
    (C, gradient), G = value_and_gradient(params, X, y), curvature
    gradient = flat(gradient)
    d = np.linalg.solve(G + damping * np.eye(len(G)), gradient)
    moved = flat(params) - flat(after)
    # Conjugate gradients stop at a residual of 1e-10, and the condition is below 1e4.
    np.testing.assert_allclose(moved, d, atol=1e-6 * np.abs(d).max())
    assert step.residual <= newton_step.TOLERANCE
    np.testing.assert_allclose(step.length, np.linalg.norm(d), rtol=1e-6)
    np.testing.assert_allclose(step.predicted, C - gradient @ d + d @ G @ d / 2, rtol=1e-9)
    np.testing.assert_allclose(step.cost, value_and_gradient(after, X, y)[0], rtol=1e-12)


def test_residual_tells_a_step_that_has_not_converged(problem):
    cost, params, X, y = problem
    residuals = [float(newton_step.newton_step(cost, params, 1e-2, i, X, y)[1].residual) for i in (1, 8, 500)]
    assert residuals[0] > 0.1 > residuals[1] > 1e-6 > residuals[2]


def test_first_iteration_goes_along_the_gradient_as_far_as_the_model_falls(
    problem, value_and_gradient, curvature
):
    cost, params, X, y = problem
    after, _ = newton_step.newton_step(cost, params, 0.1, 1, X, y)
    gradient = flat(value_and_gradient(params, X, y)[1])
    length = gradient @ gradient / (gradient @ curvature @ gradient + 0.1 * gradient @ gradient)
    np.testing.assert_allclose(flat(params) - flat(after), length * gradient, rtol=1e-9)


def test_undamped_step_lands_on_the_minimum_of_a_quadratic_cost():
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((20, 3)), rng.standard_normal((2, 3))
    cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    params = drawn(rng, (3, 2))
    (layer,), step = newton_step.newton_step(cost, params, 0.0, 100, X, X @ W.T + 1)
    np.testing.assert_allclose(layer.W, W, atol=1e-8)
    np.testing.assert_allclose(layer.b, 1, atol=1e-8)
    assert abs(step.cost) < 1e-15 and abs(step.predicted) < 1e-13


def test_descent_is_that_of_a_plain_loop(problem, value_and_gradient):
    cost, params, X, y = problem
    after, costs = newton_step.descend(cost, optax.sgd, jnp.array([0.1, 0.5]), params, X, y, 5)
    after = jax.device_get(after)
    for run, rate in enumerate((0.1, 0.5)):
        weights, expected = params, []
        for _ in range(5):
            C, gradient = jax.device_get(value_and_gradient(weights, X, y))
            expected.append(C)
            weights = jax.tree.map(lambda w, g, rate=rate: w - rate * g, weights, gradient)
        expected.append(value_and_gradient(weights, X, y)[0])
        np.testing.assert_allclose(costs[run], expected, rtol=1e-12)
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda a, run=run: a[run], after)), flat(weights), rtol=1e-10
        )


def test_flops_of_a_matrix_product_are_two_for_each_pair():
    A, B = jnp.ones((30, 40)), jnp.ones((40, 50))
    assert newton_step.flops(lambda A, B: A @ B, A, B) == pytest.approx(2 * 30 * 40 * 50, rel=0.01)


def made_up() -> Result:
    """A point at cost 1, where μ = DAMPINGS[1] reaches 0.52 with i = 4 and 0.5 with i = 32."""
    costs = np.full((len(DAMPINGS), len(ITERATIONS)), 0.9)
    costs[0] = np.nan  # diverged
    costs[1] = np.linspace(0.8, 0.5, len(ITERATIONS))
    costs[1, 2] = 0.52
    step = Step(costs, np.full_like(costs, 0.2), np.full_like(costs, 0.01), np.ones_like(costs))
    falling = np.array([[1, 0.9, 0.6, 0.51, 0.4], [1, 0.5, np.nan, np.nan, np.nan]])
    crawling = np.array([[1, 0.99, 0.98, 0.97, 0.96]])
    point = Point("at home", 1.0, step, {"gradient descent": falling, "Adam": crawling})
    return Result((point,), 100.0, 150.0)


def test_comparison_takes_the_cheapest_step_that_does_nearly_as_much():
    result = made_up()
    (point,) = result.points
    assert point.best() == (1, 2)
    assert result.work(4) == 1 + 5 * 1.5
    np.testing.assert_array_equal(point.least("gradient descent"), [1, 0.5, 0.6, 0.51, 0.4])
    np.testing.assert_allclose(point.ratios()[[1, 2]], [0.5 / 0.8, 0.1 / 0.8])
    best = newton_step.compared(result, point)
    assert best["needed"] == {"gradient descent": "1", "Adam": "more than 4"}
    assert best["same"] == {"gradient descent": 0.4, "Adam": 0.96}  # 8 gradients, and only 4 were taken
    figure = newton_step.draw(result)
    figure.draw_without_rendering()  # a layout that does not fit would warn
    assert "at home: cost 1 to 0.52, work 8.5; gradient descent 1, Adam more than 4" in figure.get_suptitle()
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes if axes.get_title())


@pytest.mark.parametrize("target, steps", ((2.0, 0), (0.5, 2), (0.4, np.inf)))
def test_steps_to_a_cost_are_the_first_that_reach_it(target, steps):
    assert newton_step.steps_to(np.array([1, 0.6, 0.5, 0.7, 0.45]), target) == steps


def test_quick_run_compares_at_equal_work(standard_promotion, capsys, tmp_path):
    newton_step.main(["--quick", "--output", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    ratio = re.search(r"a Gauss–Newton product \S+: (\S+) gradients", out)
    assert ratio and 1 < float(ratio[1]) < 2.5
    work = re.search(r"^ *work +(.+)$", out, re.MULTILINE)
    expected = [1 + (i + 1) * float(ratio[1]) for i in ITERATIONS]
    assert work
    np.testing.assert_allclose([float(w) for w in work[1].split()], expected, rtol=0.02)
    ratios = [float(r) for r in re.findall(r"^ *(?:0\.\d+|1) .* (-?\d+\.\d\d)$", out, re.MULTILINE)]
    assert len(ratios) == 2 * len(DAMPINGS)
    # With the strongest damping the model holds; at random weights with the weakest it does not.
    assert 0.8 < ratios[4] < 1.2 and 0.8 < ratios[9] < 1.2 and ratios[0] < 0.5
    costs = re.findall(
        r"^(?:at random weights|after 100 steps): cost (\S+) to (\S+), work", out, re.MULTILINE
    )
    assert len(costs) == 2 and all(float(after) < float(before) for before, after in costs)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--widths 5 0", "integers of at least 1", "0"),
        ("--l2 nan", "a finite number of at least 0", "nan"),
        ("--before 0", "integers of at least 1", "0"),
        ("--steps 0", "an integer of at least 1", "0"),
    ),
)
def test_bad_flag_is_one_line(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        newton_step.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"newton_step: {flags.split()[0]} needs to be ") and expected in err
    assert err.endswith(f", got {got}.\n")
