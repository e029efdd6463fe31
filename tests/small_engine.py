"""An engine of few programs, and what several requests at once come to; `conftest` has fixtures of both."""

from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.tickets import Ticket


def make(model: AvgLlava, **options) -> Engine:
    """An engine of few programs; those of one shape share what is compiled."""
    return Engine(model, **{"slots": 4, "chunk": 32, "image_cache_bytes": 2**18} | options)


def ended(engine: Engine, requests: list[Request]) -> list[Ticket]:
    """The tickets of requests that were submitted together, once all have ended."""
    tickets = [engine.submit(request) for request in requests]
    while engine.step():
        pass
    return tickets
