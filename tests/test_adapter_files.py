"""Adapter folders of peft and of LLaVA's own training code, read and refused; `test_peft` runs the library itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from avg_llava_jax import adapters, checkpoint, parameters
from avg_llava_jax.convert import convert, peft
from tests.random_model import save_random_model

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def base(tiny, tokenizer, tmp_path_factory):
    """The folder of a model with two layers."""
    config = dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, layers=2, tied_embeddings=False))
    save_random_model(config, tokenizer, tmp_path_factory.mktemp("base") / "base")
    return tmp_path_factory.getbasetemp() / "base0" / "base"


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def write(folder, base, tensors, config=CONFIG, name="adapter_model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    if name.endswith(".bin"):
        torch.save({key: torch.tensor(value) for key, value in tensors.items()}, folder / name)
    else:
        save_file(tensors, folder / name)
    return folder


def q(layer, rank, spelled="base_model.model.model.layers.{}.self_attn.q_proj"):
    """A and B of the query of one layer."""
    name = spelled.format(layer)
    return {f"{name}.lora_A.weight": drawn(layer, rank, 16), f"{name}.lora_B.weight": drawn(9 + layer, 16, rank)}


def test_llavas_own_files(base, tmp_path):
    """adapter_model.bin and non_lora_trainables.bin, as LLaVA writes them; config.json of the model beside them."""
    folder = write(tmp_path / "llava", base, q(0, 2) | q(1, 2), name="adapter_model.bin")
    (folder / "config.json").write_text('{"model_type": "llava_llama"}')
    whole = {
        "base_model.model.model.mm_projector.0.weight": torch.tensor(drawn(20, 16, 16)),
        "base_model.model.model.image_newline": torch.tensor(drawn(21, 16)),
    }
    torch.save(whole, folder / "non_lora_trainables.bin")
    before, loaded = checkpoint.load(base).params, checkpoint.load(folder)
    node, plain = loaded.params["language"]["layers"]["q"], before["language"]["layers"]["q"]
    for layer in (0, 1):
        np.testing.assert_array_equal(node["lora_a"][layer], drawn(layer, 2, 16).T)
        np.testing.assert_array_equal(node["lora_b"][layer], drawn(9 + layer, 16, 2).T)
    np.testing.assert_array_equal(node["lora_scale"], [1.5, 1.5])
    np.testing.assert_array_equal(node["kernel"], plain["kernel"])
    np.testing.assert_array_equal(loaded.params["connector"]["up"]["kernel"], drawn(20, 16, 16).T)
    np.testing.assert_array_equal(loaded.params["image_newline"], drawn(21, 16))
    np.testing.assert_array_equal(loaded.params["connector"]["down"]["kernel"], before["connector"]["down"]["kernel"])

    # Imported it refers to its base, and gives the same model; folded in it stands alone.
    convert.import_adapter(folder, base, tmp_path / "imported")
    again = checkpoint.load(tmp_path / "imported")
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert "language/layers/q/kernel" not in checkpoint.stored.shapes(
        next((tmp_path / "imported" / "checkpoints").iterdir()) / "params"
    )
    convert.merge(folder, tmp_path / "merged")
    merged = checkpoint.load(tmp_path / "merged")
    assert "base" not in merged.meta and not adapters.of(merged.params)
    wanted = np.asarray(plain["kernel"], np.float64)
    wanted = wanted + 1.5 * np.stack([drawn(n, 2, 16).T.astype(float) @ drawn(9 + n, 16, 2).T for n in (0, 1)])
    np.testing.assert_allclose(merged.params["language"]["layers"]["q"]["kernel"], wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="has no adapters and refers to no base"):
        convert.merge(tmp_path / "merged", tmp_path / "nothing")


def test_ranks_and_alphas_of_their_own(base, tmp_path):
    """Of transformers' names: layer 1 alone has rank 3 and its own alpha, layer 0 has no adapter on v at all."""
    spelled = "base_model.model.model.language_model.layers.{}.self_attn.q_proj"
    v = {key.replace("q_proj", "v_proj"): value[..., :] for key, value in q(1, 2, spelled).items()}
    v = {key: value[:8] if "lora_B" in key else value for key, value in v.items()}
    config = CONFIG | {"alpha_pattern": {"layers.1.self_attn.q_proj": 6}, "use_rslora": True}
    loaded = checkpoint.load(write(tmp_path / "a", base, q(0, 2, spelled) | q(1, 3, spelled) | v, config))
    layers = loaded.params["language"]["layers"]
    assert layers["q"]["lora_a"].shape == (2, 16, 3) and not layers["q"]["lora_a"][0, :, 2].any()
    np.testing.assert_allclose(layers["q"]["lora_scale"], [3 / 2**0.5, 6 / 3**0.5], rtol=1e-6)
    assert not layers["v"]["lora_b"][0].any() and layers["v"]["lora_b"][1].any()
    peft_folder = tmp_path / "out"
    convert.import_adapter(tmp_path / "a", base, tmp_path / "w")
    convert.export_peft(tmp_path / "w", peft_folder)
    values = json.loads((peft_folder / "adapter_config.json").read_text())
    assert values["r"] in (2, 3) and values["alpha_pattern"]
    again = checkpoint.load_adapter(peft_folder, base)
    theirs, ours = adapters.folded(again.params), adapters.folded(loaded.params)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5), theirs, ours)


