"""Buckets: every static size of the engine. XLA compiles a program for each combination of sizes.

Buckets of one kind are an ascending tuple; a size is padded to the smallest bucket that holds it, or to the largest if
none does. `server_buckets` makes few: all programs are compiled before the server answers, and long prompts prefill in
chunks. `offline_buckets` makes many: a program is compiled at its first use, and a prompt prefills whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from avg_llava_jax.config import ModelConfig

STEPS = 8
"""The most tokens that a row decodes in one call."""

SMALLEST_LENGTH, FINER_FROM = 32, 256
SMALLEST_WINDOW = 128
ROUTED_TEXT = 256
MICRO_BATCH = 8

VERIFIED = 32
"""The most tokens that one prefill predicts along a draft."""


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The static sizes of an engine; a field that is a tuple holds the buckets of one axis.

    slots: slots of the cache. capacity: positions of a slot. pages: tiles whose pyramids are kept.
    batch_shards: parts of a mesh's batch axis; with several, prefill and decode take all slots, so that each device
        works on its own slots.
    prompts: prompts in one prefill. chunks: positions of a prefill from a prompt's start. resume_chunks: positions of
        one that follows a cached prefix. longest_draft_chunk: the longest chunk that may end in a draft.
    windows: cache positions that are attended to. rows: slots in one decode.
    tiles: tiles in one encode. images: images in one route, each with at most `image_tiles` tiles. texts: text tokens
        of their prompts.
    greedy: whether greedy decoding has programs of its own, which compile faster and sort nothing.
    """

    slots: int
    capacity: int
    pages: int
    batch_shards: int
    prompts: tuple[int, ...]
    chunks: tuple[int, ...]
    resume_chunks: tuple[int, ...]
    longest_draft_chunk: int
    windows: tuple[int, ...]
    rows: tuple[int, ...]
    tiles: tuple[int, ...]
    images: tuple[int, ...]
    image_tiles: int
    texts: tuple[int, ...]
    on_demand: bool

    @property
    def prefills(self) -> list[tuple[int, int, int, int]]:
        """(prompts, chunk, window, predicted) of every prefill program, if none is compiled on demand.

        window 0: a prompt without a cached prefix.
        """
        fresh = [(chunk, 0) for chunk in self.chunks]
        sizes = fresh + [(chunk, window) for chunk in self.resume_chunks for window in self.windows if window >= chunk]
        return [(prompts, *size, self.predicted(size[0], False)) for prompts in self.prompts for size in sizes]

    def predicted(self, chunk: int, draft: bool) -> int:
        """How many of a chunk's last positions predict a token: 1, or `VERIFIED` where it may end in a draft."""
        return VERIFIED if draft or (chunk <= self.longest_draft_chunk and not self.on_demand) else 1

    @property
    def decodes(self) -> list[tuple[int, int]]:
        """(rows, window) of every decode program."""
        return [(rows, window) for rows in self.rows for window in self.windows]

    @property
    def routes(self) -> list[tuple[int, int]]:
        """(images, text) of every routing program."""
        return [(images, text) for images in self.images for text in self.texts]

    @property
    def programs(self) -> int:
        """The number of programs."""
        shared = len(self.windows) + len(self.prompts) + 1  # copies, first tokens, an empty cache
        return len(self.tiles) + len(self.routes) + len(self.prefills) + len(self.decodes) + shared


def server_buckets(config: ModelConfig, slots: int, chunk: int, pages: int, batch_shards: int = 1) -> Buckets:
    """Few buckets, for an engine that compiles every program before it answers.

    For the 7B model, 8 slots and chunks of 256: prompts 1 4, chunks 64 256 (64 may verify a draft), windows
    528 1040 2064 4112, rows 1 4 8, tiles 3 4 5 8, images 1 4, texts 256 4096.
    """
    longest = config.language.max_length
    capacity = _multiple(longest + STEPS)
    counts = tile_counts(config)
    chunks = _powers(min(64, chunk), 4, chunk)
    return Buckets(
        slots=slots,
        capacity=capacity,
        pages=max(pages, *counts),
        batch_shards=batch_shards,
        prompts=(slots,) if batch_shards > 1 else tuple(sorted({1, min(4, slots)})),
        chunks=chunks,
        resume_chunks=chunks,
        longest_draft_chunk=chunks[0],
        windows=_halves(capacity),
        rows=(slots,) if batch_shards > 1 else _powers(1, 4, slots),
        tiles=tuple(sorted({*counts, max(MICRO_BATCH, *counts)})),
        images=(1, 4),
        image_tiles=max(counts),
        texts=_powers(ROUTED_TEXT, longest, longest),
        on_demand=False,
    )


