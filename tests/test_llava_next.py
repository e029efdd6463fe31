"""The transformers library's LLaVA-NeXT, in and out, against the library itself: tiny, random, fp32."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

from avg_llava_jax import checkpoint
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import convert, foreign, llava_next
from avg_llava_jax.data.conversation import IMAGE, encode_prompt
from avg_llava_jax.data.geometry import kept_cells, visual_index
from avg_llava_jax.data.tiles import grid_of, make_tiles
from avg_llava_jax.data.tokenizer import load_tokenizer, train_byte_bpe
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.vit import normalise
from tests.conftest import TOKENIZER
from tests.differences import agree
from tests.test_conversation import QWEN3
from tests.test_convert import SOURCE, TOWER

IMAGE_TOKEN = 1000
IDS = [1, 17, 300, -1, 45, 499, 2]  # -1: the image
MEAN, STD = [0.5, 0.25, 0.75], [0.25, 0.5, 0.125]
SIZES = [(112, 56), (56, 112)]  # un-padding agrees: nothing straddles


@pytest.fixture(scope="module", params=["llama", "mistral"])
def theirs(request, tmp_path_factory):
    """(torch model, the folder it saved, the config and parameters that we read from it)."""
    language = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
    language |= {"num_key_value_heads": 4, "vocab_size": 1064, "rms_norm_eps": 1e-5}
    if request.param == "mistral":
        language |= {"rope_theta": 1e6, "sliding_window": None, "max_position_embeddings": 512}
    text = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[request.param](**language)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=pinpoints
        )
    ).eval()
    for parameter in model.parameters():  # as initialised, everything is near zero and layers say little
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp(request.param) / "theirs"
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SOURCE / name, folder)
    llava_next.name_tokens(folder, {"<image>": IMAGE_TOKEN})
    colours = {"image_mean": MEAN, "image_std": STD, "image_grid_pinpoints": pinpoints}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))
    return model, folder, *foreign.load(folder)[:2]


def torch_logits(model, pixels, size, count, image_token=IMAGE_TOKEN):
    ids = [token for i in IDS for token in ([image_token] * count if i < 0 else [i])]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.tensor(np.moveaxis(pixels, -1, 1)[None]),
            image_sizes=torch.tensor([size[::-1]]),
        ).logits[0].numpy()  # fmt: skip


def our_inputs(config, size):
    """uint8 tiles, and the packed order at the finest granularity of IDS with the image."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    tiles = make_tiles(Image.fromarray(noise), config)
    visual = visual_index(size, config, config.granularities[-1])
    at, text = IDS.index(-1), len(IDS) - 1
    visual = np.where(visual < 0, len(tiles) * config.pyramid_rows, visual) + text
    return tiles, np.concatenate([np.arange(at), visual, np.arange(at, text)]), len(visual)


def our_logits(config, params, tiles, index):
    @jax.jit
    def compiled(params, tiles, index):
        text = avg_llava.embed(config, params, jnp.array([[i for i in IDS if i >= 0]]))
        pyramid = avg_llava.pyramid_of(config, params, tiles[None])
        hidden = avg_llava.decoder(config, params, avg_llava.assemble(params, pyramid, text, index[None]))
        return avg_llava.unembed(config, params, hidden[0])

    with jax.default_matmul_precision("highest"):
        return np.asarray(compiled(params, tiles, index))


@pytest.mark.parametrize("size", SIZES)
def test_logits_of_the_finest_granularity(theirs, size):
    model, _, config, params = theirs
    tiles, index, count = our_inputs(config, size)
    pixels = np.asarray(normalise(config.vision, tiles))
    logits = torch_logits(model, pixels, size, count)
    ours = our_logits(config, params, tiles, index)
    assert np.abs(logits).max() > 1
    agree("LLaVA-NeXT in the library: logits", ours, logits)


def test_config(theirs):
    model, _, config, _ = theirs
    mistral = model.config.text_config.model_type == "mistral"
    assert config.template == ("mistral_instruct" if mistral else "vicuna_v1")
    assert config.language.rope_theta == (1e6 if mistral else 1e4)
    assert config.language.max_length == (512 if mistral else 2048)
    assert config.pinpoints == ((112, 56), (56, 112), (112, 112))  # theirs are (height, width)
    assert (config.router.attention, config.unpad) == ("tokens", "exact")


NEW = ((r"^(vision_tower|multi_modal_projector|image_newline)", r"model.\1"), (r"^language_model\.lm_head", "lm_head"),
       (r"^language_model\.model", "model.language_model"))  # fmt: skip
OLD = ((r"^vision_tower\.", "vision_tower.vision_model."),)


@pytest.mark.parametrize("renamed", [NEW, OLD], ids=["model-prefixed", "old"])
def test_names_old_and_new(theirs, tmp_path, renamed):
    folder = theirs[1]
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, by in renamed:
            name = re.sub(pattern, by, name)
        tensors[name] = tensor
    save_file(tensors, other / "model.safetensors")
    config, params, _ = foreign.load(other)
    assert config == theirs[2]
    jax.tree.map(np.testing.assert_array_equal, params, theirs[3])
    del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ValueError, match=r"'language_model\.model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        foreign.load(other)


