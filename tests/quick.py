"""An experiment's quick run by its command, once for all tests of a file."""

import contextlib
import io
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def quick_run(experiment: ModuleType, folder: Path) -> tuple[Any, str, Path]:
    """What its `measure` returned, what it printed, and its figure."""
    figure, results, out = folder / "figure.png", [], io.StringIO()
    measure = experiment.measure
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(experiment, "measure", lambda flags: results.append(measure(flags)) or results[-1])
        experiment.main(["--quick", "--output", str(figure)])
    return results[0], out.getvalue(), figure
