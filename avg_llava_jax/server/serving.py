"""A service on a socket: uvicorn in a thread, and a way to stop that lets running requests finish."""

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


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet, so that a port in use shows before a model is loaded.

    port: 0 for any that is free. Raises OSError in one line that names both.
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
        )
        self._server = uvicorn.Server(config)
        # Beside the main thread uvicorn leaves signals alone: on its own it would stop listening, /health too, at once.
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [bound]}, name="http", daemon=True)

    def start(self) -> None:
        """Returns when requests are taken."""
        self._thread.start()
        deadline = time.monotonic() + STARTING_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError(f"the HTTP server did not start at {self.url}")
            time.sleep(TICK)

    def drain(self, seconds: float, hurry: threading.Event | None = None) -> None:
        """Refuse what is new, let what runs finish for so long or until `hurry`, cancel the rest, and close.

        /health says 503 from the first moment on, and is answered until the last.
        """
        self.service.draining = True
        hurry = hurry or threading.Event()
        deadline = time.monotonic() + seconds
        while self.service.running and time.monotonic() < deadline and not hurry.wait(TICK):
            pass
        self.service.engine.close(drain=False)
        deadline = time.monotonic() + CLOSING_SECONDS
        while self.service.running and time.monotonic() < deadline:
            time.sleep(TICK)  # those that were cancelled are told so
        self._server.should_exit = True
        self._thread.join(2 * CLOSING_SECONDS)
