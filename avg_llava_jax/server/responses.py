"""/v1/responses: OpenAI's newer API, stateless. Nothing is stored, so `previous_response_id` is refused.

    input: a text, or a list of messages {"role", "content"}; content is a text or a list of parts
        {"type": "input_text" | "output_text", "text": ...} and {"type": "input_image", "image_url": ..., "detail": ...}

A streamed response is a list of numbered events:

    response.created  response.in_progress  response.output_item.added  response.content_part.added
    response.output_text.delta ...
    response.output_text.done  response.content_part.done  response.output_item.done
    response.completed, or response.incomplete where the answer reached its limit
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.inference.model import Model
from avg_llava_jax.inference.requests import Answer
from avg_llava_jax.inference.tickets import Piece
from avg_llava_jax.server.fields import ANYTHING, TEXT, Field, Parsed, read_fields, required, short
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.reading import (
    DEFAULT_NEW_TOKENS,
    LOOKING,
    MODEL,
    SAMPLING,
    STREAMING,
    TOKENS,
    Ask,
    ask_of,
    check_model,
    conversation,
)
from avg_llava_jax.server.refusal import Refusal
from avg_llava_jax.server.replies import Reply, event
from avg_llava_jax.server.shaping import response_format


def _format(value: Any, path: str) -> Any:
    """`text.format` is `response_format` of chat completions, but for the fields of `json_schema`, which lie in it."""
    path = f"{path}.format"
    given = read_fields(value, TEXT_FORMAT, path.rpartition(".")[0]).get("format", {"type": "text"})
    if isinstance(given, dict) and given.get("type") == "json_schema":
        rest = {name: one for name, one in given.items() if name != "type"}
        given = {"type": "json_schema", "json_schema": rest}
    return response_format(given, path)


TEXT_FORMAT = (
    Field("format", Parsed("as `response_format`", lambda value, path: value)),
    Field("verbosity", nothing=("medium",)),
)

RESPONSE = (
    MODEL,
    Field("input", Parsed("a text, or a list of messages", lambda value, path: value)),
    Field("instructions", TEXT, about="the system message"),
    *STREAMING,
    Field("max_output_tokens", TOKENS, about=f"{DEFAULT_NEW_TOKENS} if absent"),
    *SAMPLING,
    *LOOKING,
    Field("text", Parsed("`format`: `text`, `json_object` or `json_schema`", _format)),
    Field("tools", nothing=([],)),
    Field("tool_choice", nothing=("none", "auto")),
    Field("parallel_tool_calls", nothing=(True, False), about="without tools there is nothing to call"),
    Field("max_tool_calls", nothing=ANYTHING, about="without tools there is nothing to call"),
    Field("reasoning", nothing=({}, {"effort": "none"})),
    Field("include", nothing=([], ["reasoning.encrypted_content"])),
    Field("truncation", nothing=("disabled",)),
    Field("background", nothing=(False,)),
    Field("previous_response_id", about="the server keeps nothing: send the conversation"),
    Field("conversation"),
    Field("prompt"),
    Field("top_logprobs", nothing=(0,)),
)
"""Fields of /v1/responses."""


def read(values: Any, config: ModelConfig, limits: Limits, served: Sequence[str]) -> Ask:
    """Check the JSON of /v1/responses and convert it to a request; see `reading.read`."""
    given = read_fields(values, RESPONSE, extras=limits.unknown_fields)
    check_model(given, served)
    if given.get("n", 1) > 1:
        raise Refusal(400, "n is not supported here, only 1", "n", "unsupported_value")
    if given.get("text") is not None:
        given["response_format"] = given.pop("text")
    said = required(given, RESPONSE, "input")
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    if not isinstance(messages, list):
        raise Refusal(400, f"input must be a text or a list of messages, not {short(said)}", "input")
    said = {n: one for n, one in enumerate(messages) if not isinstance(one, dict) or one.get("type") != "reasoning"}
    turns, images, details = conversation(said, "input", config, limits, given.get("instructions"))
    return ask_of(given, RESPONSE, turns, images, details, config, limits)


class ResponseReply(Reply):
    """The reply to one response."""

    def __init__(self, name: str, model: Model, ask: Ask, text_tokens: int):
        super().__init__(name, model, ask, text_tokens)
        self._name, self._id, self._item = name, f"resp_{secrets.token_hex(12)}", f"msg_{secrets.token_hex(12)}"
        self._created, self._number = int(time.time()), -1

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (answer,) = answers
        cut = answer.finish == "length"
        return {
            **self._response("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._message("incomplete" if cut else "completed", [self._part(answer.text)])],
            "usage": self._usage_of(answers),
            "avg_llava": self._seen(answer),
        }

    def _usage_of(self, answers: Sequence[Answer]) -> dict[str, Any]:
        usage = super()._usage_of(answers)
        return {
            "input_tokens": usage.pop("prompt_tokens"),
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage.pop("completion_tokens"),
            "output_tokens_details": {"reasoning_tokens": 0},
            **usage,
        }

    def begin(self) -> Iterator[str]:
        response = self._response("in_progress")
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._part_event("response.content_part.added", part=self._part(""))

    def piece(self, piece: Piece, number: int, visual: int) -> Iterator[str]:
        if piece:
            yield self._part_event("response.output_text.delta", delta=piece, logprobs=[])

    def ended(self, answer: Answer, number: int) -> Iterator[str]:
        yield from ()

    def end(self, answers: Sequence[Answer]) -> Iterator[str]:
        (answer,), whole = answers, self.whole(answers)
        (item,) = whole["output"]
        yield self._part_event("response.output_text.done", text=answer.text, logprobs=[])
        yield self._part_event("response.content_part.done", part=item["content"][0])
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, refusal: Refusal) -> Iterator[str]:
        error = refusal.body()["error"]  # OpenAI's client looks for `error`, others read the fields beside it
        yield self._event("error", code=error["code"], message=error["message"], param=error["param"], error=error)

    def _event(self, kind: str, **values: Any) -> str:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **values}, kind)

    def _part_event(self, kind: str, **values: Any) -> str:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **values)

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "status": status, "role": "assistant", "content": content}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _response(self, status: str) -> dict[str, Any]:
        """The response without its answer."""
        given, request = self._ask.given, self._ask.request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"),
            "model": self._name,
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": {},
        }
