"""Atomic writes: files and folders appear complete or not at all; a workdir records the settings of its run."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

Path = str | os.PathLike[str]


_BUCKET = re.compile(r"(?:^|[,*])\s*(?!https?:)([a-z][a-z0-9+.-]+:/\S*)", re.IGNORECASE)


def refuse_buckets(named: Mapping[str, Any]) -> None:
    """Refuse addresses of object stores (`gs://`, `s3://`, `hdfs://`, ...): only file systems are supported.

    As a path, such an address would create a local folder `gs:`. http and https are not paths and pass.

    named: settings by name, nested; each element of a list or of a comma-separated text is checked.

    Raises:
      ValueError: names the first such setting.
    """
    for name, value in named.items():
        if isinstance(value, (str, os.PathLike)):
            if found := _BUCKET.search(os.fspath(value)):
                raise ValueError(
                    f"{name}={found[1]} is not a local path: buckets are neither read nor written;"
                    " copy the files to a disk or a shared file system"
                )
        elif isinstance(value, (list, tuple)):
            refuse_buckets({f"{name}[{number}]": one for number, one in enumerate(value)})
        elif hasattr(value, "items"):
            refuse_buckets({f"{name}.{key}": inner for key, inner in value.items()})


def write_whole(path: Path, content: str | Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: `content` goes to `<path>.part`, which then replaces `path`.

    content: a text, written as UTF-8, or a function that writes into the open binary file.
    """
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode("utf-8"))
        else:
            content(file)
    os.replace(beside, path)


def lock(path: Path, guarded: Path) -> int:
    """Lock a file, which is made, until its descriptor is closed or the process ends; returns the descriptor.

    guarded: the file or folder that one process at a time may write.

    Raises:
      RuntimeError: another process holds the lock; names it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode() or "?"
        os.close(descriptor)
        raise RuntimeError(f"{guarded} is in use by process {holder}: wait for it or use another --workdir") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def around(path: Path, begin: str, end: str) -> tuple[str, str]:
    """Split a text file around its marker lines: the text up to and with `begin`, and the text from `end` on.

    Raises:
      ValueError: the file does not contain each marker exactly once.
    """
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(
            f"{path} does not say where the tables go: add the lines {begin.strip()} and {end.strip()}, once each"
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n", f"\n{end}{after}"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON object, indented, as UTF-8."""
    pathlib.Path(path).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def whole_lines(path: Path) -> list[bytes]:
    """Lines of a file that a run appends to; [] where the file does not exist.

    A last line without line end, left by an interruption, is removed from the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    # Bytes: the cut may split a character, and `str.splitlines` knows more line ends than JSON escapes.
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, path.stat().st_size - len(lines.pop()))
    return lines


@contextlib.contextmanager
def whole(output: Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """A temporary folder to fill; it becomes `output` when the block succeeds and is removed when the block fails.

    replace: an existing `output` is replaced when the block succeeds; without it only an empty folder may exist.

    Raises:
      ValueError: `output` already exists, or is a bucket.
    """
    refuse_buckets({"output": output})
    output = pathlib.Path(output).absolute()
    if not replace and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} already exists: remove it or give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as beside:
        folder = pathlib.Path(beside) / output.name
        folder.mkdir()
        yield folder
        if output.exists():
            output.replace(folder.with_name(f"{output.name}.replaced"))
        folder.replace(output)


def portable(settings: Any) -> Any:
    """Nested settings with absolute paths shortened to their last component: such paths mean nothing elsewhere."""
    if isinstance(settings, dict):
        return {key: portable(inner) for key, inner in settings.items()}
    if isinstance(settings, str) and pathlib.Path(settings).is_absolute():
        return pathlib.Path(settings).name
    return settings


MADE_BY = "made_by"


def same_run(workdir: Path, name: str, settings: dict[str, Any], made_by: Mapping[str, str] | None = None) -> None:
    """Check that a workdir holds no results of other settings, then store `settings` there in the JSON file `name`.

    made_by: digests of what else determines the results, see `reuse`; stored with the settings.

    Raises:
      ValueError: the workdir holds results of other settings (names the first that differs) or of another `made_by`, or
        is a bucket.
    """
    refuse_buckets({"workdir": workdir})
    path = pathlib.Path(workdir) / name
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): use another --workdir") from None
        for key, value in settings.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{workdir} holds answers for {key}={before.get(key)!r}, not {value!r}: use another --workdir"
                )
        other = differing(before.get(MADE_BY) or {}, made_by or {})
        if other:
            raise ValueError(f"{workdir} holds results of other {other}: use another --workdir")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings | ({MADE_BY: made_by} if made_by else {}), indent=1) + "\n")


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Names of the values that are not as before: "weights and code"; "" where all are."""
    return " and ".join(name for name, value in now.items() if before.get(name) != value)
