"""The phases. They differ only in their loss and in the components they train (`parameters.TRAINED_IN`).

grounding          patches name what they show; trains encoder, connector and (un)embeddings. The layers of the
                   language model count as trained, but get no gradient, only weight decay
connector          next-token loss of the answers; trains the connector
multi_granularity  next-token loss of the answers; trains encoder, connector and language model
rglf               feedback of the frozen model on the router's choices; trains the router, see `rglf`
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.stack import Remat
from avg_llava_jax.training import losses, rglf
from avg_llava_jax.training.config import RglfConfig
from avg_llava_jax.training.optimizer import Loss


def with_whole(phase: str, granularities: tuple[int, ...], batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch with what the phase's loss of a micro-batch needs to know of the whole batch."""
    return batch if phase in ("grounding", "rglf") else losses.with_totals(batch, granularities)


def make_loss(
    phase: str,
    config: ModelConfig,
    granularities: tuple[int, ...],
    settings: RglfConfig,
    remat: Remat,
    lora_dropout: float = 0.0,
) -> Loss:
    """The loss of a phase, (params, batch, keys) -> loss, (weight, metrics).

    Raises:
      ValueError: the phase does not go with these granularities or with rematerialisation.
    """
    if phase == "grounding":

        def grounding(params: Any, batch: Mapping[str, Any], keys: Any) -> Any:
            del keys
            loss, metrics = losses.grounding_loss(config, params, batch, remat)
            return loss, (jnp.sum(batch["patch_words"] >= 0).astype(jnp.float32), metrics)

        return grounding

    if phase != "rglf":

        def language(params: Any, batch: Mapping[str, Any], keys: Any) -> Any:
            if lora_dropout and keys is not None:
                params = avg_llava.with_dropout(params, keys, batch["pixels"].shape[1], lora_dropout)
            loss, metrics = losses.language_loss(config, params, batch, granularities, remat)
            return loss, (jnp.sum(batch["target_at"][granularities[0]] >= 0).astype(jnp.float32), metrics)

        return language

    if granularities != config.granularities:
        raise ValueError(
            f"phase rglf compares all granularities of the model, {config.granularities}: leave them unset"
        )
    return lambda params, batch, keys: rglf.batch_loss(config, params, batch, keys, settings)
