"""Evaluation on a random model: the answers are the model's own, the figures follow from them."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.data.images import image_ref
from avg_llava_jax.data.jersey import Jersey
from avg_llava_jax.data.sources import open_source
from avg_llava_jax.eval import evaluation, plots, policies, routing, timing
from avg_llava_jax.files import lock
from avg_llava_jax.inference.device import Device
from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.requests import Request
from tests.random_model import random_model

OPTIONS = {"max_new_tokens": 4, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return random_model(tiny, tokenizer)


@pytest.fixture(scope="module")
def questions(model):
    source = Jersey("test", 24, paired=True)
    questions, skipped = evaluation.read_questions(source, model.tokenizer, model.config)
    assert len(questions) == 24 and not skipped
    return questions


@pytest.fixture(scope="module")
def records(model, questions, tmp_path_factory):
    return evaluation.answer_all(model, questions, tmp_path_factory.mktemp("records") / "answers.jsonl", **OPTIONS)


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (["a", "a", "a"], ["a", "a#2", "a#3"]),
        (["a", "a", "a#2", "a"], ["a", "a#2", "a#2#2", "a#3"]),  # `a#2` is a record's own id
        (["a#2", "a", "a"], ["a#2", "a", "a#3"]),
    ],
)
def test_every_question_has_an_id_of_its_own(tiny, tokenizer, ids, wanted):
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann"}]
    source = [{"id": name, "images": [], "conversations": turns} for name in ids]
    questions, _ = evaluation.read_questions(source, tokenizer, tiny)
    assert [question.sample.id for question in questions] == wanted


def test_answers_are_the_models_own(model, questions, records):
    for question, record in list(zip(questions, records, strict=True))[::11]:
        assert record["id"] == question.sample.id and record["kind"] == question.sample.kind
        (image,) = question.sample.images
        auto = model.answer(image, question.text, max_new_tokens=4)
        assert record["chosen"] == [auto.granularity]
        said = {"answer": auto.text, "right": False, "visual_tokens": auto.visual_tokens}
        assert record["adaptive"] == said | {"certainty": pytest.approx(auto.certainty, abs=1e-4)}
        np.testing.assert_allclose(record["probabilities"][0], list(auto.probabilities.values()), atol=1e-4)
        for g in model.config.granularities:
            fixed = model.answer(image, question.text, granularity=g, max_new_tokens=4)
            assert (record["answers"][g], record["visual_tokens"][g]) == (fixed.text, fixed.visual_tokens)
            assert record["certainty"][g] == pytest.approx(fixed.certainty, abs=1e-4)


def test_an_interrupted_run_goes_on(model, questions, records, tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    limit = OPTIONS["max_new_tokens"]
    lines = [
        json.dumps(record | {"made_by": evaluation.made_by(model, question, limit)})
        for record, question in zip(records[:20], questions[:20], strict=True)
    ]
    file.write_text("\n".join(lines) + '\n{"id": "cut of')
    answered = []
    original = evaluation._Asked
    monkeypatch.setattr(
        evaluation, "_Asked", lambda engine, asked, *rest: answered.append(asked) or original(engine, asked, *rest)
    )
    again = evaluation.answer_all(model, questions, file, **OPTIONS)
    assert {question.sample.id for question in answered} == {question.sample.id for question in questions[20:]}
    assert [record["answers"] for record in again] == [record["answers"] for record in records]
    assert len(file.read_text().splitlines()) == 24
    file.write_text("nonsense\n")
    with pytest.raises(ValueError, match="is not a file of answers"):
        evaluation.answer_all(model, questions, file, **OPTIONS)


def test_one_process_at_a_time_appends_to_a_file(model, questions, tmp_path):
    file = tmp_path / "answers.jsonl"
    held = lock(tmp_path / ".answers.jsonl.lock", file)
    with pytest.raises(RuntimeError, match=f"{file} is in use by process {os.getpid()}: wait for it or use another"):
        evaluation.answer_all(model, questions, file, **OPTIONS)
    os.close(held)
    assert len(evaluation.answer_all(model, questions[:2], file, **OPTIONS)) == 2


def test_mixed_questions(model, llava_folder):
    """Text alone, one image and two, and an image that is damaged behind its header."""
    broken = llava_folder / "images" / "1-0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source = open_source(str(llava_folder / "train.json"), str(llava_folder / "images"))
    questions, skipped = evaluation.read_questions(source, model.tokenizer, model.config)
    records = evaluation.answer_all(model, questions, skipped=skipped, **OPTIONS)
    assert [entry["reason"] for entry in skipped] == ["corrupt_image"]
    assert len(records) == 23
    by_id = {record["id"]: record for record in records}
    assert by_id["r0"]["chosen"] == [] and by_id["r0"]["visual_tokens"] == {4: 0, 8: 0, 16: 0}
    assert len(set(by_id["r0"]["answers"].values())) == 1
    two = next(question for question in questions if question.sample.id == "r2")
    answer = model.answer(two.sample.images, two.text, max_new_tokens=4)
    assert by_id["r2"]["chosen"] == list(answer.granularity)
    assert by_id["r2"]["adaptive"]["answer"] == answer.text
    report = policies.report(model.config, records)
    assert report["n"] == 23 and set(report["accuracy"]["adaptive"]) == {"colour", "all"}
    scores = routing.route_all(model, [question.sample for question in questions if question.sample.id in by_id], 8)
    assert policies.choices(model.config, scores) == [tuple(record["chosen"]) for record in records]


def test_a_prompt_that_does_not_fit_is_wrong_at_that_granularity(model):
    image = image_ref(Image.new("RGB", (30, 30)))
    turns = [{"from": "human", "value": "<image>\n" + "red " * 180}, {"from": "gpt", "value": "yes"}]
    record = {"id": "a", "images": [image], "conversations": turns}
    question = evaluation.make_question(record, model.tokenizer, model.config.template)
    (record,) = evaluation.answer_all(model, [question], **OPTIONS)
    assert record["answers"][16] is None and record["answers"][4] is not None
    assert record["right"][16] is False


@pytest.fixture(scope="module")
def alike(model, tmp_path_factory):
    """Prompts that begin alike, and some that nearly do: of one image and of two, one too long for the finest."""
    folder, rng = tmp_path_factory.mktemp("alike"), np.random.default_rng(0)
    for name, size in {"a": (30, 30), "b": (30, 30), "wide": (32, 16)}.items():
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(folder / f"{name}.png")
    image = "<image>\n"
    asked = [
        ("a", image + "What is it?"),
        ("b", image + "What is it?"),
        ("wide", image + "What is it?"),
        ("a", image + "Is it red or green, and how large is it?"),
        ("b", image + "Where?"),
        ("a b", image * 2 + "What is it?"),
        ("b a", image * 2 + "What is it?"),
        ("a", "Look here: " + image + "What is it?"),
        ("a", image + "red " * 180),
        ("wide", image + "Is it red?"),
        ("a b", image * 2 + "Which is larger?"),
        ("a b", image + "Is this larger than" + image + "?"),
        ("a", image + "Where is it?"),
        ("b", image + "How many?"),
        ("a b", image * 2 + "Is it red or green, and how large is it?"),
    ]
    questions = []
    for at, (names, prompt) in enumerate(asked):
        images = [image_ref(folder / f"{name}.png") for name in names.split()]
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": "yes"}]
        record = {"id": str(at), "images": images, "conversations": turns}
        questions.append(evaluation.make_question(record, model.tokenizer, model.config.template))
    return questions


def test_prefixes_that_questions_share_are_read_once(model, alike, monkeypatch):
    """Answers and first logits are those of prompts that are read from their start."""
    tickets, starts = [], []
    submit, prefill = Engine.submit_prepared, Device.prefill

    def watched(engine, prepared, images=None):
        tickets.append((prepared, submit(engine, prepared, images, keep_logits=True)))
        return tickets[-1][1]

    def read(device, parts, *size):
        starts.extend(part.start for part in parts)
        return prefill(device, parts, *size)

    monkeypatch.setattr(Engine, "submit_prepared", watched)
    monkeypatch.setattr(Device, "prefill", read)
    shared = evaluation.answer_all(model, alike, **OPTIONS)
    assert sum(start > 0 for start in starts) > 10
    found = {(prepared.sample.id, prepared.choice): ticket.logits for prepared, ticket in tickets}
    tickets.clear()
    starts.clear()
    monkeypatch.setattr("avg_llava_jax.inference.scheduler.WORTH_COPYING", 10**9)
    alone = evaluation.answer_all(model, alike, **OPTIONS)
    assert not any(starts) and len(found) == len(tickets)
    for prepared, ticket in tickets:
        np.testing.assert_allclose(
            found[prepared.sample.id, prepared.choice], ticket.logits, atol=1e-3, rtol=1e-3
        )
    assert [record["answers"] for record in shared] == [record["answers"] for record in alone]
    assert [record["answer"] for record in shared] == [record["answer"] for record in alone]
    # One question about two pictures, and the same two in another order.
    assert shared[0]["answers"][4] != shared[1]["answers"][4] and shared[5]["answers"][4] != shared[6]["answers"][4]
    assert shared[8]["answers"][16] is None and shared[8]["answers"][4] is not None


def test_controls(model, questions):
    for what in ("instruction", "image"):
        mixed = routing.shuffled(questions, what)
        same = [a.images == b.sample.images for a, b in zip(mixed, questions, strict=True)]
        text = [a.tokens == b.sample.tokens for a, b in zip(mixed, questions, strict=True)]
        assert all(same if what == "instruction" else text)
        assert sorted(a.sizes for a in mixed) == sorted(b.sample.sizes for b in questions)
        assert sum(text if what == "instruction" else same) < 12
    scores = routing.route_all(model, routing.shuffled(questions, "image"), 8)
    assert len(scores) == 24 and scores[0].shape == (1, 3)
    with pytest.raises(ValueError, match="choose instruction or image"):
        routing.shuffled(questions, "text")


def record(name, kind, right, chosen):
    """A hand-made record; visual tokens are the granularity, twice."""
    return {
        "id": name,
        "kind": kind,
        "right": dict(zip((4, 8, 16), right, strict=True)),
        "answers": {4: "x", 8: "x", 16: "x"},
        "certainty": {4: 0.5, 8: 0.5, 16: 0.5},
        "visual_tokens": {4: 8, 8: 16, 16: 32},
        "images": [name],
        "scores": [[0.0, 0.0, 0.0]],
        "chosen": [chosen],
        "adaptive": {},
    }


def test_the_figures(tiny):
    records = [
        record("a", "coarse", (True, True, True), 4),
        record("b", "coarse", (True, True, False), 8),
        record("c", "fine", (False, False, True), 16),
        record("d", "fine", (False, False, False), 16),
    ]
    report = policies.report(tiny, records, {"fixed": {}, "adaptive": 1.0})
    accuracy = report["accuracy"]
    assert accuracy["fixed"]["4"] == {"coarse": 1.0, "fine": 0.0, "all": 0.5}
    assert accuracy["fixed"]["16"] == {"coarse": 0.5, "fine": 0.5, "all": 0.5}
    assert accuracy["adaptive"] == accuracy["oracle"] == {"coarse": 1.0, "fine": 0.5, "all": 0.75}
    assert report["visual_tokens"]["adaptive"] == (8 + 16 + 32 + 32) / 4
    assert report["visual_tokens"]["oracle"] == (8 + 8 + 32 + 8) / 4
    assert report["visual_tokens_by_kind"]["adaptive"] == {"coarse": 12.0, "fine": 32.0, "all": 22.0}
    assert report["chosen"]["coarse"] == {"4": 0.5, "8": 0.5, "16": 0.0}
    assert report["n_by_kind"] == {"coarse": 2, "fine": 2, "all": 4}
    assert policies.random_choices(tiny, records, 1) == policies.random_choices(tiny, records, 1)
    many = policies.random_choices(tiny, records * 100)
    assert {choice[0] for choice in many} == {4, 8, 16}
    with pytest.raises(ValueError, match="was never answered"):
        policies.outcome(tiny, records[:1], [(4, 8)])
    with pytest.raises(ValueError, match="no question"):
        policies.report(tiny, [])


def test_telling_examples(tiny, model, questions, records, tmp_path):
    found = [
        record("a", "coarse", (True, True, True), 8),
        record("b", "coarse", (0.4, 0.9, 0.6), 4),
        record("c", "fine", (False, False, True), 16),
        record("d", "fine", (False, False, False), 4),
        record("e", "coarse", (True, True, True), 4),
        record("f", "fine", (True, False, True), 16) | {"chosen": [16, 16]},
        record("g", "fine", (False, True, True), 8),
    ]
    shown = policies.examples(tiny, found, 2)
    assert shown == {"right, cheap": [4, 0], "right, fine": [2, 6], "wrong because cheap": [1]}

    def told(at: int, right: tuple[bool, ...], chosen: int) -> dict:
        adaptive = {"right": dict(zip((4, 8, 16), right, strict=True))[chosen], "visual_tokens": chosen}
        made = record(None, None, right, chosen) | {"id": questions[at].sample.id, "adaptive": adaptive}
        return records[at] | made | {"answer": "$5", "answers": {4: "$5", 8: None, 16: "x^2 & $"}}

    path = tmp_path / "plots" / "examples.png"
    assert plots.examples(tiny, questions, [told(0, (False, False, False), 4)], path) is None and not path.exists()
    several = [told(0, (True, True, True), 4), told(1, (False, False, True), 4), told(2, (False, False, True), 16)]
    assert plots.examples(tiny, questions, several, path, count=2) == path
    assert Image.open(path).size == (1056, 1440)  # three sorts, two columns


@pytest.mark.parametrize(
    "one, other", [("Seven!", "seven"), (" The  team. ", "the team"), ("«Ünï»", "ünï"), ("No. 7", "no 7")]
)
def test_normalised_answers(one, other):
    assert evaluation.normalise(one) == evaluation.normalise(other)
    assert evaluation.normalise("7") != evaluation.normalise("8")


def test_seconds(model, questions):
    seconds = timing.seconds_per_answer(model, questions, count=2, max_new_tokens=4)
    assert set(seconds["fixed"]) == {"4", "8", "16"}
    assert all(value > 0 for value in (*seconds["fixed"].values(), seconds["adaptive"]))


def test_requests_say_what_they_cannot_do():
    with pytest.raises(ValueError, match="raw=True takes the prompt as one text"):
        Request([{"from": "human", "value": "a"}], raw=True)


def test_images_that_cost_differently(model, llava_folder, tmp_path):
    """Questions about two images: what a price chooses for each is answered once, and then known."""
    source = open_source(str(llava_folder / "train.json"), str(llava_folder / "images"))
    questions, _ = evaluation.read_questions(source, model.tokenizer, model.config)
    questions = [question for question in questions if len(question.sample.sizes) == 2][:3]
    records = evaluation.answer_all(model, questions, tmp_path / "answers.jsonl", **OPTIONS)
    options = tmp_path / "mixed.jsonl", 4, 8
    wanted = [(4, 8), (8, 8), tuple(records[2]["chosen"])]
    with pytest.raises(ValueError, match="was never answered"):
        policies.outcome(model.config, records, wanted)
    evaluation.answer_mixed(model, questions, records, wanted, *options)
    (line,) = options[0].read_text().splitlines()
    answer = model.answer(questions[0].sample.images, questions[0].text, granularity=[4, 8], max_new_tokens=4)
    assert json.loads(line)["answer"] == answer.text
    tokens = answer.visual_tokens + records[1]["visual_tokens"][8] + records[2]["adaptive"]["visual_tokens"]
    assert policies.outcome(model.config, records, wanted)["visual_tokens"] == pytest.approx(tokens / 3)
    for record in records:
        record.pop("mixed", None)
    options[0].write_text(line + "\n" + '{"id": "cut o')
    evaluation.answer_mixed(None, questions[:1], records[:1], wanted[:1], *options)  # no model: nothing is answered
    assert records[0]["mixed"][4, 8]["answer"] == answer.text


def test_a_temperature_is_found_again(tiny):
    """Oracles drawn from softmax(scores / T): the fit finds T, and it says so on the other half."""
    rng = np.random.default_rng(0)
    records = []
    for _ in range(4000):
        scores = rng.normal(size=3) * 2
        shares = np.exp(scores / 2.5)
        best = rng.choice(3, p=shares / shares.sum())
        right = {g: place >= best for place, g in enumerate(tiny.granularities)}
        records.append({"scores": [scores.tolist()], "chosen": [4], "right": right})
    found = policies.temperature(tiny, records)
    assert found["temperature"] == pytest.approx(2.5, rel=0.1)
    assert found["nll"] < found["nll_at_1"] - 0.05
    scores = [np.asarray(record["scores"]) for record in records]
    for weight in (0.0, 0.3, 2.0):
        calibrated = [rows / found["temperature"] for rows in scores]
        sizes = [((32, 32),)] * len(scores)
        assert policies.weighted_choices(tiny, calibrated, sizes, weight) == policies.weighted_choices(
            tiny, scores, sizes, weight * found["temperature"]
        )
    with pytest.raises(ValueError, match="one half of the questions"):
        policies.temperature(tiny, records[:1])
