"""The one training loop, for every phase.

A run is a function of its config: batch n, the dropout of step n and the learning rate of step n
depend on n alone, so a run that was killed goes on from its last checkpoint to the same losses.
"""

import contextlib
import functools
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from avg_llava_jax import checkpoint, parameters, plots, sharding
from avg_llava_jax.config import ModelConfig, from_dict, to_dict
from avg_llava_jax.data.pipeline import Batch, Batches, PlannedBatches
from avg_llava_jax.data.sources import open_sources
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.models import avg_llava
from avg_llava_jax.training import phases
from avg_llava_jax.training.metrics import MetricsLog, Progress, SkippedLog
from avg_llava_jax.training.optimizer import OptimizerConfig, gradients, make_optimizer, rate_shape, trainable

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, 143: what a shell reports for it, so that a scheduler sees who ended the run."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Start(NamedTuple):
    """The model that a run begins with. `params` is None where a checkpoint of the run itself takes its place."""

    model: ModelConfig
    params: parameters.Params | None
    granularities_trained: list[int] | None


def train(config: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """Run a phase to its end, or on from where it was stopped.

    `configs/` says what there is to set. `workdir` becomes a checkpoint folder, with metrics.jsonl,
    skipped.jsonl, tensorboard/ and plots/.

    Raises:
      FileNotFoundError, ValueError: a setting or a file is wrong; one line that says which.
      RuntimeError: another process holds the workdir, or too many samples were skipped.
      FloatingPointError: the loss or a gradient is not finite.
      SystemExit: with TERMINATED after SIGTERM, once a checkpoint is written.
    """
    workdir = Path(workdir)
    optimizer_config = OptimizerConfig(**config.optimizer)
    names = trainable(config.phase, optimizer_config)
    mesh = sharding.make_mesh(config.mesh)
    _check(config, optimizer_config, mesh)
    with checkpoint.Manager(workdir) as manager, jax.set_mesh(mesh), _Termination() as termination:
        start = _start(config, workdir, mesh)
        granularities = _granularities(config, start.model)
        with contextlib.closing(_batches(config, workdir, start.model, granularities)) as batches:
            run = _Run(config, start.model, granularities, names, optimizer_config, mesh)
            run.begin(manager, start.params, batches)
            start = start._replace(params=None)  # the state holds them, or donated them already
            if run.step < config.steps:
                _loop(config, workdir, run, manager, batches, termination)
    plots.training_curves(workdir)


def _loop(
    config: ml_collections.ConfigDict,
    workdir: Path,
    run: "_Run",
    manager: checkpoint.Manager,
    batches: Batches,
    termination: "_Termination",
) -> None:
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(MetricsLog(workdir, run.step)))
        skipped = stack.enter_context(contextlib.closing(SkippedLog(workdir, config.data.max_skipped_share)))
        progress = stack.enter_context(contextlib.closing(Progress(config.steps)))
        reporter = _Reporter(config, run, log, progress)
        while run.step < config.steps:
            batch = next(batches)
            ids = batch.pop("ids")
            skipped.add(sum(map(bool, ids)), batch.pop("skipped"))
            # The device works on this step while the last one is reported.
            reporter.hand_over(run.advance(batch), ids, batch)
            last = run.step == config.steps or termination.asked
            if last or run.step % config.checkpoint_every == 0:
                reporter.report()  # never save a state whose loss was not looked at
                run.save(manager, batches)
            if termination.asked:
                break
        reporter.report()
        manager.wait()
        if skipped.reasons:
            progress.say(f"skipped samples: {skipped.summary()}")
        if termination.asked and run.step < config.steps:
            progress.say(f"terminated: step {run.step} is saved, the same command goes on from there")
            raise SystemExit(TERMINATED)


