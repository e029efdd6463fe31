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
    levels = [features]
    grids = config.grids[::-1]
    for (rows, columns), (next_rows, next_columns) in itertools.pairwise(grids):
        pooled = rearrange(levels[-1], "... (r c) d -> ... r c d", r=rows, c=columns)
        pooled = reduce(pooled, "... (r a) (c b) d -> ... (r c) d", "mean", r=next_rows, c=next_columns)
        levels.append(pooled)
    return jnp.concatenate(levels[::-1], axis=-2)
