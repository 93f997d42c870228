"""The network follows the arms and the linear classifier does not; costs and answers are NumPy's own."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import fnn
from experiments import spiral


class Quick(NamedTuple):
    result: spiral.Result
    figure: Figure
    text: str
    path: Path


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run by its command, and what went through it: it compiles once for all tests."""
    path, kept = tmp_path_factory.mktemp("spiral") / "figure.png", {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        for name in ("measure", "draw"):
            real = getattr(spiral, name)
            patch.setattr(
                spiral, name, lambda given, name=name, real=real: kept.setdefault(name, real(given))
            )
        spiral.main(["--quick", "--output", str(path)])
    return Quick(kept["measure"], kept["draw"], out.getvalue(), path)


def outputs(params, X):
    """The network's outputs by NumPy in float64."""
    A = np.asarray(X, np.float64)
    for l, (W, b) in enumerate(params, start=1):
        A = A @ np.asarray(W, np.float64).T + np.asarray(b, np.float64)
        A = np.maximum(A, 0) if l < len(params) else A
    return A


def log_softmax(Z):
    Z = Z - Z.max(axis=1, keepdims=True)
    return Z - np.log(np.exp(Z).sum(axis=1, keepdims=True))


def test_arms_have_100_points_each_on_radii_from_0_to_1():
    X, y = spiral.spiral(np.random.default_rng(0))
    assert (X.shape, X.dtype, y.shape, y.dtype) == ((300, 2), np.float32, (300,), np.int32)
    np.testing.assert_array_equal(np.bincount(y), (100, 100, 100))
    for arm in range(3):
        r = np.linalg.norm(X[y == arm], axis=1)
        np.testing.assert_allclose(r, np.arange(100) / 99, atol=1e-6)


def angles_off_the_arm(X, y):
    """Every point's angle t in r·(sin t, cos t), less the 4j + 4r of its arm, from -π to π; r > 0."""
    r = np.linalg.norm(X, axis=1)
    t = np.arctan2(*X[r > 0].T)
    return np.angle(np.exp(1j * (t - 4 * y[r > 0] - 4 * r[r > 0])))


def test_angles_are_those_of_the_arm_without_noise(monkeypatch):
    monkeypatch.setattr(spiral, "NOISE", 0.0)
    X, y = spiral.spiral(np.random.default_rng(0))
    np.testing.assert_allclose(angles_off_the_arm(X, y), 0, atol=1e-5)
    np.testing.assert_allclose(X[99], (np.sin(4), np.cos(4)), atol=1e-6)  # the first arm ends at t = 4


def test_noise_of_the_angle_is_normal_with_deviation_0_2():
    noise = np.concatenate([angles_off_the_arm(*spiral.spiral(np.random.default_rng(s))) for s in range(20)])
    # 5,940 angles: standard errors of 0.0026 and 0.0018.
    assert abs(noise.mean()) < 0.013 and abs(noise.std() - 0.2) < 0.009
    assert abs(np.mean(np.abs(noise) < 0.2) - 0.683) < 0.03  # a normal variable within one deviation


def test_data_depend_on_seed_and_run_alone_and_new_points_are_new():
    X, y, X_new, y_new = spiral.draw_data(spiral.Flags(runs=4))
    assert X.shape == X_new.shape == (4, 300, 2) and y.shape == y_new.shape == (4, 300)
    fewer = spiral.draw_data(spiral.Flags(runs=2))
    np.testing.assert_array_equal(X[:2], fewer[0])
    np.testing.assert_array_equal(X_new[:2], fewer[2])
    draws = [*X, *X_new, *spiral.draw_data(spiral.Flags(runs=4, seed=1))[0]]
    assert len({draw.tobytes() for draw in draws}) == 12


def test_quick_run_finds_the_arms_with_the_network_alone(quick):
    # Over 69 triples of runs: the linear classifier's best single run had 57.3 % of the points, the
    # network's median 93.3 to 98.0 %.
    linear, network = quick.result.linear, quick.result.network
    assert linear.accuracy.shape == network.accuracy.shape == (3, 2001)
    assert 0.4 < linear.accuracy[:, -1].min() and linear.accuracy[:, -1].max() < 0.6
    assert linear.new_accuracy.max() < 0.6
    assert np.median(network.accuracy[:, -1]) > 0.85 and np.median(network.new_accuracy) > 0.85
    for model, size in ((linear, 9), (network, 603)):
        (C, _), (right, _), (new, _) = spiral.ends(model)
        row = next(
            line for line in quick.text.split("\n") if line.startswith(model.name) and "median" in line
        )
        assert row.split()[-5:] == [str(size), "median", f"{C:.3f}", f"{right:.1%}", f"{new:.1%}"]
    assert quick.path.read_bytes().startswith(b"\x89PNG") and "figure.png" in quick.text


def test_worst_run_has_the_highest_cost_and_the_fewest_right():
    C, right, new = np.array([[9, 2], [9, 5], [9, 3]]), np.array([[0, 0.9], [0, 0.7], [0, 0.5]]), np.arange(3)
    model = spiral.Training("", fnn.mlp([]), (), C, right, new, 0.0)
    assert spiral.ends(model) == [(3, 5), (0.7, 0.5), (1, 0)]


@pytest.mark.parametrize("name", ("linear", "network"))
def test_cost_and_accuracy_are_those_of_numpy(quick, name):
    model = getattr(quick.result, name)
    _, _, X_new, y_new = spiral.draw_data(spiral.Flags(runs=3))
    np.testing.assert_allclose(model.cost[:, 0], np.log(3), atol=0.02)  # weights near 0 at the start
    for run in range(3):
        params = jax.tree.map(lambda leaf, run=run: leaf[run], model.params)
        X, y = quick.result.X[run], quick.result.y[run]
        Z = outputs(params, X)
        C = -np.mean(log_softmax(Z)[np.arange(300), y]) + 0.5 * 1e-3 * sum(np.sum(W**2) for W, _ in params)
        np.testing.assert_allclose(model.cost[run, -1], C, rtol=1e-4)
        # A point on a border may be on its other side in float64.
        assert abs(model.accuracy[run, -1] - np.mean(Z.argmax(axis=1) == y)) < 0.005
        right = np.mean(outputs(params, X_new[run]).argmax(axis=1) == y_new[run])
        assert abs(model.new_accuracy[run] - right) < 0.005


def test_steps_are_those_of_gradient_descent_on_all_points():
    """The case study's own loop for the linear classifier: p - y, its mean, the penalty, a step of size 1."""
    flags = spiral.Flags(runs=2, steps=5, seed=3)
    data = spiral.draw_data(flags)
    model = spiral.train(flags, "linear", (), data)
    for run, key in enumerate(jax.random.split(jax.random.key(3), 2)):
        ((W, b),) = fnn.init(key, (2, 3), weights=jax.nn.initializers.normal(0.01), dtype=jnp.float32)
        W, b, X, y = np.float64(W), np.float64(b), data[0][run], data[1][run]
        for step in range(5):
            log_p = log_softmax(outputs([(W, b)], X))
            C = -np.mean(log_p[np.arange(300), y]) + 0.5 * 1e-3 * np.sum(W**2)
            np.testing.assert_allclose(model.cost[run, step], C, rtol=1e-5)
            Z_bar = (np.exp(log_p) - np.eye(3)[y]) / 300
            W, b = W - (Z_bar.T @ X + 1e-3 * W), b - Z_bar.sum(axis=0)
        np.testing.assert_allclose(model.params[0].W[run], W, rtol=1e-5)
        np.testing.assert_allclose(model.params[0].b[run], b, atol=1e-6)


def test_regions_are_the_largest_outputs_over_the_plane(quick):
    network = quick.result.network
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), network.params)
    places, answers = spiral.regions(network.net, params, reach=1.2, n=60)
    assert (places[0], places[-1], len(places)) == (np.float32(-1.2), np.float32(1.2), 60)
    # Column by column, (x_1, x_2) written out: x_1 goes along the row.
    Z = np.stack([outputs(params, [(places[j], x2) for x2 in places]) for j in range(60)], axis=1)
    top = np.sort(Z, axis=-1)
    clear = top[..., -1] - top[..., -2] > 1e-3  # elsewhere rounding decides
    assert clear.mean() > 0.99 and set(answers.flat) == {0, 1, 2}
    np.testing.assert_array_equal(answers[clear], Z.argmax(axis=-1)[clear])


