"""From samples on the host to the compiled functions of `generate`: padding to static shapes and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.packing import Sample, Shape, collate, packed_length, prompt_index, shape_of
from avg_llava_jax.inference import generate
from avg_llava_jax.models.avg_llava import Params
from avg_llava_jax.models.router import Routing

SMALLEST_TEXT = 64


@dataclasses.dataclass(frozen=True)
class Seen:
    """Prompts whose images are encoded: text ids (B, L), pyramid (B, T, R, D), routing (None if not asked for).

    inputs: what a router reads besides the pyramid, see `collate`; nothing where there is no image.
    picture: int (B,), the same number where rows have the same images; None where few have, or it is not known.
    """

    samples: Sequence[Sample]
    shape: Shape
    text: np.ndarray
    pyramid: jax.Array
    routing: Routing | None
    inputs: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    picture: np.ndarray | None = None

    def logits(self, row: int) -> np.ndarray:
        """Router scores (images, G) of one sample; no rows where there was no routing."""
        if self.routing is None:
            return np.zeros((0, 0), np.float32)
        return np.asarray(self.routing.logits[row, : len(self.samples[row].sizes)])


def by_key(items: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[int]]:
    """Row numbers of the items by key, in order of appearance."""
    found: dict[Any, list[int]] = {}
    for row, item in enumerate(items):
        found.setdefault(key(item), []).append(row)
    return found


def groups(items: Iterable[Any], key: Callable[[Any], Hashable], size: int) -> Iterator[list[int]]:
    """Row numbers of the items that share a key, at most `size` together."""
    for rows in by_key(items, key).values():
        for at in range(0, len(rows), size):
            yield rows[at : at + size]


def power(count: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, count - 1).bit_length()


def prompt_shape(sample: Sample, config: ModelConfig) -> Shape:
    """The static sizes under which a prompt is encoded and routed; texts share few lengths."""
    shape = shape_of(sample, config)
    text = min(max(SMALLEST_TEXT, shape.text), config.language.max_length)
    return dataclasses.replace(shape, text=text, answer=1, fill=1.0)


def see(
    config: ModelConfig,
    params: Params,
    samples: Sequence[Sample],
    shape: Shape,
    rows: int | None = None,
    tiles: Sequence[np.ndarray] | None = None,
    route: bool = True,
) -> Seen:
    """Encode and route samples of one shape as a batch of `rows` (default: as many as there are).

    `tiles` are their images' tiles, where they are loaded already; samples that share an array are encoded
    once. Without `route` the router does not run. Text-only samples, of which a batch consists wholly or not
    at all, skip the encoder as well.
    """
    rows = len(samples) if rows is None else rows
    if not any(sample.sizes for sample in samples):
        text = np.zeros((rows, shape.text), np.int32)
        for row, sample in enumerate(samples):
            text[row, : len(sample.tokens.ids)] = sample.tokens.ids
        newline = params["image_newline"]
        pyramid = jnp.zeros((rows, shape.tiles, config.pyramid_rows, newline.shape[0]), newline.dtype)
        return Seen(samples, shape, text, pyramid, None)
    batch = collate(samples, shape, config, granularities=(), tiles=tiles)
    wanted = {key: batch[key] for key in ("pixels", "tile_image", "first_tile", "text", "instruction")}
    fill = {"tile_image": -1, "first_tile": -1}
    spare = rows - len(samples)
    batch = {
        key: np.pad(array, [(0, spare)] + [(0, 0)] * (array.ndim - 1), constant_values=fill.get(key, 0))
        for key, array in wanted.items()
    }
    first = _first_of_each(tiles, rows)
    place = None
    if route and first is None:
        pyramid, routing = generate.see_and_route(config, params, batch)
        del batch["pixels"]
        return Seen(samples, shape, batch["text"], pyramid, routing, batch)
    pixels = batch.pop("pixels")
    if first is None:
        pyramid = generate.see(config, params, pixels)
    else:
        distinct, place = first
        pyramid = generate.see(config, params, pixels[distinct])[place]
    routing = generate.route(config, params, pyramid, batch) if route else None
    return Seen(samples, shape, batch["text"], pyramid, routing, batch, place)


def _first_of_each(tiles: Sequence[np.ndarray] | None, rows: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Where at most half of a batch's images differ: rows to encode (a power of two), and the place of each row there.

    Tiles a a a b b of 8 rows -> ([0, 3], [0, 0, 0, 1, 1, 0, 0, 0]); None where nothing is saved.
    """
    by_array = by_key(tiles or (), id)
    count = power(len(by_array))
    if not by_array or 2 * count > rows:
        return None
    place = np.zeros(rows, np.int32)
    for at, members in enumerate(by_array.values()):
        place[members] = at
    return np.resize([members[0] for members in by_array.values()], count), place


