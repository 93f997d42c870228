"""Do activations that are right to the last bit cost time?

    python -m experiments.benchmarks.activations        (8 seconds for each row; --help lists the flags)
    taskset -c 0 python -m experiments.benchmarks.activations --output one_core.txt

One step of gradient descent with the library's activations and loss, and the same step with naive forms in
their place: `jax.nn`'s values, and slopes as one writes them, σ(1-σ), 1-a², s + z s (1-s), Φ + zφ; the loss
is -log_softmax with the gradient p - e_y. Two networks, float32. Both steps run interleaved in one process.
Printed: the median of a step by the library, and the ratio of the medians with the range that holds the
middle half of the ratios of neighbouring runs. The last column is the naive step against itself, compiled a
second time: what noise is. Written to activations.txt beside the script.

On a CPU XLA splits every kernel of more than one operation per byte over the threads, however small. For the
4,096 neurons of the digits network's batch the handing over takes longer than the work; hence the run on one
core, activations_one_core.txt.
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from fnn.tables import aligned

# name -> (widths, batch size)
NETWORKS = {"digits": ((64, 128, 10), 32), "784-512-512-10": ((784, 512, 512, 10), 128)}


def naive(value, slope) -> fnn.Rule:
    return fnn.Rule(lambda z: (value(z), z), lambda z, a_bar: (a_bar * slope(z),))


def naive_silu_slope(z):
    s = jax.nn.sigmoid(z)
    return s + z * s * (1 - s)


def naive_gelu_slope(z):
    cdf, pdf = (1 + jax.lax.erf(z * 0.5**0.5)) / 2, jnp.exp(-z * z / 2) * (2 * jnp.pi) ** -0.5
    return cdf + z * pdf


def naive_gelu_tanh_slope(z):
    c = (2 / jnp.pi) ** 0.5
    a = jnp.tanh(c * (z + 0.044715 * z**3))
    return (1 + a) / 2 + z / 2 * (1 - a * a) * c * (1 + 3 * 0.044715 * z * z)


# name -> (ours, naive)
PAIRS: dict[str, tuple[fnn.Rule, fnn.Rule]] = {
    "relu": (fnn.relu, naive(jax.nn.relu, lambda z: (z > 0).astype(z.dtype))),
    "sigmoid": (fnn.sigmoid, naive(jax.nn.sigmoid, lambda z: jax.nn.sigmoid(z) * (1 - jax.nn.sigmoid(z)))),
    "tanh": (fnn.tanh, naive(jnp.tanh, lambda z: 1 - jnp.tanh(z) ** 2)),
    "softplus": (fnn.softplus, naive(jax.nn.softplus, jax.nn.sigmoid)),
    "elu": (fnn.elu(1.0), naive(jax.nn.elu, lambda z: jnp.where(z > 0, 1, jnp.exp(jnp.minimum(z, 0))))),
    "silu": (fnn.silu, naive(jax.nn.silu, naive_silu_slope)),
    "gelu": (fnn.gelu, naive(partial(jax.nn.gelu, approximate=False), naive_gelu_slope)),
    "gelu_tanh": (fnn.gelu_tanh, naive(partial(jax.nn.gelu, approximate=True), naive_gelu_tanh_slope)),
}


def naive_loss_forward(a, y):
    log_p = jax.nn.log_softmax(a)
    is_label = jnp.arange(a.shape[-1])[None, :] == y[:, None]
    return -jnp.sum(log_p, axis=-1, where=is_label), (log_p, is_label)


def naive_loss_pullback(residuals, C_bar):
    log_p, is_label = residuals
    return C_bar[:, None] * (jnp.exp(log_p) - is_label.astype(log_p.dtype)), None


naive_loss = fnn.Rule(naive_loss_forward, naive_loss_pullback)


def step(cost: fnn.Cost):
    """A compiled step; a new function each time, so that equal ones are compiled apart."""

    @jax.jit
    def one(params, X, y):
        C, gradient = fnn.value_and_grad(cost)(params, X, y)
        return C, jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient)

    return one


def seconds(call, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    return time.perf_counter() - start


def row(network: str, name: str, budget: float) -> tuple[str, ...]:
    sizes, N = NETWORKS[network]
    keys = jax.random.split(jax.random.key(0), 3)
    params: Any = fnn.init(keys[0], sizes, weights=fnn.he_normal, dtype=jnp.float32)
    X = jax.random.normal(keys[1], (N, sizes[0]), jnp.float32)
    y = jax.random.randint(keys[2], (N,), 0, sizes[-1])
    ours, theirs = PAIRS[name]
    costs = (
        fnn.cost(fnn.mlp(ours), fnn.softmax_cross_entropy_with_integer_labels),
        *(fnn.cost(fnn.mlp(theirs), naive_loss) for _ in range(2)),
    )
    steps = [step(cost) for cost in costs]
    for one in steps:
        seconds(one, params, X, y)
    repeat = max(1, int(0.002 / seconds(steps[0], params, X, y)))  # short steps are timed in groups

    def timed(one) -> float:
        start = time.perf_counter()
        jax.block_until_ready([one(params, X, y)[0] for _ in range(repeat)])
        return (time.perf_counter() - start) / repeat

    times, stop = [], time.perf_counter() + budget
    while time.perf_counter() < stop or len(times) < 20:
        order = list(range(len(steps)))[:: 1 if len(times) % 2 else -1]
        found = {i: timed(steps[i]) for i in order}
        times.append([found[i] for i in range(len(steps))])
    medians = np.median(times, axis=0)

    def ratio(a: int, b: int) -> str:
        low, high = np.quantile([t[a] / t[b] for t in times], [0.25, 0.75])
        return f"{medians[a] / medians[b]:.3f} ({low:.2f}-{high:.2f})"

    return network, name, f"{medians[0] * 1e6:,.0f}", ratio(0, 1), ratio(2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each row")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".txt"), help="the table")
    flags = parser.parse_args()
    rows: list[tuple[str, ...]] = [("network", "activation", "step / µs", "ours / naive", "naive / naive")]
    for network in NETWORKS:
        for name in PAIRS:
            rows.append(row(network, name, flags.seconds))
            print(rows[-1], flush=True)
    cores = len(os.sched_getaffinity(0))
    device = f"{jax.devices()[0].platform}, {cores} core{'s' * (cores > 1)}"
    text = aligned(rows, "<<>>>") + f"\nfloat32; jax {jax.__version__}, {device}\n"
    print(text)
    flags.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