def test_two_names_of_one_tensor_must_agree(theirs, tmp_path):
    """A folder with the old and the new name of one tensor: once the same, once a stale copy."""
    folder = shutil.copytree(theirs[1], tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    for change in (0, 1):
        copy = {"model.image_newline": tensors["image_newline"] + np.float32(change)}
        save_file(tensors | copy, folder / "model.safetensors")
        if not change:
            jax.tree.map(np.testing.assert_array_equal, foreign.load(folder)[1], theirs[3])
    with pytest.raises(ValueError, match="'image_newline' and .*'model.image_newline' are both 'model.image_newline'"):
        foreign.load(folder)


def test_there_and_back(theirs, tmp_path):
    """Import and export: every tensor the same, and the library loads all of it."""
    model, folder, *_ = theirs
    convert.import_folder(folder, tmp_path / "ours")
    convert.export_transformers(tmp_path / "ours", tmp_path / "back", shard_size=100_000)
    again, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(again.config.text_config) is type(model.config.text_config)
    assert again.config.image_token_index == IMAGE_TOKEN
    # Its router is random, so it has none to give.
    assert not (tmp_path / "back" / "router").exists() and not hasattr(again.config, "auto_map")


def test_a_model_that_began_here(tiny, tokenizer, tmp_path):
    """Out to the library, with a token for the image that the tokenizer lacked: its logits are ours."""
    config = dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, vocab_size=tokenizer.vocab_size))
    checkpoint.save_config(tmp_path / "ours", config)
    checkpoint.copy_tokenizer(TOKENIZER, tmp_path / "ours")
    params = jax.jit(lambda: avg_llava.init(config, jax.random.key(0)))()
    with checkpoint.Manager(tmp_path / "ours") as manager:
        manager.save(1, params)
    convert.export_transformers(tmp_path / "ours", tmp_path / "out")
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    token, size = tokenizer.vocab_size, (32, 16)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<image>") == token
    tiles, index, count = our_inputs(config, size)
    theirs = torch_logits(model, np.asarray(normalise(config.vision, tiles)), size, count, token)
    ours = our_logits(config, params, tiles, index)
    agree("ours as a LLaVA-NeXT: logits", ours, theirs[:, :token])
    np.testing.assert_array_equal(theirs[:, token], theirs[:, 0])


@pytest.mark.parametrize("size", [(500, 375), (300, 1000), (1000, 300), (640, 480), (337, 671), (1999, 1000), (90, 91)])
def test_unpadding_differs_by_rounding(size):
    """The documented difference: ours keeps a straddling row (column) of cells on each side, the library may not."""
    config = ModelConfig()
    rows, columns = (24 * n for n in grid_of(size, config))
    cells = torch.arange(rows * columns).reshape(1, rows, columns)
    theirs = unpad_image(cells, size[::-1])[0]
    first, last = int(theirs[0, 0]), int(theirs[-1, -1])
    top, bottom, left, right = kept_cells(size, config, 576)
    their_top, their_left = first // columns, first % columns
    their_bottom, their_right = last // columns + 1, last % columns + 1
    for more in (their_top - top, bottom - their_bottom, their_left - left, right - their_right):
        assert 0 <= more <= 1


def test_configs_that_do_not_fit(theirs, tmp_path):
    folder = theirs[1]
    other = shutil.copytree(folder, tmp_path / "other")
    values = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' is not supported"),
        ({"vision_feature_layer": [-2, -5]}, "only one layer"),
        ({"text_config": values["text_config"] | {"model_type": "gemma"}}, "'gemma' is not supported"),
        ({"image_grid_pinpoints": [[50, 112]]}, "must be a multiple of the tile side 56"),
    ):
        (other / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message) as error:
            foreign.load(other)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="holds its vision encoder: drop vision_tower"):
        foreign.load(folder, TOWER)


def processors(folder):
    """The two files of the library's versions, before 5 and since, of a folder that has the first."""
    old = folder / "preprocessor_config.json"
    return old, folder / "processor_config.json", json.loads(old.read_text())


