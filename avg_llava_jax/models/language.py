"""The language model: a decoder of the Llama family, Qwen's included.

`decoder` walks its layers for training, scoring, prefill and decode.

    ids (B, S) --embed--> x (B, S, D) --decoder--> hidden (B, S, D) --unembed--> logits (B, S, V)

`params` is a plain nested dict: embed, layers, norm, unembed (absent if embeddings are tied). Layers are stacked
along a first axis and scanned, or a tuple (`unstack`) and unrolled; with a cache they are always unrolled.
Compute runs in the parameters' dtype; for quantized parameters, in the dtype of their scales.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, Int, Key, Shaped

from avg_llava_jax.config import LanguageConfig
from avg_llava_jax.models import one_cpu
from avg_llava_jax.models.attention import Segments, cached_attention, self_attention
from avg_llava_jax.models.cache import Cache, LayerCache, Span
from avg_llava_jax.models.linear import Linear, gather_fp32_grad
from avg_llava_jax.models.stack import SHALLOW, Remat, rematerialised, stack
from avg_llava_jax.placement import constrain

Params = dict[str, Any]


Rope = tuple[Float[Array, "B S 1 d"], Float[Array, "B S 1 d"]]
"""cos and sin in fp32."""


def rotary(config: LanguageConfig, positions: Int[ArrayLike, "B S"]) -> Rope:
    """cos and sin of the rotary embedding at these positions."""
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


def rotate(
    x: Float[ArrayLike, "B S heads d"], cos: Float[ArrayLike, "B S 1 d"], sin: Float[ArrayLike, "B S 1 d"]
) -> Float[Array, "B S heads d"]:
    """Rotary embedding of queries or keys, first half paired with second half."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


