"""The engine over HTTP, as OpenAI's API, with a demo page."""

import importlib.metadata

from avg_llava_jax import extras

try:
    VERSION = importlib.metadata.version("avg_llava_jax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    VERSION = "checkout"

with extras.required("serve", "the server"):
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
