"""Every setting has an effect, or is refused where it would have none; defaults stand in `training.config` alone."""

import ast
import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import parameters
from avg_llava_jax.config import ModelConfig, RopeScaling, from_dict, to_dict
from avg_llava_jax.data.packing import Shape, load_tiles
from avg_llava_jax.data.pipeline import EMPTY, collate_rows
from avg_llava_jax.parallel import costs, sharding
from avg_llava_jax.training import phases, setup
from avg_llava_jax.training.config import TrainConfig, defaults, read
from avg_llava_jax.training.step import Step
from tests.conftest import TOKENIZER

ROOT = Path(__file__).parents[1]
MESH = {"data": 1, "fsdp": 1, "tensor": 1}

IN_THE_STEP = {
    "phase": "connector",
    "granularities": (8,),
    "seed": 1,
    "steps": 7,
    "batch_size": 2,
    "compute_dtype": "bfloat16",
    "remat": "full",
    "optimizer.learning_rate": 1e-3,
    "optimizer.encoder_learning_rate": 1e-3,
    "optimizer.connector_learning_rate": 1e-3,
    "optimizer.warmup": 0.5,
    "optimizer.weight_decay": 0.5,
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.5,
    "optimizer.eps": 1e-3,
    "optimizer.clip": 0.5,
    "optimizer.accumulate": 4,  # on one CPU four rows are two micro-batches anyway
}
"""Settings that change what a step of multi-granularity tuning computes, each with another value."""

IN_RGLF = {
    "rglf.margin": 0.5,
    "rglf.rank_weight": 0.5,
    "rglf.ce_weight": 0.5,
    "rglf.nll_weight": 0.5,
    "rglf.tie_nats": 0.5,
    "rglf.execution": "vmap",
}

SHOWN_BY = {
    "checkpoint_every": "test_a_run_that_is_stopped_goes_on_to_the_same_losses",
    "evaluate_every": "test_validation_while_training",
    "data.validation": "test_validation_while_training",
    "data.validation_images": "test_validation_of_a_path",
    "max_bad_steps": "test_steps_that_are_not_finite_are_passed_over",
    "init_from": "test_train_then_route",
    "fresh": "test_asks_once_trains_many_and_goes_on",
    "vision_tower": "test_imported_and_trained",
    "tokenizer": "test_train_then_route",
    "data.path": "test_the_data_is_what_the_settings_say",
    "data.images": "test_the_data_is_what_the_settings_say",
    "data.max_pixels": "test_the_data_is_what_the_settings_say",
    "data.shapes": "test_the_data_is_what_the_settings_say",
    "data.pack": "test_the_data_is_what_the_settings_say",
    "data.workers": "test_the_data_is_what_the_settings_say",
    "data.max_skipped_share": "test_too_many_bad_records_stop_a_run",
    "rglf.feedback": "test_stored_feedback_trains_as_live_does",
    "optimizer.lora.rank": "test_what_is_trained_and_what_is_stored",
    "optimizer.lora.targets": "test_what_is_trained_and_what_is_stored",
    "optimizer.lora.alpha": "test_adapters_are_trained_further",
    "optimizer.lora.dropout": "test_dropout_is_of_a_sample_alone",
    "quantize": "test_a_router_on_adapters",
    "mesh.data": "test_a_mesh_computes_what_one_device_does",
    "mesh.fsdp": "test_a_mesh_computes_what_one_device_does",
    "mesh.tensor": "test_a_mesh_computes_what_one_device_does",
}
"""The test that would fail if a setting had no effect, for those that are no part of the step."""


def changed(by: dict, **others) -> TrainConfig:
    config = defaults()
    config.update_from_flattened_dict({"granularities": (4,), "batch_size": 4, "steps": 100, **by, **others})
    return read(config)


