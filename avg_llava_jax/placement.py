"""Logical axis names and the mesh axes that shard them: one table for parameters and activations."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike

MESH_AXES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # of activations: samples, or tiles of samples
    "copies": "data",  # of activations: the samples of one copy of the model, where "width" splits the rest
    "width": "fsdp",  # of parameters, which are gathered where they are used
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}
"""Logical axis -> mesh axes, None = replicated. Small parameters (norms, positions, voter) are replicated whole."""


def spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of each array axis: spec("batch", None, "heads") is P(("data", "fsdp"), None, "tensor")."""
    return PartitionSpec(*(MESH_AXES[axis] for axis in axes))


def fitting(mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """`spec` without entries that do not divide their array axis, and without axes that an outer `shard_map` uses.

    On a mesh with tensor=2, PartitionSpec("fsdp", "tensor") for shape (64, 5) becomes PartitionSpec("fsdp", None).
    """
    free = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto]

    def fit(entry: str | tuple[str, ...] | None, size: int) -> str | tuple[str, ...] | None:
        names = tuple(name for name in ((entry,) if isinstance(entry, str) else entry or ()) if name in free)
        if not names or size % math.prod(mesh.shape[name] for name in names):
            return None
        return names if len(names) > 1 else names[0]

    return PartitionSpec(*(fit(entry, size) for entry, size in zip(spec, shape, strict=True)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain the sharding of `x` by the names of its axes; without a mesh (`jax.set_mesh`) x is returned as it is.

    constrain(hidden, "batch", None, None): every device holds whole rows (S, D) of its own samples.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(mesh, spec(*axes), x.shape))


def put(array: ArrayLike, beside: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Put an array on the devices of another one, sharded by `spec` where that lies on a mesh."""
    at = beside.sharding
    if isinstance(at, NamedSharding):
        at = NamedSharding(at.mesh, fitting(at.mesh, spec, array.shape))
    return jax.device_put(array, at)


def platform() -> tuple[str, int]:
    """The platform compiled for and its number of devices: of the mesh in use, or of this machine."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend(), jax.device_count()
    return mesh.abstract_device.platform, mesh.size
