"""A few records of each benchmark, written as its users have it: the hub's parquet folders, or the original files.

Images are drawn. `RECORDS` holds the fields as the hub names them; a picture is given by its number.
"""

import copy
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange")
SIZES = ((40, 20), (20, 40), (30, 30), (64, 24))


def _circle(index, question, options, right, picture, hint=None):
    """A question of MMBench and its rotations: each option moves one letter on, the index by a million."""
    for turn in range(len(options)):
        turned = options[-turn:] + options[:-turn] if turn else options
        letters = dict.fromkeys("ABCD", "nan") | dict(zip("ABCD", turned, strict=False))
        answer = "ABCD"[(right + turn) % len(options)]
        common = {"category": "attribute", "L2-category": "fine", "source": "drawn", "split": "dev", "hint": hint}
        yield {"index": index + turn * 1_000_000, "question": question, "answer": answer, "image": picture} | (
            letters | common
        )


RECORDS = {
    "gqa": [
        {"id": str(n), "imageId": f"n{n // 2}", "question": question, "answer": answer}
        for n, (question, answer) in enumerate(
            [("Is it red?", "yes"), ("What colour is it?", "red"), ("Is it round?", "no"), ("What is it?", "a wall")]
        )
    ],
    "scienceqa_img": [
        {"image": 0, "question": "Which is larger?", "choices": ["a sun", "a moon"], "answer": 0, "hint": "Think."},
        {"image": 1, "question": "Which is warm?", "choices": ["ice", "fire", "snow"], "answer": 1, "hint": ""},
        {"image": None, "question": "Which floats?", "choices": ["wood", "iron"], "answer": 0, "hint": ""},
    ],
    "vizwiz_vqa_val": [
        {"question_id": "VizWiz_val_0", "image": 0, "question": "WHAT is This?",
         "answers": ["wall"] * 7 + ["paint"] * 3},
        {"question_id": "VizWiz_val_1", "image": 1, "question": "color?", "answers": ["unanswerable"] * 10},
        {"question_id": "VizWiz_val_2", "image": 2, "question": "how many?", "answers": []},
    ],
    "textvqa_val": [
        {"question_id": 34602, "image": 0, "question": "what brand is it?", "answers": ["Nokia"] * 10},
        {"question_id": 34603, "image": 0, "question": "what does it say?", "answers": ["two"] * 3 + ["one"] * 7},
        {"question_id": 34604, "image": 3, "question": "what year?", "answers": ["1999"] * 10},
    ],
    "chartqa": [
        {"image": 0, "question": "What is the share?", "answer": "12%", "type": "human_test"},
        {"image": 0, "question": "How many?", "answer": "42", "type": "human_test"},
        {"image": 1, "question": "Which country?", "answer": "Peru", "type": "augmented_test"},
    ],
    "docvqa_val": [
        {"questionId": "1", "image": 3, "question": "Who wrote it?", "answers": ["Ann Lee", "A. Lee"]},
        {"questionId": "2", "image": 3, "question": "What date?", "answers": ["May 3, 1999"]},
    ],
    "ai2d": [
        {"image": 0, "question": "What does a show?", "options": ["leaf", "root", "stem", "bud"], "answer": "2"},
        {"image": 1, "question": "What eats b?", "options": ["fox", "hen"], "answer": "0"},
    ],
    "mme": [
        {"image": n, "question_id": f"{category}/{n}.png", "question": f"Is it {what}? Please answer yes or no.",
         "answer": answer, "category": category}
        for n, category in enumerate(["existence", "OCR", "code_reasoning"])
        for what, answer in (("red", "Yes"), ("blue", "No"))
    ],
    "mmbench_en_dev": [
        *_circle(3, "What colour is it?", ["red", "green", "blue"], 0, 0),
        *_circle(7, "Which is larger?", ["left", "right"], 1, 1, hint="Look at both."),
    ],
    "pope": [
        {"id": str(n), "question_id": str(n % 2), "image": n % 2, "category": category, "answer": answer,
         "question": f"Is there a {thing} in the image?"}
        for n, (category, thing, answer) in enumerate(
            [("adversarial", "cup", "yes"), ("adversarial", "dog", "no"), ("popular", "man", "yes"),
             ("popular", "sky", "no"), ("random", "car", "yes"), ("random", "sun", "yes")]
        )
    ],
    "mmmu_val": [
        {"id": "validation_Art_1", "question": "Which is <image 1>?", "options": "['a wall', 'a door']",
         "answer": "B", "question_type": "multiple-choice", "image_1": 0},
        {"id": "validation_Art_2", "question": "Compare <image 1> and <image 2>.",
         "options": "['same', 'other', '<image 3>']", "answer": "A", "question_type": "multiple-choice",
         "image_1": 1, "image_2": 2, "image_3": 3},
        {"id": "validation_Math_3", "question": "How many in <image 1>?", "options": "[]",
         "answer": "12.5", "question_type": "open", "image_1": 2},
        {"id": "validation_Math_4", "question": "What is 2 + 2?", "options": "['3', '4']",
         "answer": "B", "question_type": "multiple-choice"},
    ],
}  # fmt: skip

