"""The loop and its phases: what learns, what is logged, and that a run that was stopped goes on as before."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.config import ModelConfig, to_dict
from avg_llava_jax.configs import jersey
from avg_llava_jax.data import pipeline
from avg_llava_jax.data.pipeline import PlannedBatches
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.models import avg_llava, one_cpu
from avg_llava_jax.training import loop, losses, phases, rglf
from avg_llava_jax.training.config import OptimizerConfig, RglfConfig, defaults
from avg_llava_jax.training.loop import TERMINATED, train, train_together
from avg_llava_jax.training.metrics import MetricsLog, Progress, read_rows
from avg_llava_jax.training.optimizer import gradients, make_optimizer, trainable
from tests.conftest import TOKENIZER

ROOT = Path(__file__).parents[1]


def settings(tiny: ModelConfig, folder: Path) -> ConfigDict:
    config = defaults()
    config.model = ConfigDict(to_dict(tiny))
    config.tokenizer = str(TOKENIZER)
    config.data.path, config.data.images, config.data.shapes = str(folder / "train.json"), str(folder / "images"), 1
    config.steps, config.batch_size, config.checkpoint_every = 12, 4, 10
    config.optimizer.update({"learning_rate": 2e-2, "encoder_learning_rate": 0.0, "warmup": 0.1})
    return config


@pytest.fixture(scope="module")
def batch(tokenizer, tiny, tmp_path_factory):
    """Rows: text alone, one image, two images, and text without an answer."""
    folder = tmp_path_factory.mktemp("data")
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (30, 20), colour).save(folder / f"{name}.png")

    def record(name, question, answer, *images):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "images": list(images), "conversations": turns}

    records = [
        record("text", "Hi?", "No."),
        record("one", "<image>\nWho?", "red", "a.png"),
        record("two", "<image> or <image>?", "the blue 7", "a.png", "b.png"),
    ]
    (folder / "a.json").write_text(json.dumps(records))
    source = PlannedBatches(
        open_sources(str(folder / "a.json"), str(folder)), tokenizer, tiny, tiny.granularities, batch_size=4, shapes=1
    )
    batches = (source[number] for number in range(99))
    wanted = [f"{folder / 'a.json'}#{number}" for number in range(3)]  # text, one, two
    found = next(found for found in batches if set(wanted) <= set(found["records"]))
    rows = [found["records"].index(record) for record in wanted]
    arrays = {key: value for key, value in found.items() if key not in ("records", "skipped")}
    taken = jax.tree.map(lambda x: x[np.array([*rows, rows[0]])].copy(), arrays)
    for g in tiny.granularities:
        taken["target_at"][g][3] = -1
    return taken


def test_train_then_route(tiny, llava_folder, tmp_path):
    """Both phases, from fresh parameters: the loss falls, and only what a phase trains changes."""
    config, one = settings(tiny, llava_folder), tmp_path / "one"
    train(config, one)
    rows = read_rows(one / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert np.mean([row["loss"] for row in rows[-3:]]) < 0.8 * rows[0]["loss"]
    wanted = {
        "phase",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "step_seconds",
        "nll/4",
        "nll/8",
        "nll/16",
    }
    assert wanted <= rows[0].keys()
    assert rows[0]["learning_rate"] == 0 and rows[1]["learning_rate"] == pytest.approx(2e-2)
    assert list((one / "tensorboard").iterdir())
    assert (one / "plots" / "training.png").stat().st_size > 1000
    assert json.loads((one / "config.json").read_text())["granularities_trained"] == [4, 8, 16]

    fresh = parameters.flat(jax.jit(lambda: avg_llava.init(tiny, jax.random.key(0)))())
    loaded = checkpoint.load(one)
    assert loaded.config == tiny
    assert changed(fresh, loaded.params) == {"connector", "language"}  # the encoder's rate is 0

    config.phase, config.init_from, config.steps = "rglf", str(one), 3
    config.model = defaults().model
    two = tmp_path / "two"
    train(config, two)
    row = read_rows(two / "metrics.jsonl")[-1]
    assert {"rank_loss", "ce_loss", "best_chosen", "regret", "visual_tokens", "chosen/4", "nll/16"} <= row.keys()
    assert 0 < row["visual_tokens"] < 200
    routed = checkpoint.load(two)
    assert changed(parameters.flat(loaded.params), routed.params) == {"router"}
    assert routed.config == tiny and routed.meta["granularities_trained"] == [4, 8, 16]

    train(config, two)  # already at its end: nothing happens
    with pytest.raises(ValueError, match="holds phase rglf: give phase connector a workdir of its own"):
        config.phase = "connector"
        train(config, two)


def test_what_is_frozen_is_held_in_the_compute_dtype(tiny, llava_folder, tmp_path):
    """From fp32 parameters, through a checkpoint and on: what learns stays fp32, the rest is rounded once."""
    config = settings(tiny, llava_folder)
    config.phase, config.compute_dtype, config.steps = "rglf", "bfloat16", 1
    train(config, tmp_path)
    config.steps = 2
    train(config, tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2]
    fresh = parameters.flat(jax.jit(lambda: avg_llava.init(tiny, jax.random.key(0)))())
    for path, leaf in parameters.flat(checkpoint.load(tmp_path).params).items():
        learns = parameters.TABLE[path].component == "router"
        assert leaf.dtype == (jnp.float32 if learns else jnp.bfloat16), path
        assert learns or np.array_equal(leaf, fresh[path].astype(jnp.bfloat16)), path


def changed(before: dict, after: parameters.Params) -> set[str]:
    """The components of which a parameter is not what it was."""
    leaves, rows = parameters.flat(after), parameters.describe(after)
    return {rows[path].component for path in leaves if not np.array_equal(before[path], leaves[path])}


def test_feedback_ignores_text_and_the_two_executions_agree(tiny, params, batch):
    def loss(execution):
        feedback = RglfConfig(execution=execution)
        return jax.jit(lambda p, b: rglf.batch_loss(tiny, p, b, None, feedback))

    per_length = loss("per_length")
    value, (count, metrics) = per_length(params, batch)
    assert count == 3  # one image, and two; the rows with text alone, and with no answer, have none
    other, (_, others) = loss("vmap")(params, batch)
    np.testing.assert_allclose(value, other, rtol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5, atol=1e-5, err_msg=name)

    changed_text = {**batch, "text": batch["text"].copy(), "targets": batch["targets"].copy()}
    changed_text["text"][[0, 3]] += 7
    changed_text["targets"][[0, 3]] += 7
    np.testing.assert_array_equal(per_length(params, changed_text)[0], value)

    nothing = jax.tree.map(lambda x: np.repeat(x[:1], 4, axis=0), batch)
    value, (count, metrics) = per_length(params, nothing)
    assert value == 0 and count == 0
    assert all(np.isfinite(x) for x in metrics.values())


def test_visual_tokens_are_those_of_the_choice(tiny, params, batch):
    """With all scores equal the router takes the first, which is the coarsest."""
    blank = {**params, "router": jax.tree.map(jnp.zeros_like, params["router"])}
    loss = jax.jit(lambda params, batch: rglf.batch_loss(tiny, params, batch, None, RglfConfig()))
    _, (_, metrics) = loss(blank, batch)
    assert metrics["chosen/4"] == 1
    assert metrics["visual_tokens"] == pytest.approx(batch["visual"][1:3, :, 0].sum() / 3)


def test_a_step_is_compiled_for_each_batch_shape(tiny, llava_folder, tmp_path, monkeypatch, capsys):
    """Compiling would not pay over so few steps: see `pipeline.saving`."""
    monkeypatch.setattr(pipeline, "COMPILE_STEPS", 0)
    config = settings(tiny, llava_folder)
    config.data.shapes = 3
    train(config, tmp_path)
    said = capsys.readouterr().err
    assert "compiling batch shape 1 of 3" in said and "compiling batch shape 2 of 3" in said
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13)) and rows[-1]["loss"] < rows[0]["loss"]


def test_accumulation_gives_the_gradients_of_the_whole_batch(tiny, params, batch, monkeypatch):
    """Four rows at once, two at a time as one CPU takes them, and one at a time."""
    loss = phases.make_loss("connector", tiny, (4,), RglfConfig(), remat="full")
    trained, frozen = parameters.split(params, ("connector",))
    turns = []

    def of_trained(trained, batch, rng):
        turns.append(len(rng))
        return loss(parameters.merge(trained, frozen), batch, rng)

    def by(rows, accumulate):
        monkeypatch.setattr(one_cpu, "TRAINING_ROWS", rows)
        turns.clear()
        step = jax.jit(lambda trained, batch: gradients(of_trained, trained, batch, jax.random.key(0), accumulate))
        found = step(trained, batch)
        assert set(turns) == {min(rows, 4 // accumulate)}
        return found

    whole = by(4, 1)
    for parts in (by(2, 1), by(4, 2), by(2, 4)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), whole, parts)


def test_accumulation_where_truncation_leaves_unequal_answers(tiny, params, batch, monkeypatch):
    """At the finest granularity an answer lost all but one of its tokens; without totals the loss would be another."""
    monkeypatch.setattr(one_cpu, "TRAINING_ROWS", 4)
    cut = np.flatnonzero(batch["target_at"][16][2] >= 0)[1:]
    assert len(cut) > 1
    targets = {g: each.copy() for g, each in batch["target_at"].items()}
    targets[16][2, cut] = -1
    short = batch | {"target_at": targets}
    loss = phases.make_loss("multi_granularity", tiny, tiny.granularities, RglfConfig(), remat="none")

    def found(batch, accumulate):
        return jax.jit(lambda p, b: gradients(loss, p, b, jax.random.key(0), accumulate))(params, batch)

    whole, plain = found(short, 1), found(short, 4)
    assert abs(whole[1] - plain[1]) > 1e-3
    for given, accumulate in ((losses.with_totals(short, tiny.granularities), parts) for parts in (1, 2, 4)):
        one = found(given, accumulate)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, one)


@pytest.mark.parametrize("stage", ["grounding", "reading", "roster", "finest", "full", "router"])
def test_every_stage_of_the_shipped_model_trains(stage, tmp_path):
    """With the rows of a batch that one CPU splits; a batch of grounding holds arrays without elements."""
    config = jersey.get_config(stage)
    config.steps, config.checkpoint_every, config.batch_size, config.data.shapes = 1, 1, 2 * one_cpu.TRAINING_ROWS, 1
    config.data.workers, config.init_from = 0, config.init_from if stage == "router" else ""
    config.data.path = config.data.path.split("&size=")[0] + "&size=64"
    train(config, tmp_path)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert np.isfinite(row["loss"]) and row["grad_norm"] > 0


def test_one_cpu_takes_few_rows_at_a_time():
    assert [one_cpu.part_count(rows, 2) for rows in (1, 2, 5, 6, 16)] == [1, 1, 5, 3, 8]
    rows, seen = {"x": np.arange(6.0)[:, None]}, []

    def double(batch):
        seen.append(batch["x"].shape)
        return 2 * batch["x"], batch["x"][:, 0]

    doubled, same = jax.jit(lambda rows: one_cpu.by_parts(double, rows, 4))(rows)
    np.testing.assert_array_equal(doubled, 2 * rows["x"])
    np.testing.assert_array_equal(same, rows["x"][:, 0])
    assert set(seen) == {(3, 1)}


def test_runs_together_are_the_runs_alone(tiny, llava_folder, tmp_path, capsys):
    config = settings(tiny, llava_folder)
    config.phase, config.granularities, config.steps = "connector", (4,), 3
    other = config.copy_and_resolve_references()
    other.seed = 1
    alone = {"one": config, "two": other}
    for name, each in alone.items():
        train(each, tmp_path / "alone" / name)
    capsys.readouterr()
    handler = signal.getsignal(signal.SIGTERM)
    train_together({tmp_path / "together" / name: each for name, each in alone.items()})
    assert signal.getsignal(signal.SIGTERM) is handler
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(": ")[0] for line in lines if "connector 3/3" in line} == {"one", "two"}
    for name in alone:
        first, second = (
            [row["loss"] for row in read_rows(tmp_path / where / name / "metrics.jsonl")]
            for where in ("alone", "together")
        )
        assert len(first) == 3 and first == second
    losses = {read_rows(tmp_path / "alone" / name / "metrics.jsonl")[0]["loss"] for name in alone}
    assert len(losses) == 2


@pytest.mark.parametrize("end", ["error", "interrupt"])
def test_a_run_that_fails_ends_those_beside_it(tiny, llava_folder, tmp_path, monkeypatch, end):
    """The others save a checkpoint, and the error comes through."""
    config = settings(tiny, llava_folder)
    config.phase, config.granularities, config.steps = "connector", (4,), 5000
    bad = config.copy_and_resolve_references()
    bad.optimizer.update({"learning_rate": 1e38, "warmup": 0.0})
    runs = {tmp_path / "good": config}
    if end == "error":
        runs[tmp_path / "bad"] = bad

    def interrupted(threads, return_when):
        while not read_rows(tmp_path / "good" / "metrics.jsonl"):
            time.sleep(0.01)
        raise KeyboardInterrupt

    if end == "interrupt":
        monkeypatch.setattr(loop, "wait", interrupted)
    with pytest.raises(FloatingPointError if end == "error" else KeyboardInterrupt):
        train_together(runs)
    (saved,) = checkpoint.steps(tmp_path / "good")[-1:]
    assert 0 < saved < 5000


def test_optimizer_knows_components_and_matrices(tiny, params):
    config = OptimizerConfig(learning_rate=1e-2, encoder_learning_rate=1e-3, warmup=0.0, weight_decay=0.1, clip=1e9)
    assert trainable("multi_granularity", config) == ("encoder", "connector", "language")
    still = dataclasses.replace(config, connector_learning_rate=0.0)
    assert trainable("multi_granularity", still) == ("encoder", "language")
    with pytest.raises(ValueError, match="would train nothing"):
        trainable("connector", still)
    optimizer = make_optimizer(dataclasses.replace(config, connector_learning_rate=2e-2), steps=10)
    trained, _ = parameters.split(params, trainable("multi_granularity", config))
    zeros = jax.tree.map(jnp.zeros_like, trained)
    decay, _ = jax.jit(optimizer.update)(zeros, optimizer.init(trained), trained)
    np.testing.assert_allclose(
        decay["connector"]["up"]["kernel"], -2e-3 * trained["connector"]["up"]["kernel"], rtol=1e-5
    )
    np.testing.assert_allclose(
        decay["encoder"]["layers"]["q"]["kernel"], -1e-4 * trained["encoder"]["layers"]["q"]["kernel"], rtol=1e-5
    )
    np.testing.assert_allclose(
        decay["language"]["layers"]["q"]["kernel"], -1e-3 * trained["language"]["layers"]["q"]["kernel"], rtol=1e-5
    )
    for vector in (
        decay["connector"]["up"]["bias"],
        decay["encoder"]["layers"]["norm1"]["scale"],
        decay["image_newline"],
    ):
        np.testing.assert_array_equal(vector, 0)
    clipped = make_optimizer(OptimizerConfig(1e-2, 1e-2, clip=1.0), steps=10)
    state = clipped.init(trained)
    _, state = jax.jit(clipped.update)(jax.tree.map(lambda x: x + 5.0, zeros), state, trained)
    moments = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    assert optax.global_norm(moments.mu) == pytest.approx(0.1, rel=1e-4)  # (1 - b1) x 1


def test_a_loss_that_is_not_finite_stops_the_run(tiny, llava_folder, tmp_path):
    config = settings(tiny, llava_folder)
    config.phase, config.granularities = "connector", (4,)
    config.optimizer.update({"learning_rate": 1e38, "warmup": 0.0})
    with pytest.raises(FloatingPointError, match=r"at step [23]; its samples are .*train.json#\d+, .*train.json#"):
        train(config, tmp_path / "run")
    assert not checkpoint.steps(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("phase", "third", "phase 'third' is not known"),
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate=nan must be finite"),
        ("optimizer.encoder_learning_rate", -1.0, "encoder_learning_rate=-1.0 must be finite, and a rate at least 0"),
        ("compute_dtype", "int8", "compute_dtype='int8'"),
        ("granularities", (5,), r"granularities=\(5,\): this model has \(4, 8, 16\)"),
        ("init_from", "nowhere", "nowhere does not exist"),
        ("tokenizer", "", "init_from is not set"),
    ],
)
def test_settings_that_make_no_sense(tiny, llava_folder, tmp_path, name, value, message):
    config = settings(tiny, llava_folder)
    config.update_from_flattened_dict({name: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(config, tmp_path / "run")


@pytest.mark.parametrize("records", [[{"id": 1, "foo": 2}], [1, 2]], ids=["no turns", "no records"])
def test_data_without_a_usable_record_train_nothing(tiny, llava_folder, tmp_path, records):
    (llava_folder / "train.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"train.json: none of the records can be used, the first for \w+: "):
        train(settings(tiny, llava_folder), tmp_path)
    assert not checkpoint.steps(tmp_path)


@pytest.fixture
def interruptible():
    """Ctrl+C interrupts, also where these tests are a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_again_ends_at_once(interruptible, capsys):
    with loop.Termination() as termination:
        os.kill(os.getpid(), signal.SIGINT)
        assert (termination.asked, termination.code) == (True, 130)
        assert "Ctrl+C again ends at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with loop.Termination() as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (termination.asked, termination.code) == (True, TERMINATED)


