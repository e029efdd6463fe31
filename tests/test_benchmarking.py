"""A model on the eleven benchmarks: from both layouts to the table, killed and gone on with."""

import csv
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.tiles import tile_count
from avg_llava_jax.eval import benchmarking, evaluation
from avg_llava_jax.eval.benchmarks import records, scoring, table, tasks
from avg_llava_jax.inference.device import Device
from avg_llava_jax.inference.guides import Guide
from tests import benchmark_fixtures as fixtures
from tests.random_model import random_model
from tests.test_launch import ROOT, folder, run  # noqa: F401 (a fixture)

OPTIONS = {"max_new_tokens": 2, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return random_model(tiny, tokenizer)


@pytest.fixture(autouse=True)
def small_image_cache(monkeypatch):
    monkeypatch.setattr(evaluation, "IMAGE_CACHE_BYTES", 2**18)


def test_guides_of_questions_that_ask_for_a_letter(model, tmp_path):
    """Every one of AI2D's, whose options are listed, none of POPE's, and none unless asked."""
    pytest.importorskip("llguidance")

    def guides(name, guided):
        task = tasks.find(name)
        rows = records.read(task, fixtures.write_hub(tmp_path / f"{name} {guided}", name))
        questions, _ = benchmarking.questions_of(task, rows, model, "lmms_eval", guided)
        return [question.guide for question in questions]

    assert set(guides("ai2d", True)) == {Guide.choice(list("ABCD")), Guide.choice(list("AB"))}
    assert set(guides("ai2d", False)) == set(guides("pope", True)) == {None}


@pytest.mark.parametrize("name", tasks.BENCHMARKS)
def test_a_benchmark(name, model, tmp_path):
    """Every row is asked, what is reported is what launch.score says of the file, and a killed run goes on."""
    task = tasks.find(name)
    rows = records.read(task, fixtures.write_hub(tmp_path / "data", name))
    questions, skipped = benchmarking.questions_of(task, rows, model, "lmms_eval")
    assert not skipped and sorted(int(question.sample.id) for question in questions) == list(range(len(rows)))
    file = tmp_path / "answers.jsonl"
    answered = evaluation.answer_all(model, questions, file, **OPTIONS)
    weighted = benchmarking.weighted_choices(model.config, questions, answered, [0.0, 0.05, 1e6])
    for picked in weighted.values():
        evaluation.answer_mixed(model, questions, answered, picked, tmp_path / "mixed.jsonl", 2, 4)
    report = benchmarking.report(task, model.config, rows, answered, weighted=weighted)

    for key in ("metrics", "score", "interval", "visual_tokens", "token_cut", "chosen"):
        assert report[key]["cost weight 0"] == report[key]["adaptive"]
        assert report[key]["cost weight 1e+06"] == report[key]["fixed"]["4"]
    score = scoring.score(task, rows, scoring.read_answers(file, len(rows)))
    assert report["metrics"]["adaptive"] == score["metrics"]
    low, high = report["interval"]["adaptive"]
    assert low <= report["score"]["adaptive"] <= high
    assert report["score"]["oracle"] >= max(report["score"]["fixed"].values()) - 1e-9
    tokens = report["visual_tokens"]
    assert tokens["fixed"]["4"] <= tokens["adaptive"] <= tokens["fixed"]["16"]
    assert report["token_cut"]["fixed"]["16"] == 0 and report["token_cut"]["oracle"] > 0

    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:1]) + lines[1][:20], encoding="utf-8")
    again = evaluation.answer_all(model, questions, file, **OPTIONS)
    for picked in weighted.values():
        evaluation.answer_mixed(model, questions, again, picked, tmp_path / "mixed.jsonl", 2, 4)
    assert benchmarking.report(task, model.config, rows, again, weighted=weighted) == report
    assert file.read_text(encoding="utf-8").splitlines(keepends=True)[0] == lines[0]


def test_what_cannot_be_asked_counts_as_wrong(model, tmp_path):
    """An image that is empty, missing, damaged behind its header, and a prompt that no granularity leaves room for."""
    damaged = fixtures.picture(1)[:80]
    images = (None, {"bytes": None, "path": "gone.png"}, b"no image", damaged, 0, 1)
    rows = [{"image": image, "question": f"How many {n}?", "answer": "4", "type": "human_test"}
            for n, image in enumerate(images)]  # fmt: skip
    rows[5]["question"] = "red " * 300
    rows = records.read(tasks.CHARTQA, fixtures.write_hub(tmp_path, "chartqa", rows))
    questions, skipped = benchmarking.questions_of(tasks.CHARTQA, rows, model, "lmms_eval")
    answered = evaluation.answer_all(model, questions, skipped=skipped, **OPTIONS)
    reasons = {entry["id"]: entry["reason"] for entry in skipped}
    assert reasons == {
        "0": "missing_image", "1": "missing_image", "2": "corrupt_image", "3": "corrupt_image", "5": "too_long",
    }  # fmt: skip
    answered[0]["answer"] = answered[0]["answers"][4] = "4"  # as if it were right
    answered[0]["chosen"] = [4]
    report = benchmarking.report(tasks.CHARTQA, model.config, rows, answered)
    assert (report["n"], report["answered"]) == (6, 1)
    assert report["metrics"]["adaptive"]["relaxed_overall"] == pytest.approx(1 / 6)
    assert report["metrics"]["fixed"]["16"]["relaxed_overall"] == 0
    assert report["oracle_gap"] is None  # the best fixed one is as good as the oracle


