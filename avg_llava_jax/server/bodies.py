"""Bodies of requests: received within bounds, and unpacked within bounds."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Mapping

from starlette.requests import Request

from avg_llava_jax.server.clients import Clients, Key
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal

DISCARDED = 4
"""A body over its limit is read and discarded up to this multiple of the limit, so that the client gets a reply."""
ENCODINGS = ("", "identity", "gzip")


async def receive(request: Request, clients: Clients, who: str | Key, limits: Limits) -> bytes:
    """The body of a request of `who`. Raises Refusal 408, 413 or 429."""
    body = await _read(request, clients, who, limits, limits.body_bytes)
    if body is None:
        raise _too_large(limits)
    return body


async def discard(request: Request, clients: Clients, who: str | Key, limits: Limits) -> None:
    """Read a body that is refused, since many clients send all of it before they read the reply."""
    await _read(request, clients, who, limits, 0)


async def _read(request: Request, clients: Clients, who: str | Key, limits: Limits, keep: int) -> bytes | None:
    """The body; None where it is over `keep` bytes, of which up to `DISCARDED` limits are read."""
    length = request.headers.get("content-length", "0")
    declared = int(length) if length.isdecimal() else 0
    body, size, most = bytearray(), 0, DISCARDED * limits.body_bytes
    if declared > most:
        return None
    try:
        async with clients.arriving(who) as arriving:
            async for chunk in request.stream():
                size += len(chunk)
                if max(size, declared) <= keep:
                    clients.grew(who, arriving, len(chunk))
                    body += chunk
                elif size > most:
                    break
    except TimeoutError:
        raise Refusal(408, "the body did not arrive in time") from None
    return bytes(body) if max(size, declared) <= keep else None


def check_encoding(headers: Mapping[str, str]) -> None:
    """Raise Refusal 415 for a Content-Encoding that `unpacked` does not read."""
    if (encoding := _encoding(headers)) not in ENCODINGS:
        raise Refusal(415, f"Content-Encoding must be gzip or none, not {encoding!r}", code="invalid_content_encoding")


def unpacked(body: bytes, headers: Mapping[str, str], limits: Limits) -> bytes:
    """The body without its Content-Encoding, at most `limits.body_bytes`. Raises Refusal 400, 413 or 415."""
    check_encoding(headers)
    if _encoding(headers) != "gzip":
        return body
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(body)).read(limits.body_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Refusal(400, f"the body is not valid gzip: {error}", code="invalid_gzip") from None
    if len(content) > limits.body_bytes:
        raise _too_large(limits)
    return content


def _encoding(headers: Mapping[str, str]) -> str:
    return headers.get("content-encoding", "").strip().lower()


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"the body is over {limits.body_bytes} bytes: send smaller images", code="body_too_large")
