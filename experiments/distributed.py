"""How does one script train on one device, on eight, and on many machines?

    python -m experiments.distributed                       one process, all of its devices
    python -m experiments.distributed --cpu-devices 8       a CPU that stands in for eight devices

    two processes, in two windows:
    python -m experiments.distributed --coordinator 127.0.0.1:8476 --processes 2 --process 0
    python -m experiments.distributed --coordinator 127.0.0.1:8476 --processes 2 --process 1

    srun python -m experiments.distributed                  Slurm, a task for each GPU or each machine
    mpirun -n 4 python -m experiments.distributed           Open MPI
    gcloud compute tpus tpu-vm ssh NAME --worker=all --command="python -m experiments.distributed"

--help lists the flags. On machines of their own, processes need a coordinator's address that all can reach,
a port of the first machine; under Slurm, Open MPI, on Cloud TPU and Kubernetes JAX finds it by itself. GPUs
talk by NCCL, TPUs by their own links, CPUs by gloo over TCP. --checkpoint needs a folder that all see.

What makes a script for one device one for many are three lines of it:

    fnn.join_processes()                              does nothing in a process alone
    layout = fnn.data_parallel()                      or fully_sharded(), tensor_parallel(4)
    history = fnn.fit(..., layout=layout)

The network reads scikit-learn's handwritten digits. Process 0 prints the layout, what a compiled step sends
over the links, how many bytes each device holds, and the results, which are those of one device to rounding:
--layout none trains on one device.

When a process fails: --fail-at 3 raises an exception in the last process, after epoch 3. It ends at once, and
the others with it, as their links break; without `join_processes` all would wait for each other. A run with
--checkpoint goes on from there when it is started again, with as many processes or other many.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

import fnn
from experiments import digits
from experiments.collectives import collectives
from experiments.command import expect
from fnn.runs import compiled_epochs
from fnn.tables import aligned


@dataclass(frozen=True)
class Flags:
    """Trains on all devices of all processes."""

    layout: Literal["data", "sharded", "tensor", "none"] = "data"
    """Batches split; parameters split too; pairs of layers split; one device."""
    model: int = 2
    """Devices that share a pair of layers, with --layout tensor."""
    widths: tuple[int, ...] = (512, 256)
    """Widths of the hidden layers."""
    batch_size: int = 128
    """Examples per step, of all devices together."""
    epochs: int = 20
    """Passes over the training data."""
    seed: int = 0
    """Decides everything that is random."""
    factors: bool = False
    """Send a gradient as its factors a and δ where these are fewer numbers."""
    checkpoint: Path | None = None
    """A folder from which the run goes on when it is started again."""
    save: Path | None = None
    """A file for the trained parameters."""
    coordinator: str | None = None
    """Address of process 0, host:port."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which one this is, from 0."""
    cpu_devices: int | None = None
    """Devices that the CPU of each process stands in for."""
    fail_at: int | None = None
    """The epoch after which the last process raises an exception."""

    def check(self) -> None:
        expect("--epochs", "an integer of at least 1", self.epochs, self.epochs >= 1)
        expect("--batch-size", "an integer from 1 to 1437", self.batch_size, 1 <= self.batch_size <= 1437)
        expect("--model", "an integer of at least 1", self.model, self.model >= 1)


def layout_of(flags: Flags, params: fnn.Params) -> fnn.Layout | None:
    if flags.layout == "data":
        factors = fnn.factor_layers(params, flags.batch_size) if flags.factors else ()
        return fnn.data_parallel(factors=factors)
    if flags.layout == "sharded":
        return fnn.fully_sharded()
    return fnn.tensor_parallel(flags.model) if flags.layout == "tensor" else None


def run(flags: Flags) -> fnn.History:
    (X, y), (X_test, y_test) = digits.load(flags.seed)
    X, X_test = digits.standardised(X, X), digits.standardised(X_test, X)
    init_key, key = jax.random.split(jax.random.key(flags.seed))
    params = fnn.init(init_key, (64, *flags.widths, 10), weights=fnn.he_normal)
    net = fnn.mlp(fnn.relu)
    cost = fnn.cost(net, fnn.softmax_cross_entropy_with_integer_labels)
    optimizer = optax.adam(1e-3)
    layout = layout_of(flags, params)

    is_first, is_last = jax.process_index() == 0, jax.process_index() == jax.process_count() - 1
    description = describe(cost, optimizer, params, flags.batch_size, layout)
    if is_first:
        n = jax.process_count()
        print(f"Devices:  {jax.device_count()} in {n} process{'es' * (n > 1)}, layout {flags.layout}")
        print(description)

    def fail(report: fnn.EpochReport) -> None:
        if is_last and report.epoch == flags.fail_at:
            raise RuntimeError(f"as --fail-at {flags.fail_at} asks for")

    history = fnn.fit(
        cost,
        optimizer,
        params,
        (X, y),
        key=key,
        epochs=flags.epochs,
        batch_size=flags.batch_size,
        validation=(X_test, y_test),
        metrics={"accuracy": fnn.accuracy(net)},
        callbacks=[fail] if flags.fail_at else [],
        checkpoint=flags.checkpoint,
        layout=layout,
    )
    trained = jax.device_get(fnn.on_host(history.params))
    if is_first:
        accuracy = history.validation["accuracy"][-1]
        print(f"Training: {flags.epochs} epochs in {history.seconds.sum():.1f} s")
        print(f"Test:     {accuracy:.2%} of the digits, cost {history.validation['cost'][-1]:.6f}")
        if flags.save is not None:
            fnn.save(flags.save, trained)
    return history


def describe(cost: Any, optimizer: Any, params: Any, batch_size: int, layout: fnn.Layout | None) -> str:
    """What each device holds of a run's state, and what they send each other in an epoch of equal steps.

    All processes call it: those of GPUs share the work of compiling.
    """
    state: Any = fnn.train_state(optimizer, params, jax.random.key(0))
    data: Any = jnp.zeros((2 * batch_size, 64)), jnp.zeros(2 * batch_size, jnp.int32)
    if layout is not None:
        state, data = layout.put(params, state), layout.put_whole(data)
    leaves = jax.tree.leaves((state.params, state.optimizer_state))
    shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
    held = sum(shard.data.nbytes for shard in shards if shard.device == shards[0].device)
    whole = sum(leaf.nbytes for leaf in leaves)
    text = f"Each has: {held:,} of the {whole:,} bytes of parameters and optimiser\n"

    _, run_epochs = compiled_epochs(cost, optimizer, (), (), batch_size, False, layout)
    sent = Counter(collectives(run_epochs.lower(state, data, None, jnp.int32(1)).compile()))
    if not sent:
        return f"{text}Sends:    nothing"
    rows: list[tuple[str, ...]] = [("Sends:   times", "what", "bytes", "arrays")]
    for (kind, shapes, n_bytes), times in sorted(sent.items(), key=lambda item: -item[0].bytes):
        more = f" and {len(shapes) - 2} more" if len(shapes) > 2 else ""
        rows.append((f"{times}", kind, f"{n_bytes:,}", ", ".join(shapes[:2]) + more))
    return text + aligned(rows, "><><")


def main(args: Sequence[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=args, prog="python -m experiments.distributed")
    try:
        flags.check()
    except ValueError as error:
        raise SystemExit(f"distributed: {error}") from None
    if flags.cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", flags.cpu_devices)
    fnn.join_processes(flags.coordinator, flags.processes, flags.process)
    run(flags)


if __name__ == "__main__":
    main()
