"""From the JSON of /v1/chat/completions to a `Request`; an invalid field is refused by its name.

    messages: system, user and assistant; content is a text or a list of parts
        {"type": "text", "text": ...} and {"type": "image_url", "image_url": {"url": ..., "detail": ...}}
    every other field: a row of CHAT

The parts say where images are; `<image>` in a text is text. A message's images precede its text, as in training, unless
one stands between two texts: then all parts keep their order. System messages are prepended to the first question.
`detail` of an image sets its granularity: `low` the coarsest, `high` and `original` the finest, `auto` the router's
choice. Any message may be empty, as the model's own answer may be, and the first may be an answer. Messages that do not
end with the user's have an empty question behind them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import Turn
from avg_llava_jax.inference.requests import Granularity, Request
from avg_llava_jax.server import shaping
from avg_llava_jax.server.fields import (
    ANYTHING,
    FLAG,
    LIST,
    TEXT,
    Field,
    Number,
    OneOf,
    Parsed,
    checked_text,
    read_fields,
    required,
    short,
)
from avg_llava_jax.server.images import SentImage, read_image
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal, too_long
from avg_llava_jax.server.shaping import CHAT_SCORES, SHAPING
from avg_llava_jax.server.tools import TOOLS, Tools, as_text, tools_of

DEFAULT_NEW_TOKENS = 256
CHARACTERS_A_TOKEN = 32  # times max_length: a longer text is refused before it is tokenized
STOPS, STOP_CHARACTERS = 4, 256
MANY = 2**31 - 1
TOKENS = Number(1, math.inf, whole=True)
"""How long an answer may be: any number is cut to what fits."""

ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}


def _stops(value: Any, path: str) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refusal(400, f"{path} must be a string or a list of strings, not {short(value)}", path)
    if len(stops) > STOPS or not all(0 < len(stop) <= STOP_CHARACTERS for stop in stops):
        raise Refusal(400, f"{path} takes up to {STOPS} strings of 1 to {STOP_CHARACTERS} characters", path)
    return [checked_text(stop, path) for stop in stops]


def _levels(value: Any, path: str) -> Granularity | list[Granularity]:
    """`Model.prepare` checks that the model has them."""

    def name(one: Any) -> bool:
        if isinstance(one, str):
            return one == "auto" or re.fullmatch(r"\d+x\d+", one) is not None
        return isinstance(one, (int, float)) and not isinstance(one, bool)

    if not all(map(name, value if isinstance(value, list) else [value])):
        raise Refusal(400, f'{path}={short(value)} must be "auto", a number or a list of these', path)
    return value


def _threshold(value: Any, path: str) -> float | str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value != "calibrated" and not (number and 0 <= value <= 1):
        raise Refusal(400, f'{path}={short(value)} must be in 0 .. 1, or "calibrated"', path)
    return value


STREAM_OPTIONS = (
    Field("include_usage", FLAG, about="one more event with `usage` after the last piece"),
    Field("continuous_usage_stats", FLAG, about="`usage` so far in every event"),
    Field("include_obfuscation", nothing=ANYTHING),
)

STREAMING = (
    Field("stream", FLAG, about="server-sent events"),
    Field("stream_options", Parsed("an object", lambda value, path: read_fields(value, STREAM_OPTIONS, path))),
)

SAMPLING = (
    Field("temperature", Number(0, 2), sets="temperature", about="0, the default, is greedy"),
    Field("top_p", Number(0, 1), sets="top_p"),
    Field("top_k", Number(0, math.inf, whole=True), nothing=(-1,), sets="top_k"),
    Field("seed", Number(-(2**63), 2**63 - 1, whole=True), about="without one, another sample each time"),
    Field("stop", Parsed(f"a string, or up to {STOPS} of them", _stops), nothing=([], ""), sets="stop"),
    *SHAPING,
    Field("length_penalty", nothing=(1,)),
    Field("best_of", nothing=(1,)),
    Field("use_beam_search", nothing=(False,)),
    Field("stop_token_ids", nothing=([],)),
    Field("bad_words", nothing=([],)),
    Field("allowed_token_ids"),
    Field("logits_processors", nothing=([],)),
    Field("echo", nothing=(False,)),
    Field("prompt_logprobs", nothing=(0, False)),
    Field("skip_special_tokens", nothing=(True,)),
    Field("spaces_between_special_tokens", nothing=(True, False)),
    Field("include_stop_str_in_output", nothing=(False,)),
    Field("truncate_prompt_tokens", nothing=(-1,)),
    Field("add_special_tokens", nothing=(True, False), about="the model's template decides"),
    Field("return_tokens_as_token_ids", nothing=(False,)),
    Field("return_token_ids", nothing=(False,)),
    Field("mm_processor_kwargs", nothing=({},)),
    Field("priority", nothing=(0,)),
    Field("kv_transfer_params", nothing=({},)),
    Field("service_tier", nothing=("auto", "default")),
    Field("store", nothing=(False,)),
    *(Field(name, nothing=ANYTHING, about="about the caller") for name in ("user", "metadata", "safety_identifier")),
    *(Field(name, nothing=ANYTHING, about="a name for logs") for name in ("request_id", "rid")),
    *(Field(name, nothing=ANYTHING, about="a hint for a cache") for name in ("prompt_cache_key", "cache_salt")),
)
"""Fields of every endpoint that generates."""

LOOKING = (
    Field("granularity", Parsed('`"auto"`, tokens a tile, or a list of these, one per image', _levels)),
    Field("cost_weight", Number(0, 1000), sets="cost_weight", about="the price of visual tokens for the router"),
    Field("max_visual_tokens", Number(1, MANY, whole=True), sets="max_visual_tokens", about="of all images together"),
    Field(
        "escalate",
        Parsed('0 .. 1, or `"calibrated"`', _threshold),
        sets="escalate",
        about="an answer less certain is given again at a finer granularity",
    ),
)
"""Our own fields."""

MODEL = Field("model", TEXT, sets="adapter", about="the base, which it is if absent, or an adapter")

CHAT = (
    MODEL,
    Field("messages", LIST, about="of `system`, `developer`, `user`, `assistant`, `tool`; parts `text`, `image_url`"),
    *STREAMING,
    Field("max_tokens", TOKENS, nothing=(-1,), about=f"{DEFAULT_NEW_TOKENS} if absent"),
    Field("max_completion_tokens", TOKENS, nothing=(-1,), about="the newer name of `max_tokens`"),
    *SAMPLING,
    *LOOKING,
    *CHAT_SCORES,
    *TOOLS,
    Field("functions", nothing=([],)),
    Field("function_call", nothing=("none", "auto")),
    Field("modalities", nothing=(["text"],)),
    Field("audio"),
    Field("reasoning_effort", nothing=("none",)),
    Field("reasoning", nothing=({}, {"effort": "none"}, {"enabled": False})),
    Field("include_reasoning", nothing=(True, False)),
    Field("verbosity", nothing=("medium",)),
    Field("web_search_options"),
    Field("prediction", nothing=ANYTHING, about="a hint for speed"),
    Field("documents", nothing=([],)),
    Field("chat_template"),
    Field("chat_template_kwargs", nothing=({}, {"enable_thinking": False})),
    Field("add_generation_prompt", nothing=(True,)),
    Field("continue_final_message", nothing=(False,)),
)
"""Fields of /v1/chat/completions."""

ANY = Parsed("a string or a list of parts", lambda value, path: value)

MESSAGE = (
    Field("role", OneOf(tuple(ROLES)), about="in chat completions also `tool`, see below"),
    Field("content", ANY),
    Field("type", nothing=("text", "message"), about="lm-eval sends it"),
    Field("tool_calls", nothing=([], "", {}), about="taken from `assistant` in chat completions, see below"),
    *(Field(name, nothing=([], "", {})) for name in ("function_call", "annotations", "audio")),
    *(Field(name, nothing=ANYTHING) for name in ("name", "id", "status", "refusal")),
    *(Field(name, nothing=ANYTHING, about="of an earlier answer") for name in ("reasoning", "reasoning_content")),
)
"""Fields of one message."""

PART = (
    Field("type", TEXT),
    Field("text", TEXT),
    Field("refusal", TEXT, about="the text of an earlier answer"),
    Field("image_url", Parsed("an object with `url`, or the URL", lambda value, path: value)),
    Field("detail", nothing=ANYTHING, about="beside `image_url`, read with it"),
    *(Field(name, nothing=ANYTHING) for name in ("cache_control", "uuid", "annotations", "logprobs")),
)
IMAGE_URL = (
    Field("url", TEXT),
    Field("detail", OneOf(("auto", "low", "high", "original")), about="the granularity of this image"),
    Field("format", nothing=ANYTHING, about="the image itself says it"),
)
TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the field that holds it."""
IMAGES = ("image_url", "input_image")


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request and how to send its answer.

    given: the honoured fields as they were asked for, without the prompt. count: answers, each by a seed of its own.
    made: answers to choose these from, 0 = no more than these.
    usage_with_each: send the usage so far with every piece. tools: the functions that the answer may call.
    """

    request: Request
    given: dict[str, Any]
    stream: bool = False
    include_usage: bool = False
    usage_with_each: bool = False
    count: int = 1
    tools: Tools | None = None
    made: int = 0

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each image."""
        return tuple(image.size for image in self.request.images)

    @property
    def seeds(self) -> list[int]:
        """A seed for each answer."""
        return [(self.request.seed + number) % 2**32 for number in range(self.made or self.count)]


