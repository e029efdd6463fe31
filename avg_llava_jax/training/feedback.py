"""Measuring stored feedback: the frozen model's answers do not depend on the router, so one measurement serves many.

`avg-llava feedback` measures into a folder (see `data.feedback`), optionally with the visual features.
`config.rglf.feedback` names the folder; RGLF then trains to the same losses without running the language model or,
with stored features, the encoder.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from avg_llava_jax import checkpoint
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert.quantize import quantized
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.feedback import FeedbackFolder, Stored, question_digest
from avg_llava_jax.data.pipeline import WINDOW, PlannedBatches, Skipped
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.models import avg_llava, one_cpu
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.parallel import hosts, sharding
from avg_llava_jax.reuse import made_by_frozen
from avg_llava_jax.training import losses, rglf, setup
from avg_llava_jax.training.config import TrainConfig
from avg_llava_jax.training.metrics import SkippedLog

NOT_ARRAYS = ("records", "skipped")
"""Entries of a batch that stay on the host."""


class Windows(NamedTuple):
    """The number of windows of a set, how many of them were already stored, and what was skipped, by reason."""

    count: int
    reused: int
    skipped: str = ""

    def __str__(self) -> str:
        found = f"{self.count} windows of {WINDOW} batches, {self.reused} of them measured before"
        return f"{found}; skipped samples: {self.skipped}" if self.skipped else found


def measured_by(config: ModelConfig, params: avg_llava.Params) -> dict[str, str]:
    """Digests of what determines the answers: weights in their dtype, model config and code, without the router."""
    return made_by_frozen(config, params, ["training/rglf.py"])


def run(config: TrainConfig, folder: str | pathlib.Path, keep_features: bool) -> Windows:
    """`measure` the samples of a run of this config, with its model.

    Raises:
      ValueError: the phase is not rglf; and as `measure`.
    """
    if config.phase != "rglf":
        raise ValueError(f"phase={config.phase}: feedback is for phase rglf")
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    setup.check(config, mesh)
    loaded = checkpoint.load(config.init_from, config.vision_tower or None, mesh, setup.DTYPES[config.compute_dtype])
    model = setup.override(loaded.config, config.model)
    batches = setup.plan_batches(config, model, load_tokenizer(loaded.tokenizer_folder), mesh)
    params = quantized(loaded.params) if config.quantize else loaded.params
    share = config.data.max_skipped_share
    return measure(model, params, batches, config.steps, folder, mesh, keep_features, config.rglf.execution, share)


def measure(
    config: ModelConfig,
    params: avg_llava.Params,
    batches: PlannedBatches,
    steps: int,
    folder: str | pathlib.Path,
    mesh: jax.sharding.Mesh,
    keep_features: bool,
    execution: losses.Execution = "per_length",
    max_skipped_share: float = 1.0,
) -> Windows:
    """Store the feedback on all samples that a run of `steps` steps would use, once each.

    An existing folder is resumed: windows are reused if it holds all their questions; windows whose data changed are
    measured again.

    params: in the compute dtype, sharded by `sharding.shardings`; features are stored in that dtype.
    keep_features: 4 * P * D bytes per tile in float32: 24 KB for jersey, 9 MB (half of it in bfloat16) for the 7B.
    max_skipped_share: fail if a larger share of the samples cannot be used; skipped.jsonl in the folder lists them.

    Raises:
      ValueError: the folder holds feedback measured with other settings, another model or other code.
      RuntimeError: too many samples were skipped.
    """
    dtype = str(jax.tree.leaves(params)[0].dtype) if keep_features else ""
    store = FeedbackFolder(pathlib.Path(folder), config.granularities, dtype, measured_by(config, params))
    if hosts.first():
        store.start()
    multihost_utils.sync_global_devices("the feedback's folder is there")
    if not hosts.first():
        store.start()
    count = math.ceil(steps / WINDOW)
    if len(batches.parts) == 1:  # otherwise epochs end at different times, and only `steps` says how far to go
        count = min(count, math.ceil(batches.sizes[0] / (WINDOW * batches.batch_size)))
    known: set[str] = set()
    reused, process = 0, jax.process_index()
    skips = SkippedLog(store.path if hosts.first() else None, max_skipped_share)
    with (
        jax.set_mesh(mesh),
        tqdm(total=count * WINDOW, unit="batch") as progress,
        contextlib.closing(skips),
    ):
        for window in range(count):
            held, questions = store.holds(window, process), _questions(batches, window)
            if hosts.agree(questions <= held.keys() | known):
                reused += 1
            else:
                held, used, skipped = _window(config, execution, params, batches, window, known, mesh, keep_features)
                counted = hosts.gather((used, skipped))
                skips.add(sum(used for used, _ in counted), [one for _, each in counted for one in each])
                store.add(window, process, held)
            known.update(held)
            progress.update(WINDOW)
    multihost_utils.sync_global_devices("feedback is stored")
    if hosts.first():
        store.finish(count, jax.process_count())
    return Windows(count, reused, skips.summary())


def _questions(batches: PlannedBatches, window: int) -> set[str]:
    """The questions of a window, by `question_digest`, in this process's rows."""
    questions = set()
    for number in range(window * WINDOW, (window + 1) * WINDOW):
        for member in itertools.chain(*batches.rows_of(number)):
            try:
                questions.add(question_digest(member.sample))
            except BadSample:  # its image is gone: nothing can be asked
                continue
    return questions


