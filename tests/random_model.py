"""A model with random weights that says something else to every picture and prompt."""

import functools

import jax

from avg_llava_jax.api import AvgLlava
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.models import avg_llava


@functools.cache
def random_model(config: ModelConfig, tokenizer: Tokenizer) -> AvgLlava:
    params = jax.jit(lambda: avg_llava.init(config, jax.random.key(0)))()
    # As initialised, a model of this size repeats its last token: let the layers outweigh the embedding.
    params["language"] = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params["language"])
    params["language"]["embed"] *= 30
    params["router"]["logits"]["kernel"] *= 10
    return AvgLlava(config, params, tokenizer)
