"""The circuits of the lecture and the total derivative, run as their users run them."""

import numpy as np

from experiments import chain_rule, circuits
from tests.strategies import tolerance

ROUNDINGS = tolerance("float32") / np.finfo(np.float32).eps  # 50


def test_circuits_have_the_lectures_values_and_jaxs_gradients(capsys, tmp_path):
    circuits.main(["--quick", "--output", str(tmp_path / "figure.svg")])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    for row in (
        "f multiply(q, z) -12 1",
        "f reciprocal(shift) 0.7311 1",
        "f sigmoid(z) 0.7311 1",
        "w0 input 2 -0.1966",
        "f squared_norm(q) 0.116 1",
        "W input [[0.1, 0.5], [-0.3, 0.8]] [[0.088, 0.176], [0.104, 0.208]]",
    ):
        assert row.split() in rows, row
    assert float(out.split("differ by at most ")[1].split()[0]) < ROUNDINGS


def test_grouped_neuron_has_the_gradients_of_its_gates():
    apart, grouped = (circuits.measure()[title].sweep for title in list(circuits.CIRCUITS)[1:3])
    for name in grouped.graph.inputs:
        np.testing.assert_allclose(grouped.gradients[name], apart.gradients[name], rtol=1e-6)  # float32


def test_terms_through_y_and_z_cancel_and_the_one_through_x_is_left(capsys, tmp_path):
    result = chain_rule.measure(chain_rule.Flags())
    x, y, z = result.terms
    np.testing.assert_allclose(y, -z, atol=1e-5)
    ratio = np.abs(y).max() / np.abs(x).max()  # 2/t e sin(t - 1) at t = 1/2, over e
    np.testing.assert_allclose(ratio, 4 * np.sin(0.5), rtol=1e-5)
    np.testing.assert_allclose(result.total, np.e * np.cos(result.t - 1), atol=1e-5)
    assert result.difference < ROUNDINGS
    chain_rule.main(["--quick", "--t", "2", "--output", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    assert "(1×3)(3×1) = (1×1): [[1.469]]" in out and "df/dt" in out  # e cos(1) = 1.4687
    for axes in chain_rule.draw(result).axes:
        assert axes.get_xlabel() and axes.get_ylabel()
