"""Which visual tokens an image has: against measured cases, and against counting pixels."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.config import ModelConfig, ScalerConfig, VisionConfig
from avg_llava_jax.data.geometry import kept_cells, visual_count, visual_index
from avg_llava_jax.data.tiles import best_resolution, grid_of, make_tiles, placement, tile_count

GOLDEN = Path(__file__).parent / "data" / "golden"
EXACT = ModelConfig()
RELEASED = dataclasses.replace(EXACT, unpad="released")
# Another ladder: 8 x 8 patches, height halved first, tiles of 64 pixels.
SMALL = ModelConfig(
    vision=VisionConfig(image_size=64, patch_size=8),
    scaler=ScalerConfig(halvings=4, first_axis="height"),
    pinpoints=((64, 128), (128, 64), (128, 128), (192, 64)),
)
SIZES = [
    (1, 1),
    (1, 1000),
    (1000, 1),
    (2, 3),
    (63, 64),
    (64, 63),
    (336, 336),
    (337, 335),
    (500, 375),
    (375, 500),
    (640, 359),
    (672, 672),
    (673, 671),
    (1000, 300),
    (300, 1000),
    (1920, 1080),
    (3, 4000),
    (4000, 3),
    (4000, 3000),
]


def as_patches(index, config, granularity):
    """(tile, mean row, mean column) of the patches behind each visual token; -1 for newlines."""
    rows, columns = dict(zip(config.granularities, config.grids, strict=True))[granularity]
    high, wide = config.vision.grid // rows, config.vision.grid // columns
    tile, row = np.divmod(index, config.pyramid_rows)
    cell = row - config.pyramid_offsets[granularity]
    patches = np.stack(
        [tile, cell // columns * high + (high - 1) / 2, cell % columns * wide + (wide - 1) / 2], axis=1
    ).astype(np.float64)
    patches[index < 0] = -1
    return patches


def test_released_mode_matches_every_measured_case():
    cases = json.loads((GOLDEN / "geometry.json").read_text())
    assert len(cases) == 570
    arrays = np.load(GOLDEN / "geometry.npz")
    for case in cases:
        size, granularity = tuple(case["size"]), case["granularity"]
        index = visual_index(size, RELEASED, granularity)
        assert best_resolution(size, RELEASED.pinpoints) == tuple(case["best_resolution"]), size
        assert len(index) == visual_count(size, RELEASED, granularity) == case["n_visual_tokens"], (size, granularity)
        assert np.count_nonzero(index < 0) == case["newlines"], (size, granularity)
        patches = as_patches(index, RELEASED, granularity)
        # The measured checksum weighs tile, row and column by 1, 31, 7 and each token by its position.
        assert np.arange(1, len(index) + 1) @ (patches @ [1, 31, 7]) == case["checksum"], (size, granularity)
        name = f"{size[0]}x{size[1]}.{granularity}"
        if name in arrays:
            np.testing.assert_array_equal(patches, arrays[name])
    assert len(arrays.files) == 25


def brute_force(size, config, granularity):
    """The packed index, by looking at every pixel of a white image's tiles."""
    rows, columns = dict(zip(config.granularities, config.grids, strict=True))[granularity]
    side = config.vision.image_size
    tiles = make_tiles(Image.new("RGB", size, "white"), config).any(axis=-1)
    packed = [config.pyramid_offsets[granularity] + cell for cell in range(granularity)]
    grid_rows, grid_columns = grid_of(size, config)
    for row in range(grid_rows * rows):
        line = []
        for column in range(grid_columns * columns):
            tile = 1 + row // rows * grid_columns + column // columns
            y, x = row % rows * (side // rows), column % columns * (side // columns)
            if tiles[tile, y : y + side // rows, x : x + side // columns].any():
                cell = row % rows * columns + column % columns
                line.append(tile * config.pyramid_rows + config.pyramid_offsets[granularity] + cell)
        if line:
            packed += [*line, -1]
    return packed


@pytest.mark.parametrize("config", [EXACT, SMALL], ids=["336", "64"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_exact_mode_keeps_the_cells_that_hold_a_pixel(size, config):
    for granularity in config.granularities:
        index = visual_index(size, config, granularity)
        assert index.tolist() == brute_force(size, config, granularity)
        assert visual_count(size, config, granularity) == len(index)


@pytest.mark.parametrize("config", [EXACT, SMALL], ids=["336", "64"])
def test_exact_mode_counts_for_many_sizes(config):
    rng = np.random.default_rng(0)
    side = config.vision.image_size
    for width, height in zip(rng.integers(1, 4001, 400), rng.integers(1, 3001, 400), strict=True):
        size = (int(width), int(height))
        left, top, new_width, new_height = placement(size, best_resolution(size, config.pinpoints))
        for granularity, (rows, columns) in zip(config.granularities, config.grids, strict=True):
            kept_rows = len({y // (side // rows) for y in range(top, top + new_height)})
            kept_columns = len({x // (side // columns) for x in range(left, left + new_width)})
            assert visual_count(size, config, granularity) == granularity + kept_rows * (kept_columns + 1)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_exact_mode_keeps_the_same_region_at_every_granularity(size):
    left, top, width, height = placement(size, best_resolution(size, EXACT.pinpoints))
    for granularity, (rows, columns) in zip(EXACT.granularities, EXACT.grids, strict=True):
        high, wide = EXACT.vision.image_size // rows, EXACT.vision.image_size // columns
        first_row, last_row, first_column, last_column = kept_cells(size, EXACT, granularity)
        assert top - high < first_row * high <= top
        assert top + height <= last_row * high < top + height + high
        assert left - wide < first_column * wide <= left
        assert left + width <= last_column * wide < left + width + wide


@pytest.mark.parametrize("unpad", ["exact", "released"])
def test_an_image_without_mosaic_is_its_cells_and_one_newline(unpad):
    config = dataclasses.replace(SMALL, pinpoints=(), unpad=unpad)
    assert grid_of((50, 70), config) == (0, 0) and tile_count((50, 70), config) == 1
    for granularity in config.granularities:
        index = visual_index((50, 70), config, granularity)
        first = config.pyramid_offsets[granularity]
        assert index.tolist() == [*range(first, first + granularity), -1]
        assert visual_count((50, 70), config, granularity) == granularity + 1
    assert make_tiles(Image.new("RGB", (50, 70)), config).shape == (1, 64, 64, 3)


def test_a_mosaic_of_one_tile():
    config = dataclasses.replace(SMALL, pinpoints=((64, 64),))
    index = visual_index((64, 64), config, 4)
    cells = np.arange(4) + config.pyramid_offsets[4]
    own = (cells + config.pyramid_rows).reshape(config.grids[0])
    assert index.tolist() == cells.tolist() + [token for row in own.tolist() for token in [*row, -1]]


def test_the_index_is_shared_so_it_cannot_be_written():
    with pytest.raises(ValueError):
        visual_index((500, 375), EXACT, 36)[0] = 1


def test_an_unknown_granularity_is_named():
    with pytest.raises(ValueError, match="granularity 40 .* 36, 72, 144, 288, 576"):
        visual_index((500, 375), EXACT, 40)
