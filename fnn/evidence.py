"""What is known of a gradient that was found wrong, gathered for its diagnosis."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .diagnosis import Evidence
from .inside import origin_of_nonfinite, replaced, steps_of
from .question import Question, as_it_is, wide_promotion
from .rounding import coarsest, primitives
from .truth import EPS, Reference


def with_insight(
    evidence: Evidence, question: Question, reference: Reference, native_jaxpr: Any, wide_jaxpr: Any
) -> Evidence:
    """What the insides of f, of its reference and of the gradient tell, each asked for at most once."""
    value, arrays = reference.value.jaxpr, reference.arrays
    if reference.gradient is None or reference.is_large:
        return evidence

    @cache
    def sums():
        with wide_promotion():
            return steps_of(reference.gradient, arrays, {"reduce_sum", "dot_general"})

    @cache
    def tanh_form():
        if not primitives(value) & {"erf", "erfc"}:
            return None
        f = replaced(value, {"erf": _tanh_for_erf, "erfc": lambda u: 1 - _tanh_for_erf(u)})
        both = question.value_and_gradient(lambda arrays: f(*arrays)[0])
        with wide_promotion():
            return [np.asarray(x) for x in jax.jit(both)(arrays)[:-1]]

    def origin(n):
        if native_jaxpr is not None and not np.isfinite(evidence.native[n]).all():
            return origin_of_nonfinite(native_jaxpr, question.arrays(None, as_it_is), n)
        if wide_jaxpr is None:
            return ""
        with wide_promotion():
            return origin_of_nonfinite(wide_jaxpr, arrays, n)

    return replace(evidence, sums=sums, tanh_form=tanh_form, origin=origin)


def _tanh_for_erf(u: Any) -> Any:
    """erf(x/√2) as GELU's tanh form has it. Source: Hendrycks & Gimpel (2016), §2."""
    x = u * 2**0.5
    return jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))


def sizes_of(question: Question) -> list[int]:
    """Axis lengths of all arrays: candidates for an N that was forgotten."""
    return sorted(
        {
            n
            for leaf, yes in zip(question.leaves, question.is_array, strict=True)
            if yes
            for n in np.shape(leaf)
        }
        - {1}
    )


def evidence_of(question, truth, exact, points, got, wide, wide_jaxpr, leaves, native, eps) -> Evidence:
    """Of a gradient that was found wrong, at the point given and elsewhere; eps: of its own dtype."""
    n_gradient = len(truth.gradient)
    return Evidence(
        paths=question.paths,
        got=list(got[:n_gradient]),
        truth=[g[0] for g in exact],
        params=[points[0].theta[question.moving.index(i)] for i in question.judged],
        sizes=sizes_of(question),
        verdicts=[leaf.verdict for leaf in leaves[:n_gradient]],
        elsewhere=[
            (points[p].name, [w[p] for w in wide[:n_gradient]], [g[p] for g in exact])
            for p in range(1, len(points))
            if wide is not None and np.isfinite(truth.value[p])
        ],
        is_wide=all(jnp.result_type(question.leaves[i]) == np.float64 for i in question.judged),
        own_eps=eps,
        computes_with=coarsest(wide_jaxpr) if wide_jaxpr is not None else EPS,
        native=[np.asarray(x).astype(np.float64) for x in native[:n_gradient]],
    )
