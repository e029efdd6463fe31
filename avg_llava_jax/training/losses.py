"""Losses of the model, pure functions of parameters and one batch (paper, section 3.4); `rglf` has the router's."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava, language
from avg_llava_jax.models.stack import Remat

Batch = Mapping[str, Any]
"""Arrays as `data.pipeline.collate_rows` describes them; those of one granularity in a dict {g: array}."""
Metrics = dict[str, Float[Array, ""]]
Execution = Literal["per_length", "vmap"]


def answer_nll(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: Float[ArrayLike, "B T R D"],
    text: Float[ArrayLike, "B L D"],
    index: Int[ArrayLike, "B S *corners"],
    target_at: Int[ArrayLike, "B A"],
    targets: Int[ArrayLike, "B A"],
    remat: Remat = "none",
    weight: Float[ArrayLike, "B S corners"] | None = None,
    length: Int[ArrayLike, "B n"] | None = None,
    reach: int | None = None,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Negative log-likelihood of each sample's answer at one granularity.

    Logits are computed only at the A positions that predict an answer token, not at all S.

    Args:
      index, weight: see `avg_llava.assemble`.
      target_at: the packed position whose next token is the target, -1 = none.
      targets: token ids.
      length, reach: of the n samples that share a row, one after another; None = one a row.
    Returns:
      the sum over each sample's answer in nats, and the number of its tokens, both fp32: (B, n), or (B,)
      without `length`.
    """
    packed = avg_llava.assemble(params, pyramid, text, index, weight)
    hidden = avg_llava.decoder(config, params, packed, remat, length, reach, jnp.maximum(target_at, 0))
    log_probs = jax.nn.log_softmax(avg_llava.unembed(config, params, hidden))
    # Summed rather than looked up, so that each device reads its own part of the vocabulary.
    nll = -jnp.sum(jnp.where(jnp.arange(log_probs.shape[-1]) == targets[..., None], log_probs, 0.0), axis=-1)
    counted = target_at >= 0
    if length is not None:  # (B, n, A)
        of, _ = language.split(length, target_at)
        counted = counted[:, None] & (of[:, None] == jnp.arange(length.shape[1])[:, None])
        nll = nll[:, None]
    return jnp.sum(jnp.where(counted, nll, 0.0), axis=-1), jnp.sum(counted, axis=-1).astype(jnp.float32)


def granularity_nll(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: Float[ArrayLike, "B T R D"],
    text: Float[ArrayLike, "B L D"],
    batch: Batch,
    granularities: Sequence[int],
    execution: Execution = "per_length",
    remat: Remat = "none",
) -> tuple[Float[Array, "*g_rows"], Float[Array, "*g_rows"]]:
    """`answer_nll` at each granularity: sums and counts.

    `per_length` runs one program part per granularity at its own static length. `vmap` pads all to the longest
    and maps over the granularity axis.
    """
    shared = (batch["targets"], remat)
    lengths = {g: batch["length"][g] if "reach" in batch else None for g in granularities}
    reach = {g: batch["reach"][g].shape[1] if "reach" in batch else None for g in granularities}
    if execution == "vmap":
        longest = max(batch["index"][g].shape[1] for g in granularities)

        def padded(name: str) -> Array:
            """One array of the arrays (B, S_g, ...) of all granularities: (G, B, S, ...)."""
            arrays = [batch[name][g] for g in granularities]
            ends = [[(0, 0), (0, longest - each.shape[1]), *[(0, 0)] * (each.ndim - 2)] for each in arrays]
            return jnp.stack([jnp.pad(each, end) for each, end in zip(arrays, ends, strict=True)])

        target_at = jnp.stack([batch["target_at"][g] for g in granularities])
        weight = padded("weight") if "weight" in batch else None
        length = jnp.stack(list(lengths.values())) if "reach" in batch else None
        most = max(reach.values()) if "reach" in batch else None
        return jax.vmap(lambda i, t, w, n: answer_nll(config, params, pyramid, text, i, t, *shared, w, n, most))(
            padded("index"), target_at, weight, length
        )

    weights = batch.get("weight", {})
    parts = [
        answer_nll(
            config,
            params,
            pyramid,
            text,
            batch["index"][g],
            batch["target_at"][g],
            *shared,
            weights.get(g),
            lengths[g],
            reach[g],
        )
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
) -> tuple[Float[Array, ""], Metrics]:
    """Next-token cross-entropy of the answers, mean over tokens, then over granularities (paper, equation 5).

    Serves connector pre-training, visual instruction tuning (the finest granularity alone) and
    multi-granularity tuning. Every image is encoded once. A batch without labels gives 0, never NaN.
    """
    pyramid = avg_llava.pyramid_of(config, params, batch["pixels"], remat)
    text = avg_llava.embed(config, params, batch["text"])
    sums, counts = granularity_nll(config, params, pyramid, text, batch, granularities, "per_length", remat)
    sums, counts = (x.reshape(len(x), -1).sum(axis=1) for x in (sums, counts))
    per_granularity = sums / jnp.maximum(counts, 1.0)
    metrics = {f"nll/{g}": nll for g, nll in zip(granularities, per_granularity, strict=True)}
    return jnp.mean(per_granularity), metrics


def grounding_loss(
    config: ModelConfig, params: avg_llava.Params, batch: Batch, remat: Remat = "none"
) -> tuple[Float[Array, ""], Metrics]:
    """Each patch names what it shows: cross-entropy of its words, with the features fed directly to the unembedding.

    Scores are multiplied by sqrt(D), so that features become about as long as the embeddings: the router attends to
    both, and would neglect the shorter ones.

    batch["patch_words"]: int (B, T, P, words) token ids, -1 = none; a patch's words share its probability.
    """
    features = avg_llava.encode_images(config, params, batch["pixels"], remat)
    scores = avg_llava.unembed(config, params, features) * config.language.width**0.5
    log_probs = jax.nn.log_softmax(scores)
    words = batch["patch_words"]
    nll = -jnp.take_along_axis(log_probs, jnp.maximum(words, 0), axis=-1)
    loss = jnp.sum(jnp.where(words >= 0, nll, 0.0)) / jnp.maximum(jnp.sum(words >= 0), 1)
    return loss, {"patch_nll": loss}
