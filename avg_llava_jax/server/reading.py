"""From the JSON of /v1/chat/completions to a `Request`; an invalid field is refused by its name.

    messages: system, user and assistant, the last from the user; content is a text or a list of parts
        {"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": ..., "detail": ...}}
    model, stream, stream_options.include_usage, max_tokens or max_completion_tokens, temperature, top_p, stop, seed
    our extensions (`extra_body`): granularity, cost_weight, max_visual_tokens, escalate, top_k

A message's images precede its text, as in training, unless `<image>` in the text places each of them. The system
message is prepended to the first question. `detail` of an image sets its granularity: `low` the coarsest, `high` the
finest, `auto` the router's choice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import reprlib
import secrets
from collections.abc import Sequence
from typing import Any

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import PLACEHOLDER, Turn
from avg_llava_jax.inference.requests import Granularity, Request
from avg_llava_jax.server.images import SentImage, read_image
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal

DEFAULT_NEW_TOKENS = 256
CHARACTERS_A_TOKEN = 32  # times max_length: a longer text is refused before it is tokenized
STOPS, STOP_CHARACTERS = 4, 256

ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list"}
# OpenAI fields that are not supported, each with the one value that has no effect.
WITHOUT_EFFECT = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "tools": [],
}
ABOUT_THE_CALLER = ("user", "metadata", "safety_identifier", "prompt_cache_key")

_QUOTES = reprlib.Repr()  # its constructor takes these only since Python 3.12
_QUOTES.maxstring = _QUOTES.maxother = 80


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request and how to send its answer. sizes: (width, height) of each of its images."""

    request: Request
    stream: bool
    include_usage: bool
    sizes: tuple[tuple[int, int], ...]


class Fields:
    """The fields of a JSON object, taken one by one; null counts as absent. `end` refuses those that were not taken."""

    def __init__(self, values: Any, where: str = ""):
        if not isinstance(values, dict):
            raise Refusal(400, f"{where or 'the body'} must be a JSON object, not {_short(values)}", where or None)
        self._left = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def raw(self, name: str) -> Any:
        return self._left.pop(name, None)

    def take(self, name: str, kind: type, default: Any = None, required: bool = False) -> Any:
        """A field of one type. An integer is a valid number; true is not."""
        value = self.raw(name)
        if value is None:
            if required:
                raise Refusal(400, f"{self.path(name)} is missing: it must be {KINDS[kind]}", self.path(name))
            return default
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise Refusal(400, f"{self.path(name)} must be {KINDS[kind]}, not {_short(value)}", self.path(name))
        return _unicode(value, self.path(name)) if kind is str else value

    def number(self, name: str, kind: type, default: Any, least: float, most: float) -> Any:
        """A number in least .. most."""
        value = self.take(name, kind, default)
        if value is not default and not least <= value <= most:
            raise Refusal(400, f"{self.path(name)}={_short(value)} must be in {least} .. {most}", self.path(name))
        return value

    def end(self) -> None:
        for name in self._left:
            raise Refusal(400, f"unknown field {_short(self.path(name))}", self.path(name)[:80], "unknown_field")


def read(body: bytes, config: ModelConfig, limits: Limits, served: str) -> Ask:
    """Check a body and convert it to a request. served: the name of the model here.

    Raises:
      Refusal: 400, or 404 for another model; names the field.
    """
    fields = Fields(_parsed(body))
    model = fields.take("model", str, served)
    if model != served:
        raise Refusal(404, f"model {_short(model)} does not exist here, only {served!r}", "model", "model_not_found")
    for name in ABOUT_THE_CALLER:
        fields.raw(name)
    for name, value in WITHOUT_EFFECT.items():
        given = fields.raw(name)
        if given is not None and (given != value or isinstance(given, bool) != isinstance(value, bool)):
            raise Refusal(400, f"{name}={_short(given)} is not supported, only {json.dumps(value)}", name)
    stream = fields.take("stream", bool, False)
    options = Fields(fields.raw("stream_options") or {}, "stream_options")
    include_usage = options.take("include_usage", bool, False)
    options.raw("include_obfuscation")
    options.end()

    turns, images, details = _conversation(fields.take("messages", list, required=True), limits)
    if sum(len(turn["value"]) for turn in turns) > CHARACTERS_A_TOKEN * config.language.max_length:
        raise Refusal(400, f"the text is too long for a model of {config.language.max_length} tokens", "messages")
    seed = fields.number("seed", int, None, -(2**63), 2**63 - 1)
    request = Request(
        prompt=turns,
        images=images,
        granularity=_granularity(fields.raw("granularity"), details, config),
        max_new_tokens=_new_tokens(fields, limits),
        temperature=float(fields.number("temperature", float, 0.0, 0, 2)),
        top_p=float(fields.number("top_p", float, 1.0, 0, 1)),
        top_k=fields.number("top_k", int, 0, 0, config.language.vocab_size),
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        stop=_stops(fields.raw("stop")),
        cost_weight=float(fields.number("cost_weight", float, 0.0, 0, 1000)),
        max_visual_tokens=fields.number("max_visual_tokens", int, None, 1, 2**31 - 1),
        escalate=_escalate(fields),
    )
    fields.end()
    return Ask(request, stream, include_usage, tuple(image.size for image in images))


