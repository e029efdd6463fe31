"""What is timed is the step and its parts, and PyTorch computes the same; how long they take is not tested."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from avg_llava_jax import parameters
from avg_llava_jax.commands import planning
from avg_llava_jax.config import ScalerConfig
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import losses, rglf
from avg_llava_jax.training.config import RglfConfig
from avg_llava_jax.training.step import Step
from launch.bench import parts as bench_parts
from launch.bench import torch_baseline
from launch.bench import train as bench_train
from tests.test_parity import ours, randomise

ROWS = 2
NAMES = {
    "tower.": "model.vision_tower.vision_tower.vision_model.",
    "connector.": "model.mm_projector.",
    "newline": "model.image_newline",
    "language.": "",
    "router.": "model.router.",
}


def released(name):
    """The released name of a parameter of the baseline."""
    part = next(part for part in NAMES if name.startswith(part))
    return NAMES[part] + name.removeprefix(part).removeprefix("vision_model.")


@pytest.fixture(scope="module")
def small(tiny):
    """Two granularities, and no dropout, so that every way gives the same numbers."""
    return dataclasses.replace(
        tiny, scaler=ScalerConfig(halvings=1), router=dataclasses.replace(tiny.router, dropout=0.0)
    )


@pytest.fixture(scope="module")
def shape(small):
    return planning.largest_shape(small, text=8, answer=3)


def test_a_random_batch_fills_its_shape(small, shape):
    batch = bench_parts.random_batch(small, ROWS, shape)
    assert (batch["tile_image"] == 0).all() and batch["pixels"].any(axis=(2, 3, 4)).all()
    assert batch["instruction"].sum() == ROWS * (shape.text - shape.answer)
    for g in small.granularities:
        newlines = batch["index"][g].shape[1] - batch["length"][g]
        assert (batch["target_at"][g] >= 0).all() and (newlines <= shape.tiles * small.vision.grid).all()
    with pytest.raises(ValueError, match="no mosaic of this model makes 4 tiles"):
        bench_parts.random_batch(small, ROWS, dataclasses.replace(shape, tiles=4))


@pytest.mark.parametrize("phase", bench_train.PHASES)
def test_parts_compute_what_the_step_does(small, shape, phase):
    """The answers of each granularity, and in RGLF the two executions, from parameters that both were given."""
    config = bench_train.config_of(phase, ROWS, "float32", "none")
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    batch = jax.device_put(bench_parts.random_batch(small, ROWS, shape))
    with jax.set_mesh(mesh):
        step = Step(config, small, mesh)
        params = jax.jit(lambda: parameters.init(small, jax.random.key(0)))()
        whole = bench_parts.Whole({"per_length": step}, params, batch)
        parts = {part.name: part.run for part in bench_parts.parts(config, small, whole, batch)}
        found = {name: jax.device_get(run()) for name, run in parts.items() if name != "optimizer"}
        _, _, metrics = whole.run("per_length")()
        before = jax.device_get(whole.trained)
        after, _, copy = parts["optimizer"]()
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), after, copy))
    assert not jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), after, before))
    common = ["encode", "pool", *(f"LMM {g}" for g in small.granularities)]
    assert list(parts) == [*common, *(["per_length", "vmap", "router"] if phase == "rglf" else []), "optimizer"]
    for at, g in enumerate(small.granularities):
        nll = found[f"LMM {g}"] if phase == "rglf" else found[f"LMM {g}"][0]
        np.testing.assert_allclose(nll.mean() / shape.answer, metrics[f"nll/{g}"], rtol=1e-5)
        if phase == "rglf":
            for execution in ("per_length", "vmap"):
                np.testing.assert_allclose(found[execution][0][:, at], nll / shape.answer, rtol=1e-5)
        else:
            of_params, of_pyramid, of_text = found[f"LMM {g}"][1]
            assert all(leaf.any() for leaf in jax.tree.leaves((of_params["language"]["layers"], of_pyramid, of_text)))


def test_the_report_holds_all_of_it(small, shape):
    config = bench_train.config_of("rglf", ROWS, "float32", "none")
    found = bench_train.measure(config, small, shape, repeats=1)
    found["torch"] = {"left_out": "no such thing"}
    text = bench_train.table("rglf", json.loads(json.dumps(found)), devices=1, most=1e12)
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")] == [
        "seconds a step", f"{found['step']['per_length']['seconds']:.4f}",
        "part", "encode", "pool", *(f"LMM {g}" for g in small.granularities), "router", "optimizer", "sum of parts",
        "against", "step with one padded vmap", "its language model alone", "PyTorch",
    ]  # fmt: skip


@pytest.mark.parametrize("phase", bench_train.PHASES)
def test_pytorch_computes_the_same(small, shape, phase, tmp_path):
    """From the same parameters the same loss, however often images are encoded."""
    bench_train.write_batch(tmp_path / "batch.npz", small, ROWS, shape)
    config = bench_train.config_of(phase, ROWS, "float32", "none")
    work = json.loads(json.dumps(bench_train.baseline_work(config, small, "cpu")))
    theirs = torch_baseline.read_batch(tmp_path / "batch.npz", torch.device("cpu"))
    found = []
    for again in (False, True):
        training = torch_baseline.Training(work)
        randomise(training.model)
        tensors = {released(name): tensor.clone() for name, tensor in training.model.state_dict().items()}
        found.append(training.step(theirs, again).item())
        moved = [each for each in training.ours if each.grad is not None and each.grad.any()]
        assert len(moved) > 0.8 * len(training.ours)
    shapes = parameters.abstract(small)
    params = {component: ours(component, shapes[component], tensors) for component in shapes}
    batch = bench_parts.random_batch(small, ROWS, shape)
    with jax.default_matmul_precision("highest"):
        if phase == "rglf":
            loss = jax.jit(lambda *given: rglf.batch_loss(small, *given, None, RglfConfig())[0])(params, batch)
        else:
            loss = jax.jit(lambda *given: losses.language_loss(small, *given, small.granularities)[0])(params, batch)
    np.testing.assert_allclose(found, [loss, loss], rtol=1e-4)
