"""The whole forward pass against tensors measured on the released PyTorch implementation (tests/data/golden)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from avg_llava_jax import checkpoint
from avg_llava_jax.data.geometry import visual_index
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.vit import normalise
from tests.differences import agree
from tests.measured_pixels import measured_tiles

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())
IMAGE = -200
TILES, TEXT, LENGTHS = 5, 256, (512, 1024, 2816)  # static sizes that hold every case


@pytest.fixture(scope="module")
def model():
    loaded = checkpoint.load(GOLDEN / "avg-llava-tiny", GOLDEN / "vision_tower")
    with jax.default_matmul_precision("highest"):
        yield loaded


@pytest.fixture(scope="module")
def see_and_route(model):
    """Compiled once for all cases, whose tiles and texts are padded: the empty slots must change nothing."""
    config = model.config

    @jax.jit
    def compiled(params, pixels, batch):
        features = avg_llava.encode_images(config, params, pixels)
        pyramid = avg_llava.scale(config, features)
        text = avg_llava.embed(config, params, batch["text"])
        return features, pyramid, text, avg_llava.route(config, params, pyramid, text, batch)

    return compiled


@pytest.fixture(scope="module")
def read(model):
    """The language model over packed embeddings, compiled once per padded length."""

    @jax.jit
    def compiled(params, pyramid, text, index):
        embeds = avg_llava.assemble(params, pyramid, text, index)
        hidden = avg_llava.decoder(model.config, params, embeds)
        return embeds[0], avg_llava.unembed(model.config, params, hidden[0])

    return compiled


@pytest.fixture(scope="module", params=CASES, ids=lambda case: pathlib.Path(case["file"]).stem)
def run(model, see_and_route, request):
    """One inference case: (golden arrays, what we compute for it)."""
    case, config, params = request.param, model.config, model.params
    image = Image.open(GOLDEN / case["image"]).convert("RGB")
    with np.load(GOLDEN / case["file"]) as file:
        golden = dict(file)
    pixels = measured_tiles(image, config, pathlib.Path(case["image"]).name)
    ids = golden["input_ids"]
    text, real = ids[ids != IMAGE], np.arange(TEXT) < len(ids) - 1
    slots = np.arange(TILES) < len(pixels)
    batch = {
        "text": np.pad(text, (0, TEXT - len(text)))[None],
        "instruction": real[None],
        "tile_image": np.where(slots, 0, -1)[None],
        "first_tile": np.zeros((1, 1), np.int32),
    }
    padded = np.pad(pixels, ((0, TILES - len(pixels)), (0, 0), (0, 0), (0, 0)))
    features, pyramid, embedded, routing = see_and_route(params, padded[None], batch)
    at = int(np.flatnonzero(ids == IMAGE)[0])
    return golden, {
        "config": config,
        "params": params,
        "pixels": pixels,
        "size": image.size,
        "text_ids": text,
        "order": lambda visual: np.concatenate([np.arange(at), visual, np.arange(at, len(text))]),
        "features": features[0, : len(pixels)],
        "pyramid": pyramid,
        "text": embedded,
        "routing": routing,
    }


def compare(golden, name, array, tolerance):
    """`array` against the golden tensor of that name, of which only a slice may have been kept."""
    keys = [key for key in golden if key == name or key.startswith(name + "[")]
    assert keys, name
    for key in keys:
        index = eval("np.s_" + key[len(name) :]) if "[" in key else ...
        agree(f"released code: {name.split('.')[0]}", np.asarray(array)[index], golden[key], tolerance, key)


def packed_index(ours, granularity):
    """The packed order of the single image and the text around it, as `assemble` counts rows."""
    visual = visual_index(ours["size"], ours["config"], granularity)
    newline = TILES * ours["config"].pyramid_rows
    return ours["order"](TEXT + np.where(visual < 0, newline, visual))


def test_pixels(run):
    golden, ours = run
    pixels = normalise(ours["config"].vision, jnp.asarray(ours["pixels"]))
    compare(golden, "pixel_values.0", np.moveaxis(np.asarray(pixels), -1, 1), 1e-5)


def test_features(run):
    golden, ours = run
    config, params = ours["config"], ours["params"]
    patches = jax.jit(avg_llava.encoder(config.vision).apply)({"params": params["encoder"]}, ours["pixels"])
    compare(golden, "vision_features", patches, 1e-5)
    compare(golden, "image_features", ours["features"], 1e-5)


def test_pyramid(run):
    golden, ours = run
    pyramid = ours["pyramid"][0, : len(ours["pixels"])]
    for granularity, offset in ours["config"].pyramid_offsets.items():
        compare(golden, f"pooled.{granularity}", pyramid[:, offset : offset + granularity], 1e-5)


def test_router(run):
    golden, ours = run
    routing = ours["routing"]
    positions = np.asarray(routing.text_rows[0, 0])
    rows = np.where(positions[:, None] >= 0, np.asarray(ours["text"][0])[positions], 0)
    compare(golden, "router_text.0", rows, 1e-6)
    votes = np.asarray(routing.votes[0, : len(ours["pixels"])])
    compare(golden, "router_mlp_out.0", votes / np.asarray(ours["params"]["router"]["voter"])[:, None], 1e-4)
    compare(golden, "router_pre_norm.0", routing.pre_norm[0], 1e-4)
    compare(golden, "router_logits.0", routing.logits[0], 1e-4)
    assert int(routing.logits[0, 0].argmax()) == golden["router_choice"][0]


@pytest.mark.parametrize("granularity", [36, 72, 144, 288, 576, "router"])
def test_logits(run, read, granularity):
    golden, ours = run
    chosen = int(golden["router_choice_granularity"][0]) if granularity == "router" else granularity
    index = packed_index(ours, chosen)
    length = len(index)
    assert length == golden["seq_len"][["36", "72", "144", "288", "576", "router"].index(str(granularity))]
    padded = np.pad(index, (0, next(n for n in LENGTHS if n >= length) - length))
    embeds, logits = read(ours["params"], ours["pyramid"], ours["text"], padded[None])
    compare(golden, f"inputs_embeds.{granularity}", embeds[:length], 1e-5)
    compare(golden, f"logits.{granularity}", logits[:length], 1e-4)
