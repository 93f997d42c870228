"""A run on the host: epochs in groups without a changed bit; it stops early, when told, where it diverges."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import host_loop, runs
from tests.test_train import ADAM, assert_equal, count_compilations, fit, problem

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_epochs_in_one_call_are_those_one_by_one_to_the_last_bit():
    """With a callback every epoch is a call of its own, without one up to 256 go together."""
    cost, params, data = problem()
    options = dict(
        epochs=150, validation=data, metrics={"accuracy": fnn.accuracy(cost.net)}, record={"C": mean_loss}
    )
    calls = []
    one_by_one = fit(
        cost, ADAM, params, data, callbacks=[lambda report: calls.append(report.epoch)], **options
    )
    together = fit(cost, ADAM, params, data, **options)
    assert calls == list(range(1, 151))
    for name in ("params", "train", "validation", "records"):
        assert_equal(getattr(one_by_one, name), getattr(together, name))
    assert together.records["C"].shape == (150 * 5,) and together.seconds.shape == (150,)
    # Groups: every epoch of one has the same time.
    assert len(set(together.seconds)) < 100 < len(set(one_by_one.seconds))


def mean_loss(sweep):
    return jnp.mean(sweep.losses)


def test_callbacks_see_every_epoch_and_may_end_the_run():
    cost, params, data = problem()
    reports = []

    def at_three(report):
        reports.append(jax.tree.map(np.asarray, report))
        return report.epoch == 3

    metrics = {"accuracy": fnn.accuracy(cost.net)}
    history = fit(cost, ADAM, params, data, epochs=9, callbacks=[at_three], metrics=metrics, validation=data)
    assert [report.epoch for report in reports] == [1, 2, 3] and [report.step for report in reports] == [
        5,
        10,
        15,
    ]
    for i, report in enumerate(reports):
        assert report.train == {name: column[i] for name, column in history.train.items()}
        assert report.validation == {name: column[i] for name, column in history.validation.items()}
    assert_equal(reports[-1].params, history.params)
    kept = []
    fit(cost, ADAM, params, data, epochs=2, callbacks=[kept.append])
    assert np.isfinite(kept[0].params[0].W).all() and (kept[0].params[0].W != kept[1].params[0].W).any()
    assert_equal(history.params, fit(cost, ADAM, params, data, epochs=3).params)
    # What is true but not True goes on.
    assert len(fit(cost, ADAM, params, data, epochs=2, callbacks=[lambda report: 1]).seconds) == 2


@pytest.mark.parametrize("larger", (False, True))
def test_early_stopping_returns_the_best_parameters(larger):
    """On labels that contradict the training ones the validation cost rises sooner or later."""
    cost, params, (X, y) = problem()
    metrics = {"accuracy": fnn.accuracy(cost.net)}
    rule = fnn.EarlyStopping("accuracy" if larger else "cost", patience=4, larger_is_better=larger)
    options = dict(validation=(X, 1 - y), metrics=metrics)
    history = fit(cost, ADAM, params, (X, y), epochs=200, early_stopping=rule, **options)
    column = history.validation[rule.monitor]
    best = int(np.argmax(column) if larger else np.argmin(column)) + 1  # the first of equal ones
    assert history.best_epoch == best and len(column) == best + 4 < 200
    held_out = metrics["accuracy"](history.params, X, 1 - y) if larger else cost(history.params, X, 1 - y)
    np.testing.assert_allclose(held_out, column[best - 1], rtol=1e-12)
    assert_equal(history.params, fit(cost, ADAM, params, (X, y), epochs=best).params)


def test_early_stopping_without_validation_looks_at_training_and_small_gains_do_not_count():
    cost, params, data = problem()
    rule = fnn.EarlyStopping(patience=2, min_delta=1e3)
    history = fit(cost, ADAM, params, data, epochs=50, early_stopping=rule)
    assert history.best_epoch == 1 and len(history.seconds) == 3
    never = fit(cost, ADAM, params, data, epochs=5, early_stopping=fnn.EarlyStopping(patience=50))
    assert never.best_epoch == 5 and len(never.seconds) == 5


def test_divergence_after_the_best_epoch_keeps_the_best():
    cost, params, data = problem()
    blows_up = optax.sgd(optax.piecewise_constant_schedule(0.1, {17: 1e300}))  # in the fourth epoch
    with pytest.raises(fnn.DivergenceError, match="in epoch 4") as error:
        fit(cost, blows_up, params, data, epochs=9, early_stopping=fnn.EarlyStopping(min_delta=1e3))
    history = error.value.history
    assert history.best_epoch == 1 and len(history.seconds) == 3
    assert_equal(history.params, fit(cost, blows_up, params, data, epochs=1).params)


def test_history_as_json_lines():
    cost, params, data = problem()
    history = fit(cost, ADAM, params, data, validation=data, metrics={"accuracy": fnn.accuracy(cost.net)})
    lines = [json.loads(line) for line in history.json_lines().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    for i, line in enumerate(lines):
        assert line["train"] == {name: column[i] for name, column in history.train.items()}
        assert line["validation"] == {name: column[i] for name, column in history.validation.items()}
        assert line["seconds"] == history.seconds[i]


# Divergence


def poisoned(at: int, *, value: bool = True):
    """A cost whose gradient, and value if wanted, is NaN in batches that hold example number `at`."""
    cost, params, (X, y) = problem()
    X = X.at[:, 2].set(jnp.arange(len(X)))

    def forward(params, X, y):
        C, residuals = cost.forward(params, X.at[:, 2].set(0), y)
        bad = jnp.where(jnp.any(X[:, 2] == at), jnp.nan, 1)
        return C * (bad if value else 1), (residuals, bad)

    def pullback(residuals, C_bar):
        residuals, bad = residuals
        return cost.pullback(residuals, C_bar * bad)

    return fnn.Rule(forward, pullback), params, (X, y)


@pytest.mark.parametrize("value", (True, False))
def test_steps_without_a_finite_gradient_are_skipped_and_counted(value):
    cost, params, data = poisoned(11, value=value)
    history = fit(cost, ADAM, params, data, epochs=6, on_divergence="skip")
    assert history.skipped == 6  # once an epoch
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(history.params))
    column = history.train["cost"]
    assert np.isfinite(column).all() and column[-1] < column[0]
    if value:  # one example in each batch: the cost is the mean over the others
        one_by_one = fit(cost, optax.sgd(0.0), params, data, epochs=1, batch_size=1, on_divergence="skip")
        X, y = (np.delete(array, 11, axis=0) for array in data)
        expected = problem()[0](params, jnp.asarray(X).at[:, 2].set(0), jnp.asarray(y))
        np.testing.assert_allclose(one_by_one.train["cost"], expected, rtol=1e-12)
    with pytest.raises(fnn.DivergenceError, match=r"in epoch 1 .* at step \d of 5"):
        fit(cost, ADAM, params, data, epochs=6)


def test_skipping_gives_up_where_every_step_fails():
    cost, params, data = poisoned(11)
    always = fnn.Rule(cost.forward, lambda residuals, C_bar: cost.pullback(residuals, C_bar * jnp.nan))
    with pytest.raises(fnn.DivergenceError, match=r"epoch 3 the parameters became .* at step 1 of 5\."):
        fit(always, ADAM, params, data, epochs=30, on_divergence="skip")


def test_skipping_changes_no_run_that_goes_well():
    cost, params, data = problem()
    plain, skipping = (fit(cost, ADAM, params, data, on_divergence=how) for how in ("raise", "skip"))
    assert skipping.skipped == plain.skipped == 0
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(skipping.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_a_second_equal_run_that_skips_compiles_nothing():
    def run():
        cost, params, data = problem()
        fit(cost, ADAM, params, data, on_divergence="skip")

    run()
    assert count_compilations(run) == 0


def diverging(activation, loss, rate, scale=1.0):
    params = fnn.init(jax.random.key(1), (3, 8, 6, 2), dtype="float32")
    params = jax.tree.map(lambda x: x * scale, params)
    X = jax.random.normal(jax.random.key(0), (37, 3), "float32")
    with pytest.raises(fnn.DivergenceError) as error:
        fit(fnn.cost(fnn.mlp(activation), loss), optax.sgd(rate), params, (X, X[:, :2]))
    return str(error.value)


@pytest.mark.parametrize("watched", (False, True))
def test_divergence_is_the_same_however_long_ago_the_state_was_kept(monkeypatch, watched):
    """After every call, which with a callback is one epoch, or once, before the first."""
    cost, params, (X, _) = problem()
    cost = fnn.cost(cost.net, fnn.squared_error)
    growing = optax.sgd(optax.exponential_decay(1e-3, transition_steps=4, decay_rate=2.0))
    options: dict[str, Any] = dict(epochs=100, callbacks=[lambda report: None] if watched else [])
    errors = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(host_loop, "KEPT_SECONDS", seconds)
        with pytest.raises(fnn.DivergenceError) as error:
            fit(cost, growing, params, (X, 3 * X[:, :2]), **options)
        errors.append(error.value)
    kept, replayed = errors
    assert str(kept) == str(replayed)
    assert 3 < len(kept.history.train["cost"]) == len(replayed.history.train["cost"])
    assert_equal(kept.history.params, replayed.history.params)
    assert_equal(kept.history.train, replayed.history.train)


def test_a_replay_that_diverges_before_keeps_what_was_kept(monkeypatch):
    """On some devices sums are not the same twice. Here all is called infinite from the fourth call on."""
    cost, params, data = problem()
    run, calls = runs._InMemory._run, []

    def flaky(self, state, n):
        state, is_finite, rows = run(self, state, n)
        calls.append(n)
        return state, is_finite and len(calls) < 4, rows

    monkeypatch.setattr(runs._InMemory, "_run", flaky)
    with pytest.raises(fnn.DivergenceError) as error:
        fit(cost, ADAM, params, data, epochs=100)
    assert_equal(error.value.history.params, params)
    assert len(error.value.history.seconds) == sum(calls[:3])


def test_a_call_reuses_the_memory_of_the_state():
    cost, params, data = problem()
    state = fnn.train_state(ADAM, params, jax.random.key(2))
    _, run = runs.compiled_epochs(cost, ADAM, (), (), 8, False, None)
    memory: Any = run.lower(state, data, None, np.int32(1)).compile().memory_analysis()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))))
    assert memory.alias_size_in_bytes == whole


def copied_in_a_step(cost, params, data):
    """The shapes of the matrices that a compiled step copies."""
    state = fnn.train_state(ADAM, params, jax.random.key(2))
    _, run = runs.compiled_epochs(cost, ADAM, (), (), 8, False, None)
    program: Any = run.lower(state, data, None, np.int32(3)).compile().as_text()
    (step,) = (part for part in program.split("\n\n") if len(re.findall(r" dot\(|ynn_fusion", part)) > 4)
    return set(re.findall(r"= f32\[(\d+,\d+)\]\S* copy\(", step))


def test_a_step_copies_no_weights():
    """They are updated in their own memory once the errors below them, and the penalty, are known."""
    params, data = problem(widths=(100, 400, 300, 200), dtype="float32")[1:]
    weights = {"400,100", "300,400", "200,300"}
    net, loss = fnn.mlp(fnn.relu), fnn.softmax_cross_entropy_with_integer_labels
    for l2 in (0.0, 1e-4):
        cost = fnn.cost(net, loss, l2=l2)
        assert not copied_in_a_step(cost, params, data) & weights
    by_autodiff = fnn.Rule(
        lambda params, *batch: jax.vjp(lambda params: cost.forward(params, *batch)[0], params),
        lambda vjp, C_bar: (*vjp(C_bar), None, None),
    )
    assert copied_in_a_step(by_autodiff, params, data) & weights == {"300,400", "200,300"}


def test_divergence_names_the_first_quantity_that_is_not_finite():
    at = r"in epoch 1 the cost became \S+ at step {} of 5\. First not finite there: {}"

    def expect(message, step, what):
        assert re.search(at.format(step, what), message), message

    expect(
        diverging(fnn.tanh, fnn.squared_error, np.nan), 2, r"params\[0\]\.W at index \[0, 0\], nan\. That was"
    )
    expect(
        diverging(fnn.relu, fnn.squared_error, 0.1, 1e20),
        1,
        r"a\^2, the output of layer 2 at index .*Nothing was",
    )
    expect(diverging(fnn.relu, fnn.squared_error, 0.1, 1e9), 1, r"the losses at index")
    steep = fnn.Rule(lambda z: (z, None), lambda _, a_bar: (a_bar * jnp.float32(1e38) * 1e38,))
    found = diverging(steep, fnn.squared_error, 0.1)
    assert re.search(r"in epoch 1 .* at step \d of 5\. First not finite there: .*", found)


def test_divergence_through_the_errors_alone_is_told_from_the_forward_pass():
    """The cost is finite, δ^1 is not: the parameters are bad after the first step."""
    steep = fnn.Rule(lambda z: (z, None), lambda _, a_bar: (a_bar / 0,))
    cost = fnn.cost(fnn.mlp(steep), fnn.squared_error)
    _, params, (X, y) = problem(8, widths=(3, 8, 6, 2))
    with pytest.raises(
        fnn.DivergenceError, match=r"parameters became .* at step 1 of 1\. .*: δ\^2, the error of layer 2"
    ):
        fit(cost, ADAM, params, (X, X[:, :2]), epochs=1, batch_size=8)


def test_divergence_of_a_rule_that_is_no_network_is_explained_too():
    cost, params, data = poisoned(11)
    with pytest.raises(fnn.DivergenceError, match=r"First not finite there: the cost, nan\."):
        fit(cost, ADAM, params, data)