def _parsed(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # ValueError includes JSONDecodeError and UnicodeDecodeError
        raise Refusal(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def _conversation(messages: Sequence[Any], limits: Limits) -> tuple[list[Turn], list[SentImage], list[str]]:
    """Turns for the model's template, all images, and the `detail` of each image.

    Consecutive messages of one role become one turn.
    """
    said: list[tuple[str, str]] = []
    images: list[SentImage] = []
    details: list[str] = []
    for number, message in enumerate(messages):
        fields = Fields(message, f"messages[{number}]")
        role = fields.take("role", str, required=True)
        if role not in ROLES:
            where = fields.path("role")
            raise Refusal(400, f"{where}={_short(role)} is not supported, only {', '.join(ROLES)}", where)
        fields.take("name", str)
        if role == "assistant":
            for name in ("refusal", "annotations", "audio", "tool_calls", "function_call"):
                if fields.raw(name):
                    raise Refusal(400, f"{fields.path(name)} is not supported", fields.path(name))
        text, new, wanted = _content(fields.raw("content"), fields.path("content"), role, len(images), limits)
        fields.end()
        said.append((ROLES[role], text))
        images += new
        details += wanted
    if not said or said[-1][0] != "human":
        raise Refusal(400, "messages must end with a message from the user", "messages")
    system = [text for role, text in said if role == "system"]
    turns = [
        {"from": role, "value": "\n".join(text for _, text in group)}
        for role, group in itertools.groupby((pair for pair in said if pair[0] != "system"), lambda pair: pair[0])
    ]
    if turns[0]["from"] != "human":
        raise Refusal(400, "the first message after the system's must be from the user", "messages")
    if system:
        turns[0]["value"] = "\n".join([*system, "", turns[0]["value"]])
    return turns, images, details


def _content(
    content: Any, where: str, role: str, before: int, limits: Limits
) -> tuple[str, list[SentImage], list[str]]:
    """Text with placeholders, images and details of one message. before: number of images in earlier messages."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise Refusal(400, f"{where} must be a string or a list of parts, not {_short(content)}", where)
    texts, images, details = [], [], []
    for number, part in enumerate(content):
        fields = Fields(part, f"{where}[{number}]")
        kind = fields.take("type", str, required=True)
        if kind == "text":
            texts.append(fields.take("text", str, required=True))
        elif kind == "image_url" and role == "user":
            if before + len(images) >= limits.images:
                raise Refusal(400, f"{where}[{number}]: over {limits.images} images", "messages", "too_many_images")
            link = Fields(fields.raw("image_url"), fields.path("image_url"))
            detail = link.take("detail", str, "auto")
            if detail not in ("auto", "low", "high"):
                raise Refusal(400, f"{link.path('detail')} must be auto, low or high", link.path("detail"))
            images.append(read_image(link.take("url", str, required=True), fields.path("image_url"), limits))
            details.append(detail)
            link.end()
        else:
            known = "text or image_url" if role == "user" else f"text in a message from {role}"
            raise Refusal(400, f"{fields.path('type')}={_short(kind)} must be {known}", fields.path("type"))
        fields.end()
    text = "\n".join(texts)
    if PLACEHOLDER not in text:
        text = f"{PLACEHOLDER}\n" * len(images) + text
    elif text.count(PLACEHOLDER) != len(images):
        found = text.count(PLACEHOLDER)
        raise Refusal(400, f"{where}: {len(images)} images for {found} {PLACEHOLDER} in the text", where)
    return text, images, details


def _granularity(value: Any, details: Sequence[str], config: ModelConfig) -> Granularity | list[Granularity]:
    """The field `granularity`, or else each image's `detail`. `Model.prepare` checks that the model has it."""
    if value is None:
        known = {"auto": "auto", "low": config.granularities[0], "high": config.granularities[-1]}
        return [known[detail] for detail in details] if set(details) - {"auto"} else "auto"
    for one in value if isinstance(value, list) else [value]:
        if one != "auto" and (isinstance(one, bool) or not isinstance(one, int)):
            raise Refusal(
                400, f'granularity={_short(value)} must be "auto", a number or a list of these', "granularity"
            )
    return value


def _escalate(fields: Fields) -> float | str:
    """The field `escalate`: a probability, or "calibrated"."""
    value = fields.raw("escalate")
    if value is None or value == "calibrated":
        return value or 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise Refusal(400, f'escalate={_short(value)} must be in 0 .. 1, or "calibrated"', "escalate")
    return float(value)


def _new_tokens(fields: Fields, limits: Limits) -> int:
    old = fields.number("max_tokens", int, None, 1, limits.new_tokens)
    new = fields.number("max_completion_tokens", int, None, 1, limits.new_tokens)
    if None not in (old, new) and old != new:
        raise Refusal(400, f"max_tokens={old} and max_completion_tokens={new} differ: give one", "max_tokens")
    return new or old or min(DEFAULT_NEW_TOKENS, limits.new_tokens)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refusal(400, f"stop must be a string or a list of strings, not {_short(value)}", "stop")
    if len(stops) > STOPS or not all(0 < len(stop) <= STOP_CHARACTERS for stop in stops):
        raise Refusal(400, f"stop takes up to {STOPS} strings of 1 to {STOP_CHARACTERS} characters", "stop")
    return [_unicode(stop, "stop") for stop in stops]


def _unicode(text: str, where: str) -> str:
    """The text; refuses a lone surrogate, which JSON can spell and UTF-8 and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(400, f"{where} is not valid Unicode: it holds half a surrogate pair", where) from None
    return text


def _short(value: Any) -> str:
    return _QUOTES.repr(value)
