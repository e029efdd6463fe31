"""What a sample shares its batch with, and how far it is padded, changes none of its numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.data.conversation import encode_conversation
from avg_llava_jax.data.images import image_ref
from avg_llava_jax.data.packing import collate, make_sample, merge, shape_of
from avg_llava_jax.models import avg_llava
from avg_llava_jax.training import losses

SIZES = {"text": (), "two": ((40, 20), (30, 30)), "tall": ((20, 60),)}


@pytest.fixture(scope="module")
def samples(tiny, tokenizer):
    """Text alone, two images of 3 and 5 tiles, and one image under a long question."""
    rng, made = np.random.default_rng(0), []
    for name, sizes in SIZES.items():
        images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        question = "Who is it? " * (6 if name == "tall" else 1) + " and ".join(["<image>"] * len(sizes))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"the {name} one"}]
        tokens = encode_conversation(turns, tokenizer, tiny.template, images=len(sizes))
        made.append(make_sample(name, tokens, [image_ref(image) for image in images]))
    return made


@pytest.fixture(scope="module")
def measure(tiny, params):
    """Samples -> answer NLL (B, G), tokens counted (B, G), and logits (B, I, G) of either router.

    `learning`: of the router over tokens as it computes them where it has weights to drop, though it drops none.
    """

    @jax.jit
    def compiled(batch):
        pyramid = avg_llava.pyramid_of(tiny, params, batch["pixels"])
        text = avg_llava.embed(tiny, params, batch["text"])
        sums, counts = losses.granularity_nll(tiny, params, pyramid, text, batch, tiny.granularities)
        logits = {}
        for attention in ("tokens", "tiles"):
            config = dataclasses.replace(tiny, router=dataclasses.replace(tiny.router, attention=attention))
            logits[attention] = avg_llava.route(config, params, pyramid, text, batch).logits
        learns = dataclasses.replace(tiny, router=dataclasses.replace(tiny.router, dropout=0.0))
        keys = jax.random.split(jax.random.key(0), len(text))
        logits["learning"] = avg_llava.route(learns, params, pyramid, text, batch, keys).logits
        return sums.T, counts.T, logits

    return lambda rows: compiled(collate(rows, merge(shape_of(row, tiny) for row in rows), tiny))


def test_a_sample_in_a_batch_is_as_alone(samples, measure):
    sums, counts, logits = measure(samples)
    for row, sample in enumerate(samples):
        own_sums, own_counts, own_logits = measure([sample])
        np.testing.assert_allclose(sums[row], own_sums[0], rtol=1e-5, atol=1e-5, err_msg=sample.id)
        np.testing.assert_array_equal(counts[row], own_counts[0], sample.id)
        images = len(sample.sizes)
        for attention in logits:
            np.testing.assert_allclose(
                logits[attention][row, :images],
                own_logits[attention][0, :images],
                rtol=1e-4,
                atol=1e-4,
                err_msg=f"{sample.id}, {attention}",
            )
        np.testing.assert_allclose(logits["learning"][row, :images], logits["tokens"][row, :images], atol=1e-5)
    one, other = (logits[attention][1, 0] for attention in ("tokens", "tiles"))
    assert not np.allclose(one, other, atol=1e-2)  # two routers, not one


def test_one_walk_with_all_granularities_is_a_walk_with_each(tiny, params, samples):
    """Losses and gradients; the granularities are weighted apart, so that none stands for another."""
    batch = collate(samples, merge(shape_of(sample, tiny) for sample in samples), tiny)

    def total(params, together):
        pyramid = avg_llava.pyramid_of(tiny, params, batch["pixels"])
        text = avg_llava.embed(tiny, params, batch["text"])
        walks = [tiny.granularities] if together else [(g,) for g in tiny.granularities]
        found = [losses.granularity_nll(tiny, params, pyramid, text, batch, walk) for walk in walks]
        sums, counts = map(jnp.concatenate, zip(*found, strict=True))
        return jnp.sum(sums * (1 + jnp.arange(len(sums)))[:, None]), (sums, counts)

    walk = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    (_, (sums, counts)), grads = walk(params, True)
    (_, (apart, apart_counts)), apart_grads = walk(params, False)
    np.testing.assert_allclose(sums, apart, rtol=1e-5)
    np.testing.assert_array_equal(counts, apart_counts)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4), grads, apart_grads)
