"""Rows of a benchmark's split, from the hub's parquet folders or the original files.

    fields   the values for prompt and scorer, checked: a row without them ends the run with its file and number
    images   references by field; a broken or missing image shows only when it is loaded

`read(..., images=False)` reads no image column: scoring needs none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.images import MAX_PIXELS, ImageRef
from avg_llava_jax.eval.benchmarks import originals, parquet
from avg_llava_jax.eval.benchmarks.metrics import CIRCLE, Fields
from avg_llava_jax.eval.benchmarks.rows import Row
from avg_llava_jax.eval.benchmarks.tasks import MMBENCH, MME, Benchmark


def read(task: Benchmark, data: str | os.PathLike[str], images: bool = True, max_pixels: int = MAX_PIXELS) -> list[Row]:
    """All rows of the benchmark's split, in the order of file names and rows.

    data: the data set's folder as downloaded, or its id on the hub.
    max_pixels: of an image; see `ImageRef`.

    Raises:
      FileNotFoundError, ValueError: in one line; a row that cannot be used is named by file and number.
    """
    folder = Path(data)
    if not folder.is_dir():
        folder = parquet.download(task, str(data))
    files = sorted(folder.rglob("*.parquet"))
    found = parquet.rows(task, folder, files, images) if files else originals.rows(task, folder)
    rows = [dataclasses.replace(row, fields=checked(task, row)) for row in found]
    if not rows:
        raise ValueError(f"{folder} has no rows of {task.name}'s split {task.split!r}")
    _check_ids(task, rows)
    bounded: dict[ImageRef, ImageRef] = {}  # an image of several rows stays one object
    for row in rows:
        for name, image in row.images.items():
            if image is not None and image.max_pixels != max_pixels:
                row.images[name] = bounded.setdefault(image, dataclasses.replace(image, max_pixels=max_pixels))
    return rows


def locate(task: Benchmark, data: str) -> str:
    """The folder of one of several benchmarks, named as by lmms-eval, the hub or the paper.

    `hub` in place of a folder is the hub itself. Raises FileNotFoundError, ValueError: not there, or twice.
    """
    if data == "hub":
        return task.hub
    names = {task.name.lower(), task.hub.partition("/")[2].lower(), task.title.lower()}
    found = [path for path in sorted(Path(data).glob("*")) if path.is_dir() and path.name.lower() in names]
    if not found:
        raise FileNotFoundError(f"--data={data} has no folder for {task.name}: name it {' or '.join(sorted(names))}")
    if len(found) > 1:
        raise ValueError(f"--data={data} has {task.name} twice, as {found[0].name} and as {found[1].name}: keep one")
    return str(found[0])


def ask(task: Benchmark, row: Row, profile: str) -> tuple[str, list[ImageRef]]:
    """The prompt of a row and its images. Raises BadSample `missing_image`."""
    names = task.images(row.fields, profile)
    images = [row.images.get(name) for name in names]
    if task.text_only:
        images = [image for image in images if image is not None]
    elif None in images:
        raise BadSample("missing_image", f"`{names[images.index(None)]}` is empty")
    return task.prompt(row.fields, profile), images


def checked(task: Benchmark, row: Row) -> Fields:
    """The fields of a row, checked for their types and for a reference answer."""
    fields = {name: row.fields.get(name) for name in (*task.fields, *task.optional, *task.id) if name in row.fields}
    try:
        for name, kind in task.fields.items():
            if name not in fields:
                raise ValueError(f"no field `{name}`; there are {', '.join(sorted(row.fields))}")
            fields[name] = _of_kind(name, fields[name], kind)
        task.gold(fields)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None
    return fields


def _of_kind(name: str, value: Any, kind: type) -> Any:
    if value is None:
        raise ValueError(f"`{name}` is empty" + (": a question without an answer" if "answer" in name else ""))
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)  # a column that once had gaps
    if kind is list and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    if kind is not list and isinstance(value, kind) and not isinstance(value, bool):
        return value
    wanted = {str: "a text", int: "a whole number", list: "a list of texts"}[kind]
    raise ValueError(f"`{name}` is {value!r}, not {wanted}")


def _check_ids(task: Benchmark, rows: Sequence[Row]) -> None:
    """Check that no record is repeated, and that records scored together are all there."""
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        names = [name for name in task.id if row.fields.get(name) is not None]
        key = tuple(row.fields[name] for name in names)
        if key and key in seen:
            said = ", ".join(f"`{name}` {value!r}" for name, value in zip(names, key, strict=True))
            raise ValueError(f"{row.where}: {said} is there already, in {seen[key].where}")
        seen[key] = row
    if task is MME:
        pairs: dict[tuple[str, Any], list[Row]] = {}
        for row in rows:
            pairs.setdefault((row.fields["category"], row.fields["question_id"]), []).append(row)
        for (category, question), pair in pairs.items():
            if len(pair) != 2:
                raise ValueError(
                    f"{pair[0].where}: MME has two questions an image, {category} {question!r} has {len(pair)}"
                )
    if task is MMBENCH and all(row.fields["index"] >= CIRCLE for row in rows):
        raise ValueError(f"{rows[0].where}: no `index` is below {CIRCLE}, so there are only rotations of questions")
