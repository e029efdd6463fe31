"""The visual granularity router: pyramid and instruction in, a score per granularity out (paper, section 3.3)."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models.attention import QUERY_BLOCK, dense, self_attention
from avg_llava_jax.models.dropout import dropper
from avg_llava_jax.models.linear import Linear

DROPOUT_BLOCK = 128
"""Queries of a long sequence that attend at once with dropout.

With 256, libtpu 0.0.42 ends its process on the 7B's router for v5e and v5p.
"""


class Routing(NamedTuple):
    """The router's scores and how they came about. J = router.text_tokens.

    logits: after the layer norm; argmax chooses, the first of a tie.
    pre_norm: before the layer norm: the mean over the image's tiles of the summed votes.
    votes: each row's opinion times its voter weight; garbage in empty tile slots.
    text_rows: positions in `text` of the selected instruction tokens, -1 = none.
    """

    logits: Float[Array, "B I G"]
    pre_norm: Float[Array, "B I G"]
    votes: Float[Array, "B T R+J G"]
    text_rows: Int[Array, "B I J"]


def select_text(
    features: Float[ArrayLike, "B I P D"],
    text: Float[ArrayLike, "B L D"],
    instruction: Bool[ArrayLike, "B _ L"],
    count: int,
) -> tuple[Float[Array, "B I J D"], Int[Array, "B I J"]]:
    """Select the J = `count` instruction tokens most similar to each image.

    Similarity is the cosine of every patch with every token, averaged over patches. The average is linear, so
    normalised patches are averaged first.

    Args:
      features: the finest features of tile 0 of each image.
      text: raw token embeddings; instruction: tokens that may be selected, by each image or by all.
    Returns:
      rows, most similar first, and their positions. Where an image has fewer instruction tokens, rows are zero and
      positions -1.
    """
    mean_patch = jnp.mean(unit(features), axis=-2)
    similarity = jnp.einsum("bid,bld->bil", mean_patch, unit(text))
    similarity = jnp.where(instruction, similarity, -jnp.inf)
    short = max(0, count - text.shape[1])
    similarity = jnp.pad(similarity, ((0, 0), (0, 0), (0, short)), constant_values=-jnp.inf)
    best, positions = jax.lax.top_k(similarity, count)
    exists = best > -jnp.inf
    rows = jax.vmap(lambda t, p: t[p])(text, jnp.minimum(positions, text.shape[1] - 1))
    return jnp.where(exists[..., None], rows, 0), jnp.where(exists, positions, -1)


def first_voter(_: Key[ArrayLike, ""], pyramid: int, text: int) -> Float[Array, " rows"]:
    """The voter's first weights: half of the vote for the rows of the pyramid, half for those of the instruction.

    In the mean of all rows many patches outvote a few rows of text, and some seeds then learn to choose by the image
    alone. With 4 rows of the pyramid and 2 of text: [1/8, 1/8, 1/8, 1/8, 1/4, 1/4].
    """
    counts = (pyramid, text) if text else (pyramid,)
    return jnp.concatenate([jnp.full(count, 1 / (len(counts) * count)) for count in counts])


def unit(x: Float[ArrayLike, "*M D"]) -> Float[Array, "*M D"]:
    """x / |x| in fp32, with PyTorch's guard against the zero vector."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Router(nn.Module):
    """One post-norm transformer layer, an MLP with G opinions per row, and a voter that sums them over the rows."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        pyramid: Float[ArrayLike, "B T R D"],
        text: Float[ArrayLike, "B L D"],
        instruction: Bool[ArrayLike, "B _ L"],
        tile_image: Int[ArrayLike, "B T"],
        first_tile: Int[ArrayLike, "B I"],
        dropout: Key[ArrayLike, " B"] | None = None,
    ) -> Routing:
        """Score the granularities of each image.

        Args:
          pyramid: all granularities of each tile, see `scaler.scale`.
          text: raw token embeddings; instruction: tokens that may be selected, by each image or by all.
          tile_image: which image of the row a tile belongs to, -1 = empty tile slot.
          first_tile: the tile slot of each image's tile 0, -1 = empty image slot.
          dropout: one key per sample; None = no dropout.
        """
        config, router = self.config, self.config.router
        finest = config.tokens[-1]
        images = first_tile.shape[1]

        tile0 = jax.vmap(lambda tiles, at: tiles[at, -finest:])(pyramid, jnp.maximum(first_tile, 0))
        text_rows, positions = select_text(tile0, text, instruction, router.text_tokens)
        tile_text = jax.vmap(lambda rows, image: rows[image])(text_rows, jnp.maximum(tile_image, 0))
        x = jnp.concatenate([pyramid, tile_text.astype(pyramid.dtype)], axis=2)

        drop = dropper(router.dropout, dropout)
        x = nn.LayerNorm(router.norm_eps, use_fast_variance=False, name="norm1")(
            x + drop(self._attend(x, tile_image, None if dropout is None else drop))
        )
        y = drop(jax.nn.relu(Linear(x.shape[-1], name="linear1")(x)))
        x = nn.LayerNorm(router.norm_eps, use_fast_variance=False, name="norm2")(
            x + drop(Linear(x.shape[-1], name="linear2")(y))
        )

        opinions = jax.nn.gelu(Linear(x.shape[-1], name="hidden")(x), approximate=False)
        opinions = Linear(len(config.granularities), name="logits")(opinions).astype(jnp.float32)
        voter = self.param("voter", first_voter, config.pyramid_rows, router.text_tokens)
        votes = voter[:, None].astype(jnp.float32) * opinions

        member = (tile_image[:, :, None] == jnp.arange(images)).astype(jnp.float32)
        tiles = jnp.maximum(jnp.sum(member, axis=1), 1.0)
        pre_norm = jnp.einsum("bti,btg->big", member, jnp.sum(votes, axis=2)) / tiles[..., None]
        logits = nn.LayerNorm(router.norm_eps, use_fast_variance=False, name="norm")(pre_norm)
        return Routing(logits, pre_norm, votes, positions)

    def _attend(
        self, x: Float[ArrayLike, "B T rows D"], tile_image: Int[ArrayLike, "B T"], drop: Callable | None
    ) -> Float[Array, "B T rows D"]:
        """Self-attention over the rows of a tile (`tokens`) or an image's tiles (`tiles`).

        drop: dropout of the attention weights in training.
        """
        width, heads = x.shape[-1], self.config.router.heads
        tokens = self.config.router.attention == "tokens"
        q, k, v = (Linear(width, name=name)(x) for name in ("q", "k", "v"))
        out = Linear(width, name="out")
        if tokens and drop is None:
            q, k, v = (rearrange(y, "b t r (h d) -> (b t) r h d", h=heads) for y in (q, k, v))
            y = self_attention(q, k, v, causal=False)
            return out(rearrange(y, "(b t) r h d -> b t r (h d)", b=len(x)))
        # Axes of independent attentions come first: their products then need no transposed copy.
        first = "b t r (h d) -> b (t h) r d" if tokens else "b t r (h d) -> b (r h) t d"
        q, k, v = (rearrange(y, first, h=heads) for y in (q, k, v))
        mask = None if tokens else (tile_image[:, :, None] == tile_image[:, None, :])[:, None]
        back = "b (t h) r d -> b t r (h d)" if tokens else "b (r h) t d -> b t r (h d)"
        y = _in_blocks(q, k, v, drop) if tokens else dense(q, k, v, mask, drop)
        return out(rearrange(y, back, h=heads))


def _in_blocks(
    q: Float[ArrayLike, "B Q S d"], k: Float[ArrayLike, "B Q S d"], v: Float[ArrayLike, "B Q S d"], drop: Callable
) -> Float[Array, "B Q S d"]:
    """`dense` with dropout for `DROPOUT_BLOCK` queries at a time; the backward pass recomputes their weights."""
    length = q.shape[2]
    if length <= QUERY_BLOCK:
        return dense(q, k, v, drop=drop)
    count = -(-length // DROPOUT_BLOCK)
    q = jnp.pad(q, [(0, 0), (0, 0), (0, -length % count), (0, 0)])

    @jax.checkpoint
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        block, turn = part
        return dense(block, k, v, drop=lambda weights: drop(weights, turn))

    out = jax.lax.map(one, (rearrange(q, "b h (n s) d -> n b h s d", n=count), jnp.arange(count)))
    return rearrange(out, "n b h s d -> b h (n s) d")[:, :, :length]
