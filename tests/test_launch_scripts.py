"""The scripts that start a run on other machines, run against stand-ins for what those machines have."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FLAGS = ["--config=configs/jersey.py:tiny", "--workdir=/w", "--config.data.path=a b.json"]


@pytest.fixture
def machine(tmp_path):
    """Runs a script with commands that write down how they were called and end as they are told."""
    calls = tmp_path / "calls"

    def stand_in(name, *ends):
        """One line of shell for each call; the last is for all later ones."""
        lines = [f'echo {name} "$@" >> {calls}', f'count=$(grep -c "^{name} " {calls})']
        lines += [f"[ $count -eq {number} ] && {{ {end}; }}" for number, end in enumerate(ends[:-1], 1)]
        (tmp_path / name).write_text("\n".join(["#!/usr/bin/env bash", *lines, ends[-1], ""]))
        (tmp_path / name).chmod(0o755)

    def start(script, **variables):
        place = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "PAUSE": "0"}
        return subprocess.Popen(
            ["bash", str(ROOT / "launch" / "cluster" / script), *FLAGS],
            cwd=ROOT,
            env=os.environ | place | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(script, **variables):
        process = start(script, **variables)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output, calls.read_text().splitlines()

    run.stand_in, run.start, run.calls = stand_in, start, calls
    return run


TRAIN = f"python -m launch.train {' '.join(FLAGS)}"


@pytest.mark.parametrize(("ends", "code"), [(["exit 75", "exit 134", "exit 0"], 0), (["exit 143", "exit 2"], 2)])
def test_gpu_host_starts_again_what_can_be_mended(machine, ends, code):
    machine.stand_in("python", *ends)
    assert machine("gpu_host.sh")[::2] == (code, [TRAIN] * len(ends))


def test_gpu_host_passes_sigterm_on_and_waits(machine, tmp_path):
    saved = tmp_path / "saved"
    machine.stand_in("python", f"trap 'sleep 0.3; touch {saved}; exit 143' TERM; sleep 30 &>/dev/null & wait")
    process = machine.start("gpu_host.sh")
    while not machine.calls.exists():
        time.sleep(0.05)
    time.sleep(0.3)  # until the trap is set
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143 and saved.exists()


def test_gpu_host_ends_at_sigterm_between_two_runs(machine):
    machine.stand_in("python", "exit 1")
    process = machine.start("gpu_host.sh", PAUSE="20")
    while not machine.calls.exists():
        time.sleep(0.05)
    time.sleep(0.5)  # until it pauses
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 143 and len(machine.calls.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("end", "restarts", "code", "queued"),
    [("exit 143", 0, 0, True), ("exit 75", 3, 0, True), ("exit 2", 0, 2, False), ("true", 0, 0, False),
     ("exit 134", 100, 134, False)],
)  # fmt: skip
def test_slurm_queues_again_what_can_be_mended(machine, end, restarts, code, queued):
    machine.stand_in("srun", end)
    machine.stand_in("scontrol", "true")
    place = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    ended, _, calls = machine("slurm.sh", **place)
    assert ended == code
    assert calls[0].startswith("srun --kill-on-bad-exit=0 ")
    assert calls[0].endswith(f"-m launch.train --coordinator=auto {' '.join(FLAGS)}")
    assert (calls[1:] == ["scontrol requeue 7"]) is queued


def test_slurm_does_not_queue_again_what_was_cancelled(machine):
    machine.stand_in("srun", "trap 'exit 143' TERM; sleep 30 &>/dev/null & wait")
    machine.stand_in("scontrol", "true")
    process = machine.start("slurm.sh", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7")
    while not machine.calls.exists():
        time.sleep(0.05)
    time.sleep(0.3)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    for pid in (process.pid, *map(int, children)):  # as scancel does
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143 and "scontrol" not in machine.calls.read_text()


def test_tpu_asks_again_for_a_slice_that_was_taken_away(machine):
    """Nothing there, made, ready; taken away while it trains; deleted, made again, trained to its end."""
    states = ["", "", "echo PROVISIONING", "echo ACTIVE", "echo SUSPENDED", "", "echo ACTIVE"]
    calls = machine.calls
    describe = "".join(f"{number}) {state or ':'} ;; " for number, state in enumerate(states[1:], 1))
    machine.stand_in(
        "gcloud",
        f'case "$*" in *describe*) case $(grep -c describe {calls}) in {describe} esac ;; '
        f"*launch.train*) [ $(grep -c launch.train {calls}) -gt 1 ] || exit 255 ;; esac",
    )
    code, output, made = machine("tpu.sh", TPU="t", ZONE="z", TYPE="v5litepod-64")
    assert code == 0, output
    verbs = [call.split()[4] for call in made if "queued-resources" in call and "describe" not in call]
    assert verbs == ["create", "delete", "create"]
    trained = [call for call in made if "launch.train" in call]
    assert len(trained) == 2 and all("--worker=all" in call for call in trained)
    assert f"-m launch.train --coordinator=auto {' '.join(FLAGS[:2])} --config.data.path=a\\ b.json" in trained[0]
    assert "queued-resources delete t --zone=z" in output


def test_tpu_stops_at_wrong_input(machine):
    machine.stand_in(
        "gcloud", 'case "$*" in *describe*) echo ACTIVE ;; *launch.train*) echo launch.train ended with 2 ;; esac'
    )
    assert machine("tpu.sh", TPU="t", ZONE="z", TYPE="v5litepod-64")[0] == 2


def test_own_adapter(machine, tmp_path):
    """Two runs on the same data, then a server with the adapter beside its base."""
    machine.stand_in("python", "true")
    code, output, calls = machine("../own_adapter.sh", BASE="B", VISION_TOWER="V", TUNE="--config.steps=7")
    assert code == 0, output
    data, images, work = FLAGS[0], FLAGS[1], FLAGS[2]
    tuned, routed, served = calls
    for call, start in ((tuned, "B"), (routed, f"{work}/tuned")):
        assert f"--config.init_from={start} --config.data.path={data} --config.data.images={images}" in call
        assert "--config.quantize=int8" in call
    assert "--config.vision_tower=V" in tuned and tuned.endswith("--config.steps=7") and "V" not in routed
    assert served == (
        "python -m launch.serve --checkpoint=B --vision_tower=V --dtype=bfloat16 --quantize=int8 "
        f"--adapter=own={work}/router"
    )


def test_gke_manifest():
    """A host for each pod, a process for each host, and exit codes as launch.train has them."""
    manifest = yaml.safe_load((ROOT / "launch" / "cluster" / "gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy, (job,) = manifest["spec"]["failurePolicy"], manifest["spec"]["replicatedJobs"]
    assert policy["maxRestarts"] > 0
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    hosts = rows * columns // container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == hosts
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # one lost pod ends the job, JobSet starts all
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob",
        "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]},
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["command"][:4] == ["python", "-m", "launch.train", "--coordinator=auto"]
    done = subprocess.run([sys.executable, *container["command"][1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2  # every flag is known, and this is no such pod
    assert done.stderr.startswith("error: --coordinator=auto: no SLURM step, Cloud TPU, GKE or Open MPI is known here")
