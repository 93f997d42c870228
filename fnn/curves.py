"""A picture of a run: its learning curves."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
TRAINING, VALIDATION, BEST = "tab:blue", "tab:orange", "0.45"
WIDTH, HEIGHT, LEGEND = 4.4, 3.2, 0.4  # inches of a panel, and of the line above
COLUMNS = 3  # panels in a row, at most
FEW = 30  # epochs, up to which each is a point on its curve


def draw_history(history: History, path: str | os.PathLike[str] | None = None) -> "Figure":
    """A matplotlib figure of a run: its cost and each metric against epochs, one panel for each.

    history: what `fit` returns, or `error.history` of a `DivergenceError`
    path: where the figure is written, if at all: .png, .svg or .pdf

    The cost has a logarithmic scale where it spans more than a factor of ten. A line marks the best epoch:
    that of early stopping, or otherwise that of the lowest cost on the validation data; without either there
    is none. Returns the figure, which belongs to no window. Needs matplotlib, in the extra `experiments`.

    Raises TypeError for anything but a `History`, ValueError for one without epochs or for another kind of
    file, ImportError without matplotlib, and OSError if the file cannot be written.

    >>> import fnn, jax, optax, os, tempfile
    >>> X = jax.random.normal(jax.random.key(0), (100, 3))
    >>> cost = fnn.cost(fnn.mlp([]), fnn.half_squared_error)
    >>> history = fnn.fit(cost, optax.sgd(0.1), fnn.init(jax.random.key(1), (3, 1)), (X, X[:, :1]),
    ...                   key=jax.random.key(2), epochs=5, batch_size=32, progress=False)
    >>> path = tempfile.mkdtemp() + "/history.png"
    >>> figure = fnn.draw_history(history, path)
    >>> [axes.get_ylabel() for axes in figure.axes], os.path.exists(path)
    (['cost'], True)
    """
    if not isinstance(history, History):
        raise TypeError(
            f"draw_history: needs the History that fnn.fit returns, got {type(history).__name__}."
        )
    if not len(history.seconds):
        raise ValueError("draw_history: there is nothing to draw, the history has no epochs.")
    if path is not None and os.path.splitext(os.fspath(path))[1].lower() not in FORMATS:
        raise ValueError(f"draw_history: path needs to end in .png, .svg or .pdf, got {os.fspath(path)!r}.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        hint = 'pip install "fnn[experiments]"'
        raise ImportError(f"draw_history: needs matplotlib, in the extra experiments: {hint}.") from error
    parts, names = (history.train, history.validation), list({**history.train, **history.validation})
    rows = -(-len(names) // COLUMNS)
    columns = -(-len(names) // rows)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure((WIDTH * columns, HEIGHT * rows + LEGEND), dpi=150, layout=layout)
    panels = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    best = _best_epoch(history)
    for axes, name in zip(panels, names, strict=False):
        drawn = zip(parts, ("training", "validation"), (TRAINING, VALIDATION), strict=True)
        curves = [(part[name], label, color) for part, label, color in drawn if name in part]
        _draw(axes, name, curves, best)
    for axes in panels[len(names) :]:
        axes.remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    if path is not None:
        figure.savefig(path)
    return figure


def _best_epoch(history: History) -> int | None:
    """Counted from 1."""
    cost = history.validation.get("cost", np.full(1, np.nan))
    if history.best_epoch is not None or np.isnan(cost).all():
        return history.best_epoch
    return int(np.nanargmin(cost)) + 1


def _draw(axes: "Axes", name: str, curves: Sequence[tuple[np.ndarray, str, str]], best: int | None) -> None:
    """curves: numbers, label and colour of each."""
    from matplotlib.ticker import MaxNLocator

    epochs = np.arange(1, len(curves[0][0]) + 1)
    marker = "." if len(epochs) <= FEW else ""
    for numbers, label, color in curves:
        axes.plot(epochs, numbers, color=color, marker=marker, linewidth=1.5, label=label)
    if best is not None:  # a point on the validation curve, where there is one
        axes.axvline(best, color=BEST, linewidth=1, linestyle="--", label=f"best epoch, {best}", zorder=1)
        numbers, _, color = curves[-1]
        axes.plot(best, numbers[best - 1], "o", color=color, markeredgecolor="white", zorder=3)
    finite = np.concatenate([numbers for numbers, *_ in curves])
    finite = finite[np.isfinite(finite)]
    if name == "cost" and len(finite) and 0 < 10 * finite.min() < finite.max():
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(name, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
