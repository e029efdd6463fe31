"""Sources of records: LLaVA JSON or JSONL files, and the generated data set `jersey`.

A record is a dict `id, conversations` and `image` (a name) or `images` (a list of names), or neither. If one
of the two is null or empty, it is ignored; if both name images, the names must be the same. `kind` is free text. Names
are looked up in a folder, a zip or a tar. A source reads one record at a time: it holds only the byte offsets of a
file's records, 16 MB per million.

A data set is one source, or several with weights:

    path="train.json"                         images="photos.zip"
    path="jersey?split=router&turns=4"
    path="0.7*a.json, 0.2*b.jsonl, 0.1*jersey"   images="photos.zip, /data/b, "
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import encode_conversation
from avg_llava_jax.data.errors import BadSample, half_character
from avg_llava_jax.data.grounding import read_words
from avg_llava_jax.data.images import MAX_PIXELS, ImageStore
from avg_llava_jax.data.jersey import Jersey
from avg_llava_jax.data.packing import Sample, check_labels, make_sample
from avg_llava_jax.data.tokenizer import Tokenizer

SAMPLED = 64
"""Records whose images `content_digest` reads."""

Record = dict[str, Any]


class Source(Protocol):
    """Random access to records. `images` of a record are references; a record that cannot be used raises BadSample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class WeightedSource(NamedTuple):
    """One source of a mixture, the path that opened it, and its weight."""

    path: str
    source: Source
    weight: float

    def id(self, index: int) -> str:
        """Id of a record, usable or not; its number if it has none."""
        return self.source.id(index) if isinstance(self.source, LlavaJson) else str(index)


class LlavaJson:
    """A LLaVA JSON (one list) or JSONL file (one object per line), by its suffix.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a JSON list, or has no records.
    """

    def __init__(self, path: str | os.PathLike, images: str | os.PathLike = "", max_pixels: int = MAX_PIXELS):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist; data are a LLaVA JSON, a JSONL, or `jersey`")
        self.store = ImageStore(images, max_pixels) if images else None
        self._places = _lines(self.path) if self.path.suffix == ".jsonl" else _elements(self.path)
        if not len(self._places):
            raise ValueError(f"{self.path} has no records: give a file with at least one")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        record = self._parse(index)
        return {**record, "id": _id(record, index), "images": self._references(index, record)}

    def id(self, index: int) -> str:
        """Id of a record; its number if it has none."""
        try:
            return _id(self._parse(index), index)
        except BadSample:
            return str(index)

    def _parse(self, index: int) -> Record:
        start, end = self._places[index].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            record = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise BadSample("malformed_record", f"record {index}: {error}") from None
        half = b"\\u" in text and half_character(json.dumps(record, ensure_ascii=False))
        if half:
            raise BadSample(
                "malformed_record", f"record {index} has {half}, half of a surrogate pair: write it as valid UTF-8"
            )
        if not isinstance(record, dict):
            raise BadSample("malformed_record", f"record {index} is not a JSON object")
        return record

    def _references(self, index: int, record: Record) -> list[Any]:
        one, several = _names(record.get("image")), _names(record.get("images"))
        if one and several and one != several:
            raise BadSample("malformed_record", f"record {index}: `image` is {one}, `images` is {several}: keep one")
        names = one or several
        if record.get("video"):
            raise BadSample("video", f"record {index} is about a video: only images are read, give frames as `images`")
        if names and self.store is None:
            raise ValueError(f"{self.path} names images: give their folder, zip or tar (--images, or data.images)")
        return [self.store.ref(name) for name in names]


def _id(record: Record, index: int) -> str:
    """The record's `id`; its number if the id is missing or null, as in exported tables."""
    value = record.get("id")
    return str(index if value is None else value)


def _names(value: Any) -> list[Any]:
    """Names in `image` or `images`; [] for null, an empty value, or the NaN of an exported table."""
    if value is None or value == "" or value != value:
        return []
    return value if isinstance(value, list) else [value]


def _lines(path: Path) -> np.ndarray:
    """Byte range, first and last, of each line that is not blank: int64 (n, 2)."""
    places, at = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                places.append((at, at + len(line)))
            at += len(line)
    return np.array(places, np.int64).reshape(-1, 2)


