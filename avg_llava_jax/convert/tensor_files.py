"""Where a tensor lies in a weight file, and the header of a safetensors file; for a `.bin`, see `pickled`."""

import json
import math
import pathlib
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""What weights may be stored as."""

COUNTERS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}
"""What tensors that nothing computes with may be stored as besides, as `position_ids`."""


class Place(NamedTuple):
    """A tensor in a file.

    code: its dtype as safetensors call it; those of `DTYPES` and `COUNTERS` can be read.
    begin: byte of its first element.
    strides: elements from one index to the next along each axis; (3, 1) for a tensor (2, 3) in rows.
    """

    path: pathlib.Path
    code: str
    shape: tuple[int, ...]
    begin: int
    strides: tuple[int, ...]

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of the file: what is taken of it is read, and no memory holds the rest."""
        dtype = (DTYPES | COUNTERS)[self.code]
        elements = np.memmap(self.path, dtype, "r", self.begin, (extent(self.shape, self.strides),))
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements, self.shape, strides, writeable=False)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last, both counted: 6 for shape (2, 3) and strides (3, 1)."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def read_header(path: pathlib.Path) -> dict[str, Place]:
    """The place of every tensor in a safetensors file, by name.

    The file is 8 bytes with the length of a JSON object, the object, then the tensors, each in rows:
    {"model.norm.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, ...}

    Raises:
      ValueError: truncated or damaged; one line.
    """
    whole = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > whole - 8:
            raise ValueError(f"{path} is truncated or damaged: its {whole} bytes do not hold its header")
        try:
            entries = {
                name: (str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                for name, entry in json.loads(file.read(length)).items()
                if name != "__metadata__"
            }
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f"{path} is damaged, or no safetensors file: its header is not readable") from None
    places = {}
    for name, (code, shape, begin, end) in entries.items():
        known = (DTYPES | COUNTERS).get(code)
        if begin < 0 or min(shape, default=0) < 0 or (known and end - begin != math.prod(shape) * known.itemsize):
            raise ValueError(f"{path} is damaged: tensor {name!r} of shape {shape} does not take {end - begin} bytes")
        if 8 + length + end > whole:
            raise ValueError(f"{path} is truncated or damaged: it ends before its tensor {name!r}")
        rows = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        places[name] = Place(path, code, shape, 8 + length + begin, rows)
    return places
