"""Files that are there whole or not at all, and workdirs that know what they belong to."""

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, BinaryIO

Path = str | os.PathLike[str]


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


def same_run(workdir: Path, name: str, settings: dict[str, Any]) -> None:
    """Results in a workdir are gone on with only by the run they come from; its settings are kept in `name`.

    Raises:
      ValueError: the workdir holds results of other settings; names the first that differs.
    """
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
