"""Guides say what an answer must be: one of some texts, a match of an expression, JSON by a schema.

llguidance reads them. Before each token, it marks the tokens with which the answer can still satisfy its guide;
`programs.shape` bans the others. A guided answer may begin with a space, as in training; the space is stripped.

    Guide.choice(["yes", "no"])    before the first token    may come: y, n, ye, yes, no and these after a space
                                   after "ye"                may come: s
                                   after "yes"               the answer is complete

JSON is closed before its tokens run out, because truncated JSON is not JSON. When little more is left than its shortest
end takes, only the tokens of that end are allowed:

    Guide.json(), 6 tokens left    {"a": [1, "b    ends by    "] }
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from avg_llava_jax import extras
from avg_llava_jax.data.tokenizer import Tokenizer

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON with one space after `:` and `,`: small models otherwise repeat white space endlessly."""

CLOSING_RESERVE = 16
"""Tokens left over when JSON is closed, or an eighth of the answer's limit if that is less: one token of the model may
lengthen the shortest end by several, as a key does."""

MESSAGE = 300  # characters of llguidance's messages, which quote the grammar


@dataclasses.dataclass(frozen=True)
class Guide:
    """What an answer must be. Made by the methods below; needs the extra `serve`.

    grammar_text: the grammar, in llguidance's JSON. closes: whether an answer is closed before its tokens run out.

    Raises:
      ValueError: the guide cannot be followed; the message says why in one line.
      MissingExtra: llguidance is not installed.
    """

    grammar_text: str
    closes: bool = False

    def __post_init__(self) -> None:
        with extras.required("serve", "a guide"):
            from llguidance import LLMatcher
        if problem := LLMatcher.validate_grammar(self.grammar_text):
            raise ValueError(f"cannot be followed: {_one_line(problem)}")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Guide:
        """One of several texts."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("must be a list of texts, none of them empty")
        return cls._lark("start: " + " | ".join(json.dumps(text.strip()) for text in texts))

    @classmethod
    def regex(cls, pattern: str) -> Guide:
        """A match of a regular expression, in the syntax of Rust's regex crate."""
        with extras.required("serve", "a guide"):
            from llguidance import LLMatcher
        return cls._of(json.loads(LLMatcher.grammar_from_regex(pattern))["grammars"][0])

    @classmethod
    def grammar(cls, text: str) -> Guide:
        """A sentence of a grammar, in Lark's syntax as llguidance reads it, or in GBNF."""
        with extras.required("serve", "a guide"):
            from llguidance.gbnf_to_lark import any_to_lark
        try:
            lark = any_to_lark(text)
        except RecursionError:
            raise ValueError("cannot be followed: it is nested too deeply") from None
        except Exception as error:  # that function raises nothing more specific
            raise ValueError(f"cannot be followed: {_one_line(str(error))}") from None
        return cls._lark(lark)

    @classmethod
    def json(cls, schema: dict[str, Any] | bool | None = None) -> Guide:
        """JSON by a JSON schema, see `strict`; None = any JSON object."""
        schema = {"type": "object"} if schema is None else schema
        if not isinstance(schema, dict):
            raise ValueError("a JSON schema must be an object")
        return cls._of({"json_schema": strict(schema)}, closes=True)

    @classmethod
    def _lark(cls, text: str) -> Guide:
        return cls._of({"lark_grammar": text})

    @classmethod
    def _of(cls, answer: dict[str, Any], closes: bool = False) -> Guide:
        start = {"lark_grammar": 'start: " "? @answer'}
        return cls(json.dumps({"grammars": [start, answer | {"name": "answer"}]}), closes)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as its author means it: compact, and objects have only the properties that it names.

    JSON schema allows any others if an object has no `additionalProperties`, and a model that may write more will.
    A schema with `allOf`, or an object with properties of its own and of alternatives, names properties in one part for
    the others: it stays as it is.
    """

    def divided(part: dict[str, Any]) -> bool:
        each = [each for key in ("anyOf", "oneOf") if isinstance(part.get(key), list) for each in part[key]]
        return any("properties" in one for one in each if isinstance(one, dict))

    def closed(part: Any) -> Any:
        if not isinstance(part, dict) or ("properties" in part and divided(part)):
            return part
        found = {}
        for key, value in part.items():
            if key in ("items", "additionalProperties"):
                value = closed(value)
            elif key in ("anyOf", "oneOf", "prefixItems") and isinstance(value, list):
                value = [closed(each) for each in value]
            elif key in ("properties", "$defs", "definitions") and isinstance(value, dict):
                value = {name: closed(each) for name, each in value.items()}
            found[key] = value
        if "properties" in part and not {"additionalProperties", "patternProperties", "$ref"} & part.keys():
            found["additionalProperties"] = False
        return found

    return (schema if '"allOf"' in json.dumps(schema) else closed(schema)) | {"x-guidance": COMPACT}


class Matcher:
    """The answer so far, and the tokens that its guide allows next.

    Raises ValueError if the guide cannot be followed with this vocabulary.
    """

    def __init__(self, guide: Guide, tokenizer: Tokenizer, stop_ids: tuple[int, ...], vocabulary: int):
        from llguidance import LLMatcher

        self._matcher = LLMatcher(_vocabulary_of(tokenizer, stop_ids), guide.grammar_text, log_level=0)
        self._read, self._words = 0, -(-vocabulary // 32)
        self._closes, self._tokenizer = guide.closes, tokenizer
        self.closed = False  # whether the answer was closed before its tokens ran out
        self._look = math.inf  # the number of tokens left at which to look for the shortest end again
        self._check()

    def allowed(self, left: int, most: int) -> np.ndarray:
        """The tokens that may come next, uint32 (ceil(V / 32),), see `programs.Shaping`.

        left: tokens that may still come, of the most that the answer may have.
        """
        mask = np.zeros(self._words, np.uint32)
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        mask[: len(found)] = found[: len(mask)]
        if self._closes and left <= self._look and not self.complete:
            end, spare = self._end(left), min(CLOSING_RESERVE, most // 8)
            slack = left // 2 if end is None else left - len(end) - spare
            self._look = left - slack // 3  # a token may lengthen the end by two more
            if end and slack <= 0:
                self.closed, mask[:] = True, 0
                mask[end[0] // 32] = 1 << end[0] % 32
        return mask

    def _end(self, most: int) -> list[int] | None:
        """The tokens of a short end of the JSON, [] if it may end here; None if they are more than `most`."""
        matcher, end, token_of = self._matcher.deep_copy(), [], _closers(self._tokenizer)
        while not matcher.is_accepting():
            tokens = matcher.compute_ff_tokens()
            if not tokens:
                bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
                known = [each for each, token in token_of.items() if bits[token]]
                if "~" in known:  # JSON has it only in strings
                    known = [each for each in known if each == '"']
                tokens = [token_of[known[0]] if known else int(bits.argmax())]
            if len(end) + len(tokens) > most or not matcher.consume_tokens(tokens):
                return None
            end += tokens
        return end

    def read(self, tokens: Sequence[int]) -> None:
        """Follow an answer to its newest token. Raises ValueError if that takes more than llguidance's limits."""
        if not self.complete:
            self._matcher.consume_tokens(list(tokens[self._read :]))
            self._read = len(tokens)
            self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the guide cannot be followed: {_one_line(self._matcher.get_error())}")


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, after_special=True)


@functools.cache
def _vocabulary_of(tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), eos_token=list(stop_ids))


@functools.cache
def _closers(tokenizer: Tokenizer) -> dict[str, int]:
    """The token of each character that ends something in JSON, and of `~`."""
    found = {tokenizer.bytes_of(token): token for token in reversed(range(tokenizer.vocab_size))}
    return {each: found[each.encode()] for each in '}]"0~' if each.encode() in found}


def _one_line(message: str) -> str:
    return " ".join(message.split())[:MESSAGE]
