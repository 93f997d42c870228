"""Batches as they come: the run of `fit` on them, with their errors, their end, and their place kept."""

import itertools
import re
import threading
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import resume, streams
from tests.test_train import ADAM, assert_equal, problem

pytestmark = pytest.mark.usefixtures("standard_promotion")

COST, PARAMS, (X, Y) = problem(37)  # 37 examples: batches of 8 leave a last one of 5
DATA = np.asarray(X), np.asarray(Y)
KEY = jax.random.key(2)
STEPS = 5


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not left, left


def batches(data=DATA, epochs=3, batch_size=8):
    return fnn.Batches(data, key=KEY, batch_size=batch_size, epochs=epochs)


def fit_batches(given, cost: Any = COST, optimizer=ADAM, params=PARAMS, **options):
    defaults: dict[str, Any] = dict(steps_per_epoch=STEPS, progress=False)
    return fnn.fit_batches(cost, optimizer, params, given, **(defaults | options))


def fit(data=DATA, optimizer=ADAM, params=PARAMS, **options):
    defaults: dict[str, Any] = dict(key=KEY, epochs=3, batch_size=8, progress=False)
    return fnn.fit(COST, optimizer, params, data, **(defaults | options))


@pytest.fixture(scope="module")
def in_memory():
    with jax.numpy_dtype_promotion("standard"):
        return fit()


def mean_norm(sweep):
    return jnp.mean(fnn.example_norms(sweep))


# The run of `fit`


def test_run_on_batches_is_that_in_memory_to_the_last_bit(in_memory):
    history = fit_batches(batches(), epochs=3)
    assert_equal(history.params, in_memory.params)
    np.testing.assert_allclose(history.train["cost"], in_memory.train["cost"], rtol=1e-14)
    assert history.validation == {} and history.records == {} and history.seconds.shape == (3,)
    # Any iterable of the same batches, and epochs counted by the batches.
    for given in (list(batches()), iter(batches()), (tuple(batch) for batch in batches())):
        assert_equal(fit_batches(given).params, in_memory.params)


def test_run_with_everything_is_that_in_memory_to_the_last_bit():
    data = (*DATA, np.linspace(0.5, 2, 37))
    held_out = DATA[0][:13] + 1, DATA[1][:13]
    options: dict[str, Any] = dict(validation=held_out, record={"norm": mean_norm})
    options |= dict(early_stopping=fnn.EarlyStopping(patience=2, min_delta=0.01), on_divergence="skip")
    whole = fit(data, metrics={"accuracy": fnn.accuracy(COST.net)}, epochs=9, **options)
    history = fit_batches(batches(data, 9), metrics={"accuracy": fnn.accuracy(COST.net)}, **options)
    assert_equal(history.params, whole.params)
    assert history.best_epoch == whole.best_epoch and len(history.seconds) == len(whole.seconds) < 9
    np.testing.assert_allclose(history.records["norm"], whole.records["norm"], rtol=1e-12)
    assert history.train.keys() == {"cost"} and history.validation.keys() == {"cost", "accuracy"}
    np.testing.assert_allclose(history.train["cost"], whole.train["cost"], rtol=1e-12)
    for name in ("cost", "accuracy"):
        np.testing.assert_allclose(history.validation[name], whole.validation[name], rtol=1e-12)


def test_a_layout_gives_the_run_in_memory_up_to_rounding(in_memory):
    """Batches of 8, and of 5, which the devices do not divide."""
    history = fit_batches(batches(), epochs=3, layout=fnn.fully_sharded(), validation=DATA)
    for a, b in zip(jax.tree.leaves(history.params), jax.tree.leaves(in_memory.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        assert len(a.devices()) == 8
    np.testing.assert_allclose(history.validation["cost"][-1], COST(in_memory.params, X, Y), rtol=1e-9)


def test_float32_from_a_file_with_64_bit_labels_and_without_x64(tmp_path):
    """Labels are NumPy's 64-bit integers, X a memory map of which only rows are read; settings of a `with`
    hold in the thread that reads."""
    mapped = np.lib.format.open_memmap(tmp_path / "X.npy", "w+", np.float32, (37, 3))
    mapped[:] = DATA[0]
    data = np.load(tmp_path / "X.npy", mmap_mode="r"), DATA[1].astype(np.int64)
    with jax.enable_x64(False):
        params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float32)), PARAMS)
        in_memory = fit(data, params=params)
        history = fit_batches(batches(data), params=params, checkpoint=tmp_path / "run")
        assert_equal(history.params, in_memory.params)
        assert history.params[0].W.dtype == "float32"
        with pytest.raises(TypeError, match=r"X of batch 0 .*float64"):
            fit_batches(batches(), params=params)


