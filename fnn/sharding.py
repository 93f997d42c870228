r"""Where the numbers of a run live: layouts of batches and parameters over many devices.

A layout says along which axis of a mesh of devices the examples of a batch are split, and along which of its
own axes every parameter is. The step stays the same pure function: XLA splits its products as the operands
are, and puts the collectives in. Results are those of one device up to rounding, since a sum over a split
axis adds in another order.

    layout            a device holds                        collectives of a step
    data_parallel     its share of the batch                the gradient's all-reduce, one for all layers
    tensor_parallel   of W^1 its rows, of W^2 its columns,  one all-reduce of (N, n_l) per pair of layers on
                      and so on                             the way forward, one on the way back but for the
                                                            first pair, and the gradient's over the batch's
                                                            axis
    fully_sharded     its share of the batch, of all        an all-gather of every W^l and b^l, and the
                      parameters and optimiser state        gradient's all-reduce

In a pair of layers, z^1 = W^1 x is split like the rows of W^1; its activation stays so; and of
z^2 = Σ_k W^2_{:,k} a^1_k every device has some k: one sum over devices, whose result all have (Shoeybi et al.
2019, *Megatron-LM*, §3). An activation that uses all of a layer's z, such as softmax, needs more.

A gradient as factors. ∂C/∂W = Σ_n δ_n a_nᵀ has rank N at most: where the batch is so small that
N < n m / (n + m), for W of (n, m), its factors δ (N, n) and a (N, m) are fewer numbers than it. A layer named
in `factors` sends those by all-gather, and every device computes the whole product: fewer bytes over the
link, for N n m multiplications on every device where there was a share of them. Exact, not an approximation.
Source: Zhang et al. (2017), *Poseidon*, §3.2, "sufficient factor broadcasting".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .params import Layer, Params, check_params, is_count
from .processes import put
from .sweep import Sweep

DATA, MODEL = "data", "model"  # the axes of a mesh
WHOLE = PartitionSpec()


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over devices. Made by `data_parallel`, `tensor_parallel` or `fully_sharded`.

    mesh: of axes that are Auto, so that XLA finds the shardings of what is between
    batch: the mesh's axis of the examples, or of an ensemble's members
    model: the axis over which pairs of layers are split; None for no such split
    state: the axis over which every array of the parameters is split; None for no such split
    specs: a pytree of PartitionSpec like the parameters, in place of what `model` and `state` say
    factors: the layers, counted from 1, whose gradient goes over the link as its factors a and δ

    Hashable, so that it can be static under `jax.jit`, if `specs` is.
    """

    mesh: Mesh
    batch: str = DATA
    model: str | None = None
    state: str | None = None
    specs: Any = None
    factors: tuple[int, ...] = ()

    def __post_init__(self):
        named = [axis for axis in (self.batch, self.model, self.state) if axis is not None]
        if not isinstance(self.mesh, Mesh) or not set(named) <= set(self.mesh.axis_names):
            axes = self.mesh.axis_names if isinstance(self.mesh, Mesh) else type(self.mesh).__name__
            raise ValueError(f"Layout: mesh needs to be a jax.sharding.Mesh with axes {named}, got {axes}.")
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            raise ValueError(
                "Layout: every axis of the mesh needs the type Auto; jax.make_mesh makes them Explicit. Use "
                "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))."
            )
        if not isinstance(self.factors, tuple) or not all(map(is_count, self.factors)):
            raise TypeError(
                "Layout: factors needs to be some numbers of layers, counted from 1, such as (1, 2); "
                f"got {self.factors!r}."
            )

    def specifications(self, params: Any) -> Any:
        """The PartitionSpec of every array of the parameters, or of arrays of their shapes."""
        if self.specs is not None:
            is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
            specs = jax.tree.structure(self.specs, is_leaf=is_spec)
            leaves = jax.tree.leaves(self.specs, is_leaf=is_spec)
            if specs != jax.tree.structure(params) or not all(map(is_spec, leaves)):
                raise ValueError(
                    "Layout: specs needs to be a pytree like the parameters, a PartitionSpec for each array, "
                    f"got {specs} for {jax.tree.structure(params)}."
                )
            return self.specs
        axes: Any = jax.tree.map(lambda leaf: (None,) * jnp.ndim(leaf), params)
        if self.model is not None:
            axes = _pairs(params, self.model, self.mesh.shape[self.model])
        if self.state is not None:
            split = partial(_split_longest, self.state, self.mesh.shape[self.state])
            axes = jax.tree.map(split, params, axes)
        return jax.tree.map(lambda _, names: PartitionSpec(*names), params, axes)

    def shardings(self, params: Any, tree: Any) -> Any:
        """The NamedSharding of every array of a tree.

        Those that belong to a parameter are split as it is: they have its shape, and their place in the tree
        ends as the parameter's does (Adam's `mu` and `nu` are trees like the parameters). All others are
        whole on every device.
        """
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        leaves = jax.tree.leaves(params)
        flat = jax.tree.structure(params).flatten_up_to(self.specifications(params))
        of_params = sorted(zip(paths, leaves, flat, strict=True), key=lambda triple: -len(triple[0]))

        def sharding(path, leaf):
            for end, param, spec in of_params:
                if jnp.shape(leaf) == jnp.shape(param) and path[len(path) - len(end) :] == end:
                    return NamedSharding(self.mesh, spec)
            return NamedSharding(self.mesh, WHOLE)

        return jax.tree.map_with_path(sharding, tree)

    def put(self, params: Any, tree: Any) -> Any:
        """The tree placed on the devices, its arrays split as the parameters are. On the host.

        With several processes each needs to have the same numbers, or arrays that are spread over all.
        """
        return jax.tree.map(put, tree, self.shardings(params, tree))

    def put_whole(self, tree: Any) -> Any:
        """The tree on every device, whole. On the host."""
        return jax.tree.map(lambda leaf: put(leaf, NamedSharding(self.mesh, WHOLE)), tree)

    def put_rows(self, tree: Any) -> Any:
        """The tree with every array split along its first axis. On the host."""
        return jax.tree.map(lambda leaf: put(leaf, self.rows_sharding), tree)

    def check_own_rows(self, where: str) -> None:
        """Raises ValueError if several processes hold the same rows of a batch."""
        axis = self.mesh.axis_names.index(self.batch)
        holders: dict[int, set[int]] = {}
        for place, device in np.ndenumerate(self.mesh.devices):
            holders.setdefault(place[axis], set()).add(device.process_index)
        if any(len(processes) > 1 for processes in holders.values()):
            raise ValueError(
                f"{where}: with several processes each gives rows of its own, but this layout has the same "
                "rows of a batch in several. Split a pair of layers within a process, tensor_parallel of no "
                "more devices than it has, or use fit with all of the data in every process."
            )

    # In traced code.

    def placed(self, params: Any, tree: Any) -> Any:
        """As `put`."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(params, tree))

    def whole(self, tree: Any) -> Any:
        """As `put_whole`."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, WHOLE))

    def rows(self, tree: Any) -> Any:
        """The arrays split along their first axis, of examples."""
        return jax.lax.with_sharding_constraint(tree, self.rows_sharding)

    def gathered(self, params: Any) -> Any:
        """The parameters as a step computes with them: no longer split over the axis `state`.

        Left to itself, XLA would rather gather the batch and split the products as the parameters are.
        """
        return replace(self, state=None).placed(params, params)

    def on_gathered(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The step (state, *batch) -> (state, row) from parameters that are `gathered`."""
        return lambda state, *batch: step(state._replace(params=self.gathered(state.params)), *batch)

    @property
    def rows_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(self.batch))

    def with_factors_gathered(self, sweep: Sweep) -> Sweep:
        """The sweep with a^{l-1} and δ^l of the layers in `factors` whole on every device."""
        L = len(sweep.errors)
        if not all(1 <= l <= L for l in self.factors):
            raise ValueError(f"Layout: factors needs to name layers from 1 to {L}, got {self.factors}.")

        def gathered(arrays):
            # Rows first: else XLA computes a^l whole on every device, from the a^{l-1} that is whole already.
            return tuple(
                self.whole(self.rows(a)) if l in self.factors else a for l, a in enumerate(arrays, start=1)
            )

        return replace(sweep, inputs=gathered(sweep.inputs), errors=gathered(sweep.errors))


def data_parallel(devices: Sequence[Any] | None = None, *, factors: Sequence[int] = ()) -> Layout:
    """Every device has all parameters and a share of each batch.

    devices: all of `jax.devices()` by default, of all processes
    factors: the layers whose gradient goes over the link as its factors; see `factor_layers`

    >>> import fnn
    >>> fnn.data_parallel().mesh.axis_names
    ('data',)
    """
    factors = tuple(factors) if isinstance(factors, Sequence) else factors
    return Layout(_mesh("data_parallel", devices), factors=cast(Any, factors))


def fully_sharded(devices: Sequence[Any] | None = None) -> Layout:
    """As `data_parallel`, and every device has a share only of the parameters and the optimiser's state.

    Every array is split along its longest axis that divides by the number of devices; one without such an
    axis stays whole. Source: Rajbhandari et al. (2020), *ZeRO*, stage 3.
    """
    return Layout(_mesh("fully_sharded", devices), state=DATA)


def tensor_parallel(model: int, devices: Sequence[Any] | None = None) -> Layout:
    """Pairs of layers are split over groups of `model` devices, the first by rows of W, the other by columns.

    Between the groups the batch is split, as `data_parallel` does. A pair whose width in between does not
    divide by `model` stays whole, and so does the last layer of an odd number.
    """
    return Layout(_mesh("tensor_parallel", devices, model), model=MODEL)


def factor_layers(params: Params, batch_size: int) -> tuple[int, ...]:
    """The layers of (n, m) weights for which the factors are fewer numbers: N < n m / (n + m).

    >>> import fnn, jax
    >>> fnn.factor_layers(fnn.init(jax.random.key(0), (784, 512, 512, 10)), 128)
    (1, 2)
    """
    check_params("factor_layers", params)
    if not is_count(batch_size):
        raise ValueError(f"factor_layers: batch_size needs to be a positive integer, got {batch_size!r}.")
    shapes = [layer.W.shape for layer in params]
    return tuple(l for l, (n, m) in enumerate(shapes, start=1) if batch_size * (n + m) < n * m)


def _mesh(where: str, devices: Sequence[Any] | None, model: int | None = None) -> Mesh:
    array = np.asarray(jax.devices() if devices is None else devices, dtype=object).reshape(-1)
    if not array.size or not all(isinstance(device, jax.Device) for device in array):
        raise TypeError(f"{where}: devices needs to be some of jax.devices(), got {devices!r}.")
    if len(set(array)) < array.size:
        raise ValueError(f"{where}: devices needs to have each device once, got {devices!r}.")
    if model is None:
        return Mesh(array, (DATA,), axis_types=(AxisType.Auto,))
    if not is_count(model) or array.size % model:
        raise ValueError(
            f"{where}: model needs to be a positive integer that divides the {array.size} devices, "
            f"got {model!r}."
        )
    return Mesh(array.reshape(-1, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def _pairs(params: Any, axis: str, size: int) -> Any:
    """The axes of pairs of layers split by rows and by columns.

    Whole stay a pair whose width in between does not divide, and the last of an odd number of layers.
    """
    check_params("tensor_parallel: without specs", params)
    axes: list[Any] = [[(None, None), None if b is None else (None,)] for _, b in params]
    for l in range(0, len(params) - 1, 2):
        if params[l].W.shape[0] % size == 0:
            axes[l] = [(axis, None), None if params[l].b is None else (axis,)]
            axes[l + 1][0] = (None, axis)
    return tuple(Layer(*layer) for layer in axes)


def _split_longest(axis: str, size: int, leaf: Any, names: tuple[Any, ...]) -> tuple[Any, ...]:
    """The axes with the longest one split that is whole and divides."""
    shape = jnp.shape(leaf)
    free = [i for i, n in enumerate(shape) if names[i] is None and n % size == 0 and n > 0]
    if not free:
        return names
    longest = max(free, key=lambda i: shape[i])
    return (*names[:longest], axis, *names[longest + 1 :])
