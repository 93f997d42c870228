"""Signals grow or fade as the theory of wide layers says, and networks learn where they get through."""

from functools import partial
from math import inf, log, pi, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnn
from experiments import initialization
from experiments.initialization import ACTIVATIONS, LAYERS, STARTS, last_costs, normal_mean, predict
from tests.quick import optimised, quick_run
from tests.strategies import drawn

NAMES = list(STARTS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run by command: its result, what it prints, and its figure. Half the batch learns as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initialization, "BATCH_SIZE", 32)
        patch.setattr(initialization, "train", optimised(initialization.train, "cost", emitters=True))
        return quick_run(initialization, tmp_path_factory.mktemp("quick"))


def fluctuation(activation, q, backward):
    """The relative variance of a neuron's square: of σ(√q x)² forward, of (wσ′(√q x))² backward."""
    if activation == "relu":
        return 5.0  # forward E x⁴/2 / (1/2)² - 1, backward (3/2) / (1/2)² - 1
    if backward:
        slope = [normal_mean(lambda x, p=p: (1 - np.tanh(sqrt(q) * x) ** 2) ** p) for p in (2, 4)]
        return 3 * slope[1] / slope[0] ** 2 - 1
    value = [normal_mean(lambda x, p=p: np.tanh(sqrt(q) * x) ** p) for p in (2, 4)]
    return value[1] / value[0] ** 2 - 1


