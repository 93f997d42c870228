"""Each member is as if alone: in order, steps, numbers and divergence; compiled once, in little memory."""

import re
from functools import cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import ensemble
from tests.strategies import drawn, signs
from tests.test_train import count_compilations

pytestmark = pytest.mark.usefixtures("standard_promotion")

M, N = 5, 40  # batches of 8; chunks of 2 or 3 members have a shorter last one
RATES = np.array([0.001, 0.01, 0.03, 0.05, 0.1])
ADAM = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
NET = fnn.mlp(fnn.tanh)
COST = fnn.cost(NET, fnn.softmax_cross_entropy_with_integer_labels, l2=1e-4)
METRICS = {"accuracy": fnn.accuracy(NET)}
RUN: dict[str, Any] = dict(epochs=3, batch_size=8, progress=False)
KEY = jax.random.key(0)


@cache
def problem(members=M, dtype="float64", **options):
    """Parameters (members, ...), data, and a key for each member; made once."""
    params = drawn(np.random.default_rng(1), (3, 8, 2), dtype=dtype, members=(members,), **options)
    return params, signs(N, dtype=dtype), jax.random.split(jax.random.key(2), members)


def fit(cost=COST, optimizer=ADAM, given=None, **options):
    params, data, keys = given or problem()
    defaults: dict[str, Any] = dict(keys=keys, metrics=METRICS, members_at_once=M, **RUN)
    return fnn.fit_ensemble(cost, optimizer, params, data, **(defaults | options))


def member(tree, i):
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[i], a.dtype), tree)


def assert_equal(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.shape(x) == jnp.shape(y)
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


def assert_member_is_alone(history, i, alone, rtol=1e-9):
    assert_equal(member(history.params, i), alone.params, rtol=rtol, atol=1e-12)
    for ours, theirs in ((history.train, alone.train), (history.validation, alone.validation)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name][i], theirs[name], rtol=rtol)


def test_member_is_the_network_fitted_alone_with_its_key_and_hyperparameters():
    params, (X, y), keys = problem()
    rows = (jnp.asarray(np.asarray(a)[part], a.dtype) for part in (np.s_[:29], np.s_[29:]) for a in (X, y))
    X, y, *held_out = rows
    data, held_out = (X, y, jnp.asarray(np.linspace(0.5, 2, 29), "float64")), tuple(held_out)
    b1 = np.linspace(0.5, 0.9, M)
    run: dict[str, Any] = RUN | dict(validation=held_out, metrics=METRICS)
    numbers = {"learning_rate": RATES, "b1": b1}
    history = fnn.fit_ensemble(
        COST, ADAM, params, data, keys=keys, hyperparameters=numbers, members_at_once=2, **run
    )
    assert history.train.keys() == history.validation.keys() == {"cost", "accuracy"}
    assert all(column.shape == (M, 3) for column in (*history.train.values(), *history.validation.values()))
    assert history.diverged.tolist() == [0] * M
    assert history.seconds.shape == (3,) and (history.seconds > 0).all()
    for i in (0, 4):
        adam = optax.adam(float(RATES[i]), b1=float(b1[i]))
        alone = fnn.fit(COST, adam, member(params, i), data, key=keys[i], **run)
        assert_member_is_alone(history, i, alone)
    # Of another member it is not.
    with pytest.raises(AssertionError):
        assert_member_is_alone(history, 0, alone, rtol=1e-3)


@pytest.mark.parametrize("members_at_once", (1, 3))
def test_chunks_change_nothing_but_rounding(members_at_once):
    numbers = {"learning_rate": RATES}
    whole = fit(hyperparameters=numbers)
    parts = fit(members_at_once=members_at_once, hyperparameters=numbers)
    assert_equal(parts.params, whole.params, rtol=1e-9, atol=1e-12)
    assert_equal(dict(parts.train), dict(whole.train), rtol=1e-9)


