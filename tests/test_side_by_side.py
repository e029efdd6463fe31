"""The table of two checkouts."""

import json
import pathlib

import pytest
from absl import flags

from launch.bench import side_by_side

ROOT = pathlib.Path(__file__).parents[1]
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def test_the_table_has_medians_and_ratios_and_what_one_of_them_lacks():
    old = [{"answer, first: seconds": seconds} for seconds in (9.0, 4.0, 5.0)]
    new = [{"answer, first: seconds": 2.0, "accuracy above": -0.25}] * 3
    lines = side_by_side.table({"answer": {"old": old, "new": new}}).splitlines()
    assert lines[2:] == ["| answer, first: seconds | 5 | 2 | 0.40 |", "| accuracy above | – | -0.25 | – |"]


def test_a_checkout_runs_its_own_modules(tmp_path):
    """Also one whose benchmarks are not in a folder of their own; what fails is said."""
    (tmp_path / "launch").mkdir()
    for name in ("answer", "bench_train"):
        (tmp_path / "launch" / f"{name}.py").write_text("import os\nassert 'JAX_X' not in os.environ\nexit(3)")
    before, now = (side_by_side.Checkout(folder, tmp_path / "cache") for folder in (tmp_path, ROOT))
    assert before.command("bench.train")[-1] == "launch.bench_train"
    assert now.command("bench.train", cores=2)[-1] == "launch.bench.train"
    assert now.command("bench.train", cores=2)[:3] == ["taskset", "--cpu-list", "0-1"]
    with pytest.raises(RuntimeError, match=r"launch.answer exits with 3"):
        before.seconds("answer")
    with pytest.raises(ValueError, match="no checkout of this project"):
        side_by_side.Checkout(tmp_path / "launch", tmp_path)


def test_pictures_with_ten_questions_each(tmp_path):
    records = json.loads(side_by_side.shapes_and_colours(tmp_path, 3).read_text())
    assert len(records) == 3 and all((tmp_path / record["image"]).is_file() for record in records)
    for record in records:
        turns = record["conversations"]
        assert len(turns) == 20 and turns[0]["value"].startswith("<image>")
        said = {question["value"]: reply["value"] for question, reply in zip(turns[::2], turns[1::2], strict=True)}
        assert said["Does the image contain a " + turns[1]["value"] + "?"] == "yes"
