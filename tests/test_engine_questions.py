"""`evaluation.answer_all`: the same records whatever runs together, images encoded once, no request too many."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.data.images import image_ref
from avg_llava_jax.data.sources import open_source
from avg_llava_jax.eval import evaluation
from avg_llava_jax.inference import programs
from avg_llava_jax.inference.engine import Engine
from tests.conftest import write_llava
from tests.random_model import random_model

OPTIONS = {"max_new_tokens": 4, "progress": False}


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return random_model(tiny, tokenizer)


@pytest.fixture(scope="module")
def questions(model, photos, tmp_path_factory):
    """Text alone, one image and two, of different tile counts; one image damaged; one that fits but at the finest."""
    folder = write_llava(tmp_path_factory.mktemp("llava"))
    broken = folder / "images" / "1-0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source = open_source(str(folder / "train.json"), str(folder / "images"))
    records = [source[index] for index in range(12)]

    def ask(name, images, prompt):
        turns = [{"from": "human", "value": "<image>\n" * len(images) + prompt}, {"from": "gpt", "value": "yes"}]
        records.append({"id": name, "images": [image_ref(image) for image in images], "conversations": turns})

    square, red = Image.new("RGB", (30, 30)), Image.new("RGB", (40, 20), "red")
    ask("mixed", [photos[0], red], "What is it?")
    ask("long", [square], "red " * 180)
    ask("again", [square], "What is it?")
    return [evaluation.make_question(record, model.tokenizer, model.config.template) for record in records]


@pytest.fixture(scope="module")
def records(model, questions, tmp_path_factory):
    file = tmp_path_factory.mktemp("records") / "answers.jsonl"
    return evaluation.answer_all(model, questions, file, batch_size=1, skipped=[], **OPTIONS)


@pytest.fixture
def engines(monkeypatch):
    """The engines that are made, with a small cache, and how often each question was asked."""
    made, asked = [], Counter()
    original = Engine.submit_prepared

    def submit(engine, prepared, images=None):
        if engine not in made:
            made.append(engine)
        asked[prepared.sample.id] += 1
        return original(engine, prepared, images)

    monkeypatch.setattr(evaluation, "IMAGE_CACHE_BYTES", 2**18)
    monkeypatch.setattr(Engine, "submit_prepared", submit)
    return made, asked


def apart(record):
    """A record whose certainties are a list of their own."""
    adaptive = dict(record["adaptive"])
    certainties = [*record["certainty"].values(), adaptive.pop("certainty")]
    return {k: v for k, v in record.items() if k != "certainty"} | {"adaptive": adaptive, "certainties": certainties}


def same(some, others):
    """Records are equal but for the last bits of scores and certainties, and `made_by`, which stored records have."""
    rounded = ("scores", "probabilities", "certainties")
    some, others = [apart(record) for record in some], [apart(record) for record in others]
    for one, other in zip(some, others, strict=True):
        first, second = ({k: v for k, v in r.items() if k not in (*rounded, "made_by")} for r in (one, other))
        assert first == second
        for name in rounded:
            np.testing.assert_allclose(one[name], other[name], atol=1e-3, rtol=1e-3)


def test_records_are_those_of_one_answer_at_a_time(model, questions, records, engines, tmp_path):
    """All at once; then from a file that was cut off in the middle of a line."""
    (made, asked), file, skipped = engines, tmp_path / "answers.jsonl", []
    ours = evaluation.answer_all(model, questions, file, batch_size=3, skipped=skipped, **OPTIONS)
    assert [(entry["id"], entry["reason"]) for entry in skipped] == [("r1", "corrupt_image")]
    same(ours, records)
    assert any(len(set(record["chosen"])) > 1 for record in ours)
    assert ours[-2]["answers"][16] is None and ours[-2]["answers"][4] is not None

    for question, record in zip([q for q in questions if q.sample.id != "r1"], ours, strict=True):
        choices = {(g,) * len(record["chosen"]) for g, text in record["answers"].items() if text is not None}
        assert asked[question.sample.id] == len(choices | {tuple(record["chosen"])}), question.sample.id
    (engine,) = made
    images = {image.name for question in questions for image in question.sample.images} - {"1-0.png"}
    assert engine.stats().image_misses <= len(images) and engine.stats().rejected == 0

    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:9]) + lines[9][:50], encoding="utf-8")
    asked.clear()
    again = evaluation.answer_all(model, questions, file, batch_size=3, skipped=[], **OPTIONS)
    same(again, records)
    assert set(asked) == {json.loads(line)["id"] for line in lines[9:]}
    assert file.read_text(encoding="utf-8").splitlines(keepends=True)[:9] == lines[:9]


def test_what_cannot_be_asked(model, questions, engines):
    with pytest.raises(ValueError, match="corrupt_image"):
        evaluation.answer_all(model, questions, **OPTIONS)
    record = {"id": "a", "images": [], "conversations": [{"from": "human", "value": "red " * 300}]}
    record["conversations"].append({"from": "gpt", "value": "yes"})
    question, skipped = evaluation.make_question(record, model.tokenizer, model.config.template), []
    assert evaluation.answer_all(model, [question], skipped=skipped, **OPTIONS) == []
    assert skipped[0]["reason"] == "too_long"


@pytest.mark.parametrize("program", ["encode", "decode"])
def test_a_failing_device_ends_the_run(model, questions, engines, monkeypatch, program):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand many lines more")

    monkeypatch.setattr(programs, program, fail)
    with pytest.raises(RuntimeError, match="^the device failed: RESOURCE_EXHAUSTED: out of memory$"):
        evaluation.answer_all(model, questions[-1:], **OPTIONS)
