"""Image references: `size` reads only the header, `load` decodes the pixels.

A reference is small and picklable. It holds a location (a file, a member of a zip or tar, memory),
never an open handle, so worker processes, forked or spawned, can use it.

Every image is decoded to upright 8-bit RGB:

* EXIF orientation is applied, and `size` already counts it;
* 16-bit greyscale is scaled to 8 bits (Pillow's own conversion clips at 255: nearly all white);
* everything else goes through Pillow's `convert("RGB")`, as in the released code: palettes are
  looked up, CMYK is converted, and **alpha is dropped, not composited** - a transparent pixel
  shows the colour stored under it;
* an animation gives its first frame.

Broken metadata never make an image unreadable: a PNG or JPEG that Pillow refuses for its profile, text or EXIF is
decoded without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import posixpath
import stat
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from avg_llava_jax.data.errors import BadSample

# Pillow warns above this number of pixels and refuses more than twice as many; it is the default of max_pixels,
# which replaces the warning.
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

SPARSE = (-1, -1)
"""Marks a sparse member of a tar, in place of its first byte and length."""

_PNG = b"\x89PNG\r\n\x1a\n"
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


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """An image that is not loaded yet.

    name: its name in messages.
    max_pixels: largest width x height; a larger image is refused before it is decoded. Every function that creates
        references takes it as an argument. Pillow itself refuses above 179 million.
    """

    name: str
    max_pixels: int = dataclasses.field(default=MAX_PIXELS, kw_only=True)

    @property
    def size(self) -> tuple[int, int]:
        """Size (width, height) in pixels after EXIF orientation; reads only the header.

        Raises BadSample: `missing_image`, `corrupt_image`, `too_large_image`.
        """
        with self._guard(), self._opened() as image:
            return _upright_size(self._bounded(image))

    def load(self) -> Image.Image:
        """Decodes the upright RGB image; raises as `size`."""
        with self._guard(), self._opened() as image:
            # Before decoding: a PNG may carry EXIF after its pixels, which `size` never sees.
            orientation = _orientation(self._bounded(image))
            try:
                rgb = to_rgb(image)
            except Exception as error:
                with self._opened_bare(error) as bare:
                    rgb = to_rgb(self._bounded(bare))
        return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb

    def digest(self) -> bytes:
        """SHA-256 of the encoded bytes, 32 bytes, independent of the file's name; raises BadSample `missing_image`."""
        with self._guard():
            source = self._source()
            content = source.getbuffer() if isinstance(source, io.BytesIO) else Path(source).read_bytes()
            return hashlib.sha256(content).digest()

    def _source(self) -> str | io.BytesIO:
        """A path, or the encoded bytes."""
        raise NotImplementedError

    def _open(self) -> Image.Image:
        return Image.open(self._source())

    def _opened(self) -> Image.Image:
        """Opens the image, without its metadata where Pillow cannot read it otherwise."""
        try:
            return self._open()
        except (BadSample, FileNotFoundError, Image.DecompressionBombError):
            raise
        except Exception as error:
            return self._opened_bare(error)

    def _opened_bare(self, error: Exception) -> Image.Image:
        """Opens the image without its metadata; raises `error`, the first failure, where that fails too."""
        source = self._source()
        if isinstance(source, str):
            with open(source, "rb") as file:
                source = io.BytesIO(file.read())
        bare = without_metadata(source.getvalue())
        if bare is None:
            raise error
        try:
            return Image.open(io.BytesIO(bare), formats=("PNG", "JPEG"))
        except UnidentifiedImageError:
            raise error from None

    def _bounded(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if not width * height:
            raise BadSample("corrupt_image", f"{self.name}: {width} x {height} is no pixel")
        if width * height > self.max_pixels:
            raise BadSample(
                "too_large_image", f"{self.name}: {width} x {height} is over {self.max_pixels} pixels (max_pixels)"
            )
        return image

    def _guard(self) -> _Guard:
        return _Guard(self.name)


class _Guard:
    """Turns any error of opening, unpacking or decoding into one BadSample that names the image.

    Decoders raise errors of any type (NotImplementedError for a DDS of an unknown kind), and so do archives
    (RuntimeError for an encrypted member).
    """

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
        if isinstance(error, Exception):
            raise BadSample("corrupt_image", f"{self.name}: {str(error) or type(error).__name__}") from error


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
    """A member of an uncompressed tar, by its byte offset and length in the archive."""

    archive: str
    start: int
    length: int

    def _source(self) -> io.BytesIO:
        with open(self.archive, "rb") as file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.length))


