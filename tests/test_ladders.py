"""Ladders on grids of any side: pooling against PyTorch's, and what un-padding keeps against painted pixels."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from avg_llava_jax.config import ModelConfig, ScalerConfig, VisionConfig, from_dict, named, to_dict
from avg_llava_jax.data.geometry import borders, visual_count, visual_index
from avg_llava_jax.data.tiles import best_resolution, grid_of, placement
from avg_llava_jax.models.scaler import scale

SIGLIP = VisionConfig(image_size=384, patch_size=14, encoder="siglip")
ODD = ModelConfig(vision=SIGLIP, pinpoints=((384, 768), (768, 384), (768, 768), (1152, 384)))
TWINS = ScalerConfig(grids=((9, 3), 4, (3, 9), 9, 1))


def with_ladder(side, scaler, **changes):
    vision = VisionConfig(image_size=4 * side, patch_size=4, encoder="siglip")
    return ModelConfig(vision=vision, scaler=scaler, pinpoints=((4 * side, 8 * side),), **changes)


def pooled(scaler, level, grid):
    """A level (1, D, r, c) from the finer one: PyTorch's pooling; for a list of grids from the patches."""
    if scaler.grids:
        return F.adaptive_avg_pool2d(level, grid)
    kernel = [-(-fine // coarse) for fine, coarse in zip(level.shape[2:], grid, strict=True)]
    return F.avg_pool2d(level, kernel, ceil_mode=True)


def test_the_ladder_of_siglip():
    assert ODD.grids == ((7, 7), (14, 7), (14, 14), (27, 14), (27, 27))
    assert ODD.granularities == ODD.tokens == (49, 98, 196, 378, 729)
    given = with_ladder(27, ScalerConfig(grids=(27, 14, 7, 4, 2)))
    assert given.granularities == (4, 16, 49, 196, 729)
    assert from_dict(to_dict(given)) == given


def test_rungs_of_equally_many_tokens_have_names_of_their_own():
    config = with_ladder(9, TWINS)
    assert config.granularities == ("1x1", "4x4", "3x9", "9x3", "9x9") and config.tokens == (1, 16, 27, 27, 81)
    assert config.pyramid_offsets == {"1x1": 0, "4x4": 1, "3x9": 17, "9x3": 44, "9x9": 71}
    assert named("9x3") == "9x3" and named("72") == 72
    wide, tall = (visual_index((36, 72), config, g) for g in ("3x9", "9x3"))
    assert np.count_nonzero(wide < 0) == 6 and np.count_nonzero(tall < 0) == 18
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("scaler", [ScalerConfig(), ScalerConfig(3, "height"), TWINS], ids=["width", "height", "grids"])
@pytest.mark.parametrize("side", [9, 13])
def test_pooling_is_pytorchs(side, scaler):
    if scaler.grids:
        scaler = ScalerConfig(grids=(*(grid for grid in scaler.grids if grid != 9), side))
    config = with_ladder(side, scaler)
    features = np.random.default_rng(0).normal(size=(2, side * side, 5)).astype(np.float32)
    ours = np.asarray(jax.jit(functools.partial(scale, config))(features))
    patches = level = torch.tensor(features).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    for grid, granularity in zip(config.grids[::-1], config.granularities[::-1], strict=True):
        level = pooled(scaler, patches if scaler.grids else level, grid)
        at, tokens = config.pyramid_offsets[granularity], config.tokens_at(granularity)
        theirs = level.permute(0, 2, 3, 1).reshape(2, tokens, 5).numpy()
        np.testing.assert_allclose(ours[:, at : at + tokens], theirs, atol=1e-6)


def which_patches(scaler, side):
    """For each number of cells of the ladder the patches that each cell averages, bool (cells, side), by PyTorch."""
    found, level = {}, torch.eye(side)[None]
    ladder = scaler.ladder(side)
    for cells in sorted({n for grid in ladder for n in grid}, reverse=True):
        if scaler.grids:
            weights = F.adaptive_avg_pool1d(torch.eye(side)[None], cells)
        else:
            weights = level = F.avg_pool1d(level, 2, ceil_mode=True) if cells < level.shape[2] else level
        found[cells] = (weights[0].T > 0).numpy()
    return found


def painted(start, length, tiles, vision):
    """Which patches of a mosaic show a pixel of the image, along one axis: bool (tiles, patches)."""
    pixels = np.zeros(tiles * vision.image_size, bool)
    pixels[start : start + length] = True
    used = vision.grid * vision.patch_size
    return pixels.reshape(tiles, -1)[:, :used].reshape(tiles, vision.grid, vision.patch_size).any(axis=2)


def test_ten_thousand_cases_against_painted_pixels():
    """Random sizes, grids, ladders and rungs: which cells are kept, and how many visual tokens an image has."""
    rng, cases = np.random.default_rng(0), 0
    while cases < 10_000:
        grid, patch = int(rng.integers(2, 31)), int(rng.integers(1, 7))
        vision = VisionConfig(image_size=grid * patch + int(rng.integers(0, patch)), patch_size=patch, encoder="siglip")
        if rng.random() < 0.5:
            most = 2 * (grid - 1).bit_length()
            scaler = ScalerConfig(int(rng.integers(0, min(most, 6) + 1)), ("width", "height")[rng.integers(2)])
        else:
            given = {tuple(map(int, rng.integers(1, grid + 1, 2))) for _ in range(4)} | {(grid, grid)}
            scaler = ScalerConfig(grids=tuple(given))
        side = vision.image_size
        pinpoints = tuple((side * int(x), side * int(y)) for x, y in rng.integers(1, 5, (4, 2)))
        config = ModelConfig(vision=vision, scaler=scaler, pinpoints=pinpoints)
        patches_of = which_patches(scaler, grid)
        for size in rng.integers(1, 6 * side, (12, 2)).tolist():
            size = tuple(size)
            left, top, width, height = placement(size, best_resolution(size, pinpoints))
            rows, columns = grid_of(size, config)
            down, across = painted(top, height, rows, vision), painted(left, width, columns, vision)
            for granularity, cells in zip(config.granularities, config.grids, strict=True):
                kept_rows = (down @ patches_of[cells[0]].T).ravel().nonzero()[0]
                kept_columns = (across @ patches_of[cells[1]].T).ravel().nonzero()[0]
                index = visual_index(size, config, granularity)
                mosaic = index[cells[0] * cells[1] :].reshape(len(kept_rows), len(kept_columns) + 1)
                tile, row = np.divmod(mosaic[:, :-1], config.pyramid_rows)
                cell = row - config.pyramid_offsets[granularity]
                y = (tile - 1) // columns * cells[0] + cell // cells[1]
                x = (tile - 1) % columns * cells[1] + cell % cells[1]
                assert (y == kept_rows[:, None]).all() and (x == kept_columns).all() and (mosaic[:, -1] == -1).all()
                assert visual_count(size, config, granularity) == len(index)
                cases += 1


def test_borders_of_cells_that_are_not_equally_wide():
    """Two tiles of 5 patches of 4 pixels: windows of 2, 2 and 1 patches in each."""
    config = with_ladder(5, ScalerConfig(1))
    y, x = borders((20, 40), config, 15)
    assert y.tolist() == list(range(0, 41, 4)) and x.tolist() == [0, 8, 16, 20]
    padded = dataclasses.replace(config, pinpoints=(), several="square")
    y, x = borders((40, 20), padded, 15)  # lies in the middle of 40 x 40
    assert y.tolist() == [-10, -2, 6, 14, 22, 30] and x.tolist() == [0, 16, 32, 40]


@pytest.mark.parametrize(
    ("scaler", "message"),
    [
        (ScalerConfig(halvings=9), "scaler.halvings=9 needs a larger grid than 5 x 5"),
        (ScalerConfig(grids=(5, 6)), "give different grids of 1 to 5 rows and columns"),
        (ScalerConfig(grids=(3, 2)), "one of them 5 x 5"),
        (ScalerConfig(grids=(5, 3, (3, 3))), "give different grids"),
        (ScalerConfig(grids=(5, "3")), "must hold sides, or pairs of rows and columns"),
    ],
)
def test_no_such_ladder(scaler, message):
    with pytest.raises(ValueError, match=message) as error:
        with_ladder(5, scaler)
    assert "\n" not in str(error.value)
