"""Plans: the programs of a config, compiled ahead of time from shapes for devices that need not be present.

`chips.target` names the devices; XLA compiles for them on any machine. A plan holds what each device would store,
compute and send, and a lower bound on the time.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from avg_llava_jax import checkpoint, parameters, placement
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import foreign
from avg_llava_jax.data.feedback import read_feedback
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.packing import Shape, load_tiles
from avg_llava_jax.data.pipeline import EMPTY, collate_rows
from avg_llava_jax.eval import routing
from avg_llava_jax.inference import programs
from avg_llava_jax.inference.buckets import STEPS, length_bucket
from avg_llava_jax.inference.sampling import sampling_of, shaping_of
from avg_llava_jax.models import cache as kv_cache
from avg_llava_jax.models import language
from avg_llava_jax.parallel import costs, sharding
from avg_llava_jax.parallel.chips import Target
from avg_llava_jax.training import config as training_config
from avg_llava_jax.training import setup
from avg_llava_jax.training.feedback import measure_batch
from avg_llava_jax.training.step import Step


class Program(NamedTuple):
    """A traced program for a target, ready for XLA to compile.

    held: its arguments by kind, trees of shapes with shardings. donated: the kinds that it may overwrite. useful: the
    same program without rematerialisation, None where it has none.
    """

    name: str
    traced: jax.stages.Traced
    held: dict[str, Any]
    donated: tuple[str, ...] = ()
    useful: jax.stages.Traced | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The cost of one program.

    held: bytes per device of each kind of argument. temporaries: bytes per device that the program allocates besides.
        total: both, and outputs that reuse no argument. temporaries and total are None where XLA rejected the program.
    flops: of matrix products, over all devices. recomputed: the FLOPs among them that rematerialisation adds.
    traffic: by kind of collective.
    moves: transfers between a device's memory and its cores, by instruction.
    refused: XLA's reason for rejecting the program; only its TPU compiler rejects a program for its size.
    """

    program: str
    target: Target
    held: dict[str, int]
    temporaries: float | None
    total: float | None
    flops: float
    recomputed: float
    traffic: dict[str, costs.Traffic]
    moves: tuple[costs.Access, ...] = ()
    refused: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether the program fits a device; None where its memory is not known."""
        memory = self.target.memory
        return None if memory is None else self.total is not None and self.total <= memory

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds that each resource needs at its peak; the longest of them is the roofline, the lower bound on time.

        memory: counts one read of every argument.
        """
        chip = self.target.chip
        if chip is None:
            return {}
        return {
            "compute": self.flops / len(self.target.devices) / chip.flops,
            "memory": sum(self.held.values()) / chip.bandwidth,
            "network": sum(each.sent for each in self.traffic.values()) / self.target.links,
        }


def model_of(config: ml_collections.ConfigDict) -> ModelConfig:
    """The model that a run of this config would train; the 7B where neither config nor `init_from` says otherwise.

    A PyTorch folder needs no weights yet, only its JSON files and tokenizer.
    """
    config = training_config.read(config)
    folder = config.init_from
    if not folder:
        model = ModelConfig()
    elif foreign.is_foreign(folder):
        model = foreign.config_of(folder, config.vision_tower or None)
    else:
        model, _ = checkpoint.read_config(folder)
    return setup.override(model, config.model)


