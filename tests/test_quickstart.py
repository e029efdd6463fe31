"""The notebook, executed with a router trained for two steps; it runs what `launch.quickstart` runs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
POLICIES = {"fixed", "random", "adaptive", "adaptive_paper", "oracle"}
LADDER = ["4", "8", "16", "32", "64"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += f"\nWORKDIR, STEPS, PICTURES, QUESTIONS = pathlib.Path({str(workdir)!r}), 2, 32, 12"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return workdir


def test_report_has_what_it_promises(workdir):
    report = json.loads((workdir / "report.json").read_text())
    assert report["accuracy"].keys() == POLICIES and report["n"] == 12
    assert POLICIES - {"oracle"} <= report["visual_tokens"].keys()
    assert list(report["accuracy"]["fixed"]) == list(report["visual_tokens"]["fixed"]) == LADDER
    for outcome in (report["accuracy"]["adaptive"], report["accuracy"]["fixed"]["4"]):
        assert outcome.keys() == {"coarse", "fine", "near", "all"} and all(0 <= v <= 1 for v in outcome.values())
    for chosen in (report["chosen"], report["shuffled_instruction"]["chosen"], report["shuffled_image"]["chosen"]):
        assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in chosen.values())
    assert report["seconds"]["router_training"] > 0
    assert list(report["seconds"]["answer"]["fixed"]) == LADDER and report["seconds"]["answer"]["adaptive"] > 0
    oracle, best = report["accuracy"]["oracle"]["all"], max(a["all"] for a in report["accuracy"]["fixed"].values())
    assert oracle >= best


def test_both_routers_learn_from_one_feedback_and_the_pictures_are_drawn(workdir):
    for name in ("adaptive", "adaptive_paper"):
        rows = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2] and all(row["phase"] == "rglf" for row in rows)
    settings = [
        json.loads((workdir / n / "config.json").read_text())["training"] for n in ("adaptive", "adaptive_paper")
    ]
    assert settings[0]["rglf"]["feedback"] == settings[1]["rglf"]["feedback"]
    assert settings[0]["rglf"]["tie_nats"] > 0 == settings[1]["rglf"]["tie_nats"]
    for name in ("accuracy_against_tokens", "choices", "voter", "one_scene"):
        assert (workdir / "plots" / f"{name}.png").stat().st_size > 5000
