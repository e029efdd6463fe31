"""Stored feedback: every picture of an epoch is asked about, and what is read is what was written."""

import numpy as np
import pytest

from avg_llava_jax.data.pipeline import PlannedBatches
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.training import feedback
from tests.random_model import random_model


def test_an_epoch_is_asked_whole(tiny, tokenizer, llava_folder, tmp_path):
    """24 records are no multiple of a window of batches: later epochs begin before it ends."""
    parts = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"))
    batches = PlannedBatches(parts, tokenizer, tiny, tiny.granularities, batch_size=5, shapes=1)
    found = feedback.measure_all(tiny, random_model(tiny, tokenizer).params, batches, 24)
    assert set(found) == {f"r{number}" for number in range(24)}
    assert all(row.shape == (3,) and np.isfinite(row).all() for row in found.values())
    feedback.write(tmp_path / "feedback.npz", tiny, found)
    again = feedback.read(tmp_path / "feedback.npz", tiny)
    assert found.keys() == again.keys()
    assert all((again[name] == row).all() for name, row in found.items())
    assert [path.name for path in tmp_path.glob("feedback*")] == ["feedback.npz"]


def test_feedback_on_another_ladder_is_refused(tiny, tmp_path):
    np.savez(tmp_path / "f.npz", ids=np.array(["a"]), nll=np.ones((1, 2), np.float32), granularities=[4, 16])
    with pytest.raises(ValueError, match=r"is on granularities \(4, 16\), the model has \(4, 8, 16\)"):
        feedback.read(tmp_path / "f.npz", tiny)
