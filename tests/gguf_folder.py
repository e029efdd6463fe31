"""A Llama in a GGUF file, as a folder of the transformers library: real weights for tests, from a Python package.

Quantized tensors are widened to fp32. GGUF interleaves the halves of each head of q and k; they are put back in order.
"""

import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, pre_tokenizers

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
CONTROL = 3  # token type of a special token


def write_folder(path, folder):
    """config.json, weights and tokenizer of the GGUF file `path`, in `folder`; needs the package gguf."""
    import gguf

    reader = gguf.GGUFReader(path)
    value = {key: field.contents() for key, field in reader.fields.items()}
    assert value["general.architecture"] == "llama" and value["tokenizer.ggml.pre"] == "smollm"
    heads, groups = value["llama.attention.head_count"], value["llama.attention.head_count_kv"]

    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name.removesuffix(".weight")
        if name not in ENDS:
            _, layer, part = name.split(".")
            if part in ("attn_q", "attn_k"):
                rows = weight.reshape(heads if part == "attn_q" else groups, -1, 2, weight.shape[1])
                weight = rows.swapaxes(1, 2).reshape(weight.shape)
        whole = ENDS[name] if name in ENDS else f"model.layers.{layer}.{LAYER[part]}"
        tensors[whole + ".weight"] = np.ascontiguousarray(weight)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": value["tokenizer.ggml.bos_token_id"],
        "eos_token_id": value["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": value["llama.embedding_length"],
        "intermediate_size": value["llama.feed_forward_length"],
        "max_position_embeddings": value["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": value["llama.block_count"],
        "num_key_value_heads": groups,
        "rms_norm_eps": value["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": value["llama.rope.freq_base"],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "vocab_size": value["llama.vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(value, folder)


def _write_tokenizer(value, folder):
    tokens = value["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in value["tokenizer.ggml.merges"]]
    model = tokenizers.Tokenizer(tokenizers.models.BPE({token: at for at, token in enumerate(tokens)}, merges))
    # What `smollm` names: digits one by one, then GPT-2's words.
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    kinds = value["tokenizer.ggml.token_type"]
    model.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    model.save(str(folder / "tokenizer.json"))
    named = {
        f"{ours}_token": tokens[value[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": value["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | named))
