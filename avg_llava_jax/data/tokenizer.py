"""Tokenizers loaded from a folder: tokenizer.json verbatim, or a sentencepiece tokenizer.model.

This module uses neither torch nor a conversion. Newer libraries rebuild Llama tokenizers when they load
them, and text after a special token then becomes other tokens than in training (`</s>USER` is `US ER` or
`_USER`, depending on the library). Both kinds of file are read here unchanged. For tokenizer.model the
`legacy` key of tokenizer_config.json decides, as in the training of the released weights:

    legacy true (also when absent)   every piece of text starts with a word boundary
    legacy false                     only text that does not follow a special token starts with one
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


class Tokenizer:
    """Text to ids and back; `load_tokenizer` creates it.

    vocab_size: number of embedding rows that the ids need, added tokens included.
    bos_id: None if the model's texts do not begin with BOS. eos_id, pad_id: never None.
    special_tokens: text of each special token -> its id.
    chat_template: the tokenizer's own Jinja template, or None: from chat_template.jinja, chat_template.json, which
        older versions of the transformers library write for a processor, or tokenizer_config.json.
    """

    def __init__(self, folder: Path, config: dict[str, Any], backend: _JsonBackend | _SentencePieceBackend):
        self.folder = folder
        self._backend = backend
        self.vocab_size: int = backend.vocab_size
        self.special_tokens: dict[str, int] = backend.special_tokens
        named = {key: _content(config.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad")}
        self._named = {key: text for key, text in named.items() if text is not None}
        self.eos_id: int = self._special("eos")
        self.eos_token: str = self._named["eos"]
        bos = self._named.get("bos")
        adds_bos = config.get("add_bos_token", backend.adds_bos(bos))
        self.bos_id: int | None = self._special("bos") if bos is not None and adds_bos else None
        pad = self._named.get("pad") or self._named.get("unk")
        self.pad_id: int = self.special_tokens.get(pad, self.eos_id)
        self.chat_template: str | None = _chat_template(folder, config)

    def _special(self, key: str) -> int:
        text = self._named.get(key)
        if text not in self.special_tokens:
            raise ValueError(f"{self.folder}: {key}_token is {text!r}, which is not a special token of its vocabulary")
        return self.special_tokens[text]

    def encode(self, text: str, *, after_special: bool = False) -> list[int]:
        """Ids of plain text, without BOS. Special tokens in the text are not parsed.

        after_special: the text follows a special token other than BOS; see this module's docstring.
        """
        return self._backend.encode(text, after_special) if text else []

    def split_special(self, text: str) -> list[tuple[str, int | None]]:
        """Splits rendered text at its special tokens: (text, None) or (token, its id).

        >>> tokenizer.split_special("a</s>b")   # doctest: +SKIP
        [('a', None), ('</s>', 2), ('b', None)]
        """
        parts = self._special_pattern.split(text)
        return [(part, self.special_tokens.get(part)) for part in parts if part]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens.

        Each byte that is not valid UTF-8 becomes U+FFFD, and nothing else does. So the text of a prefix of the ids is a
        prefix of their text, except for U+FFFD at its end. (The libraries would also retract complete characters
        before such a byte.)
        """
        skip = self._special_ids
        return self._backend.decode(self._mended([int(i) for i in ids if int(i) not in skip]))

    def bytes_of(self, token: int) -> bytes:
        """What one token adds to a text, which need not be whole UTF-8; a special token's own name, b"" for no token.

        Where a piece stands first in a text, `decode` drops the space before it: "▁Who" is b" Who" here.
        """
        if token in self._backend.bytes:
            return bytes([self._backend.bytes[token]])
        return self._names[token] if token in self._names else self._backend.bytes_of(token)

    @functools.cached_property
    def _names(self) -> dict[int, bytes]:
        return {token: name.encode() for name, token in self.special_tokens.items()}

    def _mended(self, ids: list[int]) -> list[int]:
        """Ids with invalid byte tokens replaced by those of U+FFFD: E6 97 "a" becomes EF BF BD "a"."""
        byte_of = self._backend.bytes
        if not any(i in byte_of for i in ids):
            return ids
        mended: list[int] = []
        for is_byte, run in itertools.groupby(ids, byte_of.__contains__):
            if is_byte:
                text = bytes(byte_of[i] for i in run).decode("utf-8", errors="replace")
                mended += [self._id_of_byte[byte] for byte in text.encode()]
            else:
                mended += run
        return mended

    @functools.cached_property
    def _id_of_byte(self) -> dict[int, int]:
        return {byte: i for i, byte in self._backend.bytes.items()}

    def apply_chat_template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Renders `[{"role": "system" | "user" | "assistant", "content": text}]` with the tokenizer's own template.

        A template that expects parts gets `[{"type": "text", "text": text}]`.

        Raises ValueError if the tokenizer has no chat template or it cannot be rendered.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.folder}: this tokenizer has no chat template; choose another `template`")
        if self.takes_parts:
            messages = [_in_parts(message) for message in messages]
        return self._render(messages, add_generation_prompt)

    @functools.cached_property
    def writes_images(self) -> bool:
        """Whether its chat template knows image parts, and writes `<image>` for each."""
        content = [{"type": "image"}, {"type": "text", "text": "probe"}]
        try:
            return "<image>" in self._render([{"role": "user", "content": content}])
        except ValueError:
            return False

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether its chat template writes the text of a system turn."""
        messages = [{"role": "system", "content": "probe"}, {"role": "user", "content": "a"}]
        try:
            return "probe" in self.apply_chat_template(messages)
        except ValueError:
            return False

    @functools.cached_property
    def takes_greeting(self) -> bool:
        """Whether its chat template writes an answer that precedes all questions."""
        messages = [{"role": "assistant", "content": "probe"}, {"role": "user", "content": "a"}]
        try:
            return "probe" in self.apply_chat_template(messages)
        except ValueError:
            return False

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        # Imported here: the import takes a second, and most models use a template of `conversation`.
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {f"{key}_token": text for key, text in self._named.items()}
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, **names
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.folder}: its chat template cannot be rendered: {error}") from None
        return rendered[0]

    @functools.cached_property
    def takes_parts(self) -> bool:
        """Whether the template expects parts, like a processor's: it does not render a plain text."""
        probe = {"role": "user", "content": "probe"}
        try:
            if "probe" in self._render([probe]):
                return False
        except ValueError:
            pass
        try:
            return "probe" in self._render([_in_parts(probe)])
        except ValueError:
            return False

    def save(self, folder: str | Path) -> None:
        """Copies the tokenizer's files, unchanged, into `folder`, which is created if missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self.folder / name).is_file() and Path(folder).resolve() != self.folder.resolve():
                shutil.copyfile(self.folder / name, Path(folder) / name)

    def digest(self) -> str:
        """SHA-256 of the tokenizer's files, in hex."""
        found = hashlib.sha256()
        for name in _FILES:
            if (self.folder / name).is_file():
                found.update(name.encode() + hashlib.sha256((self.folder / name).read_bytes()).digest())
        return found.hexdigest()

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __reduce__(self):
        return load_tokenizer, (self.folder,)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads a tokenizer folder; tokenizer.json takes precedence over tokenizer.model.

    Raises FileNotFoundError if the folder has neither, ValueError if a file in it is not valid.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    for key, value in _read_json(folder / "special_tokens_map.json").items():
        config.setdefault(key, value)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(folder, config, _JsonBackend(folder))
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(folder, config, _SentencePieceBackend(folder, config))
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model: copy one of them there")


