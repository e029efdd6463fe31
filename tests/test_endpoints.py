"""The endpoints beside chat completions, and what clients act on: codes, headers, encodings."""

import concurrent.futures
import contextlib
import dataclasses
import gzip
import http.server
import io
import socket
import threading

import openai
import pytest
from PIL import Image

from avg_llava_jax.server import VERSION, app
from avg_llava_jax.server.clients import key_of, parse_keys
from avg_llava_jax.server.images import tiles_of
from avg_llava_jax.server.limits import Limits
from tests.served import HEAD, LIMITS, ONE, Served, encoded, link, linked, text, user


def test_completions(served):
    done = served.openai.completions.create(model="tiny", prompt="c b <image> a", max_tokens=3, stop=None, n=1)
    assert (done.object, done.choices[0].text, done.choices[0].finish_reason) == (
        "text_completion",
        "a <image> b",
        "length",
    )
    assert served.engine.requests[-1].raw and served.engine.requests[-1].prompt == ["c b <image> a"]
    parts = [text("Left: "), link(), text(" right: "), link(detail="low")]
    stream = served.openai.completions.create(
        model="tiny", prompt=parts, stream=True, stream_options={"include_usage": True}, max_tokens=5
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == "right: Left:"
    assert chunks[-1].choices[0].finish_reason == "stop" and last.usage.completion_tokens == 2
    request = served.engine.requests[-1]
    assert request.prompt == ["Left: ", " right: ", ""] and request.granularity == ["auto", 4]
    for prompt in (["a", "b"], [1, 2], [], [{"type": "audio"}]):
        reply = served.http.post("/v1/completions", json={"prompt": prompt})
        assert reply.status_code == 400 and reply.json()["error"]["param"].startswith("prompt"), reply.text
    reply = served.http.post("/v1/completions", json={"prompt": "a", "echo": True})
    assert reply.json()["error"]["param"] == "echo"


def test_a_byte_order_mark_is_no_part_of_a_body(served):
    headers = {"Content-Type": "application/json"}
    body = b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "b a"}]}'
    reply = served.http.post("/v1/chat/completions", content=body, headers=headers)
    assert reply.json()["choices"][0]["message"]["content"] == "a b"


def test_offsets_of_tokens_go_on_through_a_stream(served):
    fields = {"model": "tiny", "prompt": "c b a", "logprobs": 0, "temperature": 1, "n": 2}
    whole = served.openai.completions.create(**fields).choices
    offsets = {0: [], 1: []}
    for chunk in served.openai.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    for choice in whole:
        lengths = [len(token) for token in choice.logprobs.tokens]
        assert offsets[choice.index] == choice.logprobs.text_offset == [sum(lengths[:n]) for n in range(len(lengths))]
    assert len(offsets[0]) == 3


def test_the_best_of_several_completions(served, monkeypatch):
    fields = {"model": "tiny", "prompt": "c b a", "temperature": 1, "seed": 299}
    done = served.openai.completions.create(n=2, best_of=4, logprobs=0, **fields)  # seeds 299 .. 302
    assert [choice.logprobs.token_logprobs[0] for choice in done.choices] == [-2, -3]
    assert [choice.index for choice in done.choices] == [0, 1] and done.usage.completion_tokens == 12
    assert served.openai.completions.create(best_of=3, **fields).choices[0].logprobs is None
    for options, message in (
        ({"best_of": 2, "n": 3}, "at least n=3"),
        ({"best_of": 2, "stream": True}, "cannot be streamed"),
        ({"best_of": 2, "temperature": 0}, "needs a temperature"),
    ):
        reply = served.http.post("/v1/completions", json={**fields, **options})
        assert reply.status_code == 400 and message in reply.text and reply.json()["error"]["param"] == "best_of"


def test_responses(served):
    said = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "", "annotations": []}]},
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "three two one"},
                {"type": "input_image", "image_url": link()["image_url"]["url"], "detail": "low"},
            ],
        },
    ]
    ask = served.openai.responses.create
    done = ask(model="tiny", instructions="Be brief.", input=said, max_output_tokens=2, reasoning={"effort": None})
    assert (done.output_text, done.status, done.incomplete_details.reason) == (
        "one two",
        "incomplete",
        "max_output_tokens",
    )
    assert (done.usage.output_tokens, done.instructions) == (2, "Be brief.")
    request = served.engine.requests[-1]
    assert [turn["value"] for turn in request.prompt] == [["Be brief."], ["Hello"], [""], ["", "\nthree two one"]]
    assert request.granularity == [4]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model="tiny", input="Hello", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model="tiny", input=[*said, {"role": "user", "content": 5}])  # `reasoning` keeps its place
    assert caught.value.param == "input[4].content"


