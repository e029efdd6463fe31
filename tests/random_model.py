"""A model with random weights that says something else to every picture and prompt."""

import dataclasses
import functools
import pathlib

import jax

from avg_llava_jax.checkpoint import Loaded
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import convert
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Answer
from avg_llava_jax.models import avg_llava


@functools.cache
def random_model(config: ModelConfig, tokenizer: Tokenizer) -> AvgLlava:
    params = jax.jit(lambda: avg_llava.init(config, jax.random.key(0)))()
    # As initialised, a model of this size repeats its last token: let the layers outweigh the embedding.
    params["language"] = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params["language"])
    params["language"]["embed"] *= 30
    params["router"]["logits"]["kernel"] *= 10
    return AvgLlava(config, params, tokenizer)


def save_random_model(config: ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> AvgLlava:
    """`random_model`, which also stands in `folder` as a checkpoint."""
    model = random_model(config, tokenizer)
    folder.mkdir(exist_ok=True)
    meta = {"step": 1, "training": None, "granularities_trained": None}
    convert.write_checkpoint(Loaded(config, model.params, tokenizer.folder, meta), folder)
    return model


def plain(answer: Answer) -> Answer:
    """An answer less its timings and the last bits of its probabilities and certainties."""
    rows = answer.probabilities
    rows = () if rows is None else rows if isinstance(rows, tuple) else (rows,)
    rounded = tuple(tuple((g, round(p, 4)) for g, p in row.items()) for row in rows)
    passes = tuple(dataclasses.replace(each, certainty=round(each.certainty, 3)) for each in answer.passes)
    return dataclasses.replace(answer, timings={}, probabilities=rounded, passes=passes)
