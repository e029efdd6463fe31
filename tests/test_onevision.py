"""LLaVA-OneVision in the library, with the same weights as ours: tiles, token counts, logits, answers, in and out."""

import copy
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shlex
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from avg_llava_jax import adapters, checkpoint, parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.configs import onevision_05b
from avg_llava_jax.convert import convert, foreign, layouts, llava_next
from avg_llava_jax.data.geometry import visual_count, visual_index, visual_weight
from avg_llava_jax.data.packing import load_tiles
from avg_llava_jax.data.tokenizer import load_tokenizer, train_byte_bpe
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.model import Model
from avg_llava_jax.inference.requests import Prepared, Request
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.vit import normalise
from avg_llava_jax.training.loop import train
from tests.differences import agree
from tests.in_the_library import noise, packed, sample_of, torch_inputs
from tests.test_conversation import TEXTS
from tests.test_pytorch import collapsed

peft = pytest.importorskip("peft")

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "train.md"
IMAGE_TOKEN = 311  # the tokenizer's next id
SIDE = 30  # 7 x 7 patches of 4 pixels: an odd grid, and a margin of 2 that no patch shows
MEAN, STD = [0.5, 0.25, 0.75], [0.25, 0.5, 0.125]
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in range(1, 7) for columns in range(1, 7)]
SIZES = [(40, 31), (100, 130), (30, 175)]  # the second has 5 x 4 tiles: more cells than nine tiles have
REAL = ModelConfig(
    vision=layouts.KNOWN_TOWERS["google/siglip-so400m-patch14-384"],
    pinpoints=tuple((384 * x, 384 * y) for y in range(1, 7) for x in range(1, 7)),
    unpad="library",
    most_tiles=9,
    several="square",
)
ITS_TEMPLATE = (  # as its folders have it: a space after the role, images first
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% if m.content is string %}{{ '\\n' + m.content }}{% else %}"
    "{% for part in m.content if part.type == 'image' %}<image>{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor %}{% endif %}"
    "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEASURED = {
    (384, 384): 1485, (500, 375): 1728, (300, 1000): 2835, (1600, 1200): 7309, (64, 48): 1317, (2304, 2304): 7371,
    (3000, 500): 5130, (1153, 769): 8686, (640, 480): 2929, (1920, 1080): 7269,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(torch model, its folder, our config and parameters of it, the library's image processor)."""
    text = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1064, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE,
        patch_size=4, vision_use_head=False,
    )  # fmt: skip
    model = transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, video_token_index=IMAGE_TOKEN + 1,
            image_grid_pinpoints=PINPOINTS,
        )
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    folder = tmp_path_factory.mktemp("onevision") / "theirs"
    model.save_pretrained(folder)
    train_byte_bpe(TEXTS, 340, folder, ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    (folder / "chat_template.jinja").write_text(ITS_TEMPLATE)
    llava_next.name_tokens(folder, {"<image>": IMAGE_TOKEN, "<video>": IMAGE_TOKEN + 1})
    cut = LlavaOnevisionImageProcessorPil(
        image_mean=MEAN, image_std=STD, size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    cut.save_pretrained(folder)
    return model, folder, *foreign.load(folder)[:2], cut


def test_config(theirs):
    config = theirs[2]
    assert (config.vision.encoder, config.vision.activation, config.vision.grid) == ("siglip", "gelu_tanh", 7)
    assert (config.vision.mean, config.vision.std, config.vision.resample) == (tuple(MEAN), tuple(STD), "bicubic")
    assert (config.unpad, config.most_tiles, config.several) == ("library", 9, "square")
    assert config.language.tied_embeddings and config.language.qkv_bias
    assert config.pinpoints[1] == (60, 30) and len(config.pinpoints) == 36  # theirs are (height, width)
    assert config.granularities == (4, 8, 16, 28, 49)


def ours(config, params, samples, granularity=None):
    """Logits (length, V) of each sample at a granularity, the finest by default, and router logits of every image."""
    granularity = granularity or config.granularities[-1]
    batch, places = packed(config, samples, config.granularities)
    arrays = {key: batch[key] for key in ("pixels", "text", "instruction", "tile_image", "first_tile")}
    with jax.default_matmul_precision("highest"):
        logits, scores = map(np.asarray, run(config, params, arrays, *places[granularity]))
    scores = [row[: len(sample.sizes)] for row, sample in zip(scores, samples, strict=True)]
    return [row[:n] for row, n in zip(logits, batch["length"][granularity], strict=True)], np.concatenate(scores)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, batch, index, weight):
    pyramid, text = (
        avg_llava.pyramid_of(config, params, batch["pixels"]),
        avg_llava.embed(config, params, batch["text"]),
    )
    sequence = avg_llava.assemble(params, pyramid, text, index, weight)
    logits = avg_llava.unembed(config, params, avg_llava.decoder(config, params, sequence))
    return logits, avg_llava.route(config, params, pyramid, text, batch).logits


MIXED = [[noise(SIZES[0])], [noise(SIZES[1])], [noise((35, 80), 1), noise((50, 20), 2)], [noise(SIZES[2])]]


def test_logits_of_the_finest_granularity(theirs):
    """One batch: an image, one over nine tiles' worth of cells, two images in a prompt, a tall one."""
    model, _, config, params, cut = theirs
    samples = [sample_of(images) for images in MIXED]
    inputs = torch_inputs(cut, config, samples, IMAGE_TOKEN)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    assert np.abs(logits).max() > 1
    for own, row, mask in zip(ours(config, params, samples)[0], logits, inputs["attention_mask"], strict=True):
        agree("LLaVA-OneVision in the library: logits", own, row[mask.bool().numpy()])


def test_pixels(theirs):
    """Tiles of one image, and the padded squares of two: the library's pixels."""
    _, _, config, _, cut = theirs
    for images in MIXED:
        own = np.asarray(normalise(config.vision, load_tiles(sample_of(images), config)))
        pixels = cut([images], return_tensors="np")["pixel_values"]
        together = np.concatenate(list(pixels))
        agree("LLaVA-OneVision: pixels", np.moveaxis(own, -1, 1), together[: len(own)], 1e-5)


@pytest.mark.parametrize("size", MEASURED)
def test_token_counts_of_the_real_model(size):
    """Measured on the library's model with 384 pixels; all granularities are reduced alike."""
    assert visual_count(size, REAL, 729) == MEASURED[size]
    for granularity in REAL.granularities:
        index, weight = visual_index(size, REAL, granularity), visual_weight(size, REAL, granularity)
        assert index.shape == weight.shape == (visual_count(size, REAL, granularity), 4)
        np.testing.assert_allclose(weight.sum(axis=1), 1, atol=1e-6)
        assert index.max() < 37 * REAL.pyramid_rows


def test_counts_are_the_processors():
    """Thousands of sizes: ours, and the library's own formula."""
    processor = object.__new__(LlavaOnevisionProcessor)
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    processor.image_processor = type("P", (), {"image_grid_pinpoints": [[y, x] for x, y in REAL.pinpoints]})
    sizes = np.random.default_rng(0).integers(1, 3000, (2000, 2)).tolist()
    for size in [(1, 3000), (3000, 1), (1, 1), *map(tuple, sizes)]:
        assert visual_count(size, REAL, 729) == processor._get_number_of_features(*size[::-1], 384, 384), size
    for size in ((1, 3000), (3000, 1), (1, 1)):  # exact un-padding leaves a mosaic between two tiles without cells
        for config in (REAL, dataclasses.replace(REAL, unpad="exact")):
            for g in config.granularities:
                counts = len(visual_index(size, config, g)), len(visual_weight(size, config, g))
                assert counts == (visual_count(size, config, g),) * 2


def test_greedy_tokens(theirs, tokenizer):
    """Our engine at the finest granularity, and `generate`: the same tokens."""
    model, _, config, params, cut = theirs
    samples = [sample_of(images) for images in MIXED[1:3]]
    inputs = torch_inputs(cut, config, samples, IMAGE_TOKEN)
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = expected[:, inputs["input_ids"].shape[1] :].tolist()
    own = Model(dataclasses.replace(config, template="vicuna_v1"), params, tokenizer)
    own.stop_ids = ()
    engine = Engine(own, 2, 1024, None, 64 << 20)
    finest = config.granularities[-1]
    with jax.default_matmul_precision("highest"):
        tickets = [
            engine.submit_prepared(Prepared(Request("", max_new_tokens=6), s, (finest,) * len(s.sizes)))
            for s in samples
        ]
        while not all(ticket.ended for ticket in tickets):
            engine.step()
    assert [list(ticket.result().token_ids) for ticket in tickets] == expected


@pytest.fixture(scope="module")
def exported(theirs, tmp_path_factory):
    """The library's folder, imported and exported."""
    folder = tmp_path_factory.mktemp("exported")
    convert.import_folder(theirs[1], folder / "ours")
    convert.export_transformers(folder / "ours", folder / "out")
    return folder / "out"


def test_there_and_back(theirs, exported):
    """Import and export: every tensor the same, the library loads all of it, and it is read again as it was."""
    model, _, config, params, _ = theirs
    again, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert again.config.text_config.model_type == "qwen2" and again.config.vision_aspect_ratio == "anyres_max_9"
    read = foreign.load(exported)
    assert read.config == config
    jax.tree.map(np.testing.assert_array_equal, read.params, params)


def test_the_authors_layout(theirs, tmp_path):
    """`llava_qwen`: the same tensors under the names of the released layout, one encoder layer less than the tower."""
    _, folder, config, params, _ = theirs
    values = json.loads((folder / "config.json").read_text())
    text = values["text_config"]
    tower = tmp_path / "tower"
    tower.mkdir()
    vision = values["vision_config"] | {"num_hidden_layers": config.vision.layers + 1}
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    (tower / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD, "resample": 3}))
    old = tmp_path / "old"
    old.mkdir()
    tensors = {llava_next.released_name(n): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, old / "model.safetensors")
    for path in folder.glob("*token*.json"):  # ChatML's tokens, and no chat template
        shutil.copy(path, old)
    about = {
        **text, "model_type": "llava_qwen", "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32,
        "image_grid_pinpoints": "(1x1),...,(6x6)", "unfreeze_mm_vision_tower": True,
    }  # fmt: skip
    (old / "config.json").write_text(json.dumps(about))
    loaded = foreign.load(old, tower)
    vision = dataclasses.replace(loaded.config.vision, layers=config.vision.layers, select_layer=-1)
    assert loaded.config.template == "qwen_1_5"
    same = dataclasses.replace(loaded.config, vision=vision, pinpoints=config.pinpoints, template=config.template)
    assert same == config and set(loaded.config.pinpoints) == set(config.pinpoints)
    router = parameters.split(params, ("router",))[1]
    jax.tree.map(np.testing.assert_array_equal, parameters.split(loaded.params, ("router",))[1], router)
    (old / "config.json").write_text(json.dumps(about | {"image_aspect_ratio": "anyres"}))
    with pytest.raises(ValueError, match="image_aspect_ratio='anyres' is not supported, only anyres_max_N") as error:
        foreign.load(old, tower)
    assert "\n" not in str(error.value)


