"""Tools: functions that the model may call, in text that its guide keeps well-formed.

These models were trained without tools, so everything is text. The system message lists the functions; a call is

    <tool_call>{"name": "look_up", "arguments": {"shirt": 7}}</tool_call>

and a result `<tool_response>...</tool_response>` in a question. A guide makes an answer one or more calls, arguments by
the functions' schemas, or, with `tool_choice: "auto"`, a text that does not begin like a call.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from avg_llava_jax.inference.guides import Guide, strict
from avg_llava_jax.server.fields import (
    ANYTHING,
    FLAG,
    LIST,
    TEXT,
    Field,
    OneOf,
    Parsed,
    read_fields,
    required,
    short,
)
from avg_llava_jax.server.refusal import Refusal
from avg_llava_jax.server.shaping import OBJECT, guided

CALL, CALL_END = "<tool_call>", "</tool_call>"
RESULT, RESULT_END = "<tool_response>", "</tool_response>"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NO_PARAMETERS = {"additionalProperties": False}
MOST_TOOLS = 128
HEAD = re.compile(r'\{"name": "([^"]*)", "arguments": ')
INTRODUCTION = f"""You can call these functions, one JSON object a line:
{{}}
To call one, answer with nothing but {CALL}{{{{"name": NAME, "arguments": ARGUMENTS}}}}{CALL_END}"""

TOOL = (Field("type", OneOf(("function",))), Field("function", OBJECT))
FUNCTION = (
    Field("name", TEXT),
    Field("description", TEXT),
    Field("parameters", OBJECT),
    Field("strict", nothing=ANYTHING, about="arguments always follow the schema"),
)
CALLED = (
    Field("id", nothing=ANYTHING),
    Field("type", OneOf(("function",))),
    Field("function", OBJECT),
    Field("index", nothing=ANYTHING),
)
CALLED_FUNCTION = (Field("name", TEXT), Field("arguments", TEXT))
RESULT_MESSAGE = (
    Field("role", OneOf(("tool",))),
    Field("content", Parsed("a string or a list of parts", lambda value, path: value)),
    *(Field(name, nothing=ANYTHING) for name in ("tool_call_id", "name", "id", "type", "status")),
)


def _functions(value: Any, path: str) -> list[dict[str, Any]]:
    """The functions of `tools`: [{"name", and "description", "parameters" where they are there}]."""
    functions: list[dict[str, Any]] = []
    for number, tool in enumerate(LIST(value, path)):
        where = f"{path}[{number}]"
        given = read_fields(tool, TOOL, where)
        function = read_fields(required(given, TOOL, "function", where), FUNCTION, f"{where}.function")
        name = required(function, FUNCTION, "name", f"{where}.function")
        if not NAME.fullmatch(name) or any(name == one["name"] for one in functions):
            raise Refusal(
                400,
                f"{where}.function.name={short(name)} must be letters, digits, _ and -, up to 64, and another for each",
                f"{where}.function.name",
            )
        functions.append(function)
    if len(functions) > MOST_TOOLS:
        raise Refusal(400, f"{path} has {len(functions)} functions, at most {MOST_TOOLS}", path)
    return functions


def _choice(value: Any, path: str) -> str:
    """none, auto, required, or `=NAME` for one function."""
    if isinstance(value, str):
        return OneOf(("none", "auto", "required"))(value, path)
    given, where = read_fields(value, TOOL, path), f"{path}.function"
    return "=" + required(read_fields(given.get("function"), FUNCTION, where), FUNCTION, "name", where)


TOOLS = (
    Field("tools", Parsed("a list of functions", _functions), nothing=([],), about="called as text, by a guide"),
    Field("tool_choice", Parsed("`none`, `auto`, `required` or a function", _choice)),
    Field("parallel_tool_calls", FLAG, about="false: one call at most"),
)
"""Fields of /v1/chat/completions."""


class Tools:
    """The functions that one answer may call. introduction: for the system message. guide: for the answer.

    forced: whether one function is named, after whose call OpenAI says `stop` and not `tool_calls`.
    """

    def __init__(self, functions: Sequence[dict[str, Any]], choice: str, several: bool):
        self.forced = choice.startswith("=")
        if self.forced:
            functions = [function for function in functions if function["name"] == choice[1:]]
            if not functions:
                raise Refusal(400, f"tool_choice names {choice[1:]!r}, which is not in tools", "tool_choice")
        listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
        self.introduction = INTRODUCTION.format(listed)
        self.guide = _guide(functions, choice == "auto", several)


def tools_of(given: dict[str, Any]) -> Tools | None:
    """The tools of a body's fields, None where it has none or wants none called."""
    functions, choice = given.get("tools"), given.get("tool_choice", "auto")
    if choice == "none" or (choice == "auto" and not functions):
        return None
    if not functions:
        raise Refusal(400, "tool_choice needs tools", "tool_choice")
    return Tools(functions, choice, given.get("parallel_tool_calls", True))


