"""What one request may cost."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one request; whatever exceeds one is refused before it costs more than reading it.

    body_bytes: of the HTTP body, images included. pixels: width x height of one image, by its header.
    images: in all turns. new_tokens: asked for at most. seconds: from the first byte to the last.
    image_bytes: of one remote image. image_hosts: whence remote images may come ("host" or "host:port").
    """

    body_bytes: int = 32 << 20
    pixels: int = 24_000_000
    images: int = 8
    new_tokens: int = 1024
    seconds: float = 120.0
    image_bytes: int = 16 << 20
    image_hosts: tuple[str, ...] = ()