class _Run:
    """Parameters, optimizer state, and the compiled step."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: ModelConfig,
        granularities: tuple[int, ...],
        names: tuple[str, ...],
        optimizer_config: OptimizerConfig,
        mesh: jax.sharding.Mesh,
    ):
        self._names, self._mesh = names, mesh
        self.step = 0
        self._optimizer = make_optimizer(optimizer_config, config.steps)
        feedback = phases.FeedbackConfig(**config.rglf)
        loss = phases.make_loss(config.phase, model, granularities, feedback, config.remat)
        dtype, seed = DTYPES[config.compute_dtype], config.seed

        def update(ours: Any, state: Any, frozen: Any, batch: Any, step: jax.Array) -> tuple[Any, Any, Any]:
            cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
            still = cast(frozen)
            rng = jax.random.fold_in(jax.random.key(seed), step)

            def of_ours(ours: Any, batch: Any, rng: jax.Array) -> Any:
                return loss(parameters.merge(cast(ours), still), batch, rng)

            grads, value, metrics = gradients(of_ours, ours, batch, rng, optimizer_config.accumulate)
            metrics |= {"loss": value, "grad_norm": optax.global_norm(grads)}
            updates, state = self._optimizer.update(grads, state, ours)
            return optax.apply_updates(ours, updates), state, metrics

        whole = parameters.abstract(model)
        ours, frozen = parameters.split(whole, names)
        state = jax.eval_shape(self._optimizer.init, ours)
        of_state = sharding.state_shardings(mesh, whole, state)
        of_ours, of_frozen = (sharding.shardings(mesh, half) for half in (ours, frozen))
        rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._rows = rows
        self._init = jax.jit(self._optimizer.init, out_shardings=of_state)
        self._update = jax.jit(
            update,
            in_shardings=(of_ours, of_state, of_frozen, rows, everywhere),
            out_shardings=(of_ours, of_state, everywhere),
            donate_argnums=(0, 1),
        )
        targets = (whole, sharding.shardings(mesh, whole)), (state, of_state)
        self._targets = [
            jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), *pair)
            for pair in targets
        ]

    def begin(self, manager: checkpoint.Manager, params: parameters.Params | None, batches: Batches) -> None:
        """Take `params`, or where that is None the newest checkpoint of the run."""
        if params is None:
            restored = manager.restore(*self._targets, batches)
            self.step, params, self._state = restored.step, restored.params, restored.optimizer
            self._ours, self._frozen = parameters.split(params, self._names)
        else:
            self._ours, self._frozen = parameters.split(params, self._names)
            self._state = self._init(self._ours)

    def advance(self, batch: Batch) -> dict[str, jax.Array]:
        """One optimizer step; returns its metrics before they are computed."""
        arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(self._rows, x), batch)
        step = jnp.asarray(self.step, jnp.int32)
        self._ours, self._state, metrics = self._update(self._ours, self._state, self._frozen, arrays, step)
        self.step += 1
        return metrics

    def save(self, manager: checkpoint.Manager, batches: Batches) -> None:
        manager.save(self.step, parameters.merge(self._ours, self._frozen), self._state, batches)


class _Reporter:
    """Writes the metrics of a step once the next one has been handed to the device."""

    def __init__(self, config: ml_collections.ConfigDict, run: _Run, log: MetricsLog, progress: Progress):
        self._phase, self._log, self._progress, self._run = config.phase, log, progress, run
        self._peak, self._rate = config.optimizer.learning_rate, rate_shape(OptimizerConfig(**config.optimizer), config.steps)
        self._pending: tuple[int, dict[str, jax.Array], list[str], int] | None = None
        self._shapes: set[tuple[int, ...]] = set()
        self._since = time.monotonic()

    def hand_over(self, metrics: dict[str, jax.Array], ids: list[str], batch: Batch) -> None:
        shape = (*batch["pixels"].shape[:2], *batch["text"].shape[1:], *batch["targets"].shape[1:])
        shape += tuple(index.shape[1] for index in batch["index"].values())
        if shape not in self._shapes:
            self._shapes.add(shape)
            rows, tiles, text, answer, *lengths = shape
            self._progress.say(
                f"batch shape {len(self._shapes)}: {rows} samples of {tiles} tiles, {text} text tokens, "
                f"{answer} of them answer, packed to {', '.join(map(str, lengths))}"
            )
        self.report()
        tokens = int(sum(length.sum() for length in batch["length"].values())) * jax.process_count()
        self._pending = self._run.step, metrics, ids, tokens

    def report(self) -> None:
        """Wait for the step that is pending, check it and write it."""
        if self._pending is None:
            return
        (step, metrics, ids, tokens), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise FloatingPointError(f"{name} is {values[name]} at step {step}, samples {', '.join(filter(None, ids))}")
        row = {
            "step": step,
            "phase": self._phase,
            **dict(sorted(values.items())),
            "learning_rate": self._peak * float(self._rate(step - 1)),
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
        }
        self._log.write(row)
        self._progress.show(row)


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


def _start(config: ml_collections.ConfigDict, workdir: Path, mesh: jax.sharding.Mesh) -> Start:
    """The run's own checkpoint, else `init_from`, else a fresh model; writes config.json and tokenizer/."""
    if checkpoint.steps(workdir):
        model, values = checkpoint.read_config(workdir)
        before = (values["training"] or {}).get("phase")
        if before != config.phase:
            raise ValueError(f"{workdir} holds phase {before}: give phase {config.phase} a workdir of its own")
        return Start(model, None, values["granularities_trained"])
    if config.init_from:
        loaded = checkpoint.load(config.init_from, config.vision_tower or None, mesh, jnp.float32)
        model = _overridden(loaded.config, config.model)
        params, tokenizer, trained = loaded.params, loaded.tokenizer_folder, loaded.meta["granularities_trained"]
        _same_shapes(params, parameters.abstract(model), config.init_from)
    else:
        model = _overridden(ModelConfig(), config.model)
        init = functools.partial(avg_llava.init, model)
        shardings = sharding.shardings(mesh, parameters.abstract(model))
        params = jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
        tokenizer, trained = config.tokenizer, None
    if config.phase != "rglf":
        trained = list(_granularities(config, model))
    checkpoint.copy_tokenizer(tokenizer, workdir)
    checkpoint.save_config(workdir, model, config.to_dict(), trained)
    return Start(model, params, trained)


