"""Rewrite the table of fields of docs/serve.md from the code: python -m launch.bench.serve_fields"""

import pathlib

from avg_llava_jax.files import around, write_whole
from avg_llava_jax.server.completions import COMPLETION
from avg_llava_jax.server.fields import Field, markdown
from avg_llava_jax.server.reading import CHAT, IMAGE_URL, MESSAGE, PART, STREAM_OPTIONS
from avg_llava_jax.server.responses import RESPONSE
from avg_llava_jax.server.tokenizing import TOKENIZE
from avg_llava_jax.server.tools import CALLED, CALLED_FUNCTION, RESULT_MESSAGE

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "serve.md"
BEGIN, END = "<!-- fields: python -m launch.bench.serve_fields -->\n", "<!-- end of fields -->\n"


def beyond(table: tuple[Field, ...]) -> list[Field]:
    """The fields of a table that chat completions do not have, or have with another meaning."""
    return [field for field in table if field not in CHAT]


def tables() -> str:
    """The tables in Markdown."""
    parts = {
        "`/v1/chat/completions`": CHAT,
        "Its `stream_options`": STREAM_OPTIONS,
        "A message": MESSAGE,
        "A message of `tool`": RESULT_MESSAGE,
        "A call in `tool_calls` of an earlier answer": CALLED,
        "Its `function`": CALLED_FUNCTION,
        "A part of a message": PART,
        "`image_url` of a part": IMAGE_URL,
        "`/v1/completions`: other than in chat completions": beyond(COMPLETION),
        "`/v1/responses`: other than in chat completions": beyond(RESPONSE),
        "`/tokenize` with a prompt": TOKENIZE,
    }
    return "\n".join(f"{title}:\n\n{markdown(table)}\n" for title, table in parts.items())


def main() -> None:
    before, after = around(DOCUMENT, BEGIN, END)
    write_whole(DOCUMENT, before + tables() + after)


if __name__ == "__main__":
    main()