@dataclasses.dataclass(frozen=True)
class MemoryImage(ImageRef):
    """An image in memory: encoded bytes, or a Pillow image, which is never modified."""

    content: bytes | Image.Image

    def _open(self) -> Image.Image:
        if isinstance(self.content, Image.Image):
            return self.content.copy()
        return super()._open()

    def digest(self) -> bytes:
        """SHA-256 of the encoded bytes; for a Pillow image, of its mode, size and pixels."""
        if isinstance(self.content, Image.Image):
            about = f"{self.content.mode} {self.content.size} ".encode()
            return hashlib.sha256(about + self.content.tobytes()).digest()
        return super().digest()

    def _source(self) -> io.BytesIO:
        return io.BytesIO(self.content)


class ImageStore:
    """The images of a data set: a folder, a .zip, or an uncompressed .tar.

    Hard and symbolic links in an archive to its own files or folders are followed, as in a folder. The constructor
    reads only the names. References are independent of the store: each opens its file in the process that uses it.

    Raises FileNotFoundError if the path does not exist, ValueError if it is neither a folder, a zip nor an
    uncompressed tar, or its directory is damaged.

    >>> ImageStore("photos.zip").ref("coco/1.jpg").load()   # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike, max_pixels: int = MAX_PIXELS):
        self.path = str(path)
        self.max_pixels = max_pixels
        self._members: dict[str, Any] = {}  # by path: the name in a zip, (first byte, length) in a tar
        self._links: dict[str, str] = {}  # path -> path
        if os.path.isdir(self.path):
            self.kind = "folder"
        elif not os.path.exists(self.path):
            raise FileNotFoundError(f"{self.path}: no such folder, zip or tar of images")
        elif zipfile.is_zipfile(self.path) or _begins(self.path, b"PK\3\4"):
            self.kind = "zip"
            try:
                self._members, self._links = _zip_members(self.path)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.path}: its directory is damaged ({error}): copy or pack it again") from None
        else:
            self.kind = "tar"
            self._members, self._links = _tar_members(self.path)

    def members_digest(self) -> bytes:
        """SHA-256 of an archive's members: names, sizes and places, in a zip checksums too; of a folder, of nothing."""
        members = self._members
        if self.kind == "zip":
            with zipfile.ZipFile(self.path) as archive:
                members = {info.filename: (info.CRC, info.file_size) for info in archive.infolist()}
        return hashlib.sha256(repr(sorted(members.items())).encode()).digest()

    def ref(self, name: str) -> ImageRef:
        """A reference to the image of that name; raises BadSample `missing_image` where an archive lacks it.

        A file missing from a folder raises when `size` or `load` is first called.
        """
        if not isinstance(name, str) or not name:
            raise BadSample("missing_image", f"{name!r} is not the name of an image")
        if self.kind == "folder":
            return FileImage(os.path.join(self.path, name), max_pixels=self.max_pixels)
        path = posixpath.normpath(_slashed(name) if self.kind == "zip" else name)
        member = self._members.get(_followed(path, self._members, self._links))
        if member is None:
            link = f": it is a link to {self._links[path]}" if path in self._links else ""
            raise BadSample("missing_image", f"{self.path} has no member {name}{link}")
        if member is SPARSE:
            raise BadSample("missing_image", f"{self.path}: {name} is stored with holes: pack it without --sparse")
        label = f"{self.path}:{path}"
        if self.kind == "zip":
            return ZipImage(label, self.path, member, max_pixels=self.max_pixels)
        return TarImage(label, self.path, *member, max_pixels=self.max_pixels)


def image_ref(image: str | os.PathLike | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> ImageRef:
    """A reference to a path, to encoded bytes or to a Pillow image."""
    if isinstance(image, (bytes, Image.Image)):
        return MemoryImage("image in memory", image, max_pixels=max_pixels)
    return FileImage(os.fspath(image), max_pixels=max_pixels)


def without_metadata(content: bytes) -> bytes | None:
    """A PNG or JPEG file with the same pixels and without its metadata; None for other formats and truncated files.

    A PNG keeps its critical chunks (IHDR, PLTE, IDAT, IEND) and valid EXIF. A JPEG loses comments and application
    segments, except EXIF and valid JFIF and Adobe segments, which define its colours.
    """
    if content.startswith(_PNG):
        return _png_without_metadata(content)
    return _jpeg_without_metadata(content) if content.startswith(b"\xff\xd8") else None


def _png_without_metadata(content: bytes) -> bytes | None:
    # A chunk: length of its data, name, data, CRC. The name of a critical one begins with a capital letter.
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        name = content[at + 4 : at + 8]
        sound = zlib.crc32(content[at + 4 : end - 4]).to_bytes(4, "big") == content[end - 4 : end]
        if name[:1].isupper() or (name == b"eXIf" and sound):
            kept.append(content[at:end])
        at = end
        if name == b"IEND":
            return b"".join(kept)
    return None


def _jpeg_without_metadata(content: bytes) -> bytes | None:
    # A segment before the scan: FF, its kind, two bytes of length (which counts itself), data.
    kept, at = [content[:2]], 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        kind, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        data = content[at + 4 : end]
        if kind == 0xDA:  # start of scan: the rest is pixels
            return b"".join([*kept, content[at:]])
        jfif, adobe = data.startswith(b"JFIF\0") and len(data) >= 12, data.startswith(b"Adobe") and len(data) >= 12
        exif = data.startswith(b"Exif\0\0")
        application, comment = 0xE0 <= kind <= 0xEF, kind == 0xFE
        if not (application or comment) or (kind, True) in ((0xE0, jfif), (0xE1, exif), (0xEE, adobe)):
            kept.append(content[at:end])
        at = end
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB by the rules in this module's docstring; takes the first frame of an animation.

    16-bit values map as v -> round(v / 257), so 0 and 65535 become 0 and 255. Pillow opens 16-bit PGM
    and some PNG files in mode "I", so that mode counts as 16 bits too.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())  # undo the premultiplied alpha
    elif image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; a direct conversion to RGB warns
    rgb = image.convert("RGB")
    return rgb.copy() if rgb is image else rgb


