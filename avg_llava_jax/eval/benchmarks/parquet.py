"""The hub's layout: parquet files whose paths name the config and the split, with the images inside."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from avg_llava_jax.data.images import FileImage, ImageRef, MemoryImage
from avg_llava_jax.eval.benchmarks.rows import Row
from avg_llava_jax.eval.benchmarks.tasks import Benchmark

Seen = dict[bytes, ImageRef]
"""Images by the digest of their bytes: the hub stores an image with every question about it, we hold it once."""


def download(task: Benchmark, repository: str) -> Path:
    """Download the parquet files of a data set from the hub into its cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise FileNotFoundError(f"--data={repository}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = [
        f"*{config}*{task.split}*.parquet" if config else f"*{task.split}*.parquet"
        for config in {task.config, task.image_config or task.config}
    ]
    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"--data={repository}: no such folder, nor could it be read from the hub ({type(error).__name__})"
        ) from None


def rows(task: Benchmark, folder: Path, files: Sequence[Path], images: bool) -> Iterator[Row]:
    """Rows of the split. images: False = without image references; image columns are then not read.

    Raises:
      ValueError: a file is malformed, or the split is there twice, as in two snapshots of a hub cache.
    """
    chosen = _of_split(task, folder, files, task.config)
    seen: Seen = {}
    by_id: dict[str, ImageRef | None] = {}
    if images and task.image_config:
        for path in _of_split(task, folder, files, task.image_config):
            for where, values in _read(path, ["id", "image"], []):
                image = _image(path, where, "image", values["image"], seen)
                if by_id.setdefault(str(values["id"]), image) != image:
                    raise ValueError(f"{where}: image {values['id']!r} is there already, with other bytes: keep one")
    unnamed: set[Path] = set()  # folders of rows that no id tells apart
    for path in chosen:
        columns = () if task.image_config or not images else task.image_fields
        needed = [*task.fields, *columns[:1]]  # MMMU's further images are not in every file
        for where, values in _read(path, needed, [*task.optional, *task.id, *columns[1:]]):
            if all(values.get(name) is None for name in task.id):
                unnamed.add(path.parent)
                _once(task, unnamed)
            found = {name: _image(path, where, name, values.pop(name, None), seen) for name in columns}
            if images and task.image_config:
                found = {"image": by_id.get(values["imageId"])}
            yield Row(where, values, found)


def _of_split(task: Benchmark, folder: Path, files: Sequence[Path], config: str | None) -> list[Path]:
    """The files of a config and of the split."""
    inside = [(path, path.relative_to(folder)) for path in files]
    of_config = [(path, name) for path, name in inside if config is None or _named(name, config)]
    of_split = [path for path, name in of_config if _named(name, task.split)]
    if not of_split:
        wanted = f"config {config!r}, split {task.split!r}" if config else f"split {task.split!r}"
        there = _listing(str(name) for _, name in inside)
        raise ValueError(f"{folder} has no parquet file of {task.name}'s {wanted}; there are {there}")
    for parent in {path.parent for path in of_split}:
        _complete(sorted(path for path in of_split if path.parent == parent))
    return of_split


def _once(task: Benchmark, folders: set[Path]) -> None:
    """Check that rows without ids come from one folder, since a second folder may repeat them."""
    if len(folders) > 1:
        one, other = sorted(folders)[:2]
        raise ValueError(
            f"{task.name}'s split {task.split!r} is there twice, in {one} and in {other}: give one of them as --data"
        )


def _complete(files: Sequence[Path]) -> None:
    """Check that the shards `NAME-00000-of-00002.parquet`, ... of a folder are complete and from one export."""
    shards = [(path, found) for path in files if (found := re.search(r"-(\d{5})-of-(\d{5})\.", path.name))]
    counts: dict[str, set[int]] = {}
    for path, found in shards:
        counts.setdefault(path.name[: found.start()], set()).add(int(found[2]))
    for name, totals in counts.items():
        there = {path.name for path in files}
        if len(totals) > 1:
            first, second = sorted(totals)[:2]
            raise ValueError(
                f"{files[0].parent} holds {name} twice, in {first} and in {second} shards: remove the older ones"
            )
        (total,) = totals
        missing = [f"{name}-{n:05}-of-{total:05}.parquet" for n in range(total)]
        missing = [shard for shard in missing if shard not in there]
        if missing:
            raise ValueError(f"{files[0].parent} lacks {missing[0]}: the split is not whole")


def _read(path: Path, needed: Sequence[str], welcome: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values) of each row, with the required columns and the optional ones that exist."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            missing = [name for name in needed if name not in there]
            if missing:
                raise ValueError(f"{path}: no column `{missing[0]}`; there are {_listing(there, 40)}")
            columns = [name for name in dict.fromkeys([*needed, *welcome]) if name in there]
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for values in batch.to_pylist():
                    yield f"{path} row {number}", values
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as parquet (only a Git LFS pointer?): {text}") from None


def _image(path: Path, where: str, field: str, value: Any, seen: Seen) -> ImageRef | None:
    """An image reference: the bytes of a struct {bytes, path}, or the file it names; None where it is empty."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if content:
        if not isinstance(content, bytes):
            raise ValueError(f"{where}: `{field}` is {type(content).__name__}, not an image's bytes")
        image = MemoryImage(f"{where}, `{field}`", content)
        return seen.setdefault(hashlib.blake2b(content).digest(), image)
    name = value.get("path") if isinstance(value, dict) else None
    return FileImage(str(path.parent / name)) if name else None


def _named(path: Path, word: str) -> bool:
    """Whether a part of a path names a config or a split: `dev/0.parquet`, `dev-00000-of-00001.parquet`."""
    return any(re.search(rf"(^|[-.]){re.escape(word)}([-.]|$)", part) for part in path.parts)


def _listing(names: Iterable[str], most: int = 8) -> str:
    """Names for a message, abbreviated."""
    names = sorted(set(names))
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
