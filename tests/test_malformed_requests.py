"""Requests that are not as they should be are told so, and hurt nobody."""

import json
import struct
import zlib

import pytest

from tests.served import ONE, encoded, link, linked, text, user


def bomb(side):
    """A PNG of side x side pixels in a few hundred bytes."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(bytes(100_000))) + part(b"IEND", b"")
    )


MALFORMED = {
    "no messages": ({}, "messages is missing"),
    "messages empty": ({"messages": []}, "messages must hold a message"),
    "messages not a list": ({"messages": "hello"}, "messages must be a list, not 'hello'"),
    "message not an object": ({"messages": [1]}, "messages[0] must be a JSON object, not 1"),
    "role": ({"messages": [{"role": "critic", "content": "x"}]}, "role must be system, developer, user or assistant"),
    "tool calls": ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}, *ONE]}, "tool_calls[0]"),
    "content": ({"messages": [user(5)]}, "messages[0].content must be a string or a list of parts, not 5"),
    "content object": ({"messages": [user({})]}, "must be a string or a list of parts"),
    "part": ({"messages": [user([{"type": "audio"}])]}, "content[0].type='audio' must be text or image_url"),
    "part's text": ({"messages": [user([text(5)])]}, "content[0].text must be a string, not 5"),
    "part's field": ({"messages": [user([{**text("x"), "colour": 1}])]}, "field 'messages[0].content[0].colour'"),
    "image of the system": ({"messages": [{"role": "system", "content": [link()]}, *ONE]}, "must be text: only"),
    "image of an answer": ({"messages": [*ONE, {"role": "assistant", "content": [link()]}, *ONE]}, "must be text"),
    "image null": ({"messages": [user([{"type": "image_url"}])]}, "image_url must be a JSON object, not None"),
    "images": ({"messages": [user([link()] * 4)]}, "over 3 images"),
    "detail": ({"messages": [user([link(detail="best")])]}, "image_url.detail must be auto, low, high or original"),
    "unknown field": ({"messages": ONE, "beams": 4}, "unknown field 'beams'"),
    "n": ({"messages": ONE, "n": 2}, "n=2 needs a temperature"),
    "tools": ({"messages": ONE, "tools": [{}]}, "tools[0].function is missing"),
    "choice": ({"messages": ONE, "guided_choice": 5}, "guided_choice must be a list, not 5"),
    "stream": ({"messages": ONE, "stream": "yes"}, "stream must be true or false, not 'yes'"),
    "stream options": ({"messages": ONE, "stream_options": {"x": 1}}, "unknown field 'stream_options.x'"),
    "tokens": ({"messages": ONE, "max_tokens": 0}, "max_tokens=0 must be 1 or more"),
    "seed huge": ({"messages": ONE, "seed": 10**400}, "must be in -9223372036854775808 .. 9223372036854775807"),
    "tokens half": ({"messages": ONE, "max_tokens": 5.5}, "max_tokens must be an integer, not 5.5"),
    "tokens infinite": ({"messages": ONE, "max_tokens": 1e999}, "Infinity is not a JSON number"),
    "tokens true": ({"messages": ONE, "max_tokens": True}, "max_tokens must be an integer, not True"),
    "tokens twice": ({"messages": ONE, "max_tokens": 1, "max_completion_tokens": 2}, "differ: give one"),
    "temperature": ({"messages": ONE, "temperature": 2.5}, "temperature=2.5 must be in 0 .. 2"),
    "temperature text": ({"messages": ONE, "temperature": "hot"}, "temperature must be a number, not 'hot'"),
    "top_p": ({"messages": ONE, "top_p": 0}, "top_p=0.0 must be over 0"),
    "stop": ({"messages": ONE, "stop": ["a"] * 5}, "stop takes up to 4 strings"),
    "stop number": ({"messages": ONE, "stop": 5}, "stop must be a string or a list of strings, not 5"),
    "granularity": ({"messages": ONE, "granularity": 5}, "granularity=5: choose auto, 4, 8, 16"),
    "granularity text": ({"messages": ONE, "granularity": "fine"}, "granularity='fine' must be"),
    "granularities": ({"messages": [user([link()])], "granularity": [4, 4]}, "names 2 for 1 images"),
    "cost": ({"messages": ONE, "cost_weight": -1}, "cost_weight=-1 must be in"),
    "escalate": ({"messages": ONE, "escalate": 1.5}, 'escalate=1.5 must be in 0 .. 1, or "calibrated"'),
    "escalate text": ({"messages": ONE, "escalate": "yes"}, "escalate='yes' must be in 0 .. 1"),
    "calibrated": ({"messages": ONE, "escalate": "calibrated"}, "the checkpoint has no calibration"),
    "budget": ({"messages": [user([link(), text("x")])], "max_visual_tokens": 2}, "max_visual_tokens=2: the images"),
    "surrogate": ({"messages": [user("\ud800")]}, "messages[0].content[0].text is not valid Unicode"),
    "long": ({"messages": [user("x" * 9000)]}, "maximum context length is 256 tokens: the text is longer"),
    "over length": ({"messages": [user("word " * 600)]}, "the model's limit is 256"),
    "base64": ({"messages": linked("data:image/png;base64,@@@@")}, "not valid base64"),
    "base64 cut": ({"messages": linked("data:image/png;base64,AAAAA")}, "not valid base64"),
    "no base64": ({"messages": linked("data:image/png,xx")}, "must have the form data:image/png;base64"),
    "no data": ({"messages": linked("data:image/png;base64,")}, "the data URI is empty"),
    "file": ({"messages": linked("file:///etc/passwd")}, "must be a data URI"),
    "remote": ({"messages": linked("https://example.com/x.png")}, "does not fetch images from 'example.com'"),
    "no image": ({"messages": [user([link(b"hello")])]}, "not an image in a known format (known: PNG"),
    "format": ({"messages": [user([link(encoded(kind="TIFF"))])]}, "not an image in a known format"),
    "bomb": ({"messages": [user([link(bomb(9000))])]}, "image_url: 9000 x 9000 is over 250000 pixels"),
    "bomb for Pillow": ({"messages": [user([link(bomb(30000))])]}, "900000000 pixels"),
    "damaged": ({"messages": [user("damaged")]}, "image: damaged"),
}  # fmt: skip


@pytest.fixture
def neighbour(served):
    """A good request that is being answered while a bad one comes."""
    served.engine.held.set()
    stream = served.ask("neighbour good a", stream=True)
    yield stream
    served.engine.held.clear()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a good neighbour"


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_told_what_is_wrong(served, neighbour, name):
    body, message = MALFORMED[name]
    # json.dumps: half a surrogate pair passes it, as it does JavaScript's
    headers = {"Content-Type": "application/json"}
    reply = served.http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error" and {"param", "code"} <= set(error)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "the body must be a JSON object, not [1]"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_body_that_is_no_json(served, content, message):
    headers = {"Content-Type": "application/json"}
    reply = served.http.post("/v1/chat/completions", content=content, headers=headers)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"], reply.text
