"""The language model: a Llama-family decoder whose KV cache is an argument and a result."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from avg_llava_jax.config import LanguageConfig
from avg_llava_jax.models.attention import HeadsFirst, attend_at, attend_cached, attention
from avg_llava_jax.models.stack import SHALLOW, Remat, stack
from avg_llava_jax.parallel.placement import constrain


class KeyValues(NamedTuple):
    """Keys (after rotation) and values of all layers: (layers, B, S, kv_heads, head_dim) each."""

    k: jax.Array
    v: jax.Array


def rotary(config: LanguageConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, S, 1, head_dim) in fp32 for integer positions (B, S)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if scaling and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling:
        wavelength = 2 * jnp.pi / frequency
        low = scaling.original_max_length / scaling.low_freq_factor
        high = scaling.original_max_length / scaling.high_freq_factor
        smooth = (scaling.original_max_length / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        bent = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        frequency = jnp.where(
            wavelength > low, frequency / scaling.factor, jnp.where(wavelength < high, frequency, bent)
        )
    angle = positions[..., None].astype(jnp.float32) * jnp.concatenate([frequency, frequency])
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of x (B, S, heads, head_dim), first half paired with second half."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


class Linear(nn.Dense):
    """`nn.Dense`, also with an int8 kernel (in, out) and its scales (out,), see `weights.quantize`: x @ (q * s).

    The scales are taken out of the sum, y = (x @ q) * s: weights stay int8 in memory, XLA converts what it multiplies.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.has_variable("params", "kernel_scale"):
            return super().__call__(x)
        y = x @ self.get_variable("params", "kernel").astype(x.dtype)
        y = y * self.get_variable("params", "kernel_scale")
        return y + self.get_variable("params", "bias") if self.use_bias else y


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer: (B, S, D) -> the same shape, and this layer's new keys and values.

    Of a cache that is `HeadsFirst` these are the whole cache: written before it is read, it is updated in place.
    With `only` (B,) the output is that of one position a row, (B, 1, D); keys and values are those of all. It is not
    for a cache that is `HeadsFirst`.
    """

    config: LanguageConfig

    @nn.compact
    def __call__(self, x, rope, cached, cache, only=None):
        config = self.config
        y = nn.RMSNorm(config.norm_eps, name="norm1")(x)

        def heads(name: str, count: int) -> jax.Array:
            y_out = Linear(count * config.head_dim, use_bias=config.attention_bias, name=name)(y)
            return rearrange(y_out, "b s (h d) -> b s h d", h=count)

        new = k, v = rotate(heads("k", config.kv_heads), *rope), heads("v", config.kv_heads)
        if only is not None:
            x, y, *rope = (jnp.take_along_axis(part, _like(only, part), axis=1) for part in (x, y, *rope))
        q = rotate(heads("q", config.heads), *rope)
        if only is not None:
            y = attend_at(q, new, cache, cached, only)
        elif cache is None:
            y = attention(q, k, v, causal=True)
        elif isinstance(cache, HeadsFirst):
            new = cache.grown(k, v, cached)
            y = new.attend(q, cached + 1)
        else:
            y = attend_cached(q, new, cache, cached)
        y = Linear(config.width, use_bias=config.attention_bias, name="out")(rearrange(y, "b s h d -> b s (h d)"))
        x = constrain(x + y, "batch", None, None)

        y = nn.RMSNorm(config.norm_eps, name="norm2")(x)
        gate = Linear(config.mlp_width, use_bias=False, name="gate")(y)
        up = Linear(config.mlp_width, use_bias=False, name="up")(y)
        y = Linear(config.width, use_bias=False, name="down")(jax.nn.silu(gate) * up)
        return constrain(x + y, "batch", None, None), new


def _like(at: jax.Array, x: jax.Array) -> jax.Array:
    """Positions (B,) with as many axes as x (B, S, ...)."""
    return at.reshape(-1, *[1] * (x.ndim - 1))


class LanguageModel(nn.Module):
    """Embeddings in, hidden states out; `embed` and `unembed` stand at the two ends.

    Compute happens in the parameters' dtype; of quantized ones, in that of their scales.
    """

    config: LanguageConfig
    remat: Remat = "none"

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(config.width**-0.5)
        self.embedding = self.param("embed", init, (config.vocab_size, config.width))
        by_layer = (nn.broadcast, nn.broadcast, 0)  # rope, cached, cache
        self.layers = stack(DecoderLayer, config.layers, self.remat, by_layer)(config)
        self.norm = nn.RMSNorm(config.norm_eps)
        if not config.tied_embeddings:
            self.head = Linear(config.vocab_size, use_bias=False, name="unembed")

    def embed(self, ids: jax.Array) -> jax.Array:
        """Token ids (...) -> raw embeddings (..., D)."""
        # The table is gathered along its width first: rows of the batch and columns of the table lie on the same axis.
        rows = constrain(self.embedding, "vocab", None)[ids]
        if self.has_variable("params", "embed_scale"):
            scale = self.get_variable("params", "embed_scale")
            rows = rows.astype(scale.dtype) * scale[ids][..., None]
        return constrain(rows, "batch", *[None] * ids.ndim)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (..., D) -> logits (..., V) in fp32."""
        if not self.config.tied_embeddings:
            logits = self.head(hidden)
        else:
            logits = hidden @ self.embedding.T.astype(hidden.dtype)
            if self.has_variable("params", "embed_scale"):
                logits = logits * self.get_variable("params", "embed_scale")
        return constrain(logits.astype(jnp.float32), "batch", *[None] * (hidden.ndim - 2), "vocab")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        cache: KeyValues | None = None,
        cached: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Right-padded embeddings through all layers and the last norm.

        Padding needs no mask: it lies to the right of every real token, and attention is causal.

        Args:
          x: (B, S, D); positions: int (B, S), 0..S-1 if not given.
          cache: earlier keys and values, (layers, B, C, kv_heads, head_dim), of which the first `cached` (B,)
            are real; None for a sequence from its start.
        Returns:
          hidden (B, S, D), and the keys and values of these S tokens alone (see `extend`).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        x, new = self.layers(x, rotary(self.config, positions), cached, None if cache is None else tuple(cache))
        return self.norm(x), KeyValues(*new)


