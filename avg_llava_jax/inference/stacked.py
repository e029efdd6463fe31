"""Several adapters on one base, answered together: every row of a batch chooses one by its number, 0 is the base.

The adapters are concatenated along their ranks, so that the two products of `models.linear` serve all rows. A row's
scales are 0 except in the columns of its adapter. Adapter 1 has rank 2, adapter 2 rank 1, three rows choose 0, 2, 1:

    lora_a (in, 3)    lora_owner  1 1 2    lora_scale of each row    0  0  0
    lora_b (3, out)                                                  0  0  s2
                                                                     s1 s1 0

Connector, newline and router, which are trained in full, are stacked along a first axis, the base's first. They and the
encoder run for one adapter at a time; the language model runs for any mixture.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import ArrayLike, Int

from avg_llava_jax import adapters, parameters, placement
from avg_llava_jax.models.avg_llava import Params

TRAINED_IN_FULL = ("connector", "image_newline", "router")


class Stack(NamedTuple):
    """Names of adapters, number 1 first, and their leaves for `merge_leaves`; None without adapters."""

    names: tuple[str, ...] = ()
    leaves: Params | None = None

    def number(self, name: str | None) -> int:
        """The number of an adapter; None is the base, 0. Raises ValueError if there is none of that name."""
        if name is not None and name not in self.names:
            raise ValueError(f"adapter={name!r}: choose {', '.join(map(repr, self.names)) or 'None'}")
        return 0 if name is None else 1 + self.names.index(name)


def stack(base: Params, own: Sequence[Params]) -> Params:
    """The leaves of several adapters, see the module; arrays in the dtype in which the base computes.

    base: a model of stacked layers without adapters. own: the result of `adapters.divide` for each adapter.
    """
    first, each = (parameters.flat(adapters.divide(base)[0]), [parameters.flat(one) for one in own])
    newline = first["image_newline"]
    found: dict[str, tuple[jax.Array, PartitionSpec]] = {}
    for path, leaf in first.items():
        of_all = jnp.stack([leaf, *(one[path].astype(leaf.dtype) for one in each)])
        found[path] = of_all, PartitionSpec(None, *parameters.TABLE[path].spec)
    for node in sorted({path.rpartition("/")[0] for one in each for path in one if adapters.is_leaf(path)}):
        a, b, scale = (f"{node}/{leaf}" for leaf in adapters.LEAVES)
        having = [(number, one) for number, one in enumerate(each, 1) if a in one]
        for path, axis in ((a, 2), (b, 1)):
            side_by_side = jnp.concatenate([one[path] for _, one in having], axis=axis)
            found[path] = side_by_side.astype(newline.dtype), parameters.TABLE[path].spec
        shapes = [(*one[scale].shape, one[a].shape[2]) for _, one in having]
        for path, values in (
            (scale, [one[scale][:, None] for _, one in having]),
            (f"{node}/lora_owner", [number for number, _ in having]),
        ):
            columns = [jnp.broadcast_to(value, shape) for value, shape in zip(values, shapes, strict=True)]
            found[path] = jnp.concatenate(columns, axis=1), PartitionSpec(None, None)
    return parameters.unflat({path: placement.put(leaf, newline, spec) for path, (leaf, spec) in found.items()})


def merge_leaves(base: Any, leaves: Any) -> Any:
    """The union of two trees; a leaf of `leaves` replaces one of the base. Layers are a tuple in both."""
    if isinstance(base, tuple):
        return tuple(map(merge_leaves, base, leaves))
    if not isinstance(base, dict):
        return leaves
    return base | {name: merge_leaves(base[name], part) if name in base else part for name, part in leaves.items()}


def params_for_rows(params: Params, number: Int[ArrayLike, "*B"] | None) -> Params:
    """The parameters with which a batch runs.

    number: the adapter of each row, or one for all; None = the model has none, and the parameters are unchanged.
    With a number per row, the components trained in full (`TRAINED_IN_FULL`) have a first axis of rows.
    """
    if number is None:
        return params
    whole = {name: jax.tree.map(lambda leaf: leaf[number], params[name]) for name in TRAINED_IN_FULL}
    return params | whole | {name: _scaled(params[name], jnp.asarray(number)) for name in parameters.ADAPTERS}


def _scaled(node: Any, number: jax.Array) -> Any:
    """A part of the tree whose adapters have scales (B, 1, R), or (layers, B, 1, R) where layers are stacked."""
    if isinstance(node, tuple):
        return tuple(_scaled(each, number) for each in node)
    if not isinstance(node, dict):
        return node
    if "lora_owner" not in node:
        return {name: _scaled(part, number) for name, part in node.items()}
    owner, scale = (node[f"lora_{name}"][..., None, None, :] for name in ("owner", "scale"))
    rest = {name: leaf for name, leaf in node.items() if name != "lora_owner"}
    return rest | {"lora_scale": jnp.where(owner == number.reshape(-1, 1, 1), scale, 0)}
