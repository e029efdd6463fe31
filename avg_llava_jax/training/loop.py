"""The one training loop, for every phase.

A run is a function of its config: batch n, the dropout of step n and the learning rate of step n
depend on n alone, so a run that was killed goes on from its last checkpoint to the same losses.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.data.pipeline import Batch, Batches
from avg_llava_jax.parallel import hosts, sharding
from avg_llava_jax.training import curves, disk, setup
from avg_llava_jax.training.config import TrainConfig, read
from avg_llava_jax.training.metrics import MetricsLog, Progress, SkippedLog
from avg_llava_jax.training.optimizer import rate_shape
from avg_llava_jax.training.step import Step

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, 143: what a shell reports for it, so that a scheduler sees who ended the run."""


def train(settings: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """Run a phase to its end; a run that was stopped resumes.

    `config.TrainConfig` says what there is to set. `workdir` becomes a checkpoint folder, with metrics.jsonl,
    skipped.jsonl, tensorboard/ and plots/. The processes of a run (see `hosts`) share it: all of them save
    their part of a checkpoint, the first writes the logs.

    Raises:
      FileNotFoundError, ValueError: a setting or a file is wrong; one line that says which.
      RuntimeError: another process holds the workdir, or too many samples were skipped.
      FloatingPointError: the loss or a gradient is not finite in more than `max_bad_steps` steps.
      OSError: the disk is full.
      ConnectionError: another process of the run is gone.
      SystemExit: with TERMINATED after SIGTERM to any of the processes, once a checkpoint is written.
    """
    config, workdir = read(settings), Path(workdir)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    setup.check(config, mesh)
    with hosts.together():
        setup.check_alike(config, workdir)
    with (
        hosts.together(),
        disk.watched(workdir),
        checkpoint.Manager(workdir) as manager,
        jax.set_mesh(mesh),
        _Termination() as termination,
    ):
        model, params = setup.begin(config, workdir, mesh)
        with contextlib.closing(setup.open_batches(config, workdir, model, mesh)) as batches:
            run = _Run(Step(config, model, mesh))
            run.begin(manager, params, batches)
            del params  # the run has them, and gives their memory to its first step
            if run.step < config.steps:
                _loop(config, workdir, run, manager, batches, hosts.Votes(mesh), termination)
    if hosts.first():
        curves.training_curves(workdir)


def _loop(
    config: TrainConfig,
    workdir: Path,
    run: "_Run",
    manager: checkpoint.Manager,
    batches: Batches,
    votes: hosts.Votes,
    termination: "_Termination",
) -> None:
    with contextlib.ExitStack() as stack:
        log, out = None, stack.enter_context(open(os.devnull, "w"))
        if hosts.first():
            log, out = stack.enter_context(contextlib.closing(MetricsLog(workdir, run.step))), sys.stderr
        skips = SkippedLog(workdir if hosts.first() else None, config.data.max_skipped_share)
        stack.enter_context(contextlib.closing(skips))
        progress = stack.enter_context(contextlib.closing(Progress(config.steps, out)))
        reporter = _Reporter(config, run, log, progress)
        while run.step < config.steps:
            manager.check()
            batch = next(batches)
            ids, skipped = batch.pop("ids"), batch.pop("skipped")
            # What one process knows alone, all must know before they act on it.
            vote = votes.cast(termination.asked, sum(map(bool, ids)), len(skipped))
            # The device works on this step while the last one is reported.
            reporter.hand_over(run.advance(batch), ids, batch)
            asked, used, any_skipped = jax.device_get(vote).tolist()
            skips.add(used, list(itertools.chain(*hosts.gather(skipped))) if any_skipped else [])
            if asked or run.step == config.steps or run.step % config.checkpoint_every == 0:
                reporter.report()  # never save a state whose loss was not looked at
                run.save(manager, batches)
            if asked:
                break
        reporter.report()
        manager.wait()
        if skips.reasons:
            progress.say(f"skipped samples: {skips.summary()}")
        if run.step < config.steps:
            progress.say(f"terminated: step {run.step} is saved, the same command goes on from there")
            raise SystemExit(TERMINATED)


class _Run:
    """Parameters, optimizer state, and the step that moves them on."""

    def __init__(self, step: Step):
        self.step = 0
        self._compiled = step

    def begin(self, manager: checkpoint.Manager, params: parameters.Params | None, batches: Batches) -> None:
        """Take `params`, or where that is None the newest checkpoint of the run."""
        if params is None:
            restored = manager.restore(self._compiled.params, self._compiled.state, batches)
            self.step, self._state = restored.step, restored.optimizer
            self._ours, self._frozen = self._compiled.split(restored.params)
        else:
            self._ours, self._frozen = self._compiled.split(params)
            self._state = self._compiled.init(self._ours)

    def advance(self, batch: Batch) -> dict[str, jax.Array]:
        """One optimizer step; returns its metrics before they are computed."""
        arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._compiled.rows, x), batch)
        step = jnp.asarray(self.step, jnp.int32)
        self._ours, self._state, metrics = self._compiled.update(self._ours, self._state, self._frozen, arrays, step)
        self.step += 1
        return metrics

    def save(self, manager: checkpoint.Manager, batches: Batches) -> None:
        manager.save(self.step, parameters.merge(self._ours, self._frozen), self._state, batches)


