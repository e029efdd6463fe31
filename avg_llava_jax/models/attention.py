"""Softmax attention over a whole sequence, by the fastest way the platform has."""

import jax
import jax.numpy as jnp

from avg_llava_jax.models.flash import flash_attention


def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = False) -> jax.Array:
    """q (B, S, H, d) over k, v (B, S, KV, d), KV a divisor of H -> (B, S, H, d).

    In bfloat16 on a GPU or TPU a flash kernel, which never forms the S x S scores in memory; otherwise plain XLA.
    The platform is that of the mesh in use (`jax.set_mesh`), which may be compiled for without being there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    here = mesh.empty or mesh.abstract_device is None
    platform, devices = (
        (jax.default_backend(), jax.device_count()) if here else (mesh.abstract_device.platform, mesh.size)
    )
    if platform == "cpu" and devices == 1:
        return _sample_by_sample(q, k, v, causal)
    if platform == "tpu" and q.dtype == jnp.bfloat16:
        return flash_attention(q, k, v, causal)
    cudnn = platform in ("gpu", "cuda") and q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn" if cudnn else "xla")


def _sample_by_sample(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """The scores of one sample fit a CPU's cache, those of a batch do not: 3 times faster at S = 320.

    They are formed again in the backward pass, which is cheaper than reading them back.
    """
    repeat = q.shape[2] // k.shape[2]

    @jax.checkpoint
    def one(sample: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = sample
        k, v = (jnp.repeat(x, repeat, axis=1) if repeat > 1 else x for x in (k, v))
        scores = jnp.einsum("qhd,khd->hqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        if causal:
            scores = scores + jnp.where(jnp.tri(*scores.shape[1:], dtype=bool), 0.0, -jnp.inf)
        weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1).T[..., None]
        return (jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), v) / total).astype(v.dtype)

    return jax.lax.map(one, (q, k, v))
