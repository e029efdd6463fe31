"""int8 weights for the language model: half the memory of bfloat16, a quarter of float32, nearly the same answers.

Quantization is weight-only and symmetric, with one scale per output channel (per token for the embedding):

    scale = max |w| / 127,   q = round(w / scale),   w is about q * scale

A kernel (in, out) = [[0.5, -8], [-1.27, 4]] becomes q = [[50, -127], [-127, 64]] with scales [0.01, 0.063].

Activations keep the dtype that the weights had: `models.language.Linear` multiplies them by q, and the result by the
scale. Encoder, connector, router and norms are not quantized.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from avg_llava_jax import parameters

LARGEST = 127


def quantized(params: parameters.Params) -> parameters.Params:
    """Quantizes the language model to int8, with the devices and shardings of the input.

    Every `kernel` of the language model becomes int8 with a `kernel_scale` beside it, `embed` with an `embed_scale`;
    scales have the dtype of the weights. The input is not modified.

    Raises ValueError where the parameters are already quantized.
    """
    leaves: dict[str, jax.Array] = {}
    for path, leaf in parameters.flat(params).items():
        if leaf.dtype == jnp.int8:
            raise ValueError(f"parameter {path!r} is already int8: quantize the original checkpoint")
        axis = _summed_axis(path)
        if axis is None:
            leaves[path] = leaf
        else:
            leaves[path], leaves[path + "_scale"] = _steps_and_scales(leaf, axis)
    return parameters.unflat(leaves)


def _summed_axis(path: str) -> int | None:
    """The contracted axis of a weight; None for a parameter that is not quantized."""
    if not path.startswith("language/"):
        return None
    return {"kernel": -2, "embed": -1}.get(path.rsplit("/", 1)[1])


@functools.partial(jax.jit, static_argnums=1)
def _steps_and_scales(weight: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 weights and their scales. The scale is rounded to its dtype before the division: no error is added."""
    exact = weight.astype(jnp.float32)
    scale = (jnp.max(jnp.abs(exact), axis, keepdims=True) / LARGEST).astype(weight.dtype)
    scale = jnp.where(scale > 0, scale, 1)  # a channel of zeros
    steps = jnp.round(exact / scale.astype(jnp.float32))
    return jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8), jnp.squeeze(scale, axis)


def memory(params: parameters.Params) -> dict[str, int]:
    """Bytes of each component, summed over all devices; also accepts ShapeDtypeStructs."""
    total, leaves = dict.fromkeys(parameters.COMPONENTS, 0), parameters.flat(params)
    for path, row in parameters.describe(params).items():
        base = row.component.removesuffix("_lora")
        total[base] += leaves[path].size * leaves[path].dtype.itemsize
    return total