@pytest.mark.parametrize(
    "sizes, members, asked, size",
    (
        ((3, 2), 64, 8, 8),
        ((3, 2), 10, 8, 5),
        ((3, 2), 11, 4, 4),
        ((3, 2), 5, 100, 5),
        ((3, 2), 1, None, 1),
        ((3, 2), 9, None, 3),
        ((64, 128, 10), 9, None, 3),  # 9,610 parameters
        ((64, 128, 64, 10), 9, None, 1),
    ),
)
def test_chunks_are_no_larger_than_asked_and_about_equal(sizes, members, asked, size):
    params = jax.eval_shape(jax.vmap(partial(fnn.init, sizes=sizes)), jax.random.split(KEY, members))
    assert ensemble._chunk_size(params, members, asked, "") == size


def test_one_that_diverges_leaves_the_others_as_they_were():
    numbers = RATES.copy()
    calm = fit(optimizer=SGD, hyperparameters={"learning_rate": numbers})
    numbers[1] = 1e300
    with pytest.warns(RuntimeWarning, match="1 of 5 members diverged.*member 1 in epoch 1.*learning rates"):
        wild = fit(optimizer=SGD, hyperparameters={"learning_rate": numbers})
    others = np.array([0, 2, 3, 4])
    assert wild.diverged.tolist() == [0, 1, 0, 0, 0] and calm.diverged.tolist() == [0] * M
    assert_equal(member(wild.params, others), member(calm.params, others))
    for name in ("cost", "accuracy"):
        np.testing.assert_array_equal(wild.train[name][others], calm.train[name][others])
        assert np.isnan(wild.train[name][1]).all()
    assert all(np.isnan(leaf[1]).all() for leaf in jax.tree.leaves(jax.device_get(wild.params)))


def test_epoch_of_divergence_is_that_in_which_fit_raises():
    """A linear network grows by a factor a step: the larger the rate, the sooner it overflows."""
    cost, rates = fnn.cost(fnn.mlp([]), fnn.squared_error), np.array([1e4, 0.01, 1e12, 1e40])

    @jax.jit
    def make():
        X = jax.random.normal(jax.random.key(0), (N, 3))
        keys = jax.random.split(jax.random.key(3), 4)
        params = jax.vmap(lambda key: fnn.init(key, (3, 1)))(keys)
        return X, X @ jnp.array([[1.0], [-2.0], [0.5]]), keys, params

    X, y, keys, params = make()
    run: dict[str, Any] = RUN | dict(epochs=12, validation=(X, y))
    with pytest.warns(RuntimeWarning, match="3 of 4 members diverged, the first of them member 3"):
        history = fnn.fit_ensemble(
            cost, SGD, params, (X, y), keys=keys, hyperparameters={"learning_rate": rates}, **run
        )
    for i in (0, 2, 3):
        with pytest.raises(fnn.DivergenceError) as error:
            fnn.fit(cost, optax.sgd(rates[i]), member(params, i), (X, y), key=keys[i], **run)
        good = len(error.value.history.seconds)
        assert history.diverged[i] == good + 1
        for name, columns in (("train", history.train), ("validation", history.validation)):
            column = columns["cost"][i]
            np.testing.assert_allclose(column[:good], getattr(error.value.history, name)["cost"], rtol=1e-9)
            assert np.isnan(column[good:]).all()
    assert history.diverged[1] == 0 and len(set(history.diverged)) == 4


def test_params_keys_and_hyperparameters_given_stay_usable():
    params, data, keys = given = problem()
    rates, before = jnp.array(RATES), jax.tree.map(np.array, params)
    history = fit(given=given, hyperparameters={"learning_rate": rates})
    assert_equal(jax.tree.map(np.asarray, params), before)
    jax.random.split(keys[0])
    assert (np.asarray(history.params[0].W) != np.asarray(params[0].W)).any()
    np.testing.assert_array_equal(rates, RATES)


def test_equal_keys_mean_equal_orders_and_keys_of_either_style_are_welcome():
    params, data, keys = problem()
    twins = jax.tree.map(lambda a: jnp.asarray(np.stack([np.asarray(a)[0]] * M), a.dtype), params)
    same = fit(given=(twins, data, keys), keys=jnp.stack([keys[0], keys[1]] * 2 + [keys[0]]))
    assert_equal(member(same.params, 0), member(same.params, 2))
    W = np.asarray(same.params[0].W)
    assert (W[0] != W[1]).any()
    raw = fit(keys=jax.vmap(jax.random.key_data)(keys))
    assert_equal(raw.params, fit().params)


