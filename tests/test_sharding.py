"""A run on many devices is that of one up to rounding; what they send each other is what the layout says.

The devices are the eight virtual ones of `conftest.py`: real programs, partitioned and run, on one processor.
"""

import re
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import fnn
from experiments.collectives import Collective, collectives
from fnn import ensemble, runs
from fnn.orders import shuffle
from fnn.processes import check_launcher
from fnn.sharding import Layout
from tests.strategies import drawn
from tests.test_ensemble import assert_equal
from tests.test_ensemble import fit as fit_ensemble
from tests.test_ensemble import problem as members
from tests.test_train import count_compilations

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEVICES = jax.devices()
NET = fnn.mlp(fnn.tanh)
COST = fnn.cost(NET, fnn.softmax_cross_entropy_with_integer_labels, l2=1e-3)
ADAM = optax.adam(0.05)
# Widths that divide by 8, by 4 alone, and by none of 2, 4, 8.
SIZES = (6, 16, 12, 24, 3)
N, BATCH = 37, 12  # batches that do not divide by 8, and a last one of a single example


def grid(*shape, names=("data", "model"), kind=AxisType.Auto):
    devices = np.array(DEVICES[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, names, axis_types=(kind,) * len(shape))


@cache
def network(sizes=SIZES, dtype="float64", **options):
    return drawn(np.random.default_rng(1), sizes, dtype=dtype, **options)


@cache
def examples(N=N, sizes=SIZES, dtype="float64"):
    X = np.random.default_rng(0).standard_normal((N, sizes[0]))
    return jnp.asarray(X, dtype), jnp.asarray(np.arange(N) % sizes[-1], "int64")


SPECS: Any = fnn.Layer  # of PartitionSpecs in place of arrays
OWN = (
    SPECS(P("rows", "columns"), P("rows")),
    SPECS(P(None, "columns"), P()),
    SPECS(P(("columns", "rows")), P("columns")),
    SPECS(P(), P(None)),
)
LAYOUTS = {
    "data_parallel": fnn.data_parallel(),
    "data_parallel on 3 devices": fnn.data_parallel(DEVICES[2:5]),
    "data_parallel on 1 device": fnn.data_parallel(DEVICES[3:4]),
    "factors": fnn.data_parallel(factors=(1, 3, 4)),
    "fully_sharded": fnn.fully_sharded(),
    "tensor_parallel(2)": fnn.tensor_parallel(2),
    "tensor_parallel(8)": fnn.tensor_parallel(8),
    "own specs": Layout(grid(2, 2, 2, names=("data", "rows", "columns")), specs=OWN),
    "fully sharded pairs": Layout(grid(2, 4), model="model", state="data", factors=(2,)),
}


def fit(cost: Any = COST, optimizer=ADAM, params: Any = None, data: Any = None, **options):
    defaults: dict[str, Any] = dict(key=jax.random.key(2), epochs=3, batch_size=BATCH, progress=False)
    params, data = params or network(), data or examples()
    return fnn.fit(cost, optimizer, params, data, **(defaults | options))


def mean_norm(sweep):
    return jnp.mean(fnn.example_norms(sweep))


def full_run(layout=None):
    """With a penalty, weights, held-out data, a metric, a record, the best epoch's parameters, and a last
    batch of a single example."""
    X, y = examples()
    return fit(
        data=(X, y, jnp.asarray(np.linspace(0.5, 2, N), "float64")),
        validation=(jnp.asarray(np.asarray(X)[:13] + 1, "float64"), jnp.asarray(np.asarray(y)[:13], "int64")),
        metrics={"accuracy": fnn.accuracy(NET)},
        record={"norm": mean_norm},
        early_stopping=fnn.EarlyStopping(patience=5),
        layout=layout,
    )


def plain_run(layout=None):
    return fit(data=examples(24), layout=layout)


@cache
def on_one_device(run):
    return run()


def assert_same_numbers(ours, theirs, rtol=1e-9):
    """1e-9 in float64, as everywhere between two orders of the same sums: Adam divides by the gradient's own
    size, which makes thousands of roundings of a few."""
    for name in ("params", "train", "validation", "records"):
        for_ours, for_theirs = (jax.tree.leaves(getattr(history, name)) for history in (ours, theirs))
        for a, b in zip(for_ours, for_theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)
    assert (ours.best_epoch, ours.skipped) == (theirs.best_epoch, theirs.skipped)


def assert_placed(layout, params):
    shardings = jax.tree.leaves(layout.shardings(params, params))
    for leaf, sharding in zip(jax.tree.leaves(params), shardings, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("name", ("data_parallel", "fully_sharded"))
def test_run_with_everything_is_that_on_one_device_up_to_rounding(name):
    assert_same_numbers(full_run(LAYOUTS[name]), on_one_device(full_run))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "data_parallel"])
