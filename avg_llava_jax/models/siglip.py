"""The vision encoder of SigLIP and of SigLIP 2 with a fixed resolution: patches alone, no norm before the layers.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023; Tschannen et al., "SigLIP 2", 2025.
"""

import flax.linen as nn
from jaxtyping import Array, ArrayLike, Float, UInt8

from avg_llava_jax.config import VisionConfig
from avg_llava_jax.models.linear import Linear, broadcast_fp32_grad
from avg_llava_jax.models.stack import Remat, stack
from avg_llava_jax.models.vit import EncoderLayer, patches_of


class Siglip(nn.Module):
    """Tiles to patch features: hidden state `select_layer`, before SigLIP's last norm and its pooling head.

    Compute runs in the parameters' dtype.
    """

    config: VisionConfig
    remat: Remat = "none"

    @nn.compact
    def __call__(self, pixels: UInt8[ArrayLike, "M H W 3"]) -> Float[Array, "M P E"]:
        """Encode tiles; patches are row-major."""
        config = self.config
        init = nn.initializers.normal(config.width**-0.5)
        position = self.param("position", init, (config.grid**2, config.width))
        x = Linear(config.width, name="patch_embed")(patches_of(config, pixels).astype(position.dtype))
        x = x + broadcast_fp32_grad(position, x.shape)
        x, _ = stack(EncoderLayer, config.used_layers, self.remat)(config, name="layers")(x)
        return x
