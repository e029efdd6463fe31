"""What several tests share: a model small enough to compile in seconds, and the shipped tokenizer."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from avg_llava_jax import ASSETS
from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig, ScalerConfig, VisionConfig
from avg_llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.models import avg_llava
from tests.differences import LARGEST
from tests.random_model import random_model
from tests.small_engine import make

TOKENIZER = ASSETS / "tokenizer"
LONGEST = ("notebooks", "hosts", "training", "benchmarking", "mesh", "validation", "faults", "launch", "ablations")
"""The files that take longest, `test_NAME.py`, from the longest: as the last one, each would keep one process alone."""


class LargestOfAllProcesses:
    """Where tests run in several processes, each hands its differences over as it ends."""

    @staticmethod
    def pytest_testnodedown(node) -> None:
        for what, difference in getattr(node, "workeroutput", {}).get("largest", {}).items():
            LARGEST[what] = max(LARGEST.get(what, 0.0), difference)


def pytest_configure(config) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(LargestOfAllProcesses())


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["largest"] = LARGEST


def pytest_terminal_summary(terminalreporter) -> None:
    """The largest difference of each comparison that ran, as docs/convert.md has them."""
    if LARGEST:
        terminalreporter.section("largest differences")
    for what, difference in sorted(LARGEST.items()):
        terminalreporter.write_line(f"{difference:.1e}  {what}")


def pytest_collection_modifyitems(items) -> None:
    """The longest files first; what runs in several processes keeps that order by --no-loadscope-reorder."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """Tiles of 4 x 4 patches, two halvings: granularities 4, 8, 16."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=32, activation="gelu"
        ),
        scaler=ScalerConfig(halvings=2),
        router=RouterConfig(text_tokens=4, heads=2),
        language=LanguageConfig(
            vocab_size=600, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=32, tied_embeddings=True,
            max_length=256,
        ),
        pinpoints=((16, 32), (32, 16), (32, 32)),
        template="mistral",
    )  # fmt: skip


@pytest.fixture(scope="session")
def params(tiny):
    """Fresh parameters of `tiny`."""
    return jax.jit(lambda key: avg_llava.init(tiny, key))(jax.random.key(1))


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Noise in four shapes."""
    rng = np.random.default_rng(0)
    sizes = ((32, 16), (16, 40), (30, 30), (50, 31))
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in sizes]


@pytest.fixture(scope="module")
def unweighted(tiny, tokenizer) -> AvgLlava:
    """A model that only prepares requests."""
    return AvgLlava(tiny, None, tokenizer)


@pytest.fixture(scope="module")
def served(unweighted):
    """The server, with an engine that needs no device behind it."""
    from tests.served import Served  # what it imports, only these tests need

    served = Served(unweighted)
    yield served
    served.close()


@pytest.fixture
def llava_folder(tmp_path: Path) -> Path:
    """A folder of `write_llava`, a test's own."""
    return write_llava(tmp_path)


def write_llava(folder: Path) -> Path:
    """`train.json` with 24 records and their images: text alone, one image, two images, several turns."""
    colours = ("red", "green", "blue")
    (folder / "images").mkdir()
    records = []
    for number in range(24):
        names = [f"{number}-{image}.png" for image in range(number % 3)]
        for image, name in enumerate(names):
            size = ((40, 20), (20, 40), (30, 30))[(number + image) % 3]
            Image.new("RGB", size, colours[(number + image) % 3]).save(folder / "images" / name)
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + "What colour is it? é日"},
            {"from": "gpt", "value": colours[number % 3]},
        ]
        if number % 4 == 0:
            turns += [{"from": "human", "value": "Is it large?"}, {"from": "gpt", "value": "No, it is small."}]
        record = {"id": f"r{number}", "conversations": turns, "kind": "colour"}
        if len(names) == 1:
            record["image"] = names[0]
        elif names:
            record["images"] = names
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    """Its parameters are bound to a device, as those of a checkpoint are: that decides what compiles."""
    params = jax.device_put(random_model(tiny, tokenizer).params, jax.devices()[0])
    return AvgLlava(tiny, params, tokenizer)


@pytest.fixture(scope="module")
def engine(model):
    engine = make(model)
    engine.warm_up()
    return engine