def test_run_on_many_devices_is_that_on_one_up_to_rounding(name):
    """Batches of 12, which no number of devices but 2 and 3 divides."""
    history = plain_run(LAYOUTS[name])
    assert_same_numbers(history, on_one_device(plain_run))
    assert_placed(LAYOUTS[name], history.params)


def test_a_run_compiles_once_whatever_its_length():
    layout = LAYOUTS["own specs"]
    plain_run(layout)
    assert count_compilations(lambda: fit(data=examples(24), epochs=7, layout=layout)) == 0


SMALL = (5, 8, 4)
OPTIMISERS = {
    "momentum on a schedule": optax.sgd(optax.cosine_decay_schedule(0.5, 9), momentum=0.9, nesterov=True),
    "clipping and weight decay": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05)),
    "state of other shapes": optax.adafactor(0.05, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optimiser_runs_fully_sharded(name):
    options: dict[str, Any] = dict(params=network(SMALL), data=examples(16, SMALL), batch_size=8, epochs=2)
    alone, spread = (fit(COST, OPTIMISERS[name], layout=l, **options) for l in (None, fnn.fully_sharded()))
    assert_same_numbers(spread, alone)
    assert_placed(fnn.fully_sharded(), spread.params)


def test_odd_numbers_of_layers_without_bias_in_pairs():
    options: dict[str, Any] = dict(
        params=network((5, 8, 6, 4), bias=None), data=examples(16, (5, 8, 6, 4)), batch_size=8
    )
    layout = fnn.tensor_parallel(4)
    history = fit(layout=layout, **options)
    assert_same_numbers(history, fit(**options))
    assert_placed(layout, history.params)
    split = [layer.W.sharding.spec for layer in history.params]
    assert split == [P("model", None), P(None, "model"), P()] and history.params[0].b is None


def bilinear_forward(params, X, y):
    Z = X @ params["U"] @ params["scale"].T
    return jnp.mean((Z - y) ** 2), (params, X, Z - y)


def bilinear_pullback(residuals, C_bar):
    (params, X, errors), A = residuals, residuals[1] @ residuals[0]["U"]
    delta = 2 * C_bar * errors / errors.size
    return {"U": X.T @ (delta @ params["scale"]), "scale": delta.T @ A}, None, None


BILINEAR = fnn.Rule(bilinear_forward, bilinear_pullback)


@pytest.mark.parametrize("layout", (fnn.data_parallel(), fnn.fully_sharded()), ids=("data", "fully"))
def test_parameters_of_ones_own_rule(layout):
    """A dict; fully sharded, `U` is split by its rows, and `scale`, of which no axis divides, is whole."""
    cost, columns = BILINEAR, np.sin(np.arange(48.0)).reshape(3, 16).T
    X, y = (jnp.asarray(np.tile(columns, 6)[:, :n], "float64") for n in (16, 3))
    U, scale = np.cos(np.arange(80.0)).reshape(16, 5), np.ones((3, 5))
    params = {"scale": jnp.asarray(scale, "float64"), "U": jnp.asarray(U, "float64")}
    options: dict[str, Any] = dict(cost=cost, params=params, data=(X, y), batch_size=6)
    history = fit(layout=layout, **options)
    assert_same_numbers(history, fit(**options))
    split = {name: leaf.addressable_shards[0].data.shape for name, leaf in history.params.items()}
    assert split == {"U": (2 if layout.state else 16, 5), "scale": (3, 5)}


# Divergence


def poisoned(at):
    """A cost that is NaN in batches that hold example number `at`, which is the first column of X."""

    def forward(params, X, y):
        bad = jnp.where(jnp.any(X[:, 0] == at), jnp.nan, 1)
        C, residuals = COST.forward(params, X.at[:, 0].set(1), y)
        return C * bad, (residuals, bad)

    def pullback(residuals, C_bar):
        return COST.pullback(residuals[0], C_bar * residuals[1])

    X, y = examples(24, SMALL)
    X = np.array(X)
    X[:, 0] = np.arange(24)
    return fnn.Rule(forward, pullback), (jnp.asarray(X, "float64"), y)


def test_divergence_names_the_step():
    cost, data = poisoned(11)
    order = np.asarray(shuffle(jax.random.key(2), 24)[1])
    step = int(np.flatnonzero(order == 11)[0]) // 8 + 1
    message = rf"in epoch 1 the cost became nan at step {step} of 3\. First not finite there: the cost, nan"
    with pytest.raises(fnn.DivergenceError, match=message) as error:
        fit(cost, params=network(SMALL), data=data, batch_size=8, layout=fnn.fully_sharded())
    assert_equal(jax.device_get(error.value.history.params), jax.device_get(network(SMALL)))


def test_skipped_steps_are_counted():
    cost, data = poisoned(11)
    options: dict[str, Any] = dict(on_divergence="skip", epochs=2, batch_size=8, layout=fnn.data_parallel())
    history = fit(cost, params=network(SMALL), data=data, **options)
    assert history.skipped == 2 and all(np.isfinite(x).all() for x in jax.tree.leaves(history.params))


# Collectives: what every step sends, read from the program that `fit` runs


@jax.jit
def adam_state(params):
    return fnn.train_state(ADAM, params, jax.random.key(0))


@cache
def program(layout, sizes=SIZES, batch_size=16, metrics=(), N=None, dtype=None):
    """Steps of float32 without a penalty; the state as it goes in, and the compiled epochs."""
    cost = fnn.cost(replace(NET, dtype=dtype), fnn.softmax_cross_entropy_with_integer_labels)
    params, data = network(sizes, "float32"), examples(N or 2 * batch_size, sizes, "float32")
    with jax.numpy_dtype_promotion("standard"):
        state = layout.put(params, adam_state(params))
        _, run = runs.compiled_epochs(cost, ADAM, metrics, (), batch_size, False, layout)
        return state, run.lower(state, layout.put_whole(data), None, jnp.int32(1)).compile()


def floats(*shapes):
    return tuple("f32[" + ",".join(map(str, shape)) + "]" for shape in shapes)


def one(kind, *shapes):
    return Collective(kind, floats(*shapes), 4 * sum(int(np.prod(shape)) for shape in shapes))


def of_steps(compiled):
    """Without the answer to whether every array is finite, once an epoch."""
    return [c for c in collectives(compiled) if not all(shape == "pred[]" for shape in c.shapes)]


def gradient(layout, sizes=SIZES):
    """The sum over devices of the gradient, as far as each has it, and of the cost."""
    return one("all-reduce", *used_shapes(layout, sizes), ())


def used_shapes(layout, sizes=SIZES):
    """Of every array on a device while a step computes."""
    params = network(sizes)
    shardings = replace(layout, state=None).shardings(params, params)
    return jax.tree.leaves(
        jax.tree.map(lambda s, a: s.shard_shape(a.shape), shardings, params), is_leaf=is_shape
    )


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def test_data_parallel_sends_the_gradient_and_the_cost_in_one_all_reduce():
    compiled = program(fnn.data_parallel())[1]
    assert collectives(compiled) == [gradient(fnn.data_parallel())]
    assert collectives(compiled)[0].bytes == 4 * (sum(a.size for a in jax.tree.leaves(network())) + 1)


@pytest.mark.parametrize("layout", (fnn.data_parallel(), fnn.tensor_parallel(2)), ids=("data", "tensor"))
def test_layouts_of_operands_send_nothing(layout):
    """Products of bfloat16 numbers alone ask for one: they send what those of float32 do."""
    kinds = [
        [(c.kind, len(c.shapes)) for c in collectives(program(layout, dtype=dtype)[1])]
        for dtype in (None, jnp.dtype(jnp.bfloat16))
    ]
    assert kinds[0] == kinds[1]


def test_evaluation_and_a_shorter_last_step_send_no_data():
    """The gradient of the scan's step and of the last one, then the number of right answers. The order of the
    examples is worked out by every device."""
    compiled = program(fnn.data_parallel(), metrics=(fnn.accuracy(NET),), N=37)[1]
    step, *others = sorted(collectives(compiled), key=lambda c: -c.bytes)
    assert step == gradient(fnn.data_parallel())
    assert others == [step, one("all-reduce", ())]


def test_fully_sharded_gathers_every_array_once_a_step():
    """Those that are split: of widths 6, 16, 12, 24, 3 the biases of 12 and 3 are not."""
    layout = fnn.fully_sharded()
    split = [leaf.shape for leaf in jax.tree.leaves(network()) if any(n % 8 == 0 for n in leaf.shape)]
    expected = [gradient(layout), *(one("all-gather", shape) for shape in split)]
    assert len(split) == 6 and sorted(of_steps(program(layout)[1])) == sorted(expected)


@pytest.mark.parametrize("model", (2, 8))
def test_pairs_of_layers_send_one_sum_each_way(model):
    """Forward z^2 and z^4, back the errors of a^2, which the second pair begins with; of the input there are
    none. With 8 of 8 devices in a group every one has the whole batch and its part of the gradient."""
    layout = fnn.tensor_parallel(model)
    rows = 16 * model // 8
    expected = [one("all-reduce", (rows, n)) for n in (12, 3, 12)]
    expected += [gradient(layout)] * (model < 8)
    assert sorted(of_steps(program(layout)[1])) == sorted(expected)


def test_a_layer_over_from_the_pairs_sends_nothing():
    compiled = program(fnn.tensor_parallel(8), (6, 16, 12, 24))[1]
    assert of_steps(compiled) == [one("all-reduce", (16, 12))]


def test_fully_sharded_pairs_send_what_both_do():
    """Two groups of 4: what 4 devices of a group hold of an array is split once more, over the two groups."""
    layout = Layout(grid(2, 4), model="model", state="data")
    state, compiled = program(layout)
    held = [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(state.params)]
    gathered = [whole for part, whole in zip(held, used_shapes(layout), strict=True) if part != whole]
    expected = [one("all-gather", shape) for shape in gathered]
    expected += [one("all-reduce", (8, n)) for n in (12, 3, 12)] + [gradient(layout)]
    assert len(gathered) == 4 and sorted(of_steps(compiled)) == sorted(expected)


def test_factors_go_instead_of_the_gradient():
    """Of layers 1 and 3 the inputs and errors of all 16 examples; the others' gradients as before."""
    compiled = program(fnn.data_parallel(factors=(1, 3)))[1]
    expected = [one("all-gather", (16, n)) for n in (6, 16, 12, 24)]
    expected += [one("all-reduce", (12, 16), (12,), (3, 24), (3,), ())]
    assert sorted(of_steps(compiled)) == sorted(expected)


def test_factors_of_few_examples_are_fewer_bytes():
    """4 examples: below n m / (n + m) in layers 1 to 3, which is 4.4, 6.9 and 8; above 2.7 of the last."""
    layers = fnn.factor_layers(network(), 4)
    assert layers == (1, 2, 3)
    sent = []
    for factors in ((), layers, (1, 2, 3, 4)):
        layout = fnn.data_parallel(DEVICES[:4], factors=factors)
        sent.append(sum(c.bytes for c in of_steps(program(layout, batch_size=4)[1])))
    assert sent[1] < sent[2] and sent[1] < sent[0]
    # a^0, δ^1, a^1, δ^2, a^2, δ^3; and the last layer's gradient with the cost.
    assert sent[1] == 4 * (4 * (6 + 16 + 16 + 12 + 12 + 24) + 3 * 24 + 3 + 1)


def test_factor_layers_are_those_with_fewer_numbers():
    params = network()
    for examples_ in range(1, 12):
        fewer = [examples_ * sum(layer.W.shape) < layer.W.size for layer in params]
        assert fnn.factor_layers(params, examples_) == tuple(np.flatnonzero(fewer) + 1)


# Memory


def bytes_on_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


# layout -> parameters of the 703 on a device
HELD = {
    "data_parallel": 703,
    "fully_sharded": (96 + 16 + 192 + 288 + 24 + 72) // 8 + 12 + 3,
    "tensor_parallel(2)": (96 + 16 + 192 + 288 + 24 + 72) // 2 + 12 + 3,
    "tensor_parallel(8)": (96 + 16 + 192 + 288 + 24 + 72) // 8 + 12 + 3,
    # W^1 4·6/2, b^1 16/4, W^2 12·4/2, b^2 12/2, W^3 6·12/2, b^3 24/4, W^4 3·6, b^4 3
    "fully sharded pairs": 12 + 4 + 24 + 6 + 36 + 6 + 18 + 3,
}


@pytest.mark.parametrize("name", HELD)
def test_a_device_holds_its_share_of_parameters_and_of_the_optimisers_state(name):
    params = network(dtype="float32")
    state = adam_state(params)
    placed = LAYOUTS[name].put(params, state)
    assert_equal(jax.device_get(placed._replace(key=0)), jax.device_get(state._replace(key=0)))
    adam = placed.optimizer_state[0]
    assert [bytes_on_a_device(tree) for tree in (placed.params, adam.mu, adam.nu)] == [4 * HELD[name]] * 3


def test_state_comes_out_of_a_step_as_it_went_in():
    state, compiled = program(fnn.fully_sharded())
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(compiled.output_shardings[0]), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


# Checkpoints


def test_a_run_goes_on_with_other_layouts(tmp_path):
    """The first epoch fully sharded over 8 devices, the second on 3, the last on one."""
    for epochs, name in ((1, "fully_sharded"), (2, "data_parallel on 3 devices"), (3, None)):
        layout = None if name is None else LAYOUTS[name]
        history = fit(data=examples(24), epochs=epochs, layout=layout, checkpoint=tmp_path)
    assert_same_numbers(history, on_one_device(plain_run))


def test_a_run_goes_on_with_its_layout_to_the_last_bit(tmp_path):
    layout = LAYOUTS["fully_sharded"]
    fit(data=examples(24), epochs=2, layout=layout, checkpoint=tmp_path)
    resumed, whole = fit(data=examples(24), layout=layout, checkpoint=tmp_path), plain_run(layout)
    assert_equal(jax.device_get(resumed.params), jax.device_get(whole.params))
    assert_equal(dict(resumed.train), dict(whole.train))
    assert_placed(layout, resumed.params)


# Ensembles


def test_members_on_their_own_devices_are_those_on_one_up_to_rounding():
    """6 members, two at once with and without 3 devices; the second device's first one diverges."""
    rates = np.array([0.001, 0.01, 1e300, 0.03, 0.05, 0.1])
    options: dict[str, Any] = dict(
        given=members(6), hyperparameters={"learning_rate": rates}, members_at_once=2
    )
    with pytest.warns(RuntimeWarning, match="1 of 6 members diverged.*member 2 in epoch"):
        one_device = fit_ensemble(**options)
    layout = fnn.data_parallel(DEVICES[:3])
    with pytest.warns(RuntimeWarning, match="1 of 6 members diverged.*member 2 in epoch"):
        history = fit_ensemble(layout=layout, **options)
    near: dict[str, Any] = dict(rtol=1e-9, atol=1e-12)  # one chunk is no loop of three: other fusions
    assert_equal(jax.device_get(history.params), jax.device_get(one_device.params), **near)
    for name in ("cost", "accuracy"):
        np.testing.assert_allclose(history.train[name], one_device.train[name], rtol=1e-9)
    np.testing.assert_array_equal(history.diverged, one_device.diverged)
    assert {shard.data.shape[0] for shard in history.params[0].W.addressable_shards} == {2}


def test_members_tell_each_other_nothing():
    params, data, keys = members(6)
    layout = fnn.data_parallel(DEVICES[:3])
    optimizer = optax.sgd(0.1)
    start = jax.jit(jax.vmap(partial(fnn.train_state, optimizer)))
    state = layout.put_rows(start(params, keys))
    run = ensemble._compiled_epoch(COST, optimizer, (), 8, 2, layout)
    compiled = run.lower(state, layout.put_whole(data), None).compile()
    assert collectives(compiled) == []


# What is refused


@pytest.mark.usefixtures("no_shape_annotations")
def test_members_that_do_not_divide_are_told_so():
    with pytest.raises(ValueError, match=r"the 5 members need to divide by the 8 devices.*'data'; add 3, or"):
        fit_ensemble(layout=fnn.data_parallel())
    with pytest.raises(
        TypeError, match=r"fit_ensemble: layout needs to be one such as fnn.data_parallel\(\)"
    ):
        fit_ensemble(layout=DEVICES)


def layout_of(**options):
    return Layout(LAYOUTS["data_parallel"].mesh, **options)


SUM = fnn.Rule(lambda params, X, y: (params["W"].sum(), None), lambda _, C_bar: ({"W": C_bar}, None, None))
BAD = {
    "a mesh as jax.make_mesh makes it": (
        lambda: Layout(grid(8, names=("data",), kind=AxisType.Explicit)),
        ValueError,
        r"needs the type Auto; .* axis_types=\(jax\.sharding\.AxisType\.Auto,\)",
    ),
    "no mesh": (
        lambda: Layout(cast(Any, DEVICES)),
        ValueError,
        r"mesh needs to be .* with axes \['data'\], got list",
    ),
    "an axis that is not there": (
        lambda: layout_of(model="model"),
        ValueError,
        r"with axes \['data', 'model'\], got \('data',\)",
    ),
    "another axis of the batch": (
        lambda: layout_of(batch="rows"),
        ValueError,
        r"\['rows'\], got \('data',\)",
    ),
    "devices as words": (
        lambda: fnn.data_parallel("cpu"),
        TypeError,
        r"data_parallel: devices needs to be some of jax\.devices\(\), got 'cpu'",
    ),
    "numbers of devices": (
        lambda: fnn.fully_sharded([0, 1]),
        TypeError,
        r"fully_sharded: devices .* got \[0, 1\]",
    ),
    "no devices": (lambda: fnn.tensor_parallel(2, []), TypeError, r"tensor_parallel: devices .* got \[\]"),
    "a device twice": (lambda: fnn.data_parallel(DEVICES[:2] * 2), ValueError, r"each device once"),
    "groups that do not divide": (
        lambda: fnn.tensor_parallel(3),
        ValueError,
        r"divides the 8 devices, got 3",
    ),
    "groups of half a device": (lambda: fnn.tensor_parallel(cast(Any, 0.5)), ValueError, r"got 0\.5"),
    "factors of a number": (
        lambda: fnn.data_parallel(factors=cast(Any, 1)),
        TypeError,
        r"numbers of layers, counted from 1, such as \(1, 2\); got 1",
    ),
    "factors counted from 0": (
        lambda: fnn.data_parallel(factors=(0, 1)),
        TypeError,
        r"counted from 1.*\(0, 1\)",
    ),
    "factors of no layer": (
        lambda: plain_run(fnn.data_parallel(factors=(2, 5))),
        ValueError,
        r"factors needs to name layers from 1 to 4, got \(2, 5\)",
    ),
    "factors of no network": (
        lambda: fit(fnn.Rule(COST.forward, COST.pullback), layout=LAYOUTS["factors"]),
        TypeError,
        r"cost needs to be made by fnn\.cost",
    ),
    "specs of another network": (
        lambda: plain_run(layout_of(specs=OWN[:3])),
        ValueError,
        r"specs needs to be a pytree like the parameters",
    ),
    "specs as words": (
        lambda: plain_run(layout_of(specs=tuple(SPECS("data", P()) for _ in OWN))),
        ValueError,
        r"a PartitionSpec for each array",
    ),
    "specs of an axis that is not there": (
        lambda: plain_run(layout_of(specs=OWN)),
        ValueError,
        r"not found in mesh",
    ),
    "specs in a list": (
        lambda: plain_run(layout_of(specs=list(OWN))),
        TypeError,
        r"layout needs to be hashable",
    ),
    "pairs of no layers": (
        lambda: fit(params={"W": jnp.ones(3)}, cost=SUM, layout=fnn.tensor_parallel(2)),
        TypeError,
        r"tensor_parallel: without specs: params needs to be a tuple of fnn\.Layer",
    ),
    "a mesh as layout": (
        lambda: plain_run(grid(8, names=("data",))),
        TypeError,
        r"fit: layout needs to be one such as fnn\.data_parallel\(\) makes; got Mesh",
    ),
    "a layout not made": (lambda: plain_run(fnn.data_parallel), TypeError, r"layout needs .* got function"),
    "factors of half a batch": (
        lambda: fnn.factor_layers(network(), cast(Any, 0.5)),
        ValueError,
        r"batch_size .* 0\.5",
    ),
    "factors of a dict": (
        lambda: fnn.factor_layers(cast(Any, {}), 3),
        TypeError,
        r"factor_layers: params needs",
    ),
}


@pytest.mark.usefixtures("no_shape_annotations")
@pytest.mark.parametrize("name", BAD)
def test_bad_layouts_are_told_what_was_expected_and_what_came(name):
    make, error, message = BAD[name]
    with pytest.raises(error) as raised:
        make()
    assert re.search(message, str(raised.value)), str(raised.value)


def test_many_tasks_that_know_of_one_process_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    for run in (plain_run, lambda layout: fit_ensemble(given=members(6), layout=layout)):
        with pytest.raises(
            RuntimeError, match=r"SLURM_STEP_NUM_TASKS=4, but JAX knows of one.*join_processes"
        ):
            run(LAYOUTS["data_parallel on 3 devices"])
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_launcher("fit")


# The reading of collectives


def test_collectives_are_read_from_text_of_every_form():
    text = """
      %all-gather-start.1 = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%a), dimensions={0}
      %all-gather-done.1 = f32[16,4]{1,0} all-gather-done(%all-gather-start.1)
      ROOT r.2 = (bf16[3]{0:T(256)}, /*index=1*/pred[5]{0}, f64[]) all-reduce-start(%b, %c, %d), to_apply=%add
      %p = (s8[7]{0}, s8[7]{0}, u32[], u32[]) collective-permute-start(%e), source_target_pairs={{0,1}}
      %many = ((f32[1]{0}, f32[2]{0}), (f32[8]{0}, f32[16]{0})) all-gather-start(%f, %g)
      %reduce-scatter.3 = f8e4m3fn[3,5]{1,0} reduce-scatter(%h), metadata={op_name="all-reduce(x)"}
      %all-to-all = (s4[3]{0}, c64[2]{0}) all-to-all(%i, %j)
      %fusion = f32[9]{0} fusion(%all-reduce.4), calls=%all-gather
    """
    assert collectives(text) == [
        Collective("all-gather", ("f32[16,4]",), 256),
        Collective("all-reduce", ("bf16[3]", "pred[5]", "f64[]"), 6 + 5 + 8),
        Collective("collective-permute", ("s8[7]",), 7),
        Collective("all-gather", ("f32[8]", "f32[16]"), 96),
        Collective("reduce-scatter", ("f8e4m3fn[3,5]",), 15),
        Collective("all-to-all", ("s4[3]", "c64[2]"), 2 + 16),
    ]
