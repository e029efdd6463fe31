"""Decoder configs of the transformers library, in and out: Llama, Mistral, Qwen2 (2.5 too) and Qwen3.

    config.json, or the text_config of a larger one --read--> LanguageConfig --write--> text_config

Another family is an entry of `FAMILIES` here, and what it computes differently a field of `LanguageConfig`.
"""

import pathlib
from typing import Any

from avg_llava_jax.config import LanguageConfig, RopeScaling

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": LLAMA | QWEN,
    "qwen3": LLAMA | QWEN | {"head_dim": 128},
}
"""`model_type` -> values that the library takes for fields which a config.json omits."""

FIXED = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0}
"""Config fields of a decoder for which this model supports only one value."""

COUNTS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size"),
)
"""Config fields of a decoder that are positive integers; `OPTIONAL` ones may be null."""
OPTIONAL = ("num_key_value_heads", "head_dim")
NUMBERS = ("rms_norm_eps", "rope_theta", "max_position_embeddings", "tokenizer_model_max_length", "sliding_window")
FLAGS = ("attention_bias", "tie_word_embeddings", "use_sliding_window")


def check_fixed(path: pathlib.Path, values: dict[str, Any], fixed: dict[str, Any], inside: str = "") -> None:
    """Check that each field in `fixed` is absent or has its only supported value.

    path, inside: file and prefix of the fields, for errors.

    Raises:
      ValueError: names the first field with another value.
    """
    for key, only in fixed.items():
        if values.get(key, only) != only:
            raise ValueError(f"{path}: {inside}{key}={values[key]!r} is not supported, only {only!r}")


def check_kinds(
    path: pathlib.Path,
    values: dict[str, Any],
    counts: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    """Check that each field is absent or of its kind: positive integers, positive numbers, true or false.

    optional: fields that may be null. Numbers and flags may be: null is no number, and no.

    Raises:
      ValueError: names the first field that is not.
    """
    for kinds, names, says in (
        ((int,), counts, "a positive integer"),
        ((int, float), numbers, "a positive number"),
        ((bool,), flags, "true or false"),
    ):
        for key in names:
            value = values.get(key)
            absent = key not in values or (value is None and (key in optional or names is not counts))
            if not absent and (type(value) not in kinds or (names is not flags and value <= 0)):
                raise ValueError(f"{path}: {key}={value!r} is not {says}")


def read(path: pathlib.Path, values: dict[str, Any], family: str, inside: str = "") -> LanguageConfig:
    """Build the decoder config from the fields of a LlamaConfig, MistralConfig, Qwen2Config or Qwen3Config.

    A Mistral's sliding window limits `max_length`: up to that length the window does not change attention.

    Args:
      path, inside: file and prefix of the fields, for errors.
      family: one of `FAMILIES`.

    Raises:
      ValueError: names the field that this model does not support.
    """
    check_fixed(path, values, FIXED, inside)
    check_kinds(path, values, COUNTS, NUMBERS, FLAGS, OPTIONAL)
    nothing = {key for key in (*NUMBERS, *FLAGS) if values.get(key) is None and key != "sliding_window"}
    values = FAMILIES[family] | {key: value for key, value in values.items() if key not in nothing}
    limit = values.get("tokenizer_model_max_length") or values["max_position_embeddings"]
    heads, width = values["num_attention_heads"], values["hidden_size"]
    rope = _rope_of(path, values, inside)
    if family == "mistral":
        limit = min(limit, values["sliding_window"] or limit)
    _check_windows(path, values, limit, inside)
    return LanguageConfig(
        vocab_size=values["vocab_size"],
        width=width,
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        mlp_width=values["intermediate_size"],
        norm_eps=values["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or values.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(path, rope, inside),
        attention_bias=family != "qwen2" and values.get("attention_bias", False),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=values.get("tie_word_embeddings", False),
        max_length=limit,
    )


def _check_windows(path: pathlib.Path, values: dict[str, Any], limit: int, inside: str) -> None:
    """Check that every layer attends to all `limit` positions.

    `layer_types` says it layer by layer; without it, a Qwen's layers from `max_window_layers` on have a window where
    `use_sliding_window` is set.
    """
    layers, window = values["num_hidden_layers"], values.get("sliding_window") or 0
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 28) if values.get("use_sliding_window") else layers
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    for layer, kind in enumerate(kinds):
        if kind == "full_attention" or (kind == "sliding_attention" and window >= limit):
            continue
        if kind != "sliding_attention":
            raise ValueError(f"{path}: {inside}layer_types[{layer}]={kind!r} is not supported, only 'full_attention'")
        raise ValueError(
            f"{path}: layer {layer} attends to {inside}sliding_window={window} tokens, fewer than"
            f" {inside}max_position_embeddings={limit}: set max_position_embeddings to {window} at most"
        )


def _rope_of(path: pathlib.Path, values: dict[str, Any], inside: str) -> dict[str, Any]:
    """`rope_parameters`, of version 5 of the library, or else `rope_scaling`; raises ValueError where they differ."""
    given = [(key, values[key]) for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    for key, rope in given:
        if type(rope) is not dict:
            raise ValueError(f"{path}: {inside}{key}={rope!r} is not an object")
        check_kinds(path, rope, numbers=("rope_theta", "factor", "low_freq_factor", "high_freq_factor"))
    if len({_rope_scaling(path, rope, inside) for _, rope in given}) > 1:
        raise ValueError(f"{path}: {inside}rope_parameters and {inside}rope_scaling differ: remove the wrong one")
    return given[0][1] if given else {}


def _rope_scaling(path: pathlib.Path, rope: dict[str, Any], inside: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each type of layer"
    check_fixed(path, rope, {"partial_rotary_factor": 1.0}, f"{inside}rope_parameters.")
    try:
        match kind:
            case "default":
                return None
            case "linear":
                return RopeScaling("linear", float(rope["factor"]))
            case "llama3":
                return RopeScaling(
                    "llama3",
                    float(rope["factor"]),
                    float(rope["low_freq_factor"]),
                    float(rope["high_freq_factor"]),
                    int(rope["original_max_position_embeddings"]),
                )
    except KeyError as error:
        raise ValueError(f"{path}: rope scaling {kind!r} lacks {error}") from None
    raise ValueError(f"{path}: rope scaling {kind!r} is not supported, only 'linear' and 'llama3'")


def write(language: LanguageConfig, original: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Build the text_config of a decoder, the inverse of `read`.

    original: the text_config imported with the weights, for fields not read here; {} = none.
    vocabulary: number of embedding rows.

    Raises:
      ValueError: no family of the library computes what this decoder does.
    """
    if language.qk_norm and language.qkv_bias:
        raise ValueError("model.language: no decoder of the transformers library has both qk_norm and qkv_bias")
    family = "qwen3" if language.qk_norm else "qwen2" if language.qkv_bias else original.get("model_type", "llama")
    longest = max(original.get("max_position_embeddings", 0), language.max_length)
    shorter = {"tokenizer_model_max_length": language.max_length} if language.max_length < longest else {}
    return original | shorter | {
        "model_type": family,
        "attention_bias": language.attention_bias,
        "head_dim": language.head_dim,
        "hidden_size": language.width,
        "intermediate_size": language.mlp_width,
        "max_position_embeddings": longest,
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
