"""An optional dependency that is not installed: one line that names the extra."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from avg_llava_jax import extras
from avg_llava_jax.inference.guides import Guide

ROOT = Path(__file__).parents[1]
PLAN = ["plan", "--config=configs/jersey.py:tiny", "--topology=v5e:2x2"]
BLOCKED = """
import sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
from avg_llava_jax.commands.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    "module, command, message",
    [
        ("starlette", ["serve", "--port=0"], "the server needs starlette, {} `serve`{} '.[serve]'"),
        ("libtpu", PLAN, "topology 'v5e:2x2' needs libtpu, {} `plan`{} '.[plan]'"),
        ("uvicorn", ["serve", "--port=0"], "the server needs uvicorn, {} `serve`{} '.[serve]'"),
    ],
)
def test_a_command_names_the_extra(module, command, message):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, module, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    message = message.format("which is not installed: install the extra", ", in a checkout by pip install -e")
    assert done.stderr == f"error: {message} (--traceback shows where)\n"


@pytest.mark.parametrize("extra, module", [(extra, module) for extra, of in extras.EXTRAS.items() for module in of])
def test_a_blocked_import_names_the_extra(extra, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(extras.MissingExtra, match=rf"^this needs {module}, .* pip install -e '\.\[{extra}\]'$"):  # noqa: SIM117
        with extras.required(extra, "this"):
            __import__(module)


def test_the_plugin_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "avg_llava_jax.eval.lmms_eval_plugin", raising=False)
    with pytest.raises(extras.MissingExtra, match=r"the lmms-eval plugin needs lmms_eval\S*, which is not installed"):
        __import__("avg_llava_jax.eval.lmms_eval_plugin")


@pytest.mark.parametrize("kind, value", [("choice", ["a"]), ("regex", "a"), ("grammar", 'start: "a"'), ("json", {})])
def test_a_guide_names_its_extra(kind, value, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(extras.MissingExtra, match="^a guide needs llguidance, which is not installed: .* `serve`"):
        getattr(Guide, kind)(value)


def test_another_module_that_is_missing_is_another_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught, extras.required("serve", "this"):
        __import__("no_such_module")
    assert not isinstance(caught.value, extras.MissingExtra)


def test_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras.EXTRAS.keys() <= project["optional-dependencies"].keys()


def test_documents_install_from_the_checkout():
    """The package is on no index, so `pip install avg_llava_jax[...]` would find nothing, or another project."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    pages += [*(ROOT / "avg_llava_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.*")]
    for page in pages:
        assert "avg_llava_jax[" not in page.read_text(encoding="utf-8", errors="replace"), page
