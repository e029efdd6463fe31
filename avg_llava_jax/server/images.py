"""Images of a request: data URIs, and remote images from allowed hosts.

Format and size are checked from the image's header, before anything is decoded. `tiles_of` decodes; it runs in a few
threads of its own, so images in memory are few, however many requests there are.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request

from PIL import Image

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.images import ImageRef, MemoryImage
from avg_llava_jax.inference.job import Images, read_images
from avg_llava_jax.inference.requests import Prepared
from avg_llava_jax.server import VERSION
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal

FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
FETCH_SECONDS = 10.0
CHUNK = 1 << 16
USER_AGENT = f"avg_llava_jax/{VERSION}"  # some hosts refuse Python's own


@dataclasses.dataclass(frozen=True)
class SentImage(MemoryImage):
    """An image from a client, in one of the web's formats; Pillow's other decoders are not trusted with it."""

    def _open(self) -> Image.Image:
        return Image.open(self._source(), formats=FORMATS)


@dataclasses.dataclass(frozen=True)
class TiledImage(ImageRef):
    """An image whose tiles are cut: its size is what is left of it."""

    pixels: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels


def tiles_of(config: ModelConfig, prepared: Prepared) -> tuple[Prepared, Images]:
    """Decode a request's images: the request without their files, and their tiles.

    Raises Refusal 400 where one cannot be decoded; names its field.
    """
    sample = prepared.sample
    try:
        tiles = read_images(config, sample)
    except BadSample as error:
        where = next((ref.name for ref in sample.images if error.detail.startswith(f"{ref.name}:")), None)
        raise Refusal(400, error.detail, where, error.reason) from None
    refs = tuple(TiledImage(ref.name, size) for ref, size in zip(sample.images, sample.sizes, strict=True))
    request = dataclasses.replace(prepared.request, images=refs)
    return dataclasses.replace(prepared, request=request, sample=dataclasses.replace(sample, images=refs)), tiles


def read_image(url: str, where: str, limits: Limits) -> SentImage:
    """The image at `url`. where: the field that names it, for messages."""
    url = url.strip()
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        content = _decoded(url, where)
    elif scheme in ("http", "https"):
        content = _fetched(url, where, limits)
    else:
        raise Refusal(400, f"{where} must be a data URI (data:image/png;base64,...)", where, "invalid_image_url")
    image = SentImage(where, content, max_pixels=limits.pixels)
    try:
        image.size  # noqa: B018 (reads the header)
    except BadSample as error:
        known = f" (known: {', '.join(FORMATS)})" if "known format" in error.detail else ""
        raise Refusal(400, error.detail + known, where, error.reason) from None
    return image


def _decoded(url: str, where: str) -> bytes:
    """The bytes of a data URI. Its base64 may be wrapped into lines, URL-safe, percent-encoded or without padding."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refusal(400, f"{where} must have the form data:image/png;base64,...", where, "invalid_image_url")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        content = _mended(data, where)
    if not content:
        raise Refusal(400, f"{where}: the data URI is empty", where, "invalid_base64")
    return content


def _mended(data: str, where: str) -> bytes:
    """The bytes of base64 that is not quite: cleaning takes longer than decoding, so only where that fails."""
    if "%" in data:
        data = urllib.parse.unquote(data)
    data = re.sub(r"\s", "", data).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{where}: not valid base64 ({error})", where, "invalid_base64") from None


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects only within the same scheme and host."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if (old.scheme, old.netloc) != (new.scheme, new.netloc):
            raise urllib.error.URLError(f"it redirects to another host, {new.scheme}://{new.netloc}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetched(url: str, where: str, limits: Limits) -> bytes:
    """The bytes of a remote image whose host the operator allows."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = _ascii_host(parts.netloc)
    except ValueError as error:
        raise Refusal(400, f"{where}: {error}", where, "invalid_image_url") from None
    if host not in map(_ascii_host, limits.image_hosts):
        raise Refusal(
            400, f"{where}: this server does not fetch images from {host!r}; send a data URI", where, "host_not_allowed"
        )
    path, query = (urllib.parse.quote(text, safe="%/:=&?~+!$,;'@()*[]") for text in (parts.path, parts.query))
    url = urllib.parse.urlunsplit((parts.scheme, host, path, query, ""))
    request = urllib.request.Request(url, headers={"User-Agent": USER_AGENT, "Accept": "image/*"})
    deadline, content = time.monotonic() + FETCH_SECONDS, bytearray()
    try:
        with urllib.request.build_opener(_SameHost).open(request, timeout=FETCH_SECONDS) as reply:
            while chunk := reply.read1(CHUNK):
                content += chunk
                if len(content) > limits.image_bytes:
                    raise Refusal(400, f"{where}: over {limits.image_bytes} bytes", where, "too_large_image")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no image within {FETCH_SECONDS:.0f} seconds")
    except (OSError, ValueError, http.client.HTTPException) as error:  # OSError includes URLError and TimeoutError
        raise Refusal(400, f"{where}: cannot fetch the image: {error}", where, "image_not_fetched") from None
    return bytes(content)


def _ascii_host(netloc: str) -> str:
    """A host in lower case, umlauts as in DNS: Bücher.example:80 becomes xn--bcher-kva.example:80."""
    host, colon, port = netloc.lower().partition(":")
    return host.encode("idna").decode() + colon + port if not host.isascii() else netloc.lower()