def test_metrics_after_a_checkpoint_are_dropped_on_resume(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    MetricsLog(tmp_path, 2).close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_rows_end_only_where_a_line_does(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"id": "a\u2028b\u0085c"}\n{"id": "é'.encode()[:-1])  # killed inside a character
    assert read_rows(path) == [{"id": "a\u2028b\u0085c"}]


def test_progress_reads_well_in_a_file(tmp_path):
    with open(tmp_path / "log", "w") as file:
        progress = Progress(100, file)
        for step in range(1, 101):
            row = {"step": step, "phase": "rglf", "loss": 0.5, "tokens_per_second": 10.0, "step_seconds": 2.0}
            progress.show(row | {"best_chosen": 0.25})
        progress.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "rglf 1/100  loss 0.5000  best 0.25  10 tokens/s  2.00 s/step  ETA 0:03:18"
    assert len(lines) == 2 and lines[-1].endswith("ETA 0:00:00")


STEPS, EVERY = 24, 6
WITHOUT_TORCH = os.pathsep.join((str(ROOT / "tests" / "without_torch"), str(ROOT)))
"""PYTHONPATH of processes that train: half of their start would be the import of PyTorch."""


def start(workdir: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.train", "--config=configs/jersey.py:tiny", f"--workdir={workdir}"]
    command += [f"--config.steps={STEPS}", f"--config.checkpoint_every={EVERY}", "--config.granularities=(4,)"]
    command += ["--config.batch_size=4"]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": WITHOUT_TORCH,
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Until a step is logged; a run that is over is an error."""
    while not any(row["step"] >= step for row in read_rows(workdir / "metrics.jsonl")):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def test_a_run_that_is_stopped_goes_on_to_the_same_losses(tmp_path):
    """SIGTERM, then SIGKILL, against a run that nobody stopped; and a second process in the same workdir."""
    cache, whole, stopped = (tmp_path / name for name in ("cache", "whole", "stopped"))
    process = start(whole, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output

    process = start(stopped, cache)
    wait_for(process, stopped, 1)
    second = start(stopped, cache)
    process.send_signal(signal.SIGSTOP)  # so that the first is still there when the second comes
    output, _ = second.communicate()
    assert second.returncode == 2 and f"is in use by process {process.pid}" in output
    process.send_signal(signal.SIGCONT)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == TERMINATED == 143, output
    (saved,) = checkpoint.steps(stopped)[-1:]
    assert saved % EVERY or saved < STEPS
    assert f"step {saved} is saved" in output

    process = start(stopped, cache)
    wait_for(process, stopped, saved + EVERY + 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    process = start(stopped, cache)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    timeless = [
        [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second")} for row in rows]
        for rows in (read_rows(whole / "metrics.jsonl"), read_rows(stopped / "metrics.jsonl"))
    ]
    assert len(timeless[0]) == STEPS
    assert timeless[0] == timeless[1]
    assert checkpoint.steps(stopped)[-1] == STEPS
