"""Sources and batches: what is read, in which order, by whom, and what becomes of bad records."""

import collections
import dataclasses
import json
import tarfile
import zipfile

import numpy as np
import pytest

from avg_llava_jax.data import pipeline
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.packing import Shape, merge
from avg_llava_jax.data.pipeline import WINDOW, Batches, PlannedBatches, choose_shapes, saving
from avg_llava_jax.data.sources import LlavaJson, open_source, open_sources, read_sample
from avg_llava_jax.training.metrics import SkippedLog, read_rows


def planned(folder, tokenizer, config, path=None, batch_size=4, **settings):
    parts = open_sources(path or str(folder / "train.json"), str(folder / "images"))
    return PlannedBatches(parts, tokenizer, config, config.granularities, batch_size, **settings)


def numbers(batch):
    """The number of each row's record in its file, without the empty rows."""
    return [int(record.rpartition("#")[2]) for record in batch["records"] if record]


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], dict):
            same(one[key], other[key])
        else:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_json_and_jsonl_give_the_same_records(llava_folder):
    records = json.loads((llava_folder / "train.json").read_text(encoding="utf-8"))
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    (llava_folder / "train.jsonl").write_text(lines, encoding="utf-8")
    (llava_folder / "bom.json").write_bytes(b"\xef\xbb\xbf" + (llava_folder / "train.json").read_bytes())
    sources = [
        LlavaJson(llava_folder / name, llava_folder / "images") for name in ("train.json", "train.jsonl", "bom.json")
    ]
    assert [len(source) for source in sources] == [24] * 3
    for index, record in enumerate(records):
        for source in sources:
            assert source[index]["conversations"] == record["conversations"]
            assert source[index]["id"] == record["id"]
            assert len(source[index]["images"]) == index % 3


def test_images_from_zip_and_tar_are_those_of_the_folder(llava_folder, tokenizer, tiny):
    with zipfile.ZipFile(llava_folder / "images.zip", "w") as archive:
        for file in (llava_folder / "images").iterdir():
            archive.write(file, file.name)
    with tarfile.open(llava_folder / "images.tar", "w") as archive:
        archive.add(llava_folder / "images", ".")
    want = planned(llava_folder, tokenizer, tiny)[0]
    for name in ("images.zip", "images.tar"):
        parts = open_sources(str(llava_folder / "train.json"), str(llava_folder / name))
        same(want, PlannedBatches(parts, tokenizer, tiny, tiny.granularities, 4)[0])


def test_jersey_is_a_source_by_name():
    source = open_source("jersey?split=router&turns=2&near=1&paired=true&size=7")
    assert (source.split, source.turns, source.near, source.paired, len(source)) == ("router", 2, 1.0, True, 7)
    with pytest.raises(ValueError, match="no field 'colour'"):
        open_source("jersey?colour=red")
    with pytest.raises(ValueError, match="is not of type int"):
        open_source("jersey?turns=many")