def _overridden(model: ModelConfig, overrides: ml_collections.ConfigDict) -> ModelConfig:
    """`config.model` over a model's config; what is None there stays as it is."""

    def over(values: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
        for key, value in by.items():
            if isinstance(value, dict):
                values[key] = over(dict(values.get(key) or {}), value)
            elif value is not None:
                values[key] = value
        return values

    return from_dict(over(to_dict(model), overrides.to_dict()))


def _same_shapes(params: parameters.Params, wanted: parameters.Params, where: str) -> None:
    ours, theirs = parameters.flat(wanted), parameters.flat(params)
    for path in sorted(ours.keys() | theirs.keys()):
        shapes = [tree[path].shape if path in tree else None for tree in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"config.model does not fit {where}: {path} is {shapes[0]} there, {shapes[1]} is asked for")


def _granularities(config: ml_collections.ConfigDict, model: ModelConfig) -> tuple[int, ...]:
    """Those that the phase trains, ascending; unset means all."""
    chosen = tuple(sorted(config.granularities)) or model.granularities
    if not set(chosen) <= set(model.granularities):
        raise ValueError(f"granularities={chosen}: this model has {model.granularities}")
    return chosen


def _check(config: ml_collections.ConfigDict, optimizer: OptimizerConfig, mesh: jax.sharding.Mesh) -> None:
    """Settings that would only fail later, or worse, would not."""
    if config.compute_dtype not in DTYPES:
        raise ValueError(f"compute_dtype={config.compute_dtype!r}: choose {' or '.join(DTYPES)}")
    for name in ("steps", "batch_size", "checkpoint_every"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]} must be at least 1")
    parts = optimizer.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {parts}: "
            f"optimizer.accumulate={optimizer.accumulate} times mesh data x fsdp={parts // optimizer.accumulate}"
        )


def _batches(
    config: ml_collections.ConfigDict, workdir: Path, model: ModelConfig, granularities: tuple[int, ...]
) -> Batches:
    tokenizer = load_tokenizer(workdir / checkpoint.TOKENIZER)
    if tokenizer.vocab_size > model.language.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.language.vocab_size={model.language.vocab_size}"
        )
    planned = PlannedBatches(
        sources=open_sources(config.data.path, config.data.images, config.data.max_pixels),
        tokenizer=tokenizer,
        config=model,
        granularities=granularities,
        batch_size=config.batch_size,
        seed=config.seed,
        shapes=config.data.shapes,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    return Batches(planned, config.data.workers)
