"""RGLF, ranking granularities by the feedback of the LMM (paper, section 3.5), in the paper's order.

    feedback       L[g]    mean NLL of the answer under the frozen model at granularity g           feedback
    ranking        r       granularities by L, the best first; s = log_softmax(router), in that order   rank
    ranking loss           sum over j of mean over i of max(0, s[i+j] - s[i] + margin * j * (L[i+j] - L[i]))  rank_loss
    cross-entropy          -s[0]: the best granularity is the one to choose                         cross_entropy
    loss                   rank_weight * ranking loss + ce_weight * cross-entropy                   rglf_loss
    of a batch             every image is encoded once, for the feedback and for the router         batch_loss

Worked example, one image, three granularities, margin 1. L = [0.9, 0.2, 0.5], so r = [1, 2, 0] and L in order is
[0.2, 0.5, 0.9]. An untrained router scores s = log(1/3) each:

    j = 1    mean(max(0, 0.5 - 0.2), max(0, 0.9 - 0.5)) = 0.35
    j = 2    max(0, 2 * (0.9 - 0.2))                    = 1.4        ranking loss 1.75, cross-entropy log 3
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.training import losses
from avg_llava_jax.training.config import RglfConfig


def feedback(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: Float[ArrayLike, "B T R D"],
    text: Float[ArrayLike, "B L D"],
    batch: losses.Batch,
    execution: losses.Execution,
) -> tuple[Float[Array, "*rows G"], Bool[Array, "*rows"]]:
    """Feedback of the frozen model: mean answer NLL in nats at every granularity, without gradient.

    Stored feedback (`batch["nll"]`, NaN = none) is returned unchanged.

    Returns:
      the NLL in fp32, and which samples have an answer token at every granularity: rows are (B, n) where n samples
      share a row, else (B,).
    """
    if "nll" in batch:
        answered = jnp.all(jnp.isfinite(batch["nll"]), axis=-1)
        return jnp.where(answered[..., None], batch["nll"], 0.0), answered
    sums, counts = losses.granularity_nll(config, params, pyramid, text, batch, config.granularities, execution)
    return jax.lax.stop_gradient(jnp.moveaxis(sums / jnp.maximum(counts, 1.0), 0, -1)), jnp.all(counts > 0, axis=0)


def rank(nll: Float[ArrayLike, " G"], tie_nats: float) -> tuple[Float[Array, " G"], Int[Array, " G"]]:
    """Rank the granularities of one image by feedback: the NLL with ties set equal, and the order.

    Granularities within `tie_nats` of the best are ties, which rank cheapest first. With tie_nats = 0.1:

        nll [0.29, 0.24, 0.25, 0.90, 0.20]  ->  [0.20, 0.20, 0.20, 0.90, 0.20], order [0, 1, 2, 4, 3]
    """
    best = jnp.min(nll)
    level = jnp.where(nll - best <= tie_nats, best, nll)
    return level, jnp.argsort(level, stable=True)


def rank_loss(scores: Float[ArrayLike, " G"], nll: Float[ArrayLike, " G"], margin: float) -> Float[Array, ""]:
    """Ranking loss of one image with an adaptive margin (paper, equations 8 and 9).

    Args:
      scores: log-probabilities of the router; scores and nll in ascending order of nll.
    Returns: sum over distances j of the mean over pairs (i, i + j) of
      max(0, scores[i+j] - scores[i] + margin * j * (nll[i+j] - nll[i])).
    """
    total = jnp.zeros((), scores.dtype)
    for j in range(1, len(scores)):
        wanted = margin * j * (nll[j:] - nll[:-j])
        total += jnp.mean(jnp.maximum(scores[j:] - scores[:-j] + wanted, 0.0))
    return total


def cross_entropy(scores: Float[ArrayLike, "M G"]) -> Float[Array, " M"]:
    """Cross-entropy of the best granularity, from log-probabilities with the best first."""
    return -scores[:, 0]


def rglf_loss(
    logits: Float[ArrayLike, "M G"],
    nll: Float[ArrayLike, "M G"],
    valid: Bool[ArrayLike, " M"],
    *,
    margin: float,
    rank_weight: float,
    ce_weight: float,
    nll_weight: float = 0.0,
    tie_nats: float = 0.0,
) -> tuple[Float[Array, ""], losses.Metrics]:
    """The loss of M images: rank the granularities by log-likelihood, and choose the best one (paper, equation 10).

    `nll_weight` adds the expected NLL of the answer if the router draws a granularity from its probabilities p,

        sum over g of p[g] * nll[g]

    which instruction tuning through the router's choice would minimise, here without sampling noise.

    Args:
      logits: router scores, one row an image; nll: mean answer NLL in nats at each granularity.
      valid: rows without an image or without labels add nothing.
    Returns: the loss and its parts, with `best_chosen` (share) and `regret` (nats) of the router's argmax.
    """
    # An invalid row may hold anything, even NaN: replace it before the logarithm.
    logits = jnp.where(valid[:, None], logits.astype(jnp.float32), 0.0)
    nll = jax.lax.stop_gradient(jnp.where(valid[:, None], nll, 0.0))
    level, order = jax.vmap(lambda row: rank(row, tie_nats))(nll)
    scores = jax.nn.log_softmax(logits)
    scores, level = (jnp.take_along_axis(rows, order, axis=1) for rows in (scores, level))
    ranks = jax.vmap(lambda s, n: rank_loss(s, n, margin))(scores, level)
    expected = jnp.sum(jax.nn.softmax(logits) * nll, axis=1)

    def mean(rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid, rows, 0.0)) / jnp.maximum(jnp.sum(valid), 1)

    chosen = jnp.argmax(logits, axis=1)
    regret = jnp.take_along_axis(nll, chosen[:, None], axis=1)[:, 0] - jnp.min(nll, axis=1)
    metrics = {
        "rank_loss": mean(ranks),
        "ce_loss": mean(cross_entropy(scores)),
        "expected_nll": mean(expected),
        "best_chosen": mean((chosen == order[:, 0]).astype(jnp.float32)),
        "regret": mean(regret),
    }
    weighted = ((rank_weight, "rank_loss"), (ce_weight, "ce_loss"), (nll_weight, "expected_nll"))
    return sum(weight * metrics[name] for weight, name in weighted), metrics


def batch_loss(
    config: ModelConfig,
    params: avg_llava.Params,
    batch: losses.Batch,
    keys: Key[Array, " B"] | None,
    settings: RglfConfig,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], losses.Metrics]]:
    """RGLF on one batch: the feedback on a sample trains the router on each of its images.

    Each image is encoded once, for the answers and for the router. keys: of the router's dropout, None = no dropout.
    An image counts if its sample has an answer token at every granularity.

    Returns:
      the loss, (the number of images that count, metrics); `nll/g`, `visual_tokens` and `chosen/g` are means over them.
    """
    if "features" in batch:  # stored with the feedback
        pyramid = scale(config, batch["features"])
    else:
        pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
    text = avg_llava.embed(config, params, batch["text"])
    shared = (config, params, pyramid, text, batch)
    nll, answered = feedback(*shared, settings.execution)  # (B, *n, G), (B, *n)
    logits = avg_llava.route(*shared, dropout=keys).logits  # (B, I, G)

    rows = len(logits)
    sample = jnp.maximum(batch.get("image_sample", jnp.zeros_like(batch["first_tile"])), 0)  # of each image
    nll = jnp.take_along_axis(nll.reshape(rows, -1, nll.shape[-1]), sample[..., None], axis=1)
    answered = jnp.take_along_axis(answered.reshape(rows, -1), sample, axis=1)
    valid = ((batch["first_tile"] >= 0) & answered).reshape(-1)
    nll = nll.reshape(len(valid), -1)
    logits = logits.reshape(len(valid), -1)
    weights = {
        name: getattr(settings, name) for name in ("margin", "rank_weight", "ce_weight", "nll_weight", "tie_nats")
    }
    loss, metrics = rglf_loss(logits, nll, valid, **weights)

    count = jnp.sum(valid).astype(jnp.float32)
    chosen = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    tokens = batch["visual"].reshape(len(valid), -1)

    def mean(rows: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(valid[:, None], rows, 0.0), axis=0) / jnp.maximum(count, 1.0)

    metrics["visual_tokens"] = jnp.sum(mean(chosen * tokens))
    for at, granularity in enumerate(config.granularities):
        metrics[f"nll/{granularity}"] = mean(nll)[at]
        metrics[f"chosen/{granularity}"] = mean(chosen)[at]
    return loss, (count, metrics)
