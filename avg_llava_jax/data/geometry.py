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

With `ModelConfig.most_tiles` (LLaVA-OneVision) a mosaic with too many cells is reduced, after the crop: every token of
it is a weighted sum of four cells. The index then is (N, 4), with weights (N, 4); a token that is not reduced, and a
newline, has weights 1 0 0 0. Reduced to 1 x 2, with the weights of a cell's neighbours below and to the right:

        20 21 40 41    -> 1 x 2 ->    20 21 22 23 | 40 41 42 43 | -1 -1 -1 -1
        22 23 42 43                   1/4 each    | 1/4 each    | 1 0 0 0
"""

from __future__ import annotations

import functools
import math

import numpy as np

from avg_llava_jax.config import Granularity, ModelConfig, Windows
from avg_llava_jax.data.tiles import Size, best_resolution, grid_of, mosaic_box, placement

NEWLINE = -1
ALLOWED = 1.1
"""A mosaic is reduced where its sides exceed those of `most_tiles` by this factor, their geometric mean."""


@functools.lru_cache(maxsize=256)
def visual_index(size: Size, config: ModelConfig, granularity: Granularity) -> np.ndarray:
    """Pyramid row of each visual token of one image, -1 for a newline: int32 (N,), or (N, 4) with `most_tiles`.

    The array is read-only. size: (width, height) in pixels, after EXIF rotation.
    granularity: one of `config.granularities`; any other raises ValueError.
    """
    cells = config.tokens_at(granularity)
    overview = np.arange(cells, dtype=np.int32) + config.pyramid_offsets[granularity]
    if not config.pinpoints:
        index = _corners(config, np.append(overview, np.int32(NEWLINE)))
    else:
        kept = _kept_rows(size, config, granularity)
        if config.most_tiles:
            kept = np.stack([kept[at] for at in _blend(size, config, granularity)[0]], axis=-1)
        newlines = np.full((len(kept), 1, *kept.shape[2:]), NEWLINE, np.int32)
        mosaic = np.concatenate([kept, newlines], axis=1).reshape(-1, *kept.shape[2:])
        index = np.concatenate([_corners(config, overview), mosaic])
    index.flags.writeable = False
    return index


@functools.lru_cache(maxsize=256)
def visual_weight(size: Size, config: ModelConfig, granularity: Granularity) -> np.ndarray:
    """Weights of the four rows of each visual token, float32 (N, 4), with `most_tiles`; read-only."""
    weight = np.zeros((visual_count(size, config, granularity), 4), np.float32)
    weight[:, 0] = 1
    if config.pinpoints:
        shares = _blend(size, config, granularity)[1]
        mosaic = weight[config.tokens_at(granularity) :].reshape(len(shares), shares.shape[1] + 1, 4)
        mosaic[:, :-1] = shares
    weight.flags.writeable = False
    return weight


@functools.lru_cache(maxsize=65536)
def visual_count(size: Size, config: ModelConfig, granularity: Granularity) -> int:
    """N, the number of visual tokens of one image, newlines included; builds no index."""
    cells = config.tokens_at(granularity)
    if not config.pinpoints:
        return cells + 1
    rows, columns = mosaic_cells(size, config, granularity)
    return cells + rows * (columns + 1)


def mosaic_cells(size: Size, config: ModelConfig, granularity: Granularity) -> tuple[int, int]:
    """(rows, columns) of the mosaic's visual tokens: its kept cells, reduced where they are too many.

    The reduction is that of LLaVA-OneVision: by the same factor along both sides. Needs pinpoints.
    """
    top, bottom, left, right = kept_cells(size, config, granularity)
    rows, columns = bottom - top, right - left
    if not config.most_tiles:
        return rows, columns
    factor = math.sqrt(rows * columns / (config.most_tiles * config.tokens_at(granularity)))
    return (rows, columns) if factor <= ALLOWED else (max(1, int(rows // factor)), max(1, int(columns // factor)))


def _kept_rows(size: Size, config: ModelConfig, granularity: Granularity) -> np.ndarray:
    """Pyramid rows of the mosaic's kept cells: int32 (rows, columns)."""
    cell_rows, cell_columns = config.grid_at(granularity)
    top, bottom, left, right = kept_cells(size, config, granularity)
    row, column = np.arange(top, bottom)[:, None], np.arange(left, right)[None, :]
    tile = 1 + row // cell_rows * grid_of(size, config)[1] + column // cell_columns
    cell = row % cell_rows * cell_columns + column % cell_columns
    return (tile * config.pyramid_rows + config.pyramid_offsets[granularity] + cell).astype(np.int32)


def _corners(config: ModelConfig, index: np.ndarray) -> np.ndarray:
    """An index (N,) in the form of this config: with `most_tiles` (N, 4), four times the same row."""
    return np.repeat(index[:, None], 4, axis=1) if config.most_tiles else index


Corner = tuple[np.ndarray, np.ndarray]
"""Rows (h, 1) and columns (1, w) of kept cells."""


def _blend(size: Size, config: ModelConfig, granularity: Granularity) -> tuple[list[Corner], np.ndarray]:
    """The four kept cells that each token of the mosaic is made of, and their weights, float (h, w, 4)."""
    top, bottom, left, right = kept_cells(size, config, granularity)
    rows, columns = mosaic_cells(size, config, granularity)
    (above, below, down), (before, behind, across) = _between(bottom - top, rows), _between(right - left, columns)
    corners = [(y[:, None], x[None, :]) for y in (above, below) for x in (before, behind)]
    weights = [y[:, None] * x[None, :] for y in (1 - down, down) for x in (1 - across, across)]
    return corners, np.stack(weights, axis=-1)


