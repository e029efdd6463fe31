"""Stacks of layers: one module scanned over stacked parameters, its activations kept or rematerialised."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax

Remat = Literal["none", "dots", "full"]
"""What the backward pass recomputes: nothing; all but products with parameters; all but each layer's input."""

SHALLOW = 6
"""The most layers of a stack that is unrolled: it runs faster, and still compiles quickly."""

KEPT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def rematerialised(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The pure function of one layer, its activations rematerialised by the policy of `remat`."""
    return layer if remat == "none" else jax.checkpoint(layer, prevent_cse=False, policy=KEPT[remat])


def stack(layer: type[nn.Module], length: int, remat: Remat, in_axes: tuple = ()) -> type[nn.Module]:
    """A module of `length` layers whose parameters are those of one layer, stacked along a first axis.

    A layer maps (x, *inputs) to (x, outputs). `in_axes` has an entry per input: `nn.broadcast` = the same for all
    layers, 0 = stacked.
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
