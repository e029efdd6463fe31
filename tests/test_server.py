"""The server as OpenAI's own client sees it, and as clients that mean no good do."""

import base64
import concurrent.futures
import http.server
import io
import json
import math
import pathlib
import socket
import struct
import threading
import time
import zlib

import httpx
import openai
import pytest
from PIL import Image

from avg_llava_jax.api import AvgLlava
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.server.app import Service
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.replies import lattices
from avg_llava_jax.server.serving import Serving, bind
from tests.engine_double import EngineDouble

ROOT = pathlib.Path(__file__).parents[1]
LIMITS = Limits(body_bytes=1 << 20, pixels=250_000, images=3, new_tokens=64, seconds=20, image_bytes=50_000)


class Served:
    """A service on a double, in this process, and OpenAI's client of it."""

    def __init__(self, model, key=None, limits=LIMITS, places=72):
        self.engine = EngineDouble(model)
        self.service = Service(self.engine, "tiny", limits, key, places)
        self.serving = Serving(self.service, bind("127.0.0.1", 0))
        self.serving.start()
        self.url = self.serving.url
        self.http = httpx.Client(base_url=self.url, timeout=20)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or "none", max_retries=0, timeout=20)

    def ask(self, content, **options):
        """One question through OpenAI's client."""
        messages = content if isinstance(content, list) and "role" in content[0] else [user(content)]
        return self.openai.chat.completions.create(model="tiny", messages=messages, **options)

    def post(self, **body):
        return self.http.post("/v1/chat/completions", json=body)

    def until(self, holds):
        """Wait for what other threads do."""
        deadline = time.monotonic() + 30
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def close(self):
        self.http.close()
        self.openai.close()
        self.serving.drain(0)


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return AvgLlava(tiny, None, tokenizer)  # it only prepares requests


@pytest.fixture(scope="module")
def served(model):
    served = Served(model)
    yield served
    served.close()


def user(content):
    return {"role": "user", "content": content}