class _JsonBackend:
    """tokenizer.json, run by the library that wrote it."""

    def __init__(self, folder: Path):
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        self._start = self._plain(text)
        self.vocab_size = 1 + max(self._start.get_vocab(with_added_tokens=True).values())  # ids may leave gaps
        added = self._start.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self._has_bos = self._start.encode("a", add_special_tokens=True).ids[:1]
        spec, changed = json.loads(text), False
        spec["pre_tokenizer"] = copy.deepcopy(spec.get("pre_tokenizer"))
        for part in _parts(spec["pre_tokenizer"]):
            if part.get("prepend_scheme") == "first":
                # "first" refers to the complete string, special tokens included: no word boundary after one.
                part["prepend_scheme"], changed = "never", True
        self._after = self._plain(json.dumps(spec)) if changed else self._start
        falls_back = any(part.get("type") == "ByteFallback" for part in _parts(spec.get("decoder"), "decoders"))
        self.bytes = _byte_tokens(self._start.get_vocab(with_added_tokens=False)) if falls_back else {}
        in_bytes = any(part.get("type") == "ByteLevel" for part in _parts(spec.get("decoder"), "decoders"))
        self._byte_of = _bytes_of_characters() if in_bytes else {}
        self._added = {token: entry.content.encode() for token, entry in added.items()}

    @staticmethod
    def _plain(text: str) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # a special token in the text is encoded as plain text
        return tokenizer

    def adds_bos(self, bos: str | None) -> bool:
        return bos is not None and self._has_bos == [self.special_tokens.get(bos)]

    def encode(self, text: str, after_special: bool) -> list[int]:
        tokenizer = self._after if after_special else self._start
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._start.decode(ids, skip_special_tokens=True)

    def bytes_of(self, token: int) -> bytes:
        piece = self._start.id_to_token(token) or ""
        if token in self._added:
            return self._added[token]
        return bytes(self._byte_of[c] for c in piece) if self._byte_of else _spaced(piece)


