"""A picture of a computational graph: values above the wires, gradients below them.

As CS231n, lecture 4, draws it: inputs at the left, every gate in a bubble, and on the wire that leaves it the
value above and the gradient below. Nodes stand in columns, each right of all its inputs; within a column they
are ordered by the mean height of their neighbours (the barycentre method of Sugiyama, Tagawa & Toda 1981),
which keeps wires short and mostly uncrossed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .graphs import Graph, GraphSweep, shown
from .rules import RuleLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SYMBOLS = {
    "add": "+",
    "subtract": "−",
    "multiply": "×",
    "divide": "÷",
    "maximum": "max",
    "reciprocal": "1/x",
    "square": "x²",
    "sum": "Σ",
    "squared_norm": "‖x‖²",
    "dot": "·",
    "sigmoid": "σ",
}
VALUE, GRADIENT, LINE = "tab:green", "tab:red", "0.35"
LETTER, BUBBLE, ROW, GAP, TITLE = 0.085, 0.44, 0.62, 0.4, 0.35  # inches; a letter of 10 points
SWEEPS = 40  # over the columns, alternately to the right and to the left

Point = str | tuple[str, int]  # a node, or the place where a wire of that node passes a column


def draw_graph(*sweeps: GraphSweep, titles: Sequence[str] = ()) -> "Figure":
    """A matplotlib figure of graphs that were run, one below the other; `.savefig("graph.svg")` writes it.

    sweeps: what `graph.backprop(...)` returns
    titles: one for each, or none

    Needs matplotlib, which is in the extra `experiments`.

    >>> import fnn
    >>> figure = fnn.draw_graph(fnn.graph(lambda x, y, z: (x + y) * z).backprop(-2.0, 5.0, -4.0))
    >>> [text.get_text() for text in figure.axes[0].texts][:3]
    ['x', '-2', '-4']
    """
    for sweep in sweeps:
        if not isinstance(sweep, GraphSweep):
            raise TypeError(
                f"draw_graph: needs what graph.backprop(...) returns, got {type(sweep).__name__}."
            )
    if not sweeps or len(titles) not in (0, len(sweeps)):
        raise ValueError(
            f"draw_graph: needs graphs and a title for each or none, got {len(sweeps)} and {len(titles)}."
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = 'pip install "fnn[experiments]"'
        raise ImportError(f"draw_graph: needs matplotlib, in the extra experiments: {hint}.") from error
    plans = [_plan(sweep) for sweep in sweeps]
    title = TITLE if titles else 0.0
    width, height = max(plan.width for plan in plans), sum(plan.height + title for plan in plans)
    figure, top = Figure(figsize=(width, height), dpi=150), height
    for n, plan in enumerate(plans):
        top -= plan.height + title
        box = (0, top / height, plan.width / width, plan.height / height)
        axes = figure.add_axes(box, xlim=(0, plan.width), ylim=(0, plan.height))
        axes.set_axis_off()
        _draw(axes, plan)
        if titles:
            axes.set_title(titles[n], loc="left", x=0.1 / plan.width, fontsize=11, weight="bold")
    return figure


class _Plan(NamedTuple):
    """Where everything goes, in inches from the lower left corner."""

    texts: dict[str, str]  # name -> what stands in the node
    gates: frozenset[str]  # names of the nodes that are gates
    labels: dict[str, tuple[str, str]]  # name -> value, gradient
    half: dict[str, float]  # name -> half the node's width
    room: dict[str, float]  # name -> length of the wire behind it that carries the numbers
    place: dict[Point, tuple[float, float]]
    wires: list[tuple[Point, Point]]
    width: float
    height: float


def _plan(sweep: GraphSweep) -> _Plan:
    texts = {name: name for name in sweep.graph.inputs}
    texts |= {node.name: _symbol(node.gate) for node in sweep.graph.nodes}
    labels = {name: (_stacked(sweep.values[name]), _stacked(sweep.gradients[name])) for name in texts}
    column, level, wires = _layout(sweep.graph)
    # A column is as wide as its widest node, and leaves room for the numbers on the wires behind it.
    half = {name: max(BUBBLE, (len(text) + 1) * LETTER) / 2 for name, text in texts.items()}
    room = {name: (max(map(len, "\n".join(pair).split("\n"))) + 1) * LETTER for name, pair in labels.items()}
    middle, right = {}, 0.1
    for c in range(max(column.values()) + 1):
        here = [name for name in texts if column[name] == c]
        middle[c] = right + max(half[name] for name in here)
        right = middle[c] + max(half[name] + room[name] for name in here) + GAP
    lines = max(text.count("\n") for pair in labels.values() for text in pair)
    row = ROW + 2 * 0.15 * lines
    lowest, highest = min(level.values()), max(level.values())
    place = {point: (middle[column[point]], (h - lowest + 0.5) * row) for point, h in level.items()}
    gates = frozenset(node.name for node in sweep.graph.nodes)
    return _Plan(texts, gates, labels, half, room, place, wires, right, (highest - lowest + 1) * row)


def _draw(axes: "Axes", plan: _Plan) -> None:
    ends = dict(plan.place)  # where the wires to other nodes begin
    for name, text in plan.texts.items():
        x, y = plan.place[name]
        begin, end = x + plan.half[name], x + plan.half[name] + plan.room[name]
        ends[name] = end, y
        _draw_node(axes, text, x, y, plan.half[name], is_gate=name in plan.gates)
        axes.plot((begin, end), (y, y), color=LINE, linewidth=1.1, zorder=1)
        value, gradient = plan.labels[name]
        axes.text((begin + end) / 2, y + 0.03, value, ha="center", va="bottom", fontsize=9, color=VALUE)
        axes.text((begin + end) / 2, y - 0.05, gradient, ha="center", va="top", fontsize=9, color=GRADIENT)
    for begin, end in plan.wires:
        x, y = plan.place[end]
        _draw_wire(axes, ends[begin], (x - plan.half[end] if isinstance(end, str) else x, y))


def _draw_node(axes: "Axes", text: str, x: float, y: float, half: float, *, is_gate: bool) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.text(x, y, text, ha="center", va="center", fontsize=10, zorder=3)
    if is_gate:  # a circle where the text is short
        style = f"round,pad=0,rounding_size={BUBBLE / 2 - 0.001}"
        corner = (x - half, y - BUBBLE / 2)
        bubble = FancyBboxPatch(corner, 2 * half, BUBBLE, boxstyle=style, fc="white", ec=LINE, zorder=2)
        axes.add_patch(bubble)


def _draw_wire(axes: "Axes", begin: tuple[float, float], end: tuple[float, float]) -> None:
    """A curve that leaves and arrives level."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bend = (begin[0] + end[0]) / 2
    points = [begin, (bend, begin[1]), (bend, end[1]), end]
    curve = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_patch(PathPatch(curve, fc="none", ec=LINE, linewidth=1.1, zorder=1))


