"""Paths that are none."""

import os
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from avg_llava_jax import checkpoint, files
from tests.test_launch import ROOT, run

BUCKETS = ["gs://my-bucket/run1", "s3://b/run", "hdfs://h/x", "abfss://c@a.dfs.core.windows.net/x", "file:///tmp/x", "GS://b/run"]


@pytest.mark.parametrize("bucket", BUCKETS)
def test_buckets_are_refused_wherever_they_stand(bucket):
    config = ConfigDict({"data": {"path": "a.json", "images": f"im, {bucket}"}, "steps": 1})
    for named, where in (
        ({"workdir": bucket}, "workdir"),
        ({"workdir": pathlib.Path(bucket)}, "workdir"),
        ({"config": config}, "config.data.images"),
        ({"path": f"0.5*{bucket}, 0.5*jersey"}, "path"),
        ({"image": ["a.png", bucket]}, r"image\[1\]"),
    ):
        with pytest.raises(ValueError, match=f"{where}={bucket[:3]}.* is not a local path") as error:
            files.refuse_buckets(named)
        assert "\n" not in str(error.value)


def test_paths_and_addresses_pass():
    files.refuse_buckets(
        {
            "data": "/data/a.json",
            "path": "0.8*a.json, 0.2*jersey?split=router",
            "image": ["https://a.org/b.png", "c:/d.png", "lmms-lab/POPE", b"gs://", 3, None],
            "workdir": pathlib.Path("a") / "b:c",
            "topology": "v5e:8x8",
        }
    )


def test_no_folder_is_made_for_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (
        lambda: checkpoint.Manager("gs://b/run"),
        lambda: files.same_run("gs://b/run", "run.json", {}),
        lambda: files.whole("gs://b/run").__enter__(),
    ):
        with pytest.raises(ValueError, match="gs:/"):
            use()
    assert not any(tmp_path.iterdir())


def test_commands_refuse_buckets_at_once(tmp_path):
    for command, flags in (
        ("train", ["--config=configs/jersey.py", f"--workdir={tmp_path}/run", "--config.data.images=gs://b/im.zip"]),
        ("train", ["--config=configs/jersey.py", "--workdir=gs://my-bucket/run1"]),
        ("evaluate", ["--data=s3://b/test.json", f"--workdir={tmp_path}/out"]),
        ("answer", ["--prompt=What is gs://b?", "--image=gs://b/a.png"]),
    ):
        code, _, error = run(command, *flags)
        assert code == 2 and "is not a local path: buckets are neither read" in error, error
        assert "prompt" not in error
    assert not any(tmp_path.iterdir()) and not (ROOT / "gs:").exists()


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    """A path that is not UTF-8, printed once the work is done, as is an answer on a terminal of another encoding."""
    output = b"--output=" + os.fsencode(tmp_path) + b"/caf\xe9"
    command = [sys.executable, "-m", "launch.write_jersey", "--count=1", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.endswith(b"caf\\udce9/test.json\n")
