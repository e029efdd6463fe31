"""Batches against a packer that walks through a sample token by token."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.config import LanguageConfig, ModelConfig, ScalerConfig, VisionConfig
from avg_llava_jax.data.conversation import IGNORE, IMAGE, Tokens
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.geometry import visual_index
from avg_llava_jax.data.images import image_ref
from avg_llava_jax.data.packing import (
    Sample,
    Shape,
    check_labels,
    collate,
    labels_left,
    load_tiles,
    make_sample,
    merge,
    packed_length,
    prompt_index,
    row_shape,
    shape_of,
)
from avg_llava_jax.data.tiles import make_tiles, tile_count

GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=4),
    scaler=ScalerConfig(halvings=4),
    pinpoints=((16, 32), (32, 16), (32, 32), (48, 16)),
    language=LanguageConfig(max_length=200),
)


def with_limit(limit, config=CONFIG):
    return dataclasses.replace(config, language=dataclasses.replace(config.language, max_length=limit))


def image(width, height):
    values = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image_ref(Image.fromarray(values))


def sample(*parts, name="s"):
    """Parts: a size for an image, a positive int for a prompt token, a negative one for an answer token."""
    ids, labels, images = [], [], []
    for part in parts:
        if isinstance(part, tuple):
            images.append(image(*part))
        ids.append(IMAGE if isinstance(part, tuple) else abs(part))
        labels.append(-part if not isinstance(part, tuple) and part < 0 else IGNORE)
    return make_sample(name, Tokens(ids, labels), images)


SAMPLES = [
    sample(1, 5, (40, 20), 6, 7, -8, -2, name="one image"),
    sample(1, 5, 6, -7, -2, 9, -3, -2, name="text only"),
    sample(1, (20, 40), 6, (30, 31), 7, -8, -2, name="two images"),
    sample((33, 9), (5, 50), -8, -2, name="neighbours, nothing before"),
    sample(1, 6, -7, -2, 8, (20, 20), -5, -2, (1, 1), 9, -4, name="images between turns, answer after an image"),
]


def walk(sample, config, choice):
    """What stands at each packed position, as (kind, ...) tuples, and the targets' positions."""
    limit, packed, targets, images, text = config.language.max_length, [], [], 0, 0
    for token, label in zip(sample.tokens.ids, sample.tokens.labels, strict=True):
        if token == IMAGE:
            index = visual_index(sample.sizes[images], config, choice[images])
            if len(packed) + len(index) > limit:
                break
            first = sum(tile_count(size, config) for size in sample.sizes[:images])
            for row in index.tolist():
                tile, rest = divmod(row, config.pyramid_rows)
                packed.append(("newline",) if row < 0 else ("visual", first + tile, rest))
            images += 1
        else:
            if len(packed) + 1 > limit:
                break
            if label != IGNORE:
                targets.append(len(packed) - 1)
            packed.append(("text", text, token))
            text += 1
    return packed, targets


def read(row, shape, config, text):
    """The same from one row of `index`."""
    out = []
    for at in row.tolist():
        if at < shape.text:
            out.append(("text", at, int(text[at])))
        elif at == shape.text + shape.tiles * config.pyramid_rows:
            out.append(("newline",))
        else:
            out.append(("visual", *divmod(at - shape.text, config.pyramid_rows)))
    return out


@pytest.mark.parametrize("unpad", ["exact", "released"])
@pytest.mark.parametrize("limit", [200, 97, 60, 40, 20, 5, 3, 1])
def test_a_mixed_batch_matches_the_walk(limit, unpad):
    config = with_limit(limit, dataclasses.replace(CONFIG, unpad=unpad))
    shape = merge(shape_of(s, config) for s in SAMPLES)
    batch = collate(SAMPLES, shape, config)
    for b, s in enumerate(SAMPLES):
        labels = [label for token, label in zip(s.tokens.ids, s.tokens.labels, strict=True) if token != IMAGE]
        answers = [label for label in labels[:limit] if label != IGNORE]
        for g in config.granularities:
            packed, targets = walk(s, config, [g] * len(s.sizes))
            length = batch["length"][g][b]
            assert length == len(packed) <= limit
            assert read(batch["index"][g][b][:length], shape, config, batch["text"][b]) == packed
            assert not batch["index"][g][b][length:].any()
            at = batch["target_at"][g][b]
            expected = [t if t >= 0 else -1 for t in targets]
            assert at[: len(expected)].tolist() == expected
            assert (at[len(expected) :] == -1).all()
            for position, target in zip(at.tolist(), batch["targets"][b].tolist(), strict=True):
                if position >= 0:
                    assert packed[position + 1][0] == "text" and packed[position + 1][2] == target
            assert labels_left(s, config, g) == sum(t >= 0 for t in targets)
        assert batch["targets"][b].tolist() == answers + [0] * (shape.answer - len(answers))