ANSWERS = {
    "gqa": ["Yes.", "blue", "No", "wall"],
    "scienceqa_img": ["A", "b. fire", "A. wood"],
    "vizwiz_vqa_val": ["Wall", "unanswerable", "two"],
    "textvqa_val": ["nokia", "2", "1998"],
    "chartqa": ["0.125", "43", "peru"],
    "docvqa_val": ["ann lee", "May 3 1999"],
    "ai2d": ["C. stem", "B"],
    "mme": ["Yes", "No", "yes", "yes", "n", "No."],
    "mmbench_en_dev": ["A", "B", "blue", "B. right", "right"],
    "pope": ["yes", "Yes", "no", "no", "Yes.", "yes"],
    "mmmu_val": ["(B)", "B", "It is 12.50", "4 is the answer, which is B"],
}
"""One answer a record, some right, some not."""

METRICS = {
    "gqa": {"exact_match": 0.5},
    "scienceqa_img": {"exact_match": 2 / 3},
    "vizwiz_vqa_val": {"exact_match": 2 / 3},
    "textvqa_val": {"exact_match": (1 + 0.9) / 3},
    "chartqa": {"relaxed_overall": 1.0, "relaxed_human_split": 1.0, "relaxed_augmented_split": 1.0},
    "docvqa_val": {"anls": (1 + 1 - 1 / 11) / 2},
    "ai2d": {"exact_match": 0.5},
    "mme": {"mme_perception_score": 250.0, "mme_cognition_score": 50.0},
    "mmbench_en_dev": {"gpt_eval_score": 50.0},
    "pope": {
        "pope_accuracy": 3 / 6, "pope_precision": 2 / 3, "pope_recall": 2 / 3, "pope_f1_score": 2 / 3,
        "pope_yes_ratio": 4 / 6,
    },
    "mmmu_val": {"mmmu_acc": 0.75},
}  # fmt: skip
"""What lmms-eval's rules make of them, worked out by hand."""

HUB = {
    "gqa": "testdev_balanced_instructions/testdev-00000-of-00001.parquet",
    "scienceqa_img": "ScienceQA-IMG/test-00000-of-00001-f0a3.parquet",
    "vizwiz_vqa_val": "data/val-00000-of-00001.parquet",
    "textvqa_val": "data/validation-00000-of-00001.parquet",
    "chartqa": "data/test-00000-of-00001.parquet",
    "docvqa_val": "DocVQA/validation-00000-of-00001.parquet",
    "ai2d": "data/test-00000-of-00001.parquet",
    "mme": "data/test-00000-of-00001.parquet",
    "mmbench_en_dev": "en/dev-00000-of-00001.parquet",
    "pope": "data/test-00000-of-00001.parquet",
    "mmmu_val": "data/validation-00000-of-00001.parquet",
}
ORIGINALS = ("gqa", "scienceqa_img", "vizwiz_vqa_val", "textvqa_val", "mme", "pope")

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def records(name):
    """A copy of a benchmark's records, to be changed at will."""
    return copy.deepcopy(RECORDS[name])


