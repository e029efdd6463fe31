"""The mesh: axes `data` (replicas), `fsdp` (parameters and batch), `tensor` (heads, MLPs, vocabulary)."""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from avg_llava_jax import parameters, placement
from avg_llava_jax.config import ModelConfig

AXES = ("data", "fsdp", "tensor")

COMPILERS = min(8, os.cpu_count() or 1)
"""Programs that compile at the same time; each takes memory of the host."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given axis sizes; one of them may be -1 and takes the remaining devices.

    On 8 devices {"data": -1, "fsdp": 2, "tensor": 2} makes (2, 2, 2). On several TPU slices `data` alone crosses the
    slow network between them: each slice holds whole copies of the model.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of the TPU slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    given = [int(sizes[axis]) for axis in AXES]
    fixed = 1
    for size in given:
        fixed *= 1 if size == -1 else size
    if given.count(-1) > 1 or fixed < 1 or any(size < 1 and size != -1 for size in given):
        raise ValueError(f"mesh {dict(zip(AXES, given, strict=True))}: sizes are positive, at most one is -1")
    shape = tuple(len(devices) // fixed if size == -1 else size for size in given)
    if shape[0] * shape[1] * shape[2] != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, given, strict=True))} does not fit {len(devices)} devices: "
            "give sizes whose product is their number"
        )
    # A single slice's devices may have no index, and a GPU's is another thing.
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if shape[0] % slices:
        raise ValueError(
            f"mesh {dict(zip(AXES, given, strict=True))} on {slices} TPU slices: give `data` a multiple of {slices}"
        )
    # jax.make_mesh splits a side of a TPU slice for v5e alone: it refuses tensor=2 on v6e:4x4. It takes no several
    # slices, and create_device_mesh mixes them within an axis, or fails (jax 0.10.2).
    if slices > 1:
        within, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def read_sizes(text: str) -> dict[str, int]:
    """Parse axis sizes of a command line; an omitted axis has size 1.

    "fsdp=-1,tensor=2" is {"data": 1, "fsdp": -1, "tensor": 2}.

    Raises:
      ValueError: the text has another form, or names an axis outside `AXES`.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise ValueError(f"mesh {text!r}: {part!r} must be AXIS=SIZE; the axes are {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def shardings(mesh: Mesh, params: parameters.Params) -> parameters.Params:
    """A NamedSharding for each parameter; an array axis that the mesh axis does not divide is not sharded."""
    return jax.tree.map(
        lambda leaf, spec: NamedSharding(mesh, placement.fitting(mesh, spec, leaf.shape)),
        params,
        parameters.partition_specs(params),
    )


def constrain(params: parameters.Params) -> parameters.Params:
    """Constrain parameters, or their gradients, to the table's shardings inside a compiled function.

    Without it XLA may replicate a gradient on every device, or gather fp32 parameters where bf16 ones would do.
    """
    rows = parameters.describe(params)
    leaves = parameters.flat(params).items()
    return parameters.unflat({path: placement.constrain(leaf, *rows[path].axes) for path, leaf in leaves})


def state_shardings(mesh: Mesh, params: parameters.Params, state: Any) -> Any:
    """Shardings of an optimizer state: a leaf with a parameter's path and shape gets its sharding, others replicate.

    state: a tree with subtrees of the structure of (part of) `params`, as Optax's moments are.
    """
    by_path = parameters.flat(shardings(mesh, params))
    shapes = {path: leaf.shape for path, leaf in parameters.flat(params).items()}

    def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(names)):
            name = "/".join(names[start:])
            if name in by_path and shapes[name] == leaf.shape:
                return by_path[name]
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, state)


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` of a function (config, params, ...) that runs under the mesh of its parameters, if they have one.

    Its attribute `compile` takes the same arguments and runs nothing: a later call finds the program compiled. Threads
    may compile at the same time.
    """
    compiled = jax.jit(function, **options)

    def under_mesh(use: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(config: ModelConfig, params: parameters.Params, *arguments: Any) -> Any:
            at = params["image_newline"].sharding
            with jax.set_mesh(at.mesh) if isinstance(at, NamedSharding) else contextlib.nullcontext():
                return use(config, params, *arguments)

        return run

    run = under_mesh(compiled)
    run.trace = compiled.trace
    run.compile = under_mesh(lambda *arguments: compiled.lower(*arguments).compile())
    return run


def placed(shapes: Any, at: Any) -> Any:
    """ShapeDtypeStructs of a tree with shardings `at`, to restore a checkpoint into or to compile for."""
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), shapes, at)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a batch: its first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, placement.spec("batch"))


def process_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """The rows of a batch on this process's devices, ascending; the process loads these.

    Processes that share a layer (`tensor` over several hosts) have the same rows.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for (part,) in slices for row in range(*part.indices(batch_size))}))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())
