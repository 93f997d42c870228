"""Progress bars: over epochs, live in a terminal and a few plain lines elsewhere; and a late one."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

LINES = 10  # plain lines for a whole run, so that a log stays readable

Show = Callable[[int, Sequence[float], Sequence[float]], None]  # (epoch, training's numbers, validation's)


@contextmanager
def progress_bar(epochs: int, names: Sequence[str], *, show: bool) -> Iterator[Show]:
    """Yields a function to call after every epoch, counted from 1, with the numbers of those names.

    Numbers of the validation data stand in brackets after those of the training data. Written to standard
    error, as results go to standard output.
    """

    def text(train: Sequence[float], validation: Sequence[float]) -> str:
        held_out = [f" ({number:.4f})" for number in validation] or [""] * len(train)
        numbers = zip(names, train, held_out, strict=True)
        return "  ".join(f"{name} {number:.4f}{bracket}" for name, number, bracket in numbers)

    def line(epoch: int, train: Sequence[float], validation: Sequence[float]) -> None:
        if epoch in (1, epochs) or epoch % -(-epochs // LINES) == 0:
            width = len(str(epochs))
            print(f"epoch {epoch:>{width}}/{epochs}  {text(train, validation)}", file=sys.stderr, flush=True)

    if not show:
        yield lambda epoch, train, validation: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column
    except ImportError:  # rich is in the extra `experiments`
        yield line
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield line
        return
    columns = (
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        # Where the terminal is narrow, the numbers are cut and the bar stays.
        TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("", total=epochs, numbers="compiling")
        yield lambda epoch, train, validation: bar.update(
            task, completed=epoch, numbers=text(train, validation)
        )


Tell = Callable[[str, int, int], None]  # (what is done now, how many of it are done, of how many)


@contextmanager
def late_bar(*, after: float = 3.0) -> Iterator[Tell]:
    """Yields a function to call with news; in a terminal a bar shows the latest after so many seconds.

    Whoever waits less sees nothing, and so do logs. Written to standard error.
    """
    began, shown = time.monotonic(), []
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:  # rich is in the extra `experiments`
        yield lambda what, done, total: None
        return
    console = Console(stderr=True)

    def tell(what: str, done: int, total: int) -> None:
        if not shown and console.is_terminal and time.monotonic() - began > after:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            bar = Progress(*columns, console=console, transient=True)
            bar.start()
            shown.append((bar, bar.add_task(what, total=total)))
        for bar, task in shown:
            bar.update(task, description=what, completed=done, total=total)

    try:
        yield tell
    finally:
        for bar, _ in shown:
            bar.stop()
