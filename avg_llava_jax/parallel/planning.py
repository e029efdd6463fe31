"""What a config would cost on devices that are not there: its real programs, compiled ahead of time from shapes alone.

The `libtpu` package compiles for TPU topologies on any machine. A plan says what each device would hold, what it
would compute and send, and how long that takes at the least.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import foreign
from avg_llava_jax.data.feedback import read_feedback
from avg_llava_jax.data.packing import Shape, load_tiles
from avg_llava_jax.data.pipeline import EMPTY, collate_rows
from avg_llava_jax.inference import generate
from avg_llava_jax.parallel import costs, placement, sharding
from avg_llava_jax.training import config as training_config
from avg_llava_jax.training import setup
from avg_llava_jax.training.step import Step

GIB = 2**30


class Chip(NamedTuple):
    """One device as its maker describes it: bytes of memory that programs may use, bf16 FLOP/s, bytes/s of its memory,
    and bytes/s that it sends to its neighbours over all links together (half the bidirectional figure)."""

    memory: float
    flops: float
    bandwidth: float
    links: float


CHIPS = {
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 200e9),
    "v5p": Chip(95.74 * GIB, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.25 * GIB, 918e12, 1638e9, 400e9),
}
"""By the name that begins a topology: https://docs.cloud.google.com/tpu/docs/v5e and its neighbours."""


class Target(NamedTuple):
    """Devices to compile for; `chip` is None where nothing is known of them."""

    topology: str
    devices: Sequence[jax.Device]
    chip: Chip | None


