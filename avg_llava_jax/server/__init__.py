"""The engine over HTTP, as OpenAI's chat completions, with a demo page."""

from avg_llava_jax import extras

with extras.required("serve", "the server"):
    import starlette  # noqa: F401
    import uvicorn  # noqa: F401
