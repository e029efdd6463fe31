"""Long sequences, read whole and through the cache; `test_parity` compares with transformers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax.config import LanguageConfig, ModelConfig
from avg_llava_jax.models import avg_llava, language, one_cpu
from avg_llava_jax.models.cache import Span, empty_cache


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


def test_on_one_cpu_no_gradient_of_a_kernel_transposes_the_rows(tiny, monkeypatch):
    """XLA would write a layer's input again, one element at a time, as an array with a column for each row."""
    params, x = fresh(tiny), jnp.zeros((2, 40, tiny.language.width))

    def transposed():
        def total(params, x):
            hidden, _ = language.decoder(tiny.language, params["language"], x)
            return language.unembed(tiny.language, params["language"], hidden).sum()

        return re.findall(r"f32\[\d+,80\]\{1,0\}", jax.jit(jax.grad(total)).lower(params, x).compile().as_text())

    assert not transposed()
    monkeypatch.setattr(one_cpu, "here", lambda: False)
    assert transposed(), "products over two axes of rows"


def test_a_long_sequence_through_the_cache(tiny):
    """Rows of 3100 and 900 tokens: whole; and one part after another, the second in a chunk, the rest one by one."""
    config = LanguageConfig(
        vocab_size=50, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=32, max_length=4096
    )  # fmt: skip
    params = fresh(with_language(tiny, config))["language"]
    start, chunk, steps = jnp.array([3100, 900]), 8, 2
    ids = np.random.default_rng(2).integers(0, 50, (2, 3100 + chunk + steps))
    walk = jax.jit(language.decoder, static_argnames="config")
    x = language.embed(params, ids)
    whole = language.unembed(config, params, walk(config, params, x)[0])

    @functools.partial(jax.jit, static_argnames="window")
    def through(cache, x, start, window, last=None):
        hidden, cache = language.decoder(config, params, x, cache, Span(start, None, window), last)
        return language.unembed(config, params, hidden), cache

    rows = np.arange(2)
    cache = empty_cache(config, 2, 3200, jnp.float32)
    logits, cache = through(cache, x[:, :3100], jnp.zeros(2, int), 0, start[:, None] - 1)
    np.testing.assert_allclose(logits[:, 0], whole[rows, start - 1], atol=1e-4, rtol=1e-4)
    for count in (chunk, *[1] * steps):
        at = start[:, None] + np.arange(count)
        logits, cache = through(cache, x[rows[:, None], at], start, None)
        np.testing.assert_allclose(logits, whole[rows[:, None], at], atol=1e-4, rtol=1e-4)
        start = start + count


@pytest.mark.parametrize("layers", [1, 3, 8])  # one layer, an unrolled stack, a loop
def test_layers_unstacked_and_some_hidden_states_a_row(tiny, layers):
    """Unstacked layers are the stacked ones, and `last` gives what the whole model gives there, and its cache."""
    config = LanguageConfig(vocab_size=50, width=16, layers=layers, heads=4, kv_heads=2, head_dim=8, mlp_width=32)
    params, draw = fresh(with_language(tiny, config))["language"], np.random.default_rng(1)
    apart = params | {"layers": language.unstack(params["layers"])}
    x = jnp.asarray(draw.standard_normal((3, 12, 16), np.float32))
    last, start = jnp.array([[11, 10], [0, 0], [4, 7]]), jnp.array([7, 2, 0])
    whole = jax.jit(lambda params, x: language.decoder(config, params, x)[0])
    np.testing.assert_allclose(whole(apart, x), whole(params, x), atol=1e-5, rtol=1e-5)

    @functools.partial(jax.jit, static_argnames="window")
    def through(x, cache, start, window, last=None):
        return language.decoder(config, apart, x, cache, Span(start, None, window), last)

    cache = empty_cache(config, 3, 20, jnp.float32)
    _, before = through(x[:, :7], cache, jnp.zeros(3, int), 0)
    for given in ((cache, jnp.zeros(3, int), 0), (before, start, None)):
        hidden, all_of_it = through(x, *given)
        found, cache_of_one = through(x, *given, last)
        np.testing.assert_allclose(found, hidden[jnp.arange(3)[:, None], last], atol=1e-5, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), cache_of_one, all_of_it)


def test_unstacking_may_free_what_was_stacked(tiny):
    config = LanguageConfig(vocab_size=50, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=32)
    layers = fresh(with_language(tiny, config))["language"]["layers"]
    wanted = jax.tree.map(lambda leaf: np.array(leaf[1]), layers)
    here, freed = language.one_cpu.unstack, jax.tree.leaves(layers)
    language.one_cpu.unstack = lambda layers: None  # as on an accelerator
    try:
        apart = language.unstack(layers, free=True)
    finally:
        language.one_cpu.unstack = here
    assert all(leaf.is_deleted() for leaf in freed)
    jax.tree.map(np.testing.assert_array_equal, apart[1], wanted)