def _elements(path: Path) -> np.ndarray:
    """Byte range, first and last, of each element of a JSON list: int64 (n, 2).

    The file is decoded as Latin-1, one character per byte; JSON allows non-ASCII bytes only inside strings.
    """
    text = path.read_bytes().decode("latin-1").removeprefix("\u00ef\u00bb\u00bf")  # a byte order mark
    skipped = path.stat().st_size - len(text)
    decoder, places = json.JSONDecoder(), []
    at = _blank(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path} is not a JSON list; a file with one object per line must be named .jsonl")
    at = _blank(text, at + 1)
    while text[at : at + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        places.append((at + skipped, end + skipped))
        at = _blank(text, end)
        if text[at : at + 1] == ",":
            at = _blank(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError(f"{path} is not valid JSON: expecting ',' or ']' at byte {at + skipped}")
    at = _blank(text, at + 1)
    if at < len(text):
        raise ValueError(f"{path} is not valid JSON: something follows its list at byte {at + skipped}")
    return np.array(places, np.int64).reshape(-1, 2)


def _blank(text: str, at: int) -> int:
    """Next position that is not white space."""
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


_WEIGHTED = re.compile(r"(?:(?P<weight>\d+\.?\d*|\.\d+)\*)?(?P<path>\S.*)")


def open_source(path: str, images: str = "", max_pixels: int = MAX_PIXELS) -> Source:
    """Opens one source: `jersey`, `jersey?field=value&...` (fields of `Jersey`), or a file.

    Raises:
      FileNotFoundError, ValueError: as `LlavaJson`; an unknown field of `Jersey`, or a value of another type.
    """
    scheme, _, query = path.partition("?")
    if scheme != "jersey":
        return LlavaJson(path, images, max_pixels)
    defaults = {field.name: field.default for field in dataclasses.fields(Jersey)}
    given: dict[str, Any] = {}
    for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if key not in defaults:
            raise ValueError(f"data.path {path!r}: jersey has no field {key!r}; it has {', '.join(defaults)}")
        kind = type(defaults[key])
        try:
            given[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise ValueError(f"data.path {path!r}: {key}={value!r} is not of type {kind.__name__}") from None
    return Jersey(**given)


def open_sources(path: str, images: str = "", max_pixels: int = MAX_PIXELS) -> list[WeightedSource]:
    """Opens the sources of comma-separated paths `[weight*]path` (default weight 1).

    images: folder, zip or tar of the images; one for all paths, or a comma-separated one for each, in their order.

    Raises:
      FileNotFoundError, ValueError: as `open_source`; no path, another number of image locations than of paths, or a
        weight that is not greater than 0.
    """
    entries = [_WEIGHTED.fullmatch(entry.strip()) for entry in path.split(",")]
    places = [place.strip() for place in images.split(",")]
    if not path or not all(entries):
        raise ValueError(f"data.path={path!r}: give a path, or several as '0.8*a.json, 0.2*jersey'")
    if len(places) == 1:
        places *= len(entries)
    if len(places) != len(entries):
        raise ValueError(f"data.images names {len(places)} places for the {len(entries)} paths of data.path")
    if any(entry["weight"] and float(entry["weight"]) == 0 for entry in entries):
        raise ValueError(f"data.path={path!r}: weights must be greater than 0")
    return [
        WeightedSource(entry["path"], open_source(entry["path"], place, max_pixels), float(entry["weight"] or 1))
        for entry, place in zip(entries, places, strict=True)
    ]


def content_digest(source: Source) -> str:
    """Digest of a source, in hex: its records, and its images as far as that is affordable.

    It covers every byte of a records file, the names and sizes of all members of an archive (and their checksums, which
    a zip has), and conversations and encoded images of `SAMPLED` records, evenly spaced. Files may move.
    """
    found = hashlib.sha256(str(len(source)).encode())
    if isinstance(source, LlavaJson):
        with open(source.path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
        if source.store is not None:
            found.update(source.store.members_digest())
    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        try:
            record = source[int(index)]
            found.update(json.dumps(record.get("conversations")).encode())
            for image in record["images"]:
                found.update(image.digest())
        except BadSample as error:
            found.update(error.reason.encode())
    return found.hexdigest()[:32]


def read_sample(
    source: Source, index: int, tokenizer: Tokenizer, config: ModelConfig, granularities: Sequence[int]
) -> Sample:
    """Reads a record as a tokenized training sample that keeps an answer token at each of the granularities.

    Raises:
      BadSample: the record cannot be used; `reason` says why.
    """
    record = source[index]
    images = record["images"]
    tokens = encode_conversation(record.get("conversations"), tokenizer, config.template, len(images))
    sample = make_sample(record["id"], tokens, images, record.get("kind"))
    if record.get("words"):
        sample = dataclasses.replace(sample, words=read_words(record["words"], tokenizer))
    check_labels(sample, config, granularities)
    return sample
