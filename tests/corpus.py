"""Gradients whose verdict is known: the mistakes people make, and right ones that fool naive checkers."""

from collections.abc import Callable

import fnn
from tests.corpus_right import RIGHT as RIGHT
from tests.corpus_wrong import WRONG as WRONG
from tests.corpus_wrong import Case


def judge(case: Case, seed: int = 0) -> fnn.Report:
    """What the library says of a case."""
    if case.kind == "rule":
        return fnn.check_rule(case.f, *case.args, seed=seed)
    assert case.candidate is not None
    if case.kind == "jvp":
        return fnn.check_jvp(case.f, case.candidate, case.args, seed=seed)
    check = fnn.check_value_and_gradient if case.kind == "value" else fnn.check_gradient
    return check(case.f, case.candidate, *case.args, argnums=case.argnums, seed=seed)


def thinned(cases: dict[str, Callable[[], Case]], n: int) -> list[str]:
    """Every n-th case, for a suite that runs in minutes."""
    return list(cases)[::n]
