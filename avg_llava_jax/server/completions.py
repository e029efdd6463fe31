"""/v1/completions: a prompt without a conversation template, and its continuation.

    prompt: a text, a list of one text, or a list of parts as in a message, whose texts and images are put together as
        they stand: ["Left: ", image, " right: ", image]
    best_of: that many answers by as many seeds, of which those `n` with the most likely tokens are returned
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.inference.model import Model
from avg_llava_jax.inference.requests import TOP, Answer, TokenScore
from avg_llava_jax.server import scores
from avg_llava_jax.server.fields import Field, Number, Parsed, read_fields, required, short
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.reading import (
    IMAGES,
    LOOKING,
    MODEL,
    PART,
    SAMPLING,
    STREAMING,
    TOKENS,
    Ask,
    ask_of,
    check_characters,
    check_model,
    read_link,
    text_of,
)
from avg_llava_jax.server.refusal import Refusal
from avg_llava_jax.server.replies import Reply
from avg_llava_jax.server.shaping import MOST_ANSWERS, check_sampled

DEFAULT_NEW_TOKENS = 16  # OpenAI's

COMPLETION = (
    MODEL,
    Field("prompt", Parsed("a text, or a list of parts `text` and `image_url`", lambda value, path: value)),
    *STREAMING,
    Field("max_tokens", TOKENS, nothing=(-1,), about=f"{DEFAULT_NEW_TOKENS} if absent"),
    *(field for field in SAMPLING if field.name != "best_of"),
    Field("best_of", Number(1, MOST_ANSWERS, whole=True), about="answers, of which the `n` most likely are returned"),
    *LOOKING,
    Field("logprobs", Number(0, TOP, whole=True), nothing=(False,), about="of each token, with so many likely ones"),
    Field("suffix", nothing=("",)),
)
"""Fields of /v1/completions."""


def read(values: Any, config: ModelConfig, limits: Limits, served: Sequence[str]) -> Ask:
    """Check the JSON of /v1/completions and convert it to a request; see `reading.read`."""
    given = read_fields(values, COMPLETION, extras=limits.unknown_fields)
    check_model(given, served)
    if "logprobs" in given:
        given |= {"logprobs": True, "top_logprobs": given["logprobs"]}  # as chat completions name them
    prompt = required(given, COMPLETION, "prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        (prompt,) = prompt
    parts = [{"type": "text", "text": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise Refusal(400, f"prompt must be one text, or a list of parts, not {short(prompt)}", "prompt")
    texts, images, details = [""], [], []
    for number, part in enumerate(parts):
        path = f"prompt[{number}]"
        fields = read_fields(part, PART, path, limits.unknown_fields)
        kind = required(fields, PART, "type", path)
        if kind == "text":
            texts[-1] += text_of(part, fields, "text", path)
        elif kind in IMAGES:
            if len(images) >= limits.images:
                raise Refusal(400, f"{path}: over {limits.images} images", path, "too_many_images")
            image, detail = read_link(fields.get("image_url"), part.get("detail"), f"{path}.image_url", limits)
            texts.append("")
            images.append(image)
            details.append(detail)
        else:
            raise Refusal(400, f"{path}.type={short(kind)} must be text or image_url", f"{path}.type")
    check_characters(texts, config, "prompt")
    ask = ask_of(given, COMPLETION, texts, images, details, config, limits, DEFAULT_NEW_TOKENS, raw=True)
    best_of = given.get("best_of", ask.count)
    if best_of < ask.count:
        raise Refusal(400, f"best_of={best_of} must be at least n={ask.count}", "best_of")
    if best_of == ask.count:
        return ask
    if ask.stream:
        raise Refusal(400, "best_of chooses among whole answers: it cannot be streamed", "best_of")
    check_sampled("best_of", given)
    scored = dataclasses.replace(ask.request, logprobs=ask.request.logprobs or 0)
    return dataclasses.replace(ask, request=scored, made=best_of)


def _likelihood(answer: Answer) -> float:
    """The mean log-probability of an answer's tokens; an empty answer comes last."""
    each = [score.logprob for score in answer.logprobs]
    return sum(each) / len(each) if each else -math.inf


class CompletionReply(Reply):
    """The reply to one completion."""

    kind, chunk_kind, begins = "text_completion", "text_completion", "cmpl"

    def __init__(self, name: str, model: Model, ask: Ask, text_tokens: int):
        super().__init__(name, model, ask, text_tokens)
        self._characters = [0] * ask.count  # of the tokens so far, of each answer

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The best answers; their usage counts all."""
        best = sorted(answers, key=_likelihood, reverse=True) if self._ask.made else answers
        return {**super().whole(best[: self._ask.count]), "usage": self._usage_of(answers)}

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(answer.logprobs, number) if self._ask.given.get("logprobs") else None
        return {"index": number, "text": answer.text, "finish_reason": answer.finish, "logprobs": logprobs}

    def begin(self) -> Iterator[str]:
        yield from ()

    def _said(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"text": delta.get("content", "")}

    def _logprobs(self, found: Sequence[TokenScore], number: int) -> dict[str, Any] | None:
        if not found:
            return None
        logprobs = scores.completion(found, self._tokenizer, self._characters[number])
        self._characters[number] += sum(map(len, logprobs["tokens"]))
        return logprobs
