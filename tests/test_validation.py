"""Validation while training: on which samples, what is measured, and that the run does not feel it."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.data.pipeline import PlannedBatches, hold_out
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import curves, phases, setup
from avg_llava_jax.training.config import RglfConfig, defaults, read
from avg_llava_jax.training.loop import train
from avg_llava_jax.training.metrics import MetricsLog, Progress, read_rows
from avg_llava_jax.training.validation import LOSS, Best
from tests.conftest import write_llava
from tests.random_model import random_model, save_random_model
from tests.test_training import settings

TIMES = ("step_seconds", "tokens_per_second")


def timeless(workdir, validation=True):
    """Rows of metrics.jsonl without what differs between two runs, or without the validation as well."""
    return [
        {k: v for k, v in row.items() if k not in TIMES and (validation or not k.startswith("validation/"))}
        for row in read_rows(workdir / "metrics.jsonl")
    ]


def test_a_share_is_held_out_the_same_in_every_run():
    used, held = hold_out(100, 0.07)
    assert len(held) == 7 and sorted([*used, *held]) == list(range(100))
    assert hold_out(100, 0.07)[1].tolist() == held.tolist()
    assert len(hold_out(10, 0.001)[1]) == 1
    with pytest.raises(ValueError, match=r"data\.validation=0\.9 of 2 records leaves none to train on"):
        hold_out(2, 0.9)


@pytest.mark.parametrize("batch_size", [4, 5, 7])
def test_held_out_records_come_once_and_are_never_trained_on(tiny, tokenizer, llava_folder, batch_size):
    config = settings(tiny, llava_folder)
    config.data.validation, config.batch_size, config.data.path = (
        "0.3",
        batch_size,
        f"{config.data.path}, jersey?size=40",
    )
    config = read(config)
    planned = setup.plan_batches(config, tiny, tokenizer)
    held = setup.plan_validation(config, planned)
    assert held.ladder is planned.ladder and planned.sizes == [17, 28] and held.sizes == [7, 12]
    assert len(held) == -(-19 // batch_size)
    once = [record for number in range(len(held)) for record in held[number]["records"] if record]
    trained = {record for number in range(30) for record in planned[number]["records"]}
    assert len(once) == len(set(once)) == 19 and not trained & set(once) and len(trained) > 30
    rows = [dataclasses.replace(held, rows=part) for part in (tuple(range(2)), tuple(range(2, batch_size)))]
    shared = [record for part in rows for number in range(len(held)) for record in part[number]["records"] if record]
    assert sorted(shared) == sorted(once)


def test_batches_that_end_are_the_same_samples_whatever_their_size(tiny, tokenizer, llava_folder):
    """Over more than one window, and with records that cannot be used, each of which is reported once."""
    (llava_folder / "images" / "1-0.png").unlink()
    parts = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"))
    batches = PlannedBatches(parts, tokenizer, tiny, tiny.granularities, batch_size=1, single_epoch=True)
    found = [batches[number] for number in range(len(batches))]
    assert len(found) == 24 and sum(bool(batch["records"][0]) for batch in found) == 23
    assert [one.record.rpartition("#")[2] for batch in found for one in batch["skipped"]] == ["1"]


def test_validation_while_training(tiny, tokenizer, llava_folder, tmp_path, monkeypatch):
    """The run itself is as without; what is measured is the loss of the phase; the best model is kept; and resuming."""
    config = settings(tiny, llava_folder)
    config.steps, config.checkpoint_every = 6, 3
    config.data.validation = str(llava_folder / "train.json")  # a path: the training data stays whole
    config.evaluate_every, config.data.pack = 2, 2
    train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation/loss" in row] == [2, 4, 6]
    names = {"loss", "best_step", *(f"nll/{g}" for g in tiny.granularities)}
    assert {name for name in rows[1] if name.startswith("validation/")} == {f"validation/{name}" for name in names}
    values = [rows[step - 1]["validation/loss"] for step in (2, 4, 6)]
    best = (2, 4, 6)[int(np.argmin(values))]
    assert rows[-1]["validation/best_step"] == best

    kept = checkpoint.load(tmp_path / "run" / "best")
    assert checkpoint.steps(tmp_path / "run" / "best") == [best] and kept.config == tiny
    assert json.loads((tmp_path / "run" / "best" / "validation.json").read_text()) == {
        "step": best,
        "loss": min(values),
    }
    assert best == 6, "the loss of so few steps falls"
    newest = checkpoint.load(tmp_path / "run").params
    jax.tree.map(np.testing.assert_array_equal, kept.params, newest)

    # by hand: all samples at once, in a row each
    held = setup.plan_validation(read(config), setup.plan_batches(read(config), tiny, tokenizer))
    whole = dataclasses.replace(held, batch_size=24, pack=1)[0]
    arrays = {key: value for key, value in whole.items() if key not in ("records", "skipped")}
    loss = phases.make_loss("multi_granularity", tiny, tiny.granularities, RglfConfig(), "none")
    np.testing.assert_allclose(values[-1], jax.jit(lambda p: loss(p, arrays, None)[0])(newest), rtol=1e-5)

    # a run without validation, and one that is cut short and resumed, have the same losses
    config.data.validation, config.evaluate_every = "", 0
    train(config, tmp_path / "without")
    assert timeless(tmp_path / "without") == timeless(tmp_path / "run", validation=False)
    assert not (tmp_path / "without" / "best").exists()
    figure = drawn(tmp_path / "run", monkeypatch)
    assert {"loss", "validation/loss", "nll/4", "validation/nll/4"} <= figure


def test_a_run_with_validation_resumes_to_the_same(tiny, llava_folder, tmp_path):
    """Killed after steps that were measured and not saved: what comes again is the same, and so is the best."""
    config = settings(tiny, llava_folder)
    config.data.validation, config.evaluate_every, config.steps, config.checkpoint_every = "0.2", 1, 4, 2
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    train(config, tmp_path / "cut")
    rows = timeless(tmp_path / "cut")
    assert rows == timeless(tmp_path / "whole") and len(rows) == 4
    assert [row["validation/best_step"] for row in rows] == [1, 2, 3, 4]
    kept = [json.loads((tmp_path / run / "best" / "validation.json").read_text()) for run in ("whole", "cut")]
    assert kept[0] == kept[1] == {"step": 4, "loss": rows[-1]["validation/loss"]}
    assert checkpoint.steps(tmp_path / "cut" / "best") == [4]


def drawn(workdir, monkeypatch):
    """The names in the legends of the training curves."""
    labels = set()
    save = curves.Figure.savefig

    def look(figure, *args, **options):
        for axis in figure.axes:
            labels.update(text.get_text() for text in axis.get_legend().get_texts())
        save(figure, *args, **options)

    monkeypatch.setattr(curves.Figure, "savefig", look)
    assert curves.training_curves(workdir).stat().st_size > 1000
    return labels


def test_validation_of_a_path(tiny, tokenizer, llava_folder, tmp_path):
    """RGLF: the router's regret on a file with pictures of its own, which the frozen model is asked about once."""
    save_random_model(tiny, tokenizer, tmp_path / "model")
    (tmp_path / "held").mkdir()
    held = write_llava(tmp_path / "held")
    config = settings(tiny, llava_folder)
    config.model, config.phase, config.init_from = defaults().model, "rglf", str(tmp_path / "model")
    config.steps, config.checkpoint_every = 4, 2
    config.data.validation, config.data.validation_images = str(held / "train.json"), str(held / "images")
    train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    measured = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in measured] == [2, 4]
    assert {"validation/regret", "validation/best_chosen", "validation/visual_tokens"} <= measured[0].keys()
    for g in tiny.granularities:  # the model is frozen
        assert measured[0][f"validation/nll/{g}"] == measured[1][f"validation/nll/{g}"]
    assert measured[0]["validation/loss"] != measured[1]["validation/loss"]
    kept, whole = (parameters.flat(checkpoint.load(tmp_path / folder).params) for folder in ("run/best", "model"))
    assert {path.split("/")[0] for path in kept if not np.array_equal(kept[path], whole[path])} == {"router"}

    config.data.validation_images = str(llava_folder)  # where they are not
    with pytest.raises(ValueError, match="none of its 24 records has an answer and an image and can be used"):
        train(config, tmp_path / "other")


