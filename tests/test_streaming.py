"""Pieces of text, by a decoder over bytes: a token is a byte."""

import numpy as np
import pytest

from avg_llava_jax.convert import llava_next
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.inference.text_stream import TextStream
from tests.test_convert import SOURCE


def decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def pieces_of(text, chunk, stop=()):
    """(stream, pieces) of a text that comes in chunks of so many bytes."""
    stream, data, pieces = TextStream(decode, stop), text.encode(), []
    for end in range(chunk, len(data) + chunk, chunk):
        pieces.append(stream.feed(list(data[:end]), final=end >= len(data)))
    return stream, pieces


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("text", ["", "seven", " seven ", "日本 é 🙂!", "a  b\n\nc", "\ufffd is a character"])
def test_pieces_join_to_the_text_and_split_no_character(text, chunk):
    stream, pieces = pieces_of(text, chunk)
    assert "".join(pieces) == stream.text == text.strip()
    assert all(piece in text for piece in pieces)
    assert not stream.stopped


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "text, stop, wanted, used",
    [
        ("one END two", ["END"], "one", "one END"),
        ("one ENTER", ["END"], "one ENTER", "one ENTER"),
        ("EEND", ["END"], "E", "EEND"),
        ("a b c", ["c", "b"], "a", "a b"),
        ("\nAnn", ["\n"], "", "\n"),
        ("日本。次", ["。"], "日本", "日本。"),
        ("never", ["x", "yy"], "never", "never"),
    ],
)
def test_stop_strings_end_the_text_whatever_the_chunks(text, stop, wanted, used, chunk):
    stream, pieces = pieces_of(text, chunk, stop)
    assert "".join(pieces) == stream.text == wanted
    assert decode(stream.ids) == used
    assert stream.stopped == (used != text or any(text.endswith(s) for s in stop))


def test_what_may_be_a_stop_string_is_held_back():
    _, pieces = pieces_of("go EN route", 1, ["END"])
    assert pieces[:7] == ["g", "o", "", "", "", " EN", " r"]


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizer.json"])
def with_byte_tokens(request, tmp_path_factory):
    """(tokenizer, ids of bytes) of a tokenizer that spells what it does not know in bytes."""
    tokenizer = load_tokenizer(SOURCE)
    if request.param == "tokenizer.json":
        folder = tmp_path_factory.mktemp("json")
        llava_next.save_tokenizer(folder, tokenizer, {"<image>": 1000}, "vicuna_v1")
        tokenizer = load_tokenizer(folder)
    return tokenizer, tokenizer._id_of_byte


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xc3\xa9", "é"),
        (b"\xc3\xa9\xe6", "é\ufffd"),
        (b"\xc3\xa9\xe6\x97", "é\ufffd"),
        (b"\xc3\xa9\xe6\x97\xa5", "é日"),
        (b"\xc3\xa9\xff\xc3\xa9", "é\ufffdé"),
        (b"\xf0\x9f\x99\x82\xf0\x9f", "🙂\ufffd"),
        (b"\x97\xa5", "\ufffd\ufffd"),
        (b"\xef\xbf\xbd", "\ufffd"),
    ],
)
def test_bytes_that_are_no_text_take_no_character_back(with_byte_tokens, content, text):
    """Streamed, whole, and decoded: the same text, also where an answer ends inside a character."""
    tokenizer, id_of = with_byte_tokens
    said, run = tokenizer.encode("seven"), [id_of[byte] for byte in content]
    for ids, wanted in ((run, text), (said + run, "seven" + text), (said + run + said, f"seven{text} seven")):
        assert tokenizer.decode(ids).strip() == wanted
        for chunk in (1, 2, 3, 100):
            stream = TextStream(tokenizer.decode)
            ends = range(chunk, len(ids) + chunk, chunk)
            pieces = [stream.feed(ids[:end], final=end >= len(ids)) for end in ends]
            assert "".join(pieces) == stream.text == wanted


def test_any_tokens_stream_to_what_they_decode_to(with_byte_tokens):
    tokenizer, id_of = with_byte_tokens
    rng, characters = np.random.default_rng(0), [id_of[byte] for byte in "é日🙂".encode()]
    for _ in range(300):
        parts = [
            rng.integers(3, 1000, 3).tolist(),
            [id_of[byte] for byte in rng.integers(0, 256, 3).tolist()],
            characters[: rng.integers(0, 10)],
        ]
        ids = [token for n in rng.integers(0, 3, 5) for token in parts[n]]
        stream, pieces, at = TextStream(tokenizer.decode), [], 0
        while at < len(ids):
            at += int(rng.integers(1, 4))
            pieces.append(stream.feed(ids[:at], final=at >= len(ids)))
        assert "".join(pieces) == stream.text == tokenizer.decode(ids).strip()


def test_an_incomplete_last_character_is_shown_as_one_replacement():
    stream = TextStream(decode)
    assert stream.feed([104, 105, 0xE6], final=False) == "hi"
    assert stream.feed([104, 105, 0xE6], final=True) == "\ufffd"
    assert stream.text == "hi\ufffd"
