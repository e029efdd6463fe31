"""Prompts of token ids and images, as ours and as the transformers library's models take them."""

import dataclasses

import numpy as np
import torch
from PIL import Image

from avg_llava_jax.data.conversation import IGNORE, IMAGE, Tokens
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.images import MemoryImage
from avg_llava_jax.data.packing import Sample, collate, merge, shape_of


def noise(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


def sample_of(images, text=(1, 17, 300, 45, 499, 2)):
    """The first token, each image and token 9, the other tokens."""
    ids = [text[0], *[token for _ in images for token in (IMAGE, 9)], *text[1:]]
    sizes = tuple(image.size for image in images)
    return Sample("s", Tokens(ids, [IGNORE] * len(ids)), sizes, tuple(MemoryImage("i", image) for image in images))


def torch_inputs(cut, config, samples, image_token):
    """The library's inputs, padded on the left, with as many image tokens as ours. cut: its image processor."""
    finest = config.granularities[-1]
    rows = []
    for sample in samples:
        own, sizes = config.of(len(sample.sizes)), iter(sample.sizes)
        rows.append([
            each for token in sample.tokens.ids
            for each in ([image_token] * visual_count(next(sizes), own, finest) if token == IMAGE else [token])
        ])  # fmt: skip
    longest = max(map(len, rows))
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    pixels = cut([[image.content for image in sample.images] for sample in samples], return_tensors="pt")
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor(mask)} | dict(pixels)


def packed(config, samples, granularities):
    """A batch of ours, and its index and weights at each granularity, padded to one length: one program serves all."""
    shape = dataclasses.replace(merge(shape_of(s, config, granularities) for s in samples), answer=1)
    batch = collate(samples, shape, config, granularities)
    most = max(index.shape[1] for index in batch["index"].values())
    places = {}
    for granularity, index in batch["index"].items():
        room = [(0, most - index.shape[1] if axis == 1 else 0) for axis in range(index.ndim)]
        places[granularity] = [np.pad(batch[key][granularity], room) for key in ("index", "weight") if key in batch]
    return batch, places
