"""Every example in a docstring and every Python block of the README runs and prints what it says."""

import doctest
import importlib
import io
import pkgutil
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import fnn
from tests.test_bad_input import BAD

ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.iter_modules(fnn.__path__, "fnn.")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$(?:\n+```text\n(.*?)^```$)?", README, flags=re.M | re.S)
PYTHON = [(code, output) for language, code, output in BLOCKS if language == "python"]
OTHERS = [block for block in PYTHON if "import equinox" in block[0] or "from flax" in block[0]]
SHELL = [code for language, code, _ in BLOCKS if language in ("sh", "bash", "")]


@pytest.fixture(autouse=True)
def as_a_user_has_it():
    """JAX's defaults, four digits printed."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        np.printoptions(precision=4),
    ):
        yield


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_print_what_they_say(name):
    module = importlib.import_module(name)
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    examples = [test for test in finder.find(module, name) if test.examples]
    report = io.StringIO()
    for test in examples:
        runner.run(test, out=report.write)
    assert runner.failures == 0, report.getvalue()
    if name in (
        "fnn.activations",
        "fnn.losses",
        "fnn.network",
        "fnn.sweep",
        "fnn.params",
        "fnn.train",
        "fnn.reductions",
        "fnn.curvature",
    ):
        assert len(examples) >= 2, "the finder found the module's examples"


def test_every_public_name_is_documented():
    """By its own docstring; initialisers that are JAX's have JAX's, or the comment beside them."""
    public = {name: value for name, value in vars(fnn).items() if not name.startswith("_")}
    for name, value in public.items():
        if not isinstance(value, ModuleType) and not name.endswith(("_normal", "_uniform", "zeros")):
            assert value.__doc__ and len(value.__doc__) > 20, name


@pytest.mark.parametrize("package", (None, "equinox", "flax"))
def test_readme_blocks_print_what_they_say(package):
    """In order, each with the names of those before it; those of the extra `others` after two of them."""
    if package:
        pytest.importorskip(package)
    blocks = [block for block in PYTHON if block not in OTHERS]
    if package:
        blocks = [*blocks[:2], *(block for block in OTHERS if package in block[0])]
    names: dict = {}
    for code, expected in blocks:
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(code, "README", "exec"), names)
        assert out.getvalue().rstrip() == expected.rstrip(), code


def test_readme_blocks_are_all_recognised():
    assert len(PYTHON) >= 2
    assert {language for language, _, _ in BLOCKS} <= {"python", "sh", "text", "bash", ""}
    assert README.count("```python") == len(PYTHON)


def test_readme_has_the_two_commands_and_ci_runs_the_second():
    commands = "\n".join(SHELL)
    run = "python3 -m pip install uv && python3 -m uv run"
    assert f"{run} python -m experiments.digits" in commands and f"{run} pytest" in commands
    assert f"{run} pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_counts_the_cases_of_bad_input():
    assert f"{len(BAD)} cases, from a label of -1" in README


def test_readme_links_lead_to_what_they_name():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    links = re.findall(r"\[`?([^\]`]+)`?\]\(([^)#\s]+)(?:#L(\d+))?\)", text)
    local = [(text, path, line) for text, path, line in links if not path.startswith("http")]
    assert len(local) >= 10
    for text, path, line in local:
        assert (ROOT / path).exists(), path
        if line:
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
            assert lines[int(line) - 1].startswith(f"def {text}("), f"{text} is not at {path}#L{line}"