def test_the_rest_of_a_batch():
    shape = merge(shape_of(s, CONFIG) for s in SAMPLES)
    batch = collate(SAMPLES, shape, CONFIG)
    for b, s in enumerate(SAMPLES):
        text = [token for token in s.tokens.ids if token != IMAGE]
        labels = [label for token, label in zip(s.tokens.ids, s.tokens.labels, strict=True) if token != IMAGE]
        assert batch["text"][b].tolist() == text + [0] * (shape.text - len(text))
        assert batch["instruction"][b].tolist() == [label == IGNORE for label in labels] + [False] * (
            shape.text - len(text)
        )
        slot = 0
        for ordinal, (ref, size) in enumerate(zip(s.images, s.sizes, strict=True)):
            count = tile_count(size, CONFIG)
            assert batch["first_tile"][b, ordinal] == slot
            assert (batch["tile_image"][b, slot : slot + count] == ordinal).all()
            np.testing.assert_array_equal(batch["pixels"][b, slot : slot + count], make_tiles(ref.load(), CONFIG))
            slot += count
        assert (batch["first_tile"][b, len(s.sizes) :] == -1).all()
        assert (batch["tile_image"][b, slot:] == -1).all() and not batch["pixels"][b, slot:].any()
    integers = [batch["tile_image"], batch["first_tile"], batch["text"], batch["targets"]]
    for name in ("index", "length", "target_at"):
        assert tuple(batch[name]) == CONFIG.granularities
        integers += batch[name].values()
    assert all(array.dtype == np.int32 for array in integers)
    assert batch["pixels"].dtype == np.uint8 and batch["instruction"].dtype == bool


def test_a_batch_is_what_each_sample_is_alone():
    shape = merge(shape_of(s, CONFIG) for s in SAMPLES)
    together = collate(SAMPLES, shape, CONFIG)
    for b, s in enumerate(SAMPLES):
        alone = collate([s], shape, CONFIG, tiles=[load_tiles(s, CONFIG)])
        for name, value in alone.items():
            for one, all_ in (
                [(value[g], together[name][g]) for g in value] if isinstance(value, dict) else [(value, together[name])]
            ):
                np.testing.assert_array_equal(one[0], all_[b])


def test_the_example_of_the_docstring():
    config = ModelConfig(
        vision=VisionConfig(image_size=28, patch_size=14), scaler=ScalerConfig(halvings=2), pinpoints=((28, 28),)
    )
    assert config.pyramid_offsets == {1: 0, 2: 1, 4: 3}
    batch = collate([sample(7, 8, (28, 28), 9, -5, -2)], Shape(2, 1, 6, 2, 1.0), config, (1, 4))
    assert batch["index"][1][0, :8].tolist() == [0, 1, 6, 13, 20, 2, 3, 4]
    assert batch["index"][4][0, :15].tolist() == [0, 1, 9, 10, 11, 12, 16, 17, 20, 18, 19, 20, 2, 3, 4]
    assert batch["target_at"][1].tolist() == [[5, 6]] and batch["target_at"][4].tolist() == [[12, 13]]
    assert batch["length"][1] == 8 and batch["length"][4] == 15
    assert tuple(batch["index"]) == (1, 4)


def test_a_prompt_with_a_granularity_for_each_image():
    s = sample(1, (20, 40), 6, (30, 31), 7)
    shape = shape_of(s, CONFIG)
    for choice in [(1, 16), (16, 1), (4, 4), (2, 8)]:
        index, length = prompt_index(s, shape, CONFIG, choice)
        packed, _ = walk(s, CONFIG, choice)
        assert index.shape == (shape.length(CONFIG, max(choice)),) and index.dtype == np.int32
        text = [token for token in s.tokens.ids if token != IMAGE] + [0] * shape.text
        assert read(index[:length], shape, CONFIG, text) == packed
    same = collate([s], shape, CONFIG)
    np.testing.assert_array_equal(prompt_index(s, shape, CONFIG, (4, 4))[0], same["index"][4][0])
    assert prompt_index(s, shape, CONFIG, (4, 4))[1] == same["length"][4][0]


def test_a_prompt_of_text_alone():
    s = sample(1, 5, 6)
    shape = shape_of(s, CONFIG)
    index, length = prompt_index(s, shape, CONFIG, ())
    assert length == 3 and index[:3].tolist() == [0, 1, 2] and shape.fill == 0
    assert len(index) == shape.length(CONFIG, 16) == shape.text


def test_a_prompt_is_never_cut():
    s = sample(1, (32, 32), 6, (32, 32), 7)
    config = with_limit(120)
    shape = shape_of(s, config)
    assert prompt_index(s, shape, config, (4, 4))[1] == packed_length(s, config, 4)
    with pytest.raises(ValueError, match=r"takes \d+ tokens at granularities \[16, 16\], max_length is 120"):
        prompt_index(s, shape, config, (16, 16))
    with pytest.raises(ValueError, match="1 granularities for 2 images"):
        prompt_index(s, shape, config, (16,))


