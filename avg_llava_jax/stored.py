"""One tree of arrays on disk, in Orbax's format: its shapes, and reads that detect damage by checksums.

Every leaf has a checksum. It is computed when the leaf is saved and again after it is read, in one pass over memory, by
the devices, or by the host where that takes less time than to compile; it does not depend on the sharding:

    sum over all elements of  mix(bits, place)  modulo 2**32

with `bits` the element's bit pattern as an unsigned integer and `place` its index in the flattened leaf. For each
`place`, `mix` is one to one, so one changed element always changes the sum. It scatters its input by the
multiplications and shifts of MurmurHash3, so several changes cancel in one case of 2**32.
"""

import json
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from avg_llava_jax.parallel import hosts

logger = logging.getLogger(__name__)

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
"""Unsigned dtype by bytes per element; JAX has no wider elements unless x64 is enabled."""

SMALL = 2**28
"""Bytes of a tree up to which the host computes its checksums: a third of a second, where compiling takes longer."""


def checksums(tree: Any) -> dict[str, int]:
    """Checksum of each leaf by "path dtype". Leaves are NumPy arrays, or arrays on the same devices."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    sums = map(_on_host, jax.device_get(arrays)) if _small(arrays) else jax.device_get(_checksums(arrays))
    return {f"{_name(path)} {leaf.dtype}": int(value) for (path, leaf), value in zip(leaves, sums, strict=True)}


def by_layer(tree: Any) -> list[dict[str, int]]:
    """`checksums` of each layer, for leaves that stack layers along their first axis."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    if _small(arrays):
        tree = jax.device_get(tree)
        return [checksums(jax.tree.map(lambda leaf: leaf[at], tree)) for at in range(len(arrays[0]))]  # noqa: B023
    sums = np.stack(jax.device_get(_sums_by_layer(arrays)), axis=1)
    names = [f"{_name(path)} {leaf.dtype}" for path, leaf in leaves]
    return [dict(zip(names, map(int, row), strict=True)) for row in sums]


def _small(arrays: list[Any]) -> bool:
    """Whether the host computes the checksums of these arrays."""
    near = all(getattr(array, "is_fully_addressable", True) for array in arrays)
    return near and sum(array.nbytes for array in arrays) <= SMALL


def _mix(bits: Any, place: Any) -> Any:
    """`mix` of uint32 arrays of NumPy or JAX."""
    mixed = bits ^ (place * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> np.uint32(16))


def _on_host(leaf: np.ndarray) -> int:
    """`_checksums` of one array, in pieces that fit the caches."""
    bits, total, piece = leaf.reshape(-1).view(np.dtype(UNSIGNED[leaf.dtype.itemsize])), 0, 2**16
    for start in range(0, len(bits), piece):
        part = bits[start : start + piece].astype(np.uint32)
        place = np.arange(start, start + len(part)).astype(np.uint32)
        total += int(np.sum(_mix(part, place), dtype=np.uint32))
    return total % 2**32


@jax.jit
def _sums_by_layer(leaves: list[jax.Array]) -> list[jax.Array]:
    return jax.vmap(_checksums)(leaves)


@jax.jit
def _checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    def checksum(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
        place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
        for axis in reversed(range(leaf.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        return jnp.sum(_mix(bits, place), dtype=jnp.uint32)

    return [checksum(leaf) for leaf in leaves]


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def targets(tree: Any) -> Any:
    """ShapeDtypeStructs to restore into, from arrays or shapes; a leaf without sharding goes to the first device."""
    first = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first),
        tree,
    )


def shapes(folder: pathlib.Path) -> dict[str, jax.ShapeDtypeStruct] | None:
    """Shapes and dtypes of a saved tree by path; None where they cannot be read."""
    try:
        tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    except (ValueError, OSError, KeyError, AttributeError):
        return None
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves}


def read(folder: pathlib.Path, into: Any, expected: dict[str, int]) -> Any | None:
    """Restore a saved tree; None where it is damaged for any process, after a warning that says how.

    into: ShapeDtypeStructs with shardings. expected: `checksums` at the time of saving; a leaf that is
    restored to another dtype has no counterpart and is not compared.
    """
    tree = _restore(folder, into)
    if not hosts.agree(tree is not None):
        return None
    found = checksums(tree)
    changed = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    if changed:
        logger.warning("%s: %s is damaged: its checksum differs", folder, ", ".join(changed[:3]))
        return None
    return tree


def _restore(folder: pathlib.Path, into: Any) -> Any | None:
    try:
        return ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(into))
    except Exception as error:
        # Orbax raises a bare Exception for an unreadable chunk; other types (out of memory, ...) are not damage.
        if type(error) is not Exception and not isinstance(error, (ValueError, OSError, KeyError)):
            raise
        logger.warning("%s: %s", folder, str(error).splitlines()[0][:120])
        return None


def read_json(path: pathlib.Path) -> Any | None:
    """Content of a JSON file; None where it is damaged, after a warning."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        logger.warning("%s: %s", path, error)
        return None


def require(where: str, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check that the saved parameters have the names and shapes that the config requires.

    Raises:
      ValueError: names the first parameter that is missing, unknown, or of another shape.
    """
    for path, leaf in wanted.items():
        if path not in stored:
            raise ValueError(f"{where}: parameter {path!r} is missing")
        if stored[path].shape != leaf.shape:
            raise ValueError(
                f"{where}: parameter {path!r} has shape {stored[path].shape}, its config says {leaf.shape}"
            )
    unknown = sorted(stored.keys() - wanted.keys())
    if unknown:
        raise ValueError(f"{where}: parameter {unknown[0]!r} is unknown to this model")
