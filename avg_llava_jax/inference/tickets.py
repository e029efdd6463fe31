"""Tickets: a caller's handles of requests in the engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from avg_llava_jax.inference.requests import Answer


class Cancelled(Exception):
    """The request was cancelled before its answer was complete."""


class QueueFull(Exception):
    """The engine's queue is full; try again later."""


class Ticket:
    """A thread-safe handle of one request. Made by `Engine.submit`.

    progress: visual tokens of the prompt, and tokens generated so far.
    scores: router scores fp32 (G,) of each routed image; None before the request is routed.
    logits: fp32 (V,) of the first token, with `keep_logits`.
    """

    keep_logits = False

    def __init__(self, wake: Callable[[], None]):
        self._wake = wake
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._answer: Answer | None = None
        self._error: Exception | None = None
        self.cancelled = False
        self.progress = (0, 0)
        self.scores: list[np.ndarray] | None = None
        self.logits: np.ndarray | None = None

    def pieces(self) -> Iterator[str]:
        """Iterate over the answer's text as it is generated, for one reader; blocks, and raises as `result` does."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # a second iterator finds the end as well
        self.result()

    def ready(self) -> list[str]:
        """The pieces of text since the last call; never blocks."""
        found = []
        while not self._pieces.empty():
            piece = self._pieces.get()
            if piece is not None:
                found.append(piece)
        return found

    def result(self, timeout: float | None = None) -> Answer:
        """The answer; blocks, at most `timeout` seconds.

        Raises:
          ValueError: the request could not be answered, in one line.
          RuntimeError: the device failed, or the engine stopped.
          Cancelled: the request was cancelled.
          TimeoutError: the answer is not complete yet.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds")
        if self._error is not None:
            raise self._error
        return self._answer

    @property
    def ended(self) -> bool:
        """Whether `result` would return or raise at once."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Cancel the request: its slot is free at the engine's next round. No effect on a request that has ended."""
        self.cancelled = True
        self._wake()

    def show(self, piece: str) -> None:
        """Add a piece of text; called by the engine."""
        if piece:
            self._pieces.put(piece)

    def end(self, outcome: Answer | Exception) -> None:
        """End the request with its answer or error; called by the engine."""
        if isinstance(outcome, Exception):
            self._error = outcome
        else:
            self._answer = outcome
        self._ended.set()
        self._pieces.put(None)
