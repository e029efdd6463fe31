"""Eight forced CPU devices give what one gives: training in both phases, answering, and the flash kernel."""

import os
import pathlib
import subprocess
import sys


def test_a_mesh_computes_what_one_device_does():
    given = os.environ.get("XLA_FLAGS", "")
    done = subprocess.run(
        [sys.executable, "-m", "tests.on_eight_devices"],
        cwd=pathlib.Path(__file__).parents[1],
        # What is compared is computed once: fast code would not pay for the time that it takes to make.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{given} --xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
    assert "Involuntary full rematerialization" not in done.stderr
