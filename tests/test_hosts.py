"""Several processes as one run: the losses of one process, decisions that all share, and the loss of one of them."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from avg_llava_jax import checkpoint
from avg_llava_jax.parallel import hosts
from avg_llava_jax.training.loop import TERMINATED
from avg_llava_jax.training.metrics import read_rows
from tests.test_training import WITHOUT_TORCH

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 30, 6


def start(folder: Path, workdir: Path, *flags: str, devices: int = 1, cwd: Path = ROOT) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.train", f"--config={ROOT}/configs/jersey.py:tiny", f"--workdir={workdir}"]
    command += [f"--config.steps={STEPS}", f"--config.checkpoint_every={EVERY}", "--config.granularities=(4,)"]
    command += ["--config.batch_size=4", "--config.data.max_skipped_share=0.5"]
    command += [f"--config.data.path={folder / 'train.json'}", f"--config.data.images={folder / 'images'}"]
    command += flags
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": WITHOUT_TORCH,
    }
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_two(
    folder: Path, workdir: Path, *flags: str, second: tuple[str, ...] = (), cwds: tuple[Path, Path] = (ROOT, ROOT)
) -> list[subprocess.Popen]:
    """Two processes with the same flags; the second may have more of them, and each a folder where it is started."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        both = f"--coordinator=localhost:{free.getsockname()[1]}", "--processes=2"
    return [
        start(folder, workdir, *both, "--process=0", *flags, cwd=cwds[0]),
        start(folder, workdir, *both, "--process=1", *flags, *second, cwd=cwds[1]),
    ]


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def wait_for(process: subprocess.Popen, workdir: Path, step: int) -> None:
    while not any(row["step"] >= step for row in read_rows(workdir / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_two_processes_are_one_run(llava_folder):
    """Stopped by SIGTERM to one of them, by SIGKILL of one, and gone on with by one process with two devices."""
    for name in ("2-0.png", "5-1.png"):  # records that only the process whose rows they are finds out about
        whole = (llava_folder / "images" / name).read_bytes()
        (llava_folder / "images" / name).write_bytes(whole[:-30])
    alone, shared = llava_folder / "alone", llava_folder / "shared"
    finish(start(llava_folder, alone))

    first, second = start_two(llava_folder, shared)
    wait_for(first, shared, 1)
    second.terminate()
    outputs = [process.communicate()[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (TERMINATED, TERMINATED), outputs
    saved = checkpoint.steps(shared)[-1]
    assert saved < STEPS
    assert f"step {saved} is saved" in outputs[0] and f"step {saved} is saved" not in outputs[1]  # one of them writes

    first, second = start_two(llava_folder, shared)
    wait_for(first, shared, saved + EVERY + 1)
    second.kill()
    since = time.monotonic()
    output, _ = first.communicate()
    second.communicate()
    assert time.monotonic() - since < 90  # --heartbeat is 60
    assert first.returncode == hosts.RESTART, output
    assert "error: process 0 of 2 has lost another one" in output and "resumes from its last checkpoint" in output

    finish(start(llava_folder, shared, devices=2))
    one, other = (read_rows(workdir / "metrics.jsonl") for workdir in (alone, shared))
    assert [row["step"] for row in other] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "nll/4"):
        np.testing.assert_allclose([row[name] for row in other], [row[name] for row in one], rtol=1e-5, err_msg=name)
    records = [{row["id"]: row["reason"] for row in read_rows(w / "skipped.jsonl")} for w in (alone, shared)]
    assert records[0] == records[1] == {"r2": "corrupt_image", "r5": "corrupt_image"}
    assert not list(shared.glob("process_*"))


@pytest.mark.parametrize("wrong", ["a setting that makes no sense", "another setting", "a file that is not there"])
def test_what_is_wrong_on_one_process_ends_all_of_them(llava_folder, wrong):
    """In one line, soon, and with the exit code after which nobody starts them again."""
    workdir = llava_folder / "run"
    if wrong == "a file that is not there":
        message = "train.json does not exist"
        cwds = llava_folder, llava_folder / "images"
        pair = start_two(llava_folder, workdir, "--config.data.path=train.json", cwds=cwds)
    else:
        flag, message = {
            "a setting that makes no sense": ("--config.remat=some", "remat='some': choose none or dots or full"),
            "another setting": ("--config.seed=7", "seed=7 on process 1, 0 on process 0: start them alike"),
        }[wrong]
        pair = start_two(llava_folder, workdir, second=(flag,))
    outputs = [pair[1].communicate()[0]]
    since = time.monotonic()
    outputs.insert(0, pair[0].communicate()[0])
    assert [process.returncode for process in pair] == [2, 2], outputs
    assert time.monotonic() - since < 30 and not checkpoint.steps(workdir)
    for output in outputs:
        assert [message in line for line in output.splitlines() if line.startswith("error: ")] == [True], output
    assert wrong == "another setting" or "error: process 1 of 2 failed: " in outputs[0], outputs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("auto", 2, None), "--processes and --process go with"),
        (("", None, 0), "--processes and --process go with"),
        (("here", 2, 0), "--coordinator=here: give HOST:PORT"),
        (("here:1", 2, 2), "--processes=2 --process=2: process counts from 0"),
        (("here:1", 2, None), "--process=None"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(ValueError, match=message):
        hosts.start(*flags)


def test_gather_of_one_process_is_what_it_has():
    value = [{"a": [1, None]}, "é"]
    assert hosts.gather(value) == [value] and json.loads(json.dumps(value)) == value
    assert hosts.agree(True) and not hosts.agree(False)
