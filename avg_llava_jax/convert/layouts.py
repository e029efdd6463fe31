"""Conversion between PyTorch config.json files and ModelConfig, in both directions.

The reader is strict: a field that contradicts another or is not supported raises an error with its name.
"""

import ast
import math
import os
import pathlib
from typing import Any

from avg_llava_jax.config import ModelConfig, RouterConfig, ScalerConfig, VisionConfig
from avg_llava_jax.convert import decoders
from avg_llava_jax.convert.decoders import check_counts, check_fixed
from avg_llava_jax.convert.tensors import read_json
from avg_llava_jax.data.conversation import END, START, keeps_turns
from avg_llava_jax.data.tokenizer import load_tokenizer

Folder = str | os.PathLike[str]

KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": VisionConfig()}
"""Towers whose config is known without a folder; their weights need one unless the checkpoint holds them."""

FIXED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
"""Fields of a released config.json with only one supported value."""

PREPROCESSOR_FIXED = {"do_rescale": True, "do_normalize": True, "resample": 3}
"""Fields of a preprocessor_config.json with only one supported value; resample 3 is bicubic."""

COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size"),
)
"""Config fields of an encoder that are positive integers."""


def read_config(folder: Folder, vision_tower: Folder | None, has_router: bool) -> ModelConfig:
    """Build the model config from a released config.json and the config of its CLIP folder.

    With a router the config uses the released router attention (over tiles) and the released un-padding; without one,
    this project's defaults.

    Raises:
      FileNotFoundError, ValueError: one line that names the folder or field.
    """
    folder = pathlib.Path(folder)
    values = read_json(folder / "config.json")
    check_fixed(folder / "config.json", values, FIXED)
    vision = _vision(folder, values, vision_tower)
    if values.get("mm_hidden_size", vision.width) != vision.width:
        raise ValueError(
            f"{folder}/config.json: mm_hidden_size={values['mm_hidden_size']}, but the vision tower has {vision.width};"
            " give the CLIP folder of the checkpoint as vision_tower"
        )
    ladder = values.get("vis_token_granularity")
    scaler = ScalerConfig() if ladder is None else ScalerConfig(halvings=len(ladder) - 1)
    family = values["model_type"].removeprefix("llava_")
    language, spoken = decoders.read(folder / "config.json", values, family), template(folder, family)
    try:
        config = ModelConfig(
            vision=vision,
            scaler=scaler,
            router=RouterConfig(
                attention="tiles" if has_router else "tokens", text_tokens=values.get("filtered_text_num", 32)
            ),
            language=language,
            pinpoints=_pinpoints(folder, values),
            unpad="released" if has_router else "exact",
            template=spoken,
        )
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    if ladder is not None and tuple(ladder) != config.granularities:
        raise ValueError(
            f"{folder}/config.json: vis_token_granularity={ladder}, but {len(ladder) - 1} halvings of a"
            f" {vision.grid} x {vision.grid} grid give {list(config.granularities)}"
        )
    return config


def _pinpoints(folder: pathlib.Path, values: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """Pinpoints (width, height) from `image_grid_pinpoints`, a string that holds a list of [width, height]."""
    given = values.get("image_grid_pinpoints")
    try:
        pairs = ast.literal_eval(given) if isinstance(given, str) else given
        return tuple((int(width), int(height)) for width, height in pairs)
    except (TypeError, ValueError, SyntaxError):
        raise ValueError(
            f"{folder}/config.json: image_grid_pinpoints={given!r} is not a list of [width, height]"
        ) from None


def _vision(folder: pathlib.Path, values: dict[str, Any], vision_tower: Folder | None) -> VisionConfig:
    name = values.get("mm_vision_tower")
    select = values.get("mm_vision_select_layer", -2)
    if vision_tower is None:
        if name not in KNOWN_TOWERS:
            raise FileNotFoundError(
                f"{folder}/config.json names the vision tower {name!r}: give that CLIP folder as vision_tower"
            )
        return VisionConfig(**{**vars(KNOWN_TOWERS[name]), "select_layer": select})
    return read_tower(vision_tower, select)


def read_tower(vision_tower: Folder, select: int) -> VisionConfig:
    """Build the encoder config from a CLIP folder; `select` is the index of the selected layer.

    Raises:
      FileNotFoundError, ValueError: not a CLIP folder, or a config that this model does not support.
    """
    path = pathlib.Path(vision_tower) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"vision_tower {vision_tower} is not a CLIP folder: it has no config.json")
    clip = read_json(path)
    if clip.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"{path}: model_type={clip.get('model_type')!r} is not a CLIP")
    return clip_vision(path, clip.get("vision_config", clip), read_preprocessor(vision_tower), select)


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
        for key in ("image_mean", "image_std"):
            if values.get(key) != chosen[key]:
                raise ValueError(f"{path} has {key}={chosen[key]}, {other} has {values.get(key)}: remove the wrong one")
    return chosen


