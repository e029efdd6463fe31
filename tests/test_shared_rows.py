"""Samples that share a row: every number is that of a row each, and every record is used once."""

import collections
import dataclasses
import json
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from avg_llava_jax.data.conversation import encode_conversation
from avg_llava_jax.data.images import image_ref
from avg_llava_jax.data.packing import labels_left, load_tiles, make_sample, merge, packed_length, row_shape
from avg_llava_jax.data.pipeline import WINDOW, Batches, PlannedBatches, collate_rows, share_rows
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.models import language
from avg_llava_jax.training import losses, rglf
from avg_llava_jax.training.config import RglfConfig
from tests.test_pipeline import numbers, planned, same

# Text alone, two images of 3 and 5 tiles, several turns, one image under a long text that is cut, a small image.
SIZES = ((), ((40, 20), (30, 30)), (), ((20, 60),), ((16, 16),))
ROWS = (0, 0, 0, 1, 1)
LIMIT = 100


@pytest.fixture(scope="module")
def short(tiny):
    return dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, max_length=LIMIT))


@pytest.fixture(scope="module")
def samples(short, tokenizer):
    draw, made = np.random.default_rng(0), []
    for number, sizes in enumerate(SIZES):
        images = [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
        question = "<image>\n" * len(sizes) + "Who is it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"the {number} one"}]
        if number in (2, 3):
            turns += [{"from": "human", "value": "Why?" * 9 * number}, {"from": "gpt", "value": "No reason."}]
        tokens = encode_conversation(turns, tokenizer, short.template, images=len(sizes))
        made.append(make_sample(str(number), tokens, [image_ref(image) for image in images]))
    finest = short.granularities[-1]
    assert packed_length(made[3], short, finest) > LIMIT and labels_left(made[3], short, finest) > 0
    return made


def collated(config, samples, rows):
    tiles = [load_tiles(sample, config) for sample in samples]
    parts = [[sample for sample, at in zip(samples, rows, strict=True) if at == row] for row in sorted(set(rows))]
    shape = merge(row_shape(part, config) for part in parts)
    return collate_rows(samples, tiles, shape, config, config.granularities, rows=rows)


@pytest.mark.parametrize("execution", ["per_length", "vmap"])
def test_losses_and_gradients_are_those_of_a_row_each(short, params, samples, execution):
    """Phase one at each granularity, and RGLF with its router, whose images read the text of their own sample alone."""

    @jax.jit
    def both(params, batch):
        def phase_one(params):
            return losses.language_loss(short, params, batch, short.granularities)

        def router(router):
            given = RglfConfig(execution=execution)
            return rglf.batch_loss(short, {**params, "router": router}, batch, None, given)

        routed = jax.value_and_grad(router, has_aux=True)(params["router"])
        return (routed, jax.value_and_grad(phase_one, has_aux=True)(params)) if execution == "per_length" else (routed,)

    shared, alone = collated(short, samples, ROWS), collated(short, samples, range(len(samples)))
    assert len(shared["text"]) == 2 and "text_sample" in shared and "text_sample" not in alone
    assert int(shared["length"][16].sum()) == int(alone["length"][16].sum())
    with jax.default_matmul_precision("highest"):
        for one, other in zip(both(params, shared), both(params, alone), strict=True):
            np.testing.assert_allclose(one[0][0], other[0][0], rtol=1e-5)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), one[0][1], other[0][1])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one[1], other[1])
            assert any(leaf.any() for leaf in jax.tree.leaves(one[1]))


def test_positions_start_anew_with_each_sample():
    segments, positions = language.split(jnp.array([[3, 0, 2]]), jnp.arange(6)[None])
    assert segments.tolist() == [[0, 0, 0, 2, 2, 3]] and positions.tolist() == [[0, 1, 2, 0, 1, 0]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3000)), min_size=1, max_size=60), st.integers(1, 20))
