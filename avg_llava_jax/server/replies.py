"""From an `Answer` to OpenAI's JSON: a completion, or the chunks of one.

    whole(answers)                                 complete answers
    begin() piece(...) ... ended(...) end(answers)  server-sent events; `failed(refusal)` ends them early

Our extensions of OpenAI's fields are `usage.visual_tokens` and `usage.granularity`, and `avg_llava` on the completion
and on the last chunk with a choice; a stream that escalates has a chunk with the `avg_llava` of the first read before:

    {"granularity": 16, "visual_tokens": 75, "certainty": 0.98, "closed": false, "probabilities": {"4": 0.1, ...},
     "cost_weight": 0.0,
     "timings": {"encode": 0.02, ...}, "passes": [{"granularity": 16, "visual_tokens": 75, "certainty": 0.98}],
     "images": [{"granularity": 16, "probabilities": ..., "visual_tokens": 75, "finest": 280, "size": [640, 480],
                 "tiles": LATTICE, "cells": LATTICE, "borders": {"x": [0, 80, ...], "y": ...}}]}

A LATTICE is the position of tiles or cells in pixels of the upright image, {left, top, width, height, columns, rows}.
Tiles include their padding, so they may extend beyond the image; cells exclude those that un-padding removes. `borders`
has the borders of the cells, which need not be equally wide.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from avg_llava_jax.config import Granularity, ModelConfig
from avg_llava_jax.data.geometry import borders, visual_count
from avg_llava_jax.data.tiles import Size, grid_of, mosaic_box
from avg_llava_jax.inference.model import Model
from avg_llava_jax.inference.requests import Answer, TokenScore
from avg_llava_jax.inference.tickets import Piece
from avg_llava_jax.server import scores
from avg_llava_jax.server.reading import Ask
from avg_llava_jax.server.refusal import Refusal
from avg_llava_jax.server.tools import Calls, message_of

DONE = "data: [DONE]\n\n"


class Reply:
    """The reply to one request for chat completions. name: the model's. text_tokens: of the prompt, without images."""

    kind, chunk_kind, begins = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, name: str, model: Model, ask: Ask, text_tokens: int):
        self._config, self._tokenizer, self._ask, self._text_tokens = model.config, model.tokenizer, ask, text_tokens
        self._head = {"id": f"{self.begins}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self._calls: dict[int, Calls] = defaultdict(Calls)
        self._made = [0] * ask.count  # tokens of earlier chunks, of each answer

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The complete answers."""
        return {
            **self._head,
            "object": self.kind,
            "choices": [self._choice(number, answer) for number, answer in enumerate(answers)],
            "usage": self._usage_of(answers),
            "avg_llava": self._seen(answers[0]),
        }

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        message = message_of(answer.text) if self._ask.tools else {"content": answer.text}
        return {
            "index": number,
            "message": {"role": "assistant", **message, "refusal": None},
            "finish_reason": self._finish(answer, "tool_calls" in message),
            "logprobs": self._logprobs(answer.logprobs, number),
        }

    def begin(self) -> Iterator[str]:
        """The events before the first piece."""
        for number in range(self._ask.count):
            yield self._chunk(number, {"role": "assistant", "content": ""})

    def piece(self, piece: Piece, number: int, visual: int) -> Iterator[str]:
        """The events of a piece of an answer. visual: visual tokens of the prompt."""
        if piece.glance is not None:
            yield self._chunk(number, {}, (), 0, visual, glance=piece.glance)
            return
        for at, delta in enumerate(self._deltas(piece, number)):
            yield self._chunk(number, delta, () if at else piece.logprobs, piece.tokens, visual)

    def ended(self, answer: Answer, number: int) -> Iterator[str]:
        """The events after the last piece of an answer."""
        scores, new = answer.logprobs[self._made[number] :], len(answer.token_ids)
        yield self._chunk(number, {}, scores, new, answer.visual_tokens, answer)

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        """The events after all answers."""
        if self._ask.include_usage:
            chunk = {**self._head, "object": self.chunk_kind, "choices": [], "usage": self._usage_of(answers)}
            yield event(chunk)
        yield DONE

    def failed(self, refusal: Refusal) -> Iterator[str]:
        """The last event of answers that break off."""
        yield event(refusal.body())

    def _chunk(
        self,
        number: int,
        delta: dict[str, Any],
        scores: Sequence[TokenScore] = (),
        new: int = 0,
        visual: int = 0,
        answer: Answer | None = None,
        glance: Answer | None = None,
    ) -> str:
        """A chunk of a stream. new: tokens so far. answer: the one that it ends. glance: one that is given again."""
        finish = answer and self._finish(answer, bool(self._calls[number].names))
        logprobs = self._logprobs(scores, number)
        choice = {"index": number, **self._said(delta), "finish_reason": finish, "logprobs": logprobs}
        chunk = {**self._head, "object": self.chunk_kind, "choices": [choice]}
        self._made[number] = new
        if answer or glance:
            chunk["avg_llava"] = self._seen(answer or glance)
        if self._ask.usage_with_each:
            chunk["usage"] = self._usage(new, visual)
        return event(chunk)

    def _said(self, delta: dict[str, Any]) -> dict[str, Any]:
        """What a choice of a chunk says, with its name."""
        return {"delta": delta}

    def _deltas(self, piece: Piece, number: int) -> list[dict[str, Any]]:
        """What a piece of text brings to a message; {} where that is not known yet."""
        return self._calls[number].feed(piece) or [{}] if self._ask.tools else [{"content": piece}]

    def _finish(self, answer: Answer, called: bool) -> str:
        if called and answer.finish == "stop" and not self._ask.tools.forced:
            return "tool_calls"
        return answer.finish

    def _usage(self, new: int, visual: int) -> dict[str, Any]:
        """new: generated tokens. visual: visual tokens of the prompt."""
        prompt = self._text_tokens + visual
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "visual_tokens": visual,
        }

    def _usage_of(self, answers: Sequence[Answer]) -> dict[str, Any]:
        new = sum(len(answer.token_ids) for answer in answers)
        return self._usage(new, answers[0].visual_tokens) | {"granularity": answers[0].granularity}

    def _logprobs(self, found: Sequence[TokenScore], number: int) -> dict[str, Any] | None:
        return scores.chat(found, self._tokenizer) if found else None

    def _seen(self, answer: Answer) -> dict[str, Any]:
        config, shares = self._config.of(len(self._ask.sizes)), _each(answer.probabilities)
        images = [
            {
                "granularity": granularity,
                "probabilities": shares[number] if shares else None,
                "visual_tokens": visual_count(size, config, granularity),
                "finest": visual_count(size, config, config.granularities[-1]),
                "size": list(size),
                **lattices(size, config, granularity),
            }
            for number, (size, granularity) in enumerate(zip(self._ask.sizes, _each(answer.granularity), strict=True))
        ]
        return {
            "granularity": answer.granularity,
            "visual_tokens": answer.visual_tokens,
            "certainty": answer.certainty,
            "closed": answer.closed,
            "passes": [dataclasses.asdict(each) for each in answer.passes],
            "probabilities": answer.probabilities or None,
            "cost_weight": answer.cost_weight,
            "timings": answer.timings,
            "images": images,
        }


def lattices(size: Size, config: ModelConfig, granularity: Granularity) -> dict[str, dict[str, Any]]:
    """{"tiles": ..., "cells": ..., "borders": ...} of an image at one granularity, see the module's docstring.

    Example: tiles of 2 x 2 cells, a mosaic of one row of two tiles, an image of the mosaic's size, 64 x 32 pixels:

        tiles    left 0, top 0, width 64, height 32, columns 2, rows 1
        cells    left 0, top 0, width 64, height 32, columns 4, rows 2
        borders  x 0 16 32 48 64, y 0 16 32
    """
    top, bottom, left, right = mosaic_box(size, config)
    rows, columns = (max(1, n) for n in grid_of(size, config))
    y, x = (edges.tolist() for edges in borders(size, config, granularity))
    return {
        "tiles": {
            **{"left": left, "top": top, "width": right - left, "height": bottom - top},
            **{"columns": columns, "rows": rows},
        },
        "cells": {
            **{"left": x[0], "top": y[0], "width": x[-1] - x[0], "height": y[-1] - y[0]},
            **{"columns": len(x) - 1, "rows": len(y) - 1},
        },
        "borders": {"x": x, "y": y},
    }


def event(values: dict[str, Any], name: str | None = None) -> str:
    """One server-sent event. name: its type, where the client reads one."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(values)}\n\n"


def _each(values: Any) -> tuple[Any, ...]:
    """A value per image: of None (no image), one value (one image) or a tuple (several)."""
    return () if values is None else values if isinstance(values, tuple) else (values,)
