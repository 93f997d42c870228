"""From the shell: is a gradient right?

    python -m fnn check package.module:f package.module:gradient --shapes 4,3 3
    python -m fnn check file.py

The first form draws normal arrays of those shapes as arguments; a scalar is written (). The second runs a
file that defines f, gradient and args. Prints the report; the exit status is 0 if the gradient is right, 1 if
it is wrong, 2 if the question is.
"""

import argparse
import importlib
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .check import check_gradient, check_value_and_gradient


def main(argv: Sequence[str] | None = None) -> int:
    words: dict[str, Any] = {
        "description": __doc__,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = argparse.ArgumentParser(prog="python -m fnn", **words)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    check = commands.add_parser("check", help="a gradient against autodiff", **words)
    check.add_argument("f", help="package.module:f, or a file that defines f, gradient and args")
    check.add_argument("gradient", nargs="?", help="package.module:gradient")
    check.add_argument(
        "--shapes", nargs="+", default=[], help="of the arguments: 4,3 is a matrix, () a number"
    )
    check.add_argument("--dtype", default="float32", help="of the arguments (default: float32)")
    check.add_argument("--argnums", default="0", help="of the differentiated arguments: 0 or 0,2")
    check.add_argument("--value", action="store_true", help="the function returns (value, gradient)")
    check.add_argument("--seed", type=int, default=0, help="of the arguments and the check (default: 0)")
    check.add_argument("--json", action="store_true", help="the report as JSON")
    flags = parser.parse_args(argv)
    sys.path.insert(0, str(Path.cwd()))
    try:
        f, gradient, args = _from_file(flags) if flags.gradient is None else _from_modules(flags)
        numbers = tuple(int(n) for n in flags.argnums.split(","))
        argnums = numbers if "," in flags.argnums else numbers[0]
        judge = check_value_and_gradient if flags.value else check_gradient
        report = judge(f, gradient, *args, argnums=argnums, seed=flags.seed)
    except (TypeError, ValueError, ImportError, AttributeError, OSError, KeyError) as error:
        print(f"fnn check: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) if flags.json else report)
    return 0 if report else 1


def _from_modules(flags: argparse.Namespace) -> tuple[Callable, Callable, tuple]:
    if not flags.shapes:
        raise ValueError("--shapes is needed with functions of a module, such as --shapes 4,3 3.")
    rng = np.random.default_rng(flags.seed)
    args = tuple(jnp.asarray(rng.standard_normal(_shape(text)), flags.dtype) for text in flags.shapes)
    return _imported(flags.f), _imported(flags.gradient), args


def _from_file(flags: argparse.Namespace) -> tuple[Callable, Callable, tuple]:
    if not Path(flags.f).is_file():
        raise ValueError(
            f"needs package.module:f package.module:gradient, or a file; there is no file {flags.f}."
        )
    names = runpy.run_path(flags.f)
    missing = [name for name in ("f", "gradient", "args") if name not in names]
    if missing:
        raise ValueError(f"{flags.f} needs to define f, gradient and args; it lacks {', '.join(missing)}.")
    args = names["args"]
    return names["f"], names["gradient"], args if isinstance(args, tuple) else (args,)


def _imported(name: str) -> Callable[..., Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name} needs the form package.module:function.")
    return getattr(importlib.import_module(module), attribute)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.strip("()").split(",") if n)


if __name__ == "__main__":
    sys.exit(main())