class _SentencePieceBackend:
    """tokenizer.model with the word-boundary rule of `legacy`."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        path = folder / "tokenizer.model"
        try:
            self._start = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a sentencepiece model ({error})") from None
        pieces = self._start
        self.special_tokens = {
            pieces.id_to_piece(i): i for i in range(pieces.vocab_size()) if pieces.is_control(i) or pieces.is_unknown(i)
        }
        for text, token in _read_json(folder / "added_tokens.json").items():
            self.special_tokens[text] = token
        for token, entry in config.get("added_tokens_decoder", {}).items():
            self.special_tokens[entry["content"]] = int(token)
        self.vocab_size = max(pieces.vocab_size(), 1 + max(self.special_tokens.values(), default=-1))
        self.bytes = _byte_tokens({pieces.id_to_piece(i): i for i in range(pieces.vocab_size()) if pieces.is_byte(i)})
        legacy = config.get("legacy")
        self._after = pieces if legacy is None or legacy else _without_word_boundary(pieces)

    def adds_bos(self, bos: str | None) -> bool:
        return bos is not None  # the default of Llama tokenizers

    def encode(self, text: str, after_special: bool) -> list[int]:
        return (self._after if after_special else self._start).encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._start.decode([i for i in ids if i < self._start.vocab_size()])

    def bytes_of(self, token: int) -> bytes:
        return _spaced(self._start.id_to_piece(token)) if token < self._start.vocab_size() else b""


def _without_word_boundary(pieces: sentencepiece.SentencePieceProcessor) -> sentencepiece.SentencePieceProcessor:
    """The same model without the word boundary before the text."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces.serialized_model_proto())
    model.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


_WORDS = r"\n| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def train_byte_bpe(
    texts: Iterable[str],
    vocab_size: int,
    folder: str | Path,
    special_tokens: Sequence[str] = ("<unk>", "<s>", "</s>"),
    markers: Sequence[str] = (),
) -> Tokenizer:
    """Trains a small byte-level BPE, writes it to `folder` and loads it.

    The vocabulary has all 256 bytes, so any text round-trips. A token never crosses the end of a word,
    a digit or a run of punctuation, and includes the space before it. The special tokens get the first
    ids and must begin with `<unk>`, `<s>`, `</s>` (ids 0, 1, 2). `markers` are strings of a template,
    such as `[INST]`; each is one token anywhere in a text, together with white space before it. They get
    the last ids.

    Raises ValueError if `special_tokens` begin with others, or `vocab_size` is too small.
    """
    if tuple(special_tokens[:3]) != ("<unk>", "<s>", "</s>"):
        raise ValueError(f"special_tokens must begin with <unk>, <s>, </s>; got {list(special_tokens)}")
    least = 256 + len(special_tokens) + len(markers)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small: bytes, special tokens and markers take {least}")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(markers),
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.add_tokens([tokenizers.AddedToken(text, lstrip=True, special=False) for text in markers])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


def _parts(node: dict[str, Any] | None, inside: str = "pretokenizers") -> Iterable[dict[str, Any]]:
    """The JSON node of a pre-tokenizer (`inside`: decoders) and the nodes nested in it."""
    if node is not None:
        yield node
        for inner in node.get(inside, ()):
            yield from _parts(inner, inside)


def _spaced(piece: str) -> bytes:
    """A piece of a sentencepiece vocabulary, with spaces for word boundaries."""
    return piece.replace("\u2581", " ").encode()


def _bytes_of_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte.

    Printable characters of Latin-1 stand for themselves; characters from U+0100 stand for the others, in order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _byte_tokens(vocabulary: dict[str, int]) -> dict[int, int]:
    """Id -> byte of the tokens <0x00> to <0xFF>; {} if one of them is missing."""
    ids = [vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]
    return {} if None in ids else dict(zip(ids, range(256), strict=True))


def _content(token: str | dict[str, Any] | None) -> str | None:
    """A token's text; the files hold it bare or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _in_parts(message: dict[str, str]) -> dict[str, Any]:
    """A message whose content is a list of one part, its text."""
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
