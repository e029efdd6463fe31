"""Limits of one request and of one client."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Upper bounds; a request over one is refused as early as possible.

    body_bytes: of the HTTP body, images included, unpacked. pixels: width x height of one image, from its header.
    images: in all turns together. new_tokens: of an answer. seconds: from the first byte to the last.
    image_bytes: of one remote image. image_hosts: hosts of remote images ("host" or "host:port").
    unknown_fields: whether fields that the server does not know are ignored, not refused.

    Of one client, see `clients`: bodies, bodies_bytes: bodies that are still arriving, in number and bytes.
    body_seconds: from a body's first byte to its last. client_requests: requests that wait or run; None = no bound.
    """

    body_bytes: int = 32 << 20
    pixels: int = 24_000_000
    images: int = 8
    new_tokens: int = 1024
    seconds: float = 120.0
    image_bytes: int = 16 << 20
    image_hosts: tuple[str, ...] = ()
    unknown_fields: bool = False
    bodies: int = 256
    bodies_bytes: int = 256 << 20
    body_seconds: float = 60.0
    client_requests: int | None = None
