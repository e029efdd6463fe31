"""The transformers library's `llava_next` layout: its names, its config.json, and its processor's files.

Two kinds of names are read, those of the hub's older files and those of newer versions, and mixtures:

    language_model.model.layers.0...     model.language_model.layers.0...      model.layers.0...
    language_model.lm_head.weight        lm_head.weight                        lm_head.weight
    vision_tower.vision_model.X          model.vision_tower.X                  (CLIP).vision_model.X
    multi_modal_projector.linear_1.bias  model.multi_modal_projector...        model.mm_projector.0.bias
    image_newline                        model.image_newline                   model.image_newline

The right column is the released layout's, which the parameter table has; (CLIP) stands for
model.vision_tower.vision_tower. The left one is written: every
version reads it.
"""

import os
import pathlib
import re
from typing import Any

import tokenizers

from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig, ScalerConfig, to_dict
from avg_llava_jax.convert import layouts
from avg_llava_jax.convert.chat_templates import chat_template
from avg_llava_jax.convert.tensors import read_json
from avg_llava_jax.data.sentencepiece_json import write_tokenizer_json
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.files import write_json

MODEL_TYPE = "llava_next"
IMAGE = "<image>"

MODELING = pathlib.Path(__file__).parents[1] / "assets" / "pytorch" / "modeling_avg_llava.py"
"""The PyTorch model that goes out with the weights; this package never imports it."""
MODEL_CLASS = "AvgLlavaForConditionalGeneration"
ROUTER = "router"
"""The folder of the router's weights, beside a LLaVA-NeXT's."""
ADAPTIVE = "avg_llava"
"""In config.json: the parts of our config that a LLaVA-NeXT has not, and modeling_avg_llava.py reads."""

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

