"""Generated requests: whatever is asked, the server answers, and never with its own failure.

python -m tests.test_generated_requests 10000     so many of them
"""

import dataclasses
import json
import sys
from collections import Counter

import httpx
import pytest

from avg_llava_jax.server.completions import COMPLETION
from avg_llava_jax.server.fields import ANYTHING, Field, Number, OneOf, Typed
from avg_llava_jax.server.reading import CHAT, IMAGE_URL, MESSAGE, PART, STREAM_OPTIONS
from avg_llava_jax.server.responses import RESPONSE
from avg_llava_jax.server.tokenizing import TOKENIZE
from tests.served import LIMITS, Served, encoded, link

hypothesis = pytest.importorskip("hypothesis", reason="generated requests need hypothesis")
st = hypothesis.strategies

BATCH = 500
"""Requests of one run of hypothesis, which keeps what it generates."""
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.sampled_from((0, 1, -1, 5.0, 10**30))
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.sampled_from(("hello", "b a", "", " ", "<image>", "é日\U000f0000", "word " * 300)) | st.text(max_size=20)
URLS = st.sampled_from(
    (link()["image_url"]["url"], link(encoded()[:60])["image_url"]["url"], "data:image/png;base64,@", "http://x/ ü", "")
)


def nested(name: str, field: Field):
    """Good values of a field whose values have a structure, None for others."""
    if name == "messages" or name == "input":
        return st.lists(objects(MESSAGE, {"role": 3, "content": 3}), min_size=1, max_size=3) | TEXTS
    if name in ("content", "prompt"):
        return TEXTS | st.lists(objects(PART, {"type": 3, "text": 2, "image_url": 2}), max_size=3)
    if name == "image_url":
        return URLS | objects(IMAGE_URL, {"url": 3})
    if name == "stream_options":
        return objects(STREAM_OPTIONS, {})
    if name == "url":
        return URLS
    if name == "type":
        return st.sampled_from(("text", "image_url", "input_text", "input_image", "message", "audio"))
    return {"model": st.just("tiny"), "text": TEXTS}.get(name)


def values(field: Field):
    """Values of a field: mostly such as it takes, some of any kind."""
    likely = []
    if (own := nested(field.name, field)) is not None:
        likely.append(own)
    elif isinstance(field.parse, Number):
        whole = field.parse.whole
        numbers = st.integers(int(field.parse.least), int(min(field.parse.most, 99)))
        likely.append(numbers if whole else st.floats(field.parse.least, field.parse.most) | numbers)
    elif isinstance(field.parse, OneOf):
        likely.append(st.sampled_from(field.parse.choices))
    elif isinstance(field.parse, Typed):
        likely.append({bool: st.booleans(), str: TEXTS, list: st.lists(JSON, max_size=2)}[field.parse.kind])
    if field.nothing and field.nothing is not ANYTHING:
        likely.append(st.sampled_from(list(field.nothing)))
    return st.one_of(*likely, *likely, *likely, JSON)


def objects(table, often):
    """Objects with some fields of a table. often: those that most of them have."""
    some = st.fixed_dictionaries({}, optional={field.name: st.deferred(lambda f=field: values(f)) for field in table})
    named = {field.name: field for field in table}
    most = st.fixed_dictionaries({name: st.deferred(lambda f=named[name]: values(f)) for name in often})
    few = st.lists(st.sampled_from(sorted(named)), max_size=3)
    return st.builds(lambda all_, names, must: {n: all_[n] for n in names if n in all_} | must, some, few, most)


PATHS = {
    "/v1/chat/completions": objects(CHAT, {"messages": 1}),
    "/v1/completions": objects(COMPLETION, {"prompt": 1}),
    "/v1/responses": objects(RESPONSE, {"input": 1}),
    "/tokenize": objects(TOKENIZE, {"prompt": 1}) | objects(CHAT, {"messages": 1}),
}
REQUESTS = st.sampled_from(sorted(PATHS)).flatmap(lambda path: st.tuples(st.just(path), PATHS[path]))


def answered(served: Served, path: str, body: object) -> int:
    """The status of a request; checks what every reply has."""
    content = json.dumps(body)  # NaN and half surrogate pairs too, as clients write them
    reply = served.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code < 500, f"{path} {content}: {reply.text}"
    assert reply.headers["x-request-id"]
    if reply.status_code != 200:
        error = reply.json()["error"]
        assert error["message"] and {"type", "param", "code"} <= set(error), f"{path} {content}: {reply.text}"
    return reply.status_code


def run(served: Served, examples: int) -> dict[int, int]:
    """Send generated requests: how many had which status."""
    counts: dict[int, int] = {}

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(REQUESTS)
    def send(request):
        status = answered(served, *request)
        counts[status] = counts.get(status, 0) + 1

    send()
    return counts


def test_no_generated_request_fails_the_server(unweighted):
    served = Served(unweighted)
    served.engine.places = 64
    counts = run(served, 120)
    assert counts[200] > 5 and counts[400] > 5
    served.until(lambda: served.service.running == 0)
    served.close()


if __name__ == "__main__":
    from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig, ScalerConfig, VisionConfig
    from avg_llava_jax.data.tokenizer import load_tokenizer
    from avg_llava_jax.inference.model import Model
    from tests.conftest import TOKENIZER

    config = ModelConfig(
        vision=VisionConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=32),
        scaler=ScalerConfig(halvings=2),
        router=RouterConfig(text_tokens=4, heads=2),
        language=LanguageConfig(vocab_size=600, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, max_length=256),
        pinpoints=((16, 32), (32, 16), (32, 32)),
        template="mistral_instruct",
    )
    limits = dataclasses.replace(LIMITS, seconds=3600)  # on a busy machine, the double may wait for long
    server = Served(Model(config, None, load_tokenizer(TOKENIZER)), limits=limits)
    server.engine.places, server.http = 64, httpx.Client(base_url=server.url, timeout=3600)
    counts, wanted = Counter(), int(sys.argv[1])
    while (sent := sum(counts.values())) < wanted:
        counts.update(run(server, min(BATCH, wanted - sent)))
        server.engine.requests.clear()
        print(f"{sum(counts.values())} requests: {dict(sorted(counts.items()))}", flush=True)
    server.until(lambda: server.service.running == 0)
    server.close()
