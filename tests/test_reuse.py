"""Folders with earlier results: what still holds is reused, and everything else is set aside or refused."""

import contextlib
import dataclasses
import json
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from avg_llava_jax import checkpoint, reuse, stored
from avg_llava_jax.data.feedback import FeedbackFolder, require_same_measure
from avg_llava_jax.data.sources import content_digest, open_source
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.eval import evaluation, quickstart
from avg_llava_jax.files import same_run
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.guides import Guide
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import feedback, setup
from avg_llava_jax.training.config import read
from tests.random_model import random_model, save_random_model
from tests.test_training import settings

OPTIONS = {"max_new_tokens": 2, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return random_model(tiny, tokenizer)


@pytest.fixture
def data(tmp_path):
    """Six questions about three pictures, two of them identical except for their ids."""
    rng = np.random.default_rng(0)
    for at in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / f"{at}.png")
    return [
        {
            "id": f"q{at}",
            "image": f"{at // 2}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is {at if at < 5 else 4}?"},
                {"from": "gpt", "value": f"answer {at}"},
            ],
        }
        for at in range(6)
    ]


class Folder:
    """Evaluations into one folder; `asked` holds the ids of the questions that the last one asked."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.asked = folder, []
        original = evaluation._Asked
        monkeypatch.setattr(
            evaluation,
            "_Asked",
            lambda engine, question, *rest: self.asked.append(question.sample.id) or original(engine, question, *rest),
        )

    def evaluate(self, model, data, **options):
        (self.folder / "test.json").write_text(json.dumps(data))
        source = open_source(str(self.folder / "test.json"), str(self.folder))
        questions, _ = evaluation.read_questions(source, model.tokenizer, model.config)
        self.asked.clear()
        file = self.folder / "answers.jsonl"
        records = evaluation.answer_all(model, questions, file, **OPTIONS | options)
        on_disk = [json.loads(line) for line in file.read_text().splitlines()]
        assert sorted(record["id"] for record in on_disk) == sorted(question.sample.id for question in questions)
        by_id = {record["id"]: record for record in on_disk}
        for record in records:
            assert json.loads(json.dumps(record)) == by_id[record["id"]]
        return records

    def stale(self, number):
        return [json.loads(line)["id"] for line in (self.folder / f"stale-{number}" / "answers.jsonl").open()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return Folder(tmp_path, monkeypatch)


def test_nothing_is_asked_twice(folder, model, data, capsys):
    first = folder.evaluate(model, data)
    assert len(folder.asked) == 6 and "kept" not in capsys.readouterr().err
    content = (folder.folder / "answers.jsonl").read_bytes()
    assert folder.evaluate(model, data) == first and not folder.asked
    assert (folder.folder / "answers.jsonl").read_bytes() == content
    assert "answers.jsonl: 6 answers kept from an earlier run" in capsys.readouterr().err


def other_weights(model, tokenizer):
    params = jax.tree.map(lambda x: x, model.params)
    params["language"]["norm"]["scale"] = params["language"]["norm"]["scale"] + 1e-3
    return AvgLlava(model.config, params, tokenizer)


def test_another_model_answers_for_itself(folder, model, tokenizer, data, capsys):
    folder.evaluate(model, data)
    (folder.folder / "report.json").write_text("{}")
    other = other_weights(model, tokenizer)
    records = folder.evaluate(other, data)
    assert len(folder.asked) == 6 and len(folder.stale(1)) == 6
    said = f"0 of 6 answers kept, 6 of other weights: set aside in {folder.folder}/stale-1"
    assert said in capsys.readouterr().err
    assert not (folder.folder / "report.json").exists() and (folder.folder / "stale-1" / "report.json").exists()
    fresh = evaluation.answer_all(other, _questions(folder, other), **OPTIONS)
    assert [record["answers"] for record in records] == [record["answers"] for record in fresh]


@pytest.mark.parametrize("what", ["weights", "model config", "tokenizer", "code", "max_new_tokens", "guide"])
def test_whatever_made_an_answer_counts(what, folder, model, tokenizer, data, monkeypatch, capsys, tmp_path):
    folder.evaluate(model, data)
    config, params, new_tokens = model.config, model.params, OPTIONS["max_new_tokens"]
    match what:
        case "weights":
            params = jax.tree.map(lambda x: x.astype(jax.numpy.bfloat16), params)
        case "model config":
            config = dataclasses.replace(config, language=dataclasses.replace(config.language, rope_theta=99.0))
        case "tokenizer":
            tokenizer.save(tmp_path / "tokenizer")
            with (tmp_path / "tokenizer" / "tokenizer_config.json").open("a") as file:
                file.write("\n")
            tokenizer = load_tokenizer(tmp_path / "tokenizer")
        case "code":
            monkeypatch.setattr(reuse, "code", lambda *of: "new")
        case "max_new_tokens":
            new_tokens += 1
    other = AvgLlava(config, params, tokenizer)
    questions = _questions(folder, other)
    if what == "guide":
        pytest.importorskip("llguidance")
        questions = [dataclasses.replace(question, guide=Guide.choice(["a", "b"])) for question in questions]
    evaluation.settle(other, questions, tmp_path / "answers.jsonl", new_tokens)
    assert f"0 of 6 answers kept, 6 of other {what}: set aside" in capsys.readouterr().err
    assert (tmp_path / "answers.jsonl").read_text() == "" and len(folder.stale(1)) == 6


def _questions(folder, model):
    source = open_source(str(folder.folder / "test.json"), str(folder.folder))
    return evaluation.read_questions(source, model.tokenizer, model.config)[0]


def test_other_references_grade_the_same_answers(folder, model, data):
    first = folder.evaluate(model, data)
    assert not any(record["adaptive"]["right"] for record in first)
    for record, answered in zip(data, first, strict=True):
        record["conversations"][1]["value"] = answered["answer"] or "x"
        record["kind"] = "new"
    again = folder.evaluate(model, data)
    assert not folder.asked and not (folder.folder / "stale-1").exists()
    assert all(record["adaptive"]["right"] == bool(record["answer"]) for record in again)
    assert [record["kind"] for record in again] == ["new"] * 6 and again[0]["reference"] == first[0]["answer"]
    assert [record["answers"] for record in again] == [record["answers"] for record in first]


def test_only_what_changed_is_asked_again(folder, model, data):
    """A question that was reworded, a picture that was replaced, one that is gone, and records that moved."""
    first = folder.evaluate(model, data)
    data[0]["conversations"][0]["value"] += " Now?"
    Image.new("RGB", (30, 20), "red").save(folder.folder / "1.png")
    folder.evaluate(model, data)
    assert sorted(folder.asked) == ["q0", "q2", "q3"] == sorted(folder.stale(1))

    moved = [record | {"id": f"q{at}"} for at, record in enumerate(data[1:] + data[:1])]
    records = folder.evaluate(model, moved)
    assert not folder.asked and records[0]["answers"] == first[1]["answers"]
    assert [record["reference"] for record in records] == ["answer 1", *(f"answer {n}" for n in (2, 3, 4, 5, 0))]

    fewer = moved[:3]
    records = evaluation.answer_all(model, _asked(folder, model, fewer), folder.folder / "answers.jsonl", **OPTIONS)
    assert [record["id"] for record in records] == ["q0", "q1", "q2"]
    folder.evaluate(model, moved)
    assert not folder.asked and not (folder.folder / "stale-2").exists()  # of a shorter run, nothing is lost

    folder.evaluate(model, moved, max_new_tokens=3)
    assert len(folder.asked) == 6 and len(folder.stale(2)) == 6


def _asked(folder, model, data):
    (folder.folder / "test.json").write_text(json.dumps(data))
    return _questions(folder, model)


def test_records_of_an_earlier_version_are_set_aside(folder, model, data, capsys):
    folder.evaluate(model, data)
    file = folder.folder / "answers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "made_by"}) + "\n" for line in lines))
    folder.evaluate(model, data)
    assert len(folder.asked) == 6 and "6 of other weights and model config" in capsys.readouterr().err


def test_choices_per_image_are_kept_alike(model, tokenizer, llava_folder, capsys):
    """The answers of `answer_mixed`: graded again, and asked again of another model."""
    source = open_source(str(llava_folder / "train.json"), str(llava_folder / "images"))
    questions, _ = evaluation.read_questions(source, tokenizer, model.config)
    questions = [question for question in questions if len(question.sample.sizes) == 2][:2]
    wanted = [(4, 8), (8, 4)]

    def mixed(model, questions):
        records = evaluation.answer_all(model, questions, llava_folder / "answers.jsonl", **OPTIONS)
        evaluation.answer_mixed(model, questions, records, wanted, llava_folder / "mixed.jsonl", 2, 4)
        return [record["mixed"][choice] for record, choice in zip(records, wanted, strict=True)]

    first = mixed(model, questions)
    right = [dataclasses.replace(q, reference=one["answer"]) for q, one in zip(questions, first, strict=True)]
    capsys.readouterr()
    again = mixed(model, right)
    assert [one | {"right": True} for one in first] == again
    assert capsys.readouterr().err.count("2 answers kept from an earlier run") == 2
    mixed(other_weights(model, tokenizer), questions)
    assert capsys.readouterr().err.count("0 of 2 answers kept, 2 of other weights") == 2
    assert len((llava_folder / "mixed.jsonl").read_text().splitlines()) == 2


def test_the_digest_of_code():
    assert reuse._bare('"""A."""\ndef f():\n    """B."""  # c\n    return  1\n') == reuse._bare("def f(): return 1")
    assert reuse._bare("x = 'text'") != reuse._bare("x = 'other'")
    whole, part = reuse.code(), reuse.code(("config.py", "data", "models"), ("models/router.py",))
    assert len(whole) == 32 and whole != part != reuse.code(("config.py", "data", "models"))


def test_the_contents_of_a_data_set(llava_folder):
    """A word, a picture, a member of an archive: each is other data. A file that moved is not."""
    records, images = llava_folder / "train.json", llava_folder / "images"
    pictures = sorted(images.iterdir())

    def zipped(name):
        with zipfile.ZipFile(llava_folder / name, "w") as archive:
            for path in pictures:
                archive.write(path, path.name)
        return llava_folder / name

    def digest(where=images):
        return content_digest(open_source(str(records), str(where)))

    before = digest(), digest(zipped("a.zip")), content_digest(open_source("jersey?size=9"))
    assert len(set(before)) == 3 and before[0] == digest()
    images.rename(llava_folder / "moved")
    (llava_folder / "a.zip").rename(llava_folder / "b.zip")
    images, pictures = llava_folder / "moved", sorted((llava_folder / "moved").iterdir())
    assert (digest(images), digest(llava_folder / "b.zip")) == before[:2]
    assert content_digest(open_source("jersey?size=9")) == before[2]
    assert content_digest(open_source("jersey?size=9&seed=1")) != before[2]
    Image.new("RGB", (9, 9)).save(pictures[-1])
    assert digest(images) != before[0] and digest(zipped("c.zip")) != before[1]
    other = digest(images)
    records.write_text(records.read_text().replace("red", "Red", 1))
    assert digest(images) != other


def test_a_run_resumes_on_its_own_data_alone(tiny, llava_folder, tmp_path, caplog, monkeypatch):
    config, records = settings(tiny, llava_folder), llava_folder / "train.json"
    mesh = sharding.make_mesh(config.mesh)
    checkpoint.copy_tokenizer(config.tokenizer, tmp_path)

    def start():
        with contextlib.closing(setup.open_batches(read(config), tmp_path, tiny, mesh)):
            return (tmp_path / "data.json").read_text()

    before = start()
    (tmp_path / "checkpoints" / "1" / "params").mkdir(parents=True)  # as of a run that was interrupted
    config.data.images = str((llava_folder / "images").rename(llava_folder / "moved"))
    assert start() == before and "resumes with other code" not in caplog.text
    records.write_text(records.read_text().replace("red", "Red", 1))
    with pytest.raises(ValueError, match=r"was trained on other data: data.path .*json has changed since; .*delete"):
        start()
    (tmp_path / "data.json").unlink()
    assert start() != before
    monkeypatch.setattr(reuse, "code", lambda *of: "new")
    start()
    assert "resumes with other code than it began with" in caplog.text


def test_feedback_of_other_code_is_refused(tiny, tokenizer, tmp_path, monkeypatch):
    """`measured_by` names the code, and the router's is none of it."""
    params = random_model(tiny, tokenizer).params
    before = feedback.measured_by(tiny, params)
    FeedbackFolder(tmp_path, tiny.granularities, measured_by=before).start()
    wanted = reuse.code(("config.py", "data", "models", "training/rglf.py"), without=("models/router.py",))
    assert before["code"] == wanted
    monkeypatch.setattr(reuse, "code", lambda *of, **options: "new")
    with pytest.raises(ValueError, match="was measured with other code: let avg-llava feedback measure into another"):
        require_same_measure(tmp_path, feedback.measured_by(tiny, params))