def test_adaptive_in_pytorch(theirs, tokenizer, tmp_path):
    """Our model with a router, exported: the folder's own class computes our logits at every granularity, and chooses
    as ours does; the library's class reads the same folder."""
    _, source, config, params, cut = theirs
    router = params["router"] | {"voter": jax.random.normal(jax.random.key(1), params["router"]["voter"].shape)}
    params = params | {"router": router}
    meta = {"step": 1, "training": None, "granularities_trained": None}
    (tmp_path / "ours").mkdir()
    convert.write_checkpoint(checkpoint.Loaded(config, params, source, meta), tmp_path / "ours")
    convert.export_transformers(tmp_path / "ours", tmp_path / "out")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(model).__name__ == "AvgLlavaOnevisionForConditionalGeneration"
    samples = [sample_of(images) for images in MIXED]
    inputs = torch_inputs(cut, config, samples, IMAGE_TOKEN)
    with torch.no_grad():
        for granularity in (4, 28):
            output, (logits, scores) = (
                model(**inputs, granularity=granularity),
                ours(config, params, samples, granularity),
            )
            for own, row, mask in zip(logits, output.logits, output.attention_mask, strict=True):
                agree("adaptive LLaVA-OneVision in PyTorch: logits", own, row[mask].numpy())
        agree("adaptive LLaVA-OneVision in PyTorch: router", scores, model(**inputs).router_logits)
        finest = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out").eval()(**inputs)
    with torch.no_grad(), pytest.raises(ValueError, match="reads images, not videos"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])
    for own, row, mask in zip(ours(config, params, samples)[0], finest.logits, inputs["attention_mask"], strict=True):
        agree("LLaVA-OneVision in the library: logits", own, row[mask.bool()].numpy())


