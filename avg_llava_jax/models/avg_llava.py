"""AVG-LLaVA from pixels and token ids to logits, as pure functions of (config, params, arrays).

    pixels --encode_images--> features --scale--> pyramid --route--> logits over granularities
    text, pyramid, newline --assemble(index)--> packed embeddings --decoder--> hidden states

`params` is a plain nested dict with the keys encoder, connector, image_newline, router, language.
Compute runs in the dtype of the parameters: cast them to choose it. config.py has the legend of dims.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key, UInt8

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import language, linear, one_cpu
from avg_llava_jax.models.connector import Connector
from avg_llava_jax.models.encoder import encoder
from avg_llava_jax.models.router import Router, Routing
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.models.stack import Remat

Params = dict[str, Any]


def init(config: ModelConfig, rng: Key[ArrayLike, ""]) -> Params:
    """Fresh fp32 parameters. Under `jax.eval_shape` only shapes are traced, nothing is computed."""
    rngs = jax.random.split(rng, 5)
    side, width = config.vision.image_size, config.language.width
    finest = config.tokens[-1]
    return {
        "encoder": encoder(config.vision).init(rngs[0], jnp.zeros((1, side, side, 3), jnp.uint8))["params"],
        "connector": Connector(width).init(rngs[1], jnp.zeros((1, finest, config.vision.width)))["params"],
        "image_newline": jax.random.normal(rngs[2], (width,)) * width**-0.5,
        "router": Router(config).init(
            rngs[3],
            jnp.zeros((1, 1, config.pyramid_rows, width)),
            jnp.zeros((1, 1, width)),
            jnp.ones((1, 1, 1), bool),
            jnp.zeros((1, 1), jnp.int32),
            jnp.zeros((1, 1), jnp.int32),
        )["params"],
        "language": language.init(config.language, rngs[4]),
    }


def with_dropout(params: Params, keys: Key[ArrayLike, " B"], tiles: int, rate: float) -> Params:
    """Parameters whose adapters drop out a share of their input; one key per sample of `tiles` tiles."""
    of_tiles = jax.vmap(lambda key: jax.random.split(key, tiles))(keys).reshape(-1)
    rows = {"encoder": of_tiles, "language": keys}
    return params | {
        name: params[name] | {"layers": linear.with_dropout(params[name]["layers"], rows[name], rate)} for name in rows
    }


def encode_images(
    config: ModelConfig, params: Params, pixels: UInt8[ArrayLike, "B T H W 3"], remat: Remat = "none"
) -> Float[Array, "B T P D"]:
    """Encode and connect every tile."""
    batch, tiles = pixels.shape[:2]

    def encode(pixels: UInt8[ArrayLike, "M H W 3"]) -> Float[Array, "M P E"]:
        return encoder(config.vision, remat).apply({"params": params["encoder"]}, pixels)

    tiled = pixels.reshape(-1, *pixels.shape[2:])
    if linear.differs_by_row(params["encoder"]["layers"]):
        patches = encode(tiled)
    else:
        patches = one_cpu.encode(encode, tiled, config.vision.grid**2)
    features = Connector(config.language.width).apply({"params": params["connector"]}, patches)
    return features.reshape(batch, tiles, *features.shape[1:])


def pyramid_of(
    config: ModelConfig, params: Params, pixels: UInt8[ArrayLike, "B T H W 3"], remat: Remat = "none"
) -> Float[Array, "B T R D"]:
    """Encode, connect and scale: the pyramid of every tile."""
    return scale(config, encode_images(config, params, pixels, remat))


def embed(config: ModelConfig, params: Params, ids: Int[ArrayLike, "*M"]) -> Float[Array, "*M D"]:
    """Raw embeddings of token ids."""
    del config  # unused; all functions of this module take (config, params, ...)
    return language.embed(params["language"], ids)


def route(
    config: ModelConfig,
    params: Params,
    pyramid: Float[ArrayLike, "B T R D"],
    text: Float[ArrayLike, "B L D"],
    batch: Mapping[str, Any],
    dropout: Key[ArrayLike, " B"] | None = None,
) -> Routing:
    """Score the granularities of each image by its pyramid and the raw text embeddings.

    batch: `instruction` bool (B, L), `tile_image` int (B, T), `first_tile` int (B, I), see `Router`; where samples
        share a row, `text_sample` int (B, L) and `image_sample` int (B, I): an image's router reads its sample's text.
    dropout: None at inference.
    """
    reads = batch["instruction"][:, None]
    if "text_sample" in batch:
        reads = reads & (batch["text_sample"][:, None] == batch["image_sample"][..., None])
    inputs = (pyramid, text, reads, batch["tile_image"], batch["first_tile"])
    router = functools.partial(Router(config).apply, {"params": params["router"]})
    if dropout is not None:
        return router(*inputs, dropout)
    return one_cpu.by_parts(lambda rows: router(*rows), inputs, one_cpu.FORWARD_ROWS)


def assemble(
    params: Params,
    pyramid: Float[ArrayLike, "B T R D"],
    text: Float[ArrayLike, "B L D"],
    index: Int[ArrayLike, "B S *corners"],
    weight: Float[ArrayLike, "B S 4"] | None = None,
) -> Float[Array, "B S D"]:
    """Pack text, visual tokens and newlines into one sequence: a single gather.

    An entry of `index` is a row of

        0 .. L-1                text tokens
        L .. L+T*R-1            row r of tile slot t at L + t*R + r
        L+T*R                   the learned newline

    With L=3, T=1, R=7, index [0, 3, 10, 1, 2] packs: text 0, the coarsest visual token, the newline, text 1, text 2.
    With weight (B, S, 4), index is (B, S, 4), and each position the weighted sum of its four rows.
    """
    newline = jnp.broadcast_to(params["image_newline"].astype(text.dtype), (len(text), 1, text.shape[-1]))
    visual = pyramid.reshape(len(text), -1, text.shape[-1])
    rows = jnp.concatenate([text, visual.astype(text.dtype), newline], axis=1)
    index = jnp.asarray(index)  # `vmap` of a function with its own gradient takes no NumPy array
    if weight is None:
        return jax.vmap(linear.gather_fp32_grad)(rows, index)
    corners = jax.vmap(linear.gather_fp32_grad)(rows, index.reshape(len(index), -1))
    return blend(corners.reshape(*index.shape, -1), weight)


def blend(corners: Float[ArrayLike, "B S 4 D"], weight: Float[ArrayLike, "B S 4"]) -> Float[Array, "B S D"]:
    """The weighted sums, in fp32, of four rows each."""
    return jnp.sum(corners.astype(jnp.float32) * weight[..., None], axis=2).astype(corners.dtype)


def decoder(
    config: ModelConfig,
    params: Params,
    x: Float[ArrayLike, "B S D"],
    remat: Remat = "none",
    parts: Sequence[language.RowPart] = (),
) -> Float[Array, "B S D"]:
    """Hidden states of the packed embeddings of whole sequences, without a cache; parts: see `language.decoder`."""
    return language.decoder(config.language, params["language"], x, remat=remat, parts=parts)[0]


def unembed(config: ModelConfig, params: Params, hidden: Float[ArrayLike, "*M D"]) -> Float[Array, "*M V"]:
    """Logits of hidden states, in fp32."""
    return language.unembed(config.language, params["language"], hidden)
