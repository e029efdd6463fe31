"""Load as real clients bring it, on this version and another: python -m launch.bench.serve_load --against=../older

Streams that are dropped, slow readers, connections that say nothing, and many large pictures at once. Two servers run,
one from each checkout, and take turns, since a machine is never equally busy twice. An answer counts as wrong where it
is not the one that the same question gets alone. The table of docs/serve.md is rewritten.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from avg_llava_jax.commands import cli
from avg_llava_jax.files import around, write_whole
from launch.bench.running import Running, running

AGAINST = flags.DEFINE_string("against", None, "Checkout of the version to compare with.")
SERVE = flags.DEFINE_list("serve", [], "Flags of both servers, as slots=4,max_length=512.")
TURNS = flags.DEFINE_integer("turns", 3, "Turns of each version.", lower_bound=1)
CHOSEN = flags.DEFINE_list("loads", [], "Loads to bring, by name; default: all.")
PAGE = flags.DEFINE_string("page", "docs/serve.md", "Where the table stands; empty = printed alone.")
BEGIN, END = "<!-- load: python -m launch.bench.serve_load -->\n", "<!-- end of load -->\n"
SECONDS = 300.0
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
QUESTIONS = ("Who wears 7?", "What is the weather?", "Which team has 10?", "Who stands left of 4?")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a request ended. first: seconds to the first piece of its text. text: None where the client left."""

    status: int
    first: float | None = None
    text: str | None = None


def body(question: str, pictures: list[str], **fields: Any) -> bytes:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [*parts, {"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    return json.dumps({"messages": [message], "max_tokens": 32, "stream": True, **fields}).encode()


def picture(seed: int, width: int, height: int) -> str:
    """A JPEG with some texture, as a data URI."""
    rng, file = np.random.default_rng(seed), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), np.uint8))
    small.resize((width, height)).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


