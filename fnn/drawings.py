"""A picture of a computational graph: values above the wires, gradients below them.

As CS231n, lecture 4, draws it: inputs at the left, every gate in a bubble, and on the wire that leaves it the
value above and the gradient below. Nodes stand in columns, each right of all its inputs; within a column they
are ordered by the mean height of their neighbours (the barycentre method of Sugiyama, Tagawa & Toda 1981),
which keeps wires short and mostly uncrossed.
"""

from typing import TYPE_CHECKING

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
LETTER, BUBBLE, ROW, GAP = 0.085, 0.44, 0.62, 0.4  # inches; a letter of 10 points
SWEEPS = 12  # over the columns; more moved nothing in graphs of 40 nodes

Point = str | tuple[str, int]  # a node, or the place where a wire of that node passes a column


def draw_graph(sweep: GraphSweep) -> "Figure":
    """A matplotlib figure of the graph that was run; `.savefig("graph.svg")` writes it, .png and .pdf too.

    Needs matplotlib, which is in the extra `experiments`.

    >>> import fnn
    >>> figure = fnn.draw_graph(fnn.graph(lambda x, y, z: (x + y) * z).backprop(-2.0, 5.0, -4.0))
    >>> [text.get_text() for text in figure.axes[0].texts][:3]
    ['x', '-2', '-4']
    """
    if not isinstance(sweep, GraphSweep):
        raise TypeError(f"draw_graph: needs what graph.backprop(...) returns, got {type(sweep).__name__}.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = 'pip install "fnn[experiments]"'
        raise ImportError(f"draw_graph: needs matplotlib, in the extra experiments: {hint}.") from error
    texts = {name: name for name in sweep.graph.inputs}
    texts |= {node.name: _symbol(node.gate) for node in sweep.graph.nodes}
    labels = {name: (_stacked(sweep.values[name]), _stacked(sweep.gradients[name])) for name in texts}
    column, height, wires = _layout(sweep.graph)

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
    lowest, highest = min(height.values()), max(height.values())
    size = right, (highest - lowest + 1) * row
    place = {point: (middle[column[point]], (h - lowest + 0.5) * row) for point, h in height.items()}

    figure = Figure(figsize=size, dpi=150)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(0, size[1]))
    axes.set_axis_off()
    for name, text in texts.items():
        x, y = place[name]
        begin, end = x + half[name], x + half[name] + room[name]
        place[name] = end, y  # where the wires to other nodes begin
        _draw_node(axes, text, x, y, half[name], is_gate=name not in sweep.graph.inputs)
        axes.plot((begin, end), (y, y), color=LINE, linewidth=1.1, zorder=1)
        value, gradient = labels[name]
        axes.text((begin + end) / 2, y + 0.03, value, ha="center", va="bottom", fontsize=9, color=VALUE)
        axes.text((begin + end) / 2, y - 0.05, gradient, ha="center", va="top", fontsize=9, color=GRADIENT)
    for begin, end in wires:
        x, y = place[end]
        if isinstance(end, str):
            x -= room[end] + 2 * half[end]
        _draw_wire(axes, place[begin], (x, y))
    return figure


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
