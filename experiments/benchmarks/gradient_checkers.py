"""Which gradient checkers catch wrong gradients, and which cry wolf at right ones?

    python -m experiments.benchmarks.gradient_checkers        (needs the extras `experiments` and `test`)

The corpora of the tests, `tests/corpus_wrong.py` and `tests/corpus_right.py`: gradients of scalar functions,
in four precisions, with x64 on. Every checker as its documentation uses it:

    fnn          check_gradient and check_value_and_gradient
    allclose     numpy.allclose(candidate, jax.grad(f)), with its defaults
    check_grads  jax.test_util.check_grads of a custom_vjp with the candidate, first order, reverse mode
    check_grad   scipy.optimize.check_grad in float64, below 1e-5 of the gradient's length
    gradcheck    torch.autograd.gradcheck of a Function with the candidate as its backward, in float64, with
                 its defaults (needs torch, in the extra `torch`; left out without it)

An exception counts as a rejection: the gradient does not get through. Rules and jvps, which not all of them
can be asked about, are judged by fnn alone. The table is written to gradient_checkers.txt beside the script.
"""

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import test_util
from jax.flatten_util import ravel_pytree

from fnn.tables import aligned
from tests.corpus import RIGHT, WRONG, judge
from tests.corpus_wrong import Case

torch: Any = None
if importlib.util.find_spec("torch"):
    torch = importlib.import_module("torch")


def by_fnn(case: Case) -> bool:
    return bool(judge(case))


def by_allclose(case: Case) -> bool:
    ours, theirs = gradient_of(case)(*case.args), jax.grad(case.f, case.argnums)(*case.args)
    leaves, others = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    same = jax.tree.structure(ours) == jax.tree.structure(theirs)
    pairs = zip(leaves, others, strict=True)
    return same and all(
        np.allclose(np.asarray(a, np.float64), np.asarray(b, np.float64)) and np.shape(a) == np.shape(b)
        for a, b in pairs
    )


def by_check_grads(case: Case) -> bool:
    """A function of the differentiated arguments alone, whose rule is the candidate."""
    positions = case.argnums if isinstance(case.argnums, tuple) else (case.argnums,)

    def whole(moving):
        args = list(case.args)
        for i, x in zip(positions, moving, strict=True):
            args[i] = x
        return args

    f = jax.custom_vjp(lambda *moving: case.f(*whole(moving)))

    def backward(moving, bar):
        gradient = gradient_of(case)(*whole(moving))
        gradients = gradient if isinstance(case.argnums, tuple) else (gradient,)
        return jax.tree.map(lambda g: bar * g, tuple(gradients))

    f.defvjp(lambda *moving: (case.f(*whole(moving)), moving), backward)
    test_util.check_grads(f, tuple(case.args[i] for i in positions), order=1, modes=["rev"])
    return True


def of_vector(case: Case) -> tuple[Any, Callable[[Any], float], Callable[[Any], Any]]:
    """The differentiated arguments as one float64 vector, with f and the candidate as functions of it."""
    positions = case.argnums if isinstance(case.argnums, tuple) else (case.argnums,)
    vector, unravel = ravel_pytree(
        tuple(jax.tree.map(lambda a: jnp.asarray(a, float), case.args[i]) for i in positions)
    )

    def args(x):
        whole = list(case.args)
        for i, arg in zip(positions, unravel(jnp.asarray(x)), strict=True):
            whole[i] = arg
        return whole

    def gradient(x):
        return np.asarray(ravel_pytree(gradient_of(case)(*args(x)))[0], np.float64)

    return np.asarray(vector, np.float64), lambda x: float(case.f(*args(x))), gradient


def by_check_grad(case: Case) -> bool:
    x, f, gradient = of_vector(case)
    error = scipy.optimize.check_grad(f, gradient, x)
    return bool(error <= 1e-5 * max(float(np.linalg.norm(gradient(x))), 1.0))


def by_gradcheck(case: Case) -> bool:
    """f and its gradient of one vector, handed to torch through NumPy."""
    vector, f, gradient = of_vector(case)

    class OfJax(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.tensor(f(x.detach().numpy()), dtype=torch.float64)

        @staticmethod
        def backward(ctx, bar):
            (x,) = ctx.saved_tensors
            return bar * torch.tensor(gradient(x.detach().numpy()))

    return bool(torch.autograd.gradcheck(OfJax.apply, (torch.tensor(vector, requires_grad=True),)))


def gradient_of(case: Case) -> Callable[..., Any]:
    assert case.candidate is not None
    candidate: Callable[..., Any] = case.candidate
    return candidate if case.kind == "gradient" else lambda *args: candidate(*args)[1]


CHECKERS = {
    "fnn": by_fnn,
    "allclose": by_allclose,
    "check_grads": by_check_grads,
    "check_grad": by_check_grad,
} | ({"gradcheck": by_gradcheck} if torch else {})


def passes(check: Callable[[Case], bool], build: Callable[[], Case]) -> bool:
    try:
        return check(build())
    except Exception:
        return False


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    kinds = {name: build().kind for name, build in (WRONG | RIGHT).items()}
    scalar = ("gradient", "value")
    wrong = [name for name in WRONG if kinds[name] in scalar]
    right = [name for name in RIGHT if kinds[name] in scalar]
    rows = [("checker", f"caught of {len(wrong)}", f"false alarms of {len(right)}", "seconds")]
    for name, check in CHECKERS.items():
        start = time.perf_counter()
        caught = sum(not passes(check, WRONG[key]) for key in wrong)
        alarms = sum(not passes(check, RIGHT[key]) for key in right)
        rows.append((name, str(caught), str(alarms), f"{time.perf_counter() - start:.0f}"))
        print(rows[-1], file=sys.stderr, flush=True)
    start = time.perf_counter()
    others = [name for name in kinds if kinds[name] not in scalar]
    missed = [name for name in others if name in WRONG and passes(by_fnn, WRONG[name])]
    alarmed = [name for name in others if name in RIGHT and not passes(by_fnn, RIGHT[name])]
    n_wrong = sum(name in WRONG for name in others)
    device = jax.devices()[0]
    with_torch = f"torch {torch.__version__}, " if torch else ""
    text = aligned(rows, "<>>>") + (
        f"\n\nRules and jvps, by fnn: {n_wrong - len(missed)} of {n_wrong} wrong ones caught, {len(alarmed)} "
        f"false alarms of {len(others) - n_wrong}, {time.perf_counter() - start:.0f} s\n"
        f"jax {jax.__version__}, scipy {scipy.__version__}, {with_torch}{device.platform}\n"
    )
    print(text)
    Path(__file__).with_suffix(".txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
