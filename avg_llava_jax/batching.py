"""From samples on the host to the compiled functions of `generate`: padding to static shapes and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from avg_llava_jax import generate
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.packing import Sample, Shape, collate, packed_length, prompt_index, shape_of
from avg_llava_jax.models.avg_llava import Params
from avg_llava_jax.models.router import Routing

SMALLEST_TEXT = 64


@dataclasses.dataclass(frozen=True)
class Seen:
    """Prompts whose images are encoded: text ids (B, L), pyramid (B, T, R, D), routing (None without images)."""

    samples: Sequence[Sample]
    shape: Shape
    text: np.ndarray
    pyramid: jax.Array
    routing: Routing | None

    def logits(self, row: int) -> np.ndarray:
        """Router scores (images, G) of one sample."""
        images = len(self.samples[row].sizes)
        return np.asarray(self.routing.logits[row, :images]) if images else np.zeros((0, 0), np.float32)


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
) -> Seen:
    """Encode and route samples of one shape as a batch of `rows` (default: as many as there are).

    `tiles` are their images' tiles, where they are loaded already. Text-only samples, of which a batch
    consists wholly or not at all, skip the encoder.
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
    pyramid, routing = generate.see_and_route(config, params, batch)
    return Seen(samples, shape, batch["text"], pyramid, routing)


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
