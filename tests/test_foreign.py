"""Folders in the released PyTorch layout: every tensor arrives, and every defect is named in one line."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import convert, foreign, layouts
from avg_llava_jax.data.tokenizer import train_byte_bpe
from avg_llava_jax.parallel import sharding

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"
SOURCE, TOWER = GOLDEN / "avg-llava-tiny", GOLDEN / "vision_tower"
CLIP = "model.vision_tower.vision_tower.vision_model."


@pytest.fixture
def folder(tmp_path):
    """A copy to spoil."""
    return shutil.copytree(SOURCE, tmp_path / "checkpoint")


@pytest.fixture
def tensors():
    return load_file(SOURCE / "model.safetensors")


def write(folder, tensors):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def stacked(tensors, name):
    count = sum(1 for layer in range(99) if name.format(n=layer) in tensors)
    return np.stack([tensors[name.format(n=layer)] for layer in range(count)])


def test_every_tensor_arrives(tensors):
    """Spelled out name by name, apart from the table that the reader uses."""
    config, params, _ = foreign.load(SOURCE, TOWER)
    t = tensors
    language, router, encoder = params["language"], params["router"], params["encoder"]
    pairs = [
        (language["embed"], t["model.embed_tokens.weight"]),
        (language["norm"]["scale"], t["model.norm.weight"]),
        (language["unembed"]["kernel"], t["lm_head.weight"].T),
        (params["image_newline"], t["model.image_newline"]),
        (router["voter"], t["model.router.voter"][:, 0]),
        (encoder["class_token"], t[CLIP + "embeddings.class_embedding"]),
        (encoder["position"], t[CLIP + "embeddings.position_embedding.weight"]),
        (
            np.asarray(encoder["patch_embed"]["kernel"]).reshape(14, 14, 3, -1),
            np.einsum("vcrk->rkcv", t[CLIP + "embeddings.patch_embedding.weight"]),
        ),
    ]
    for ours, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
        pairs.append((language["layers"][ours]["scale"], stacked(t, f"model.layers.{{n}}.{name}.weight")))
    for ours, name in (
        *((ours, f"self_attn.{theirs}_proj") for ours, theirs in zip(("q", "k", "v", "out"), "qkvo", strict=True)),
        *((ours, f"mlp.{ours}_proj") for ours in ("gate", "up", "down")),
    ):
        theirs = stacked(t, f"model.layers.{{n}}.{name}.weight").swapaxes(1, 2)
        pairs.append((language["layers"][ours]["kernel"], theirs))
    for at, ours in enumerate("qkv"):
        third = slice(64 * at, 64 * (at + 1))
        pairs.append((router[ours]["kernel"], t["model.router.merger.self_attn.in_proj_weight"][third].T))
        pairs.append((router[ours]["bias"], t["model.router.merger.self_attn.in_proj_bias"][third]))
    for tree, key, name in (
        (router, "out", "model.router.merger.self_attn.out_proj"),
        (router, "linear1", "model.router.merger.linear1"),
        (router, "linear2", "model.router.merger.linear2"),
        (router, "hidden", "model.router.router.0"),
        (router, "logits", "model.router.router.2"),
        (params["connector"], "up", "model.mm_projector.0"),
        (params["connector"], "down", "model.mm_projector.2"),
    ):
        pairs += [(tree[key]["kernel"], t[name + ".weight"].T), (tree[key]["bias"], t[name + ".bias"])]
    for tree, key, name in (
        (router, "norm1", "model.router.merger.norm1"),
        (router, "norm2", "model.router.merger.norm2"),
        (router, "norm", "model.router.norm"),
        (encoder, "pre_norm", CLIP + "pre_layrnorm"),
    ):
        pairs += [(tree[key]["scale"], t[name + ".weight"]), (tree[key]["bias"], t[name + ".bias"])]
    layer, used = CLIP + "encoder.layers.{n}.", config.vision.used_layers
    for key, name in (
        *((key, f"self_attn.{key}_proj") for key in "qkv"),
        ("out", "self_attn.out_proj"),
        ("up", "mlp.fc1"),
        ("down", "mlp.fc2"),
    ):
        weight = stacked(t, f"{layer}{name}.weight")[:used]
        pairs.append((encoder["layers"][key]["kernel"], weight.swapaxes(1, 2)))
        pairs.append((encoder["layers"][key]["bias"], stacked(t, f"{layer}{name}.bias")[:used]))
    for key, name in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        pairs.append((encoder["layers"][key]["scale"], stacked(t, f"{layer}{name}.weight")[:used]))
        pairs.append((encoder["layers"][key]["bias"], stacked(t, f"{layer}{name}.bias")[:used]))

    assert len(pairs) == len(jax.tree.leaves(params))
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)
    assert used == 2


def test_config():
    config, *_ = foreign.load(SOURCE, TOWER)
    assert (config.router.attention, config.unpad, config.template) == ("tiles", "released", "vicuna_v1")
    assert config.granularities == (36, 72, 144, 288, 576)
    assert config.pinpoints == ModelConfig().pinpoints
    assert (config.vision.heads, config.vision.mlp_width) == (4, 64)  # from the tower's config
    assert (config.language.layers, config.language.max_length) == (2, 4096)


def test_released_mistral(folder):
    edit(folder, model_type="llava_mistral", sliding_window=1024, num_key_value_heads=2)
    config = layouts.read_config(folder, TOWER, has_router=True)
    assert (config.template, config.language.max_length, config.language.kv_heads) == ("mistral_instruct", 1024, 2)


def test_checkpoint_load_reads_it_too():
    loaded = checkpoint.load(SOURCE, TOWER, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert (loaded.tokenizer_folder / "tokenizer.model").is_file()
    assert loaded.meta["granularities_trained"] == [36, 72, 144, 288, 576]


def test_onto_a_mesh():
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    _, params, _ = foreign.load(SOURCE, TOWER, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == sharding.shardings(mesh, params)


def test_shards_and_half_precision(folder, tensors):
    """bf16 and fp16 tensors in two shards with an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": (names[:60], ml_dtypes.bfloat16), "b.safetensors": (names[60:], np.float16)}
    index = {}
    for file, (part, dtype) in halves.items():
        save_file({name: np.ascontiguousarray(tensors[name].astype(dtype)) for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _, params, _ = foreign.load(folder, TOWER)
    assert params["image_newline"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(params["image_newline"], tensors["model.image_newline"].astype(ml_dtypes.bfloat16))
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        foreign.load(folder, TOWER)


def test_the_tower_folder_counts_where_the_checkpoint_did_not_train_it(folder, tensors):
    tower = load_file(TOWER / "model.safetensors")["vision_model.embeddings.class_embedding"]
    edit(folder, unfreeze_mm_vision_tower=False)
    _, params, _ = foreign.load(folder, TOWER)
    np.testing.assert_array_equal(params["encoder"]["class_token"], tower)
    write(folder, {name: tensor for name, tensor in tensors.items() if not name.startswith(CLIP)})
    _, params, _ = foreign.load(folder, TOWER)
    np.testing.assert_array_equal(params["encoder"]["class_token"], tower)
    edit(folder, mm_hidden_size=None)
    with pytest.raises(FileNotFoundError, match="give that CLIP folder as vision_tower"):
        foreign.load(folder, None)


def test_without_a_router_a_fresh_one_is_made(folder, tensors, caplog):
    write(folder, {name: tensor for name, tensor in tensors.items() if not name.startswith("model.router.")})
    edit(folder, vis_token_granularity=None, filtered_text_num=None)
    with caplog.at_level("INFO"):
        config, params, trained = foreign.load(folder, TOWER)
    assert "initialised ['router'], which the checkpoint lacks" in caplog.text
    assert (config.router.attention, config.unpad) == ("tokens", "exact")
    assert params["router"]["voter"].shape == (1148,)
    assert trained == [576]  # a LLaVA-NeXT has seen nothing else
    parameters.describe(params)


def test_tensors_of_no_use_are_known(folder, tensors):
    write(
        folder,
        tensors
        | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
            CLIP + "embeddings.position_ids": np.arange(577),
        },
    )
    foreign.load(folder, TOWER)


def missing(folder, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write(folder, tensors)


def unknown(folder, tensors):
    write(folder, tensors | {"model.layers.2.mlp.up_proj.weight": np.zeros(3, np.float32)})


def wrong_shape(folder, tensors):
    write(folder, tensors | {"model.image_newline": np.zeros(63, np.float32)})


def wrong_dtype(folder, tensors):
    write(folder, tensors | {"model.image_newline": np.zeros(64, np.int32)})


def part_of_a_router(folder, tensors):
    write(folder, {k: v for k, v in tensors.items() if not k.startswith("model.router.merger")})


def truncated(folder, _):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100_000)


def other_header(folder, _):
    (folder / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b'{"a": {}}' + bytes(9))


def overlapping(folder, tensors):
    write(folder, tensors)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[64],', b'"shape":[65],', 1))


def no_index(folder, _):
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def no_weights(folder, _):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing"),
        (unknown, r"tensor 'model\.layers\.2\.mlp\.up_proj\.weight' is unknown"),
        (wrong_shape, r"tensor 'model\.image_newline' has shape \(63,\), its config says \(64,\)"),
        (wrong_dtype, r"tensor 'model\.image_newline' has dtype I32, not one of F32, F16, BF16"),
        (part_of_a_router, r"tensor 'model\.router\.merger\..*' is missing"),
        (truncated, r"model\.safetensors is truncated or damaged"),
        (other_header, r"model\.safetensors is damaged, or not a safetensors file"),
        (overlapping, r"is damaged: tensor '.*' of shape \(65,\) does not take 256 bytes"),
        (no_index, r"index\.json has no weight_map"),
        (no_weights, r"holds no model\.safetensors \(.*\) and no pytorch_model\.bin"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_weights(folder, tensors, spoil, message):
    spoil(folder, tensors)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        checkpoint.load(folder, TOWER)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear' is not supported"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size=1024, but the vision tower has 32"),
        ({"image_grid_pinpoints": "[[336"}, "image_grid_pinpoints="),
        ({"image_grid_pinpoints": [[300, 672]]}, "must be a multiple of the tile side 336"),
        ({"vis_token_granularity": [36, 144, 576]}, "vis_token_granularity="),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads=0 is not a positive integer"),
        ({"filtered_text_num": 0}, "config.json: filtered_text_num=0 is not a positive integer"),
        ({"mm_vision_select_layer": "-2"}, "config.json: mm_vision_select_layer=.-2. is not an integer"),
        ({"hidden_size": "64"}, "config.json: hidden_size='64' is not a positive integer"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "rope scaling 'llama3' lacks"),
        ({"intermediate_size": 99}, r"down_proj.weight' has shape \(64, 160\), its config says \(64, 99\)"),
    ],
)
def test_contradicting_config(folder, values, message):
    edit(folder, **values)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load(folder, TOWER)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_tokenizer_with_more_ids_than_the_embedding_is_not_imported(folder, tmp_path, where):
    """One <pad> more than the 1000 rows."""
    convert.dry_run(folder, TOWER)
    if where == "added_tokens.json":
        (folder / where).write_text('{"<pad>": 1000}')
    if where == "tokenizer_config.json":
        values = json.loads((folder / where).read_text())
        values["added_tokens_decoder"] = values.get("added_tokens_decoder", {}) | {"1000": {"content": "<pad>"}}
        (folder / where).write_text(json.dumps(values))
    if where == "tokenizer.json":
        train_byte_bpe(["a"], 259, folder)
        spec = json.loads((folder / where).read_text())
        names = [*(f"<{n}>" for n in range(259, 1000)), "<pad>"]
        added = [spec["added_tokens"][0] | {"id": id, "content": name} for id, name in enumerate(names, 259)]
        (folder / where).write_text(json.dumps(spec | {"added_tokens": spec["added_tokens"] + added}))
    message = r"the tokenizer has ids up to 1000 \('<pad>'\), the embedding has 1000 rows: remove the added tokens"
    for use in (lambda: convert.import_folder(folder, tmp_path / "out", TOWER), lambda: convert.dry_run(folder, TOWER)):
        with pytest.raises(ValueError, match=message) as error:
            use()
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        convert.dry_run(folder, TOWER)


def test_tower_that_is_not_there(folder, tmp_path):
    with pytest.raises(ValueError, match="mm_hidden_size=32, but the vision tower has 1024"):
        checkpoint.load(folder)
    with pytest.raises(FileNotFoundError, match="not a CLIP folder"):
        checkpoint.load(folder, tmp_path)
