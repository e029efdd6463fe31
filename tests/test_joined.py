"""A decoder folder and a CLIP folder, joined: both compute what they computed in PyTorch, the rest is fresh."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from avg_llava_jax import checkpoint
from avg_llava_jax.configs import connector_7b
from avg_llava_jax.convert import convert, foreign
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.packing import load_tiles
from avg_llava_jax.data.tokenizer import train_byte_bpe
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.encoder import encoder
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.models.vit import normalise
from avg_llava_jax.training.loop import train
from tests.conftest import TOKENIZER
from tests.differences import agree
from tests.in_the_library import noise, packed, sample_of, torch_inputs
from tests.test_conversation import CHATML, QWEN3, TEXTS
from tests.test_convert import SOURCE
from tests.test_pytorch import collapsed, complete, load

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {  # class, config, chat template of a ChatML tokenizer, ours that is found
    "SmolLM2": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}, None,
                "vicuna_v1"),
    "Llama 3": ("Llama", {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
                          "rope_scaling": LLAMA3 | {"rope_theta": 5e5, "original_max_position_embeddings": 64}}, None,
                "vicuna_v1"),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 600, "rope_theta": 1e6}, None,
                "mistral_instruct"),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_theta": 1e6, "max_position_embeddings": 4096}, CHATML,
              "tokenizer"),
    "Qwen2.5": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}, "", "qwen_1_5"),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}, QWEN3, "chatml"),
}  # fmt: skip
LONGEST = {"SmolLM2": 2048, "Llama 3": 4096, "Mistral": 600, "Qwen2": 4096, "Qwen2.5": 32768, "Qwen3": 32768}


def save(model, folder, bits=torch.float32):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():  # as initialised, everything is near zero
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.15)
    model.to(bits).eval().save_pretrained(folder)
    return model


def write_clip(folder):
    """torch's vision model of a whole CLIP, its text side too, tiles of 8 x 8 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 99}, vision_config=sizes | {"image_size": 32, "patch_size": 4}
    )
    model = save(transformers.CLIPModel(config), folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}')
    return model.vision_model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(torch's vision model, folder)."""
    folder = tmp_path_factory.mktemp("clip")
    return write_clip(folder), folder


def language(folder, family):
    """(torch's decoder, its folder with a tokenizer)."""
    kind, values, chat, _ = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**SIZES | {"vocab_size": 600} | values)
    model = save(getattr(transformers, f"{kind}ForCausalLM")(config), folder)
    if chat is None:
        for path in TOKENIZER.iterdir():
            shutil.copy(path, folder)
    else:
        train_byte_bpe(TEXTS, 340, folder, ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"))
        if chat:
            (folder / "chat_template.jinja").write_text(chat)
    return model, folder


def write_siglip(folder):
    """torch's vision model, a SigLIP's vision side with the pooling head that is not run: 7 x 7 patches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.SiglipVisionConfig(**sizes, image_size=30, patch_size=4)
    model = save(transformers.SiglipVisionModel(config), folder)
    about = {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.25, 0.5, 0.125], "resample": 2, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """(torch's vision model, folder)."""
    folder = tmp_path_factory.mktemp("siglip")
    return write_siglip(folder), folder


CLIP = [("CLIP", family) for family in FAMILIES]
SIGLIP = [("SigLIP", family) for family in ("SmolLM2", "Mistral", "Qwen2", "Qwen3")]


@pytest.fixture(scope="module", params=CLIP + SIGLIP, ids=" + ".join)
def pair(request, clip, siglip, tmp_path_factory):
    """(tower, family, torch's tower, torch's decoder, our checkpoint of both, its export)."""
    tower, family = request.param
    vision, source = clip if tower == "CLIP" else siglip
    folder = tmp_path_factory.mktemp("pair")
    decoder, text = language(folder / "decoder", family)
    convert.import_folder(text, folder / "ours", source, seed=3)
    (folder / "ours" / foreign.ORIGIN).unlink()  # with it, the export would leave out a router that was never trained
    convert.export_transformers(folder / "ours", folder / "theirs")
    return tower, family, vision, decoder, folder / "ours", folder / "theirs"


IN_THE_LIBRARY = {  # class, image processor, granularities, images of two prompts, which it resizes and crops as we do
    "CLIP": (transformers.LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil, (4, 8, 16, 32, 64),
             [[(40, 20)], [(32, 64), (64, 64)]]),
    "SigLIP": (transformers.LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessorPil, (4, 8, 16, 28, 49),
               [[(100, 130)], [(35, 80), (50, 20)]]),  # the first is reduced: more cells than nine tiles have
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def rungs(config, params, tiles, ids, pixels, text, *places):
    """Patches of tiles; logits of ids; features of pixels, the packed sequence of these and the text, its logits."""
    patches = encoder(config.vision).apply({"params": params["encoder"]}, tiles)
    words = avg_llava.decoder(config, params, avg_llava.embed(config, params, ids))
    features = avg_llava.encode_images(config, params, pixels)
    embedded = avg_llava.embed(config, params, text)
    sequence = avg_llava.assemble(params, scale(config, features), embedded, *places)
    logits = avg_llava.unembed(config, params, avg_llava.decoder(config, params, sequence))
    return patches, avg_llava.unembed(config, params, words), features, sequence, logits


def test_every_rung(pair):
    """Tower and decoder compute what they did; exported, the library's class has our features, packed sequences and
    logits, and the tokens that it generates are those our logits choose; the adaptive class has our logits too."""
    tower, family, vision, decoder, folder, out = pair
    kind, images, ladder, sizes = IN_THE_LIBRARY[tower]
    loaded = checkpoint.load(folder)
    config, params = loaded.config, loaded.params
    assert (config.vision.encoder, config.vision.used_layers) == (tower.lower(), 2)
    assert (config.granularities, config.several) == (ladder, "square" if tower == "SigLIP" else "anyres")
    assert loaded.meta["granularities_trained"] is None  # nothing here has seen an image
    assert (config.language.max_length, config.template) == (LONGEST[family], FAMILIES[family][-1])
    plain, report = kind.from_pretrained(out, output_loading_info=True)
    assert complete(report)
    assert plain.config.text_config.model_type == ("llama" if family == "Mistral" else decoder.config.model_type)

    if tower == "SigLIP":  # the library counts it in texts and ids
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert tokenizer.convert_tokens_to_ids("<video>") == plain.config.video_token_index
        assert tokenizer.convert_tokens_to_ids("<image>") == plain.config.image_token_index

    cut = images.from_pretrained(out)
    pictures = [[noise(size, seed) for seed, size in enumerate(each)] for each in sizes]
    text = (1, 17, 300, 45, 499, 2)
    asked = torch_inputs(cut, config, [sample_of(each, text) for each in pictures], plain.config.image_token_index)
    new = plain.generate(**asked, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[:, -6:].tolist()
    samples = [sample_of(each, (*text, *more)) for each, more in zip(pictures, new, strict=True)]
    inputs = torch_inputs(cut, config, samples, plain.config.image_token_index)
    seen = {}
    plain.model.multi_modal_projector.register_forward_hook(lambda _, __, made: seen.update(features=made))
    plain.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.update(packed=given["inputs_embeds"]), with_kwargs=True
    )
    ids = np.random.default_rng(0).integers(0, 600, (2, 40))
    tiles = np.random.default_rng(1).integers(0, 255, (2, *[config.vision.image_size] * 2, 3), np.uint8)
    normal = torch.tensor(np.moveaxis(np.asarray(normalise(config.vision, tiles)), -1, 1))
    adaptive = load(out)
    with torch.no_grad():
        patches = vision(normal, output_hidden_states=True).hidden_states[-2][:, -(config.vision.grid**2) :]
        words, finest, coarse = decoder(torch.tensor(ids)).logits, plain(**inputs), adaptive(**inputs, granularity=8)

    batch, places = packed(config, samples, (8, ladder[-1]))

    def ours(granularity):
        with jax.default_matmul_precision("highest"):
            return rungs(config, params, tiles, ids, batch["pixels"], batch["text"], *places[granularity])

    what, lengths = f"{tower} + {family}, joined", batch["length"]
    our_patches, our_words, features, sequence, logits = map(np.asarray, ours(ladder[-1]))
    agree(f"{what}: 1 tower", our_patches, patches)
    used = [row[: len(load_tiles(s, config))] for row, s in zip(features, samples, strict=True)]
    agree(f"{what}: 2 connector", np.concatenate(used), seen["features"])
    agree(f"{what}: 3 decoder", our_words, words)
    for row, length in enumerate(lengths[ladder[-1]]):
        at = inputs["attention_mask"][row].bool()
        agree(f"{what}: 4 packed", sequence[row, :length], seen["packed"][row][at])
        assert np.abs(logits[row]).max() > 0.5
        agree(f"{what}: 5 logits", logits[row, :length], finest.logits[row][at, : logits.shape[2]])
        assert logits[row, length - 7 : length - 1].argmax(axis=1).tolist() == new[row]
    logits = np.asarray(ours(8)[-1])
    for row, at in enumerate(coarse.attention_mask):
        agree(f"{what}: 6 adaptive", logits[row, : lengths[8][row]], coarse.logits[row][at, : logits.shape[2]])


QUESTIONS = {  # sizes of its images
    "What colour is it?": [(40, 20)],
    "Which is taller?": [(32, 64), (64, 64)],
    "Who are you?": [],
}


@pytest.mark.parametrize("pair", [each for each in CLIP if each[1] != "Qwen2.5"], indirect=True, ids=" + ".join)
def test_exported_and_asked(pair):
    """Both classes of the library, on a batch of mixed make-up: ids, greedy answers, and a second turn."""
    *_, folder, out = pair
    ours = AvgLlava.load(folder)
    plain = transformers.LlavaNextForConditionalGeneration.from_pretrained(out)
    adaptive, processor = load(out), transformers.AutoProcessor.from_pretrained(out)
    pictures = [[noise(size, seed) for seed, size in enumerate(sizes)] for sizes in QUESTIONS.values()]
    turns = [[{"from": "human", "value": "<image>\n" * len(p) + q}] for q, p in zip(QUESTIONS, pictures, strict=True)]
    turns[0] += [{"from": "gpt", "value": "Red."}, {"from": "human", "value": "Sure?"}]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [[{"role": roles[t["from"]], "content": t["value"]} for t in one] for one in turns]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True) for one in messages]
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=[*pictures[0], *pictures[1]], text=texts, padding=True, return_tensors="pt")
    asked = [Request(t, p, max_new_tokens=6, granularity=64) for t, p in zip(turns, pictures, strict=True)]
    for request, row, mask in zip(asked, inputs["input_ids"], inputs["attention_mask"], strict=True):
        sample = ours.prepare(request).sample
        counts = [visual_count(size, ours.config, 64) for size in sample.sizes]
        assert collapsed(row, mask, processor.image_token_id, counts) == sample.tokens.ids
    answers, start = ours.answer_batch(asked), inputs["input_ids"].shape[1]
    same(answers, plain.generate(**inputs, max_new_tokens=6, do_sample=False)[:, start:].tolist(), ours.stop_ids)
    ids = adaptive.generate(**inputs, max_new_tokens=6, do_sample=False, granularity=64)
    same(answers, ids[:, start:].tolist(), ours.stop_ids)


