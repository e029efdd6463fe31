"""Fields of a JSON object by a table: one `Field` says what a field may hold and what becomes of it.

    FIELDS = (
        Field("temperature", Number(0, 2), sets="temperature"),     honoured: it sets `Request.temperature`
        Field("store", nothing=(False,)),                           refused, except for values that ask for nothing
        Field("user", nothing=ANYTHING),                            ignored
    )
    read_fields({"temperature": 1, "store": False, "user": None}, FIELDS)   ->   {"temperature": 1.0}

null always counts as absent. `status` and `markdown` write the table of docs/serve.md from the same entries.
"""

from __future__ import annotations

import contextvars
import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from avg_llava_jax.server.refusal import Refusal

KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list"}

_extras: contextvars.ContextVar[bool] = contextvars.ContextVar("extras", default=False)
"""`extras` of the object that is being read."""

_QUOTES = reprlib.Repr()  # its constructor takes these only since Python 3.12
_QUOTES.maxstring = _QUOTES.maxother = 80


class _Anything:
    """Contains every value."""

    def __contains__(self, value: object) -> bool:
        return True


ANYTHING: Collection[Any] = _Anything()  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    parse: (value, path) -> the value to use; raises Refusal. None = no value is honoured. `parse.says`: what it takes.
    nothing: values that ask for nothing, and so are accepted as if the field were absent.
    sets: the field of `Request` that the value becomes; None = the reader of the object decides.
    about: what it does, for docs/serve.md.
    """

    name: str
    parse: Callable[[Any, str], Any] | None = None
    nothing: Collection[Any] = ()
    sets: str | None = None
    about: str = ""

    @property
    def status(self) -> str:
        """honoured, ignored or refused."""
        return "honoured" if self.parse else "ignored" if self.nothing is ANYTHING else "refused"

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether the value is one of `nothing`; true and 1 differ, 1 and 1.0 do not, null in an object is absent."""
        if self.nothing is ANYTHING:
            return True
        if isinstance(value, dict):
            value = {name: one for name, one in value.items() if one is not None}
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.nothing)


def read_fields(values: Any, table: Sequence[Field], where: str = "", extras: bool = False) -> dict[str, Any]:
    """The honoured fields of a JSON object, parsed, without those that ask for nothing.

    where: the object's own path, for messages. extras: ignore fields that the table does not have, here and in the
        objects that the fields hold.

    Raises:
      Refusal: 400 that names the first field at fault.
    """
    if not isinstance(values, dict):
        raise Refusal(400, f"{where or 'the body'} must be a JSON object, not {short(values)}", where or None)
    outside = _extras.set(extras := extras or _extras.get())
    try:
        return _read_fields(values, table, where, extras)
    finally:
        _extras.reset(outside)


def _read_fields(values: dict[str, Any], table: Sequence[Field], where: str, extras: bool) -> dict[str, Any]:
    known, given = {field.name: field for field in table}, {}
    for name, value in values.items():
        path, field = f"{where}.{name}" if where else name, known.get(name)
        if value is None or (field is None and extras):
            continue
        if field is None:
            raise Refusal(400, f"unknown field {short(path)}", path[:80], "unknown_field")
        if field.asks_for_nothing(value):
            continue
        if field.parse is None:
            only = " or ".join(json.dumps(one) for one in field.nothing)
            rule = f", only {only}" if only else ""
            raise Refusal(400, f"{path}={short(value)} is not supported{rule}", path, "unsupported_value")
        given[name] = field.parse(value, path)
    return given


@dataclasses.dataclass(frozen=True)
class Typed:
    """A value of one JSON type; a string must be valid Unicode."""

    kind: type

    @property
    def says(self) -> str:
        return KINDS[self.kind]

    def __call__(self, value: Any, path: str) -> Any:
        if isinstance(value, bool) != (self.kind is bool) or not isinstance(value, self.kind):
            raise Refusal(400, f"{path} must be {self.says}, not {short(value)}", path)
        return checked_text(value, path) if self.kind is str else value


@dataclasses.dataclass(frozen=True)
class Number:
    """A number in least .. most. whole: an integer, which may be written 5.0."""

    least: float
    most: float
    whole: bool = False

    @property
    def says(self) -> str:
        return f"{KINDS[int if self.whole else float]}, {self._range.removeprefix('in ')}"

    @property
    def _range(self) -> str:
        return f"{self.least} or more" if self.most in (2**31 - 1, math.inf) else f"in {self.least} .. {self.most}"

    def __call__(self, value: Any, path: str) -> int | float:
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, float):
            number = value.is_integer() if self.whole else math.isfinite(value)
        if not number:
            raise Refusal(400, f"{path} must be {KINDS[int if self.whole else float]}, not {short(value)}", path)
        if not self.least <= value <= self.most:
            raise Refusal(400, f"{path}={short(value)} must be {self._range}", path)
        return int(value) if self.whole else float(value)


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some strings."""

    choices: tuple[str, ...]

    @property
    def says(self) -> str:
        return " or ".join(json.dumps(choice) for choice in self.choices)

    def __call__(self, value: Any, path: str) -> str:
        if value not in self.choices:
            known = f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
            raise Refusal(400, f"{path} must be {known}, not {short(value)}", path)
        return value


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A value that a function reads. says: what it takes."""

    says: str
    read: Callable[[Any, str], Any]

    def __call__(self, value: Any, path: str) -> Any:
        return self.read(value, path)


TEXT, FLAG, LIST = Typed(str), Typed(bool), Typed(list)


def required(given: dict[str, Any], table: Sequence[Field], name: str, where: str = "") -> Any:
    """A field that must be there."""
    if name not in given:
        path = f"{where}.{name}" if where else name
        says = next(field.parse.says for field in table if field.name == name)
        raise Refusal(400, f"{path} is missing: it must be {says}", path)
    return given[name]


def checked_text(text: str, where: str) -> str:
    """The text; refuses a lone surrogate, which JSON can spell and UTF-8 and tokenizers cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal(400, f"{where} is not valid Unicode: it holds half a surrogate pair", where) from None
    return text


def short(value: Any) -> str:
    """A value quoted for a message."""
    return _QUOTES.repr(value)


def markdown(table: Sequence[Field]) -> str:
    """The table of fields for docs/serve.md, sorted by status and name within it as in the code."""
    lines = ["| field | | values | |", "|---|---|---|---|"]
    for status in ("honoured", "ignored", "refused"):
        for field in table:
            if field.status == status:
                takes = [field.parse.says] if field.parse else []
                if field.nothing and field.nothing is not ANYTHING:
                    takes.append("nothing: " + ", ".join(f"`{json.dumps(one)}`" for one in field.nothing))
                lines.append(f"| `{field.name}` | {status} | {'; '.join(takes).replace('|', '/')} | {field.about} |")
    return "\n".join(lines)
