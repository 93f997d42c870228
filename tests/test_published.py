"""Which published rules the judge finds right, at kinks too; and what it finds wrong, closed forms show."""

import re
from math import log, pi

import jax
import jax.numpy as jnp
import jax.scipy.special as special
import numpy as np
import optax
import pytest

import fnn
from experiments import published
from experiments.published import KINK, LOSES, NO_GRADIENT, NOT_ASKED, REFUSED, RIGHT, WRONG

QUICK = published.Flags(quick=True)
of_jax_0_10 = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="the table is of jax 0.10.2; later ones have jnp.sinc's gradient right",
)


@pytest.fixture
def defaults():
    with published.as_a_user_has_it():
        yield


@pytest.fixture(scope="module")
def quick():
    rows, _ = published.rows_of(QUICK)
    return rows, published.measure(QUICK, rows)


@of_jax_0_10
def test_quick_run_has_the_verdicts_that_it_is_known_for(quick):
    rows, answers = quick
    found = {
        (row.name, row.points): tuple(one.verdict for one in verdicts.values())
        for row, verdicts in zip(rows, answers, strict=True)
    }
    assert found == {
        ("nn.relu", "0, -0, 10⁻³⁰"): (KINK, KINK, KINK),
        ("numpy.logaddexp", "(t, t), t to 1000"): (LOSES, LOSES, LOSES),
        ("numpy.sinc", "0, 1"): (RIGHT, RIGHT, RIGHT),
        ("numpy.sinc", "0.01, 0.001"): (LOSES, LOSES, LOSES),
        ("numpy.linalg.det", "diag(1, 2, 0, 3)"): (WRONG, NOT_ASKED, NOT_ASKED),
        ("scipy.special.xlogy", "x = 0"): (RIGHT, RIGHT, RIGHT),
        ("projection_simplex", "a corner"): (KINK, NO_GRADIENT, NO_GRADIENT),
        ("scale_gradient", "by 3"): (WRONG, WRONG, WRONG),
    }


@of_jax_0_10
def test_table_says_why_shows_it_and_names_what_is_missing(quick):
    rows, answers = quick
    text = published.table(rows, answers, ["a_package"])
    head, _, notes = text.partition("\n\n")
    lines = head.split("\n")
    assert lines[-1].split() == ["a_package", "not", "installed"]
    numbers = [int(n) for n in re.findall(r"\[(\d+)\]$", head, re.MULTILINE)]
    assert numbers == [int(n) for n in re.findall(r"^\[(\d+)\]", notes, re.MULTILINE)] == [1, 2, 3, 4, 5]
    assert notes.count("; the truth: ") == 4  # a gradient that is meant to be wrong needs no proof
    assert "gives 0, 0, 0, 0; the truth: 0, 0, 1·2·3 = 6, 0" in notes and "raises TypeError" in notes
    assert max(map(len, text.split("\n"))) <= 110 and "explained" not in notes


# What is said of others is true by mathematics alone, without the judge.


@pytest.mark.parametrize("dtype, t", ((jnp.float32, 1e8), (jnp.bfloat16, 500), (jnp.float16, 1000)))
def test_slope_of_logaddexp_along_its_diagonal_is_not_one(dtype, t, defaults):
    slope = float(jax.grad(lambda t: jnp.logaddexp(t, t))(dtype(t)))
    assert abs(slope - 1) > 50 * float(jnp.finfo(dtype).eps)


def test_gradient_of_det_is_zero_where_a_cofactor_is_six(defaults):
    last, other = (jnp.diag(jnp.array(d)) for d in ([1.0, 2, 3, 0], [1.0, 2, 0, 3]))
    gradient = jax.grad(jnp.linalg.det)
    np.testing.assert_allclose(jnp.diag(gradient(last)), [0, 0, 0, 6])
    assert not gradient(other).any()
    nudged = [float(jnp.linalg.det(other.at[2, 2].set(h))) for h in (-0.5, 0.5)]
    assert nudged[1] - nudged[0] == pytest.approx(6)


@of_jax_0_10
def test_other_lines_of_the_table_are_true(defaults):
    x = np.float16(0.001)
    assert jax.grad(jnp.sinc)(x) == -np.inf and -(pi**2) * x / 3 == pytest.approx(-0.00329, rel=1e-3)
    # Of log Φ the slope lies between -x and -x + 1/|x|.
    assert not 1000 <= jax.grad(special.log_ndtr)(np.float32(-1000)) <= 1000.01
    assert jnp.isnan(jax.grad(special.xlogy, 1)(0.0, 0.0))
    assert not jnp.any(special.xlogy(0.0, jnp.array([-1.0, -0.1, 0, 0.1, 1])))
    with pytest.raises(TypeError, match="Custom JVP rule"):
        jax.grad(lambda x: optax.projections.projection_simplex(x)[0])(jnp.ones(3, jnp.bfloat16))


