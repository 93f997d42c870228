"""Times of several things in turn, and their ratios, as benchmarks report them."""

import os
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds_of(runs: list[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Seconds, one row for each round, in which every run has its turn, in another order each time."""
    shuffled, times = random.Random(0), []
    for _ in range(rounds):
        order = list(range(len(runs)))
        shuffled.shuffle(order)
        found = {i: seconds(runs[i]) for i in order}
        times.append([found[i] for i in range(len(runs))])
    return np.array(times)


def ratio(times: np.ndarray, a: int, b: int) -> str:
    """Of medians, and in brackets the range of the middle half of the ratios within a round."""
    low, high = np.quantile(times[:, a] / times[:, b], [0.25, 0.75])
    return f"{np.median(times[:, a]) / np.median(times[:, b]):.2f} ({low:.2f}-{high:.2f})"


def ratio_within(times: np.ndarray, a: int, b: int) -> str:
    """The median of the ratios within a round, and in brackets where that of endless rounds lies at 95 %.

    Of n ratios the median of their distribution lies between those that are k-th from either end, but for
    the chance that k - 1 or fewer of n tosses of a coin show heads, twice: 5 % for k = n/2 - 0.98 √n.
    """
    ratios = np.sort(times[:, a] / times[:, b])
    n = len(ratios)
    k = max(1, int(n / 2 - 0.98 * n**0.5))
    return f"{np.median(ratios):.3f} ({ratios[k - 1]:.3f}-{ratios[n - k]:.3f})"


def where(*distributions: str) -> str:
    """The versions of these, the kind of device, and the cores."""
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{name} {version(name)}" for name in distributions)
    return f"{versions}, {jax.devices()[0].platform}, {cores} core{'s' * (cores > 1)}"
