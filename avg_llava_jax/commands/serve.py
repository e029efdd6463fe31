"""Serve a model over HTTP: OpenAI's API, a demo page, Prometheus metrics.

    avg-llava serve --port=8000 [--adapter=NAME=FOLDER ...]

Endpoints are OpenAI's chat completions at /v1/chat/completions, a demo page at /, and Prometheus metrics at /metrics.
SIGTERM or Ctrl+C lets running requests finish; a second one cancels them. AVG_LLAVA_API_KEY or --api_key_file sets a
key for clients; a line of that file may limit its key. --slo_ttft lets the server look less closely under load.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
import threading
from typing import TYPE_CHECKING

from absl import flags

from avg_llava_jax.commands import cli, pictures
from avg_llava_jax.files import refuse_buckets

if TYPE_CHECKING:
    from avg_llava_jax.inference.pricing import Slo

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 = all addresses of the machine.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 = any free port.", 0, 65535)
NAME = flags.DEFINE_string("name", None, "The model's name for clients; default: the checkpoint folder's name.")
API_KEY_FILE = flags.DEFINE_string("api_key_file", None, "A file with the keys that clients must send, one a line.")
ADAPTER = flags.DEFINE_multi_string(
    "adapter", [], "NAME=FOLDER, an adapter on the checkpoint; a request's `model` chooses it. May be repeated."
)
SLOTS = flags.DEFINE_integer("slots", 8, "Requests decoded at once.", lower_bound=1)
QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait; more are refused with 429.", lower_bound=1)
SLO_TTFT = flags.DEFINE_float(
    "slo_ttft", None, "Seconds to the first token that a higher price of visual tokens keeps under load; default: none."
)
SLO_COST_WEIGHTS = flags.DEFINE_list(
    "slo_cost_weights", ["0", "100"], "The lowest and highest price for --slo_ttft; at 100 the router is not asked."
)
MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Most tokens of prompt and answer; fewer save memory.")
IMAGE_CACHE_MB = flags.DEFINE_integer("image_cache_mb", 256, "Device memory for encoded images.", lower_bound=1)
IMAGE_HOSTS = flags.DEFINE_list("image_hosts", [], "Hosts of image URLs to fetch: a.com,b.org:8080.")
MAX_BODY_MB = flags.DEFINE_integer("max_body_mb", 32, "Size of the largest request, images included.", lower_bound=1)
MAX_IMAGES = flags.DEFINE_integer("max_images", 8, "Most images in one conversation.", lower_bound=0)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 1024, "A request's max_tokens are cut to it.", lower_bound=1)
MAX_SECONDS = flags.DEFINE_float("max_seconds", 120, "Time limit of a request, in seconds.", lower_bound=0.001)
CLIENT_REQUESTS = flags.DEFINE_integer(
    "client_requests", None, "Requests that one client may have here at once; default: no bound.", lower_bound=1
)
ALLOWED_ORIGINS = flags.DEFINE_list("allowed_origins", [], "Origins of web pages that may use the server, or *.")
UNKNOWN_FIELDS = flags.DEFINE_bool("unknown_fields", False, "Ignore fields that the server does not know.")
DRAIN_SECONDS = flags.DEFINE_float("drain_seconds", 30, "Seconds for running requests after SIGTERM.", lower_bound=0)
flags.adopt_module_key_flags(pictures)
flags.set_default(pictures.MAX_PIXELS, 24_000_000)
API_KEY = "AVG_LLAVA_API_KEY"


def api_keys() -> str | None:
    """The keys of the file, else that of the environment; None without a key."""
    path = API_KEY_FILE.value
    return pathlib.Path(path).read_text(encoding="utf-8") if path else os.environ.get(API_KEY)


def adapters_of(texts: list[str], served: str) -> dict[str, str]:
    """["a=FOLDER"] -> {"a": "FOLDER"}. Raises ValueError for another form, and for a name that is taken."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ValueError(f"--adapter={text}: write NAME=FOLDER")
        if name == served or name in found:
            raise ValueError(f"--adapter={text}: the name {name!r} is taken: give each model its own (--name)")
        found[name] = folder
    refuse_buckets(found)
    return found


def slo_of(ttft: float | None, weights: list[str]) -> Slo | None:
    """The promise of --slo_ttft and --slo_cost_weights. Raises ValueError in one line."""
    from avg_llava_jax.inference.pricing import Slo

    try:
        low, high = map(float, weights)
    except ValueError:
        given = ",".join(weights)
        raise ValueError(f"--slo_cost_weights={given}: give the lowest and the highest, such as 0,100") from None
    return None if ttft is None else Slo(ttft, low, high)


def main() -> None:
    text = api_keys()
    name = NAME.value or pathlib.Path(cli.CHECKPOINT.value).resolve().name
    adapters = adapters_of(ADAPTER.value, name)

    from avg_llava_jax.server.clients import parse_keys

    keys = () if text is None else parse_keys(text, API_KEY_FILE.value or API_KEY)

    from avg_llava_jax.inference.engine import Engine
    from avg_llava_jax.server.app import Service
    from avg_llava_jax.server.limits import Limits
    from avg_llava_jax.server.serving import Serving, bind

    limits = Limits(
        body_bytes=MAX_BODY_MB.value << 20,
        pixels=pictures.MAX_PIXELS.value,
        images=MAX_IMAGES.value,
        new_tokens=MAX_NEW_TOKENS.value,
        seconds=MAX_SECONDS.value,
        image_hosts=tuple(host.strip().lower() for host in IMAGE_HOSTS.value),
        unknown_fields=UNKNOWN_FIELDS.value,
        bodies_bytes=8 * (MAX_BODY_MB.value << 20),
        client_requests=CLIENT_REQUESTS.value,
    )
    slo = slo_of(SLO_TTFT.value, SLO_COST_WEIGHTS.value)
    bound = bind(HOST.value, PORT.value)
    model = cli.load_model(adapters)
    engine = Engine(
        model,
        slots=SLOTS.value,
        max_length=MAX_LENGTH.value,
        image_cache_bytes=IMAGE_CACHE_MB.value << 20,
        queue=QUEUE.value,
        slo=slo,
    )
    say("compiling ...")
    engine.warm_up()
    engine.start()
    places = SLOTS.value + QUEUE.value
    serving = Serving(Service(engine, name, limits, keys, places, ALLOWED_ORIGINS.value), bound)
    serving.start()

    stop, hurry = threading.Event(), threading.Event()

    def asked(*_: object) -> None:
        (hurry if stop.is_set() else stop).set()

    signal.signal(signal.SIGTERM, asked)
    signal.signal(signal.SIGINT, asked)
    if not keys and HOST.value not in ("127.0.0.1", "::1", "localhost"):
        say(f"warning: {HOST.value} is open to anyone who can reach it; set {API_KEY} or --api_key_file")
    say(f"{name} at {serving.url}/ and {serving.url}/v1 (Ctrl+C stops)")
    stop.wait()
    say(f"finishing {serving.service.running} requests, for up to {DRAIN_SECONDS.value:g} seconds")
    serving.drain(DRAIN_SECONDS.value, hurry)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def command() -> None:
    cli.run(main, required=[])