def traced(config: TrainConfig, model: ModelConfig) -> str:
    """What the step computes, as text."""
    mesh = sharding.make_mesh(MESH)
    setup.check_step(config, mesh)
    granularities = setup.granularities(config, model)
    row = collate_rows([EMPTY], [load_tiles(EMPTY, model)], Shape(1, 1, 16, 4, 0.6), model, granularities)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype), row)
    with jax.set_mesh(mesh):
        step = Step(config, model, mesh)
        trained, frozen = step.split(step.params)
        jaxpr = step.update.trace(trained, step.state, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32)).jaxpr
    return re.sub("0x[0-9a-f]+", "", str(jaxpr))


def test_every_setting_has_an_effect(tiny):
    """A new setting belongs into one of the tables above; `model` has a test of its own."""
    settings = {name for name in setup.leaves(defaults().to_dict()) if not name.startswith("model.")}
    assert settings == IN_THE_STEP.keys() | IN_RGLF.keys() | SHOWN_BY.keys()

    without = traced(changed({}), tiny)
    assert traced(changed({}), tiny) == without
    for name, value in IN_THE_STEP.items():
        assert traced(changed({name: value}), tiny) != without, name

    rglf = {"phase": "rglf", "granularities": ()}
    without = traced(changed(rglf), tiny)
    for name, value in IN_RGLF.items():
        assert traced(changed(rglf | {name: value}), tiny) != without, name

    tests = {
        node.name: ast.unparse(node)
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert not set(SHOWN_BY.values()) - tests.keys()


def other(value):
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 or 9
        case str():
            others = {"quick_gelu": "gelu", "width": "height", "tokens": "tiles", "exact": "released"}
            return others.get(value, "llama3" if value == "linear" else "vicuna_v2")
        case ():
            return ((1, 1), (2, 2))  # of `scaler.grids`
        case tuple() | list():
            return tuple(reversed(value))


def test_every_field_of_the_model_can_be_set():
    """And none is changed that is not; `first_axis` and `heads`, which docs/extend.md offers, among them."""
    base = dataclasses.replace(
        ModelConfig(), language=dataclasses.replace(ModelConfig().language, rope_scaling=RopeScaling())
    )
    assert setup.override(base, read(defaults()).model) == base
    assert setup.override(ModelConfig(), read(defaults()).model).language.rope_scaling is None
    values = setup.leaves(to_dict(base))
    names = {name.removeprefix("model.") for name in setup.leaves(defaults().to_dict()) if name.startswith("model.")}
    assert names == values.keys() and {"scaler.first_axis", "router.heads"} <= names
    for name, value in values.items():
        config = defaults()
        config.update_from_flattened_dict({f"model.{name}": other(value)})
        try:
            found = setup.leaves(to_dict(setup.override(base, read(config).model)))
        except ValueError:  # it does not go with the other values, so it was read
            continue
        assert {key for key in found if found[key] != values[key]} == {name}


FRESH = {"tokenizer": "T", "data.path": "jersey"}


@pytest.mark.parametrize(
    ("phase", "changes", "message"),
    [
        ("rglf", {"remat": "full"}, "remat=full has no effect in phase rglf"),
        ("rglf", {"optimizer.encoder_learning_rate": 1.0}, "encoder_learning_rate=1.0 has no effect in phase rglf"),
        ("rglf", {"optimizer.connector_learning_rate": 1.0}, "connector_learning_rate=1.0 has no effect in phase rglf"),
        ("connector", {"optimizer.encoder_learning_rate": 1.0}, "phase connector, which trains connector"),
        ("rglf", {"rglf.feedback": "F", "rglf.execution": "vmap"}, "execution=vmap has no effect with rglf.feedback"),
        ("connector", {"evaluate_every": 3}, "evaluate_every=3 has no effect without data.validation"),
        ("connector", {"data.validation": "1.5"}, r"data.validation=1.5: a share of the records lies between 0 and 1"),
        ("connector", {"data.validation": "0.5", "data.validation_images": "I"}, "validation_images=I has no effect"),
        ("grounding", {}, r"granularities=\(4,\) has no effect in phase grounding"),
        ("connector", FRESH | {"fresh": ("router",)}, r"fresh=\('router',\) has no effect without init_from"),
        ("connector", FRESH | {"vision_tower": "V"}, "vision_tower='V' has no effect without init_from"),
        ("grounding", {"granularities": (), "data.pack": 2}, "data.pack=2 has no effect in phase grounding"),
        ("connector", {"data.pack": 3}, "batch_size=4 must be a multiple of 3: .* times data.pack=3"),
        ("connector", {"data.pack": 0}, "data.pack=0 must be at least 1"),
        ("rglf", {"rglf.execution": "both"}, "rglf.execution='both': choose per_length or vmap"),
    ],
)
def test_a_setting_without_effect_is_refused(phase, changes, message):
    with pytest.raises(ValueError, match=message):
        setup.check(changed({"phase": phase, **changes}), sharding.make_mesh(MESH))


def test_an_unknown_setting_is_named():
    config = defaults()
    config.rglf.temperature = 1.0
    with pytest.raises(ValueError, match=r"config\.rglf: unknown key 'temperature'; known keys are ce_weight"):
        read(config)


def test_the_data_is_what_the_settings_say(tiny, tokenizer, llava_folder):
    """Each setting of `data` shows in the batches, or in how they are read."""
    data = {"data.path": str(llava_folder / "train.json"), "data.images": str(llava_folder / "images")}

    def planned(**changes):
        return setup.plan_batches(changed(data | changes), tiny, tokenizer)

    plain = planned(**{"data.shapes": 3, "steps": 1000})
    assert len(plain.ladder) == 3
    assert [len(planned(**few).ladder) for few in ({"data.shapes": 1, "steps": 1000}, {"steps": 10})] == [1, 1]
    assert not any(plain[number]["skipped"] for number in range(16))
    small = planned(**{"data.max_pixels": 500})
    assert "too_large_image" in {one.reason for number in range(16) for one in small[number]["skipped"]}
    assert [len(planned(**{"data.pack": pack})[0]["text"]) for pack in (1, 2)] == [4, 2]
    assert planned(**{"data.path": "jersey"}).parts[0].path == "jersey"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        planned(**{"data.images": "nowhere"})
    config = changed(data | {"data.workers": 2})
    (llava_folder / "tokenizer").symlink_to(TOKENIZER)
    assert setup.open_batches(config, llava_folder, tiny, sharding.make_mesh(MESH)).workers == 2


def test_remat_computes_more_again_and_the_same_gradients(tiny, monkeypatch):
    """`dots` keeps the products with parameters, `full` the input of each layer alone."""
    monkeypatch.setattr(jax, "device_count", lambda: 2)  # plain attention: on one CPU it forms its scores twice
    model = from_dict(to_dict(tiny) | {"language": to_dict(tiny.language) | {"layers": 2}})
    params = jax.jit(lambda: parameters.init(model, jax.random.key(0)))()
    draw = np.random.default_rng(0)
    row = collate_rows([EMPTY], [load_tiles(EMPTY, model)], Shape(1, 1, 16, 4, 0.6), model, (4,))
    row["text"], row["targets"] = draw.integers(0, 600, (1, 16), np.int32), draw.integers(0, 600, (1, 4), np.int32)
    row["pixels"] = draw.integers(0, 256, row["pixels"].shape, np.uint8)
    row["index"][4][0] = draw.integers(0, 16 + model.pyramid_rows, row["index"][4].shape[1])
    row["target_at"][4][0] = [3, 4, 5, 6]

    def gradients(remat):
        loss = phases.make_loss("multi_granularity", model, (4,), TrainConfig().rglf, remat)
        return jax.jit(jax.grad(lambda p: loss(p, row, None)[0]))

    found = {remat: gradients(remat) for remat in ("none", "dots", "full")}
    work = {remat: costs.flops(one.trace(params).jaxpr.jaxpr) for remat, one in found.items()}
    assert work["none"] < work["dots"] < work["full"]
    plain = found["none"](params)
    assert any(leaf.any() for leaf in jax.tree.leaves(plain["language"]["layers"]))
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[remat](params), plain)


def test_the_package_does_not_need_the_experiments():
    """configs/ is no part of what is installed."""
    for path in (ROOT / "avg_llava_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("configs", "launch") for name in names), path