def _check_preprocessor(path: pathlib.Path, values: dict[str, Any]) -> None:
    check_fixed(path, values, PREPROCESSOR_FIXED)
    for key in ("image_mean", "image_std"):
        colour = values.get(key)
        numbers = isinstance(colour, list) and len(colour) == 3 and all(type(x) in (int, float) for x in colour)
        if not numbers or (key == "image_std" and min(colour) <= 0):
            raise ValueError(f"{path}: {key}={colour!r} must be three numbers" + " over 0" * (key == "image_std"))
    factor = values.get("rescale_factor", 1 / 255)
    if type(factor) is not float or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"{path}: rescale_factor={factor!r} is not supported, only 1/255")


def has_tokenizer(folder: Folder) -> bool:
    """Whether the folder holds a tokenizer."""
    return any((pathlib.Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def check_tokenizer(folder: Folder, rows: int) -> None:
    """Check that every id of a folder's tokenizer, if any, has a row in the embedding of `rows` rows.

    Raises:
      ValueError: names the tokens without a row.
    """
    if not has_tokenizer(folder):
        return
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > rows:
        over = [repr(text) for text, token in tokenizer.special_tokens.items() if token >= rows]
        named = f" ({', '.join(over[:4])}{', …' if len(over) > 4 else ''})" if over else ""
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}{named}, the embedding has {rows} rows:"
            " remove the added tokens that the model does not know (added_tokens.json, tokenizer_config.json), or use"
            " the tokenizer published with the weights"
        )


def template(folder: Folder, family: str) -> str:
    """Conversation template of a model: the one that matches its tokenizer, else LLaVA's for its family.

    The tokenizer's own chat template decides: Llama 3's gives `llama_3`, one with USER and ASSISTANT `vicuna_v1`, one
    with [INST] of a Mistral `mistral_instruct`, that of LLaVA-OneVision in the transformers library `llava_onevision`,
    a ChatML that rewrites earlier turns (Qwen3 drops their thoughts) `chatml`, any other `tokenizer`. A tokenizer
    without chat template is matched by its special tokens.

    Raises:
      ValueError: a ChatML tokenizer without a chat template, not of a Qwen.
    """
    folder = pathlib.Path(folder)
    default = {"mistral": "mistral_instruct"}.get(family, "vicuna_v1")
    if not has_tokenizer(folder):
        return default
    tokenizer = load_tokenizer(folder)
    if "<|start_header_id|>" in tokenizer.special_tokens:
        return "llama_3"
    is_chatml = START in tokenizer.special_tokens
    if tokenizer.chat_template is None:
        if not is_chatml:
            return default
        if family in ("qwen2", "qwen3"):
            return {"qwen2": "qwen_1_5", "qwen3": "chatml"}[family]
        raise ValueError(f"{folder}: its tokenizer has {START} of ChatML and no chat template: add one")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
    if "USER:" in said and "ASSISTANT:" in said:
        return "vicuna_v1"
    if f"{START}user \nWho?{END}{START}" in said:
        return "llava_onevision"
    if is_chatml and not keeps_turns(tokenizer):
        return "chatml"
    return "mistral_instruct" if family == "mistral" and "[INST]" in said else "tokenizer"


def clip_vision(path: pathlib.Path, clip: dict[str, Any], colours: dict[str, Any], select: int) -> VisionConfig:
    """Build the encoder config from a CLIPVisionConfig and the result of `read_preprocessor`; `path` is for errors.

    Raises:
      ValueError: names the field that this model does not support.
    """
    check_counts(path, clip, COUNTS)
    # The defaults are those of CLIPVisionConfig, whose config.json may omit them.
    vision = VisionConfig(
        image_size=clip.get("image_size", 224),
        patch_size=clip.get("patch_size", 32),
        width=clip.get("hidden_size", 768),
        layers=clip.get("num_hidden_layers", 12),
        heads=clip.get("num_attention_heads", 12),
        mlp_width=clip.get("intermediate_size", 3072),
        activation=clip.get("hidden_act", "quick_gelu"),
        norm_eps=clip.get("layer_norm_eps", 1e-5),
        select_layer=select,
        mean=tuple(colours["image_mean"]),
        std=tuple(colours["image_std"]),
    )
    if vision.activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{path}: hidden_act={vision.activation!r} is not supported, only 'quick_gelu' and 'gelu'")
    return vision


