"""A served double, OpenAI's client of it, and parts of messages."""

import base64
import io
import time

import httpx
import openai
from PIL import Image

from avg_llava_jax.server.app import Service
from avg_llava_jax.server.clients import parse_keys
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.serving import Serving, bind
from tests.engine_double import EngineDouble

LIMITS = Limits(body_bytes=1 << 20, pixels=250_000, images=3, new_tokens=64, seconds=20, image_bytes=50_000)


class Served:
    """A service on a double, in this process, and OpenAI's client of it."""

    def __init__(self, model, key=None, limits=LIMITS, places=72, origins=()):
        self.engine = EngineDouble(model)
        keys = parse_keys(key, "key") if key else ()
        self.service = Service(self.engine, "tiny", limits, keys, places, origins)
        self.serving = Serving(self.service, bind("127.0.0.1", 0))
        self.serving.start()
        self.url = self.serving.url
        self.http = httpx.Client(base_url=self.url, timeout=20)
        sent = key.split()[0] if key else "none"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=sent, max_retries=0, timeout=20)

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


def linked(url):
    return [user([{"type": "image_url", "image_url": {"url": url}}])]


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ONE = [user("hello")]
