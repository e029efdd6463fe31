"""Images of a request: data URIs, and remote images from allowed hosts.

Format and size are checked from the image's header, before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request

from PIL import Image

from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.images import MemoryImage
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal

FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
FETCH_SECONDS = 10.0
CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class SentImage(MemoryImage):
    """An image from a client, in one of the web's formats; Pillow's other decoders are not trusted with it."""

    def _open(self) -> Image.Image:
        return Image.open(self._source(), formats=FORMATS)


def read_image(url: str, where: str, limits: Limits) -> SentImage:
    """The image at `url`. where: the field that names it, for messages."""
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
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refusal(400, f"{where} must have the form data:image/png;base64,...", where, "invalid_image_url")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise Refusal(400, f"{where}: not valid base64 ({error})", where, "invalid_base64") from None
    if not content:
        raise Refusal(400, f"{where}: the data URI is empty", where, "invalid_base64")
    return content


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
        host = parts.netloc.lower()
    except ValueError as error:
        raise Refusal(400, f"{where}: {error}", where, "invalid_image_url") from None
    if host not in limits.image_hosts:
        raise Refusal(
            400, f"{where}: this server does not fetch images from {host!r}; send a data URI", where, "host_not_allowed"
        )
    deadline, content = time.monotonic() + FETCH_SECONDS, bytearray()
    try:
        with urllib.request.build_opener(_SameHost).open(url, timeout=FETCH_SECONDS) as reply:
            while chunk := reply.read1(CHUNK):
                content += chunk
                if len(content) > limits.image_bytes:
                    raise Refusal(400, f"{where}: over {limits.image_bytes} bytes", where, "too_large_image")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no image within {FETCH_SECONDS:.0f} seconds")
    except (OSError, ValueError, http.client.HTTPException) as error:  # OSError includes URLError and TimeoutError
        raise Refusal(400, f"{where}: cannot fetch the image: {error}", where, "image_not_fetched") from None
    return bytes(content)
