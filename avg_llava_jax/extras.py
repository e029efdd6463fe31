"""Optional dependencies: an extra that is not installed gives one line that names it."""

import importlib

EXTRAS = {"serve": ("starlette", "uvicorn"), "plan": ("libtpu",), "lmms-eval": ("lmms_eval",)}
"""The modules that an extra of pyproject.toml brings, as far as the package imports them."""


class MissingExtra(ImportError):
    """An optional dependency is not installed; the text says what needs it and how to install it."""


def require(extra: str, what: str) -> None:
    """Check that an extra is installed.

    extra: a key of `EXTRAS`. what: what needs it, the subject of the error.

    Raises:
      MissingExtra: one of its modules cannot be found. An installed module that fails to import raises its own error.
    """
    for module in EXTRAS[extra]:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise MissingExtra(
                f"{what} needs {module}, which is not installed: install the extra `{extra}`, "
                f"in a checkout by pip install -e '.[{extra}]'"
            ) from None
