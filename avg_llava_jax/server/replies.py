"""From an `Answer` to OpenAI's JSON: a completion, or the chunks of one.

Our extensions of OpenAI's fields are `usage.visual_tokens` and `usage.granularity`, and `avg_llava` on the completion
and on the last chunk with a choice:

    {"granularity": 16, "visual_tokens": 75, "probabilities": {"4": 0.1, ...}, "timings": {"encode": 0.02, ...},
     "images": [{"granularity": 16, "probabilities": ..., "visual_tokens": 75, "finest": 280, "size": [640, 480],
                 "tiles": LATTICE, "cells": LATTICE}]}

A LATTICE is the position of tiles or cells in pixels of the upright image, {left, top, width, height, columns, rows}.
Tiles include their padding, so they may extend beyond the image; cells exclude those that un-padding removes.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.geometry import kept_cells, visual_count
from avg_llava_jax.data.tiles import Size, grid_of, mosaic_box
from avg_llava_jax.inference.model import Model
from avg_llava_jax.inference.requests import Answer, TokenScore
from avg_llava_jax.inference.tickets import Piece
from avg_llava_jax.server import scores
from avg_llava_jax.server.tools import Calls, Tools, message_of

DONE = "data: [DONE]\n\n"


class Reply:
    """The reply to one request.

    name: the model's. text_tokens: of the prompt, without images. sizes: of its images. tools: what answers may call.
    """

    def __init__(self, name: str, model: Model, sizes: Sequence[Size], text_tokens: int, tools: Tools | None = None):
        self._tools = tools
        self._calls: dict[int, Calls] = defaultdict(Calls)
        self._config, self._tokenizer = model.config, model.tokenizer
        self._sizes, self._text_tokens = sizes, text_tokens
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def completion(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The complete answers."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", **(message := self._message(answer)), "refusal": None},
                "finish_reason": self._finish(answer, "tool_calls" in message),
                "logprobs": self._logprobs(answer.logprobs),
            }
            for number, answer in enumerate(answers)
        ]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage_of(answers),
            "avg_llava": self._seen(answers[0]),
        }

    def chunk(
        self, delta: dict[str, Any], item: Piece | Answer | None = None, number: int = 0, before: int = 0
    ) -> dict[str, Any]:
        """A chunk of a stream.

        item: the piece that it brings, or the answer that it ends. number: of the answer. before: tokens of earlier
        chunks.
        """
        answer = item if isinstance(item, Answer) else None
        new = answer.logprobs[before:] if answer else item.logprobs if item is not None else ()
        choice = {
            "index": number,
            "delta": delta,
            "finish_reason": answer and self._finish(answer, bool(self._calls[number].names)),
            "logprobs": self._logprobs(new),
        }
        extension = {} if answer is None else {"avg_llava": self._seen(answer)}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **extension}

    def deltas(self, piece: Piece, number: int) -> list[dict[str, Any]]:
        """What a piece of text brings to a message; {} where that is not known yet."""
        return self._calls[number].feed(piece) or [{}] if self._tools else [{"content": piece}]

    def _message(self, answer: Answer) -> dict[str, Any]:
        return message_of(answer.text) if self._tools else {"content": answer.text}

    def _finish(self, answer: Answer, called: bool) -> str:
        if called and answer.finish == "stop" and not self._tools.forced:
            return "tool_calls"
        return answer.finish

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk that `stream_options.include_usage` adds after the last piece."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage_of(answers)}

    def usage(self, new: int, visual: int) -> dict[str, Any]:
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
        return self.usage(new, answers[0].visual_tokens) | {"granularity": answers[0].granularity}

    def _logprobs(self, found: Sequence[TokenScore]) -> dict[str, Any] | None:
        return scores.chat(found, self._tokenizer) if found else None

    def _seen(self, answer: Answer) -> dict[str, Any]:
        config, shares = self._config, _each(answer.probabilities)
        images = [
            {
                "granularity": granularity,
                "probabilities": shares[number] if shares else None,
                "visual_tokens": visual_count(size, config, granularity),
                "finest": visual_count(size, config, config.granularities[-1]),
                "size": list(size),
                **lattices(size, config, granularity),
            }
            for number, (size, granularity) in enumerate(zip(self._sizes, _each(answer.granularity), strict=True))
        ]
        return {
            "granularity": answer.granularity,
            "visual_tokens": answer.visual_tokens,
            "probabilities": answer.probabilities or None,
            "timings": answer.timings,
            "images": images,
        }


def lattices(size: Size, config: ModelConfig, granularity: int) -> dict[str, dict[str, float]]:
    """{"tiles": ..., "cells": ...} of an image at one granularity, see the module's docstring.

    Example: tiles of 2 x 2 cells, a mosaic of one row of two tiles, an image of the mosaic's size, 64 x 32 pixels:

        tiles  left 0, top 0, width 64, height 32, columns 2, rows 1
        cells  left 0, top 0, width 64, height 32, columns 4, rows 2
    """
    top, bottom, left, right = mosaic_box(size, config)
    rows, columns = (max(1, n) for n in grid_of(size, config))
    tiles = {"left": left, "top": top, "width": right - left, "height": bottom - top, "columns": columns, "rows": rows}
    tile_rows, tile_columns = dict(zip(config.granularities, config.grids, strict=True))[granularity]
    above, below, before, behind = 0, tile_rows, 0, tile_columns
    if config.pinpoints:
        above, below, before, behind = kept_cells(size, config, granularity)
    height, width = (bottom - top) / (rows * tile_rows), (right - left) / (columns * tile_columns)
    cells = {
        "left": left + before * width,
        "top": top + above * height,
        "width": (behind - before) * width,
        "height": (below - above) * height,
        "columns": behind - before,
        "rows": below - above,
    }
    return {"tiles": tiles, "cells": cells}


def event(values: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(values)}\n\n"


def _each(values: Any) -> tuple[Any, ...]:
    """A value per image: of None (no image), one value (one image) or a tuple (several)."""
    return () if values is None else values if isinstance(values, tuple) else (values,)
