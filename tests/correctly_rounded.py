r"""Values and slopes of the activations at every finite number of the 16-bit dtypes, correctly rounded.

    python -m tests.correctly_rounded        makes the table again, in a minute

One array for each: the bits of the number of the dtype that is nearest to the exact one, computed with 60
digits (`experiments/exact.py`), for the inputs in ascending order. Neighbours are alike, so what is stored is
their differences. `tests/test_accuracy.py` computes a part of it anew.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

from experiments.exact import ACTIVATIONS, exactly, finite_numbers, nearest

PATH = Path(__file__).with_suffix(".npz")
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def make() -> None:
    table = {}
    for dtype_name, dtype in DTYPES.items():
        inputs = finite_numbers(dtype)
        for name, function in ACTIVATIONS.items():
            for what, f in (("value", function.value), ("slope", function.slope)):
                rounded = np.array([nearest(f(exactly(z)), dtype) for z in inputs], dtype)
                bits = rounded.view(np.uint16)
                table[f"{dtype_name} {name} {what}"] = np.diff(bits, prepend=np.uint16(0))
            print(dtype_name, name)
    np.savez_compressed(PATH, **table)


def load(dtype_name: str, name: str, what: str) -> np.ndarray:
    """The correctly rounded numbers, one for each of `finite_numbers`."""
    with np.load(PATH) as table:
        bits = np.cumsum(table[f"{dtype_name} {name} {what}"], dtype=np.uint16)
    return bits.view(DTYPES[dtype_name])


if __name__ == "__main__":
    make()
