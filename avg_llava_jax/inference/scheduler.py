"""The scheduler assigns slots and picks the prompts to prefill and the answers to decode: no device, model or clock.

A slot holds one sequence in the KV cache. After an answer it keeps its keys and values until it is reassigned, so that
a later prompt with the same prefix prefills only the rest. A *key*, an int64, identifies the content of a position: a
token id, or for every visual token of an image a negative number that stands for the image and its granularity.

    slot 0, finished    7 8 -36 -36 9 5 2      "<image> Who?" "Ann"
    a follow-up         7 8 -36 -36 9 5 2 6 4  prefills 6 4 alone, in slot 0
    another prompt      7 8 -72 3              copies 7 8 to the least recently used slot, and prefills -72 3

(Real prefixes are longer: fewer than `WORTH_COPYING` shared positions are prefilled again.) Prompts prefill in chunks,
each in turn, so that a long prompt does not stall the others. Prompts whose next chunk has the same size prefill
together.

A prompt may end in a draft of its answer, whose tokens prefill with it. Every position from the prompt's last on
predicts a token. Predictions hold up to and including the first that differs from the draft, as in decoding:

    prompt 7 8 -72 -72 9, draft 5 6 4    keys 7 8 -72 -72 9  5  6  4
                                         predictions         5  3  1  2    hold: 5 3; cached: 7 8 -72 -72 9 5
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np

from avg_llava_jax.inference.buckets import STEPS, VERIFIED, Buckets, bucket, chunk_bucket

STEPS_BETWEEN_CHUNKS = 4
NO_KEYS = np.zeros(0, np.int64)
WORTH_COPYING = 16
"""The shortest shared prefix, in positions, that is copied from one slot to another."""

LONGEST_RESUME_CHUNK = 512
"""The most positions of a prefill that follows a cached prefix: its attention holds all scores in memory."""


@dataclasses.dataclass(eq=False)
class Work:
    """The scheduler's state of a request.

    keys: int64 (S,), one per position of its prompt and of the draft behind it. draft: tokens of the draft.
    limit: tokens to generate at most, at least 1.
    slot: None before it has one. cached: positions of its slot that hold its prompt and answer.
    tokens: generated so far; the newest is not cached. each_token: whether to stream token by token.
    waits_for: a work that is prefilling a prefix which this one shares.
    """

    keys: np.ndarray = dataclasses.field(default_factory=lambda: NO_KEYS)
    draft: int = 0
    limit: int = 1
    slot: int | None = None
    cached: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    each_token: bool = False
    waits_for: Work | None = None

    @property
    def prompt(self) -> int:
        """Positions of the prompt, without the draft."""
        return len(self.keys) - self.draft


@dataclasses.dataclass
class Slot:
    """A slot of the cache. keys: int64 (n,), of its cached positions. used: the turn of its last release, 0 = never."""

    number: int
    keys: np.ndarray = dataclasses.field(default_factory=lambda: NO_KEYS)
    work: Work | None = None
    used: int = 0


@dataclasses.dataclass(frozen=True)
class Admission:
    """A work's slot. shared: positions of its prompt that are cached. source: the slot to copy them from, or None."""

    slot: int
    shared: int
    source: int | None = None


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Prompts that prefill together, `lengths[i]` positions from `starts[i]` each, and the size of their program.

    predicts: how many of the last positions of each predict a token, 0 before the end of its prompt.
    """

    works: list[Work]
    starts: list[int]
    lengths: list[int]
    predicts: list[int]
    prompts: int
    chunk: int
    window: int
    predicted: int


@dataclasses.dataclass(frozen=True)
class Decode:
    """Answers that decode together, at most `steps` tokens more, and the size of their program."""

    works: list[Work]
    rows: int
    window: int
    steps: int


class Scheduler:
    """Slots and the works in them. prefilling: works whose prompts prefill. decoding: works whose answers decode."""

    def __init__(self, buckets: Buckets):
        self.buckets = buckets
        self.slots = [Slot(number) for number in range(buckets.slots)]
        self.prefilling: deque[Work] = deque()
        self.decoding: list[Work] = []
        self._turn = 0

    @property
    def free(self) -> bool:
        """Whether a slot is free."""
        return any(slot.work is None for slot in self.slots)

    def admit(self, work: Work) -> Admission | None:
        """Assign a slot to a work; None if no slot is free, or if it should wait for a shared prefix.

        The work gets the free slot that shares most of its content with the prompt; otherwise the least recently used
        free slot, into which the longest prefix of another slot is copied. It waits if a prompt that is prefilling
        will share a longer prefix than any slot does now, so that the prefix is prefilled once.
        """
        free = [slot for slot in self.slots if slot.work is None]
        if not free or (work.waits_for is not None and work.waits_for in self.prefilling):
            return None
        shares = self._shares(work)
        best = max(self.slots, key=lambda slot: shares[slot.number])
        coming = {_shared(other.keys, work.keys): other for other in self.prefilling}
        if coming and max(coming) >= shares[best.number] + WORTH_COPYING:
            work.waits_for = coming[max(coming)]
            return None
        own = max(free, key=lambda slot: shares[slot.number])
        if 2 * shares[own.number] <= len(own.keys):
            own = min(free, key=lambda slot: (slot.used, slot.number))
        return self._assign(work, own, shares)

    def readmit(self, work: Work) -> Admission:
        """Prefill the new keys of a work that decodes, in its slot, which keeps what both prompts share."""
        self.decoding.remove(work)
        work.tokens = []
        return self._assign(work, self.slots[work.slot], self._shares(work))

    def _shares(self, work: Work) -> dict[int, int]:
        """Positions of the work's prompt that each slot holds."""
        return {slot.number: _shared(slot.keys, work.keys[: work.prompt]) for slot in self.slots}

    def _assign(self, work: Work, own: Slot, shares: dict[int, int]) -> Admission:
        best = max(self.slots, key=lambda slot: shares[slot.number])
        shared, source = shares[own.number], None
        if shares[best.number] >= shared + WORTH_COPYING:
            shared, source = shares[best.number], best.number
        own.work, own.keys = work, work.keys[:shared]
        work.slot, work.cached = own.number, shared
        self.prefilling.append(work)
        return Admission(own.number, shared, source)

    def next_group(self, works: Sequence[Work], partial: bool) -> list[Work]:
        """The works to give slots to next, so that prompts of one bucket prefill together in full calls.

        Of works that share a prefix, the first is prefilled alone. The others follow once a slot holds the prefix, and
        before it is overwritten. Of the rest, the fullest bucket is next, in multiples of `buckets.prompts[-1]`.

        partial: return less than a full call if there is no full one.
        """
        free = sum(slot.work is None for slot in self.slots)
        sizes = [bucket(self.buckets.chunks, len(work.keys)) for work in works]
        cached = {size: {_prefix(slot.keys, size) for slot in self.slots} for size in set(sizes)}
        seen = {_prefix(work.keys, bucket(self.buckets.chunks, len(work.keys))) for work in self.prefilling}
        groups: dict[tuple[bool, int], list[Work]] = {}
        for work, size in zip(works, sizes, strict=True):
            prefix = _prefix(work.keys, size)
            follows = prefix in cached[size]
            if follows or prefix not in seen:
                groups.setdefault((follows, size), []).append(work)
            seen.add(prefix)
        (follows, _), group = max(groups.items(), key=lambda item: (item[0][0], len(item[1])), default=((True, 0), []))
        count = min(len(group), free)
        full = count - count % self.buckets.prompts[-1]
        return group[: count if follows or (partial and not full) else full]

    def next_prefill(self, fullest: bool = False) -> Prefill | None:
        """The next chunk of the prompt that waited longest, with all prompts whose next chunk has the same size.

        fullest: take the most common size instead.
        """
        if not self.prefilling:
            return None
        by_size: dict[tuple[int, int, int], list[Work]] = {}
        for work in self.prefilling:
            by_size.setdefault(self._size(work), []).append(work)
        size = max(by_size, key=lambda size: len(by_size[size])) if fullest else next(iter(by_size))
        (chunk, window, predicted), works = size, by_size[size][: self.buckets.prompts[-1]]
        # A chunk that would end after the slot's capacity starts earlier, and prefills some positions again.
        starts = [min(work.cached, self.buckets.capacity - chunk) for work in works]
        lengths = [min(chunk, self._stop(work) - start) for work, start in zip(works, starts, strict=True)]
        predicts = [
            max(0, start + length - max(work.cached, work.prompt - 1))
            for work, start, length in zip(works, starts, lengths, strict=True)
        ]
        prompts = bucket(self.buckets.prompts, len(works))
        return Prefill(works, starts, lengths, predicts, prompts, chunk, window, predicted)

    def _stop(self, work: Work) -> int:
        """The position before which the next chunk of a work ends; in a draft it predicts at most `VERIFIED` tokens."""
        if not work.draft:
            return len(work.keys)
        longest = self.buckets.longest_draft_chunk
        if work.cached:
            longest = min(longest, LONGEST_RESUME_CHUNK)
        known = max(work.cached, work.prompt - 1)
        stop = min(len(work.keys), known + min(VERIFIED, longest))
        return stop if stop - work.cached <= longest else known

    def _size(self, work: Work) -> tuple[int, int, int]:
        """(chunk, window, predicted) of the next chunk of a work."""
        stop = self._stop(work)
        left, window = stop - work.cached, 0
        if not work.cached:
            chunk = chunk_bucket(self.buckets.chunks, left)
        else:
            chunk = chunk_bucket(self.buckets.resume_chunks, min(left, LONGEST_RESUME_CHUNK))
            window = bucket(self.buckets.windows, min(work.cached + chunk, self.buckets.capacity))
        return chunk, window, self.buckets.predicted(chunk, draft=stop > work.prompt)

    def prefilled(self, prefill: Prefill) -> list[Work]:
        """Record that a prefill is in the cache. Returns the works whose prompt is complete, which now decode."""
        ended = []
        for work, start, length in zip(prefill.works, prefill.starts, prefill.lengths, strict=True):
            self.prefilling.remove(work)
            self.slots[work.slot].keys = work.keys[: start + length]
            work.cached = start + length
            if work.cached == len(work.keys):
                self.decoding.append(work)
                ended.append(work)
            else:
                self.prefilling.append(work)
        return ended

    def predicted(self, work: Work, tokens: Sequence[int]) -> int:
        """Record the tokens that the last prefill of a work predicts. Returns how many of them hold.

        If one differs from the draft, the rest of the draft is dropped, and the answer decodes. The prefill is over
        once there is one token more than the draft has.
        """
        draft = work.keys[work.prompt + len(work.tokens) :][: len(tokens)]
        agreed = common(np.array(tokens), draft)
        held = min(agreed + 1, len(tokens))
        work.tokens += tokens[:held]
        if agreed < len(draft):
            work.cached = work.prompt + len(work.tokens) - 1
            work.keys, work.draft = work.keys[: work.cached], len(work.tokens) - 1
            self.slots[work.slot].keys = work.keys
            if work in self.prefilling:
                self.prefilling.remove(work)
                self.decoding.append(work)
        return held

    def next_decode(self) -> Decode | None:
        """All answers that decode; fewer steps where prompts wait for prefill."""
        if not self.decoding:
            return None
        works = sorted(self.decoding, key=lambda work: work.slot)
        steps = 1 if any(work.each_token for work in works) else STEPS_BETWEEN_CHUNKS if self.prefilling else STEPS
        rows = bucket(self.buckets.rows, works[-1].slot + 1)
        window = bucket(self.buckets.windows, max(work.cached for work in works) + STEPS)
        return Decode(works, rows, window, steps)

    def decoded(self, work: Work, tokens: Sequence[int]) -> None:
        """Record new tokens of a work: its last token and all but the newest of these are cached now."""
        slot = self.slots[work.slot]
        slot.keys = np.concatenate([slot.keys, [*work.tokens[-1:], *tokens][: len(tokens)]]).astype(np.int64)
        work.cached += len(tokens)
        work.tokens += tokens

    def release(self, work: Work) -> None:
        """Release the slot of a work that ended or was cancelled; the slot keeps its cached prefix."""
        self._turn += 1
        self.slots[work.slot].work, self.slots[work.slot].used = None, self._turn
        (self.prefilling if work in self.prefilling else self.decoding).remove(work)

    def clear(self) -> None:
        """Drop all works and all cached prefixes."""
        self.prefilling.clear()
        self.decoding.clear()
        for slot in self.slots:
            slot.work, slot.keys, slot.used = None, NO_KEYS, 0


def _shared(keys: np.ndarray, prompt: np.ndarray) -> int:
    """Positions of a prompt that need no prefill where `keys` are cached.

    The last position is always prefilled: its logits give the first token of the answer. A prefix of less than a
    quarter of the prompt counts as 0, since prefill from position 0 is fastest.
    """
    if keys[:WORTH_COPYING].tobytes() != prompt[:WORTH_COPYING].tobytes():  # a tenth of the time of `common`
        return 0
    shared = common(keys, prompt[:-1])
    return shared if shared >= WORTH_COPYING and 4 * shared >= len(prompt) else 0


def _prefix(keys: np.ndarray, size: int) -> bytes:
    """The keys that two prompts of a bucket have in common where they share a prefix worth copying."""
    return keys[: max(WORTH_COPYING, size // 4)].tobytes()


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the prefix that two arrays (n,), (m,) share.

    >>> common(np.array([7, 8, 9]), np.array([7, 8, 5, 9]))
    2
    """
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
