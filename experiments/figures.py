"""How every figure looks: a title that says the finding, labelled axes, a light grid."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine


def new_figure(finding: str, width: float, height: float) -> Figure:
    """An empty figure of that size in inches, with the finding as its title.

    It belongs to no window and no global state, so nothing has to be closed.
    """
    figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    figure.suptitle(finding, weight="bold")
    return figure


def panels(
    finding: str, titles: Sequence[str], *, columns: int = 3, height: float = 3.7
) -> tuple[Figure, list[Axes]]:
    """A figure of panels with their titles and a light grid, at most so many in a row."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = new_figure(finding, 4.6 * columns, 0.4 + height * rows)
    axes = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for one, title in zip(axes, titles, strict=False):
        one.set_title(title)
        one.grid(alpha=0.3)
    for one in axes[len(titles) :]:
        one.set_axis_off()
    return figure, axes[: len(titles)]
