"""Router scores without answers: images are encoded once and scored by any number of routers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.packing import Sample, collate, load_tiles, shape_of, tiles_of
from avg_llava_jax.eval.evaluation import Question
from avg_llava_jax.eval.policies import by_key
from avg_llava_jax.inference.model import Model
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.router import Routing
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.parallel import sharding

ROUTER_INPUTS = ("tile_image", "first_tile", "text", "instruction")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Prompts of a batch whose images are encoded.

    rows: their indices among all prompts. images: the number of images of each. pyramid: (B, T, R, D), None without
        images. inputs: what a router reads besides the pyramid, see `packing.collate`.
    """

    rows: Sequence[int]
    images: Sequence[int]
    pyramid: jax.Array | None
    inputs: Mapping[str, np.ndarray]


@functools.partial(sharding.jit, static_argnums=0)
def encode(config: ModelConfig, params: avg_llava.Params, pixels: jax.Array) -> jax.Array:
    """uint8 (B, T, H, W, 3) -> pyramids (B, T, R, D)."""
    return avg_llava.pyramid_of(config, params, pixels)


@functools.partial(sharding.jit, static_argnums=0)
def route(
    config: ModelConfig, params: avg_llava.Params, pyramid: jax.Array, inputs: Mapping[str, jax.Array]
) -> Routing:
    """Score the granularities of every image: pyramid (B, T, R, D), `inputs` as of `Encoded`."""
    return avg_llava.route(config, params, pyramid, avg_llava.embed(config, params, inputs["text"]), inputs)


Pyramids = Mapping[tuple, np.ndarray]
"""Pyramids (tiles, R, D) by the images of a sample."""


def encode_once(model: Model, samples: Sequence[Sample], batch_size: int = 32) -> Pyramids:
    """The images of the prompts, each encoded once however many prompts are about it; held in the host's memory.

    batch_size: tiles that are encoded at once, of any images.
    """
    config = model.config
    distinct = [sample for sample in dict((sample.images, sample) for sample in samples).values() if sample.sizes]
    tiles = itertools.chain.from_iterable(load_tiles(sample, config) for sample in distinct)
    found, running = [], None
    while batch := list(itertools.islice(tiles, batch_size)):  # read while the device encodes the one before
        pixels = np.zeros((batch_size, 1, *batch[0].shape), np.uint8)
        pixels[: len(batch), 0] = batch
        before, running = running, (encode(config, model.params, pixels), len(batch))
        found += _fetched(before)
    found += _fetched(running)
    ends = np.cumsum([tiles_of(sample, config) for sample in distinct])
    parts = np.split(np.concatenate(found), ends[:-1]) if found else []
    return {sample.images: pyramid for sample, pyramid in zip(distinct, parts, strict=True)}


def _fetched(running: tuple[jax.Array, int] | None) -> list[np.ndarray]:
    """The pyramids (n, R, D) of the first n tiles of a batch (B, 1, R, D); [] without a batch."""
    return [] if running is None else [np.asarray(running[0])[: running[1], 0]]


def encode_all(
    model: Model, samples: Sequence[Sample], batch_size: int = 32, pyramids: Pyramids | None = None
) -> Iterator[Encoded]:
    """Encode prompts in batches of equal tiles and images, with one text length for all.

    pyramids: the result of `encode_once` for all of their images, with room in each batch for the most tiles;
        None = encode them.
    """
    config = model.config
    shapes = [dataclasses.replace(shape_of(sample, config), answer=1, fill=1.0) for sample in samples]
    text = max((shape.text for shape in shapes), default=0)
    if pyramids is not None:  # running a router is cheap, compiling another program for it is not
        most = max((shape.tiles for shape in shapes), default=0)
        shapes = [dataclasses.replace(shape, tiles=most) for shape in shapes]

    def alike(row: int) -> tuple[int, int, bool]:
        return shapes[row].tiles, shapes[row].images, bool(samples[row].sizes)

    for rows in by_key(range(len(samples)), alike).values():
        for at in range(0, len(rows), batch_size):
            part = rows[at : at + batch_size]
            images = [len(samples[row].sizes) for row in part]
            if not any(images):
                yield Encoded(part, images, None, {})
                continue
            shape = dataclasses.replace(shapes[part[0]], text=text)
            padded = [samples[row] for row in np.resize(part, batch_size)]  # one program for all batches of a shape
            known = None if pyramids is None else [pyramids[sample.images] for sample in padded]
            batch = collate(padded, shape, config, (), known)
            pyramid = encode(config, model.params, batch["pixels"]) if pyramids is None else batch["pixels"]
            yield Encoded(part, images, pyramid, {key: batch[key] for key in ROUTER_INPUTS})


def route_encoded(model: Model, encoded: Iterable[Encoded]) -> list[np.ndarray]:
    """Router scores (images, G) of the prompts encoded by `encode_all`, in their order.

    model: the one that encoded them, or one that differs from it only in router and ladder.
    """
    config, scores = model.config, dict[int, np.ndarray]()
    for batch in encoded:
        if batch.pyramid is None:
            scores |= dict.fromkeys(batch.rows, np.zeros((0, len(config.granularities)), np.float32))
            continue
        pyramid = batch.pyramid
        if pyramid.shape[2] != config.pyramid_rows:  # another ladder: pool again from the finest rows
            pyramid = scale(config, jnp.asarray(pyramid[:, :, -config.granularities[-1] :]))
        logits = np.asarray(route(config, model.params, pyramid, batch.inputs).logits)
        for at, (row, images) in enumerate(zip(batch.rows, batch.images, strict=True)):
            scores[row] = logits[at, :images]
    return [scores[row] for row in range(len(scores))]


def route_all(
    model: Model, samples: Sequence[Sample], batch_size: int = 32, pyramids: Pyramids | None = None
) -> list[np.ndarray]:
    """Router scores (images, G) of each prompt; no prompt is answered. pyramids: as of `encode_all`."""
    return route_encoded(model, encode_all(model, samples, batch_size, pyramids))


def shuffled(questions: Sequence[Question], what: str, seed: int = 0) -> list[Sample]:
    """Samples of a control in which the router gets another question's instruction, or another question's image.

    Every question is paired, in seeded order, with another one that has as many images; it is paired with itself only
    where there is no other. what: "instruction" or "image".
    """
    if what not in ("instruction", "image"):
        raise ValueError(f"shuffled {what!r}: choose instruction or image")
    samples = [question.sample for question in questions]
    mixed = list(samples)
    for rows in by_key(samples, lambda sample: len(sample.sizes)).values():
        order = random.Random(seed).sample(rows, len(rows))
        for row, other in zip(order, order[1:] + order[:1], strict=True):
            one, two = (samples[row], samples[other]) if what == "instruction" else (samples[other], samples[row])
            mixed[row] = dataclasses.replace(one, tokens=two.tokens)
    return mixed
