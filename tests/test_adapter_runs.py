"""Runs of adapters: what they train and store, that they resume exactly, and that every command reads them."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from avg_llava_jax import adapters, checkpoint, parameters, stored
from avg_llava_jax.convert import convert
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.training.config import defaults, read
from avg_llava_jax.training.loop import train
from avg_llava_jax.training.metrics import read_rows
from avg_llava_jax.training.setup import check
from tests.conftest import write_llava
from tests.random_model import save_random_model


def settings(root, phase="multi_granularity"):
    config = defaults()
    config.phase, config.init_from = phase, str(root / "base")
    config.data.path, config.data.images, config.data.shapes = str(root / "train.json"), str(root / "images"), 1
    config.steps, config.batch_size, config.checkpoint_every = 4, 4, 2
    config.optimizer.learning_rate, config.optimizer.warmup = 1e-2, 0.0
    return config


def lora(config):
    config.granularities = (4,)
    config.optimizer.lora.update({"rank": 2, "alpha": 2.0, "dropout": 0.1, "targets": ("language", "encoder/v")})
    return config


@pytest.fixture(scope="module")
def root(tiny, tokenizer, tmp_path_factory):
    """Data, a base, and `run`: four steps of QLoRA, with checkpoints of steps 2 and 4."""
    root = write_llava(tmp_path_factory.mktemp("runs"))
    save_random_model(tiny, tokenizer, root / "base")
    config = lora(settings(root))
    config.quantize = "int8"
    train(config, root / "run")
    return root


def test_what_is_trained_and_what_is_stored(root, tiny):
    run, before = checkpoint.load(root / "run"), parameters.flat(checkpoint.load(root / "base").params)
    after = parameters.flat(run.params)
    for path, leaf in before.items():
        trained = parameters.TABLE[path].component == "connector"
        assert np.array_equal(after[path], leaf) != trained, path
    found = adapters.of(run.params)
    assert set(found) == set(after) - set(before) == set(adapters.shapes(tiny, ("language", "encoder/v"), 2))
    assert all(leaf.any() for leaf in found.values()) and found["encoder/layers/v/lora_scale"][0] == 1.0
    held = stored.shapes(root / "run" / "checkpoints" / "4" / "params")
    assert {path.split("/")[0] for path in held} == {"connector", "encoder", "image_newline", "language", "router"}
    assert set(found) == {path for path in held if path.startswith(("encoder", "language"))}
    assert {"path", "digest", "vision_tower"} == run.meta["base"].keys()
    losses = [row["loss"] for row in read_rows(root / "run" / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_a_run_resumes_exactly(root):
    shutil.copytree(root / "run", root / "again")
    shutil.rmtree(root / "again" / "checkpoints" / "4")
    config = lora(settings(root))
    config.quantize = "int8"
    train(config, root / "again")
    one, other = (checkpoint.load(root / name) for name in ("run", "again"))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    rows = [[row["loss"] for row in read_rows(root / name / "metrics.jsonl")][-2:] for name in ("run", "again")]
    assert rows[0] == rows[1]


def test_a_router_on_adapters(root):
    """RGLF on an int8 base with adapters: both stay as they are, and the checkpoint still refers to the first base."""
    config = settings(root, "rglf")
    config.init_from, config.quantize, config.steps = str(root / "run"), "int8", 1
    train(config, root / "routed")
    one, other = (checkpoint.load(root / name) for name in ("run", "routed"))
    assert one.meta["base"] == other.meta["base"]
    before, after = parameters.flat(one.params), parameters.flat(other.params)
    changed = {parameters.TABLE[path].component for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"router"} and before.keys() == after.keys()


def test_a_router_on_a_published_adapter_is_found_from_its_own_folder(root, tmp_path):
    """A published adapter refers to its base by a relative path, which would be another one from elsewhere."""
    (tmp_path / "hub").mkdir()
    shutil.copytree(root / "run", tmp_path / "hub" / "tuned")
    path = tmp_path / "hub" / "tuned" / "config.json"
    values = json.loads(path.read_text())
    shutil.copytree(values["base"]["path"], tmp_path / "hub" / "base")
    path.write_text(json.dumps(values | {"base": values["base"] | {"path": "../base"}}))
    config = settings(root, "rglf")
    config.init_from, config.steps = str(tmp_path / "hub" / "tuned"), 1
    train(config, tmp_path / "work" / "router")
    assert adapters.of(checkpoint.load(tmp_path / "work" / "router").params)


def test_every_command_reads_it(root, tmp_path):
    """Answers of adapters are those of the two folded into one; so are exports."""
    convert.merge(root / "run", tmp_path / "merged")
    image, logits = str(root / "images" / "1-0.png"), []
    for folder in (root / "run", tmp_path / "merged"):
        model = AvgLlava.load(folder)
        prepared = model.prepare(Request("What colour is it?", [image], granularity=4))
        logits.append(model.first_logits([prepared])[0])
    np.testing.assert_allclose(*logits, atol=1e-3, rtol=1e-4)  # of logits of some hundreds
    convert.export_transformers(root / "run", tmp_path / "one")
    convert.export_transformers(tmp_path / "merged", tmp_path / "other")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert first == second


def test_adapters_are_trained_further(root, tmp_path):
    """From a run of the same adapters; another rank or alpha is refused."""
    config = lora(settings(root))
    config.init_from, config.steps = str(root / "run"), 1
    config.fresh = ("language",)
    with pytest.raises(ValueError, match="fresh=.*: encoder and language model are those of the base of this run"):
        train(config, tmp_path / "fresh")
    config.fresh = ()
    for key, value, message in (
        ("rank", 3, r"other adapters .* encoder/layers/v/lora_a is \(1, 16, 2\) there, \(1, 16, 3\) is asked for"),
        ("alpha", 8.0, r"alpha / rank of \[1.0\], optimizer.lora asks for 4.0"),
    ):
        other = config.copy_and_resolve_references()
        other.optimizer.lora[key] = value
        with pytest.raises(ValueError, match=message):
            train(other, tmp_path / key)


def test_another_base(root, tiny, tokenizer, tmp_path):
    shutil.copytree(root / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    values = json.loads(path.read_text())
    params = parameters.flat(checkpoint.load(root / "base").params)
    params["language/layers/q/kernel"] *= 1.001
    params = parameters.unflat(params)
    meta = {"step": 1, "training": None, "granularities_trained": None}
    convert.write_checkpoint(checkpoint.Loaded(tiny, params, tokenizer.folder, meta), tmp_path / "other")
    for base, error, message in (
        ("../other", ValueError, "other is not the base that .*run was trained on: its weights are others"),
        ("gone", FileNotFoundError, "config.json refers to its base .*gone, which does not exist"),
        ("../run", ValueError, "refers to a base itself"),
    ):
        path.write_text(json.dumps(values | {"base": values["base"] | {"path": base}}))
        with pytest.raises(error, match=message):
            checkpoint.load(tmp_path / "run")
    shutil.copytree(root / "base", tmp_path / "moved")  # the same weights elsewhere; a path from the folder
    path.write_text(json.dumps(values | {"base": values["base"] | {"path": "../moved"}}))
    assert adapters.of(checkpoint.load(tmp_path / "run").params)


def test_settings_without_effect(root):
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": 1})
    for phase, change, message in (
        ("rglf", {}, "lora.rank=2 has no effect in phase rglf, which trains router"),
        ("rglf", {"optimizer.lora.rank": 0, "quantize": "int4"}, "lora.alpha=2.0 has no effect with .*rank=0"),
        ("connector", {"quantize": "int4"}, "quantize='int4': choose int8"),
        ("connector", {"optimizer.encoder_learning_rate": 0.0}, "targets=.* has no effect on the encoder with"),
        ("connector", {"init_from": "", "tokenizer": "t"}, "optimizer.lora.rank needs a trained base: give init_from"),
        ("connector", {"optimizer.lora.targets": ("language/qq",)}, "targets has 'language/qq': choose from encoder"),
    ):
        config = lora(settings(root, phase))
        config.granularities = ()
        config.update_from_flattened_dict(change)
        with pytest.raises(ValueError, match=message):
            check(read(config), mesh)
    config = settings(root)
    config.quantize = "int8"
    with pytest.raises(ValueError, match="quantize=int8 freezes the language model, which phase multi_granularity"):
        check(read(config), mesh)
