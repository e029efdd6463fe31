"""Stored feedback: every picture of an epoch is asked about, what is read is what was written, and it trains alike."""

import dataclasses

import jax
import numpy as np
import pytest

from avg_llava_jax.data.pipeline import PlannedBatches
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.training import feedback, phases
from tests.random_model import random_model


def test_stored_feedback_trains_as_live_does(tiny, tokenizer, llava_folder, tmp_path):
    """24 records are no multiple of a window of batches: later epochs begin before it ends."""
    model = random_model(tiny, tokenizer)
    parts = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"))
    batches = PlannedBatches(parts, tokenizer, tiny, tiny.granularities, batch_size=5, shapes=1)
    found = feedback.measure_all(tiny, model.params, batches, 24)
    assert set(found) == {f"r{number}" for number in range(24)}
    assert all(row.shape == (3,) and np.isfinite(row).all() for row in found.values())
    feedback.write(tmp_path / "feedback.npz", tiny, found)
    again = feedback.read(tmp_path / "feedback.npz", tiny)
    assert found.keys() == again.keys()
    assert all((again[name] == row).all() for name, row in found.items())
    assert [path.name for path in tmp_path.glob("feedback*")] == ["feedback.npz"]

    mixed = next(number for number in range(16) if tile_counts(batches[number]) == {0, 3, 8})
    live = batches[mixed]
    loss = phases.make_loss("rglf", tiny, tiny.granularities, phases.FeedbackConfig(), remat="none")
    compiled = jax.jit(lambda batch: loss(model.params, batch, jax.random.key(0)))

    def rglf(batch):
        return compiled({key: value for key, value in batch.items() if key not in feedback.NOT_ARRAYS})

    value, (count, metrics) = rglf(live)
    stored, (as_many, others) = rglf(dataclasses.replace(batches, feedback=again)[mixed])
    np.testing.assert_allclose(stored, value, rtol=1e-5, atol=1e-5)
    assert count == as_many == (live["first_tile"] >= 0).sum()
    for name in metrics:
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5, atol=1e-5, err_msg=name)

    unknown = next(row for row in range(5) if (live["first_tile"][row] >= 0).any())
    del again[live["ids"][unknown]]
    value, (count, _) = rglf(dataclasses.replace(batches, feedback=again)[mixed])
    assert np.isfinite(value) and count == as_many - (live["first_tile"][unknown] >= 0).sum()


def tile_counts(batch):
    """How many tiles samples of a batch have; 0 is text alone."""
    return set((batch["tile_image"] >= 0).sum(axis=1).tolist())


def test_feedback_on_another_ladder_is_refused(tiny, tmp_path):
    np.savez(tmp_path / "f.npz", ids=np.array(["a"]), nll=np.ones((1, 2), np.float32), granularities=[4, 16])
    with pytest.raises(ValueError, match=r"is on granularities \(4, 16\), the model has \(4, 8, 16\)"):
        feedback.read(tmp_path / "f.npz", tiny)
