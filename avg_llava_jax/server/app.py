"""The routes: OpenAI's endpoints below /v1, /tokenize, /version, /health, /metrics, and the page at /.

    body --bodies.receive--> bytes --read--> Ask --prepare, tiles_of--> Prepared --engine--> Ticket --pieces--> Reply

An error before the first piece sets the HTTP status; a later one is the last event of the stream. However an exchange
ends, its ticket is cancelled and its generators are closed, so a client that disconnects frees its slot at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.requests import Answer, Prepared
from avg_llava_jax.inference.tickets import Cancelled, Piece, QueueFull, Ticket
from avg_llava_jax.server import VERSION, bodies, completions, reading, responses, tokenizing
from avg_llava_jax.server.clients import Clients, Key, key_of
from avg_llava_jax.server.images import tiles_of
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.metrics import CONTENT_TYPE, Metrics
from avg_llava_jax.server.refusal import Refusal, json_response, refusal_of
from avg_llava_jax.server.replies import Reply
from avg_llava_jax.server.request_ids import HEADER, RequestIds

logger = logging.getLogger(__name__)

PAGE = pathlib.Path(__file__).with_name("page.html")
DECODERS = 2
"""Images that are decoded at once, and large bodies that are read: each takes its size times some bytes of memory."""
LARGE = 1 << 20
"""Bytes of a body from which on it holds images, and is read where they are decoded."""
GRACE = 10.0
"""Seconds that a client has to take its reply, in addition to those of the answer."""
TICK = 0.01
LEFT = 499  # the status that nginx logs for a client that disconnected
NOTHING_ELSE = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
EXPECTED = (ValueError, RuntimeError, TimeoutError, QueueFull, Cancelled)
"""Errors that a request may end with; RuntimeError comes from the engine and from XLA."""

T = TypeVar("T")


class _Left(Exception):
    """The client disconnected before its reply."""


class Endpoint(NamedTuple):
    """What differs between the endpoints that generate. read: JSON -> Ask, see `reading.read`."""

    read: Callable[..., reading.Ask]
    reply: type[Reply]


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(reading.read, Reply),
    "/v1/completions": Endpoint(completions.read, completions.CompletionReply),
    "/v1/responses": Endpoint(responses.read, responses.ResponseReply),
}


class Service:
    """An engine behind HTTP.

    name: the base's name for clients; adapters have theirs. keys: those that clients must send one of; none = no key.
    places: requests answered at once, the engine's slots plus its queue; more are refused before their body is read.
    origins: of web pages that browsers may let use this server; "*" = all.
    draining: set it to refuse new requests. running: requests without a complete reply whose body is complete.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        limits: Limits,
        keys: Sequence[Key] = (),
        places: int = 72,
        origins: Sequence[str] = (),
    ):
        self.engine, self.model, self.limits = engine, engine.model, limits
        self.names = (name, *self.model.adapters.names)
        self.draining, self.running = False, 0
        self.metrics = Metrics()
        self._keys, self._clients = keys, Clients(limits)
        self._places = places
        self._threads = concurrent.futures.ThreadPoolExecutor(places, thread_name_prefix="request")
        self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, thread_name_prefix="images")
        self._since = int(time.time())
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[HEADER, "Retry-After"],
        )
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/version", self.version),
                Route("/metrics", self.measured),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                *(Route(path, _Asgi(self.generate), methods=["POST"]) for path in ENDPOINTS),
            ],
            middleware=[Middleware(RequestIds), *([cors] if origins else [])],
            exception_handlers={
                Refusal: lambda _, error: error.response(),
                HTTPException: lambda request, error: _no_route(request, error).response(),
                ValueError: lambda _, error: refusal_of(error, 1).response(),
                Exception: lambda _, error: refusal_of(error, 1).response(),
            },
        )

    async def page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": NOTHING_ELSE, "Cache-Control": "no-cache"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    async def health(self, _: Request) -> Response:
        status = "draining" if self.draining else "ok" if self.engine.open else "failed"
        return json_response({"status": status}, 200 if status == "ok" else 503)

    async def version(self, _: Request) -> Response:
        return json_response({"version": VERSION})

    async def measured(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.engine.stats()), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """The models, in a list or one by its name; `avg_llava` holds the granularities and the limits of a request."""
        self._caller(request)
        config, limits = self.model.config, self.limits
        ours = {
            "granularities": list(config.granularities),
            "max_length": config.language.max_length,
            "limits": {
                "body_bytes": limits.body_bytes,
                "pixels": limits.pixels,
                "images": limits.images,
                "new_tokens": limits.new_tokens,
            },
        }
        base, *others = self.names
        entry = {"object": "model", "created": self._since, "owned_by": "avg_llava_jax"}
        entries = [{"id": base} | entry | {"avg_llava": {"step": self.model.step} | ours}]
        entries += [{"id": name} | entry | {"parent": base, "avg_llava": ours} for name in others]
        asked = request.path_params.get("name")
        if asked is None:
            return json_response({"object": "list", "data": entries})
        reading.check_model({"model": asked}, self.names)
        return json_response(entries[self.names.index(asked)])

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a prompt or of messages, see `tokenizing`."""
        who = self._caller(request)
        body = await bodies.receive(request, self._clients, who, self.limits)
        return json_response(await self._in_thread(self._tokenized, body, request.headers))

    def _tokenized(self, body: bytes, headers: Any) -> dict[str, Any]:
        values = reading.parsed(bodies.unpacked(body, headers, self.limits))
        return tokenizing.tokenized(values, self.model, self.limits, self.names)

    async def generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request of `ENDPOINTS`, from its headers to its last byte."""
        request = Request(scope, receive)
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    response = await self._reply(request, stack)
                except (_Left, ClientDisconnect):
                    raise
                except Exception as error:
                    response = self._refused(error).response()
                self.metrics.replies[response.status_code] += 1
                async with asyncio.timeout(self.limits.seconds + GRACE):
                    await response(scope, receive, send)
        except (_Left, ClientDisconnect, TimeoutError):
            self.metrics.replies[LEFT] += 1

    async def _reply(self, request: Request, stack: contextlib.AsyncExitStack) -> Response:
        """The response, once its first piece is there. `stack` releases what it holds after the response is sent."""
        begin = time.perf_counter()
        endpoint = ENDPOINTS[request.scope["path"]]
        who = request.client.host if request.client else ""
        try:
            self._check_headers(request)
            who = self._caller(request)
        except (Refusal, *EXPECTED):
            await bodies.discard(request, self._clients, who, self.limits)
            raise
        body = await bodies.receive(request, self._clients, who, self.limits)
        stack.enter_context(self._clients.admitted(who))
        stack.enter_context(self._place())
        threads = self._decoders if len(body) > LARGE else self._threads
        preparing = asyncio.get_running_loop().run_in_executor(threads, self._prepare, endpoint, body, request.headers)
        ask, prepared = await _unless_left(request, preparing)
        del body
        text_tokens, tiles = len(prepared.sample.tokens.ids) - len(prepared.sample.sizes), []
        if prepared.sample.images:
            decoding = asyncio.get_running_loop().run_in_executor(self._decoders, tiles_of, self.model.config, prepared)
            prepared, tiles = await _unless_left(request, decoding)
            ask = dataclasses.replace(ask, request=prepared.request)  # the files themselves are no longer needed
        tickets, pieces = [], []
        for seed in ask.seeds:
            one = dataclasses.replace(prepared, request=dataclasses.replace(prepared.request, seed=seed))
            tickets.append(await self._in_thread(self.engine.submit_prepared, one, tiles))
            pieces.append(self._follow(tickets[-1], begin))
            stack.push_async_callback(_closed, pieces[-1])
            stack.callback(tickets[-1].cancel)
        reply = endpoint.reply(ask.given.get("model", self.names[0]), self.model, ask, text_tokens)
        if not ask.stream:
            answers = await _unless_left(request, _last_of_each(pieces))
            return json_response(reply.whole(answers))
        items = _merged(pieces)
        stack.push_async_callback(items.aclose)
        first = await _unless_left(request, anext(items))
        events = self._events(reply, tickets, first, items)
        stack.push_async_callback(events.aclose)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, 200, headers, media_type="text/event-stream")

    def _prepare(self, endpoint: Endpoint, body: bytes, headers: Any) -> tuple[reading.Ask, Prepared]:
        """The checked, tokenized request of a body."""
        values = reading.parsed(bodies.unpacked(body, headers, self.limits))
        ask = endpoint.read(values, self.model.config, self.limits, self.names)
        return ask, self.model.prepare(ask.request)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place of the queue, while a request is answered."""
        if self.running >= self._places:
            raise QueueFull
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    async def _follow(self, ticket: Ticket, begin: float) -> AsyncGenerator[Piece | Answer]:
        """Yield an answer's pieces, then the answer. Raises TimeoutError, or the error of the ticket."""
        deadline = begin + self.limits.seconds

        async def wait(call: Callable[..., T], *arguments: Any) -> T:
            return await asyncio.wait_for(self._in_thread(call, *arguments), deadline - time.perf_counter())

        iterator, first = ticket.pieces(glances=True), None
        while (piece := await wait(next, iterator, None)) is not None:
            if first is None and piece:
                first = time.perf_counter()
                self.metrics.first_piece.observe(first - begin)
            yield piece
        answer = await wait(ticket.result)
        end = time.perf_counter()
        self.metrics.whole.observe(end - begin)
        if first is not None and len(answer.token_ids) > 1:
            self.metrics.each_token.observe((end - first) / (len(answer.token_ids) - 1))
        yield answer

    async def _events(
        self,
        reply: Reply,
        tickets: Sequence[Ticket],
        first: tuple[int, Piece | Answer],
        rest: AsyncIterator[tuple[int, Piece | Answer]],
    ) -> AsyncIterator[str]:
        """Server-sent events of all answers. first, rest: their items, each with the number of its answer."""
        answers: dict[int, Answer] = {}
        for event in reply.begin():
            yield event
        try:
            number, item = first
            while True:
                if isinstance(item, Answer):
                    answers[number], made = item, reply.ended(item, number)
                else:
                    made = reply.piece(item, number, tickets[number].visual_tokens or 0)
                for event in made:
                    yield event
                if len(answers) == len(tickets):
                    break
                number, item = await anext(rest)
        except EXPECTED as error:
            ending = reply.failed(self._refused(error))
        else:
            ending = reply.end([answers[number] for number in range(len(tickets))])
        for event in ending:
            yield event

    def _check_headers(self, request: Request) -> None:
        """Raise the refusal that the headers alone call for, if any."""
        if self.draining:
            raise Cancelled
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"Content-Type must be application/json, not {kind!r}", code="invalid_content_type")
        bodies.check_encoding(request.headers)
        if self.running >= self._places:
            raise QueueFull

    def _caller(self, request: Request) -> str | Key:
        """The client: its key, or its address where the server has no keys. Raises Refusal 401 without a valid key."""
        if not self._keys:
            return request.client.host if request.client else ""
        key = key_of(request.headers.get("authorization", ""), self._keys)
        if key is None:
            message = "this server wants its API key: Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return key

    def _refused(self, error: Exception) -> Refusal:
        if self.draining and isinstance(error, RuntimeError):  # the engine is closed
            error = Cancelled()
        refusal = refusal_of(error, self.metrics.retry_after())
        if refusal.status == 500:
            logger.error("a request failed", exc_info=error)
        return refusal


class _Asgi:
    """A method as an ASGI application: Starlette expects a plain function to return a response."""

    def __init__(self, call: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(scope, receive, send)


async def _unless_left(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises _Left if the client disconnects first."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Left
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """The items of several iterators as they come, each with the number of its iterator."""
    waiting = {asyncio.ensure_future(anext(stream)): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    yield number, task.result()
                    waiting[asyncio.ensure_future(anext(streams[number]))] = number
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)


async def _closed(items: AsyncGenerator[Any]) -> None:
    """Close a generator, once the task that runs it has ended: where a client leaves, that task is only told to."""
    while items.ag_running:
        await asyncio.sleep(TICK)
    await items.aclose()


async def _last_of_each(streams: Sequence[AsyncIterator[T]]) -> list[T]:
    tasks = [asyncio.ensure_future(_last(stream)) for stream in streams]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _last(items: AsyncIterator[T]) -> T:
    async for item in items:
        last = item
    return last


def _no_route(request: Request, error: HTTPException) -> Refusal:
    return Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers)
