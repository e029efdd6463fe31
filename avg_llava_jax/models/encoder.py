"""The vision encoders, by the name that `model.vision.encoder` gives: uint8 tiles in, patch features out.

Every tile is a separate input. An encoder is a module of (config, remat) that maps uint8 (M, H, W, 3) to (M, P, E),
patches row-major.
"""

import flax.linen as nn

from avg_llava_jax.config import VisionConfig
from avg_llava_jax.models.clip import Clip
from avg_llava_jax.models.siglip import Siglip
from avg_llava_jax.models.stack import Remat

ENCODERS: dict[str, type[nn.Module]] = {"clip": Clip, "siglip": Siglip}


def encoder(config: VisionConfig, remat: Remat = "none") -> nn.Module:
    """The encoder that a config names. Raises ValueError if there is none of that name."""
    if config.encoder not in ENCODERS:
        raise ValueError(f"model.vision.encoder={config.encoder!r}: choose {' or '.join(ENCODERS)}")
    return ENCODERS[config.encoder](config, remat)
