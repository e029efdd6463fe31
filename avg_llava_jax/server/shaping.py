"""What a request asks of its tokens: biases, guides, several answers; fields that set more than one value of `Request`.

    response_format {"type": "json_object"}                            any JSON object
    response_format {"type": "json_schema", "json_schema": {"schema": {...}}}
    structured_outputs {"choice": [...]}, also json, json_object, regex, grammar      as in vLLM
    guided_choice [...], also guided_json, guided_regex, guided_grammar               as in older versions of vLLM
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from avg_llava_jax.extras import MissingExtra
from avg_llava_jax.inference.guides import Guide
from avg_llava_jax.inference.requests import TOP
from avg_llava_jax.server.fields import (
    ANYTHING,
    FLAG,
    LIST,
    Field,
    Number,
    OneOf,
    Parsed,
    read_fields,
    required,
    short,
)
from avg_llava_jax.server.refusal import Refusal

MOST_ANSWERS = 16
MANY = 2**31 - 1
OBJECT = Parsed("an object", lambda value, path: value)


def _biases(value: Any, path: str) -> dict[int, float]:
    """{"token id": bias}; JSON has no other keys than texts."""
    if not isinstance(value, dict) or not all(token.isdecimal() for token in value):
        raise Refusal(400, f"{path} must be an object of token ids and biases, not {short(value)}", path)
    return {int(token): BIAS(bias, f"{path}.{token}") for token, bias in value.items()}


def guided(make: Callable[[Any], Guide], value: Any, path: str) -> Guide:
    """The guide that `make` makes of a field's value; one that cannot be followed is refused by the field's path."""
    try:
        return make(value)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"{path} {error}", path) from None
    except MissingExtra as error:
        raise Refusal(400, f"{path}: {error}", path, "unsupported_value") from None


def _guide(make: Callable[[Any], Guide]) -> Callable[[Any, str], Guide]:
    return lambda value, path: guided(make, value, path)


def _schema(value: Any) -> Guide:
    return Guide.json(json.loads(value) if isinstance(value, str) else value)


def _text(make: Callable[[str], Guide]) -> Callable[[Any], Guide]:
    def read(value: Any) -> Guide:
        if not isinstance(value, str):
            raise ValueError(f"must be a string, not {short(value)}")
        return make(value)

    return read


BIAS = Number(-100, 100)
CHOICE = Parsed("a list of texts", lambda value, path: guided(Guide.choice, LIST(value, path), path))
REGEX = Parsed("a regular expression", _guide(_text(Guide.regex)))
GRAMMAR = Parsed("a grammar, Lark's or GBNF", _guide(_text(Guide.grammar)))
SCHEMA = Parsed("a JSON schema", _guide(_schema))
ANY_OBJECT = Parsed("true", lambda value, path: guided(lambda _: Guide.json(), FLAG(value, path), path))

RESPONSE_FORMAT = (
    Field("type", OneOf(("text", "json_object", "json_schema"))),
    Field("json_schema", OBJECT),
)
JSON_SCHEMA = (
    Field("schema", SCHEMA),
    *(Field(name, nothing=ANYTHING) for name in ("name", "description", "strict")),
)
STRUCTURED = (
    Field("choice", CHOICE),
    Field("regex", REGEX),
    Field("grammar", GRAMMAR),
    Field("json", SCHEMA),
    Field("json_object", ANY_OBJECT, nothing=(False,)),
    *(Field(name, nothing=ANYTHING) for name in ("disable_fallback", "disable_any_whitespace", "whitespace_pattern")),
    Field("disable_additional_properties", nothing=(False,)),
    Field("structural_tag"),
)


def response_format(value: Any, path: str) -> Guide | None:
    """The guide of `response_format`, None for text."""
    given = read_fields(value, RESPONSE_FORMAT, path)
    kind = required(given, RESPONSE_FORMAT, "type", path)
    if kind == "json_schema":
        where = f"{path}.json_schema"
        schema = read_fields(required(given, RESPONSE_FORMAT, "json_schema", path), JSON_SCHEMA, where)
        return required(schema, JSON_SCHEMA, "schema", where)
    return guided(lambda _: Guide.json(), None, path) if kind == "json_object" else None


def _structured(value: Any, path: str) -> Guide | None:
    given = read_fields(value, STRUCTURED, path)
    if len(given) > 1:
        raise Refusal(400, f"{path} has {' and '.join(given)}: give one", path)
    return next(iter(given.values()), None)


GUIDES = (
    Field("response_format", Parsed("`text`, `json_object` or `json_schema`", response_format), nothing=({},)),
    Field("structured_outputs", Parsed("one of choice, regex, grammar, json", _structured), about="as in vLLM"),
    Field("guided_choice", CHOICE, nothing=([],)),
    Field("guided_regex", REGEX),
    Field("guided_grammar", GRAMMAR),
    Field("guided_json", SCHEMA),
    *(Field(name, nothing=ANYTHING) for name in ("guided_decoding_backend", "guided_whitespace_pattern")),
)
"""What an answer must be; at most one of them."""

SHAPING = (
    Field("min_p", Number(0, 1), sets="min_p"),
    Field("frequency_penalty", Number(-2, 2), sets="frequency_penalty"),
    Field("presence_penalty", Number(-2, 2), sets="presence_penalty"),
    Field("repetition_penalty", Number(0.01, 100), sets="repetition_penalty", about="1 is none"),
    Field("logit_bias", Parsed("{token id: -100 .. 100}, up to 300", _biases), sets="logit_bias"),
    Field("ignore_eos", FLAG, about="no stop token before `max_tokens`"),
    Field("min_tokens", Number(0, MANY, whole=True), sets="min_tokens", about="no stop token before this many"),
    Field("n", Number(1, MOST_ANSWERS, whole=True), about="answers; over 1 only with a temperature"),
    *GUIDES,
)
"""Fields of every endpoint that generates."""

CHAT_SCORES = (
    Field("logprobs", FLAG, nothing=(0,), about="of each token, by the model's own logits"),
    Field("top_logprobs", Number(0, TOP, whole=True), about="the most likely tokens; needs `logprobs`"),
)
"""Log-probabilities as /v1/chat/completions names them."""


def options(given: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """The values of `Request` that depend on several fields. new_tokens: the tokens that the answer may have."""
    found: dict[str, Any] = {}
    guides = {field.name: given[field.name] for field in GUIDES if given.get(field.name) is not None}
    if len(guides) > 1:
        raise Refusal(400, f"{' and '.join(guides)} both say what the answer must be: give one", next(iter(guides)))
    if guides:
        found["guide"] = next(iter(guides.values()))
    if given.get("ignore_eos"):
        found["min_tokens"] = new_tokens
    if given.get("logprobs"):
        found["logprobs"] = given.get("top_logprobs", 0)
    elif given.get("top_logprobs"):
        raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs")
    if given.get("n", 1) > 1:
        check_sampled("n", given)
    return found


def check_sampled(name: str, given: dict[str, Any]) -> None:
    """Refuse a field that asks for several answers where they would all be the same."""
    if not given.get("temperature"):
        raise Refusal(400, f"{name}={given[name]} needs a temperature over 0: greedy answers are all the same", name)
