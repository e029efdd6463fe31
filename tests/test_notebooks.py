"""The notebooks, executed one after another in one kernel: routers are trained for two steps, models are small."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from avg_llava_jax import checkpoint
from tests.random_model import save_random_model

ROOT = Path(__file__).parent.parent
NOTEBOOKS = (
    "quickstart", "evaluate_and_tradeoff", "train_your_own_data", "convert_checkpoints", "adapter_of_your_own",
)  # fmt: skip
FORGET = r"%reset_selective -f ^(?!(In|Out|get_ipython|exit|quit|open)$)[^_]"  # no notebook uses another one's names
POLICIES = {"fixed", "random", "adaptive", "adaptive_paper", "escalation", "combined", "oracle"}
LADDER = ["4", "8", "16", "32", "64"]


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory):
    """What the notebooks left: `quickstart` and `own_data` are workdirs of theirs."""
    folder = tmp_path_factory.mktemp("notebooks")
    save_random_model(tiny, tokenizer, folder / "tiny")
    with_router = f"WORKDIR, STEPS, PICTURES, QUESTIONS = pathlib.Path({str(folder / 'quickstart')!r}), 2, 32, 12"
    own = f"WORKDIR, INIT_FROM = pathlib.Path({str(folder / 'own_data')!r}), {str(folder / 'tiny')!r}"
    settings = {
        "quickstart": with_router,
        "evaluate_and_tradeoff": with_router,
        "train_your_own_data": f"{own}\nRECORDS, STEPS, ROUTER_STEPS = 24, 2, 2",
        "adapter_of_your_own": (
            f"WORKDIR, BASE = pathlib.Path({str(folder / 'own_adapter')!r}), {str(folder / 'tiny')!r}\n"
            "PICTURES, STEPS, ROUTER_STEPS, QUESTIONS = 24, 1, 1, 2"
        ),
        "convert_checkpoints": f"FOLDER = pathlib.Path({str(folder / 'pytorch')!r})",
    }
    together = nbformat.v4.new_notebook()
    for name in NOTEBOOKS:
        notebook = read(name)
        (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        cell.source += "\n" + settings[name]
        together.cells += [nbformat.v4.new_code_cell(FORGET), *notebook.cells]
    NotebookClient(together, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    return folder


@pytest.fixture
def workdir(folder):
    return folder / "quickstart"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_committed_as_it_is_to_be_seen(name):
    """With a Colab badge, the install cell, and the outputs of one whole run, which name no path of a machine."""
    cells = read(name).cells
    assert "colab-badge.svg" in cells[0].source
    needs = {"convert_checkpoints": '["torch"]', "evaluate_and_tradeoff": '["ipywidgets"]'}.get(name, "[]")
    assert cells[1].source == read("quickstart").cells[1].source.replace("NEEDS = []", f"NEEDS = {needs}")
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert name == "convert_checkpoints" or sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not any(path in str(outputs) for path in (str(ROOT), "/home/", "/tmp/"))


def install(folder, repository="", missing=()):
    """Run the install cell in a folder: (exit code, what pip was asked for, its last line of errors)."""
    cell = read("convert_checkpoints").cells[1].source.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    code = f"""
import importlib.util, pathlib, subprocess, sys
find_spec, run = importlib.util.find_spec, subprocess.run
importlib.util.find_spec = lambda name: None if name in {missing!r} else find_spec(name)
def replaced(command, check):
    if "pip" in command:
        print(command[command.index("--quiet") + 1 :])
    else:
        run(command, check=check)
subprocess.run = replaced
{cell}
print(pathlib.Path.cwd())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr.strip().rpartition("\n")[2]


def test_the_install_cell_in_a_checkout_installs_what_is_missing():
    assert install(ROOT) == (0, [str(ROOT)], "")
    assert install(ROOT / "notebooks", missing=("torch",)) == (0, ["['torch']", str(ROOT)], "")


def test_the_install_cell_elsewhere_clones_and_installs(tmp_path):
    message = "This is no checkout: set REPOSITORY to the project's address and run this cell again."
    assert install(tmp_path) == (1, [], message)
    origin = tmp_path / "origin"
    (origin / "avg_llava_jax").mkdir(parents=True)
    (origin / "avg_llava_jax" / "__init__.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(origin)]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *command], check=True)
    cloned = (0, ["['-r', 'requirements.txt']", str(tmp_path / "project")], "")
    assert install(tmp_path, str(origin)) == cloned
    assert install(tmp_path, str(origin)) == cloned  # the kernel was started again


def test_own_data_goes_through_both_phases(folder):
    phases = []
    for name in ("tuned", "router"):
        _, values = checkpoint.read_config(folder / "own_data" / name)
        phases.append((values["training"]["phase"], checkpoint.steps(folder / "own_data" / name)))
    assert phases == [("multi_granularity", [2]), ("rglf", [2])]


def test_the_adapter_is_asked_beside_its_base(folder):
    phases = [checkpoint.read_config(folder / "own_adapter" / name)[1] for name in ("tuned", "router")]
    assert [values["training"]["quantize"] for values in phases] == ["int8"] * 2
    assert phases[0]["base"] == phases[1]["base"] and phases[1]["training"]["phase"] == "rglf"


def test_the_checkpoint_comes_back(folder):
    assert checkpoint.load(folder / "pytorch" / "back").config.granularities == (4, 8, 16, 32, 64)
    assert (folder / "pytorch" / "transformers" / "modeling_avg_llava.py").is_file()


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
