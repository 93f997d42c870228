"""The order of the examples: a permutation for any N, as random as one by sorting, and of the key alone."""

from functools import partial
from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from fnn import orders
from fnn.hashing import hashed


def drawn_orders(N: int, draws: int, rounds: int | None = None, key: int = 0) -> np.ndarray:
    rounds = orders.rounds(N) if rounds is None else rounds
    keys = jax.random.split(jax.random.key(key), draws)
    return np.asarray(jax.jit(jax.vmap(lambda key: orders.permutation(key, N, rounds)))(keys))


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from its mean: the degrees of freedom, with a variance of twice that."""
    mean, degrees = counts.mean(), counts.size - 1
    return float((((counts - mean) ** 2).sum() / mean - degrees) / (2 * degrees) ** 0.5)


@pytest.mark.parametrize("N", (1, 2, 3, 5, 64, 65, 1408))
def test_every_order_is_a_permutation(N):
    drawn = drawn_orders(N, 20)
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.broadcast_to(np.arange(N), (20, N)))


def test_key_decides_and_every_epoch_has_another_order():
    key, first = orders.shuffle(jax.random.key(0), 30)
    _, second = orders.shuffle(key, 30)
    assert jnp.array_equal(first, orders.shuffle(jax.random.key(0), 30)[1])
    assert not jnp.array_equal(first, second)
    assert not jnp.array_equal(first, orders.shuffle(jax.random.key(1), 30)[1])


@pytest.mark.parametrize("backend, unroll", (("cpu", 1), ("gpu", 16)))
def test_orders_are_these_on_every_device_or_kind_has_another_name(backend, unroll, monkeypatch):
    """Checkpoints of a run that began with these orders go on with them."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    traced = jax.make_jaxpr(lambda key: orders.permutation(key, 10, orders.rounds(10)))(jax.random.key(0))
    assert [eqn.params["unroll"] for eqn in traced.eqns if eqn.primitive.name == "scan"] == [unroll]
    _, key = jax.random.split(jax.random.key(0))
    order = orders.permutation(key, 10, orders.rounds(10))
    assert order.tolist() == [5, 1, 7, 6, 8, 0, 9, 4, 3, 2] and orders.KIND == "swap or not"


@pytest.mark.parametrize("check_vma", (True, False))
def test_every_device_of_a_shard_map_has_the_order_of_its_key(check_vma):
    keys = jax.random.split(jax.random.key(0), 4)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    over_devices = partial(jax.shard_map, mesh=mesh, in_specs=P("devices"), out_specs=P("devices"))
    each = jax.jit(over_devices(lambda keys: orders.shuffle(keys[0], 10)[1][None], check_vma=check_vma))(keys)
    np.testing.assert_array_equal(each, [orders.shuffle(key, 10)[1] for key in keys])


@pytest.mark.parametrize("N", range(2, 7))
def test_with_perfect_bits_it_is_uniform_to_1e_8(N):
    """The distribution over all N! orders after that many rounds, exactly: a Markov chain."""
    numbers = {order: n for n, order in enumerate(permutations(range(N)))}
    chain = np.zeros((len(numbers), len(numbers)))
    for K in range(N):
        pairs = [(x, (K - x) % N) for x in range(N) if x < (K - x) % N]
        for bits in product((0, 1), repeat=len(pairs)):
            swapped = np.arange(N)
            for (x, partner), bit in zip(pairs, bits, strict=True):
                if bit:
                    swapped[[x, partner]] = partner, x
            after = [numbers[tuple(swapped[list(order)])] for order in numbers]
            np.add.at(chain, (range(len(numbers)), after), 1 / N / 2 ** len(pairs))
    share = np.linalg.matrix_power(chain, orders.rounds(N))[0]
    assert np.abs(share - 1 / len(numbers)).sum() / 2 < 1e-8


def test_all_orders_of_four_are_equally_frequent():
    """24 orders of 48,000 draws. Keys are fixed: this and the next two hold for good, or never."""

    def unevenness(**options):
        _, counts = np.unique(drawn_orders(4, 48_000, **options), axis=0, return_counts=True)
        return chi_square(np.pad(counts, (0, 24 - len(counts))))

    assert abs(unevenness()) < 4
    assert unevenness(rounds=6) > 10


def test_places_and_pairs_of_places_are_equally_frequent():
    """Of 1,000 examples some, and pairs of them, in tenths of the epoch; and next to whom they are."""

    def unevenness(**options):
        drawn = drawn_orders(1000, 8_000, **options)
        places = np.argsort(drawn, axis=1)[:, [0, 1, 2, 499, 500, 998, 999]] // 100
        alone = [chi_square(np.bincount(place, minlength=10)) for place in places.T]
        pairs = [(m, n) for n in range(places.shape[1]) for m in range(n)]
        joint = [chi_square(np.bincount(10 * places[:, m] + places[:, n], minlength=100)) for m, n in pairs]
        # Of the 999 neighbours each is the next number with probability 1/1000.
        successors = (np.diff(drawn, axis=1) == 1).sum() / (8_000 * 0.999)
        return max(map(abs, alone)), max(map(abs, joint)), abs(successors - 1) * 8_000**0.5

    assert max(unevenness()) < 4.5
    alone, joint, successors = unevenness(rounds=6)
    assert alone > 4.5 and joint > 4.5 and successors > 4.5


def test_a_batch_has_as_many_of_a_kind_as_one_drawn_without_replacement():
    """Of 50 examples 10 are marked; in the first 20 there are 4 of them, with the hypergeometric variance."""
    mean, variance = 20 * 10 / 50, 20 * (10 / 50) * (40 / 50) * (30 / 49)

    def apart(**options):
        marked = (drawn_orders(50, 20_000, **options)[:, :20] < 10).sum(axis=1)
        return abs(marked.mean() - mean) / (variance / 20_000) ** 0.5, abs(marked.var() / variance - 1) * 100

    assert max(apart()) < 4  # in standard errors, of the variance for a normal distribution
    assert min(apart(rounds=2)) > 10


def test_more_examples_than_32_bits_count_are_refused():
    with pytest.raises(ValueError, match="at most 2³¹ - 1 examples, got 2147483648"):
        orders.shuffle(jax.random.key(0), 2**31)


def test_hashes_differ_and_every_bit_of_the_number_turns_the_highest_of_half_of_them():
    numbers = jnp.arange(2**16, dtype=jnp.uint32)
    hashes = np.asarray(hashed(numbers))
    assert len(np.unique(hashes)) == 2**16
    for bit in range(32):
        turned = (hashes ^ np.asarray(hashed(numbers ^ jnp.uint32(2**bit)))) >> 31
        assert abs(turned.mean() - 0.5) < 0.02, bit