def tiny(config, folder, **changes):
    """A shipped config at a tiny size: two steps of two samples, on a ladder of two."""
    values = {
        "data.path": str(folder / "train.json"), "data.images": str(folder / "images"), "data.workers": 0,
        "data.shapes": 1, "compute_dtype": "float32", "steps": 2, "batch_size": 2, "optimizer.accumulate": 1,
    }  # fmt: skip
    config.update_from_flattened_dict(values | changes)
    return config


def changed(before, after):
    """Which parameters a run changed."""
    before = parameters.flat(before)
    return {path for path, leaf in parameters.flat(after).items() if not np.array_equal(leaf, before.get(path))}


def test_one_line_to_a_trained_router_and_back(theirs, llava_folder, tmp_path):
    """The line of docs/train.md from a OneVision folder to PyTorch, with the flags that it gives, at a tiny size."""
    line = re.search(r"^avg-llava train --config=configs/onevision_05b\.py(.|\n)*?(?=^```)", PAGE.read_text(), re.M)[0]
    line = line.replace("\\\n", "")
    names = {
        "FOLDER": str(theirs[1]),
        "W1": str(tmp_path / "W1"),
        "W2": str(tmp_path / "W2"),
        "OUT": str(tmp_path / "out"),
    }
    for command in line.split("&&"):
        _, verb, *words = shlex.split(command)
        given = {
            flag.removeprefix("--"): names.get(value, value) for flag, _, value in (w.partition("=") for w in words)
        }
        if verb == "export":
            assert given.pop("layout") == "transformers"
            convert.export_transformers(given.pop("checkpoint"), given.pop("output"))
            assert not given
            continue
        module = importlib.import_module("avg_llava_jax.configs." + pathlib.Path(given.pop("config")).stem)
        config, workdir = module.get_config(), given.pop("workdir")
        config.update_from_flattened_dict({key.removeprefix("config."): value for key, value in given.items()})
        ladder = {"model.scaler.halvings": 1, "fresh": ("router",)} if config.phase != "rglf" else {}
        train(tiny(config, llava_folder, **ladder), workdir)
    tuned, routed = checkpoint.load(tmp_path / "W1"), checkpoint.load(tmp_path / "W2")
    assert tuned.config.template == "llava_onevision" and tuned.config.granularities == (28, 49)
    assert tuned.meta["granularities_trained"] == [28, 49]
    assert changed(theirs[3], tuned.params) >= {p for p in parameters.flat(tuned.params) if not p.startswith("router")}
    assert {path.split("/")[0] for path in changed(tuned.params, routed.params)} == {"router"}
    again = foreign.load(tmp_path / "out")
    assert again.config == routed.config
    jax.tree.map(np.testing.assert_array_equal, again.params, routed.params)


