"""Softmax attention over a whole sequence, or over a cache, by the fastest way the platform has."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from avg_llava_jax.models.flash import flash_attention

BLOCK, MOST_BLOCKS = 192, 16
"""Queries whose scores a CPU forms at once, and into how many blocks a sequence is cut at most: each is compiled."""


class HeadsFirst(NamedTuple):
    """Keys and values of one layer, (B, KV, C, d) each, as decoding on a CPU reads them: each head's in one piece."""

    k: jax.Array
    v: jax.Array

    def grown(self, k: jax.Array, v: jax.Array, at: jax.Array) -> "HeadsFirst":
        """With those of one token a row, (B, 1, KV, d), at positions `at` (B,)."""
        rows, heads = jnp.arange(len(at))[:, None], jnp.arange(k.shape[2])
        return HeadsFirst(
            self.k.at[rows, heads, at[:, None]].set(k[:, 0]), self.v.at[rows, heads, at[:, None]].set(v[:, 0])
        )

    def attend(self, q: jax.Array, count: jax.Array) -> jax.Array:
        """Attention of one token a row, q (B, 1, H, d), over the first `count` (B,) entries: the same shape.

        Behind 3000 tokens a sixth of the time of `attend_cached`, which copies each head's keys out of their layer.
        """
        q = rearrange(q, "b 1 (g r) d -> b g r d", g=self.k.shape[1]) * q.shape[-1] ** -0.5
        scores = jnp.einsum("bgrd,bgcd->bgrc", q, self.k, preferred_element_type=jnp.float32)
        real = jnp.arange(self.k.shape[2]) < count[:, None]
        weights = jax.nn.softmax(jnp.where(real[:, None, None], scores, -jnp.inf), axis=-1)
        out = jnp.einsum("bgrc,bgcd->bgrd", weights.astype(self.v.dtype), self.v)
        return rearrange(out, "b g r d -> b 1 (g r) d")


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """q (B, S, H, d) over k, v (B, S, KV, d), KV a divisor of H -> (B, S, H, d).

    In bfloat16 a flash kernel, which never forms the S x S scores in memory: on a TPU, and on a GPU for heads of at
    most 128. Otherwise plain XLA.
    The platform is that of the mesh in use (`jax.set_mesh`), which may be compiled for without being there.
    """
    if on_one_cpu():
        return _block_by_block(q, k, v, causal)
    platform, _ = _platform()
    if platform == "tpu" and q.dtype == jnp.bfloat16:
        return flash_attention(q, k, v, causal)
    head_dim = q.shape[-1]  # cuDNN takes these on every GPU since Ampere
    cudnn = platform in ("gpu", "cuda") and q.dtype == jnp.bfloat16 and head_dim % 8 == 0 and head_dim <= 128
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn" if cudnn else "xla")


def on_one_cpu() -> bool:
    """Whether what is compiled runs on one CPU device, whose caches are small and whose copies are dear."""
    return _platform() == ("cpu", 1)