def same(answers, rows, stops):
    """Token by token, and the end as well."""
    for answer, row in zip(answers, rows, strict=True):
        assert row[: len(answer.token_ids)] == list(answer.token_ids)
        assert answer.finish == "length" or row[len(answer.token_ids)] in stops


def test_fresh_parts_come_from_the_seed(clip, tmp_path):
    folder = language(tmp_path, "SmolLM2")[1]
    one, same, other = (foreign.load(folder, clip[1], dtype=jnp.bfloat16, seed=seed).params for seed in (1, 1, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for kernel in (("connector", "up", "kernel"), ("router", "q", "kernel"), ("image_newline",)):
        a, b = one, other
        for key in kernel:
            a, b = a[key], b[key]
        assert 0.01 < np.std(np.asarray(a, np.float32)) < 1 and not np.array_equal(a, b)
    np.testing.assert_array_equal(one["language"]["embed"], other["language"]["embed"])


def test_imported_and_trained(clip, llava_folder, tmp_path):
    """Imported to a checkpoint of ours; and as it is in configs/connector_7b.py: the connector alone learns."""
    folder, tower = language(tmp_path / "llama", "SmolLM2")[1], clip[1]
    convert.import_folder(folder, tmp_path / "ours", tower)
    imported = checkpoint.load(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, imported.params, checkpoint.load(folder, tower).params)

    config = connector_7b.get_config()
    config.init_from, config.vision_tower, config.granularities = str(folder), str(tower), (64,)
    config.data.path, config.data.images = str(llava_folder / "captions.json"), str(llava_folder / "images")
    config.data.workers, config.data.shapes, config.compute_dtype = 0, 1, "float32"
    config.steps, config.batch_size = 2, 2
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(n), "image": f"{n}-0.png", "conversations": turns} for n in (1, 4, 7)]
    (llava_folder / "captions.json").write_text(json.dumps(records))
    train(config, tmp_path / "run")
    trained = checkpoint.load(tmp_path / "run")
    assert trained.meta["granularities_trained"] == [64] and trained.config.template == "plain"
    changed = {
        name for name, tree in trained.params.items()
        if not all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(imported.params[name])))
    }  # fmt: skip
    assert changed == {"connector", "image_newline"}


