"""The benchmark authors' own layouts: annotation files, and images in folders.

    GQA        testdev_balanced_questions.json          images/ID.jpg
    ScienceQA  problems.json, pid_splits.json           test/ID/image.png
    VizWiz     val.json                                 val/NAME.jpg
    TextVQA    TextVQA_0.5.1_val.json                   train_images/ID.jpg
    MME        CATEGORY/*.txt or CATEGORY/questions_answers_YN/*.txt; images beside them or in CATEGORY/images
    POPE       coco_pope_{adversarial,popular,random}.json   val2014/NAME.jpg

Files may be anywhere below the folder; fields are named as in the hub's layout.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avg_llava_jax.data.images import FileImage
from avg_llava_jax.eval.benchmarks import tasks
from avg_llava_jax.eval.benchmarks.rows import Row

MME_CATEGORIES = (
    *("OCR", "artwork", "celebrity", "code_reasoning", "color", "commonsense_reasoning", "count", "existence"),
    *("landmark", "numerical_calculation", "position", "posters", "scene", "text_translation"),
)


def rows(task: tasks.Benchmark, folder: Path) -> Iterator[Row]:
    """Rows of the split, images as files."""
    readers = {
        tasks.GQA: _gqa,
        tasks.SCIENCEQA: _scienceqa,
        tasks.VIZWIZ: _vizwiz,
        tasks.TEXTVQA: _textvqa,
        tasks.MME: _mme,
        tasks.POPE: _pope,
    }
    if task not in readers:
        raise ValueError(f"{folder} has no *.parquet; {task.name} is read from the hub's layout only")
    yield from readers[task](folder)


def _gqa(folder: Path) -> Iterator[Row]:
    path = _file(folder, "testdev_balanced_questions.json")
    images = _folder(folder, "images")
    for number, record in _entries(path, _json(path, dict)):
        row = _row(path, number, record, FileImage(f"{images}/{record.get('imageId')}.jpg"))
        row.fields["id"] = number
        yield row


def _scienceqa(folder: Path) -> Iterator[Row]:
    path, splits = _file(folder, "problems.json"), _file(folder, "pid_splits.json")
    problems = _json(path, dict)
    chosen = _json(splits, dict).get("test")
    if not isinstance(chosen, list):
        raise ValueError(f"{splits} has no split 'test'")
    images = _folder(folder, "test")
    for number in chosen:
        if number not in problems:
            raise ValueError(f"{path}: no problem {number}, which {splits} names")
        ((_, record),) = _entries(path, {number: problems[number]})
        if record.get("image"):  # the questions with an image, as the hub's ScienceQA-IMG
            yield _row(path, number, record, FileImage(f"{images}/{number}/{record['image']}"))


def _vizwiz(folder: Path) -> Iterator[Row]:
    path = _file(folder, "val.json")
    images = _folder(folder, "val")
    for number, record in _entries(path, _json(path, list)):
        row = _row(path, number, record, FileImage(f"{images}/{record.get('image')}"))
        if isinstance(record.get("answers"), list):
            row.fields["answers"] = [one.get("answer") if isinstance(one, dict) else one for one in record["answers"]]
        row.fields["question_id"] = Path(str(record.get("image"))).stem
        yield row


def _textvqa(folder: Path) -> Iterator[Row]:
    path = _file(folder, "TextVQA_0.5.1_val.json")
    images = _folder(folder, "train_images")
    records = _json(path, dict).get("data")
    if not isinstance(records, list):
        raise ValueError(f"{path} has no list `data`")
    for number, record in _entries(path, records):
        yield _row(path, number, record, FileImage(f"{images}/{record.get('image_id')}.jpg"))


def _mme(folder: Path) -> Iterator[Row]:
    homes = [path for name in MME_CATEGORIES for path in [_category(folder, name)] if path]
    if not homes:
        raise FileNotFoundError(f"{folder} has neither *.parquet nor a folder of MME's categories, such as `existence`")
    for home in homes:
        for path in sorted(home.rglob("*.txt")):
            pictures = home / "images" if (home / "images").is_dir() else path.parent
            image = next(
                (
                    pictures / f"{path.stem}{end}"
                    for end in (".png", ".jpg")
                    if (pictures / f"{path.stem}{end}").is_file()
                ),
                pictures / f"{path.stem}.jpg",
            )
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                if not line.strip():
                    continue
                question, tab, answer = line.rstrip().rpartition("\t")
                if not tab:
                    raise ValueError(f"{path} row {number}: not a question, a tab and its answer")
                fields = {
                    "question": question,
                    "answer": answer,
                    "category": home.name,
                    "question_id": f"{home.name}/{image.name}",
                }
                yield Row(f"{path} row {number}", fields, {"image": FileImage(str(image))})


def _category(folder: Path, name: str) -> Path | None:
    """The nearest folder of a category; an error where another one has other questions."""
    home = _folder(folder, name, missing_ok=True)
    for other in sorted(path for path in folder.rglob(name) if home and path.is_dir() and path != home):
        if _texts(other) not in ({}, _texts(home)):
            raise ValueError(f"{home} and {other} differ: give the folder of one of them as --data")
    return home


def _texts(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in home.rglob("*.txt")}


def _pope(folder: Path) -> Iterator[Row]:
    paths = [_file(folder, f"coco_pope_{category}.json") for category in ("adversarial", "popular", "random")]
    images = _folder(folder, "val2014")
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} row {number}: not valid JSON ({error})") from None
            ((_, record),) = _entries(path, {number: record})
            row = _row(path, number, record, FileImage(f"{images}/{record.get('image')}"))
            names = {"text": "question", "label": "answer"}
            fields = {names.get(name, name): value for name, value in row.fields.items()}
            yield Row(row.where, fields | {"category": path.stem.removeprefix("coco_pope_")}, row.images)


def _row(path: Path, number: Any, record: dict[str, Any], image: FileImage) -> Row:
    return Row(f"{path} row {number}", dict(record), {"image": image})


def _entries(path: Path, records: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(number or key, record) of a list or of an object; each record an object."""
    for number, record in records.items() if isinstance(records, dict) else enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path} row {number}: a record must be an object, not {type(record).__name__}")
        yield number, record


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds {type(content).__name__}, not {kind.__name__}")
    return content


def _file(folder: Path, name: str) -> Path:
    """The nearest file of that name below the folder; an error where another one has other content."""
    found = sorted(folder.rglob(name), key=lambda path: (len(path.parts), path))
    if not found:
        raise FileNotFoundError(f"{folder} has neither *.parquet nor {name}")
    for other in found[1:]:
        if not filecmp.cmp(found[0], other, shallow=False):
            raise ValueError(f"{found[0]} and {other} differ: give the folder of one of them as --data")
    return found[0]


def _folder(folder: Path, name: str, missing_ok: bool = False) -> Path | None:
    """The nearest folder of that name below a folder."""
    found = sorted((path for path in folder.rglob(name) if path.is_dir()), key=lambda path: (len(path.parts), path))
    if not found and not missing_ok:
        raise FileNotFoundError(f"{folder} has no folder {name} with the images")
    return found[0] if found else None
