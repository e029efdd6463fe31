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


def test_image_and_images_must_agree(source):
    records = source({"image": "a.png", "images": ["a.png"]}, {"image": "a.png", "images": ["b.png"]})
    assert len(records[0]["images"]) == 1
    with pytest.raises(BadSample, match=r"record 1: `image` is \['a.png'\], `images` is \['b.png'\]"):
        _ = records[1]


def test_a_null_id_is_the_number(source):
    records = source({"id": None}, {}, {"id": "x"}, {"id": 0})
    assert [records[n]["id"] for n in range(4)] == ["0", "1", "x", "0"] == [records.id(n) for n in range(4)]
