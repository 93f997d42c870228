"""What do reductions of one backward sweep cost, against every example's gradient by autodiff?

    python -m experiments.benchmarks.per_example        (about 5 minutes; --help lists the flags)

Networks of tanh with softmax cross-entropy, random data, float32. All programs are compiled first, and those
that compute the same are compared, to 1e-4 of the largest entry. Then they run interleaved in one process, in
another order each round. Half of the examples are clipped. The programs:

    fnn            value_and_grad, the plain gradient, which is the unit; reductions of fnn.backprop
    jax.grad       of the batch's mean loss, in plain JAX; with respect to zeros added to every z^l, which
                   gives the same pairs (a^{l-1}, δ^l) by autodiff, and fnn's reductions of these
    vmap(grad)     of one example's loss, and what is asked of the result; three forms of clipping, "norms,
                   then grad" being a second pass: the gradient of losses weighted by what the norms allow
    jax_privacy    clipping.clipped_grad of one example's loss (needs jax_privacy 2; left out without it)
    vmap(jacrev)   J of every example, contracted with H by einsum; and Σ_k (J_nᵀ s_k)² with a root of H

Printed: XLA's own count of temporary memory, in KiB; milliseconds, the median of the rounds; both as
multiples of the plain gradient's and of what fnn takes for the same. In brackets the range that holds the
middle half of the ratios within a round; with few rounds the ratio of the medians may lie outside. Written
to per_example.txt beside the script.

Found, memory first, which is exact. Norms, clipped mean, second moment and Gram matrix need 1.0 to 1.7 times
what the plain gradient does on the first network and 1.0 to 3.0 times on the second, where the squares of X,
196 KiB, are twice what its gradient needs. Variance, signal to noise, cosines and noise scale keep a mean
gradient as well: 2.4 to 6.6. In time they are all 0.6 to 1.6 plain gradients, norms 0.6 and clipping 1.

    clipped mean   691 and 550 times less memory than vmap(grad) in one product of factors and gradients, 433
                   and 298 than one by one, 432 and 298 than jax_privacy, 55 and 151 than its microbatches
                   of 32; 62 and 46 times less time than the fastest of these
    diagonal       2,037 times less memory and 809 times less time than J contracted by einsum

What is not so:
- A backward pass by hand buys nothing, its pairs do: with the zeros' pairs the same reductions take 0.75 to
  1.0 of our memory, and as long as ours or, on the second network, 0.8 to 1.0 of that.
- vmap(grad) does not always write the gradients out. XLA fuses the outer products into a sum that follows,
  so that norms, a second moment written as a mean, and clipping in two passes need 0.2 to 0.75 of our memory:
  no array (N, n_l, n_{l-1}) stands outside of a fusion in the compiled program. What is left is time, N
  multiplications for every parameter: norms 33 times ours on the first network and 4 on the second, clipping
  in two passes 25 and 4, a second moment 117 and 56. So a factor of about 50 holds for clipping where
  gradients are written out, and neither for norms nor against two passes.
- The diagonal by a root of H needs 0.85 of our memory (1.6 with jaxlib 0.11 and 0.12), for the same reason,
  though 446 times as long.
- jax.grad of the plain loss needs 0.66 of our plain gradient's memory and on the second network 0.87 of its
  time. The slope of fnn.tanh is a function of z, right to the last bits, so that z is kept beside a and an
  exponential is taken again; autodiff's 1 - a² is one of a alone. The four reductions need 1.5 to 4.6 times
  the memory of jax.grad.
"""

import argparse
import importlib
import importlib.util
import os
import random
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fnn
from fnn.tables import aligned

clipping: Any = None
if importlib.util.find_spec("jax_privacy"):
    clipping = importlib.import_module("jax_privacy.clipping")

# (widths, N, whether Jacobians fit in memory)
NETWORKS = (((784, 512, 512, 10), 256, False), ((784, 128, 128, 10), 64, True))
GROUP = 0.1  # seconds for which a short program is repeated within a round


