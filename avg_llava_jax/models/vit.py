"""What the vision encoders share: pixels to patches, and the pre-norm transformer layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, UInt8

from avg_llava_jax.config import VisionConfig
from avg_llava_jax.models.attention import self_attention
from avg_llava_jax.models.linear import Linear
from avg_llava_jax.placement import constrain


def normalise(config: VisionConfig, pixels: UInt8[ArrayLike, "*M H W 3"]) -> Float[Array, "*M H W 3"]:
    """Pixels 0 .. 255 in float32, with the tower's mean and deviation."""
    return (pixels.astype(jnp.float32) / 255.0 - jnp.array(config.mean)) / jnp.array(config.std)


def patches_of(config: VisionConfig, pixels: UInt8[ArrayLike, "M H W 3"]) -> Float[Array, "M P values"]:
    """The normalised pixels of each patch, p * p * 3 values, patches row-major.

    A margin at the right and at the bottom that is narrower than a patch is not used: 6 of 384 pixels at 14 a patch.
    """
    side, used = config.patch_size, config.grid * config.patch_size
    pixels = normalise(config, pixels[:, :used, :used])
    return rearrange(pixels, "m (r a) (c b) rgb -> m (r c) (a b rgb)", a=side, b=side)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer of CLIP and SigLIP."""

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
        y = activate(config, y)
        return constrain(x + Linear(config.width, name="down")(y), "batch", None, None), None


def activate(config: VisionConfig, x: Float[ArrayLike, "*M"]) -> Float[Array, "*M"]:
    """`config.activation` of each value."""
    if config.activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=config.activation == "gelu_tanh")


def layer_norm(config: VisionConfig, name: str) -> nn.LayerNorm:
    """Layer norm; the exact variance keeps fp32 parity with PyTorch."""
    return nn.LayerNorm(epsilon=config.norm_eps, use_fast_variance=False, name=name)