def test_a_quickstart_of_another_model_is_refused(tiny, tokenizer, tmp_path):
    """Weights that changed at the same path: no router trained on the earlier ones is shown as theirs."""
    save_random_model(tiny, tokenizer, tmp_path / "model")
    config = quickstart.router_config(tmp_path / "model", steps=1)
    made_by = AvgLlava.load(tmp_path / "model").made_by | {"weights": "others"}
    given = {"config": json.loads(config.to_json_best_effort()), "questions": 6}
    same_run(tmp_path / "run", "quickstart.json", given, made_by | {"training code": reuse.code(quickstart.TRAINING)})
    with pytest.raises(ValueError, match="run holds results of other weights: use another --workdir"):
        quickstart.run(tmp_path / "run", config, 6)


@pytest.mark.parametrize("small", [stored.SMALL, -1])
def test_the_digest_of_weights_does_not_depend_on_their_form(model, monkeypatch, small):
    """Answers of one process, which stacks layers, serve two, which do not."""
    monkeypatch.setattr(stored, "SMALL", small)
    layers = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf + 1]), model.params["language"]["layers"])
    parts = tuple(jax.tree.map(lambda leaf: leaf[at], layers) for at in range(2))  # noqa: B023

    def digest(layers):
        return reuse.weights(model.params | {"language": model.params["language"] | {"layers": layers}})

    assert digest(parts) == digest(layers) != digest(parts[::-1])
