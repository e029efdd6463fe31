"""Every way of attention gives what the formula gives. The TPU kernel runs here in its interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax.models.attention import BLOCK, _block_by_block, _cached_at_once, _cached_by_head
from avg_llava_jax.models.flash import flash_attention


def draw(dtype, length, heads=4, kv_heads=2, width=16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, count, width) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))
    return q.astype(dtype), k.astype(dtype), (0.1 * v).astype(dtype)


def formula(q, k, v, causal):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2).astype(jnp.float32) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def cudnn(q, k, v, causal):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


WAYS = {
    "cpu": _block_by_block,
    "xla": lambda q, k, v, causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal),
    "tpu": lambda q, k, v, causal: flash_attention(q, k, v, causal, interpret=jax.default_backend() != "tpu"),
    "gpu": cudnn,
}


CASES = [(way, *case) for way in WAYS for case in ((True, 200), (False, 130))]  # no multiples of a kernel's tile


@pytest.mark.parametrize("way, causal, length", [*CASES, ("cpu", True, 2 * BLOCK + 9), ("cpu", False, BLOCK + 1)])
def test_attention_is_the_formula(way, causal, length):
    if way == "gpu" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN runs on a GPU alone")

    def both(function):
        return jax.jit(
            jax.value_and_grad(
                lambda q, k, v: (jnp.sum(jnp.sin(function(q, k, v, causal).astype(jnp.float32))), None)[0],
                argnums=(0, 1, 2),
            )
        )

    arrays = draw(jnp.bfloat16, length)
    out = jax.jit(lambda *arrays: WAYS[way](*arrays, causal))(*arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), formula(*arrays, causal), atol=1e-3)
    if way == "gpu":
        return  # it takes 16 bits alone
    exact = draw(jnp.float32, length)
    np.testing.assert_allclose(WAYS[way](*exact, causal), formula(*exact, causal), atol=1e-5)
    for ours, wanted in zip(both(WAYS[way])(*exact)[1], both(formula)(*exact)[1], strict=True):
        np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.parametrize("way", [_cached_at_once, _cached_by_head])
@pytest.mark.parametrize("steps", [1, 5])
def test_attention_over_a_cache_is_the_formula(way, steps):
    """Rows of unequal length, and a cache whose end is garbage: as if what is real stood in one sequence."""
    real = [9, 4]
    q, k, v = draw(jnp.float32, 9 + steps)
    whole = [
        formula(*(x[row : row + 1, 9 - cached :] for x in (q, k, v)), True)[0, -steps:]
        for row, cached in enumerate(real)
    ]
    garbage = jnp.full((2, 3, *k.shape[2:]), 1e4)
    old = [jnp.stack([jnp.roll(x[row, :9], cached - 9, axis=0) for row, cached in enumerate(real)]) for x in (k, v)]
    new = [x[:, 9:] for x in (k, v)]
    out = way(q[:, 9:], *new, *(jnp.concatenate([x, garbage], axis=1) for x in old), jnp.array(real))
    np.testing.assert_allclose(out, jnp.stack(whole), atol=1e-5)
