"""How many of a derivative's digits are right in 16 bits: those derived by hand, and those of autodiff?

    python -m experiments.accuracy        (--help lists the flags)

Autodiff differentiates the implementation, every operation rounded to the working precision; a slope derived
by hand is a function of its own, in a form that neither cancels nor overflows. Measured: the slope of every
activation at every finite number of the dtype, by its pullback and by `jax.grad` of `jax.nn`'s function,
against 60 digits, in units in the last place (ulp). Half a unit is the best a number can be. In bfloat16 the
numbers below the smallest normal one are set apart: they are float32's too, and hardware takes them for 0.

Then the gradient of a network over a batch of 4096 examples, by hand and by `jax.grad` of the same network
written with `jax.nn`, against the gradient in float64 at the same rounded numbers: the largest error of an
entry, relative to the largest entry of its array.

Expected answer, on a CPU in float16: by hand at most 0.5002 ulp, at all 63,488 numbers, and always finite.
Autodiff is off by more than 1 ulp at 4.5 to 10.5 % of them, by up to 2,314, and NaN for gelu_tanh at 18,114.
The gradient's error by hand is 0.00035 to 0.0006, autodiff's 2 to 7 times that. (On an accelerator float32's
exp is another, which moves the first figures by some 2⁻¹³.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from matplotlib.figure import Figure

import fnn
from experiments import command
from experiments.exact import ACTIVATIONS, exactly, finite_numbers, ulps
from experiments.figures import panels
from fnn.tables import aligned

# name -> (ours, jax.nn's)
PAIRS: dict[str, tuple[fnn.Rule, Callable[[Any], Any]]] = {
    "sigmoid": (fnn.sigmoid, jax.nn.sigmoid),
    "tanh": (fnn.tanh, jnp.tanh),
    "softplus": (fnn.softplus, jax.nn.softplus),
    "elu(1.0)": (fnn.elu(1.0), jax.nn.elu),
    "silu": (fnn.silu, jax.nn.silu),
    "gelu": (fnn.gelu, partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": (fnn.gelu_tanh, partial(jax.nn.gelu, approximate=True)),
    "relu": (fnn.relu, jax.nn.relu),
    "leaky_relu(0.01)": (fnn.leaky_relu(0.01), jax.nn.leaky_relu),
}
SIZES, EXAMPLES = (64, 128, 128, 10), 4096
NETWORKS = ("tanh", "silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Flags(command.Flags):
    """The slope of every activation at every 16-bit number, by hand and by autodiff."""

    dtype: Literal["float16", "bfloat16"] = "float16"
    """Whose numbers are asked."""
    quick: bool = False
    """Every 64th number."""


class Errors(NamedTuple):
    """In ulp, for every input; infinite where the result is not finite, NaN where the truth is set apart."""

    ours: np.ndarray
    autodiff: np.ndarray


def dtype_of(flags: Flags) -> Any:
    return np.dtype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[flags.dtype])


def by_hand(rule: fnn.Rule, z: jax.Array) -> jax.Array:
    a, residuals = rule.forward(z)
    return rule.pullback(residuals, jnp.ones_like(a))[0]


def slope_errors(name: str, inputs: np.ndarray) -> Errors:
    rule, theirs = PAIRS[name]
    exact = [ACTIVATIONS[name].slope(exactly(z)) for z in inputs]
    slopes = (
        jax.jit(partial(by_hand, rule))(jnp.asarray(inputs)),
        jax.jit(jax.vmap(jax.grad(theirs)))(jnp.asarray(inputs)),
    )
    smallest = 0.0 if inputs.dtype == np.float16 else float(ml_dtypes.finfo(inputs.dtype).smallest_normal)

    def error(number: Any, truth: Any) -> float:
        return np.nan if 0 < abs(truth) < smallest else ulps(number, truth, inputs.dtype)

    return Errors(*(np.array(list(map(error, np.asarray(found), exact))) for found in slopes))


def summarise(errors: np.ndarray) -> tuple[str, str, str]:
    """The largest error, the share of inputs off by more than 1 ulp, how many results are not finite."""
    errors = errors[~np.isnan(errors)]
    finite = np.isfinite(errors)
    return (
        f"{errors[finite].max():.4g}",
        f"{(errors[finite] > 1).sum() / len(errors):.1%}",
        f"{(~finite).sum():,}",
    )


@cache
def gradients(name: str) -> tuple[Callable, Callable]:
    """Of a network with this activation: cost and gradient by hand, and the gradient by autodiff."""
    rule, theirs = PAIRS[name]
    cost = fnn.cost(fnn.mlp(rule), fnn.softmax_cross_entropy_with_integer_labels)

    def plain(params: Any, X: jax.Array, y: jax.Array) -> jax.Array:
        """The same cost, as one writes it for autodiff."""
        *hidden, (W, b) = params
        for W_hidden, b_hidden in hidden:
            X = theirs(X @ W_hidden.T + b_hidden[None, :])
        log_p = jax.nn.log_softmax(X @ W.T + b[None, :])
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))

    return jax.jit(fnn.value_and_grad(cost)), jax.jit(jax.grad(plain))


class GradientErrors(NamedTuple):
    """The largest relative error of an entry of the gradient, over all arrays of parameters."""

    ours: float
    autodiff: float


def gradient_errors(name: str, dtype: Any, seed: int) -> GradientErrors:
    """Of a network with this activation over a batch, in the dtype."""
    ours, autodiff = gradients(name)
    keys = jax.random.split(jax.random.key(seed), 3)
    params = fnn.init(keys[0], SIZES, weights=fnn.he_normal, dtype=jnp.float32)
    X = jax.random.normal(keys[1], (EXAMPLES, SIZES[0]), jnp.float32)
    y = jax.random.randint(keys[2], (EXAMPLES,), 0, SIZES[-1])
    narrow = jax.tree.map(lambda x: x.astype(dtype), (params, X))
    found = ours(*narrow, y)[1], autodiff(*narrow, y)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), narrow)
        exact = jax.tree.leaves(autodiff(*wide, y))

    def largest(gradient: Any) -> float:
        pairs = zip(jax.tree.leaves(gradient), map(np.asarray, exact), strict=True)
        return max(float(np.abs(np.float64(g) - truth).max() / np.abs(truth).max()) for g, truth in pairs)

    return GradientErrors(*map(largest, found))


def draw(errors: dict[str, Errors], inputs: np.ndarray, dtype: str) -> Figure:
    """Errors against the number at which they arise; results that are not finite at the upper edge."""
    z, top, floor = inputs.astype(np.float64), 1e5, 0.02
    figure, axes = panels(
        f"The slope at every {dtype} number: half a unit of the last digit by hand, thousands by autodiff",
        [name.replace("(1.0)", "").replace("(0.01)", "") for name in errors],
    )
    for axis, (name, pair) in zip(axes, errors.items(), strict=True):
        for what, found, color, size in (
            ("jax.grad of jax.nn", pair.autodiff, "tab:red", 2),
            ("by hand", pair.ours, "tab:blue", 1),
        ):
            height = np.clip(found, floor, top)
            axis.plot(z, height, ".", markersize=size, color=color, label=what, rasterized=True)
            if lost := np.isinf(found).sum():
                axis.text(0.98, 0.9, f"{lost:,} NaN", color=color, transform=axis.transAxes, ha="right")
        axis.axhline(0.5, color="black", linewidth=0.8)
        axis.set_xscale("symlog", linthresh=1e-4)
        axis.set_xticks([-1e4, -1, -1e-3, 0, 1e-3, 1, 1e4])
        axis.set_yscale("log")
        axis.set_ylim(floor, 2 * top)
        axis.set_xlabel("z")
        axis.set_ylabel("error / ulp")
    axes[0].legend(loc="upper left", markerscale=6)
    return figure


def run(flags: Flags) -> Figure:
    dtype = dtype_of(flags)
    inputs = finite_numbers(dtype)
    if dtype != np.float16:  # float32's subnormal numbers, which are bfloat16's, are 0 to the hardware
        magnitude = np.abs(inputs.astype(np.float64))
        inputs = inputs[(magnitude >= float(ml_dtypes.finfo(dtype).smallest_normal)) | (magnitude == 0)]
    inputs = inputs[:: 64 if flags.quick else 1]
    errors = {name: slope_errors(name, inputs) for name in PAIRS}
    print(
        f"Slopes at {len(inputs):,} {flags.dtype} numbers, jax {jax.__version__}, {jax.devices()[0].platform}"
    )
    rows = [
        ("", "by hand", "", "", "jax.grad", "", ""),
        ("activation", *("max ulp", "> 1 ulp", "not finite") * 2),
    ]
    rows += [(name, *summarise(pair.ours), *summarise(pair.autodiff)) for name, pair in errors.items()]
    print(aligned(rows, "<>>>>>>"))
    print(
        f"\nGradients over {EXAMPLES} examples, network {'-'.join(map(str, SIZES))}, largest relative error"
    )
    rows = [("activation", "by hand", "jax.grad")]
    for name in NETWORKS[:: 3 if flags.quick else 1]:
        found = gradient_errors(name, dtype, flags.seed)
        rows.append((name, f"{found.ours:.1e}", f"{found.autodiff:.1e}"))
    print(aligned(rows, "<>>"))
    return draw(errors, inputs, flags.dtype)


def main(args: Sequence[str] | None = None) -> None:
    command.main(__file__, Flags, run, args)


if __name__ == "__main__":
    main()