def test_bad_folders(base, tmp_path):
    good, where = q(0, 2) | q(1, 2), tmp_path / "a"
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    for tensors, config, message in (
        (good, {"use_dora": True}, "use_dora=True is not supported"),
        (good, {"peft_type": "IA3"}, "peft_type='IA3' is not supported, only LORA"),
        (good, {"lora_alpha": "a"}, "lora_alpha='a' is not a number"),
        (good, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the base too"),
        (good, {"init_lora_weights": "olora"}, "init_lora_weights='olora' changed the base too"),
        (good, {"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens is not supported: the adapter would act"),
        (
            good | {"base_model.model.lm_head.lora_A.weight": drawn(0, 2, 16)},
            {},
            "'base_model.model.lm_head.lora_A.weig",
        ),
        (good | {"base_model.model.model.norm.weight": drawn(0, 16)}, {}, "norm.weight' is unknown, or is on a layer"),
        (q(5, 2), {}, "layers.5.self_attn.q_proj.lora_A.weight' is unknown"),
        (
            {key: value for key, value in good.items() if "0.self_attn.q_proj.lora_B" not in key},
            {},
            "lora_A without lora_B",
        ),
        (good | {f"{name}.lora_A.weight": drawn(0, 2, 12)}, {}, r"A \(2, 12\) and B .*trained on another base"),
        (good | {"base_model.model.model.image_newline": drawn(0, 9)}, {}, r"newline' has shape \(9,\), on this base"),
    ):
        folder = write(where, base, tensors, CONFIG | config)
        with pytest.raises(ValueError, match=message) as error:
            checkpoint.load(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    whole = (write(where, base, good) / "adapter_model.safetensors").read_bytes()
    (where / "adapter_model.safetensors").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        checkpoint.load(where)
    (where / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model.safetensors and no adapter_model.bin"):
        checkpoint.load(where)
    write(where, "someone/else", good)
    with pytest.raises(FileNotFoundError, match="names the base 'someone/else', which is no folder"):
        checkpoint.load(where)
    with pytest.raises(ValueError, match="has no adapter_config.json: --base is for"):
        convert.import_adapter(base, base, tmp_path / "x")
    with pytest.raises(ValueError, match="the checkpoint has no adapters"):
        convert.export_peft(base, tmp_path / "y")
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_written_names(base, tmp_path):
    """The names of transformers 5: peft finds its modules by them."""
    convert.import_adapter(write(tmp_path / "a", base, q(0, 2) | q(1, 2)), base, tmp_path / "w")
    convert.export_peft(tmp_path / "w", tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert {
        "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.multi_modal_projector.linear_2.bias",
        "base_model.model.model.image_newline",
        "base_model.model.router.merger.self_attn.in_proj_weight",
        "base_model.model.router.voter",
    } <= names
    tower = parameters.TABLE["encoder/layers/up/lora_a"].torch.format(n=3)
    assert peft._module(tower) == "model.vision_tower.encoder.layers.3.mlp.fc1.lora_A.weight"