def test_images_are_encoded_once(model, tmp_path, monkeypatch):
    """Questions about one image share its encoding, and are answered as they would be alone."""
    rows = records.read(tasks.POPE, fixtures.write_hub(tmp_path, "pope"))
    questions, _ = benchmarking.questions_of(tasks.POPE, rows, model, "lmms_eval")
    names = [question.sample.images[0].name for question in questions]
    assert names == sorted(names, key=names.index) and len(set(names)) == 2
    encoded = []
    original = Device.encode
    monkeypatch.setattr(Device, "encode", lambda *of: encoded.append(len(of[2])) or original(*of))
    together = evaluation.answer_all(model, questions[:3], max_new_tokens=4, batch_size=4, progress=False)
    assert encoded == [tile_count(questions[0].sample.sizes[0], model.config)]
    alone = [
        evaluation.answer_all(model, [question], max_new_tokens=4, progress=False)[0] for question in questions[:3]
    ]
    for one, other in zip(together, alone, strict=True):
        assert (one["answers"], one["chosen"]) == (other["answers"], other["chosen"])


def test_figures():
    """Scores of three questions with two granularities, worked out by hand."""
    config = ModelConfig()
    g, h = config.granularities[0], config.granularities[-1]
    rows = [records.Row("", {"answer": "yes", "question": "", "imageId": ""}, {}) for _ in range(4)]
    said = ((True, True, g), (False, True, h), (False, True, g))
    answered = [
        {
            "id": str(n), "index": n, "kind": "GQA", "chosen": [chosen],
            "answers": {x: "yes" if (cheap if x < h else fine) else "no" for x in config.granularities},
            "answer": "yes" if (cheap if chosen < h else fine) else "no",
            "right": {}, "visual_tokens": {x: 2 * x for x in config.granularities},
            "adaptive": {"right": None, "visual_tokens": 2 * chosen},
        }
        for n, (cheap, fine, chosen) in enumerate(said)
    ]  # fmt: skip
    report = benchmarking.report(tasks.GQA, config, rows, answered)
    assert report["score"]["fixed"] == {"36": 25.0, "72": 25.0, "144": 25.0, "288": 25.0, "576": 75.0}
    assert report["score"]["adaptive"] == 50.0 and report["score"]["oracle"] == 75.0
    assert report["visual_tokens"]["adaptive"] == 2 * (36 + 576 + 36) / 3
    assert report["visual_tokens"]["oracle"] == 2 * (36 + 576 + 576) / 3
    assert report["token_cut"]["adaptive"] == pytest.approx(1 - (36 + 576 + 36) / 3 / 576)
    assert report["oracle_gap"] is None
    lines = table.table([report, report | {"title": "MME", "full": 2000.0}])
    shown = dict(zip(lines[0], lines[-1], strict=True))
    assert shown["task"] == "mean" and shown["n"] == "8" and shown["unanswered"] == "2"
    assert shown["router"] == "26.2"  # 50 of 100 and 50 of 2000
    assert shown["seconds"] == "" and shown["AVG-LLaVA-7B"] == "33.1"

    other = benchmarking.report(dataclasses.replace(tasks.GQA, paper=None), config, rows, answered)
    assert other["score"] == report["score"] and set(other["paper"].values()) == {None}
    lines = table.table([report, other])
    shown = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert [one["router"] for one in shown] == ["50.0", "50.0", "50.0"]
    assert [one["LLaVA-NeXT-7B"] for one in shown] == ["64.2", "", ""]
    assert [one["its speed-up"] for one in shown] == ["1.14", "", ""]


def test_seconds(model, tmp_path):
    """Only questions that fit at every granularity are timed, so that the same ones are compared."""
    rows = records.read(tasks.POPE, fixtures.write_hub(tmp_path, "pope"))
    questions, _ = benchmarking.questions_of(tasks.POPE, rows, model, "lmms_eval")
    answered = [{"id": question.sample.id, "answers": {4: "a", 16: None}} for question in questions]
    assert benchmarking.seconds(model, questions, answered, 2, 2) is None
    answered[0]["answers"][16] = "b"
    seconds = benchmarking.seconds(model, questions, answered, 2, 2)
    assert set(seconds["fixed"]) == {"4", "8", "16"} and seconds["adaptive"] > 0
    assert benchmarking.seconds(model, questions, answered, 0, 2) is None


