"""Targets of phase `grounding`, which trains a randomly initialised vision encoder: words for each patch.

A record may assign words to boxes of its picture (`words: [{"box": [x0, y0, x1, y1], "text": "orange 7"}]`, in
pixels; later boxes cover earlier ones). Phase `grounding` trains each patch to predict the words of the box
that contains the patch's centre. A model that starts from a pre-trained CLIP skips this phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.tiles import grid_of, mosaic_box, placement
from avg_llava_jax.data.tokenizer import Tokenizer

WORDS = 2
"""Target tokens per patch: a shirt's colour and its number."""


class Words(NamedTuple):
    """A box (x0, y0, x1, y1) in pixels of the picture, and the token ids of its content."""

    box: tuple[float, float, float, float]
    ids: tuple[int, ...]


def read_words(entries: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> tuple[Words, ...]:
    """Reads the `words` of a record, tokenized as inside a sentence and truncated to WORDS tokens.

    Raises BadSample `malformed_words`.
    """
    try:
        return tuple(
            Words(tuple(map(float, entry["box"])), tuple(tokenizer.encode(" " + entry["text"])[:WORDS]))
            for entry in entries
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadSample("malformed_words", f"each of `words` needs a box of 4 numbers and a text: {error!r}") from None


def patch_centres(size: tuple[int, int], config: ModelConfig) -> np.ndarray:
    """Centres of the patches of all tiles: float (T, P, 2), x and y in pixels of a (width, height) picture.

    Tile 0 covers the complete picture, so with a 2 x 2 grid and a 40 x 20 picture its centres are
    (10, 5) (30, 5) (10, 15) (30, 15). Patches in the padding of the mosaic are outside the picture.
    """
    width, height = size
    grid, side = config.vision.grid, config.vision.image_size
    steps = (np.arange(grid) + 0.5) * config.vision.patch_size / side
    cell_x, cell_y = np.meshgrid(steps, steps)
    x0, y0, across, down = 0, 0, width, height
    if not config.pinpoints:
        y0, y1, x0, x1 = mosaic_box(size, config)
        across, down = x1 - x0, y1 - y0
    whole = np.stack([x0 + cell_x * across, y0 + cell_y * down], axis=-1)
    tiles = [whole.reshape(-1, 2)]
    rows, columns = grid_of(size, config)
    left, top, inner_width, inner_height = placement(size, (columns * side, rows * side)) if rows else (0, 0, 1, 1)
    for row in range(rows):
        for column in range(columns):
            x = ((column + cell_x) * side - left) * width / inner_width
            y = ((row + cell_y) * side - top) * height / inner_height
            tiles.append(np.stack([x, y], axis=-1).reshape(-1, 2))
    return np.stack(tiles)


def patch_words(words: Sequence[Words], size: tuple[int, int], config: ModelConfig) -> np.ndarray:
    """Target token ids of each patch: int32 (T, P, WORDS), -1 = none; where boxes overlap, the last one wins."""
    x, y = np.moveaxis(patch_centres(size, config), -1, 0)
    named = np.full((*x.shape, WORDS), -1, np.int32)
    for (x0, y0, x1, y1), ids in words:
        inside = (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        named[inside] = [*ids, *[-1] * (WORDS - len(ids))]
    return named
