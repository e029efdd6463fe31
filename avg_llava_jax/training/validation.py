"""Validation while training: the loss and the metrics of a phase on held-out samples.

Validation does not affect training: batches, dropout and learning rates are those of a run without it. The model with
the lowest validation loss so far is kept in a separate checkpoint folder:

    WORKDIR/best/                    config.json, tokenizer/ and one step under checkpoints/, like any checkpoint
    WORKDIR/best/validation.json     {"step": ..., "loss": ...}
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import foreign
from avg_llava_jax.data.pipeline import PlannedBatches, Skipped
from avg_llava_jax.files import write_whole
from avg_llava_jax.parallel import hosts
from avg_llava_jax.training.config import TrainConfig
from avg_llava_jax.training.curves import PREFIX
from avg_llava_jax.training.feedback import NOT_ARRAYS, measure_batch
from avg_llava_jax.training.step import Step

LOSS, BEST_STEP = f"{PREFIX}loss", f"{PREFIX}best_step"
BEST, RECORD = "best", "validation.json"


class Validation:
    """The held-out samples of a run.

    In phase rglf the frozen model answers them once; its feedback is kept and the router is measured against it.

    seen: the number of used samples and the skipped records of the first pass; the same on all processes.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, step: Step, batches: PlannedBatches):
        self._config, self._model, self._step, self._batches = config, model, step, batches
        self._nll: dict[int, jax.Array] = {}
        self.seen: tuple[int, list[Skipped]] | None = None

    def run(self, trained: parameters.Params, frozen: parameters.Params) -> dict[str, float]:
        """Means over all held-out samples, by `validation/NAME`. All processes must call it.

        Raises:
          ValueError: no held-out sample can be used.
        """
        total, used, skipped = None, 0, []
        for number in range(len(self._batches)):
            batch = self._batches[number]
            used += sum(map(bool, batch["records"]))
            skipped += batch["skipped"]
            arrays = {key: value for key, value in batch.items() if key not in NOT_ARRAYS}
            arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._step.rows, x), arrays)
            if self._config.phase == "rglf":
                arrays["nll"] = self._feedback(number, trained, frozen, arrays)
            found = self._step.evaluate(trained, frozen, arrays)
            total = found if total is None else jax.tree.map(jax.numpy.add, total, found)
        if self.seen is None:
            counts, lists = hosts.gather(used), hosts.gather(skipped)
            self.seen = sum(counts), [Skipped(*one) for one in itertools.chain(*lists)]
        sums, weight = jax.device_get(total)
        if not weight:
            raise ValueError(
                f"data.validation={self._config.data.validation}: none of its {sum(self._batches.sizes)} records "
                f"has an answer{' and an image' if self._config.phase == 'rglf' else ''} and can be used"
            )
        return {f"{PREFIX}{name}": float(value / weight) for name, value in sorted(sums.items())}

    def _feedback(self, number: int, trained: parameters.Params, frozen: parameters.Params, arrays: Any) -> jax.Array:
        """The frozen model's feedback on a batch, NLL (B, G), measured once."""
        if number not in self._nll:
            params = parameters.merge(trained, frozen)
            self._nll[number], _ = measure_batch(self._model, self._config.rglf.execution, False, params, arrays)
        return self._nll[number]


class Best:
    """The checkpoint with the lowest validation loss, in `WORKDIR/best`.

    known: loss and step of the best so far, in a resumed run. A model that an interrupted run kept after its last
        checkpoint stays until the resumed run reaches that step or a better one.
    """

    def __init__(self, workdir: Path, known: tuple[float, int] | None = None):
        self._workdir, self._folder = workdir, workdir / BEST
        self.loss, self.step = known or (float("inf"), None)
        record = self._folder / RECORD
        if record.is_file():
            self._drop_all_but(json.loads(record.read_text())["step"])

    def offer(self, step: int, loss: float, params: parameters.Params) -> bool:
        """Keep a step if its loss is the lowest so far; returns whether it is. All processes must call it."""
        if not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        if hosts.first():
            self._folder.mkdir(exist_ok=True)
            shutil.copyfile(self._workdir / checkpoint.CONFIG, self._folder / checkpoint.CONFIG)
            shutil.copytree(
                self._workdir / checkpoint.TOKENIZER, self._folder / checkpoint.TOKENIZER, dirs_exist_ok=True
            )
            foreign.keep_unused(self._workdir, self._folder)
            shutil.rmtree(self._folder / checkpoint.STEPS / str(step), ignore_errors=True)
        multihost_utils.sync_global_devices("the folder of the best checkpoint is there")
        with checkpoint.Manager(self._folder) as manager:
            manager.save(step, params)
        if hosts.first():
            write_whole(self._folder / RECORD, json.dumps({"step": step, "loss": loss}) + "\n")
        self._drop_all_but(step)
        multihost_utils.sync_global_devices("the best checkpoint is kept")
        return True

    def _drop_all_but(self, step: int) -> None:
        """Remove other steps: readers take the newest, and an interrupted run may have left two."""
        if hosts.first():
            for other in checkpoint.steps(self._folder):
                if other != step:
                    shutil.rmtree(self._folder / checkpoint.STEPS / str(other))
