"""Low-rank adapters: one path, the base bit for bit where they add nothing, and their gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import adapters, parameters
from avg_llava_jax.convert.quantize import quantized
from avg_llava_jax.inference import stacked
from avg_llava_jax.models import avg_llava, language
from avg_llava_jax.models.cache import Span, empty_cache
from avg_llava_jax.models.dropout import dropped
from avg_llava_jax.training import losses
from avg_llava_jax.training.config import LoraConfig, OptimizerConfig
from avg_llava_jax.training.optimizer import trainable
from tests.test_quantize import dequantized
from tests.test_training import batch  # noqa: F401

TARGETS = ("language", "encoder/q", "encoder/down")


def adapted(config, params, rank=3, targets=TARGETS, b=0.05):
    """A model with adapters; b: the deviation of B, which a fresh adapter has as zeros."""
    leaves = adapters.init(config, targets, rank, 1.5, jax.random.key(3))
    for number, (path, leaf) in enumerate(leaves.items()):
        if path.endswith("lora_b"):
            leaves[path] = b * jax.random.normal(jax.random.key(number), leaf.shape)
    return parameters.unflat(parameters.flat(params) | leaves)


@pytest.fixture(scope="module")
def deep(tiny):
    """Two layers, which are stacked, with biases."""
    return dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, layers=2, attention_bias=True))


@pytest.fixture(scope="module")
def base(deep):
    return jax.jit(lambda: avg_llava.init(deep, jax.random.key(0)))()


@functools.partial(jax.jit, static_argnums=0)
def walks(config, params):
    """Features of pixels, hidden states of whole sequences, and those through a cache, prefill and decode."""
    pixels = jax.random.randint(jax.random.key(1), (2, 2, 16, 16, 3), 0, 255).astype(jnp.uint8)
    ids = jax.random.randint(jax.random.key(2), (2, 9), 0, config.language.vocab_size)
    features = avg_llava.encode_images(config, params, pixels)
    x = avg_llava.embed(config, params, ids)
    whole = avg_llava.decoder(config, params, x)
    cache = empty_cache(config.language, 2, 9, x.dtype)
    walk = functools.partial(language.decoder, config.language, params["language"])
    first, cache = walk(x[:, :6], cache, Span(jnp.zeros(2, int), None, 0))
    rest, _ = walk(x[:, 6:], cache, Span(jnp.array([6, 6])))
    return features, whole, jnp.concatenate([first, rest], axis=1)


def test_an_adapter_that_adds_nothing_is_the_base_bit_for_bit(deep, base):
    """B is zero, as it is at first, or the rank is 0: arrays without elements."""
    fresh = adapted(deep, base, b=0.0)
    none = {"lora_a": lambda leaf: leaf[..., :0], "lora_b": lambda leaf: leaf[:, :0]}
    leaves = parameters.flat(fresh).items()
    empty = {path: none.get(path.rpartition("/")[2], lambda leaf: leaf)(leaf) for path, leaf in leaves}
    wanted = walks(deep, base)
    for params in (fresh, parameters.unflat(empty)):
        jax.tree.map(np.testing.assert_array_equal, walks(deep, params), wanted)


@pytest.mark.parametrize("int8", [False, True])
def test_every_path_computes_the_folded_weights(deep, base, int8):
    params = adapted(deep, base)
    if int8:
        params = quantized(params)
        with pytest.raises(ValueError, match="kernel' is int8: fold the adapter into the original base"):
            adapters.folded(params)
    folded = adapters.folded(dequantized(params) if int8 else params)
    assert not adapters.of(folded)
    plain, found, wanted = walks(deep, base), walks(deep, params), walks(deep, folded)
    for before, one, other in zip(plain, found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
        assert np.abs(before - other).max() > 0.01  # the adapters do something
    np.testing.assert_allclose(found[1], found[2], atol=1e-4, rtol=1e-4)  # whole, and through the cache


def test_rows_choose_among_several(deep, base):
    """Row 0 is the base bit for bit, row 1 the second adapter; the tiles are of the first."""
    own = [adapted(deep, base, rank, targets) for rank, targets in ((2, TARGETS), (3, ("language/q", "language/down")))]
    leaves = stacked.stack(base, [adapters.divide(one)[0] for one in own])
    assert leaves["language"]["layers"]["q"]["lora_owner"].tolist() == [[1, 1, 2, 2, 2]] * 2
    several = stacked.merge_leaves(base, leaves)
    of_tiles, of_rows = stacked.params_for_rows(several, 1), stacked.params_for_rows(several, np.array([0, 2]))
    plain, found = walks(deep, base), walks(deep, of_tiles | {"language": of_rows["language"]})
    first, second = (walks(deep, adapters.folded(one)) for one in own)
    np.testing.assert_allclose(found[0], first[0], atol=2e-5, rtol=1e-4)
    np.testing.assert_array_equal(walks(deep, stacked.params_for_rows(several, 0))[0], plain[0])
    for whole, before, other in zip(found[1:], plain[1:], second[1:], strict=True):
        np.testing.assert_array_equal(whole[0], before[0])
        np.testing.assert_allclose(whole[1], other[1], atol=1e-4, rtol=1e-4)
        assert np.abs(whole[1] - before[1]).max() > 0.01


def test_fold_by_hand():
    node = {"kernel": [[[1.0, 2.0]]], "lora_a": [[[3.0]]], "lora_b": [[[4.0, 5.0]]], "lora_scale": [0.5]}
    layers = {"q": {name: jnp.array(value) for name, value in node.items()}}
    folded = adapters.folded({"language": {"layers": layers}})
    np.testing.assert_array_equal(folded["language"]["layers"]["q"]["kernel"], [[[7.0, 9.5]]])


def test_gradients_are_finite_differences(deep, base, batch):  # noqa: F811
    """Of the loss on an int8 base, along the gradients of A and of B; `test_peft` has those on a plain base."""
    ours, frozen = parameters.split(quantized(adapted(deep, base)), ("language_lora", "encoder_lora"))

    @jax.jit
    def loss(ours):
        arrays = jax.tree.map(jnp.asarray, batch)
        return losses.language_loss(deep, parameters.merge(ours, frozen), arrays, (4,))[0]

    grads, leaves, step = parameters.flat(jax.jit(jax.grad(loss))(ours)), parameters.flat(ours), 1e-2
    for part in ("lora_a", "lora_b"):
        length = np.sqrt(sum(np.vdot(grad, grad) for path, grad in grads.items() if path.endswith(part)))
        way = {path: grad / length * path.endswith(part) for path, grad in grads.items()}
        up, down = (loss(parameters.unflat({p: leaves[p] + s * way[p] for p in way})) for s in (step, -step))
        np.testing.assert_allclose(length, (up - down) / (2 * step), rtol=2e-3)


def test_dropout_is_of_a_sample_alone(deep, base, batch):  # noqa: F811
    """The same masks for a row in any batch, others for other keys; without keys there is none."""
    params, keys = adapted(deep, base, b=0.3), jax.random.split(jax.random.key(5), 4)
    tiles = batch["pixels"].shape[1]

    @jax.jit
    def features(keys, pixels, ids):
        dropping = avg_llava.with_dropout(params, keys, tiles, 0.5)
        x = avg_llava.embed(deep, params, ids)
        return avg_llava.encode_images(deep, dropping, pixels), avg_llava.decoder(deep, dropping, x)

    all_rows = features(keys, batch["pixels"], batch["text"])
    one_row = features(keys[2:3], batch["pixels"][2:3], batch["text"][2:3])
    other = features(keys[1:2], batch["pixels"][2:3], batch["text"][2:3])
    for whole, one, another in zip(all_rows, one_row, other, strict=True):
        np.testing.assert_allclose(whole[2:3], one, atol=1e-4, rtol=1e-4)
        assert np.abs(one - another).max() > 1e-3
    x = jnp.ones((2, 1000, 20))
    found = dropped(x, keys[:2], jnp.float32(0.75))
    assert sorted(np.unique(found)) == [0, pytest.approx(1 / 0.75)] and abs(found.mean() - 1) < 0.02


def test_the_table(deep, base):
    """Adapters are sharded like the weights they stand on, and every adapter has peft's name."""
    params = adapted(deep, base)
    rows, specs = parameters.describe(params), parameters.flat(parameters.partition_specs(params))
    kernel = specs["language/layers/down/kernel"]
    assert specs["language/layers/down/lora_a"][:2] == kernel[:2]
    assert specs["language/layers/down/lora_b"][2] == kernel[2]
    assert rows["language/layers/gate/lora_b"].torch == "model.layers.{n}.mlp.gate_proj.lora_B.weight"
    ours, frozen = parameters.split(params, ("language_lora",))
    assert {path.rsplit("/", 1)[1] for path in parameters.flat(ours)} == {"lora_a", "lora_b"}
    assert "language/layers/q/lora_scale" in parameters.flat(frozen)
    own, rest = adapters.divide(params)
    assert set(own) == {"connector", "encoder", "image_newline", "language", "router"}
    assert set(adapters.of(own)) == set(adapters.of(params)) and not adapters.of(rest)
    with pytest.raises(ValueError, match="belongs to an adapter: fold it in first"):
        parameters.torch_parts(params)
    with pytest.raises(ValueError, match=r"here: parameter 'language/layers/k/lora_scale' is missing"):
        leaves = adapters.of(params)
        del leaves["language/layers/k/lora_scale"]
        adapters.require("here", leaves, deep)


def test_settings():
    lora = LoraConfig(rank=4, targets=("language/q", "encoder"))
    assert lora.scale == 2.0 and LoraConfig(rank=4, alpha=2).scale == 0.5
    assert trainable("multi_granularity", OptimizerConfig(lora=lora)) == ("connector", "encoder_lora", "language_lora")
    assert trainable("connector", OptimizerConfig(lora=LoraConfig(rank=1))) == ("connector", "language_lora")
    for wrong, message in (
        ({"targets": ("language/q",)}, r"lora.targets=\('language/q',\) has no effect with optimizer.lora.rank=0"),
        ({"rank": 2, "dropout": 1.0}, "dropout=1.0 is a share"),
        ({"rank": 2, "alpha": -1.0}, "alpha=-1.0 must be over 0"),
        ({"rank": -1}, "rank=-1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**wrong)
    with pytest.raises(ValueError, match="targets has 'language/qq': choose from encoder, language, encoder/q"):
        adapters.nodes(("language/qq",))
