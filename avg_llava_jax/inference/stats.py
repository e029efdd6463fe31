"""The engine's counters."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter


@dataclasses.dataclass(frozen=True)
class Stats:
    """A snapshot of the counters. All but `waiting`, `running` and `cost_weight` only increase.

    waiting: requests without a slot. running: requests with a slot.
    cost_weight: the lowest price of visual tokens that the load allows now, see `pricing`.
    raised: requests whose router chose at a price that the load had raised.
    admitted: requests that got a slot. finished, cancelled, failed: requests by how they ended.
    rejected: requests that `submit` refused, as malformed or because the queue was full.
    tokens: generated tokens, those after a stop string included. visual_tokens: of all prompts that got a slot.
    granularities: {granularity: images that were packed at it}.
    escalated: passes that followed one that was not certain enough. draft_tokens: tokens of their drafts.
    verified_tokens: draft tokens that the finer prefill predicts as well, which need no decoding.
    image_hits, image_misses: images that were encoded when a request asked for them, and those that were not.
    prefix_hits: prompts with a cached prefix. prefix_tokens: their cached positions.
    ttft_seconds, ttft_count: sum and count of the times from `submit` to the first token.
    token_seconds, token_count: the time after the first tokens, and the number of tokens in it.
    """

    waiting: int = 0
    running: int = 0
    cost_weight: float = 0.0
    raised: int = 0
    admitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    rejected: int = 0
    tokens: int = 0
    visual_tokens: int = 0
    granularities: dict[int, int] = dataclasses.field(default_factory=dict)
    escalated: int = 0
    draft_tokens: int = 0
    verified_tokens: int = 0
    image_hits: int = 0
    image_misses: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    ttft_seconds: float = 0.0
    ttft_count: int = 0
    token_seconds: float = 0.0
    token_count: int = 0


class Counters:
    """Thread-safe sums under the names of `Stats`."""

    def __init__(self, granularities: tuple[int, ...]):
        self._lock = threading.Lock()
        self._sums: Counter[str] = Counter()
        self._granularities = dict.fromkeys(granularities, 0)

    def add(self, **amounts: float) -> None:
        with self._lock:
            self._sums.update(amounts)

    def count_granularities(self, choice: tuple[int, ...]) -> None:
        """Count the granularities of the images of a prompt that got a slot."""
        with self._lock:
            for granularity in choice:
                self._granularities[granularity] += 1

    def snapshot(self, **now: float) -> Stats:
        """The sums, with the current values `now` of the other fields."""
        with self._lock:
            return Stats(**self._sums, **now, granularities=dict(self._granularities))
