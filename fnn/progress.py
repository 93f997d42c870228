"""What a run shows of itself while it goes on, live in a terminal and as a few plain lines elsewhere.

And a bar that comes late: to be seen only by who has waited for a while.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from statistics import median
from typing import Any

LINES = 10  # plain lines for a whole run, so that a log stays readable
BETWEEN = 0.1  # seconds between two states of a live bar, as small networks have hundreds of epochs in them
RECENT = 5  # epochs whose median is the time of one: a single slow one changes nothing

# (epoch, training's numbers, validation's, seconds)
Show = Callable[[int, Sequence[float], Sequence[float], float], None]


@contextmanager
def progress_bar(
    epochs: int | None, names: Sequence[str], *, show: bool, steps: int, examples: int
) -> Iterator[Show]:
    """Yields a function to call after every epoch, counted from 1, with its numbers and its wall time.

    epochs: None where the length is not known; then neither a total nor the time left is shown
    names: of the numbers; those of the validation data stand in brackets after those of the training data,
        of which there may be fewer
    steps, examples: of one epoch; examples is 0 where their number is not known, and the speed then in steps

    Several epochs may come at once, each with an equal part of their time. The first time includes
    compilation: until there is a second one, the speed is only known to be more than it says, and the time
    left to be less. Written to standard error, as results go to standard output.
    """
    if not show:
        yield lambda epoch, train, validation, seconds: None
        return
    words = _Words(epochs, names, steps, examples)
    try:
        from rich.console import Console
    except ImportError:  # rich is in the extra `experiments`
        console = None
    else:
        console = Console(stderr=True)
    is_watched = console is not None and console.is_terminal
    with _live_bar(words, console) if is_watched else _plain_lines(words) as tell:
        yield tell


@contextmanager
def _plain_lines(words: "_Words") -> Iterator[Show]:
    """The first epoch, some between, and the last one, be it planned or not."""
    epochs = words.epochs
    unprinted: list[tuple[Sequence[float], Sequence[float]]] = []  # the numbers of the last epoch

    def is_due(epoch: int) -> bool:
        if epochs is None:
            return str(epoch).rstrip("0") in ("1", "2", "5")  # 1, 2, 5, 10, 20, 50, ...
        return epoch == epochs or epoch % -(-epochs // LINES) == 0

    def tell(epoch: int, train: Sequence[float], validation: Sequence[float], seconds: float) -> None:
        is_first = words.count == 0
        words.add(epoch, seconds)
        unprinted[:] = [(train, validation)]
        if is_first or is_due(epoch):
            print_it()

    def print_it() -> None:
        for numbers in unprinted:
            parts = (words.epoch(), words.step(), words.numbers(*numbers), words.speed(), words.left())
            print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)
        unprinted.clear()

    try:
        yield tell
    finally:
        print_it()


@contextmanager
def _live_bar(words: "_Words", console: Any) -> Iterator[Show]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    columns = (
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
        # Where the terminal is narrow, the numbers are cut and the bar stays.
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task("compiling", total=words.epochs, left="")
        latest: list[tuple[Sequence[float], Sequence[float]]] = []
        shown = float("-inf")

        def tell(epoch: int, train: Sequence[float], validation: Sequence[float], seconds: float) -> None:
            nonlocal shown
            words.add(epoch, seconds)
            latest[:] = [(train, validation)]
            if time.monotonic() - shown >= BETWEEN:
                shown = time.monotonic()
                update()

        def update() -> None:
            for numbers in latest:
                parts = (words.step(), words.numbers(*numbers), words.speed())
                text = "  ".join(part for part in parts if part)
                bar.update(task, completed=words.last, description=text, left=words.left())

        try:
            yield tell
        finally:
            update()
            if words.epochs is None:  # known now
                bar.update(task, total=words.last)


class _Words:
    """An epoch in words: where the run stands, its numbers, and its speed by the last few epochs."""

    def __init__(self, epochs: int | None, names: Sequence[str], steps: int, examples: int):
        self.epochs, self.names, self.steps, self.examples = epochs, names, steps, examples
        self.last, self.count = 0, 0  # the epoch now, and how many were seen; a resumed run has seen fewer
        self.recent: deque[float] = deque(maxlen=RECENT)

    def add(self, epoch: int, seconds: float) -> None:
        self.last, self.count = epoch, self.count + 1
        if self.count == 2:  # there is a time without compilation
            self.recent.clear()
        self.recent.append(seconds)

    def epoch(self) -> str:
        if self.epochs is None:
            return f"epoch {self.last}"
        return f"epoch {self.last:>{len(str(self.epochs))}}/{self.epochs}"

    def step(self) -> str:
        width = len(str((self.epochs or 0) * self.steps))
        return f"step {self.last * self.steps:>{width}}"

    def numbers(self, train: Sequence[float], validation: Sequence[float]) -> str:
        parts = [_short(number) for number in train], [f"({_short(number)})" for number in validation]
        columns = zip_longest(self.names, *parts, fillvalue="")
        return "  ".join(" ".join(word for word in column if word) for column in columns)

    def speed(self) -> str:
        seconds = median(self.recent)
        if seconds <= 0:
            return ""
        speed, what = (self.examples or self.steps) / seconds, "examples" if self.examples else "steps"
        return f"{'>' * (self.count == 1)}{speed:,.{0 if speed >= 10 else 2}f} {what}/s"

    def left(self) -> str:
        if self.epochs is None or self.last >= self.epochs:
            return ""
        seconds = median(self.recent) * (self.epochs - self.last)
        return f"{'<' * (self.count == 1)}{_clock(seconds)} left"


def _short(number: float) -> str:
    """Four digits behind the point, or a power of ten where these would say too little or too much."""
    return f"{number:.4f}" if number == 0 or 1e-3 <= abs(number) < 1e5 else f"{number:.3e}"


def _clock(seconds: float) -> str:
    """0:12, 12:05 or 3:00:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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