def test_weight_decay_of_each_member_is_the_costs_l2():
    params, data, keys = problem(bias=None)
    decays = np.linspace(0, 0.2, M)
    decay = optax.inject_hyperparams(optax.add_decayed_weights)(weight_decay=0.0)
    optimizer = optax.chain(decay, SGD)
    plain = fnn.cost(NET, COST.loss)
    numbers = {"weight_decay": decays, "learning_rate": RATES}
    history = fit(plain, optimizer, (params, data, keys), hyperparameters=numbers, metrics=None)
    for i in (4,):
        cost = fnn.cost(NET, COST.loss, l2=decays[i])
        alone = fnn.fit(cost, optax.sgd(RATES[i]), member(params, i), data, key=keys[i], **RUN)
        assert_equal(member(history.params, i), alone.params, rtol=1e-9, atol=1e-12)


def test_hyperparameters_inside_others_are_found():
    """Of an optimiser within one whose numbers are injected too; this one asks for the value of the cost."""
    polyak = optax.inject_hyperparams(optax.polyak_sgd)(max_learning_rate=0.3)

    def clipped(max_norm):
        return optax.chain(optax.clip_by_global_norm(max_norm), polyak)

    nested = optax.inject_hyperparams(clipped)(max_norm=1e9)
    numbers = {"max_learning_rate": RATES, "max_norm": np.geomspace(0.01, 1, M)}
    params, data, keys = problem()
    history = fit(optimizer=nested, hyperparameters=numbers, metrics=None)
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.polyak_sgd(RATES[0]))
    alone = fnn.fit(COST, optimizer, member(params, 0), data, key=keys[0], **RUN)
    assert_member_is_alone(history, 0, alone)
    assert history.validation == {}


@pytest.mark.parametrize("dtype, x64", (("float32", False), ("bfloat16", True)))
def test_narrow_dtypes_stay_and_rates_in_float64_are_welcome(dtype, x64):
    given = problem(dtype=dtype)
    adam = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2"))(learning_rate=1e-3)
    with jax.enable_x64(x64):
        history = fit(COST, adam, given, hyperparameters={"learning_rate": RATES}, epochs=10, metrics=None)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(history.params))
    cost = history.train["cost"][2:]
    assert (cost[:, -1] < 0.9 * cost[:, 0]).all()


def test_run_compiles_once_whatever_its_length_and_a_second_equal_one_nothing():
    numbers = {"learning_rate": RATES}
    fit(epochs=1, hyperparameters=numbers)
    assert count_compilations(lambda: fit(epochs=4, hyperparameters=numbers)) == 0
    assert count_compilations(lambda: jax.jit(lambda x: 2 * x)(1.0)) > 0, "the count counts"


def test_state_is_reused_and_beside_it_stands_one_chunk():
    """256 members, 4 at once: in the memory of the program neither a second state nor data of each member."""
    params, data, keys = problem(256, "float32")
    start = jax.jit(jax.vmap(lambda params, key: fnn.train_state(SGD, params, jax.random.key_data(key))))
    state = start(params, keys)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    compiled = ensemble._compiled_epoch(COST, SGD, (), 8, 4, None).lower(state, data, None).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size > 3 * memory.temp_size_in_bytes


def test_progress_shows_medians_of_those_left(capsys):
    rates = RATES.copy()
    rates[[0, 3]] = 1e300
    with pytest.warns(RuntimeWarning, match="2 of 5"):
        history = fit(optimizer=SGD, hyperparameters={"learning_rate": rates}, progress=True)
    lines = capsys.readouterr().err.splitlines()
    median = np.median(history.train["cost"][[1, 2, 4], 0])
    assert lines[0].startswith(f"epoch 1/3  step {-(-N // 8):>2}  median cost {median:.4f}")
    assert lines[2].endswith(f"  {M * N / np.median(history.seconds[1:]):,.0f} examples/s")
    assert len(lines) == 3 and "median accuracy" in lines[2]


