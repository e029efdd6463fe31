"""Dropout with one key per sample: a sample's mask is the same on every device and in every micro-batch."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from avg_llava_jax.placement import constrain


def dropped(
    x: Float[ArrayLike, "B ..."], keys: Key[ArrayLike, " B"], keep: Float[ArrayLike, ""] | float
) -> Float[Array, "B ..."]:
    """Each value kept with probability `keep` and divided by it, else 0.

    Masks use 16 random bits per value, exact enough for a rate: on a CPU, drawing 32 bits takes half of a router's
    training step.
    """
    limit = round(keep * 2**16)
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(keys)
    kept = constrain(bits < limit, "batch", *[None] * (x.ndim - 1))
    return jnp.where(kept, x * jnp.asarray(2**16 / limit, x.dtype), 0)


def dropper(rate: float, keys: Key[ArrayLike, " B"] | None) -> Callable[..., jax.Array]:
    """Dropout of arrays (B, ...) at `rate`; the n-th call folds n into the keys. None = no dropout.

    The result takes an array. In a loop, whose body is traced once, it also takes the number of the iteration.
    """
    if keys is None or rate == 0:
        return lambda x, turn=None: x
    calls = itertools.count()

    def drop(x: jax.Array, turn: jax.Array | None = None) -> jax.Array:
        folded = keys
        for number in (next(calls),) if turn is None else (next(calls), turn):
            folded = jax.vmap(jax.random.fold_in, (0, None))(folded, number)
        return dropped(x, folded, 1 - rate)

    return drop
