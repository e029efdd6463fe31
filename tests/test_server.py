"""The server as OpenAI's own client sees it, and as clients that mean no good do."""

import concurrent.futures
import contextlib
import dataclasses
import http.server
import json
import math
import socket
import threading

import httpx
import openai
import pytest

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.stacked import Stack
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.replies import lattices
from avg_llava_jax.server.serving import bind
from tests.served import HEAD, LIMITS, ONE, Served, encoded, link, linked, text, user


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
    assert [turn["from"] for turn in request.prompt] == ["system", "human", "gpt", "human"]
    assert request.prompt[0]["value"] == ["Be brief."] and request.prompt[1]["value"] == ["", "\nfirst words"]
    assert request.prompt[3]["value"] == ["", "\nand\n", "\nthen this"]  # an image between two texts stays there
    assert served.engine.model.tokenizer.decode(
        [token for token in served.engine.model.prepare(request).sample.tokens.ids if token >= 0]
    ).startswith("[INST] Be brief.\n\n")
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
            extra_body={"granularity": 16, "cost_weight": 0.5, "max_visual_tokens": 60, "escalate": 0.9, "top_k": 7},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "see how it"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * 5 + ["length"]  # with the glance
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.model_extra["granularity"] == 16
    glance = chunks[1].model_extra["avg_llava"]
    assert glance["granularity"] == 4 and [read["certainty"] for read in glance["passes"]] == [0.25]
    (image,) = chunks[-2].model_extra["avg_llava"]["images"]
    assert (image["granularity"], image["probabilities"]) == (16, None)
    assert image["cells"] == {"left": 0, "top": 0, "width": 32, "height": 16, "columns": 8, "rows": 4}
    request = served.engine.requests[-1]
    assert (request.cost_weight, request.max_visual_tokens, request.escalate, request.top_k) == (0.5, 60, 0.9, 7)
    seen = chunks[-2].model_extra["avg_llava"]
    assert seen["certainty"] == 0.75
    assert seen["passes"][1] == {"granularity": 16, "visual_tokens": seen["visual_tokens"], "certainty": 0.75}
    assert seen["passes"][0]["certainty"] == 0.25


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


def test_statuses_in_the_shape_of_openai(served):
    with pytest.raises(openai.NotFoundError, match="model 'gpt-9' does not exist here, only 'tiny'"):
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


def test_an_adapter_is_a_model(tiny, tokenizer):
    model = AvgLlava(tiny, None, tokenizer)
    model.adapters = Stack(("mine",))
    served = Served(model)
    try:
        first, second = served.openai.models.list().data
        assert (first.id, second.id, second.model_extra["parent"]) == ("tiny", "mine", "tiny")
        assert served.openai.models.retrieve("mine").id == "mine"
        with pytest.raises(openai.NotFoundError, match="model 'other' does not exist here, only 'tiny', 'mine'"):
            served.openai.models.retrieve("other")
        for path, body in (
            ("chat/completions", {"messages": ONE}),
            ("completions", {"prompt": "a"}),
            ("responses", {"input": "a"}),
        ):
            for sent, name, adapter in (({}, "tiny", None), ({"model": "tiny"}, "tiny", None),
                                        ({"model": "mine"}, "mine", "mine")):  # fmt: skip
                reply = served.http.post(f"/v1/{path}", json=body | sent).json()
                assert (reply["model"], served.engine.requests[-1].adapter) == (name, adapter)
            refused = served.http.post(f"/v1/{path}", json=body | {"model": "other"})
            assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"
        assert served.http.post("/tokenize", json={"model": "mine", "prompt": "a"}).json()["count"] >= 1
    finally:
        served.close()


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


def test_a_full_queue_asks_to_come_again(unweighted):
    served = Served(unweighted)
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


def test_bodies_that_do_not_come_lock_nobody_out(unweighted):
    """A hundred connections with one byte of a body take no place, and the server keeps few of them."""
    limits = dataclasses.replace(LIMITS, bodies=16)
    served = Served(unweighted, limits=limits, places=2)
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.serving.port)))
            connection.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
            silent.append(connection)
        for connection in silent[:84]:  # the oldest are dropped for newer ones
            assert b" 408 " in connection.recv(100)
        assert served.post(messages=ONE).status_code == 200 and served.service.running == 0
    served.close()


def test_a_full_server_refuses_by_the_headers_alone(unweighted):
    served = Served(unweighted, places=1)
    served.engine.held.set()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        taken = pool.submit(served.ask, "b a")
        served.until(lambda: served.service.running == 1)
        with socket.create_connection(("127.0.0.1", served.serving.port)) as connection:
            connection.sendall(HEAD + b"Content-Length: 90000000\r\n\r\n{")  # more than is read and discarded
            assert b" 429 " in connection.recv(100)
        assert served.post(messages=ONE).status_code == 429
        served.engine.held.clear()
        assert taken.result().choices[0].message.content == "a b"
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


def test_what_takes_too_long_is_given_up(unweighted):
    served = Served(unweighted, limits=Limits(seconds=1))
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


def test_the_key(unweighted):
    served = Served(unweighted, key="secret")
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


def test_remote_images_come_from_allowed_hosts_alone(unweighted):
    pictures = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=pictures.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{pictures.server_port}"
    served = Served(unweighted, limits=Limits(image_bytes=50_000, image_hosts=(host,)))
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


def test_draining_finishes_what_runs_and_takes_nothing_new(unweighted):
    served = Served(unweighted)
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


def test_what_does_not_finish_while_draining_is_told_so(unweighted):
    served = Served(unweighted)
    served.engine.held.set()
    stream = served.ask("c b a", stream=True)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(served.ask, "c b a")
        served.until(lambda: served.engine.running == 2)
        served.serving.drain(0.1)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert isinstance(whole.exception(), openai.APIStatusError) and whole.exception().status_code == 503


def test_lattices_lie_on_the_image(tiny):
    """A worked case: 32 x 20 pixels lie on a mosaic of 32 x 32, 6 rows of padding above and below."""
    drawn = lattices((32, 20), tiny, 8)  # cells of 8 x 4 pixels: the first row of them is padding alone
    assert drawn["tiles"] == {"left": 0, "top": -6, "width": 32, "height": 32, "columns": 2, "rows": 2}
    assert drawn["cells"] == {"left": 0, "top": -2, "width": 32, "height": 24, "columns": 4, "rows": 6}
    without = lattices((30, 10), ModelConfig(pinpoints=()), 36)
    assert without["cells"] == {"left": 0, "top": 0, "width": 30, "height": 10, "columns": 6, "rows": 6}
    assert without["tiles"] == without["cells"] | {"columns": 1, "rows": 1}


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}"):
            bind("127.0.0.1", port)
