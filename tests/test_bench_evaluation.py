"""The program that measures evaluation: the ways to answer say the same."""

import json

from tests.test_launch import folder, run  # noqa: F401 (a fixture)


def test_every_way_answers_the_same(folder, tmp_path):  # noqa: F811
    output = tmp_path / "speed.json"
    flags = ("--questions=6", "--images=2", "--one_at_a_time=2", "--slots=4", f"--output={output}")
    code, said, error = run("bench.evaluation", f"--checkpoint={folder}", *flags)
    assert code == 0, error
    report = json.loads(output.read_text())
    asked = {name: way["questions"] for name, way in report["ways"].items()}
    assert asked == {"together": report["questions"], "one at a time": 2}
    assert report["questions"] > 3
    for name, way in report["ways"].items():
        assert way["differing"] == [] and way["compilations"] == 0 and name in said
