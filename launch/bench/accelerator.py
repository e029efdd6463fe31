"""Everything worth measuring on an accelerator, within a time limit: python -m launch.bench.accelerator --output=A.json

    parity      first logits of the shipped model at each granularity, in fp32, against those of this machine's CPU
    train       `launch.bench.train`, the shapes of --shape, both phases, few layers (--layers)
    inference   `launch.bench.inference`, the shapes of --shape
    compile     `launch.bench.compile_matrix` for this device, where its compiler is installed

Each part is a process of its own and gets a share of --minutes; one that fails or takes too long is noted, and the next
one runs. The JSON file is written after every part.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli

OUTPUT = flags.DEFINE_string("output", "accelerator.json", "JSON file for all figures.")
MINUTES = flags.DEFINE_float("minutes", 12.0, "Minutes for all parts together.", lower_bound=0.1)
SHAPE = flags.DEFINE_enum("shape", "7b", ["jersey", "mid", "7b"], "Sizes of `train` and `inference`; jersey: a trial.")
LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the language model in `train`.", lower_bound=1)
TARGET = flags.DEFINE_string("target", "", "This device as `compile_matrix` names it, as h200:1; empty = leave it out.")
LOGITS = flags.DEFINE_string("logits", "", "Write the parity logits of the default device to this file, and end.")

SHARES = {"parity": 0.15, "train": 0.35, "inference": 0.35, "compile": 0.15}
PARTS = flags.DEFINE_multi_enum("part", list(SHARES), list(SHARES), "Give it once for each part, in order.")


def first_logits(path: pathlib.Path) -> None:
    """Write the first logits (questions, G, V) of shipped test questions, computed on the default device in fp32."""
    import jax
    import numpy as np

    from avg_llava_jax.eval import quickstart
    from avg_llava_jax.inference.api import AvgLlava
    from avg_llava_jax.inference.engine import Engine
    from avg_llava_jax.inference.requests import Prepared, Request

    jax.config.update("jax_default_matmul_precision", "highest")
    model = AvgLlava.load()
    engine = Engine(model, chunk=None, slots=8, queue=1000)
    request = Request("", max_new_tokens=1)
    tickets = [
        engine.submit_prepared(Prepared(request, question.sample, (granularity,)), keep_logits=True)
        for question in quickstart.test_questions(model, 12)
        for granularity in model.config.granularities
    ]
    while engine.step():
        pass
    logits = np.stack([ticket.logits for ticket in tickets])
    np.save(path, logits.reshape(12, len(model.config.granularities), -1))


def run(arguments: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run a module in a process; its seconds, how it ended, and the end of its output."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
        start_new_session=True,
    ) as running:
        try:
            said, _ = running.communicate(timeout=seconds)
            ended = f"exit status {running.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # its own processes too, which would hold the device
            said, _ = running.communicate()
            ended = f"stopped after {seconds:.0f} s"
    return {"seconds": round(time.perf_counter() - begin, 1), "ended": ended, "output": said[-4000:]}


def parity(folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """The largest difference of first logits between the default device and the CPU."""
    import numpy as np

    files = {"device": folder / "device.npy", "cpu": folder / "cpu.npy"}
    me = "launch.bench.accelerator"
    results = {
        "device": run([me, f"--logits={files['device']}"], seconds / 2),
        "cpu": run([me, f"--logits={files['cpu']}"], seconds / 2, JAX_PLATFORMS="cpu"),
    }
    if all(file.exists() for file in files.values()):
        device, cpu = np.load(files["device"]), np.load(files["cpu"])
        results["largest_difference"] = float(np.abs(device - cpu).max())
        results["largest_logit"] = float(np.abs(cpu).max())
        results["first_tokens_equal"] = bool((device.argmax(-1) == cpu.argmax(-1)).all())
    return results


def measure(part: str, folder: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Run a part; what it wrote is under `figures`."""
    if part == "parity":
        return parity(folder, seconds)
    written = folder / f"{part}.json"
    if part == "train":
        sizes = [f"--shape={SHAPE.value}", f"--layers={LAYERS.value}", "--repeats=5", "--nobaseline"]
        result = run(["launch.bench.train", *sizes, f"--output={written}"], seconds)
    elif part == "inference":
        written = folder / "inference.json"
        result = run(["launch.bench.inference", f"--shape={SHAPE.value}", "--notorch", f"--workdir={folder}"], seconds)
    else:
        written = folder / "known"
        where = [f"--target={TARGET.value}", f"--known={written}", "--tables=", f"--limit_s={seconds / 4:.0f}"]
        return run(["launch.bench.compile_matrix", *where], seconds)
    return result | ({"figures": json.loads(written.read_text())} if written.exists() else {})


def main() -> None:
    if LOGITS.value:
        first_logits(pathlib.Path(LOGITS.value))
        return
    from avg_llava_jax.files import write_whole

    parts = [part for part in PARTS.value if part != "compile" or TARGET.value]
    devices = "import jax; d = jax.devices(); print(jax.__version__, len(d), d[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", devices], text=True, capture_output=True)
    results: dict[str, Any] = {"device": asked.stdout.strip() or asked.stderr.strip()[-300:]}
    share = 60 * MINUTES.value / sum(SHARES[part] for part in parts)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print(f"{part}: at most {share * SHARES[part]:.0f} s", flush=True)
            results[part] = measure(part, pathlib.Path(folder), share * SHARES[part])
            write_whole(pathlib.Path(OUTPUT.value), json.dumps(results, indent=1) + "\n")
    print(f"wrote {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main, required=[])
