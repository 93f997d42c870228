"""The picture of a run shows its numbers, and is there in every format."""

import sys
from typing import Any

import numpy as np
import optax
import pytest

import fnn
from tests.test_train import fit, problem

matplotlib = pytest.importorskip("matplotlib")
RNG = np.random.default_rng(0)


def made_up(epochs=12, names=("cost", "accuracy"), *, validation=True, **options):
    """A history of numbers between 1 and 2, all different."""
    train, held_out = ({name: 1 + RNG.random(epochs) for name in names} for _ in range(2))
    return fnn.History(None, train, held_out if validation else {}, np.ones(epochs), **options)


def curves(axes):
    """label -> its line; those that have one."""
    return {str(line.get_label()): line for line in axes.lines if not line.get_label().startswith("_")}


def points(line):
    return [np.asarray(axis, float).tolist() for axis in line.get_data()]


@pytest.mark.usefixtures("standard_promotion")
def test_curves_are_the_numbers_of_a_run(tmp_path):
    cost, params, data = problem()
    metrics = {"accuracy": fnn.accuracy(cost.net)}
    history = fit(cost, optax.adam(0.05), params, data, epochs=6, validation=data, metrics=metrics)
    figure = fnn.draw_history(history, tmp_path / "run.png")
    assert [axes.get_ylabel() for axes in figure.axes] == ["cost", "accuracy"]
    for axes in figure.axes:
        name, lines = axes.get_ylabel(), curves(axes)
        assert axes.get_xlabel() == "epoch"
        assert points(lines["training"]) == [[1, 2, 3, 4, 5, 6], history.train[name].tolist()]
        assert points(lines["validation"]) == [[1, 2, 3, 4, 5, 6], history.validation[name].tolist()]


def test_each_part_has_one_color_and_a_name_in_the_legend():
    figure = fnn.draw_history(made_up())
    for part in ("training", "validation"):
        assert len({curves(axes)[part].get_color() for axes in figure.axes}) == 1
    assert curves(figure.axes[0])["training"].get_color() != curves(figure.axes[0])["validation"].get_color()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:2] == ["training", "validation"] and legend[2].startswith("best epoch, ")
    alone = fnn.draw_history(made_up(validation=False))
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["training"]


@pytest.mark.parametrize("validation", (False, True))
def test_best_epoch_of_early_stopping_is_marked_on_every_panel(validation):
    history = made_up(best_epoch=4, validation=validation)
    part = history.validation if validation else history.train
    for axes in fnn.draw_history(history).axes:
        lines = curves(axes)
        assert points(lines["best epoch, 4"])[0] == [4, 4]
        assert points(axes.lines[-1]) == [[4], [part[axes.get_ylabel()][3]]]
        color = lines["validation" if validation else "training"].get_color()
        assert axes.lines[-1].get_color() == color


def test_best_epoch_is_otherwise_that_of_the_lowest_cost_on_validation_data():
    history = made_up()
    history.validation["cost"][[2, 7]] = np.nan, 0.5
    assert "best epoch, 8" in curves(fnn.draw_history(history).axes[1])
    without = (made_up(validation=False), made_up())
    without[1].validation["cost"][:] = np.nan
    for history in without:
        assert not any("best" in label for label in curves(fnn.draw_history(history).axes[0]))


@pytest.mark.parametrize(
    "costs, scale",
    (
        ([3.0, 1.0, 0.29], "log"),
        ([3.0, 1.0, 0.31], "linear"),
        ([3.0, np.nan, 0.29], "log"),
        ([3.0, 1.0, 0.0], "linear"),
        ([3.0, 1.0, -5.0], "linear"),
        ([np.nan] * 3, "linear"),
        ([np.inf, 2.0, 1.0], "linear"),
    ),
)
def test_cost_has_a_logarithmic_scale_where_it_spans_more_than_a_decade(costs, scale):
    history = fnn.History(None, {"cost": np.array(costs), "error": np.array([1e3, 1.0, 1.0])}, {}, np.ones(3))
    figure = fnn.draw_history(history)
    figure.draw_without_rendering()
    assert [axes.get_yscale() for axes in figure.axes] == [scale, "linear"]


def test_validation_numbers_count_for_the_scale():
    parts = {"cost": np.array([3.0, 1.0])}, {"cost": np.array([3.0, 0.1])}
    assert fnn.draw_history(fnn.History(None, *parts, np.ones(2))).axes[0].get_yscale() == "log"


@pytest.mark.parametrize("n", range(1, 8))
def test_every_number_has_a_panel_of_its_own_and_nothing_is_empty(n):
    figure = fnn.draw_history(made_up(3, ("cost", *(f"metric {i}" for i in range(1, n)))))
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    assert len(figure.axes) == n and None not in boxes
    found: list[Any] = boxes
    assert not any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in found)


@pytest.mark.parametrize("epochs", (1, 2, 5, 30, 31, 1000))
def test_epochs_are_whole_numbers_and_a_single_one_is_seen(epochs):
    figure = fnn.draw_history(made_up(epochs))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert all(tick == round(tick) for tick in axes.get_xticks())
    assert (curves(axes)["training"].get_marker() == ".") == (epochs <= 30)


@pytest.mark.parametrize("name, begins", (("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")))
@pytest.mark.parametrize("of", (str, None))
def test_file_is_of_the_kind_its_name_says(tmp_path, name, begins, of):
    path = tmp_path / name
    fnn.draw_history(made_up(), of(path) if of else path)
    assert path.read_bytes().startswith(begins)


def test_name_of_a_metric_is_shown_as_it_is(tmp_path):
    figure = fnn.draw_history(made_up(names=("cost", "a_b $\\x$")), tmp_path / "a.svg")
    assert figure.axes[1].get_ylabel() == "a_b $\\x$"


@pytest.mark.parametrize(
    "call, error, message",
    (
        (lambda p: fnn.draw_history({"cost": [1.0]}, p / "a.png"), TypeError, "fnn.fit returns, got dict"),  # pyright: ignore[reportArgumentType]
        (lambda p: fnn.draw_history(made_up(0), p / "a.png"), ValueError, "no epochs"),
        (lambda p: fnn.draw_history(fnn.History(None, {}, {}, np.array([])), p), ValueError, "no epochs"),
        (
            lambda p: fnn.draw_history(made_up(), p / "a.jpg"),
            ValueError,
            r"\.png, \.svg or \.pdf, got .*a\.jpg",
        ),
        (lambda p: fnn.draw_history(made_up(), p / "a"), ValueError, r"\.png, \.svg or \.pdf"),
        (lambda p: fnn.draw_history(made_up(), p / "nowhere" / "a.png"), OSError, "nowhere"),
    ),
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, no_shape_annotations, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'draw_history: .* pip install "fnn\[experiments\]"'):
        fnn.draw_history(made_up())
