"""Pieces of text, by a decoder over bytes: a token is a byte."""

import pytest

from avg_llava_jax.inference.text_stream import TextStream


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


def test_an_incomplete_last_character_is_shown_as_one_replacement():
    stream = TextStream(decode)
    assert stream.feed([104, 105, 0xE6], final=False) == "hi"
    assert stream.feed([104, 105, 0xE6], final=True) == "\ufffd"
    assert stream.text == "hi\ufffd"
