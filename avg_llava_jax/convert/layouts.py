"""Conversion between PyTorch config.json files and ModelConfig, in both directions.

The reader is strict: a field that contradicts another or is not supported raises an error with its name.
"""

import ast
import itertools
import os
import pathlib
import re
from typing import Any

from avg_llava_jax.config import ModelConfig, RouterConfig, ScalerConfig, VisionConfig
from avg_llava_jax.convert import decoders, towers
from avg_llava_jax.convert.decoders import check_fixed, check_kinds
from avg_llava_jax.convert.tensors import read_json
from avg_llava_jax.data.conversation import END, START, keeps_turns
from avg_llava_jax.data.tokenizer import load_tokenizer

Folder = str | os.PathLike[str]

KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "google/siglip-so400m-patch14-384": VisionConfig(
        image_size=384,
        width=1152,
        layers=27,
        mlp_width=4304,
        activation="gelu_tanh",
        norm_eps=1e-6,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        encoder="siglip",
    ),
}
"""Towers whose config is known without a folder; their weights need one unless the checkpoint holds them."""

FIXED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
"""Fields of a released config.json with only one supported value."""

ONEVISION = "llava_qwen"
"""`model_type` of a LLaVA-OneVision in the layout of its authors."""

FAMILIES = {"llava_llama": "llama", "llava_mistral": "mistral", ONEVISION: "qwen2"}
"""`model_type` of a folder in this layout -> family of its decoder."""


def read_config(folder: Folder, vision_tower: Folder | None, has_router: bool) -> ModelConfig:
    """Build the model config from a released config.json and the config of its tower's folder.

    With a router the config uses the released router attention (over tiles) and the released un-padding; without one,
    this project's defaults. A LLaVA-OneVision uses the library's un-padding and reduces large mosaics.

    Raises:
      FileNotFoundError, ValueError: one line that names the folder or field.
    """
    folder = pathlib.Path(folder)
    values = read_json(folder / "config.json")
    check_fixed(folder / "config.json", values, FIXED)
    check_kinds(folder / "config.json", values, counts=("filtered_text_num",))
    vision = _vision(folder, values, vision_tower)
    if values.get("mm_hidden_size", vision.width) != vision.width:
        raise ValueError(
            f"{folder}/config.json: mm_hidden_size={values['mm_hidden_size']}, but the vision tower has {vision.width};"
            " give the CLIP folder of the checkpoint as vision_tower"
        )
    mosaic = _mosaic(folder, values) | ({"unpad": "released"} if has_router else {})
    ladder = values.get("vis_token_granularity")
    scaler = ScalerConfig() if ladder is None else ScalerConfig(halvings=len(ladder) - 1)
    family = FAMILIES[values["model_type"]]
    language, spoken = decoders.read(folder / "config.json", values, family), template(folder, family)
    try:
        config = ModelConfig(
            vision=vision,
            scaler=scaler,
            router=RouterConfig(
                attention="tiles" if has_router else "tokens", text_tokens=values.get("filtered_text_num", 32)
            ),
            language=language,
            pinpoints=_pinpoints(values, vision.image_size),
            template=spoken,
            **mosaic,
        )
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    if ladder is not None and tuple(ladder) != config.granularities:
        raise ValueError(
            f"{folder}/config.json: vis_token_granularity={ladder}, but {len(ladder) - 1} halvings of a"
            f" {vision.grid} x {vision.grid} grid give {list(config.granularities)}"
        )
    return config


def _mosaic(folder: pathlib.Path, values: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` that `image_aspect_ratio` sets: `anyres`, of a LLaVA-OneVision `anyres_max_9`."""
    if values.get("model_type") != ONEVISION:
        check_fixed(folder / "config.json", values, {"image_aspect_ratio": "anyres"})
        return {}
    return onevision_mosaic(folder / "config.json", "image_aspect_ratio", values.get("image_aspect_ratio"))


def onevision_mosaic(path: pathlib.Path, key: str, value: Any) -> dict[str, Any]:
    """Fields of `ModelConfig` by which LLaVA-OneVision packs its mosaics; `value` is `anyres_max_9`.

    Raises:
      ValueError: another value; names the key.
    """
    most = re.fullmatch(r"anyres_max_([1-9]\d*)", str(value))
    if most is None:
        raise ValueError(f"{path}: {key}={value!r} is not supported, only anyres_max_N, as anyres_max_9")
    return {"unpad": "library", "most_tiles": int(most[1]), "several": "square"}


def _pinpoints(values: dict[str, Any], side: int) -> tuple[tuple[int, int], ...]:
    """Pinpoints (width, height) from `image_grid_pinpoints`, a list of [width, height] or a string that holds one.

    A string "(1x1),...,(6x6)" means all grids of tiles of `side` pixels between the two.
    """
    given = values.get("image_grid_pinpoints")
    span = re.fullmatch(r"\((\d+)x(\d+)\),\.\.\.,\((\d+)x(\d+)\)", given) if isinstance(given, str) else None
    if span:
        first, second, last, end = map(int, span.groups())
        return tuple((x * side, y * side) for x in range(first, last + 1) for y in range(second, end + 1))
    try:
        pairs = ast.literal_eval(given) if isinstance(given, str) else given
        return tuple((int(width), int(height)) for width, height in pairs)
    except (TypeError, ValueError, SyntaxError):
        raise ValueError(f"image_grid_pinpoints={given!r} is not a list of [width, height]") from None


def _vision(folder: pathlib.Path, values: dict[str, Any], vision_tower: Folder | None) -> VisionConfig:
    name = values.get("mm_vision_tower")
    select = values.get("mm_vision_select_layer", -2)
    if type(select) is not int:
        raise ValueError(f"{folder}/config.json: mm_vision_select_layer={select!r} is not an integer")
    if vision_tower is None:
        if name not in KNOWN_TOWERS:
            raise FileNotFoundError(
                f"{folder}/config.json names the vision tower {name!r}: give that CLIP or SigLIP folder as vision_tower"
            )
        return VisionConfig(**{**vars(KNOWN_TOWERS[name]), "select_layer": select})
    return towers.read_folder(vision_tower, select)


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
    only |= {"vision.encoder": (vision.encoder, "clip"), "most_tiles": (config.most_tiles, 0)}
    only |= {"several": (config.several, "anyres"), "vision.resample": (vision.resample, "bicubic")}
    if language.rope_scaling is not None:
        only["rope_scaling.kind"] = (language.rope_scaling.kind, "linear")
    if router:
        only |= {
            "router.attention": (config.router.attention, "tiles"),
            "router.heads": (config.router.heads, 8),
            "router.norm_eps": (config.router.norm_eps, 1e-5),
            "scaler.first_axis": (config.scaler.first_axis, "width"),
            "scaler.grids": (config.scaler.grids, ()),
            "scaler.halvings of odd sides": (sum(b != 2 * a for a, b in itertools.pairwise(config.tokens)), 0),
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
        same = _pinpoints(original, vision.image_size) == config.pinpoints
    except ValueError:
        same = False
    values["image_grid_pinpoints"] = (
        original["image_grid_pinpoints"] if same else str([list(size) for size in config.pinpoints])
    )
    return defaults | kept | values | (router_fields if router else {})
