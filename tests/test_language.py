"""Long sequences, read whole and through the cache; `test_parity` compares with transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax.config import LanguageConfig, ModelConfig
from avg_llava_jax.inference import generate
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.language import LanguageModel, read


def with_language(tiny: ModelConfig, language: LanguageConfig) -> ModelConfig:
    return dataclasses.replace(tiny, language=language, router=dataclasses.replace(tiny.router, heads=2))


def fresh(config: ModelConfig) -> avg_llava.Params:
    """Random parameters, the biases and norms too."""
    params = jax.jit(lambda: avg_llava.init(config, jax.random.key(0)))()
    noise = np.random.default_rng(0)
    params["language"] = jax.tree.map(
        lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32), params["language"]
    )
    return params


def test_a_long_sequence_through_the_cache(tiny):
    """Rows of 3100 and 900 tokens: whole; and one part after another, the second in a chunk, the rest one by one."""
    language = LanguageConfig(
        vocab_size=50, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=32, max_length=4096
    )  # fmt: skip
    config = with_language(tiny, language)
    params = fresh(config)
    lengths, chunk, steps = np.array([3100, 900], np.int32), 8, 2
    ids = np.random.default_rng(2).integers(0, 50, (2, lengths.max() + chunk + steps))
    forward = jax.jit(avg_llava.language, static_argnums=0)
    embeds = avg_llava.embed(config, params, ids)
    whole = avg_llava.unembed(config, params, forward(config, params, embeds)[0])

    logits, cache = generate.prefill(config, params, embeds[:, : lengths.max()], lengths, chunk + steps)
    rows = np.arange(2)
    np.testing.assert_allclose(logits, whole[rows, lengths - 1], atol=1e-4, rtol=1e-4)
    cached = lengths
    for count in (chunk, *[1] * steps):
        at = cached[:, None] + np.arange(count)
        hidden, new = forward(config, params, embeds[rows[:, None], at], jnp.asarray(at), cache, jnp.asarray(cached))
        np.testing.assert_allclose(
            avg_llava.unembed(config, params, hidden), whole[rows[:, None], at], atol=1e-4, rtol=1e-4
        )
        cache = generate.extend(cache, new, jnp.asarray(cached))
        cached = cached + count


@pytest.mark.parametrize("layers", [1, 3, 8])  # one layer, an unrolled stack, a loop
def test_one_hidden_state_a_row(layers):
    """`read` gives what the whole model gives at that position, and its whole cache: from the start, and behind one."""
    config = LanguageConfig(vocab_size=50, width=16, layers=layers, heads=4, kv_heads=2, head_dim=8, mlp_width=32)
    model, draw = LanguageModel(config), np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, 16)))["params"]
    params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32) / 4, shapes)
    x = draw.standard_normal((3, 12, 16), np.float32)
    only, cached = jnp.array([11, 0, 4]), jnp.array([7, 2, 0])
    whole = jax.jit(lambda params, *given: model.apply({"params": params}, *given))
    one = jax.jit(read, static_argnums=0)
    _, before = whole(params, x[:, :7])
    for behind in ((), (cached[:, None] + jnp.arange(12), before, cached)):
        hidden, new = whole(params, x, *behind)
        found, found_new = one(config, params, x, only, *behind)
        np.testing.assert_allclose(found, hidden[jnp.arange(3), only], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(found_new, new, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
