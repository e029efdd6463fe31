"""A server in a process of its own, for programs that ask it over HTTP."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple


class Running(NamedTuple):
    """A server that listens. model: its model's name. url: without a path. pid: of its process."""

    model: str
    url: str
    pid: int


@contextlib.contextmanager
def running(*flags: str, folder: str | os.PathLike[str] = ".") -> Iterator[Running]:
    """`launch.serve` of the checkout in `folder`, at a free port, until the block ends.

    Raises RuntimeError where it does not start.
    """
    folder = pathlib.Path(folder).absolute()
    command = [sys.executable, "-m", "launch.serve", "--port=0", *flags]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    try:
        said = []
        while not (place := re.search(r"^(\S+) at (\S+)/ and", line := server.stderr.readline())):
            said.append(line.strip())
            if not line:
                raise RuntimeError(f"the server in {folder} did not start: {' '.join(said)[-500:]}")
        threading.Thread(target=server.stderr.read, daemon=True).start()  # else a full pipe would stop the server
        yield Running(*place.groups(), server.pid)
    finally:
        server.terminate()
        server.wait()