def largest_shape(model: ModelConfig, tiles: int = 0, text: int = 512, answer: int = 128) -> Shape:
    """The batch shape of samples with one image of the largest mosaic (or of `tiles` tiles), without padding."""
    largest = width, height = max(model.pinpoints, key=math.prod)
    shape = Shape(tiles or 1 + width * height // model.vision.image_size**2, 1, text, answer, 1.0)
    if tiles or not model.most_tiles:
        return shape
    shares = (visual_count(largest, model, g) / shape.visual(model, g) for g in model.granularities)
    return dataclasses.replace(shape, fill=max(shares))  # a reduced mosaic fills a part of its tiles' room


def train_step(config: ml_collections.ConfigDict, target: Target, shape: Shape) -> Plan:
    """The plan of the training step on batches of one shape."""
    return plan(training(config, model_of(config), target, shape), target)


def lasting(config: ml_collections.ConfigDict, target: Target) -> int:
    """Bytes per device that persist between training steps, parameters and optimizer, from shapes alone."""
    settings = training_config.read(config)
    mesh = sharding.make_mesh(dataclasses.asdict(settings.mesh), target.devices)
    step = Step(settings, model_of(config), mesh)
    return size((step.params, step.state))


def training(config: ml_collections.ConfigDict, model: ModelConfig, target: Target, shape: Shape) -> Program:
    """The training step of a model on batches of one shape."""
    config = training_config.read(config)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), target.devices)

    def traced(config: training_config.TrainConfig) -> tuple[Any, dict[str, Any]]:
        step, held = _step(config, model, mesh, shape)
        given = (held[name] for name in ("trained", "optimizer", "frozen", "batch"))
        return step.update.trace(*given, jax.ShapeDtypeStruct((), jnp.int32)), held

    with jax.set_mesh(mesh):
        program, held = traced(config)
        useful = None
        if config.remat != "none":
            useful, _ = traced(dataclasses.replace(config, remat="none"))
        return Program("train step", program, held, ("trained", "optimizer"), useful)


def beside_training(
    config: ml_collections.ConfigDict, model: ModelConfig, target: Target, shape: Shape
) -> Iterator[Program]:
    """The other programs of a run: the optimizer's first state, validation; in RGLF also of `feedback`, `explain`."""
    config = training_config.read(config)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), target.devices)
    with jax.set_mesh(mesh):
        step, held = _step(config, model, mesh, shape)
        trained, batch = held["trained"], held["batch"]
        yield Program("init", step.init.trace(trained), {"trained": trained})
        given = {name: held[name] for name in ("trained", "frozen", "batch")}
        yield Program("validation", step.evaluate.trace(*given.values()), given)
        if config.phase != "rglf":
            return
        params = parameters.abstract(model, setup.DTYPES[config.compute_dtype])
        given = {"parameters": sharding.placed(params, sharding.shardings(mesh, params)), "batch": batch}
        params = given["parameters"]
        yield Program("feedback", measure_batch.trace(model, config.rglf.execution, True, params, batch), given)
        pixels = batch["pixels"]
        yield Program("explain, encode", routing.encode.trace(model, params, pixels), given | {"batch": pixels})
        pyramid = jax.ShapeDtypeStruct(
            (*pixels.shape[:2], model.pyramid_rows, model.language.width),
            params["image_newline"].dtype,
            sharding=sharding.batch_sharding(mesh),
        )
        inputs = {name: batch[name] for name in routing.ROUTER_INPUTS}
        yield Program(
            "explain, route",
            routing.route.trace(model, params, pyramid, inputs),
            given | {"batch": inputs, "pyramid": pyramid},
        )


def _step(
    config: training_config.TrainConfig, model: ModelConfig, mesh: Mesh, shape: Shape
) -> tuple[Step, dict[str, Any]]:
    """A training step, and the shapes of what its update takes, by kind."""
    setup.check_step(config, mesh)
    nothing, tiles, pack = None, load_tiles(EMPTY, model), config.data.pack
    if pack > 1:
        longest = tuple(shape.length(model, g) for g in model.granularities)
        sizes = (pack * size for size in (shape.tiles, shape.images, shape.text, shape.answer))
        shape = Shape(*sizes, 0.0, pack, tuple(pack * size for size in longest), longest)
    if config.rglf.feedback:
        nothing = next(iter(read_feedback(config.rglf.feedback, model.granularities).values()))
        tiles = tiles if nothing.features is None else nothing.features[:0]
    rows = collate_rows(
        [EMPTY],
        [tiles],
        shape,
        model,
        setup.packed_granularities(config, model),
        words=config.phase == "grounding",
        stored=[nothing] if nothing else None,
    )
    step = Step(config, model, mesh)
    trained, frozen = step.split(step.params)
    batch = _batch(rows, config.rows, mesh)
    return step, {"trained": trained, "frozen": frozen, "optimizer": step.state, "batch": batch}


def answering(config: ml_collections.ConfigDict, target: Target, shape: Shape, room: int) -> Iterator[Plan]:
    """Plans of the programs that answer `config.batch_size` questions; `decode` is one token of each answer."""
    for program in answers(config, model_of(config), target, shape, room):
        yield plan(program, target)