def test_figure_shows_points_on_their_regions_and_labelled_curves(quick):
    *maps, cost_axes, accuracy_axes = quick.figure.axes
    result = quick.result
    for axes, model in zip(maps, (result.linear, result.network), strict=True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), model.params)
        mesh, points = axes.collections
        _, answers = spiral.regions(model.net, params, 1.1 * np.abs(result.X[0]).max())
        np.testing.assert_array_equal(np.reshape(mesh.get_array(), answers.shape), answers)
        np.testing.assert_allclose(points.get_offsets(), result.X[0])
        np.testing.assert_array_equal(points.get_array(), result.y[0])
        assert f"{model.accuracy[0, -1]:.1%} right" in axes.get_title()
    for axes, name in ((cost_axes, "cost"), (accuracy_axes, "accuracy")):
        *_, line = axes.lines
        np.testing.assert_allclose(line.get_ydata(), np.median(getattr(result.network, name), axis=0))
        assert axes.get_legend() is not None
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in quick.figure.axes)
    assert f"{np.median(result.network.new_accuracy):.1%} by a layer" in quick.figure.get_suptitle()


def test_lowest_accuracy_counts_from_the_runs_own_first_at_the_goal():
    accuracy = np.array([[0.1, 0.98, 0.8, 0.99], [0.5, 0.6, 0.7, 0.9], [0.2, 0.3, 0.4, 0.97]])
    expected = np.array([[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(spiral.reached(accuracy), expected)
    assert spiral.lowest(accuracy) == (0, 2)
    assert spiral.lowest(accuracy[1:2]) == (0, 0)  # never there


def test_report_counts_falls_and_says_when_no_run_gets_there(quick):
    accuracy = np.array([[0.1, 0.98, 0.8, 0.99], [0.5, 0.6, 0.7, 0.9], [0.2, 0.3, 0.4, 0.97]])
    cost = np.array([[3.0, 2, 1, 2]] * 3)
    network = quick.result.network._replace(accuracy=accuracy, cost=cost)
    text = spiral.report(quick.result._replace(network=network))
    assert "2 of 3 runs are at 97%" in text and "after 2 steps (median)" in text
    assert "16.7% (median), 33.3% (worst)" in text and "80.0% (run 1, step 2)" in text
    assert "the cost rises: 33%" in text
    text = spiral.report(quick.result._replace(network=network._replace(accuracy=accuracy - 0.1)))
    assert "0 of 3 runs are at 97%" in text and "lowest" not in text


def test_runs_that_diverge_end_the_experiment(monkeypatch):
    def train(flags, name, hidden, data):
        cost = np.array([[1.0, 2.0], [1.0, np.nan if name == "network" else 2.0]])
        return spiral.Training(name, fnn.mlp([]), (), cost, cost, cost[:, -1], 0.0)

    monkeypatch.setattr(spiral, "train", train)
    with pytest.raises(SystemExit, match="network's cost became NaN or infinite in 1 of 2 runs"):
        spiral.measure(spiral.Flags(runs=2))


@pytest.mark.parametrize(
    "flags, expected",
    (
        ("--runs 0", "an integer of at least 1, got 0."),
        ("--learning-rate nan", "a finite number above 0, got nan."),
        ("--l2 -1", "at least 0, got -1.0."),
    ),
)
def test_bad_flag_is_one_line_that_says_what_was_expected_and_what_came(flags, expected, capsys):
    with pytest.raises(SystemExit) as exit:
        spiral.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"spiral: {flags.split()[0]} needs to be ") and expected in err
