"""Pyramid rows of an image's visual tokens, in packed order.

A tile has R pyramid rows, the granularities concatenated (ModelConfig.pyramid_offsets).
Tile t, granularity g, cell c (row-major in that granularity's grid) is row `t*R + offset_g + c`
of the image. An image is packed as the cells of tile 0, then the mosaic of the other tiles
row by row, each row followed by a newline (-1). Paper, section 3.1, and LLaVA-NeXT.

    Worked example: ladder {4: 2x2, 16: 4x4}, so R = 20 with offsets {4: 0, 16: 4};
    an image of one mosaic row of two tiles at granularity 4, nothing cropped:

        tile 0       mosaic (2 cells x 4 cells)     packed
        0 1          20 21 | 40 41                  0 1 2 3, 20 21 40 41 -1, 22 23 42 43 -1
        2 3          22 23 | 42 43
"""

from __future__ import annotations

import functools

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.tiles import Size, best_resolution, grid_of, placement

NEWLINE = -1


@functools.lru_cache(maxsize=1024)
def visual_index(size: Size, config: ModelConfig, granularity: int) -> np.ndarray:
    """Pyramid row of each visual token of one image, -1 for a newline: int32 (N,), read-only.

    size: (width, height) in pixels, after EXIF rotation.
    granularity: tokens per tile, one of `config.granularities`; any other raises ValueError.
    """
    cell_rows, cell_columns = _cells(config, granularity)
    rows, columns = grid_of(size, config)
    stride, offset = config.pyramid_rows, config.pyramid_offsets[granularity]
    overview = np.arange(granularity, dtype=np.int32) + offset
    if not rows:
        index = np.append(overview, np.int32(NEWLINE))
    else:
        top, bottom, left, right = kept_cells(size, config, granularity)
        row, column = np.arange(top, bottom)[:, None], np.arange(left, right)[None, :]
        tile = 1 + row // cell_rows * columns + column // cell_columns
        cell = row % cell_rows * cell_columns + column % cell_columns
        mosaic = np.full((bottom - top, right - left + 1), NEWLINE, np.int32)
        mosaic[:, :-1] = tile * stride + offset + cell
        index = np.concatenate([overview, mosaic.ravel()])
    index.flags.writeable = False
    return index


@functools.lru_cache(maxsize=65536)
def visual_count(size: Size, config: ModelConfig, granularity: int) -> int:
    """N, the number of visual tokens of one image, newlines included; builds no index."""
    if not config.pinpoints:
        return granularity + 1
    top, bottom, left, right = kept_cells(size, config, granularity)
    return granularity + (bottom - top) * (right - left + 1)


def kept_cells(size: Size, config: ModelConfig, granularity: int) -> tuple[int, int, int, int]:
    """Cells of the mosaic that un-padding keeps: (top, bottom, left, right), half open.

    Only this function reads `config.unpad`. Needs pinpoints.
    """
    cells = _cells(config, granularity)
    if config.unpad == "released":
        return _kept_released(size, config, cells)
    return _kept_exact(size, config, cells)


def _kept_exact(size: Size, config: ModelConfig, cells: tuple[int, int]) -> tuple[int, int, int, int]:
    """Every cell that holds at least one pixel of the image.

    The region is computed in mosaic pixels, so it is the same at every granularity. A cell that
    straddles its border is kept: no pixel of the image is lost, and less than one cell of padding stays.
    """
    cell_height, cell_width = (config.vision.image_size // n for n in cells)
    left, top, width, height = placement(size, best_resolution(size, config.pinpoints))
    return (
        top // cell_height,
        -(-(top + height) // cell_height),
        left // cell_width,
        -(-(left + width) // cell_width),
    )


def _kept_released(size: Size, config: ModelConfig, cells: tuple[int, int]) -> tuple[int, int, int, int]:
    """The released crop: the aspect ratio in cells, truncated, with the same cut on both sides.

    Where a cell is not square (granularities 72 and 288) it removes about half of the image's rows.
    Weights trained with this crop need it.
    """
    width, height = size
    rows, columns = (n * m for n, m in zip(grid_of(size, config), cells, strict=True))
    if width / height > columns / rows:
        cut = (rows - int(height * (columns / width))) // 2
        return cut, rows - cut, 0, columns
    cut = (columns - int(width * (rows / height))) // 2
    return 0, rows, cut, columns - cut


def _cells(config: ModelConfig, granularity: int) -> tuple[int, int]:
    """(rows, columns) of one tile's cells at a granularity."""
    for rows, columns in config.grids:
        if rows * columns == granularity:
            return rows, columns
    known = ", ".join(map(str, config.granularities))
    raise ValueError(f"granularity {granularity} is not one of this model's: {known}")
