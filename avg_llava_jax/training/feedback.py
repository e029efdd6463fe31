"""Stored feedback, measured: how the frozen model answers does not depend on the router, so once is enough for many.

`launch.feedback` measures it into a folder (see `data.feedback`), and if asked keeps the features that the model
saw. `config.rglf.feedback` names the folder; RGLF then trains without running the language model, or where features
are kept without the encoder too, to the same losses.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from avg_llava_jax import checkpoint
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.feedback import FeedbackFolder, Stored
from avg_llava_jax.data.pipeline import WINDOW, PlannedBatches
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.parallel import hosts, sharding
from avg_llava_jax.training import losses, rglf, setup
from avg_llava_jax.training.config import TrainConfig

NOT_ARRAYS = ("ids", "skipped")
"""What the pipeline adds to a batch for the host alone."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    config: ModelConfig, execution: losses.Execution, params: avg_llava.Params, batch: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean NLL (B, G), who has an answer (B,), features (B, T, P, D)."""
    features = avg_llava.see(config, params, batch["pixels"])
    text = avg_llava.embed(config, params, batch["text"])
    return *rglf.feedback(config, params, scale(config, features), text, batch, execution), features


def run(config: TrainConfig, folder: str | pathlib.Path, keep_features: bool) -> None:
    """`measure` what a run of this config would ask, with its model.

    Raises:
      ValueError: it is not a run of phase rglf; and as `measure`.
    """
    if config.phase != "rglf":
        raise ValueError(f"phase={config.phase}: feedback is for phase rglf")
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    setup.check(config, mesh)
    loaded = checkpoint.load(config.init_from, config.vision_tower or None, mesh, setup.DTYPES[config.compute_dtype])
    model = setup.override(loaded.config, config.model)
    batches = setup.plan_batches(config, model, load_tokenizer(loaded.tokenizer_folder), mesh)
    measure(model, loaded.params, batches, config.steps, folder, mesh, keep_features, config.rglf.execution)


def measure(
    config: ModelConfig,
    params: avg_llava.Params,
    batches: PlannedBatches,
    steps: int,
    folder: str | pathlib.Path,
    mesh: jax.sharding.Mesh,
    keep_features: bool,
    execution: losses.Execution = "per_length",
) -> None:
    """Store the feedback on all samples that a run of `steps` steps would see, once each; goes on with a folder.

    params: in the dtype to compute in, laid out by `sharding.shardings`; features are kept in it.
    keep_features: 4 * P * D bytes a tile in float32: 24 KB for jersey, 9 MB (half of it in bfloat16) for the 7B.

    Raises:
      ValueError: the folder holds feedback that was measured in another way.
    """
    dtype = str(jax.tree.leaves(params)[0].dtype) if keep_features else ""
    store = FeedbackFolder(pathlib.Path(folder), config.granularities, dtype)
    store.begin()
    windows = math.ceil(steps / WINDOW)
    if len(batches.parts) == 1:  # else epochs end at different times, and how far to go is for `steps` to say
        windows = min(windows, math.ceil(len(batches.parts[0].source) / (WINDOW * batches.batch_size)))
    known: set[str] = set()
    process = jax.process_index()
    with jax.set_mesh(mesh), tqdm(total=windows * WINDOW, unit="batch") as progress:
        for window in range(windows):
            if not hosts.agree(store.has(window, process)):
                found = _window(config, execution, params, batches, window, known, mesh, keep_features)
                store.add(window, process, found)
            known.update(store.ids(window, process))
            progress.update(WINDOW)
    multihost_utils.sync_global_devices("feedback is stored")
    if hosts.first():
        store.finish(windows, jax.process_count())


def _window(
    config: ModelConfig,
    execution: losses.Execution,
    params: avg_llava.Params,
    batches: PlannedBatches,
    window: int,
    known: set[str],
    mesh: jax.sharding.Mesh,
    keep_features: bool,
) -> dict[str, Stored]:
    """The answers to one window's samples but for the known ones."""
    rows = sharding.batch_sharding(mesh)
    found: dict[str, Stored] = {}
    for number in range(window * WINDOW, (window + 1) * WINDOW):
        batch = batches[number]
        arrays = {key: value for key, value in batch.items() if key not in NOT_ARRAYS}
        arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), arrays)
        measured = _measure(config, execution, params, arrays)
        ours = multihost_utils.global_array_to_host_local_array(measured, mesh, rows.spec)
        nll, answered, features = map(np.asarray, ours)
        tiles = (batch["tile_image"] >= 0).sum(axis=1)
        for row, name in enumerate(batch["ids"]):
            if name and name not in known and answered[row]:
                found[name] = Stored(nll[row], features[row, : tiles[row]] if keep_features else None)
    return found
