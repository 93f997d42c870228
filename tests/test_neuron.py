"""The closed form is the library's gradient; a neuron comes back to its truth, or dies and stays dead."""

import re
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import fnn
from experiments import neuron
from tests.strategies import tolerance


class Quick(NamedTuple):
    result: dict[int, neuron.Fits]
    figure: Figure
    text: str
    path: Path


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run by its command, and what went through it: it compiles once for all tests."""
    path, kept = tmp_path_factory.mktemp("neuron") / "figure.png", {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        for name in ("measure", "draw"):
            real = getattr(neuron, name)
            patch.setattr(
                neuron, name, lambda given, name=name, real=real: kept.setdefault(name, real(given))
            )
        neuron.main(["--quick", "--output", str(path)])
    return Quick(kept["measure"], kept["draw"], out.getvalue(), path)


@partial(jax.jit, static_argnums=0)
def library(cost, theta, X, y):
    params = (fnn.Layer(W=theta[None, :-1], b=theta[-1:]),)
    C, (gradient,) = fnn.value_and_grad(cost)(params, X, y[:, None])
    return C, jnp.append(gradient.W[0], gradient.b)


def by_library(theta, X, y):
    return jax.device_get(library(neuron.neuron_cost(), *map(jnp.asarray, (theta, X, y))))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(((1, 1), (4, 1), (5, 3), (60, 7))))
def test_closed_form_is_the_gradient_of_the_library(seed, shape):
    rng = np.random.default_rng(seed)
    N, n = shape
    theta, X, y = rng.standard_normal(n + 1), rng.standard_normal((N, n)), rng.standard_normal(N)
    C, gradient = neuron.closed_form(theta, X, y)
    library_C, library_gradient = by_library(theta, X, y)
    close = tolerance("float64", fan_in=N)
    # Relative to the terms without their signs: a sum of few terms may cancel to almost 0.
    assert np.all(np.abs(library_gradient - gradient) <= close * neuron.magnitudes(theta, X, y))
    np.testing.assert_allclose(library_C, C, rtol=close, atol=close)


def test_closed_form_is_the_slope_of_the_cost():
    rng = np.random.default_rng(0)
    theta, X, y = rng.standard_normal(4), rng.standard_normal((20, 3)), rng.standard_normal(20)
    _, gradient = neuron.closed_form(theta, X, y)
    for i in range(4):
        h = 1e-6 * np.eye(4)[i]
        slope = (neuron.closed_form(theta + h, X, y)[0] - neuron.closed_form(theta - h, X, y)[0]) / 2e-6
        np.testing.assert_allclose(slope, gradient[i], rtol=1e-7)


def test_magnitudes_are_the_terms_of_active_inputs_without_signs():
    # z = 2x - 1 is 3, -3 and 1; |2x| + |b| + |y| is 4 + 1 + 4 for the first input and 2 + 1 + 1 for the last.
    theta, X, y = np.array([2.0, -1.0]), np.array([[2.0], [-1.0], [1.0]]), np.array([-4.0, 5.0, 1.0])
    np.testing.assert_allclose(neuron.magnitudes(theta, X, y), (2 / 3 * (9 * 2 + 4 * 1), 2 / 3 * (9 + 4)))


@pytest.mark.parametrize("gradient_of", (neuron.closed_form, by_library))
def test_an_input_at_the_kink_is_inactive(gradient_of):
    # w·x + b = 2x - 1 is 0 for the first input and 3 for the second: (2/2)·(3 - 5)·2 and (2/2)·(3 - 5).
    theta, X, y = np.array([2.0, -1.0]), np.array([[0.5], [2.0]]), np.array([3.0, 5.0])
    C, gradient = gradient_of(theta, X, y)
    assert C == (3**2 + 2**2) / 2 and gradient.tolist() == [-4, -2]


@pytest.mark.parametrize("b", (-0.5, 0.0))  # at 0 the first input is at the kink
def test_a_dead_neuron_has_a_gradient_of_exactly_0_and_never_moves(b):
    X, y = jnp.array([[0.0, 0.0], [1.0, 0.5], [2.0, 3.0]]), jnp.array([4.0, -5.0, 6.0])
    start = np.array([-1.0, -0.25, b])
    C, gradient = by_library(start, X, y)
    np.testing.assert_allclose(C, (4**2 + 5**2 + 6**2) / 3)
    assert (gradient == 0).all()
    assert (neuron.closed_form(start, np.asarray(X), np.asarray(y))[1] == 0).all()
    assert (neuron.magnitudes(start, np.asarray(X), np.asarray(y)) == 0).all()

    cost, optimizer = neuron.neuron_cost(), optax.sgd(1e6)
    params = (fnn.Layer(W=jnp.asarray(start[None, :2]), b=jnp.asarray(start[2:])),)
    state = fnn.train_state(optimizer, params, jax.random.key(0))
    step = jax.jit(partial(fnn.train_step, cost, optimizer))
    for _ in range(3):
        state, _ = step(state, X, y[:, None])
    assert state.params[0].W.tolist() == [[-1.0, -0.25]] and state.params[0].b.tolist() == [b]


def test_quick_run_recovers_the_truth_to_rounding_or_not_at_all(quick):
    # Over seeds 0 to 19: 51 to 72 % recovered with one input and 76 to 91 % with two, to 1e-15 or better;
    # all others were 1.1 or more away.
    for n, fits, (low, high) in ((1, quick.result[1], (0.3, 0.85)), (2, quick.result[2], (0.55, 0.98))):
        assert fits.X.dtype == fits.end.dtype == np.float64 and fits.end.shape == (2, 50, n + 1)
        became, away = neuron.outcomes(fits), neuron.distances(fits.end)
        recovered = became == neuron.RECOVERED
        assert low < recovered.mean() < high
        assert away[recovered].max() < 1e-13 and away[~recovered].min() > 0.1
        assert (recovered | ~neuron.points_right(fits) | (became == neuron.DEAD)).mean() > 0.95
        shares = recovered.mean(axis=1)
        assert f"{n}  {shares.mean():.1%} ({shares.min():.1%}–{shares.max():.1%})" in quick.text
        # A neuron stands still if and only if it is dead; in 100 starts on one input some are.
        np.testing.assert_array_equal(neuron.never_moved(fits), became == neuron.DEAD)
        assert n == 2 or 0 < np.mean(became == neuron.DEAD) < 0.4
        assert n == 2 or 0 < np.mean(became == neuron.OFF) < 0.6
    units = re.search(r"at most (\S+) rounding errors apart", quick.text)
    assert units and 0 < float(units[1]) <= 50
    dead = sum(np.sum(neuron.outcomes(fits) == neuron.DEAD) for fits in quick.result.values())
    assert f"{dead} of {dead} have a gradient of exactly 0" in quick.text
    assert quick.path.read_bytes().startswith(b"\x89PNG") and "figure.png" in quick.text


def test_data_are_the_true_neurons_and_depend_on_the_seed(quick):
    for n, fits in quick.result.items():
        assert fits.X.shape == (2, 100, n)
        np.testing.assert_allclose(fits.y, np.maximum(0, fits.X.sum(axis=2) / np.sqrt(n) + 0.5), atol=1e-14)
        np.testing.assert_array_equal(fits.X[1], np.random.default_rng((0, n, 1)).standard_normal((100, n)))
        assert 0.5 < np.mean(fits.y > 0) < 0.85  # 0.69 expected: Φ(½)
        np.testing.assert_allclose(np.linalg.norm(neuron.truth(n)[:-1]), 1)
        assert len({start.tobytes() for starts in fits.start for start in starts}) == 100


def test_paths_are_those_of_descent_on_the_closed_form(quick):
    fits = quick.result[1]
    assert fits.path.shape == (2, 50, 4001, 2) and quick.result[2].path.size == 0
    np.testing.assert_array_equal(fits.path[:, :, 0], fits.start)
    np.testing.assert_array_equal(fits.path[:, :, -1], fits.end)
    for d in range(2):
        for s in range(10):
            theta = fits.start[d, s]
            for step in range(30):
                np.testing.assert_allclose(fits.path[d, s, step], theta, atol=1e-12)
                theta = theta - 0.3 * neuron.closed_form(theta, fits.X[d], fits.y[d])[1]


def test_outcomes_are_told_apart():
    X = np.array([[[-1.0], [0.0], [2.0]]])
    y = np.maximum(0, X[..., 0] + 0.5)
    start = np.array([[[1.0, 0.2], [-1.0, -1.0], [-1.0, 1.0], [1.0, 0.2], [-1.0, 1.0]]])
    end = np.array([[[1.0, 0.5 + 5e-10], [-1.0, -1.0], [-1.0, -1.0 + 5e-10], [1.0, 0.5 + 2e-9], [-1, 2e-9]]])
    fits = neuron.Fits(X, y, start, 0 * start, end, end[:, :, None])
    expected = [neuron.RECOVERED, neuron.DEAD, neuron.OFF, neuron.ELSEWHERE, neuron.ELSEWHERE]
    assert neuron.outcomes(fits).tolist() == [expected]
    assert neuron.never_moved(fits).tolist() == [[False, True, False, False, False]]
    assert neuron.points_right(fits).tolist() == [[True, False, False, True, False]]
    moving = fits._replace(gradient=fits.gradient + [0.0, 1e-300])
    assert not neuron.never_moved(moving).any()


def test_wrong_gradients_are_many_rounding_errors_away(quick):
    fits = quick.result[2]
    assert neuron.rounding_errors(fits) <= 50
    assert neuron.rounding_errors(fits._replace(gradient=1.001 * fits.gradient)) > 1e10
    dead = neuron.outcomes(fits) == neuron.DEAD
    assert dead.any()
    stirred = fits._replace(gradient=np.where(dead[..., None], 1e-300, fits.gradient))
    assert neuron.rounding_errors(stirred) == np.inf


def test_figure_shows_paths_from_start_to_end_and_the_dead_in_their_wedge(quick):
    functions, plane, curves = quick.figure.axes
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in quick.figure.axes)
    fits = quick.result[1]
    became = neuron.outcomes(fits)[0]
    assert f"100 starts: {np.mean(neuron.outcomes(fits) == 0):.0%} recover" in quick.figure.get_suptitle()
    assert "to 15 digits" in quick.figure.get_suptitle()
    (legend,) = quick.figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert f"dead from the start: {np.sum(became == neuron.DEAD)}" in texts
    lines = {np.column_stack(line.get_data()).tobytes() for line in plane.lines}
    assert all(np.ascontiguousarray(path[:401]).tobytes() in lines for path in fits.path[0])
    (wedge,) = plane.collections
    inside = wedge.get_paths()[0].contains_points(fits.start[0])
    np.testing.assert_array_equal(inside, became == neuron.DEAD)
    distances = np.sort([line.get_ydata()[-1] for line in curves.lines])
    np.testing.assert_allclose(distances, np.sort(neuron.distances(fits.path[0, :, 400])))


def test_title_promises_no_digits_when_none_recovers(quick):
    fits = quick.result[1]
    title = neuron.draw({1: fits._replace(end=fits.start)}).get_suptitle()
    assert "0% recover the true w and b,\n" in title


def test_neurons_that_diverge_end_the_experiment(tmp_path):
    figure = tmp_path / "figure.png"
    with pytest.raises(SystemExit, match="neuron: with 1 input .* became NaN or infinite"):
        neuron.main(["--steps", "3", "--starts", "20", "--learning-rate", "1e300", "--output", str(figure)])
    assert not figure.exists()


@pytest.mark.parametrize(
    "flags, expected",
    (
        ("--data-sets 0", "an integer of at least 1, got 0."),
        ("--steps -5", "an integer of at least 1, got -5."),
        ("--learning-rate inf", "a finite number above 0, got inf."),
    ),
)
def test_bad_flag_is_one_line_that_says_what_was_expected_and_what_came(flags, expected, capsys):
    with pytest.raises(SystemExit) as exit:
        neuron.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"neuron: {flags.split()[0]} needs to be ") and expected in err
