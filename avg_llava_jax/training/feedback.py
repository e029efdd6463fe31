"""Feedback once, routers many: the frozen model's answer NLL does not depend on the router, so it can be stored.

A feedback file is an npz: `ids` (N,), `nll` (N, G) mean nats per answer token, `granularities` (G,).
`config.rglf.feedback` names one; RGLF then trains without running the language model, to the same losses.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.pipeline import WINDOW, PlannedBatches
from avg_llava_jax.models import avg_llava
from avg_llava_jax.training import losses

NOT_ARRAYS = ("ids", "skipped")
"""What the pipeline adds to a batch for the host alone."""


def answer_feedback(
    config: ModelConfig,
    params: avg_llava.Params,
    pyramid: jax.Array,
    text: jax.Array,
    batch: Mapping[str, Any],
    execution: losses.Execution,
) -> tuple[jax.Array, jax.Array]:
    """Mean answer NLL in nats at every granularity (B, G), without gradient, and who has an answer, bool (B,).

    Stored feedback (`batch["nll"]`, NaN = none) is taken as it is. A sample counts if it has an answer
    token at every granularity.
    """
    if "nll" in batch:
        answered = jnp.all(jnp.isfinite(batch["nll"]), axis=1)
        return jnp.where(answered[:, None], batch["nll"], 0.0), answered
    sums, counts = losses.granularity_nll(config, params, pyramid, text, batch, config.granularities, execution)
    return jax.lax.stop_gradient(sums / jnp.maximum(counts, 1.0)).T, jnp.all(counts > 0, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _measure(config: ModelConfig, params: avg_llava.Params, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
    text = avg_llava.embed(config, params, batch["text"])
    return answer_feedback(config, params, pyramid, text, batch, "per_length")


def measure_all(
    config: ModelConfig, params: avg_llava.Params, batches: PlannedBatches, records: int
) -> dict[str, np.ndarray]:
    """Feedback on the first epoch of `records` records of a pipeline: its answered samples' ids -> nll (G,).

    An epoch is surely over at the end of a window of batches; batches that bring nothing new are passed over.
    """
    found: dict[str, np.ndarray] = {}
    windows = -(-records // (WINDOW * batches.batch_size))
    for number in tqdm(range(windows * WINDOW), unit="batch"):
        if len(found) == records:
            break
        batch = batches[number]
        if found.keys() >= set(filter(None, batch["ids"])):
            continue
        nll, answered = jax.device_get(
            _measure(config, params, {key: value for key, value in batch.items() if key not in NOT_ARRAYS})
        )
        found |= {name: row for name, row, good in zip(batch["ids"], nll, answered, strict=True) if good}
    return found


def write(path: str | os.PathLike[str], config: ModelConfig, feedback: Mapping[str, np.ndarray]) -> None:
    """Store feedback; the file appears only when whole."""
    path = pathlib.Path(path)
    beside = path.with_name(path.name + ".part.npz")
    nll = np.stack(list(feedback.values())) if feedback else np.zeros((0, len(config.granularities)), np.float32)
    np.savez(beside, ids=np.array(list(feedback)), nll=nll, granularities=np.array(config.granularities))
    beside.replace(path)


def read(path: str | os.PathLike[str], config: ModelConfig) -> dict[str, np.ndarray]:
    """What `write` stored. Raises ValueError where it was measured on another ladder."""
    with np.load(path) as stored:
        ladder = tuple(int(g) for g in stored["granularities"])
        if ladder != config.granularities:
            raise ValueError(f"rglf.feedback={path} is on granularities {ladder}, the model has {config.granularities}")
        return dict(zip(stored["ids"].tolist(), stored["nll"], strict=True))
