"""Low-rank adapters (LoRA) on the linears of encoder and language model, as leaves beside the kernels they stand on.

    language/layers/q/kernel      W (layers, in, out)      frozen, also as int8 with kernel_scale
    language/layers/q/lora_a      A (layers, in, r)        trained
    language/layers/q/lora_b      B (layers, r, out)       trained, zero at first: a new adapter changes nothing
    language/layers/q/lora_scale  s (layers,)              alpha / r, constant

`models.linear` computes x @ W + s * (x @ A) @ B. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021;
with an int8 base, the idea of Dettmers et al., "QLoRA", 2023.

The *base* are the frozen weights of encoder and language model. A checkpoint with adapters holds the rest, `own`, and
refers to its base.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from avg_llava_jax import parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.parameters import Params

LINEARS = tuple(path.removesuffix("/lora_a") for path in parameters.TABLE if path.endswith("/lora_a"))
"""The nodes that may have an adapter: "language/layers/q", ..."""

LEAVES = ("lora_a", "lora_b", "lora_scale")


def name_of(node: str) -> str:
    """The name of a linear in settings and messages: "language/layers/q" is "language/q"."""
    return node.replace("/layers", "")


def nodes(targets: Collection[str]) -> tuple[str, ...]:
    """The linears that targets name: "language" is all of the language model, "language/q" one in each layer.

    Raises:
      ValueError: a target names none.
    """
    names = {node: (node.split("/")[0], name_of(node)) for node in LINEARS}
    for target in targets:
        if not any(target in name for name in names.values()):
            known = ", ".join((*parameters.ADAPTERS, *map(name_of, LINEARS)))
            raise ValueError(f"optimizer.lora.targets has {target!r}: choose from {known}")
    return tuple(node for node, name in names.items() if not set(targets).isdisjoint(name))


def shapes(config: ModelConfig, targets: Collection[str], rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The fp32 leaves, by path, of adapters of one rank on a model."""
    whole, found = parameters.flat(parameters.abstract(config)), {}
    for node in nodes(targets):
        for path, shape in _shapes(node, whole[f"{node}/kernel"].shape, rank).items():
            found[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return found


def _shapes(node: str, kernel: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's leaves, by path, on a kernel (layers, in, out)."""
    layers, into, out = kernel
    return {
        f"{node}/{leaf}": shape
        for leaf, shape in zip(LEAVES, ((layers, into, rank), (layers, rank, out), (layers,)), strict=True)
    }


def init(
    config: ModelConfig, targets: Collection[str], rank: int, scale: float, key: jax.Array
) -> dict[str, jax.Array]:
    """Fresh adapters, by path: A uniform within 1 / sqrt(in), as peft draws it, and B zero."""
    leaves = {}
    for number, (path, leaf) in enumerate(shapes(config, targets, rank).items()):
        match path.rsplit("/", 1)[1]:
            case "lora_a":
                own, bound = jax.random.fold_in(key, number), leaf.shape[1] ** -0.5
                leaves[path] = jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)
            case "lora_b":
                leaves[path] = jnp.zeros(leaf.shape, leaf.dtype)
            case "lora_scale":
                leaves[path] = jnp.full(leaf.shape, scale, leaf.dtype)
    return leaves


def is_leaf(path: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return path in parameters.TABLE and parameters.TABLE[path].component in parameters.ADAPTERS.values()


def of(params: Params) -> dict[str, Any]:
    """The leaves of all adapters, by path; {} where there are none."""
    return {path: leaf for path, leaf in parameters.flat(params).items() if is_leaf(path)}


def divide(params: Params) -> tuple[Params, Params]:
    """Divide a model into what a checkpoint of its own holds (adapters, connector, newline, router) and its base."""
    rows, leaves = parameters.describe(params), parameters.flat(params)
    base = {path: leaf for path, leaf in leaves.items() if rows[path].component in parameters.ADAPTERS}
    own = {path: leaf for path, leaf in leaves.items() if path not in base}
    return parameters.unflat(own), parameters.unflat(base)


def require(where: str, leaves: Mapping[str, Any], config: ModelConfig) -> None:
    """Check that adapters are whole and fit a model.

    Raises:
      ValueError: names the first leaf that is missing or has another shape.
    """
    kernels = parameters.flat(parameters.abstract(config))
    for node in sorted({path.rsplit("/", 1)[0] for path in leaves}):
        parts = [f"{node}/{leaf}" for leaf in LEAVES]
        if missing := [part for part in parts if part not in leaves]:
            raise ValueError(f"{where}: parameter {missing[0]!r} is missing")
        rank = leaves[parts[0]].shape[-1]
        for part, shape in _shapes(node, kernels[f"{node}/kernel"].shape, rank).items():
            if leaves[part].shape != shape:
                raise ValueError(
                    f"{where}: parameter {part!r} has shape {leaves[part].shape}, on this base it would have {shape}"
                )


def folded(params: Params) -> Params:
    """The same model without adapters: W + s A @ B in the place of W, computed in fp32 and rounded to W's dtype.

    W [[1, 2]], A [[3]], B [[4, 5]], s 0.5 become [[7, 9.5]].

    Raises:
      ValueError: the base is int8: its steps are too coarse for what is added.
    """
    leaves = parameters.flat(params)
    for node in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
        if leaves[f"{node}/kernel"].dtype == jnp.int8:
            raise ValueError(f"parameter {node + '/kernel'!r} is int8: fold the adapter into the original base")
        leaves[f"{node}/kernel"] = _fold(leaves[f"{node}/kernel"], *(leaves.pop(f"{node}/{leaf}") for leaf in LEAVES))
    return parameters.unflat(leaves)


@jax.jit
def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    added = jnp.matmul(a, b, precision="highest") * scale[:, None, None]
    return (kernel.astype(jnp.float32) + added).astype(kernel.dtype)