def _platform() -> tuple[str, int]:
    """What is compiled for, and how many devices of it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend(), jax.device_count()
    return mesh.abstract_device.platform, mesh.size


def _block_by_block(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """One head of one sample at a time, about `BLOCK` queries of it: scores that fit a CPU's cache.

    Of a causal block only the keys up to its end are read, which saves nearly half of the work. Scores are formed again
    in the backward pass, which is cheaper than reading them back.
    """
    batch, length, heads, _ = q.shape
    block = math.ceil(length / min(math.ceil(length / BLOCK), MOST_BLOCKS))

    def by_head(x: jax.Array) -> jax.Array:
        x = jnp.repeat(x, heads // x.shape[2], axis=2)
        return rearrange(x, "b s h d -> (b h) s d")

    @jax.checkpoint
    def one(head: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = head
        rows = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            seen = stop if causal else length
            scores = jnp.einsum("qd,kd->qk", q[start:stop], k[:seen], preferred_element_type=jnp.float32)
            if causal:
                scores = scores + jnp.where(jnp.tri(stop - start, seen, start, dtype=bool), 0.0, -jnp.inf)
            weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
            total = jnp.sum(weights, axis=-1, keepdims=True)
            rows.append((weights.astype(v.dtype) @ v[:seen] / total).astype(v.dtype))
        return jnp.concatenate(rows)

    out = jax.lax.map(one, (by_head(q * q.shape[-1] ** -0.5), by_head(k), by_head(v)))
    return rearrange(out, "(b h) s d -> b s h d", b=batch)


def attend_at(
    q: jax.Array,
    new: tuple[jax.Array, jax.Array],
    cache: tuple[jax.Array, jax.Array] | None,
    cached: jax.Array | None,
    at: jax.Array,
) -> jax.Array:
    """Attention of one new token a row: what `attention` (causal), or `attend_cached` gives at its place.

    Args:
      q: (B, 1, H, d), at position `at` (B,) among the new; new: k, v (B, S, KV, d).
      cache: k, v (B, C, KV, d) before them, of which the first `cached` (B,) are real, or None.
    Returns: (B, 1, H, d).
    """
    real = jnp.arange(new[0].shape[1]) <= at[:, None]
    if cache is not None:
        new = tuple(jnp.concatenate(parts, axis=1) for parts in zip(cache, new, strict=True))
        real = jnp.concatenate([jnp.arange(cache[0].shape[1]) < cached[:, None], real], axis=1)
    return jax.nn.dot_product_attention(q, *new, mask=real[:, None, None])


def attend_cached(
    q: jax.Array, new: tuple[jax.Array, jax.Array], cache: tuple[jax.Array, jax.Array], cached: jax.Array
) -> jax.Array:
    """Attention of new tokens over a cache and over themselves, without joining the two in memory.

    Args:
      q: (B, S, H, d); new: k, v (B, S, KV, d), causal among themselves.
      cache: k, v (B, C, KV, d) of which the first `cached` (B,) entries are real.
    Returns: (B, S, H, d).
    """
    way = _cached_by_head if on_one_cpu() else _cached_at_once
    return way(q, *new, *cache, cached)


def _cached_at_once(
    q: jax.Array, k: jax.Array, v: jax.Array, old_k: jax.Array, old_v: jax.Array, cached: jax.Array
) -> jax.Array:
    """`attend_cached`, all heads in one product."""
    steps = q.shape[1]
    q = rearrange(q, "b s (g r) d -> b s g r d", g=k.shape[2]) * q.shape[-1] ** -0.5
    old = jnp.einsum("bsgrd,bcgd->bgrsc", q, old_k, preferred_element_type=jnp.float32)
    real = jnp.arange(old_k.shape[1]) < cached[:, None]
    old = jnp.where(real[:, None, None, None], old, -jnp.inf)
    own = jnp.einsum("bsgrd,bcgd->bgrsc", q, k, preferred_element_type=jnp.float32)
    own = jnp.where(jnp.tri(steps, dtype=bool), own, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([old, own], axis=-1), axis=-1).astype(v.dtype)
    out = jnp.einsum("bgrsc,bcgd->bsgrd", weights[..., :-steps], old_v)
    out = out + jnp.einsum("bgrsc,bcgd->bsgrd", weights[..., -steps:], v)
    return rearrange(out, "b s g r d -> b s (g r) d")


def _cached_by_head(
    q: jax.Array, k: jax.Array, v: jax.Array, old_k: jax.Array, old_v: jax.Array, cached: jax.Array
) -> jax.Array:
    """`attend_cached`, one head of one sample at a time: its scores fit a CPU's cache, and its keys are read in place.

    A quarter of the time for 256 new tokens behind 3000, the same for one; a third for one each in 8 samples.
    """
    batch, steps, heads, width = q.shape
    capacity, groups = old_k.shape[1:3]
    shared = heads // groups
    causal = jnp.repeat(jnp.where(jnp.tri(steps, dtype=bool), 0.0, -jnp.inf), shared, axis=0)
    real = jnp.where(jnp.arange(capacity) < cached[:, None], 0.0, -jnp.inf)

    def one(head: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, row, group = head
        before_k, before_v = (
            jax.lax.dynamic_slice(x, (row, 0, group, 0), (1, capacity, 1, width))[0, :, 0] for x in (old_k, old_v)
        )
        old = jnp.einsum("qd,kd->qk", q, before_k, preferred_element_type=jnp.float32) + real[row]
        own = jnp.einsum("qd,kd->qk", q, k, preferred_element_type=jnp.float32) + causal
        largest = jnp.maximum(jnp.max(old, axis=-1), jnp.max(own, axis=-1))[:, None]
        old, own = jnp.exp(old - largest), jnp.exp(own - largest)
        total = (jnp.sum(old, axis=-1) + jnp.sum(own, axis=-1))[:, None]
        return ((old.astype(v.dtype) @ before_v + own.astype(v.dtype) @ v) / total).astype(v.dtype)

    by_head = (
        rearrange(q * width**-0.5, "b s (g r) d -> (b g) (s r) d", r=shared),
        *(rearrange(x, "b s g d -> (b g) s d") for x in (k, v)),
        jnp.repeat(jnp.arange(batch), groups),
        jnp.tile(jnp.arange(groups), batch),
    )
    return rearrange(jax.lax.map(one, by_head), "(b g) (s r) d -> b s (g r) d", b=batch, s=steps)
