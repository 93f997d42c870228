"""A progress bar over epochs: live with rich in a terminal, a few plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

LINES = 10  # plain lines for a whole run, so that a log stays readable


@contextmanager
def progress_bar(epochs: int, *, show: bool) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yields a function to call after every epoch with its number, from 1, and the numbers to show.

    Written to standard error, as results go to standard output.
    """
    if not show:
        yield lambda epoch, numbers: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:  # rich is in the extra `experiments`
        yield lambda epoch, numbers: _line(epoch, epochs, numbers)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda epoch, numbers: _line(epoch, epochs, numbers)
        return
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=epochs, numbers="compiling")
        yield lambda epoch, numbers: bar.update(task, completed=epoch, numbers=_text(numbers))


def _line(epoch: int, epochs: int, numbers: Mapping[str, float]) -> None:
    if epoch in (1, epochs) or epoch % -(-epochs // LINES) == 0:
        print(f"epoch {epoch:>{len(str(epochs))}}/{epochs}  {_text(numbers)}", file=sys.stderr, flush=True)


def _text(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in numbers.items())
