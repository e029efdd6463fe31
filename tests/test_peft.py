"""The peft library on exported models: its logits and gradients are ours, and what it saves loads here."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from avg_llava_jax import SHIPPED, adapters, checkpoint, parameters
from avg_llava_jax.convert import convert
from avg_llava_jax.data.packing import collate, merge, prompt_index, shape_of
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.models import avg_llava
from tests.random_model import save_random_model
from tests.test_adapters import adapted
from tests.test_pytorch import ask

peft = pytest.importorskip("peft")

GRANULARITY = 8
SIZES = {"What colour is it?": (40, 20), "Which of the two?": (90, 41)}


@pytest.fixture(scope="module")
def run(tiny, tokenizer, tmp_path_factory):
    """A checkpoint of adapters, its base, the base in PyTorch, and the adapters as peft's files."""
    root = tmp_path_factory.mktemp("peft")
    own = dataclasses.replace(tiny.language, layers=2, tied_embeddings=False)
    config = dataclasses.replace(tiny, language=own, vision=dataclasses.replace(tiny.vision, layers=3))
    base = save_random_model(config, tokenizer, root / "base")
    params = adapted(config, base.params, targets=("language", "encoder/q", "encoder/up"), b=0.3)
    params["connector"] = jax.tree.map(lambda leaf: leaf + 0.1, params["connector"])
    params["router"]["voter"] = jax.random.normal(jax.random.key(1), params["router"]["voter"].shape)
    params["image_newline"] = params["image_newline"] * 2
    meta = {"step": 3, "training": None, "granularities_trained": None, "base": checkpoint.refer(root / "base")}
    convert.write_checkpoint(checkpoint.Loaded(config, params, tokenizer.folder, meta), root / "run")
    convert.export_transformers(root / "base", root / "theirs")
    convert.export_peft(root / "run", root / "adapter")
    return root


def pytorch(run, **options):
    """The exported base with the exported adapters, as peft loads them; nothing may be missing."""
    model = AutoModelForImageTextToText.from_pretrained(run / "theirs", trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing keys
        return peft.PeftModel.from_pretrained(model, run / "adapter", **options)


def test_logits_gradients_and_back(run, tmp_path):
    ours, theirs = AvgLlava.load(run / "run"), pytorch(run, is_trainable=True)
    assert adapters.of(ours.params)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES.values()]
    prepared = [
        ours.prepare(Request(question, [image], granularity=GRANULARITY))
        for question, image in zip(SIZES, images, strict=True)
    ]
    inputs = ask(AutoProcessor.from_pretrained(run / "theirs"), {q: [1] for q in SIZES}, images)
    routed = theirs(**inputs)  # the router, and the granularities that it chooses, are the adapter's
    auto = [ours.answer([image], question, max_new_tokens=1) for question, image in zip(SIZES, images, strict=True)]
    assert routed.granularities.tolist() == [answer.granularity for answer in auto]

    # The same weighted sum of all logits; samples of mixed tile counts.
    config, samples = ours.config, [each.sample for each in prepared]
    shape = dataclasses.replace(merge(shape_of(s, config) for s in samples), answer=1, fill=1.0)
    batch = collate(samples, shape, config, granularities=())
    index, lengths = np.zeros((2, 192), np.int32), []
    for row, sample in enumerate(samples):
        places, length = prompt_index(sample, shape, config, (GRANULARITY,))
        index[row, :length] = places[:length]
        lengths.append(length)
    weights = rng.standard_normal((192, config.language.vocab_size)).astype(np.float32) / 1000

    @jax.jit
    def value(trained, frozen):
        params = parameters.merge(trained, frozen)
        pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
        x = avg_llava.assemble(params, pyramid, avg_llava.embed(config, params, batch["text"]), index)
        logits = avg_llava.unembed(config, params, avg_llava.decoder(config, params, x))
        used = np.arange(192) < np.array(lengths)[:, None]
        return (logits * weights * used[..., None]).sum(), logits

    trained, frozen = parameters.split(
        checkpoint.load(run / "run").params, ("encoder_lora", "language_lora", "connector")
    )
    with jax.default_matmul_precision("highest"):
        (_, logits), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(trained, frozen)
    output = theirs(**inputs, granularity=GRANULARITY)
    loss = 0.0
    for row, mine, mask, length in zip(output.logits, logits, output.attention_mask, lengths, strict=True):
        row = row[mask, : config.language.vocab_size]
        np.testing.assert_allclose(mine[:length], row.detach().numpy(), atol=1e-4, rtol=1e-4)
        loss = loss + (row * torch.tensor(weights[:length])).sum()
    loss.backward()
    theirs_grads = {name: each.grad for name, each in theirs.named_parameters() if each.grad is not None}
    compared = 0
    for path, grad in parameters.flat(grads).items():
        row = parameters.TABLE[path]
        if path.endswith(("lora_a", "lora_b")):
            module = convert.peft._module(row.torch).replace(".weight", ".default.weight")
            found = np.stack(
                [theirs_grads["base_model.model." + module.format(n=n)].numpy().T for n in range(len(grad))]
            )
            scale = np.abs(found).max()
            np.testing.assert_allclose(grad, found, atol=1e-4 * scale, rtol=1e-4, err_msg=path)
            assert scale > 1e-4
            compared += 1
    assert compared == 2 * (7 + 2)

    # What peft saves of the same model loads here as it was.
    theirs.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["r"] == 3
    again = checkpoint.load_adapter(tmp_path / "saved", run / "base").params
    for path, leaf in parameters.flat(checkpoint.load(run / "run").params).items():
        if path not in ("image_newline", "router/voter"):  # bare parameters, which peft does not save
            np.testing.assert_allclose(parameters.flat(again)[path], leaf, rtol=1e-6, err_msg=path)


