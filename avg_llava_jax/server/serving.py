"""A service on a socket: uvicorn in a thread, with a shutdown that lets running requests finish."""

from __future__ import annotations

import logging
import socket
import threading
import time

import uvicorn

from avg_llava_jax.server.app import Service

logger = logging.getLogger(__name__)

TICK = 0.05
STARTING_SECONDS = 30
CLOSING_SECONDS = 5
KEEP_ALIVE_SECONDS = 75
"""An idle connection stays open for longer than clients (5 s) and proxies (60 s) keep theirs: who closes first must not
be the server, or the next request meets a connection that is just closing."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet, so that a port in use is reported before the model loads.

    port: 0 = any free port.

    Raises:
      OSError: the address is not available; names host and port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; give another --host or --port"
        ) from None
    return bound


class Serving:
    """Serves until `drain`. The engine must have been started."""

    def __init__(self, service: Service, bound: socket.socket):
        self.service, self._bound = service, bound
        host, self.port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        config = uvicorn.Config(
            service.app,
            http="h11",
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=CLOSING_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        # Outside the main thread uvicorn installs no signal handlers; its own would close /health at once.
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}, name="http", daemon=True)

    def start(self) -> None:
        """Start serving; returns once requests are accepted."""
        self._thread.start()
        deadline = time.monotonic() + STARTING_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the HTTP server did not start at {self.url}")
            time.sleep(TICK)

    def drain(self, seconds: float, hurry: threading.Event | None = None) -> None:
        """Refuse new requests, let running ones finish for `seconds` or until `hurry`, cancel the rest, and close.

        /health answers 503 from the beginning to the end of it.
        """
        self.service.draining = True
        hurry = hurry or threading.Event()
        deadline = time.monotonic() + seconds
        while self.service.running and time.monotonic() < deadline and not hurry.wait(TICK):
            pass
        self.service.engine.close(drain=False)
        deadline = time.monotonic() + CLOSING_SECONDS
        while self.service.running and time.monotonic() < deadline:
            time.sleep(TICK)  # cancelled requests still get their reply
        self._server.should_exit = True
        self._thread.join(2 * CLOSING_SECONDS)
