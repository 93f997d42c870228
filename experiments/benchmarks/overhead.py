"""What does `fit` take beyond the steps themselves: its calls, checks and numbers?

    python -m experiments.benchmarks.overhead       (8 minutes on two cores; --help lists the flags)

The trainings S and M of experiments/benchmarks/training.py, with Adam and SGD:

    outside         the part of a run that `fit` spends outside its compiled calls, from its first check of
                    the arguments to the history; both are of one run, so that no noise between two hides it
    fnn.train_step  all epochs of the same step as one compiled scan, its time over that of `fit`
    jax.grad        the same of the step by autodiff, with orders as fit makes them

The two scans and `fit` have their turns in rounds, in another order each time. Of the times over fit's
within a round stands the median, and in brackets where the median of endless rounds lies at 95 %; of the
part outside the median and the middle half of the runs. Written to overhead.txt beside the script.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from experiments.benchmarks.timing import ratio_within, rounds_of, seconds, where
from experiments.benchmarks.training import QUICK, RATES, SIZES, by_fit, by_grad, by_step, fit_order, task_of
from fnn import runs
from fnn.tables import aligned


def inside(run: Callable[[], Any]) -> float:
    """The part of a run of `fit` that its compiled calls take, until their numbers are on the host."""
    spent, call = [], runs._InMemory._run

    def timed(*arguments):
        start = time.perf_counter()
        result = call(*arguments)
        spent.append(time.perf_counter() - start)
        return result

    with mock.patch.object(runs._InMemory, "_run", timed):
        whole = seconds(run)
    return sum(spent) / whole


by_autodiff = partial(by_grad, permutation=fit_order)


def row(name: str, quick: bool, optimizer: str, rounds: int) -> tuple[str, ...]:
    size = (QUICK if quick else SIZES)[name]
    task, epochs = task_of(name, size, optimizer), size.epochs * size.compiled
    trainings = [partial(make(task).run, epochs) for make in (by_fit, by_step, by_autodiff)]
    for run in trainings:
        seconds(run)  # compiles
    times = rounds_of(trainings, rounds)
    low, median, high = np.quantile([1 - inside(trainings[0]) for _ in range(rounds)], [0.25, 0.5, 0.75])
    steps = epochs * (size.N // size.batch_size)
    outside = f"{median:.2%} ({low:.2%}-{high:.2%})"
    return f"{name}, {optimizer}", f"{steps:,}", outside, ratio_within(times, 1, 0), ratio_within(times, 2, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="seconds: short runs, two rounds")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".txt"), help="the table")
    flags = parser.parse_args()
    rounds = 2 if flags.quick else flags.rounds
    cells = [("", "steps", "outside", "fnn.train_step", "jax.grad")]
    cells += [row(name, flags.quick, optimizer, rounds) for name in "SM" for optimizer in RATES]
    text = f"{aligned(cells, '<>>>>')}\n\n{where('jax', 'jaxlib', 'optax')}, {rounds} rounds\n"
    print(text, end="")
    flags.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
