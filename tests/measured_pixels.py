"""The tiles that the golden tensors of tests/data/golden were measured with."""

import numpy as np
from PIL import Image

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data import tiles

TALL = "im_300x1000.png"
"""Cut under Pillow 13, which resamples the height of this image's overview first; see `images.resized`."""


def measured_tiles(image: Image.Image, config: ModelConfig, name: str) -> np.ndarray:
    """As `tiles.make_tiles`: uint8 (T, H, W, 3); of the image `TALL` the overview is the measured one."""
    cut = tiles.make_tiles(image, config)
    if name == TALL:
        side = config.vision.image_size
        cut[0] = _height_first(image, (side, side))
    return cut


def _height_first(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    lower = image.resize((image.width, size[1]), Image.Resampling.BICUBIC)
    return np.asarray(lower.resize(size, Image.Resampling.BICUBIC))
