"""The KV cache: one layout, one write, one view, for prefill and decode, for one sequence and for many slots.

A layer's keys are (slots, K, C, d): each head is contiguous, as decoding reads it. A *slot* holds one sequence; C is
its capacity in positions. `Span` names the slot and the positions of each row of a batch:

    slot  [2, 0]   start [3, 0]   S = 2      row 0 writes positions 3 and 4 of slot 2, row 1 positions 0 and 1 of slot 0

Positions after a row's last token are never attended to: padding may be written there, and later tokens overwrite it.
A row whose slot or start lies outside the cache writes nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from avg_llava_jax.placement import constrain


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the S tokens of each row of a batch stand in the cache.

    start: position of each row's first token.
    slot: each row's slot; None = row i is slot i.
    window: F, the static number of a slot's first positions that are attended to, at least start + S; None = the
        whole capacity; 0 = none: every row starts at 0, and attends only to its own tokens.
    """

    start: Int[ArrayLike, " B"]
    slot: Int[ArrayLike, " B"] | None = None
    window: int | None = None


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer."""

    k: Float[Array, "slots K C d"]
    v: Float[Array, "slots K C d"]

    def write(self, k: Float[ArrayLike, "B S K d"], v: Float[ArrayLike, "B S K d"], span: Span) -> "LayerCache":
        """Write new keys and values at `span`; a donated cache is updated in place."""
        return LayerCache(_write(self.k, k, span), _write(self.v, v, span))

    def view(self, span: Span, rows: int) -> tuple[Float[Array, "B K F d"], Float[Array, "B K F d"]]:
        """Keys and values of the first F = `span.window` positions of each of B = `rows` rows."""
        return _view(self.k, span, rows), _view(self.v, span, rows)


Cache = tuple[LayerCache, ...]
"""One `LayerCache` per layer."""


def spread(cache: Cache) -> Cache:
    """Constrain the cache to the mesh: slots along the batch axes, heads along `tensor`."""
    return jax.tree.map(lambda part: constrain(part, "batch", "heads", None, None), cache)


def _write(
    cache: Float[ArrayLike, "slots K C d"], new: Float[ArrayLike, "B S K d"], span: Span
) -> Float[Array, "slots K C d"]:
    new = new.swapaxes(1, 2).astype(cache.dtype)  # (B, K, S, d)
    rows = jnp.arange(len(new)) if span.slot is None else span.slot
    if span.slot is None and len(new) == len(cache):
        # One write per row, so that each device of a mesh writes its own slots.
        return jax.vmap(lambda one, new, start: _put(one[None], new[None], jnp.zeros(1, int), start[None])[0])(
            cache, new, span.start
        )
    return _put(cache, new, rows, span.start)


def _put(
    cache: Float[ArrayLike, "slots K C d"],
    new: Float[ArrayLike, "B K S d"],
    slot: Int[ArrayLike, " B"],
    start: Int[ArrayLike, " B"],
) -> Float[Array, "slots K C d"]:
    """Write `new` to its slots from positions `start`; rows outside are dropped."""
    return jax.lax.scatter(
        cache,
        jnp.stack([slot, start], axis=-1).astype(jnp.int32),
        new,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 2)
        ),
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def _view(cache: Float[ArrayLike, "slots K C d"], span: Span, rows: int) -> Float[Array, "B K F d"]:
    window = cache.shape[2] if span.window is None else span.window
    if span.slot is None:
        return cache[:rows, :, :window]
    return cache.at[span.slot, :, :window].get(mode="clip")
