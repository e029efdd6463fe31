"""What each phase minimises: pure functions of parameters and one batch (paper, sections 3.4 and 3.5)."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.stack import Remat

Batch = dict[str, jax.Array | dict[int, jax.Array]]
Execution = Literal["per_length", "vmap"]


def answer_nll(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: jax.Array,
    text: jax.Array,
    index: jax.Array,
    target_at: jax.Array,
    targets: jax.Array,
    remat: Remat = "none",
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each sample's answer at one granularity.

    Logits are formed at the A positions that predict an answer token, not at all S.

    Args:
      pyramid (B, T, R, D), text (B, L, D); index int (B, S), see `assemble`.
      target_at: int (B, A), the packed position whose next token is the target, -1 = none.
      targets: int (B, A).
    Returns:
      the sum over the answer in nats (B,), and how many tokens were counted (B,), both fp32.
    """
    hidden, _ = avg_llava.language(config, params, avg_llava.assemble(params, pyramid, text, index), remat=remat)
    at = jnp.take_along_axis(hidden, jnp.maximum(target_at, 0)[..., None], axis=1)
    log_probs = jax.nn.log_softmax(avg_llava.unembed(config, params, at))
    # Summed rather than looked up, so that each device reads its own part of the vocabulary.
    nll = -jnp.sum(jnp.where(jnp.arange(log_probs.shape[-1]) == targets[..., None], log_probs, 0.0), axis=-1)
    counted = target_at >= 0
    return jnp.sum(jnp.where(counted, nll, 0.0), axis=1), jnp.sum(counted, axis=1).astype(jnp.float32)


def granularity_nll(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: jax.Array,
    text: jax.Array,
    batch: Batch,
    granularities: Sequence[int],
    execution: Execution = "per_length",
    remat: Remat = "none",
) -> tuple[jax.Array, jax.Array]:
    """`answer_nll` at each granularity: sums and counts, (G, B) each.

    `per_length` runs one program part per granularity at its own static length. `vmap` pads all to the longest
    and maps over the granularity axis.
    """
    shared = (batch["targets"], remat)
    if execution == "vmap":
        longest = max(batch["index"][g].shape[1] for g in granularities)
        index = jnp.stack(
            [jnp.pad(batch["index"][g], ((0, 0), (0, longest - batch["index"][g].shape[1]))) for g in granularities]
        )
        target_at = jnp.stack([batch["target_at"][g] for g in granularities])
        return jax.vmap(lambda i, t: answer_nll(config, params, pyramid, text, i, t, *shared))(index, target_at)

    parts = [
        answer_nll(config, params, pyramid, text, batch["index"][g], batch["target_at"][g], *shared)
        for g in granularities
    ]
    sums, counts = zip(*parts, strict=True)
    return jnp.stack(sums), jnp.stack(counts)


