"""The commands as a user runs them."""

import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from avg_llava_jax import checkpoint
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Request
from tests import benchmark_fixtures as fixtures
from tests.conftest import TOKENIZER
from tests.random_model import random_model

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden"


def run(module, *flags):
    """(exit code, standard output, standard error) of `python -m launch.<module>`."""
    command = [sys.executable, "-m", f"launch.{module}", *map(str, flags)]
    env = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tiny, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.save_config(folder, tiny)
    checkpoint.copy_tokenizer(TOKENIZER, folder)
    with checkpoint.Manager(folder) as manager:
        manager.save(1, random_model(tiny, tokenizer).params)
    return folder


def test_explain_equals_the_golden_tensors(tmp_path):
    case = next(case for case in json.loads((GOLDEN / "index.json").read_text()) if "500x375_short" in case["file"])
    golden = np.load(GOLDEN / case["file"])
    code, out, error = run(
        "explain",
        f"--checkpoint={GOLDEN / 'avg-llava-tiny'}",
        f"--vision_tower={GOLDEN / 'vision_tower'}",
        f"--image={GOLDEN / case['image']}",
        f"--prompt={case['prompt']}",
        "--raw",
        f"--output={tmp_path / 'x.npz'}",
        f"--figure={tmp_path / 'x.png'}",
    )
    assert code == 0, error
    assert f"{golden['router_choice_granularity'][0]} tokens a tile" in out
    ours = np.load(tmp_path / "x.npz")
    for name in ("input_ids", "seq_len", "router_choice", "router_choice_granularity"):
        np.testing.assert_array_equal(ours[name], golden[name], name)
    np.testing.assert_allclose(ours["router_logits"], golden["router_logits.0"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours["router_pre_norm"], golden["router_pre_norm.0"], atol=1e-4, rtol=1e-4)
    for g in (36, 72, 144, 288, 576, "router"):
        np.testing.assert_allclose(ours[f"logits.{g}"], golden[f"logits.{g}[-1]"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours["votes.0"].sum(1).mean(0), ours["router_pre_norm"][0], atol=1e-3)
    assert Image.open(tmp_path / "x.png").width > 1000


def test_a_published_checkpoint_tells_no_paths(tiny, tokenizer, folder, tmp_path):
    training = {"phase": "rglf", "init_from": str(tmp_path / "one"), "data": {"path": "jersey?turns=1"}}
    source = tmp_path / "run"
    checkpoint.save_config(source, tiny, training, [4, 8, 16])
    checkpoint.copy_tokenizer(TOKENIZER, source)
    shutil.copytree(folder / "checkpoints", source / "checkpoints")
    code, _, error = run("publish", f"--checkpoint={source}", f"--output={tmp_path / 'out'}")
    assert code == 0, error
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.meta["training"] == training | {"init_from": "one"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoints", "config.json", "tokenizer"]


def test_answer(tiny, tokenizer, folder, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    common = (f"--checkpoint={folder}", f"--image={tmp_path / 'a.png'}", "--prompt=Who?", "--max_new_tokens=6")
    code, out, error = run("answer", *common, "--stream")
    assert code == 0, error
    text, choice, times = out.rsplit("\n", 3)[:3]
    assert text == random_model(tiny, tokenizer).answer(tmp_path / "a.png", "Who?", max_new_tokens=6).text
    assert choice.startswith("image 0: ") and "visual tokens, 6 new tokens" in times
    total, compiling = map(float, re.search(r"total ([\d.]+) s, of which ([\d.]+) s compiling$", times).groups())
    assert 0 < compiling <= total + 0.01


def test_images_over_max_pixels(folder, tmp_path):
    image, data = tmp_path / "a.png", tmp_path / "test.json"
    Image.new("RGB", (40, 30), "red").save(image)
    turns = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "nobody"}]
    data.write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    fixtures.write_hub(tmp_path / "pope", "pope")
    asking, workdir = (f"--image={image}", "--prompt=Who?"), f"--workdir={tmp_path / 'out'}"
    cases = {
        ("answer", *asking): "40 x 30 is over 99 pixels (max_pixels)",
        ("explain", *asking): "40 x 30 is over 99 pixels (max_pixels)",
        ("evaluate", f"--data={data}", f"--images={tmp_path}", workdir): "the first for too_large_image",
        ("benchmark", "--task=pope", f"--data={tmp_path / 'pope'}", workdir): "none of 6 rows can be asked",
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run, *command, f"--checkpoint={folder}", "--max_pixels=99") for command in cases]
        for done, message in zip(runs, cases.values(), strict=True):
            code, _, error = done.result()
            assert code == 2 and message in error, error


def test_evaluate(folder, tmp_path):
    flags = (
        f"--checkpoint={folder}",
        "--data=jersey?split=test&size=12&paired=true",
        f"--workdir={tmp_path}",
        "--max_new_tokens=2",
        "--batch_size=8",
    )
    code, out, error = run("evaluate", *flags)
    assert code == 0, error
    assert "adaptive" in out and "12 questions, 0 skipped" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["n"] == 12
    assert set(report["seconds"]["answer"]["fixed"]) == set(report["accuracy"]["fixed"]) == {"4", "8", "16"}
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["id"] for line in lines}) == 12

    answers = (tmp_path / "answers.jsonl").stat()
    code, out, error = run("tradeoff", *flags, "--cost_weights=0,1e6", "--timed=2", "--rounds=1")
    assert code == 0, error
    assert (tmp_path / "answers.jsonl").stat().st_mtime == answers.st_mtime  # nothing was asked again
    points = {point["name"]: point for point in json.loads((tmp_path / "tradeoff.json").read_text())["points"]}
    assert points["cost weight 0"]["accuracy"] == report["accuracy"]["adaptive"]
    assert points["cost weight 1e+06"]["visual_tokens"] == points["always 4"]["visual_tokens"]
    assert points["oracle"]["seconds"] > 0 and "cost weight 1e+06" in out
    assert (tmp_path / "plots" / "tradeoff.png").stat().st_size > 10000

    frontiers = json.loads((tmp_path / "tradeoff.json").read_text())["frontier"]
    assert list(frontiers) == ["visual tokens", "GFLOPs", "seconds"]
    for found in frontiers.values():
        assert set(found["areas"]) == {"fixed", "random", "router", "escalation", "combined", "oracle"}
    assert (tmp_path / "plots" / "frontier.png").stat().st_size > 10000

    code, out, error = run("calibrate", *flags)
    assert code == 2 and "8 independent questions cannot support alpha=0.01 with delta=0.025: at least 368" in error
    assert not (folder / "calibration.json").exists()
    code, out, error = run("calibrate", *flags, "--alpha=0.95", "--begin=4,auto")
    assert code == 0, error
    assert "12 questions, 8 of them independent" in out
    thresholds = json.loads((folder / "calibration.json").read_text())["thresholds"]
    assert set(thresholds) == {"4", "auto"}
    model, image = AvgLlava.load(folder), Image.new("RGB", (40, 30))
    prepared = model.prepare(Request("Who?", image, granularity=4, escalate="calibrated"))
    assert prepared.request.escalate == thresholds["4"]
    for options in ({"granularity": 8}, {"cost_weight": 1.0}):
        with pytest.raises(ValueError, match="escalate=calibrated is known for granularity=4 or auto of all images"):
            model.prepare(Request("Who?", image, escalate="calibrated", **options))
    with pytest.raises(ValueError, match="holds without max_visual_tokens: give one of them"):
        model.prepare(Request("Who?", image, granularity=4, escalate="calibrated", max_visual_tokens=90))
    before = json.loads((folder / "calibration.json").read_text()) | {"format": 1}  # of escalation in one step
    for text in ("{}", json.dumps(before)):
        (folder / "calibration.json").write_text(text)
        with pytest.raises(ValueError, match="calibration.json is not a calibration of this version"):
            AvgLlava.load(folder).prepare(Request("Who?", escalate="calibrated"))
    (folder / "calibration.json").unlink()

    code, _, error = run("evaluate", *flags, "--max_new_tokens=3")
    assert code == 2 and "holds answers for max_new_tokens=2, not 3: use another --workdir" in error


@pytest.mark.parametrize(
    "module, flags, message",
    [
        ("answer", ["--prompt=a", "--checkpoint=nowhere"], "checkpoint folder nowhere does not exist"),
        ("answer", ["--prompt=a", "--top_p=x"], "--top_p=x"),
        ("explain", ["--prompt=a", "--image=a.png", "--output=nowhere/x.npz"], "its folder does not exist"),
        ("explain", ["--prompt=a"], "--image is missing"),
        ("evaluate", ["--data=nowhere.json", "--workdir=w"], "nowhere.json does not exist"),
        ("tradeoff", ["--data=x", "--workdir=w", "--cost_weights=1,-2"], "--cost_weights=1,-2: give numbers of 0 or"),
        ("train", ["--config=configs/own_data.py", "--workdir=w", "--config.depth=3"], "config has no setting 'depth'"),
        ("train", ["--config=configs/jersey.py:nope", "--workdir=w"], "configs/jersey.py:nope: choose grounding"),
        ("train", ["--config=configs/own_data.py", "--workdir=w", "--checkpoint=x"], "Unknown command line flag"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(module, flags, message):
    code, _, error = run(module, *flags)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
