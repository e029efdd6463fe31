"""Losses of the model, pure functions of parameters and one batch (paper, section 3.4); `rglf` has the router's."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava
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
    index: Sequence[Int[ArrayLike, "B _ *corners"]],
    target_at: Sequence[Int[ArrayLike, "B A"]],
    targets: Int[ArrayLike, "B A"],
    remat: Remat = "none",
    weight: Sequence[Float[ArrayLike, "B _ corners"]] | None = None,
) -> tuple[Float[Array, "G B"], Float[Array, "G B"]]:
    """Negative log-likelihood of each sample's answer at each of G granularities, in one walk through the decoder.

    The sequences of a sample lie one after another in a row, so that every layer's parameters are gathered once, and
    their gradients summed once, for all of them. Logits are computed only at the A positions of each that predict an
    answer token. With sequences of 5 and 7 positions, position 2 of the second is position 5 + 2 of the row.

    Args:
      index, weight: of each granularity, see `avg_llava.assemble`.
      target_at: of each granularity, the packed position whose next token is the target, -1 = none.
      targets: token ids.
    Returns:
      the sum over the answer in nats, and the number of its tokens, both fp32.
    """
    lengths = tuple(each.shape[1] for each in index)
    joined = None if weight is None else jnp.concatenate(weight, axis=1)
    packed = avg_llava.assemble(params, pyramid, text, jnp.concatenate(index, axis=1), joined)
    hidden = avg_llava.decoder(config, params, packed, remat, lengths)
    starts = itertools.accumulate(lengths[:-1], initial=0)
    at = jnp.concatenate([jnp.maximum(each, 0) + start for each, start in zip(target_at, starts, strict=True)], axis=1)
    logits = avg_llava.unembed(config, params, jnp.take_along_axis(hidden, at[..., None], axis=1))
    log_probs = jax.nn.log_softmax(logits.reshape(*logits.shape[:1], len(index), -1, logits.shape[-1]))
    # Summed rather than looked up, so that each device reads its own part of the vocabulary.
    chosen = jnp.arange(log_probs.shape[-1]) == targets[:, None, :, None]
    nll = -jnp.sum(jnp.where(chosen, log_probs, 0.0), axis=-1)
    counted = jnp.stack(target_at, axis=1) >= 0
    sums, counts = jnp.sum(jnp.where(counted, nll, 0.0), axis=2), jnp.sum(counted, axis=2)
    return sums.T, counts.T.astype(jnp.float32)


def granularity_nll(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: Float[ArrayLike, "B T R D"],
    text: Float[ArrayLike, "B L D"],
    batch: Batch,
    granularities: Sequence[int],
    execution: Execution = "per_length",
    remat: Remat = "none",
) -> tuple[Float[Array, "G B"], Float[Array, "G B"]]:
    """`answer_nll` at each granularity: sums and counts.

    `per_length` runs each granularity at its own static length. `vmap` pads all to the longest and maps over the
    granularity axis.
    """
    shared = (batch["targets"], remat)
    if execution == "vmap":
        longest = max(batch["index"][g].shape[1] for g in granularities)

        def padded(name: str) -> Array:
            """One array of the arrays (B, S_g, ...) of all granularities: (G, B, S, ...)."""
            arrays = [batch[name][g] for g in granularities]
            ends = [[(0, 0), (0, longest - each.shape[1]), *[(0, 0)] * (each.ndim - 2)] for each in arrays]
            return jnp.stack([jnp.pad(each, end) for each, end in zip(arrays, ends, strict=True)])

        target_at = jnp.stack([batch["target_at"][g] for g in granularities])
        weight = padded("weight") if "weight" in batch else None

        def one(index: jax.Array, target_at: jax.Array, weight: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            weights = None if weight is None else [weight]
            sums, counts = answer_nll(config, params, pyramid, text, [index], [target_at], *shared, weights)
            return sums[0], counts[0]

        return jax.vmap(one)(padded("index"), target_at, weight)

    index, target_at = ([batch[name][g] for g in granularities] for name in ("index", "target_at"))
    weight = [batch["weight"][g] for g in granularities] if "weight" in batch else None
    return answer_nll(config, params, pyramid, text, index, target_at, *shared, weight)


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
    per_granularity = jnp.sum(sums, axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1.0)
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
