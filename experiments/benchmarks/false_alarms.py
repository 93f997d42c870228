"""How close do right gradients come to being called wrong?

    python -m experiments.benchmarks.false_alarms --draws 100000

The library's own rules and gates, each with random numbers of random shape, in float64, float32, bfloat16 and
float16, judged by `fnn.check_rule` at six points each; a draw is a rule judged at a point. Every alarm would
be a false one. Prints the number of them and the largest error in rounding units, beside what is allowed, and
writes both to false_alarms.txt beside the script.
"""

import argparse
import time
import warnings
from pathlib import Path

import jax
import numpy as np

import fnn
from fnn.truth import LIMIT, POINTS
from tests.strategies import DTYPES, INSTANCES, gate_cases, rules


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    cases, rng = rules(fnn) | gate_cases(fnn), np.random.default_rng(flags.seed)
    start, draws, alarms, worst, where = time.perf_counter(), 0, [], 0.0, ""
    # One rule, dtype and shape after the other, so that each is compiled once.
    kinds = [
        (name, dtype, size) for name in cases for dtype in DTYPES for size in dict.fromkeys(cases[name].sizes)
    ]
    per_kind = max(1, -(-flags.draws // (len(POINTS) * len(kinds))))
    for name, dtype, size in kinds:
        many: tuple = ()
        for n in range(per_kind):
            if n % INSTANCES == 0:
                many = cases[name].draw(rng, size, dtype)
            primals = jax.tree.map(lambda leaf, i=n % INSTANCES: leaf[i], many)
            report = fnn.check_rule(cases[name].rule, *primals, seed=int(rng.integers(2**31)))
            draws += len(POINTS)
            if not report:
                alarms.append(f"{name} {dtype} {size}")
            largest = max(leaf.units for leaf in report.leaves)
            if largest > worst:
                worst, where = largest, f"{name}, {dtype}, {size}"
    text = (
        f"{draws} draws of {len(cases)} rules in {len(kinds)} dtypes and shapes: {len(alarms)} false alarms\n"
        f"largest error: {worst:.2f} rounding units, in {where}; {LIMIT:g} are allowed\n"
        f"{time.perf_counter() - start:.0f} s, jax {jax.__version__}, {jax.devices()[0].platform}\n"
    )
    print(text, *dict.fromkeys(alarms), sep="\n")
    Path(__file__).with_suffix(".txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
