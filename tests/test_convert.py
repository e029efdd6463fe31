"""PyTorch folders in and out again: no bit is lost, and what is not whole is not there."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig
from avg_llava_jax.convert import convert, foreign, tensors
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training.loop import train
from tests.random_model import save_random_model
from tests.test_training import settings

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"
SOURCE, TOWER = GOLDEN / "avg-llava-tiny", GOLDEN / "vision_tower"


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    convert.import_folder(SOURCE, folder, TOWER)
    return folder


@pytest.fixture(scope="module")
def as_released(tiny, tokenizer, tmp_path_factory):
    """A checkpoint that began here, of a model that the released code could run."""
    config = dataclasses.replace(
        tiny, router=RouterConfig("tiles", text_tokens=4), unpad="released", template="vicuna_v1"
    )
    folder = tmp_path_factory.mktemp("fresh")
    save_random_model(config, tokenizer, folder)
    return folder


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert tensor.tobytes() == other[name].tobytes(), name


def read_all(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_table_is_its_own_inverse():
    config = ModelConfig(language=LanguageConfig(width=64, layers=2, heads=8, kv_heads=4, head_dim=8, mlp_width=32))
    rng = np.random.default_rng(0)
    for path, leaf in parameters.flat(parameters.abstract(config)).items():
        row = parameters.TABLE[path]
        if leaf.size > 2**22:
            continue
        ours = rng.normal(size=leaf.shape[1:] if row.layered else leaf.shape)
        theirs = row.to_torch(ours, config.vision.patch_size)
        whole = np.concatenate([theirs] * 3) if row.form.startswith("third") else theirs
        assert whole.shape == row.torch_shape(leaf.shape, config.vision.patch_size), path
        np.testing.assert_array_equal(row.from_torch(whole), ours, err_msg=path)


def test_released_folder_comes_back_byte_by_byte(imported, tmp_path):
    convert.export_released(imported, tmp_path / "one")
    same_bits(load_file(SOURCE / "model.safetensors"), read_all(tmp_path / "one"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (SOURCE, tmp_path / "one"))
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == {"mm_vision_tower"}
    for name in ("generation_config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "one" / name).read_text()) == json.loads((SOURCE / name).read_text())
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "one" / name).read_bytes() == (SOURCE / name).read_bytes()
    tower = read_all(tmp_path / "one" / "vision_tower")
    assert tower.keys() == load_file(TOWER / "model.safetensors").keys()

    convert.export_released(imported, tmp_path / "many", shard_size=200_000)
    same_bits(load_file(SOURCE / "model.safetensors"), read_all(tmp_path / "many"))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("many/model-*.safetensors"))
    assert set(index["weight_map"].values()) == {file.name for file in files} and len(files) > 2
    assert all(file.stat().st_size < 300_000 for file in files)


def test_half_precision_and_tensors_of_no_use(tmp_path):
    """bf16, inv_freq and position_ids survive; a tower that lies elsewhere comes inside."""
    folder = shutil.copytree(SOURCE, tmp_path / "source")
    weights = {
        name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(SOURCE / "model.safetensors").items()
    }
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(4, dtype=np.float32)
    weights[foreign.TOWER + "vision_model.embeddings.position_ids"] = np.arange(577)[None]
    save_file(weights, folder / "model.safetensors")
    convert.import_folder(folder, tmp_path / "ours", TOWER)
    convert.export_released(tmp_path / "ours", tmp_path / "back")
    same_bits(weights, read_all(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"

    bare = {name: tensor for name, tensor in weights.items() if not name.startswith(foreign.TOWER)}
    save_file(bare, folder / "model.safetensors")
    convert.import_folder(folder, tmp_path / "joined", TOWER)
    convert.export_released(tmp_path / "joined", tmp_path / "whole", dtype="float32")
    back = read_all(tmp_path / "whole")
    tower = load_file(TOWER / "model.safetensors")
    same_bits(tower, {name: back[foreign.TOWER + name] for name in tower})
    assert back["lm_head.weight"].dtype == np.float32
    config, *_ = foreign.load(tmp_path / "whole")  # finds the tower's config in it
    assert config.vision.width == 32


SHARDED = """
    import pathlib, sys, jax, numpy as np
    jax.config.update("jax_num_cpu_devices", 8)
    from absl import flags
    from avg_llava_jax import checkpoint
    from avg_llava_jax.parallel import sharding
    from avg_llava_jax.convert import foreign
    from avg_llava_jax.commands import import_torch

    source, tower, output = sys.argv[1:]
    flags.FLAGS(["x", f"--source={source}", f"--vision_tower={tower}", f"--output={output}", "--mesh=fsdp=-1,tensor=2"])
    import_torch.main()

    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    spread, plain = foreign.load(source, tower, mesh).params, foreign.load(source, tower).params
    for params in (spread, checkpoint.load(output).params):
        jax.tree.map(np.testing.assert_array_equal, params, plain)
    up = spread["language"]["layers"]["up"]["kernel"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 64 // 4, 160 // 2)}
    (saved,) = pathlib.Path(output).glob("checkpoints/*/params/_sharding")
    assert "fsdp" in saved.read_text()  # it was written from the mesh
"""


def test_onto_eight_devices(tmp_path):
    """Forced CPU devices: every device gets its part, and the parts are what one device would have."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), SOURCE, TOWER, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_mesh_as_written():
    assert sharding.read_sizes("fsdp=-1, tensor=2") == {"data": 1, "fsdp": -1, "tensor": 2}
    for text in ("fsdp", "fsdp=x", "model=2", ""):
        with pytest.raises(ValueError, match="must be AXIS=SIZE; the axes are data, fsdp, tensor"):
            sharding.read_sizes(text)


def test_llava_next_keeps_no_router(tmp_path):
    folder = shutil.copytree(SOURCE, tmp_path / "source")
    weights = {k: v for k, v in load_file(SOURCE / "model.safetensors").items() if not k.startswith(foreign.ROUTER)}
    save_file(weights, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in values.items() if key not in ("vis_token_granularity", "filtered_text_num")}
    (folder / "config.json").write_text(json.dumps(kept))
    convert.import_folder(folder, tmp_path / "ours", TOWER)
    with pytest.raises(ValueError, match="only router.attention='tiles', this model has 'tokens'; --norouter"):
        convert.export_released(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    convert.export_released(tmp_path / "ours", tmp_path / "back", router=False)
    same_bits(weights, read_all(tmp_path / "back"))
    assert "vis_token_granularity" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_ten_steps_out_and_in(as_released, llava_folder, tiny, tmp_path):
    """A model of ours, out, in, ten RGLF steps, out, in: the same weights and the same answers."""
    convert.export_released(as_released, tmp_path / "out")
    convert.import_folder(tmp_path / "out", tmp_path / "in")
    config = settings(tiny, llava_folder)
    config.model.template, config.model.unpad = "vicuna_v1", "released"
    config.model.router.attention, config.model.router.heads = "tiles", 8
    config.phase, config.init_from, config.steps = "rglf", str(tmp_path / "in"), 10
    train(config, tmp_path / "run")
    convert.export_released(tmp_path / "run", tmp_path / "trained")
    convert.import_folder(tmp_path / "trained", tmp_path / "again")
    convert.export_transformers(tmp_path / "run", tmp_path / "torch")

    run, again, before = (AvgLlava.load(path) for path in (tmp_path / "run", tmp_path / "again", as_released))
    assert run.config == again.config == before.config
    jax.tree.map(np.testing.assert_array_equal, run.params, again.params)
    assert not np.array_equal(run.params["router"]["voter"], before.params["router"]["voter"])
    router = load_file(tmp_path / "trained" / "model.safetensors")
    router = {name.removeprefix(foreign.ROUTER): it for name, it in router.items() if name.startswith(foreign.ROUTER)}
    same_bits(router, load_file(tmp_path / "torch" / "router" / "model.safetensors"))
    for size in ((40, 20), (20, 40)):
        image = Image.new("RGB", size, "red")
        one, other = (model.answer(image, "What?", max_new_tokens=8) for model in (run, again))
        assert (one.text, one.granularity) == (other.text, other.granularity)


def theirs(language, layers, width, mlp):
    """Names and shapes of a released AVG-LLaVA as PyTorch sees them: models on the meta device, the rest by hand."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    llama = LlamaConfig(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, **language)
    with torch.device("meta"):
        found = {k: tuple(v.shape) for k, v in LlamaForCausalLM(llama).state_dict().items()}
        for name, tensor in CLIPVisionModel(clip).state_dict().items():
            found[foreign.TOWER + "vision_model." + name.removeprefix("vision_model.")] = tuple(tensor.shape)
    merger = "model.router.merger."
    found |= {"model.image_newline": (width,), "model.router.voter": (1148, 1)}
    found |= {merger + "self_attn.in_proj_weight": (3 * width, width), merger + "self_attn.in_proj_bias": (3 * width,)}
    for name, shape in {
        **dict.fromkeys((merger + "self_attn.out_proj", merger + "linear1", merger + "linear2"), (width, width)),
        **{"model.router.router.0": (width, width), "model.router.router.2": (5, width)},
        **{"model.mm_projector.0": (width, 1024), "model.mm_projector.2": (width, width)},
        **{merger + "norm1": (width,), merger + "norm2": (width,), "model.router.norm": (5,)},
    }.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: shape for name, shape in found.items() if not name.endswith("position_ids")}


@pytest.mark.parametrize(("layers", "width", "heads", "mlp"), [(32, 4096, 32, 11008), (40, 5120, 40, 13824)])
def test_dry_run_at_true_sizes(tmp_path, layers, width, heads, mlp):
    """7B and 13B: files with headers and holes; then no files but the index; then the config alone."""
    found = theirs({"num_attention_heads": heads, "vocab_size": 32000}, layers, width, mlp)
    values = json.loads((SOURCE / "config.json").read_text()) | {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000,
        "mm_hidden_size": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    used = len(found) - 16 - 2  # less CLIP's last layer and last norm
    assert f"{used} tensors are what its config asks for" in convert.dry_run(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(found, "model-00001-of-00001.safetensors")}))
    assert f"{used} tensors match in name" in convert.dry_run(tmp_path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*found, "model.extra"], "x")}))
    with pytest.raises(ValueError, match="'model.extra' is unknown"):
        convert.dry_run(tmp_path)
    index.unlink()

    half = np.dtype(ml_dtypes.bfloat16)
    header, at = {}, 0
    for name, shape in found.items():
        size = int(np.prod(shape)) * half.itemsize
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    assert f"{used} tensors match in name, shape and dtype, 18 more" in convert.dry_run(tmp_path)


def test_what_is_not_whole_is_not_there(imported, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert.export_released(imported, tmp_path / "out")
    with pytest.raises(OSError, match="No space left"):
        convert.import_folder(SOURCE, tmp_path / "in", TOWER)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="already exists"):
        convert.export_released(imported, tmp_path / "out")


def test_sources_that_are_none(tmp_path, imported):
    with pytest.raises(FileNotFoundError, match="is neither a folder nor a hub id"):
        convert.import_folder(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="config.json: model_type=None is not supported, only llava_llama"):
        convert.import_folder(imported, tmp_path / "out")


HUB = """
    import sys
    from absl import app
    from avg_llava_jax.convert import convert

    def main(argv):
        for name in argv[1:]:
            try:
                print(convert.dry_run(name, "owner/tower"))
            except FileNotFoundError as error:
                print("error:", error)

    app.run(main)
"""


def test_hub_ids(tmp_path):
    """Found in the hub's cache without a network; what is not there is one line."""
    for name, folder in (("tiny", SOURCE), ("tower", TOWER)):
        repository = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, repository / "snapshots" / "abc123")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc123")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HUB), "owner/tiny", "owner/absent", "not/a valid id"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    found, absent, invalid = done.stdout.strip().split("\n")
    assert "tensors match in name, shape and dtype" in found and "owner--tiny" in found
    assert absent.startswith("error: owner/absent is not a local folder, and the hub's answer is: ")
    assert invalid.startswith("error: not/a valid id is not a local folder")


def test_bin_is_asked_for_where_the_hub_has_nothing_else(tmp_path, monkeypatch):
    """Many older repositories hold both; the safetensors alone are fetched then."""
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns)
        if name == "owner/safe":
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    convert.local_folder("owner/old")
    assert [("pytorch_model*.bin" in patterns) for patterns in asked] == [False, True]
    convert.local_folder("owner/safe")
    assert len(asked) == 3


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_card_says_what_it_was_trained_and_measured_at(as_released, tmp_path, layout):
    export = {"released": convert.export_released, "transformers": convert.export_transformers}[layout]
    source = shutil.copytree(as_released, tmp_path / "run")
    values = json.loads((source / "config.json").read_text())
    training = {
        "phase": "rglf",
        "steps": 9,
        "init_from": str(tmp_path / "secret" / "tuned"),
        "data": {"path": "a.json"},
    }
    values |= {"training": training, "granularities_trained": [4, 16]}
    (source / "config.json").write_text(json.dumps(values))
    export(source, tmp_path / "unmeasured")
    card = (tmp_path / "unmeasured" / "README.md").read_text()
    assert "Phase `rglf`, step 1 of 9, on `a.json`, from `tuned`; tuned at 4, 16 tokens a tile." in card
    assert "It was not measured" in card and str(tmp_path) not in card

    rows = {"accuracy": {"all": 0.5}, "visual_tokens": 7.25}
    report = {key: {"fixed": {"4": it}, "adaptive": it, "oracle": it} for key, it in rows.items()} | {"n": 40}
    (source / "report.json").write_text(json.dumps(report))
    export(source, tmp_path / "measured")
    card = (tmp_path / "measured" / "README.md").read_text()
    assert "to 40 questions" in card and "| always 4 | 0.500 | 7.2 |" in card and "| the router | 0.500 | 7.2 |" in card
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json is not a report of avg-llava evaluate"):
        export(source, tmp_path / "out", report=tmp_path / "other.json")


def test_published_and_trained_checkpoints_keep_the_way_back(imported, tmp_path):
    foreign.keep_unused(imported, tmp_path)
    same_bits(load_file(imported / foreign.UNUSED), load_file(tmp_path / foreign.UNUSED))
    assert (tmp_path / foreign.ORIGIN).read_bytes() == (imported / foreign.ORIGIN).read_bytes()
    assert jnp.float32 == checkpoint.load(imported).params["image_newline"].dtype
