"""Angles are those of known vectors, F = W is backpropagation to the last bit, and random feedback aligns."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from experiments import feedback_alignment as experiment
from experiments.feedback_alignment import (
    DIRECT,
    LAST,
    NONE,
    OTHERS,
    QUICK_RULES,
    RANDOM,
    RULES,
    SIGNS,
    SIZES,
    TRUE,
    Outcome,
    Runs,
)
from tests.quick import quick_run
from tests.strategies import drawn

TINY = (3, 6, 5, 4)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run by command: its outcomes, what it prints, and its figure."""
    with jax.numpy_dtype_promotion("standard"):
        return quick_run(experiment, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def tiny():
    """A cost, parameters, a batch and its gradient, two hidden layers, in float64."""
    _, cost = experiment.network("tanh")
    X = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)))
    y = jnp.asarray([0, 1, 2, 3, 0, 1, 2])
    params = weights(1)
    return cost, params, X, y, jax.jit(lambda *args: fnn.gradient(fnn.backprop(cost, *args)))(params, X, y)


def weights(seed):
    """LeCun's start of the tiny network."""
    return drawn(np.random.default_rng(seed), TINY)


def layer(W, b=None):
    return fnn.Layer(jnp.asarray(np.array(W, float)), None if b is None else jnp.asarray(np.array(b, float)))


# One program each. Where an angle has to be 0 to the last bit they are called as they are: compiled whole,
# the same sum may be taken in two orders.
angle, weight_angles = jax.jit(experiment.angle), jax.jit(experiment.weight_angles)


def rule_gradient(rule, cost, params, fixed, X, y):
    def gradient(params, fixed):
        return experiment.rule_gradient(rule, cost, params, experiment.feedback(rule, params, fixed), X, y)

    return jax.jit(gradient)(params, fixed)


@pytest.mark.parametrize(
    "a, b, degrees",
    (
        ((1, 0, 0), (0, 2, 0), 90),
        ((1, 0, 0), (3, 0, 0), 0),
        ((1, 1, 0), (-2, -2, 0), 180),
        ((1, 0, 0), (1, 0, 1), 45),
        ((1, 0, 0), (1e-9, 1e-9 * np.sqrt(3), 0), 60),
        ((1, 0, 0), (1, 1e-7, 0), np.degrees(1e-7)),  # an arccos of 1 - 5e-15 has two digits of it
    ),
)
def test_angle_of_known_vectors_over_all_leaves(a, b, degrees):
    trees = [layer([v[:2]], v[2:]) for v in (a, b)]
    np.testing.assert_allclose(angle(*trees), degrees, rtol=1e-8, atol=1e-12)


def test_angle_of_a_vector_with_itself_is_exactly_0_and_with_none_is_undefined():
    v = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert experiment.angle(v, v) == 0
    assert np.isnan(experiment.angle(v, np.zeros_like(v)))


def test_params_as_feedback_are_backpropagation_to_the_last_bit(tiny):
    cost, params, X, y, truth = tiny
    assert experiment.feedback(TRUE, params, None) is params
    gradient = rule_gradient(TRUE, cost, params, None, X, y)
    for ours, true in zip(jax.tree.leaves(gradient), jax.tree.leaves(truth), strict=True):
        np.testing.assert_array_equal(ours, true)
    assert experiment.gradient_angles(gradient, truth).tolist() == [0, 0, 0]
    assert experiment.weight_angles(params, params).tolist() == [0, 0]


def test_last_layer_has_the_true_gradient_under_every_rule_and_the_others_only_by_backpropagation(tiny):
    cost, params, X, y, truth = tiny
    rng = np.random.default_rng(3)
    direct = fnn.DirectFeedback(tuple(jnp.asarray(rng.normal(size=(TINY[-1], n))) for n in TINY[1:-1]))
    fixed = {RANDOM: weights(2), DIRECT: direct}
    for rule in OTHERS:
        gradient = rule_gradient(rule, cost, params, fixed.get(rule), X, y)
        angles = experiment.gradient_angles(gradient, truth)
        assert angles[-1] == 0 and (angles[:-1] > 5).all()


def test_last_layer_alone_leaves_the_hidden_ones_as_they_are(tiny):
    cost, params, X, y, truth = tiny
    *hidden, last = rule_gradient(LAST, cost, params, None, X, y)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(hidden))
    np.testing.assert_array_equal(last.W, truth[-1].W)


def test_signs_are_as_large_as_the_weights_on_average():
    params = layer([[1], [1]], [0, 0]), layer([[1, -3]], [0])
    assert experiment.feedback(SIGNS, params, None)[1].W.tolist() == [[2, -2]]
    # For normal weights cos = E|w| / √(E w²) = √(2/π), here within 4 standard errors.
    W = np.random.default_rng(0).normal(size=(300, 300))
    params = layer(np.ones((300, 1))), layer(W)
    (degrees,) = np.asarray(weight_angles(params, experiment.feedback(SIGNS, params, None)))
    assert degrees == pytest.approx(np.degrees(np.arccos(np.sqrt(2 / np.pi))), abs=0.5)


def test_direct_feedback_is_compared_with_the_whole_way_forward(tiny):
    _, params, *_ = tiny
    W2, W3 = params[1].W, params[2].W
    same = fnn.DirectFeedback((W3 @ W2, W3))
    np.testing.assert_allclose(weight_angles(params, same), 0, atol=1e-12)
    opposite = fnn.DirectFeedback((-W3 @ W2, W3))
    np.testing.assert_allclose(weight_angles(params, opposite), (180, 0), atol=1e-12)