def _symbol(gate: RuleLike) -> str:
    """What stands in the bubble: a sign of arithmetic where there is one, otherwise the gate's name."""
    name, _, number = repr(gate).rstrip(")").partition("(")
    if isinstance(gate, Graph):
        return "graph"
    if number and name in ("constant", "shift", "scale", "power"):
        c = float(number)
        return {"constant": f"{c:g}", "shift": f"{c:+g}", "scale": f"×{c:g}", "power": f"x^{c:g}"}[name]
    return SYMBOLS.get(name, repr(gate))


def _stacked(x) -> str:
    """A value with a matrix's rows below one another."""
    return shown(x).replace("], [", "]\n[").replace("[[", "[").replace("]]", "]")


def _layout(graph: Graph) -> tuple[dict[Point, int], dict[Point, float], list[tuple[Point, Point]]]:
    """The column and the height of every node, of every place where a wire passes a column; and the wires.

    Columns count from 0 at the left, heights upwards in rows.
    """
    column: dict[Point, int] = dict.fromkeys(graph.inputs, 0)
    users: dict[str, list[str]] = {name: [] for name in graph.inputs}
    for name, _, inputs in graph.nodes:
        column[name] = 1 + max((column[source] for source in inputs), default=0)
        users[name] = []
        for source in inputs:
            users[source].append(name)
    for name in graph.inputs:  # as near to where they are used as can be
        column[name] = min((column[user] for user in users[name]), default=1) - 1

    wires: list[tuple[Point, Point]] = []
    for name in users:
        for user in dict.fromkeys(users[name]):
            begin: Point = name
            for c in range(column[name] + 1, column[user]):
                column[name, c] = c
                if (begin, (name, c)) not in wires:
                    wires.append((begin, (name, c)))
                begin = (name, c)
            wires.append((begin, user))

    columns: list[list[Point]] = [[] for _ in range(max(column.values()) + 1)]
    for point, c in column.items():
        columns[c].append(point)
    height = {point: float(-n) for points in columns for n, point in enumerate(points)}
    for sweep in range(SWEEPS):
        leftwards = sweep % 2 == 1
        for points in reversed(columns) if leftwards else columns:
            wanted = {}
            for point in points:
                beside = [w[leftwards] for w in wires if w[1 - leftwards] == point]
                wanted[point] = np.mean([height[other] for other in beside]) if beside else height[point]
            height |= _spread(wanted)
    return column, height, wires


def _spread(wanted: dict[Point, float]) -> dict[Point, float]:
    """Heights at least a row apart, in the order of those wanted and with the same mean."""
    order = sorted(wanted, key=lambda point: -wanted[point])
    got: dict[Point, float] = {}
    below = np.inf
    for point in order:
        got[point] = below = min(wanted[point], below - 1)
    shift = float(np.mean([wanted[point] - got[point] for point in order]))
    return {point: h + shift for point, h in got.items()}
