"""Ask a server through one client library: python asking.py LIBRARY URL MODEL REQUESTS

`launch.bench.clients` runs it in the library's own environment, so it imports nothing of this project. It prints, as
JSON, the requests sent and failed, and the median milliseconds to the first piece of those that stream.
"""

from __future__ import annotations

import base64
import json
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

Call = Callable[[], Iterable[Any] | None]
"""One request: a stream of pieces, or None where it is over. Raises where the server or the answer is wrong."""

QUESTION = "Who wears 7?"
SHIRT = {
    "title": "Shirt",
    "description": "A shirt",
    "type": "object",
    "properties": {"number": {"type": "integer"}, "team": {"enum": ["red", "blue"]}},
    "required": ["number", "team"],
}


def png(side: int) -> str:
    """A data URI."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes([y % 256, 99, 50]) * side for y in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    whole = part(b"IHDR", head) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + whole).decode()


def user(words: str, image: str | None = None) -> dict[str, Any]:
    parts = [{"type": "text", "text": words}]
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}, *parts] if image else words}


def check(holds: bool, what: Any) -> None:
    if not holds:
        raise ValueError(f"not as asked for: {what!r}")


def check_shirt(found: Any) -> None:
    check(isinstance(found["number"], int) and found["team"] in ("red", "blue"), found)


def openai(url: str, model: str) -> list[Call]:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    chat = client.chat.completions.create
    items = [{"type": "input_image", "image_url": png(120)}, {"type": "input_text", "text": QUESTION}]
    greeted = [{"role": "assistant", "content": "Hello!"}, user(" "), {"role": "assistant", "content": None}, user("?")]
    format_ = {"type": "json_schema", "json_schema": {"name": "shirt", "strict": True, "schema": SHIRT}}

    def shaped() -> None:
        done = chat(model=model, messages=[user(QUESTION)], response_format=format_)
        check_shirt(json.loads(done.choices[0].message.content))

    def several() -> None:
        done = chat(model=model, messages=greeted, n=2, temperature=1, logprobs=True, max_tokens=8)
        check(len(done.choices) == 2, done)

    return [
        lambda: chat(model=model, messages=[user(QUESTION, png(120))], stream=True),
        lambda: client.responses.create(model=model, input=[{"role": "user", "content": items}], stream=True),
        lambda: client.completions.create(model=model, prompt=QUESTION, stream=True),
        several,
        shaped,
    ]


def langchain(url: str, model: str) -> list[Call]:
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=128, max_retries=0, timeout=300)

    def structured(method: str) -> None:
        found = chat.with_structured_output(SHIRT, method=method).invoke(QUESTION)
        if method == "json_mode":  # any object
            check(isinstance(found, dict), found)
        else:
            check_shirt(found)

    return [
        lambda: chat.stream([HumanMessage(user(QUESTION, png(120))["content"])]),
        lambda: structured("json_schema"),
        lambda: structured("json_mode"),
        lambda: structured("function_calling"),
    ]


def instructor(url: str, model: str) -> list[Call]:
    import openai
    from instructor import Mode, from_openai
    from pydantic import BaseModel

    class Shirt(BaseModel):
        number: int
        team: str

    class Anything(BaseModel):
        pass

    def extract(mode: Mode, wanted: type[BaseModel]) -> None:
        client = from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300), mode=mode)
        client.chat.completions.create(
            model=model, messages=[user(QUESTION)], response_model=wanted, max_retries=0, max_tokens=128
        )

    return [
        lambda: extract(Mode.JSON_SCHEMA, Shirt),
        lambda: extract(Mode.JSON, Anything),
        lambda: extract(Mode.TOOLS, Shirt),
    ]


def litellm(url: str, model: str) -> list[Call]:
    import litellm

    def complete(words: str, **options: Any) -> Any:
        return litellm.completion(
            f"openai/{model}", [user(words)], api_base=url, api_key="none", max_retries=0, timeout=300, **options
        )

    def shaped() -> None:
        format_ = {"type": "json_schema", "json_schema": {"name": "shirt", "schema": SHIRT}}
        check_shirt(json.loads(complete(QUESTION, response_format=format_).choices[0].message.content))

    def too_long() -> None:
        try:
            done = complete("word " * 50_000)
        except litellm.ContextWindowExceededError:
            return
        check(False, done)

    return [lambda: complete(QUESTION, stream=True, frequency_penalty=0.5), shaped, too_long]


def lm_eval(url: str, model: str) -> list[Call]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.api_models import JsonChatStr
    from lm_eval.models.openai_completions import LocalChatCompletion

    asks = LocalChatCompletion(base_url=f"{url}/chat/completions", model=model, max_retries=1)
    message = {**user(QUESTION), "type": "text"}  # as versions before 0.4.10 send it

    def generate() -> None:
        options = {"until": ["\n\n", "Question:"], "max_gen_toks": 16, "do_sample": False, "temperature": 0.0}
        one = Instance("generate_until", {}, (JsonChatStr(json.dumps([message])), options), 0)
        (text,) = asks.generate_until([one], disable_tqdm=True)
        check(isinstance(text, str), text)

    return [generate]


def main() -> None:
    library, url, model, requests = sys.argv[1], f"{sys.argv[2]}/v1", sys.argv[3], int(sys.argv[4])
    calls = globals()[library](url, model)
    first, failed = [], 0
    for number in range(requests):
        begin = time.perf_counter()
        try:
            stream = calls[number % len(calls)]()
            if stream is not None:
                pieces = iter(stream)
                next(pieces)
                first.append(1e3 * (time.perf_counter() - begin))
                for _ in pieces:
                    pass
        except Exception as error:  # every library has its own
            print(f"request {number}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
            failed += 1
    print(json.dumps({"sent": requests, "failed": failed, "first_ms": statistics.median(first) if first else None}))


if __name__ == "__main__":
    main()