def _guide(functions: Sequence[dict[str, Any]], may_talk: bool, several: bool) -> Guide:
    calls = " | ".join(f"call_{number}" for number in range(len(functions)))
    lines = [
        'start: " "? answer',
        "answer: calls" + (" | TEXT" if may_talk else ""),
        r'calls: one ("\n"? one)*' if several else "calls: one",
        f"one: {calls}",
        r"TEXT: /([^<]|<[^t])(.|\n)*/",
    ]
    grammars = []
    for number, function in enumerate(functions):
        head = json.dumps(f'{CALL}{{"name": "{function["name"]}", "arguments": ')
        lines.append(f"call_{number}: {head} @arguments_{number} {json.dumps('}' + CALL_END)}")
        schema = {"type": "object"} | function.get("parameters", NO_PARAMETERS)
        guided(Guide.json, schema, f"tools[{number}].function.parameters")
        grammars.append({"name": f"arguments_{number}", "json_schema": strict(schema)})
    grammar = json.dumps({"grammars": [{"lark_grammar": "\n".join(lines)}, *grammars]})
    return guided(lambda text: Guide(text, closes=True), grammar, "tools")


def as_text(messages: Sequence[Any], extras: bool = False) -> list[Any]:
    """Messages in which the calls of `assistant` and the results of `tool`, which becomes `user`, are text.

    Other messages stay as they are, and all keep their places. extras: as in `read_fields`.
    """
    return [_as_text(message, f"messages[{number}]", extras) for number, message in enumerate(messages)]


def _as_text(message: Any, where: str, extras: bool) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") == "tool":
        content = read_fields(message, RESULT_MESSAGE, where, extras).get("content") or ""
        parts = content if isinstance(content, list) else [_part(content)]
        return {"role": "user", "content": [_part(RESULT), *parts, _part(RESULT_END)]}
    calls = message.get("tool_calls")
    if message.get("role") != "assistant" or not calls:
        return message
    lines = []
    for number, call in enumerate(LIST(calls, f"{where}.tool_calls")):
        path = f"{where}.tool_calls[{number}]"
        given = read_fields(call, CALLED, path, extras)
        function = required(given, CALLED, "function", path)
        function = read_fields(function, CALLED_FUNCTION, f"{path}.function", extras)
        name = required(function, CALLED_FUNCTION, "name", f"{path}.function")
        arguments = function.get("arguments") or "{}"
        lines.append(f'{CALL}{{"name": {json.dumps(name)}, "arguments": {arguments}}}{CALL_END}')
    content = message.get("content") or []
    parts = content if isinstance(content, list) else [_part(content)]
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": [*parts, *map(_part, lines)]
    }


def _part(text: Any) -> dict[str, Any]:
    return {"type": "text", "text": text}


class Calls:
    """Reads an answer with tools as it comes: its text, or its calls.

        pieces   <tool_call>{"na   me": "f", "arguments": {"a":   1}}</tool_call>
        deltas   none              id, name, `{"a":`              `1}`
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._held, self._talks = "", False
        self._open = False  # inside of the arguments, of which `_depth` braces and brackets are open
        self._depth, self._quoted, self._escaped = 0, False, False

    def feed(self, piece: str) -> list[dict[str, Any]]:
        """The deltas of a message that a piece of the answer's text brings, in OpenAI's JSON."""
        if self._talks:
            return [{"content": piece}]
        self._held += piece
        if not self.names and not CALL.startswith(self._held[: len(CALL)]):
            self._talks = True
            return [{"content": self._held}]
        deltas: list[dict[str, Any]] = []
        while True:
            if self._open:
                end = self._arguments_end()
                if end:
                    function = {"arguments": self._held[:end]}
                    deltas.append(_delta(len(self.names) - 1, {"function": function}))
                    self._held = self._held[end:]
                if self._open:
                    return deltas
            found = HEAD.search(self._held)
            if not found:
                return deltas
            self.names.append(found[1])
            self._held, self._open = self._held[found.end() :], True
            function = {"name": found[1], "arguments": ""}
            entry = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            deltas.append(_delta(len(self.names) - 1, entry))

    def _arguments_end(self) -> int:
        """The characters of what is held that belong to the arguments; closes them at their last brace."""
        for at, character in enumerate(self._held):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            else:
                self._depth += (character in "{[") - (character in "}]")
                if not self._depth:
                    self._open = False
                    return at + 1
        return len(self._held)


def _delta(index: int, entry: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, **entry}]}


def message_of(text: str) -> dict[str, Any]:
    """`content` and `tool_calls` of the message of a whole answer; the last call may be incomplete."""
    content, calls = "", []
    for delta in Calls().feed(text):
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({key: part[key] for key in ("id", "type", "function")})
            else:
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return {"content": None, "tool_calls": calls} if calls else {"content": content}
