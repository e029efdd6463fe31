"""Losses of the model, pure functions of parameters and one batch (paper, section 3.4); `rglf` has the router's."""

import itertools
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
SEQUENCES = ("index", "target_at", "weight", "length")
"""The arrays of a batch that are of one granularity each."""
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
    length: Sequence[Int[ArrayLike, "B n"]] | None = None,
    reach: Sequence[int] | None = None,
) -> tuple[Float[Array, "G B ..."], Float[Array, "G B ..."]]:
    """Negative log-likelihood of each sample's answer at each of G granularities, in one pass through the decoder.

    The sequences of a sample follow one another in a row, so that every layer's parameters are gathered once, and
    their gradients summed once, for all of them. Logits are computed only at the A positions of each that predict an
    answer token. With sequences of 5 and 7 positions, position 2 of the second is position 5 + 2 of the row.

    Args:
      index, weight: of each granularity, see `avg_llava.assemble`.
      target_at: of each granularity, the packed position whose next token is the target, -1 = none.
      targets: token ids.
      length, reach: of each granularity, see `language.RowPart`: n samples share a row; None = one a row.
    Returns:
      the sum over each sample's answer in nats, and the number of its tokens, both fp32: (G, B, n), or (G, B)
      without `length`.
    """
    parts = [language.RowPart(each.shape[1]) for each in index]
    if length is not None:
        parts = [language.RowPart(*each) for each in zip([part.size for part in parts], length, reach, strict=True)]
    joined = None if weight is None else jnp.concatenate(weight, axis=1)
    packed = avg_llava.assemble(params, pyramid, text, jnp.concatenate(index, axis=1), joined)
    hidden = avg_llava.decoder(config, params, packed, remat, parts)
    starts = itertools.accumulate([part.size for part in parts[:-1]], initial=0)
    at = jnp.concatenate([jnp.maximum(each, 0) + start for each, start in zip(target_at, starts, strict=True)], axis=1)
    logits = avg_llava.unembed(config, params, jnp.take_along_axis(hidden, at[..., None], axis=1))
    log_probs = jax.nn.log_softmax(logits.reshape(*logits.shape[:1], len(index), -1, logits.shape[-1]))
    # Summed rather than looked up, so that each device reads its own part of the vocabulary.
    chosen = jnp.arange(log_probs.shape[-1]) == targets[:, None, :, None]
    nll = -jnp.sum(jnp.where(chosen, log_probs, 0.0), axis=-1)
    counted = jnp.stack(target_at, axis=1) >= 0
    if length is not None:  # (B, G, n, A)
        of = jnp.stack([language.split(*each)[0] for each in zip(length, target_at, strict=True)], axis=1)
        counted = counted[:, :, None] & (of[:, :, None] == jnp.arange(length[0].shape[1])[:, None])
        nll = nll[:, :, None]
    sums, counts = jnp.sum(jnp.where(counted, nll, 0.0), axis=-1), jnp.sum(counted, axis=-1)
    return jnp.swapaxes(sums, 0, 1), jnp.swapaxes(counts, 0, 1).astype(jnp.float32)


def granularity_nll(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: Float[ArrayLike, "B T R D"],
    text: Float[ArrayLike, "B L D"],
    batch: Batch,
    granularities: Sequence[int],
    execution: Execution = "per_length",
    remat: Remat = "none",
) -> tuple[Float[Array, "G B ..."], Float[Array, "G B ..."]]:
    """`answer_nll` at each granularity: sums and counts.

    `per_length` runs each granularity at its own static length. `vmap` pads all to the longest and maps over the
    granularity axis.
    """
    shared = (batch["targets"], remat)
    reach = [batch["reach"][g].shape[1] for g in granularities] if "reach" in batch else None
    if execution == "vmap":
        longest = max(batch["index"][g].shape[1] for g in granularities)

        def padded(name: str) -> Array:
            """The arrays (B, S_g, ...) of all granularities, padded, as one: (G, B, S, ...)."""
            arrays = [batch[name][g] for g in granularities]
            ends = [[(0, 0), (0, longest - each.shape[1]), *[(0, 0)] * (each.ndim - 2)] for each in arrays]
            return jnp.stack([jnp.pad(each, end) for each, end in zip(arrays, ends, strict=True)])

        target_at = jnp.stack([batch["target_at"][g] for g in granularities])
        weight = padded("weight") if "weight" in batch else None
        length = None if reach is None else jnp.stack([batch["length"][g] for g in granularities])
        most = None if reach is None else [max(reach)]

        def one(index: jax.Array, target_at: jax.Array, *rest: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            weights, lengths = (None if each is None else [each] for each in rest)
            sums, counts = answer_nll(
                config, params, pyramid, text, [index], [target_at], *shared, weights, lengths, most
            )
            return sums[0], counts[0]

        return jax.vmap(one)(padded("index"), target_at, weight, length)

    index, target_at, weight, length = (
        [batch[name][g] for g in granularities] if name in batch else None for name in SEQUENCES
    )
    length = length if reach else None
    return answer_nll(config, params, pyramid, text, index, target_at, *shared, weight, length, reach)


TOTALS = "answer_tokens"


def with_totals(batch: Batch, granularities: Sequence[int]) -> Batch:
    """A batch with its numbers of answer tokens at each granularity, float (B, G), the same in every row.

    A micro-batch keeps them: where truncation leaves more answer tokens at some granularities than at others, its loss
    must be divided by those of the whole batch.
    """
    totals = jnp.stack([jnp.sum(batch["target_at"][g] >= 0) for g in granularities]).astype(jnp.float32)
    return {**batch, TOTALS: jnp.broadcast_to(totals, (len(batch["text"]), len(granularities)))}


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

    Of a micro-batch with the totals of its batch (`with_totals`), the loss is such that the mean over micro-batches,
    weighted by their answer tokens at the first granularity, is the loss of the batch: with 3 3 and 60 36 answer tokens
    at two granularities, the second has weight 60 and divides by 60 and 60 * 39 / 63.
    """
    pyramid = avg_llava.pyramid_of(config, params, batch["pixels"], remat)
    text = avg_llava.embed(config, params, batch["text"])
    sums, counts = granularity_nll(config, params, pyramid, text, batch, granularities, "per_length", remat)
    sums, counts = (x.reshape(len(x), -1).sum(axis=1) for x in (sums, counts))
    if TOTALS in batch:
        totals = batch[TOTALS][0]
        counts = totals * counts[0] / jnp.maximum(totals[0], 1.0)
    per_granularity = sums / jnp.where(counts > 0, counts, 1.0)
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