def test_adapters(theirs, llava_folder, tmp_path):
    """LoRA on a Qwen2 and a SigLIP: two steps change nothing else but connector and newline, and peft computes ours."""
    model, folder, _, params, cut = theirs
    lora = {"init_from": str(folder), "optimizer.lora.rank": 2, "optimizer.lora.targets": ("language", "encoder")}
    rates = {"optimizer.learning_rate": 0.03, "optimizer.encoder_learning_rate": 0.03}
    ladder = {"model.scaler.halvings": 0, "fresh": ("router",)}
    train(tiny(onevision_05b.get_config(), llava_folder, **lora, **rates, **ladder), tmp_path / "run")
    loaded = checkpoint.load(tmp_path / "run")
    new = changed(params, loaded.params)
    assert {path.split("/")[0] for path in new if not adapters.is_leaf(path)} == {
        "connector",
        "image_newline",
        "router",
    }
    assert sum(path.endswith("lora_b") for path in new) == 7 + 6
    convert.export_peft(tmp_path / "run", tmp_path / "adapter", router=False)
    samples = [sample_of(images) for images in MIXED]
    inputs = torch_inputs(cut, loaded.config, samples, IMAGE_TOKEN)
    with torch.no_grad(), warnings.catch_warnings():
        plain = model(**inputs).logits
        warnings.simplefilter("error", UserWarning)  # of missing keys
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter")(**inputs).logits
    assert (theirs - plain).abs().max() > 0.1
    for own, row, mask in zip(
        ours(loaded.config, loaded.params, samples)[0], theirs, inputs["attention_mask"], strict=True
    ):
        agree("LLaVA-OneVision with adapters in peft: logits", own, row[mask.bool()].numpy())


