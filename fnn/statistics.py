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
    size = np.sqrt(x.size).astype(x.dtype)
    below = [(jnp.abs(x) < x.dtype.type(edge)).astype(jnp.int32) for edge in edges]
    largest, *counts = _by_rows([jnp.maximum, *[add] * len(below)], [jnp.abs(x), *below])
    # Of x divided by its largest number no square overflows, and none that matters vanishes.
    unit = jnp.max(largest)
    unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
    sums, squares = _by_rows([add, add], [x / unit, (x / unit) ** 2])
    mean, rms = jnp.sum(sums / size) / size * unit, jnp.sqrt(jnp.sum(squares)) / size * unit
    dead = jnp.mean(jnp.all(x == 0, axis=0), dtype=x.dtype)
    shares = jnp.stack(
        [jnp.int32(0), *(jnp.sum(count, dtype=jnp.int32) for count in counts), jnp.int32(x.size)]
    )
    return mean, rms, dead, jnp.diff(shares.astype(x.dtype) / x.size)


def _by_rows(operations: Sequence[Any], arrays: Sequence[Array]) -> list[Array]:
    """Each array reduced along its rows by its operation, sums or maxima, all in one pass.

    Nothing of their size is kept; of a comparison for each edge, `jnp.sum` would keep every one on a CPU.
    """
    starts = [x.dtype.type(0) for x in arrays]
    return jax.lax.reduce(
        arrays, starts, lambda a, b: [f(x, y) for f, x, y in zip(operations, a, b, strict=True)], (1,)
    )
