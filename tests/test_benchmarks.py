"""The eleven benchmarks on the host: both layouts of their data, their prompts, their scores, and bad input."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.eval.benchmarks import letters, metrics, records, scoring, tasks
from tests import benchmark_fixtures as fixtures
from tests.test_launch import run

NAMES = list(tasks.BENCHMARKS)


def answers_file(path, answers):
    lines = [json.dumps({"index": index, "answer": answer}) for index, answer in enumerate(answers)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_the_hub_layout(name, tmp_path):
    task = tasks.find(name)
    rows = records.read(task, fixtures.write_hub(tmp_path, name, shards=2))
    assert len(rows) == len(fixtures.RECORDS[name])
    result = scoring.score(task, rows, fixtures.ANSWERS[name])
    assert result["metrics"] == pytest.approx(fixtures.METRICS[name], abs=1e-5)
    assert (result["task"], result["n"], result["missing"]) == (name, len(rows), 0)
    plain = records.read(task, tmp_path, images=False)
    assert [row.fields for row in plain] == [row.fields for row in rows] and not any(row.images for row in plain)
    for row in rows:
        prompt, images = records.ask(task, row, "lmms_eval")
        assert row.fields["question"].strip().split(" Please")[0].lower() in prompt.lower()
        assert all(image.load().size == image.size for image in images)


@pytest.mark.parametrize("name", fixtures.ORIGINALS)
def test_the_original_layout_is_the_same_data(name, tmp_path):
    task = tasks.find(name)
    hub = records.read(task, fixtures.write_hub(tmp_path / "hub", name))
    original = records.read(task, fixtures.write_original(tmp_path / "original", name))
    if name == "scienceqa_img":
        hub = hub[:2]  # the original has the questions with an image alone
    if name == "mme":  # by category, and its images by name
        hub.sort(key=lambda row: row.fields["category"])
        original.sort(key=lambda row: row.fields["category"])
    assert [task.gold(row.fields) for row in original] == [task.gold(row.fields) for row in hub]
    for one, other in zip(original, hub, strict=True):
        (prompt, images), (expected, pictures) = (records.ask(task, row, "lmms_eval") for row in (one, other))
        assert prompt == expected
        assert [np.array(image.load()).tolist() for image in images] == [
            np.array(image.load()).tolist() for image in pictures
        ]


def test_prompts():
    """As the harness writes them, letter by letter; `paper` differs for MMMU alone."""

    def prompt(name, row, profile="lmms_eval"):
        return tasks.find(name).prompt(fixtures.RECORDS[name][row], profile)

    letter = "Answer with the option's letter from the given choices directly."
    word = "Answer the question using a single word or phrase."
    assert prompt("scienceqa_img", 0) == f"Context: Think.\nWhich is larger?\nA. a sun\nB. a moon\n{letter}"
    assert prompt("scienceqa_img", 1) == f"Which is warm?\nA. ice\nB. fire\nC. snow\n{letter}"
    assert prompt("vizwiz_vqa_val", 0) == (
        f"What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{word}"
    )
    assert prompt("textvqa_val", 0) == f"What brand is it?\n{word}"
    assert prompt("chartqa", 1) == "How many?\nAnswer the question with a single word."
    assert prompt("mme", 0) == f"Is it red?\n{word}"
    listed = "There are several options:\nA. left\nB. right"
    assert prompt("mmbench_en_dev", 3) == f"Look at both. Which is larger? {listed}\n\n{letter}"
    assert prompt("mmbench_en_dev", 0).startswith("What colour is it? There are several options:\nA. red\nB. green\nC.")
    assert prompt("mmmu_val", 0) == f"Which is <image 1>?\nA. a wall\nB. a door\n\n{letter}"
    assert prompt("mmmu_val", 2) == f"How many in <image 1>?\n\n{word}"
    assert prompt("mmmu_val", 0, "paper") == (
        "Which is <image>?\nA. a wall\nB. a door\nAnswer with the option letter from the given choices directly."
    )
    assert tasks.MMMU.images(fixtures.RECORDS["mmmu_val"][1], "paper") == ["image_1", "image_2", "image_3"]
    with pytest.raises(ValueError, match="--task=nope: choose from gqa"):
        tasks.find("nope")


def test_letters_that_a_prompt_offers():
    ask = "Answer with the option's letter from the given choices directly."
    for options, found in (
        ("A. red\nB. blue\nC. green", "ABC"),
        ("(A) red\n(B) blue", "AB"),
        ("Context: B. is a letter\nA. red\nB. blue", "AB"),
        ("A. red\nC. blue", ""),
        ("A. red", ""),
        ("red or blue", ""),
    ):
        assert "".join(letters.offered(f"Which?\n{options}\n{ask}")) == found
    assert letters.offered("Which?\nA. red\nB. blue") == []  # asks for no letter


def test_one_image_is_held_once(tmp_path):
    """The hub stores an image with every question about it; as a reference it is the same object."""
    rows = records.read(tasks.POPE, fixtures.write_hub(tmp_path, "pope"))
    images = {id(row.images["image"]) for row in rows}
    assert len(images) == 2 and rows[0].images["image"] is rows[2].images["image"]


def test_the_bound_on_pixels_is_an_argument(tmp_path):
    folder = fixtures.write_hub(tmp_path, "pope")
    images = [row.images["image"] for row in records.read(tasks.POPE, folder, max_pixels=100)]
    assert len({id(image) for image in images}) == 2
    with pytest.raises(BadSample, match=r"40 x 20 is over 100 pixels \(max_pixels\)"):
        images[0].load()
    assert records.read(tasks.POPE, folder, max_pixels=40 * 20)[0].images["image"].load().size == (40, 20)


def test_the_score_command(tmp_path):
    fixtures.write_hub(tmp_path / "data", "chartqa")
    answers = answers_file(tmp_path / "answers.jsonl", ["13%", None])
    flags = ("--task=chartqa", f"--data={tmp_path / 'data'}", f"--answers={answers}")
    code, out, error = run("score", *flags, f"--output={tmp_path / 'score.json'}")
    assert code == 0, error
    assert "3 questions, 2 without an answer" in out
    assert json.loads((tmp_path / "score.json").read_text()) == {
        "task": "chartqa",
        "n": 3,
        "missing": 2,
        "metrics": {"relaxed_overall": 0.0, "relaxed_human_split": 0.0, "relaxed_augmented_split": 0.0},
    }
    code, _, error = run("score", *flags, f"--output={tmp_path / 'nowhere' / 'score.json'}")
    assert code == 2 and "its folder does not exist" in error
    code, _, error = run("score", "--task=chartqa", "--data=nowhere", f"--answers={answers}", "--output=x.json")
    assert code == 2 and error.count("\n") == 1 and "--data=nowhere: no such folder" in error


def test_scoring_needs_no_device_library(tmp_path):
    code = (
        "import sys; from avg_llava_jax.commands import score;"
        "from avg_llava_jax.eval.benchmarks import records, scoring, tasks;"
        "print({'jax', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    "lines, message",
    [
        ('{"index": 0, "answer": "a"}\n{"index": 0, "answer": "b"}', "line 2: `index` 0 was answered before"),
        ('{"index": 3, "answer": "a"}', "line 1: `index` is 3, the split has rows 0 to 2"),
        ('{"index": true, "answer": "a"}', "line 1: `index` is True"),
        ('{"index": 0, "answer": 4}', "line 1: `answer` is 4, not a text"),
        ('\n{"index": 0}', "line 2: must be"),
        ("nonsense", "line 1: not valid JSON"),
    ],
)
def test_bad_answers(lines, message, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        scoring.read_answers(path, 3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        scoring.read_answers(tmp_path / "none.jsonl", 3)


def without(row, field):
    return {name: value for name, value in row.items() if name != field}


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("gqa", lambda rows: [without(row, "answer") for row in rows], "no column `answer`; there are id, imageId"),
        ("gqa", lambda rows: [rows[0], rows[1] | {"answer": None}], "row 1: `answer` is empty: a question without"),
        ("gqa", lambda rows: [rows[0] | {"answer": " "}], "row 0: `answer` is empty: this is a question without"),
        ("gqa", lambda rows: [row | {"id": "7"} for row in rows], "row 1: `id` '7' is there already, in .* row 0"),
        ("textvqa_val", lambda rows: [row | {"question": 3} for row in rows], "row 0: `question` is 3, not a text"),
        ("textvqa_val", lambda rows: [row | {"answers": "x"} for row in rows], "row 0: `answers` is 'x', not a list"),
        ("scienceqa_img", lambda rows: [rows[0], rows[1] | {"answer": 3}], "row 1: `answer` is 3, but there are 3"),
        ("ai2d", lambda rows: [rows[0] | {"answer": "B"}], "row 0: `answer` is 'B', no number of an option"),
        ("mme", lambda rows: rows[:3], "row 2: MME has two questions an image, OCR 'OCR/1.png' has 1"),
        ("pope", lambda rows: [rows[0] | {"answer": "maybe"}], "row 0: `answer` is 'maybe', neither yes nor no"),
        (
            "pope",
            lambda rows: [rows[0], rows[0]],
            "row 1: `category` 'adversarial', `question_id` '0' is there already",
        ),
        ("mmbench_en_dev", lambda rows: [rows[2] | {"answer": "nan"}], "row 0: `answer` is 'nan', none of the"),
        ("mmbench_en_dev", lambda rows: rows[1:3], "row 0: no `index` is below 1000000"),
        ("mmmu_val", lambda rows: [rows[0] | {"options": "['a'"}], "row 0: `options` is .* not a Python list"),
        ("mmmu_val", lambda rows: [rows[0] | {"answer": "?"}], r"row 0: `answer` is '\?', none of the 2 options"),
    ],
)
def test_bad_records(name, change, message, tmp_path):
    fixtures.write_hub(tmp_path, name, change(fixtures.records(name)))
    with pytest.raises(ValueError, match=message) as caught:
        records.read(tasks.find(name), tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders(tmp_path):
    fixtures.write_hub(tmp_path / "hub", "docvqa_val")
    with pytest.raises(ValueError, match="no parquet file of mmbench_en_dev's config 'en', split 'dev'; there are"):
        records.read(tasks.MMBENCH, tmp_path / "hub")
    (tmp_path / "hub" / fixtures.HUB["docvqa_val"]).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"validation-00000-of-00001.parquet cannot be read as parquet"):
        records.read(tasks.DOCVQA, tmp_path / "hub")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \*.parquet; chartqa is read from the hub's layout only"):
        records.read(tasks.CHARTQA, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"has neither \*.parquet nor TextVQA_0.5.1_val.json"):
        records.read(tasks.TEXTVQA, tmp_path / "empty")
    fixtures.write_original(tmp_path / "pope", "pope")
    broken = tmp_path / "pope" / "coco" / "coco_pope_popular.json"
    broken.write_text(broken.read_text() + "nonsense\n")
    with pytest.raises(ValueError, match=r"coco_pope_popular.json row 2: not valid JSON"):
        records.read(tasks.POPE, tmp_path / "pope")
    fixtures.write_original(tmp_path / "mme", "mme")
    (text,) = (tmp_path / "mme").rglob("existence/0.txt")
    text.write_text("Is it red? Yes\n")
    with pytest.raises(ValueError, match=r"0.txt row 0: not a question, a tab and its answer"):
        records.read(tasks.MME, tmp_path / "mme")


@pytest.mark.parametrize("name", fixtures.HUB)
def test_two_snapshots_below_one_folder_are_refused(name, tmp_path):
    """The hub's cache after the data set got another commit; each snapshot alone is read."""
    for snapshot in ("1111", "2222"):
        fixtures.write_hub(tmp_path / "snapshots" / snapshot, name)
    task = tasks.find(name)
    assert len(records.read(task, tmp_path / "snapshots" / "1111", images=False)) == len(fixtures.RECORDS[name])
    with pytest.raises(ValueError, match="1111.*2222|2222.*1111") as error:
        records.read(task, tmp_path, images=False)
    assert "\n" not in str(error.value)


