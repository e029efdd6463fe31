"""Guides say what an answer must be: one of some texts, a match of an expression, JSON by a schema.

llguidance reads them. Before each token it marks those with which the answer can still become what its guide says;
`programs.shape` bans the others. A guided answer may begin with a space, as answers do in training, which is stripped.

    Guide.choice(["yes", "no"])    before the first token    may come: y, n, ye, yes, no and these after a space
                                   after "ye"                may come: s
                                   after "yes"               the answer is complete
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from avg_llava_jax import extras
from avg_llava_jax.data.tokenizer import Tokenizer

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON with one space after `:` and `,`: small models repeat white space for ever where they may."""

MESSAGE = 300  # characters of llguidance's messages, which quote the grammar


@dataclasses.dataclass(frozen=True)
class Guide:
    """What an answer must be. Made by the methods below; needs the extra `serve`.

    grammar_text: the grammar, in llguidance's JSON.

    Raises:
      ValueError: it cannot be followed; says why in one line.
      MissingExtra: llguidance is not installed.
    """

    grammar_text: str

    def __post_init__(self) -> None:
        with extras.required("serve", "a guide"):
            from llguidance import LLMatcher
        if problem := LLMatcher.validate_grammar(self.grammar_text):
            raise ValueError(f"cannot be followed: {_one_line(problem)}")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Guide:
        """One of some texts."""
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
        except Exception as error:  # that function raises nothing more special
            raise ValueError(f"cannot be followed: {_one_line(str(error))}") from None
        return cls._lark(lark)

    @classmethod
    def json(cls, schema: dict[str, Any] | bool | None = None) -> Guide:
        """JSON by a JSON schema, see `strict`; None = any JSON object."""
        schema = {"type": "object"} if schema is None else schema
        if not isinstance(schema, dict):
            raise ValueError("a JSON schema must be an object")
        return cls._of({"json_schema": strict(schema)})

    @classmethod
    def _lark(cls, text: str) -> Guide:
        return cls._of({"lark_grammar": text})

    @classmethod
    def _of(cls, answer: dict[str, Any]) -> Guide:
        start = {"lark_grammar": 'start: " "? @answer'}
        return cls(json.dumps({"grammars": [start, answer | {"name": "answer"}]}))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema as its author means it: compact, and objects have the properties that it names, and no others.

    JSON schema allows any others where an object has no `additionalProperties`, and a model that may write more will.
    A schema with `allOf`, whose parts name properties for each other, stays as it is.
    """

    def closed(part: Any) -> Any:
        if not isinstance(part, dict):
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
    """The part of an answer that is there, and what may follow by its guide.

    Raises ValueError where the guide cannot be followed with this vocabulary.
    """

    def __init__(self, guide: Guide, tokenizer: Tokenizer, stop_ids: tuple[int, ...], vocabulary: int):
        from llguidance import LLMatcher

        self._matcher = LLMatcher(_vocabulary_of(tokenizer, stop_ids), guide.grammar_text, log_level=0)
        self._read, self._words = 0, -(-vocabulary // 32)
        self._check()

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, uint32 (ceil(V / 32),), see `programs.Shaping`."""
        mask = np.zeros(self._words, np.uint32)
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        mask[: len(found)] = found[: len(mask)]
        return mask

    def read(self, tokens: Sequence[int]) -> None:
        """Follow an answer to its newest token. Raises ValueError where that takes more than llguidance's limits."""
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


def _one_line(message: str) -> str:
    return " ".join(message.split())[:MESSAGE]