class Program(NamedTuple):
    whose: str
    what: str  # programs of equal `what` compute the same
    form: str
    call: Callable[..., Any]


# The network and its loss without fnn, for one example and for a batch.


def outputs(params, x):
    for W, b in params[:-1]:
        x = jnp.tanh(W @ x + b)
    W, b = params[-1]
    return W @ x + b


def loss(params, x, y):
    z = outputs(params, x)
    return jax.nn.logsumexp(z) - z[y]


def losses_of(Z, y):
    return jax.nn.logsumexp(Z, axis=1) - jnp.take_along_axis(Z, y[:, None], axis=1)[:, 0]


def mean_loss(params, X, y):
    A = X
    for W, b in params[:-1]:
        A = jnp.tanh(A @ W.T + b)
    W, b = params[-1]
    return jnp.mean(losses_of(A @ W.T + b, y))


# Every example's gradient by autodiff, and what is asked of it.

example_gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))


def norms_of(gradients):
    return jnp.sqrt(sum(jnp.sum(g.reshape(len(g), -1) ** 2, axis=1) for g in jax.tree.leaves(gradients)))


def norms(params, X, y):
    return norms_of(example_gradients(params, X, y))


def clipped_in_one_product(max_norm, params, X, y):
    gradients = example_gradients(params, X, y)
    factors = jnp.minimum(1, max_norm / norms_of(gradients)) / len(X)
    return jax.tree.map(lambda g: jnp.tensordot(factors, g, axes=1), gradients)


def clipped_one_by_one(max_norm, params, X, y):
    gradients = example_gradients(params, X, y)
    factors = jnp.minimum(1, max_norm / norms_of(gradients))
    return jax.tree.map(lambda g: jnp.mean(jax.vmap(jnp.multiply)(factors, g), axis=0), gradients)


def clipped_by_weights(max_norm, params, X, y):
    """The norms, then one gradient of the losses weighted by what the norms allow."""
    factors = jnp.minimum(1, max_norm / norms(params, X, y)) / len(X)

    def weighted(params):
        return jnp.sum(factors * jax.vmap(loss, in_axes=(None, 0, 0))(params, X, y))

    return jax.grad(weighted)(params)


def second_moment_as_a_mean(params, X, y):
    return jax.tree.map(lambda g: jnp.mean(g**2, axis=0), example_gradients(params, X, y))


def second_moment_in_one_product(params, X, y):
    p = jnp.full(len(X), 1 / len(X))
    return jax.tree.map(lambda g: jnp.tensordot(p, g**2, axes=1), example_gradients(params, X, y))


# The Gauss–Newton diagonal from every example's Jacobian, with H = diag p - p pᵀ or its root.


def diagonal_by_einsum(params, X, y):
    def hessian(x):
        p = jax.nn.softmax(outputs(params, x))
        return jnp.diag(p) - jnp.outer(p, p)

    H = jax.vmap(hessian)(X)
    Js = jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(params, X)
    return jax.tree.map(lambda J: jnp.einsum("nk...,nkl,nl...->...", J, H, J) / len(X), Js)


def diagonal_by_root(params, X, y):
    """Σ_k (J_nᵀ s_k)²: the root goes into the function that is differentiated, and no J is needed after."""

    def rotated(params, x):
        z = outputs(params, x)
        p = jax.lax.stop_gradient(jax.nn.softmax(z))
        return ((jnp.eye(p.size) - p[:, None]) * jnp.sqrt(p)).T @ z

    Js = jax.vmap(jax.jacrev(rotated), in_axes=(None, 0))(params, X)
    return jax.tree.map(lambda J: jnp.sum(J**2, axis=(0, 1)) / len(X), Js)


