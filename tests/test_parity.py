"""Our modules against PyTorch's, each alone: tiny, random, fp32. The steps of a ladder, from a layer to a decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from avg_llava_jax import parameters
from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig, ScalerConfig, VisionConfig
from avg_llava_jax.convert import decoders, towers
from avg_llava_jax.models import language
from avg_llava_jax.models.encoder import encoder
from avg_llava_jax.models.router import Router
from avg_llava_jax.models.vit import normalise
from tests.differences import agree


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def randomise(module):
    """As initialised, everything is near zero and layers say little."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.15)
    return module.eval()


def ours(component, shapes, tensors):
    """Our parameters of one component, by the table, from PyTorch tensors under their released names."""
    leaves = {}
    for path, leaf in parameters.flat({component: shapes}).items():
        row = parameters.TABLE[path]
        layers = range(leaf.shape[0]) if row.layered else (None,)
        stack = [row.from_torch(tensors[row.torch.format(n=layer)].numpy()) for layer in layers]
        leaves[path] = np.stack(stack) if row.layered else stack[0]
        assert leaves[path].shape == leaf.shape, path
    return parameters.unflat(leaves)[component]


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_layer_by_layer(activation):
    """Every hidden state that can be selected, from the end and from the start."""
    config = VisionConfig(28, 7, 32, layers=3, heads=4, mlp_width=48, activation=activation)
    torch_config = transformers.CLIPVisionConfig(**towers.write(config))
    model = randomise(transformers.CLIPVisionModel(torch_config))
    tensors = {
        "model.vision_tower.vision_tower.vision_model." + name.removeprefix("vision_model."): tensor
        for name, tensor in model.state_dict().items()
    }
    pixels = np.random.default_rng(0).integers(0, 255, (2, 28, 28, 3), np.uint8)
    inputs = torch.tensor(np.moveaxis(np.asarray(normalise(config, pixels)), -1, 1))
    with torch.no_grad():
        states = model(inputs, output_hidden_states=True).hidden_states
    for select in (1, -3, -2, -1):
        tower = encoder(dataclasses.replace(config, select_layer=select))
        shapes = jax.eval_shape(tower.init, jax.random.key(0), pixels)["params"]
        features = jax.jit(tower.apply)({"params": ours("encoder", shapes, tensors)}, pixels)
        agree("CLIP: hidden states", features, states[select][:, 1:])


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("Llama", {"num_key_value_heads": 4}, 40),
        ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}, 40),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 300),
        ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}, 300),
        ("Llama", {"num_hidden_layers": 1}, 3100),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}, 40),
        ("Qwen2", {"num_key_value_heads": 2}, 40),
        ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}, 40),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}, 40),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12, "attention_bias": True}, 40),
    ],
    ids=[
        *("MHA", "GQA, tied, biased", "rope linear", "rope llama3", "3100 tokens", "Mistral"),
        *("Qwen2", "Qwen2 tied", "Qwen3", "Qwen3 biased"),
    ],
)
def test_decoder(family, changes, length):
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"vocab_size": 96, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_key_value_heads": 4}
    torch_config = getattr(transformers, f"{family}Config")(**values | changes)
    model = randomise(getattr(transformers, f"{family}ForCausalLM")(torch_config))
    if torch_config.tie_word_embeddings:
        model.tie_weights()
    config = decoders.read("here", torch_config.to_dict(), torch_config.model_type)
    ids = np.random.default_rng(1).integers(0, 96, (2, length))

    def whole(params, ids):
        return language.unembed(config, params, language.decoder(config, params, language.embed(params, ids))[0])

    shapes = jax.eval_shape(lambda: language.init(config, jax.random.key(0)))
    tensors = model.state_dict()
    params = ours("language", shapes, tensors)
    biases = {name for name in tensors if name.endswith("bias")}
    assert len(biases) == sum(leaf.shape[0] for path, leaf in parameters.flat(params).items() if path.endswith("bias"))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    logits = jax.jit(whole)(params, ids)
    assert np.abs(theirs).max() > 0.5
    agree(f"{family}: logits", logits, theirs)


def test_sizes_of_a_decoder_come_from_its_config():
    config = decoders.read("here", transformers.LlamaConfig(rope_parameters=LLAMA3, head_dim=64).to_dict(), "llama")
    assert (config.head_dim, config.rope_theta, config.rope_scaling.kind) == (64, 5e5, "llama3")
    assert isinstance(config, LanguageConfig) and config.rope_scaling.original_max_length == 64


@pytest.mark.parametrize("attention", ["tokens", "tiles"])
def test_router_against_the_library_layer(attention):
    """`torch.nn.TransformerEncoderLayer` over the rows of a tile, and, sequence first, over the tiles of an image."""
    config = ModelConfig(
        vision=VisionConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=32),
        scaler=ScalerConfig(halvings=2),
        router=RouterConfig(attention, text_tokens=3, heads=8),
        language=LanguageConfig(vocab_size=64, width=32, layers=1, heads=2, kv_heads=2, head_dim=16, mlp_width=32),
        pinpoints=((16, 32),),
    )
    width, rows = config.language.width, config.pyramid_rows + 3
    merger = torch.nn.TransformerEncoderLayer(width, 8, width, dropout=0.1, batch_first=attention == "tokens")
    head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, 3))
    norm, voter = torch.nn.LayerNorm(3), torch.nn.Parameter(torch.zeros(rows, 1))
    module = torch.nn.Module()
    module.merger, module.router, module.norm, module.voter = merger, head, norm, voter
    randomise(module)

    rng = np.random.default_rng(0)
    pyramid = rng.normal(size=(1, 3, rows - 3, width)).astype(np.float32)
    text = rng.normal(size=(1, 5, width)).astype(np.float32)
    inputs = pyramid, text, np.ones((1, 1, 5), bool), np.zeros((1, 3), np.int32), np.zeros((1, 1), np.int32)
    router = Router(config)
    shapes = jax.eval_shape(lambda: router.init(jax.random.key(0), *inputs))["params"]
    tensors = {f"model.router.{name}": tensor for name, tensor in module.state_dict().items()}
    routing = jax.jit(router.apply)({"params": ours("router", shapes, tensors)}, *map(jnp.asarray, inputs))

    tile0, words = torch.tensor(pyramid[0, 0, -16:]), torch.tensor(text[0])
    similar = torch.nn.functional.cosine_similarity(tile0[:, None], words[None], dim=-1).mean(0)
    best = similar.topk(3).indices
    np.testing.assert_array_equal(routing.text_rows[0, 0], best)
    x = torch.cat([torch.tensor(pyramid[0]), words[best].expand(3, -1, -1)], dim=1)
    with torch.no_grad():
        pre_norm = (head(merger(x)) * voter).sum(1).mean(0)
        logits = norm(pre_norm)
    agree("torch.nn.TransformerEncoderLayer: router", routing.pre_norm[0, 0], pre_norm)
    agree("torch.nn.TransformerEncoderLayer: router", routing.logits[0, 0], logits)
