"""The KV cache: one layout, one write, one view, for prompts and answers, for one sequence and for many slots.

A layer's keys are (slots, KV, C, d): head by head in one piece, which is how decoding reads them. A *slot* is the row
of one sequence, C its capacity in positions. `Span` says where the tokens of a batch stand in it:

    slot  [2, 0]   start [3, 0]   S = 2      row 0 writes positions 3 and 4 of slot 2, row 1 positions 0 and 1 of slot 0

What lies behind a row's last position is never attended to, so that padding may be written there, and is overwritten.
A row whose slot or start lies outside the cache writes nothing.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avg_llava_jax.placement import constrain


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the S tokens of each row of a batch stand.

    start: int (B,), position of a row's first token.
    slot: int (B,), each row's slot; None = row i is slot i.
    window: positions of a slot that are attended to, a static bound on start + S; None = all of its capacity; 0 = none
        of them: every row starts at 0, and attends to its own tokens alone.
    """

    start: jax.Array
    slot: jax.Array | None = None
    window: int | None = None


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer: (slots, KV, C, d) each."""

    k: jax.Array
    v: jax.Array

    def write(self, k: jax.Array, v: jax.Array, span: Span) -> "LayerCache":
        """The cache with new keys and values (B, S, KV, d) where `span` says; updated in place where it is donated."""
        return LayerCache(_write(self.k, k, span), _write(self.v, v, span))

    def view(self, span: Span, rows: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a batch of `rows` rows: the first W = `window` positions of each, (B, KV, W, d)."""
        return _view(self.k, span, rows), _view(self.v, span, rows)


Cache = tuple[LayerCache, ...]
"""One entry a layer."""


def spread(cache: Cache) -> Cache:
    """The cache laid out over the mesh: slots along the batch, heads along `tensor`."""
    return jax.tree.map(lambda part: constrain(part, "batch", "heads", None, None), cache)


def _write(cache: jax.Array, new: jax.Array, span: Span) -> jax.Array:
    new = new.swapaxes(1, 2).astype(cache.dtype)  # (B, KV, S, d)
    rows = jnp.arange(len(new)) if span.slot is None else span.slot
    if span.slot is None and len(new) == len(cache):
        # Row by row, so that each device of a mesh writes its own slots.
        return jax.vmap(lambda one, new, start: _put(one[None], new[None], jnp.zeros(1, int), start[None])[0])(
            cache, new, span.start
        )
    return _put(cache, new, rows, span.start)


def _put(cache: jax.Array, new: jax.Array, slot: jax.Array, start: jax.Array) -> jax.Array:
    """A window (KV, S, d) of `new` (B, KV, S, d) into each slot (B,) from `start` (B,) on; one outside is dropped."""
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


def _view(cache: jax.Array, span: Span, rows: int) -> jax.Array:
    window = cache.shape[2] if span.window is None else span.window
    if span.slot is None:
        return cache[:rows, :, :window]
    return cache.at[span.slot, :, :window].get(mode="clip")