def test_shards_of_two_writings_and_missing_shards_are_refused(tmp_path):
    fixtures.write_hub(tmp_path, "chartqa", shards=2)
    shard = tmp_path / fixtures.HUB["chartqa"].replace("00000-of-00001", "00001-of-00002")
    assert len(records.read(tasks.CHARTQA, tmp_path)) == 3
    shard.rename(shard.with_suffix(".away"))
    with pytest.raises(ValueError, match="lacks test-00001-of-00002.parquet: the split is not whole"):
        records.read(tasks.CHARTQA, tmp_path)
    shard.with_suffix(".away").rename(shard)
    fixtures.write_hub(tmp_path, "chartqa")
    with pytest.raises(ValueError, match="holds test twice, in 1 and in 2 shards: remove the older ones"):
        records.read(tasks.CHARTQA, tmp_path)


def test_an_image_of_two_snapshots_is_refused_where_it_differs(tmp_path):
    fixtures.write_hub(tmp_path / "1111", "gqa")
    (images,) = tmp_path.rglob("testdev_balanced_images/*.parquet")
    other = tmp_path / "2222" / "testdev_balanced_images" / images.name
    other.parent.mkdir(parents=True)
    shutil.copy(images, other)
    rows = records.read(tasks.GQA, tmp_path)
    fixtures._write(other, [{"id": "n0", "image": 3}])
    with pytest.raises(ValueError, match="image 'n0' is there already, with other bytes"):
        records.read(tasks.GQA, tmp_path)
    assert len(rows) == 4


