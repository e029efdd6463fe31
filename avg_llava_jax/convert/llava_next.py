"""The transformers library's `llava_next` and `llava_onevision`: tensor names, config.json, the processor's files.

The reader accepts old names (as in the hub's files), new names, and mixtures:

    language_model.model.layers.0...     model.language_model.layers.0...      model.layers.0...
    language_model.lm_head.weight        lm_head.weight                        lm_head.weight
    vision_tower.vision_model.X          model.vision_tower.X                  (tower).vision_model.X
    multi_modal_projector.linear_1.bias  model.multi_modal_projector...        model.mm_projector.0.bias
    image_newline                        model.image_newline                   model.image_newline

The right column is the released layout, which the parameter table uses; (tower) stands for
model.vision_tower.vision_tower. Export writes the left column, which every version reads.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers

from avg_llava_jax.config import ModelConfig, RouterConfig, ScalerConfig, build, to_dict
from avg_llava_jax.convert import decoders, layouts, towers
from avg_llava_jax.convert.chat_templates import chat_template, with_images
from avg_llava_jax.convert.tensors import read_json
from avg_llava_jax.data.conversation import puts_bos
from avg_llava_jax.data.geometry import ALLOWED
from avg_llava_jax.data.sentencepiece_json import write_tokenizer_json
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.files import write_json

ONEVISION = "llava_onevision"
IMAGE, VIDEO = "<image>", "<video>"
PROCESSOR = "LlavaNextProcessor"
CLIP = "clip_vision_model"

MODELING = pathlib.Path(__file__).parents[1] / "assets" / "pytorch" / "modeling_avg_llava.py"
"""The PyTorch model that is exported with the weights; this package never imports it."""
ROUTER = "router"
"""Folder of the router's weights, inside the exported folder."""
ADAPTIVE = "avg_llava"
"""Key of config.json for the fields of ModelConfig that a LLaVA-NeXT lacks; modeling_avg_llava.py reads them."""

INWARD = (
    (r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(model\.)?", "model."),
    (r"^vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^image_newline$", "model.image_newline"),
)
OUTWARD = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^model\.(?=layers\.|norm\.|embed_tokens\.)", "language_model.model."),
)

FIXED = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}


