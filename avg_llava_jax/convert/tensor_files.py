"""Place, the location of a tensor in a weight file, and the header of a safetensors file; `.bin` files: `pickled`."""

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Dtypes of weights, by safetensors name."""

COUNTERS = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32)}
"""Further dtypes for tensors that the model does not run, such as `position_ids`."""


class Place(NamedTuple):
    """The location of a tensor in a file.

    code: safetensors name of its dtype; those in `DTYPES` and `COUNTERS` can be read.
    begin: byte offset of its first element.
    strides: elements from one index to the next along each axis; (3, 1) for a row-major tensor (2, 3).
    """

    path: pathlib.Path
    code: str
    shape: tuple[int, ...]
    begin: int
    strides: tuple[int, ...]

    def map(self) -> np.ndarray:
        """Memory-map the tensor as a read-only view: only the accessed elements are read."""
        dtype = (DTYPES | COUNTERS)[self.code]
        elements = np.memmap(self.path, dtype, "r", self.begin, (extent(self.shape, self.strides),))
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(elements, self.shape, strides, writeable=False)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements from a tensor's first to its last, inclusive: 6 for shape (2, 3) and strides (3, 1)."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


BITS = {
    "BOOL": 8,
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)},
    **{"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits per element of every dtype in the format."""

LONGEST_HEADER = 100_000_000
"""The format's limit, in bytes."""


def read_header(path: pathlib.Path) -> dict[str, Place]:
    """Read the place of every tensor in a safetensors file, by name.

    The file consists of 8 bytes with the length of a JSON object, the object, and the tensors, row-major:
    {"model.norm.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, ...}
    The tensors cover every byte after the object exactly once: no holes, overlaps, trailing bytes or duplicate names.

    Raises:
      ValueError: the file is truncated, damaged, or not a valid safetensors file; one line.
    """
    whole = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(whole - 8, LONGEST_HEADER):
            raise ValueError(f"{path} is truncated or damaged: its {whole} bytes do not hold its header")
        try:
            entries = dict(_entries(path, json.loads(file.read(length).decode(), object_pairs_hook=tuple)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if str(path) in str(error):
                raise
            raise ValueError(f"{path} is damaged, or not a safetensors file: its header is not readable") from None
    at, before = 0, None
    for name, (code, shape, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if code not in BITS:
            raise ValueError(f"{path} is damaged: tensor {name!r} has dtype {code!r}, which safetensors do not have")
        if (end - begin) * 8 != math.prod(shape) * BITS[code]:
            raise ValueError(f"{path} is damaged: tensor {name!r} of shape {shape} does not take {end - begin} bytes")
        if begin < at:
            raise ValueError(f"{path} is damaged: tensors {before!r} and {name!r} overlap")
        if begin > at:
            raise ValueError(f"{path} is damaged: {begin - at} bytes before tensor {name!r} belong to no tensor")
        if 8 + length + end > whole:
            raise ValueError(f"{path} is truncated or damaged: it ends before its tensor {name!r}")
        at, before = end, name
    if 8 + length + at < whole:
        raise ValueError(f"{path} is damaged: {whole - 8 - length - at} trailing bytes belong to no tensor")
    return {
        name: Place(path, code, shape, 8 + length + begin, _rows(shape))
        for name, (code, shape, begin, _) in entries.items()
    }


Pairs = tuple[tuple[str, Any], ...]
"""A JSON object as (name, value) pairs, duplicate names included."""

Entry = tuple[str, tuple[int, ...], int, int]
"""dtype, shape, first byte, last byte + 1; bytes counted from the end of the header."""


def _entries(path: pathlib.Path, header: Pairs) -> Iterator[tuple[str, Entry]]:
    """Name and entry of each tensor in a header; `path` is for errors."""
    for name, values in _object(path, header).items():
        if name != "__metadata__":
            entry = _object(path, values)
            code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if type(code) is not str or any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
                raise ValueError
            name.encode()  # half of a surrogate pair is not a name
            yield name, (code, tuple(shape), begin, end)


def _object(path: pathlib.Path, pairs: Pairs) -> dict[str, Any]:
    """A JSON object of a header; raises ValueError where a name is duplicate."""
    if type(pairs) is not tuple:
        raise ValueError
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{path} is damaged: its header has {name!r} twice")
        found[name] = value
    return found


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a row-major tensor: (3, 1) for (2, 3)."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