def read(
    config: LanguageConfig,
    params: dict[str, Any],
    x: jax.Array,
    only: jax.Array,
    positions: jax.Array | None = None,
    cache: KeyValues | None = None,
    cached: jax.Array | None = None,
) -> tuple[jax.Array, KeyValues]:
    """`LanguageModel` where one hidden state a row is asked for: hidden (B, D) at position `only` (B,) of x (B, S, D).

    The last layer forms no other: it is spared its MLP, two of its four projections and nearly all of its attention.
    `params` are the language model's, layers stacked. All else is as there, the keys and values of all S positions too.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    rope, layer = rotary(config, positions), DecoderLayer(config)

    def run(x: jax.Array, number: jax.Array | int, only: jax.Array | None = None) -> tuple[jax.Array, Any]:
        # Taken by number in the loop: the stacked parameters are never cut in two, which would copy them.
        stacked = params["layers"], None if cache is None else tuple(cache)
        one, old = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), stacked)
        return layer.apply({"params": one}, x, rope, cached, old, only)

    last = config.layers - 1
    x, before = jax.lax.scan(run, x, jnp.arange(last), unroll=config.layers <= SHALLOW)
    x, new = run(x, last, only)
    joined = (jnp.concatenate([some, one[None]]) for some, one in zip(before, new, strict=True))
    return nn.RMSNorm(config.norm_eps).apply({"params": params["norm"]}, x)[:, 0], KeyValues(*joined)


def apart(cache: KeyValues) -> list[HeadsFirst]:
    """A cache of all layers as a list with one a layer."""
    k, v = (rearrange(part, "n b c g d -> n b g c d") for part in cache)
    return [HeadsFirst(k[at], v[at]) for at in range(len(k))]


def positions_of(cache: KeyValues | list[HeadsFirst], at: jax.Array) -> KeyValues:
    """Keys and values at positions `at`, int (B, S), of each sequence: (layers, B, S, kv_heads, head_dim) each."""
    if isinstance(cache, KeyValues):
        return KeyValues(*(jnp.take_along_axis(part, at[None, ..., None, None], axis=2) for part in cache))
    parts = [[jnp.take_along_axis(part, at[:, None, :, None], axis=2) for part in layer] for layer in cache]
    return KeyValues(*(rearrange(part, "n b g s d -> n b s g d") for part in map(jnp.stack, zip(*parts, strict=True))))


def layer_by_layer(
    config: LanguageConfig,
    params: dict[str, Any],
    x: jax.Array,
    cache: Sequence[HeadsFirst],
    cached: jax.Array,
) -> tuple[jax.Array, list[HeadsFirst]]:
    """`LanguageModel` on one new token a row, x (B, 1, D), with its layers as a tuple and their caches `apart`.

    In a loop over tokens on a CPU, where a scan over stacked layers copies each before it is read, this takes half of
    the time. The caches that it returns are apart too.
    """
    rope, new = rotary(config, cached[:, None]), []
    for layer, old in zip(params["layers"], cache, strict=True):
        x, grown = DecoderLayer(config).apply({"params": layer}, x, rope, cached, old)
        new.append(grown)
    return nn.RMSNorm(config.norm_eps).apply({"params": params["norm"]}, x), new


def extend(cache: KeyValues, new: KeyValues, cached: jax.Array) -> KeyValues:
    """Write new keys and values behind the first `cached` (B,) entries of each sequence's cache.

    cache (layers, B, C, ...), new (layers, B, S, ...): row b gets positions cached[b] .. cached[b] + S - 1.
    """

    def write(old: jax.Array, fresh: jax.Array) -> jax.Array:
        def row(o, f, at):
            return jax.lax.dynamic_update_slice_in_dim(o, f, at, axis=1)

        return jax.vmap(row, in_axes=(1, 1, 0), out_axes=1)(old, fresh.astype(old.dtype), cached)

    return KeyValues(write(cache.k, new.k), write(cache.v, new.v))
