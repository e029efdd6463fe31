"""What earlier results in a folder are reused for: digests of the model and the code that made them.

    weights        checksums of the parameters, dtypes included
    model config   `ModelConfig`
    tokenizer      the tokenizer's files
    code           the sources that determine the results, without comments and docstrings

With `data.feedback.question_digest`, of one question's token ids, labels and encoded images, they identify an answer.
The same command reuses what is identical and says so; `set_aside` moves the rest into a subfolder:

    OUT/answers.jsonl   24 answers    --9 of them by other weights-->   OUT/answers.jsonl          15 answers
    OUT/report.json                                                     OUT/stale-1/answers.jsonl   9 answers
                                                                        OUT/stale-1/report.json
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax

from avg_llava_jax import parameters, stored
from avg_llava_jax.config import ModelConfig, to_dict
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.files import whole_lines, write_whole
from avg_llava_jax.models.avg_llava import Params

ANSWERING = ("config.py", "data", "models", "inference")
"""Sources that an answer depends on."""
PROGRAMS = (
    *ANSWERING, "adapters.py", "commands", "configs", "parallel", "parameters.py", "placement.py", "training"
)  # fmt: skip
"""Sources that a compiled program depends on."""
ROUTER = "models/router.py"
PACKAGE = pathlib.Path(__file__).parent

Entry = dict[str, Any]


def digest(values: Any) -> str:
    """Digest of JSON values, 32 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def code(sources: tuple[str, ...] = ANSWERING, without: tuple[str, ...] = ()) -> str:
    """Digest of modules and folders of this package; comments, docstrings and layout do not count."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in without and any(name == each or name.startswith(f"{each}/") for each in sources):
            found[name] = _bare(path.read_text(encoding="utf-8"))
    return digest(found)


@functools.cache
def _bare(source: str) -> str:
    """A module's source without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [each for each in node.body if not _is_text(each)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def programs(*scripts: str) -> str:
    """Digest of what compiled programs depend on: this package's code, the scripts that ask for them, and jax."""
    own = [_bare(pathlib.Path(script).read_text(encoding="utf-8")) for script in scripts]
    return digest([code(PROGRAMS), own, jax.__version__])


def weights(params: Params) -> str:
    """Digest of parameters: the same for decoder layers in one array and in a tuple, and on any mesh."""
    layers = params["language"]["layers"]
    language = {name: part for name, part in params["language"].items() if name != "layers"}
    rest = stored.checksums(params | {"language": language})
    each = [stored.checksums(layer) for layer in layers] if isinstance(layers, tuple) else stored.by_layer(layers)
    return digest([rest, each])


def made_by(config: ModelConfig, params: Params, tokenizer: Tokenizer) -> dict[str, str]:
    """Digests of what determines a model's answers, by name."""
    return {
        "weights": weights(params),
        "model config": digest(to_dict(config)),
        "tokenizer": tokenizer.digest()[:32],
        "code": code(),
    }


def made_by_frozen(config: ModelConfig, params: Params, sources: Iterable[str]) -> dict[str, str]:
    """`made_by` of results that do not depend on the router, nor on the tokenizer.

    The length of the ladder does not count, so that results on more granularities serve a shorter ladder.
    """
    _, frozen = parameters.split(params, ("router",))
    values = to_dict(config)
    del values["router"], values["scaler"]["halvings"]
    return {
        "weights": weights(frozen),
        "model config": digest(values),
        "code": code(("config.py", "data", "models", *sources), without=(ROUTER,)),
    }


def set_aside(folder: pathlib.Path, names: Iterable[str], reason: str) -> pathlib.Path:
    """Move files and folders of `folder` into its first free subfolder `stale-N`, which it returns, and say so."""
    place = next(place for n in itertools.count(1) if not (place := folder / f"stale-{n}").exists())
    place.mkdir(parents=True)
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, place / name)
    print(f"{folder}: {reason}: set aside in {place}", file=sys.stderr, flush=True)
    return place


def sift(file: str | os.PathLike[str], judge: Callable[[Entry], Entry | str], derived: Iterable[str] = ()) -> None:
    """Keep the entries of a file (JSON lines) that still hold.

    judge: an entry -> the entry to keep, or why it is stale. Stale entries are set aside with `derived`, files beside.
    A last line that an interruption left incomplete is removed.

    Raises:
      ValueError: the file holds other lines than JSON objects.
    """
    file, stale, kept, why = pathlib.Path(file), [], [], dict[str, int]()
    try:
        lines = [line.decode() for line in whole_lines(file)]
        entries = [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a file of answers ({error}); use another folder") from None
    for line, entry in zip(lines, entries, strict=True):
        found = judge(entry)
        if isinstance(found, str):
            stale.append(line)
            why[found] = why.get(found, 0) + 1
        else:
            kept.append(json.dumps(found, ensure_ascii=False) + "\n")
    if stale:
        reasons = ", ".join(f"{count} of {reason}" for reason, count in why.items())
        place = set_aside(file.parent, derived, f"{len(kept)} of {len(lines)} answers kept, {reasons}")
        write_whole(place / file.name, "".join(stale))
    elif lines:
        print(f"{file}: {len(lines)} answers kept from an earlier run", file=sys.stderr, flush=True)
    if kept != lines:
        write_whole(file, "".join(kept))
