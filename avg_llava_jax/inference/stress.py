"""A stress test: random requests of every kind, some malformed or cancelled; each must end right, none may compile."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import random
import resource
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.tickets import Cancelled, QueueFull, Ticket

MALFORMED, CANCELLED = 0.05, 0.05
WORDS = "who what where number colour shirt left right weather field team player seven many of the is are 3 10 ?"


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a run.

    outcomes: requests by how they ended: answered, malformed (ValueError from `submit`), failed, cancelled.
    wrong: one line for each request that did not end as it should.
    compilations: programs compiled during the run. seconds: of the whole run.
    device_bytes: bytes on the devices after the run, less those before it. host_bytes: growth of the process's peak
        memory since the first quarter of the requests.
    """

    outcomes: dict[str, int]
    wrong: list[str]
    compilations: int
    seconds: float
    device_bytes: int
    host_bytes: int


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Count the programs that XLA compiles in any thread; yields a function that returns the count so far."""
    count = 0

    def heard(name: str, _: float, **__: Any) -> None:
        nonlocal count
        count += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def stress(
    engine: Engine, count: int, in_flight: int, seed: int = 0, largest: int = 200, progress: bool = False
) -> Report:
    """Send `count` random requests to a started engine, `in_flight` at once; pictures have sides up to `largest` px."""
    rng = random.Random(seed)
    pictures = [random_picture(rng, largest) for _ in range(max(4, count // 10))]
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    running: deque[tuple[int, Ticket, bool]] = deque()
    before, begin, quarter = _live_bytes(), time.perf_counter(), 0

    def settle() -> None:
        number, ticket, cancel = running.popleft()
        outcome, trouble = _outcome(ticket, cancel)
        outcomes[outcome] += 1
        if trouble:
            wrong.append(f"request {number}: {trouble}")

    with compilations() as compiled:
        for number in tqdm(range(count), unit="request", disable=not progress):
            while len(running) >= in_flight:
                settle()
            if number == count // 4:
                quarter = _peak_bytes()
            malformed = rng.random() < MALFORMED
            request = (malformed_request if malformed else random_request)(rng, engine, pictures)
            cancel = not malformed and rng.random() < CANCELLED
            try:
                ticket = engine.submit(Request(**request))
            except QueueFull as error:
                wrong.append(f"request {number}: {error}")
            except ValueError as error:
                outcomes["malformed"] += 1
                if not malformed or "\n" in str(error):
                    wrong.append(f"request {number}: {error}")
            else:
                if malformed:
                    wrong.append(f"request {number}: was taken: {request}")
                running.append((number, ticket, cancel))
                if cancel and rng.random() < 0.5:
                    ticket.cancel()  # at once; the others after their first piece
        while running:
            settle()
        return Report(
            outcomes=dict(outcomes),
            wrong=wrong,
            compilations=compiled(),
            seconds=time.perf_counter() - begin,
            device_bytes=_left_bytes(before),
            host_bytes=_peak_bytes() - quarter,
        )


def random_picture(rng: random.Random, largest: int) -> Image.Image:
    """Coloured noise of a random size."""
    width, height = rng.randint(1, largest), rng.randint(1, largest)
    pixels = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def random_request(rng: random.Random, engine: Engine, pictures: list[Image.Image]) -> dict[str, Any]:
    """Fields of a request that fits: none to two pictures, a few words or many, any granularity, any sampling."""
    config = engine.config
    images = rng.choices(pictures, k=rng.choice((0, 1, 1, 1, 2)))
    coarsest = config.granularities[0]
    granularity = "auto" if rng.random() < 0.5 else rng.choice(config.granularities)
    if len(images) > 1:
        granularity = coarsest
    return {
        "prompt": " ".join(rng.choices(WORDS.split(), k=rng.choice((2, 5, 12, 30)))),
        "images": images,
        "granularity": granularity,
        "max_new_tokens": rng.choice((1, 2, 7, 16, 40)),
        "temperature": rng.choice((0.0, 0.0, 0.7, 1.3)),
        "top_p": rng.choice((1.0, 0.9)),
        "top_k": rng.choice((0, 5)),
        "min_p": rng.choice((0.0, 0.0, 0.1)),
        "repetition_penalty": rng.choice((1.0, 1.0, 1.2)),
        "logit_bias": rng.choice(({}, {}, {5: -100.0})),
        "min_tokens": rng.choice((0, 0, 3)),
        "logprobs": rng.choice((None, None, 2)),
        "seed": rng.getrandbits(32),
        "stop": rng.choice(((), ("e",), ("\n", "the"))),
    }


def malformed_request(rng: random.Random, engine: Engine, pictures: list[Image.Image]) -> dict[str, Any]:
    """Fields of a request that must be refused."""
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    whole = file.getvalue()
    fields = {"prompt": "What is it?", "images": pictures[:1]}
    faults: list[dict[str, Any]] = [
        {"images": whole[: len(whole) // 2]},
        {"images": b"no picture"},
        {"images": "nowhere.png"},
        {"prompt": "Compare <image> with <image>."},
        {"prompt": "word " * engine.config.language.max_length},
        {"prompt": "", "images": ()},
        {"granularity": engine.config.granularities[0] + 1},
        {"images": pictures[:1] * (engine.buckets.pages + 1), "granularity": engine.config.granularities[0]},
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"logit_bias": {engine.config.language.vocab_size: 1.0}},
    ]
    return fields | rng.choice(faults)


def _outcome(ticket: Ticket, cancel: bool) -> tuple[str, str | None]:
    """How a request ended, and what is wrong with that, or None. `cancel`: cancel it after its first piece."""
    pieces = ticket.pieces()
    try:
        if cancel:
            next(pieces, None)
            ticket.cancel()
        text = "".join(pieces)
        answer = ticket.result()
    except Cancelled:
        return "cancelled", None if cancel else "was cancelled by nobody"
    except (ValueError, RuntimeError) as error:
        return "failed", str(error)
    if not cancel and answer.text != text:
        return "answered", f"its pieces are {text!r}, its text {answer.text!r}"
    return "answered", None


def _live_bytes() -> int:
    gc.collect()  # arrays of an earlier engine must not count
    return sum(array.nbytes for array in jax.live_arrays())


def _left_bytes(before: int) -> int:
    """More bytes than before; the round that ended the last answer holds its arrays until it ends itself."""
    for _ in range(20):
        if (left := _live_bytes() - before) <= 0:
            break
        time.sleep(0.1)
    return left


def _peak_bytes() -> int:
    """Linux counts this in kibibytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