class RowPart(NamedTuple):
    """A part of each row: one sequence of `size` positions, or several that share it.

    length: (B, n), the lengths of n sequences one after another. reach: at least the longest of them.

    Parts of 3 and 4 positions, the second shared by sequences of 1 and 2, have positions 0 1 2, 0 0 1 0.
    """

    size: int
    length: Int[ArrayLike, "B n"] | None = None
    reach: int | None = None


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer, from x and the cache to both.

    Without a cache: causal, each row a whole sequence, or with `segments` the sequences of `parts` one after another.
    With a cache: keys and values of x are written at `span`, then queries attend to the prefix written before as well.
    With `last`: keys and values of all S tokens are written, but only the tokens at indices `last` of each row are
    computed further: the MLP, two projections and the attention of all others are skipped.
    """

    config: LanguageConfig
    parts: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Float[ArrayLike, "B S D"],
        rope: Rope,
        positions: Int[ArrayLike, "B S"],
        cache: LayerCache | None = None,
        span: Span | None = None,
        last: Int[ArrayLike, "B E"] | None = None,
        segments: tuple[Segments | None, ...] = (None,),
    ) -> tuple[Float[Array, "B _ D"], LayerCache | None]:
        config = self.config
        y = nn.RMSNorm(config.norm_eps, name="norm1")(x)

        def heads(name: str, count: int) -> jax.Array:
            bias = config.attention_bias or config.qkv_bias
            y_out = Linear(count * config.head_dim, use_bias=bias, name=name)(y)
            return rearrange(y_out, "b s (h d) -> b s h d", h=count)

        def placed(name: str, count: int) -> jax.Array:
            x = heads(name, count)
            return rotate(nn.RMSNorm(config.norm_eps, name=name + "_norm")(x) if config.qk_norm else x, *rope)

        k, v = placed("k", config.kv_heads), heads("v", config.kv_heads)
        if cache is not None:
            cache = cache.write(k, v, span)
        if last is not None:
            x, y, positions, *rope = (_at(part, last) for part in (x, y, positions, *rope))
        q = placed("q", config.heads)
        if cache is None or (span.window == 0 and last is None):
            parts = zip(*(_apart(each, self.parts or (q.shape[1],)) for each in (q, k, v)), segments, strict=True)
            y = jnp.concatenate([self_attention(*each, causal=True, segments=own) for *each, own in parts], axis=1)
        else:
            # With `last`, the queries of a prompt from position 0 attend to the keys just written to the cache.
            window = span.window or (k.shape[1] if span.window == 0 else None)
            y = cached_attention(q, cache, dataclasses.replace(span, window=window), positions)
        y = Linear(config.width, use_bias=config.attention_bias, name="out")(rearrange(y, "b s h d -> b s (h d)"))
        x = constrain(x + y, "batch", None, None)

        y = nn.RMSNorm(config.norm_eps, name="norm2")(x)
        gate = Linear(config.mlp_width, use_bias=False, name="gate")(y)
        up = Linear(config.mlp_width, use_bias=False, name="up")(y)
        y = Linear(config.width, use_bias=False, name="down")(jax.nn.silu(gate) * up)
        return constrain(x + y, "batch", None, None), cache


def _apart(x: Shaped[ArrayLike, "B S *rest"], parts: tuple[int, ...]) -> list[Shaped[Array, "B _ *rest"]]:
    """The sequences of `parts` positions that follow one another in each row."""
    return jnp.split(x, list(itertools.accumulate(parts))[:-1], axis=1)


def _at(x: Shaped[ArrayLike, "B S *rest"], place: Int[ArrayLike, "B E"]) -> Shaped[Array, "B E *rest"]:
    """x at some indices of each row."""
    return jnp.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)


def decoder(
    config: LanguageConfig,
    params: Params,
    x: Float[ArrayLike, "B S D"],
    cache: Cache | None = None,
    span: Span | None = None,
    last: Int[ArrayLike, "B E"] | None = None,
    remat: Remat = "none",
    parts: Sequence[RowPart] = (),
) -> tuple[Float[Array, "B _ D"], Cache | None]:
    """Walk embeddings through all layers and the final norm.

    Right padding needs no mask: it follows every real token, where causal attention does not reach.

    Args:
      x: packed embeddings.
      cache, span: where keys and values are written, and which positions are attended to; None for whole sequences.
      last: with a cache: the indices of each row whose hidden states are needed. The last layer computes only these,
        which saves an eighth of the work of 8 layers, 1/32 of 32.
      remat: what the backward pass recomputes, see `stack.Remat`; for stacked layers without a cache.
      parts: without a cache: the parts of each row, one after another; () = one sequence of S positions.
    Returns:
      hidden (B, S, D), or (B, E, D) with `last`, and the updated cache (None without one).
    """
    parts = parts or (RowPart(x.shape[1]),)
    within, segments = zip(*(_within(part, len(x)) for part in parts), strict=True)
    positions = jnp.concatenate(within, axis=1)
    if span is not None and span.window != 0:
        positions = span.start[:, None] + positions
    rope, layers = rotary(config, positions), params["layers"]
    layer = DecoderLayer(config, tuple(part.size for part in parts))

    def run(x: jax.Array, layer_params: Params, *rest: Any) -> tuple[jax.Array, LayerCache | None]:
        return layer.apply({"params": layer_params}, x, rope, positions, *rest, segments=segments)

    if cache is None and not isinstance(layers, tuple):
        # A scan carries x alone.
        x, _ = jax.lax.scan(rematerialised(run, remat), x, layers, unroll=config.layers <= SHALLOW)
        return _norm(config, params, x), None
    layers = unstack(layers)
    written = []
    # Traced once for all layers but the last, which may compute less.
    same = jax.jit(lambda x, layer_params, *cache: run(x, layer_params, *cache, *(() if span is None else (span,))))
    for number, layer_params in enumerate(layers):
        own = () if cache is None else (cache[number],)
        if last is not None and number == len(layers) - 1:
            x, layer_cache = run(x, layer_params, *own, span, last)
        else:
            x, layer_cache = same(x, layer_params, *own)
        written.append(layer_cache)
    return _norm(config, params, x), None if cache is None else tuple(written)


def _within(part: RowPart, rows: int) -> tuple[Int[Array, "B _"], Segments | None]:
    """Positions of a part within their sequences, and which sequence each belongs to."""
    positions = jnp.broadcast_to(jnp.arange(part.size), (rows, part.size))
    if part.length is None:
        return positions, None
    ids, positions = split(part.length, positions)
    return positions, Segments(ids, part.reach or part.size)


def split(
    length: Int[ArrayLike, "B n"], positions: Int[ArrayLike, "B S"]
) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
    """For each position of a row that n sequences share: its sequence, n = none, and its position within that sequence.

    Lengths 3, 0, 2 and positions 0 .. 5 give sequences 0 0 0 2 2 3 and positions 0 1 2 0 1 0.
    """
    ends = jnp.cumsum(length, axis=1)
    starts = jnp.pad(ends, [(0, 0), (1, 0)])
    segments = jnp.sum(positions[..., None] >= ends[:, None], axis=-1)
    return segments, positions - jnp.take_along_axis(starts, segments, axis=1)


def _norm(config: LanguageConfig, params: Params, x: Float[ArrayLike, "*M D"]) -> Float[Array, "*M D"]:
    return nn.RMSNorm(config.norm_eps).apply({"params": params["norm"]}, x)


def unstack(layers: Params | tuple[Params, ...], free: bool = False) -> tuple[Params, ...]:
    """Unstack layers into a tuple, from which a decode loop reads each layer without a copy.

    Outside of a compiled function every layer gets its own memory, except on one CPU device, where they are views.
    free: delete each stacked array once it is copied, so that both are never in memory together.
    """
    if isinstance(layers, tuple):
        return layers
    leaves, tree = jax.tree.flatten(layers)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        shared = one_cpu.unstack(layers)
        if shared is not None:
            return shared
    columns = []
    for leaf in leaves:
        columns.append([leaf[at] for at in range(len(leaf))])
        if free:
            jax.block_until_ready(columns[-1])
            leaf.delete()
    return tuple(tree.unflatten(row) for row in zip(*columns, strict=True))


class _InitModel(nn.Module):
    """The whole model on one token, used only to draw its parameters."""

    config: LanguageConfig

    def setup(self) -> None:
        config = self.config
        draw = nn.initializers.normal(config.width**-0.5)
        self.embedding = self.param("embed", draw, (config.vocab_size, config.width))
        self.layers = stack(DecoderLayer, config.layers, "none", (nn.broadcast, nn.broadcast))(config)
        self.norm = nn.RMSNorm(config.norm_eps)
        if not config.tied_embeddings:
            self.head = Linear(config.vocab_size, use_bias=False, name="unembed")

    def __call__(self) -> Float[Array, "1 1 _"]:
        positions = jnp.zeros((1, 1), jnp.int32)
        x, _ = self.layers(self.embedding[positions], rotary(self.config, positions), positions)
        return self.norm(x) if self.config.tied_embeddings else self.head(self.norm(x))


def init(config: LanguageConfig, rng: Key[ArrayLike, ""]) -> Params:
    """Fresh fp32 parameters, layers stacked."""
    return _InitModel(config).init(rng)["params"]


def embed(params: Params, ids: Int[ArrayLike, "*M"]) -> Float[Array, "*M D"]:
    """Raw embeddings of token ids."""
    # The table's width and the batch share the mesh axis `fsdp`. Each device looks up its part of the width for all
    # rows, and the parts are exchanged: that sends the embeddings of the text, and their gradients, not the table.
    rest = [None] * (ids.ndim - 1)
    table = jnp.asarray(constrain(params["embed"], "vocab", "width"))
    rows = gather_fp32_grad(table, constrain(jnp.asarray(ids), "copies", *rest))
    rows = constrain(rows, "copies", *rest, "width")
    if "embed_scale" in params:
        scale = params["embed_scale"]
        rows = rows.astype(scale.dtype) * scale[ids][..., None]
    return constrain(rows, "batch", *rest, None)


def unembed(config: LanguageConfig, params: Params, hidden: Float[ArrayLike, "*M D"]) -> Float[Array, "*M V"]:
    """Logits of hidden states, in fp32."""
    if not config.tied_embeddings:
        logits = Linear(config.vocab_size, use_bias=False).apply({"params": params["unembed"]}, hidden)
    else:
        logits = one_cpu.product(hidden, params["embed"].T.astype(hidden.dtype))
        if "embed_scale" in params:
            logits = logits * params["embed_scale"]
    return constrain(logits.astype(jnp.float32), "batch", *[None] * (hidden.ndim - 2), "vocab")
