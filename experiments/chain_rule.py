"""Where does a total derivative come from?

    python -m experiments.chain_rule        (--help lists the flags)

f(x, y, z) = sin(x)·exp(y z²) with x = t - 1, y = t², z = 1/t, so that y z² = 1 and f = e sin(t - 1).

Expected answer: df/dt is the sum of three terms, ∂f/∂x_i · dx_i/dt, one for each way in which t reaches f.
Those through y and z are large, of opposite signs, and cancel; what is left is the term through x,
e cos(t - 1). The same derivative is a product of two Jacobians, (1×3)(3×1). The figure, chain_rule.png beside
this file, shows the terms and their sum.

Source: a first course on the multivariate chain rule; Parr & Howard (2018), §4.5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import fnn
from experiments import command
from experiments.command import expect
from experiments.figures import panels
from fnn import Wire, gates, node

PATHS = (gates.shift(-1.0), gates.square, gates.reciprocal)  # x, y and z of t


@fnn.graph
def f(x: Wire, y: Wire, z: Wire) -> Wire:
    return node(gates.sin, x) * node(gates.exp, y * z**2)


def paths_forward(t):
    """t ↦ (x, y, z), its Jacobian a column (3×1)."""
    values, kept = zip(*(path.forward(t) for path in PATHS), strict=True)
    return jnp.stack(values), kept


def paths_pullback(kept, bar):
    """t̄ = Σ_i (dx_i/dt) x̄_i: t forks into three."""
    adjoints = [path.pullback(kept[i], bar[i])[0] for i, path in enumerate(PATHS)]
    return (adjoints[0] + adjoints[1] + adjoints[2],)


def of_vector_forward(v):
    """(x, y, z) ↦ f, its Jacobian a row (1×3)."""
    return f.forward(v[0], v[1], v[2])


def of_vector_pullback(residuals, f_bar):
    return (jnp.stack(f.pullback(residuals, f_bar)),)


chain = fnn.chain(fnn.Rule(paths_forward, paths_pullback), fnn.Rule(of_vector_forward, of_vector_pullback))


@dataclass(frozen=True)
class Flags(command.Flags):
    """The total derivative of sin(x)·exp(y z²) along x = t - 1, y = t², z = 1/t."""

    t: float = 2.0
    """Where the tables are made."""

    def check(self) -> None:
        super().check()
        expect("--t", "a number from 0.1 to 10", self.t, 0.1 <= self.t <= 10)


class Result(NamedTuple):
    at_t: fnn.TotalDerivative
    product: fnn.JacobianProduct
    t: np.ndarray  # (n,)
    terms: np.ndarray  # (3, n): through x, y and z
    total: np.ndarray  # (n,)
    difference: float  # from e cos(t - 1): the largest over t, in rounding errors of the largest term


def measure(flags: Flags) -> Result:
    t = jnp.linspace(0.5, 8.0, 301, dtype=jnp.float32)
    result = jax.jit(jax.vmap(lambda t: fnn.total_derivative(f, PATHS, t)))(t)
    terms, total = np.stack(jax.device_get(result.terms)), np.asarray(result.total)
    eps, closed = float(np.finfo(np.float32).eps), np.e * np.cos(np.asarray(t, float) - 1)
    difference = float((np.abs(total - closed) / (eps * np.abs(terms).max(axis=0))).max())
    at = jnp.asarray(flags.t, jnp.float32)
    at_t, product = fnn.total_derivative(f, PATHS, at), fnn.jacobian_product(chain, at)
    return Result(at_t, product, np.asarray(t), terms, total, difference)


def report(result: Result) -> str:
    return (
        f"{result.at_t}\n\n{result.product}\n\n"
        f"The sum of the terms and e cos(t - 1) differ by at most {result.difference:.1f} rounding errors of "
        f"the largest term, over t from {result.t[0]:g} to {result.t[-1]:g}.\n"
    )


def draw(result: Result) -> Figure:
    largest = np.abs(result.terms[1:]).max() / np.abs(result.terms[0]).max()
    finding = f"Two terms up to {largest:.1f} times the third cancel: df/dt = e cos(t - 1) is left"
    figure, (terms, total) = panels(finding, ["Terms ∂f/∂x · dx/dt", "Their sum"])
    colors = ("tab:blue", "tab:orange", "tab:green")
    for name, term, color in zip(f.inputs, result.terms, colors, strict=True):
        terms.plot(result.t, term, color=color, label=f"through {name}")
    closed = np.e * np.cos(result.t - 1)
    total.plot(result.t, result.total, color="0.2", label="sum of the terms")
    total.plot(result.t[::15], closed[::15], "o", markersize=4, color="tab:red", label="e cos(t - 1)")
    for axes in (terms, total):
        axes.set(xlabel="t", ylabel="contribution to df/dt" if axes is terms else "df/dt")
        axes.legend()
    return figure


def run(flags: Flags) -> Figure:
    result = measure(flags)
    print(report(result))
    return draw(result)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
