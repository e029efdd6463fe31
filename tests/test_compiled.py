"""Compiled programs are kept between runs, and no damage of the folder stops a command."""

import os
import subprocess
import sys

import pytest

from tests.test_launch import ROOT, folder  # noqa: F401 (a fixture)


@pytest.fixture
def answer(folder, tmp_path):  # noqa: F811
    """Answers a question by a process of its own; its standard output and error."""
    env = {name: value for name, value in os.environ.items() if "CACHE" not in name} | {"XDG_CACHE_HOME": str(tmp_path)}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # a fast machine compiles the tiny model in no time

    def run(*flags):
        command = [sys.executable, "-m", "launch.answer", f"--checkpoint={folder}", "--prompt=Who?"]
        command += ["--max_new_tokens=3", *flags]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[0], done.stderr

    return run


def entries(path):
    return {file.name: file.read_bytes() for file in path.rglob("*-cache")}


def test_programs_are_kept(answer, tmp_path):
    """In the user's cache folder; a second run adds none, damaged ones are compiled again, an empty flag keeps none."""
    kept = tmp_path / "avg_llava_jax" / "compiled"
    said, _ = answer("--compiled=")
    assert not kept.exists()
    assert answer()[0] == said
    first = entries(kept)
    assert first
    assert answer()[0] == said and entries(kept) == first
    for name in first:
        (kept / name).write_bytes(b"damaged")
    assert answer()[0] == said


def test_a_folder_that_cannot_be_written_is_a_line(answer, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    _, error = answer(f"--compiled={file}")
    assert f"compiled programs are not kept: {file}: File exists" in error
