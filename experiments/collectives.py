"""The collectives of a compiled program, read from its text: what devices send each other, and how much."""

import re
from math import ceil, prod
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# name = shape kind(operands); the shape of several arrays is a tuple, (f32[3,4]{1,0}, f32[4]{0})
LINE = re.compile(rf"^\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(KINDS)})(-start)?\(", re.MULTILINE)
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits: the first number in s32, bf16, f8e4m3fn


class Collective(NamedTuple):
    """One collective of a program; one in a loop runs as often as the loop does.

    kind: of KINDS
    shapes: of the arrays of its result on one device, as the text has them: ("f32[3,4]", "f32[4]")
    bytes: of all of them
    """

    kind: str
    shapes: tuple[str, ...]
    bytes: int


def collectives(compiled: Any) -> list[Collective]:
    """The collectives in a compiled program, in the order of its text.

    compiled: what `jax.jit(f).lower(*args).compile()` gives, or its `as_text()`

    Of a collective that is started and awaited apart, as GPUs have them, the start is taken. Bytes are those
    of the result. Over a ring of p devices an all-gather sends (p - 1)/p of them from each device, an
    all-reduce twice that.

    >>> total = "%sum = (f32[3,4]{1,0}, f32[4]{0}) all-reduce(%dot.7, %reduce.4), channel_id=1"
    >>> collectives(total)
    [Collective(kind='all-reduce', shapes=('f32[3,4]', 'f32[4]'), bytes=64)]
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    return [_collective(shape, kind, start) for shape, kind, start in LINE.findall(text)]


def _collective(shape: str, kind: str, start: str) -> Collective:
    if start and kind in ("all-gather", "collective-permute"):  # (operands, results, what else it needs)
        shape = _parts(shape)[1]
    arrays = list(ARRAY.finditer(shape))
    return Collective(kind, tuple(array[0] for array in arrays), sum(map(_bytes, arrays)))


def _bytes(array: re.Match[str]) -> int:
    bits = int(array[2] or 8)  # a pred takes a byte
    return ceil(bits * prod(int(n) for n in array[3].split(",") if n) / 8)


def _parts(shape: str) -> list[str]:
    """The parts of a tuple: those between commas that are in no further bracket."""
    parts, depth = [""], 0
    for character in shape.strip()[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts
