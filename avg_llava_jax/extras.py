"""Optional dependencies: an extra that is not installed gives one line that names it."""

import contextlib
from collections.abc import Iterator

EXTRAS = {"serve": ("starlette", "uvicorn"), "lmms-eval": ("lmms_eval",)}
"""The top-level modules that an extra of pyproject.toml brings, as far as the package imports them itself."""


class MissingExtra(ImportError):
    """An optional dependency is not installed; the text says what needs it and, by `lacking`, how to install it."""


def lacking(extra: str, names: str) -> str:
    """The end of a sentence on what an extra brings: "libtpu, which is not installed: ..."."""
    return f"{names}, which is not installed: install the extra `{extra}`, in a checkout by pip install -e '.[{extra}]'"


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
        raise MissingExtra(f"{what} needs {lacking(extra, error.name)}") from None
