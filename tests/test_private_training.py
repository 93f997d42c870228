"""The step is clipped, noised by σ C / m, and plain gradient descent's without either."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from experiments import private_training
from tests.strategies import drawn

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def batch():
    """Parameters, inputs and labels; the norms of the examples' gradients are far apart."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 64)) * np.geomspace(0.01, 1, 40)[:, None]
    params = drawn(rng, private_training.SIZES, dtype="float32")
    return params, X.astype(np.float32), rng.integers(0, 10, 40).astype(np.int32)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)]).astype(float)


@jax.jit
def after_a_step(params, X, y, rate, deviation, max_norm):
    optimizer = private_training.noisy_sgd(rate, deviation, jax.random.key(1))
    after, _ = private_training.private_step(optimizer, max_norm, (params, optimizer.init(params)), X, y)
    return after


def step(batch, rate, deviation, max_norm):
    return flat(after_a_step(*batch, *map(np.float32, (rate, deviation, max_norm)))) - flat(batch[0])


def test_quick_run_learns_less_with_more_noise(standard_promotion, capsys, tmp_path):
    private_training.main(["--quick", "--epochs", "3", "--output", str(tmp_path / "figure.png")])
    out = capsys.readouterr().out
    assert "no privacy accounting is done" in out
    plain = re.search(r"Without clipping and noise, η = \S+: (\S+)% of the test digits", out)
    rows = re.findall(r"^ *10 +(\S+) +(\S+) +\S+ +\S+% +(\S+)% ", out, re.MULTILINE)
    assert plain and [row[:2] for row in rows] == [("0", "0"), ("1", "0.078"), ("4", "0.31")]
    clipped, little, much = (float(row[2]) for row in rows)
    # Measured: 95.0 % plain, 95.7 % clipped, 89.9 % and 75.7 % with noise.
    assert abs(float(plain[1]) - clipped) < 4 and clipped > 90
    assert clipped - 2 > little > much + 4 and much > 30
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("sigma, C, m", ((1.0, 0.1, 128), (4.0, 10.0, 32)))
def test_noise_has_deviation_sigma_c_over_m_in_every_step(sigma, C, m, standard_promotion):
    optimizer = private_training.noisy_sgd(1.0, private_training.deviation(sigma, C, m), jax.random.key(0))
    zeros: Any = (fnn.Layer(jnp.zeros((200, 500), jnp.float32), jnp.zeros(2000, jnp.float32)),)
    state = optimizer.init(zeros)
    draws = []
    for _ in range(3):
        updates, state = optimizer.update(zeros, state)
        draws.append(flat(updates))
        for leaf in jax.tree.leaves(updates):
            # The deviation of n normal numbers is off by 1/√(2n), their mean by 1/√n; five times that.
            n, expected = leaf.size, sigma * C / m
            assert abs(np.std(leaf) / expected - 1) < 5 / np.sqrt(2 * n)
            assert abs(np.mean(leaf)) < 5 * expected / np.sqrt(n)
    # Every step has noise of its own, and so have the arrays of a layer.
    assert np.abs(np.corrcoef(draws)[np.triu_indices(3, 1)]).max() < 5 / np.sqrt(len(draws[0]))
    assert not np.array_equal(draws[0][:2000], draws[0][-2000:])


def test_no_noise_means_none_even_without_a_bound():
    assert private_training.deviation(jnp.float32(0), jnp.float32(np.inf), 128) == 0


def test_step_without_bound_and_noise_is_gradient_descents(batch, standard_promotion):
    params, X, y = batch
    gradient = jax.jit(fnn.value_and_grad(private_training.COST))(params, X, y)[1]
    moved = step(batch, 0.1, 0, np.inf)
    # A difference of parameters of size 1 at most: an eps each.
    np.testing.assert_allclose(moved, -0.1 * flat(gradient), atol=2 * EPS)
    assert np.abs(moved).max() > 1e-3


def test_step_is_that_of_the_examples_gradients_clipped_one_by_one(batch, standard_promotion):
    params, X, y = batch
    gradient = jax.jit(jax.grad(private_training.COST))
    each = [flat(gradient(params, X[n : n + 1], y[n : n + 1])) for n in range(len(y))]
    norms = np.linalg.norm(each, axis=1)
    C = float(np.median(norms))
    assert norms.min() < C / 1.2 and norms.max() > 2 * C
    clipped = np.mean([g * min(1, C / norm) for g, norm in zip(each, norms, strict=True)], axis=0)
    np.testing.assert_allclose(step(batch, 1.0, 0, C), -clipped, atol=8 * EPS)


def test_noise_is_added_after_clipping_and_scaled_by_the_rate_alone(batch, standard_promotion):
    quiet, noisy = (step(batch, 0.5, deviation, 1e-3) for deviation in (0, 0.2))
    assert np.linalg.norm(quiet) <= 0.5e-3 * 1.01
    np.testing.assert_allclose(np.std(noisy - quiet), 0.5 * 0.2, rtol=5 / np.sqrt(2 * len(quiet)))


def test_best_rate_is_the_first_of_the_best_means():
    assert private_training.best_rate(np.array([[0.8, 0.9], [1.0, 0.9], [0.9, 1.0], [1.0, 0.1]])) == 1


def test_same_seed_same_members_same_run_and_noise_of_its_own_for_each(standard_promotion):
    rng = np.random.default_rng(0)
    N = private_training.N
    data = jnp.asarray(rng.standard_normal((N, 64)), jnp.float32), jnp.zeros(N, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 2)[np.array([0, 0, 1])]
    ones = np.ones(3, np.float32)
    runs = private_training.Runs(*private_training.train(ones, ones, ones, keys, data, data, 700, 1))
    assert runs.after.shape == (3, N) and runs.test.shape == (3, 1)
    np.testing.assert_array_equal(runs.after[0], runs.after[1])
    assert not np.array_equal(runs.after[0], runs.after[2])


@pytest.mark.parametrize(
    "flags, expected, got",
    (
        ("--max-norms 1 0", "finite numbers above 0", "0.0"),
        ("--max-norms inf", "finite numbers above 0", "inf"),
        ("--noise 0 -1", "finite numbers of at least 0", "-1.0"),
        ("--noise 1 0", "ascending", "1 0"),
        ("--batch-size 1438", "from 1 to 1437", "1438"),
        ("--epochs 0", "an integer of at least 1", "0"),
        ("--runs 0", "from 1 to 100", "0"),
    ),
)
def test_bad_flag_is_one_line(flags, expected, got, capsys):
    with pytest.raises(SystemExit) as exit:
        private_training.main(flags.split())
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"private_training: {flags.split()[0]} needs to be ") and expected in err
    assert err.endswith(f", got {got}.\n")


def test_optax_noise_has_a_variance_for_its_eta(standard_promotion):
    """Why `noisy_sgd` squares the deviation."""
    noise = optax.add_noise(0.25, 0, jax.random.key(0))
    zeros = jnp.zeros(100_000, jnp.float32)
    updates, _ = noise.update(zeros, noise.init(zeros))
    np.testing.assert_allclose(np.std(np.asarray(updates)), 0.5, rtol=0.02)