def picture(number):
    """The encoded bytes of a picture."""
    image = Image.new("RGB", SIZES[number % len(SIZES)], COLOURS[number % len(COLOURS)])
    ImageDraw.Draw(image).ellipse((4, 4, 16, 16), "white")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_hub(folder, name, rows=None, shards=1):
    """Parquet as on the hub, beside files of another split and, where there are configs, of another config."""
    folder, rows = Path(folder), records(name) if rows is None else rows
    path = folder / HUB[name]
    if name == "gqa":
        images = [{"id": f"n{number}", "image": number} for number in range(2)]
        _write(folder / "testdev_balanced_images" / path.name, images)
    for shard in range(shards):
        of_shard = rows[len(rows) * shard // shards : len(rows) * (shard + 1) // shards]
        _write(path.with_name(path.name.replace("00000-of-00001", f"{shard:05}-of-{shards:05}")), of_shard)
    other = {"question": "Not of this split", "image": 0}
    _write(path.with_name("other-00000-of-00001.parquet"), [other])
    if path.parts[len(folder.parts)] != "data":
        _write(folder / "another_config" / path.name, [other])
    return folder


def _write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if name == "image" or name.startswith("image_"):
            columns[name] = pa.array([_struct(value) for value in values], _IMAGE)
        else:
            columns[name] = pa.array(values)
    pq.write_table(pa.table(columns), path, row_group_size=2)


def _struct(value):
    """A picture's number, its bytes, None, or the struct itself."""
    if value is None or isinstance(value, dict):
        return value
    return {"bytes": picture(value) if isinstance(value, int) else value, "path": "picture.png"}


def write_original(folder, name, rows=None):
    """The files that the benchmark's authors give out."""
    folder, rows = Path(folder), records(name) if rows is None else rows
    {
        "gqa": _gqa, "scienceqa_img": _scienceqa, "vizwiz_vqa_val": _vizwiz, "textvqa_val": _textvqa, "mme": _mme,
        "pope": _pope,
    }[name](folder, rows)  # fmt: skip
    return folder


def _save(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))


def _dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _gqa(folder, rows):
    for number in range(2):
        _save(folder / "images" / f"n{number}.jpg", number)
    _dump(folder / "questions" / "testdev_balanced_questions.json", {row.pop("id"): row for row in rows})


def _scienceqa(folder, rows):
    problems = {}
    for number, row in enumerate(rows, 5):
        image = row.pop("image")
        if image is not None:
            _save(folder / "images" / "test" / str(number) / "image.png", image)
        problems[str(number)] = row | {"image": None if image is None else "image.png", "split": "test"}
    _dump(folder / "problems.json", problems | {"4": {"question": "Of another split", "split": "train"}})
    _dump(folder / "pid_splits.json", {"train": ["4"], "test": list(problems)})


def _vizwiz(folder, rows):
    entries = []
    for row in rows:
        name = f"{row['question_id']}.jpg"
        _save(folder / "val" / name, row["image"])
        answers = [{"answer": answer, "answer_confidence": "yes"} for answer in row["answers"]]
        entries.append({"image": name, "question": row["question"], "answers": answers, "answerable": 1})
    _dump(folder / "Annotations" / "val.json", entries)


def _textvqa(folder, rows):
    for row in rows:
        _save(folder / "train_images" / f"i{row['image']}.jpg", row["image"])
        row["image_id"] = f"i{row.pop('image')}"
    _dump(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})


def _mme(folder, rows):
    for row in rows:
        category, name = row["question_id"].split("/")
        home = folder / "MME_Benchmark_release_version" / category
        if category == "OCR":  # some categories have their images and texts in folders of their own
            image, text = home / "images" / name, home / "questions_answers_YN" / name
        else:
            image = text = home / name
        _save(image, row["image"])
        text.parent.mkdir(parents=True, exist_ok=True)
        with open(text.with_suffix(".txt"), "a", encoding="utf-8") as file:
            file.write(f"{row['question']}\t{row['answer']}\n")


def _pope(folder, rows):
    for row in rows:
        name = f"COCO_val2014_{row['image']:012}.jpg"
        _save(folder / "val2014" / name, row["image"])
        entry = {"question_id": row["question_id"], "image": name, "text": row["question"], "label": row["answer"]}
        path = folder / "coco" / f"coco_pope_{row['category']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
