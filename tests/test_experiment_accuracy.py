"""By hand every slope is right to half a unit in 16 bits, by autodiff it is not, and nor is a gradient."""

import contextlib
import io

import numpy as np
import pytest

from experiments import accuracy
from experiments.accuracy import Errors, Flags, dtype_of, gradient_errors, slope_errors, summarise
from experiments.exact import finite_numbers

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_quick_run_prints_both_tables_and_draws(tmp_path):
    path, out = tmp_path / "figure.png", io.StringIO()
    with contextlib.redirect_stdout(out):
        accuracy.main(["--quick", "--output", str(path)])
    lines = out.getvalue().splitlines()
    assert "992 float16 numbers" in lines[0] and path.stat().st_size > 20_000
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    for name in accuracy.PAIRS:
        worst, share, lost, *_ = rows[name] if name not in accuracy.NETWORKS else table_row(lines, name)
        assert float(worst) < 0.502 and share == "0.0%" and lost == "0"


def table_row(lines, name):
    """The first line of that name; the second is the gradient's."""
    return next(line.split()[1:] for line in lines if line.split()[:1] == [name])


@pytest.mark.parametrize("dtype_name", ("float16", "bfloat16"))
def test_autodiff_of_gelu_tanh_is_not_finite_where_the_slope_is(dtype_name):
    inputs = finite_numbers(dtype_of(Flags(dtype=dtype_name)))[::97]
    errors = slope_errors("gelu_tanh", inputs)
    assert np.nanmax(errors.ours) < 0.502 and np.isinf(errors.autodiff).sum() > 50
    assert (np.isnan(errors.ours) == np.isnan(errors.autodiff)).all()
    assert np.isnan(errors.ours).any() == (dtype_name == "bfloat16")


def test_summary_leaves_out_what_is_set_apart_and_counts_what_is_lost():
    errors = np.array([0.25, 0.5, np.nan, 3.0, np.inf])
    assert summarise(errors) == ("3", "25.0%", "1")
    assert Errors(errors, errors).ours is errors


@pytest.mark.parametrize("name", ("tanh", "gelu_tanh"))
def test_gradient_over_4096_examples_is_nearer_to_float64_than_autodiffs(name):
    """Float16 rounds a number by up to 2⁻¹¹ = 0.0005; autodiff's errors p/N are below its normal numbers."""
    found = gradient_errors(name, np.dtype(np.float16), seed=1)
    assert found.ours < 2**-10 < found.autodiff