def read(values: Any, config: ModelConfig, limits: Limits, served: Sequence[str]) -> Ask:
    """Check the JSON of /v1/chat/completions and convert it to a request.

    served: the names of the models here, the base's first.

    Raises:
      Refusal: 400, or 404 for another model; names the field.
    """
    given = read_fields(values, CHAT, extras=limits.unknown_fields)
    check_model(given, served)
    tools = tools_of(given)
    messages = as_text(required(given, CHAT, "messages"), limits.unknown_fields)
    introduction = tools.introduction if tools else None
    turns, images, details = conversation(dict(enumerate(messages)), "messages", config, limits, introduction)
    ask = ask_of(given, CHAT, turns, images, details, config, limits)
    if tools is None:
        return ask
    if ask.request.guide:
        raise Refusal(400, "tools and a format both say what the answer must be: give one", "tools")
    return dataclasses.replace(ask, request=dataclasses.replace(ask.request, guide=tools.guide), tools=tools)


def check_model(given: dict[str, Any], served: Sequence[str]) -> None:
    """Raise Refusal 404 for another model than those served here; drop the base's name, so that only adapters stay."""
    model = given.get("model", served[0])
    if model not in served:
        only = ", ".join(map(repr, served))
        raise Refusal(404, f"model {short(model)} does not exist here, only {only}", "model", "model_not_found")
    if model == served[0]:
        given.pop("model", None)