def tower_folder(folder: Folder, vision_tower: Folder | None) -> Folder | None:
    """The given CLIP folder, else the checkpoint's own `vision_tower/`, which `export_released` writes; else None."""
    inside = pathlib.Path(folder) / "vision_tower"
    return inside if vision_tower is None and (inside / "config.json").is_file() else vision_tower


def released_config(config: ModelConfig, original: dict[str, Any], router: bool, tower: str) -> dict[str, Any]:
    """Build config.json for the released code, the inverse of `read_config`.

    Args:
      original: the config.json imported with the weights, for fields that this project does not read; {} = none.
      router: whether the folder holds a router; without one it is a LLaVA-NeXT.
      tower: value of `mm_vision_tower` where the config is not that of a known tower.

    Raises:
      ValueError: the released code cannot run this model; names the field.
    """
    language, vision = config.language, config.vision
    only: dict[str, tuple[Any, Any]] = {"head_dim": (language.head_dim, language.width // language.heads)}
    only |= {"qkv_bias": (language.qkv_bias, False), "qk_norm": (language.qk_norm, False)}
    if language.rope_scaling is not None:
        only["rope_scaling.kind"] = (language.rope_scaling.kind, "linear")
    if router:
        only |= {
            "router.attention": (config.router.attention, "tiles"),
            "router.heads": (config.router.heads, 8),
            "router.norm_eps": (config.router.norm_eps, 1e-5),
            "scaler.first_axis": (config.scaler.first_axis, "width"),
            "unpad": (config.unpad, "released"),
        }
    for field, (ours, theirs) in only.items():
        if ours != theirs:
            raise ValueError(
                f"the released code supports only {field}={theirs!r}, this model has {ours!r}"
                + ("; --norouter exports it as a LLaVA-NeXT" if field.startswith(("router", "scaler", "unpad")) else "")
            )
    values = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "attention_bias": language.attention_bias,
        "hidden_act": "silu",
        "hidden_size": language.width,
        "image_aspect_ratio": "anyres",
        "intermediate_size": language.mlp_width,
        "max_position_embeddings": max(original.get("max_position_embeddings", 0), language.max_length),
        "mm_hidden_size": vision.width,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": vision.select_layer,
        "mm_vision_tower": tower,
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "num_key_value_heads": language.kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_scaling": language.rope_scaling and {"type": "linear", "factor": language.rope_scaling.factor},
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tied_embeddings,
        "tokenizer_model_max_length": language.max_length,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
        "vocab_size": language.vocab_size,
    }
    for name, known in KNOWN_TOWERS.items():
        if known == VisionConfig(**{**vars(vision), "select_layer": known.select_layer}):
            values["mm_vision_tower"] = name
    router_fields = {
        "vis_token_granularity": list(config.granularities),
        "filtered_text_num": config.router.text_tokens,
        "router_select": True,
        "margin": original.get("margin", 1.0),
        "rank_loss_weight": original.get("rank_loss_weight", 1.0),
        "ce_loss_weight": original.get("ce_loss_weight", 0.1),
    }
    defaults = {"tokenizer_padding_side": "right", "use_cache": True}
    kept = {key: value for key, value in original.items() if key not in router_fields and key != "rope_parameters"}
    try:
        same = _pinpoints(pathlib.Path(), original) == config.pinpoints
    except ValueError:
        same = False
    values["image_grid_pinpoints"] = (
        original["image_grid_pinpoints"] if same else str([list(size) for size in config.pinpoints])
    )
    return defaults | kept | values | (router_fields if router else {})


def clip_config(vision: VisionConfig) -> dict[str, Any]:
    """Build config.json of a CLIP folder, the inverse of `read_tower`."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": vision.activation,
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


def clip_preprocessor(vision: VisionConfig) -> dict[str, Any]:
    """Build preprocessor_config.json of a CLIP folder: the preprocessing of one tile."""
    side = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
