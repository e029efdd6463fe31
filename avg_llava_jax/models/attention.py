"""Softmax attention: of sequences over themselves, and of new tokens over a cache, with the platform's fastest kernel.

Layers call `self_attention` and `cached_attention`; `kernel_for` chooses the kernel. Queries, keys and values have the
projections' layout, (B, S, heads, d); a cache has another layout (see `cache`).
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from avg_llava_jax import placement
from avg_llava_jax.models import one_cpu
from avg_llava_jax.models.cache import LayerCache, Span
from avg_llava_jax.models.flash import flash_attention

Kernel = Literal["splash", "cudnn", "one_cpu", "blocks", "dense"]

QUERY_BLOCK = 256
"""Queries in a block: their scores are in memory together if no flash kernel runs."""


class Segments(NamedTuple):
    """Sequences that share rows, one after another.

    ids: which sequence each position belongs to. reach: positions of the longest of them; no query looks further back.
    """

    ids: Int[Array, "B S"]
    reach: int


def kernel_for(platform: str, devices: int, dtype: jnp.dtype, head_dim: int, length: int) -> Kernel:
    """The kernel for a sequence of `length` positions over itself, forward and backward.

        platform         dtype         head_dim               length   kernel
        one CPU device   any           any                    > 256    one_cpu: head by head, scores in the CPU's cache
        TPU              bfloat16      any                    any      splash: JAX's Pallas kernel, padded to its tiles
        GPU              16 bits       <= 128, multiple of 8  any      cudnn: padded to an even length, and masked
        otherwise        any           any                    <= 256   dense: plain XLA, scores in memory
        otherwise        any           any                    more     blocks: dense for 256 queries at a time

    Only `dense` ever holds S x S scores. cuDNN supports longer heads on some GPUs, but JAX checks that on the GPU of
    the tracing machine, which a compilation ahead of time does not have. `length` is the sequence's own;
    `cached_attention` handles a cache.
    """
    if platform == "cpu" and devices == 1 and length > QUERY_BLOCK:
        return "one_cpu"
    if platform == "tpu" and dtype == jnp.bfloat16:
        return "splash"
    if platform in ("gpu", "cuda") and dtype.itemsize == 2 and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    return "dense" if length <= QUERY_BLOCK else "blocks"


def self_attention(
    q: Float[ArrayLike, "B S Q d"],
    k: Float[ArrayLike, "B S K d"],
    v: Float[ArrayLike, "B S K d"],
    causal: bool,
    segments: Segments | None = None,
) -> Float[Array, "B S Q d"]:
    """Attention of a sequence over itself; with `segments`, of several that share a row, each over itself alone.

    With `causal`, a query attends to the positions up to its own; with `segments`, only to those of its segment.
    Segments require `causal`. The mesh in use (`jax.set_mesh`) decides the platform; its devices need not exist when
    a program is compiled for it.
    """
    kernel = kernel_for(*placement.platform(), q.dtype, q.shape[-1], q.shape[1])
    if kernel == "one_cpu":
        return one_cpu.self_attention(q, k, v, causal, *(segments or ()))
    if kernel in ("splash", "cudnn"):
        return by_device(functools.partial(FUSED[kernel], causal=causal), q, k, v, segments)
    return (_in_blocks if kernel == "blocks" else _dense_self_attention)(q, k, v, causal, *(segments or ()))


def cached_attention(
    q: Float[ArrayLike, "B S Q d"], cache: LayerCache, span: Span, positions: Int[ArrayLike, "B S"]
) -> Float[Array, "B S Q d"]:
    """Attention of new tokens over a cache that they are already written to.

    The query at position p of `positions` attends to cache positions 0 .. p of its row; `span` names the
    row's slot and its window F. Scores are (B, Q, S, F): the caller bounds S by prefilling in chunks what
    follows a cached prefix.
    """
    if one_cpu.here():
        return one_cpu.cached_attention(q, cache, span, positions)
    k, v = cache.view(span, len(q))
    mask = jnp.arange(k.shape[2]) <= positions[..., None]
    return dense(q.swapaxes(1, 2), k, v, mask[:, None]).swapaxes(1, 2)


def dense(
    q: Float[ArrayLike, "B Q S d"],
    k: Float[ArrayLike, "B K C d"],
    v: Float[ArrayLike, "B K C d"],
    mask: Bool[ArrayLike, "..."] | None = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "B Q S d"]:
    """Plain XLA attention, softmax in fp32, all scores in memory.

    mask: broadcast to (B, Q, S, C), False = not attended to. drop: dropout of the weights (B, Q, S, C).
    """
    groups, steps = k.shape[1], q.shape[2]
    # Queries that share a key head are grouped: both products are then plain batched matrix products.
    q = rearrange(q * q.shape[-1] ** -0.5, "b (g r) s d -> b g (r s) d", g=groups)
    scores = jnp.einsum("bgmd,bgcd->bgmc", q, k, preferred_element_type=jnp.float32)
    scores = rearrange(scores, "b g (r s) c -> b (g r) s c", s=steps)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = rearrange(weights if drop is None else drop(weights), "b (g r) s c -> b g (r s) c", g=groups)
    return rearrange(jnp.einsum("bgmc,bgcd->bgmd", weights, v), "b g (r s) d -> b (g r) s d", s=steps)


def by_device(
    kernel: Callable[..., jax.Array],
    q: Float[ArrayLike, "B S Q d"],
    k: Float[ArrayLike, "B S K d"],
    v: Float[ArrayLike, "B S K d"],
    segments: Segments | None = None,
) -> Float[Array, "B S Q d"]:
    """A fused kernel on a mesh: each device computes its own samples and heads.

    Queries are sharded as their keys are, so that a query head lies on the device of its key head.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ids, reach = segments or (None, None)
    if mesh.empty or mesh.size == 1:
        return kernel(q, k, v, ids=ids, reach=reach)
    spec = placement.fitting(mesh, placement.spec("batch", None, "heads", None), k.shape)
    specs = (spec,) * 3 + (None if ids is None else jax.sharding.PartitionSpec(*spec[:2]),)

    def on(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        return kernel(q, k, v, ids=ids, reach=reach)

    return jax.shard_map(on, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, ids)


def padded_attention(
    q: Float[ArrayLike, "B S Q d"],
    k: Float[ArrayLike, "B S K d"],
    v: Float[ArrayLike, "B S K d"],
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
    ids: Int[ArrayLike, "B S"] | None = None,
    reach: int | None = None,
) -> Float[Array, "B S Q d"]:
    """`jax.nn.dot_product_attention`, padded to an even length: JAX cannot differentiate cuDNN's at an odd one.

    Padding is on the right, where causal attention does not reach; non-causal attention gets the real length. A CLIP
    encoder's 577 positions become 578. Segments are a mask (B, S, S) in memory: cuDNN's own packed layout is not in
    JAX's public interface.
    """
    length = q.shape[1]
    odd = length % 2
    real = jnp.full(len(q), length, jnp.int32) if odd and not causal else None
    q, k, v = (jnp.pad(x, [(0, 0), (0, odd), (0, 0), (0, 0)]) for x in (q, k, v))
    del reach  # cuDNN has no window together with a mask
    mask = None
    if ids is not None:
        ids = jnp.pad(ids, [(0, 0), (0, odd)])
        mask = (ids[:, :, None] == ids[:, None])[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, key_value_seq_lengths=real, implementation=implementation
    )
    return out[:, :length]


FUSED = {"splash": flash_attention, "cudnn": padded_attention}


def _dense_self_attention(
    q: Float[ArrayLike, "B S Q d"],
    k: Float[ArrayLike, "B S K d"],
    v: Float[ArrayLike, "B S K d"],
    causal: bool,
    ids: Int[ArrayLike, "B S"] | None = None,
    reach: int | None = None,
) -> Float[Array, "B S Q d"]:
    del reach  # all scores are in memory
    mask = jnp.tri(q.shape[1], dtype=bool) if causal else None
    if ids is not None:
        mask = (mask & (ids[:, :, None] == ids[:, None]))[:, None]
    return dense(*(x.swapaxes(1, 2) for x in (q, k, v)), mask).swapaxes(1, 2)


def _in_blocks(
    q: Float[ArrayLike, "B S Q d"],
    k: Float[ArrayLike, "B S K d"],
    v: Float[ArrayLike, "B S K d"],
    causal: bool,
    ids: Int[ArrayLike, "B S"] | None = None,
    reach: int | None = None,
) -> Float[Array, "B S Q d"]:
    """`dense` for `QUERY_BLOCK` queries at a time; the backward pass recomputes their scores.

    With `reach`, a block reads only the keys from its first query's reach to its end.
    """
    length = q.shape[1]
    count = -(-length // QUERY_BLOCK)
    block = -(-length // count)
    seen = length if reach is None else min(length, block + reach - 1)
    q = jnp.pad(q, [(0, 0), (0, count * block - length), (0, 0), (0, 0)])
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    @jax.checkpoint
    def one(part: tuple[jax.Array, ...]) -> jax.Array:
        q, start, *own = part
        first = jnp.clip(start + block - seen, 0, length - seen)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, first, seen, axis=2) for x in (k, v))
        mask = first + jnp.arange(seen) <= start + jnp.arange(block)[:, None] if causal else None
        for each in own:
            theirs = jax.lax.dynamic_slice_in_dim(ids, first, seen, axis=1)
            mask = (mask & (each[..., None] == theirs[:, None]))[:, None]
        return dense(q, keys, values, mask)

    parts = [rearrange(q, "b (n s) h d -> n b h s d", n=count), jnp.arange(count) * block]
    if ids is not None:
        own = jnp.pad(ids, [(0, 0), (0, count * block - length)])
        parts.append(rearrange(own, "b (n s) -> n b s", n=count))
    out = jax.lax.map(one, tuple(parts))
    return rearrange(out, "n b h s d -> b (n s) h d")[:, :length]
