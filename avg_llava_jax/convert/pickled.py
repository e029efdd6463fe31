"""Reads PyTorch's `.bin` weight files without PyTorch and without running code from them.

Since PyTorch 1.6 such a file is an uncompressed zip: `data.pkl` maps each tensor to a part of a storage, in pickled
form, and `data/0`, `data/1`, ... hold the bytes of the storages. A pickle is a list of calls, and a file may name any
Python function to call. This reader replaces each name that a state dict needs (`MEANINGS`) and refuses all others.
"""

import pathlib
import pickle
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, NamedTuple

from avg_llava_jax.convert.tensor_files import COUNTERS, DTYPES, Place, extent

OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of a file by `torch.save` before 1.6: a pickled magic number."""

DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),  # the zip
    *(EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError),  # the pickle
)


class _Storage(NamedTuple):
    """code: safetensors name of its dtype. key: the zip's entry `data/KEY` holds its bytes."""

    code: str
    key: str


class _Tensor(NamedTuple):
    """Description of one tensor in a file; `begin` and `strides` count elements of its storage."""

    storage: _Storage
    shape: tuple[int, ...]
    begin: int
    strides: tuple[int, ...]


class _StateDict(dict):
    """An OrderedDict of the file; its attributes (`_metadata`, versions of modules) are not read."""

    def __setstate__(self, _: Any) -> None:
        pass


def _tensor(storage: _Storage, begin: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
    numbers = (begin, *shape, *strides)
    if type(storage) is not _Storage or any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("it describes a tensor that cannot exist")
    return _Tensor(storage, shape, begin, strides)


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


MEANINGS = {
    "collections.OrderedDict": _StateDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    # Strings: nothing callable.
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}


class _Unpickler(pickle.Unpickler):
    """Every name that a pickle uses goes through `find_class`."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in MEANINGS:
            raise pickle.UnpicklingError(f"it asks for {full!r}, which weights do not need; none of its code was run")
        return MEANINGS[full]

    def persistent_load(self, named: Any) -> _Storage:
        match named:
            case ("storage", str(code), str(key), _, _):  # the last two: device, elements
                return _Storage(code, key)
        raise pickle.UnpicklingError("it refers to an object that is not a storage")


def read_header(path: pathlib.Path) -> dict[str, Place]:
    """Read the place of every tensor in a `.bin` file, by name.

    Raises:
      ValueError: the file has the format from before 1.6, is damaged, or names a function that weights do not need.
    """
    with open(path, "rb") as file:
        if file.read(len(OLD_FORMAT)) == OLD_FORMAT:
            raise ValueError(
                f"{path} has PyTorch's format from before 1.6, which is not supported; rewrite it with PyTorch:"
                " torch.save(torch.load(FILE, weights_only=True), FILE)"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                (root,) = (name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl"))
                entries = {entry.filename.removeprefix(root): entry for entry in archive.infolist()}
                if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                    raise pickle.UnpicklingError("its numbers are big-endian")
                tensors = _Unpickler(archive.open(entries["data.pkl"])).load()
                if not isinstance(tensors, dict):
                    raise pickle.UnpicklingError("it is not a state dict")
                return {name: _place(path, file, entries, name, tensor) for name, tensor in tensors.items()}
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} is refused: {error}") from None
        except DAMAGED as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None


def _place(path: pathlib.Path, file: BinaryIO, entries: dict[str, zipfile.ZipInfo], name: Any, tensor: Any) -> Place:
    if type(name) is not str or type(tensor) is not _Tensor:
        raise pickle.UnpicklingError(f"its {name!r} is not a tensor")
    entry = entries[f"data/{tensor.storage.key}"]
    if entry.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("it is compressed")
    code, known = tensor.storage.code, (DTYPES | COUNTERS).get(tensor.storage.code)
    size = known.itemsize if known else 1
    if (tensor.begin + extent(tensor.shape, tensor.strides)) * size > entry.file_size:
        raise pickle.UnpicklingError(f"its tensor {name!r} exceeds its storage")
    # An entry's bytes follow a header of 30 bytes, then its name and padding; bytes 26 to 29 hold their two lengths.
    file.seek(entry.header_offset + 26)
    begin = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return Place(path, code, tensor.shape, begin + tensor.begin * size, tensor.strides)
