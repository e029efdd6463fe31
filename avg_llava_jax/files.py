"""Files and folders that are there whole or not at all, and workdirs that know what they belong to."""

import contextlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

Path = str | os.PathLike[str]


_BUCKET = re.compile(r"(?:^|[,*])\s*(?!https?:)([a-z][a-z0-9+.-]+:/\S*)")


def refuse_buckets(named: Mapping[str, Any]) -> None:
    """Refuse addresses of object stores (`gs://`, `s3://`, `hdfs://`, ...): every file here lies in a file system.

    As paths they would become local folders `gs:`. named: settings by name, nested; of lists and of comma-separated
    texts each element counts. http and https are no paths and pass.

    Raises:
      ValueError: names the first one.
    """
    for name, value in named.items():
        if isinstance(value, (str, os.PathLike)):
            if found := _BUCKET.search(os.fspath(value)):
                raise ValueError(
                    f"{name}={found[1]} is no path of this machine: buckets are neither read nor written here;"
                    " mount it (gcsfuse, mountpoint-s3, rclone mount) or copy the files"
                )
        elif isinstance(value, (list, tuple)):
            refuse_buckets({f"{name}[{number}]": one for number, one in enumerate(value)})
        elif hasattr(value, "items"):
            refuse_buckets({f"{name}.{key}": inner for key, inner in value.items()})


def write_whole(path: Path, content: str | Callable[[BinaryIO], object]) -> None:
    """Write beside its place, then move there: a text, or what a function writes into the open file."""
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode("utf-8"))
        else:
            content(file)
    os.replace(beside, path)


def around(path: Path, begin: str, end: str) -> tuple[str, str]:
    """What a text file holds up to the line `begin` and from the line `end` on, for something to be put between.

    Raises:
      ValueError: the file does not have each of them once.
    """
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(
            f"{path} does not say where the tables go: it needs the lines {begin.strip()} and {end.strip()}"
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n", f"\n{end}{after}"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """One JSON object, readable."""
    pathlib.Path(path).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that is appended to, none where there is no file.

    A last line that was cut off by an interruption is removed from the file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return []
    # As bytes: a cut may go through a character, and a text's `splitlines` knows more line ends than JSON escapes.
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        os.truncate(path, path.stat().st_size - len(lines.pop()))
    return lines


@contextlib.contextmanager
def whole(output: Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """A folder to fill, which becomes `output` when the block ends well and is gone when it does not.

    replace: what is at `output` already goes when the block has ended well; otherwise only an empty folder may be.

    Raises:
      ValueError: there is something at `output` already, or it is a bucket.
    """
    refuse_buckets({"output": output})
    output = pathlib.Path(output).absolute()
    if not replace and output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} is there already: remove it or give another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as beside:
        folder = pathlib.Path(beside) / output.name
        folder.mkdir()
        yield folder
        if output.exists():
            output.replace(folder.with_name(f"{output.name}.replaced"))
        folder.replace(output)


def portable(settings: Any) -> Any:
    """Settings, nested, with absolute paths cut to their last name: they mean nothing on another machine."""
    if isinstance(settings, dict):
        return {key: portable(inner) for key, inner in settings.items()}
    if isinstance(settings, str) and pathlib.Path(settings).is_absolute():
        return pathlib.Path(settings).name
    return settings


def same_run(workdir: Path, name: str, settings: dict[str, Any]) -> None:
    """Results in a workdir are gone on with only by the run they come from; its settings are kept in `name`.

    Raises:
      ValueError: the workdir holds results of other settings, or is a bucket; names the first that differs.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=1) + "\n")
