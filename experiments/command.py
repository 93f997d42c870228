"""What every experiment shares: its flags, and a command line that answers a wrong flag in one line."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import tyro
from matplotlib.figure import Figure

import fnn

FORMATS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Flags:
    """The flags of every experiment. An experiment adds its own in a subclass."""

    formats: ClassVar[tuple[str, ...]] = FORMATS
    seed: int = 0
    """Decides everything that is random."""
    output: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: beside the script)")
    ] = None
    """Where the figure goes: .png, .svg or .pdf."""
    quick: bool = False
    """A smaller run for a first look, in seconds."""

    def check(self) -> None:
        """Raises ValueError unless every flag has a value that can work."""
        # A larger seed would be cut to 32 bits in silence: jax.random.key(2**32) is key(0).
        expect("--seed", "an integer from 0 to 2**32 - 1", self.seed, 0 <= self.seed < 2**32)
        expect_file("--output", self.formats, self.output)


@dataclass(frozen=True)
class TableFlags(Flags):
    """Those of an experiment that writes a table."""

    formats: ClassVar[tuple[str, ...]] = (".txt",)
    output: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: beside the script)")
    ] = None
    """Where the table goes: .txt."""


F = TypeVar("F", bound=Flags)


def expect(flag: str, what: str, got: Any, is_right: bool) -> None:
    """Raises ValueError unless the flag is right: what it needs to be, and what came."""
    if not is_right:
        raise ValueError(f"{flag} needs to be {what}, got {got}.")


def expect_file(flag: str, suffixes: Sequence[str], path: Path | None) -> None:
    """Raises ValueError if a path is given where no file of such a kind can be written."""
    is_right = path is None or (path.suffix in suffixes and path.parent.is_dir())
    expect(flag, f"a {' or '.join(suffixes)} file in an existing folder", path, is_right)


def main(
    script: str, flags_type: type[F], run: Callable[[F], Figure], args: Sequence[str] | None = None
) -> None:
    """Reads the flags, runs the experiment, and writes the figure that it returns.

    script: the experiment's `__file__`. The figure goes beside it, a quick run's to a name of its own, so
        that it never replaces the real one.
    run: prints what it finds and returns the figure
    """
    flags, output = _read(script, flags_type, ".png", args)
    try:
        figure = run(flags)
    except fnn.DivergenceError as error:
        raise SystemExit(f"{Path(script).stem}: {error}") from None
    figure.savefig(output)
    print(f"Figure:   {os.path.relpath(output)}")


def table_main(
    script: str, flags_type: type[F], run: Callable[[F], str], args: Sequence[str] | None = None
) -> None:
    """As `main`, for an experiment that returns a table as text: it is printed, and written to a file."""
    flags, output = _read(script, flags_type, ".txt", args)
    text = run(flags)
    print(text)
    output.write_text(text, encoding="utf-8")
    print(f"Table:    {os.path.relpath(output)}")


def _read(script: str, flags_type: type[F], suffix: str, args: Sequence[str] | None) -> tuple[F, Path]:
    """The flags, and where the result goes; a wrong flag ends the program."""
    path = Path(script)
    flags = tyro.cli(flags_type, args=args, prog=f"python -m experiments.{path.stem}")
    try:
        flags.check()
    except ValueError as error:
        print(f"{path.stem}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return flags, flags.output or path.with_name(f"{path.stem}{'_quick' * flags.quick}{suffix}")
