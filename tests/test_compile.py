"""The core of the compile matrix: programs of a few seconds each, compiled for GPUs and TPUs that are not there."""

import json
import pathlib
import subprocess
import sys

import pytest

from avg_llava_jax.parallel import chips, costs
from launch.bench import compile_matrix

ROOT = pathlib.Path(__file__).parents[1]

CORE = r"^attention (577|1024|37) .*bfloat16|^attention 577 .*float32|^tiny answering bfloat16"
"""Lengths, head sizes and dtypes that take different kernels, forward and backward, and whole programs."""


@pytest.mark.parametrize("target", ["h100:1", "h100:8/tensor=8", "v5e:2x2/fsdp=2,tensor=2"])
def test_programs_compile(target, tmp_path):
    if missing := chips.missing(chips.CHIPS[target.partition(":")[0]]):
        pytest.skip(f"not installed: {missing}")
    flags = [f"--target={target}", f"--cases={CORE}", f"--known={tmp_path}", "--tables=", "--limit_s=200"]
    command = [sys.executable, "-m", "launch.bench.compile_matrix", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.rglob("*.json"))) == 5


DECODE = """
from avg_llava_jax.commands import planning
from avg_llava_jax.config import LanguageConfig, ModelConfig, VisionConfig
from avg_llava_jax.models import cache
from avg_llava_jax.parallel import chips, sharding
from avg_llava_jax.training.config import defaults
from launch.bench import compile_matrix

target, sizes = chips.target("v5e:2x2"), sharding.read_sizes("fsdp=1,tensor=4")
model = ModelConfig(
    vision=VisionConfig(width=64, heads=1, mlp_width=64, layers=2),
    language=LanguageConfig(vocab_size=512, width=512, mlp_width=512, layers=2, heads=32, kv_heads=32, head_dim=128),
)
config = defaults()
config.update({"compute_dtype": "bfloat16", "batch_size": 8})
config.mesh.update(sizes)
shape = planning.largest_shape(model, text=512, answer=128)
for stored, cache.positions_first in (("as it is", cache.positions_first), ("heads first", lambda: False)):
    *_, decode = planning.answers(config, model, target, shape, 64)
    print(stored, compile_matrix.judge(decode, target, sizes, {})["faults"])
"""


def test_decode_on_tpus_does_not_copy_its_cache():
    """And the matrix sees it where it does: stored heads first, all is copied into the loop and out of it."""
    if missing := chips.missing(chips.CHIPS["v5e"]):
        pytest.skip(f"not installed: {missing}")
    done = subprocess.run([sys.executable, "-c", DECODE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, other = done.stdout.splitlines()
    assert ours == "as it is []"
    assert "heads first ['temporaries are 0.76 of the cache', 'copies of the cache: 8, copy bf16[8,8,3648,128]" in other


def test_what_a_program_writes():
    hlo = """HloModule jit_f

%fused_computation (p: f32[8,16]) -> f32[8,16] {
  %inside = f32[8,600,600]{2,1,0} exponential(%p)
  ROOT %out = f32[8,16]{1,0} reduce(%inside, %zero), dimensions={1}, to_apply=%sum
}

%body (state: (s32[], bf16[2,3])) -> (s32[], bf16[2,3]) {
  %copied = bf16[2,3]{1,0} copy(%x)
  ROOT %next = (s32[], bf16[2,3]{1,0}) tuple(%i, %copied)
}

ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %loop = (s32[], bf16[2,3]) while(%init), condition=%less, body=%body
  %near = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %far = (f32[4,16]{1,0:T(8,128)}, f32[4,16]{0,1:T(8,128)}, u32[]{:S(2)}) copy-start(%q)
  ROOT %fusion = f32[8,16]{1,0} fusion(%p), kind=kLoop, calls=%fused_computation
}
"""
    found = costs.written(hlo)
    assert sorted(map(str, found)) == ["copy bf16[2,3]", "copy-start f32[4,16]", "fusion f32[8,16]"]
    assert sorted(array.size for array in found) == [12, 256, 512]


@pytest.mark.parametrize(
    "shape, length, heads, scores",
    [
        ((2, 16, 577, 577), 577, 16, True),
        ((32, 640, 577), 577, 16, True),  # padded to the kernel's blocks
        ((2, 577, 16, 577), 577, 16, True),
        ((2, 577, 1024), 577, 16, False),
        ((4096, 4096), 4096, 32, False),  # a weight
        ((2, 1024, 1024), 932, 4, False),  # weights of two layers
        ((2, 2, 132, 132), 132, 2, False),  # as small as a block
        ((2, 16, 256, 577), 577, 16, False),
        ((2, 4, 1024, 1024), 1024, 4, True),
        ((2, 1024, 1024), 1024, 4, False),  # a block of 256 queries of four heads
    ],
)
def test_what_counts_as_scores(shape, length, heads, scores):
    assert compile_matrix._is_scores(shape, length, heads) is scores


SAYS = """
import sys, time
sys.argv[1:] = []
print("begin first", flush=True)
print('end {"first": {"faults": []}}', flush=True)
print("begin second", flush=True)
"""


@pytest.mark.parametrize(
    "then, fault",
    [
        ("import os; os.abort()", "the compiler ended the process: signal 6"),
        ("time.sleep(60)", "not compiled after 2 s"),
    ],
)
def test_a_compiler_that_ends_or_does_not_is_a_line_of_the_table(then, fault, tmp_path, monkeypatch):
    """Its child is run again, and goes on behind the case that it was at."""
    started = []

    def child(command, **options):
        started.append(command)
        code = SAYS + then if len(started) == 1 else "pass"
        return original([sys.executable, "-c", code], **options)

    original = subprocess.Popen
    monkeypatch.setattr(compile_matrix.subprocess, "Popen", child)
    for name, value in {"WORKDIR": str(tmp_path), "ONLY": "", "LIMIT": 2.0}.items():
        monkeypatch.setattr(compile_matrix, name, type("Flag", (), {"value": value}))
    compile_matrix.compile_all("h100:1")
    known = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*/h100-1/*")}
    assert known == {"first": {"first": {"faults": []}}, "second": {"second": {"faults": [fault]}}}
    assert len(started) == 2 and "--child=h100:1" in started[0]


def test_tables_number_what_is_wrong():
    found = {
        "h100:1": {"step": {"total": 2**30, "faults": []}, "decode": {"total": 2**29, "faults": ["copies", "scores"]}},
        "v5e:2x2": {"step": {"faults": ["it crashed"]}, "decode": {"total": 2**28, "faults": ["copies"]}},
    }
    assert compile_matrix.tables(found).splitlines() == [
        "| GiB a device | h100:1 | v5e:2x2 |",
        "|---|---:|---:|",
        "| step | 1.00 | **no** (1) |",
        "| decode | 0.50 (2) (3) | 0.25 (2) |",
        "",
        "1. it crashed",
        "2. copies",
        "3. scores",
        "",
        "1 of 4 pass.",
    ]


def test_what_went_wrong_is_one_line():
    text = """INTERNAL: custom_partitioner: Traceback (most recent call last):
  File "fused_attention_stablehlo.py", line 575, in infer_sharding_from_operands
ValueError: Query, key and value should have same sharding.
At: fused_attention_stablehlo.py"""
    assert (
        compile_matrix._first_line(RuntimeError(text)) == "ValueError: Query, key and value should have same sharding."
    )
    assert compile_matrix._first_line(RuntimeError("no such thing\nat all")) == "RuntimeError: no such thing"
