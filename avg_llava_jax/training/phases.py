"""The phases: which loss, and which components learn (`parameters.TRAINED_IN`). Nothing else differs.

grounding          patches name what they show; encoder, connector and (un)embeddings learn: the layers of the
                   language model belong to what is trained, but get no gradient, only weight decay
connector          next-token loss of the answers; the connector learns
multi_granularity  the same; encoder, connector and language model learn
rglf               feedback of the frozen model to the router; the router learns
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.models.stack import Remat
from avg_llava_jax.training import losses
from avg_llava_jax.training.feedback import answer_feedback
from avg_llava_jax.training.optimizer import Loss


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
    """RGLF (paper, section 3.5): weights of the loss's parts, and how the frozen model is run.

    nll_weight: of the NLL expected under the router's probabilities; alone, it trains by instruction tuning instead.
    tie_nats: granularities within so many nats of the best count as equally good and rank cheapest first; 0 = paper.
    feedback: folder of the frozen model's answers to the data (see `feedback`); "" = they are measured on the way.
    execution: `per_length` runs each granularity at its own length, `vmap` pads all to the longest.
    """

    margin: float = 1.0
    rank_weight: float = 1.0
    ce_weight: float = 0.1
    nll_weight: float = 0.0
    tie_nats: float = 0.0
    feedback: str = ""
    execution: losses.Execution = "per_length"

    def __post_init__(self) -> None:
        if self.execution not in ("per_length", "vmap"):
            raise ValueError(f"rglf.execution={self.execution!r}: choose per_length or vmap")
        if self.tie_nats < 0:
            raise ValueError(f"rglf.tie_nats={self.tie_nats} must not be negative")


def make_loss(
    phase: str, config: ModelConfig, granularities: tuple[int, ...], feedback: FeedbackConfig, remat: Remat
) -> Loss:
    """The loss of a phase, (params, batch, keys) -> loss, (weight, metrics)."""
    if phase == "grounding":

        def grounding(params: Any, batch: Mapping[str, Any], keys: jax.Array) -> Any:
            del keys
            loss, metrics = losses.grounding_loss(config, params, batch, remat)
            return loss, (jnp.sum(batch["patch_words"] >= 0).astype(jnp.float32), metrics)

        return grounding

    if phase != "rglf":

        def language(params: Any, batch: Mapping[str, Any], keys: jax.Array) -> Any:
            del keys
            loss, metrics = losses.language_loss(config, params, batch, granularities, remat)
            return loss, (jnp.sum(batch["target_at"][granularities[0]] >= 0).astype(jnp.float32), metrics)

        return language

    if granularities != config.granularities:
        raise ValueError(
            f"phase rglf compares all granularities of the model, {config.granularities}: leave them unset"
        )

    def rglf(params: Any, batch: Mapping[str, Any], keys: jax.Array) -> Any:
        return feedback_loss(config, params, batch, keys, feedback)

    return rglf


def feedback_loss(
    config: ModelConfig,
    params: avg_llava.Params,
    batch: Mapping[str, Any],
    keys: jax.Array | None,
    feedback: FeedbackConfig,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
    """RGLF on one batch: every image of a sample learns from how well that sample was answered.

    Each image is encoded once, for the answers and for the router. `keys` (B,) drive the router's
    dropout, None = none. An image counts if its sample has an answer token at every granularity.

    Returns:
      the loss, (how many images counted, metrics); `nll/g`, `visual_tokens` and `chosen/g` are means over them.
    """
    if "features" in batch:  # stored with the feedback
        pyramid = scale(config, batch["features"])
    else:
        pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
    text = avg_llava.embed(config, params, batch["text"])
    shared = (config, params, pyramid, text, batch)
    nll, answered = answer_feedback(*shared, feedback.execution)  # (B, G), (B,)
    logits = avg_llava.route(*shared, dropout=keys).logits  # (B, I, G)

    valid = ((batch["first_tile"] >= 0) & answered[:, None]).reshape(-1)
    nll = jnp.broadcast_to(nll[:, None], logits.shape).reshape(len(valid), -1)
    logits = logits.reshape(len(valid), -1)
    weights = {
        name: getattr(feedback, name) for name in ("margin", "rank_weight", "ce_weight", "nll_weight", "tie_nats")
    }
    loss, metrics = losses.feedback_loss(logits, nll, valid, **weights)

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
