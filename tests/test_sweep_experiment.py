"""Members are rates by seeds, each as if alone; the best rate, the range and the times are right."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from experiments import digits, sweep
from experiments.sweep import QUICK_EPOCHS, QUICK_RATES, QUICK_SEEDS, Flags, Result
from tests.quick import quick_run

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run by command: its result, what it prints, and its figure."""
    with jax.numpy_dtype_promotion("standard"):
        return quick_run(sweep, tmp_path_factory.mktemp("quick"))


def made_up() -> Result:
    """Two widths, three rates, two seeds; the second width diverges at the last rate."""
    accuracy = np.array([[[0.5, 0.6], [0.8, 0.9], [0.845, 0.845]], [[0.9, 0.92], [0.7, 0.9], [0, 0]]])
    diverged = accuracy == 0
    seconds, theirs = np.array([2.0, 3.0]), np.array([[1.0, 3.0], [4.0, 6.0]])
    return Result(
        np.array([4, 8]),
        2.0 ** np.array([-4, -2, 0]),
        accuracy,
        diverged,
        seconds,
        theirs,
        np.array([[0.7, 0.8], [0.8, 0.9]]),
        np.array([[0.71, 0.81], [0.81, 0.91]]),
        20,
    )


def test_quick_run_prints_a_row_for_each_width_and_the_finding(quick):
    result, out, figure = quick
    assert result.widths.tolist() == [4, 256]
    assert result.accuracy.shape == result.diverged.shape == (2, len(QUICK_RATES), QUICK_SEEDS)
    assert result.theirs.shape == result.our_accuracy.shape == (2, 1) and (result.theirs > 0).all()
    assert result.networks == 12 and (result.seconds > 0).all()
    rows = re.findall(r"^ *(\d+) +2\^(-?\d+) +\S+% +\S+% to \S+%", out, re.MULTILINE)
    expected = [(str(w), f"{np.log2(result.rates[i]):.0f}") for w, i in zip(result.widths, result.best)]
    assert rows == expected
    assert "24 networks in" in out and "(extrapolated)" in out and f"jax {jax.__version__}" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_wide_networks_want_smaller_rates_than_narrow_ones(quick):
    result, _, _ = quick
    narrow, wide = result.rates[result.best]
    assert wide < narrow
    assert result.mean[1].max() > 0.95 > result.mean[0].max() > 0.7


@pytest.mark.parametrize("rate, seed", ((1, 2), (2, 0)))
def test_cell_of_the_table_is_the_network_of_that_rate_and_seed_alone(quick, rate, seed, standard_promotion):
    result, _, _ = quick
    (X, y), (X_test, y_test) = digits.load(0)
    key = jax.random.split(jax.random.key(0), QUICK_SEEDS)[seed]
    init_key, order_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    params = fnn.init(init_key, (64, 4, 10), weights=fnn.he_normal, dtype=jnp.float32)
    adam: Any = sweep.optax.adam(float(QUICK_RATES[rate]))
    run: dict[str, Any] = dict(key=order_key, epochs=QUICK_EPOCHS, batch_size=32, progress=False)
    history = fnn.fit(sweep.COST, adam, params, (digits.standardised(X, X), y), **run)
    test = jnp.asarray(digits.standardised(X_test, X)), jnp.asarray(y_test)
    alone = float(fnn.accuracy(sweep.NET)(history.params, *test))
    # 225 steps in float32 may end apart by rounding, so that a digit or two change sides.
    assert abs(result.accuracy[0, rate, seed] - alone) < 2.5 / len(y_test)


def test_best_rates_and_those_close_to_them():
    result = made_up()
    assert result.best.tolist() == [1, 0]  # the first of equal means 0.85 and 0.845
    assert [rates.tolist() for rates in result.close] == [[0.25, 1.0], [0.0625]]
    np.testing.assert_allclose(result.mean, [[0.55, 0.85, 0.845], [0.91, 0.8, 0]])


def test_extrapolated_time_is_the_mean_times_the_networks():
    np.testing.assert_array_equal(made_up().their_seconds, [2 * 6, 5 * 6])
    assert sweep.finding(made_up()) == (
        "The best learning rate is 0.25 for 4 neurons and 0.062 for 8;\n"
        "12 networks in 5 s, by scikit-learn one by one in 42 s (extrapolated)"
    )
    lines = sweep.report(made_up()).splitlines()
    assert lines[3].split() == "4 2^-2 85.0% 80.0% to 90.0% 2^-2 to 2^0 0 2.0 12 6.0 75.0% 76.0%".split()
    assert lines[4].split()[:10] == "8 2^-4 91.0% 90.0% to 92.0% 2^-4 to 2^-4 2".split()


def test_network_that_diverged_reads_nothing(standard_promotion):
    """A network of NaN would answer 0, and be right about every tenth digit."""
    (X, y), _ = digits.load(0)
    data = digits.standardised(X, X)[:64], y[:64]
    rates, flags = np.array([1e-2, 1e38]), Flags(seeds=2, epochs=4)
    accuracy, diverged, _ = sweep.train(4, rates, flags, data, tuple(map(jnp.asarray, data)))
    assert diverged.tolist() == [[False, False], [True, True]]
    assert (accuracy[1] == 0).all() and (accuracy[0] > 0).all()


def test_figure_marks_the_best_rate_of_each_width():
    figure = sweep.draw(made_up())
    figure.draw_without_rendering()  # a layout that does not fit would warn
    heat, curves, times = figure.axes[:3]
    (marks,) = heat.lines
    np.testing.assert_array_equal(marks.get_xydata(), [[1, 0], [0, 1]])
    assert [text.get_text() for text in heat.texts] == ["55", "85", "84", "91", "80", "0"]
    bars: list[Any] = list(times.patches)
    assert sorted(bar.get_height() for bar in bars) == pytest.approx([2, 3, 12, 30])
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in (heat, curves, times))


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--widths 4 0", "integers of at least 1", "0"),
        ("--widths 8 4", "ascending", "8 4"),
        ("--seeds 0", "an integer of at least 1", "0"),
        ("--timed 0", "an integer of at least 1", "0"),
        ("--batch-size 1438", "from 1 to 1437", "1438"),
    ),
)
def test_bad_flag_is_one_line(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        sweep.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"sweep: {flags.split()[0]} needs to be ") and expected in err
    assert err.endswith(f", got {got}.\n")
