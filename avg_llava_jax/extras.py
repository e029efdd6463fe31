"""Optional dependencies: a missing extra raises one line that names it."""

import contextlib
from collections.abc import Iterator

EXTRAS = {"serve": ("starlette", "uvicorn", "llguidance"), "lmms-eval": ("lmms_eval",)}
"""Top-level modules of each extra in pyproject.toml that this package imports."""


class MissingExtra(ImportError):
    """An optional dependency is not installed; the message says what needs it and how to install it."""


def lacking(extra: str, names: str) -> str:
    """End of an error message on a missing extra: "libtpu, which is not installed: install the extra ..."."""
    return f"{names}, which is not installed: install the extra `{extra}`, in a checkout by pip install -e '.[{extra}]'"


@contextlib.contextmanager
def required(extra: str, what: str) -> Iterator[None]:
    """Context manager around the imports of an extra's modules.

    extra: a key of `EXTRAS`. what: the feature that needs it, the subject of the error.

    Raises:
      MissingExtra: one of the extra's modules is not installed. Any other import error passes through unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[extra]:
            raise
        raise MissingExtra(f"{what} needs {lacking(extra, package)}") from None
