"""How much time does it save to train many small networks in one compiled run?

    python -m experiments.benchmarks.ensembles        (4 to 10 minutes; --help lists the flags)

M networks 64-64-10 (relu, softmax cross-entropy, Adam) learn the handwritten digits in float32 with batches
of 32, each with a learning rate, initial weights and an order of its own, without validation and metrics:

    fit_ensemble              with several members_at_once
    a loop of fit             one optimiser for all, so that it compiles once
    ..., each its own rate    optax.adam(rate) is a new program for `fit`, so that every network compiles
    scikit-learn              a loop over MLPClassifier of the same layers, optimiser, batch and epochs

In a round every row has its turn, in another order each time. A loop trains a few networks and its time is
multiplied: 8 of the loop of `fit`, 1 of the two rows below it. "warm" is a run whose programs are compiled
(in the row that compiles for each network none ever is), the median of the rounds; "first" is one run with
compilation. The ratio is of the median of the loop of `fit` to the row's, and in brackets the range that
holds the middle half of the ratios within a round.

The second part is the epoch alone, of larger networks too, and what its program needs of memory beside the
state. Written to ensembles.txt beside the script.

Found, on two cores: once compiled, a run of 16 to 256 networks for 10 epochs takes 0.4 to 0.7 of the time
of a loop of `fit`, and 0.07 to 0.1 of scikit-learn's. With compilation, which the loop of `fit` needs once
too, both take 2 to 5 s; but a loop in which every rate is a new program takes 180 to 230 times as long as
the compiled run of all. The batched products make the epoch itself 0.82 to 0.84 as long with 4 networks
64-64-10 at once, 0.75 with 2 networks 784-256-256-10, and no shorter with a few 64-128-64-10.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import fnn
from experiments import digits
from experiments.benchmarks.timing import ratio, rounds_of, seconds
from fnn import ensemble
from fnn.tables import aligned

WIDTHS, BATCH, ALONE = (64, 64, 10), 32, 8
AT_ONCE = (1, 4, None)  # None: all
# name -> (widths, members, N, batch size) of the table of epochs
EPOCHS = {
    "64-64-10, 16 networks, batch 32": (WIDTHS, 16, digits.TRAINING_DIGITS, BATCH),
    "64-64-10, 64 networks, batch 32": (WIDTHS, 64, digits.TRAINING_DIGITS, BATCH),
    "64-64-10, 256 networks, batch 32": (WIDTHS, 256, digits.TRAINING_DIGITS, BATCH),
    "64-128-64-10, 64 networks, batch 32": ((64, 128, 64, 10), 64, digits.TRAINING_DIGITS, BATCH),
    "784-256-256-10, 16 networks, batch 128": ((784, 256, 256, 10), 16, 2048, 128),
}
NET = fnn.mlp(fnn.relu)
COST = fnn.cost(NET, fnn.softmax_cross_entropy_with_integer_labels)
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)


class Row(NamedTuple):
    name: str
    run: Callable[[], None]
    times: float  # by which its time is multiplied, as it trains only some of the networks


def digits_data() -> tuple[Any, Any]:
    (X, y), _ = digits.load(0)
    return jnp.asarray(digits.standardised(X, X)), jnp.asarray(y)


class Members(NamedTuple):
    keys: Any
    params: Any
    rates: np.ndarray

    def alone(self, i: int) -> Any:
        return jax.tree.map(lambda a: a[i], self.params)


def members(M: int, widths: tuple[int, ...]) -> Members:
    keys = jax.random.split(jax.random.key(0), M)
    init = partial(fnn.init, sizes=widths, weights=fnn.he_normal, dtype=jnp.float32)
    return Members(keys, jax.block_until_ready(jax.jit(jax.vmap(init))(keys)), np.geomspace(1e-4, 1e-2, M))


def by_ensemble(at_once: int | None, networks: Members, epochs: int, data: Any) -> None:
    history = fnn.fit_ensemble(
        COST,
        ADAM,
        networks.params,
        data,
        keys=networks.keys,
        epochs=epochs,
        batch_size=BATCH,
        hyperparameters={"learning_rate": networks.rates},
        members_at_once=at_once or len(networks.rates),
        progress=False,
    )
    jax.block_until_ready(history.params)


def by_fit(count: int, own_rates: bool, networks: Members, epochs: int, data: Any) -> None:
    for i in range(count):
        optimizer = optax.adam(float(networks.rates[i])) if own_rates else ADAM
        run: dict[str, Any] = dict(key=networks.keys[i], epochs=epochs, batch_size=BATCH, progress=False)
        jax.block_until_ready(fnn.fit(COST, optimizer, networks.alone(i), data, **run).params)


def by_sklearn(epochs: int, data: Any) -> None:
    batch_size: Any = BATCH  # its annotation knows only "auto"
    classifier = MLPClassifier(
        hidden_layer_sizes=WIDTHS[1:-1],
        activation="relu",
        solver="adam",
        alpha=0.0,
        batch_size=batch_size,
        learning_rate_init=1e-3,
        max_iter=epochs,
        tol=0.0,
        n_iter_no_change=epochs + 1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is to stop after so many epochs
        classifier.fit(*(np.asarray(a) for a in data))
    assert classifier.n_iter_ == epochs


def runs_table(M: int, epochs: int, rounds: int, data: Any) -> str:
    networks = members(M, WIDTHS)
    rows = [
        Row("a loop of fit", partial(by_fit, ALONE, False, networks, epochs, data), M / ALONE),
        Row("a loop of fit, each its own rate", partial(by_fit, 1, True, networks, epochs, data), M),
        Row("scikit-learn", partial(by_sklearn, epochs, data), M),
    ]
    for at_once in AT_ONCE:
        name = f"fit_ensemble, {at_once or 'all'} at once"
        rows.append(Row(name, partial(by_ensemble, at_once, networks, epochs, data), 1))
    first = []
    for row in rows:
        jax.clear_caches()
        once, again = seconds(row.run), seconds(row.run)
        # A loop of one network is of networks of their own: each of them compiles, or none does.
        first.append(row.times * again + (once - again if row.times < M else 0))
    for row in rows:  # clearing the caches took their programs too
        seconds(row.run)
    times = rounds_of([row.run for row in rows], rounds) * np.array([row.times for row in rows])
    cells: list[tuple[str, ...]] = [(f"{M} networks, {epochs} epochs", "warm / s", "first / s", "fit / this")]
    for i, row in enumerate(rows):
        cells.append((row.name, f"{np.median(times[:, i]):.2f}", f"{first[i]:.1f}", ratio(times, 0, i)))
    return aligned(cells, "<>>>")


def epoch_table(name: str, rounds: int) -> str:
    widths, M, N, batch_size = EPOCHS[name]
    data: Any = digits_data()
    if widths[0] != 64:
        keys = jax.random.split(jax.random.key(1))
        data = jax.random.normal(keys[0], (N, widths[0])), jax.random.randint(keys[1], (N,), 0, widths[-1])
    networks = members(M, widths)
    sizes = sorted({min(size, M) for size in (1, 2, 4, 8, 16, M)})
    compiled: list[Any] = []
    for size in sizes:
        state = jax.vmap(partial(fnn.train_state, ADAM))(networks.params, networks.keys)
        epoch = ensemble._compiled_epoch(COST, ADAM, (), batch_size, size, None)
        epoch = epoch.lower(state, data, None).compile()
        compiled.append(epoch)
    memory = [epoch.memory_analysis().temp_size_in_bytes / 2**20 for epoch in compiled]
    state_size = compiled[0].memory_analysis().alias_size_in_bytes / 2**20
    states = [jax.vmap(partial(fnn.train_state, ADAM))(networks.params, networks.keys) for _ in sizes]

    def run(i):
        states[i], *rest = compiled[i](states[i], data, None)
        jax.block_until_ready((states[i], rest))

    for i in range(len(sizes)):
        run(i)
    times = rounds_of([partial(run, i) for i in range(len(sizes))], rounds)
    cells: list[tuple[str, ...]] = [(name, "epoch / ms", "/ 1 at once", "MiB beside the state")]
    for i, size in enumerate(sizes):
        median = 1e3 * np.median(times[:, i])
        cells.append((f"{size} at once", f"{median:.0f}", ratio(times, i, 0), f"{memory[i]:.1f}"))
    return f"{aligned(cells, '<>>>')}\nstate: {state_size:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="of runs; three times as many of epochs")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".txt"), help="the tables")
    flags = parser.parse_args()
    data, parts = digits_data(), []
    tables = [partial(runs_table, M, flags.epochs, flags.rounds, data) for M in flags.members]
    tables += [partial(epoch_table, name, 3 * flags.rounds) for name in EPOCHS]
    for table in tables:
        parts.append(table())
        print(parts[-1], end="\n\n", flush=True)
    cores = len(os.sched_getaffinity(0))
    device = f"{jax.devices()[0].platform}, {cores} core{'s' * (cores > 1)}"
    versions = f"jax {jax.__version__}, optax {version('optax')}, scikit-learn {version('scikit-learn')}"
    parts.append(
        f"float32; {versions}, {device}, {flags.rounds} rounds of runs, {3 * flags.rounds} of epochs"
    )
    print(parts[-1])
    flags.output.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