def test_batches_after_a_step_are_those_of_the_whole():
    whole = list(batches())
    assert len(batches()) == len(whole) == 15 and batches().steps_per_epoch == STEPS
    for step in range(len(whole) + 2):
        after = list(batches().after(step))
        assert len(after) == len(whole[step:])
        for a, b in zip(after, whole[step:], strict=True):
            assert_equal(a, b)
    assert sorted(len(y) for _, y in whole) == [5] * 3 + [8] * 12


def test_a_loader_may_fill_the_same_memory_again(in_memory):
    def reused():
        memory = [np.empty((8, *array.shape[1:]), array.dtype) for array in DATA]
        for batch in batches():
            for into, array in zip(memory, batch, strict=True):
                into[: len(array)] = array
            yield tuple(into[: len(batch[0])] for into in memory)

    assert_equal(fit_batches(reused(), epochs=3).params, in_memory.params)


# Where they end


def test_no_more_batches_are_taken_than_are_used(in_memory):
    """So that a stream that waits for its next batch does not hold up the end, and another run goes on."""
    taken = iter(batches(epochs=5))
    assert_equal(fit_batches(taken, epochs=3).params, in_memory.params)
    assert len(list(taken)) == 2 * STEPS


def test_steps_left_over_make_a_shorter_epoch(in_memory):
    steps = []
    history = fit_batches(batches(), steps_per_epoch=6, callbacks=[lambda report: steps.append(report.step)])
    assert_equal(history.params, in_memory.params)
    assert history.train["cost"].shape == (3,) and steps == [6, 12, 15]


def test_an_iterator_that_ends_early_is_told():
    with pytest.warns(RuntimeWarning, match="the batches ended after epoch 3 of 4"):
        history = fit_batches(batches(), epochs=4)
    assert len(history.seconds) == 3


def test_mean_cost_is_over_examples_and_batches_may_differ_in_length():
    """Rates of 0: the mean over batches of 5 and 8 examples is the cost of all of them."""
    ends = np.cumsum([8, 5, 8, 8, 8])
    given = [(DATA[0][a:b], DATA[1][a:b]) for a, b in itertools.pairwise([0, *ends])]
    history = fit_batches(given, optimizer=optax.sgd(0.0))
    np.testing.assert_allclose(history.train["cost"], [COST(PARAMS, X, Y)], rtol=1e-12)


def test_callbacks_see_every_epoch_and_may_end_the_run(in_memory):
    reports = []

    def at_three(report):
        reports.append(report)
        return report.epoch == 3

    history = fit_batches(itertools.cycle(batches()), callbacks=[at_three])
    assert [(report.epoch, report.step) for report in reports] == [(1, 5), (2, 10), (3, 15)]
    assert reports[-1].train == {"cost": history.train["cost"][-1]}
    assert_equal(history.params, in_memory.params)


# Errors of a stream


class Broken(Exception):
    pass


def breaks_at(number):
    yield from itertools.islice(batches(), number)
    raise Broken


@pytest.mark.parametrize("number, epochs", ((0, 0), (3, 0), (7, 1), (10, 2)))
def test_an_error_of_the_stream_comes_after_the_epochs_before_it(number, epochs):
    seen = []
    with pytest.raises(Broken):
        fit_batches(breaks_at(number), callbacks=[lambda report: seen.append(report.epoch)])
    assert seen == list(range(1, epochs + 1))


def test_what_is_wrong_with_a_batch_that_is_not_used_is_not_told(in_memory):
    assert_equal(fit_batches(breaks_at(15), epochs=3).params, in_memory.params)


def changed(number, change):
    given = list(batches())
    given[number] = change(*given[number])
    return given


def with_nan(X, y):
    X = X.copy()
    X[3, 1] = np.nan
    return X, y


