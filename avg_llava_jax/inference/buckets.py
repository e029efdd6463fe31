"""Every static size of the engine. XLA compiles one program for each, so there are few, and all are known beforehand.

A ladder is an ascending tuple; what is needed is padded to the smallest rung that holds it.
"""

from __future__ import annotations

import dataclasses

from avg_llava_jax.config import ModelConfig

STEPS = 8
"""Tokens that a row decodes at most in one call."""

SMALLEST_CHUNK = 32
SMALLEST_WINDOW = 128
ROUTED_TEXT = 256
MICRO_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Ladders:
    """slots: rows of the KV cache; capacity: positions of each; pages: tiles whose pyramids are kept.

    lanes: slots whose prompts are read together, one for each part of a mesh's batch axis.
    chunks: prompt positions read at once. windows: cached positions that are attended to.
    rows: slots that decode together. tiles: tiles encoded together. images: images routed together, of at
    most `image_tiles` tiles, with one of `texts` as the length of their prompts.
    """

    slots: int
    capacity: int
    pages: int
    lanes: int
    chunks: tuple[int, ...]
    windows: tuple[int, ...]
    rows: tuple[int, ...]
    tiles: tuple[int, ...]
    images: tuple[int, ...]
    image_tiles: int
    texts: tuple[int, ...]

    @property
    def prefills(self) -> list[tuple[int, int]]:
        """(chunk, window) of every prefill program; window 0 is a prompt from its start."""
        return [(chunk, window) for chunk in self.chunks for window in (0, *self.windows)]

    @property
    def decodes(self) -> list[tuple[int, int]]:
        """(rows, window) of every decode program."""
        return [(rows, window) for rows in self.rows for window in self.windows]

    @property
    def routes(self) -> list[tuple[int, int]]:
        """(images, text) of every routing program."""
        return [(images, text) for images in self.images for text in self.texts]


def make_ladders(config: ModelConfig, slots: int, chunk: int, pages: int, lanes: int = 1) -> Ladders:
    """The ladders of a model.

    For the 7B model, 8 slots and chunks of 256: chunks 32 64 128 256, windows 528 1040 2064 4112, rows 1 4 8,
    tiles 3 4 5 8, images 1 4, texts 256 4096.
    """
    longest = config.language.max_length
    capacity = _round(longest + STEPS)
    side = config.vision.image_size
    counts = {1 + (width // side) * (height // side) for width, height in config.pinpoints} or {1}
    return Ladders(
        slots=slots,
        capacity=capacity,
        pages=max(pages, *counts),
        lanes=min(lanes, slots),
        chunks=_powers(SMALLEST_CHUNK, 2, chunk),
        windows=_windows(capacity),
        rows=_powers(1, 4, slots),
        tiles=tuple(sorted({*counts, max(MICRO_BATCH, *counts)})),
        images=(1, 4),
        image_tiles=max(counts),
        texts=_powers(ROUTED_TEXT, longest, longest),
    )


def rung(ladder: tuple[int, ...], need: int) -> int:
    """The smallest rung that holds `need`; the largest where none does."""
    return next((size for size in ladder if size >= need), ladder[-1])


def chunk_rung(ladder: tuple[int, ...], left: int) -> int:
    """The chunk to read next of so many positions: the one that holds them, or a smaller one if it would be half empty.

    Half empty is under three quarters, counted in smallest chunks: one call for 170, two for 130.

    >>> chunk_rung((32, 64, 128, 256), 130), chunk_rung((32, 64, 128, 256), 170), chunk_rung((32, 64, 128, 256), 900)
    (128, 256, 256)
    """
    up = rung(ladder, left)
    if 4 * -(-left // ladder[0]) * ladder[0] >= 3 * up:
        return up
    return max(size for size in ladder if size < up)


def _powers(first: int, factor: int, last: int) -> tuple[int, ...]:
    """first, first * factor, ... as long as they are below `last`, and `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)


def _windows(capacity: int) -> tuple[int, ...]:
    """`capacity` and at most three halves of it in turn, none below SMALLEST_WINDOW."""
    sizes = [capacity]
    while len(sizes) < 4 and sizes[-1] >= 2 * SMALLEST_WINDOW:
        sizes.append(_round(-(-sizes[-1] // 2)))
    return tuple(reversed(sizes))


def _round(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // 16) * 16