def test_records_are_read_once_while_they_are_remembered(llava_folder, tokenizer, tiny, monkeypatch):
    """Three epochs of 24 records; with no room for them all, each is read again and the batches are the same."""
    batches, read = planned(llava_folder, tokenizer, tiny), collections.Counter()

    def counted(source, index, *others):
        read[index] += 1
        return read_sample(source, index, *others)

    monkeypatch.setattr(pipeline, "read_sample", counted)
    found = [batches[number] for number in range(18)]
    assert set(read.values()) == {1} and len(read) == 24
    monkeypatch.setattr(pipeline, "REMEMBERED", 5)
    again = planned(llava_folder, tokenizer, tiny)
    for number, batch in enumerate(found):
        same(batch, again[number])
    assert min(read.values()) > 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1}', "not a JSON list"),
        ('[{"id": 1}', "expecting ',' or '\\]'"),
        ('[{"id": }]', "not valid JSON"),
        ("[]", "no records"),
    ],
)
def test_files_that_are_no_data_set(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        LlavaJson(tmp_path / "a.json")


def test_paths_that_make_no_sense(llava_folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        open_sources("nowhere.json")
    with pytest.raises(ValueError, match="names 2 places for the 1 paths"):
        open_sources("jersey", "a, b")
    with pytest.raises(ValueError, match="greater than 0"):
        open_sources("0*jersey")
    text_and_images = LlavaJson(llava_folder / "train.json")
    assert text_and_images[0]["images"] == []
    with pytest.raises(ValueError, match=r"data\.images"):
        _ = text_and_images[1]


def test_every_record_once_an_epoch(llava_folder, tokenizer, tiny):
    batches = planned(llava_folder, tokenizer, tiny, batch_size=3)
    count = 24 * WINDOW // np.gcd(24, 3 * WINDOW)  # batches until windows and epochs end together
    seen = collections.Counter(at for number in range(count) for at in numbers(batches[number]))
    assert set(seen) == set(range(24))
    assert len(set(seen.values())) == 1


def test_batches_follow_from_seed_and_number(llava_folder, tokenizer, tiny):
    one, again, other = (planned(llava_folder, tokenizer, tiny, seed=seed) for seed in (5, 5, 6))
    for number in (40, 3, 17):
        same(one[number], again[number])
    assert [one[n]["records"] for n in range(4)] != [other[n]["records"] for n in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_by_state_whatever_the_workers(llava_folder, tokenizer, tiny, workers):
    source = planned(llava_folder, tokenizer, tiny)
    first = Batches(source)
    for _ in range(3):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    want = [next(first) for _ in range(3)]
    first.close()
    second = Batches(source, workers)
    next(second)
    second.set_state(state)
    for batch in want:
        same(batch, next(second))
    assert second.get_state() == first.get_state()
    second.close()


def test_processes_share_out_the_rows(llava_folder, tokenizer, tiny):
    whole = planned(llava_folder, tokenizer, tiny, batch_size=6)
    rows = [(0, 3), (1, 2), (4, 5)]
    parts = [planned(llava_folder, tokenizer, tiny, batch_size=6, rows=part) for part in rows]
    for number in range(5):
        pieces = [part[number] for part in parts]
        for part, piece in zip(rows, pieces, strict=True):
            assert piece["records"] == [whole[number]["records"][row] for row in part]
            np.testing.assert_array_equal(piece["text"], whole[number]["text"][list(part)])


def test_mixture_follows_the_weights(llava_folder, tokenizer, tiny):
    path = f"1*{llava_folder / 'train.json'}, 3*jersey?turns=1"
    batches = planned(llava_folder, tokenizer, tiny, path=path, batch_size=4)
    records = [record for number in range(2 * WINDOW) for record in batches[number]["records"]]
    assert sum(record.startswith(str(llava_folder)) for record in records) == len(records) // 4


def test_batches_come_in_few_shapes(llava_folder, tokenizer, tiny):
    for limit in (1, 3):
        batches = planned(llava_folder, tokenizer, tiny, shapes=limit)
        shapes = {
            (b["pixels"].shape, b["text"].shape, b["index"][16].shape) for b in map(batches.__getitem__, range(32))
        }
        assert len(batches.ladder) <= limit
        assert len(shapes) <= limit


@pytest.mark.parametrize("pack", [1, 2])
def test_the_shapes_of_coming_batches_are_known_before_them(llava_folder, tokenizer, tiny, pack):
    """From batch 2 to the end of its window, each once and in order, with all arrays of a batch."""
    batches = planned(llava_folder, tokenizer, tiny, pack=pack)

    def shapes(batch):
        return str({key: np.shape(value) if not isinstance(value, dict) else shapes(value)
                    for key, value in batch.items() if key not in ("records", "skipped")})  # fmt: skip

    upcoming = [shapes(batch) for batch in batches.upcoming(2, 1000)]
    assert upcoming == list(dict.fromkeys(shapes(batches[number]) for number in range(2, WINDOW)))
    assert len(upcoming) > 1 and [shapes(batch) for batch in batches.upcoming(2, 1)] == upcoming[:1]


def test_shapes_are_chosen_to_hold_all_found(tiny):
    found = {Shape(t, 1, length, length, 1.0): 10 * t for t in (1, 2, 3) for length in (16, 64)}
    ladder = choose_shapes(found, 3, 0.02, tiny, tiny.granularities)
    assert len(ladder) == 3
    assert ladder[-1] == merge(found)
    assert all(any(merge([rung, shape]) == rung for rung in ladder) for shape in found)
    assert choose_shapes(found, 99, 0.02, tiny, tiny.granularities)[-1] == merge(found)


def test_shapes_that_save_little_are_not_kept(tiny):
    """Texts of 1000 and 1001 share a shape, however many shapes are allowed; texts of 100 have their own."""
    near = {Shape(1, 1, length, 16, 1.0): 10 for length in (1000, 1001)}
    assert choose_shapes(near, 6, 0.02, tiny, tiny.granularities) == (merge(near),)
    found = near | {Shape(1, 1, 100, 16, 1.0): 10}
    assert [shape.text for shape in choose_shapes(found, 6, 0.02, tiny, tiny.granularities)] == [100, 1001]


def test_short_runs_have_few_shapes(tiny):
    """Texts of 100 save a quarter of the work: a shape of their own pays over 100 steps, but not over 50."""
    found = {Shape(1, 1, length, 16, 1.0): 10 for length in (100, 1001)}
    ladders = [choose_shapes(found, 6, saving(steps), tiny, tiny.granularities) for steps in (50, 100)]
    assert [len(ladder) for ladder in ladders] == [1, 2]


def test_visual_tokens_are_counted(llava_folder, tokenizer, tiny):
    """Packed length = text + visual tokens, at each granularity."""
    batch = planned(llava_folder, tokenizer, tiny)[0]
    text = [batch["length"][g] - batch["visual"][:, :, at].sum(1) for at, g in enumerate(tiny.granularities)]
    np.testing.assert_array_equal(text[0], text[1])
    np.testing.assert_array_equal(text[0], text[2])


@pytest.fixture
def damaged_folder(llava_folder):
    """Six records of the 24 are bad, each in its own way."""
    records = json.loads((llava_folder / "train.json").read_text(encoding="utf-8"))
    (llava_folder / "images" / "1-0.png").unlink()
    whole = (llava_folder / "images" / "4-0.png").read_bytes()
    (llava_folder / "images" / "4-0.png").write_bytes(whole[:-30])  # its header is fine
    records[7]["conversations"][1]["value"] = " "
    records[10]["conversations"][0]["from"] = "tool"
    records[13]["image"] = ["13-0.png", "13-0.png"]
    records[15]["conversations"] = records[15]["conversations"][:1]
    (llava_folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return llava_folder


REASONS = {
    "r1": "missing_image",
    "r4": "corrupt_image",
    "r7": "empty_answer",
    "r10": "unknown_role",
    "r13": "image_count",
    "r15": "ends_on_human",
}


def test_bad_records_are_left_out_and_written_down(damaged_folder, tokenizer, tiny, tmp_path):
    batches = planned(damaged_folder, tokenizer, tiny, batch_size=4)
    (tmp_path / "run").mkdir()
    logs = [SkippedLog(tmp_path / "run", max_share=0.5)]
    for number in range(2 * WINDOW):
        if number == WINDOW:  # a run that is resumed
            logs[0].close()
            logs.append(SkippedLog(tmp_path / "run", max_share=0.5))
        batch = batches[number]
        assert not {int(name[1:]) for name in REASONS} & set(numbers(batch))
        empty = np.array([not record for record in batch["records"]])
        assert (batch["first_tile"][empty] == -1).all()
        assert all((batch["target_at"][g][empty] == -1).all() for g in tiny.granularities)
        logs[-1].add(sum(map(bool, batch["records"])), batch["skipped"])
    logs[-1].close()
    rows = read_rows(tmp_path / "run" / "skipped.jsonl")
    assert {row["id"]: row["reason"] for row in rows} == REASONS
    assert len(rows) == len(REASONS)
    assert all(row["detail"] and row["record"].endswith(row["id"].replace("r", "#")) for row in rows)
    assert logs[-1].reasons == collections.Counter(REASONS.values())


def test_too_many_bad_records_stop_a_run(damaged_folder, tokenizer, tiny, tmp_path):
    (tmp_path / "run").mkdir()
    log = SkippedLog(tmp_path / "run", max_share=0.1)
    batches = planned(damaged_folder, tokenizer, tiny)
    with pytest.raises(RuntimeError, match=r"max_skipped_share=0\.1 .* 1 missing_image"):
        for number in range(99):
            log.add(4, batches[number]["skipped"])
    log.close()


def test_a_share_below_the_bound_stops_no_run(damaged_folder, tokenizer, tiny, tmp_path):
    """What a window left out comes with all of its batches, not with the first; each process reports its part."""
    (tmp_path / "run").mkdir()
    log = SkippedLog(tmp_path / "run", max_share=0.5)
    whole = planned(damaged_folder, tokenizer, tiny, batch_size=16)
    for number in range(8):  # of a window of 16
        batch = whole[number]
        log.add(sum(map(bool, batch["records"])), batch["skipped"])
    log.close()
    halves = [dataclasses.replace(whole, rows=tuple(range(start, 16, 2))) for start in (0, 1)]
    reported = [one for half in halves for one in half[0]["skipped"]]
    assert collections.Counter(reported) == collections.Counter(whole[0]["skipped"])


def test_large_images_are_bad(llava_folder, tokenizer, tiny):
    (part,) = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"), max_pixels=500)
    with pytest.raises(BadSample, match="too_large_image"):
        read_sample(part.source, 1, tokenizer, tiny, tiny.granularities)


def test_a_sample_that_truncation_leaves_no_label_is_bad(llava_folder, tokenizer, tiny):
    short = dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, max_length=60))
    (part,) = open_sources(str(llava_folder / "train.json"), str(llava_folder / "images"))
    read_sample(part.source, 2, tokenizer, short, (4,))
    with pytest.raises(BadSample, match="no_label_left"):
        read_sample(part.source, 2, tokenizer, short, (4, 16))


def test_records_larger_than_all_of_the_survey_share_wide_shapes(llava_folder, tokenizer, tiny, monkeypatch):
    """The survey sees no record with two images: those come in powers of two, not each in a shape of its own."""
    batches = planned(llava_folder, tokenizer, tiny, batch_size=2, shapes=2)
    first = [member for member in batches.first(24) if len(member.sample.sizes) < 2]
    monkeypatch.setattr(PlannedBatches, "first", lambda self, count: iter(first))
    found = {(batch["tile_image"].shape[1], batch["text"].shape[1]) for batch in map(batches.__getitem__, range(24))}
    known = {(rung.tiles, rung.text) for rung in batches.ladder}
    assert batches.ladder[-1].tiles == 3 and found - known and found - known <= {(8, 32), (8, 64)}
