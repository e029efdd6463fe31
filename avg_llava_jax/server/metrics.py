"""Metrics for Prometheus at /metrics, in its text format 0.0.4: the engine's counts, and the latencies of clients."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

from avg_llava_jax.inference.stats import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

GAUGES = {"waiting": "Requests in the queue.", "running": "Requests that have a slot."}
COUNTERS = {
    "requests_admitted": "Requests that got a slot.",
    "requests_finished": "Requests that were answered.",
    "requests_cancelled": "Requests that were cancelled.",
    "requests_failed": "Requests that failed in the engine.",
    "requests_rejected": "Requests that the engine refused, as malformed or because its queue was full.",
    "tokens": "Tokens generated.",
    "visual_tokens": "Visual tokens of all prompts.",
    "raised": "Requests for which the load raised the price of visual tokens.",
    "escalated": "Passes that followed one that was not certain enough.",
    "draft_tokens": "Tokens of the answers that they had.",
    "verified_tokens": "Tokens of these that the next pass gave as well.",
    "image_hits": "Images whose encoding was cached.",
    "image_misses": "Images that had to be encoded.",
    "prefix_hits": "Prompts whose prefix was cached.",
    "prefix_tokens": "Prompt positions that were cached.",
}


class Histogram:
    """A histogram with cumulative buckets. bounds: ascending, in seconds."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.total, self.count = bounds, 0.0, 0
        self._counts = [0] * len(bounds)

    def observe(self, seconds: float) -> None:
        self.total += seconds
        self.count += 1
        for place, bound in enumerate(self.bounds):
            if seconds <= bound:
                self._counts[place] += 1

    def samples(self) -> Iterator[tuple[str, float]]:
        """(suffix and labels, value)."""
        for bound, count in zip(self.bounds, self._counts, strict=True):
            yield f'_bucket{{le="{bound}"}}', count
        yield '_bucket{le="+Inf"}', self.count
        yield "_sum", self.total
        yield "_count", self.count


class Metrics:
    """The server's own measurements; used only from its event loop."""

    def __init__(self) -> None:
        self.first_piece = Histogram(WAITS)
        self.each_token = Histogram(STEPS)
        self.whole = Histogram(WAITS)
        self.replies: collections.Counter[int] = collections.Counter()

    def retry_after(self) -> int:
        """Seconds until a slot may be free: the mean time of an answer so far, from 1 to 30."""
        return max(1, min(30, round(self.whole.total / self.whole.count))) if self.whole.count else 1

    def text(self, stats: Stats) -> str:
        """All metrics as text, the engine's `stats` included."""
        lines: list[str] = []

        def add(name: str, kind: str, about: str, samples: Any) -> None:
            name = f"avg_llava_{name}"
            lines.extend([f"# HELP {name} {about}", f"# TYPE {name} {kind}"])
            lines.extend(f"{name}{suffix} {value}" for suffix, value in samples)

        for name, about in GAUGES.items():
            add(f"requests_{name}", "gauge", about, [("", getattr(stats, name))])
        add("cost_weight", "gauge", "The price of visual tokens that the load sets.", [("", stats.cost_weight)])
        for name, about in COUNTERS.items():
            add(f"{name}_total", "counter", about, [("", getattr(stats, name.removeprefix("requests_")))])
        add("images_total", "counter", "Images, by granularity.", _labelled("granularity", stats.granularities))
        add(
            "replies_total",
            "counter",
            "Chat completions by HTTP status.",
            _labelled("status", self.replies),
        )
        add("first_piece_seconds", "histogram", "From a request to its first piece.", self.first_piece.samples())
        add("each_token_seconds", "histogram", "Mean per token, after the first piece.", self.each_token.samples())
        add("request_seconds", "histogram", "From a request to its end.", self.whole.samples())
        return "\n".join(lines) + "\n"


def _labelled(label: str, counts: Mapping[int, int]) -> list[tuple[str, float]]:
    return [(f'{{{label}="{key}"}}', count) for key, count in sorted(counts.items())]