def test_its_processor(theirs, exported, monkeypatch):
    """Of our export: ids and pixels of prompts with an image, two images, and none, are ours."""
    own, out = AvgLlava(theirs[2], None, load_tokenizer(theirs[1])), exported
    pil = LlavaOnevisionImageProcessorPil.from_pretrained(out)
    if importlib.util.find_spec("torchvision"):
        processor = transformers.AutoProcessor.from_pretrained(out)
        processor.image_processor = pil  # torchvision's resizing is another
    else:  # which AutoProcessor needs, for videos, as does the check of its parts
        monkeypatch.setattr(LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda *_: None)
        about = json.loads((out / "processor_config.json").read_text())
        about["chat_template"] = (out / "chat_template.jinja").read_text()
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        processor = LlavaOnevisionProcessor(pil, tokenizer, None, **about)
    pictures = [*MIXED[1:3], []]
    turns = [[{"from": "human", "value": "<image>\n" * len(each) + "What is it?"}] for each in pictures]
    turns[0] += [{"from": "gpt", "value": "Red."}, {"from": "human", "value": "Sure?"}]
    roles = {"human": "user", "gpt": "assistant"}
    texts = [
        processor.apply_chat_template(
            [{"role": roles[turn["from"]], "content": turn["value"]} for turn in one], add_generation_prompt=True
        )
        for one in turns
    ]
    processor.tokenizer.padding_side = "left"
    inputs = processor(images=pictures[:2], text=texts, padding=True, return_tensors="pt")
    ids, mask, finest = inputs["input_ids"], inputs["attention_mask"], own.config.granularities[-1]
    images = iter(inputs["pixel_values"])
    for row, (each, asked) in enumerate(zip(pictures, turns, strict=True)):
        sample = own.prepare(Request(asked, each)).sample
        counts = [visual_count(size, own.config.of(len(each)), finest) for size in sample.sizes]
        assert collapsed(ids[row], mask[row], IMAGE_TOKEN, counts) == sample.tokens.ids
        tiles = np.moveaxis(np.asarray(normalise(own.config.vision, load_tiles(sample, own.config))), -1, 1)
        theirs = [next(images).numpy() for _ in each]
        found = theirs[0][: len(tiles)] if len(each) == 1 else [image[0] for image in theirs]
        if each:
            agree("LLaVA-OneVision: pixels", tiles, found, 1e-5)


def test_what_is_not_supported(theirs, tmp_path):
    folder = shutil.copytree(theirs[1], tmp_path / "folder")
    values = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"vision_aspect_ratio": "pad"}, "vision_aspect_ratio='pad' is not supported, only anyres_max_N"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy='default' is not supported"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, "model_type='siglip2_vision_model' is not supp"),
        ({"vision_config": values["vision_config"] | {"image_size": 32}}, "image_size=32, but its processor makes"),
    ):
        pinpoints = {"image_grid_pinpoints": [[32, 32]]} if "image_size" in message else {}
        (folder / "config.json").write_text(json.dumps(values | change | pinpoints))
        if pinpoints:
            for name in ("preprocessor_config.json", "processor_config.json"):
                if (folder / name).is_file():
                    cut = json.loads((folder / name).read_text()) | pinpoints
                    (folder / name).write_text(json.dumps(cut))
        with pytest.raises(ValueError, match=message) as error:
            foreign.load(folder)
        assert "\n" not in str(error.value)


def test_reduction_is_the_librarys_interpolation():
    """The weighted sums of four cells against torch, on a mosaic of the real grid."""
    size = (1600, 1200)
    index, weight = visual_index(size, REAL, 729), visual_weight(size, REAL, 729)
    tiles = 1 + 5 * 4
    values = np.random.default_rng(0).normal(size=(tiles * REAL.pyramid_rows + 1)).astype(np.float32)
    ours = np.asarray(jnp.sum(values[index] * weight, axis=1))
    offset = REAL.pyramid_offsets[729]
    cells = values[:-1].reshape(tiles, -1)[1:, offset:].reshape(4, 5, 27, 27).swapaxes(1, 2).reshape(108, 135)
    assert visual_count(size, dataclasses.replace(REAL, most_tiles=0), 729) == 729 + 102 * 136  # 3 rows cut a side
    factor = (102 * 135 / (9 * 729)) ** 0.5
    target = [int(102 // factor), int(135 // factor)]
    reduced = torch.nn.functional.interpolate(torch.tensor(cells[3:105])[None, None], target, mode="bilinear")[0, 0]
    mosaic = ours[729:].reshape(target[0], target[1] + 1)
    agree("LLaVA-OneVision: reduction", mosaic[:, :-1], reduced.numpy(), 1e-5)
    assert (mosaic[:, -1] == values[-1]).all()