def encoded(size=(32, 16), kind="PNG", colour="red"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def link(content=None, **rest):
    """A part of a message that holds an image."""
    data = base64.b64encode(encoded() if content is None else content).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", **rest}}


def text(words):
    return {"type": "text", "text": words}


def test_openai_client_several_turns_and_images(served, tiny):
    messages = [
        {"role": "system", "content": "Be brief."},
        user([text("first words"), link(encoded((16, 40)))]),
        {"role": "assistant", "content": "words first"},
        user([link(encoded((30, 30), "JPEG")), text("and"), link(detail="low"), text("then this")]),
    ]
    done = served.ask(messages, max_completion_tokens=5, temperature=0.5, top_p=0.9, seed=-1, stop=["x", "yz"], n=1)
    assert done.choices[0].message.content == "this then and"
    assert (done.choices[0].finish_reason, done.model, done.object) == ("stop", "tiny", "chat.completion")

    request = served.engine.requests[-1]
    assert [turn["from"] for turn in request.prompt] == ["human", "gpt", "human"]
    assert request.prompt[0]["value"] == "Be brief.\n\n<image>\nfirst words"
    assert request.prompt[2]["value"] == "<image>\n<image>\nand\nthen this"
    assert [image.size for image in request.images] == [(16, 40), (30, 30), (32, 16)]
    assert (request.max_new_tokens, request.temperature, request.top_p, request.seed) == (5, 0.5, 0.9, 2**32 - 1)
    assert request.stop == ("x", "yz") and request.granularity == ["auto", "auto", 4]

    visual = sum(visual_count(size, tiny, g) for size, g in (((16, 40), 8), ((30, 30), 8), ((32, 16), 4)))
    text_tokens = len(served.engine.model.prepare(request).sample.tokens.ids) - 3
    usage = done.usage.model_dump()
    assert (usage["visual_tokens"], usage["granularity"]) == (visual, [8, 8, 4])
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (text_tokens + visual, 3)
    assert usage["total_tokens"] == text_tokens + visual + 3
    seen = done.model_extra["avg_llava"]
    assert [image["size"] for image in seen["images"]] == [[16, 40], [30, 30], [32, 16]]
    assert seen["images"][2]["probabilities"]["4"] == pytest.approx(1 / 3)


def test_openai_client_streams(served):
    chunks = list(
        served.ask(
            [text("streams it how see"), link()],
            stream=True,
            max_tokens=3,
            stream_options={"include_usage": True},
            extra_body={"granularity": 16, "cost_weight": 0.5, "max_visual_tokens": 60, "top_k": 7},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "see how it"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 4 + ["length"]
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.model_extra["granularity"] == 16
    (image,) = chunks[-2].model_extra["avg_llava"]["images"]
    assert (image["granularity"], image["probabilities"]) == (16, None)
    assert image["cells"] == {"left": 0, "top": 0, "width": 32, "height": 16, "columns": 8, "rows": 4}
    request = served.engine.requests[-1]
    assert (request.cost_weight, request.max_visual_tokens, request.top_k) == (0.5, 60, 7)


def test_what_is_not_said_is_the_default(served):
    done = served.post(messages=[user("a b")], stop=None, user="me", temperature=0, n=1, logit_bias={}).json()
    request = served.engine.requests[-1]
    assert (request.temperature, request.top_p, request.granularity, request.images) == (0, 1, "auto", ())
    assert done["usage"]["granularity"] is None and done["avg_llava"]["images"] == []
    seeds = set()
    for _ in range(3):
        assert served.post(messages=[user("a")], temperature=1).status_code == 200
        seeds.add(served.engine.requests[-1].seed)
    assert len(seeds) == 3  # whoever names no seed gets another sample


def bomb(side):
    """A PNG of side x side pixels in a few hundred bytes."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(bytes(100_000))) + part(b"IEND", b"")
    )


def linked(url):
    return [user([{"type": "image_url", "image_url": {"url": url}}])]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ONE = [user("hello")]
MALFORMED = {
    "no messages": ({}, "messages is missing"),
    "messages empty": ({"messages": []}, "must end with a message from the user"),
    "messages not a list": ({"messages": "hello"}, "messages must be a list, not 'hello'"),
    "message not an object": ({"messages": [1]}, "messages[0] must be a JSON object, not 1"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role='tool' is not supported"),
    "answer last": ({"messages": [*ONE, {"role": "assistant", "content": "x"}]}, "must end with"),
    "answer first": ({"messages": [{"role": "assistant", "content": "x"}, *ONE]}, "must be from the user"),
    "answer empty": ({"messages": [*ONE, {"role": "assistant", "content": ""}, *ONE]}, "answer without text"),
    "tool calls": ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}, *ONE]}, "tool_calls is not"),
    "content": ({"messages": [user(5)]}, "messages[0].content must be a string or a list of parts, not 5"),
    "content null": ({"messages": [user(None)]}, "must be a string or a list of parts"),
    "question empty": ({"messages": [user("  ")]}, "a question without text"),
    "part": ({"messages": [user([{"type": "audio"}])]}, "content[0].type='audio' must be text or image_url"),
    "part's text": ({"messages": [user([text(5)])]}, "content[0].text must be a string, not 5"),
    "part's field": ({"messages": [user([{**text("x"), "colour": 1}])]}, "field 'messages[0].content[0].colour'"),
    "image of the system": ({"messages": [{"role": "system", "content": [link()]}, *ONE]}, "must be text in a message"),
    "image count": ({"messages": [user([text("<image> <image>"), link()])]}, "1 images for 2 <image>"),
    "placeholder": ({"messages": [user("see <image>")]}, "0 images for 1 <image>"),
    "images": ({"messages": [user([link()] * 4)]}, "over 3 images"),
    "detail": ({"messages": [user([link(detail="best")])]}, "detail must be auto, low or high"),
    "unknown field": ({"messages": ONE, "beams": 4}, "unknown field 'beams'"),
    "n": ({"messages": ONE, "n": 2}, "n=2 is not supported, only 1"),
    "tools": ({"messages": ONE, "tools": [{}]}, "tools=[{}] is not supported"),
    "stream": ({"messages": ONE, "stream": "yes"}, "stream must be true or false, not 'yes'"),
    "stream options": ({"messages": ONE, "stream_options": {"x": 1}}, "unknown field 'stream_options.x'"),
    "tokens": ({"messages": ONE, "max_tokens": 65}, "max_tokens=65 must be in 1 .. 64"),
    "tokens huge": ({"messages": ONE, "max_tokens": 10**40}, "must be in 1 .. 64"),
    "tokens true": ({"messages": ONE, "max_tokens": True}, "max_tokens must be an integer, not True"),
    "tokens twice": ({"messages": ONE, "max_tokens": 1, "max_completion_tokens": 2}, "differ: give one"),
    "temperature": ({"messages": ONE, "temperature": 2.5}, "temperature=2.5 must be in 0 .. 2"),
    "temperature text": ({"messages": ONE, "temperature": "hot"}, "temperature must be a number, not 'hot'"),
    "top_p": ({"messages": ONE, "top_p": 0}, "top_p=0.0 must be over 0"),
    "stop": ({"messages": ONE, "stop": ["a"] * 5}, "stop takes up to 4 strings"),
    "stop number": ({"messages": ONE, "stop": 5}, "stop must be a string or a list of strings, not 5"),
    "granularity": ({"messages": ONE, "granularity": 5}, "granularity=5 is none of this model's: auto, 4, 8, 16"),
    "granularity text": ({"messages": ONE, "granularity": "fine"}, "granularity='fine' must be"),
    "granularities": ({"messages": [user([link()])], "granularity": [4, 4]}, "names 2 for 1 images"),
    "cost": ({"messages": ONE, "cost_weight": -1}, "cost_weight=-1 must be in"),
    "budget": ({"messages": [user([link(), text("x")])], "max_visual_tokens": 2}, "max_visual_tokens=2: the images"),
    "surrogate": ({"messages": [user("\ud800")]}, "messages[0].content[0].text is not valid Unicode"),
    "long": ({"messages": [user("x" * 9000)]}, "the text is too long"),
    "over length": ({"messages": [user("word " * 600)]}, "the model's limit is 256"),
    "base64": ({"messages": linked("data:image/png;base64,@@@@")}, "not valid base64"),
    "base64 cut": ({"messages": linked("data:image/png;base64,AAAAA")}, "not valid base64"),
    "no base64": ({"messages": linked("data:image/png,xx")}, "a data URI reads data:image/png;base64"),
    "no data": ({"messages": linked("data:image/png;base64,")}, "the data URI is empty"),
    "file": ({"messages": linked("file:///etc/passwd")}, "an image is a data URI"),
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
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_body_that_is_no_json(served, content, message):
    headers = {"Content-Type": "application/json"}
    reply = served.http.post("/v1/chat/completions", content=content, headers=headers)
    assert reply.status_code == 400 and message in reply.json()["error"]["message"], reply.text


def test_statuses_in_the_shape_of_openai(served):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9' here, only 'tiny'"):
        served.openai.chat.completions.create(model="gpt-9", messages=ONE)
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask([link(b"hello")])
    assert caught.value.param == "messages[0].content[0].image_url" and caught.value.code == "corrupt_image"
    with pytest.raises(openai.InternalServerError, match="its log says why"):
        served.ask("crash")
    assert served.http.post("/v1/chat/completions", content="{}").status_code == 415
    for reply, status in (
        (served.http.get("/v1/chat/completions"), 405),
        (served.http.get("/v2"), 404),
        (served.http.get("/v1/models/other"), 404),
        (served.post(messages=[user("x" * (2 << 20))]), 413),
        (served.post(messages=[user("x" * (5 << 20))]), 413),
    ):
        assert reply.status_code == status and reply.json()["error"]["message"]


def test_models_health_and_metrics(served, tiny):
    (entry,) = served.openai.models.list().data
    assert entry.id == "tiny" and served.openai.models.retrieve("tiny").id == "tiny"
    assert entry.model_extra["avg_llava"]["granularities"] == list(tiny.granularities)
    assert served.http.get("/health").json() == {"status": "ok"}
    served.engine.open = False
    assert served.http.get("/health").status_code == 503
    served.engine.open = True
    served.ask("one two three")
    lines = served.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values['avg_llava_replies_total{status="200"}']) >= 1
    assert float(values["avg_llava_requests_finished_total"]) >= 1 and "avg_llava_requests_waiting" in values
    counts = [float(value) for name, value in values.items() if name.startswith("avg_llava_first_piece_seconds_bucket")]
    assert counts == sorted(counts) and counts[-1] == float(values["avg_llava_first_piece_seconds_count"]) >= 1
    for line in lines:
        assert line.startswith(("# HELP avg_llava_", "# TYPE avg_llava_")) or math.isfinite(
            float(line.rsplit(" ", 1)[1])
        )


def test_an_answer_that_breaks_off_ends_its_stream_with_the_error(served):
    stream = served.ask("x crash good", stream=True)
    with pytest.raises(openai.APIError, match="its log says why"):
        list(stream)


def test_a_full_queue_asks_to_come_again(model):
    served = Served(model)
    served.engine.held.set()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(served.ask, "c b a") for _ in range(served.engine.places)]
        served.until(lambda: served.engine.running == served.engine.places)
        with pytest.raises(openai.RateLimitError) as caught:
            served.ask("c b a")
        assert int(caught.value.response.headers["Retry-After"]) >= 1 and caught.value.code == "queue_full"
        served.engine.held.clear()
        assert {job.result().choices[0].message.content for job in taken} == {"a b c"}
    served.close()


def test_what_has_no_place_is_not_read(model):
    """Whose body does not come takes a place, no more than one."""
    served = Served(model, places=1)
    with socket.create_connection(("127.0.0.1", served.serving.port)) as connection:
        connection.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        served.until(lambda: served.service.running == 1)
        assert served.post(messages=ONE).status_code == 429
    served.until(lambda: served.service.running == 0)
    assert served.post(messages=ONE).status_code == 200
    served.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(served, stream):
    served.engine.held.set()
    before = served.engine.ends["Cancelled"]
    body = json.dumps({"messages": [user("c b a")], "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", served.serving.port)) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        if stream:
            assert b"200 OK" in connection.recv(100)
        served.until(lambda: served.engine.running == 1)
    served.until(lambda: served.engine.ends["Cancelled"] == before + 1)
    served.until(lambda: served.service.running == 0)
    served.engine.held.clear()


def test_what_takes_too_long_is_given_up(model):
    served = Served(model, limits=Limits(seconds=1))
    served.engine.held.set()
    with pytest.raises(openai.APIStatusError, match="longer than this server allows") as caught:
        served.ask("b a")
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="longer than this server allows"):
        list(served.ask("b a", stream=True))
    served.until(lambda: served.engine.ends["Cancelled"] == 2)

    with socket.create_connection(("127.0.0.1", served.serving.port)) as connection:  # a body that never comes
        connection.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
        assert b" 408 " in connection.recv(100)
    served.close()


def test_the_key(model):
    served = Served(model, key="secret")
    assert served.ask("b a").choices[0].message.content == "a b"
    for sent in (None, b"Bearer wrong", b"Bearer", b"secret", b"Bearer s\xe9"):
        raw = {} if sent is None else {"Authorization": sent}
        reply = served.http.post("/v1/chat/completions", json={"messages": ONE}, headers=raw)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key", sent
        assert served.http.get("/v1/models", headers=raw).status_code == 401
    assert served.http.get("/health").status_code == served.http.get("/").status_code == 200
    assert "secret" not in served.http.get("/").text
    served.close()


class _Pictures(http.server.BaseHTTPRequestHandler):
    """/good, /near (redirects to /good), /far (to another host), /huge, /gone."""

    def do_GET(self):
        places = {"/near": "/good", "/far": f"http://localhost:{self.server.server_port}/good"}
        if self.path in places:
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
        elif self.path in ("/good", "/huge"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded() if self.path == "/good" else bytes(1_000_000))
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


def test_remote_images_come_from_allowed_hosts_alone(model):
    pictures = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{pictures.server_port}"
    served = Served(model, limits=Limits(image_bytes=50_000, image_hosts=(host,)))
    for path in ("good", "near"):
        reply = served.post(messages=linked(f"http://{host}/{path}"))
        assert reply.json()["avg_llava"]["images"][0]["size"] == [32, 16], reply.text
    for url, message in (
        (f"http://{host}/far", "it redirects to another host"),
        (f"http://{host}/huge", "over 50000 bytes"),
        (f"http://{host}/gone", "404"),
        (f"http://localhost:{pictures.server_port}/good", "does not fetch images from 'localhost"),
        (f"http://user@{host}/good", "does not fetch images from 'user@"),
        ("http://[::1/x", "Invalid IPv6"),
    ):
        reply = served.post(messages=linked(url))
        assert reply.status_code == 400 and message in reply.json()["error"]["message"], reply.text
    served.close()
    pictures.shutdown()


def test_draining_finishes_what_runs_and_takes_nothing_new(model):
    served = Served(model)
    served.engine.held.set()
    stream = served.ask("c b a", stream=True)
    draining = threading.Thread(target=served.serving.drain, args=(20,))
    draining.start()
    served.until(lambda: served.http.get("/health").status_code == 503)
    with pytest.raises(openai.APIStatusError, match="shutting down") as caught:
        served.ask("b a")
    assert caught.value.status_code == 503 and "Retry-After" in caught.value.response.headers
    served.engine.held.clear()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a b c"
    draining.join(10)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{served.url}/health")


def test_lattices_lie_on_the_image(tiny):
    """A worked case: 32 x 20 pixels lie on a mosaic of 32 x 32, 6 rows of padding above and below."""
    drawn = lattices((32, 20), tiny, 16)  # cells of 4 x 4 pixels: the first row of them is padding alone
    assert drawn["tiles"] == {"left": 0, "top": -6, "width": 32, "height": 32, "columns": 2, "rows": 2}
    assert drawn["cells"] == {"left": 0, "top": -2, "width": 32, "height": 24, "columns": 8, "rows": 6}
    without = lattices((30, 10), ModelConfig(pinpoints=()), 36)
    assert without["cells"] == {"left": 0, "top": 0, "width": 30, "height": 10, "columns": 6, "rows": 6}
    assert without["tiles"] == without["cells"] | {"columns": 1, "rows": 1}


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}"):
            bind("127.0.0.1", port)
