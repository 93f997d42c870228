"""How long does the order of an epoch take, by `fnn.orders`, `jax.random.permutation` and NumPy?

    python -m experiments.benchmarks.shuffling      (a minute on two cores; --help lists the flags)

Orders of N examples, one after the other in one compiled call, of as many keys as stand beside N. NumPy's
generator draws as many in a loop. The last column is an order's time for each step of batch 32 in its epoch.

Times are medians of rounds in which each has its turn, in another order each time. Of the times over fnn's
stands the ratio of medians, and in brackets the middle half of the ratios within a round. Written to
shuffling.txt beside the script.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import ratio, rounds_of, seconds, where
from fnn.orders import permutation, rounds
from fnn.tables import aligned

SIZES = {1_408: 300, 60_000: 10, 1_000_000: 1}  # examples -> orders
BATCH_SIZE = 32


def compiled(order_of: Callable[[Any], Any], keys: Any) -> Callable[[], Any]:
    orders = jax.jit(partial(jax.lax.map, order_of))
    return lambda: jax.block_until_ready(orders(keys))


def by_numpy(N: int, n: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(n):
        generator.permutation(N)


def row(N: int, n: int, repeats: int) -> tuple[str, ...]:
    keys = jax.random.split(jax.random.key(0), n)
    runs = [
        compiled(lambda key: permutation(key, N, rounds(N)), keys),
        compiled(lambda key: jax.random.permutation(key, N), keys),
        partial(by_numpy, N, n),
    ]
    for run in runs:
        seconds(run)  # compiles
    times = rounds_of(runs, repeats) / n
    each = [f"{1e6 * t:,.1f}" for t in np.median(times, axis=0)]
    share = f"{1e6 * np.median(times[:, 0]) * BATCH_SIZE / N:.2g}"
    return f"{N:,}", f"{n:,}", *each, ratio(times, 1, 0), ratio(times, 2, 0), share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="seconds: two rounds of the smallest")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".txt"), help="the table")
    flags = parser.parse_args()
    head = "N", "orders", "fnn µs", "JAX µs", "NumPy µs", "JAX / fnn", "NumPy / fnn", "fnn µs / step"
    cells: list[tuple[str, ...]] = [head]
    for N, n in list(SIZES.items())[: 1 if flags.quick else None]:
        cells.append(row(N, n, 2 if flags.quick else flags.rounds))
    text = f"{aligned(cells, '>>>>>>>>')}\n\n{where('jax', 'jaxlib', 'numpy')}\n"
    print(text, end="")
    flags.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
