"""Decoder configs in and out, against the library's own classes."""

import pathlib

import pytest
import transformers

from avg_llava_jax.config import LanguageConfig, RopeScaling
from avg_llava_jax.convert import decoders

CLASSES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
HERE = pathlib.Path("config.json")


def library(family, **values):
    """A config of the library, as its config.json."""
    return getattr(transformers, CLASSES[family])(**values).to_dict()


@pytest.mark.parametrize("family", decoders.FAMILIES)
def test_what_a_config_omits_is_what_the_library_takes(family):
    assert decoders.read(HERE, {}, family) == decoders.read(HERE, library(family), family)


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("family", "language"),
    [
        ("llama", LanguageConfig(rope_scaling=LLAMA3, rope_theta=5e5, kv_heads=8, tied_embeddings=True)),
        ("llama", LanguageConfig(attention_bias=True, rope_scaling=RopeScaling("linear", 2.0))),
        ("qwen2", LanguageConfig(qkv_bias=True, rope_theta=1e6, max_length=32768, norm_eps=1e-6)),
        ("qwen3", LanguageConfig(qk_norm=True, width=1024, heads=16, kv_heads=8, head_dim=128, tied_embeddings=True)),
        ("qwen3", LanguageConfig(qk_norm=True, attention_bias=True)),
    ],
)
def test_out_and_in_again(family, language):
    written = decoders.write(language, {}, language.vocab_size)
    assert written["model_type"] == family
    assert decoders.read(HERE, library(**{"family": family} | written), family) == language
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert decoders.read(HERE, older, family) == language


def test_no_family_has_both():
    with pytest.raises(ValueError, match="no decoder of the transformers library has both qk_norm and qkv_bias"):
        decoders.write(LanguageConfig(qk_norm=True, qkv_bias=True), {}, 9)


FOUR = {"num_hidden_layers": 4, "max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}
SOME = ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("qwen2", FOUR | SLIDING, "layer 3 attends to text_config.sliding_window=32 tokens, fewer than"),
        ("qwen3", FOUR | {"layer_types": SOME, "sliding_window": 63}, r"layer 1 attends .*sliding_window=63 tokens"),
        ("qwen2", FOUR | {"layer_types": SOME}, r"layer 1 attends .*sliding_window=0 tokens"),
        ("llama", FOUR | {"layer_types": ["chunked_attention"] * 4}, r"layer_types\[0\]='chunked_attention' is not"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "rope scaling 'mrope' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope' is not supported"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' lacks 'factor'"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "'one for each type of layer' is not"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ("qwen2", {"hidden_act": "gelu"}, "text_config.hidden_act='gelu' is not supported, only 'silu'"),
        ("qwen3", {"num_key_value_heads": 0}, "num_key_value_heads=0 is not a positive integer"),
        ("llama", {"hidden_size": None}, "hidden_size=None is not a positive integer"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' is not a positive number"),
        ("llama", {"rope_theta": {}}, "rope_theta={} is not a positive number"),
        ("llama", {"attention_bias": "false"}, "attention_bias='false' is not true or false"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' is not a positive number"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters and text_config.rope_scaling differ",
        ),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(family, values, message):
    with pytest.raises(ValueError, match=message) as error:
        decoders.read(HERE, values, family, "text_config.")
    assert str(error.value).startswith("config.json: ") and "\n" not in str(error.value)


def test_what_is_null_is_what_the_library_takes():
    names = (*decoders.OPTIONAL, "rope_theta", "rope_scaling", "rms_norm_eps", "attention_bias", "tie_word_embeddings")
    assert decoders.read(HERE, dict.fromkeys(names), "llama") == decoders.read(HERE, {}, "llama")


@pytest.mark.parametrize(
    ("family", "values", "longest"),
    [
        ("qwen2", FOUR | SLIDING | {"sliding_window": 64}, 64),
        ("qwen2", FOUR | SLIDING | {"max_window_layers": 4}, 64),
        ("qwen2", FOUR | SLIDING | {"use_sliding_window": False}, 64),
        ("qwen2", FOUR | SLIDING | {"tokenizer_model_max_length": 32}, 32),
        ("mistral", FOUR | {"sliding_window": 32}, 32),
        ("mistral", FOUR | {"sliding_window": None}, 64),
    ],
)
def test_windows_that_no_sequence_reaches(family, values, longest):
    assert decoders.read(HERE, values, family).max_length == longest
