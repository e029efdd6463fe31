"""Special cases of one CPU device: its caches are small, copies are expensive, and slices of host arrays are free.

Each is reached through an interface that accelerators use too: `attention`, `linear`, `language.unstack`,
`avg_llava.encode_images`, `avg_llava.route`, `training.optimizer.gradients`, `training.feedback.measure_batch`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from avg_llava_jax import placement
from avg_llava_jax.models.cache import LayerCache, Span

BLOCK, MOST_BLOCKS = 192, 16
"""Queries per block, and the most blocks of a sequence: every block is compiled separately."""

PATCHES = 512
"""Tiles with at least this many patches are encoded one by one: products are as fast, and activations fit the CPU's
cache. Saves 6 % of the time of a ViT-B at 336 pixels."""

TRAINING_ROWS, FORWARD_ROWS = 2, 4
"""Rows of a batch that a training step, and a frozen model or router, compute at a time: activations stay in the CPU's
cache, and the system need not allocate hundreds of MB at every step. A router's step takes 0.6 times as long, phase one
0.75 times, routing 32 images 0.6 times."""


def here() -> bool:
    """Whether the program being compiled runs on one CPU device."""
    return placement.platform() == ("cpu", 1)


def part_count(rows: int, most: int) -> int:
    """The fewest equal parts of a batch with at most `most` rows each; 1 if this is not one CPU device.

    With most = 2: 16 rows -> 8 parts, 5 rows -> 5 parts.
    """
    if not here():
        return 1
    return next(count for count in range(-(-rows // most), rows + 1) if rows % count == 0)


def by_parts(function: Callable[[Any], Any], batch: Any, most: int) -> Any:
    """`function` of a batch; both it and the result are trees of arrays (B, ...). On one CPU, `most` rows at a time."""
    rows = len(jax.tree.leaves(batch)[0])
    count = part_count(rows, most)
    if count == 1:
        return function(batch)
    split = jax.tree.map(lambda x: x.reshape(count, rows // count, *x.shape[1:]), batch)
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), jax.lax.map(function, split))


def product(x: Float[ArrayLike, "*M in"], kernel: Float[ArrayLike, "in out"]) -> Float[Array, "*M out"]:
    """x @ kernel, on one CPU over one axis of rows.

    For the gradient of the kernel, XLA for CPUs would transpose rows of several axes one element at a time.
    """
    x = jnp.asarray(x)
    if not here():
        return x @ kernel
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return (rows @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def self_attention(
    q: Float[ArrayLike, "B S Q d"],
    k: Float[ArrayLike, "B S K d"],
    v: Float[ArrayLike, "B S K d"],
    causal: bool,
    ids: Int[ArrayLike, "B S"] | None = None,
    reach: int | None = None,
) -> Float[Array, "B S Q d"]:
    """`attention.self_attention`, one head of one sample at a time. ids, reach: of its segments.

    A causal block reads only the keys within reach, up to its end: without segments that saves nearly half of the work.
    The backward pass recomputes scores, which is cheaper than loading them from memory.
    """
    batch, length, heads, _ = q.shape
    positions = jnp.arange(length)

    def by_head(x: jax.Array) -> jax.Array:
        x = jnp.repeat(x, heads // x.shape[2], axis=2)
        return rearrange(x, "b s h d -> (b h) s d")

    @jax.checkpoint
    def one(head: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, *own = head
        return _by_blocks(q, k, v, positions if causal else None, causal, *own, reach=reach)

    given = [by_head(q * q.shape[-1] ** -0.5), by_head(k), by_head(v)]
    if ids is not None:
        given.append(jnp.repeat(ids, heads, axis=0))
    out = jax.lax.map(one, tuple(given))
    return rearrange(out, "(b h) s d -> b s h d", b=batch)


def cached_attention(
    q: Float[ArrayLike, "B S Q d"], cache: LayerCache, span: Span, positions: Int[ArrayLike, "B S"]
) -> Float[Array, "B S Q d"]:
    """`attention.cached_attention`, one head of one row at a time: keys are sliced from the cache without a copy."""
    batch, _, heads, width = q.shape
    groups, capacity = cache.k.shape[1:3]
    window, shared = span.window or capacity, heads // groups
    slot = jnp.arange(batch) if span.slot is None else span.slot

    def one(head: tuple[jax.Array, ...]) -> jax.Array:
        q, slot, group, positions = head
        k, v = (
            jax.lax.dynamic_slice(part, (slot, group, 0, 0), (1, 1, window, width))[0, 0] for part in (cache.k, cache.v)
        )
        return _by_blocks(q, k, v, positions)

    out = jax.lax.map(
        one,
        (
            rearrange(q * width**-0.5, "b s (g r) d -> (b g) (s r) d", r=shared),
            jnp.repeat(slot, groups),
            jnp.tile(jnp.arange(groups), batch),
            jnp.repeat(jnp.repeat(positions, shared, axis=1), groups, axis=0),
        ),
    )
    return rearrange(out, "(b g) (s r) d -> b s (g r) d", b=batch, r=shared)


def _by_blocks(
    q: Float[ArrayLike, "S d"],
    k: Float[ArrayLike, "C d"],
    v: Float[ArrayLike, "C d"],
    positions: Int[ArrayLike, " S"] | None,
    own: bool = False,
    ids: Int[ArrayLike, " S"] | None = None,
    reach: int | None = None,
) -> Float[Array, "S d"]:
    """Attention of one head in blocks of queries.

    positions: the last key that each query attends to; None = all of them. own: positions are 0 .. S - 1, so
    that a block reads no key after its end. ids, reach: with `own`, see `attention.Segments`.
    """
    length, rows = len(q), []
    block = math.ceil(length / min(math.ceil(length / BLOCK), MOST_BLOCKS))
    for start in range(0, length, block):
        stop = min(start + block, length)
        seen = slice(0 if reach is None else max(0, start - reach + 1), stop if own else len(k))
        scores = jnp.einsum("qd,kd->qk", q[start:stop], k[seen], preferred_element_type=jnp.float32)
        if positions is not None:
            mask = jnp.arange(seen.start, seen.stop) <= positions[start:stop, None]
            if ids is not None:
                mask &= ids[seen] == ids[start:stop, None]
            scores = scores + jnp.where(mask, 0.0, -jnp.inf)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        rows.append((weights.astype(v.dtype) @ v[seen] / total).astype(v.dtype))
    return jnp.concatenate(rows)


def encode(
    one_batch: Callable[[jax.Array], jax.Array], pixels: UInt8[ArrayLike, "M H W 3"], patches: int
) -> Float[Array, "M P E"]:
    """`one_batch` of pixels; tile by tile where a tile has at least `PATCHES` patches."""
    if here() and patches >= PATCHES:
        return jax.lax.map(lambda tile: one_batch(tile[None])[0], pixels)
    return one_batch(pixels)


def unstack(layers: Any) -> tuple[Any, ...] | None:
    """Stacked layers as a tuple of views that share their memory; None if they are not on one CPU device.

    The caller must keep the stacked arrays. Slicing on the device would copy; slicing the host's view does not.
    """
    leaves = jax.tree.leaves(layers)
    if any(not isinstance(leaf, jax.Array) or leaf.device != jax.devices("cpu")[0] for leaf in leaves):
        return None
    host = jax.device_get(layers)
    return tuple(
        jax.device_put(jax.tree.map(lambda leaf: leaf[at], host), may_alias=True)  # noqa: B023
        for at in range(len(leaves[0]))
    )