def _window(
    config: ModelConfig,
    execution: losses.Execution,
    params: avg_llava.Params,
    batches: PlannedBatches,
    window: int,
    known: set[str],
    mesh: jax.sharding.Mesh,
    keep_features: bool,
) -> tuple[dict[str, Stored], int, list[Skipped]]:
    """Feedback on a window's samples, by `question_digest`, without the known ones; NaN where there is no answer.

    Also the number of samples that were used, and those that were skipped.
    """
    rows = sharding.batch_sharding(mesh)
    found: dict[str, Stored] = {}
    used, skipped = 0, []

    def keep(number: int, batch: Mapping[str, Any], measured: tuple[jax.Array, jax.Array]) -> None:
        nonlocal used
        used += sum(map(bool, batch["records"]))
        skipped.extend(batch["skipped"])
        ours = multihost_utils.global_array_to_host_local_array(measured, mesh, rows.spec)
        nll, features = map(np.asarray, ours)
        for row, members in enumerate(batches.rows_of(number)):
            image = batch["tile_image"][row]
            of_tile = np.where(image < 0, -1, batch["image_sample"][row, image] if "image_sample" in batch else 0)
            for place, (record, sample) in enumerate(members):
                try:
                    question = question_digest(sample)
                except BadSample:
                    continue
                if question in known:
                    continue
                own = nll[row].reshape(-1, nll.shape[-1])[place]
                found[question] = Stored(own, features[row, of_tile == place] if keep_features else None, record)

    def ask(number: int) -> tuple[int, Mapping[str, Any], tuple[jax.Array, jax.Array]]:
        with jax.set_mesh(mesh):
            batch = batches[number]
            arrays = {key: value for key, value in batch.items() if key not in NOT_ARRAYS}
            arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(rows, x), arrays)
            measured = measure_batch(config, execution, keep_features, params, arrays)
            return number, batch, jax.block_until_ready(measured)

    # One batch is read while the device measures another; a CPU measures both. Several processes keep one order.
    pool = ThreadPoolExecutor(1 if jax.process_count() > 1 else 2, "feedback")
    try:
        for answered in pool.map(ask, range(window * WINDOW, (window + 1) * WINDOW)):
            keep(*answered)
    finally:
        pool.shutdown(cancel_futures=True)
    return found, used, skipped


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def measure_batch(
    config: ModelConfig,
    execution: losses.Execution,
    keep_features: bool,
    params: avg_llava.Params,
    batch: Mapping[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """Mean NLL (B, *n, G), NaN where a sample has no answer, and features (B, T, P, D), or of no tile (B, 0, P, D)."""

    def measured(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        features = avg_llava.encode_images(config, params, batch["pixels"])
        text = avg_llava.embed(config, params, batch["text"])
        nll, answered = rglf.feedback(config, params, scale(config, features), text, batch, execution)
        return jnp.where(answered[..., None], nll, jnp.nan), features if keep_features else features[:, :0]

    return one_cpu.by_parts(measured, batch, one_cpu.FORWARD_ROWS)
