r"""The order of the examples in an epoch: `shuffle`, by swapping or not.

`jax.random.permutation` sorts random numbers, and on a CPU XLA's sort takes a third of the epoch of a small
network. This takes a tenth of the sort's time for 1,408 examples and 2 per cent for 60,000 and a million,
where NumPy's permutation takes 0.7, 1.0 and 2.1 times ours (experiments/benchmarks/shuffling.py).

In a round, K is drawn among 0..N-1. x ↦ K - x mod N makes pairs of the places, and the two examples of a pair
change places or stay, by a random bit of the pair. Whatever K and the bits are, that permutes. Where one
example ends depends on no other, so all N are computed at once, in 32-bit integers.

The bit of a pair is the highest of a hash of its larger place, after an exclusive or with a number drawn for
the round. With independent fair bits instead, the distribution over all N! orders would be within 10⁻⁸ of
uniform after `rounds(N)` for N ≤ 6, which tests/test_orders.py computes. For larger N the frequencies of
places and of pairs of places are tested there, with the bits as they are.

Source: Hoang, Morris & Rogaway (2012), *An enciphering scheme based on a card shuffle*. Their bound on the
distance, for the places of q of the examples with fair bits, has the factors N^(3/2) and about ½ (1 + q/N) to
the power of half the rounds: next to nothing for a batch of a long epoch, but no bound for all of it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from .hashing import hashed
from .rules import _of_equal_axes

KIND = "swap or not"  # stands in checkpoints: to be renamed with any change that gives other orders


@partial(jax.jit, static_argnames="N")
def shuffle(key: Array, N: int) -> tuple[Array, Int32[Array, " N"]]:
    """The key of the next epoch, and the order of the examples in this one: 0..N-1 permuted.

    Raises ValueError for N of 2³¹ or more, which signed 32-bit integers do not count.

    >>> import jax
    >>> key, order = shuffle(jax.random.key(0), 5)
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4]
    """
    key, shuffle_key = jax.random.split(key)
    return key, permutation(shuffle_key, N, rounds(N))


def rounds(N: int) -> int:
    """32 for the distance from uniform with a few examples; 4 for every doubling, as N^(3/2) needs 3."""
    return 32 + 4 * (N - 1).bit_length()


def permutation(key: Array, N: int, rounds: int) -> Int32[Array, " N"]:
    """0..N-1 in a random order."""
    if N >= 2**31:
        raise ValueError(f"an epoch has at most 2³¹ - 1 examples, got {N}; split it into several.")

    def swap_or_not(x, drawn):
        K, salt = drawn[0] % jnp.uint32(N), drawn[1]
        partner = jnp.where(x <= K, K - x, K + (jnp.uint32(N) - x))
        bit = hashed(jnp.maximum(x, partner) ^ salt) >> jnp.uint32(31)
        return jnp.where(bit == 1, partner, x), None

    drawn = jax.random.bits(key, (rounds, 2), jnp.uint32)
    places, drawn = _of_equal_axes((jnp.arange(N, dtype=jnp.uint32), drawn))
    # On a GPU launching a kernel takes longer than a round, so 16 share one; on a CPU XLA would split that
    # kernel over threads, which takes longer too.
    unroll = 1 if jax.default_backend() == "cpu" else 16
    return jax.lax.scan(swap_or_not, places, drawn, unroll=unroll)[0].astype(jnp.int32)
