"""int8 weights: what they are worth, what they weigh, and that the model multiplies by just those."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import parameters
from avg_llava_jax.convert.quantize import memory, quantized
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.models import avg_llava, language
from avg_llava_jax.models.cache import Span, empty_cache
from tests.random_model import random_model, save_random_model


def dequantized(params):
    """The same tree with q * scale in the place of q."""
    leaves = parameters.flat(params)
    for path in [path for path in leaves if path.endswith(("kernel_scale", "embed_scale"))]:
        scale, weight = leaves.pop(path), path.removesuffix("_scale")
        axis = -1 if weight.endswith("embed") else -2
        leaves[weight] = leaves[weight] * jnp.expand_dims(scale, axis)
    return parameters.unflat(leaves)


def test_weights_are_half_a_step_off_at_most():
    kernel = jnp.array([[0.5, -8.0, 0.0], [-1.27, 4.0, 0.0]])
    params = quantized({"language": {"unembed": {"kernel": kernel}}})["language"]["unembed"]
    np.testing.assert_array_equal(params["kernel"], [[50, -127, 0], [-127, 64, 0]])
    np.testing.assert_allclose(params["kernel_scale"], [0.01, 8 / 127, 1.0], rtol=1e-6)
    weight = jax.random.normal(jax.random.key(0), (3, 64, 8)).astype(jnp.bfloat16)
    rounded = quantized({"language": {"layers": {"q": {"kernel": weight}}}})["language"]["layers"]["q"]
    assert rounded["kernel"].dtype == jnp.int8 and rounded["kernel_scale"].shape == (3, 8)
    assert rounded["kernel_scale"].dtype == jnp.bfloat16
    scale = rounded["kernel_scale"].astype(jnp.float32)[:, None]
    error = jnp.abs(rounded["kernel"] * scale - weight.astype(jnp.float32)) / scale
    assert error.max() < 1.0 and jnp.mean(error <= 0.501) > 0.95  # a scale in bfloat16 may clip the largest weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_model_multiplies_by_them(tiny, tied, dtype):
    own = dataclasses.replace(tiny.language, tied_embeddings=tied, qkv_bias=tied, attention_bias=not tied, qk_norm=tied)
    config = dataclasses.replace(tiny, language=own)
    params = jax.jit(lambda key: parameters.init(config, key, dtype))(jax.random.key(0))
    params["language"]["layers"]["q"]["bias"] += 0.3
    small = quantized(params)
    assert parameters.flat(params).keys() < parameters.flat(small).keys()
    plain = dequantized(small)
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, own.vocab_size)

    @jax.jit
    def logits(tree):
        x = avg_llava.embed(config, tree, ids)
        assert x.dtype == dtype
        cache = empty_cache(config.language, 2, 9, dtype)
        walk = functools.partial(language.decoder, config.language, tree["language"])
        first, cache = walk(x[:, :6], cache, Span(jnp.zeros(2, int), window=0))
        rest, cache = walk(x[:, 6:], cache, Span(jnp.array([6, 6])))
        assert rest.dtype == cache[0].k.dtype == dtype
        return avg_llava.unembed(config, tree, jnp.concatenate([first, rest], axis=1))

    hidden = logits(small), logits(plain)
    rounding = {"rtol": 1e-4, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.1, "atol": 0.1}
    np.testing.assert_allclose(*hidden, **rounding)
    assert np.abs(np.asarray(hidden[0])).max() > 0.5


def test_memory_and_the_table(tiny, tokenizer):
    params = random_model(tiny, tokenizer).params
    small = quantized(params)
    before, after = memory(params), memory(small)
    assert after["language"] < 0.32 * before["language"]  # of width 16: scales weigh much
    assert {part: after[part] for part in after if part != "language"} == {
        part: before[part] for part in before if part != "language"
    }
    specs = parameters.flat(parameters.partition_specs(small))
    assert specs["language/layers/gate/kernel_scale"] == jax.sharding.PartitionSpec(None, "tensor")
    assert specs["language/embed_scale"] == jax.sharding.PartitionSpec(specs["language/embed"][0])
    with pytest.raises(ValueError, match="'language/.*_scale' belongs to quantized weights"):
        parameters.torch_parts(small)
    with pytest.raises(ValueError, match="'language/.*' is already int8"):
        quantized(small)


def test_load(tiny, tokenizer, tmp_path):
    model = save_random_model(tiny, tokenizer, tmp_path / "w")
    loaded = AvgLlava.load(tmp_path / "w", quantize="int8")
    assert loaded.params["language"]["embed"].dtype == jnp.int8
    by_hand = AvgLlava(tiny, dequantized(quantized(model.params)), tokenizer)
    answers = [each.answer((), "Who?", max_new_tokens=4).text for each in (loaded, by_hand)]
    assert answers[0] == answers[1] != ""
    with pytest.raises(ValueError, match="quantize='int3': choose int8"):
        AvgLlava.load(tmp_path / "w", quantize="int3")