def answers(
    config: ml_collections.ConfigDict, model: ModelConfig, target: Target, shape: Shape, room: int
) -> Iterator[Program]:
    """The engine's programs, for `config.batch_size` slots that hold a prompt of `shape` and `room` new tokens each.

    Parameters are in the compute dtype. One micro-batch encodes and routes one image per slot.
    """
    config = training_config.read(config)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh), target.devices)
    slots, dtype = config.batch_size, setup.DTYPES[config.compute_dtype]
    whole = parameters.abstract(model, dtype)
    params = sharding.placed(whole, sharding.shardings(mesh, whole))
    length = length_bucket(shape.length(model, model.granularities[-1]), model.language.max_length)
    capacity, side = length + room, model.vision.image_size

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    with jax.set_mesh(mesh):
        layers = jax.eval_shape(language.unstack, params["language"]["layers"])
        one = jax.tree.map(lambda leaf: NamedSharding(mesh, P(*leaf.sharding.spec[1:])), params["language"]["layers"])
        layers = tuple(sharding.placed(layer, one) for layer in layers)
        params = params | {"language": params["language"] | {"layers": layers}}

        empty = jax.eval_shape(lambda params: programs.empty.__wrapped__(model, params, slots, capacity, 1), params)
        cache = jax.tree.map(lambda leaf: _placed(mesh, leaf, *kv_cache.axes()), empty[0])
        pages = slots * shape.tiles
        pool = _placed(mesh, array(pages, *empty[1].shape[1:], dtype=dtype), None, None, "width")

        pixels = array(pages, side, side, 3, dtype=jnp.uint8)
        program = programs.encode.trace(model, params, pool, pixels, array(pages))
        yield Program("encode", program, {"parameters": params, "pool": pool, "batch": _local(pixels)}, ("pool",))

        program = programs.route.trace(model, params, pool, array(slots, shape.tiles), array(slots, 512), array(slots))
        yield Program("route", program, {"parameters": params, "pool": pool})

        held = {"parameters": params, "cache": cache, "pool": pool}
        for name, size, window in (
            (f"prefill of {length}", length, 0),
            ("prefill of 256 behind a prefix", min(256, length), capacity),
        ):
            by_slot = None if mesh.shape["data"] * mesh.shape["fsdp"] > 1 else array(slots)
            corners = (4,) if model.most_tiles else ()
            places, weights = array(slots, size, *corners), array(slots, size, 4, dtype=jnp.float32)
            chunk = programs.Chunk(
                by_slot, array(slots), array(slots), array(slots, size), places, weights if corners else None
            )
            program = programs.prefill.trace(model, params, cache, pool, chunk, window, 1)
            yield Program(name, program, held, ("cache",))

        rows = programs.Rows(array(slots), array(slots), array(slots))
        neutral = sampling_of(slots, [], [], shaping_of(slots, [], [], model.language.vocab_size, capacity))
        sampling = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), neutral)
        sizes = STEPS, capacity, True
        program = programs.decode.trace(model, params, cache, rows, sampling, array(1), array(), *sizes)
        yield Program("decode, a token", program, {"parameters": params, "cache": cache}, ("cache",))


def _placed(mesh: Mesh, leaf: jax.ShapeDtypeStruct, *axes: str | None) -> jax.ShapeDtypeStruct:
    spec = placement.fitting(mesh, placement.spec(*axes), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def _local(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A replicated array that comes from the host."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P()))


def _batch(rows: dict[str, Any], count: int, mesh: Mesh) -> Any:
    """Shapes of a batch of `count` rows, from those of one row."""
    at = sharding.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=at), rows)


def plan(program: Program, target: Target) -> Plan:
    """Compile a program and read its cost from the result."""
    try:
        return cost(program, target, compiled(program, target))
    except jax.errors.JaxRuntimeError as error:
        if not too_large(error):
            raise
        return cost(program, target, str(error).splitlines()[0])


def compiled(program: Program, target: Target) -> jax.stages.Compiled:
    """The compiled program.

    Raises:
      jax.errors.JaxRuntimeError: XLA cannot compile it; see `too_large`.
    """
    return program.traced.lower().compile(compiler_options=target.options or None)