def offline_buckets(
    config: ModelConfig, slots: int, length: int, pages: int, batch_shards: int = 1, prompts: Sequence[int] = ()
) -> Buckets:
    """Buckets of an engine that compiles programs at their first use.

    length: positions of a prompt and its answer together. prompts: lengths of the prompts to come, if known;
    `few_buckets` then fits the chunks to them, and a prompt that prefills alone is padded to a full call.
    """
    longest, together = config.language.max_length, min(8, slots)
    capacity = length_bucket(min(length, longest), 2 * longest) + STEPS
    lengths = tuple(size for size in length_buckets(longest) if size <= capacity)
    counts = tile_counts(config)
    most = max(counts) if slots == 1 else max(32, *counts)
    return Buckets(
        slots=slots,
        capacity=capacity,
        pages=max(pages, *counts),
        batch_shards=batch_shards,
        prompts=(slots,) if batch_shards > 1 else tuple(sorted({together} if prompts else {1, together})),
        chunks=few_buckets(lengths, prompts) if prompts else lengths,
        resume_chunks=tuple(size for size in _powers(16, 4, 1024) if size <= capacity),
        longest_draft_chunk=capacity,
        windows=_powers(min(SMALLEST_WINDOW, capacity), 2, capacity),
        rows=(slots,) if batch_shards > 1 else tuple(sorted({1, slots})),
        tiles=tuple(sorted({*counts, most})) if slots == 1 else (max(counts), most),
        images=tuple(sorted({1, min(8, slots)})),
        image_tiles=max(counts),
        texts=_powers(64, 2, max(64, longest)),
        on_demand=True,
    )


def few_buckets(sizes: Sequence[int], needs: Sequence[int], most: int = 6) -> tuple[int, ...]:
    """Choose at most `most` of the ascending `sizes`, so that they hold all `needs` with the least padding.

    >>> few_buckets((16, 32, 64, 128), [10, 30, 31, 33, 100], most=2)
    (32, 128)
    """
    counts = Counter(bucket(tuple(sizes), need) for need in needs)
    used = sorted(counts)
    # best[k, j]: the cost of holding all needs up to the j-th used size in k buckets, the last of that size; buckets.
    best: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {(0, 0): (0, ())}
    for k in range(1, min(most, len(used)) + 1):
        for j in range(1, len(used) + 1):
            options = [
                (cost + used[j - 1] * sum(counts[size] for size in used[i:j]), (*chosen, used[j - 1]))
                for i in range(j)
                if (k - 1, i) in best
                for cost, chosen in [best[k - 1, i]]
            ]
            if options:
                best[k, j] = min(options)
    return min(plan for (_, j), plan in best.items() if j == len(used))[1]


def bucket(ladder: tuple[int, ...], need: int) -> int:
    """The smallest bucket that holds `need`; the largest where none does."""
    return next((size for size in ladder if size >= need), ladder[-1])


def chunk_bucket(ladder: tuple[int, ...], left: int) -> int:
    """The size of the next chunk where `left` positions remain: the bucket that holds them, if mostly full.

    Otherwise the next smaller bucket. Mostly full is at least three quarters, counted in smallest chunks: 170 positions
    take one chunk of 256, 130 take 128 first.

    >>> [chunk_bucket((32, 64, 128, 256), left) for left in (130, 170, 900)]
    [128, 256, 256]
    """
    up = bucket(ladder, left)
    if 4 * -(-left // ladder[0]) * ladder[0] >= 3 * up:
        return up
    return max(size for size in ladder if size < up)


def length_bucket(length: int, limit: int, smallest: int = SMALLEST_LENGTH) -> int:
    """The bucket of a length: 32, 48, 64, 96, ... 256, 320, 384, 448, 512, 640, ..., at most `limit`.

    Two buckets per octave, four from 256, where padding costs more than compiling: padding stays below a third, then
    below a fifth. smallest: the first bucket, a power of two.

    >>> [length_bucket(n, 4096) for n in (1, 65, 97, 400, 3000, 4000)]
    [32, 96, 128, 448, 3072, 4096]
    """
    octave = smallest
    while 2 * octave < length:
        octave *= 2
    step = octave // (4 if octave >= FINER_FROM else 2)
    size = octave + step * math.ceil(max(0, length - octave) / step)
    return max(length, min(size, limit))


def length_buckets(longest: int) -> tuple[int, ...]:
    """All buckets of `length_bucket`, from 16 up to the one that holds `longest`.

    >>> length_buckets(300)
    (16, 32, 48, 64, 96, 128, 192, 256, 320)
    """
    sizes = [16]
    while sizes[-1] < longest:
        sizes.append(length_bucket(sizes[-1] + 1, 2 * longest))
    return tuple(sizes)


def tile_counts(config: ModelConfig) -> set[int]:
    """The numbers of tiles to encode at once: those that an image may have, tile 0 included.

    If there are many, such as the 18 of LLaVA-OneVision: powers of two and the largest, so that few programs compile.
    """
    side = config.vision.image_size
    alone = {1} if config.several == "square" or not config.pinpoints else set()
    counts = alone | {1 + (width // side) * (height // side) for width, height in config.pinpoints}
    return counts if len(counts) <= 8 else set(_powers(1, 2, max(counts)))


def _powers(first: int, factor: int, last: int) -> tuple[int, ...]:
    """first, first * factor, ... while below `last`, then `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)


def _halves(capacity: int) -> tuple[int, ...]:
    """`capacity`, halved up to three times, ascending; none below SMALLEST_WINDOW."""
    sizes = [capacity]
    while len(sizes) < 4 and sizes[-1] >= 2 * SMALLEST_WINDOW:
        sizes.append(_multiple(-(-sizes[-1] // 2)))
    return tuple(reversed(sizes))


def _multiple(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // 16) * 16