def test_all_may_diverge(capsys):
    with pytest.warns(RuntimeWarning, match="5 of 5"):
        history = fit(optimizer=SGD, hyperparameters={"learning_rate": [1e300] * M}, progress=True)
    assert (history.diverged == 1).all() and "median cost nan" in capsys.readouterr().err


@pytest.mark.parametrize("members_at_once", (None, 1, 3))
def test_prediction_is_the_mean_and_the_deviation_of_the_members(members_at_once):
    params, (X, _), _ = problem()
    alone = np.asarray(jax.jit(jax.vmap(NET, (0, None)))(params, X))
    mean, spread = fnn.ensemble_prediction(NET, params, X, members_at_once=members_at_once)
    np.testing.assert_allclose(mean, alone.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(spread, alone.std(axis=0), rtol=1e-9)
    for_one = jax.jit(partial(fnn.ensemble_prediction, NET, members_at_once=members_at_once))(params, X[0])
    np.testing.assert_allclose(for_one, [np.asarray(mean)[0], np.asarray(spread)[0]], rtol=1e-9)


def test_prediction_of_one_member_is_its_own_without_spread():
    params, (X, _), _ = problem(1)
    mean, spread = fnn.ensemble_prediction(NET, params, X)
    np.testing.assert_allclose(mean, NET(member(params, 0), X), rtol=1e-12)
    np.testing.assert_array_equal(spread, 0)


ONE = jax.jit(lambda: fnn.init(KEY, (3, 8, 2)))()
SCHEDULED = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.cosine_decay_schedule(0.1, 9))
INTEGER = optax.inject_hyperparams(optax.sgd)(learning_rate=cast(Any, 1))


def rates(values, **options):
    return dict(hyperparameters={"learning_rate": values}, **options)


