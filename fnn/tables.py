"""Small tables as text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Rows of cells as lines, every column as wide as its widest cell.

    sides: one letter for each column, < to begin where the column begins, > to end where it ends

    >>> from fnn.tables import aligned
    >>> print(aligned([("layer", "size"), ("1", "1,024"), ("10", "8")], "<>"))
    layer   size
    1      1,024
    10         8
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)
