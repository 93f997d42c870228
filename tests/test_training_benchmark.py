"""The rows of the benchmark of training do the same work; what its overhead is, is a part of a run."""

from functools import cache, partial

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tyro")

import fnn
from experiments.benchmarks import overhead, training
from experiments.benchmarks.timing import ratio_within
from experiments.benchmarks.training import ROWS, Row, Size, Task

WIDTHS = (5, 7, 7, 3)  # the hidden layers are equal, as Equinox's MLP has them
# torch.compile takes half a minute; its rows differ from others by one flag only.
QUICK_ROWS = [row for row in ROWS if row.quick]


@pytest.fixture(autouse=True)
def as_without_the_tests_settings():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


def make_task(batch_size: int, optimizer: str, rate: float) -> Task:
    generator = np.random.default_rng(0)
    params = fnn.init(jax.random.key(0), WIDTHS, weights=fnn.he_normal, bias=fnn.unit_normal)
    X = generator.normal(size=(12, WIDTHS[0])).astype(np.float32)
    y = np.arange(12, dtype=np.int32) % WIDTHS[-1]
    return Task([(np.array(W), np.array(b)) for W, b in params], X, y, batch_size, optimizer, rate)


def changes(row: Row, task: Task, epochs: int) -> list[np.ndarray]:
    """What a run adds to every array of the start; the second run, as in a measurement."""
    made = row.of(task)
    made.run(epochs)
    after = made.weights(made.run(epochs))
    assert all(W.dtype == b.dtype == np.float32 for W, b in after)
    return [np.array(a) - b for new, old in zip(after, task.start, strict=True) for a, b in zip(new, old)]


@cache
def changes_by_fit(batch_size: int, optimizer: str, rate: float, epochs: int) -> list[np.ndarray]:
    return changes(ROWS[0], make_task(batch_size, optimizer, rate), epochs)


def assert_trains_as_fit(
    row: Row, tolerance: float, batch_size: int, optimizer: str, rate: float, epochs: int
) -> None:
    """tolerance: relative to the largest change of an array's entries"""
    pytest.importorskip(row.needs)
    found = changes(row, make_task(batch_size, optimizer, rate), epochs)
    for a, b in zip(found, changes_by_fit(batch_size, optimizer, rate, epochs), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("row", QUICK_ROWS[1:], ids=lambda row: row.name)
def test_rows_take_the_same_steps(row):
    """One batch of all examples, so that their order changes nothing but the rounding."""
    tolerance = 1e-4
    if row.needs == "sklearn":
        tolerance = 0.01  # its epsilon is beside the root of the moment before the correction of its bias
    elif row.dtype == "bfloat16":
        tolerance = 0.5  # a small entry of the gradient makes as long a step as any, with its own error
    assert_trains_as_fit(row, tolerance, 12, "Adam", 1e-3, 5)


@pytest.mark.parametrize("row", QUICK_ROWS[1:], ids=lambda row: row.name)
def test_rows_use_every_example_once_in_an_epoch(row):
    """So small a rate that all steps begin at the same point, and their order does not matter."""
    assert_trains_as_fit(row, 0.05, 4, "SGD", 1e-3, 2)


def test_a_step_has_so_many_operations():
    """Counted by XLA, which has in addition what is not a product."""
    widths, m = (50, 70, 60, 40), 30
    params = fnn.init(jax.random.key(0), widths)
    cost = fnn.cost(fnn.mlp(fnn.relu), fnn.softmax_cross_entropy_with_integer_labels)
    X, y = np.zeros((m, widths[0]), np.float32), np.zeros(m, np.int32)
    compiled = jax.jit(fnn.value_and_grad(cost)).lower(params, X, y).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    expected = training.operations(widths, m)
    assert expected < analysis["flops"] < 1.1 * expected


def test_products_and_optimiser_alone_are_those_of_a_step():
    """Shapes of outputs, gradient and errors below; Adam goes by its rate where all slopes are 1."""
    task = make_task(4, "Adam", 1e-3)
    parts = training.alone(task, 2)
    assert list(parts) == [
        (dtype, part) for dtype in ("float32", "bfloat16") for part in ("products", "Adam")
    ]
    sizes = list(zip(WIDTHS[1:], WIDTHS))
    for dtype in ("float32", "bfloat16"):
        forward, gradient, below = parts[dtype, "products"]()
        assert [Z.shape for Z in forward] == [(4, n) for n, _ in sizes]
        assert [W.shape for W in gradient] == sizes
        assert [delta.shape for delta in below] == [(4, n) for _, n in sizes[1:]]
        after, _ = parts[dtype, "Adam"]()
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(task.start), strict=True):
            np.testing.assert_allclose(new, old - 2e-3, rtol=0, atol=1e-6)


def test_a_missing_library_is_a_row(monkeypatch):
    rows = [ROWS[0], Row("another", "no_such_library", training.by_grad)]
    monkeypatch.setattr(training, "ROWS", rows)
    monkeypatch.setattr(training, "products", lambda side: {})
    monkeypatch.setattr(training, "alone", lambda task, steps: {})
    lines = training.table("M", Size(WIDTHS, 12, 4, 1, 1, 1), "SGD", 1, 8, True).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["M, SGD", "fnn.fit", "another"]
    assert "not installed" in lines[2]


def test_time_in_compiled_calls_is_a_part_of_a_run():
    run = training.by_fit(make_task(4, "SGD", 1e-3)).run
    run(1)
    assert 0 < overhead.inside(partial(run, 30)) < 1


def test_interval_of_a_median_ratio():
    """Of 21 ratios the median, and the sixth from either end: P(at most 5 of 21 heads) is 1.3 %."""
    times = np.stack([np.arange(1, 22)[::-1], np.ones(21)], axis=1)
    assert ratio_within(times, 0, 1) == "11.000 (6.000-16.000)"