def packed_index(
    config: ModelConfig,
    samples: Sequence[Sample],
    shape: Shape,
    choices: Sequence[Sequence[int]],
    rows: int | None = None,
    static: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """index int32 (rows, S) and length int32 (rows,) of prompts whose images have a granularity each.

    S is `static`, or the smallest rung of the ladder that holds them all. Spare rows have length 1.
    Raises ValueError where a prompt exceeds `max_length`.
    """
    packed = [prompt_index(sample, shape, config, choice) for sample, choice in zip(samples, choices, strict=True)]
    longest = max(length for _, length in packed)
    static = generate.length_bucket(longest, config.language.max_length) if static is None else static
    rows = len(samples) if rows is None else rows
    index, lengths = np.zeros((rows, static), np.int32), np.ones(rows, np.int32)
    for row, (positions, length) in enumerate(packed):
        index[row, :length] = positions[:length]
        lengths[row] = length
    return index, lengths


class Beginnings(NamedTuple):
    """Prompts of a batch (B rows) taken apart: their beginnings, each once, and what follows in each row.

    row: int (U,), a row that has this beginning. index: int32 (U, S1), its packed positions, see `packed_index`.
    place: int32 (B,), each row's beginning; cached: int32 (B,), its length.
    ids: int32 (B, S2), the text behind it; rest: int32 (B,), the length of that.
    """

    row: np.ndarray
    index: np.ndarray
    place: np.ndarray
    cached: np.ndarray
    ids: np.ndarray
    rest: np.ndarray


def beginnings(
    picture: np.ndarray, text: np.ndarray, index: np.ndarray, length: np.ndarray, limit: int
) -> Beginnings | None:
    """Where rows of a batch begin alike, up to the end of their last image; None where no positions are saved.

    picture: int (B,), see `Seen`; text: int (B, L); index int (B, S) and length (B,) as of `packed_index`.

    With L = 4 and ids `7 8 9 .`, an image behind the 7 whose three visual tokens are rows 4 5 6:

        picture  text       index              length     place  cached  ids      rest
        0        7 8 9 0    0 | 4 5 6 | 1 2    6          0      4       8 9 ..   2
        0        7 3 0 0    0 | 4 5 6 | 1      5          0      4       3 0 ..   1
        1        7 8 9 0    0 | 4 5 6 | 1 2    6          1      4       8 9 ..   2    another picture
        0        2 8 9 0    0 | 4 5 6 | 1 2    6          2      4       8 9 ..   2    other text in front

    row 0 2 3 0 (a power of two, so that few programs are compiled), and index `0 4 5 6` four times, padded to S1.
    """
    (rows, static), width = index.shape, text.shape[1]
    visual = index >= width
    cached = np.where(visual.any(axis=1), static - np.argmax(visual[:, ::-1], axis=1), 0).astype(np.int32)
    rest = length - cached
    if not rest.all():  # a prompt that ends on an image: no text gives its logits
        return None
    # What stands at each position: the text token's id, or minus the row of the pyramid.
    content = np.where(visual, -index, np.take_along_axis(text, np.minimum(index, width - 1), axis=1))
    begun = np.flatnonzero(cached)  # spare rows begin with nothing
    alike = by_key(begun, lambda row: (picture[row], content[row, : cached[row]].tobytes()))
    count = power(len(alike))
    before = generate.length_bucket(int(cached.max()), limit)
    behind = generate.length_bucket(int(rest.max()), limit, generate.SMALLEST_REST)
    if count * before + rows * behind >= rows * static:
        return None
    place = np.zeros(rows, np.int32)
    for at, members in enumerate(alike.values()):
        place[begun[members]] = at
    first = np.resize([begun[members[0]] for members in alike.values()], count)
    at = np.arange(before)
    begin = np.where(at < cached[first, None], index[first][:, np.minimum(at, static - 1)], 0)
    at = cached[:, None] + np.arange(behind)
    ids = np.take_along_axis(content, np.minimum(at, static - 1), axis=1)
    ids = np.where(at < length[:, None], ids, 0)
    return Beginnings(first, begin, place, cached, ids, rest)


def length_at(config: ModelConfig, sample: Sample, choice: Sequence[int]) -> int:
    """Packed length of a prompt at one granularity per image, whether or not it fits."""
    return len(sample.tokens.ids) - len(sample.sizes) + sum(visual_tokens(config, sample, choice))


def visual_tokens(config: ModelConfig, sample: Sample, choice: Sequence[int]) -> list[int]:
    """Visual tokens, newlines included, of each image."""
    return [visual_count(size, config, g) for size, g in zip(sample.sizes, choice, strict=True)]


def check_length(config: ModelConfig, sample: Sample, choice: Sequence[int]) -> None:
    """Raises ValueError where a prompt exceeds `max_length`; says which granularity would fit."""
    need, limit = length_at(config, sample, choice), config.language.max_length
    if need <= limit:
        return
    fitting = [g for g in config.granularities if packed_length(sample, config, g) <= limit]
    advice = f"granularity={fitting[-1]} would fit" if fitting else "no granularity would fit: shorten the prompt"
    at = f" at granularity {', '.join(map(str, choice))}" if choice else ""
    raise ValueError(f"the prompt takes {need} tokens{at}, the model's limit is {limit}; {advice}")


def greedy(
    config: ModelConfig,
    params: Params,
    decoding: Params,
    seen: Seen,
    choices: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    rows: int,
) -> list[list[int] | None]:
    """Greedy answers of a whole batch: token ids without the end token; None where a prompt does not fit.

    decoding: the parameters as `generate.for_decoding` gives them.
    """
    limit = config.language.max_length
    lengths = [length_at(config, sample, choice) for sample, choice in zip(seen.samples, choices, strict=True)]
    fitting = [row for row, length in enumerate(lengths) if length <= limit]
    answers: list[list[int] | None] = [None] * len(choices)
    if not fitting:
        return answers
    index, length = packed_index(
        config, [seen.samples[row] for row in fitting], seen.shape, [choices[row] for row in fitting], rows
    )
    room = generate.room_bucket(max_new_tokens)
    wanted = np.zeros(rows, np.int32)
    wanted[: len(fitting)] = np.minimum(max_new_tokens, limit - length[: len(fitting)] + 1)
    zero = np.zeros(rows, np.float32)
    sampling = generate.Sampling(zero, zero + 1, zero.astype(np.int32), zero.astype(np.uint32), wanted)
    take = np.arange(rows) if len(fitting) == len(choices) else np.resize(fitting, rows)
    stops = np.array(stop_ids, np.int32)
    text = seen.text[take]
    parts = None if seen.picture is None else beginnings(seen.picture[take], text, index, length, limit)
    if parts is None:
        embeds = generate.pack(config, params, seen.pyramid[take], text, index)
        logits, cache = generate.prefill(config, params, embeds, length, room)
    else:
        embeds = generate.pack(config, params, seen.pyramid[take[parts.row]], text[parts.row], parts.index)
        begun = generate.begin(config, params, embeds)
        logits, cache = generate.read_on(config, params, begun, parts.place, parts.cached, parts.ids, parts.rest, room)
    state = generate.start(config, decoding, cache, logits, sampling, stops, length, room, True)
    state = generate.decode(config, decoding, state, sampling, stops, np.int32(room), True)
    tokens, count = jax.device_get((state.tokens, state.count))
    for at, row in enumerate(fitting):
        answers[row] = without_end(tokens[at, : count[at]].tolist(), stop_ids)
    return answers


def without_end(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Generated ids less the end token, if that is what they end on."""
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
