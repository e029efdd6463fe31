"""The linear layer: plain or int8, with or without a low-rank adapter; and sums of gradients that need fp32.

    y = x @ W + b + (s * (x @ A)) @ B      W (in, out), A (in, r), B (r, out), s (), or (rows, 1, r) of several adapters

The parameters of a layer say which: `kernel`, `bias`; `kernel_scale` where the kernel is int8 (`convert.quantize`);
`lora_a`, `lora_b`, `lora_scale` where it has an adapter (`adapters`). Training, scoring, prefill and decode run this.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, ArrayLike, Float, Int, Key, Shaped

from avg_llava_jax.models.dropout import dropped
from avg_llava_jax.models.one_cpu import product


class Linear(nn.Dense):
    """`nn.Dense`, also for an int8 kernel q (in, out) with scales (out,), and with a low-rank adapter.

    The gradient of a bias, a sum over all rows, is added up in fp32.

    Scales are applied after the product, y = (x @ q) * scale: weights stay int8 in memory, and XLA converts them as it
    multiplies. An adapter of rank r adds (s * (x @ A)) @ B in the dtype of x.
    """

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "*M in"]) -> Float[Array, "*M out"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        if self.has_variable("params", "kernel_scale"):
            y = product(x, kernel.astype(x.dtype)) * self.get_variable("params", "kernel_scale")
        else:
            y = product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
            y = y + broadcast_fp32_grad(bias, y.shape)
        if not self.has_variable("params", "lora_a"):
            return y
        a, b, scale = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale"))
        if self.has_variable("params", "lora_keys"):
            x = dropped(x, self.get_variable("params", "lora_keys"), self.get_variable("params", "lora_keep"))
        low = (product(x, a.astype(x.dtype)) * scale).astype(x.dtype)
        return y + product(low, b.astype(x.dtype)).astype(y.dtype)


def broadcast_fp32_grad(x: Float[ArrayLike, "*N"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """x broadcast to a shape. Its gradient, a sum over all copies, is added up in fp32."""
    return jnp.broadcast_to(x.astype(jnp.float32), shape).astype(x.dtype)


@jax.custom_vjp
def gather_fp32_grad(table: Shaped[ArrayLike, "N D"], ids: Int[ArrayLike, "*M"]) -> Shaped[Array, "*M D"]:
    """table[ids], whose gradient is added up in fp32: in bf16 a sum of equal parts stops growing at 256."""
    return table[ids]


def _added(given: tuple[ArrayLike, ArrayLike], grad: jax.Array) -> tuple[jax.Array, None]:
    table, ids = given
    sums = jnp.zeros(table.shape, jnp.float32).at[ids].add(grad.astype(jnp.float32))
    return sums.astype(table.dtype), None


gather_fp32_grad.defvjp(lambda table, ids: (table[ids], (table, ids)), _added)


def differs_by_row(layers: dict[str, Any]) -> bool:
    """Whether layers must run on a whole batch, because their dropout differs by row."""
    return any("lora_keys" in node for node in layers.values())


def with_dropout(layers: dict[str, Any], keys: Key[ArrayLike, " B"], rate: float) -> dict[str, Any]:
    """Stacked layers whose adapters drop out a share `rate` of their input, x in x @ A alone, as peft does.

    keys: one per row of x. Every adapter gets its own `lora_keys` (layers, B), so a row's masks depend neither on
    the other rows nor on the device.
    """
    flat = flatten_dict(layers)
    for number, path in enumerate(sorted(path[:-1] for path in flat if path[-1] == "lora_a")):
        count = len(flat[*path, "lora_a"])
        seeds = number * count + jnp.arange(count)
        flat[*path, "lora_keys"] = jax.vmap(lambda seed: jax.vmap(jax.random.fold_in, (0, None))(keys, seed))(seeds)
        flat[*path, "lora_keep"] = jnp.full(count, 1 - rate, jnp.float32)
    return unflatten_dict(flat)