def test_responses_stream_as_events(served):
    events = list(served.openai.responses.create(model="tiny", input="b a", stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(10))
    assert "".join(event.delta for event in events if event.type.endswith("delta")) == events[-1].response.output_text
    with served.openai.responses.stream(model="tiny", input="b a", max_output_tokens=1) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"
    with pytest.raises(openai.APIError, match="its log says why"):
        list(served.openai.responses.create(model="tiny", input="x crash good", stream=True))


def test_usage_so_far(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    first, *chunks, end, usage = served.ask("c b a", stream=True, stream_options=options)
    assert [chunk.usage.completion_tokens for chunk in (first, *chunks, end)] == [0, 1, 2, 3, 3]
    assert usage.usage.total_tokens == end.usage.total_tokens


def test_tokenize_and_version(served):
    model = served.engine.model
    reply = served.http.post("/tokenize", json={"prompt": "hello", "add_special_tokens": False}).json()
    assert model.tokenizer.decode(reply["tokens"]) == "hello" and reply["count"] == len(reply["tokens"])
    assert model.tokenizer.bos_id not in reply["tokens"] and reply["max_model_len"] == 256
    reply = served.http.post("/tokenize", json={"messages": [user([link(), text("hello")])]}).json()
    done = served.ask([link(), text("hello")], extra_body={"granularity": 8})
    assert reply["count"] + reply["visual_tokens"]["8"] == done.usage.prompt_tokens
    assert served.http.post("/tokenize", json={}).json()["error"]["param"] == "prompt"
    assert served.http.get("/version").json() == {"version": VERSION}


def test_errors_that_clients_act_on(served):
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is 256 tokens") as caught:
        served.ask("word " * 600)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    for path, allowed in (("/v1/chat/completions", "POST"), ("/health", "GET")):
        reply = served.http.request("DELETE", path)
        assert reply.status_code == 405 and allowed in reply.headers["Allow"]
    reply = served.http.get("/health", headers={"x-request-id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    ids = {served.http.get("/v1/models/a/b").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2 and all(name.startswith("req_") for name in ids)


def test_a_truncated_image_is_named(served):
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask([text("a"), link(), link(noise("JPEG")[:-400])])
    assert (caught.value.param, caught.value.code) == ("messages[0].content[2].image_url", "corrupt_image")


def test_images_are_decoded_few_at_a_time_and_hold_nobody_up(unweighted, monkeypatch):
    served, gate, inside, most = Served(unweighted), threading.Event(), [], []

    def slow(config, prepared):
        inside.append(prepared)
        most.append(len(inside))
        assert gate.wait(60)
        inside.remove(prepared)
        return tiles_of(config, prepared)

    monkeypatch.setattr(app, "tiles_of", slow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(served.ask, [link(), text("b a")]) for _ in range(4)]
        served.until(lambda: len(inside) == app.DECODERS and served.service.running == 4)
        assert served.ask("d c").choices[0].message.content == "c d"  # text alone overtakes them
        gate.set()
        assert {job.result().choices[0].message.content for job in asked} == {"a b"}
    assert max(most) == app.DECODERS
    images = [image for request in served.engine.requests for image in request.images]
    assert len(images) == 4 and not any(hasattr(image, "content") for image in images)  # only their sizes are kept
    served.close()


def noise(kind):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(file, kind)
    return file.getvalue()


def test_base64_as_people_write_it(served):
    data = link(noise("PNG"))["image_url"]["url"].partition(",")[2]
    assert {"+", "/"} & set(data)
    wrapped = "\n".join(data[at : at + 76] for at in range(0, len(data), 76))
    for form in (wrapped, wrapped.replace("\n", "\r\n"), data.translate(str.maketrans("+/", "-_")), data.rstrip("=")):
        assert served.post(messages=linked(f" data:image/png;base64,{form}\n")).status_code == 200
    quoted = data.replace("+", "%2B").replace("=", "%3D")
    assert served.post(messages=linked(f"DATA:image/png;charset=utf-8;BASE64,{quoted}")).status_code == 200


def test_remote_images_with_spaces_and_umlauts(unweighted):
    asked = []

    class Pictures(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["User-Agent"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded())

        def log_message(self, *_):
            pass

    pictures = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{pictures.server_port}"
    served = Served(unweighted, limits=Limits(image_hosts=(host,)))
    for path in ("my photo.png", "my%20photo.png", "größe.png?größe=1&b=2#top"):
        assert served.post(messages=linked(f"http://{host}/{path}")).status_code == 200
    assert [path for path, _ in asked] == ["/my%20photo.png"] * 2 + ["/gr%C3%B6%C3%9Fe.png?gr%C3%B6%C3%9Fe=1&b=2"]
    assert {agent for _, agent in asked} == {f"avg_llava_jax/{VERSION}"}
    served.close()
    pictures.shutdown()


def test_gzip_bodies_are_bounded_when_unpacked(served):
    def post(content, encoding="gzip"):
        headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
        return served.http.post("/v1/chat/completions", content=content, headers=headers)

    assert post(gzip.compress(b'{"messages": [{"role": "user", "content": "b a"}]}')).status_code == 200
    assert post(gzip.compress(bytes(50 << 20))).status_code == 413
    assert post(b"\x1f\x8b nonsense").json()["error"]["code"] == "invalid_gzip"
    assert post(gzip.compress(b"{}")[:-9]).status_code == 400
    assert post(b"{}", "br").status_code == 415


def test_other_origins_only_by_flag(served, unweighted):
    asking = {"Origin": "https://a.com", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.http.get("/health", headers=asking).headers
    assert served.http.options("/v1/chat/completions", headers=asking).status_code == 405
    open_to = Served(unweighted, key="secret", origins=["https://a.com"])
    reply = open_to.http.options("/v1/chat/completions", headers=asking)
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == "https://a.com"
    reply = open_to.http.post("/v1/chat/completions", json={"messages": ONE}, headers=asking)
    assert reply.status_code == 401 and reply.headers["access-control-allow-origin"] == "https://a.com"
    assert open_to.http.options("/health", headers={**asking, "Origin": "https://b.com"}).status_code == 400
    open_to.close()


def test_a_model_may_have_a_slash_in_its_name(unweighted):
    served = Served(unweighted)
    served.service.names = ("org/tiny",)
    for path in ("org/tiny", "org%2Ftiny"):
        assert served.http.get(f"/v1/models/{path}").json()["id"] == "org/tiny"
    served.close()


def test_keys_and_their_limits(unweighted):
    served = Served(unweighted, key="one requests=1\ntwo per_minute=2  # a guest\n\n# nobody\n")

    def post(key):
        headers = {"Authorization": f"Bearer {key}"}
        return served.http.post("/v1/chat/completions", json={"messages": [user("b a")]}, headers=headers)

    served.engine.held.set()
    stream = served.ask("b a", stream=True)  # with key one
    reply = post("one")
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "too_many_requests")
    served.engine.held.clear()
    assert len(list(stream)) == 4
    served.until(lambda: served.service.running == 0)
    assert post("one").status_code == post("two").status_code == post("two").status_code == 200
    reply = post("two")
    assert reply.json()["error"]["code"] == "rate_limit_exceeded" and 1 <= int(reply.headers["Retry-After"]) <= 60
    assert post("three").status_code == 401
    served.close()


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "keys: the key must be one non-empty line of ASCII"),
        ("# none", "keys: the key must be one non-empty line of ASCII"),
        ("ok\nschl\u00fcssel", "keys, line 2: the key must be one non-empty line of ASCII"),
        ("ok speed=3", "keys, line 1: speed=3 must be requests=N or per_minute=N"),
        ("ok requests=0", "keys, line 1: requests=0 must be"),
        ("two words", "keys, line 1: words= must be"),
        ("ok requests=1 requests=5", "keys, line 1: the key or a limit is there twice"),
        ("ok requests=1\nother\nok", "keys, line 3: the key or a limit is there twice"),
    ],
)
def test_a_key_file_that_says_something_else(line, message):
    with pytest.raises(ValueError, match=message):
        parse_keys(line, "keys")


def test_a_key_with_a_number_sign_is_whole():
    keys = parse_keys("sk-a#b requests=2 #c\n\t#sk-none\n", "keys")
    assert [key.requests for key in keys] == [2]
    assert key_of("Bearer sk-a#b", keys) is keys[0]
    assert key_of("Bearer sk-a", keys) is None


def test_one_client_has_bounds(unweighted):
    limits = dataclasses.replace(LIMITS, client_requests=2, bodies_bytes=300_000)
    served = Served(unweighted, limits=limits)
    served.engine.held.set()
    streams = [served.ask("b a", stream=True) for _ in range(2)]
    assert served.post(messages=ONE).json()["error"]["code"] == "too_many_requests"
    served.engine.held.clear()
    for stream in streams:
        list(stream)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.serving.port)))
            connection.sendall(HEAD + b"Content-Length: 500000\r\n\r\n" + bytes(140_000))
        served.until(lambda: _arrived(served) >= 280_000)
        reply = served.post(messages=[user("x" * 50_000)])
        assert reply.json()["error"]["code"] == "too_many_bytes"
    served.until(lambda: _arrived(served) == 0)
    served.close()


def _arrived(served):
    clients = list(served.service._clients._clients.values())
    return sum(body.size for client in clients for body in list(client.bodies))
