"""Plans of the tiny jersey model, on forced CPU devices and, where their compilers are installed, on TPUs and GPUs."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pallas
from jax.sharding import NamedSharding, PartitionSpec

from avg_llava_jax.commands import planning
from avg_llava_jax.configs import avg_llava_7b, avg_llava_7b_router, jersey
from avg_llava_jax.parallel import chips, sharding
from avg_llava_jax.training import config as training_config
from avg_llava_jax.training import setup

ROOT = pathlib.Path(__file__).parents[1]
LACKING = {name: chips.missing(chips.CHIPS[name]) for name in ("v5e", "h100")}
TPU = pytest.mark.skipif(bool(LACKING["v5e"]), reason=f"not installed: {LACKING['v5e']}")
GPU = pytest.mark.skipif(bool(LACKING["h100"]), reason=f"not installed: {LACKING['h100']}")


def plan(*flags, **environment):
    """(exit code, standard output, standard error) of `launch.plan` on the tiny jersey model."""
    command = [sys.executable, "-m", "launch.plan", "--config=configs/jersey.py:tiny", "--text=32", "--answer=16"]
    done = subprocess.run([*command, *flags], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    logged = re.compile(r"WARNING: All log messages before|[IWE]\d{4} ")  # by XLA's plugins, in which no device is
    errors = [line for line in done.stderr.splitlines(keepends=True) if not logged.match(line)]
    return done.returncode, done.stdout, "".join(errors)


def figures(text):
    """{"all-gather": 0.12, ...} of one program."""
    return {name: float(number) for name, number in re.findall(r"^  (\S.*?)\s+([\d.e+-]+) [GTm]", text, re.MULTILINE)}


def test_the_step_on_eight_cpu_devices():
    code, out, error = plan("--topology=cpu:8", "--config.mesh.data=2", "--config.optimizer.accumulate=1")
    assert code == 0, error
    assert out.startswith("train step on cpu:8, 8 devices\n")
    found = figures(out)
    assert {"trained", "frozen", "optimizer", "batch", "temporaries", "in all", "operations"} <= found.keys()
    assert found["optimizer"] == pytest.approx(2 * found["trained"], rel=0.1)  # Adam's two moments
    assert found["in all"] > found["trained"] + found["optimizer"]


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
        f"{program} on v5e:2x2, 4 devices"
        for program in ("encode", "route", "prefill of 192", "prefill of 256 behind a prefix", "decode, a token")
    ]


ONE_GRANULARITY = ("--config.phase=connector", "--config.granularities=(4,)", "--config.compute_dtype=bfloat16")


@TPU
def test_what_does_not_fit_a_tpu_is_a_plan():
    """XLA's compiler for TPUs gives up on it, and words that in ever new ways; here on arrays of 8 GiB."""
    code = """if True:
        import jax, jax.numpy as jnp
        from avg_llava_jax.commands import planning
        from avg_llava_jax.parallel import chips, sharding
        target = chips.target("v5e:2x2")
        mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, target.devices)
        side = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16, sharding=sharding.replicated(mesh))
        for products, fits in ((3, False), (0, True)):
            def chain(a):
                b = [a]
                for _ in range(products):
                    b.append(jnp.sin(b[-1] @ a))
                return sum(jnp.sum(x @ a) for x in b[1:]) + a[0, 0]
            found = planning.plan(planning.Program("chain", jax.jit(chain).trace(side), {"a": side}), target)
            assert found.fits is fits and found.refused.startswith("" if fits else "RESOURCE_EXHAUSTED"), found
            assert found.held == {"a": 2**33} and (found.total is None) != fits, found
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@GPU
def test_steps_on_gpus_with_advice():
    """XLA's compiler for GPUs never gives up: arguments, outputs and temporaries are added up."""
    little = {"XLA_CLIENT_MEM_FRACTION": "0.0002"}
    code, out, error = plan("--topology=h100:1", *ONE_GRANULARITY, "--config.batch_size=64", **little)
    assert code == 0, error
    assert " of 0.016: DOES NOT FIT" in out and " of 0.016: fits" in out and out.rstrip().endswith("it fits")
    assert "with XLA_CLIENT_MEM_FRACTION=0.95 it fits a GPU that runs nothing else" in out


@GPU
def test_what_is_kept_alone_does_not_fit():
    """Nothing is tried: no setting makes parameters and moments smaller."""
    code, out, error = plan("--topology=h100:4x2", *ONE_GRANULARITY, XLA_CLIENT_MEM_FRACTION="0.0000001")
    assert code == 0, error
    assert out.startswith("train step on h100:4x2, 8 devices\n") and "trying" not in out
    assert out.rstrip().endswith("take a larger topology")


def test_adapters_and_int8_are_tried_last():
    def flags(module, **values):
        config = module.get_config()
        config.update_from_flattened_dict(values)
        found = list(planning.frozen_knobs(config, 1))
        for _, other in found:  # each of them runs
            settings = training_config.read(other)
            setup.check_step(settings, sharding.make_mesh(dataclasses.asdict(settings.mesh), jax.devices()[:1]))
        return [flag.replace("--config.", "") for flag, _ in found]

    low = "optimizer.lora.rank=64 compute_dtype=bfloat16 remat=full"
    low += " optimizer.lora.targets=\"('language', 'encoder')\""
    whole = [low, f"{low} quantize=int8", f"{low} quantize=int8 optimizer.accumulate=128"]
    assert flags(avg_llava_7b) == whole
    assert flags(avg_llava_7b_router, batch_size=1) == ["quantize=int8"]
    assert flags(avg_llava_7b_router, quantize="int8") == []