def test_originals_and_folders_that_are_there_twice(tmp_path):
    for copy in ("a", "b"):
        fixtures.write_original(tmp_path / "both" / copy, "textvqa_val")
    rows = records.read(tasks.TEXTVQA, tmp_path / "both")
    (path,) = (tmp_path / "both" / "b").rglob("TextVQA*.json")
    path.write_text(path.read_text().replace("Nokia", "Sony"))
    with pytest.raises(ValueError, match="TextVQA_0.5.1_val.json differ: give the folder of one"):
        records.read(tasks.TEXTVQA, tmp_path / "both")
    assert len(rows) == 3
    for name in ("ChartQA", "chartqa"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="has chartqa twice, as ChartQA and as chartqa: keep one"):
        records.locate(tasks.CHARTQA, str(tmp_path))


def test_mme_that_is_there_twice(tmp_path):
    """The same questions count once; of others it is not known which are meant."""
    for copy in ("a", "b"):
        fixtures.write_original(tmp_path / copy, "mme")
    assert len(records.read(tasks.MME, tmp_path)) == len(fixtures.ANSWERS["mme"])
    path = next((tmp_path / "b").rglob("*.txt"))
    path.write_text(path.read_text().replace("\t", " Now?\t"))
    with pytest.raises(ValueError, match=f"{path.parent.name} differ: give the folder of one of them as --data"):
        records.read(tasks.MME, tmp_path)


