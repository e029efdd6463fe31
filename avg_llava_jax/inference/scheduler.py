"""Who gets which slot, what is read next, who decodes: plain Python that knows no device, no model and no clock.

A slot is a row of the KV cache. After an answer it keeps its keys and values until it is needed, so that a later prompt
that begins as they do need not be read from its start. What stands at a position is told by its *key*: a token id, or
(image, granularity) for every visual token of an image.

    slot 0, finished    7 8 (a,36) (a,36) 9 5 2      "<image> Who?" "Ann"
    a follow-up         7 8 (a,36) (a,36) 9 5 2 6 4  reads 6 4 alone, in slot 0
    another prompt      7 8 (b,72) 3                 copies 7 8 into the longest unused slot, and reads (b,72) 3

Prompts are read in chunks, each slot's in turn, so that a long image does not stall the others.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Sequence

from avg_llava_jax.inference.buckets import STEPS, Ladders, chunk_rung, rung

STEPS_BETWEEN_CHUNKS = 4
WORTH_COPYING = 16
"""Positions that two prompts must share for them to be copied from one slot to another."""


@dataclasses.dataclass(eq=False)
class Work:
    """What the scheduler knows of a request.

    keys: of each position of its prompt. limit: tokens to generate at most, at least 1.
    slot: None before it has one. cached: positions of its slot that hold its prompt and answer.
    tokens: generated so far; the newest is not cached.
    """

    keys: list[Hashable] = dataclasses.field(default_factory=list)
    limit: int = 1
    slot: int | None = None
    cached: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Slot:
    """keys: what is cached, position by position. used: when it was last left, in turns; 0 = never."""

    number: int
    keys: list[Hashable] = dataclasses.field(default_factory=list)
    work: Work | None = None
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Admission:
    """A slot's number, and how many positions are there already, copied from the slot `source` if that is not None."""

    slot: int
    shared: int
    source: int | None = None


@dataclasses.dataclass(frozen=True)
class Reading:
    """Prompts that are read at once, each `lengths` positions from where it stands, as a program of this size."""

    works: list[Work]
    lengths: list[int]
    chunk: int
    window: int


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Answers that grow at once, by at most `steps` tokens, as a program of `rows` rows."""

    works: list[Work]
    rows: int
    window: int
    steps: int


class Scheduler:
    """Slots, and the works in them: those whose prompt is being `reading`, and those whose answer is `decoding`."""

    def __init__(self, ladders: Ladders):
        self.ladders = ladders
        self.slots = [Slot(number) for number in range(ladders.slots)]
        self.reading: deque[Work] = deque()
        self.decoding: list[Work] = []
        self._turn = 0

    def admit(self, work: Work) -> Admission | None:
        """Give a work a slot; None where all are taken, or where it should wait for what is being read.

        It gets the free slot that begins as the prompt does, where the prompt goes on from most of it; otherwise the
        one that was not used for longest, and what another slot shares with the prompt is copied. It waits where a
        prompt that is being read will share more than any slot does yet: what they share is read once.
        """
        free = [slot for slot in self.slots if slot.work is None]
        if not free:
            return None
        # The prompt's last position is read in any case: the first token of the answer follows from it.
        shares = {slot.number: common(slot.keys, work.keys[:-1]) for slot in self.slots}
        best = max(self.slots, key=lambda slot: shares[slot.number])
        coming = max((common(other.keys, work.keys[:-1]) for other in self.reading), default=0)
        if coming >= shares[best.number] + WORTH_COPYING:
            return None
        own = max(free, key=lambda slot: shares[slot.number])
        if 2 * shares[own.number] <= len(own.keys):
            own = min(free, key=lambda slot: slot.used)
        shared, source = shares[own.number], None
        if shares[best.number] >= shared + WORTH_COPYING:
            shared, source = shares[best.number], best.number
        own.work, own.keys = work, work.keys[:shared]
        work.slot, work.cached = own.number, shared
        self.reading.append(work)
        return Admission(own.number, shared, source)

    def next_reading(self) -> Reading | None:
        """The next chunk, of as many prompts as there are lanes; the one that waited longest says its size."""
        if not self.reading:
            return None
        works = list(self.reading)[: self.ladders.lanes]
        chunk = chunk_rung(self.ladders.chunks, len(works[0].keys) - works[0].cached)
        lengths = [min(chunk, len(work.keys) - work.cached) for work in works]
        most = max(work.cached for work in works)
        return Reading(works, lengths, chunk, rung(self.ladders.windows, most) if most else 0)

    def read(self, reading: Reading) -> list[Work]:
        """What `next_reading` proposed is in the cache; the works whose prompt has ended, which now decode."""
        ended = []
        for work, length in zip(reading.works, reading.lengths, strict=True):
            self.reading.remove(work)
            self.slots[work.slot].keys += work.keys[work.cached : work.cached + length]
            work.cached += length
            if work.cached == len(work.keys):
                self.decoding.append(work)
                ended.append(work)
            else:
                self.reading.append(work)
        return ended

    def next_decoding(self) -> Decoding | None:
        """All answers that grow, in few steps where prompts wait to be read."""
        if not self.decoding:
            return None
        works = sorted(self.decoding, key=lambda work: work.slot)
        rows = rung(self.ladders.rows, len(works))
        window = rung(self.ladders.windows, max(work.cached for work in works) + STEPS)
        return Decoding(works, rows, window, STEPS_BETWEEN_CHUNKS if self.reading else STEPS)

    def decoded(self, work: Work, tokens: Sequence[int]) -> None:
        """A work has grown: its last token and all but the newest of these are cached now."""
        self.slots[work.slot].keys += [*work.tokens[-1:], *tokens][: len(tokens)]
        work.cached += len(tokens)
        work.tokens += tokens

    def leave(self, work: Work) -> None:
        """A work has ended, or is given up: its slot is free, and keeps what is cached."""
        self._turn += 1
        self.slots[work.slot].work, self.slots[work.slot].used = None, self._turn
        (self.reading if work in self.reading else self.decoding).remove(work)

    def clear(self) -> None:
        """Nothing runs, and nothing is cached."""
        self.reading.clear()
        self.decoding.clear()
        for slot in self.slots:
            slot.work, slot.keys, slot.used = None, [], 0


def common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the common beginning.

    >>> common([7, 8, 9], [7, 8, 5, 9])
    2
    """
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