async def ask(url: str, content: bytes, leaves: bool = False, pause: float = 0.0) -> Outcome:
    """One streamed question. leaves: drop the connection at the first piece. pause: seconds between small reads."""
    place = urllib.parse.urlsplit(url)
    link = socket.socket()
    if pause:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    link.setblocking(False)
    await asyncio.get_running_loop().sock_connect(link, (place.hostname, place.port))
    reader, writer = await asyncio.open_connection(sock=link, limit=1024 if pause else 1 << 16)
    begin, first, came = time.perf_counter(), None, b""
    try:
        writer.write(f"{HEAD}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        while chunk := await reader.read(256 if pause else 1 << 16):
            came += chunk
            if first is None and re.search(rb'"content": "[^"]', came):
                first = time.perf_counter() - begin
                if leaves:
                    return Outcome(200, first)
            await asyncio.sleep(pause)
    except (ConnectionError, OSError):
        return Outcome(0)
    finally:
        writer.close()
    status = int(came.split(b" ", 2)[1]) if came else 0
    events = [json.loads(line) for line in re.findall(rb"^data: (\{.*\})", came, re.MULTILINE)]
    deltas = [each["choices"][0].get("delta", {}).get("content") for each in events if each.get("choices")]
    return Outcome(status, first, "".join(filter(None, deltas)) if b"data: [DONE]" in came else None)


async def all_within(asks: list[Awaitable[Outcome]]) -> list[Outcome]:
    return await asyncio.wait_for(asyncio.gather(*asks), SECONDS)


async def dropped(url: str, bodies: list[bytes]) -> list[Outcome]:
    return await all_within([ask(url, bodies[n % len(bodies)], leaves=n % 2 == 1) for n in range(64)])


async def slow(url: str, bodies: list[bytes]) -> list[Outcome]:
    return await all_within([ask(url, bodies[n % len(bodies)], pause=0.05 * (n % 2)) for n in range(32)])


async def idle(url: str, bodies: list[bytes]) -> list[Outcome]:
    """Half of the connections say nothing, half send a head and one byte of a body."""
    place, waiting = urllib.parse.urlsplit(url), []
    head = HEAD.encode() + b"Content-Length: 99\r\n\r\n{"
    try:
        for number in range(200):
            waiting.append((await asyncio.open_connection(place.hostname, place.port))[1])
            if number % 2:
                waiting[-1].write(head)
        return await all_within([ask(url, bodies[n % len(bodies)]) for n in range(32)])
    finally:
        for writer in waiting:
            writer.close()


async def large(url: str, bodies: list[bytes]) -> list[Outcome]:
    return await all_within([ask(url, content) for content in bodies])


async def beside_large(url: str, bodies: list[bytes]) -> list[Outcome]:
    """The last body is a small question, which is asked again and again while the others are answered."""
    *most, small = bodies
    work = asyncio.ensure_future(large(url, most))
    asked = []
    while not work.done():
        asked.append(await asyncio.wait_for(ask(url, small), SECONDS))
        await asyncio.sleep(0.2)
    await work
    return asked


@dataclasses.dataclass(frozen=True)
class Load:
    """A load. says: what it is, for the table. bring: (url, bodies) -> the outcomes that count."""

    says: str
    bring: Callable[[str, list[bytes]], Awaitable[list[Outcome]]]
    large: bool = False


LOADS = {
    "dropped": Load("64 streams with a picture, half dropped at their first piece", dropped),
    "slow": Load("32 streams, half of them read 256 bytes at a time", slow),
    "idle": Load("32 streams beside 200 connections that send nothing more", idle),
    "large": Load("8 requests with 8 pictures of 12 megapixels each", large, large=True),
    "beside": Load("a question about a small picture, again and again beside those", beside_large, large=True),
}


class Watch:
    """The memory of a process while a block runs: `grown`, the most bytes over those at its begin."""

    def __init__(self, pid: int):
        self._pid, self.grown = pid, 0

    def _resident(self) -> int:
        return int(pathlib.Path(f"/proc/{self._pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def _look(self, before: int) -> None:
        while True:
            self.grown = max(self.grown, self._resident() - before)
            await asyncio.sleep(0.05)

    async def __aenter__(self) -> Watch:
        self._task = asyncio.ensure_future(self._look(self._resident()))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()


def left_behind(server: Running) -> int:
    """Requests that are still there 30 seconds after a load."""
    deadline = time.monotonic() + 30
    while True:
        text = urllib.request.urlopen(f"{server.url}/metrics", timeout=60).read().decode()
        found = re.findall(r"^avg_llava_requests_(?:waiting|running) (\S+)", text, re.MULTILINE)
        if not (left := int(sum(map(float, found)))) or time.monotonic() > deadline:
            return left
        time.sleep(0.2)


@dataclasses.dataclass
class Figures:
    """Of one load on one version."""

    first: list[float] = dataclasses.field(default_factory=list)
    requests: int = 0
    wrong: int = 0
    left: int = 0
    grown: int = 0

    def row(self, says: str, version: str) -> str:
        times = [round(1e3 * np.percentile(self.first, q)) if self.first else "–" for q in (50, 95)]
        numbers = (self.requests, self.wrong, self.left, *times, self.grown >> 20)
        return f"| {says} | {version} | {' | '.join(map(str, numbers))} |\n"


async def turn(server: Running, load: Load, bodies: list[bytes], right: list[str | None], figures: Figures) -> None:
    """Bring a load to a server once. right: the answer of each body alone."""
    texts = dict(zip(bodies, right, strict=True))
    async with Watch(server.pid) as watch:
        outcomes = await load.bring(server.url, bodies)
    if load.bring is beside_large:
        wanted = [right[-1]] * len(outcomes)
    else:
        wanted = [texts[bodies[n % len(bodies)]] for n in range(len(outcomes))]
    for outcome, text in zip(outcomes, wanted, strict=True):
        figures.requests += 1
        figures.wrong += outcome.status != 200 or (outcome.text is not None and outcome.text != text)
        if outcome.first is not None:
            figures.first.append(outcome.first)
    figures.grown = max(figures.grown, watch.grown)
    figures.left += left_behind(server)


async def bring(servers: dict[str, Running]) -> str:
    """Bring all loads to all servers in turns: the table in Markdown."""
    small = [body(question, [picture(n, 320, 240)]) for n, question in enumerate(QUESTIONS)]
    coarsest = json.load(urllib.request.urlopen(f"{next(iter(servers.values())).url}/v1/models", timeout=60))
    coarsest = min(coarsest["data"][0]["avg_llava"]["granularities"])
    wanted = any(LOADS[name].large for name in CHOSEN.value or LOADS)
    many = [
        body(QUESTIONS[0], [picture(8 * n + k, 4000, 3000) for k in range(8)], granularity=coarsest)
        for n in range(8 * wanted)
    ]
    beside = [*many, small[1]]
    loads = {name: LOADS[name] for name in CHOSEN.value or LOADS}
    found: dict[tuple[str, str], Figures] = collections.defaultdict(Figures)
    bodies = {
        name: small if not load.large else beside if load.bring is beside_large else many
        for name, load in loads.items()
    }
    right: dict[tuple[str, bytes], str | None] = {}
    for version, server in servers.items():  # alone; this also warms up
        for content in {each for name in loads for each in bodies[name]}:
            outcome = await asyncio.wait_for(ask(server.url, content), SECONDS)
            if outcome.text is None:
                raise RuntimeError(f"{version} does not answer a question that it gets alone: status {outcome.status}")
            right[version, content] = outcome.text
    for number in range(TURNS.value):
        for name, load in loads.items():
            order = list(servers.items())
            for version, server in order if number % 2 == 0 else order[::-1]:
                answers = [right[version, content] for content in bodies[name]]
                await turn(server, load, bodies[name], answers, found[name, version])
                print(
                    f"round {number + 1}, {name}, {version}: {found[name, version].row(name, version)}",
                    file=sys.stderr,
                    flush=True,
                )
    head = "| load | version | requests | wrong | left behind | median ms to the first piece | 95 % | MB more |\n"
    rows = [found[name, version].row(load.says, version) for name, load in loads.items() for version in servers]
    return head + "|---|---|---|---|---|---|---|---|\n" + "".join(rows)


def main() -> None:
    if PAGE.value:
        around(PAGE.value, BEGIN, END)  # fail before the servers compile
    with contextlib.ExitStack() as stack:
        given = [f"--{flag}" for flag in SERVE.value]
        servers = {"this": stack.enter_context(running(*given))}
        if AGAINST.value:
            servers[pathlib.Path(AGAINST.value).name] = stack.enter_context(running(*given, folder=AGAINST.value))
        table = asyncio.run(bring(servers))
    print(table)
    if PAGE.value:
        before, after = around(PAGE.value, BEGIN, END)
        write_whole(PAGE.value, before + table + after)


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
