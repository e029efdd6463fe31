"""LLaVA-OneVision in the library, with the same weights as ours: tiles, token counts, logits, answers, in and out."""

import dataclasses
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
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.configs import onevision_05b_router
from avg_llava_jax.convert import convert, foreign, layouts, llava_next
from avg_llava_jax.data.geometry import visual_count, visual_index, visual_weight
from avg_llava_jax.data.packing import collate, load_tiles, merge, shape_of
from avg_llava_jax.inference.model import Model
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.vit import normalise
from avg_llava_jax.training.loop import train
from tests.differences import agree
from tests.in_the_library import noise, sample_of, torch_inputs
from tests.test_convert import SOURCE

IMAGE_TOKEN = 1000
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
            vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, video_token_index=1001,
            image_grid_pinpoints=PINPOINTS,
        )
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    folder = tmp_path_factory.mktemp("onevision") / "theirs"
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SOURCE / name, folder)
    llava_next.name_image_token(folder, IMAGE_TOKEN)
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


def our_logits(config, params, samples, granularity=None):
    """Logits (length, V) of each sample at a granularity, the finest by default, from one batch."""
    granularity = granularity or config.granularities[-1]
    shape = dataclasses.replace(merge(shape_of(s, config, [granularity]) for s in samples), answer=1)
    batch = collate(samples, shape, config, [granularity])
    packed = batch["index"][granularity], batch["weight"][granularity]
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(run(config, params, batch["pixels"], batch["text"], *packed))
    return [row[:length] for row, length in zip(logits, batch["length"][granularity], strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, pixels, text, index, weight):
    pyramid = avg_llava.pyramid_of(config, params, pixels)
    packed = avg_llava.assemble(params, pyramid, avg_llava.embed(config, params, text), index, weight)
    return avg_llava.unembed(config, params, avg_llava.decoder(config, params, packed))


MIXED = [[noise(SIZES[0])], [noise(SIZES[1])], [noise((35, 80), 1), noise((50, 20), 2)], [noise(SIZES[2])]]


def test_logits_of_the_finest_granularity(theirs):
    """One batch: an image, one over nine tiles' worth of cells, two images in a prompt, a tall one."""
    model, _, config, params, cut = theirs
    samples = [sample_of(images) for images in MIXED]
    inputs = torch_inputs(cut, config, samples, IMAGE_TOKEN)
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
    assert np.abs(logits).max() > 1
    for ours, row, mask in zip(our_logits(config, params, samples), logits, inputs["attention_mask"], strict=True):
        agree("LLaVA-OneVision in the library: logits", ours, row[mask.bool().numpy()])


def test_pixels(theirs):
    """Tiles of one image, and the padded squares of two: the library's pixels."""
    _, _, config, _, cut = theirs
    for images in MIXED:
        ours = np.asarray(normalise(config.vision, load_tiles(sample_of(images), config)))
        pixels = cut([images], return_tensors="np")["pixel_values"]
        together = np.concatenate(list(pixels))
        agree("LLaVA-OneVision: pixels", np.moveaxis(ours, -1, 1), together[: len(ours)], 1e-5)


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
    from avg_llava_jax.inference.engine import Engine
    from avg_llava_jax.inference.requests import Prepared, Request

    model, _, config, params, cut = theirs
    samples = [sample_of(images) for images in MIXED[1:3]]
    inputs = torch_inputs(cut, config, samples, IMAGE_TOKEN)
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = expected[:, inputs["input_ids"].shape[1] :].tolist()
    ours = Model(dataclasses.replace(config, template="vicuna_v1"), params, tokenizer)
    ours.stop_ids = ()
    engine = Engine(ours, 2, 1024, None, 64 << 20)
    finest = config.granularities[-1]
    with jax.default_matmul_precision("highest"):
        tickets = [
            engine.submit_prepared(Prepared(Request("", max_new_tokens=6), s, (finest,) * len(s.sizes)))
            for s in samples
        ]
        while not all(ticket.ended for ticket in tickets):
            engine.step()
    assert [list(ticket.result().token_ids) for ticket in tickets] == expected


def test_there_and_back(theirs, tmp_path):
    """Import and export: every tensor the same, the library loads all of it, and it is read again as it was."""
    model, folder, config, params, _ = theirs
    convert.import_folder(folder, tmp_path / "ours")
    convert.export_transformers(tmp_path / "ours", tmp_path / "back")
    again, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert again.config.text_config.model_type == "qwen2" and again.config.vision_aspect_ratio == "anyres_max_9"
    read = foreign.load(tmp_path / "back")
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
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(SOURCE / name, old)
    about = {
        **text, "model_type": "llava_qwen", "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32,
        "image_grid_pinpoints": "(1x1),...,(6x6)", "unfreeze_mm_vision_tower": True,
    }  # fmt: skip
    (old / "config.json").write_text(json.dumps(about))
    loaded = foreign.load(old, tower)
    vision = dataclasses.replace(loaded.config.vision, layers=config.vision.layers, select_layer=-1)
    same = dataclasses.replace(loaded.config, vision=vision, pinpoints=config.pinpoints)
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
    samples = [sample_of(images) for images in MIXED[:3]]
    inputs = torch_inputs(cut, config, samples, IMAGE_TOKEN)
    with torch.no_grad():
        for granularity in (4, 28):
            output = model(**inputs, granularity=granularity)
            logits = our_logits(config, params, samples, granularity)
            for ours, row, mask in zip(logits, output.logits, output.attention_mask, strict=True):
                agree("adaptive LLaVA-OneVision in PyTorch: logits", ours, row[mask].numpy())
        output = model(**inputs)
        agree("adaptive LLaVA-OneVision in PyTorch: router", our_scores(config, params, samples), output.router_logits)
        finest = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "out").eval()(**inputs)
    with torch.no_grad(), pytest.raises(ValueError, match="reads images, not videos"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])
    logits = our_logits(config, params, samples)
    for ours, row, mask in zip(logits, finest.logits, inputs["attention_mask"], strict=True):
        agree("LLaVA-OneVision in the library: logits", ours, row[mask.bool()].numpy())


