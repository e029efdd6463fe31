"""The vision encoder: a CLIP ViT up to a hidden state before its last layer; every tile is a separate input."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, UInt8

from avg_llava_jax.config import VisionConfig
from avg_llava_jax.models.attention import self_attention
from avg_llava_jax.models.linear import Linear
from avg_llava_jax.models.stack import Remat, stack
from avg_llava_jax.placement import constrain


def normalise(config: VisionConfig, pixels: UInt8[ArrayLike, "*M H W 3"]) -> Float[Array, "*M H W 3"]:
    """Pixels 0 .. 255 in float32, with CLIP's mean and deviation."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.array(config.mean)) / jnp.array(config.std)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer of CLIP over the 1 + P rows of a tile."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "M rows E"]) -> tuple[Float[Array, "M rows E"], None]:
        config = self.config
        y = layer_norm(config, "norm1")(x)
        q, k, v = (
            rearrange(Linear(config.width, name=name)(y), "m p (h d) -> m p h d", h=config.heads) for name in "qkv"
        )
        y = rearrange(self_attention(q, k, v, causal=False), "m p h d -> m p (h d)")
        x = constrain(x + Linear(config.width, name="out")(y), "batch", None, None)

        y = Linear(config.mlp_width, name="up")(layer_norm(config, "norm2")(x))
        y = y * jax.nn.sigmoid(1.702 * y) if config.activation == "quick_gelu" else jax.nn.gelu(y, approximate=False)
        return constrain(x + Linear(config.width, name="down")(y), "batch", None, None), None


class Encoder(nn.Module):
    """Tiles to patch features: hidden state `select_layer` without the class token (paper, section 3.1).

    Compute runs in the parameters' dtype.
    """

    config: VisionConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, pixels: UInt8[ArrayLike, "M H W 3"]) -> Float[Array, "M P E"]:
        """Encode tiles; patches are row-major."""
        config = self.config
        pixels, side = normalise(config, pixels), config.patch_size
        patches = rearrange(pixels, "m (r a) (c b) rgb -> m (r c) (a b rgb)", a=side, b=side)
        embed = nn.Dense(config.width, use_bias=False, name="patch_embed")
        init = nn.initializers.normal(config.width**-0.5)
        class_token = self.param("class_token", init, (config.width,))
        position = self.param("position", init, (1 + config.grid**2, config.width))

        x = embed(patches.astype(position.dtype))
        x = jnp.concatenate([jnp.broadcast_to(class_token, (len(x), 1, config.width)), x], axis=1) + position
        x = layer_norm(config, "pre_norm")(x)
        x, _ = stack(EncoderLayer, config.used_layers, self.remat)(config, name="layers")(x)
        return x[:, 1:]


def layer_norm(config: VisionConfig, name: str) -> nn.LayerNorm:
    """CLIP's layer norm; the exact variance keeps fp32 parity with PyTorch."""
    return nn.LayerNorm(epsilon=config.norm_eps, use_fast_variance=False, name=name)