def test_rows_share_out_every_sample_once(loads, count):
    loads = np.array(loads)
    rows = share_rows(loads, count)
    assert sorted(list(chain(*rows))) == list(range(len(loads))) and len(rows) == count
    assert sum(map(bool, rows)) == min(count, len(loads)) and all(row == sorted(row) for row in rows)
    rows = share_rows(loads[:, 1:], count)  # one kind alone: no row is fuller than the mean by more than a sample
    assert max(loads[row, 1].sum() for row in rows) <= loads[:, 1].sum() / count + loads[:, 1].max()
    assert share_rows(np.array([[5], [4], [3], [3], [1]]), 2) == [[0, 3], [1, 2, 4]]


def test_every_record_once_an_epoch_and_processes_share_out_the_rows(llava_folder, tokenizer, tiny):
    batches = planned(llava_folder, tokenizer, tiny, batch_size=6, pack=3)
    parts = [dataclasses.replace(batches, rows=(row,)) for row in (0, 1)]
    seen, count = collections.Counter(), 24 * WINDOW // np.gcd(24, 6 * WINDOW)
    for number in range(count):
        whole = batches[number]
        seen.update(numbers(whole))
        if number % 9 == 0:
            pieces = [part[number] for part in parts]
            assert list(chain(*(piece["records"] for piece in pieces))) == whole["records"]
            np.testing.assert_array_equal(np.concatenate([piece["text"] for piece in pieces]), whole["text"])
    assert set(seen) == set(range(24)) and len(set(seen.values())) == 1
    once = planned(llava_folder, tokenizer, tiny, batch_size=6, pack=3, single_epoch=True)
    assert sorted(chain(*(numbers(once[number]) for number in range(len(once))))) == list(range(24))


def test_resume_within_an_epoch(llava_folder, tokenizer, tiny):
    source = planned(llava_folder, tokenizer, tiny, pack=2)
    first, second = Batches(source), Batches(planned(llava_folder, tokenizer, tiny, pack=2))
    for _ in range(3):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    for _ in range(3):
        same(next(first), next(second))
    first.close()
    second.close()


def test_the_survey_of_few_records_shares_rows_as_batches_do(llava_folder, tokenizer, tiny):
    """24 records are fewer than the survey would read: its rows hold two each all the same, and batches fit them."""
    batches = planned(llava_folder, tokenizer, tiny, pack=2, shapes=2)
    assert max(rung.samples for rung in batches.ladder) > 1
    assert sum(batches.batch_shape(number) in batches.ladder for number in range(WINDOW)) > WINDOW // 2


@pytest.mark.parametrize("pack", [1, 2])
def test_a_window_without_a_usable_record(llava_folder, tokenizer, tiny, pack):
    """The last of 33 held-out records is alone in its window, and its image is missing."""
    records = json.loads((llava_folder / "train.json").read_text(encoding="utf-8"))
    good = next(record for record in records if isinstance(record.get("image"), str))
    rows = [good | {"id": str(number)} for number in range(32)] + [good | {"id": "32", "image": "nowhere.png"}]
    (llava_folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    parts = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"))
    batches = PlannedBatches(parts, tokenizer, tiny, tiny.granularities, 2, single_epoch=True, pack=pack)
    skipped = [one.reason for number in range(len(batches)) for one in batches[number]["skipped"]]
    assert skipped == ["missing_image"]


def test_a_sample_larger_than_any_row_gets_a_wider_one(llava_folder, tokenizer, tiny, monkeypatch):
    """The survey sees no record with two images. A damaged image leaves its place in the row empty."""
    (llava_folder / "images" / "4-0.png").write_bytes((llava_folder / "images" / "4-0.png").read_bytes()[:-30])
    parts = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"))
    batches = PlannedBatches(parts, tokenizer, tiny, tiny.granularities, batch_size=4, pack=2, shapes=2)
    first = [member for member in batches.first(24) if len(member.sample.sizes) < 2]
    monkeypatch.setattr(PlannedBatches, "first", lambda self, count: iter(first))
    found = [batches[number] for number in range(WINDOW)]
    assert {batch["pixels"].shape[1] for batch in found} - {rung.tiles for rung in batches.ladder}
    assert {one.id for batch in found for one in batch["skipped"]} == {"r4"}
    for batch in found:
        used = (batch["length"][16] > 0).sum() if batch["length"][16].ndim == 2 else len(batch["length"][16])
        assert used == sum(map(bool, batch["records"]))
