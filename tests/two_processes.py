"""The program of two processes that `test_processes.py` starts: one scene after the other, in both alike.

    python -m tests.two_processes FOLDER PROCESS PORT

What the scenes found goes to FOLDER/PROCESS.json; in the last of them process 1 raises an exception.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import fnn
from experiments import distributed
from experiments.distributed import Flags
from fnn.processes import answers, check_agreed, of_first

FLAGS = ["--widths", "32", "--epochs", "2", "--batch-size", "500", "--cpu-devices", "2"]


def the_experiment(folder: Path, join: list[str]) -> None:
    """As it is, to its end; it joins the processes."""
    distributed.main([*FLAGS, *join, "--save", str(folder / "params"), "--checkpoint", str(folder / "run")])


def answers_of_all(me: int) -> dict:
    bits = np.array([np.pi, -0.0, np.nan]) if me == 0 else np.zeros(3)
    first = of_first(bits)
    rows = jax.make_array_from_process_local_data(
        fnn.data_parallel().rows_sharding, np.full((2, 3), float(me))
    )
    whole, alone, n = fnn.on_host((rows, np.ones(1), 4))
    return {
        "processes": [jax.process_count(), jax.device_count()],
        "answers": answers(me, 7 - me).tolist(),
        "of_first": [first.tobytes().hex(), str(first.dtype)],
        "on_host": [np.asarray(whole).tolist(), alone.tolist(), n],
    }


def problem() -> tuple:
    net = fnn.mlp(fnn.tanh)
    cost = fnn.cost(net, fnn.half_squared_error)
    X = np.linspace(-1, 1, 48, dtype=np.float32).reshape(16, 3)
    return cost, optax.sgd(0.1), fnn.init(jax.random.key(0), (3, 4, 1)), (X, X[:, :1])


def refused(me: int) -> str:
    """Data that differ between the processes."""
    cost, optimizer, params, (X, y) = problem()
    options: Any = dict(key=jax.random.key(0), epochs=1, batch_size=8, progress=False)
    try:
        fnn.fit(cost, optimizer, params, (X, y + me), layout=fnn.data_parallel(), **options)
    except ValueError as error:
        check_agreed("after it", {"all": 1})  # the collectives work on
        return str(error)
    return "not refused"


def uneven_batches(me: int) -> dict:
    """Seven batches in process 0, five in process 1, each of its half of the rows."""
    cost, optimizer, params, (X, y) = problem()
    rows = slice(0, 8) if me == 0 else slice(8, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = fnn.fit_batches(
            cost,
            optimizer,
            params,
            [(X[rows], y[rows])] * (7 if me == 0 else 5),
            steps_per_epoch=1,
            layout=fnn.data_parallel(),
            progress=False,
        )
    trained = jax.device_get(fnn.on_host(history.params))
    return {
        "costs": history.train["cost"].tolist(),
        "params": [leaf.ravel().tolist() for leaf in jax.tree.leaves(trained)],
        "warnings": [str(warning.message) for warning in caught],
    }


def main(folder: Path, process: str, port: str) -> None:
    me = int(process)
    join = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", process]
    the_experiment(folder, join)
    found = {**answers_of_all(me), "refused": refused(me), "uneven": uneven_batches(me)}
    (folder / f"{me}.json").write_text(json.dumps(found))
    distributed.run(Flags(widths=(32,), batch_size=500, epochs=1000, fail_at=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