# name -> (batches or options, type of the error, its message)
WRONG = {
    "NaN": (changed(7, with_nan), ValueError, r"X of batch 7 needs to be finite, got nan at index \(3, 1\)"),
    "labels": (
        changed(6, lambda X, y: (X, y + 5)),
        ValueError,
        r"(?s)labels.*about the batch 6 given to fit",
    ),
    "columns": (changed(8, lambda X, y: (X[:, :2], y)), ValueError, r"(?s)about the batch 8 given to fit"),
    "rows": (
        changed(2, lambda X, y: (X, y[:3])),
        ValueError,
        r"the arrays of batch 2 need one row per example",
    ),
    "no rows": (changed(2, lambda X, y: (X[:0], y[:0])), ValueError, r"batch 2 is empty"),
    "dtype": (
        changed(3, lambda X, y: (X.astype("float32"), y)),
        TypeError,
        r"(?s)same dtype.*about the batch 3",
    ),
    "weights": (
        changed(3, lambda X, y: (X, y, 0.0 * y)),
        ValueError,
        r"sample_weight of batch 3 .* not 0 for",
    ),
    "one array": (changed(4, lambda X, y: (X,)), TypeError, r"batch 4 needs to be \(X, y\) .* got 1 of them"),
    "a dict": (changed(4, lambda X, y: {"X": X}), TypeError, r"batch 4 needs to be \(X, y\) .* got dict"),
    "lists": (
        changed(1, lambda X, y: (X.tolist(), y)),
        TypeError,
        r"X of batch 1 needs to be an array, got list",
    ),
    "masked": (changed(1, lambda X, y: (np.ma.array(X), y)), TypeError, r"X of batch 1 is a masked array"),
    "data": (DATA, TypeError, r"batch 0 needs to be \(X, y\) or .* got ndarray"),
    "a string": ("batches", TypeError, r"batch 0 needs to be \(X, y\) .* got str"),
    "nothing": ([], ValueError, r"batches gave no batch; an iterator can be used once only"),
    "a function": (batches, TypeError, r"batches needs to be an iterable of \(X, y\), got function; call it"),
    "a number": (3, TypeError, r"batches needs to be an iterable of \(X, y\), got int"),
    "metrics alone": (
        dict(metrics={"accuracy": fnn.accuracy(COST.net)}),
        ValueError,
        r"metrics are of the validation data.*\['accuracy'\] and no validation",
    ),
    "no steps": (
        dict(steps_per_epoch=0),
        ValueError,
        r"steps_per_epoch needs to be a positive integer, got 0",
    ),
    "no epochs": (dict(epochs=0), ValueError, r"fit_batches: epochs needs to be a positive integer, got 0"),
    "a layout not made": (dict(layout=fnn.data_parallel), TypeError, r"fit_batches: layout needs to be one"),
    "records of each example": (
        dict(record={"norms": fnn.example_norms}),
        ValueError,
        r"(?s)'norms' of record needs to return equal shapes.*5 examples, another 8",
    ),
    "an optimiser not made": (dict(optimizer=optax.adam), TypeError, r"fit_batches: optimizer.*call it"),
    "cost a function": (
        dict(cost=lambda params, X, y: 0.0),
        TypeError,
        r"fit_batches: cost needs to be a rule",
    ),
}


