"""Imports only go down: the graph of all imports in the package, at module level and in functions alike.

    config, files, extras, placement
    data      models              data without JAX, models without NumPy and Pillow
    parameters, adapters
    parallel
    checkpoint, stored, reuse, convert
    training  inference
    configs                       experiments: what they change of training's defaults
    eval                          eval/benchmarks without JAX
    server
    commands

A module may import from its own layer and from lower ones; `data` and `models`, and `training` and `inference`, do not
know each other. Imports for type checkers alone (`if TYPE_CHECKING`) count too: a type is knowledge as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import avg_llava_jax.config

PACKAGE = Path(avg_llava_jax.config.__file__).parent
ROOT = "avg_llava_jax"

LAYERS = (
    ({"config", "files", "extras", "placement"},),
    ({"data"}, {"models"}),
    ({"parameters", "adapters"},),
    ({"parallel"},),
    ({"checkpoint", "stored", "reuse", "convert"},),
    ({"training"}, {"inference"}),
    ({"configs"},),
    ({"eval"},),
    ({"server"},),
    ({"commands"},),
)
"""From the lowest; a layer may have parts that must not import each other."""

UPWARD: set[tuple[str, str]] = set()
"""Imports that still go up, by importer and imported module. It may only shrink: one that is gone must leave it."""

BANNED = {
    "data": {"jax", "jaxlib", "flax", "optax", "orbax", "torch"},
    "eval.benchmarks": {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "datasets", "torch"},
    "models": {"numpy", "PIL", "torch"},
    "commands.main": {"jax", "jaxlib", "flax", "numpy", "absl"},
    "commands.cli": {"jax", "jaxlib", "flax", "torch"},
    "commands.score": {"jax", "jaxlib", "flax", "torch", "transformers"},
}
"""What a module, or all modules of a folder, must not import, not even through others."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its name without the package's: "" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if "assets" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, inside: bool) -> Iterator[str]:
    """What a file imports, as dotted names: of `from a import b` it is `a.b`, whatever that names.

    inside: imports in functions as well, which run later than the file, and those for type checkers alone.
    """

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if inside or not (typing or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def edges(inside: bool) -> dict[str, set[str]]:
    """By module: the modules of the package that it imports, and `<name>` for each top-level name of all else."""
    graph: dict[str, set[str]] = {}
    for name, path in modules().items():
        graph[name] = set()
        for imported in imports(path, inside):
            top, _, rest = imported.partition(".")
            if top == ROOT:
                graph[name].add(rest if rest in modules() else rest.rpartition(".")[0])
            else:
                graph[name].add(f"<{top}>")
    return graph


def parents(module: str) -> set[str]:
    """The packages that run before a module: "a.b.c" -> {"", "a", "a.b"}."""
    parts = module.split(".")
    return {".".join(parts[:depth]) for depth in range(len(parts))}


def place(module: str) -> tuple[int, int]:
    """The layer of a module and the part of the layer, by the longest name that LAYERS has."""
    top = module.partition(".")[0]
    for layer, parts in enumerate(LAYERS):
        for part, names in enumerate(parts):
            if top in names:
                return layer, part
    raise AssertionError(f"{module} is in no layer: say in LAYERS where it belongs")


def direct() -> set[tuple[str, str]]:
    """Importer and imported, wherever the import stands. The package's own names are loaded when they are asked for."""
    return {
        (importer, imported)
        for importer, found in edges(inside=True).items()
        for imported in found
        if importer and imported and not imported.startswith("<")
    }


def goes_up(importer: str, imported: str) -> bool:
    (above, part), (below, other) = place(importer), place(imported)
    return below > above or (below == above and part != other)


def test_imports_go_down():
    found = {pair for pair in direct() if goes_up(*pair)}
    new = [f"{importer} imports {imported}, above it or beside it" for importer, imported in sorted(found - UPWARD)]
    assert not new, "\n".join(new)


def test_exceptions_are_real():
    """Who mends an import that goes up takes it off the list."""
    gone = UPWARD - {pair for pair in direct() if goes_up(*pair)}
    assert not gone, f"these no longer go up, remove them from UPWARD: {sorted(gone)}"


def test_no_circle():
    """Modules that import each other at module level, directly or through others, cannot be read one after another."""
    waiting = {name: {each for each in found if each in modules()} for name, found in edges(inside=False).items()}
    while waiting:
        ready = {name for name, found in waiting.items() if not found & waiting.keys()}
        assert ready, f"a circle of imports among {sorted(waiting)}"
        waiting = {name: found for name, found in waiting.items() if name not in ready}


def reached(module: str, inside: bool) -> dict[str, list[str]]:
    """All that is imported by a module, at last, each with the way that leads there.

    inside: imports in functions count for the module itself; what it imports counts by what runs when it is imported.
    """
    ways = {module: [module]}
    todo = [module]
    while todo:
        here = todo.pop()
        found = edges(inside and here == module).get(here, set())
        for name in sorted(found.union(*map(parents, (here, *found & modules().keys())))):
            if name not in ways:
                ways[name] = [*ways[here], name]
                todo.append(name)
    return ways


@pytest.mark.parametrize("folder, banned", BANNED.items(), ids=BANNED)
def test_a_folder_stays_on_its_side(folder, banned):
    members = [name for name in modules() if name == folder or name.startswith(f"{folder}.")]
    assert members
    for name in members:
        inside = not name.startswith("commands")  # these import late what needs a device
        ways = reached(name, inside)
        found = [" -> ".join(ways[f"<{top}>"]) for top in sorted(banned) if f"<{top}>" in ways]
        assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["data", "eval.benchmarks"])
def test_a_folder_stays_on_its_side_when_it_runs(folder):
    """As above, by the interpreter, with the libraries that are imported. One of them, Grain, imports JAX itself."""
    names = [name for name in modules() if name == folder or name.startswith(f"{folder}.")]
    names = [f"{ROOT}.{name}" for name in names if "<grain>" not in edges(inside=False)[name]]
    assert len(names) > 5
    code = f"import sys, {', '.join(names)}; print(*sorted({BANNED[folder]!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_torch_is_for_tests_and_for_what_is_handed_on():
    """The package runs without PyTorch; the one file that needs it is copied beside exported weights."""
    top = {path.name: {name.partition(".")[0] for name in imports(path, True)} for path in PACKAGE.rglob("*.py")}
    assert [name for name, found in top.items() if "torch" in found] == ["modeling_avg_llava.py"]


def test_the_graph_sees_what_it_must(tmp_path):
    """A worked example of each kind of import."""
    file = tmp_path / "a.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport b.c\nif TYPE_CHECKING:\n    import d\n"
        "try:\n    from e import f\nexcept ImportError:\n    f = None\n\ndef g():\n    from h import i\n"
    )
    assert set(imports(file, inside=False)) == {"typing.TYPE_CHECKING", "b.c", "e.f"}
    assert set(imports(file, inside=True)) == {"typing.TYPE_CHECKING", "b.c", "d", "e.f", "h.i"}
    assert goes_up("data.tiles", "models.router") and goes_up("parallel.hosts", "training.loop")
    assert not goes_up("server.app", "files") and not goes_up("convert.foreign", "checkpoint")
