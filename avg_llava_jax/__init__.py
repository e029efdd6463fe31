"""AVG-LLaVA in JAX and Flax: LLaVA-NeXT with adaptive visual granularity.

    from avg_llava_jax import AvgLlava

    model = AvgLlava.load()
    answer = model.answer("photo.png", "What number is the player in orange?")

These names are loaded when they are first asked for: data workers import the package without jax.
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ASSETS / "jersey"
"""The checkpoint that comes with the package."""

_API = ("Answer", "AvgLlava", "Chat", "Request")


def __getattr__(name: str):
    if name in _API:
        from avg_llava_jax.inference import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
