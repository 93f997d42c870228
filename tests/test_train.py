"""Every example once an epoch, in a fresh order; compiled once; the same to the last bit; any optimiser."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from tests.properties import check_orders, check_steps, check_visits, orders
from tests.strategies import Architecture, drawn, network_case, signs

pytestmark = pytest.mark.usefixtures("standard_promotion")


# Of two optimisers made alike each compiles a run of its own.
SGD, ADAM = optax.sgd(0.1), optax.adam(0.05)


@cache
def problem(N=40, dtype="float64", widths=(3, 8, 2)):
    """40 examples are five batches of 8; of 37 the last has 5, and its step is compiled too."""
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels, l2=1e-4)
    params = drawn(np.random.default_rng(1), widths, dtype=dtype)
    return cost, params, signs(N, widths[0], dtype)


def fit(cost, optimizer, params, data, **options):
    defaults: dict[str, Any] = dict(key=jax.random.key(2), epochs=3, batch_size=8, progress=False)
    return fnn.fit(cost, optimizer, params, data, **(defaults | options))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 6, 7, 12, 23, 24])
def test_each_example_is_visited_exactly_once_an_epoch(batch_size):
    """24 examples: batch sizes that divide it, that leave a remainder of every kind, and the whole."""
    check_visits(fnn, 24, batch_size)


def test_order_is_fresh_every_epoch_and_decided_by_the_key():
    check_orders(fnn)


def test_epoch_equals_the_loop_over_its_batches():
    """The compiled scan, its short last batch included, against train_step in a Python loop."""
    cost, params, (X, y) = problem(37)
    optimizer, key = ADAM, jax.random.key(5)
    order = jnp.array(orders(fnn, key, N=37)[0])
    state = fnn.train_state(optimizer, params, key)
    step, costs = jax.jit(fnn.train_step, static_argnums=(0, 1)), []
    for i in range(0, 37, 8):
        state, C = step(cost, optimizer, state, X[order[i : i + 8]], y[order[i : i + 8]])
        costs.append(C)
    compiled = fnn.train_epoch(cost, optimizer, fnn.train_state(optimizer, params, key), (X, y), 8)
    np.testing.assert_allclose(compiled[1], jnp.stack(costs), rtol=1e-12)
    for a, b in zip(jax.tree.leaves(compiled[0].params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_steps_are_the_optimisers_own_on_the_gradients_of_autodiff():
    check_steps(fnn, network_case(fnn, Architecture(weighted=True, l2=0.1)))


def test_a_pullback_may_return_a_number_of_python():
    X = jnp.arange(40.0).reshape(40, 1)
    rule = fnn.Rule(lambda p, X, y: (2 * p, None), lambda residuals, C_bar: (2.0, None, None))
    history = fit(rule, SGD, jnp.zeros((), "float64"), (X, X[:, 0]), epochs=1)
    np.testing.assert_allclose(history.params, -5 * 0.1 * 2)


def test_step_is_the_optimisers_on_the_hand_written_gradient():
    cost, params, (X, y) = problem()
    optimizer = SGD
    state, C = fnn.train_step(cost, optimizer, fnn.train_state(optimizer, params, jax.random.key(0)), X, y)
    value, gradient = fnn.value_and_grad(cost)(params, X, y)
    assert C == value and state.step == 1
    assert_equal(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))


def test_equal_keys_give_equal_runs_to_the_last_bit():
    first, second, other = (fit(*problem_with_adam(), key=jax.random.key(k)) for k in (3, 3, 4))
    assert_equal(first.params, second.params)
    assert_equal(dict(first.train), dict(second.train))
    assert (first.params[0].W != other.params[0].W).any()


def problem_with_adam():
    cost, params, data = problem()
    return cost, ADAM, params, data


def test_keys_of_either_style_are_welcome():
    cost, params, data = problem()
    typed = fit(cost, SGD, params, data, key=jax.random.key(7))
    raw = fit(cost, SGD, params, data, key=jax.random.PRNGKey(7))
    assert_equal(typed.params, raw.params)


def test_params_and_key_given_to_fit_stay_usable():
    cost, params, data = problem()
    before, key = jax.tree.map(np.array, params), jax.random.key(2)
    history = fit(cost, ADAM, params, data, key=key)
    assert_equal(jax.tree.map(np.asarray, params), before)
    jax.random.split(key)
    assert (history.params[0].W != params[0].W).any()


def test_history_has_a_number_for_each_epoch():
    cost, params, (X, y) = problem()
    train, held_out = (X[:30], y[:30]), (X[30:], y[30:])
    metrics = {"accuracy": fnn.accuracy(cost.net)}
    history = fit(cost, ADAM, params, train, validation=held_out, metrics=metrics)
    assert set(history.train) == set(history.validation) == {"cost", "accuracy"}
    assert all(column.shape == (3,) for column in (*history.train.values(), *history.validation.values()))
    assert history.seconds.shape == (3,) and (history.seconds > 0).all()
    # The last row belongs to the parameters returned.
    np.testing.assert_allclose(history.validation["cost"][-1], cost(history.params, *held_out), rtol=1e-12)
    right = (cost.net.forward(history.params, X[:30])[0].argmax(axis=1) == y[:30]).mean()
    np.testing.assert_allclose(history.train["accuracy"][-1], right, rtol=1e-6)


def test_train_cost_is_the_mean_over_examples_not_over_steps():
    """10 examples in batches of 4, 4 and 2, a step size of 0: the cost must be that of the whole data."""
    cost, params, (X, y) = problem(N=10)
    history = fit(cost, optax.sgd(0.0), params, (X, y), batch_size=4, epochs=1)
    np.testing.assert_allclose(history.train["cost"], cost(params, X, y), rtol=1e-12)


def test_sample_weights_travel_with_their_examples():
    """Examples of weight 0 have labels that contradict the others; the fit must not notice them."""
    cost, params, (X, y) = problem()
    wrong = jnp.concatenate([y, 1 - y])
    weights = jnp.concatenate([jnp.ones(40), jnp.zeros(40)])
    run = dict(epochs=150, batch_size=80, metrics={"accuracy": fnn.accuracy(cost.net)}, validation=(X, y))
    history = fit(cost, ADAM, params, (jnp.concatenate([X, X]), wrong, weights), **run)
    assert history.validation["accuracy"][-1] > 0.9


OPTIMISERS = {
    "sgd": optax.sgd(0.5),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": ADAM,
    "adamw": optax.adamw(0.05),
    "lion": optax.lion(0.01),
    "rmsprop": optax.rmsprop(0.01),
    "schedule": optax.sgd(optax.cosine_decay_schedule(0.5, 50)),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
    "accumulated": optax.MultiSteps(optax.adam(0.05), every_k_schedule=2),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "on_plateau": optax.chain(optax.adam(0.05), optax.contrib.reduce_on_plateau()),
    "lbfgs": optax.lbfgs(),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optax_optimiser_lowers_the_cost(name):
    cost, params, data = problem()
    optimizer = OPTIMISERS[name]
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    history = fit(cost, optimizer, params, data, epochs=8, batch_size=40 if name == "lbfgs" else 10)
    assert history.train["cost"][-1] < 0.9 * cost(params, *data)


def test_weight_decay_and_layers_without_bias():
    cost, _, data = problem()
    params = fnn.init(jax.random.key(1), (3, 8, 2), bias=None)
    history = fit(cost, optax.adamw(0.05, weight_decay=0.1), params, data)
    assert all(layer.b is None for layer in history.params)


def count_compilations(function):
    """How many programs XLA compiles while the function runs."""
    events = []

    def listen(event, duration_secs, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(events)


def test_a_run_compiles_once_whatever_its_length():
    """A run of five epochs compiles as many programs as a run of one, and its step is traced as often."""
    traced = []

    def run(epochs):
        cost, params, data = problem()

        def forward(params, X, y):
            traced.append(len(X))
            return cost.forward(params, X, y)

        metrics = {"accuracy": fnn.accuracy(cost.net)}
        rule = fnn.Rule(forward, cost.pullback)
        fit(rule, ADAM, params, data, epochs=epochs, validation=data, metrics=metrics)

    run(1)  # what every run shares, such as splitting a key
    programs = []
    for epochs in (1, 5):
        traced.clear()
        programs.append((count_compilations(lambda epochs=epochs: run(epochs)), len(traced)))
    assert programs[0] == programs[1]
    assert programs[0][0] >= 1, "the count counts"


def test_a_second_equal_run_compiles_nothing():
    def run():
        cost, params, data = problem()
        fit(cost, OPTIMISERS["adam"], params, data)

    run()
    assert count_compilations(run) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fit_keeps_the_dtype_and_learns(dtype):
    cost, params, data = problem(dtype=dtype)
    history = fit(cost, ADAM, params, data, epochs=10)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(history.params))
    assert history.train["cost"][-1] < 0.8 * history.train["cost"][0]


def test_data_may_be_numpy_and_labels_64_bit():
    with jax.enable_x64(False):
        cost, params, (X, y) = problem(dtype="float32")
        history = fit(cost, SGD, params, (np.asarray(X), np.asarray(y, np.int64)))
        assert_equal(history.params, fit(cost, SGD, params, (X, y)).params)


def test_a_run_that_diverges_stops_with_what_was_good():
    cost, params, (X, y) = problem()
    regression = fnn.cost(fnn.mlp(fnn.identity), fnn.squared_error)
    target = X[:, :2] * 3
    # Doubles the step every update: the first epochs are fine, a later one overflows.
    growing = optax.sgd(optax.exponential_decay(1e-3, transition_steps=4, decay_rate=2.0))
    with pytest.raises(fnn.DivergenceError, match=r"in epoch (\d+) the cost became (inf|nan) at step"):
        fit(regression, growing, params, (X, target), epochs=100)
    try:
        fit(regression, growing, params, (X, target), epochs=100)
    except fnn.DivergenceError as error:
        good = len(error.history.train["cost"])
        assert good >= 3 and np.isfinite(error.history.train["cost"]).all()
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(error.history.params))
        # The same run stopped there returns the same parameters.
        assert_equal(fit(regression, growing, params, (X, target), epochs=good).params, error.history.params)


def test_progress_is_a_few_plain_lines_when_no_terminal_watches(capsys):
    history = fit(*problem_with_adam(), epochs=40, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("epoch  1/40  step   5  cost ") and len(lines) <= 11
    assert lines[-1].startswith("epoch 40/40  step 200  cost ")
    assert lines[-1].endswith(f"  {40 / np.median(history.seconds[-5:]):,.0f} examples/s")


def test_progress_bar_lives_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's way of being told that this is a terminal
    monkeypatch.setenv("TERM", "xterm")
    fit(*problem_with_adam(), epochs=4, progress=True)
    written = capsys.readouterr().err
    assert "4/4" in written and "cost" in written and "\x1b[" in written


def test_no_progress_prints_nothing(capsys):
    fit(*problem_with_adam(), progress=False)
    assert capsys.readouterr() == ("", "")


RECORD = {"layers": fnn.layer_statistics, "noise": fnn.noise_scale_parts}


@pytest.mark.parametrize("weighted", (False, True))
def test_what_is_recorded_is_of_the_sweep_of_every_step(weighted):
    """37 examples in batches of 8, 8, 8, 8 and 5, twice; replayed one by one with the same order."""
    cost, params, (X, y) = problem(37)
    data = (X, y, jnp.linspace(0.5, 2, len(X))) if weighted else (X, y)
    optimizer, key = SGD, jax.random.key(5)
    history = fit(cost, optimizer, params, data, key=key, epochs=2, record=RECORD)
    assert set(history.records) == set(RECORD)
    state, step = fnn.train_state(optimizer, params, key), 0

    @jax.jit
    def take(state, *batch):
        sweep = fnn.backprop(cost, state.params, *batch)
        return fnn.train_step(cost, optimizer, state, *batch)[0], {n: f(sweep) for n, f in RECORD.items()}

    for order in orders(fnn, key, N=37, epochs=2):
        for i in range(0, 37, 8):
            state, expected = take(state, *(array[np.array(order[i : i + 8])] for array in data))
            got = jax.tree.map(lambda column: column[step], dict(history.records))
            assert jax.tree.structure(got) == jax.tree.structure(expected)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
            step += 1
    assert len(history.records["noise"][0]) == step == 10
    for a, b in zip(jax.tree.leaves(history.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_recording_changes_a_run_by_no_more_than_rounding_and_nothing_recorded_is_empty():
    cost, params, data = problem()
    plain = fit(cost, ADAM, params, data)
    recorded = fit(cost, ADAM, params, data, record=RECORD)
    assert plain.records == {} and fit(cost, ADAM, params, data, record={}).records == {}
    for name in plain.train:
        np.testing.assert_allclose(plain.train[name], recorded.train[name], rtol=1e-9)
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(recorded.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # Adam divides by the gradient's own size


def test_numbers_of_every_example_are_recorded_where_batches_are_equal():
    cost, params, (X, y) = problem(N=24)
    history = fit(cost, SGD, params, (X, y), record={"norms": fnn.example_norms})
    assert history.records["norms"].shape == (9, 8)


def test_run_that_diverges_keeps_what_was_recorded_before():
    cost, params, data = problem()
    blows_up = optax.sgd(optax.piecewise_constant_schedule(0.1, {7: 1e300}))  # in the second epoch
    with pytest.raises(fnn.DivergenceError) as error:
        fit(cost, blows_up, params, data, record=RECORD)
    history = error.value.history
    assert len(history.seconds) == 1 and history.records["noise"][0].shape == (5,)
    large = jax.tree.map(lambda x: 1e200 * x, params)  # their penalty, a sum of squares, is not finite
    with pytest.raises(fnn.DivergenceError) as error:
        fit(cost, blows_up, large, data, record=RECORD)
    assert error.value.history.records == {}
