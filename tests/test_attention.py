"""Every way of attention gives what the formula gives. The TPU kernel runs here in its interpreter."""

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax.config import LanguageConfig
from avg_llava_jax.models import attention, one_cpu, router
from avg_llava_jax.models import cache as cache_of
from avg_llava_jax.models.attention import QUERY_BLOCK, cached_attention, dense, kernel_for, padded_attention
from avg_llava_jax.models.cache import LayerCache, Span
from avg_llava_jax.models.dropout import dropper
from avg_llava_jax.models.flash import flash_attention
from avg_llava_jax.models.one_cpu import BLOCK


def draw(dtype, length, heads=4, kv_heads=2, width=16):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, count, width) for count in (heads, kv_heads, kv_heads)]
    q, k, v = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes, strict=True))
    return q.astype(dtype), k.astype(dtype), (0.1 * v).astype(dtype)


@functools.partial(jax.jit, static_argnums=3)
def formula(q, k, v, causal):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2).astype(jnp.float32) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


WAYS = {
    "cpu": one_cpu.self_attention,
    "dense": attention._dense_self_attention,
    "blocks": attention._in_blocks,
    "tpu": lambda *arrays, **options: flash_attention(*arrays, interpret=jax.default_backend() != "tpu", **options),
    "padded": functools.partial(padded_attention, implementation="xla"),  # cuDNN's padding, on any device
    "gpu": padded_attention,
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(function, causal, *arrays):
    """What a function gives, and the gradients of a sum over it: those of the formula are compiled for all ways."""

    def total(*arrays):
        out = function(*arrays, causal)
        return jnp.sum(jnp.sin(out)), out

    found, out = jax.grad(total, (0, 1, 2), has_aux=True)(*arrays)
    return out, found


CASES = [(way, *case) for way in WAYS for case in ((True, 200), (False, 130))]  # no multiples of a kernel's tile
CASES += [("padded", causal, length) for causal in (True, False) for length in (1, 131)]
CASES += [("blocks", True, 2 * QUERY_BLOCK + 9), ("blocks", False, QUERY_BLOCK + 1)]


@pytest.mark.parametrize("way, causal, length", [*CASES, ("cpu", True, 2 * BLOCK + 9), ("cpu", False, BLOCK + 1)])
def test_attention_is_the_formula(way, causal, length):
    if way == "gpu" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN runs on a GPU alone")
    arrays = draw(jnp.bfloat16, length)
    out = jax.jit(lambda *arrays: WAYS[way](*arrays, causal))(*arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), formula(*arrays, causal), atol=1e-3)
    if way == "gpu":
        return  # it takes 16 bits alone
    exact = draw(jnp.float32, length)
    wanted, wanted_gradients = gradients(formula, causal, *exact)
    np.testing.assert_allclose(jax.jit(lambda *arrays: WAYS[way](*arrays, causal))(*exact), wanted, atol=1e-5)
    for one, other in zip(gradients(WAYS[way], causal, *exact)[1], wanted_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


SHARED = [("cpu", 2 * BLOCK + 9), ("dense", 41), ("blocks", 2 * QUERY_BLOCK + 9), ("tpu", 300), ("padded", 41)]


@pytest.mark.parametrize("way, length", SHARED)
def test_sequences_that_share_a_row_are_as_alone(way, length):
    """Values and gradients; thirds of the first row, two quarters and the rest of the second."""
    ends = [[length // 3, 2 * length // 3], [length // 4, length // 2]]
    ids = jnp.stack([jnp.sum(jnp.arange(length)[:, None] >= jnp.array(row), axis=-1) for row in ends])
    arrays = draw(jnp.float32, length)

    def alone(*arrays):
        parts = [
            jnp.concatenate(
                [formula(*(x[[row], a:b] for x in arrays), True) for a, b in pairwise([0, *own, length])], 1
            )
            for row, own in enumerate(ends)
        ]
        return jnp.concatenate(parts)

    def shared(*arrays):
        return WAYS[way](*arrays, causal=True, ids=ids, reach=length - length // 2)

    def both(function):
        return jax.jit(jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays))), (0, 1, 2)))(*arrays)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), both(shared), both(alone))


@pytest.mark.parametrize("platform", ["one cpu", "gpu", "tpu"])
@pytest.mark.parametrize("steps", [1, 5])
def test_attention_over_a_cache_is_the_formula(monkeypatch, platform, steps):
    """Rows of unequal length in other slots of a cache whose end is garbage: as if all stood in one sequence."""
    monkeypatch.setattr(one_cpu, "here", lambda: platform == "one cpu")
    monkeypatch.setattr(cache_of, "positions_first", lambda: platform == "tpu")
    arrays, lengths = draw(jnp.float32, 9 + steps), (9, 4)

    @jax.jit
    def through_a_cache(q, k, v, start, slot):
        garbage = jnp.full((3, 20, 2, 16) if platform == "tpu" else (3, 2, 20, 16), 1e4)
        cache = LayerCache(garbage, garbage)
        assert cache.capacity == 20
        for row, before in enumerate(lengths):  # what each row reads first
            earlier = (x[row : row + 1, 9 - before : 9] for x in (k, v))
            cache = cache.write(*earlier, Span(jnp.zeros(1, int), slot[row : row + 1]))
        span = Span(start, slot, window=16)
        cache = cache.write(k[:, 9:], v[:, 9:], span)
        return cached_attention(q[:, 9:], cache, span, start[:, None] + jnp.arange(steps)), cache.k

    out, written = through_a_cache(*arrays, jnp.array(lengths), jnp.array([2, 0]))
    for row, before in enumerate(lengths):
        wanted = formula(*(x[row : row + 1, 9 - before :] for x in arrays), True)[0, -steps:]
        np.testing.assert_allclose(out[row], wanted, atol=1e-5)
    assert (np.asarray(written[1]) == 1e4).all(), "the slot of no row is as it was"


