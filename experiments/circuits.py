"""What does backpropagation do on a computational graph, gate by gate?

    python -m experiments.circuits        (--help lists the flags)

Expected answer: every gate multiplies the gradient that reaches its output by its local gradients, and where
a wire forks the gradients that come back are added. The circuits are those of CS231n, lecture 4 (Li, Karpathy
& Johnson 2016): (x + y) z, the sigmoid neuron, gate by gate and with one σ gate, the squared length of W x,
and a quotient with forks. Every gradient agrees with jax.grad's to a few rounding errors. The tables list
every node; the figure, circuits.png beside this file, shows values above the wires and gradients below.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import fnn
from experiments import command
from fnn import Graph, Wire, gates, node


@fnn.graph
def product_of_sum(x: Wire, y: Wire, z: Wire) -> Wire:
    q = (x + y).named("q")
    return (q * z).named("f")


@fnn.graph
def neuron(w0: Wire, x0: Wire, w1: Wire, x1: Wire, w2: Wire) -> Wire:
    z = (w0 * x0 + w1 * x1 + w2).named("z")
    return (1 / (1 + node(gates.exp, -z))).named("f")


@fnn.graph
def neuron_of_one_gate(w0: Wire, x0: Wire, w1: Wire, x1: Wire, w2: Wire) -> Wire:
    return node(fnn.sigmoid, (w0 * x0 + w1 * x1 + w2).named("z"), name="f")


@fnn.graph
def squared_length(W: Wire, x: Wire) -> Wire:
    return node(gates.squared_norm, (W @ x).named("q"), name="f")


@fnn.graph
def quotient(x: Wire, y: Wire) -> Wire:
    numerator = (x + node(fnn.sigmoid, y)).named("numerator")
    denominator = (node(fnn.sigmoid, x) + (x + y) ** 2).named("denominator")
    return (numerator / denominator).named("f")


NEURON = (2.0, -1.0, -3.0, -2.0, -3.0)  # w0, x0, w1, x1, w2
CIRCUITS: dict[str, tuple[Graph, tuple[Any, ...], Callable[..., Any]]] = {
    # title -> (graph, inputs, the same in plain JAX)
    "f = (x + y) z: + passes the gradient on, × swaps its inputs": (
        product_of_sum, (-2.0, 5.0, -4.0), lambda x, y, z: (x + y) * z
    ),
    "A sigmoid neuron, gate by gate: local gradient times the gradient from above": (
        neuron, NEURON, lambda w0, x0, w1, x1, w2: 1 / (1 + jnp.exp(-(w0 * x0 + w1 * x1 + w2)))
    ),
    "The same neuron with one σ gate: the same gradients": (
        neuron_of_one_gate, NEURON, lambda w0, x0, w1, x1, w2: jax.nn.sigmoid(w0 * x0 + w1 * x1 + w2)
    ),
    "f = ‖W x‖²: gradients have the shapes of the values": (
        squared_length, ([[0.1, 0.5], [-0.3, 0.8]], [0.2, 0.4]), lambda W, x: jnp.sum((W @ x) ** 2)
    ),
    "f = (x + σ(y)) / (σ(x) + (x + y)²): where x and y fork, gradients are added": (
        quotient, (3.0, -4.0),
        lambda x, y: (x + jax.nn.sigmoid(y)) / (jax.nn.sigmoid(x) + (x + y) ** 2),
    ),
}  # fmt: skip


class Circuit(NamedTuple):
    sweep: fnn.GraphSweep
    difference: float  # from jax.grad: the largest, in rounding errors of the largest entry


def measure() -> dict[str, Circuit]:
    """Every circuit run forward and backward, in float32, beside jax.grad."""
    results = {}
    for title, (graph, numbers, plain) in CIRCUITS.items():
        inputs = tuple(jnp.asarray(x, jnp.float32) for x in numbers)
        sweep = jax.jit(graph.backprop)(*inputs)
        theirs = jax.grad(plain, argnums=tuple(range(len(inputs))))(*inputs)
        eps = float(jnp.finfo(jnp.float32).eps)
        apart = 0.0
        for name, expected in zip(graph.inputs, theirs, strict=True):
            off, size = jnp.abs(sweep.gradients[name] - expected).max(), jnp.abs(expected).max()
            apart = max(apart, float(off / (eps * size)))
        results[title] = Circuit(sweep, apart)
    return results


def report(circuits: dict[str, Circuit]) -> str:
    tables = "\n\n".join(f"{title}\n\n{circuit.sweep}" for title, circuit in circuits.items())
    worst = max(circuit.difference for circuit in circuits.values())
    return f"{tables}\n\nGradients: by hand and by jax.grad differ by at most {worst:.1f} rounding errors.\n"


def draw(circuits: dict[str, Circuit]) -> Figure:
    return fnn.draw_graph(*(circuit.sweep for circuit in circuits.values()), titles=list(circuits))


def run(flags: command.Flags) -> Figure:
    circuits = measure()
    print(report(circuits))
    return draw(circuits)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, command.Flags, run, args)


if __name__ == "__main__":
    main()
