"""Who asks, and what one client may have in the server at once.

A client is the API key that it sends; where the server has no keys, the address that it connects from (behind a proxy
on the same machine, the one in the proxy's X-Forwarded-For).

A body that is still arriving is no request yet, so it takes no place in the queue. It is bounded per client in number,
in bytes and in time; over the number, the client's body that has been silent for longest is dropped, so connections
that send nothing more do no harm to others, not even from the same address.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence

from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal

MINUTE = 60.0
_COMMENT = re.compile(r"(^|\s)#.*")


@dataclasses.dataclass(frozen=True)
class Key:
    """An API key. digest: its SHA-256. requests: at once. per_minute: requests; None = no bound of its own."""

    digest: bytes
    requests: int | None = None
    per_minute: int | None = None


def parse_keys(text: str, where: str) -> tuple[Key, ...]:
    """The keys of a file: one a line, with limits behind it (`KEY requests=4 per_minute=60`); a word that begins
    with # begins a comment, a # inside a key is part of it.

    Raises ValueError, which names `where` and the line, for a key that HTTP cannot carry, for an unknown limit, and for
    a key or a limit that is there twice.
    """
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        key, *rest = _COMMENT.sub("", line).split() or [""]
        if not key:
            continue
        if not key.isascii() or not key.isprintable():
            raise ValueError(f"{where}, line {number}: the key must be one non-empty line of ASCII characters")
        limits = dict(entry.partition("=")[::2] for entry in rest)
        for name, value in limits.items():
            if name not in ("requests", "per_minute") or not value.isdecimal() or int(value) < 1:
                raise ValueError(f"{where}, line {number}: {name}={value} must be requests=N or per_minute=N")
        digest = hashlib.sha256(key.encode()).digest()
        if len(limits) < len(rest) or any(one.digest == digest for one in keys):
            raise ValueError(f"{where}, line {number}: the key or a limit is there twice")
        keys.append(Key(digest, **{name: int(n) for name, n in limits.items()}))
    if not keys:
        raise ValueError(f"{where}: the key must be one non-empty line of ASCII characters")
    return tuple(keys)


def key_of(header: str, keys: Sequence[Key]) -> Key | None:
    """The key of an Authorization header. It takes the same time whichever key is right, or none."""
    scheme, _, token = header.partition(" ")
    digest = hashlib.sha256(token.strip().encode("latin-1")).digest()
    found = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return found[0] if found and scheme.lower() == "bearer" else None


@dataclasses.dataclass(eq=False)
class Body:
    """A body that is still arriving. size: bytes so far. touched: the clock when its last bytes came."""

    deadline: asyncio.Timeout
    touched: float
    size: int = 0


class Client:
    """What one client has in the server. admitted: times of its requests of the last minute."""

    def __init__(self) -> None:
        self.bodies: list[Body] = []
        self.running = 0
        self.admitted: collections.deque[float] = collections.deque()

    @property
    def idle(self) -> bool:
        return not self.bodies and not self.running and not self.admitted


class Clients:
    """All clients; used only from the event loop."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._clients: dict[str | Key, Client] = {}

    @contextlib.asynccontextmanager
    async def arriving(self, who: str | Key) -> AsyncIterator[Body]:
        """While a body arrives. Raises TimeoutError once it takes too long or is dropped for a newer one."""
        with self._client(who) as client:
            if len(client.bodies) >= self._limits.bodies:
                stalest = min(client.bodies, key=lambda body: body.touched)
                client.bodies.remove(stalest)
                if not stalest.deadline.expired():
                    stalest.deadline.reschedule(asyncio.get_running_loop().time())
            async with asyncio.timeout(min(self._limits.seconds, self._limits.body_seconds)) as deadline:
                body = Body(deadline, time.monotonic())
                client.bodies.append(body)
                try:
                    yield body
                finally:
                    if body in client.bodies:
                        client.bodies.remove(body)

    def grew(self, who: str | Key, body: Body, size: int) -> None:
        """Count bytes of a body. Raises Refusal 429 where the client's bodies together are over their bound."""
        body.size, body.touched = body.size + size, time.monotonic()
        if sum(each.size for each in self._clients[who].bodies) > self._limits.bodies_bytes:
            raise _come_again("this client sends too much at once", "too_many_bytes", 1)

    @contextlib.contextmanager
    def admitted(self, who: str | Key) -> Iterator[None]:
        """While a request whose body is complete is answered. Raises Refusal 429 over the client's limits."""
        own = who.requests if isinstance(who, Key) else None
        most = self._limits.client_requests if own is None else own
        per_minute = who.per_minute if isinstance(who, Key) else None
        with self._client(who) as client:
            if most is not None and client.running >= most:
                raise _come_again(f"this client has {most} requests here, its limit", "too_many_requests", 1)
            if per_minute is not None:
                now = time.monotonic()
                while client.admitted and client.admitted[0] <= now - MINUTE:
                    client.admitted.popleft()
                if len(client.admitted) >= per_minute:
                    seconds = int(client.admitted[0] + MINUTE - now) + 1
                    raise _come_again(f"this key has {per_minute} requests a minute", "rate_limit_exceeded", seconds)
                client.admitted.append(now)
            client.running += 1
            try:
                yield
            finally:
                client.running -= 1

    @contextlib.contextmanager
    def _client(self, who: str | Key) -> Iterator[Client]:
        """The client's entry, which is forgotten once it is idle."""
        client = self._clients.setdefault(who, Client())
        try:
            yield client
        finally:
            if client.idle:
                self._clients.pop(who, None)


def _come_again(message: str, code: str, seconds: int) -> Refusal:
    return Refusal(429, f"{message}; try again in {seconds} s", code=code, retry_after=seconds)
