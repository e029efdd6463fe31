"""Records as tables export them, with empty columns, and texts that JSON can spell and UTF-8 cannot."""

import json
import math

import pytest
from PIL import Image

from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.sources import LlavaJson, read_sample

TURNS = [{"from": "human", "value": "What colour is it?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture
def source(tmp_path):
    """Records in, the source out; its images are a.png and b.png."""
    for name in ("a", "b"):
        Image.new("RGB", (64, 48), "red").save(tmp_path / f"{name}.png")

    def made(*records):
        (tmp_path / "r.json").write_text(json.dumps([{"conversations": TURNS} | record for record in records]))
        return LlavaJson(tmp_path / "r.json", tmp_path)

    return made


@pytest.mark.parametrize("nothing", [None, [], "", math.nan])
@pytest.mark.parametrize(("empty", "key"), [("images", "image"), ("image", "images")])
@pytest.mark.parametrize("value", ["a.png", ["a.png", "b.png"]])
def test_an_empty_column_does_not_hide_the_image(source, tokenizer, tiny, nothing, empty, key, value):
    records = source({key: value, empty: nothing}, {key: value}, {empty: nothing}, {empty: nothing, key: nothing})
    count = 1 if value == "a.png" else 2
    found = [read_sample(records, index, tokenizer, tiny, tiny.granularities) for index in range(4)]
    assert [len(sample.images) for sample in found] == [count, count, 0, 0]
    assert found[0].tokens == found[1].tokens


def test_a_video_is_refused_in_one_line(source):
    records = source({"image": "a.png"}, {"video": "a.mp4"})
    with pytest.raises(BadSample, match="record 1 is about a video: only images are read, give") as e:
        _ = records[1]
    assert "\n" not in str(e.value)


def test_image_and_images_must_agree(source):
    records = source({"image": "a.png", "images": ["a.png"]}, {"image": "a.png", "images": ["b.png"]})
    assert len(records[0]["images"]) == 1
    with pytest.raises(BadSample, match=r"record 1: `image` is \['a.png'\], `images` is \['b.png'\]"):
        _ = records[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r'{"id": "x", "conversations": [{"from": "human", "value": "Hello \ud83d"}]}', r"has \\ud83d, half of a"),
        (r'{"id": "\udc80"}', r"has \\udc80, half of a surrogate pair"),
        (r'{"image": "\uDEAD.png"}', r"has \\udead, half of a surrogate pair"),
        (b'{"id": "\xed\xa0\xbd"}', "'utf-8' codec can't decode"),
        (b'{"id": "caf\xe9"}', "'utf-8' codec can't decode"),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_texts_that_are_no_unicode_name_their_record(tmp_path, text, message, ending):
    text = text if isinstance(text, bytes) else text.encode()
    good = json.dumps({"id": "smile 😀", "conversations": TURNS}).encode()  # a whole pair, as \ud83d\ude00
    path = tmp_path / f"r.{ending}"
    path.write_bytes(b"[%b,%b]" % (good, text) if ending == "json" else b"\xef\xbb\xbf%b\n%b\n" % (good, text))
    records = LlavaJson(path)
    assert records[0]["id"] == "smile 😀"
    with pytest.raises(BadSample, match=f"record 1.*{message}") as error:
        _ = records[1]
    assert error.value.reason == "malformed_record" and error.value.detail.encode()
    assert records.id(1) == "1"


def test_two_lists_in_one_file_are_refused(tmp_path):
    """As `cat a.json b.json` leaves them: the second must not be lost."""
    one = json.dumps([{"id": "x"}])
    (tmp_path / "r.json").write_text(f"{one}\n{one}")
    with pytest.raises(ValueError, match=r"r.json is not valid JSON: something follows its list at byte 14"):
        LlavaJson(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(f" {one}\r\n\t ")
    assert len(LlavaJson(tmp_path / "r.json")) == 1


def test_nesting_without_end_is_malformed(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"id": "x"}) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(BadSample, match="malformed_record: record 1: "):
        _ = LlavaJson(tmp_path / "r.jsonl")[1]
    (tmp_path / "r.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="r.json is not valid JSON"):
        LlavaJson(tmp_path / "r.json")


def test_a_null_id_is_the_number(source):
    records = source({"id": None}, {}, {"id": "x"}, {"id": 0})
    assert [records[n]["id"] for n in range(4)] == ["0", "1", "x", "0"] == [records.id(n) for n in range(4)]
