r"""What signals look like on their way through a network: statistics of every layer's a^{l-1} and δ^l.

Means, root mean squares and magnitudes tell whether signals vanish, explode or saturate, and where; dead
neurons, how much of a layer takes part at all (Glorot & Bengio 2010, §4; He et al. 2015, §2.2). All are sums
over what a sweep has anyway; `fnn.fit(..., record=...)` keeps them along a run.
"""

from collections.abc import Sequence
from functools import partial
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .elementary import widened
from .reductions import _rows
from .sweep import Sweep

DECADES = tuple(10.0**k for k in range(-10, 4))  # from what float16 takes for 0 to what overflows its squares


class Statistics(NamedTuple):
    """Of the (N, n) numbers of every layer, in at least float32.

    mean: (L,)
    rms: (L,) √mean(x²)
    dead: (L,) the fraction of the n columns that are 0 for every example
    histogram: (L, edges + 1) the fraction of |x| below the first edge, between two, and from the last on
    """

    mean: Float[Array, " L"]
    rms: Float[Array, " L"]
    dead: Float[Array, " L"]
    histogram: Float[Array, "L bins"]


class LayerStatistics(NamedTuple):
    """Statistics of the inputs a^0, ..., a^{L-1} and of the errors δ^1, ..., δ^L."""

    inputs: Statistics
    errors: Statistics


def layer_statistics(sweep: Sweep, edges: Sequence[float] = DECADES) -> LayerStatistics:
    """Mean, root mean square, fraction dead and histogram of magnitudes, of every layer's a^{l-1} and δ^l.

    edges: where the bins of |x| meet, rising, each in the bin above it; by default the decades from 1e-10 to
        1e3. A NaN counts as above all.

    Every example counts once, whatever its weight. A neuron whose δ is 0 for the whole batch learns nothing
    from it. `functools.partial(fnn.layer_statistics, edges=(0.5, 0.99))` is a function for `fit` to record.

    >>> import fnn, jax, jax.numpy as jnp
    >>> params = (fnn.Layer(jnp.array([[1.0], [-1.0]])), fnn.Layer(jnp.ones((1, 2))))
    >>> cost = fnn.cost(fnn.mlp(fnn.relu), fnn.half_squared_error)
    >>> sweep = fnn.backprop(cost, params, jnp.array([[3.0], [4.0]]), jnp.zeros((2, 1)))
    >>> statistics = fnn.layer_statistics(sweep, edges=(1, 3.5))
    >>> print(statistics.inputs.mean, statistics.errors.dead)  # a¹ is (3, 0) and (4, 0): one relu is dead
    [3.5  1.75] [0.5 0. ]
    >>> print(statistics.inputs.histogram[1])  # two 0, a 3, a 4
    [0.5  0.25 0.25]
    """
    sweep = _rows("layer_statistics", sweep)
    bounds = np.asarray(edges, float)
    if bounds.ndim != 1 or not bounds.size or not np.isfinite(bounds).all() or (np.diff(bounds) <= 0).any():
        raise ValueError(
            "layer_statistics: edges needs to be finite numbers that rise, such as (0.5, 0.99); "
            f"got {edges!r}."
        )
    edges = tuple(bounds.tolist())
    return LayerStatistics(_statistics(sweep.inputs, edges), _statistics(sweep.errors, edges))


@partial(jax.jit, static_argnums=1)  # called outside of compiled code it would be compiled at every call
def _statistics(layers: Sequence[Float[Array, "N _"]], edges: tuple[float, ...]) -> Statistics:
    columns = [_of_layer(widened(x), edges) for x in layers]
    return Statistics(*(jnp.stack(column) for column in zip(*columns, strict=True)))


def _of_layer(x: Float[Array, "N n"], edges: tuple[float, ...]) -> tuple[Array, ...]:
    # Squares of numbers far from 1 overflow or vanish: they are summed at three scales, powers of two, and
    # the largest number says which sum is right. In one pass: for a second, x would have to be kept.
    bits = jnp.finfo(x.dtype).maxexp
    scales = [x.dtype.type(2.0**exponent) for exponent in (0, -0.625 * bits, 0.5 * bits)]
    below = [(jnp.abs(x) < x.dtype.type(edge)).astype(jnp.int32) for edge in edges]
    scaled = [x * scale for scale in scales]
    sums, squares, counts = [scaled[0], scaled[1]], [part**2 for part in scaled], below
    operations = [jnp.maximum, *[add] * len([*sums, *squares, *counts])]
    largest, *totals = _reduced(operations, [jnp.abs(x), *sums, *squares, *counts], axis=1)
    largest, totals = jnp.max(largest), [jnp.sum(total, dtype=total.dtype) for total in totals]
    sums, squares, counts = totals[:2], totals[2:5], totals[5:]
    is_large, is_small = largest > 2.0 ** (0.3 * bits), largest < 2.0 ** (-0.3 * bits)
    size = x.dtype.type(x.size)
    mean = jnp.where(is_large, sums[1] / size / scales[1], sums[0] / size)
    roots = [jnp.sqrt(square / size) / scale for square, scale in zip(squares, scales, strict=True)]
    rms = jnp.where(is_large, roots[1], jnp.where(is_small, roots[2], roots[0]))
    (columns,) = _reduced([jnp.maximum], [jnp.abs(x)], axis=0)
    dead = jnp.mean(columns == 0, dtype=x.dtype)
    shares = jnp.stack([jnp.int32(0), *counts, jnp.int32(x.size)]).astype(x.dtype) / size
    return mean, rms, dead, jnp.diff(shares)


def _reduced(operations: Sequence[Any], arrays: Sequence[Array], axis: int) -> list[Array]:
    """Each array reduced along an axis by its operation, a sum or a maximum of sizes, all in one pass.

    Nothing of their size is kept; of a comparison for each edge, `jnp.sum` would keep every one on a CPU.
    """
    starts = [x.dtype.type(0) for x in arrays]
    return jax.lax.reduce(
        arrays, starts, lambda a, b: [f(x, y) for f, x, y in zip(operations, a, b, strict=True)], (axis,)
    )
