"""Optional dependencies: an extra that is not installed gives one line that names it."""

import contextlib
from collections.abc import Iterator

EXTRAS = {"serve": ("starlette", "uvicorn"), "plan": ("libtpu",), "lmms-eval": ("lmms_eval",)}
"""The top-level modules that an extra of pyproject.toml brings, as far as the package imports them."""


class MissingExtra(ImportError):
    """An optional dependency is not installed: `missing` writes the text."""


def missing(extra: str, what: str, module: str) -> MissingExtra:
    """The error that says what needs which module, and how to install the extra that brings it."""
    return MissingExtra(
        f"{what} needs {module}, which is not installed: install the extra `{extra}`, "
        f"in a checkout by pip install -e '.[{extra}]'"
    )


@contextlib.contextmanager
def required(extra: str, what: str) -> Iterator[None]:
    """Around the imports of an extra's modules.

    extra: a key of `EXTRAS`. what: what needs it, the subject of the error.

    Raises:
      MissingExtra: one of the extra's modules is not installed. Any other failure to import is raised as it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS[extra]:
            raise
        raise missing(extra, what, error.name) from None