def ask_of(
    given: dict[str, Any],
    table: Sequence[Field],
    prompt: list[Turn] | list[str],
    images: list[SentImage],
    details: Sequence[str],
    config: ModelConfig,
    limits: Limits,
    default_new_tokens: int = DEFAULT_NEW_TOKENS,
    raw: bool = False,
) -> Ask:
    """The request of given fields. details: `detail` of each image. default_new_tokens: if none are asked for."""
    options = {field.sets: given[field.name] for field in table if field.sets and field.name in given}
    if "top_k" in options:
        options["top_k"] = min(options["top_k"], config.language.vocab_size)
    new_tokens = min(_new_tokens(given) or default_new_tokens, limits.new_tokens)
    options |= shaping.options(given, new_tokens)
    seed = given.get("seed")
    request = Request(
        prompt=prompt,
        images=images,
        granularity=_granularity(given.get("granularity"), details, config),
        max_new_tokens=new_tokens,
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        raw=raw,
        **options,
    )
    stream = given.get("stream_options", {})
    return Ask(
        request,
        {name: value for name, value in given.items() if name not in ("messages", "prompt", "input")},
        given.get("stream", False),
        stream.get("include_usage", False),
        stream.get("continuous_usage_stats", False),
        given.get("n", 1),
    )


def check_characters(texts: Iterable[str], config: ModelConfig, param: str) -> None:
    """Refuse a text that cannot fit before it is tokenized."""
    if sum(map(len, texts)) > CHARACTERS_A_TOKEN * config.language.max_length:
        raise too_long(config.language.max_length, "the text is longer than any that fits", param)


