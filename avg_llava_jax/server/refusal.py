"""Refusals, HTTP errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.inference.model import PromptTooLong
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.tickets import Cancelled, QueueFull


class Refusal(Exception):
    """An HTTP error with a message that says what is wrong.

    param: the field at fault, as a path (`messages[0].content[1].image_url`), where there is one.
    code: short and machine-readable, where clients act on it.
    retry_after: seconds until the same request may succeed. headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.headers = dict(headers or {})
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """{"error": {message, type, param, code}}."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 504:
            headers["x-should-retry"] = "false"  # else OpenAI's client would repeat a slow request twice
        return json_response(self.body(), self.status, headers)


def too_long(limit: int, message: str, param: str) -> Refusal:
    """The refusal of a prompt over the model's length; clients switch models by its code or by its first words."""
    opening = f"This model's maximum context length is {limit} tokens"
    return Refusal(400, f"{opening}: {message}", param, "context_length_exceeded")


def json_response(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII, since a message may quote invalid Unicode."""
    return Response(json.dumps(values), status, headers, media_type="application/json")


def refusal_of(error: Exception, retry_after: int) -> Refusal:
    """The refusal that tells the client about an error of the engine."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFull):
        return Refusal(429, "too many requests are waiting", code="queue_full", retry_after=retry_after)
    if isinstance(error, Cancelled):
        return Refusal(503, "the server is shutting down", code="draining", retry_after=retry_after)
    if isinstance(error, TimeoutError):
        return Refusal(504, "the answer took longer than this server allows; ask for fewer tokens", code="timeout")
    if isinstance(error, PromptTooLong):
        return too_long(error.limit, str(error), "messages")
    if isinstance(error, BadSample):
        return Refusal(400, error.detail, code=error.reason)
    if isinstance(error, ValueError):
        field = re.match(r"(\w+)=", str(error))
        param = field[1] if field and field[1] in Request.__dataclass_fields__ else None
        return Refusal(400, str(error), param)
    return Refusal(500, "the server failed on this request; its log says why", code="internal_error")