def test_the_command(folder, tmp_path):  # noqa: F811
    """Two benchmarks from a folder of data sets, one in the authors' layout; a second call answers nothing anew."""
    fixtures.write_hub(tmp_path / "data" / "ChartQA", "chartqa")
    fixtures.write_original(tmp_path / "data" / "pope", "pope")
    (tmp_path / "data" / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    flags = (f"--checkpoint={folder}", f"--workdir={out}", "--max_new_tokens=2", "--slots=4", "--timed=0")
    code, said, error = run("benchmark", *flags, f"--data={tmp_path / 'data'}", "--task=chartqa,pope")
    assert code == 0, error
    assert "| ChartQA | 3 | 0 |" in said and "| POPE | 6 | 3 |" in said and "right 0" in error
    assert "skipped: " in error and "coco_pope_adversarial.json row 1: corrupt_image: " in error
    table = list(csv.DictReader((out / "table.csv").open()))
    assert [line["task"] for line in table] == ["ChartQA", "POPE", "mean"]
    assert table[0]["AVG-LLaVA-7B"] == "66.3" and table[2]["unanswered"] == "3"
    assert (out / "plots" / "choices.png").is_file()
    assert (out / "pope" / "plots" / "accuracy_against_tokens.png").is_file()
    report = json.loads((out / "pope" / "report.json").read_text())
    assert report["n"] == 6 and {"cost weight 0.1", "cost weight 0.4", "cost weight 1.6"} < set(report["score"])
    assert len((out / "pope" / "skipped.jsonl").read_text().splitlines()) == 3

    answers = (out / "pope" / "answers.jsonl").read_bytes()
    code, _, error = run("benchmark", *flags, f"--data={tmp_path / 'data' / 'pope'}", "--task=pope")
    assert code == 0, error
    assert (out / "pope" / "answers.jsonl").read_bytes() == answers
    code, _, error = run("benchmark", *flags, f"--data={tmp_path / 'data'}", "--task=gqa,pope")
    assert code == 2 and error.startswith("error: ") and "has no folder for gqa: name it gqa" in error


def start(cache, *flags):
    """`python -m launch.benchmark` on CPU devices, its output to be read. cache: a folder for what is compiled."""
    command = [sys.executable, "-m", "launch.benchmark", *flags]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_two(cache, *flags):
    """Two processes that share the questions."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        both = (*flags, f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2", "--heartbeat=10")
    return [start(cache, *both, f"--process={process}") for process in range(2)]


def kill_after(process, file, lines):
    """SIGKILL once a file has so many lines."""
    while not file.is_file() or file.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_and_gone_on_with_by_two_processes(model, folder, tmp_path):  # noqa: F811
    """One process is killed, then one of two; then two finish, with the answers of a run that nobody disturbed."""
    rows = [
        {"id": str(n), "question_id": str(n), "image": n // 4 % 4, "category": "random", "answer": "yes",
         "question": f"Is there a cup of {n} in the image?"}
        for n in range(60)
    ]  # fmt: skip
    rows[-2]["image"] = fixtures.picture(1)[:80]  # only the second process finds out
    fixtures.write_hub(tmp_path / "data", "pope", rows)
    out = tmp_path / "out" / "pope"
    flags = (tmp_path / "cache", f"--checkpoint={folder}", f"--workdir={out.parent}", f"--data={tmp_path / 'data'}",
             "--task=pope", "--max_new_tokens=4", "--slots=4", "--timed=0")  # fmt: skip
    kill_after(start(*flags), out / "answers.jsonl", 3)
    early = (out / "answers.jsonl").read_bytes().splitlines()[:3]

    first, second = start_two(*flags)
    kill_after(second, out / "answers.1.jsonl", 2)
    output, _ = first.communicate()
    assert first.returncode in (75, -signal.SIGABRT), output  # ours, or that of the runtime which noticed first
    done = sum(len((out / name).read_bytes().splitlines()) for name in ("answers.jsonl", "answers.0.jsonl"))
    assert done < 59

    pair = start_two(*flags)
    outputs = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "| POPE | 60 | 1 |" in outputs[0] and "POPE" not in outputs[1]
    assert sorted(path.name for path in out.glob("answers*")) == ["answers.jsonl"]
    assert (out / "answers.jsonl").read_bytes().splitlines()[:3] == early

    read = records.read(tasks.POPE, tmp_path / "data")
    questions, _ = benchmarking.questions_of(tasks.POPE, read, model, "lmms_eval")
    expected = evaluation.answer_all(model, questions, skipped=[], **OPTIONS | {"max_new_tokens": 4})
    found = evaluation.read_records(out / "answers.jsonl")
    assert len(found) == 59
    for record in expected:
        assert [found[record["id"]][key] for key in ("answers", "chosen")] == [record["answers"], record["chosen"]]
    report = json.loads((out / "report.json").read_text())
    assert (report["n"], report["answered"]) == (60, 59)