def test_template_is_what_the_tokenizer_speaks(clip, tmp_path):
    folder = language(tmp_path, "SmolLM2")[1]
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"chat_template": "{{ messages }}"}))
    assert foreign.inspect(folder, clip[1]).config.template == "tokenizer"
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 599, "content": "<|start_header_id|>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert foreign.inspect(folder, clip[1]).config.template == "llama_3"


def test_what_does_not_join(clip, tmp_path):
    folder, tower = language(tmp_path / "llama", "SmolLM2")[1], clip[1]
    values = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")

    def fails(message, tower=tower, **changes):
        (folder / "config.json").write_text(json.dumps(values | changes))
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            checkpoint.load(folder, tower)
        assert "\n" not in str(error.value)

    fails("is only a language model: give the CLIP or SigLIP folder", tower=None)
    fails("model_type='llava_llama' is not a CLIP", tower=SOURCE)
    fails("mlp_bias=True is not supported", mlp_bias=True)
    fails("rope scaling 'yarn' is not supported", rope_parameters={"rope_type": "yarn", "factor": 2.0})
    fails("tensor 'lm_head.weight' is missing", tie_word_embeddings=False)
    fails(r"embed_tokens.weight' has shape \(600, 32\), its config says \(601, 32\)", vocab_size=601)
    fails("tensor 'model.layers.1..*' is unknown", num_hidden_layers=1)
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    fails("'lm_head.weight' differs from 'model.embed_tokens.weight', but its config says tie_word_embeddings")
    single = shutil.copytree(tower, tmp_path / "single")
    clip_values = json.loads((single / "config.json").read_text())
    clip_values["vision_config"]["image_size"] = 4
    (single / "config.json").write_text(json.dumps(clip_values))
    fails("1 x 1 patches cannot be halved", tower=single)
    with pytest.raises(ValueError, match="model_type='clip' is not supported, only llava_llama"):
        convert.import_folder(tower, tmp_path / "out")