def our_scores(config, params, samples):
    """Router logits of every image, (images, G)."""
    shape = dataclasses.replace(merge(shape_of(s, config) for s in samples), answer=1)
    batch = collate(samples, shape, config, granularities=())
    with jax.default_matmul_precision("highest"):
        pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
        routed = avg_llava.route(config, params, pyramid, avg_llava.embed(config, params, batch["text"]), batch)
    return np.concatenate([row[: len(s.sizes)] for row, s in zip(np.asarray(routed.logits), samples, strict=True)])


def test_to_a_trained_router_and_back(theirs, llava_folder, tmp_path):
    """Two steps of the router by the shipped config, on a ladder of two; the export holds the trained router."""
    config = onevision_05b_router.get_config()
    config.init_from, config.fresh = str(theirs[1]), ("router",)
    config.model.scaler.halvings, config.model.template = 1, "vicuna_v1"
    config.data.path, config.data.images = str(llava_folder / "train.json"), str(llava_folder / "images")
    config.data.workers, config.data.shapes, config.compute_dtype = 0, 1, "float32"
    config.steps, config.batch_size, config.optimizer.accumulate = 2, 2, 1
    train(config, tmp_path / "routed")
    routed = checkpoint.load(tmp_path / "routed")
    assert routed.config.granularities == (28, 49) and np.ptp(routed.params["router"]["voter"]) > 0
    convert.export_transformers(tmp_path / "routed", tmp_path / "out")
    again = foreign.load(tmp_path / "out")
    assert again.config == routed.config
    jax.tree.map(np.testing.assert_array_equal, again.params, routed.params)


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