def too_large(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether XLA rejected a program because it does not fit the device's memory.

    The error's code tells. Its text is only used to exclude the memory of a core (RESOURCE_EXHAUSTED: Ran out of memory
    in memory space vmem), whose overflow is a fault of a kernel.
    """
    return error.error_code_string == "RESOURCE_EXHAUSTED" and not _OF_A_CORE.search(str(error))


_OF_A_CORE = re.compile(r"\b[vs]mem\b|shared memory", re.IGNORECASE)


def cost(program: Program, target: Target, made: jax.stages.Compiled | str) -> Plan:
    """The cost of a program. made: the compiled program, or XLA's reason for rejecting it."""
    flops = costs.flops(program.traced.jaxpr.jaxpr)
    recomputed = flops - costs.flops(program.useful.jaxpr.jaxpr) if program.useful else 0.0
    held = {kind: size(tree) for kind, tree in program.held.items()}
    partial = functools.partial(Plan, program.name, target, held, flops=flops, recomputed=recomputed)
    if isinstance(made, str):
        return partial(temporaries=None, total=None, traffic={}, refused=made)
    memory, text = made.memory_analysis(), made.as_text()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    total += memory.temp_size_in_bytes
    return partial(
        temporaries=memory.temp_size_in_bytes,
        total=total,
        traffic=costs.collectives(text),
        moves=tuple(costs.accesses(text)),
    )


def size(tree: Any) -> int:
    """Bytes of arrays that one device holds, from their shapes and shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


Knob = tuple[str, ml_collections.ConfigDict]
"""Flags, and the config with them."""

RANK = 64
"""The rank of the adapters that a plan tries where full tuning does not fit."""


def _turned(config: ml_collections.ConfigDict, flags: dict[str, Any]) -> Knob:
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(flags)
    shown = {key: f'"{value}"' if isinstance(value, tuple) else value for key, value in flags.items()}  # for a shell
    return " ".join(f"--config.{key}={value}" for key, value in shown.items()), other


def frozen_knobs(config: ml_collections.ConfigDict, devices: int) -> Iterator[Knob]:
    """Settings that train less than `config` does, or hold what is frozen as int8: adapters, an int8 base, or both."""
    whole = config.phase == "multi_granularity" and not config.optimizer.lora.rank
    flags = {"optimizer.lora.rank": RANK, "compute_dtype": "bfloat16", "remat": "full"} if whole else {}
    if whole:
        if config.optimizer.encoder_learning_rate:  # without adapters on the encoder, its rate had no effect
            flags["optimizer.lora.targets"] = ("language", "encoder")
        yield _turned(config, flags)
    if config.phase != "grounding" and not config.quantize:
        flags["quantize"] = "int8"
        yield _turned(config, flags)
    copies, rows = devices // abs(config.mesh.tensor), config.batch_size // config.data.pack
    accumulate = rows // copies
    if flags and rows % copies == 0 and accumulate > config.optimizer.accumulate:
        yield _turned(config, flags | {"optimizer.accumulate": accumulate})


def knobs(config: ml_collections.ConfigDict, devices: int) -> Iterator[Knob]:
    """Settings with which the same step needs less memory, the cheapest first."""
    turned, sizes = functools.partial(_turned, config), config.mesh
    if config.phase != "rglf" and config.remat != "full":  # RGLF has no backward pass through the model
        yield turned({"remat": "full"})
    least = {"remat": "full"} if config.phase != "rglf" and config.remat != "full" else {}
    if sizes.data != 1:
        least |= {"mesh.data": 1, "mesh.fsdp": -1}
        yield turned(least)
    copies = devices // abs(sizes.tensor)
    accumulate, rows = config.optimizer.accumulate, config.batch_size // config.data.pack
    while rows % (2 * accumulate * copies) == 0:
        accumulate *= 2
        yield turned(least | {"optimizer.accumulate": accumulate})
    for tensor in (2, 4, 8):
        if tensor > abs(sizes.tensor) and devices % tensor == 0:
            yield turned(least | {"optimizer.accumulate": accumulate, "mesh.fsdp": -1, "mesh.tensor": tensor})


def alternatives(config: ml_collections.ConfigDict, target: Target) -> Iterator[Knob]:
    """Settings to try where a config does not fit, in this order; none whose parameters and optimizer alone do not."""
    devices = len(target.devices)
    for knob in itertools.chain(knobs(config, devices), frozen_knobs(config, devices)):
        if lasting(knob[1], target) < target.memory:
            yield knob
