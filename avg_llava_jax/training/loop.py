"""The one training loop, for every phase.

A run is a function of its config: batch n, the dropout of step n and the learning rate of step n
depend only on n, so an interrupted run resumes from its last checkpoint and reaches the same losses.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from avg_llava_jax import adapters, checkpoint, parameters
from avg_llava_jax.data.feedback import require_same_measure
from avg_llava_jax.data.pipeline import Batch, Batches, PlannedBatches
from avg_llava_jax.parallel import hosts, sharding
from avg_llava_jax.training import curves, disk, setup
from avg_llava_jax.training.config import TrainConfig, read
from avg_llava_jax.training.feedback import measured_by
from avg_llava_jax.training.metrics import MetricsLog, Progress, SkippedLog
from avg_llava_jax.training.step import Step
from avg_llava_jax.training.validation import BEST_STEP, LOSS, Best, Validation

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, 143, as a shell reports it, so that a scheduler can tell it from a failure."""


def train(
    settings: ml_collections.ConfigDict,
    workdir: str | Path,
    termination: "Termination | None" = None,
    label: str = "",
) -> None:
    """Run a phase to its end; an interrupted run resumes.

    `config.TrainConfig` lists the settings. `workdir` becomes a checkpoint folder, with metrics.jsonl, skipped.jsonl,
    tensorboard/ and plots/. The processes of a run (see `hosts`) share it: each saves its shards of a checkpoint, the
    first writes the logs.

    termination, label: of a run that trains next to others, see `train_together`. None = handle signals here.

    Raises:
      FileNotFoundError, ValueError: a setting or a file is wrong; one line that names it.
      RuntimeError: another process holds the workdir, or too many samples were skipped.
      FloatingPointError: the loss or a gradient is not finite in more than `max_bad_steps` steps.
      OSError: the disk is full.
      ConnectionError: another process of the run was lost.
      SystemExit: after SIGTERM (with TERMINATED) or Ctrl+C (130) to any of the processes, once a checkpoint is written.
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
        contextlib.nullcontext(termination) if termination else Termination() as termination,
        contextlib.ExitStack() as running,
    ):
        start = setup.begin(config, workdir, mesh)
        model = start.model
        with contextlib.closing(setup.open_batches(config, workdir, model, mesh)) as batches:
            step = Step(config, model, mesh, start.adapters)
            run = running.enter_context(contextlib.closing(_Run(step)))
            run.begin(manager, start, batches)
            if config.rglf.feedback:
                require_same_measure(config.rglf.feedback, measured_by(model, run.params))
            del start  # the run has its parameters now, and gives their memory to its first step
            if run.step < config.steps:
                held_out = setup.plan_validation(config, batches.planned)
                validation = None if held_out is None else Validation(config, model, step, held_out)
                _loop(config, workdir, run, manager, batches, validation, hosts.Votes(mesh), termination, label)
    if hosts.first():
        curves.training_curves(workdir)


def train_together(runs: Mapping[Path, ml_collections.ConfigDict]) -> None:
    """`train` runs that do not depend on each other, by workdir, at the same time in threads of one process.

    Progress lines begin with the name of the run's workdir. Once a run fails, or after Ctrl+C or SIGTERM, the others
    save a checkpoint and end; the error is raised after that.
    """
    with Termination() as termination, ThreadPoolExecutor(len(runs), "train") as pool:
        threads = [pool.submit(train, runs[workdir], workdir, termination, workdir.name) for workdir in runs]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            termination.asked |= not all(thread.done() for thread in threads)
    errors = [error for thread in threads if (error := thread.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, SystemExit)):
        raise error


def _loop(
    config: TrainConfig,
    workdir: Path,
    run: "_Run",
    manager: checkpoint.Manager,
    batches: Batches,
    validation: Validation | None,
    votes: hosts.Votes,
    termination: "Termination",
    label: str,
) -> None:
    with contextlib.ExitStack() as stack:
        log, out = None, stack.enter_context(open(os.devnull, "w"))
        if hosts.first():
            log, out = stack.enter_context(contextlib.closing(MetricsLog(workdir, run.step))), sys.stderr
        skips = SkippedLog(workdir if hosts.first() else None, config.data.max_skipped_share)
        stack.enter_context(contextlib.closing(skips))
        progress = stack.enter_context(contextlib.closing(Progress(config.steps, out, label)))
        reporter = _Reporter(config, run, log, progress, batches.planned)
        best = Best(workdir, hosts.gather(log.best if log else None)[0])
        every = config.evaluate_every or config.checkpoint_every
        if jax.process_count() == 1:  # several processes may have to compile in the same order
            for example in batches.planned.upcoming(run.step, config.steps - run.step):
                reporter.say_shape(example)
                run.compile(run.place(example))
        while run.step < config.steps:
            manager.check()
            batch = next(batches)
            records, skipped = batch.pop("records"), batch.pop("skipped")
            arrays = run.place(batch)
            if not run.compiled(arrays):
                with reporter.paused():
                    if run.is_new(arrays):
                        reporter.say_shape(batch)
                        run.compile(arrays)
                    run.wait_for(arrays)
            # What only one process knows, all must know before they act on it.
            vote = votes.cast(termination.asked, sum(map(bool, records)), len(skipped))
            # The device works on this step while the last one is reported.
            reporter.hand_over(run.advance(arrays), records, batch)
            asked, used, any_skipped = jax.device_get(vote).tolist()
            skips.add(used, list(itertools.chain(*hosts.gather(skipped))) if any_skipped else [])
            if validation is not None and (run.step == config.steps or run.step % every == 0):
                with reporter.paused():
                    found = _evaluate(run, validation, best, skips, progress)
                reporter.report(found)
            if asked or run.step == config.steps or run.step % config.checkpoint_every == 0:
                reporter.report()  # never save a state whose loss was not checked
                run.save(manager, batches)
            if asked:
                break
        reporter.report()
        manager.wait()
        if skips.reasons:
            progress.say(f"skipped samples: {skips.summary()}")
        if run.step < config.steps:
            progress.say(f"terminated: step {run.step} is saved, the same command resumes from it")
            raise SystemExit(termination.code)


def _evaluate(
    run: "_Run", validation: Validation, best: Best, skips: SkippedLog, progress: Progress
) -> dict[str, float]:
    """Validate, keep the model if it is the best so far, and return the metrics for the log."""
    first = validation.seen is None
    if first:
        progress.say("compiling the validation")
    found = validation.run(run.trained, run.frozen)
    if first:
        skips.add(*validation.seen)
    best.offer(run.step, found[LOSS], run.saved)
    return found | {BEST_STEP: best.step}


class _Run:
    """Parameters, optimizer state, and the step that updates them, compiled for each batch shape."""

    def __init__(self, step: Step):
        self.step = 0
        self._compiled = step
        self._programs: dict[Any, Future[Callable[..., Any]]] = {}
        self._compilers = ThreadPoolExecutor(sharding.COMPILERS, "compile")

    def begin(self, manager: checkpoint.Manager, start: setup.Start, batches: Batches) -> None:
        """Start from the parameters of `start` or, if it has none, from the run's newest checkpoint."""
        self._refers, params, state = start.base is not None, start.params, None
        if params is None:
            restored = manager.restore(self._saved(self._compiled.params), self._compiled.state, batches)
            self.step, params, state = restored
        self.trained, self.frozen = self._compiled.split(parameters.merge(params, start.base or {}))
        self._state = self._compiled.init(self.trained) if state is None else state

    def _saved(self, params: parameters.Params) -> parameters.Params:
        """The part of all parameters that a checkpoint of the run holds."""
        return adapters.divide(params)[0] if self._refers else params

    def place(self, batch: Batch) -> Any:
        """This process's rows of a batch as global arrays."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._compiled.rows, x), batch)

    def is_new(self, arrays: Any) -> bool:
        """Whether no step is compiled, nor being compiled, for a batch of this shape."""
        return _shape(arrays) not in self._programs

    def compiled(self, arrays: Any) -> bool:
        return not self.is_new(arrays) and self._programs[_shape(arrays)].done()

    def compile(self, arrays: Any) -> None:
        """Start compiling the step for a batch of this shape, in parallel with other shapes."""
        compiled = self._compiled
        trained, frozen = compiled.split(compiled.params)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
        number = jax.ShapeDtypeStruct((), jnp.int32)

        def work() -> Callable[..., Any]:
            with jax.set_mesh(compiled.rows.mesh):
                return compiled.update.lower(trained, compiled.state, frozen, shapes, number).compile()

        self._programs[_shape(arrays)] = self._compilers.submit(work)

    def wait_for(self, arrays: Any) -> None:
        """Wait until the step is compiled for a batch of this shape."""
        self._programs[_shape(arrays)].result()

    def close(self) -> None:
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def advance(self, arrays: Any) -> dict[str, jax.Array]:
        """Dispatch one optimizer step; returns its metrics without waiting for them."""
        program = self._programs[_shape(arrays)].result()
        self.trained, self._state, metrics = program(self.trained, self._state, self.frozen, arrays, self._step())
        self.step += 1
        return metrics

    def _step(self) -> jax.Array:
        return jnp.asarray(self.step, jnp.int32)

    @property
    def params(self) -> parameters.Params:
        """All parameters, trained and frozen."""
        return parameters.merge(self.trained, self.frozen)

    @property
    def saved(self) -> parameters.Params:
        """The parameters that a checkpoint holds."""
        return self._saved(self.params)

    def save(self, manager: checkpoint.Manager, batches: Batches) -> None:
        manager.save(self.step, self.saved, self._state, batches)


def _shape(arrays: Any) -> tuple[Any, ...]:
    """Shapes and dtypes of a batch, the key of its compiled program."""
    return tuple((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(arrays))


class _Reporter:
    """Writes the metrics of a step after the next one is dispatched to the device.

    planned: the run's batches; they tell the number of batch shapes to compile, as far as it is known.
    """

    def __init__(
        self, config: TrainConfig, run: _Run, log: MetricsLog | None, progress: Progress, planned: PlannedBatches
    ):
        self._phase, self._run, self._log, self._progress = config.phase, run, log, progress
        self._rows, self._max_bad_steps = config.rows, config.max_bad_steps
        self._bad_steps = hosts.gather(log.bad_steps if log else 0)[0]  # the first process has the log
        self._pending: tuple[int, dict[str, jax.Array], list[str], int] | None = None
        self._settled: tuple[dict[str, float], float] | None = None
        self._shapes, self._seen = len(planned.ladder), 0
        self._patches = planned.config.vision.grid**2
        self._since = time.monotonic()

    def hand_over(self, metrics: dict[str, jax.Array], records: list[str], batch: Batch) -> None:
        self.report()
        if batch["length"]:
            tokens = int(sum(length.sum() for length in batch["length"].values()))
        else:  # no language model runs: patches
            tokens = int((batch["tile_image"] >= 0).sum()) * self._patches
        self._pending = self._run.step, metrics, records, tokens * self._rows // len(batch["text"])

    def say_shape(self, batch: Batch) -> None:
        """Log which batch shape is compiled, and how many there are."""
        self._seen += 1
        (rows, tiles), text, answer = batch["tile_image"].shape, batch["text"].shape[1], batch["targets"].shape[1]
        lengths = ", ".join(str(index.shape[1]) for index in batch["index"].values())
        self._progress.say(
            f"compiling batch shape {self._seen} of {max(self._shapes, self._seen)}: {rows} rows of {tiles} tiles, "
            f"{text} text tokens, {answer} of them answer" + (f", packed to {lengths}" if lengths else "")
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of a block from the seconds of all steps."""
        self._settle()
        yield
        self._since = time.monotonic()

    def _settle(self) -> None:
        """Wait for the pending step."""
        if self._pending is not None and self._settled is None:
            values = {name: float(value) for name, value in jax.device_get(self._pending[1]).items()}
            now = time.monotonic()
            seconds, self._since = now - self._since, now
            self._settled = values, seconds

    def report(self, validation: Mapping[str, float] | None = None) -> None:
        """Wait for the pending step, check it, and write its metrics with those of the validation after it."""
        if self._pending is None:
            return
        self._settle()
        (step, _, records, tokens), self._pending = self._pending, None
        (values, seconds), self._settled = self._settled, None
        bad = [f"{name} is {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if bad:
            self._pass_over(step, bad[0], records, validation or {})
            return
        if values.get("visual_tokens") == 0:  # text alone: there was nothing to choose, and zeros would mislead
            values = {name: values[name] for name in ("loss", "grad_norm", "learning_rate")}
        rate = values.pop("learning_rate")
        row = {
            "step": step,
            "phase": self._phase,
            **dict(sorted(values.items())),
            **(validation or {}),
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
        }
        if self._log is not None:
            self._log.write(row)
        self._progress.show(row)

    def _pass_over(self, step: int, what: str, records: list[str], validation: Mapping[str, float]) -> None:
        """Log a step that was not finite and changed nothing; raise if there were too many."""
        records = list(dict.fromkeys(filter(None, itertools.chain(*hosts.gather(records)))))
        what += f" at step {step}; its samples are {', '.join(records)}"
        self._bad_steps += 1
        if self._bad_steps > self._max_bad_steps:
            raise FloatingPointError(f"{what}; max_bad_steps={self._max_bad_steps} such steps may be passed over")
        self._progress.say(f"{what}; passed over, {self._bad_steps} of at most {self._max_bad_steps}")
        if self._log is not None:
            self._log.write({"step": step, "phase": self._phase, "not_finite": what, "records": records, **validation})


class Termination:
    """Records SIGTERM and Ctrl+C, so that the loop can save a checkpoint before it ends. Ctrl+C again ends at once.

    code: the exit code, as a shell reports the signal.
    """

    def __init__(self) -> None:
        self.asked, self.code = False, TERMINATED
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():  # Python lets no other handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in a job of a shell's background
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.asked, self.code = True, 128 + number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
            print("saving a checkpoint after this step; Ctrl+C again ends at once", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
