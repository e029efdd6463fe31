"""Stored feedback: every picture of an epoch is asked about, what is read is what was written, and it trains alike."""

import dataclasses

import jax
import numpy as np
import pytest

from avg_llava_jax.data.feedback import read_feedback
from avg_llava_jax.data.pipeline import PlannedBatches
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import feedback, phases
from avg_llava_jax.training.config import RglfConfig
from tests.conftest import write_llava
from tests.random_model import random_model


@pytest.fixture(scope="module")
def asked(tiny, tokenizer, tmp_path_factory):
    """A model, batches of 24 records, which are no multiple of a window, and the folders of its feedback on them."""
    model = random_model(tiny, tokenizer)
    llava_folder = write_llava(tmp_path_factory.mktemp("llava"))
    parts = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"))
    batches = PlannedBatches(parts, tokenizer, tiny, tiny.granularities, batch_size=5, shapes=1)
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    folders = {keep: tmp_path_factory.mktemp("feedback") for keep in (False, True)}
    for keep, folder in folders.items():
        feedback.measure(tiny, model.params, batches, 100, folder, mesh, keep)
    return model, batches, folders, mesh


@pytest.mark.parametrize("keep", [False, True], ids=["nll", "features"])
def test_stored_feedback_trains_as_live_does(tiny, asked, keep):
    model, batches, folders, _ = asked
    stored = read_feedback(folders[keep], tiny.granularities)
    assert set(stored) == {f"r{number}" for number in range(24)}
    assert all(row.nll.shape == (3,) and np.isfinite(row.nll).all() for row in stored.values())

    mixed = next(number for number in range(16) if tile_counts(batches[number]) == {0, 3, 8})
    live = batches[mixed]
    loss = phases.make_loss("rglf", tiny, tiny.granularities, RglfConfig(), remat="none")

    @jax.jit
    def compiled(router, batch):
        return loss({**model.params, "router": router}, batch, jax.random.split(jax.random.key(0), len(batch["text"])))

    def rglf(batch):
        arrays = {key: value for key, value in batch.items() if key not in feedback.NOT_ARRAYS}
        return jax.value_and_grad(compiled, has_aux=True)(model.params["router"], arrays)

    (value, (count, metrics)), grads = rglf(live)
    from_disk = dataclasses.replace(batches, feedback=stored)[mixed]
    assert ("pixels" in from_disk, "features" in from_disk) == (not keep, keep)
    (again, (as_many, others)), as_steep = rglf(from_disk)
    np.testing.assert_allclose(again, value, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), as_steep, grads)
    assert count == as_many == (live["first_tile"] >= 0).sum()
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)

    unknown = next(row for row in range(5) if (live["first_tile"][row] >= 0).any())
    del stored[live["ids"][unknown]]
    (value, (count, _)), _ = rglf(dataclasses.replace(batches, feedback=stored)[mixed])
    assert np.isfinite(value) and count == as_many - (live["first_tile"][unknown] >= 0).sum()


def test_goes_on_where_it_was_killed(tiny, asked, monkeypatch):
    """What is stored is not measured again; a window without its answers is, though its features are there."""
    model, batches, folders, mesh = asked
    before = read_feedback(folders[True], tiny.granularities)
    (folders[True] / "00000-0.npz").unlink()
    (folders[True] / "feedback.json").write_text('{"granularities": [4, 8, 16], "features": "float32"}')
    with pytest.raises(ValueError, match="is not whole: run launch.feedback again"):
        read_feedback(folders[True], tiny.granularities)
    feedback.measure(tiny, model.params, batches, 100, folders[True], mesh, keep_features=True)
    after = read_feedback(folders[True], tiny.granularities)
    assert before.keys() == after.keys()
    assert all((before[name].nll == after[name].nll).all() for name in before)
    assert all((before[name].features == after[name].features).all() for name in before)
    monkeypatch.setattr(feedback, "_window", None)  # nothing is left to measure
    feedback.measure(tiny, model.params, batches, 100, folders[True], mesh, keep_features=True)
    assert not list(folders[True].glob("*.part"))


def tile_counts(batch):
    """How many tiles samples of a batch have; 0 is text alone."""
    return set((batch["tile_image"] >= 0).sum(axis=1).tolist())


def test_a_set_serves_a_shorter_ladder(tiny, asked):
    whole, part = (read_feedback(asked[2][True], ladder) for ladder in (tiny.granularities, (8, 16)))
    assert whole.keys() == part.keys()
    assert all((part[name].nll == whole[name].nll[1:]).all() for name in whole)
    assert all((part[name].features == whole[name].features).all() for name in whole)


def test_feedback_that_does_not_fit_is_refused(tiny, asked, tmp_path):
    model, batches, folders, mesh = asked
    with pytest.raises(ValueError, match=r"is on granularities \(4, 8, 16\), the model has \(8, 32\)"):
        read_feedback(folders[False], (8, 32))
    with pytest.raises(ValueError, match="was begun with features none, not float32: give another folder"):
        feedback.measure(tiny, model.params, batches, 100, folders[False], mesh, keep_features=True)
    with pytest.raises(FileNotFoundError, match=r"has no feedback.json: make it with launch.feedback"):
        read_feedback(tmp_path, tiny.granularities)
    (name,) = (path.name for path in folders[False].glob("*.npz"))
    (folders[False] / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*: delete it, run launch.feedback again"):
        read_feedback(folders[False], tiny.granularities)