class _Reporter:
    """Writes the metrics of a step once the next one has been handed to the device."""

    def __init__(self, config: TrainConfig, run: _Run, log: MetricsLog | None, progress: Progress):
        self._phase, self._run, self._log, self._progress = config.phase, run, log, progress
        self._batch_size, self._max_bad_steps = config.batch_size, config.max_bad_steps
        self._bad_steps = hosts.gather(log.bad_steps if log else 0)[0]  # the first process has the log
        self._peak = config.optimizer.learning_rate
        self._rate = rate_shape(config.optimizer, config.steps)
        self._pending: tuple[int, dict[str, jax.Array], list[str], int] | None = None
        self._shapes: set[tuple[int, ...]] = set()
        self._since = time.monotonic()

    def hand_over(self, metrics: dict[str, jax.Array], ids: list[str], batch: Batch) -> None:
        shape = (*batch["tile_image"].shape, *batch["text"].shape[1:], *batch["targets"].shape[1:])
        shape += tuple(index.shape[1] for index in batch["index"].values())
        if shape not in self._shapes:
            self._shapes.add(shape)
            rows, tiles, text, answer, *lengths = shape
            self._progress.say(
                f"batch shape {len(self._shapes)}: {rows} samples of {tiles} tiles, {text} text tokens, "
                f"{answer} of them answer, packed to {', '.join(map(str, lengths))}"
            )
        self.report()
        tokens = int(sum(length.sum() for length in batch["length"].values())) * self._batch_size // len(ids)
        self._pending = self._run.step, metrics, ids, tokens

    def report(self) -> None:
        """Wait for the step that is pending, check it and write it."""
        if self._pending is None:
            return
        (step, metrics, ids, tokens), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        bad = [f"{name} is {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if bad:
            self._pass_over(step, bad[0], ids)
            return
        if values.get("visual_tokens") == 0:  # text alone: there was nothing to choose, and zeros would mislead
            values = {name: values[name] for name in ("loss", "grad_norm")}
        row = {
            "step": step,
            "phase": self._phase,
            **dict(sorted(values.items())),
            "learning_rate": self._peak * float(self._rate(step - 1)),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
        }
        if self._log is not None:
            self._log.write(row)
        self._progress.show(row)

    def _pass_over(self, step: int, what: str, ids: list[str]) -> None:
        """Note a step that was not finite, and so has changed nothing, or stop the run at it."""
        ids = list(dict.fromkeys(filter(None, itertools.chain(*hosts.gather(ids)))))
        what += f" at step {step}; its samples are {', '.join(ids)}"
        self._bad_steps += 1
        if self._bad_steps > self._max_bad_steps:
            raise FloatingPointError(f"{what}; max_bad_steps={self._max_bad_steps} such steps may be passed over")
        self._progress.say(f"{what}; passed over, {self._bad_steps} of at most {self._max_bad_steps}")
        if self._log is not None:
            self._log.write({"step": step, "phase": self._phase, "not_finite": what, "ids": ids})


class _Termination:
    """Remembers that SIGTERM came, so that the loop can save before it ends."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_Termination":
        # Python lets only the main thread handle signals.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._before)
