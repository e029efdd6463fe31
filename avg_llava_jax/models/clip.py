"""The vision encoder of CLIP: a class token, a norm before the layers, no bias in the patch embedding."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, UInt8

from avg_llava_jax.config import VisionConfig
from avg_llava_jax.models.linear import broadcast_fp32_grad
from avg_llava_jax.models.stack import Remat, stack
from avg_llava_jax.models.vit import EncoderLayer, layer_norm, patches_of


class Clip(nn.Module):
    """Tiles to patch features: hidden state `select_layer` without the class token (paper, section 3.1).

    Compute runs in the parameters' dtype.
    """

    config: VisionConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, pixels: UInt8[ArrayLike, "M H W 3"]) -> Float[Array, "M P E"]:
        """Encode tiles; patches are row-major."""
        config = self.config
        embed = nn.Dense(config.width, use_bias=False, name="patch_embed")
        init = nn.initializers.normal(config.width**-0.5)
        class_token = self.param("class_token", init, (config.width,))
        position = self.param("position", init, (1 + config.grid**2, config.width))

        x = embed(patches_of(config, pixels).astype(position.dtype))
        x = jnp.concatenate([broadcast_fp32_grad(class_token, (len(x), 1, config.width)), x], axis=1)
        x = x + broadcast_fp32_grad(position, x.shape)
        x = layer_norm(config, "pre_norm")(x)
        x, _ = stack(EncoderLayer, config.used_layers, self.remat)(config, name="layers")(x)
        return x[:, 1:]
