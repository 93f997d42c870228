"""Steps fall with the batch size down to a floor; the variance of a batch's gradient is the theory's."""

import re
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from experiments import batch_size, digits
from experiments.batch_size import EVERY, QUICK_SIZES, RATES, N, Noise, Result
from tests.quick import optimised, quick_run
from tests.strategies import drawn


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run by command: its result, what it prints, and its figure."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("steps_to_target", "draw_errors"):
            patch.setattr(batch_size, name, optimised(getattr(batch_size, name)))
        patch.setattr(batch_size, "TIMED_DIGITS", 2**12)  # no test asks how long a step takes
        return quick_run(batch_size, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def tiny():
    """A cost, its gradient and its sweep for six examples and two hidden layers, in float64."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(6, 3)), np.array([0, 1, 1, 2, 0, 2])
    params = drawn(rng, (3, 5, 4, 3), bias=1.0)
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels)
    gradient = jax.jit(fnn.value_and_grad(cost))
    return (lambda rows: gradient(params, X[rows], y[rows])[1]), jax.jit(partial(fnn.backprop, cost))(
        params, X, y
    )


def test_steps_fall_as_one_over_m_to_a_floor_and_the_best_rate_rises(quick):
    result, _, _ = quick
    assert tuple(result.sizes) == QUICK_SIZES == (1, 16, 256, N)
    one, sixteen, many, full = np.median(result.steps, axis=1)
    assert one > sixteen > many >= full
    assert 16 / 2 < one / sixteen < 16 * 2  # as 1/m
    assert many / full < N / 256 / 2  # no longer
    assert (np.diff(result.rates) >= 0).all() and result.rates[1] / result.rates[0] >= 4
    # The best rate has neighbours that were tried.
    assert RATES[0] < result.rates.min() and result.rates.max() < RATES[-1]


def test_time_to_target_is_the_product_of_the_medians_and_the_finding_names_the_least(quick):
    result, out, figure = quick
    product = np.median(result.steps, axis=1) * np.median(result.seconds, axis=1)
    np.testing.assert_array_equal(result.seconds_to_target, product)
    assert (result.seconds > 0).all()
    best = result.sizes[product.argmin()]
    assert best in result.soonest
    assert re.search(rf"^Batches of .*\b{best}\b.* in \d+ steps of \S+ µs, ", out, re.MULTILINE)
    rows = re.findall(r"^ *(\d+) +\S+ +\d+ \((\d+) to (\d+)\) .*(both 0|\d ± \d\.\d+)$", out, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(QUICK_SIZES)
    assert [(int(row[1]), int(row[2])) for row in rows] == [(s.min(), s.max()) for s in result.steps]
    assert f"jax {jax.__version__}" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_counted_steps_are_those_of_a_plain_loop(quick):
    result, _, _ = quick
    i, m = 2, 256
    (X, y), _ = digits.load(0)
    X, y = jnp.asarray(digits.standardised(X, X)), jnp.asarray(y)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), result.steps.shape[1])
    optimizer = optax.sgd(float(result.rates[i]))

    @jax.jit
    def step(state, rows):
        state, _ = fnn.train_step(batch_size.cost, optimizer, state, X[rows], y[rows])
        return state, batch_size.cost(state.params, X, y)

    for run, key in enumerate(keys):
        state = fnn.train_state(optimizer, batch_size.initial_params(key), key)
        count = 0
        for rows in batch_size.batches(np.random.default_rng((0, m, run)), m, 100):
            state, loss = step(state, rows)
            count += 1
            if loss <= result.target:
                break
        assert count == result.steps[i, run]


def test_evaluations_are_every_so_many_digits(quick):
    result, _, _ = quick
    for m, steps in zip(result.sizes, result.steps, strict=True):
        assert (steps % max(1, EVERY // m) == 0).all()


@pytest.mark.parametrize("m, steps", ((1, 2000), (64, 50), (1000, 3), (N, 4)))
def test_an_epoch_uses_no_digit_twice(m, steps):
    rows = batch_size.batches(np.random.default_rng(0), m, steps)
    assert rows.shape == (steps, m) and rows.min() >= 0 and rows.max() < N
    in_epoch = N // m
    epochs = [rows[i : i + in_epoch].ravel() for i in range(0, steps, in_epoch)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    if len(epochs) > 1:
        assert not np.array_equal(epochs[0][:m], epochs[1][:m])


def test_theory_is_exact_over_all_batches_of_a_tiny_set(tiny):
    _, sweep = tiny
    _, s2 = map(float, batch_size.total_variance(sweep))
    batches = [np.isin(np.arange(6), rows) for m in range(1, 7) for rows in combinations(range(6), m)]
    errors = jax.jit(jax.vmap(partial(batch_size.batch_gradient_error, sweep)))(jnp.asarray(batches))
    sizes = np.sum(batches, axis=1)
    means = [np.asarray(errors)[sizes == m].mean() for m in range(1, 7)]
    # Sums of 59 squares and 63 batches in float64.
    np.testing.assert_allclose(means, batch_size.theory(s2, np.arange(1, 7), 6), rtol=1e-12)
    assert means[-1] == 0


def test_norms_and_batch_gradients_of_the_sweep_are_those_of_the_examples_alone(tiny):
    gradient, sweep = tiny

    def square(tree):
        return sum(float(np.sum(np.asarray(leaf) ** 2)) for leaf in jax.tree.leaves(tree))

    alone = [square(gradient(np.array([n]))) for n in range(6)]
    np.testing.assert_allclose(jax.jit(batch_size.squared_norms)(sweep), alone, rtol=1e-12)
    rows = np.array([0, 2, 5])
    apart = jax.tree.map(np.subtract, *jax.device_get((gradient(rows), gradient(np.arange(6)))))
    in_batch = jnp.asarray(np.isin(np.arange(6), rows))
    np.testing.assert_allclose(
        jax.jit(batch_size.batch_gradient_error)(sweep, in_batch), square(apart), rtol=1e-12
    )


def test_measured_variance_is_the_theory_within_its_statistical_error(quick):
    """A mean over independent draws is normal, so that 4 standard errors are exceeded once in 16,000."""
    noise = quick[0].noise
    below = quick[0].sizes < N
    assert (np.abs(noise.variance - noise.theory)[below] <= 4 * noise.error[below]).all()
    assert (noise.error[below] < 0.2 * noise.theory[below]).all()  # so that the line above can fail
    assert noise.variance[-1] == noise.theory[-1] == noise.error[-1] == 0
    assert noise.scale == pytest.approx(noise.theory[0] / noise.squared_gradient)


def test_figure_marks_the_least_time_and_labels_its_axes():
    sizes = np.array([1, 32, N])
    noise = Noise(np.array([9.0, 0.3, 0]), np.array([1, 0.01, 0]), np.array([9.1, 0.28, 0]), 0.1, 91.0)
    steps = np.array([[900.0, 1000, 1100], [30, 40, 50], [9, 10, 11]])
    seconds = np.array([[1e-6, 2e-6, 3e-6], [9e-6, 1e-5, 2e-5], [1e-4, 2e-4, 3e-4]])
    result = Result(0.1, sizes, np.array([0.125, 1, 2]), steps, seconds, noise)
    figure = batch_size.draw(result)
    figure.draw_without_rendering()  # a layout that does not fit would warn
    assert figure.get_suptitle() == "Batches of 32 reach the loss soonest, in 40 steps of 10 µs, 0.4 ms"
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)
    (star,) = [line for line in figure.axes[2].lines if line.get_marker() == "*"]
    assert star.get_xdata() == [32] and star.get_ydata() == pytest.approx([0.4])
    assert "m = 1 takes 5.0 times as long, m = 1437 takes 5.0 times" in batch_size.report(result)
    seconds = seconds * [[1], [1], [0.25]]  # 10 steps of 50 µs: the quartiles of 32 and 1437 meet
    assert batch_size.finding(result._replace(seconds=seconds)).startswith("Batches of 32 to 1437 reach")


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--target 0", "a number from 0.01 to 1", "0.0"),
        ("--target nan", "a number from 0.01 to 1", "nan"),
        ("--runs 4", "an odd integer of at least 1", "4"),
        ("--draws 1", "at least 2", "1"),
    ),
)
def test_bad_flag_is_one_line_that_says_what_was_expected_and_what_came(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        batch_size.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.startswith(f"batch_size: {flags.split()[0]} needs to be ")
    assert expected in err and err.endswith(f", got {got}.\n")