def language_loss(
    config: ModelConfig,
    params: avg_llava.Params,
    batch: Batch,
    granularities: Sequence[int],
    remat: Remat = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token cross-entropy of the answers, mean over tokens, then over granularities (paper, equation 5).

    Serves connector pre-training, visual instruction tuning (the finest granularity alone) and
    multi-granularity tuning. Every image is encoded once. A batch without labels gives 0, never NaN.
    """
    pyramid = avg_llava.pyramid_of(config, params, batch["pixels"], remat)
    text = avg_llava.embed(config, params, batch["text"])
    sums, counts = granularity_nll(config, params, pyramid, text, batch, granularities, "per_length", remat)
    per_granularity = jnp.sum(sums, axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1.0)
    metrics = {f"nll/{g}": nll for g, nll in zip(granularities, per_granularity, strict=True)}
    return jnp.mean(per_granularity), metrics


def grounding_loss(config: ModelConfig, params: avg_llava.Params, batch: Batch, remat: Remat = "none"):
    """Each patch names what it shows: cross-entropy of its words, read straight through the unembedding.

    Scores are sharpened by sqrt(D), so that features come out about as long as the embeddings that they are
    read by: the router attends to both, and would not notice the shorter ones.

    batch["patch_words"]: int (B, T, P, words) token ids, -1 = none; a patch's words share its probability.
    """
    features = avg_llava.see(config, params, batch["pixels"], remat)
    scores = avg_llava.unembed(config, params, features) * config.language.width**0.5
    log_probs = jax.nn.log_softmax(scores)
    words = batch["patch_words"]
    nll = -jnp.take_along_axis(log_probs, jnp.maximum(words, 0), axis=-1)
    loss = jnp.sum(jnp.where(words >= 0, nll, 0.0)) / jnp.maximum(jnp.sum(words >= 0), 1)
    return loss, {"patch_nll": loss}


def rank_loss(scores: jax.Array, nll: jax.Array, margin: float) -> jax.Array:
    """Ranking loss of one decision with an adaptive margin (paper, equations 8 and 9).

    Args:
      scores: (G,) log-probabilities of the router; nll: (G,); both in ascending order of nll.
    Returns: scalar; sum over distances j of the mean over pairs (i, i + j) of
      max(0, scores[i+j] - scores[i] + margin * j * (nll[i+j] - nll[i])).
    """
    total = jnp.zeros((), scores.dtype)
    for j in range(1, len(scores)):
        wanted = margin * j * (nll[j:] - nll[:-j])
        total += jnp.mean(jnp.maximum(scores[j:] - scores[:-j] + wanted, 0.0))
    return total


def rank_by_feedback(nll: jax.Array, tie_nats: float) -> tuple[jax.Array, jax.Array]:
    """Order granularities by how well the frozen model answered: (G,) -> nll with ties levelled, order int (G,).

    Within `tie_nats` of the best counts as tied, and ties rank cheapest first. With tie_nats = 0.1:

        nll [0.29, 0.24, 0.25, 0.90, 0.20]  ->  [0.20, 0.20, 0.20, 0.90, 0.20], order [0, 1, 2, 4, 3]
    """
    best = jnp.min(nll)
    level = jnp.where(nll - best <= tie_nats, best, nll)
    return level, jnp.argsort(level, stable=True)


def feedback_loss(
    logits: jax.Array,
    nll: jax.Array,
    valid: jax.Array,
    *,
    margin: float,
    rank_weight: float,
    ce_weight: float,
    nll_weight: float = 0.0,
    tie_nats: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """RGLF: rank the granularities by log-likelihood, and choose the best one (paper, equation 10).

    `nll_weight` adds the answer's NLL expected where the router draws a granularity by its probabilities p,

        sum over g of p[g] * nll[g]

    which is what instruction tuning through the router's choice would minimise, here without the noise of drawing.

    Args:
      logits: (M, G) router scores, one row an image; nll: (M, G) mean answer NLL in nats at each granularity.
      valid: bool (M,); rows without an image or without labels add nothing.
    Returns: scalar loss and its parts, with `best_chosen` (share) and `regret` (nats) of the router's argmax.
    """
    # An invalid row may hold anything: make it harmless before it meets a logarithm.
    logits = jnp.where(valid[:, None], logits.astype(jnp.float32), 0.0)
    nll = jax.lax.stop_gradient(jnp.where(valid[:, None], nll, 0.0))
    level, order = jax.vmap(lambda row: rank_by_feedback(row, tie_nats))(nll)
    scores = jax.nn.log_softmax(logits)
    scores, level = (jnp.take_along_axis(rows, order, axis=1) for rows in (scores, level))
    ranks = jax.vmap(lambda s, n: rank_loss(s, n, margin))(scores, level)
    ce = -scores[:, 0]
    expected = jnp.sum(jax.nn.softmax(logits) * nll, axis=1)

    def mean(rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, rows, 0.0)) / jnp.maximum(jnp.sum(valid), 1)

    chosen = jnp.argmax(logits, axis=1)
    regret = jnp.take_along_axis(nll, chosen[:, None], axis=1)[:, 0] - jnp.min(nll, axis=1)
    metrics = {
        "rank_loss": mean(ranks),
        "ce_loss": mean(ce),
        "expected_nll": mean(expected),
        "best_chosen": mean((chosen == order[:, 0]).astype(jnp.float32)),
        "regret": mean(regret),
    }
    weighted = ((rank_weight, "rank_loss"), (ce_weight, "ce_loss"), (nll_weight, "expected_nll"))
    return sum(weight * metrics[name] for weight, name in weighted), metrics
