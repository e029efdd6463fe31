"""Flash attention on TPU: JAX's splash kernel."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, ArrayLike, Float, Int

BLOCKS = range(128, 769, 128)
"""Block sizes of the kernel; the length is padded to whole blocks."""


def flash_attention(
    q: Float[ArrayLike, "B S Q d"],
    k: Float[ArrayLike, "B S K d"],
    v: Float[ArrayLike, "B S K d"],
    causal: bool,
    interpret: bool = False,
    ids: Int[ArrayLike, "B S"] | None = None,
    reach: int | None = None,
) -> Float[Array, "B S Q d"]:
    """Splash attention on one device.

    ids, reach: with `causal`: see `attention.Segments`; blocks out of reach are not computed.
    interpret: run the kernel on any platform, slowly, for tests.
    """
    # Imported here: Pallas takes a third of a second, which other platforms need not wait for.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    block = min(BLOCKS, key=lambda size: (-(-length // size) * size, -size))  # least padding, then largest blocks
    padded = -(-length // block) * block
    mask = masks.CausalMask((padded, padded)) if causal else masks.FullMask((padded, padded))
    if reach is not None and reach < length:
        mask = masks.LocalMask((padded, padded), window_size=(reach - 1, 0), offset=0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # Padding lies to the right of every real token, where causal attention does not reach.
    behind = (jnp.arange(padded) >= length).astype(jnp.int32)
    real = None if causal or padded == length else splash.SegmentIds(q=jnp.zeros_like(behind), kv=behind)
    ids = None if ids is None else jnp.pad(ids, [(0, 0), (0, padded - length)])
    q, k, v = (
        jnp.pad(rearrange(x, "b s h d -> b h s d"), [(0, 0), (0, 0), (0, padded - length), (0, 0)])
        for x in (q * q.shape[-1] ** -0.5, k, v)
    )
    if ids is None:
        out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=real))(q, k, v)
    else:
        out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(q=ids, kv=ids)))(q, k, v, ids)
    return rearrange(out[:, :, :length], "b h s d -> b s h d")
