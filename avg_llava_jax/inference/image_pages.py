"""Which pages of device memory hold the tiles of which image: pages are few, so the longest unused image goes first.

An image is known by a hash of its tiles, so the same picture is encoded once, whatever file or request it came in.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

Digest = bytes


@dataclasses.dataclass
class Stored:
    """An image's pages. users: requests that still need them; missing: its tiles that are not encoded yet, by page."""

    pages: list[int]
    missing: dict[int, np.ndarray]
    users: int = 0


class ImagePages:
    """Hands out pages 0 .. count - 1.

    hits, misses: images that were there when a request asked for them, and those that were not.
    """

    def __init__(self, count: int):
        self.count = count
        self.hits = self.misses = 0
        self.clear()

    def clear(self) -> None:
        """Forget every image."""
        self._free = list(range(self.count))[::-1]
        self._stored: OrderedDict[Digest, Stored] = OrderedDict()  # the longest unused one first

    def take(self, images: Sequence[tuple[Digest, np.ndarray]]) -> list[list[int]] | None:
        """Pages of each image, kept until `leave`; None, and nothing taken, where too few can be freed.

        images: digests and tiles uint8 (t, H, W, 3); the tiles of new ones are then `missing`.
        """
        new = {digest: tiles for digest, tiles in images if digest not in self._stored}
        wanted = {digest for digest, _ in images}
        idle = [digest for digest, stored in self._stored.items() if not stored.users and digest not in wanted]
        need = sum(map(len, new.values())) - len(self._free)
        for digest in idle:
            if need <= 0:
                break
            need -= len(self._stored[digest].pages)
        if need > 0:
            return None
        need = sum(map(len, new.values()))
        for digest in idle:
            if len(self._free) >= need:
                break
            self._free += self._stored.pop(digest).pages
        self.hits += len(wanted) - len(new)
        self.misses += len(new)
        for digest, tiles in new.items():
            pages = [self._free.pop() for _ in tiles]
            self._stored[digest] = Stored(pages, dict(zip(pages, tiles, strict=True)))
        for digest, _ in images:
            self._stored[digest].users += 1
            self._stored.move_to_end(digest)
        return [self._stored[digest].pages for digest, _ in images]

    def leave(self, digests: Iterable[Digest]) -> None:
        """A request needs its images no more. One that was not encoded yet is forgotten with its last user."""
        for digest in digests:
            stored = self._stored[digest]
            stored.users -= 1
            if not stored.users and stored.missing:
                self._free += self._stored.pop(digest).pages

    def missing(self, most: int) -> dict[int, np.ndarray]:
        """Tiles to encode next, by page, in the order in which they were asked for."""
        found: dict[int, np.ndarray] = {}
        for stored in self._stored.values():
            for page, tile in stored.missing.items():
                if len(found) == most:
                    return found
                found[page] = tile
        return found

    def encoded(self, pages: Iterable[int]) -> None:
        """These pages now hold what they should."""
        done = set(pages)
        for stored in self._stored.values():
            if stored.missing:
                stored.missing = {page: tile for page, tile in stored.missing.items() if page not in done}

    def ready(self, digests: Iterable[Digest]) -> bool:
        """Whether all tiles of these images are encoded."""
        return not any(self._stored[digest].missing for digest in digests)


def digest_of(tiles: np.ndarray, size: tuple[int, int]) -> Digest:
    """What an image is known by: its tiles uint8 (t, H, W, 3), and its size, which says what of them is padding."""
    return hashlib.blake2b(np.ascontiguousarray(tiles), digest_size=16, key=repr(size).encode()).digest()
