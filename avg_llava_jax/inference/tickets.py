"""Tickets: a caller's handles of requests in the engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from avg_llava_jax.inference.requests import Answer, TokenScore


class Cancelled(Exception):
    """The request was cancelled before its answer was complete."""


class QueueFull(Exception):
    """The engine's queue is full; try again later."""


class Piece(str):
    """A piece of an answer's text. tokens: generated so far. logprobs: scores of those since the last piece.

    glance: None, or in a piece without text the answer that was not certain enough and is now given again.
    """

    tokens: int = 0
    logprobs: tuple[TokenScore, ...] = ()
    glance: Answer | None = None


class Ticket:
    """A thread-safe handle of one request. Made by `Engine.submit`.

    scores: router scores fp32 (G,) of each routed image; None before the request is routed.
    visual_tokens: of all images; None before granularities are chosen.
    logits: fp32 (V,) of the first token, with `keep_logits`.
    """

    keep_logits = False

    def __init__(self, wake: Callable[[], None]):
        self._wake = wake
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._answer: Answer | None = None
        self._error: Exception | None = None
        self.cancelled = False
        self.scores: list[np.ndarray] | None = None
        self.visual_tokens: int | None = None
        self._shown = 0
        self.logits: np.ndarray | None = None

    def pieces(self, glances: bool = False) -> Iterator[Piece]:
        """Iterate over the answer's text as it is generated, for one reader; blocks, and raises as `result` does.

        glances: yield pieces with a `glance` as well.
        """
        while (piece := self._pieces.get()) is not None:
            if glances or piece.glance is None:
                yield piece
        self._pieces.put(None)  # a second iterator finds the end as well
        self.result()

    def ready(self) -> list[Piece]:
        """The pieces of text since the last call; never blocks."""
        found = []
        while not self._pieces.empty():
            piece = self._pieces.get()
            if piece:
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

    def show(self, text: str, tokens: int, logprobs: Sequence[TokenScore] = ()) -> None:
        """Add a piece of text, none if it is empty; called by the engine.

        tokens, logprobs: the number and the scores of all tokens of the answer so far.
        """
        if text:
            piece = Piece(text)
            piece.tokens, piece.logprobs = tokens, tuple(logprobs[self._shown : tokens])
            self._shown = tokens
            self._pieces.put(piece)

    def dropped(self, answer: Answer) -> None:
        """Report an answer that is given again; called by the engine."""
        piece = Piece()
        piece.glance = answer
        self._pieces.put(piece)

    def end(self, outcome: Answer | Exception) -> None:
        """End the request with its answer or error; called by the engine."""
        if isinstance(outcome, Exception):
            self._error = outcome
        else:
            self._answer = outcome
        self._ended.set()
        self._pieces.put(None)