class Style(NamedTuple):
    """A model class of the library.

    name: of its classes, as in `LlavaNextProcessor`. text, tower: the library's default model types of its parts.
    vision: its default vision config. strategy, layer: the default visual features. pinpoints: (height, width).
    """

    name: str
    text: str
    tower: str
    vision: dict[str, int]
    strategy: str
    layer: int
    pinpoints: list[list[int]]

    @property
    def adaptive(self) -> str:
        """The class in modeling_avg_llava.py that adds scaler and router to this one."""
        return "AvgLlava" + self.name.removeprefix("Llava").removeprefix("Next") + "ForConditionalGeneration"


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
STYLES = {
    "llava_next": Style(
        *("LlavaNext", "llama", CLIP),
        dict(zip(SIZES, (1024, 4096, 24, 16, 336, 14), strict=True)),
        *("default", -2),
        [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    ),
    ONEVISION: Style(
        *("LlavaOnevision", "qwen2", "siglip_vision_model"),
        dict(zip(SIZES, (1152, 4304, 26, 16, 384, 14), strict=True)),
        *("full", -1),
        [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    ),
}
"""By `model_type`. Pinpoints are (height, width), as in the library; the released layout and ModelConfig have (width,
height)."""


def style_of(config: ModelConfig) -> str:
    """The `model_type` of the library's class that runs a model: of SigLIP's features all are used, of CLIP's not the
    class token.

    Raises:
      ValueError: that class cuts or packs images in another way; names the field.
    """
    if not config.pinpoints:
        raise ValueError("model.pinpoints=() cannot be exported: the transformers library needs pinpoints")
    kind = ONEVISION if config.vision.encoder == "siglip" else "llava_next"
    largest = max(width * height for width, height in config.pinpoints) / config.vision.image_size**2
    most = config.most_tiles or (9 if kind == ONEVISION else 0)
    if (most and kind != ONEVISION) or (most != config.most_tiles and math.sqrt(largest / most) > ALLOWED):
        raise ValueError(f"model.most_tiles={config.most_tiles} cannot be exported as {kind}")
    if (config.several == "square") != (kind == ONEVISION):
        raise ValueError(f"model.several={config.several!r} cannot be exported as {kind}")
    return kind


def released_name(name: str) -> str:
    """A tensor's name in the released layout; names of neither layout are returned unchanged."""
    for pattern, by in INWARD:
        name = re.sub(pattern, by, name)
    return name


def stored_name(name: str) -> str:
    """A released-layout name in this layout."""
    for pattern, by in OUTWARD:
        name, changed = re.subn(pattern, by, name)
        if changed:
            return name
    return name


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Build the model config from a config.json of one of `STYLES`; without `ADAPTIVE`, with this project's defaults.

    Raises:
      ValueError: one line that names the field.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    values = read_json(path)
    style = STYLES[values["model_type"]]
    decoders.check_fixed(path, values, FIXED | {"vision_feature_select_strategy": style.strategy})
    text, vision = values.get("text_config") or {}, values.get("vision_config") or style.vision
    kind, tower = text.get("model_type", style.text), vision.get("model_type", style.tower)
    if kind not in decoders.FAMILIES:
        known = ", ".join(decoders.FAMILIES)
        raise ValueError(f"{path}: text_config.model_type={kind!r} is not supported, only {known}")
    if tower != style.tower:
        raise ValueError(f"{path}: vision_config.model_type={tower!r} is not supported, only {style.tower}")
    select = values.get("vision_feature_layer", style.layer)
    if not isinstance(select, int):
        raise ValueError(f"{path}: vision_feature_layer={select!r} is not supported, only one layer")
    tied = text.get("tie_word_embeddings", False) or values.get("tie_word_embeddings", False)
    colours = towers.read_preprocessor(folder)
    pinpoints = values.get("image_grid_pinpoints") or style.pinpoints
    adaptive = values.get(ADAPTIVE, {})
    mosaic = {}
    if values["model_type"] == ONEVISION:
        key = "vision_aspect_ratio"
        mosaic = layouts.onevision_mosaic(path, key, values.get(key, "anyres_max_9"))
    try:
        config = ModelConfig(
            # The vision config of a LLaVA-NeXT may lack fields: early versions of the library saved differences alone.
            vision=towers.read(path, vision if style.tower != CLIP else style.vision | vision, tower, colours, select),
            scaler=build(ScalerConfig, adaptive.get("scaler", {}), f"{ADAPTIVE}.scaler"),
            router=build(RouterConfig, adaptive.get("router", {}), f"{ADAPTIVE}.router"),
            language=decoders.read(path, text | {"tie_word_embeddings": tied}, kind, "text_config."),
            pinpoints=tuple((int(width), int(height)) for height, width in pinpoints),
            template=adaptive.get("template") or layouts.template(folder, kind),
            **mosaic | ({"unpad": adaptive["unpad"]} if "unpad" in adaptive else {}),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    _check_processor(path, values, colours, config, pinpoints)
    return config


def _check_processor(
    path: pathlib.Path, values: dict[str, Any], colours: dict[str, Any], config: ModelConfig, pinpoints: list[list[int]]
) -> None:
    """Check that the folder's processor cuts images into the tiles that its config.json packs."""
    cut = colours.get("image_grid_pinpoints", pinpoints)
    if cut != pinpoints:
        raise ValueError(f"{path}: image_grid_pinpoints={pinpoints}, but its processor cuts images by {cut}")
    side, size = config.vision.image_size, colours.get("size")
    if values["model_type"] == ONEVISION and size and set(size.values()) != {side}:
        raise ValueError(f"{path}: vision_config.image_size={side}, but its processor makes tiles of {size}")


def placeholders(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the tokens that stand for images and, in a LLaVA-OneVision, videos; the next ones where it lacks them.

    A model here has no use for `<video>`; where the tokenizer lacks it, the library's processor takes the unknown
    token's id for it, and the padding of a batch for videos.
    """
    found, free = {}, tokenizer.vocab_size
    for name in (IMAGE, VIDEO) if style_of(config) == ONEVISION else (IMAGE,):
        found[name] = tokenizer.special_tokens.get(name, free)
        free = max(free, found[name] + 1)
    return found


def to_config(
    config: ModelConfig, original: dict[str, Any], added: Mapping[str, int], vocabulary: int, router: bool
) -> dict[str, Any]:
    """Build config.json for the library, the inverse of `read_config`.

    original: the config.json imported with the weights; used only if it has this layout.
    added: the ids of `placeholders`. vocabulary: number of embedding rows.
    router: whether the folder holds a router and modeling_avg_llava.py.

    Raises:
      ValueError: the library cannot cut images into this model's tiles; names the field.
    """
    kind = style_of(config)
    style = STYLES[kind]
    if original.get("model_type") != kind:
        original = {}
    text = decoders.write(config.language, original.get("text_config", {}), vocabulary)
    values = {
        "architectures": [f"{style.name}ForConditionalGeneration"],
        "model_type": kind,
        "image_grid_pinpoints": [[height, width] for width, height in config.pinpoints],
        "image_seq_length": config.tokens[-1],
        "image_token_index": added[IMAGE],
        "text_config": text,
        "tie_word_embeddings": config.language.tied_embeddings,
        "vision_config": original.get("vision_config", {}) | towers.write(config.vision),
        "vision_feature_layer": config.vision.select_layer,
        "vision_feature_select_strategy": style.strategy,
    }
    if kind == ONEVISION:
        values["vision_aspect_ratio"] = _aspect(config)
        values["video_token_index"] = added[VIDEO]
    original = {key: value for key, value in original.items() if key not in ("auto_map", ADAPTIVE)}
    if router:
        values["auto_map"] = {"AutoModelForImageTextToText": f"{MODELING.stem}.{style.adaptive}"}
        values[ADAPTIVE] = {key: to_dict(config)[key] for key in ("scaler", "router", "unpad", "template")}
    return original | values | FIXED


def _aspect(config: ModelConfig) -> str:
    return f"anyres_max_{config.most_tiles or 9}"


def preprocessor(config: ModelConfig) -> dict[str, Any]:
    """Build preprocessor_config.json of the library's image processor."""
    name, side = STYLES[style_of(config)].name, config.vision.image_size
    values = towers.preprocessor(config.vision) | {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_pad": True,
        "image_grid_pinpoints": [[height, width] for width, height in config.pinpoints],
    }
    return values if name == "LlavaNext" else values | {"size": {"height": side, "width": side}}


def processor(config: ModelConfig) -> dict[str, Any]:
    """Build processor_config.json of the library's processor."""
    style = STYLES[style_of(config)]
    values = {
        "processor_class": f"{style.name}Processor",
        "image_token": IMAGE,
        "vision_feature_select_strategy": style.strategy,
    }
    if style.name == "LlavaNext":
        return values | {"num_additional_image_tokens": 1, "patch_size": config.vision.patch_size}
    return values | {
        "num_image_tokens": config.tokens[-1],
        "video_token": VIDEO,
        "vision_aspect_ratio": _aspect(config),
    }


def save_tokenizer(
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    added: Mapping[str, int],
    template: str,
    processor_class: str = PROCESSOR,
) -> None:
    """Write the chat template and tokenizer files with which the library produces the same ids as `conversation`.

    The library must read tokenizer.json unchanged (it rebuilds Llama tokenizers), so tokenizer_config.json names
    PreTrainedTokenizerFast, and tokenizer.json itself adds BOS. If text after a special token starts without a word
    boundary, text after an image still starts with one (as in the released code): the chat template then adds a space.
    """
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer_json(folder, tokenizer.special_tokens, legacy=values.pop("legacy", None) is not False)
    if puts_bos(template):
        _begin_with_bos(folder / "tokenizer.json", tokenizer)
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(path, values)
    name_tokens(folder, added, processor_class)
    after_image = " " if tokenizer.encode("\na") != tokenizer.encode("\na", after_special=True) else ""
    chat = chat_template(template, after_image)
    if template == "tokenizer" and not tokenizer.writes_images:
        chat = with_images(tokenizer, after_image)
    if chat is not None:
        (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)  # the library's processors prefer it


def _begin_with_bos(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Make a tokenizer.json add BOS before a text, if the model's texts begin with BOS and it does not add one yet."""
    if tokenizer.bos_id is None or tokenizers.Tokenizer.from_file(str(path)).encode("a").ids[:1] == [tokenizer.bos_id]:
        return
    spec = read_json(path)
    bos = next(text for text, token in tokenizer.special_tokens.items() if token == tokenizer.bos_id)
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    add = {
        "type": "TemplateProcessing",
        "single": [begin, one],
        "pair": [begin, one, begin, two],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }
    before = spec.get("post_processor")
    spec["post_processor"] = {"type": "Sequence", "processors": [before, add]} if before else add
    write_json(path, spec)


def name_tokens(folder: pathlib.Path, added: Mapping[str, int], processor_class: str = PROCESSOR) -> None:
    """Add special tokens, by their ids, to the tokenizer files in `folder`, if they lack them; see `placeholders`."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    entries = {token: {"content": name, **plain} for name, token in added.items()}
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    known = {str(token): entry for token, entry in entries.items()}
    values["added_tokens_decoder"] = values.get("added_tokens_decoder", {}) | known
    named = {f"{name.strip('<>')}_token": name for name in added}
    values |= {"extra_special_tokens": named, "processor_class": processor_class}
    write_json(path, values)
    path = folder / "tokenizer.json"
    if path.is_file():
        spec = read_json(path)
        there = {each["content"] for each in spec["added_tokens"]}
        spec["added_tokens"] += [{"id": token, **e} for token, e in entries.items() if e["content"] not in there]
        write_json(path, spec)
