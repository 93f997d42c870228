r"""Computational graphs: named nodes, each a gate, run forward and then backward, every intermediate kept.

A node's output may go to several others: a fork. For C that depends on u through v_1, ..., v_k,

    dC = Σ_i (∂C/∂v_i) dv_i,   so   ∂C/∂u = Σ_i (∂C/∂v_i) (∂v_i/∂u):

along every wire, the local gradient ∂v_i/∂u times the gradient ∂C/∂v_i that arrives from above, **added at
forks**. Visiting the nodes backwards, each after all that use it, computes every gradient once.

Sources: Bauer (1974); Linnainmaa (1976); Li, Karpathy & Johnson (2016), CS231n, lecture 4.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from . import gates
from .params import _outline
from .rules import RuleLike, accepts, check_adjoints, check_rule_like, run_forward
from .tables import aligned


class Node(NamedTuple):
    """A gate in a graph: the name of its output, the gate, and the names of its inputs."""

    name: str
    gate: RuleLike
    inputs: tuple[str, ...]


class GraphResiduals(NamedTuple):
    primals: tuple[Array, ...]
    kept: tuple[Any, ...]  # what each node's gate kept


@dataclass(frozen=True)
class Graph:
    """A computational graph as a rule: (*inputs) -> the output. Made by `graph`, or as a table of nodes.

    inputs: names, in the order in which a call gives them
    nodes: `Node(name, gate, inputs)` in any order; they are sorted so that each stands after its inputs
    output: the name of the output node; the only node that no other uses, unless one is named

    Being a rule, it works under jit and vmap, with `fnn.value_and_grad` and `fnn.as_custom_vjp`, and as a
    gate of another graph. Raises ValueError for a cycle, a name used twice, or a name that no node has.

    >>> import fnn
    >>> from fnn.gates import add, multiply
    >>> graph = fnn.Graph(
    ...     inputs=("x", "y", "z"),
    ...     nodes=(fnn.Node("q", add, ("x", "y")), fnn.Node("f", multiply, ("q", "z"))),
    ... )
    >>> print(graph(-2.0, 5.0, -4.0))
    -12.0
    """

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: str = ""

    def __post_init__(self):
        inputs, nodes = tuple(self.inputs), tuple(self.nodes)
        if isinstance(self.inputs, str) or not all(isinstance(name, str) and name for name in inputs):
            raise TypeError(f"Graph: inputs needs to be a tuple of names such as ('x', 'y'), got {inputs!r}.")
        _check_nodes(nodes)
        names = [*inputs, *(node.name for node in nodes)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"Graph: the name {name!r} is used twice; each input and node needs its own."
                )
        for node in nodes:
            _check_known(names, node.inputs, f"node {node.name!r} takes")
        nodes = _sorted(inputs, nodes)
        output = self.output or _only_end(inputs, nodes)
        _check_known(names, (output,), "output is")
        for attribute, value in (("inputs", inputs), ("nodes", nodes), ("output", output)):
            object.__setattr__(self, attribute, value)

    def forward(self, *primals: Any, **named: Any) -> tuple[Array, GraphResiduals]:
        """The output's value, and what every gate kept."""
        values, residuals = self._run(primals, named)
        return values[self.output], residuals

    def pullback(self, residuals: GraphResiduals, out_bar: Array) -> tuple[Array, ...]:
        """The gradient with respect to every input."""
        gradients = self._gradients(residuals, out_bar)
        return tuple(
            gradients.get(name, jnp.zeros_like(x))
            for name, x in zip(self.inputs, residuals.primals, strict=True)
        )

    def __call__(self, *primals: Any, **named: Any) -> Array:
        return self.forward(*primals, **named)[0]

    def backprop(self, *primals: Any, out_bar: Any = None, **named: Any) -> "GraphSweep":
        """The value of every node, and the gradient of the output with respect to it.

        out_bar: the gradient that arrives at the output; 1 for a scalar, to be given for an array

        >>> import fnn
        >>> graph = fnn.graph(lambda x, y, z: (x + y) * z)
        >>> print(graph.backprop(-2.0, 5.0, -4.0))
        node      operation         value  gradient
        x         input                -2        -4
        y         input                 5        -4
        z         input                -4         3
        add       add(x, y)             3        -4
        multiply  multiply(add, z)    -12         1
        """
        values, residuals = self._run(primals, named)
        out = values[self.output]
        if out_bar is None:
            if out.shape:
                raise ValueError(
                    f"Graph: the output {self.output!r} has shape {out.shape}; give the gradient that "
                    "arrives there, out_bar=jnp.ones_like(output) for the sum, or go through jax.vmap."
                )
            out_bar = jnp.ones_like(out)
        out_bar = jnp.asarray(out_bar, out.dtype)
        if out_bar.shape != out.shape:
            raise ValueError(f"Graph: out_bar needs the output's shape {out.shape}, got {out_bar.shape}.")
        gradients = self._gradients(residuals, out_bar)
        # What does not lead to the output does not change it.
        return GraphSweep(
            self, values, {name: gradients.get(name, jnp.zeros_like(x)) for name, x in values.items()}
        )

    def _run(self, primals: Sequence[Any], named: dict[str, Any]) -> tuple[dict[str, Array], GraphResiduals]:
        """The value of every node by name."""
        inputs = self._bind(primals, named)
        values, kept = dict(zip(self.inputs, inputs, strict=True)), []
        for name, gate, sources in self.nodes:
            values[name], residuals = run_forward(gate, *(values[source] for source in sources))
            kept.append(residuals)
        return values, GraphResiduals(inputs, tuple(kept))

    def _gradients(self, residuals: GraphResiduals, out_bar: Array) -> dict[str, Array]:
        """The gradient of every node that leads to the output, by name."""
        gradients = {self.output: out_bar}
        for (name, gate, sources), kept in zip(reversed(self.nodes), reversed(residuals.kept), strict=True):
            if name not in gradients:
                continue
            # Local gradients times the gradient from above.
            contributions = check_adjoints(gate, gate.pullback(kept, gradients[name]), len(sources))
            for source, contribution in zip(sources, contributions, strict=True):
                if contribution is not None:  # integers have none
                    before = gradients.get(source)
                    gradients[source] = contribution if before is None else before + contribution  # a fork
        return gradients

    def _bind(self, primals: Sequence[Any], named: dict[str, Any]) -> tuple[Array, ...]:
        """The inputs in order, as arrays of floats."""
        given = dict(zip(self.inputs, primals, strict=False)) | named
        n = len(primals) + len(named)
        if n != len(self.inputs) or set(given) != set(self.inputs):
            extra = f", with {', '.join(named)} by name" if named else ""
            raise TypeError(f"Graph: needs the inputs ({', '.join(self.inputs)}), got {n}{extra}.")
        return tuple(gates.as_floats(f"Graph: input {name!r}", given[name]) for name in self.inputs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GraphSweep:
    """What one run forward and one backward know of every node. Printed, it is a table.

    graph: what was run
    values: name -> value, for inputs and nodes
    gradients: name -> gradient of the output, or of ⟨out_bar, output⟩, with respect to that value
    """

    graph: Graph = field(metadata={"static": True})
    values: dict[str, Array]
    gradients: dict[str, Array]

    def __str__(self) -> str:
        operations = dict.fromkeys(self.graph.inputs, "input")
        operations |= {name: f"{gate!r}({', '.join(inputs)})" for name, gate, inputs in self.graph.nodes}
        rows = [
            (name, operation, shown(self.values[name]), shown(self.gradients[name]))
            for name, operation in operations.items()
        ]
        return aligned([("node", "operation", "value", "gradient"), *rows], "<<>>")


class Wire:
    """A node's output while a graph is being written: arithmetic on wires adds nodes. See `graph`."""

    __array_ufunc__ = None  # NumPy's numbers leave arithmetic with wires to the methods below

    def __init__(self, nodes: dict[str, Node | None], name: str):
        self._nodes, self._name = nodes, name  # of the whole graph so far; None for an input

    def named(self, name: str) -> "Wire":
        """The same node under a name of your own, to be given where it is made."""
        own = self._nodes[self._name]
        if own is None:
            raise ValueError(f"graph: the input {self._name!r} has its name from the function's argument.")
        if any(other and self._name in other.inputs for other in self._nodes.values()):
            raise ValueError(f"graph: {self._name!r} is in use already; name a node where it is made.")
        del self._nodes[self._name]
        return _add_node(self._nodes, name, own.gate, own.inputs)

    def __add__(self, other):
        return _arithmetic(gates.add, gates.shift, self, other)

    def __sub__(self, other):
        return _arithmetic(gates.subtract, lambda c: gates.shift(-c), self, other)

    def __rsub__(self, other):
        return -self + other

    def __mul__(self, other):
        return _arithmetic(gates.multiply, gates.scale, self, other)

    def __truediv__(self, other):
        if isinstance(other, Wire):
            return node(gates.divide, self, other)
        c = _number("/", other)
        return node(gates.divide, self, _add_node(self._nodes, "", gates.constant(c), ()))

    def __rtruediv__(self, other):
        c, inverse = _number("/", other), node(gates.reciprocal, self)
        return inverse if c == 1 else inverse * c

    def __matmul__(self, other):
        return node(gates.matmul, self, other)

    def __neg__(self):
        return node(gates.scale(-1.0), self)

    def __pow__(self, n):
        return node(gates.square if _number("**", n) == 2 else gates.power(n), self)

    __radd__, __rmul__ = __add__, __mul__

    def __bool__(self):
        raise TypeError("graph: a node has no value while its graph is written; use a gate such as maximum.")

    def __repr__(self):
        return f"Wire({self._name!r})"


def node(gate: RuleLike, *inputs: Wire, name: str = "") -> Wire:
    """Adds a node to the graph being written: any rule, applied to nodes. See `graph`."""
    if not inputs or not all(isinstance(wire, Wire) for wire in inputs):
        got = ", ".join(type(wire).__name__ for wire in inputs) or "none"
        raise TypeError(
            f"node: {gate!r} needs nodes of the graph as inputs, got {got}. Arrays are inputs of the graph: "
            "make them arguments of its function."
        )
    nodes = inputs[0]._nodes
    if any(wire._nodes is not nodes for wire in inputs):
        raise ValueError(f"node: the inputs of {gate!r} belong to different graphs.")
    check_rule_like("node: the gate", gate, such_as="fnn.gates.multiply")
    return _add_node(nodes, name, gate, tuple(wire._name for wire in inputs))


def graph(function: Callable[..., Wire]) -> Graph:
    """The computational graph of a Python function of nodes; its arguments are the graph's inputs.

    In the function, + - * / @ and ** make nodes; `node(gate, *nodes)` applies any rule, and
    `.named("q")` names a node, or else it is called after its gate. Loops and functions of Python are run
    once, while the graph is written. Usable as a decorator.

    >>> import fnn
    >>> @fnn.graph
    ... def neuron(w, x, b):
    ...     z = (w * x + b).named("z")
    ...     return fnn.node(fnn.sigmoid, z, name="a")
    >>> print(neuron.backprop(2.0, -1.0, 2.0))
    node      operation         value  gradient
    w         input                 2     -0.25
    x         input                -1       0.5
    b         input                 2      0.25
    multiply  multiply(w, x)       -2      0.25
    z         add(multiply, b)      0      0.25
    a         sigmoid(z)          0.5         1
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters):
        raise TypeError("graph: the function needs named arguments, one for each input, without * or **.")
    names = tuple(p.name for p in parameters)
    nodes: dict[str, Node | None] = dict.fromkeys(names)
    output = function(*(Wire(nodes, name) for name in names))
    if not isinstance(output, Wire) or output._nodes is not nodes:
        raise TypeError(f"graph: the function needs to return one of its nodes, got {output!r}.")
    return Graph(names, tuple(row for row in nodes.values() if row), output._name)


def _add_node(nodes: dict[str, Node | None], name: str, gate: RuleLike, inputs: tuple[str, ...]) -> Wire:
    """A new node; without a name it is called after its gate: add, add_2, add_3, ..."""
    if name in nodes:
        raise ValueError(f"graph: the name {name!r} is used twice; every input and node needs its own.")
    stem, n = repr(gate).partition("(")[0], 2
    if not name:
        name = stem
        while name in nodes:
            name, n = f"{stem}_{n}", n + 1
    nodes[name] = Node(name, gate, inputs)
    return Wire(nodes, name)


def _arithmetic(gate: RuleLike, with_number: Callable[[float], RuleLike], wire: Wire, other: Any) -> Wire:
    """A gate of two nodes, or the one-input gate that a number makes of it."""
    if isinstance(other, Wire):
        return node(gate, wire, other)
    return node(with_number(_number(repr(gate), other)), wire)


def _number(operation: str, x: Any) -> float:
    if not isinstance(x, int | float | np.floating | np.integer) or isinstance(x, bool):
        raise TypeError(
            f"graph: {operation} needs a node and a number of Python, got {type(x).__name__}. "
            "Make an array an input of the graph: an argument of its function."
        )
    return float(x)


def _check_nodes(nodes: Sequence[Any]) -> None:
    for row in nodes:
        is_node = isinstance(row, Node) and isinstance(row.name, str) and isinstance(row.inputs, tuple)
        if not is_node or not row.name or not all(isinstance(name, str) for name in row.inputs):
            raise TypeError(
                f"Graph: nodes needs rows Node(name, gate, inputs), inputs a tuple of names; got {row!r}."
            )
        check_rule_like(f"Graph: the gate of node {row.name!r}", row.gate, such_as="fnn.gates.multiply")
        n = len(row.gate.inputs) if isinstance(row.gate, Graph) else None
        if n not in (None, len(row.inputs)) or not accepts(row.gate.forward, *row.inputs):
            raise ValueError(
                f"Graph: node {row.name!r} gives {len(row.inputs)} inputs to {row.gate!r}, "
                f"which takes {'another number' if n is None else n}."
            )


def _check_known(names: Sequence[str], wanted: Iterable[str], what: str) -> None:
    for name in wanted:
        if name not in names:
            raise ValueError(
                f"Graph: {what} {name!r}, but there is no such node; there are {', '.join(names)}."
            )


def _sorted(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The nodes, each after its inputs; as they are if they stand so already."""
    known = set(inputs)
    for node in nodes:
        if not known.issuperset(node.inputs):
            break
        known.add(node.name)
    else:
        return nodes
    rows = {node.name: node for node in nodes}
    try:
        order = tuple(TopologicalSorter({node.name: node.inputs for node in nodes}).static_order())
    except CycleError as error:
        raise ValueError(
            f"Graph: {' -> '.join(error.args[1])} is a cycle: the value would depend on itself. "
            "Unroll a recurrence, one node for each time step."
        ) from None
    return tuple(rows[name] for name in order if name in rows)


def _only_end(inputs: tuple[str, ...], nodes: tuple[Node, ...]) -> str:
    """The one name that nothing uses."""
    used = {source for node in nodes for source in node.inputs}
    ends = [node.name for node in nodes if node.name not in used] or list(inputs)
    if len(ends) != 1:
        raise ValueError(
            f"Graph: which is the output? Nothing uses {', '.join(ends)}; name one: output={ends[0]!r}."
        )
    return ends[0]


def shown(x: Array) -> str:
    """A value in few characters: its numbers, or dtype and shape where they are many or not known yet."""
    if isinstance(x, Tracer) or x.size > 6:
        return _outline(x)
    return np.array2string(
        np.asarray(x, np.float64), formatter={"float_kind": lambda n: f"{n:.4g}"}, separator=", "
    ).replace("\n", "")