def test_a_plain_list_of_modules_adapts_a_layer_that_does_not_run(run, tmp_path):
    """Its adapters are passed over (findings/peft_list_on_llava_next.sh); all others are there."""
    model = AutoModelForImageTextToText.from_pretrained(run / "theirs", trust_remote_code=True)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, value in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    theirs.save_pretrained(tmp_path)
    config = checkpoint.read_config(run / "base")[0]
    assert config.vision.layers == config.vision.used_layers + 1
    found = parameters.flat(checkpoint.load_adapter(tmp_path, run / "base").params)
    stored = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    for component, count in (("encoder", config.vision.used_layers), ("language", config.language.layers)):
        for node in ("q", "v"):
            path = f"{component}/layers/{node}/lora_b"
            name = "base_model.model." + convert.peft._module(parameters.TABLE[path].torch)
            name = name.replace(".weight", ".default.weight")
            wanted = np.stack([stored[name.format(n=layer)].T for layer in range(count)])
            np.testing.assert_array_equal(found[path], wanted, err_msg=path)


def test_a_router_that_came_with_an_adapter_is_exported(tmp_path):
    """Onto a LLaVA-NeXT, whose own router nothing has trained."""
    shipped = checkpoint.load(SHIPPED)
    router = dataclasses.replace(shipped.config.router, text_tokens=32, heads=8)  # those of a LLaVA-NeXT without one
    config = dataclasses.replace(shipped.config, router=router, template="vicuna_v1")
    params = jax.jit(lambda: avg_llava.init(config, jax.random.key(0)))()
    meta = {"step": 1, "training": None, "granularities_trained": [64]}
    convert.write_checkpoint(checkpoint.Loaded(config, params, shipped.tokenizer_folder, meta), tmp_path / "base")
    convert.export_transformers(tmp_path / "base", tmp_path / "next", router=False)
    base = checkpoint.load(tmp_path / "next")
    leaves = parameters.flat(base.params) | adapters.init(base.config, ("language/q",), 2, 2.0, jax.random.key(0))
    leaves["router/voter"] = leaves["router/voter"] + 1
    meta = meta | {"base": checkpoint.refer(tmp_path / "next")}
    convert.write_checkpoint(base._replace(params=parameters.unflat(leaves), meta=meta), tmp_path / "run")
    convert.export_peft(tmp_path / "run", tmp_path / "adapter")
    convert.import_adapter(tmp_path / "adapter", tmp_path / "next", tmp_path / "again")
    convert.export_transformers(tmp_path / "again", tmp_path / "out")
    found = checkpoint.load(tmp_path / "out").params["router"]["voter"]
    np.testing.assert_array_equal(found, leaves["router/voter"])


def test_folded_in_is_peft_merged(run):
    """Our export of the folded model equals what peft's merge_and_unload gives."""
    convert.export_transformers(run / "run", run / "folded")
    folded = AutoModelForImageTextToText.from_pretrained(run / "folded", trust_remote_code=True).state_dict()
    merged = pytorch(run).merge_and_unload().state_dict()
    assert folded.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(folded[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
