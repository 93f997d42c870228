"""A run that was stopped goes on from its folder, and ends with the bits of one that was not."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import resume, runs
from tests.test_train import ADAM, assert_equal, count_compilations, fit, problem

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(autouse=True)
def save_after_every_call(monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    monkeypatch.setattr(resume, "draw_history", lambda history, path: None)  # half a second each


class Stopped(Exception):
    pass


def stop_at(epoch):
    def callback(report):
        if report.epoch == epoch:
            raise Stopped

    return callback


def assert_same_run(a, b):
    assert_equal(a.params, b.params)
    for name in ("train", "validation", "records"):
        assert_equal(dict(getattr(a, name)), dict(getattr(b, name)))
    assert (a.best_epoch, a.skipped, len(a.seconds)) == (b.best_epoch, b.skipped, len(b.seconds))


OPTIONS = {
    "plain": {},
    "everything": dict(
        record={"norm": lambda sweep: jnp.mean(fnn.example_norms(sweep)), "parts": fnn.noise_scale_parts},
        metrics={"accuracy": fnn.accuracy(problem()[0].net)},
        early_stopping=fnn.EarlyStopping(patience=2, min_delta=0.05),
        on_divergence="skip",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("at", (2, 5, 8))
def test_interrupted_run_ends_with_the_same_bits(name, at, tmp_path):
    cost, params, data = problem()
    options = OPTIONS[name] | dict(epochs=9, validation=data)
    whole = fit(cost, ADAM, params, data, **options)
    for attempt in (at, at, at + 1):  # killed twice at the same place, then later
        try:
            fit(
                cost, ADAM, params, data, checkpoint=tmp_path / "run", callbacks=[stop_at(attempt)], **options
            )
        except Stopped:
            pass
    assert_same_run(fit(cost, ADAM, params, data, checkpoint=tmp_path / "run", **options), whole)


def test_a_run_may_be_made_longer_and_a_finished_one_is_only_read(tmp_path):
    cost, params, data = problem()
    folder = str(tmp_path / "new" / "run")
    fit(cost, ADAM, params, data, epochs=3, checkpoint=folder)
    longer = fit(cost, ADAM, params, data, epochs=7, checkpoint=folder)
    assert_same_run(longer, fit(cost, ADAM, params, data, epochs=7))
    seen = []
    again = fit(cost, ADAM, params, data, epochs=7, checkpoint=folder, callbacks=[seen.append])
    assert_same_run(again, longer)
    assert seen == []
    lines = [
        json.loads(line) for line in (tmp_path / "new" / "run" / "history.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in lines] == list(range(1, 8))
    assert [line["train"]["cost"] for line in lines] == longer.train["cost"].tolist()


def test_resuming_compiles_nothing_new(tmp_path):
    def run(epochs):
        cost, params, data = problem()
        fit(cost, ADAM, params, data, epochs=epochs, checkpoint=tmp_path)

    run(2)
    run(3)  # what reading needs
    assert count_compilations(lambda: run(4)) == 0


def test_sigterm_saves_and_ends_with_its_status(tmp_path, capsys):
    cost, params, data = problem()
    before = signal.getsignal(signal.SIGTERM)
    terminate = [lambda report: report.epoch == 4 and os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(SystemExit) as exit:
        fit(cost, ADAM, params, data, epochs=9, checkpoint=tmp_path, callbacks=terminate)
    assert exit.value.code == 143 and "SIGTERM after epoch 4, saved in" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []
    resumed = fit(cost, ADAM, params, data, epochs=9, checkpoint=tmp_path, callbacks=[seen.append])
    assert [report.epoch for report in seen] == [5, 6, 7, 8, 9]
    assert_same_run(resumed, fit(cost, ADAM, params, data, epochs=9))


def test_sigterm_at_the_last_save_is_not_lost(tmp_path, monkeypatch):
    cost, params, data = problem()
    save = resume.RunFolder.save

    def slow(self, *args):
        save(self, *args)
        if args[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(resume.RunFolder, "save", slow)
    with pytest.raises(SystemExit) as exit:
        fit(cost, ADAM, params, data, epochs=3, checkpoint=tmp_path)
    assert exit.value.code == 143


def test_a_run_that_a_callback_ended_is_over(tmp_path):
    cost, params, data = problem()
    options = dict(epochs=9, callbacks=[lambda report: report.epoch == 3], checkpoint=tmp_path)
    ended = fit(cost, ADAM, params, data, **options)
    assert_same_run(fit(cost, ADAM, params, data, **options), ended)
    assert len(ended.seconds) == 3


def test_damaged_checkpoint_is_passed_over_and_the_bits_are_the_same(tmp_path):
    cost, params, data = problem()
    with pytest.raises(Stopped):
        fit(cost, ADAM, params, data, epochs=9, checkpoint=tmp_path, callbacks=[stop_at(6)])
    newest = max(tmp_path.glob("step-*.npz"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match=newest.name):
        resumed = fit(cost, ADAM, params, data, epochs=9, checkpoint=tmp_path)
    assert_same_run(resumed, fit(cost, ADAM, params, data, epochs=9))


def test_keys_of_either_style_resume(tmp_path):
    cost, params, data = problem()
    for name, key in (("typed", jax.random.key(7)), ("raw", jax.random.PRNGKey(7))):
        fit(cost, ADAM, params, data, epochs=2, key=key, checkpoint=tmp_path / name)
        resumed = fit(cost, ADAM, params, data, epochs=4, key=key, checkpoint=tmp_path / name)
        assert_same_run(resumed, fit(cost, ADAM, params, data, epochs=4, key=key))


def another(**changes):
    cost, params, data = problem()
    return dict(cost=cost, optimizer=ADAM, params=params, data=data) | changes


OTHER = {
    "cost": (
        lambda: another(cost=fnn.cost(problem()[0].net, problem()[0].loss, l2=10.0)),
        r"another run: cost was .*l2=0.0001.*l2=10",
    ),
    "parameters": (
        lambda: another(params=jax.tree.map(lambda x: x + 1, problem()[1])),
        r"another run: params was",
    ),
    "epochs, fewer": (lambda: another(epochs=1), r"has 2 epochs of this run, more than epochs=1"),
    "data": (lambda: another(data=problem(N=38)[2]), r"another run: data was \[.*\], and is"),
    "one number of the data": (
        lambda: another(data=(problem()[2][0].at[3, 1].add(1e-9), problem()[2][1])),
        r"another run: data was",
    ),
    "key": (
        lambda: another(key=jax.random.key(9)),
        r"another run: key was \[.*2\], and is \[.*9\]\. Use another folder",
    ),
    "batch size": (lambda: another(batch_size=9), r"another run: batch_size was 8, and is 9"),
    "validation": (lambda: another(validation=problem()[2]), r"another run: validation was None"),
    "metrics": (
        lambda: another(metrics={"accuracy": fnn.accuracy(problem()[0].net)}),
        r"another run: numbers was \['cost'\], and is \['cost', 'accuracy'\]",
    ),
    "optimiser": (lambda: another(optimizer=optax.sgd(0.1)), r"differ; .*optimizer_state"),
    "network": (
        lambda: another(params=fnn.init(jax.random.key(1), (3, 8, 5, 2), dtype="float64")),
        r"another run: params was",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_checkpoints_of_another_run_are_refused(name, tmp_path):
    fit(**another(), epochs=2, checkpoint=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    options, message = OTHER[name]
    with pytest.raises(ValueError, match=message):
        fit(**(dict(epochs=4) | options()), checkpoint=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_run_begun_with_other_orders_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "KIND", None)  # as before there was one
        fit(**another(), epochs=2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="shuffle was None, and is swap or not.* version of fnn that began"):
        fit(**another(), epochs=4, checkpoint=tmp_path)


def test_not_due_is_not_saved_but_the_end_is(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SECONDS", 1e9)
    cost, params, data = problem()
    with pytest.raises(Stopped):
        fit(cost, ADAM, params, data, epochs=9, checkpoint=tmp_path, callbacks=[stop_at(6)])
    assert not list(tmp_path.glob("*.npz"))
    fit(cost, ADAM, params, data, epochs=9, checkpoint=tmp_path)
    assert [path.name for path in tmp_path.glob("*.npz")] == ["step-00000045.npz"]
    np.testing.assert_array_equal(len((tmp_path / "history.jsonl").read_text().splitlines()), 9)


def test_a_run_s_folder_says_what_it_was_and_shows_it(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(resume, "draw_history", lambda *arguments: drawn.append(arguments))
    cost, params, data = problem()
    history = fit(cost, ADAM, params, data, epochs=3, checkpoint=tmp_path)
    ((shown, path),) = drawn
    assert_equal(dict(shown.train), dict(history.train))
    assert path == tmp_path / "history.png"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["cost"] == repr(cost) and config["versions"]["jax"] == jax.__version__
    assert "of 1 processes" in config["devices"]
    fit(cost, ADAM, params, data, epochs=3, checkpoint=tmp_path)  # finished: nothing is drawn anew
    assert len(drawn) == 1


def test_a_run_without_matplotlib_has_no_picture(tmp_path, monkeypatch):
    def missing(history, path):
        raise ImportError

    monkeypatch.setattr(resume, "draw_history", missing)
    cost, params, data = problem()
    fit(cost, ADAM, params, data, epochs=1, checkpoint=tmp_path)
    assert not (tmp_path / "history.png").exists()
