"""Chips to plan for: their makers' figures, and how XLA compiles for them on a machine without one.

    target("v5e:8x8")   64 TPUs            libtpu compiles, `pip install -e '.[plan]'`
    target("h100:8x4")  4 hosts of 8 GPUs  XLA's CUDA plugin compiles, `pip install -e '.[plan-gpu]'`
    target("cpu:8")     8 CPU devices      of this machine

CPUs have no figures of speed or memory.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from avg_llava_jax import extras

GIB = 2**30
SHARE = 0.75
"""The share of a GPU's memory that JAX takes, unless XLA_CLIENT_MEM_FRACTION is set."""
LARGEST_SHARE = 0.95
"""The share that a GPU which runs nothing else can give to JAX; the driver and CUDA keep the rest."""


class Card(NamedTuple):
    """Further figures of a GPU that XLA's compiler needs, as NVIDIA's driver gives them: XLA's `target_config/specs`.

    capability: CUDA compute capability. cores: streaming multiprocessors, with `lanes` fp32 units each. clock: GHz.
    cache: bytes of L2. shared: bytes of shared memory of a core. network: bytes/s a GPU sends to other hosts.
    threads: of a core.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    clock: float
    cache: int
    shared: int
    network: float
    threads: int = 2048


class Chip(NamedTuple):
    """One device (half a chip of TPU7x) by its maker's figures.

    kinds: its names in JAX's `device_kind`. memory: bytes; for a TPU those that programs may use.
    flops: dense bf16 FLOP/s. bandwidth: bytes/s of its memory. links: bytes/s that it sends to its neighbours over all
    links together, one direction.
    """

    kinds: tuple[str, ...]
    memory: float
    flops: float
    bandwidth: float
    links: float
    card: Card | None = None


AMPERE = Card((8, 0), 108, 64, 1.41, 40 * 2**20, 167936, 25e9)
HOPPER = Card((9, 0), 132, 128, 1.98, 50 * 2**20, 233472, 50e9)
ADA = Card((8, 9), 128, 128, 2.535, 75497472, 102400, 3e9, 1536)
BLACKWELL = Card((10, 0), 148, 128, 1.965, 132644864, 233472, 50e9)

CHIPS = {
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(("TPU v5", "TPU v5p"), 95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 31.25 * GIB, 918e12, 1638e9, 400e9),
    "tpu7x": Chip(("TPU7x",), 94.75 * GIB, 1153.5e12, 3690e9, 300e9),
    "a100-40": Chip(("NVIDIA A100-SXM4-40GB",), 42331013120, 312e12, 1555e9, 300e9, AMPERE),
    "a100-80": Chip(("NVIDIA A100-SXM4-80GB",), 85100068864, 312e12, 2039e9, 300e9, AMPERE),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 84942979072, 989e12, 3352e9, 450e9, HOPPER),
    "h100-pcie": Chip(
        ("NVIDIA H100 PCIe",), 84942979072, 756e12, 2039e9, 64e9, HOPPER._replace(cores=114, clock=1.755)
    ),
    "h200": Chip(("NVIDIA H200",), 151397597184, 989e12, 4800e9, 450e9, HOPPER),
    "b200": Chip(("NVIDIA B200",), 191514411008, 2250e12, 7672e9, 900e9, BLACKWELL),
    "rtx4090": Chip(("NVIDIA GeForce RTX 4090",), 25433735168, 165.2e12, 1008e9, 32e9, ADA),
}
"""Name of a topology -> chip. Sources: https://docs.cloud.google.com/tpu/docs/v5e and its neighbours, NVIDIA's data
sheets for A100, H100, H200 and DGX B200, its Ada white paper. `a100-80` is the A100 SXM; an H100 PCIe without a bridge
sends over PCIe 5, an RTX 4090 over PCIe 4."""

# Without a GPU to time them on, XLA makes every product a Triton fusion, and odd sizes fail with "Couldn't find output
# tile sizes". On a GPU, where XLA times them, most are cuBLAS calls.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


class Target(NamedTuple):
    """Devices to compile for.

    chip: None for CPUs. memory: bytes of each device that a program may use, None for CPUs.
    links: bytes/s that a device sends; for GPUs on several hosts at most its share of the host's network.
    options: XLA's compiler options for them.
    """

    topology: str
    devices: Sequence[jax.Device]
    chip: Chip | None = None
    memory: float | None = None
    links: float | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


def target(topology: str) -> Target:
    """The devices of a topology, whether or not they exist.

    `v5e:8x8`, `v5p:2x2x4`, `v6e:4x4`, `tpu7x:2x2x1` (4 chips, 8 devices): a TPU slice. `h100:8`: 8 GPUs of one host,
    `h100:8x4`: 8 on each of 4 hosts. `cpu:8`: 8 CPU devices of this machine.

    The process then runs on the CPU alone; call this before JAX runs anything.

    Raises:
      ValueError: the topology is unknown, or its compiler is not installed.
    """
    name, _, size = topology.partition(":")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for other devices cannot be loaded here
    if name == "cpu" and size.isdecimal() and int(size):
        jax.config.update("jax_num_cpu_devices", int(size))
        return Target(topology, jax.devices())
    if name not in CHIPS:
        raise ValueError(
            f"topology {topology!r}: give cpu:N, {_names(gpus=True)} and how many, as h100:8, or {_names(gpus=False)} "
            "and a shape, as v5e:4x4"
        )
    chip = CHIPS[name]
    if chip.card is None:
        return Target(topology, _tpus(topology), chip, chip.memory, chip.links)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size):
        raise ValueError(f"topology {topology!r}: give the GPUs of a host and the hosts, as {name}:8 or {name}:8x4")
    each, hosts = (*map(int, size.split("x")), 1)[:2]
    links = chip.links if hosts == 1 else min(chip.links, each * chip.card.network)
    return Target(topology, _gpus(topology, chip, each, hosts), chip, chip.memory * share(), links, GPU_OPTIONS)


def by_kind(device_kind: str) -> Chip | None:
    """The chip of a `device_kind`, by its longest known prefix: "NVIDIA H200" matches "NVIDIA H200 141GB HBM3e"."""
    known = {kind: chip for chip in CHIPS.values() for kind in chip.kinds}
    longest = max((kind for kind in known if device_kind.startswith(kind)), key=len, default=None)
    return known.get(longest)


def share() -> float:
    """The share of a GPU's memory that JAX takes: XLA_CLIENT_MEM_FRACTION, its old name, or 0.75.

    Raises:
      ValueError: the variable is not a number above 0 and at most 1.
    """
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    name, text = next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", str(SHARE)))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"{name}={text}: give the part of a GPU's memory to use, above 0 and at most 1")
    return value


def description(chip: Chip) -> str:
    """A GPU as the text of XLA's `GpuTargetConfigProto`; without a field XLA aborts, or chooses other fusions."""
    card = chip.card
    major, minor = card.capability
    accelerated = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor}{accelerated} }}
  core_count: {card.cores} fpus_per_core: {card.lanes} clock_rate_ghz: {card.clock}
  device_memory_size: {int(chip.memory)} memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {card.cache}
  shared_memory_per_core: {card.shared} shared_memory_per_block_optin: {card.shared - 1024}
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: {card.threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{chip.kinds[0]}"
"""


def missing(chip: Chip) -> str | None:
    """The packages that compiling for a chip lacks, and the extra that installs them; None if nothing is missing."""
    if chip.card is None:
        return None if _installed("libtpu") else extras.lacking("plan", "libtpu")
    needs = {
        "jax-cuda12-plugin": _installed("jax_plugins.xla_cuda12") or _installed("jax_plugins.xla_cuda13"),
        "nvidia-cuda-nvcc-cu12": _installed("nvidia.cuda_nvcc") or _installed("nvidia.cu13") or shutil.which("ptxas"),
        "nvidia-cudnn-cu12": _installed("nvidia.cudnn"),
    }
    absent = [name for name, found in needs.items() if not found]
    return extras.lacking("plan-gpu", ", ".join(absent)) if absent else None


def _tpus(topology: str) -> Sequence[jax.Device]:
    _need(topology)
    # libtpu looks for its TPU machine, and for other processes that use it; this machine has neither.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"topology {topology!r} is not known to libtpu: {str(error).splitlines()[0]}") from None


def _gpus(topology: str, chip: Chip, each: int, hosts: int) -> Sequence[jax.Device]:
    _need(topology)
    shape = f"1x{hosts}x{each}"  # partitions x hosts x devices
    return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=description(chip)).devices


def _need(topology: str) -> None:
    if absent := missing(CHIPS[topology.partition(":")[0]]):
        raise extras.MissingExtra(f"topology {topology!r} needs {absent}")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing too
        return False


def _names(gpus: bool) -> str:
    return ", ".join(name for name, chip in CHIPS.items() if bool(chip.card) == gpus)