def test_colours_of_a_processor_that_version_5_saved(theirs, tmp_path):
    """Saved by the library itself: no preprocessor_config.json, the mean is in processor_config.json."""
    old, new, values = processors(shutil.copytree(theirs[1], tmp_path / "saved"))
    old.unlink()
    image_processor = LlavaNextImageProcessorPil(
        image_mean=MEAN, image_std=STD, image_grid_pinpoints=values["image_grid_pinpoints"]
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(old.parent)
    transformers.LlavaNextProcessor(image_processor, tokenizer, patch_size=14).save_pretrained(old.parent)
    assert new.is_file() and not old.is_file()
    vision = foreign.inspect(old.parent).config.vision
    assert (vision.mean, vision.std) == (tuple(MEAN), tuple(STD)) == (theirs[2].vision.mean, theirs[2].vision.std)


def test_colours_are_never_made_up(theirs, tmp_path):
    old, new, values = processors(shutil.copytree(theirs[1], tmp_path / "other"))

    def fails(message, kind=ValueError):
        with pytest.raises(kind, match=message) as error:
            foreign.load(old.parent)
        assert "\n" not in str(error.value)

    new.write_text(json.dumps({"patch_size": 14, "image_processor": values | {"image_mean": [0.1, 0.2, 0.3]}}))
    fails(r"processor_config.json has image_mean=\[0.1, 0.2, 0.3\], .*preprocessor_config.json has \[0.5, 0.25, 0.75\]")
    new.write_text(json.dumps({"patch_size": 14}))  # as versions before 5 write it
    assert foreign.inspect(old.parent).config.vision.mean == tuple(MEAN)
    for change, message in (
        ({"image_mean": None}, "image_mean=None must be three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std=.* must be three numbers over 0"),
        ({"do_normalize": False}, "do_normalize=False is not supported, only True"),
        ({"resample": 1}, r"resample=1 is not supported, only 2 \(bilinear\), 3 \(bicubic\)"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 is not supported, only 1/255"),
        ({"image_grid_pinpoints": [[56, 112]]}, "but its processor cuts images by"),
    ):
        old.write_text(json.dumps(values | change))
        fails(message)
    old.unlink()
    fails("does not say how pixels are normalised: it has no preprocessor_config.json", FileNotFoundError)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (  # as the hub's LLaVA-NeXT processors write it: contents are lists of parts
    "{% for m in messages %}ROLE{% for part in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}END"
    "{% endfor %}{% if add_generation_prompt %}OPEN{% endif %}"
)
SPOKEN = {
    "nothing": (None, (), "vicuna_v1", "mistral_instruct"),
    "llama_3": (None, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "llama_3", "llama_3"),
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "tokenizer", "tokenizer"),
    "chatml, parts": (
        PARTS.replace("ROLE", "<|im_start|>{{ m.role }}\n").replace("END", "<|im_end|>\n").replace(
            "OPEN", "<|im_start|>assistant\n"
        ),
        ("<|im_start|>", "<|im_end|>"),
        "tokenizer",
        "tokenizer",
    ),
    "onevision": (  # as the library's processor writes it
        "{% for m in messages %}<|im_start|>{{ m.role }} {% for part in m.content | selectattr('type', 'equalto',"
        " 'image') %}<image>{% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ '\n' + part.text }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "llava_onevision",
        "llava_onevision",
    ),
    "thoughts": (QWEN3, ("<|im_start|>", "<|im_end|>"), "chatml", "chatml"),
    "vicuna, parts": (
        PARTS.replace("ROLE", "{{ m.role | upper }}: ").replace("END", " ").replace("OPEN", "ASSISTANT:"),
        (),
        "vicuna_v1",
        "vicuna_v1",
    ),
    "instruct": (
        "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", (), "tokenizer", "mistral_instruct"
    ),
}  # fmt: skip


def speak(folder, chat, special):
    """Give a folder a byte-level tokenizer with these special tokens and this chat template."""
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    train_byte_bpe(["Who is it?"], 320, folder, ("<unk>", "<s>", "</s>", *special))
    if chat is not None:
        (folder / "chat_template.jinja").write_text(chat)


@pytest.mark.parametrize("name", SPOKEN)
def test_the_template_is_what_the_tokenizer_speaks(theirs, tmp_path, name):
    """Of a llava_next folder and of one in the released layout."""
    chat, special, llama, mistral = SPOKEN[name]
    folder = shutil.copytree(theirs[1], tmp_path / "theirs")
    speak(folder, chat, special)
    family = json.loads((folder / "config.json").read_text())["text_config"]["model_type"]
    config = foreign.inspect(folder).config
    assert config.template == {"llama": llama, "mistral": mistral}[family]
    released = shutil.copytree(SOURCE, tmp_path / "released")
    speak(released, chat, special)
    values = json.loads((released / "config.json").read_text())
    (released / "config.json").write_text(json.dumps(values | {"model_type": f"llava_{family}"}))
    assert foreign.inspect(released, TOWER).config.template == config.template
    if "chatml" in name:
        turns = [{"from": "human", "value": "<image>\nWho?"}]
        tokenizer = load_tokenizer(folder)
        ids = encode_prompt(turns, tokenizer, config.template, 1).ids
        text = "".join(
            "<image>" if token == IMAGE else tokenizer._backend._start.decode([token], False) for token in ids
        )
        assert text == "<|im_start|>user\n<image>\nWho?<|im_end|>\n<|im_start|>assistant\n"


def test_chatml_without_a_template_is_refused(theirs, tmp_path):
    folder = shutil.copytree(theirs[1], tmp_path / "theirs")
    speak(folder, None, ("<|im_start|>", "<|im_end|>"))
    with pytest.raises(ValueError, match=r"its tokenizer has <\|im_start\|> of ChatML and no chat template: add one"):
        foreign.inspect(folder)
    speak(folder, "{{ raise_exception('no') }}", ("<|im_start|>", "<|im_end|>"))
    with pytest.raises(ValueError, match="its chat template cannot be rendered: no"):
        foreign.inspect(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert foreign.inspect(folder).config.template == "tokenizer"
