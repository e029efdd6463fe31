"""Streaming text: token ids become pieces of text, and no piece is ever taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """The text of one answer while it is generated.

    A piece never ends inside a UTF-8 character, inside what may become a stop string, or on white
    space that may turn out to be the end. The pieces join to `text`, which is stripped and ends
    before the first stop string.

        stop "END":   tokens "The", " EN", "D of"   pieces "The", "", ""
                      tokens "The", " EN", "T"      pieces "The", "", " ENT"

    ids: tokens of the answer so far, up to the one that completes a stop string.
    stopped: whether a stop string was met.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self.text = ""
        self.ids: list[int] = []
        self.stopped = False
        self._decode = decode
        self._stop = tuple(stop)

    def restart(self) -> None:
        """Start over, as for another answer."""
        self.text, self.ids, self.stopped = "", [], False

    def feed(self, ids: Sequence[int], final: bool = False) -> str:
        """The new piece of text, given all tokens so far. final: no more tokens will come."""
        if self.stopped:
            return ""
        known, self.ids = len(self.ids), list(ids)
        raw = self._decode(self.ids)
        if self._first_stop(raw) is not None:
            # The answer must not depend on how many tokens came together: find the token that completed the stop.
            for count in range(known + 1, len(ids) + 1):
                raw = self._decode(ids[:count])
                if self._first_stop(raw) is not None:
                    self.ids, self.stopped = list(ids[:count]), True
                    break
        end = self._first_stop(raw)
        shown = raw[:end] if self.stopped or final else self._settled(raw)
        shown = shown.strip()
        if not shown.startswith(self.text):
            return ""  # bytes that became invalid UTF-8 again; wait for the token that completes them
        piece, self.text = shown[len(self.text) :], shown
        return piece

    def _first_stop(self, text: str) -> int | None:
        places = [text.find(stop) for stop in self._stop]
        return min((place for place in places if place >= 0), default=None)

    def _settled(self, text: str) -> str:
        """`text` without an incomplete character, and without what may become a stop string."""
        text = text.rstrip("\ufffd")
        keep = len(text)
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    keep = min(keep, len(text) - size)
                    break
        return text[:keep]
