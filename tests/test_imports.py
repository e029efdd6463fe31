"""Host code knows nothing of the device libraries, and the model nothing of NumPy and Pillow."""

import ast
from pathlib import Path

import pytest

import avg_llava_jax.config

PACKAGE = Path(avg_llava_jax.config.__file__).parent


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(
    "folder, banned",
    [
        ("data", {"jax", "jaxlib", "flax", "optax", "orbax", "torch"}),
        ("benchmarks", {"jax", "jaxlib", "flax", "transformers", "datasets", "torch"}),
        ("models", {"numpy", "PIL", "torch"}),
    ],
)
def test_a_folder_stays_on_its_side(folder, banned):
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & banned, path


def test_torch_is_for_tests_and_for_what_is_handed_on():
    assert {path.name for path in PACKAGE.rglob("*.py") if "torch" in imported(path)} == {"modeling_avg_llava.py"}
