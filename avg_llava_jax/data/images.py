"""Images by reference: the size from the header alone, the pixels only when asked for.

A reference is small and picklable. It holds a place (a file, a member of a zip or tar, memory),
never an open handle, so it travels to worker processes, forked or spawned.

What every image becomes is 8-bit RGB, upright:

* EXIF orientation is applied, and `size` already counts it;
* 16-bit greyscale is scaled to 8 bits (Pillow's own conversion clips at 255: nearly all white);
* everything else is Pillow's `convert("RGB")`, which is what the released code uses: palettes are
  looked up, CMYK is converted, and **alpha is dropped, not composited** - a transparent pixel
  shows the colour stored under it - so that released behaviour is reproduced;
* of an animation, the first frame.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from avg_llava_jax.data.errors import BadSample

# Pillow warns above this many pixels (and refuses twice as many); a good default for a bound.
MAX_PIXELS = 89_478_485

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on a damaged file, depending on the format and on where it is damaged.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """An image that is not loaded yet.

    name: how messages call it.
    max_pixels: width x height above which it is refused before it is decoded. Pillow itself
        refuses above 179 million.
    """

    name: str
    max_pixels: int = dataclasses.field(default=MAX_PIXELS, kw_only=True)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels after EXIF orientation; reads the header only.

        Raises BadSample: `missing_image`, `corrupt_image`, `too_large_image`.
        """
        with self._guard(), self._open() as image:
            return _upright_size(self._bounded(image))

    def load(self) -> Image.Image:
        """The upright RGB image; raises as `size` does."""
        with self._guard(), self._open() as image:
            # Before decoding: a PNG may carry EXIF after its pixels, which `size` never sees.
            orientation = _orientation(self._bounded(image))
            rgb = to_rgb(image)
        return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb

    def digest(self) -> bytes:
        """SHA-256 of the encoded bytes: the same picture under another name has the same; raises `missing_image`."""
        with self._guard():
            source = self._source()
            content = source.getbuffer() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
            return hashlib.sha256(content).digest()

    def _source(self) -> str | io.BytesIO:
        """A path, or the encoded bytes."""
        raise NotImplementedError

    def _open(self) -> Image.Image:
        return Image.open(self._source())

    def _bounded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if width * height > self.max_pixels:
            raise BadSample("too_large_image", f"{self.name}: {width} x {height} is over {self.max_pixels} pixels")
        return image

    def _guard(self) -> _Guard:
        return _Guard(self.name)


class _Guard:
    """Turns whatever opening or decoding raises into one BadSample that names the image."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if error is None or isinstance(error, BadSample):
            return
        if isinstance(error, Image.DecompressionBombError):
            raise BadSample("too_large_image", f"{self.name}: {error}") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
            raise BadSample("missing_image", f"{self.name}: no such file") from error
        if isinstance(error, UnidentifiedImageError):
            raise BadSample("corrupt_image", f"{self.name}: not an image in a known format") from error
        if isinstance(error, _DAMAGE):
            raise BadSample("corrupt_image", f"{self.name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class FileImage(ImageRef):
    """An image file on disk; `name` is its path."""

    def _source(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class ZipImage(ImageRef):
    """A member of a zip archive."""

    archive: str
    member: str

    def _source(self) -> io.BytesIO:
        return io.BytesIO(_zip(self.archive, os.getpid()).read(self.member))


@dataclasses.dataclass(frozen=True)
class TarImage(ImageRef):
    """A member of an uncompressed tar, by the place of its bytes in the archive."""

    archive: str
    start: int
    length: int

    def _source(self) -> io.BytesIO:
        with open(self.archive, "rb") as file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.length))


@dataclasses.dataclass(frozen=True)
class MemoryImage(ImageRef):
    """An image already in memory: encoded bytes, or a Pillow image (which is never changed)."""

    content: bytes | Image.Image

    def _open(self) -> Image.Image:
        if isinstance(self.content, Image.Image):
            return self.content.copy()
        return super()._open()

    def digest(self) -> bytes:
        if isinstance(self.content, Image.Image):
            about = f"{self.content.mode} {self.content.size} ".encode()
            return hashlib.sha256(about + self.content.tobytes()).digest()
        return super().digest()

    def _source(self) -> io.BytesIO:
        return io.BytesIO(self.content)


class ImageStore:
    """Where a data set's images lie: a folder, a .zip, or an uncompressed .tar.

    Only the names are read here, once; the references it gives are independent of it and open
    what they need in whichever process uses them.

    >>> ImageStore("photos.zip").ref("coco/1.jpg").load()   # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike, max_pixels: int = MAX_PIXELS):
        self.path = str(path)
        self.max_pixels = max_pixels
        self._members: dict[str, tuple[int, int]] = {}
        if os.path.isdir(self.path):
            self.kind = "folder"
        elif not os.path.exists(self.path):
            raise FileNotFoundError(f"{self.path}: no such folder, zip or tar of images")
        elif zipfile.is_zipfile(self.path):
            self.kind = "zip"
            with zipfile.ZipFile(self.path) as archive:
                self._members = {name: (0, 0) for name in archive.namelist()}
        else:
            self.kind = "tar"
            self._members = _tar_members(self.path)

    def ref(self, name: str) -> ImageRef:
        """The image of that name; raises BadSample `missing_image` where an archive lacks it.

        In a folder a missing file shows when its size or pixels are first asked for.
        """
        if not isinstance(name, str) or not name:
            raise BadSample("missing_image", f"{name!r} is not the name of an image")
        if self.kind == "folder":
            return FileImage(os.path.join(self.path, name), max_pixels=self.max_pixels)
        member = name.removeprefix("./")
        if member not in self._members:
            raise BadSample("missing_image", f"{self.path} has no member {name}")
        label = f"{self.path}:{member}"
        if self.kind == "zip":
            return ZipImage(label, self.path, member, max_pixels=self.max_pixels)
        return TarImage(label, self.path, *self._members[member], max_pixels=self.max_pixels)


def image_ref(image: str | os.PathLike | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> ImageRef:
    """A reference to anything a caller may hand over: a path, encoded bytes or a Pillow image."""
    if isinstance(image, (bytes, Image.Image)):
        return MemoryImage("image in memory", image, max_pixels=max_pixels)
    return FileImage(os.fspath(image), max_pixels=max_pixels)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, as the head of this file says; the first frame of an animation.

    16-bit values map as v -> round(v / 257), so 0 and 65535 become 0 and 255. Mode "I" is what
    Pillow makes of 16-bit PGM and some PNG files, so it is read as 16 bits too.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())  # undo the premultiplied alpha
    elif image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; straight to RGB warns
    rgb = image.convert("RGB")
    return rgb.copy() if rgb is image else rgb


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 from the header; 1 where there is none or it is nonsense.

    Pillow turns TIFF by itself, size included. PngImageFile.getexif would decode the whole image
    in search of a late EXIF chunk; the base class reads what came before the pixels.
    """
    if image.format == "TIFF":
        return 1
    value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@functools.lru_cache(maxsize=8)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    # One handle for each process: a forked child would share the file position with its parent.
    return zipfile.ZipFile(path)


def _tar_members(path: str) -> dict[str, tuple[int, int]]:
    """Name -> (first byte, length) of every file in an uncompressed tar."""
    try:
        with tarfile.open(path, "r:") as archive:
            return {m.name.removeprefix("./"): (m.offset_data, m.size) for m in archive if m.isreg()}
    except tarfile.ReadError:
        raise ValueError(
            f"{path}: neither a zip nor an uncompressed tar (a compressed tar cannot be read at random: unpack it)"
        ) from None
