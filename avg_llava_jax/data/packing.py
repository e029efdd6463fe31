"""Packing: samples with any number of images and turns become one batch of fixed-shape integer arrays.

The device holds, for each sample, three tables: the embeddings of its text (L rows), the pyramids
of its tile slots (T*R rows) and one newline row. `index` gives, for each packed position, a row of
their concatenation, so one gather packs a granularity:

    row j < L              text token j (placeholders are not text)
    row L + slot*R + r     pyramid row r of a tile slot; r = offset of the granularity + cell
    row L + T*R            the newline

Worked example. Tiles of 2x2 patches, two halvings: granularities 1, 2, 4 at pyramid rows 0, 1, 3,
so R = 7. Ids `7 8 IMAGE 9 5 2`, labels on `5 2`; an image with a mosaic of one tile, T = 2; L = 6:

    text       7 8 9 5 2 0                                targets    5 2
    index[1]   0 1 | 6 | 13 20 | 2 3 4                    target_at  5 6      length  8
               7 8   t0  t1 nl   9 5 2
    index[4]   0 1 | 9 10 11 12 | 16 17 20 18 19 20 | 2 3 4
               7 8   tile 0       t1 t1 nl t1 t1 nl   9 5 2
                                                          target_at  12 13    length  15

The newline is row 6 + 2*7 = 20. `target_at` is the packed position *before* a target: the output
there predicts the target.

Several samples may share a row, one after another, which leaves less padding than a row each: their texts, tile slots,
images and answers follow one another too, and they share the newline. A row of two samples, packed to 3 and 4:

    length     3 4                                        segment 0 0 0 1 1 1 1   position 0 1 2 0 1 2 3

A position attends only to earlier ones of its sample, and counts from the sample's start (`models.language`), so all
results equal those of the sample in a row of its own.

Truncation, per granularity: a sequence ends at `config.language.max_length`; if that is inside an
image's tokens, it ends before that image. The rest is dropped, so a sequence never holds part of an
image. A coarser granularity may keep more of a sample.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from avg_llava_jax.config import Granularity, ModelConfig
from avg_llava_jax.data.conversation import IGNORE, IMAGE, Tokens
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.geometry import visual_count, visual_index, visual_weight
from avg_llava_jax.data.grounding import WORDS, Words, patch_words
from avg_llava_jax.data.images import ImageRef
from avg_llava_jax.data.tiles import Size, make_tiles, tile_count

# Shares of the largest possible visual length (no padding in any tile). With the default pinpoints
# 16:9 pictures need .67, 4:3 ones .79, square ones .98; text-only samples need 0.
FILLS = (0.0, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A tokenized conversation and references to its images.

    sizes: (width, height) of each image after EXIF rotation, in the order of the placeholders.
    kind: category of the question, for evaluation; free text.
    words: boxes of the first image and the token ids of their content, see `grounding`.

    Raises BadSample `image_count` if placeholders, images and sizes differ in number.
    """

    id: str
    tokens: Tokens
    sizes: tuple[Size, ...] = ()
    images: tuple[ImageRef, ...] = ()
    kind: str | None = None
    words: tuple[Words, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens.images == len(self.sizes) == len(self.images):
            raise BadSample(
                "image_count",
                f"sample {self.id}: {self.tokens.images} placeholders, {len(self.images)} images, "
                f"{len(self.sizes)} sizes",
            )


def make_sample(id: str, tokens: Tokens, images: Sequence[ImageRef] = (), kind: str | None = None) -> Sample:
    """A sample whose image sizes are read from the headers; raises BadSample as `ImageRef.size`."""
    return Sample(id, tokens, tuple(image.size for image in images), tuple(images), kind)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a batch: tile slots T, image slots I, text tokens L, answer tokens A of a row.

    fill: share of the largest visual length of T tiles that is reserved, in [0, 1].
    samples: the most samples that share a row.
    lengths: S at each granularity of the model, 0 = not used; () = as `fill` says.
    longest: the same of the longest sample of a row.
    """

    tiles: int
    images: int
    text: int
    answer: int
    fill: float
    samples: int = 1
    lengths: tuple[int, ...] = ()
    longest: tuple[int, ...] = ()

    def length(self, config: ModelConfig, granularity: Granularity) -> int:
        """S, the packed length at one granularity; of one sample at most `max_length`."""
        if self.lengths:
            return self.lengths[config.granularities.index(granularity)]
        return min(self.text + self.visual(config, granularity), self.samples * config.language.max_length)

    def visual(self, config: ModelConfig, granularity: Granularity) -> int:
        """Packed positions reserved for visual tokens and newlines."""
        return math.ceil(self.fill * self.tiles * _tile_bound(config, granularity))


def shape_of(sample: Sample, config: ModelConfig, granularities: Sequence[Granularity] | None = None) -> Shape:
    """The smallest shape of the ladder that holds a sample at all these granularities (default: all).

    The ladder: T in 1..6, 8, 12, 16, 24, ...; I and L powers of two (L from 16, at most
    `max_length`); A is L / 4 or L; fill in FILLS. With the default pinpoints, at most one image per
    sample and texts up to 512 tokens, it has at most 6 L x 2 A x (1 + 3 T x 3 fills) = 120 shapes.
    """
    granularities = config.granularities if granularities is None else granularities
    limit = config.language.max_length
    layout = _layout(sample)
    text = min(len(layout.text), limit)
    tiles = _step(max(1, tiles_of(sample, config)))
    images = _power(max(1, len(sample.sizes)))
    room = min(max(16, _power(text)), limit)
    answers = int(np.count_nonzero(layout.labels[:limit] != IGNORE))
    quarter = max(1, room // 4)
    answer = quarter if answers <= quarter else room
    for fill in FILLS:
        shape = Shape(tiles, images, room, answer, fill)
        if all(_visual(sample, config, g) <= shape.visual(config, g) for g in granularities):
            return shape
    raise AssertionError("fill 1 holds every image")  # its bound counts every cell and newline


def row_shape(
    row: Sequence[Sample],
    config: ModelConfig,
    granularities: Sequence[Granularity] | None = None,
    close: bool = True,
) -> Shape:
    """The shape that a row's samples need at all these granularities (default: all), each size rounded up separately.

    close: by at most a sixteenth (lengths) or an eighth (texts, answers, tiles), such as 17 -> 18, 100 -> 104, 200 ->
        208; `pipeline.choose_shapes` merges these many shapes into few. Otherwise to powers of two, tiles and lengths
        to 1..6, 8, 12, 16, 24, ...: fewer and larger shapes.
    """
    granularities = config.granularities if granularities is None else granularities
    limit, layouts = config.language.max_length, [_layout(sample) for sample in row]
    text = max(16, sum(min(len(layout.text), limit) for layout in layouts))
    answer = max(4, sum(int(np.count_nonzero(layout.labels[:limit] != IGNORE)) for layout in layouts))
    tiles = max(1, sum(tiles_of(sample, config) for sample in row))
    images = _power(max(1, sum(len(sample.sizes) for sample in row)))
    sizes = [[max(16, min(packed_length(sample, config, g), limit)) for sample in row] for g in granularities]
    few, fine = (_part, functools.partial(_part, of=32)) if close else (_power, _step)
    most = len(row) * limit
    text, answer = min(few(text), most), min(few(answer), most)
    total, one = (
        {g: min(fine(take(own)), bound) for g, own in zip(granularities, sizes, strict=True)}
        for take, bound in ((sum, most), (max, limit))
    )
    lengths, longest = (tuple(of.get(g, 0) for g in config.granularities) for of in (total, one))
    tiles = few(tiles) if close else _step(tiles)
    return Shape(tiles, images, text, answer, 0.0, _power(len(row)), lengths, longest)


def merge(shapes: Iterable[Shape]) -> Shape:
    """The smallest shape that is at least as large as each of `shapes`, which all have `lengths`, or none."""
    rows = [(s.tiles, s.images, s.text, s.answer, s.fill, s.samples, *s.lengths, *s.longest) for s in shapes]
    largest = tuple(map(max, zip(*rows, strict=True)))
    half = (len(largest) - 6) // 2
    return Shape(*largest[:6], largest[6 : 6 + half], largest[6 + half :])


def packed_length(sample: Sample, config: ModelConfig, granularity: Granularity) -> int:
    """Number of text tokens, visual tokens and newlines of a sample before truncation."""
    return len(sample.tokens.ids) - len(sample.sizes) + _visual(sample, config, granularity)


def labels_left(sample: Sample, config: ModelConfig, granularity: Granularity) -> int:
    """Number of answer tokens that remain after truncation at a granularity."""
    layout = _layout(sample)
    placed = _place(layout, sample.sizes, config, [granularity] * len(sample.sizes))
    return int(np.count_nonzero(_target_at(layout, placed) >= 0))


def tile_counts(sample: Sample, config: ModelConfig) -> list[int]:
    """The number of tiles of each image of a sample."""
    own = config.of(len(sample.sizes))
    return [tile_count(size, own) for size in sample.sizes]


def tiles_of(sample: Sample, config: ModelConfig) -> int:
    """The number of tiles of a sample."""
    return sum(tile_counts(sample, config))


def check_labels(sample: Sample, config: ModelConfig, granularities: Sequence[Granularity]) -> None:
    """Raises BadSample `no_label_left` if truncation leaves no answer token at one of the granularities."""
    limit = config.language.max_length
    for granularity in reversed(config.ascending(granularities)):
        need = packed_length(sample, config, granularity)
        if not labels_left(sample, config, granularity):
            raise BadSample(
                "no_label_left",
                f"sample {sample.id}: of {need} tokens at granularity {granularity}, cut at {limit}, none has a label",
            )
        if need <= limit:
            break  # nothing is cut, nor at coarser ones


def load_tiles(sample: Sample, config: ModelConfig) -> np.ndarray:
    """Decodes the images of a sample: uint8 (t, H, W, 3), their tiles concatenated.

    Raises BadSample if an image cannot be read, or its pixels differ from the size in its header.
    """
    side = config.vision.image_size
    parts = [np.zeros((0, side, side, 3), np.uint8)]
    for ref, size in zip(sample.images, sample.sizes, strict=True):
        image = ref.load()
        if image.size != tuple(size):
            raise BadSample("corrupt_image", f"{ref.name}: header says {size}, pixels are {image.size}")
        parts.append(make_tiles(image, config.of(len(sample.sizes))))
    return np.concatenate(parts)


def collate(
    samples: Sequence[Sample],
    shape: Shape,
    config: ModelConfig,
    granularities: Sequence[Granularity] | None = None,
    tiles: Sequence[np.ndarray] | None = None,
    rows: Sequence[int] | None = None,
) -> dict[str, np.ndarray | dict[int, np.ndarray]]:
    """Builds a batch of B rows with the static sizes of `shape`.

    granularities: those to build `index` for; default all of the model's.
    tiles: for each sample an array (t, ...) of its tiles; default `load_tiles`.
    rows: the row of each sample, ascending from 0 without gaps; default a row each.

    pixels       uint8 (B,T,H,W,3)   zero where there is no tile
    tile_image   int32 (B,T)         ordinal within the row of the slot's image, -1 empty
    first_tile   int32 (B,I)         slot of tile 0 of each image, -1 no such image
    text         int32 (B,L)         token ids without placeholders, 0-padded
    instruction  bool  (B,L)         tokens the router may read: those without a label
    index        {g: int32 (B,S_g)}  row of each packed position, 0 in the padding
    length       {g: int32 (B,)}     packed length
    targets      int32 (B,A)         answer token ids, 0-padded
    target_at    {g: int32 (B,A)}    position that predicts the target, -1 absent or cut off

    With `config.most_tiles` index is (B,S_g,4), four rows for each position, and

    weight       {g: float32 (B,S_g,4)}  their weights, 0 in the padding

    Where K = `shape.samples` samples may share a row, length is (B,K), 0 = no such sample, and

    reach         {g: bool (B,W)}    all False; its width is the longest sample's, how far back attention reaches
    text_sample   int32 (B,L)        ordinal within the row of the sample of each token, -1 in the padding
    image_sample  int32 (B,I)        and of each image, -1 no such image

    Raises ValueError if a sample does not fit the shape.
    """
    granularities = tuple(config.granularities if granularities is None else granularities)
    corners = (4,) if config.most_tiles else ()
    tiles = [load_tiles(sample, config) for sample in samples] if tiles is None else tiles
    rows = range(len(samples)) if rows is None else rows
    count, limit, many = rows[-1] + 1, config.language.max_length, shape.samples > 1
    batch = {
        "pixels": np.zeros((count, shape.tiles, *tiles[0].shape[1:]), tiles[0].dtype),
        "tile_image": np.full((count, shape.tiles), -1, np.int32),
        "first_tile": np.full((count, shape.images), -1, np.int32),
        "text": np.zeros((count, shape.text), np.int32),
        "instruction": np.zeros((count, shape.text), bool),
        "index": {g: np.zeros((count, shape.length(config, g), *corners), np.int32) for g in granularities},
        "length": {g: np.zeros((count, shape.samples) if many else count, np.int32) for g in granularities},
        "targets": np.zeros((count, shape.answer), np.int32),
        "target_at": {g: np.full((count, shape.answer), -1, np.int32) for g in granularities},
    }
    if config.most_tiles:
        batch["weight"] = {g: np.zeros(batch["index"][g].shape, np.float32) for g in granularities}
    if many:
        reach = {g: shape.longest[config.granularities.index(g)] for g in granularities}
        batch["reach"] = {g: np.zeros((count, size), bool) for g, size in reach.items()}
        batch["text_sample"] = np.full((count, shape.text), -1, np.int32)
        batch["image_sample"] = np.full((count, shape.images), -1, np.int32)
    for b, members in itertools.groupby(zip(rows, samples, tiles, strict=True), key=lambda member: member[0]):
        slot = image = token = answer = 0  # where the next sample of the row begins
        at = dict.fromkeys(granularities, 0)
        for k, (_, sample, own) in enumerate(members):
            _fits(sample, "place among the samples of its row", k + 1, shape.samples)
            layout, counts = _layout(sample), tile_counts(sample, config)
            first = _first_slots(sample, shape, config, slot, image)
            batch["pixels"][b, slot : slot + len(own)] = own
            for start, tile_total in zip(first, counts, strict=True):
                batch["first_tile"][b, image] = start
                batch["tile_image"][b, start : start + tile_total] = image
                if many:
                    batch["image_sample"][b, image] = k
                image += 1
            text, labels = layout.text[:limit], layout.labels[:limit]
            targets = labels[labels != IGNORE]
            texts, answers = slice(token, token + len(text)), slice(answer, answer + len(targets))
            _fits(sample, "text tokens", texts.stop, shape.text)
            _fits(sample, "answer tokens", answers.stop, shape.answer)
            batch["text"][b, texts] = text
            batch["instruction"][b, texts] = labels == IGNORE
            batch["targets"][b, answers] = targets
            if many:
                batch["text_sample"][b, texts] = k
            for g in granularities:
                placed = _place(layout, sample.sizes, config, [g] * len(sample.sizes))
                _fits(sample, f"packed tokens at granularity {g}", at[g] + placed.length, batch["index"][g].shape[1])
                places = slice(at[g], at[g] + placed.length)
                _fill(batch["index"][g][b, places], placed, first, shape, config, token)
                if config.most_tiles:
                    batch["weight"][g][b, places] = _weight(placed, sample.sizes, config, [g] * len(first))
                batch["length"][g][(b, k) if many else b] = placed.length
                found = _target_at(layout, placed)[: len(targets)]
                batch["target_at"][g][b, answers] = np.where(found < 0, -1, found + at[g])
                at[g] += placed.length
            slot, token, answer = slot + sum(counts), texts.stop, answers.stop
    return batch


def collate_words(samples: Sequence[Sample], tiles: int, config: ModelConfig) -> np.ndarray:
    """Target token ids of the patches of each sample's first image: int32 (B, T, P, WORDS), T = `tiles`, -1 = none."""
    batch = np.full((len(samples), tiles, config.vision.grid**2, WORDS), -1, np.int32)
    for row, sample in enumerate(samples):
        if sample.words and sample.sizes:
            named = patch_words(sample.words, sample.sizes[0], config.of(len(sample.sizes)))
            batch[row, : len(named)] = named
    return batch


def prompt_index(
    sample: Sample, shape: Shape, config: ModelConfig, choice: Sequence[Granularity]
) -> tuple[np.ndarray, int]:
    """Packs a prompt with one granularity per image: its index, int32 (S,) or (S, 4), and its packed length.

    S is `shape.length` at the finest granularity of `choice`, or at the model's coarsest without images.

    Raises ValueError if the prompt exceeds `max_length` (it is never truncated: it would lose its
    question) or does not fit the shape, or `choice` has another length than the images.
    """
    if len(choice) != len(sample.sizes):
        raise ValueError(f"{len(choice)} granularities for {len(sample.sizes)} images")
    static = shape.length(config, config.ascending(choice)[-1] if choice else config.granularities[0])
    layout = _layout(sample)
    placed = _place(layout, sample.sizes, config, choice, cut=False)
    if placed.length > config.language.max_length:
        raise ValueError(
            f"the prompt takes {placed.length} tokens at granularities {list(choice)}, "
            f"max_length is {config.language.max_length}: choose coarser ones, or fewer images"
        )
    _fits(sample, "text tokens", len(layout.text), shape.text)
    _fits(sample, "packed tokens", placed.length, static)
    row = np.zeros((static, 4) if config.most_tiles else static, np.int32)
    _fill(row, placed, _first_slots(sample, shape, config), shape, config)
    return row, placed.length


def prompt_weight(sample: Sample, config: ModelConfig, choice: Sequence[Granularity]) -> np.ndarray:
    """Weights of the four rows of each position of a packed prompt, float32 (length, 4), with `config.most_tiles`."""
    placed = _place(_layout(sample), sample.sizes, config, choice, cut=False)
    return _weight(placed, sample.sizes, config, choice)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A sample's text without placeholders, and the positions of its images.

    text, labels: int32 (n,). before: int (images,), number of text tokens before each image.
    images_before: int (n,), number of images before each text token.
    """

    text: np.ndarray
    labels: np.ndarray
    before: np.ndarray
    images_before: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Packed positions at one choice of granularities.

    text_at: int (n,), position of each text token. image_at: int (images,), position of each image's
    first token. visual: `visual_index` of each image. length: packed length after truncation.
    """

    text_at: np.ndarray
    image_at: np.ndarray
    visual: list[np.ndarray]
    length: int


def _layout(sample: Sample) -> _Layout:
    ids = np.asarray(sample.tokens.ids, np.int32)
    labels = np.asarray(sample.tokens.labels, np.int32)
    is_image = ids == IMAGE
    images = np.flatnonzero(is_image)
    return _Layout(
        text=ids[~is_image],
        labels=labels[~is_image],
        before=images - np.arange(len(images)),
        images_before=np.cumsum(is_image)[~is_image],
    )


def _place(
    layout: _Layout, sizes: Sequence[Size], config: ModelConfig, choice: Sequence[Granularity], cut: bool = True
) -> _Placed:
    own = config.of(len(sizes))
    visual = [visual_index(size, own, g) for size, g in zip(sizes, choice, strict=True)]
    counts = np.array([0] + [len(index) for index in visual])
    ends = np.cumsum(counts)  # visual tokens of the first k images
    text_at = np.arange(len(layout.text)) + ends[layout.images_before]
    image_at = layout.before + ends[:-1]
    length = len(layout.text) + int(ends[-1])
    limit = config.language.max_length
    if cut and length > limit:
        length = limit
        for start, count in zip(image_at, counts[1:], strict=True):
            if start < limit < start + count:
                length = int(start)
    return _Placed(text_at, image_at, visual, length)


def _fill(
    row: np.ndarray, placed: _Placed, first: Sequence[int], shape: Shape, config: ModelConfig, token: int = 0
) -> None:
    """Writes the index of one packed sequence into `row`, int32 (S,) or (S, 4); its text begins at text row `token`."""
    stride = config.pyramid_rows
    newline = shape.text + shape.tiles * stride
    kept = int(np.searchsorted(placed.text_at, placed.length))
    row.T[..., placed.text_at[:kept]] = token + np.arange(kept)
    for start, visual, slot in zip(placed.image_at, placed.visual, first, strict=True):
        if start < placed.length:
            row[start : start + len(visual)] = np.where(visual < 0, newline, visual + (shape.text + slot * stride))


def _weight(placed: _Placed, sizes: Sequence[Size], config: ModelConfig, choice: Sequence[Granularity]) -> np.ndarray:
    """Weights of the four rows of each packed position, float32 (length, 4): 1 0 0 0 for text."""
    weight = np.zeros((placed.length, 4), np.float32)
    weight[:, 0] = 1
    own = config.of(len(sizes))
    for start, size, granularity in zip(placed.image_at, sizes, choice, strict=True):
        if start < placed.length:
            shares = visual_weight(size, own, granularity)
            weight[start : start + len(shares)] = shares
    return weight


def _target_at(layout: _Layout, placed: _Placed) -> np.ndarray:
    """Position before each labelled token, -1 where the token is truncated or is the first of the sequence."""
    at = placed.text_at[layout.labels != IGNORE]
    return np.where(at < placed.length, at - 1, -1)


def _first_slots(sample: Sample, shape: Shape, config: ModelConfig, slot: int = 0, image: int = 0) -> list[int]:
    """First tile slot of each image; images occupy consecutive slots, from `slot`, after `image` others of the row."""
    _fits(sample, "images", image + len(sample.sizes), shape.images)
    ends = np.cumsum([slot, *tile_counts(sample, config)])
    _fits(sample, "tiles", int(ends[-1]), shape.tiles)
    return [int(end) for end in ends[:-1]]


def _fits(sample: Sample, what: str, need: int, room: int) -> None:
    if need > room:
        raise ValueError(f"sample {sample.id} has {need} {what}, more than the {room} of its shape: use a larger shape")


def _visual(sample: Sample, config: ModelConfig, granularity: Granularity) -> int:
    own = config.of(len(sample.sizes))
    return sum(visual_count(size, own, granularity) for size in sample.sizes)


@functools.lru_cache(maxsize=256)
def _tile_bound(config: ModelConfig, granularity: Granularity) -> int:
    """Upper bound of the packed tokens of one tile: its cells, and a newline for each row of cells."""
    rows, columns = config.grid_at(granularity)
    return rows * (columns + 1)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length() if count > 1 else 1


def _part(count: int, of: int = 16) -> int:
    """The next multiple of 1 / `of` of the next power of two: 1..16, 18, 20, ..., 32, 36, ..., 64, 72, ..."""
    unit = max(1, _power(count) // of)
    return -(-count // unit) * unit


def _step(count: int) -> int:
    """1..6, 8, 12, 16, 24, 32, ...: at most a third is padding."""
    if count <= 6:
        return count
    power = _power(count)
    return power * 3 // 4 if count <= power * 3 // 4 else power
