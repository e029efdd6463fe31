"""What a model config refuses, and what it becomes as JSON."""

import dataclasses

import pytest

from avg_llava_jax.config import ModelConfig, RopeScaling, from_dict, to_dict
from avg_llava_jax.configs import avg_llava_7b
from avg_llava_jax.training import setup
from avg_llava_jax.training.config import read


def test_a_config_survives_json(tiny):
    language = dataclasses.replace(tiny.language, rope_scaling=RopeScaling("llama3", 8.0))
    config = dataclasses.replace(tiny, language=language)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("first", "grids"),
    [("width", ((4, 4), (8, 4), (8, 8))), ("height", ((4, 4), (4, 8), (8, 8)))],
)
def test_the_ladder_follows_from_the_grid(tiny, first, grids):
    rows = {"vision.image_size": 64, "vision.patch_size": 8, "scaler.halvings": 2, "scaler.first_axis": first}
    config = changed(tiny, rows | {"pinpoints": ()})
    assert config.grids == grids
    assert config.granularities == (16, 32, 64)
    assert config.pyramid_offsets == {16: 0, 32: 16, 64: 48} and config.pyramid_rows == 112


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("unpad", "Exact", "model.unpad='Exact': choose exact or released"),
        ("router.attention", "token", "model.router.attention='token': choose tokens or tiles"),
        ("vision.activation", "relu", "model.vision.activation='relu'"),
        ("scaler.first_axis", "rows", "model.scaler.first_axis='rows'"),
        ("scaler.halvings", 6, "scaler.halvings=6 needs a larger grid than 4 x 4"),
        ("router.heads", 3, "model.language.width=16 must be a multiple of router.heads=3"),
        ("language.kv_heads", 0, "model.language.heads=2 must be a multiple of language.kv_heads=0"),
        ("vision.select_layer", -4, "model.vision.select_layer=-4 of 2 layers"),
        ("vision.patch_size", 5, "vision.image_size=16 must be a multiple of vision.patch_size=5"),
        ("pinpoints", ((16, 20),), "pinpoint (16, 20) must be a multiple of the tile side 16"),
        ("language.rope_scaling", {"kind": "yarn"}, "language.rope_scaling.kind='yarn'"),
        ("router.depth", 1, "model.router: unknown key 'depth'"),
    ],
)
def test_what_makes_no_sense_is_named(tiny, name, value, message):
    with pytest.raises(ValueError) as error:
        changed(tiny, {name: value})
    assert message in str(error.value)


def test_the_stage_after_connector_pretraining_sets_its_template(tiny):
    """Unset it would go on with `plain`, which is what the checkpoint says."""
    pretrained = dataclasses.replace(tiny, template="plain")
    config = avg_llava_7b.get_config()
    assert setup.override(pretrained, read(config).model) == pretrained
    config.model.template = "vicuna_v1"  # --config.model.template=vicuna_v1
    assert setup.override(pretrained, read(config).model) == dataclasses.replace(tiny, template="vicuna_v1")


def changed(config: ModelConfig, by: dict) -> ModelConfig:
    values = to_dict(config)
    for name, value in by.items():
        *parents, last = name.split(".")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return from_dict(values)