@pytest.mark.parametrize("start", NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backward", (False, True))
def test_growth_factor_per_layer_is_that_of_wide_layers(quick, activation, start, backward):
    """A layer multiplies a mean square over n neurons by its factor times 1 ± √(v/n).

    So the logarithm drifts by -v/(2n) a layer, and its mean over the layers has the standard deviation
    √(v/(n layers)), the median over runs √(π/2 / runs) times that; 4 of these are allowed. v is the largest
    of all layers, and averaging over examples only lowers it.
    """
    result, _, _ = quick
    i, n = NAMES.index(start), 64
    measured = initialization.growth(result.measured[activation])[backward][i]
    expected = initialization.growth(result.theory[activation])[backward][i]
    squares = 10 ** result.theory[activation].activations[i]
    gain = n * STARTS[start][1](n)
    v = max(fluctuation(activation, gain * a, backward) for a in squares[:-1])
    spread = sqrt(v / (n * (LAYERS - 1)) * pi / 2 / len(measured))
    assert abs(log(np.median(measured) / expected)) <= v / (2 * n) + 4 * spread


def test_signals_vanish_or_explode_or_stay_as_each_start_says(quick):
    result, _, _ = quick
    ends = {
        (name, start): (measured.activations[i, :, -1], measured.errors[i, :, 0])
        for name, measured in result.measured.items()
        for i, start in enumerate(NAMES)
    }
    assert all(np.max(end) < -20 for name in ACTIVATIONS for end in ends[name, "std 0.01"])
    assert all(np.min(end) > 20 for end in ends["relu", "std 1"])
    forward, backward = ends["tanh", "std 1"]
    assert np.min(forward) > -0.1 and np.min(backward) > 8  # saturated: only the error explodes
    # 2^-19 is 10^-5.7; the standard deviation of the logarithm after 19 layers, √(19·5/64)/ln 10, is 0.53.
    assert all(np.abs(np.median(end) + 19 * np.log10(2)) < 2 for end in ends["relu", "LeCun"])
    assert all(np.abs(np.median(end)) < 2 for end in ends["relu", "He"])


def test_a_network_learns_where_its_signal_gets_through(quick):
    result, out, figure = quick
    cost = {name: dict(zip(NAMES, last_costs(result, name), strict=True)) for name in ACTIVATIONS}
    for start in ("LeCun", "Glorot", "He"):
        assert cost["tanh"][start] < log(10) / 2
    assert cost["relu"]["He"] < log(10) / 2
    for name in ACTIVATIONS:
        # Only the last bias learns, how often each class is in a batch.
        assert cost[name]["std 0.01"] == pytest.approx(log(10), abs=0.01)
    assert min(cost["relu"]["LeCun"], cost["relu"]["Glorot"]) > 0.98 * log(10)
    assert cost["relu"]["std 1"] == inf and cost["tanh"]["std 1"] > log(10)
    line = out.splitlines()[-2]
    assert f"tanh LeCun {cost['tanh']['LeCun']:.2f}, Glorot {cost['tanh']['Glorot']:.2f}, He " in line
    assert line.endswith(f"; relu He {cost['relu']['He']:.2f}.")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_table_has_a_row_for_every_network(quick):
    result, out, _ = quick
    for name in ACTIVATIONS:
        factors = [np.median(factor, axis=1) for factor in initialization.growth(result.measured[name])]
        for i, start in enumerate(NAMES):
            (row,) = [line for line in out.splitlines() if line.startswith(f"{name}  {start} ")]
            assert row.split()[-5] == f"{factors[0][i]:.3g}" and row.split()[-3] == f"{factors[1][i]:.3g}"


def test_lecun_and_glorot_are_one_start_where_all_widths_are_equal(quick):
    for measured in quick[0].measured.values():
        for signal in measured:
            np.testing.assert_array_equal(signal[NAMES.index("LeCun")], signal[NAMES.index("Glorot")])


@pytest.mark.parametrize("start", NAMES)
def test_variance_of_a_start_is_as_stated(start):
    initializer, variance = STARTS[start]
    W = np.asarray(initializer(jax.random.key(0), (300, 300), jnp.float64))
    # The variance of 90,000 normal numbers has the relative standard error √(2/90,000) = 0.0047.
    assert np.mean(W**2) == pytest.approx(variance(300), rel=5 * 0.0047)


def test_expected_factors_of_relu_are_half_the_gain():
    for gain in (0.5, 2.0, 3.0):
        for factor in initialization.growth(predict("relu", gain)):
            assert factor == pytest.approx(gain / 2)
    flat = predict("relu", 2.0)
    assert flat.activations.shape == flat.errors.shape == (LAYERS,)
    np.testing.assert_allclose([*flat.activations, *flat.errors], 0, atol=1e-12)


def test_mean_squares_of_tanh_have_their_known_limits():
    q = 1e-4  # E tanh² = q - 2q² + O(q³), E tanh′² = 1 - 2q + O(q²): from tanh x = x - x³/3 + …
    square, slope = initialization.mean_squares("tanh", q)
    assert square == pytest.approx(q - 2 * q**2, rel=10 * q**2)
    assert slope == pytest.approx(1 - 2 * q, rel=10 * q**2)
    q = 1e4  # ∫ sech² = 2 and ∫ sech⁴ = 4/3 under a density that is flat, 1/√(2πq), to O(1/q)
    square, slope = initialization.mean_squares("tanh", q)
    assert 1 - square == pytest.approx(2 / sqrt(2 * pi * q), rel=10 / q)
    assert slope == pytest.approx(4 / 3 / sqrt(2 * pi * q), rel=10 / q)


def test_growth_is_the_geometric_mean_over_the_layers():
    forward, backward = initialization.growth(predict("tanh", 1e-6))
    assert forward == pytest.approx(1e-6, rel=1e-5) and backward == pytest.approx(1e-6, rel=1e-5)


def test_error_of_the_last_layer_is_the_one_asked_for():
    cost = fnn.cost(fnn.mlp(fnn.tanh), initialization.inner_product)
    rng = np.random.default_rng(0)
    params = drawn(rng, (3, 5, 4))
    X, Y = np.ones((6, 3)), rng.normal(size=(6, 4))
    np.testing.assert_array_equal(jax.jit(partial(fnn.backprop, cost))(params, X, Y).errors[-1], Y)
    C = jax.jit(initialization.inner_product)(2 * Y, Y)
    np.testing.assert_allclose(C, 2 * np.sum(Y**2, axis=1), rtol=1e-14)


def test_log_mean_square_holds_where_the_square_is_out_of_range():
    log_mean_square = jax.jit(initialization.log_mean_square)
    for exponent in (-30, 0, 30):
        scaled = np.array([[3.0, -4.0]], np.float32) * np.float32(10.0**exponent)
        assert log_mean_square(scaled) == pytest.approx(2 * exponent + np.log10(12.5), abs=1e-5)


def test_figure_labels_its_axes_and_its_starts(quick):
    figure = initialization.draw(quick[0])
    assert len(figure.axes) == 6
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:5] == NAMES
    assert figure.get_suptitle() == initialization.finding(quick[0])
    (note,) = figure.axes[5].texts
    assert note.get_text().startswith("std 1: ") and note.get_text().endswith("then diverges")


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--width 31", "from 32 to 512", "31"),
        ("--runs 0", "at least 1", "0"),
        ("--learning-rate nan", "a finite number above 0", "nan"),
        ("--steps 19", "at least 20", "19"),
    ),
)
def test_bad_flag_is_one_line_that_says_what_was_expected_and_what_came(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        initialization.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith(f"initialization: {flags.split()[0]} needs to be ")
    assert expected in err and err.endswith(f", got {got}.\n")
