"""The KV cache: a layout for each platform, one write, one view, for prefill and decode, for one or many slots.

A layer's keys are (slots, K, C, d): each head is contiguous, as decoding reads it. On TPUs they are (slots, C, K, d),
as XLA writes a position there; a cache in the other layout is copied into every loop over tokens, and out again. A
*slot* holds one sequence; C is its capacity in positions. `Span` names slot and positions of each row of a batch:

    slot  [2, 0]   start [3, 0]   S = 2      row 0 writes positions 3 and 4 of slot 2, row 1 positions 0 and 1 of slot 0

Positions after a row's last token are never attended to: padding may be written there, and later tokens overwrite it.
A row whose slot or start lies outside the cache writes nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from avg_llava_jax.config import LanguageConfig
from avg_llava_jax.placement import constrain, platform


@dataclasses.dataclass(frozen=True)
class Span:
    """The cache positions of the S tokens of each row of a batch.

    start: position of each row's first token.
    slot: each row's slot; None = row i is slot i.
    window: F, the static number of a slot's first positions that are attended to, at least start + S; None = the
        whole capacity; 0 = none: every row starts at 0, and attends only to its own tokens.
    """

    start: Int[ArrayLike, " B"]
    slot: Int[ArrayLike, " B"] | None = None
    window: int | None = None


def positions_first() -> bool:
    """Whether a layer's keys are stored as (slots, C, K, d), see the module."""
    return platform()[0] == "tpu"


def axes() -> tuple[str | None, ...]:
    """The logical axes of a layer's keys, see `placement`: slots along the batch axes, heads along `tensor`."""
    return ("batch", None, "heads", None) if positions_first() else ("batch", "heads", None, None)


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer: (slots, K, C, d), or (slots, C, K, d) on TPUs."""

    k: Float[Array, "slots _ _ d"]
    v: Float[Array, "slots _ _ d"]

    @property
    def capacity(self) -> int:
        """C, the positions of a slot."""
        return self.k.shape[_axis_of_positions()]

    def write(self, k: Float[ArrayLike, "B S K d"], v: Float[ArrayLike, "B S K d"], span: Span) -> "LayerCache":
        """Write new keys and values at `span`; a donated cache is updated in place."""
        return LayerCache(_write(self.k, k, span), _write(self.v, v, span))

    def view(self, span: Span, rows: int) -> tuple[Float[Array, "B K F d"], Float[Array, "B K F d"]]:
        """Keys and values of the first F = `span.window` positions of each of B = `rows` rows."""
        return _view(self.k, span, rows), _view(self.v, span, rows)

    def copied(self, source: Int[ArrayLike, " B"], target: Int[ArrayLike, " B"], window: int) -> "LayerCache":
        """Copy the first `window` positions of slots `source` to slots `target`; a target outside is dropped."""
        at = (target, *_first(window))
        return LayerCache(*(part.at[at].set(_taken(part, source, window), mode="drop") for part in self))


Cache = tuple[LayerCache, ...]
"""One `LayerCache` per layer."""


def empty_cache(config: LanguageConfig, slots: int, capacity: int, dtype: Any) -> Cache:
    """A cache of zeros."""
    sizes = (capacity, config.kv_heads) if positions_first() else (config.kv_heads, capacity)
    shape = (slots, *sizes, config.head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers))


def constrain_cache(cache: Cache) -> Cache:
    """Constrain the cache to the mesh, see `axes`."""
    return jax.tree.map(lambda part: constrain(part, *axes()), cache)


def _axis_of_positions() -> int:
    return 1 if positions_first() else 2


def _first(window: int | None) -> tuple[slice, ...]:
    """The index, behind the slot's, of the first `window` positions; None = all."""
    return (slice(window),) if positions_first() else (slice(None), slice(window))


def _write(
    cache: Float[ArrayLike, "slots _ _ d"], new: Float[ArrayLike, "B S K d"], span: Span
) -> Float[Array, "slots _ _ d"]:
    new = (new if positions_first() else new.swapaxes(1, 2)).astype(cache.dtype)
    rows = jnp.arange(len(new)) if span.slot is None else span.slot
    if span.slot is None and len(new) == len(cache):
        # One write per row, so that each device of a mesh writes its own slots.
        return jax.vmap(lambda one, new, start: _put(one[None], new[None], jnp.zeros(1, int), start[None])[0])(
            cache, new, span.start
        )
    return _put(cache, new, rows, span.start)


def _put(
    cache: Float[ArrayLike, "slots _ _ d"],
    new: Float[ArrayLike, "B _ _ d"],
    slot: Int[ArrayLike, " B"],
    start: Int[ArrayLike, " B"],
) -> Float[Array, "slots _ _ d"]:
    """Write `new`, axes as the cache's, to its slots from positions `start`; rows outside are dropped."""
    return jax.lax.scatter(
        cache,
        jnp.stack([slot, start], axis=-1).astype(jnp.int32),
        new,
        jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, _axis_of_positions()),
        ),
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def _view(cache: Float[ArrayLike, "slots _ _ d"], span: Span, rows: int) -> Float[Array, "B K F d"]:
    seen = cache[slice(rows), *_first(span.window)] if span.slot is None else _taken(cache, span.slot, span.window)
    return seen.swapaxes(1, 2) if positions_first() else seen


def _taken(
    cache: Float[ArrayLike, "slots _ _ d"], slot: Int[ArrayLike, " B"], window: int | None
) -> Float[Array, "B _ _ d"]:
    return cache.at[(slot, *_first(window))].get(mode="clip")