def test_best_is_the_lowest_and_the_only_one(tiny, tokenizer, tmp_path):
    model = random_model(tiny, tokenizer)
    checkpoint.save_config(tmp_path, tiny)
    (tmp_path / "tokenizer").mkdir()
    with jax.set_mesh(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})):
        best = Best(tmp_path)
        assert best.offer(10, 2.0, model.params) and not best.offer(20, 2.0, model.params)
        assert not best.offer(30, float("nan"), model.params) and best.offer(5, 1.0, model.params)
    assert checkpoint.steps(tmp_path / "best") == [5]
    (tmp_path / "best" / "checkpoints" / "7" / "params").mkdir(parents=True)  # killed before it was noted
    best = Best(tmp_path, (1.0, 5))
    assert (best.step, best.loss, checkpoint.steps(tmp_path / "best")) == (5, 1.0, [5])


def test_a_loss_that_is_not_finite_is_no_best(tmp_path):
    rows = [{"step": 1, LOSS: float("nan")}, {"step": 2, LOSS: 0.5}, {"step": 3, LOSS: 0.7}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = MetricsLog(tmp_path, 3)
    assert log.best == (0.5, 2)
    log.close()


def test_the_progress_line_keeps_the_newest_validation(tmp_path):
    with open(tmp_path / "log", "w") as file:
        progress = Progress(3, file)
        for step in range(1, 4):
            row = {"step": step, "phase": "rglf", "loss": 0.5, "tokens_per_second": 10.0, "step_seconds": 2.0}
            if step == 2:
                row |= {"validation/loss": 0.25, "validation/regret": 0.0125, "validation/best_step": 1}
            progress.show(row)
        progress.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 3
    assert "validation" not in lines[0]
    for line in lines[1:]:
        assert "loss 0.5000  validation 0.2500 regret 0.0125, best at step 1  10 tokens/s" in line
