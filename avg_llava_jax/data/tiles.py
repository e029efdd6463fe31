"""AnyRes: one image of any size becomes a squashed overview and a mosaic of square tiles.

    640 x 480, pinpoint 672 x 672, tiles of 336:

    tile 0: the complete image squashed to 336 x 336
    mosaic: image resized to 672 x 504, pasted at (0, 84) on black

        +-----+-----+    rows 0..83 and 588..671 are padding
        |  1  |  2  |
        +-----+-----+    tiles 1..4, row-major
        |  3  |  4  |
        +-----+-----+

Without pinpoints, tile 0 is the only tile. With `ModelConfig.several` = `square`, each of several images is padded to a
square with the tower's mean colour, and this square is its only tile.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.images import resized, squared

Size = tuple[int, int]  # (width, height) in pixels


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint (width, height) that keeps most pixels of the image; ties go to the least padding, then the first.

    Raises ValueError without pinpoints.

    >>> best_resolution((500, 375), ((336, 672), (672, 336), (672, 672)))
    (672, 672)
    """
    width, height = size
    best, best_rank = None, None
    for target_width, target_height in pinpoints:
        scale = min(target_width / width, target_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        rank = (kept, kept - target_width * target_height)
        # A pinpoint that keeps no pixel of the image never wins over an earlier one.
        if best_rank is None or rank > best_rank:
            best, best_rank = (target_width, target_height), rank
    if best is None:
        raise ValueError("best_resolution needs at least one pinpoint")
    return best


def placement(size: Size, target: Size) -> tuple[int, int, int, int]:
    """Position of the resized image on its mosaic: (left, top, width, height) in mosaic pixels.

    One side fills the target; the other is rounded up, so it is at least one pixel. The computation
    uses floating point, as the released code, so that the pixels match: 375 * (672 / 500) is slightly
    above 504, so the image gets 505 rows, here and in the un-padding.

    >>> placement((640, 480), (672, 672))
    (0, 84, 672, 504)
    """
    (width, height), (target_width, target_height) = size, target
    scale_x, scale_y = target_width / width, target_height / height
    if scale_x < scale_y:
        new_width, new_height = target_width, min(math.ceil(height * scale_x), target_height)
    else:
        new_width, new_height = min(math.ceil(width * scale_y), target_width), target_height
    return (target_width - new_width) // 2, (target_height - new_height) // 2, new_width, new_height


@functools.lru_cache(maxsize=65536)
def grid_of(size: Size, config: ModelConfig) -> tuple[int, int]:
    """Grid (rows, columns) of the high-resolution tiles of an image; (0, 0) without pinpoints."""
    if not config.pinpoints:
        return 0, 0
    width, height = best_resolution(size, config.pinpoints)
    side = config.vision.image_size
    return height // side, width // side


def mosaic_box(size: Size, config: ModelConfig) -> tuple[float, float, float, float]:
    """Box (top, bottom, left, right) of the mosaic, padding included, in pixels of the image.

    Without pinpoints it is the box of the tile: of the image, or of the square that it is padded to. An image of
    640 x 480 on 672 x 672 is resized by 1.05, so 84 rows of padding equal 80 rows of the image: (-80, 560, 0, 640).
    """
    width, height = size
    if not config.pinpoints:
        side = max(width, height) if config.several == "square" else None
        down, across = (height, width) if side is None else (side, side)
        top, left = -((down - height) // 2), -((across - width) // 2)
        return float(top), top + down, float(left), left + across
    target = best_resolution(size, config.pinpoints)
    left, top, placed_width, placed_height = placement(size, target)
    x, y = width / placed_width, height / placed_height
    return -top * y, (target[1] - top) * y, -left * x, (target[0] - left) * x


def tile_count(size: Size, config: ModelConfig) -> int:
    """T, the number of tiles of an image, the overview included."""
    rows, columns = grid_of(size, config)
    return 1 + rows * columns


def make_tiles(image: Image.Image, config: ModelConfig) -> np.ndarray:
    """Cuts an RGB image into tiles: uint8 (T, H, W, 3), values not normalised.

    Tile 0 is the complete image squashed to one tile; the rest are the mosaic's tiles, row-major.
    Both resizes are by `images.resized` with the tower's filter, so the pixels equal those in the training of the
    released weights.
    """
    side, resample = config.vision.image_size, Image.Resampling[config.vision.resample.upper()]
    if not config.pinpoints and config.several == "square":
        image = squared(image, tuple(int(share * 255) for share in config.vision.mean))
    overview = np.asarray(resized(image, (side, side), resample))
    rows, columns = grid_of(image.size, config)
    tiles = np.empty((1 + rows * columns, side, side, 3), np.uint8)
    tiles[0] = overview
    if rows:
        target = columns * side, rows * side
        left, top, width, height = placement(image.size, target)
        mosaic = np.zeros((rows * side, columns * side, 3), np.uint8)
        mosaic[top : top + height, left : left + width] = np.asarray(resized(image, (width, height), resample))
        split = mosaic.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        tiles[1:] = split.reshape(rows * columns, side, side, 3)
    return tiles
