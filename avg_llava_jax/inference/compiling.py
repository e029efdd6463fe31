"""The seconds that JAX spends compiling in a block: tracing, lowering, and XLA's compilation or loading from disk."""

from __future__ import annotations

from typing import Any, Self

import jax


class Compiling:
    """A context manager; `seconds` counts overlapping time once, as of a trace inside a trace or in another thread."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> Self:
        jax.monitoring.register_event_time_span_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._note)

    def _note(self, event: str, start: float, end: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start, end))

    @property
    def seconds(self) -> float:
        """[(0, 2), (1, 3), (5, 6)] -> 4."""
        total = until = 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total