def parsed(body: bytes) -> Any:
    """The JSON of a body. Raises Refusal 400 where it is not valid."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(body.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # ValueError includes JSONDecodeError and UnicodeDecodeError
        raise Refusal(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


@dataclasses.dataclass
class _Message:
    """A message. texts: the texts around its images, one more than it has images. details: `detail` of each image."""

    role: str
    texts: list[str]
    images: list[SentImage]
    details: list[str]

    @property
    def blank(self) -> bool:
        return not self.images and not self.texts[0].strip()

    def followed_by(self, later: _Message) -> _Message:
        """Both as one; a blank one adds nothing."""
        if self.blank or later.blank:
            return later if self.blank else self
        texts = [*self.texts[:-1], f"{self.texts[-1]}\n{later.texts[0]}", *later.texts[1:]]
        return _Message(self.role, texts, self.images + later.images, self.details + later.details)


def conversation(
    messages: Mapping[int, Any], where: str, config: ModelConfig, limits: Limits, preface: str | None = None
) -> tuple[list[Turn], list[SentImage], list[str]]:
    """Turns for the model's template, all images, and the `detail` of each image.

    messages: by their places in the field `where`. preface: a system message before them. Consecutive messages of one
    role become one turn.
    """
    system = [preface] if preface and preface.strip() else []
    said: list[_Message] = []
    for number, each in messages.items():
        message = _message(each, f"{where}[{number}]", sum(len(one.images) for one in said), limits)
        if message.role == "system":
            system += message.texts if not message.blank else []
        elif said and said[-1].role == message.role:
            said[-1] = said[-1].followed_by(message)
        else:
            said.append(message)
    if not messages:
        raise Refusal(400, f"{where} must hold a message", where)
    if not said or said[-1].role != "human":
        said.append(_Message("human", [""], [], []))
    turns = [{"from": one.role, "value": [""] if one.blank else one.texts} for one in said]
    if system:
        turns.insert(0, {"from": "system", "value": ["\n".join(system)]})
    check_characters((text for turn in turns for text in turn["value"]), config, where)
    return turns, [image for one in said for image in one.images], [detail for one in said for detail in one.details]


def _message(message: Any, where: str, before: int, limits: Limits) -> _Message:
    """One message. before: number of images in earlier messages."""
    fields = read_fields(message, MESSAGE, where, limits.unknown_fields)
    role = ROLES[required(fields, MESSAGE, "role", where)]
    where, content = f"{where}.content", fields.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not content and not isinstance(content, (bool, int, float, dict)):
        content = [{"type": "text", "text": ""}]
    if not isinstance(content, list):
        raise Refusal(400, f"{where} must be a string or a list of parts, not {short(content)}", where)
    parts: list[str | SentImage] = []
    details: list[str] = []
    for number, part in enumerate(content):
        path = f"{where}[{number}]"
        fields = read_fields(part, PART, path, limits.unknown_fields)
        kind = required(fields, PART, "type", path)
        if kind in TEXTS:
            parts.append(text_of(part, fields, TEXTS[kind], path))
        elif kind in IMAGES and role == "human":
            if before + len(details) >= limits.images:
                raise Refusal(400, f"{path}: over {limits.images} images", path, "too_many_images")
            image, detail = read_link(fields.get("image_url"), part.get("detail"), f"{path}.image_url", limits)
            parts.append(image)
            details.append(detail)
        else:
            known = "text or image_url" if role == "human" else "text: only messages from the user have images"
            raise Refusal(400, f"{path}.type={short(kind)} must be {known}", f"{path}.type")
    texts = [at for at, part in enumerate(parts) if isinstance(part, str)]
    between = texts and any(not isinstance(part, str) for part in parts[texts[0] : texts[-1]])
    if not between:
        parts.sort(key=lambda part: isinstance(part, str))
    return _Message(role, _around(parts), [part for part in parts if not isinstance(part, str)], details)


def text_of(part: dict[str, Any], fields: dict[str, Any], name: str, where: str) -> str:
    """The text of a part, which is empty where it is null. fields: those of the part that are there, read."""
    return "" if name in part and part[name] is None else required(fields, PART, name, where)


def read_link(link: Any, detail: Any, where: str, limits: Limits) -> tuple[SentImage, str]:
    """An image and its `detail`. link: an object with both, or the URL alone."""
    if isinstance(link, str):
        link = {"url": link, "detail": detail}
    given = read_fields(link, IMAGE_URL, where, limits.unknown_fields)
    return read_image(required(given, IMAGE_URL, "url", where), where, limits), given.get("detail", "auto")


def _around(parts: Sequence[str | SentImage]) -> list[str]:
    """The texts around the images of parts, each on lines of its own: [image, "a", "b"] becomes ["", "\\na\\nb"]."""
    texts = [""]
    for number, part in enumerate(parts):
        texts[-1] += "\n" if number else ""
        if isinstance(part, str):
            texts[-1] += part
        else:
            texts.append("")
    if len(parts) and not isinstance(parts[-1], str):
        texts[-1] += "\n"
    return texts


def _granularity(value: Any, details: Sequence[str], config: ModelConfig) -> Granularity | list[Granularity]:
    """The field `granularity`, or else each image's `detail`."""
    if value is None:
        finest = config.granularities[-1]
        known = {"auto": "auto", "low": config.granularities[0], "high": finest, "original": finest}
        return [known[detail] for detail in details] if set(details) - {"auto"} else "auto"
    return value


def _new_tokens(given: dict[str, Any]) -> int | None:
    """The tokens asked for; cut to the limit of this server, and by the engine to the model's length."""
    old, new = given.get("max_tokens"), given.get("max_completion_tokens")
    if None not in (old, new) and old != new:
        raise Refusal(400, f"max_tokens={old} and max_completion_tokens={new} differ: give one", "max_tokens")
    return given.get("max_output_tokens") or new or old