@pytest.mark.parametrize("tpu", [True, False])
@pytest.mark.parametrize("by_slot", [True, False])
def test_a_row_outside_the_cache_writes_nothing(monkeypatch, by_slot, tpu):
    monkeypatch.setattr(cache_of, "positions_first", lambda: tpu)
    k = jnp.arange(2 * 3 * 2 * 4, dtype=jnp.float32).reshape(2, 3, 2, 4) + 1
    (cache,) = cache_of.empty_cache(LanguageConfig(layers=1, kv_heads=2, head_dim=4), 2, 5, jnp.float32)
    if by_slot:
        written = cache.write(k, k, Span(jnp.array([1, 1]), jnp.array([1, 2])))
        row, slot, start = 0, 1, 1
    else:
        written = cache.write(k, k, Span(jnp.array([5, 2])))
        row, slot, start = 1, 1, 2
    wanted = np.zeros((2, 2, 5, 4), np.float32)
    wanted[slot, :, start : start + 3] = np.asarray(k[row]).swapaxes(0, 1)
    np.testing.assert_array_equal(written.k, wanted.swapaxes(1, 2) if tpu else wanted)
    np.testing.assert_array_equal(written.view(Span(jnp.zeros(2, int), window=4), 2)[1], wanted[:, :, :4])
    moved = written.copied(jnp.array([slot, 0]), jnp.array([1 - slot, 2]), 2)  # there is no slot 2
    np.testing.assert_array_equal(moved.view(Span(jnp.zeros(2, int)), 2)[0][1 - slot, :, :2], wanted[slot, :, :2])


def test_dense_attention_drops_and_masks():
    q, k, v = (x.swapaxes(1, 2) for x in draw(jnp.float32, 6))
    seen = jnp.arange(6) < 4
    shown = dense(q, k, v, seen)
    np.testing.assert_allclose(shown, dense(q, k[:, :, :4], v[:, :, :4]), atol=1e-6)
    halved = dense(q, k, v, drop=lambda weights: weights / 2)
    np.testing.assert_allclose(halved, dense(q, k, v) / 2, atol=1e-6)


def test_the_router_drops_weights_block_by_block():
    """Without dropout as the formula, and gradients too; with it every block of queries draws a mask of its own."""
    q, k, v = (x.swapaxes(1, 2) for x in draw(jnp.float32, 2 * QUERY_BLOCK - 9, heads=2))

    def total(way):
        return jax.jit(jax.value_and_grad(lambda *arrays: jnp.sum(jnp.sin(way(*arrays))), (0, 1, 2)))(q, k, v)

    for one, other in zip(
        jax.tree.leaves(total(lambda *arrays: router._in_blocks(*arrays, dropper(0.0, None)))),
        jax.tree.leaves(total(dense)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    drop = dropper(0.5, jax.random.split(jax.random.key(0), 2))
    in_blocks = jax.jit(lambda *arrays: router._in_blocks(*arrays, drop))
    kept = np.asarray(in_blocks(0 * q, k, 0 * v + 1)[..., 0])  # the share of kept weights, doubled
    assert kept.mean() == pytest.approx(1, abs=0.01) and kept.std() > 0.02
    block = -(-q.shape[2] // 2)
    assert not np.any(np.isclose(kept[:, :, :block], np.roll(kept, -block, axis=2)[:, :, :block]).all(axis=2))


@pytest.mark.parametrize("length", [1, 2, 577, 1148, 2885, 4096])
def test_kernel_for_every_head_that_is_asked_for(length):
    """Encoder, language model and router of the 7B, on every platform: none holds S x S scores of a long sequence."""
    bf16, fp32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    plain = "dense" if length <= QUERY_BLOCK else "blocks"
    for head_dim in (64, 128):
        assert kernel_for("cuda", 8, bf16, head_dim, length) == "cudnn"
        assert kernel_for("tpu", 4, bf16, head_dim, length) == "splash"
    assert kernel_for("cuda", 1, bf16, 512, length) == kernel_for("cuda", 1, bf16, 20, length) == plain
    assert kernel_for("cuda", 1, fp32, 64, length) == kernel_for("tpu", 1, fp32, 64, length) == plain
    assert kernel_for("cpu", 8, fp32, 64, length) == plain
    assert kernel_for("cpu", 1, fp32, 64, length) == ("dense" if length <= QUERY_BLOCK else "one_cpu")


def test_a_cudnn_kernel_is_traced_for_no_odd_length(monkeypatch):
    """JAX differentiates cuDNN's attention for even lengths alone, and a CLIP encoder has 577 positions."""
    lengths, real = [], jax.nn.dot_product_attention

    def traced(q, k, v, implementation, **options):
        lengths.append(q.shape[1])
        return real(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", traced)
    monkeypatch.setattr(attention.placement, "platform", lambda: ("cuda", 1))
    q, k, v = draw(jnp.bfloat16, 577)
    jax.jit(jax.grad(lambda q: jnp.sum(attention.self_attention(q, k, v, False).astype(jnp.float32))))(q)
    assert lengths == [578]