def test_images_that_are_not_there(tmp_path):
    rows = fixtures.records("chartqa")
    rows[0]["image"], rows[1]["image"] = None, {"bytes": None, "path": "gone.png"}
    read = records.read(tasks.CHARTQA, fixtures.write_hub(tmp_path, "chartqa", rows))
    with pytest.raises(BadSample, match="missing_image: `image` is empty"):
        records.ask(tasks.CHARTQA, read[0], "lmms_eval")
    with pytest.raises(BadSample, match="gone.png: no such file"):
        _ = records.ask(tasks.CHARTQA, read[1], "lmms_eval")[1][0].size
    gqa = fixtures.records("gqa")
    gqa[3]["imageId"] = "n9"
    read = records.read(tasks.GQA, fixtures.write_hub(tmp_path / "gqa", "gqa", gqa))
    with pytest.raises(BadSample, match="missing_image"):
        records.ask(tasks.GQA, read[3], "lmms_eval")


def test_metrics_need_every_rotation_and_both_questions():
    fields = [{"index": index} for index in (1, 1_000_001, 2, 1_000_002, 2_000_002, 1_000_003)]
    sums = metrics.mmbench().tally(fields, [], [1, 1, 1, 1, 0, 1])
    assert sums["hit"].tolist() == [1, 0]  # the last one is a rotation of a question that is not there
    pairs = [{"category": "count", "question_id": n // 2} for n in range(6)]
    sums = metrics.mme().tally(pairs, [], [1, 1, 1, 0, 0, 0])
    assert sums["score count"].tolist() == [200, 50, 0]


def test_bootstrap():
    """The interval holds what it should, and units are drawn, not questions."""
    task, generator = tasks.GQA, random.Random(0)
    held = 0
    for trial in range(60):
        grades = [float(generator.random() < 0.7) for _ in range(80)]
        low, high = scoring.interval(task, metrics.mean("exact_match").tally([], [], grades), trial, 200)
        held += low <= 0.7 <= high
        assert 0 <= low < high <= 1
    assert held >= 50
    fields = [{"index": n % 20 + n // 20 * 1_000_000} for n in range(80)]
    sums = metrics.mmbench().tally(fields, [], [float(field["index"] % 1_000_000 < 10) for field in fields])
    low, high = scoring.interval(tasks.MMBENCH, sums)
    assert len(sums["hit"]) == 20 and 20 < low < 35 and 65 < high < 80