def target(topology: str) -> Target:
    """`v5e:8x8`, `v5p:2x2x4`, `v6e:4x4`: a TPU slice; `cpu:8`: as many devices of this machine.

    Everything else of this process runs on the CPU from then on; call it before anything has.

    Raises:
      ValueError: no such topology, or libtpu is not installed.
    """
    kind, _, size = topology.partition(":")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it has nothing to run what is compiled for others
    if kind == "cpu" and size.isdecimal() and int(size):
        jax.config.update("jax_num_cpu_devices", int(size))
        return Target(topology, jax.devices(), None)
    if kind not in CHIPS:
        raise ValueError(f"topology {topology!r}: give cpu:N, or {', '.join(CHIPS)} and a shape, as v5e:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology {topology!r} needs libtpu: pip install 'avg_llava_jax[plan]'")
    # libtpu looks for the machine that it runs on, and for others that use it; here is neither.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(f"topology {topology!r} is not known to libtpu: {str(error).splitlines()[0]}") from None
    return Target(topology, devices, CHIPS[kind])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program costs.

    held: bytes a device of each kind of argument. temporaries: bytes a device that the program needs besides, None
        where XLA gave up. total: all of it, outputs included that reuse no argument.
    flops: of matrix products, over all devices. recomputed: the part of them that rematerialisation adds.
    traffic: by kind of collective.
    """

    program: str
    target: Target
    held: dict[str, int]
    temporaries: float | None
    total: float
    flops: float
    recomputed: float
    traffic: dict[str, costs.Traffic]

    @property
    def fits(self) -> bool | None:
        """None where the memory of the devices is not known."""
        return (
            None if self.target.chip is None else self.temporaries is not None and self.total <= self.target.chip.memory
        )

    @property
    def seconds(self) -> dict[str, float]:
        """The least time that each resource needs, if it were busy all the time; the longest of them is the roofline.

        memory: every argument is read once.
        """
        chip = self.target.chip
        if chip is None:
            return {}
        return {
            "compute": self.flops / len(self.target.devices) / chip.flops,
            "memory": sum(self.held.values()) / chip.bandwidth,
            "network": sum(each.sent for each in self.traffic.values()) / chip.links,
        }


def model_of(config: ml_collections.ConfigDict) -> ModelConfig:
    """The model that a run of this config would train; where it does not say, and `init_from` is not set, the 7B."""
    config = training_config.read(config)
    folder = config.init_from
    if not folder:
        model = ModelConfig()
    elif foreign.is_foreign(folder):
        model = foreign.inspect(folder, config.vision_tower or None).config
    else:
        model, _ = checkpoint.read_config(folder)
    return setup.override(model, config.model)


def largest_shape(model: ModelConfig, tiles: int = 0, text: int = 512, answer: int = 128) -> Shape:
    """The batch shape of samples with one image of the largest mosaic (or of `tiles` tiles), without any padding."""
    width, height = max(model.pinpoints, key=math.prod)
    return Shape(tiles or 1 + width * height // model.vision.image_size**2, 1, text, answer, 1.0)


def train_step(config: ml_collections.ConfigDict, target: Target, shape: Shape) -> Plan:
    """The step that `launch.train` runs, on batches of one shape."""
    model, config = model_of(config), training_config.read(config)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), target.devices)
    setup.check_step(config, mesh)
    nothing, tiles = None, load_tiles(EMPTY, model)
    if config.rglf.feedback:
        nothing = next(iter(read_feedback(config.rglf.feedback, model.granularities).values()))
        tiles = tiles if nothing.features is None else nothing.features[:0]

    def traced(config: training_config.TrainConfig) -> tuple[Any, dict[str, Any]]:
        step = Step(config, model, mesh)
        rows = collate_rows(
            [EMPTY],
            [tiles],
            shape,
            model,
            setup.packed_granularities(config, model),
            words=config.phase == "grounding",
            stored=[nothing] if nothing else None,
        )
        ours, frozen = step.split(step.params)
        held = {
            "trained": ours,
            "frozen": frozen,
            "optimizer": step.state,
            "batch": _batch(rows, config.batch_size, mesh),
        }
        return step.update.trace(ours, step.state, frozen, held["batch"], jax.ShapeDtypeStruct((), jnp.int32)), held

    with jax.set_mesh(mesh):
        program, held = traced(config)
        useful = program
        if config.remat != "none":
            useful, _ = traced(dataclasses.replace(config, remat="none"))
        return _plan("train step", target, program, held, useful)


def answering(config: ml_collections.ConfigDict, target: Target, shape: Shape, room: int) -> Iterator[Plan]:
    """The programs that answer `config.batch_size` questions at the finest granularity, `room` tokens at most each.

    Parameters are in the compute dtype. Of `decode` one token of each answer is counted.
    """
    model, config = model_of(config), training_config.read(config)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), target.devices)
    rows, dtype = config.batch_size, setup.DTYPES[config.compute_dtype]
    whole = parameters.abstract(model, dtype)
    params = sharding.placed(whole, sharding.shardings(mesh, whole))
    batch = collate_rows([EMPTY], [load_tiles(EMPTY, model)], shape, model, ())
    batch = _batch(
        {key: batch[key] for key in ("pixels", "tile_image", "first_tile", "text", "instruction")}, rows, mesh
    )
    length = generate.length_bucket(shape.length(model, model.granularities[-1]), model.language.max_length)

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def spread(tree: Any, *axes: str | None) -> Any:
        def at(leaf: Any) -> NamedSharding:
            return NamedSharding(mesh, placement.fitting(mesh, placement.spec(*axes), leaf.shape))

        return sharding.placed(tree, jax.tree.map(at, tree))

    with jax.set_mesh(mesh):
        held = {"parameters": params, "batch": batch}
        yield _plan("see and route", target, generate.see_and_route.trace(model, params, batch), held)

        embeds = spread(array(rows, length, model.language.width, dtype=dtype), "batch", None, None)
        program = generate.prefill.trace(model, params, embeds, array(rows), room)
        yield _plan(f"prefill of {length}", target, program, {"parameters": params, "batch": embeds})

        _, cache = program.out_info
        cache = spread(cache, "layers", "batch", None, "heads", None)
        state = generate.State(cache, array(rows), array(rows, room), array(rows), array(rows, dtype=bool))
        sampling = generate.Sampling(
            *(array(rows, dtype=kind) for kind in (jnp.float32, jnp.float32, jnp.int32, jnp.uint32, jnp.int32))
        )
        program = generate.decode.trace(model, params, state, sampling, array(1), array(), True)
        yield _plan("decode, a token", target, program, {"parameters": params, "cache": cache})


def _batch(rows: dict[str, Any], count: int, mesh: Mesh) -> Any:
    """Shapes of a batch of `count` rows, given one row."""
    at = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=at), rows)


def _plan(name: str, target: Target, program: Any, held: dict[str, Any], useful: Any = None) -> Plan:
    """Compile a trace and read off what it costs; `useful`: the same program without rematerialisation."""
    flops = costs.flops(program.jaxpr.jaxpr)
    recomputed = flops - costs.flops(useful.jaxpr.jaxpr) if useful else 0.0
    sizes = {kind: sum(map(_bytes, jax.tree.leaves(tree))) for kind, tree in held.items()}
    plan = functools.partial(Plan, name, target, sizes, flops=flops, recomputed=recomputed)
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([MGT]) of", str(error))
        if not used:
            raise
        return plan(temporaries=None, total=float(used[1]) * 2 ** {"M": 20, "G": 30, "T": 40}[used[2]], traffic={})
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes
    return plan(temporaries=memory.temp_size_in_bytes, total=total, traffic=costs.collectives(compiled.as_text()))


def _bytes(leaf: Any) -> int:
    """What one device holds of an array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def knobs(config: ml_collections.ConfigDict, devices: int) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
    """Ways to need less memory for the same step, the cheapest first: a flag, and the config with it."""

    def turned(flags: dict[str, Any]) -> tuple[str, ml_collections.ConfigDict]:
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(flags)
        return " ".join(f"--config.{key}={value}" for key, value in flags.items()), other

    sizes = config.mesh
    if config.phase != "rglf" and config.remat != "full":  # RGLF has no backward pass through the model
        yield turned({"remat": "full"})
    least = {"remat": "full"} if config.phase != "rglf" and config.remat != "full" else {}
    if sizes.data != 1:
        least |= {"mesh.data": 1, "mesh.fsdp": -1}
        yield turned(least)
    copies = devices // abs(sizes.tensor)
    accumulate = config.optimizer.accumulate
    while config.batch_size % (2 * accumulate * copies) == 0:
        accumulate *= 2
        yield turned(least | {"optimizer.accumulate": accumulate})
    for tensor in (2, 4, 8):
        if tensor > abs(sizes.tensor) and devices % tensor == 0:
            yield turned(least | {"optimizer.accumulate": accumulate, "mesh.fsdp": -1, "mesh.tensor": tensor})