FIXED = {
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
FAMILIES = ("llama", "mistral")


def released_name(name: str) -> str:
    """A tensor's name in the released layout; names of neither layout stay as they are."""
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
    """The model config behind a llava_next config.json; without an `ADAPTIVE` part, with this project's defaults.

    Raises:
      ValueError: one line that names the field.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    values = read_json(path)
    text, clip = values.get("text_config") or {}, values.get("vision_config") or {}
    layouts.check_fixed(path, values, FIXED)
    layouts.check_fixed(path, text, layouts.LANGUAGE_FIXED, "text_config.")
    kind, tower = text.get("model_type", "llama"), clip.get("model_type", "clip_vision_model")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: text_config.model_type={kind!r} is not supported, only {', '.join(FAMILIES)}")
    if tower != "clip_vision_model":
        raise ValueError(f"{path}: vision_config.model_type={tower!r} is not supported, only clip_vision_model")
    select = values.get("vision_feature_layer", -2)
    if not isinstance(select, int):
        raise ValueError(f"{path}: vision_feature_layer={select!r} is not supported, only one layer")
    tied = text.get("tie_word_embeddings", False) or values.get("tie_word_embeddings", False)
    colours = layouts.read_preprocessor(folder)
    known = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    clip = known | {"image_size": 336, "patch_size": 14} | clip
    pinpoints = values.get("image_grid_pinpoints") or DEFAULT_PINPOINTS
    adaptive = values.get(ADAPTIVE, {})
    template = adaptive.get("template") or layouts.template(folder, kind)
    try:
        config = ModelConfig(
            vision=layouts.clip_vision(path, clip, colours, select),
            scaler=ScalerConfig(**adaptive.get("scaler", {})),
            router=RouterConfig(**adaptive.get("router", {})),
            language=layouts.llama(folder, text | {"tie_word_embeddings": tied}),
            pinpoints=tuple((int(width), int(height)) for height, width in pinpoints),
            unpad=adaptive.get("unpad", "exact"),
            template=template,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    cut = colours.get("image_grid_pinpoints", pinpoints)
    if cut != pinpoints:
        raise ValueError(f"{path}: image_grid_pinpoints={pinpoints}, but its processor cuts images by {cut}")
    return config


DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
"""(height, width), as LlavaNextConfig has them; the other way round than in the released layout and in ours."""


def to_config(
    config: ModelConfig, original: dict[str, Any], image_token: int, vocabulary: int, router: bool
) -> dict[str, Any]:
    """config.json for the library, the inverse of `read_config`.

    original: the config.json that the weights came with; only one of this layout is used.
    router: whether the folder has one, and modeling_avg_llava.py.

    Raises:
      ValueError: the library cannot cut images as this model does; names the field.
    """
    if not config.pinpoints:
        raise ValueError("the transformers library needs pinpoints, this model has none (model.pinpoints)")
    if original.get("model_type") != MODEL_TYPE:
        original = {}
    language = config.language
    text = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2} | original.get("text_config", {})
    text |= {
        "attention_bias": language.attention_bias,
        "head_dim": language.head_dim,
        "hidden_size": language.width,
        "intermediate_size": language.mlp_width,
        "max_position_embeddings": max(text.get("max_position_embeddings", 0), language.max_length),
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "num_key_value_heads": language.kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_parameters": _rope(language),
        "rope_scaling": _rope(language) if language.rope_scaling else None,  # with the next, for versions before 5
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tied_embeddings,
        "vocab_size": vocabulary,
    }
    values = {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "image_grid_pinpoints": [[height, width] for width, height in config.pinpoints],
        "image_seq_length": config.granularities[-1],
        "image_token_index": image_token,
        "text_config": text,
        "tie_word_embeddings": language.tied_embeddings,
        "vision_config": original.get("vision_config", {}) | layouts.clip_config(config.vision),
        "vision_feature_layer": config.vision.select_layer,
    }
    original = {key: value for key, value in original.items() if key not in ("auto_map", ADAPTIVE)}
    if router:
        values["auto_map"] = {"AutoModelForImageTextToText": f"{MODELING.stem}.{MODEL_CLASS}"}
        values[ADAPTIVE] = {key: to_dict(config)[key] for key in ("scaler", "router", "unpad", "template")}
    return original | values | FIXED


def _rope(language: LanguageConfig) -> dict[str, Any]:
    scaling = language.rope_scaling
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": language.rope_theta}
    if scaling is not None:
        values |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    return values


def preprocessor(config: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json of a LlavaNextImageProcessor."""
    return layouts.clip_preprocessor(config.vision) | {
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        "do_pad": True,
        "image_grid_pinpoints": [[height, width] for width, height in config.pinpoints],
    }


def processor(config: ModelConfig) -> dict[str, Any]:
    """processor_config.json of a LlavaNextProcessor."""
    return {
        "processor_class": "LlavaNextProcessor",
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "default",
    }


def save_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer, image_token: int, template: str) -> None:
    """Write tokenizer files from which the library makes the ids that our templates make, and the chat template.

    It is to take tokenizer.json as it is, as we do: a Llama tokenizer it would rebuild. BOS has to stand in that file.
    Where text after a special token begins no word, text after an image does nevertheless (as in the released code):
    the chat template then puts a space there.
    """
    tokenizer.save(folder)
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer_json(folder, tokenizer.special_tokens, legacy=values.pop("legacy", None) is not False)
    _begin_with_bos(folder / "tokenizer.json", tokenizer)
    values |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    write_json(path, values)
    name_image_token(folder, image_token)
    after_image = " " if tokenizer.encode("\na") != tokenizer.encode("\na", after_special=True) else ""
    chat = chat_template(template, after_image)
    if chat is not None:
        (folder / "chat_template.jinja").write_text(chat, encoding="utf-8")


def _begin_with_bos(path: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Let a tokenizer.json put BOS before a text by itself, where our texts begin with one and it does not."""
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


def name_image_token(folder: pathlib.Path, token: int) -> None:
    """Give the tokenizer files in `folder` the special token `<image>` under that id, where they have none."""
    entry = {
        "content": IMAGE,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    values["added_tokens_decoder"] = values.get("added_tokens_decoder", {}) | {str(token): entry}
    values |= {"extra_special_tokens": {"image_token": IMAGE}, "processor_class": "LlavaNextProcessor"}
    write_json(path, values)
    path = folder / "tokenizer.json"
    if path.is_file():
        spec = read_json(path)
        if all(added["content"] != IMAGE for added in spec["added_tokens"]):
            spec["added_tokens"].append({"id": token, **entry})
            write_json(path, spec)