def test_rules_begin_alike_and_draw_their_own_feedback():
    begin = experiment.starts(jax.random.split(jax.random.key(0), 2), "tanh")
    assert tuple(begin) == RULES
    params = begin[TRUE][0]
    assert [layer.W.shape[1:] for layer in params] == list(zip(SIZES[1:], SIZES[:-1], strict=True))
    for rule in RULES[:-1]:
        np.testing.assert_array_equal(begin[rule][0][1].W, params[1].W)
    assert begin[NONE][0][0].W.shape == (2, 10, 64)
    assert [rule for rule in RULES if begin[rule][1] is not None] == [DIRECT, RANDOM]
    for F, W in zip(begin[RANDOM][1], params, strict=True):
        assert not np.array_equal(F.W, W.W) and not np.array_equal(F.W[0], F.W[1])
    # The cosine of independent matrices of 8192 entries has the standard error 1/√8192: four of them.
    F, W = (np.asarray(layers[1].W).reshape(2, -1) for layers in (begin[RANDOM][1], params))
    cosines = (F * W).sum(axis=1) / np.linalg.norm(F, axis=1) / np.linalg.norm(W, axis=1)
    assert np.abs(cosines).max() < 4 / np.sqrt(8192)


def test_best_rate_is_chosen_by_the_digits_held_out():
    accuracies = np.zeros((3, 2, 4, 3))
    accuracies[:, :, -1, 0] = accuracies[:, :, -1, 2] = [[0.9], [0.8], [0.99]]
    accuracies[:, :, -1, 1] = [[0.7, 0.7], [0.6, 0.9], [0.7, 0.7]]
    accuracies[0, :, 0, 1] = 1  # not at the end
    angles = np.arange(3)[:, None, None, None] * np.ones((3, 2, 8, 4))
    outcome = experiment.best(Runs(angles, angles, accuracies), (0.5, 1.0, 2.0))
    assert outcome.rate == 1 and not outcome.at_edge and (outcome.gradient_angles == 1).all()
    assert outcome.test.tolist() == [0.8, 0.8]
    accuracies[2, :, -1, 1] = 0.9
    assert experiment.best(Runs(angles, angles, accuracies), (0.5, 1.0, 2.0))[:2] == (2, True)


@pytest.mark.parametrize("steps", (1, 2, 7, 700))
def test_windows_cover_every_step_once(steps):
    edges = experiment.windows(steps)
    assert edges[0] == 0 and edges[-1] == steps and (np.diff(edges) > 0).all()
    means = experiment.averaged(np.ones((2, steps, 3)))
    assert means.shape == (2, len(edges) - 1, 3) and (means == 1).all()


def test_steps_without_an_angle_are_left_out():
    angles = np.full((1, 400, 2), 80.0)
    angles[0, 350:360] = np.nan
    assert (experiment.averaged(angles) == 80).all()


def test_quick_run_aligns_with_the_gradient_and_beats_the_fixed_layers(quick):
    outcomes, out, figure = quick
    assert tuple(outcomes) == QUICK_RULES
    for rule in (RANDOM, DIRECT):
        angles = outcomes[rule].gradient_angles
        assert not angles[:, :, -1].any()
        assert np.abs(angles[:, 0, :-1] - 90).max() < 25
        last = angles[:, -35:, :-1].mean(axis=1)
        assert (last < 85).all() and (last > 10).all()
        assert (outcomes[rule].weight_angles[:, -1] < outcomes[rule].weight_angles[:, 0]).all()
        assert outcomes[rule].test.min() > outcomes[LAST].test.max() + 0.02
        assert re.search(rf"^{rule} .* {outcomes[rule].test.mean():.1%} \(", out, re.MULTILINE)
    assert outcomes[TRUE].test.min() > 0.94
    assert f"{TRUE} {outcomes[TRUE].test.mean():.1%}" in out.splitlines()[-3]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_figure_shows_every_rule_and_labels_its_axes():
    rng = np.random.default_rng(0)
    outcomes = {}
    for i, rule in enumerate(RULES):
        angles = rng.uniform(40, 60, (2, 40, 4))
        accuracies = np.full((2, 4, 3), 0.9 + i / 100)
        outcomes[rule] = Outcome(0.5, rule == NONE, angles, angles[:, :, :3], accuracies)
    outcomes[RANDOM].gradient_angles[:, -10:, 0] = 70
    outcomes[DIRECT].gradient_angles[:, -10:, 1] = 30
    figure = experiment.draw(outcomes)
    figure.draw_without_rendering()  # a layout that does not fit would warn
    assert "gradients end 30° to 70° off" in figure.get_suptitle()
    assert "backpropagation 90.0%" in figure.get_suptitle()
    *others, ends = figure.axes
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in others) and ends.get_xlabel()
    assert len(ends.get_yticks()) == len(RULES)
    report = experiment.report(outcomes)
    assert re.search(r"no hidden layer +0\.5\* +95\.0%", report)
    assert re.search(r"feedback alignment +1 .* 70 \(70 to 70\) +100.00% of the steps", report)


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--epochs 1", "an integer from 2 to 1000", "1"),
        ("--runs 0", "an integer from 1 to 100", "0"),
        ("--seed -1", "from 0 to 2**32 - 1", "-1"),
    ),
)
def test_bad_flag_is_one_line_that_says_what_was_expected_and_what_came(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        experiment.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith(f"feedback_alignment: {flags.split()[0]} needs to be ")
    assert expected in err and err.endswith(f", got {got}.\n")