def test_less_is_held_with_adapters_on_int8():
    config, target = jersey.get_config("tiny"), chips.Target("here", jax.devices()[:1], memory=None)
    config.phase = "multi_granularity"
    tried = [config, *(other for _, other in planning.frozen_knobs(config, 1))]
    for other in tried[1:]:
        other.optimizer.lora.rank = 2  # of a model this small
    held = [planning.lasting(other, target) for other in tried]
    assert held[0] > held[1] > held[2] == held[3]  # more micro-batches change activations alone


def test_what_fits_is_computed():
    """A sum of two (256, 256) arrays in fp32: 512 KiB of arguments and 256 of output, less what it may reuse."""
    devices = jax.devices()[:1]
    at = NamedSharding(sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices), PartitionSpec())
    side = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=at)

    def cost(donated, memory):
        traced = jax.jit(jnp.add, donate_argnums=donated).trace(side, side)
        program = planning.Program("sum", traced, {"batch": (side, side)})
        return planning.plan(program, chips.Target("here", devices, memory=memory))

    found = cost((), 768 * 2**10)
    assert found.total - found.temporaries == 768 * 2**10 and found.held == {"batch": 512 * 2**10}
    assert cost((), found.total).fits is True and cost((), found.total - 1).fits is False
    assert cost((), None).fits is None
    assert cost(0, 2**20).total == found.total - 256 * 2**10


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "tpu7x"])
def test_chips_against_what_jax_knows(name):
    """JAX counts all of a chip's memory, of which programs may use a little less; its bandwidth of v5p is 11 % less."""
    version = pallas.ChipVersion[f"TPU_{name.removeprefix('tpu').upper()}"]
    cores = 2 if version.supports_megacore else 1
    theirs, ours = pallas.get_tpu_info_for_chip(version, cores), chips.CHIPS[name]
    assert 0.97 < ours.memory / (cores * theirs.hbm_capacity_bytes) <= 1
    assert ours.flops == pytest.approx(cores * theirs.bf16_ops_per_second, rel=0.005)
    assert ours.bandwidth == pytest.approx(cores * theirs.mem_bw_bytes_per_second, rel=0.13 if name == "v5p" else 0.005)


@GPU
@pytest.mark.parametrize("name", [name for name, chip in chips.CHIPS.items() if chip.card])
def test_gpus_as_xla_reads_them(name):
    """In a process of its own: where a description is not whole, XLA ends the process."""
    code = f"""if True:
        from avg_llava_jax.parallel import chips
        target = chips.target("{name}:4x2")
        device, card = target.devices[5], target.chip.card
        assert len(target.devices) == 8 and device.process_index == 1, target
        assert chips.by_kind(device.device_kind) is target.chip, device.device_kind
        assert device.compute_capability == ".".join(map(str, card.capability)) and device.core_count == card.cores
        assert target.links == min(target.chip.links, 4 * card.network)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_chips_by_the_names_that_jax_gives_them():
    assert chips.by_kind("NVIDIA H200 141GB HBM3e") is chips.CHIPS["h200"]
    assert chips.by_kind("TPU v5 lite") is chips.CHIPS["v5e"] and chips.by_kind("TPU v5") is chips.CHIPS["v5p"]
    assert chips.by_kind("NVIDIA T4") is None and chips.by_kind("cpu") is None


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    monkeypatch.setattr(chips, "_installed", lambda module: module == "nvidia.cudnn")
    monkeypatch.setattr(chips.shutil, "which", lambda name: None)
    assert chips.missing(chips.CHIPS["b200"]) == (
        "jax-cuda12-plugin, nvidia-cuda-nvcc-cu12, which is not installed: install the extra `plan-gpu`, "
        "in a checkout by pip install -e '.[plan-gpu]'"
    )
    assert chips.missing(chips.CHIPS["v6e"]).startswith("libtpu, which is not installed: install the extra `plan`, ")
    monkeypatch.setattr(chips, "_installed", lambda module: True)
    assert chips.missing(chips.CHIPS["b200"]) is None


@pytest.mark.parametrize("text, share", [("", 0.75), ("0.9", 0.9), ("1", 1.0)])
def test_the_share_of_a_gpu_is_what_jax_takes(monkeypatch, text, share):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", text)
    assert chips.share() == share


@pytest.mark.parametrize("text", ["0", "75", "most"])
def test_no_share_of_a_gpu(monkeypatch, text):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", text)
    with pytest.raises(ValueError, match=f"XLA_CLIENT_MEM_FRACTION={text}: give the part of a GPU's memory"):
        chips.share()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v9:2x2"], "topology 'v9:2x2': give cpu:N, a100-40, a100-80, h100"),
        (["--topology=h100:2x2x2"], "give the GPUs of a host and the hosts, as h100:8 or h100:8x4"),
        (["--topology=b200"], "topology 'b200': give the GPUs of a host and the hosts"),
        (["--topology=cpu:8", "--config.batch_size=12"], "batch_size=12 must be a multiple of 8"),
        (["--topology=cpu:8", "--config.remat=some"], "remat='some': choose none or dots or full"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    code, _, error = plan(*flags)
    assert code == 2 and message in error and error.count("\n") == 1
