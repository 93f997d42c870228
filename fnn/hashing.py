"""Random-looking bits from a number, without a state: `hashed`."""

import jax.numpy as jnp
from jaxtyping import Array, UInt32


def hashed(numbers: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A hash of each number; different numbers have different ones.

    Source: Appleby's MurmurHash3 (2011), its 32-bit finaliser.

    >>> import jax.numpy as jnp
    >>> hashed(jnp.array([1, 2], jnp.uint32))
    Array([1364076727,  821347078], dtype=uint32)
    """
    for shift, odd in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        numbers = (numbers ^ (numbers >> jnp.uint32(shift))) * jnp.uint32(odd)
    return numbers
