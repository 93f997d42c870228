"""The fit finds the constants of made-up runs; the estimates are the truth on average, and divided once."""

import re
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from experiments import batch_size, digits, noise_scale
from experiments.noise_scale import MEASURED, QUICK_SIZES, QUICK_TARGETS, Check, N, Parts, Target
from fnn.orders import shuffle
from tests.quick import optimised, quick_run
from tests.strategies import drawn

# 1 to 1437, B_crit of the made-up runs well inside.
SIZES = np.array([1, 4, 16, 64, 256, N])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run by command: its check, its targets, what it prints, and its figure."""
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_size, "steps_to_target", optimised(batch_size.steps_to_target))
        patch.setattr(noise_scale, "draw_parts", optimised(noise_scale.draw_parts, "draws"))
        results, *rest = quick_run(noise_scale, tmp_path_factory.mktemp("quick"))
    return *results, *rest


@pytest.mark.parametrize("S_min, E_min", ((30.0, 2700.0), (5.0, 20.0), (800.0, 1e6)))
def test_fit_recovers_the_constants_of_the_law(S_min, E_min):
    fitted = noise_scale.fit(SIZES, S_min + E_min / SIZES)
    np.testing.assert_allclose(fitted, (S_min, E_min), rtol=1e-9)


def test_fit_has_the_least_error_of_the_logs():
    """No neighbour does better, with steps off the law by up to a fifth."""
    steps = (30 + 2700 / SIZES) * np.random.default_rng(0).uniform(0.8, 1.2, len(SIZES))
    S_min, E_min = noise_scale.fit(SIZES, steps)

    def error(S_min, E_min):
        return (np.log((S_min + E_min / SIZES) / steps) ** 2).sum()

    for a, b in ((1.001, 1), (0.999, 1), (1, 1.001), (1, 0.999)):
        assert error(a * S_min, b * E_min) > error(S_min, E_min)


def test_examples_of_the_law_double_at_the_critical_size():
    sizes = np.geomspace(1e-4, 1e4, 801)  # from E_min itself, in steps of 2 %
    assert noise_scale.doubling(sizes, 30 + 2700 / sizes) == pytest.approx(90, rel=1e-3)
    # In between, as a power: 100, 100 and 400 examples with 1, 10 and 40 at a time.
    assert noise_scale.doubling(np.array([1, 10, 40]), np.array([100, 10, 10])) == pytest.approx(20)
    assert noise_scale.doubling(np.array([1, 10]), np.array([100, 10])) == 10


def test_scale_divides_averages_and_knows_that_examples_are_finite():
    parts = Parts(np.array([10.0, 30]), np.array([0.3, -0.1]))
    assert parts.scale() == pytest.approx(20 / (0.1 + 20 / N))
    first = noise_scale.until(Parts(*(np.tile(part, (3, 1)) for part in parts)), 1)
    assert first.trace.shape == (3, 1) and first.scale() == pytest.approx(10 / (0.3 + 10 / N))
    rest = noise_scale.until(Parts(*(part[None] for part in parts)), 2, 1)
    assert rest.trace.tolist() == [[30]] and rest.squared_norm.tolist() == [[-0.1]]


def tiny(n):
    """So many examples, and the parameters of two hidden layers."""
    rng = np.random.default_rng(n)
    params = drawn(rng, (3, 5, 4, 3), bias=1.0)
    return rng.normal(size=(n, 3)), np.array([0, 1, 1, 2, 0, 2])[:n], params


def test_mean_over_all_batches_of_a_tiny_set_is_the_truth(monkeypatch):
    """All 15 batches of 4 out of 6: s² and ‖G‖² - s²/N, N = 6, up to rounding in float64."""
    X, y, params = tiny(6)
    batches = np.array(list(combinations(range(6), 4)))

    @jax.jit
    @jax.vmap
    def parts(rows):
        sweep = fnn.backprop(batch_size.cost, params, jnp.asarray(X)[rows], jnp.asarray(y)[rows])
        return fnn.noise_scale_parts(sweep)

    trace, squared_norm = (np.asarray(part).mean() for part in parts(batches))
    s2, signal = noise_scale.truth(params, X, y)
    np.testing.assert_allclose((trace, squared_norm), (s2, signal - s2 / 6), rtol=1e-10)
    monkeypatch.setattr(noise_scale, "N", 6)
    assert noise_scale.scale_of(trace, squared_norm) == pytest.approx(s2 / signal, rel=1e-10)


def test_truth_is_the_variance_and_the_mean_of_gradients_taken_alone():
    X, y, params = tiny(4)
    gradient = jax.jit(fnn.value_and_grad(batch_size.cost))
    alone = [gradient(params, X[n : n + 1], y[n : n + 1])[1] for n in range(4)]
    rows = np.array([np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in alone])
    expected = rows.var(axis=0, ddof=1).sum(), (rows.mean(axis=0) ** 2).sum()
    np.testing.assert_allclose(noise_scale.truth(params, X, y), expected, rtol=1e-10)


def test_drawn_batches_agree_with_the_truth_and_another_truth_would_not(quick):
    """A mean over independent draws is normal: 4 standard errors are exceeded once in 16,000."""
    check = quick[0]
    assert max(map(abs, check.apart())) < 4
    assert check.apart()[0] > noise_scale.in_errors(check.parts.trace, 1.1 * check.trace) + 4
    # Without s²/N the second part would miss ‖G‖² by far more than its error.
    assert noise_scale.in_errors(check.parts.squared_norm, check.squared_norm) < check.apart()[1] - 2


def test_recorded_parts_are_those_of_the_steps_of_fit(standard_promotion):
    (X, y), _ = digits.load(0)
    data = jnp.asarray(digits.standardised(X, X)), jnp.asarray(y)
    params = jax.tree.map(lambda leaf: leaf[0], batch_of_params(1))
    parts = noise_scale.record_noise(64, 1.0, 25, [params, params], data, jax.random.key(0))
    assert parts.trace.shape == parts.squared_norm.shape == (2, 25)  # 23 steps of one epoch, 2 of the next
    assert not np.array_equal(parts.trace[0], parts.trace[1])  # another order
    key = jax.random.fold_in(jax.random.key(0), 0)
    rows = shuffle(fnn.train_state(optax.sgd(1.0), params, key).key, N)[1][:64]
    sweep = jax.jit(lambda *args: fnn.noise_scale_parts(fnn.backprop(batch_size.cost, *args)))
    first = sweep(params, data[0][rows], data[1][rows])
    # Float32 sums of 64 squares.
    np.testing.assert_allclose((parts.trace[0, 0], parts.squared_norm[0, 0]), first, rtol=1e-4)


def batch_of_params(runs: int):
    return jax.jit(jax.vmap(batch_size.initial_params))(jax.random.split(jax.random.key(0), runs))


def test_quick_run_finds_the_noise_scale_rising_and_near_the_critical_size(quick):
    check, targets, out, figure = quick
    assert tuple(t.loss for t in targets) == QUICK_TARGETS
    for t in targets:
        assert tuple(t.sizes) == QUICK_SIZES
        S_min, E_min = noise_scale.fit(t.sizes, t.medians)
        (m,) = t.noise
        assert m in MEASURED and t.noise[m].trace.shape == (3, np.median(t.steps[QUICK_SIZES.index(m)]))
        run, end = noise_scale.run_and_end(t, m)
        assert E_min / S_min / 3 < run < 3 * E_min / S_min and run < end < N
        assert re.search(rf"^ *{t.loss:g} .* {E_min / S_min:.0f} .* {run:.0f} +{end:.0f}$", out, re.MULTILINE)
    assert f"{check.trace / check.squared_norm:.1f}" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_figure_and_finding_are_of_the_numbers():
    steps = np.tile((30 + 3000 / SIZES)[:, None], (1, 3))
    # B_simple 200 at first and 50 in the last quarter, in terms of the N examples.
    squared_norm = np.repeat([[100 / 200, 100 / 50]], (15, 5), axis=1) - 100 / N
    parts = Parts(np.where(np.arange(20) % 5 < 2, 98.5, 101)[None], squared_norm)  # mean of 5: 100
    targets = [Target(loss, SIZES, np.full(6, 0.5), steps, {16: parts}) for loss in (0.2, 0.02)]
    run = 100 / (0.75 * 0.5 + 0.25 * 2)
    np.testing.assert_allclose(noise_scale.run_and_end(targets[0], 16), (run, 50), rtol=1e-12)
    figure = noise_scale.draw(targets)
    figure.draw_without_rendering()  # a layout that does not fit would warn
    title = figure.get_suptitle()
    assert f"{run / 100:.2g} to {run / 100:.2g} times" in title and "0.5 to 0.5 times" in title
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    report = noise_scale.report(Check(Parts(*(part[0] for part in parts)), 100.0, 1.0), targets)
    assert re.search(r"^ 0\.2 +30 +3000 +100 +", report, re.MULTILINE)


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--targets 0.1 0", "numbers from 0.01 to 1", "0.0"),
        ("--targets nan", "numbers from 0.01 to 1", "nan"),
        ("--targets 1 1 1 1 1 1", "one to five numbers", "(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)"),
        ("--runs 4", "an odd integer of at least 1", "4"),
        ("--draws 1", "at least 2", "1"),
    ),
)
def test_bad_flag_is_one_line_that_says_what_was_expected_and_what_came(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        noise_scale.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith(f"noise_scale: {flags.split()[0]} needs to be ")
    assert expected in err and err.endswith(f", got {got}.\n")