# name -> (options of fit, type of the error, its message)
# fmt: off
BAD = {
    "one network": (dict(given=(ONE, problem()[1], problem()[2])), ValueError,
        r"params\[0\]\.W needs 5 members, as many as keys, along its first.* got shape \(8, 3\).*jax\.vmap"),
    "a key too few": (dict(keys=problem()[2][:4]), ValueError,
        r"needs 4 members, as many as keys.*\(5, 8, 3\)"),
    "an array without members": (dict(given=((*problem()[0], jnp.float64(1)), *problem()[1:])), ValueError,
        r"params\[2\] needs 5 members.*got shape \(\)"),
    "one key": (dict(keys=KEY), TypeError,
        r"keys needs to be M PRNG keys.*got key<fry> \(\); split one with jax\.random\.split"),
    "one raw key": (dict(keys=jax.random.PRNGKey(0)), TypeError, r"M PRNG keys.*got uint32 \(2,\); split"),
    "keys in two axes": (dict(keys=jax.random.split(KEY, (5, 1))), TypeError, r"M PRNG keys.*\(5, 1\)"),
    "no keys": (dict(keys=problem()[2][:0]), TypeError, r"M PRNG keys.*\(0,\)"),
    "a list of keys": (dict(keys=[KEY] * M), TypeError, r"M PRNG keys.*got list; stack them with jnp\.stack"),
    "a seed": (dict(keys=0), TypeError, r"M PRNG keys.*got 0; split"),
    "rates of other members": (rates(RATES[:4]), ValueError,
        r"'learning_rate' needs one number for each of the 5 members, shape \(5,\); got shape \(4,\)"),
    "one rate": (rates(0.1), ValueError, r"one number for each of the 5 members.*got shape \(\)"),
    "a rate of NaN": (rates([1, 1, np.nan, 1, np.inf]), ValueError,
        r"needs to be finite in float64.*got nan for member 2 \(2 of 5\)"),
    "a rate beyond float32": (rates([1, 1e39, 1, 1, 1], given=problem(dtype="float32")), ValueError,
        r"finite in float32, as it was injected; got 1e\+39 for member 1"),
    "rates as words": (rates(["0.1"] * M), TypeError, r"'learning_rate' needs real numbers.*got list"),
    "rates ragged": (rates([[1], [1, 2]]), TypeError, r"needs real numbers, one for each member"),
    "rates complex": (rates(RATES * 1j), TypeError, r"needs real numbers.*got complex128 \(5,\)"),
    "rates of truth": (rates(RATES > 0), TypeError, r"needs real numbers.*got bool \(5,\)"),
    "rates where an integer was injected": (rates(RATES, optimizer=INTEGER), TypeError,
        r"was injected as an integer, got 0\.001 for a member; inject a float, learning_rate=1\.0"),
    "a hyperparameter not injected": (dict(hyperparameters={"lr": RATES}), ValueError,
        r"injected, only b1, b2, eps, eps_root, learning_rate; got 'lr'.*inject_hyperparams\(optax\.ad"),
    "nothing injected": (rates(RATES, optimizer=optax.sgd(0.1)), ValueError,
        r"injected, none; got 'learning_rate'"),
    "a scheduled one": (rates(RATES, optimizer=SCHEDULED), ValueError,
        r"'learning_rate' follows a schedule of the optimizer.*inject a number in its place"),
    "one injected twice": (rates(RATES, optimizer=optax.chain(SGD, SGD)), ValueError,
        r"'learning_rate' is injected in 2 places"),
    "hyperparameters an array": (dict(hyperparameters=RATES), TypeError,
        r"a dict of name -> one number for each member.*got float64 \(5,\)"),
    "a hyperparameter without a name": (dict(hyperparameters={0: RATES}), TypeError,
        r"a dict of name -> .*got dict"),
    "no members at once": (dict(members_at_once=0), ValueError,
        r"members_at_once needs to be a positive.*got 0"),
    "no epochs": (dict(epochs=0), ValueError, r"fit_ensemble: epochs needs to be a positive integer, got 0"),
    "batches above N": (dict(batch_size=41), ValueError, r"batch_size 41 is larger than the data, N = 40"),
    "cost a function": (dict(cost=lambda params, X, y: 0.0), TypeError,
        r"fit_ensemble: cost needs to be a rule"),
    "an optimiser not made": (dict(optimizer=optax.adam), TypeError, r"fit_ensemble: optimizer.*call it"),
    "data of each member": (
        dict(given=(problem()[0], (jnp.ones((M, N, 3)), jnp.zeros((M, N), int)), problem()[2])), ValueError,
        r"X needs shape \(N, 3\)"),
    "a metric of each example": (dict(metrics={"z": lambda params, X, y: NET(params, X)[:, 0]}), TypeError,
        r"metric 'z' needs to be a scalar"),
}
# fmt: on


@pytest.mark.usefixtures("no_shape_annotations")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_what_was_expected_and_what_came(name):
    options, error, message = BAD[name]
    with pytest.raises(error) as raised:
        fit(**options)
    assert re.search(message, str(raised.value)), str(raised.value)


@pytest.mark.usefixtures("no_shape_annotations")
def test_values_are_checked_in_every_member():
    params, data, keys = problem()
    wrong = (params[0]._replace(W=params[0].W.at[3, 1, 2].set(jnp.nan)), *params[1:])
    with pytest.raises(ValueError, match=r"params\[0\]\.W needs to be finite, got nan at index \(3, 1, 2\)"):
        fit(given=(wrong, data, keys))
    with pytest.raises(TypeError, match="needs arrays with values, got traced ones"):
        jax.jit(lambda params: fit(given=(params, data, keys)).params)(params)


@pytest.mark.usefixtures("no_shape_annotations")
def test_prediction_of_bad_input_is_told_so():
    params, (X, _), _ = problem()
    with pytest.raises(TypeError, match="ensemble_prediction: the network needs to be a rule"):
        fnn.ensemble_prediction(cast(Any, jax.nn.relu), params, X)
    with pytest.raises(ValueError, match=r"ensemble_prediction: params\[1\]\.W needs all members.*\(2, 8\)"):
        fnn.ensemble_prediction(NET, (params[0], *ONE[1:]), X)
    with pytest.raises(ValueError, match="members_at_once needs to be a positive integer, got -1"):
        fnn.ensemble_prediction(NET, params, X, members_at_once=-1)
