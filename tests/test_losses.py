"""The losses against loops over their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.attention import self_attention
from avg_llava_jax.models.cache import Span
from avg_llava_jax.training import losses, phases, rglf
from avg_llava_jax.training.config import RglfConfig

WEIGHTS = {"margin": 0.7, "rank_weight": 1.0, "ce_weight": 0.1}


def by_loops(logits: np.ndarray, nll: np.ndarray, margin: float) -> tuple[float, float]:
    """Rank and cross-entropy parts of a batch, as reference code has them: pairs at distance j, mean over pairs."""
    rank = ce = 0.0
    scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, cost in zip(scores, nll, strict=True):
        order = np.argsort(cost, kind="stable")
        row, cost = row[order], cost[order]
        for j in range(1, len(row)):
            pairs = [max(0.0, row[i + j] - row[i] + margin * j * (cost[i + j] - cost[i])) for i in range(len(row) - j)]
            rank += sum(pairs) / len(pairs) / len(logits)
        ce -= row[0] / len(logits)
    return rank, ce


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 5)).astype(np.float32), rng.uniform(0, 2, (6, 5)).astype(np.float32)


def test_rank_loss_is_the_sum_over_pairs(case):
    logits, nll = case
    rank, ce = by_loops(logits, nll, WEIGHTS["margin"])
    loss, metrics = rglf.rglf_loss(logits, nll, jnp.ones(6, bool), **WEIGHTS)
    np.testing.assert_allclose(metrics["rank_loss"], rank, rtol=1e-5)
    np.testing.assert_allclose(metrics["ce_loss"], ce, rtol=1e-5)
    np.testing.assert_allclose(loss, rank + 0.1 * ce, rtol=1e-5)
    chosen, rows = logits.argmax(axis=1), np.arange(6)
    np.testing.assert_allclose(metrics["regret"], (nll[rows, chosen] - nll.min(axis=1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["best_chosen"], (chosen == nll.argmin(axis=1)).mean(), rtol=1e-5)


def test_rows_that_do_not_count_may_hold_anything(case):
    """Neither the loss nor a gradient sees them, be they NaN."""
    logits, nll = case
    alone = rglf.rglf_loss(logits[:2], nll[:2], jnp.ones(2, bool), **WEIGHTS)
    spoilt = logits.copy(), nll.copy()
    for array in spoilt:
        array[2:] = np.nan
    valid = jnp.arange(6) < 2
    loss, metrics = rglf.rglf_loss(*spoilt, valid, **WEIGHTS)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, alone[1][name], rtol=1e-6, err_msg=name)
    grad = jax.grad(lambda x: rglf.rglf_loss(x, spoilt[1], valid, **WEIGHTS)[0])(jnp.asarray(spoilt[0]))
    assert np.isfinite(grad).all() and not np.asarray(grad[2:]).any() and np.asarray(grad[:2]).any()

    loss, metrics = rglf.rglf_loss(*spoilt, jnp.zeros(6, bool), **WEIGHTS)
    assert loss == 0 and not any(metrics.values())


def test_ties_rank_cheapest_first():
    nll = jnp.array([0.29, 0.24, 0.25, 0.90, 0.20])
    level, order = rglf.rank(nll, 0.1)
    np.testing.assert_allclose(level, [0.2, 0.2, 0.2, 0.9, 0.2])
    assert order.tolist() == [0, 1, 2, 4, 3]
    level, order = rglf.rank(nll, 0.0)
    np.testing.assert_array_equal(level, nll)
    assert order.tolist() == [4, 1, 2, 0, 3]
    _, order = rglf.rank(jnp.full(5, 0.5), 0.0)
    assert order.tolist() == [0, 1, 2, 3, 4]  # exactly equal: the cheapest as well


def test_within_a_tie_the_router_is_pushed_to_the_cheapest():
    nll = jnp.array([[0.21, 0.20, 0.22]])

    def best(tie_nats: float) -> int:
        loss = jax.grad(lambda x: rglf.rglf_loss(x, nll, jnp.ones(1, bool), **WEIGHTS, tie_nats=tie_nats)[0])
        return int(jnp.argmin(loss(jnp.zeros((1, 3)))))

    assert best(0.1) == 0
    assert best(0.0) == 1


def test_grounding_is_the_mean_over_words(tiny, params):
    """Against a loop over the words; where all tokens are equally likely, against log V."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 2, 16, 16, 3), dtype=np.uint8)
    words = np.full((2, 2, 16, 2), -1, np.int32)
    words[0, 0, 3] = 5, 7  # a patch of two words, one of a single word, and nothing anywhere else
    words[1, 1, 9, 0] = 11
    batch = {"pixels": pixels, "patch_words": words}
    loss = phases.make_loss("grounding", tiny, (16,), RglfConfig(), remat="none")
    both = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, jax.random.key(0)), has_aux=True))

    (value, (weight, metrics)), grad = both(params, batch)
    unembed = jax.jit(lambda p, x: avg_llava.unembed(tiny, p, avg_llava.encode_images(tiny, p, x)))
    logits = 4 * np.asarray(unembed(params, pixels), np.float64)  # D = 16
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    by_hand = -(log_probs[0, 0, 3, 5] + log_probs[0, 0, 3, 7] + log_probs[1, 1, 9, 11]) / 3
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)
    assert weight == 3 and metrics["patch_nll"] == value
    direct, _ = losses.grounding_loss(tiny, params, batch)  # not compiled, so equal but for the last bit
    np.testing.assert_allclose(value, direct, rtol=1e-6)
    language = grad["language"]
    assert language["embed"].any() and not any(leaf.any() for leaf in jax.tree.leaves(language["layers"]))
    assert all(any(leaf.any() for leaf in jax.tree.leaves(grad[name])) for name in ("encoder", "connector"))

    other = pixels.copy()
    other[0, 1], other[1, 0] = 255 - other[0, 1], 255 - other[1, 0]  # tiles of which no patch has a word
    assert both(params, batch | {"pixels": other})[0][0] == value

    blank = params | {"language": params["language"] | {"embed": jnp.zeros_like(language["embed"])}}
    np.testing.assert_allclose(both(blank, batch)[0][0], np.log(600), rtol=1e-6)

    (value, (weight, _)), grad = both(params, batch | {"patch_words": np.full_like(words, -1)})
    assert value == weight == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rglf.rank_loss(jnp.zeros(3), jnp.zeros(4), 1.0),
        lambda: rglf.rglf_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.ones(3, bool), **WEIGHTS),
        lambda: jax.eval_shape(rglf.rank, jnp.zeros((2, 3)), 0.0),
        lambda: jax.jit(rglf.cross_entropy)(jnp.zeros((2, 3), int)),
        lambda: self_attention(jnp.zeros((1, 4, 2, 8)), *jnp.zeros((2, 1, 5, 2, 8)), causal=True),
        lambda: Span(start=jnp.zeros(3)),
        lambda: avg_llava.assemble({}, jnp.zeros((2, 1, 7, 4)), jnp.zeros((3, 5, 4)), jnp.zeros((2, 9), int)),
    ],
)
def test_shapes_in_signatures_are_checked_while_tests_run(wrong):
    """Under jit as well; see tests/__init__.py."""
    with pytest.raises(TypeCheckError):
        wrong()
