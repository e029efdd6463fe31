"""The visual granularity scaler: no weights, only average pooling (paper, section 3.2)."""

import itertools

import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, ArrayLike, Float

from avg_llava_jax.config import ModelConfig


def scale(config: ModelConfig, features: Float[ArrayLike, "*M P D"]) -> Float[Array, "*M R D"]:
    """Pool the finest features of each tile to its pyramid, coarsest first.

    Row `config.pyramid_offsets[g] + cell` holds a cell of granularity g, cells row-major.

    With a 2 x 2 grid, two halvings, width first, and the patches a b / c d:

        granularity 4: a, b, c, d     granularity 2: (a+b)/2, (c+d)/2     granularity 1: (a+b+c+d)/4
        rows: [(a+b+c+d)/4, (a+b)/2, (c+d)/2, a, b, c, d]
    """
    levels = _pooled(config, features) if config.scaler.grids else _halved(config, features)
    return jnp.concatenate(levels, axis=-2)


def _halved(config: ModelConfig, features: Float[ArrayLike, "*M P D"]) -> list[Float[Array, "*M _ D"]]:
    """Each level halves the finer one; the last of an odd number of rows or columns is paired with itself."""
    levels = [features]
    for (rows, columns), (next_rows, next_columns) in itertools.pairwise(config.grids[::-1]):
        pooled = rearrange(levels[-1], "... (r c) d -> ... r c d", r=rows, c=columns)
        if next_rows < rows and rows % 2:
            pooled = jnp.concatenate([pooled, pooled[..., -1:, :, :]], axis=-3)
        if next_columns < columns and columns % 2:
            pooled = jnp.concatenate([pooled, pooled[..., -1:, :]], axis=-2)
        levels.append(reduce(pooled, "... (r a) (c b) d -> ... (r c) d", "mean", r=next_rows, c=next_columns))
    return levels[::-1]


def _pooled(config: ModelConfig, features: Float[ArrayLike, "*M P D"]) -> list[Float[Array, "*M _ D"]]:
    """Each level averages windows of the patches, as PyTorch's adaptive average pooling."""
    side = config.vision.grid
    patches = rearrange(features, "... (r c) d -> ... r c d", r=side, c=side).astype(jnp.float32)
    levels = []
    for grid in config.grids:
        rows, columns = (_averages(config, cells) for cells in grid)
        cells = jnp.einsum("ir,jc,...rcd->...ijd", rows, columns, patches, precision="highest")
        levels.append(rearrange(cells, "... r c d -> ... (r c) d").astype(features.dtype))
    return levels


def _averages(config: ModelConfig, cells: int) -> Float[Array, "cells patches"]:
    """Share of each patch of a side in each cell: fp32 (cells, patches); of 3 in 2: (.5, .5, 0), (0, .5, .5)."""
    side = config.vision.grid
    first, last = jnp.array(config.scaler.windows(side, cells)).T[..., None]
    at = jnp.arange(side)
    return ((first <= at) & (at < last)) / (last - first)