def sweep_by_autodiff(params, X, y) -> fnn.Sweep:
    """The pairs (a^{l-1}, δ^l) without a backward pass of one's own: zeros e^l are added to every z^l, and
    the gradient with respect to them is δ^l."""

    def total(zeros):
        A, inputs, Z = X, [], None
        for (W, b), e in zip(params, zeros, strict=True):
            inputs.append(A)
            Z = A @ W.T + b + e
            A = jnp.tanh(Z)
        losses = losses_of(Z, y)
        return jnp.sum(losses), (losses, tuple(inputs))

    zeros = tuple(jnp.zeros((len(X), len(b))) for _, b in params)
    errors, (losses, inputs) = jax.grad(total, has_aux=True)(zeros)
    weights = jnp.full_like(losses, 1 / len(X))
    return fnn.Sweep(losses, inputs, errors, weights, None, (True,) * len(params))


def programs(cost: fnn.Cost, N: int, max_norm: float, with_jacobians: bool) -> list[Program]:
    """Ours, the first of which is the unit of all ratios, then the others."""

    def plain(params, X, y):
        return fnn.value_and_grad(cost)(params, X, y)[1]

    def again(params, X, y):  # a function of its own, so that it is compiled apart
        return plain(params, X, y)

    reductions: dict[str, Callable[[fnn.Sweep], Any]] = {
        "norms": fnn.example_norms,
        "clipped mean": lambda sweep: fnn.clipped_gradient(sweep, max_norm),
        "second moment": fnn.second_moment,
        "gram": fnn.gram,
    }
    only_ours: dict[str, Callable[[fnn.Sweep], Any]] = {
        "variance": fnn.gradient_variance,
        "signal to noise": fnn.signal_to_noise,
        "cosines": fnn.example_cosines,
        "noise scale": fnn.noise_scale,
    }

    def after(sweep, reduction):
        return lambda *args: reduction(sweep(*args))

    ours = [Program("fnn", "gradient", "", plain), Program("fnn", "gradient", "again: noise", again)]
    by_sweep = {"gradient": fnn.gradient} | reductions | only_ours
    ours += [
        Program("fnn", what, "of a sweep", after(partial(fnn.backprop, cost), reduction))
        for what, reduction in by_sweep.items()
    ]
    ours.append(Program("fnn", "diagonal", "", partial(fnn.gauss_newton_diagonal, cost)))
    others = [Program("jax.grad", "gradient", "", jax.grad(mean_loss))]
    others += [
        Program("jax.grad", what, "of added zeros", after(sweep_by_autodiff, reduction))
        for what, reduction in reductions.items()
    ]
    others += [
        Program("vmap(grad)", "norms", "", norms),
        Program("vmap(grad)", "clipped mean", "one product", partial(clipped_in_one_product, max_norm)),
        Program("vmap(grad)", "clipped mean", "one by one", partial(clipped_one_by_one, max_norm)),
        Program("vmap(grad)", "clipped mean", "norms, then grad", partial(clipped_by_weights, max_norm)),
        Program("vmap(grad)", "second moment", "one product", second_moment_in_one_product),
        Program("vmap(grad)", "second moment", "a mean", second_moment_as_a_mean),
    ]
    if clipping:
        others += [
            Program("jax_privacy", "clipped mean", form, clipped_by_jax_privacy(N, max_norm, size))
            for form, size in (("", None), ("microbatches of 32", 32))
        ]
    if with_jacobians:
        others += [
            Program("vmap(jacrev)", "diagonal", "einsum with H", diagonal_by_einsum),
            Program("vmap(jacrev)", "diagonal", "root of H", diagonal_by_root),
        ]
    return ours + others


def clipped_by_jax_privacy(N: int, max_norm: float, microbatch_size: int | None) -> Callable[..., Any]:
    """Its sum of clipped gradients over N, of the loss of a single example, as its documentation has it."""
    return clipping.clipped_grad(
        loss,
        l2_clip_norm=max_norm,
        normalize_by=N,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        microbatch_size=microbatch_size,
    )


