"""The language model against transformers' Llama, and long sequences read whole and through the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import generate, parameters
from avg_llava_jax.config import LanguageConfig, ModelConfig, RopeScaling
from avg_llava_jax.models import avg_llava

BASE = LanguageConfig(
    vocab_size=50, width=32, layers=2, heads=4, kv_heads=4, head_dim=8, mlp_width=48, max_length=4096
)  # fmt: skip
VARIANTS = {
    "multi-head": BASE,
    "grouped, tied, biased": dataclasses.replace(BASE, kv_heads=2, tied_embeddings=True, attention_bias=True),
    "wide heads, theta": dataclasses.replace(BASE, kv_heads=1, head_dim=16, rope_theta=5e5),
    "linear": dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", 4.0)),
    "llama3": dataclasses.replace(BASE, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
}


def with_language(tiny: ModelConfig, language: LanguageConfig) -> ModelConfig:
    return dataclasses.replace(tiny, language=language, router=dataclasses.replace(tiny.router, heads=2))


def fresh(config: ModelConfig) -> avg_llava.Params:
    """Random parameters, the biases and norms too."""
    params = jax.jit(lambda: avg_llava.init(config, jax.random.key(0)))()
    noise = np.random.default_rng(0)
    params["language"] = jax.tree.map(
        lambda leaf: leaf + 0.1 * noise.standard_normal(leaf.shape, np.float32), params["language"]
    )
    return params


def theirs(config: LanguageConfig, params: avg_llava.Params, ids: np.ndarray) -> np.ndarray:
    """Logits (B, S, V) of transformers' Llama with the same weights, named by the parameter table."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling:
        scaling = config.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
            rope["original_max_position_embeddings"] = scaling.original_max_length
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            attention_bias=config.attention_bias,
            tie_word_embeddings=config.tied_embeddings,
            max_position_embeddings=config.max_length,
            rope_parameters=rope,
        )
    ).eval()
    state = {}
    for path, leaf in parameters.flat({"language": params["language"]}).items():
        row = parameters.TABLE[path]
        for layer, part in enumerate(np.asarray(leaf) if row.layered else [np.asarray(leaf)]):
            tensor = part.T if row.form == "transposed" else part
            state[row.torch.format(n=layer)] = torch.tensor(np.ascontiguousarray(tensor))
    if config.attention_bias:  # theirs has a bias on the way out as well, which no released model uses
        for layer in range(config.layers):
            state[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(config.width)
    if config.tied_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(tiny, name):
    config = with_language(tiny, VARIANTS[name])
    params = fresh(config)
    ids = np.random.default_rng(1).integers(0, 50, (2, 70))

    @jax.jit
    def ours(params):
        hidden, _ = avg_llava.language(config, params, avg_llava.embed(config, params, ids))
        return avg_llava.unembed(config, params, hidden)

    np.testing.assert_allclose(ours(params), theirs(config.language, params, ids), atol=1e-4, rtol=1e-4)


def test_a_long_sequence_through_the_cache(tiny):
    """Rows of 3100 and 900 tokens: whole; and one part after another, the second in a chunk, the rest one by one."""
    language = LanguageConfig(
        vocab_size=50, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=32, max_length=4096
    )  # fmt: skip
    config = with_language(tiny, language)
    params = fresh(config)
    lengths, chunk, steps = np.array([3100, 900], np.int32), 8, 2
    ids = np.random.default_rng(2).integers(0, 50, (2, lengths.max() + chunk + steps))
    forward = jax.jit(avg_llava.language, static_argnums=0)
    embeds = avg_llava.embed(config, params, ids)
    whole = avg_llava.unembed(config, params, forward(config, params, embeds)[0])

    logits, cache = generate.prefill(config, params, embeds[:, : lengths.max()], lengths, chunk + steps)
    rows = np.arange(2)
    np.testing.assert_allclose(logits, whole[rows, lengths - 1], atol=1e-4, rtol=1e-4)
    cached = lengths
    for count in (chunk, *[1] * steps):
        at = cached[:, None] + np.arange(count)
        hidden, new = forward(config, params, embeds[rows[:, None], at], jnp.asarray(at), cache, jnp.asarray(cached))
        np.testing.assert_allclose(
            avg_llava.unembed(config, params, hidden), whole[rows[:, None], at], atol=1e-4, rtol=1e-4
        )
        cache = generate.extend(cache, new, jnp.asarray(cached))
        cached = cached + count