def _between(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where `new` bilinear samples of `old` values lie: each between (first, next), by (share of the next).

    Half-pixel centres, no antialiasing, in float32: `torch.nn.functional.interpolate`. 4 to 2: (0, 1, .5), (2, 3, .5).
    """
    step = np.float32(old) / np.float32(max(new, 1))
    at = np.maximum(step * (np.arange(new, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    first = np.floor(at).astype(np.int64)
    return first, np.minimum(first + 1, old - 1), at - first.astype(np.float32)


def kept_cells(size: Size, config: ModelConfig, granularity: Granularity) -> tuple[int, int, int, int]:
    """Cells of the mosaic that un-padding keeps: (top, bottom, left, right), half open.

    Only this function reads `config.unpad`. Needs pinpoints.
    """
    cells = config.grid_at(granularity)
    if config.unpad == "released":
        return _kept_released(size, config, cells)
    patches = _kept_library(size, config) if config.unpad == "library" else _kept_exact(size, config)
    side = config.vision.grid
    rows, columns = (config.scaler.windows(side, n) for n in cells)
    return *_holding(patches[:2], side, rows), *_holding(patches[2:], side, columns)


def borders(
    size: Size, config: ModelConfig, granularity: Granularity, whole: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Borders of the mosaic's cells (tile 0's without pinpoints) in image pixels: y (rows + 1,), x (columns + 1,).

    whole: of all cells of the mosaic; else of its visual tokens, un-padded and reduced. Cells that overlap are drawn as
    equally wide.
    """
    top, bottom, left, right = mosaic_box(size, config)
    tiles = tuple(max(1, n) for n in grid_of(size, config))
    rows, columns = config.grid_at(granularity)
    kept = (0, tiles[0] * rows, 0, tiles[1] * columns)
    if config.pinpoints and not whole:
        kept = kept_cells(size, config, granularity)
    y = top + _borders(config, rows, tiles[0], kept[:2]) * (bottom - top) / (tiles[0] * config.vision.image_size)
    x = left + _borders(config, columns, tiles[1], kept[2:]) * (right - left) / (tiles[1] * config.vision.image_size)
    if config.pinpoints and not whole and config.most_tiles:
        down, across = mosaic_cells(size, config, granularity)
        y, x = np.linspace(y[0], y[-1], down + 1), np.linspace(x[0], x[-1], across + 1)
    return y, x


def _borders(config: ModelConfig, cells: int, tiles: int, kept: tuple[int, int]) -> np.ndarray:
    """Where the n kept cells of a mosaic begin along one axis, and where the last ends, in its pixels: (n + 1,)."""
    side = config.vision.grid
    if config.scaler.grids:
        edges = np.arange(cells + 1) * side / cells
    else:
        edges = np.array([*(start for start, _ in config.scaler.windows(side, cells)), side])
    first, last = kept
    starts = np.arange(tiles)[:, None] * config.vision.image_size + edges * config.vision.patch_size
    begin = np.append(starts[:, :-1].ravel(), starts[-1, -1])
    if first == last:
        return begin[first : first + 1]
    return np.append(begin[first:last], starts[(last - 1) // cells, (last - 1) % cells + 1])


def _holding(patches: tuple[int, int], side: int, windows: Windows) -> tuple[int, int]:
    """The mosaic's cells that hold any of the patches first .. last - 1 along one axis: (first, last + 1).

    Tiles of 5 patches and windows 0-2 2-4 4-5, patches 4 .. 6: cell 2 of tile 0, cells 0 and 1 of tile 1, so (2, 4)
    where patch 6 is in the first window of tile 1.
    """
    first, last = patches
    tile, at = divmod(first, side)
    begin = tile * len(windows) + next(i for i, (_, end) in enumerate(windows) if end > at)
    if last <= first:
        return begin, begin
    tile, at = divmod(last - 1, side)
    return begin, tile * len(windows) + max(i for i, (start, _) in enumerate(windows) if start <= at) + 1


def _kept_exact(size: Size, config: ModelConfig) -> tuple[int, int, int, int]:
    """Every patch that shows at least one pixel of the image.

    A cell that straddles the image's border is kept: no pixel of the image is lost, and less than one cell of padding
    stays. A tile's last pixels that no patch shows belong to none.
    """
    left, top, width, height = placement(size, best_resolution(size, config.pinpoints))
    return *_patches(config, top, top + height), *_patches(config, left, left + width)


def _patches(config: ModelConfig, start: int, stop: int) -> tuple[int, int]:
    """The mosaic's patches that show any of the pixels start .. stop - 1 along one axis: (first, last + 1)."""
    side, patch, grid = config.vision.image_size, config.vision.patch_size, config.vision.grid
    tile, at = divmod(start, side)
    first = tile * grid + min(at // patch, grid)
    tile, at = divmod(stop, side)
    return first, max(first, tile * grid + min(-(-at // patch), grid))


def _kept_library(size: Size, config: ModelConfig) -> tuple[int, int, int, int]:
    """The patches that the transformers library keeps: the aspect ratio in patches, the same cut on both sides."""
    width, height = size
    rows, columns = (n * config.vision.grid for n in grid_of(size, config))
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return cut, rows - cut, 0, columns
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, cut, columns - cut


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
