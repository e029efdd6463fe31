"""Weight folders, read and written one tensor at a time, so that memory never holds a complete file.

Safetensors and PyTorch's `.bin` are read; safetensors are written.
"""

import json
import logging
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from avg_llava_jax.convert import pickled, tensor_files
from avg_llava_jax.convert.tensor_files import COUNTERS, DTYPES, Place

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of a folder's weight file, or of its index less `.index.json`.

The first file found is used, as in the transformers library: model.safetensors, model.safetensors.index.json,
pytorch_model.bin, pytorch_model.bin.index.json.
"""

CODES = {dtype: code for code, dtype in (DTYPES | COUNTERS).items()}

Announced = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of each tensor, by name, in the order of the files."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read the JSON object in a file; raises ValueError, with the file's name, where it holds none."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if type(values) is not dict:
        raise ValueError(f"{path} does not hold a JSON object")
    return values


def index_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The index of a folder's shards; None where it has none, or a single file takes precedence."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return None
        if (folder / f"{name}.index.json").is_file():
            return folder / f"{name}.index.json"
    return None


def weight_files(folder: pathlib.Path) -> list[str]:
    """Names of the folder's weight files: the single file, or those in its index; [] where it has neither."""
    index = index_file(folder)
    if index:
        return sorted(set(weight_map(index).values()))
    return [name for name in WEIGHTS if (folder / name).is_file()][:1]


def weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor name -> file name, from an index file; raises ValueError where the index is not valid."""
    listed = read_json(index).get("weight_map")
    if type(listed) is not dict or not listed or any(type(file) is not str for file in listed.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    for name, file in listed.items():
        if pathlib.Path(file).name != file:
            raise ValueError(f"{index}: tensor {name!r} is in {file!r}, which is not a file beside the index")
    return listed


class Tensors:
    """The weights of a folder (or of the given `files` in it), read by name, one at a time; no file stays open.

    In a sharded folder the index determines which file holds a tensor; a copy in another shard is never read. Other
    weight files (an index beside a single file, shards that the index does not name) are ignored, as in the
    transformers library; a warning names them.

    Raises:
      FileNotFoundError: the folder has no weights, or lacks a file that its index names.
      ValueError: a file is damaged, lacks a tensor that the index assigns to it, or two files hold different bytes for
        a tensor that the index does not name.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[str] = ()):
        self.folder = folder
        self._places: dict[str, Place] = {}
        index = None if files else index_file(folder)
        listed = weight_map(index) if index else {}
        for name in files or weight_files(folder):
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, but the index of the folder names it")
            found = (pickled if path.suffix == ".bin" else tensor_files).read_header(path)
            for tensor, place in found.items():
                if tensor in listed:
                    self._add_listed(tensor, place, listed[tensor], index)
                elif same_bytes(self._places.setdefault(tensor, place), place):
                    pass
                else:
                    raise ValueError(
                        f"{path} and {self._places[tensor].path} hold {tensor!r} with different bytes: remove one file"
                    )
        for tensor, name in listed.items():
            if tensor not in self._places:
                raise ValueError(f"{folder / name} lacks tensor {tensor!r}, which {index.name} assigns to it")
        if not self._places:
            either = " and no ".join(f"{name} (or {name}.index.json)" for name in WEIGHTS)
            raise FileNotFoundError(f"{folder} holds no {either}")
        if not files:
            _say_unread(folder, index, set(listed.values()))
        self.names = self._places.keys()

    def _add_listed(self, tensor: str, place: Place, file: str, index: pathlib.Path) -> None:
        if place.path.name == file:
            self._places[tensor] = place
        else:
            logger.warning("%s holds a tensor %r that is not read: %s says %s", place.path, tensor, index.name, file)

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts with `prefix`."""
        return any(name.startswith(prefix) for name in self.names)

    def place(self, name: str) -> Place:
        """The tensor's place in its file."""
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._places[name].shape

    def dtype(self, name: str, counters: bool = False) -> np.dtype:
        """Dtype from the header alone; raises ValueError unless in `DTYPES` (or, with `counters`, in `COUNTERS`)."""
        code = self._places[name].code
        if counters and code in COUNTERS:
            return COUNTERS[code]
        if code not in DTYPES:
            raise ValueError(f"{self.folder}: tensor {name!r} has dtype {code}, not one of {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        """Read the tensor as a read-only memory-mapped view of its file."""
        return self._places[name].map()


def same_bytes(one: Place, other: Place) -> bool:
    """Whether two places hold equal tensors of one dtype; reads both unless the places are identical."""
    if one == other:
        return True
    if (one.code, one.shape) != (other.code, other.shape) or one.code not in DTYPES | COUNTERS:
        return False
    bits = f"u{(DTYPES | COUNTERS)[one.code].itemsize}"  # a NaN equals itself
    return np.array_equal(np.ascontiguousarray(one.map()).view(bits), np.ascontiguousarray(other.map()).view(bits))


def _say_unread(folder: pathlib.Path, index: pathlib.Path | None, named: set[str]) -> None:
    """Warn about weight files in the folder that are ignored and may be the intended ones."""
    single = next((name for name in WEIGHTS if (folder / name).is_file()), None) if index is None else None
    beside = folder / f"{single}.index.json"
    if single and beside.is_file() and set(weight_map(beside).values()) != {single}:
        logger.warning("%s is read; %s.index.json beside it is not: remove one of them", folder / single, single)
    if index:
        stem, _, suffix = index.name.removesuffix(".index.json").partition(".")
        shards = (path.name for path in sorted(folder.glob(f"{stem}-*-of-*.{suffix}")))
        if unread := [name for name in shards if name not in named]:
            logger.warning("%s: %s not read, because %s does not name it", folder, ", ".join(unread), index.name)


class Catalog:
    """Tensors of one or several folders under the names of the released layout.

    entries: (released name, the folder's tensors, the stored name), in any order.

    Raises:
      ValueError: two entries have the same released name and different bytes, such as an old and a new name.
    """

    def __init__(self, entries: Iterable[tuple[str, Tensors, str]]):
        self._entries: dict[str, tuple[Tensors, str]] = {}
        for name, tensors, stored in entries:
            first, known = self._entries.setdefault(name, (tensors, stored))
            if not same_bytes(first.place(known), tensors.place(stored)):
                raise ValueError(
                    f"{first.folder}: tensor {known!r} and {tensors.folder}: tensor {stored!r} are both {name!r}, with"
                    " different bytes: remove one of them"
                )
        self.names = self._entries.keys()

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts with `prefix`."""
        return any(name.startswith(prefix) for name in self.names)

    def where(self, name: str) -> str:
        """Folder and stored name of a tensor, for error messages."""
        tensors, stored = self._entries[name]
        return f"{tensors.folder}: tensor {stored!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        tensors, stored = self._entries[name]
        return tensors.shape(stored)

    def dtype(self, name: str, counters: bool = False) -> np.dtype:
        """As `Tensors.dtype`."""
        tensors, stored = self._entries[name]
        return tensors.dtype(stored, counters)

    def read(self, name: str) -> np.ndarray:
        """As `Tensors.read`."""
        tensors, stored = self._entries[name]
        return tensors.read(stored)


def save(
    folder: pathlib.Path,
    tensors: Announced,
    read: Callable[[str], np.ndarray],
    shard_size: int,
) -> None:
    """Write tensors as model.safetensors, or as shards with an index where they exceed `shard_size` bytes.

    A file's header precedes its tensors, so `read` is called for one tensor name at a time, and the tensor is
    freed after it is written.
    """
    shards: list[dict[str, Any]] = [{}]
    room = shard_size
    for name, announced in tensors.items():
        size = _bytes(*announced)
        if shards[-1] and size > room:
            shards.append({})
            room = shard_size
        shards[-1][name] = announced
        room -= size
    if len(shards) == 1:
        save_file(folder / "model.safetensors", tensors, read)
        return
    files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(folder / file, shard, read)
    index = {
        "metadata": {"total_size": sum(_bytes(*announced) for announced in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_file(path: pathlib.Path, tensors: Announced, read: Callable[[str], np.ndarray]) -> None:
    """Write one safetensors file; see `save`. Raises AssertionError where `read` returns another shape or dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        size = _bytes(shape, dtype)
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, announced in tensors.items():
            array = np.ascontiguousarray(read(name))
            if (array.shape, array.dtype) != announced:
                raise AssertionError(f"tensor {name!r} is {array.shape} {array.dtype}, announced as {announced}")
            file.write(array.reshape(-1).view(np.uint8).data)


def _bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
