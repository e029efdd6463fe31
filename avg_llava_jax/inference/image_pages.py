"""Pages of device memory, one per tile, and the images that they hold; the least recently used image is evicted first.

An image is identified by a hash of its tiles, so the same picture is encoded once, whatever its file or request.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

Digest = bytes


@dataclasses.dataclass
class Stored:
    """An image's pages. users: requests that need them; missing: tiles uint8 (H, W, 3) still to encode, by page.

    adapter: the number of the adapter that encodes it, see `stacked`.
    """

    pages: list[int]
    missing: dict[int, np.ndarray]
    adapter: int
    users: int = 0


class ImagePages:
    """Allocates pages 0 .. count - 1 to images.

    hits, misses: images that were stored when a request asked for them, and those that were not.
    """

    def __init__(self, count: int):
        self.count = count
        self.hits = self.misses = 0
        self.clear()

    def clear(self) -> None:
        """Forget every image."""
        self._free = list(range(self.count))[::-1]
        self._stored: OrderedDict[Digest, Stored] = OrderedDict()  # least recently used first

    def acquire(self, images: Sequence[tuple[Digest, np.ndarray]], adapter: int = 0) -> list[list[int]] | None:
        """Acquire pages for each image until `release`; acquires nothing and returns None if too few can be freed.

        images: digests and tiles uint8 (t, H, W, 3); tiles of new images are `missing` until they are encoded.
        adapter: its number; an image has a different digest for each adapter.
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
            self._stored[digest] = Stored(pages, dict(zip(pages, tiles, strict=True)), adapter)
        for digest, _ in images:
            self._stored[digest].users += 1
            self._stored.move_to_end(digest)
        return [self._stored[digest].pages for digest, _ in images]

    def release(self, digests: Iterable[Digest]) -> None:
        """Release a request's images. An image that is not encoded yet is forgotten with its last user."""
        for digest in digests:
            stored = self._stored[digest]
            stored.users -= 1
            if not stored.users and stored.missing:
                self._free += self._stored.pop(digest).pages

    def missing(self, most: int) -> tuple[int, dict[int, np.ndarray]]:
        """An adapter and at most `most` of its tiles uint8 (H, W, 3) to encode next, by page, in request order."""
        waiting = [stored for stored in self._stored.values() if stored.missing]
        adapter = waiting[0].adapter if waiting else 0
        of_one = (tile for stored in waiting if stored.adapter == adapter for tile in stored.missing.items())
        return adapter, dict(itertools.islice(of_one, most))

    def encoded(self, pages: Iterable[int]) -> None:
        """Mark pages as encoded."""
        done = set(pages)
        for stored in self._stored.values():
            if stored.missing:
                stored.missing = {page: tile for page, tile in stored.missing.items() if page not in done}

    def ready(self, digests: Iterable[Digest]) -> bool:
        """Whether all tiles of these images are encoded."""
        return not any(self._stored[digest].missing for digest in digests)


def digest_of(tiles: np.ndarray, size: tuple[int, int]) -> Digest:
    """Hash an image: its tiles uint8 (t, H, W, 3), and its size in pixels, which tells padding from image."""
    return hashlib.blake2b(np.ascontiguousarray(tiles), digest_size=16, key=repr(size).encode()).digest()