@pytest.mark.usefixtures("no_shape_annotations")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_batches_are_told_which_and_why(name):
    given, error, message = WRONG[name]
    options = given if isinstance(given, dict) else {}
    with pytest.raises(error) as raised:
        fit_batches(batches() if options else cast(Any, given), **options)
    assert re.search(message, "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])]))


BATCHES = {
    "lists": (
        dict(data=([[1.0]], [0]), batch_size=1),
        TypeError,
        r"Batches: data needs to be arrays.*got list\. Use numpy",
    ),
    "rows": (dict(data=(DATA[0], DATA[1][:3])), ValueError, r"Batches: data needs to be arrays \(X, y\)"),
    "a batch above N": (
        dict(batch_size=38),
        ValueError,
        r"Batches: batch_size 38 is larger than the data, N = 37",
    ),
    "no epochs": (dict(epochs=0), ValueError, r"Batches: epochs needs to be a positive integer"),
    "a seed": (dict(key=0), TypeError, r"Batches: key"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_wrong_arguments_are_told_so(name):
    options, error, message = BATCHES[name]
    with pytest.raises(error, match=message):
        fnn.Batches(**(dict(data=DATA, key=KEY, batch_size=8, epochs=3) | options))


# Divergence


def test_divergence_names_the_step_and_keeps_the_epochs_before():
    """Batches of two lengths: several compiled calls an epoch, and the bad one is not the first."""
    blows_up = optax.sgd(optax.piecewise_constant_schedule(0.1, {8: 1e300}))  # in step 4 of the second epoch
    with pytest.raises(
        fnn.DivergenceError, match=r"in epoch 2 the cost became \S+ at step 5 of 5\."
    ) as error:
        fit_batches(batches(), optimizer=blows_up)
    history, before = error.value.history, fit_batches(batches(), optimizer=blows_up, epochs=1)
    assert_equal(history.params, before.params)
    assert history.train["cost"] == before.train["cost"] and len(history.seconds) == 1


def test_skipped_steps_are_counted_and_an_epoch_of_them_has_no_cost():
    bad = fnn.Rule(
        poisoned_forward, lambda residuals, C_bar: COST.pullback(residuals[0], C_bar * residuals[1])
    )
    given = list(batches(epochs=4))
    for i in range(5, 10):
        given[i] = given[i][0] + 100, given[i][1]
    history = fit_batches(given, cost=bad, on_divergence="skip")
    assert history.skipped == 5
    assert np.isfinite(history.train["cost"]).tolist() == [True, False, True, True]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(history.params))


def poisoned_forward(params, X, y):
    C, residuals = COST.forward(params, X, y)
    bad = jnp.where(jnp.any(X > 50), jnp.nan, 1)
    return C * bad, (residuals, bad)


# Checkpoints


class Stopped(Exception):
    pass


def stop_at(epoch):
    def callback(report):
        if report.epoch == epoch:
            raise Stopped

    return callback


class Counted:
    """Batches, counted as they are read; with `after` if wanted."""

    def __init__(self, has_after=True):
        self.read = []
        if has_after:
            self.after = self._after

    def _after(self, step):
        for number, batch in enumerate(batches().after(step), start=step):
            self.read.append(number)
            yield batch

    def __iter__(self):
        return self._after(0)


@pytest.mark.parametrize("has_after", (True, False))
def test_interrupted_run_ends_with_the_same_bits(has_after, tmp_path, monkeypatch, in_memory):
    """Stopped by a callback after epoch 2, then by the stream; what was used is passed over."""
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    options: dict[str, Any] = dict(checkpoint=tmp_path, record={"norm": mean_norm})
    with pytest.raises(Stopped):
        fit_batches(Counted(has_after), callbacks=[stop_at(2)], **options)
    with pytest.raises(Broken):
        fit_batches(breaks_at(12), **options)
    counted = Counted(has_after)
    history = fit_batches(counted, epochs=3, **options)
    # The first one says what the numbers of an epoch look like.
    assert counted.read == ([0, *range(10, 15)] if has_after else list(range(15)))
    plain = fit(record={"norm": mean_norm})
    assert_equal(history.params, plain.params)
    np.testing.assert_allclose(history.records["norm"], plain.records["norm"], rtol=1e-12)
    assert len(history.seconds) == 3
    again = fit_batches(Counted(has_after), epochs=3, **options)
    assert_equal(again.params, history.params)
    assert_equal(dict(again.train), dict(history.train))


def test_a_run_that_ended_in_the_middle_of_an_epoch_goes_on(tmp_path, in_memory):
    """7 steps are an epoch and a shorter one; the rest follows in epochs of their own."""
    given = list(batches())
    fit_batches(given[:7], checkpoint=tmp_path)
    history = fit_batches(given, checkpoint=tmp_path)
    assert_equal(history.params, in_memory.params)
    assert len(history.seconds) == 4


def test_a_generator_that_begins_anew_is_passed_over(tmp_path, in_memory):
    fit_batches(iter(batches()), epochs=1, checkpoint=tmp_path)
    assert_equal(fit_batches(iter(batches()), epochs=3, checkpoint=tmp_path).params, in_memory.params)


def test_checkpoints_of_other_steps_per_epoch_are_refused(tmp_path):
    fit_batches(batches(), epochs=1, checkpoint=tmp_path)
    with pytest.raises(fnn.CheckpointError, match=r"another run: steps_per_epoch was 5, and is 6"):
        fit_batches(batches(), steps_per_epoch=6, checkpoint=tmp_path)


def test_a_run_begun_with_other_orders_is_refused(tmp_path, monkeypatch):
    """Those of `Batches`; of an iterable of the user's nobody knows them."""
    _, _, data = problem()
    ours = fnn.Batches(data, key=jax.random.key(0), batch_size=8, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(streams, "KIND", None)  # as before there was one
        fit_batches(ours, epochs=1, checkpoint=tmp_path)
    with pytest.raises(fnn.CheckpointError, match=r"another run: shuffle was None, and is swap or not"):
        fit_batches(ours, epochs=2, checkpoint=tmp_path)


# The thread


def test_a_stream_that_waits_does_not_hold_up_an_end_before_it():
    """A batch that never comes, after those that are used, is not asked for."""
    never = threading.Event()

    def waits():
        yield from batches(epochs=1)
        never.wait(60)

    start = time.monotonic()
    assert len(fit_batches(waits(), epochs=1).seconds) == 1
    assert time.monotonic() - start < 30


def test_a_thread_that_waits_for_a_batch_is_left_after_a_second(monkeypatch):
    monkeypatch.setattr(streams, "SECONDS", 0.01)
    comes = threading.Event()

    def waits():
        yield from batches(epochs=1)
        comes.wait(60)

    with pytest.raises(Stopped):
        fit_batches(itertools.chain(batches(epochs=1), waits()), callbacks=[stop_at(1)])
    comes.set()
    for thread in threading.enumerate():
        if thread.name == "fit_batches":
            thread.join(10)
