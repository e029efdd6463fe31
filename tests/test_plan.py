"""Plans of the tiny jersey model, on forced CPU devices and, where libtpu is installed, on a TPU slice."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def plan(*flags):
    """(exit code, standard output, standard error) of `launch.plan` on the tiny jersey model."""
    command = [sys.executable, "-m", "launch.plan", "--config=configs/jersey.py:tiny", "--text=32", "--answer=16"]
    done = subprocess.run([*command, *flags], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def figures(text):
    """{"all-gather": 0.12, ...} of one program."""
    return {name: float(number) for name, number in re.findall(r"^  (\S.*?)\s+([\d.]+) [GTm]", text, re.MULTILINE)}


def test_the_step_on_eight_cpu_devices():
    code, out, error = plan("--topology=cpu:8", "--config.mesh.data=2", "--config.optimizer.accumulate=1")
    assert code == 0, error
    assert out.startswith("train step on cpu:8, 8 devices\n")
    found = figures(out)
    assert {"trained", "frozen", "optimizer", "batch", "temporaries", "in all", "operations"} <= found.keys()
    assert "all-gather GB" not in out and "all-reduce" in found


@TPU
def test_step_and_answers_on_a_tpu_slice():
    code, out, error = plan("--topology=v5e:2x2", "--config.compute_dtype=bfloat16", "--config.remat=full")
    assert code == 0, error
    assert "of 15.75: fits" in out and "<- the roofline" in out and "again for the backward pass" in out
    code, out, error = plan(
        "--topology=v5e:2x2", "--answering", "--config.mesh.fsdp=1", "--config.mesh.tensor=2", "--config.mesh.data=2"
    )
    assert code == 0, error
    assert [line for line in out.splitlines() if not line.startswith(" ") and line] == [
        "see and route on v5e:2x2, 4 devices",
        "prefill of 384 on v5e:2x2, 4 devices",
        "decode, a token on v5e:2x2, 4 devices",
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v9:2x2"], "topology 'v9:2x2': give cpu:N, or v5e, v5p, v6e and a shape, as v5e:4x4"),
        (["--topology=cpu:8", "--config.batch_size=12"], "batch_size=12 must be a multiple of 8"),
        (["--topology=cpu:8", "--config.remat=some"], "remat='some': choose none or dots or full"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    code, _, error = plan(*flags)
    assert code == 2 and message in error and error.count("\n") == 1
