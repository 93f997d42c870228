r"""The order of the examples in an epoch: `shuffle`, by swapping or not.

`jax.random.permutation` sorts random numbers, and on a CPU XLA's sort takes a third as long as the steps of a
small network. This takes a tenth of the sort's time for 1,408 examples, and 2 per cent for a million
(experiments/benchmarks/shuffling.py).

In a round, K is drawn among 0..N-1. x ↦ K - x mod N makes pairs of the places, and the two examples of a pair
change places or stay, by a random bit of the pair. Whatever K and the bits are, that permutes. A place is
followed through all rounds without a look at the others, so all N are at once, in 32-bit integers.

The bits are of a hash of the pair and of a number drawn for the round. Were they perfect, the distribution
over all N! orders would be within 10⁻⁸ of uniform after `rounds(N)`, for N ≤ 6, where tests/test_shuffle.py
computes it: in the end every round takes a third or more of what is left. There the frequencies of orders,
places and pairs of places are tested as well, with the bits as they are.

Source: Hoang, Morris & Rogaway (2012), *An enciphering scheme based on a card shuffle*, with a bound for any
N and any number of examples that are looked at.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from .hashing import hashed

KIND = "swap or not"  # a run goes on with the orders that it began with, or not at all


@partial(jax.jit, static_argnames="N")
def shuffle(key: Array, N: int) -> tuple[Array, Int32[Array, " N"]]:
    """The key of the next epoch, and the order of the examples in this one: 0..N-1 permuted.

    Raises ValueError for N of 2³¹ or more, which 32-bit integers do not count.

    >>> import jax
    >>> key, order = shuffle(jax.random.key(0), 5)
    >>> sorted(order.tolist())
    [0, 1, 2, 3, 4]
    """
    key, shuffle_key = jax.random.split(key)
    return key, permutation(shuffle_key, N, rounds(N))


def rounds(N: int) -> int:
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
    # A kernel starts on a GPU for longer than a round runs; a CPU hands those of many operations to threads.
    unroll = 1 if jax.default_backend() == "cpu" else 16
    x, _ = jax.lax.scan(swap_or_not, jnp.arange(N, dtype=jnp.uint32), drawn, unroll=unroll)
    return x.astype(jnp.int32)