def test_no_label_left_after_truncation():
    s = sample(1, (32, 32), 6, -7, -2)
    check_labels(s, CONFIG, CONFIG.granularities)
    config = with_limit(packed_length(s, CONFIG, 16) - 2)
    check_labels(s, config, (1, 8))
    with pytest.raises(BadSample, match="granularity 16") as error:
        check_labels(s, config, CONFIG.granularities)
    assert error.value.reason == "no_label_left"


def test_shapes_hold_their_samples_and_are_few():
    rng = np.random.default_rng(0)
    config = ModelConfig()
    shapes = set()
    for _ in range(400):
        size = (int(rng.integers(1, 3000)), int(rng.integers(1, 3000)))
        words, answers = int(rng.integers(1, 500)), int(rng.integers(1, 12))
        with_image = rng.random() < 0.8
        ids = [5] * words + [6] * answers
        tokens = Tokens([IMAGE] * with_image + ids, [IGNORE] * (with_image + words) + [6] * answers)
        images = (image_ref(b""),) if with_image else ()
        s = Sample("s", tokens, (size,) * with_image, images)
        shape = shape_of(s, config)
        shapes.add(shape)
        for g in config.granularities:
            assert shape.length(config, g) >= min(packed_length(s, config, g), config.language.max_length)
        assert shape.text >= words + answers and shape.answer >= answers
    assert len(shapes) <= 120


def test_merge_holds_both():
    merged = merge([Shape(3, 1, 16, 16, 0.6), Shape(5, 2, 64, 8, 0.0)])
    assert merged == Shape(5, 2, 64, 16, 0.6)


def test_no_shape_is_longer_than_the_limit():
    for limit in (5, 20, 100):
        config = with_limit(limit)
        for s in SAMPLES:
            shape = shape_of(s, config)
            assert shape.text <= limit
            assert all(shape.length(config, g) <= limit for g in config.granularities)


@pytest.mark.parametrize(
    "shape, what",
    [
        (Shape(2, 2, 16, 16, 1.0), "tiles"),
        (Shape(16, 1, 16, 16, 1.0), "images"),
        (Shape(16, 2, 2, 16, 1.0), "text tokens"),
        (Shape(16, 2, 16, 1, 1.0), "answer tokens"),
        (Shape(16, 2, 16, 16, 0.0), "packed tokens"),
    ],
)
def test_a_shape_that_is_too_small_is_an_error(shape, what):
    with pytest.raises(ValueError, match=f"sample two images has .* {what}"):
        collate(SAMPLES[2:3], shape, CONFIG)


def test_placeholders_and_images_must_agree():
    with pytest.raises(BadSample) as error:
        Sample("a", Tokens([1, IMAGE], [IGNORE, IGNORE]))
    assert error.value.reason == "image_count"


def test_an_image_that_is_not_what_its_header_said():
    s = dataclasses.replace(sample(1, (20, 20)), sizes=((21, 20),))
    with pytest.raises(BadSample) as error:
        load_tiles(s, CONFIG)
    assert error.value.reason == "corrupt_image"


def test_packed_lengths_match_the_measured_ones():
    config = dataclasses.replace(ModelConfig(), unpad="released")
    for case in json.loads((GOLDEN / "index.json").read_text()):
        arrays = np.load(GOLDEN / case["file"])
        ids = arrays["input_ids"].tolist()
        s = make_sample(case["file"], Tokens(ids, [IGNORE] * len(ids)), [image_ref(GOLDEN / case["image"])])
        for g in config.granularities:
            assert packed_length(s, config, g) == case["seq_len"][str(g)]
            assert prompt_index(s, shape_of(s, config), config, [g])[1] == case["seq_len"][str(g)]


def test_close_shapes_hold_their_sample_with_little_room():
    """Never wider than `shape_of`, and the batch is the same but for its padding."""
    for s in SAMPLES:
        close, wide = row_shape([s], CONFIG), shape_of(s, CONFIG)
        assert all(getattr(close, name) <= getattr(wide, name) for name in ("tiles", "images", "text", "answer"))
        text = len(s.tokens.ids) - len(s.sizes)
        assert text <= close.text <= max(16, text * 9 / 8 + 1)
        narrow, broad = collate([s], close, CONFIG), collate([s], wide, CONFIG)
        for g in CONFIG.granularities:
            assert narrow["length"][g] == broad["length"][g] <= close.length(CONFIG, g) <= wide.length(CONFIG, g)
            kept = narrow["target_at"][g].shape[1]
            np.testing.assert_array_equal(narrow["target_at"][g], broad["target_at"][g][:, :kept])
