"""Folders of weights: read one tensor at a time, and written as they come, so that no file is ever held in memory.

Safetensors and PyTorch's `.bin` are read, safetensors are written.
"""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from avg_llava_jax.convert import pickled, tensor_files
from avg_llava_jax.convert.tensor_files import COUNTERS, DTYPES, Place

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""A folder's weights, or the names of their index less `.index.json`; the first that is there counts."""

CODES = {dtype: code for code, dtype in (DTYPES | COUNTERS).items()}

Announced = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of each tensor, by name, in the order of the files."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; a ValueError that names the file where there is none."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if type(values) is not dict:
        raise ValueError(f"{path} does not hold a JSON object")
    return values


def index_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The index of a folder's shards, if it has one."""
    found = (folder / f"{name}.index.json" for name in WEIGHTS)
    return next((path for path in found if path.is_file()), None)


def weight_files(folder: pathlib.Path) -> list[str]:
    """Names of the folder's weight files, single or those that its index names; [] where it has neither."""
    index = index_file(folder)
    if index:
        return sorted(set(weight_map(index).values()))
    return [name for name in WEIGHTS if (folder / name).is_file()][:1]


def weight_map(index: pathlib.Path) -> dict[str, str]:
    """Tensor -> file, of an index file."""
    listed = read_json(index).get("weight_map")
    if type(listed) is not dict or not listed or any(type(file) is not str for file in listed.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files")
    return listed


class Tensors:
    """The weights of a folder (or the given `files` in it), read by name, one at a time; files are not held open.

    Raises:
      FileNotFoundError, ValueError: no weights, a file is missing, or a file is damaged.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[str] = ()):
        self.folder = folder
        self._places: dict[str, Place] = {}
        for name in files or weight_files(folder):
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though the folder's index names it")
            self._places |= (pickled if path.suffix == ".bin" else tensor_files).read_header(path)
        if not self._places:
            either = " and no ".join(f"{name} (or {name}.index.json)" for name in WEIGHTS)
            raise FileNotFoundError(f"{folder} holds no {either}")
        self.names = self._places.keys()

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts so."""
        return any(name.startswith(prefix) for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return self._places[name].shape

    def dtype(self, name: str, counters: bool = False) -> np.dtype:
        """From the header alone; a ValueError where it is no float of 16 or 32 bits (nor, with `counters`, an int)."""
        code = self._places[name].code
        if counters and code in COUNTERS:
            return COUNTERS[code]
        if code not in DTYPES:
            raise ValueError(f"{self.folder}: tensor {name!r} has dtype {code}, not one of {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str) -> np.ndarray:
        """The tensor: a read-only view of its file, which is read where the view is."""
        return self._places[name].map()


class Catalog:
    """Tensors of one or several folders under the names of the released layout.

    entries: released name -> (folder's tensors, the name they have there).
    """

    def __init__(self, entries: dict[str, tuple[Tensors, str]]):
        self._entries = entries
        self.names = entries.keys()

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts so."""
        return any(name.startswith(prefix) for name in self.names)

    def where(self, name: str) -> str:
        """The folder and the tensor, for errors."""
        tensors, stored = self._entries[name]
        return f"{tensors.folder}: tensor {stored!r}"

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        tensors, stored = self._entries[name]
        return tensors.shape(stored)

    def dtype(self, name: str, counters: bool = False) -> np.dtype:
        """As `Tensors.dtype`."""
        tensors, stored = self._entries[name]
        return tensors.dtype(stored, counters)

    def read(self, name: str) -> np.ndarray:
        """The tensor."""
        tensors, stored = self._entries[name]
        return tensors.read(stored)


def save(
    folder: pathlib.Path,
    tensors: Announced,
    read: Callable[[str], np.ndarray],
    shard_size: int,
) -> None:
    """Write tensors as model.safetensors, or as shards and their index where they exceed `shard_size` bytes.

    The header of a file comes before its tensors, so each is asked for (`read`, by name) when its turn
    comes and then let go.
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
    """Write one safetensors file; see `save`."""
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
