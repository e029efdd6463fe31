"""Stored feedback: every picture of an epoch is asked about, what is read is what was written, and it trains alike."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from avg_llava_jax import checkpoint
from avg_llava_jax.data.feedback import read_feedback
from avg_llava_jax.data.pipeline import WINDOW, PlannedBatches
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import feedback, metrics, phases
from avg_llava_jax.training.config import RglfConfig, defaults, read
from avg_llava_jax.training.loop import train
from avg_llava_jax.training.metrics import read_rows
from tests.conftest import write_llava
from tests.random_model import random_model, save_random_model


@pytest.fixture(scope="module")
def asked(tiny, tokenizer, tmp_path_factory):
    """A model, batches of 24 records, which are no multiple of a window, and the folders of its feedback on them."""
    model = random_model(tiny, tokenizer)
    llava_folder = write_llava(tmp_path_factory.mktemp("llava"))
    records = json.loads((llava_folder / "train.json").read_text(encoding="utf-8"))
    for number, record in enumerate(records):  # no two of them ask the same
        record["conversations"][1]["value"] += f" {number}"
    (llava_folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
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
    part = batches.parts[0].path
    stored = read_feedback(folders[keep], tiny.granularities)
    assert {row.record for row in stored.values()} == {f"{part}#{number}" for number in range(24)}
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

    (value, (count, found)), grads = rglf(live)
    from_disk = dataclasses.replace(batches, feedback=stored)[mixed]
    assert ("pixels" in from_disk, "features" in from_disk) == (not keep, keep)
    assert live["index"] and not from_disk["index"]  # nothing is packed for a language model that does not run
    (again, (as_many, others)), as_steep = rglf(from_disk)
    np.testing.assert_allclose(again, value, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), as_steep, grads)
    assert count == as_many == (live["first_tile"] >= 0).sum()
    for name in found:
        np.testing.assert_allclose(others[name], found[name], rtol=1e-5, atol=1e-5, err_msg=name)

    unknown = next(row for row in range(5) if (live["first_tile"][row] >= 0).any())
    record = live["records"][unknown]
    del stored[next(question for question, row in stored.items() if row.record == record)]
    without = dataclasses.replace(batches, feedback=stored)[mixed]
    assert [(one.record, one.reason) for one in without["skipped"]] == [(record, "no_feedback")]
    (value, (count, _)), _ = rglf(without)
    assert np.isfinite(value) and count == as_many - (live["first_tile"][unknown] >= 0).sum()


def test_feedback_of_rows_that_samples_share(tiny, asked, tmp_path):
    """`data.pack`: each record has the answers and the features that a row of its own gives it."""
    model, batches, folders, mesh = asked
    packed = dataclasses.replace(batches, batch_size=6, pack=2)
    feedback.measure(tiny, model.params, packed, 100, tmp_path, mesh, keep_features=True)
    shared, alone = (read_feedback(folder, tiny.granularities) for folder in (tmp_path, folders[True]))
    assert shared.keys() == alone.keys() and len(shared) == 24
    for question, row in shared.items():
        assert row.record == alone[question].record
        np.testing.assert_allclose(row.nll, alone[question].nll, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(row.features, alone[question].features, rtol=1e-5, atol=1e-5)


def test_goes_on_where_it_was_killed(tiny, asked, monkeypatch):
    """What is stored is not measured again; a window without its answers is, though its features are there."""
    model, batches, folders, mesh = asked
    before = read_feedback(folders[True], tiny.granularities)
    (folders[True] / "00000-0.npz").unlink()
    about = json.loads((folders[True] / "feedback.json").read_text())
    del about["files"]
    (folders[True] / "feedback.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="is incomplete: run avg-llava feedback again"):
        read_feedback(folders[True], tiny.granularities)
    assert feedback.measure(tiny, model.params, batches, 100, folders[True], mesh, keep_features=True) == (1, 0, "")
    after = read_feedback(folders[True], tiny.granularities)
    assert before.keys() == after.keys()
    assert all((before[name].nll == after[name].nll).all() for name in before)
    assert all((before[name].features == after[name].features).all() for name in before)
    monkeypatch.setattr(feedback, "_window", None)  # nothing is left to measure
    assert feedback.measure(tiny, model.params, batches, 100, folders[True], mesh, keep_features=True) == (1, 1, "")
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
    with pytest.raises(ValueError, match="was started with features none, not float32: give another folder"):
        feedback.measure(tiny, model.params, batches, 100, folders[False], mesh, keep_features=True)
    with pytest.raises(FileNotFoundError, match=r"has no feedback.json: make it with avg-llava feedback"):
        read_feedback(tmp_path, tiny.granularities)
    (name,) = (path.name for path in folders[False].glob("*.npz"))
    (folders[False] / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*: delete it, run avg-llava feedback again"):
        read_feedback(folders[False], tiny.granularities)


def ids_of(case, records):
    """The records with ids as data sets have them."""
    match case:
        case "unique":
            return records
        case "twice":
            return [record | {"id": f"r{number // 2}"} for number, record in enumerate(records)]
        case "null":
            return [record | {"id": None} for record in records]
        case "empty":
            return [record | {"id": ""} for record in records]
    return [{key: value for key, value in record.items() if key != "id"} for record in records]


@pytest.fixture(scope="module")
def random_checkpoint(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random_model(tiny, tokenizer, folder)
    return folder


def rglf_config(folder, checkpoint_folder):
    """Two steps of 12 on the records of a folder of `write_llava`."""
    config = defaults()
    config.update_from_flattened_dict(
        {
            "phase": "rglf", "init_from": str(checkpoint_folder), "steps": 2, "batch_size": 12,
            "data.path": str(folder / "train.json"), "data.images": str(folder / "images"), "data.shapes": 1,
        }
    )  # fmt: skip
    return config


def losses_of(config, workdir):
    train(config, workdir)
    return [row["loss"] for row in read_rows(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def live(random_checkpoint, tmp_path_factory):
    """Losses that need no stored feedback."""
    folder = write_llava(tmp_path_factory.mktemp("live"))
    return losses_of(rglf_config(folder, random_checkpoint), folder / "run")


@pytest.mark.parametrize("case", ["unique", "twice", "null", "empty", "missing"])
def test_each_record_has_its_own_answers_whatever_its_id(case, live, random_checkpoint, llava_folder):
    """The losses of the live run, which knows of no ids; and every sample counts."""
    records = json.loads((llava_folder / "train.json").read_text(encoding="utf-8"))
    (llava_folder / "train.json").write_text(json.dumps(ids_of(case, records)), encoding="utf-8")
    config = rglf_config(llava_folder, random_checkpoint)
    feedback.run(read(config), llava_folder / "feedback", keep_features=True)
    config.rglf.feedback = str(llava_folder / "feedback")
    np.testing.assert_allclose(losses_of(config, llava_folder / "run"), live, rtol=1e-5)
    assert (llava_folder / "run" / "skipped.jsonl").read_text() == ""


def damage(folder, count):
    """Cut the pixels of the pictures of `count` records; their headers stay whole. Returns the records' numbers."""
    records = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    damaged = [number for number, record in enumerate(records) if isinstance(record.get("image"), str)][:count]
    for number in damaged:
        picture = folder / "images" / f"cut-{number}.png"
        whole = (folder / "images" / records[number]["image"]).read_bytes()
        picture.write_bytes(whole[: len(whole) // 2])
        records[number]["image"] = picture.name
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return damaged


def test_pictures_that_cannot_be_decoded_are_skipped_and_named(random_checkpoint, llava_folder):
    """Also where they are more than `max_skipped_share`: no second measurement would find answers."""
    damaged = damage(llava_folder, 3)
    config = rglf_config(llava_folder, random_checkpoint)
    folder = llava_folder / "feedback"
    config.data.max_skipped_share = 0.5
    assert str(feedback.run(read(config), folder, keep_features=True)).endswith("skipped samples: 3 corrupt_image")
    names = {f"{llava_folder / 'train.json'}#{number}" for number in damaged}
    assert {row["record"] for row in read_rows(folder / "skipped.jsonl")} == names
    config.rglf.feedback = str(folder)
    assert np.isfinite(losses_of(config, llava_folder / "run")).all()
    rows = read_rows(llava_folder / "run" / "skipped.jsonl")
    assert {row["record"] for row in rows} <= names and {row["reason"] for row in rows} == {"no_answer"}


def test_too_many_pictures_that_cannot_be_decoded_stop_the_measurement(random_checkpoint, llava_folder, monkeypatch):
    monkeypatch.setattr(metrics, "FEW", 20)
    damage(llava_folder, 3)
    config = rglf_config(llava_folder, random_checkpoint)
    with pytest.raises(RuntimeError, match="more than data.max_skipped_share=0.05 allows: 3 corrupt_image; skipped.js"):
        feedback.run(read(config), llava_folder / "feedback", keep_features=False)


def test_a_mixture_whose_files_number_from_nought(tiny, tokenizer, asked, tmp_path):
    """Two files without ids, and one file twice with other pictures: every row has the answers of its own picture."""
    model, _, _, mesh = asked
    parts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder = write_llava(tmp_path / name)
        records = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        for record in records:
            record["conversations"][1]["value"] += f" {name}"
        (folder / "train.json").write_text(json.dumps(ids_of("missing", records)), encoding="utf-8")
        parts += open_sources(str(folder / "train.json"), str(folder / "images"))
    (tmp_path / "other").mkdir()
    for file in (tmp_path / "a" / "images").iterdir():
        Image.open(file).point(lambda value: 255 - value).save(tmp_path / "other" / file.name)
    parts += open_sources(str(tmp_path / "a" / "train.json"), str(tmp_path / "other"))

    batches = PlannedBatches(parts, tokenizer, tiny, tiny.granularities, batch_size=8, shapes=1)
    feedback.measure(tiny, model.params, batches, WINDOW, tmp_path / "feedback", mesh, keep_features=False)
    stored = read_feedback(tmp_path / "feedback", tiny.granularities)
    from_disk = dataclasses.replace(batches, feedback=stored)
    different = set()
    for number in (0, 5):
        live, found = batches[number], from_disk[number]
        assert found["records"] == live["records"] and not found["skipped"]
        arrays = {key: value for key, value in live.items() if key not in feedback.NOT_ARRAYS}
        nll, _ = feedback.measure_batch(tiny, "per_length", False, model.params, arrays)
        np.testing.assert_allclose(found["nll"], nll, rtol=1e-5)
        different |= {tuple(row) for row in found["nll"].tolist()}
    assert len(different) > 4  # the answers of one picture would not do for another


def test_a_folder_of_other_weights_or_another_model_is_refused(tiny, asked, random_checkpoint, llava_folder):
    model, batches, folders, mesh = asked
    other = jax.tree.map(lambda x: x, model.params)
    other["language"]["norm"]["scale"] = other["language"]["norm"]["scale"] + 1e-6
    unpad = dataclasses.replace(tiny, unpad="released")
    router = {**model.params, "router": jax.tree.map(lambda x: x + 1, model.params["router"])}
    with pytest.raises(ValueError, match="measured with other weights: let avg-llava feedback measure into another"):
        feedback.measure(tiny, other, batches, 100, folders[False], mesh, keep_features=False)
    with pytest.raises(ValueError, match="was measured with other model config"):
        feedback.measure(unpad, model.params, batches, 100, folders[False], mesh, keep_features=False)
    feedback.measure(tiny, model.params, batches, 100, folders[False], mesh, keep_features=False)
    assert feedback.measure(tiny, router, batches, 100, folders[False], mesh, keep_features=False) == (1, 1, "")

    config = rglf_config(llava_folder, random_checkpoint)
    feedback.run(read(config), llava_folder / "feedback", keep_features=False)
    about = json.loads((llava_folder / "feedback" / "feedback.json").read_text())
    config.rglf.feedback = str(llava_folder / "feedback")
    for before, message in (
        (about | {"measured_by": about["measured_by"] | {"weights": ""}}, "was measured with other weights"),
        ({key: value for key, value in about.items() if key != "format"}, "feedback is of an earlier format: let"),
    ):
        (llava_folder / "feedback" / "feedback.json").write_text(json.dumps(before))
        with pytest.raises(ValueError, match=message):
            train(config, llava_folder / "run")


def test_data_that_changed_is_asked_again_and_never_taken_from_a_folder(live, random_checkpoint, llava_folder):
    """An answer that was corrected, a picture that was replaced."""
    config = rglf_config(llava_folder, random_checkpoint)
    assert feedback.run(read(config), llava_folder / "feedback", keep_features=False) == (1, 0, "")
    records = json.loads((llava_folder / "train.json").read_text(encoding="utf-8"))
    for record in records:
        record["conversations"][1]["value"] += "!"
    (llava_folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    config.rglf.feedback = str(llava_folder / "feedback")
    with pytest.raises(ValueError, match=r"no answers to 24 of the first 24 records as they are now, .*json#\d+ am"):
        train(config, llava_folder / "run")
    config.rglf.feedback = ""
    assert feedback.run(read(config), llava_folder / "feedback", keep_features=False) == (1, 0, "")
    assert feedback.run(read(config), llava_folder / "feedback", keep_features=False) == (1, 1, "")

    one_picture = {f"{llava_folder / 'train.json'}#{number}" for number in range(1, 24, 3)}
    for number in range(1, 24, 3):
        Image.new("RGB", (40, 20), "yellow").save(llava_folder / "images" / f"{number}-0.png")
    config.rglf.feedback, config.data.max_skipped_share = str(llava_folder / "feedback"), 0.5
    changed = losses_of(config, llava_folder / "run")
    skipped = read_rows(llava_folder / "run" / "skipped.jsonl")
    assert {row["reason"] for row in skipped} == {"no_feedback"} and {row["record"] for row in skipped} <= one_picture
    assert np.isfinite(changed).all() and not np.allclose(changed, live)
    assert checkpoint.steps(llava_folder / "run") == [2]
