"""Gradient descent diverges beyond 2/λ; normalised steps have length ε, hop across minima, cross plateaus."""

import re
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from experiments import step_size
from tests.quick import optimised

QUICK = step_size.Flags(quick=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run by command: what it measured, on the quadratic and the network, printed and drew."""
    path, kept = tmp_path_factory.mktemp("quick") / "figure.png", {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(step_size, "train", optimised(step_size.train, "cost", "make_optimizer", "steps"))
        for name in ("measure_quadratic", "measure_network"):
            real = getattr(step_size, name)
            patch.setattr(
                step_size, name, lambda given, name=name, real=real: kept.setdefault(name, real(given))
            )
        step_size.main(["--quick", "--output", str(path)])
    return kept["measure_quadratic"], kept["measure_network"], out.getvalue(), path


@pytest.fixture(scope="module")
def quadratic(quick):
    return quick[0]


@pytest.fixture(scope="module")
def network(quick):
    return quick[1]


def test_quick_run_finds_the_limit_and_the_plateau(quick):
    *_, out, figure = quick
    limit = re.search(r"converges at η = (\S+) · 2/λ and diverges at (\S+) · 2/λ", out)
    assert limit and 0.99999 <= float(limit[1]) < 1 < float(limit[2]) <= 1.00001
    hops = [tuple(map(float, hop)) for hop in re.findall(r"^ *\S+ +(\S+) ε +(\S+) ε$", out, re.MULTILINE)]
    assert len(hops) == len(step_size.LENGTHS) and all(near + far == pytest.approx(1) for near, far in hops)
    plateau = re.search(r"leaves the plateau at step (\d+), normalised steps at step (\d+)", out)
    # Medians over 3 starts: 262 and 67.
    assert plateau and int(plateau[1]) > 2 * int(plateau[2])
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_growth_in_a_step_is_that_of_the_largest_factor(seed):
    quadratic = step_size.measure_quadratic(seed)
    last, first = step_size.last_and_first(quadratic)
    assert last < 1 < first and first - last < 1.01e-5
    n = len(step_size.ACROSS)
    assert (quadratic.growth[:n] < 1).tolist() == (step_size.ACROSS < 1).tolist()
    # At the limit the part along the largest λ is alone; elsewhere some of the other is left at step 50.
    np.testing.assert_allclose(quadratic.growth[n:], quadratic.theory[n:], atol=1e-6)
    np.testing.assert_allclose(quadratic.growth[:n], quadratic.theory[:n], atol=2e-3)


def test_limit_halves_with_twice_the_curvature():
    cost = fnn.cost(fnn.mlp([]), fnn.squared_error)  # H = 2 XᵀX/N, here 2
    X, y = np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32)
    params = (fnn.Layer(jnp.ones((2, 1, 1), jnp.float32)),)
    rates = np.array([0.99, 1.01], np.float32)
    costs, *_ = step_size.train(cost, optax.sgd, rates, params, X, y, 50)
    # C = w², and w changes by the factor 1 - 2η, -0.98 and -1.02.
    np.testing.assert_allclose(costs[:, -1], [0.98**98, 1.02**98], rtol=1e-4)


@jax.jit
def normalised_step(gradient: Any) -> Any:
    optimizer = step_size.normalised(0.25)
    return optimizer.update(gradient, optimizer.init(gradient))[0]


@pytest.mark.parametrize("scale", (1e-10, 1e-3, 1.0, 1e10))
def test_normalised_step_has_length_epsilon_over_all_arrays(scale):
    rng = np.random.default_rng(0)
    params = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (4,), (2, 4)))
    gradient = jax.tree.map(lambda a: a * np.float32(scale), params)
    step = normalised_step(gradient)
    flat, against = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]) for tree in (step, params))
    eps = float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(np.linalg.norm(flat.astype(float)), 0.25, rtol=4 * eps)
    np.testing.assert_allclose(flat, -0.25 * against / np.linalg.norm(against), rtol=8 * eps)


def test_zero_gradient_makes_a_step_of_zero_and_a_vanishing_norm_none_longer_than_epsilon():
    zeros = fnn.Layer(*(jnp.asarray(np.zeros(shape, np.float32)) for shape in ((2, 3), (2,))))
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(normalised_step(zeros)))
    tiny = jax.tree.map(lambda a: a + np.float32(1e-25), zeros)  # squares are 0 in float32
    lengths = [np.linalg.norm(np.asarray(a, float)) for a in jax.tree.leaves(normalised_step(tiny))]
    assert 0 < max(lengths) <= 0.25


def test_ready_made_normalisers_fail_at_or_near_zero():
    """Why `normalised` sets its own eps."""
    zero, small = jnp.zeros(2, jnp.float32), jnp.array([1e-6, 0], jnp.float32)
    for normaliser, gradient, length in (
        (optax.contrib.normalize(), zero, np.nan),
        (optax.normalize_by_update_norm(), small, 0.5),
    ):
        step, _ = normaliser.update(gradient, normaliser.init(gradient))
        np.testing.assert_allclose(np.linalg.norm(np.asarray(step)), length, rtol=1e-6)


def test_run_that_begins_at_the_minimum_stays_there():
    X, y = np.ones((3, 2), np.float32), np.zeros((3, 1), np.float32)
    params = (fnn.Layer(jnp.zeros((1, 1, 2), jnp.float32)),)
    runs = step_size.train(
        step_size.QUADRATIC, step_size.normalised, np.array([0.1], np.float32), params, X, y, 5
    )
    assert all((np.asarray(a) == 0).all() for a in runs)


def test_normalised_steps_along_an_eigenvector_come_nearer_by_epsilon_each():
    X, y = np.array([[2, 0], [0, 1]], np.float32), np.zeros((2, 1), np.float32)
    params = (fnn.Layer(jnp.array([[[1.05, 0]]], jnp.float32)),)
    rates = np.array([0.1], np.float32)
    runs = step_size.Runs(
        *step_size.train(step_size.QUADRATIC, step_size.normalised, rates, params, X, y, 15)
    )
    expected = np.append(1.05 - 0.1 * np.arange(11), [-0.05 * (-1) ** t for t in range(1, 5)])
    expected[11:] = [-0.05 if t % 2 else 0.05 for t in range(11, 15)]  # over the minimum and back
    np.testing.assert_allclose(runs.neuron[0, :, 0], expected, atol=1e-6)


def test_normalised_steps_end_hopping_along_the_steepest_direction(quadratic):
    for length, path in zip(step_size.LENGTHS, quadratic.normalised, strict=True):
        here, there, here_again = path[-3:]
        np.testing.assert_allclose(here_again, here, atol=1e-4 * length)
        np.testing.assert_allclose(np.linalg.norm(here - there), length, rtol=1e-4)
        across = np.stack([here, there]) @ quadratic.directions / length  # (2 points, 2 directions)
        np.testing.assert_allclose(across[:, 0], 0, atol=1e-3)
        assert across[0, 1] * across[1, 1] < 0 and 0.5 <= np.abs(across[:, 1]).max() < 0.95


def test_step_sizes_of_the_network_crawl_work_and_diverge(network):
    for rates, finals in (
        (network.rates, network.finals),
        (network.normalised_rates, network.normalised_finals),
    ):
        medians = np.median(finals, axis=1)
        assert finals.shape == (6, step_size.QUICK_STARTS)
        assert medians[0] > 0.95 * network.start and medians[-1] > 2 * network.start
        best = step_size.good(rates, finals)
        assert medians.min() < 0.3 * network.start and rates[0] < best.min() <= best.max() < rates[-1]


def test_both_rules_begin_with_the_same_step_and_only_one_keeps_its_length(network):
    length = QUICK.length
    assert network.plain.costs.shape == (step_size.QUICK_STARTS, step_size.QUICK_STEPS)
    np.testing.assert_array_equal(network.plain.costs[:, 0], network.normalised.costs[:, 0])
    np.testing.assert_allclose(network.plain.lengths[:, 0], length, rtol=1e-4)
    # Differences of float32 parameters near 1: an error of eps each, 153 of them.
    np.testing.assert_allclose(network.normalised.lengths, length, rtol=1e-4)
    assert np.median(network.plain.lengths.min(axis=1)) < 0.1 * length


def test_plateau_is_left_where_half_of_the_runs_have_lost_a_tenth_of_their_cost():
    costs = np.array([[1, 0.95, 0.89, 0.8], [1, 0.85, 0.8, 0.7], [2, 1.9, 1.85, 1.81]])
    assert step_size.plateau(step_size.Runs(costs, costs, costs)) == 2


def test_figure_says_the_finding_and_labels_every_axis(quadratic, network):
    figure = step_size.draw(QUICK, quadratic, network)
    title = figure.get_suptitle()
    assert "0.999995 · 2/λ" in title and f"step {step_size.plateau(network.plain)}" in title
    axes = [axes for axes in figure.axes if axes.get_title()]
    assert len(axes) == 6 and all(one.get_xlabel() and one.get_ylabel() for one in axes)


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--steps 99", "an integer of at least 100", "99"),
        ("--starts 0", "from 1 to 100", "0"),
        ("--length nan", "a finite number above 0", "nan"),
        ("--output nowhere/figure.png", "an existing folder", "nowhere/figure.png"),
    ),
)
def test_bad_flag_is_one_line(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        step_size.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"step_size: {flags.split()[0]} needs to be ") and expected in err
    assert err.endswith(f", got {got}.\n")
