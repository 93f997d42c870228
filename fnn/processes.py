"""Several processes of one run, on one machine or many: they start together, agree, and fail together.

Every process runs the same program on the same mesh of all devices (`jax.distributed`), and a collective
waits for all of them. Three things would go wrong in silence or wait for good, and are dealt with here:

- a launcher has started N tasks, but JAX knows of one process: N separate runs. Refused by `join_processes`
  and wherever a layout is given.
- a process raises, and the others wait for it in their next collective, it for them at its exit. From
  `join_processes` on, an exception that nobody catches ends its process at once, so that the others' links
  break and they end too.
- a decision that looks at a clock or a signal (how many epochs in a call, is a checkpoint due, has SIGTERM
  come) falls differently. It is taken from all processes' answers, which `answers` collects.
"""

import os
import sys
import traceback
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

# Variables in which launchers leave the number of tasks they have started: Slurm, Open MPI, MPICH and Intel.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def join_processes(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    **options: Any,
) -> None:
    """Joins the processes of one run; call it before anything else of JAX. Alone, it does nothing.

    Without arguments JAX finds the others by itself under Slurm, Open MPI, on Cloud TPU and on Kubernetes.
    Elsewhere each process says how many there are and which one it is.

    coordinator_address: of process 0, "host:port"
    num_processes: how many there are
    process_id: which one this is, from 0
    options: others of `jax.distributed.initialize`

    From here on an exception that is not caught ends this process at once, after its traceback, with status
    1: at a usual exit it would wait for the others, which wait for it. Raises RuntimeError if JAX is in use
    already, and if a launcher has started several tasks and JAX knows of one process only.

    >>> import fnn
    >>> fnn.join_processes()  # doctest: +SKIP
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes}
    given |= {"process_id": process_id}
    if jax.distributed.is_initialized():
        raise RuntimeError(
            "join_processes: the processes are joined already; call it once, at the beginning."
        )
    if not any(value is not None for value in given.values()) and not options:
        try:
            jax.distributed.initialize()
        except ValueError as error:  # nobody has said where the others are
            if "coordinator_address" not in str(error):
                raise
    else:
        jax.distributed.initialize(**given, **options)
    check_launcher("join_processes")
    if jax.process_count() > 1:
        sys.excepthook = _end_at_once


def check_launcher(where: str) -> None:
    """Raises RuntimeError where a launcher has started several tasks and each would train for itself."""
    for name in LAUNCHERS:
        tasks = os.environ.get(name, "")
        if tasks.isdigit() and int(tasks) > 1 and jax.process_count() == 1:
            raise RuntimeError(
                f"{where}: {name}={tasks}, but JAX knows of one process: {tasks} separate runs would "
                "overwrite each other's files. Call fnn.join_processes() before anything else of JAX; or, "
                f"if that is what you want, unset {name}."
            )


def _end_at_once(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    traceback.print_exception(kind, error, trace)
    me, all_of_us = jax.process_index(), jax.process_count()
    if issubclass(kind, jax.errors.JaxRuntimeError):
        print("If a link broke, another process has ended before: its output says why.", file=sys.stderr)
    print(f"Process {me} of {all_of_us} ends at once, so that the others end too.", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def answers(*numbers: int) -> np.ndarray:
    """What every process gave, (processes, numbers); a process alone gets its own. All have to call it."""
    mine = np.array(numbers, np.int32)
    if jax.process_count() == 1:
        return alone(*numbers)
    return np.asarray(multihost_utils.process_allgather(mine))


def alone(*numbers: int) -> np.ndarray:
    """As `answers`, of a process that has nothing to do with others."""
    return np.array(numbers, np.int32)[None]


def of_first(array: np.ndarray) -> np.ndarray:
    """What process 0 gave, to the last bit. All have to call it, with arrays of one shape and dtype."""
    if jax.process_count() == 1:
        return array
    # As bytes: JAX would make 32 bits of 64 where it is not told otherwise.
    return np.asarray(multihost_utils.broadcast_one_to_all(array.view(np.uint8))).view(array.dtype)


def check_agreed(where: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError in every process unless all were given the same: name -> what prints the same."""
    theirs = answers(*(zlib.crc32(repr(value).encode()) - 2**31 for value in given.values()))
    for name, column in zip(given, theirs.T, strict=True):
        if len(set(column.tolist())) > 1:
            raise ValueError(
                f"{where}: {name} needs to be the same in every process, but of {len(column)} processes "
                f"{len(set(column.tolist()))} differ. Load the same data and use the same keys everywhere."
            )


def put(leaf: Any, sharding: jax.sharding.Sharding) -> Any:
    """A leaf on the devices of a sharding, which may be other processes'. Each has to have all of it, or it
    has to be spread over the processes already."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def on_host(tree: Any) -> Any:
    """The tree in this process, whole: arrays that are spread over processes are collected from all."""

    def collected(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = collected(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
        return jnp.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(collected, tree)
