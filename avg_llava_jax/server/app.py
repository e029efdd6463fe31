"""The routes: /v1/chat/completions, /v1/models, /health, /metrics, and the page at /.

    body --read_body--> bytes --reading.read--> Ask --engine.submit--> Ticket --pieces--> replies

An error before the first piece sets the HTTP status; a later one is the last event of the stream. However an exchange
ends, its ticket is cancelled, so a client that disconnects frees its slot.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hmac
import logging
import pathlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.requests import Answer
from avg_llava_jax.inference.tickets import Cancelled, Piece, QueueFull, Ticket
from avg_llava_jax.server import reading
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.metrics import CONTENT_TYPE, Metrics
from avg_llava_jax.server.refusal import Refusal, json_response, refusal_of
from avg_llava_jax.server.replies import DONE, Reply, event

logger = logging.getLogger(__name__)

PAGE = pathlib.Path(__file__).with_name("page.html")
DISCARDED = 4
"""A body over its limit is read and discarded up to this multiple of the limit, so that the client gets a reply."""
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


class Service:
    """An engine behind HTTP.

    name: the model's name for clients. key: the bearer token that clients must send, None = no key.
    places: chat completions at once, the engine's slots plus its queue; more are refused before their body is read.
    draining: set it to refuse new requests. running: chat completions without a complete reply.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, key: str | None = None, places: int = 72):
        self.engine, self.model, self.name, self.limits = engine, engine.model, name, limits
        self.draining, self.running = False, 0
        self.metrics = Metrics()
        self._key = None if key is None else key.encode()
        self._places = places
        self._threads = concurrent.futures.ThreadPoolExecutor(places, thread_name_prefix="ticket")
        self._since = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/metrics", self.measured),
                Route("/v1/models", self.models),
                Route("/v1/models/{name}", self.models),
                Route("/v1/chat/completions", _Asgi(self.chat), methods=["POST"]),
            ],
            exception_handlers={
                Refusal: lambda _, error: error.response(),
                HTTPException: lambda request, error: _no_route(request, error).response(),
                Exception: lambda _, error: refusal_of(error, 1).response(),
            },
        )

    async def page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": NOTHING_ELSE, "Cache-Control": "no-cache"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    async def health(self, _: Request) -> Response:
        status = "draining" if self.draining else "ok" if self.engine.open else "failed"
        return json_response({"status": status}, 200 if status == "ok" else 503)

    async def measured(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.engine.stats()), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        """The one model, in a list or by its name; `avg_llava` holds its granularities and the limits of a request."""
        if refusal := self._unauthorized(request):
            raise refusal
        config, limits = self.model.config, self.limits
        ours = {
            "granularities": list(config.granularities),
            "max_length": config.language.max_length,
            "step": self.model.step,
            "limits": {
                "body_bytes": limits.body_bytes,
                "pixels": limits.pixels,
                "images": limits.images,
                "new_tokens": limits.new_tokens,
            },
        }
        entry = {
            "id": self.name,
            "object": "model",
            "created": self._since,
            "owned_by": "avg_llava_jax",
            "avg_llava": ours,
        }
        asked = request.path_params.get("name")
        if asked is None:
            return json_response({"object": "list", "data": [entry]})
        if asked != self.name:
            raise Refusal(404, f"model {asked!r} does not exist here, only {self.name!r}", "model", "model_not_found")
        return json_response(entry)

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One chat completion, from its headers to its last byte."""
        request = Request(scope, receive)
        self.running += 1
        try:
            with contextlib.ExitStack() as stack:
                try:
                    response = await self._reply(request, stack)
                except (Refusal, *EXPECTED) as error:
                    response = self._refused(error).response()
                self.metrics.replies[response.status_code] += 1
                await response(scope, receive, send)
        except (_Left, ClientDisconnect):
            self.metrics.replies[LEFT] += 1
        finally:
            self.running -= 1

    async def _reply(self, request: Request, stack: contextlib.ExitStack) -> Response:
        """The response, once its first piece is there. `stack` releases the ticket after the response is sent."""
        begin = time.perf_counter()
        problem = self._unacceptable(request)
        body = await self._body(request, 0 if problem else self.limits.body_bytes)
        if problem:
            raise problem
        ask, text_tokens = await asyncio.to_thread(self._prepare, body)
        tickets = []
        for each in ask.requests:
            tickets.append(await asyncio.to_thread(self.engine.submit, each))
            stack.callback(tickets[-1].cancel)
        reply = Reply(self.name, self.model, ask.sizes, text_tokens, ask.tools)
        pieces = [self._follow(ticket, begin) for ticket in tickets]
        if not ask.stream:
            answers = await _unless_left(request, asyncio.gather(*map(_last, pieces)))
            return json_response(reply.completion(answers))
        items = _merged(pieces)
        first = await _unless_left(request, anext(items))
        events = self._events(reply, ask, tickets, first, items)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, 200, headers, media_type="text/event-stream")

    def _prepare(self, body: bytes) -> tuple[reading.Ask, int]:
        """The checked request of a body, and the number of its text tokens."""
        ask = reading.read(body, self.model.config, self.limits, self.name)
        sample = self.model.prepare(ask.request).sample
        return ask, len(sample.tokens.ids) - len(sample.sizes)

    async def _follow(self, ticket: Ticket, begin: float) -> AsyncIterator[Piece | Answer]:
        """Yield an answer's pieces, then the answer. Raises TimeoutError, or the error of the ticket."""
        loop, deadline = asyncio.get_running_loop(), begin + self.limits.seconds

        async def wait(call: Callable[..., T], *arguments: Any) -> T:
            running = loop.run_in_executor(self._threads, call, *arguments)
            return await asyncio.wait_for(running, deadline - time.perf_counter())

        iterator, first = ticket.pieces(), None
        while (piece := await wait(next, iterator, None)) is not None:
            if first is None:
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
        ask: reading.Ask,
        tickets: Sequence[Ticket],
        first: tuple[int, Piece | Answer],
        rest: AsyncIterator[tuple[int, Piece | Answer]],
    ) -> AsyncIterator[str]:
        """Server-sent events: for each answer the role, the pieces, the end with `avg_llava`; at last the usage."""
        made, answers = [0] * ask.count, {}

        def chunk(number: int, delta: dict[str, Any], item: Piece | Answer | None = None) -> str:
            values = reply.chunk(delta, item, number, made[number])
            if isinstance(item, Piece):
                made[number] = item.tokens
            elif item is not None:
                made[number] = len(item.token_ids)
            if ask.usage_with_each:
                values["usage"] = reply.usage(made[number], tickets[number].visual_tokens or 0)
            return event(values)

        for number in range(ask.count):
            yield chunk(number, {"role": "assistant", "content": ""})
        try:
            number, item = first
            while True:
                if isinstance(item, Answer):
                    answers[number] = item
                    yield chunk(number, {}, item)
                    if len(answers) == ask.count:
                        break
                else:
                    for at, delta in enumerate(reply.deltas(item, number)):
                        yield chunk(number, delta, None if at else item)
                number, item = await anext(rest)
        except EXPECTED as error:
            yield event(self._refused(error).body())
            return
        if ask.include_usage:
            yield event(reply.usage_chunk([answers[number] for number in range(ask.count)]))
        yield DONE

    def _unacceptable(self, request: Request) -> Refusal | None:
        """The refusal that the headers alone call for, if any."""
        if self.draining:
            return Refusal(503, "the server is shutting down", code="draining", retry_after=self.metrics.retry_after())
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return Refusal(415, f"Content-Type must be application/json, not {kind!r}", code="invalid_content_type")
        if refusal := self._unauthorized(request):
            return refusal
        return self._refused(QueueFull()) if self.running > self._places else None

    def _unauthorized(self, request: Request) -> Refusal | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if self._key is None or (
            scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._key)
        ):
            return None
        return Refusal(401, "this server wants its API key: Authorization: Bearer KEY", code="invalid_api_key")

    def _refused(self, error: Exception) -> Refusal:
        if self.draining and isinstance(error, RuntimeError):  # the engine is closed
            error = Cancelled()
        refusal = refusal_of(error, self.metrics.retry_after())
        if refusal.status == 500:
            logger.error("a request failed", exc_info=error)
        return refusal

    async def _body(self, request: Request, limit: int) -> bytes:
        """The body. One over `limit` is read and discarded, since many clients send all before they read a reply."""
        body, size = bytearray(), 0
        most = DISCARDED * self.limits.body_bytes
        try:
            async with asyncio.timeout(self.limits.seconds):
                if _declared(request) <= most:
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size <= limit:
                            body += chunk
                        elif size > most:
                            break
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.limits.seconds:g} seconds") from None
        if max(size, _declared(request)) > limit > 0:
            raise Refusal(413, f"the body is over {limit} bytes: send smaller images", code="body_too_large")
        return bytes(body)


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


async def _last(items: AsyncIterator[T]) -> T:
    async for item in items:
        last = item
    return last


def _declared(request: Request) -> int:
    """Content-Length, 0 without that header."""
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdecimal() else 0


def _no_route(request: Request, error: HTTPException) -> Refusal:
    return Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
