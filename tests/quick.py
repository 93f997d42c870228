"""An experiment's quick run by its command, once for all tests of a file, and other ways to save time."""

import contextlib
import io
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import matplotlib
import pytest


def optimised(compiled: Any, *static: str, emitters: bool = False) -> Any:
    """A jitted function again, compiled with the optimisation that `conftest.py` leaves out.

    For one that runs for seconds, and is not called by another jitted one.

    static: names of its static arguments
    emitters: with XLA's newer loops; they compile for longer, and their tanh takes half of the time
    """
    options: dict[str, Any] = {}
    if "--xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"]:
        options["xla_backend_optimization_level"] = 1
    if emitters and "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:
        options["xla_cpu_use_fusion_emitters"] = True
    return jax.jit(compiled.__wrapped__, static_argnames=static, compiler_options=options)


def quick_run(experiment: ModuleType, folder: Path) -> tuple[Any, str, Path]:
    """What its `measure` returned, what it printed, and its figure, in few pixels."""
    figure, results, out = folder / "figure.png", [], io.StringIO()
    measure = experiment.measure
    coarse = matplotlib.rc_context({"savefig.dpi": 40})
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), coarse:
        patch.setattr(experiment, "measure", lambda flags: results.append(measure(flags)) or results[-1])
        experiment.main(["--quick", "--output", str(figure)])
    return results[0], out.getvalue(), figure