def check_agreement(asked: list[Program], answers: list[Any]) -> None:
    """Programs of equal `what` give the same, to 1e-4 of a leaf's largest entry."""
    first: dict[str, Any] = {}
    for program, answer in zip(asked, answers, strict=True):
        expected = jax.tree.leaves(first.setdefault(program.what, answer))
        for leaf, other in zip(expected, jax.tree.leaves(answer), strict=True):
            error = float(jnp.max(jnp.abs(leaf - other)) / jnp.max(jnp.abs(leaf)))
            assert leaf.shape == other.shape and error < 1e-4, (program, error)


def seconds(call, args) -> float:
    """The median of as many calls as fit into GROUP, at least one."""
    found, stop = [], time.perf_counter() + GROUP
    while not found or time.perf_counter() < stop:
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def measure(compiled: list[Any], args: tuple[Any, ...], rounds: int) -> np.ndarray:
    """Seconds, one row for each round, in which every program has its turn, in another order each time."""
    shuffled, times = random.Random(0), []
    for _ in range(rounds):
        order = list(range(len(compiled)))
        shuffled.shuffle(order)
        found = {i: seconds(compiled[i], args) for i in order}
        times.append([found[i] for i in range(len(compiled))])
    return np.array(times)


def table(widths: tuple[int, ...], N: int, with_jacobians: bool, rounds: int) -> str:
    keys = jax.random.split(jax.random.key(0), 3)
    params: Any = fnn.init(keys[0], widths, dtype=jnp.float32)
    X = jax.random.normal(keys[1], (N, widths[0]), jnp.float32)
    y = jax.random.randint(keys[2], (N,), 0, widths[-1])
    args = params, X, y
    cost = fnn.cost(fnn.mlp(fnn.tanh), fnn.softmax_cross_entropy_with_integer_labels)
    max_norm = float(jnp.median(fnn.example_norms(fnn.backprop(cost, *args))))  # every second one is clipped
    asked = programs(cost, N, max_norm, with_jacobians)
    compiled: list[Any] = [jax.jit(program.call).lower(*args).compile() for program in asked]
    check_agreement(asked, [call(*args) for call in compiled])
    memory = [call.memory_analysis().temp_size_in_bytes / 1024 for call in compiled]
    times = measure(compiled, args, rounds)
    medians = np.median(times, axis=0)

    def ratio(a: int, b: int) -> str:
        low, high = np.quantile(times[:, a] / times[:, b], [0.25, 0.75])
        return f"{digits(medians[a] / medians[b])} ({digits(low)}-{digits(high)})"

    rows: list[tuple[str, ...]] = [
        ("", "", "", "KiB", "/ plain", "ms", "/ plain", "KiB / fnn's", "ms / fnn's")
    ]
    ours: dict[str, int] = {}
    for i, (whose, what, form, _) in enumerate(asked):
        j = ours.setdefault(what, i)
        to_ours = ("", "") if whose == "fnn" else (digits(memory[i] / memory[j]), ratio(i, j))
        of_plain = f"{memory[i]:,.0f}", digits(memory[i] / memory[0]), f"{medians[i] * 1e3:,.2f}", ratio(i, 0)
        rows.append((whose, what, form, *of_plain, *to_ours))
    head = f"{'-'.join(map(str, widths))}, N = {N}, {rounds} rounds"
    return f"{head}\n\n{aligned(rows, '<<<>>>>>>')}\n"


def digits(number: float) -> str:
    return f"{number:,.2f}" if number < 9.995 else f"{number:,.1f}" if number < 99.95 else f"{number:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="for each network")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".txt"), help="the table")
    flags = parser.parse_args()
    parts = []
    for network in NETWORKS:
        parts.append(table(*network, flags.rounds))
        print(parts[-1], flush=True)
    cores = len(os.sched_getaffinity(0))
    privacy = f"jax_privacy {version('jax_privacy')}" if clipping else "without jax_privacy, not installed"
    device = f"{jax.devices()[0].platform}, {cores} core{'s' * (cores > 1)}"
    last = f"float32; jax {jax.__version__}, jaxlib {version('jaxlib')}, {privacy}, {device}\n"
    print(last)
    flags.output.write_text("\n".join([*parts, last]), encoding="utf-8")


if __name__ == "__main__":
    main()