@pytest.mark.parametrize(
    "x, ours, derivative, known",
    (
        # cos(π/2)/x - sin(π/2)/(πx²) at 1/2; I₁(1); 2x erfcx(x) - 2/√π at 0 and 10; the last by erfcx(10).
        (0.5, published.sinc, -4 / pi, None),
        (1e-3, published.sinc, -(pi**2) * 1e-3 / 3 * (1 - pi**2 * 1e-6 / 10), None),
        (1.0, published.i0, 0.5651591039924850, 1.2660658777520084),
        (0.0, published.erfcx, -2 / pi**0.5, 1.0),
        (10.0, published.erfcx, 20 * 0.05614099274382259 - 2 / pi**0.5, 0.05614099274382259),
        (0.0, published.log_ndtr, (2 / pi) ** 0.5, -log(2)),
        (-10.0, published.log_ndtr, 10.09809323396246, -53.23128515051247),
    ),
)
def test_references_have_the_known_values_and_slopes(x, ours, derivative, known):
    with jax.numpy_dtype_promotion("standard"):
        value, slope = jax.value_and_grad(ours)(jnp.float64(x))
    np.testing.assert_allclose(slope, derivative, rtol=1e-11)
    if known is not None:
        np.testing.assert_allclose(value, known, rtol=1e-13)


def test_determinant_written_out_is_the_determinant():
    M = np.random.default_rng(0).standard_normal((4, 4))
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(published.leibniz(jnp.asarray(M)), np.linalg.det(M), rtol=1e-12)


def test_plain_leaves_the_function_and_drops_its_rule(defaults):
    x = jnp.array([-1.0, 0, 2])
    np.testing.assert_array_equal(published.plain(jax.nn.relu)(x), jax.nn.relu(x))
    slope = jax.grad(lambda x: published.plain(jax.nn.relu)(x).sum())(x)
    np.testing.assert_array_equal(slope, [0, 0.5, 1])  # max(x, 0) has its middle at the tie, the rule 0


def test_package_that_is_not_installed_is_named_and_not_asked(monkeypatch):
    monkeypatch.setattr(published, "OPTIONAL", {"no_such_package": published.flax_rows})
    rows, missing = published.rows_of(published.Flags())
    assert missing == ["no_such_package"] and {row.package for row in rows} == {"jax", "optax"}
    assert "no_such_package not installed" in published.versions()


@pytest.mark.parametrize("package", published.OPTIONAL)
def test_parameters_of_other_libraries_are_judged(package):
    pytest.importorskip(package)
    with published.as_a_user_has_it():
        rows = [row for row in published.OPTIONAL[package]() if "parameters" in row.name]
        verdicts = [published.answer(row, "float32", 0).verdict for row in rows]
    assert verdicts == [RIGHT, WRONG]


def test_function_that_does_not_take_a_dtype_refuses_it():
    row = published.Row("jax", "log_ndtr", "1", published.of(special.log_ndtr, [1.0]))
    assert published.answer(row, "bfloat16", 0).verdict == REFUSED


def test_judge_that_breaks_is_no_refusal():
    def ask(dtype, seed) -> fnn.Report:
        raise TypeError("of the judge")

    with pytest.raises(TypeError, match="of the judge"):
        published.answer(published.Row("a", "b", "c", ask), "float32", 0)


def test_main_writes_the_table_where_it_is_told(monkeypatch, capsys, tmp_path):
    rows = published.jax_rows()[:1]
    monkeypatch.setattr(published, "rows_of", lambda flags: (rows, []))
    published.main(["--quick", "--output", str(tmp_path / "table.txt")])
    text = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out and f"jax {jax.__version__}" in text
    assert re.search(r"nn\.relu +ordinary +right +right +right", text)


@pytest.mark.parametrize(
    "flags, expected",
    (("--seed -1", "an integer from 0"), ("--output table.png", "a .txt file in an existing folder")),
)
def test_bad_flag_is_one_line(flags, expected, capsys):
    with pytest.raises(SystemExit) as exit:
        published.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"published: {flags.split()[0]} needs to be {expected}")
