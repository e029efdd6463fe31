"""Losses and router gradients of both phases against the released PyTorch implementation (tests/data/golden)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.data.conversation import encode_conversation
from avg_llava_jax.data.images import ImageStore
from avg_llava_jax.data.packing import collate, make_sample, merge, shape_of
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.models import avg_llava
from avg_llava_jax.training import losses
from avg_llava_jax.training.rglf import rglf_loss

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"
RECORDS = {"train_single": ["i4"], "train_two_images_same_grid": ["i3", "same"]}


@pytest.fixture(scope="module")
def model():
    loaded = checkpoint.load(GOLDEN / "avg-llava-tiny", GOLDEN / "vision_tower")
    with jax.default_matmul_precision("highest"):
        yield loaded


@pytest.fixture(scope="module", params=RECORDS)
def case(model, request):
    """(golden arrays, our batch of the same records)."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        golden = dict(file)
    tokenizer, images = load_tokenizer(model.tokenizer_folder), ImageStore(GOLDEN / "images")
    records = {record["id"]: record for record in json.loads((GOLDEN / "train_data.json").read_text())}
    samples = []
    for name in RECORDS[request.param]:
        conversations = records[name]["conversations"]
        # The released code moves an image to the front; ours leaves it where it was put.
        question = "<image>\n" + conversations[0]["value"].replace("<image>", "").strip()
        conversations = [conversations[0] | {"value": question}, *conversations[1:]]
        tokens = encode_conversation(conversations, tokenizer, "vicuna_v1", images=1)
        samples.append(make_sample(name, tokens, [images.ref(records[name]["image"])]))
    for sample, ids, labels in zip(samples, golden["input_ids"], golden["labels"], strict=True):
        np.testing.assert_array_equal(sample.tokens.ids, ids[: len(sample.tokens.ids)])
        np.testing.assert_array_equal(sample.tokens.labels, labels[: len(sample.tokens.ids)])
    shape = merge(shape_of(sample, model.config) for sample in samples)
    return golden, collate(samples, shape, model.config)


@pytest.fixture(scope="module")
def feedback(model, case):
    """NLL of the frozen model at each granularity, (B, G), and what the router reads."""
    config, params, batch = model.config, model.params, case[1]

    @jax.jit
    def compiled(params, batch):
        pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
        text = avg_llava.embed(config, params, batch["text"])
        sums, counts = losses.granularity_nll(config, params, pyramid, text, batch, config.granularities)
        return (sums / counts).T, pyramid, text

    return compiled(params, batch)


def rglf(config, router, nll, pyramid, text, batch):
    """The RGLF loss with the paper's weights, as a function of the router alone."""
    logits = avg_llava.route(config, {"router": router}, pyramid, text, batch).logits[:, 0]
    loss, metrics = rglf_loss(logits, nll, jnp.ones(len(nll), bool), margin=1.0, rank_weight=1.0, ce_weight=0.1)
    return loss, (metrics, logits)


def close(ours, golden, tolerance):
    np.testing.assert_allclose(ours, golden, atol=tolerance, rtol=tolerance)


def test_feedback(case, feedback):
    golden, _ = case
    close(feedback[0], golden["rglf_llm_loss"], 1e-5)
    np.testing.assert_array_equal(np.argsort(feedback[0], axis=1), golden["rglf_indices"])


def test_multi_granularity_loss(model, case):
    golden, batch = case
    config = model.config
    loss, metrics = jax.jit(lambda p, b: losses.language_loss(config, p, b, config.granularities))(model.params, batch)
    close(loss, golden["stage3_loss"], 1e-5)
    close([metrics[f"nll/{g}"] for g in config.granularities], golden["stage3_per_granularity"], 1e-5)


def test_rglf_loss_and_router_gradient(model, case, feedback):
    golden, batch = case
    config, router = model.config, model.params["router"]
    grad = jax.jit(jax.value_and_grad(lambda r, *rest: rglf(config, r, *rest), has_aux=True))
    (loss, (metrics, logits)), ours = grad(router, *feedback, batch)
    close(logits, golden["rglf_router_logits"], 1e-4)
    close(metrics["ce_loss"], golden["rglf_ce"], 1e-4)
    close(metrics["rank_loss"], golden["rglf_rank"], 1e-4)
    close(loss, golden["rglf_total"], 1e-4)
    for path, leaf in parameters.flat({"router": ours}).items():
        row = parameters.TABLE[path]
        close(leaf, row.from_torch(golden[f"grad_router/{row.torch}"]), 1e-4)
