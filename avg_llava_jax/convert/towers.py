"""Vision tower configs of the transformers library, in and out: CLIP, SigLIP and SigLIP 2 with a fixed resolution.

    config.json and preprocessor_config.json --read--> VisionConfig --write, preprocessor--> the same files

Mean, deviation and filter of the pixels are the tower's; a folder without mean and deviation is refused. Another tower
is an entry of `TOWERS` here, and its module an entry of `models.encoder.ENCODERS`.
"""

import math
import os
import pathlib
from typing import Any, NamedTuple

from avg_llava_jax.config import VisionConfig
from avg_llava_jax.convert.decoders import check_fixed, check_kinds
from avg_llava_jax.convert.tensors import read_json

Folder = str | os.PathLike[str]


class Tower(NamedTuple):
    """A vision model of the library.

    encoder: the name of our module. defaults: values that the library takes for fields which a config.json omits.
    config: fields of its config.json that have one value. image_processor: the library's class.
    """

    encoder: str
    defaults: dict[str, Any]
    config: dict[str, Any]
    image_processor: str


COMMON = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(
        "clip",
        COMMON | {"image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
        {"architectures": ["CLIPVisionModel"]},
        "CLIPImageProcessor",
    ),
    "siglip_vision_model": Tower(
        "siglip",
        COMMON | {"image_size": 224, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
        {"architectures": ["SiglipVisionModel"], "vision_use_head": False},
        "SiglipImageProcessor",
    ),
}
"""By the `model_type` of a vision config."""

WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""`model_type` of a model with a text side -> that of its vision side."""

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The library's name of an activation -> ours."""

FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's number of a filter -> its name."""

FIXED = {"do_rescale": True, "do_normalize": True, "num_channels": 3}
"""Fields with only one supported value."""

COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
"""Config fields of a tower that are positive integers."""


def read_folder(vision_tower: Folder, select: int) -> VisionConfig:
    """Build the encoder config from a tower's folder; `select` is the index of the selected layer.

    Raises:
      FileNotFoundError, ValueError: not a tower's folder, or a config that this model does not support.
    """
    path = pathlib.Path(vision_tower) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"vision_tower {vision_tower} is not a CLIP folder or a SigLIP one: no config.json")
    values = read_json(path)
    kind = values.get("model_type")
    if kind not in WHOLE and kind not in TOWERS:
        raise ValueError(f"{path}: model_type={kind!r} is not a CLIP or a SigLIP with a fixed resolution")
    vision = values.get("vision_config", values)
    return read(path, vision, WHOLE.get(kind, kind), read_preprocessor(vision_tower), select)


def read(path: pathlib.Path, values: dict[str, Any], kind: str, colours: dict[str, Any], select: int) -> VisionConfig:
    """Build the encoder config from a vision config and the result of `read_preprocessor`.

    path: for errors. kind: its `model_type`.

    Raises:
      ValueError: names the field that this model does not support.
    """
    if kind not in TOWERS:
        raise ValueError(f"{path}: vision_config.model_type={kind!r} is not supported, only {', '.join(TOWERS)}")
    check_kinds(path, values, COUNTS, numbers=("layer_norm_eps",))
    check_fixed(path, values, FIXED)
    tower = TOWERS[kind]
    values = tower.defaults | values
    if values["hidden_act"] not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{path}: hidden_act={values['hidden_act']!r} is not supported, only {known}")
    return VisionConfig(
        image_size=values["image_size"],
        patch_size=values["patch_size"],
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        mlp_width=values["intermediate_size"],
        activation=ACTIVATIONS[values["hidden_act"]],
        norm_eps=values["layer_norm_eps"],
        select_layer=select,
        mean=tuple(colours["image_mean"]),
        std=tuple(colours["image_std"]),
        resample=FILTERS[colours.get("resample", 3)],
        encoder=tower.encoder,
    )


def read_preprocessor(folder: Folder) -> dict[str, Any]:
    """Read the image preprocessing from preprocessor_config.json or from `image_processor` in processor_config.json.

    Version 5 of the transformers library saves only the second file.

    Raises:
      FileNotFoundError: the folder has neither.
      ValueError: the two contradict each other, or ask for a preprocessing that this model does not support.
    """
    folder = pathlib.Path(folder)
    files = {folder / "processor_config.json": "image_processor", folder / "preprocessor_config.json": None}
    found: dict[pathlib.Path, dict[str, Any]] = {}
    for path, key in files.items():
        values = read_json(path) if path.is_file() else {}
        values = values.get(key, {}) if key else values
        if type(values) is not dict:
            raise ValueError(f"{path}: {key} does not hold a JSON object")
        if values:
            found[path] = values
    if not found:
        raise FileNotFoundError(
            f"{folder} does not say how pixels are normalised: it has no preprocessor_config.json, and no"
            " processor_config.json with an image_processor; copy the file published with the weights"
        )
    (path, chosen), *others = found.items()
    _check_preprocessor(path, chosen)
    for other, values in others:
        for key in ("image_mean", "image_std", "resample"):
            if values.get(key, chosen.get(key)) != chosen.get(key) or (key != "resample" and key not in values):
                raise ValueError(
                    f"{path} has {key}={chosen.get(key)}, {other} has {values.get(key)}: remove the wrong one"
                )
    return chosen


def _check_preprocessor(path: pathlib.Path, values: dict[str, Any]) -> None:
    check_fixed(path, values, FIXED)
    for key in ("image_mean", "image_std"):
        colour = values.get(key)
        numbers = isinstance(colour, list) and len(colour) == 3 and all(type(x) in (int, float) for x in colour)
        if not numbers or (key == "image_std" and min(colour) <= 0):
            raise ValueError(f"{path}: {key}={colour!r} must be three numbers" + " over 0" * (key == "image_std"))
    factor = values.get("rescale_factor", 1 / 255)
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path}: rescale_factor={factor!r} is not supported, only 1/255")
    if values.get("resample", 3) not in FILTERS:
        known = ", ".join(f"{number} ({name})" for number, name in FILTERS.items())
        raise ValueError(f"{path}: resample={values['resample']!r} is not supported, only {known}")


def _of(vision: VisionConfig) -> tuple[str, Tower]:
    """The library's `model_type` for an encoder, and its entry; ValueError where the library has none."""
    for kind, tower in TOWERS.items():
        if tower.encoder == vision.encoder:
            return kind, tower
    raise ValueError(f"model.vision.encoder={vision.encoder!r}: the transformers library has no such tower")


def write(vision: VisionConfig) -> dict[str, Any]:
    """Build config.json of a tower's folder, the inverse of `read_folder`."""
    kind, tower = _of(vision)
    return tower.config | {
        "model_type": kind,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == vision.activation),
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "intermediate_size": vision.mlp_width,
        "layer_norm_eps": vision.norm_eps,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
        "projection_dim": vision.width,
    }


def preprocessor(vision: VisionConfig) -> dict[str, Any]:
    """Build preprocessor_config.json of a tower's folder: the preprocessing of one tile."""
    side = {"height": vision.image_size, "width": vision.image_size}
    crop = {"crop_size": side, "do_center_crop": True, "size": {"shortest_edge": vision.image_size}}
    return {
        "image_processor_type": _of(vision)[1].image_processor,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "resample": next(number for number, name in FILTERS.items() if name == vision.resample),
        "rescale_factor": 1 / 255,
        **(crop if vision.encoder == "clip" else {"size": side}),
    }
