"""Layers one after another: the same module scanned over stacked parameters, its activations kept or computed anew."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax

Remat = Literal["none", "dots", "full"]
"""What the backward pass computes anew: nothing; all but the products with parameters; all but each layer's input."""

SHALLOW = 6
"""Layers up to which a stack is unrolled: it runs faster so, and compiles soon."""

KEPT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A pure function of one layer whose activations are kept as `remat` says."""
    return layer if remat == "none" else jax.checkpoint(layer, prevent_cse=False, policy=KEPT[remat])


def stack(layer: type[nn.Module], length: int, remat: Remat, in_axes: tuple = ()) -> type[nn.Module]:
    """`length` layers as one module; its parameters are those of one layer, stacked along a first axis.

    A layer maps (x, *inputs) to (x, outputs); `in_axes` says of each input whether it is one for all layers
    (`nn.broadcast`) or stacked (0).
    """
    if remat != "none":
        layer = nn.remat(layer, prevent_cse=False, policy=KEPT[remat])
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=length <= SHALLOW,
    )
