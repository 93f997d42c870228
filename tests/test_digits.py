"""The digits are read, the gradient is right, and the figure shows every mistake or says how many."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import fnn
from experiments import digits
from tests.strategies import tolerance

ROUNDINGS = tolerance("float32") / float(jnp.finfo("float32").eps)  # 50


@pytest.mark.parametrize("seed", (0, 1, 2**32 - 1))
def test_a_fifth_of_every_class_is_held_out_and_no_digit_is_lost(seed):
    (X, y), (X_test, y_test) = digits.load(seed)
    assert (X.shape, y.shape, X_test.shape, y_test.shape) == ((1437, 64), (1437,), (360, 64), (360,))
    assert X.dtype == X_test.dtype == np.float32 and y.dtype == y_test.dtype == np.int32
    assert X.min() == 0 and X.max() == 1
    assert len(y) == digits.TRAINING_DIGITS
    all_X, all_y = load_digits(return_X_y=True)
    in_test, in_all = np.bincount(y_test, minlength=10), np.bincount(np.asarray(all_y))
    assert np.abs(in_test - in_all / 5).max() < 1
    rows = np.column_stack([np.vstack([X, X_test]) * 16, np.concatenate([y, y_test])])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, np.column_stack([all_X, all_y])))


def test_split_depends_on_the_seed_alone():
    (X, y), _ = digits.load(3)
    assert all(np.array_equal(a, b) for a, b in zip((X, y), digits.load(3)[0], strict=True))
    assert not np.array_equal(X, digits.load(4)[0][0])


def test_standardised_takes_mean_and_scale_from_the_training_part():
    (X, _), (X_test, _) = digits.load(0)
    Z, Z_test = digits.standardised(X, X), digits.standardised(X_test, X)
    assert Z.dtype == Z_test.dtype == np.float32
    np.testing.assert_allclose(Z.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(Z.std(), 1, rtol=1e-5)
    np.testing.assert_array_equal(Z_test[:7], digits.standardised(X_test[:7], X))


def test_quick_run_reads_digits_with_the_gradient_of_jax(standard_promotion, capsys, tmp_path):
    digits.main(["--quick", "--output", str(tmp_path / "figure.png")])
    out, err = capsys.readouterr()
    assert fnn.summary(digits.model(digits.Flags())[2]) in out
    units = re.search(r"differ by at most (\S+) rounding errors, in [Wb] of layer \d;", out)
    accuracy = re.search(r"Accuracy: (\S+)% of the training digits, (\S+)% of the test digits", out)
    assert units and float(units[1]) <= ROUNDINGS
    # Over seeds 0 to 39 the test accuracy after 5 epochs was 96.9 % or more.
    assert accuracy and float(accuracy[1]) >= 98 and float(accuracy[2]) >= 94
    assert "5/5" in err and "figure.png" in out
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_gradient_off_by_a_thousandth_is_thousands_of_rounding_errors_away():
    def pullback(is_positive, a_bar):
        return (jnp.where(is_positive, a_bar * 1.001, 0),)

    too_steep = fnn.Rule(fnn.relu.forward, pullback)
    (X, y), _ = digits.load(0)
    _, _, params = digits.model(digits.Flags(widths=(7, 6)))
    cost = fnn.cost(fnn.mlp(too_steep), fnn.softmax_cross_entropy_with_integer_labels)
    errors = digits.rounding_errors(*digits.gradients(cost, params, X[:40], y[:40]))
    assert list(errors) == [f"{name} of layer {l}" for l in (1, 2, 3) for name in "Wb"]
    # 0.001 / eps is 8,389; the last layer lies behind no relu on the way back, the first behind two.
    assert errors["W of layer 3"] <= ROUNDINGS
    assert 8e3 < errors["W of layer 2"] < 9e3 and 16e3 < errors["W of layer 1"] < 18e3


@pytest.mark.parametrize(
    "ours, theirs, apart",
    (
        ((1.0, 4.0), (1.0, 4.0), 0),
        ((1.0, 4.0), (1.0 + 2**-21, 4.0), 1),  # eps is 2**-23, the largest entry 4
        ((0.0, 0.0), (0.0, 0.0), 0),
        ((0.0, 1e-30), (0.0, 0.0), np.inf),
        ((np.nan, 4.0), (1.0, 4.0), np.inf),
    ),
)
def test_rounding_errors_are_counted_in_units_of_the_largest_entry(ours, theirs, apart):
    first, second = jax.device_get(
        [(fnn.Layer(jnp.array([g], jnp.float32), jnp.zeros(2, jnp.float32)),) for g in (ours, theirs)]
    )
    assert digits.rounding_errors(first, second) == {"W of layer 1": apart, "b of layer 1": 0}


@pytest.mark.parametrize("epochs, mistakes, shown", ((1, 0, 0), (2, 1, 1), (20, 11, 11), (3, 150, 20)))
def test_figure_shows_the_surest_mistakes_and_says_how_many(epochs, mistakes, shown):
    _, (X, y) = digits.load(0)
    rng = np.random.default_rng(0)
    wrong = rng.permutation(len(y))[:mistakes]
    probabilities = np.full((len(y), 10), 0.01)
    answers = y.copy()
    answers[wrong] = (y[wrong] + 1) % 10
    surety = rng.uniform(0.3, 0.9, len(y))
    probabilities[np.arange(len(y)), answers] = surety
    curve = {name: rng.uniform(0.1, 1, epochs) for name in ("cost", "accuracy")}
    figure = digits.draw(fnn.History((), curve, curve, np.ones(epochs)), X, y, probabilities)
    figure.draw_without_rendering()  # a layout that does not fit would warn

    assert f"{360 - mistakes} of 360" in figure.get_suptitle()
    top, bottom = figure.subfigs
    assert [axes.get_ylabel() for axes in top.axes] == ["cost (nats per digit)", "digits read correctly"]
    assert all(np.size(line.get_xdata()) == epochs for axes in top.axes for line in axes.lines)
    if not mistakes:
        assert bottom.get_suptitle() == "Mistakes: none"
        return
    assert f"({shown} of {mistakes} shown)" in bottom.get_suptitle()
    images = [axes for axes in bottom.axes if axes.images]
    surest = sorted(wrong, key=lambda n: -surety[n])[:shown]
    assert [axes.get_title().split("\n")[0] for axes in images] == [f"{y[n]} → {answers[n]}" for n in surest]
    for axes, n in zip(images, surest, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), X[n].reshape(8, 8))


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--learning-rate nan", "a finite number above 0", "nan"),
        ("--learning-rate inf", "a finite number above 0", "inf"),
        ("--learning-rate 0", "a finite number above 0", "0.0"),
        ("--learning-rate -1e-3", "a finite number above 0", "-0.001"),
        ("--seed -1", "from 0 to 2**32 - 1", "-1"),
        ("--seed 4294967296", "from 0 to 2**32 - 1", "4294967296"),
        ("--widths 5 0", "integers of at least 1", "0"),
        ("--epochs 0", "an integer of at least 1", "0"),
        ("--batch-size 0", "from 1 to 1437", "0"),
        ("--batch-size 1438", "from 1 to 1437", "1438"),
        ("--l2 -0.5", "at least 0", "-0.5"),
        ("--l2 nan", "at least 0", "nan"),
        ("--output nowhere/figure.png", "an existing folder", "nowhere/figure.png"),
        ("--output figure.txt", "a .png or .svg or .pdf file", "figure.txt"),
    ),
)
def test_bad_flag_is_one_line_that_says_what_was_expected_and_what_came(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        digits.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2
    assert err.startswith(f"digits: {flags.split()[0]} needs to be ") and err.count("\n") == 1
    assert expected in err and err.endswith(f", got {got}.\n")


@pytest.mark.parametrize("flags", ("--optimizer lion", "--activation step", "--widths many", "--epochs 1.5"))
def test_unknown_choice_ends_with_status_2(flags, capsys):
    with pytest.raises(SystemExit) as exit:
        digits.main(flags.split())
    assert exit.value.code == 2 and flags.split()[1] in capsys.readouterr().err


def test_run_that_diverges_says_so_and_leaves_no_figure(standard_promotion, tmp_path):
    figure = tmp_path / "figure.png"
    flags = ["--widths", "--optimizer", "sgd", "--learning-rate", "1e38", "--output", str(figure)]
    with pytest.raises(SystemExit, match="digits: fit: in epoch 1 .*learning rate"):
        digits.main(flags)
    assert not figure.exists()


def test_default_flags_are_good_and_every_optimiser_has_its_rate():
    digits.Flags().check()
    digits.Flags(widths=(), learning_rate=0.5, seed=2**32 - 1, batch_size=1437).check()
    for make, rate in digits.OPTIMIZERS.values():
        assert rate > 0 and callable(make(rate).update)


def test_network_without_hidden_layers_is_a_single_layer_in_float32():
    _, _, params = digits.model(digits.Flags(widths=()))
    (layer,) = params
    assert layer.W.shape == (10, 64) and layer.W.dtype == layer.b.dtype == jnp.float32
