"""From an `Answer` to OpenAI's JSON: a completion, or the chunks of one.

Our extensions of OpenAI's fields are `usage.visual_tokens` and `usage.granularity`, and `avg_llava` on the completion
and on the last chunk with a choice:

    {"granularity": 16, "visual_tokens": 75, "certainty": 0.98, "probabilities": {"4": 0.1, ...},
     "timings": {"encode": 0.02, ...}, "reads": [{"granularity": 16, "visual_tokens": 75, "certainty": 0.98}],
     "images": [{"granularity": 16, "probabilities": ..., "visual_tokens": 75, "finest": 280, "size": [640, 480],
                 "tiles": LATTICE, "cells": LATTICE}]}

A LATTICE is the position of tiles or cells in pixels of the upright image, {left, top, width, height, columns, rows}.
Tiles include their padding, so they may extend beyond the image; cells exclude those that un-padding removes.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.geometry import kept_cells, visual_count
from avg_llava_jax.data.tiles import Size, grid_of, mosaic_box
from avg_llava_jax.inference.requests import Answer

DONE = "data: [DONE]\n\n"


class Reply:
    """The reply to one request. text_tokens: of the prompt, without images. sizes: of its images."""

    def __init__(self, model: str, config: ModelConfig, sizes: Sequence[Size], text_tokens: int):
        self._config, self._sizes, self._text_tokens = config, sizes, text_tokens
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def completion(self, answer: Answer) -> dict[str, Any]:
        """The complete answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage(answer),
            "avg_llava": self._seen(answer),
        }

    def chunk(self, delta: dict[str, str], answer: Answer | None = None) -> dict[str, Any]:
        """A chunk of a stream; with `answer`, the last one."""
        choice = {"index": 0, "delta": delta, "finish_reason": answer and answer.finish, "logprobs": None}
        extension = {} if answer is None else {"avg_llava": self._seen(answer)}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **extension}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The chunk that `stream_options.include_usage` adds after the last piece."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage(answer)}

    def usage(self, answer: Answer) -> dict[str, Any]:
        prompt, new = self._text_tokens + answer.visual_tokens, len(answer.token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "visual_tokens": answer.visual_tokens,
            "granularity": answer.granularity,
        }

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
            "certainty": answer.certainty,
            "reads": [dataclasses.asdict(read) for read in answer.reads],
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