def resized(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resizes to (width, height): the width is resampled first, then the height, one axis per call.

    Values are rounded to 8 bits between the two passes, so their order changes the result. In one call, Pillow up to 12
    resamples the width first, as in the training of the released weights; Pillow 13 resamples the height of some tall
    images first, which changes values of noise by about 20 levels of 255.

        300 x 1000 to 336 x 336:   300 x 1000 -> 336 x 1000 -> 336 x 336
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def squared(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Pads an RGB image to a square with a colour, the image in its middle; odd padding has its larger part last.

        4 x 1: rows of padding, image, padding, padding
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 from the header; 1 if it is absent or invalid.

    Pillow rotates TIFF itself, size included. PngImageFile.getexif would decode the complete image
    in search of a late EXIF chunk; the base class reads only what precedes the pixels.
    """
    if image.format == "TIFF":
        return 1
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # an invalid EXIF block raises errors of any type
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


@functools.lru_cache(maxsize=8)
def _zip(path: str, process: int) -> zipfile.ZipFile:
    # One handle per process: a forked child would share the file position with its parent.
    return zipfile.ZipFile(path)


def _zip_members(path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Path -> name of every file in a zip, and path -> path of every symbolic link."""
    members, links = {}, {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = posixpath.normpath(_slashed(info.filename))
            if info.create_system == 3 and stat.S_ISLNK(
                info.external_attr >> 16
            ):  # 3: Unix; the member's content is the link's target
                with contextlib.suppress(Exception):  # a link that cannot be unpacked has no target
                    links[name] = _beside(name, archive.read(info).decode())
            elif not info.is_dir():
                members[name] = info.filename
    return members, links


def _begins(path: str, content: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(content)) == content


def _slashed(name: str) -> str:
    """A path in a zip; some programs of Windows write their own separator."""
    return name.replace("\\", "/")


def _tar_members(path: str) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Path -> (first byte, length) of every file in an uncompressed tar, and path -> path of every link."""
    members, links = {}, {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = posixpath.normpath(info.name)
                members.pop(name, None), links.pop(name, None)  # of duplicate names, the last one wins
                if info.issparse():  # its bytes are not contiguous there
                    members[name] = SPARSE
                elif info.isreg():
                    members[name] = info.offset_data, info.size
                elif info.islnk():  # a hard link's target is a path in the archive, a symbolic link's is relative to it
                    links[name] = posixpath.normpath(info.linkname)
                elif info.issym():
                    links[name] = _beside(name, info.linkname)
    except tarfile.ReadError as error:
        if members:
            raise ValueError(f"{path}: it is damaged or cut ({error}): copy or pack it again") from None
        raise ValueError(
            f"{path}: neither a zip nor an uncompressed tar (a compressed tar cannot be read at random: unpack it)"
        ) from None
    return members, links


def _beside(link: str, target: str) -> str:
    """Target of a symbolic link: ("a/b.png", "../c.png") -> "c.png"."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(link), target))


def _followed(path: str, members: Container[str], links: Mapping[str, str], most: int = 40) -> str:
    """Resolves the links of a path and of its folders; returns it unchanged if there are none, or too many."""
    at = path
    for _ in range(most):
        if at in members:
            return at
        rest, head = "", at
        while head and head not in links:
            head, _, tail = head.rpartition("/")
            rest = f"{tail}/{rest}" if rest else tail
        if not head:
            return path
        at = posixpath.normpath(posixpath.join(links[head], rest)) if rest else links[head]
    return path
