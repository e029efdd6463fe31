"""The start of a run: checks of its settings, its model, its data."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from avg_llava_jax import adapters, checkpoint, parameters, reuse
from avg_llava_jax.config import ModelConfig, from_dict, to_dict
from avg_llava_jax.convert import foreign, peft
from avg_llava_jax.convert.quantize import quantized
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.feedback import question_digest, read_feedback
from avg_llava_jax.data.packing import Sample
from avg_llava_jax.data.pipeline import SURVEY, WINDOW, Batches, PlannedBatches, hold_out, saving
from avg_llava_jax.data.sources import content_digest, open_sources
from avg_llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from avg_llava_jax.files import write_whole
from avg_llava_jax.models.stack import Remat
from avg_llava_jax.parallel import hosts, sharding
from avg_llava_jax.training.config import TrainConfig
from avg_llava_jax.training.optimizer import trainable

logger = logging.getLogger(__name__)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DATA = "data.json"
"""File in a workdir: digests of the training data, and of the code."""
TRAINING = ("config.py", "data", "models", "training")
CHECKED = 64
"""The number of records that are looked up in stored feedback before a run starts."""
MAY_CHANGE = (
    "checkpoint_every",
    "evaluate_every",
    "max_bad_steps",
    "data.workers",
    "data.max_skipped_share",
    "mesh",
    "rglf.execution",
    "remat",
)
"""Settings that may change when a run resumes, since they do not change what it computes."""


class Start(NamedTuple):
    """A model to train.

    params: None = those of the run's newest checkpoint.
    base: the frozen weights that the run's checkpoints refer to, see `adapters.divide`; None = they hold all.
        `params` has the other weights.
    adapters: shapes, or arrays, of the model's adapters, by path.
    """

    model: ModelConfig
    params: parameters.Params | None
    base: parameters.Params | None
    adapters: Mapping[str, Any]


def begin(config: TrainConfig, workdir: Path, mesh: jax.sharding.Mesh) -> Start:
    """Load the run's own checkpoint, else `init_from`, else initialise a model; writes config.json and tokenizer/.

    Raises:
      FileNotFoundError, ValueError: the checkpoint does not exist, or does not fit the config.
    """
    if checkpoint.steps(workdir):
        model, values = checkpoint.read_config(workdir)
        _compare(workdir, values["training"] or {}, to_dict(config))
        if not values.get("base"):
            return Start(model, None, None, {})
        base = _quantized(config, checkpoint.load_base(workdir, mesh, dtypes(config)))
        return Start(model, None, base, checkpoint.stored_adapters(workdir))
    reference = None
    if config.init_from:
        loaded = checkpoint.load(config.init_from, config.vision_tower or None, mesh, dtypes(config), config.seed)
        model = override(loaded.config, config.model)
        params = _with_fresh(config, model, loaded.params, mesh)
        tokenizer, trained = loaded.tokenizer_folder, loaded.meta["granularities_trained"]
        _same_shapes(params, parameters.abstract(model), config.init_from)
        params = _quantized(config, _with_adapters(config, model, params, mesh))
        reference = loaded.meta.get("base")
        if reference is None and (config.optimizer.lora.rank or config.quantize):
            reference = checkpoint.refer(config.init_from, config.vision_tower or None)
        if not parameters.ADAPTERS.keys().isdisjoint(trainable(config.phase, config.optimizer)):
            params, reference = adapters.folded(params), None  # what is trained in full is stored in full
        if reference and not parameters.ADAPTERS.keys().isdisjoint(config.fresh):
            raise ValueError(f"fresh={config.fresh}: encoder and language model are those of the base of this run")
    else:
        model = override(ModelConfig(), config.model)
        init = functools.partial(parameters.init, model, dtype=dtypes(config))
        shardings = sharding.shardings(mesh, parameters.abstract(model))
        params = jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
        tokenizer, trained = config.tokenizer, None
    if config.phase not in ("grounding", "rglf"):
        trained = list(granularities(config, model))
    if hosts.first():
        checkpoint.copy_tokenizer(tokenizer, workdir)
        if config.init_from:
            source = peft.base_of(config.init_from) if peft.is_adapter(config.init_from) else config.init_from
            foreign.keep_unused(source, workdir, config.vision_tower or None)
        checkpoint.save_config(workdir, model, to_dict(config), trained, reference)
    multihost_utils.sync_global_devices("config.json and tokenizer are written")
    own, base = adapters.divide(params) if reference else (params, None)
    return Start(model, own, base, adapters.of(params))


def _with_adapters(
    config: TrainConfig, model: ModelConfig, params: parameters.Params, mesh: jax.sharding.Mesh
) -> parameters.Params:
    """`params` with the adapters of `config.optimizer.lora`: those that they have, or fresh ones.

    Raises:
      ValueError: they have adapters of another rank, alpha or other targets.
    """
    lora, found = config.optimizer.lora, adapters.of(params)
    if not lora.rank:
        return params
    shapes = adapters.shapes(model, lora.chosen, lora.rank)
    if not found:
        draw = functools.partial(adapters.init, model, lora.chosen, lora.rank, lora.scale)
        at = parameters.flat(sharding.shardings(mesh, parameters.unflat(shapes)))
        fresh = jax.jit(draw, out_shardings=at)(jax.random.key(config.seed))
        return parameters.unflat(parameters.flat(params) | fresh)
    theirs, ours = ({path: leaf.shape for path, leaf in tree.items()} for tree in (found, shapes))
    if theirs != ours:
        path = min(path for path in theirs.keys() | ours.keys() if theirs.get(path) != ours.get(path))
        raise ValueError(
            f"{config.init_from} has other adapters than optimizer.lora asks for: {path} is {theirs.get(path)} there, "
            f"{ours.get(path)} is asked for; fold them in with avg-llava merge, or train them as they are"
        )
    scales = {float(x) for path in found if path.endswith("/lora_scale") for x in jax.device_get(found[path])}
    if scales != {float(jnp.float32(lora.scale))}:
        raise ValueError(
            f"{config.init_from} has adapters with alpha / rank of {sorted(scales)}, "
            f"optimizer.lora asks for {lora.scale}: give the alpha that they were trained with"
        )
    return params


def _quantized(config: TrainConfig, params: parameters.Params) -> parameters.Params:
    return quantized(params) if config.quantize else params


def abstract(config: TrainConfig, model: ModelConfig, found: Mapping[str, Any] | None = None) -> parameters.Params:
    """Shapes and dtypes of all parameters of a run. found: its adapters, None = those of `optimizer.lora`."""
    if found is None:
        found = adapters.shapes(model, config.optimizer.lora.chosen, config.optimizer.lora.rank)
    wanted = dtypes(config)
    of_adapters = {
        path: jax.ShapeDtypeStruct(leaf.shape, parameters.dtype_of(path, wanted, leaf.dtype))
        for path, leaf in found.items()
    }
    whole = parameters.unflat(parameters.flat(parameters.abstract(model, wanted)) | of_adapters)
    return jax.eval_shape(quantized, whole) if config.quantize else whole


def _with_fresh(
    config: TrainConfig, model: ModelConfig, params: parameters.Params, mesh: jax.sharding.Mesh
) -> parameters.Params:
    """`params` with the components of `config.fresh` initialised."""
    if not config.fresh:
        return params

    def draw() -> parameters.Params:
        return parameters.split(parameters.init(model, jax.random.key(config.seed), dtypes(config)), config.fresh)[0]

    shapes, _ = parameters.split(parameters.abstract(model), config.fresh)
    _, kept = parameters.split(params, config.fresh)
    return parameters.merge(jax.jit(draw, out_shardings=sharding.shardings(mesh, shapes))(), kept)


def override(model: ModelConfig, overrides: Mapping[str, Any]) -> ModelConfig:
    """A model's config with the overrides of `config.model`; None = unchanged."""

    def over(values: dict[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
        for key, value in by.items():
            if isinstance(value, Mapping):
                value = over(dict(values.get(key) or {}), value) or None
            if value is not None:
                values[key] = value
        return values

    return from_dict(over(to_dict(model), overrides))


def granularities(config: TrainConfig, model: ModelConfig) -> tuple[int, ...]:
    """The granularities that the phase trains, ascending; unset means all."""
    if not set(config.granularities) <= set(model.granularities):
        raise ValueError(f"granularities={config.granularities}: this model has {model.granularities}")
    return model.ascending(config.granularities) or model.granularities


def packed_granularities(config: TrainConfig, model: ModelConfig) -> tuple[int, ...]:
    """The granularities that batches are packed at: none in phase grounding, which runs no language model."""
    return () if config.phase == "grounding" else granularities(config, model)


def dtypes(config: TrainConfig) -> dict[str, Any]:
    """The dtype of each component's parameters: fp32 where they are trained, else the compute dtype."""
    learning = trainable(config.phase, config.optimizer)
    frozen = DTYPES[config.compute_dtype]
    names = (*parameters.COMPONENTS, *parameters.ADAPTERS.values())
    return {name: jnp.float32 if name in learning else frozen for name in names}


def check(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Check settings that would otherwise fail only later.

    Raises:
      ValueError: names the setting.
    """
    check_step(config, mesh)
    if config.checkpoint_every < 1:
        raise ValueError(f"checkpoint_every={config.checkpoint_every} must be at least 1")
    if config.evaluate_every < 0:
        raise ValueError(f"evaluate_every={config.evaluate_every} must not be negative")
    if config.max_bad_steps < 0:
        raise ValueError(f"max_bad_steps={config.max_bad_steps} must not be negative")
    unknown = sorted(set(config.fresh) - set(parameters.COMPONENTS))
    if unknown:
        raise ValueError(f"fresh names {unknown[0]!r}: the components are {', '.join(parameters.COMPONENTS)}")
    if not config.data.path:
        raise ValueError("data.path is not set: give a LLaVA JSON or JSONL, or `jersey`")
    refers = "optimizer.lora.rank" if config.optimizer.lora.rank else "quantize" if config.quantize else ""
    if refers and not config.init_from:
        raise ValueError(f"{refers} needs a trained base: give init_from")
    if not config.init_from:
        if not config.tokenizer:
            raise ValueError("init_from is not set: give a checkpoint, or a `tokenizer` to start from fresh parameters")
        for name in ("fresh", "vision_tower"):
            if getattr(config, name):
                raise ValueError(f"{name}={getattr(config, name)!r} has no effect without init_from: leave it unset")


def check_alike(config: TrainConfig, workdir: Path) -> None:
    """Check that all processes of a run have the same settings; all must call it.

    Raises:
      ValueError: names a setting that differs, and where.
    """
    first, *others = hosts.gather(leaves({"workdir": str(workdir), **to_dict(config)}))
    for process, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if (here := first.get(name)) != (there := other.get(name)):
                raise ValueError(f"{name}={there!r} on process {process}, {here!r} on process 0: start them alike")


def check_step(config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """The checks of `check` that concern the training step."""
    optimizer = config.optimizer
    for name, value in leaves(to_dict(config)).items():
        if isinstance(value, float) and not (math.isfinite(value) and (value >= 0 or not name.endswith("_rate"))):
            raise ValueError(f"{name}={value} must be finite, and a rate at least 0")
    trainable(config.phase, optimizer)
    adapters.nodes(optimizer.lora.targets)
    if config.compute_dtype not in DTYPES:
        raise ValueError(f"compute_dtype={config.compute_dtype!r}: choose {' or '.join(DTYPES)}")
    if config.quantize not in ("", "int8"):
        raise ValueError(f"quantize={config.quantize!r}: choose int8, or leave it unset")
    if config.quantize and "language" in trainable(config.phase, optimizer):
        raise ValueError(
            f"quantize={config.quantize} freezes the language model, which phase {config.phase} trains: "
            "set optimizer.lora.rank"
        )
    if config.remat not in get_args(Remat):
        raise ValueError(f"remat={config.remat!r}: choose {' or '.join(get_args(Remat))}")
    _without_effect(config)
    for name in ("steps", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = optimizer.accumulate * devices * config.data.pack
    if config.batch_size % parts:
        pack = f" times data.pack={config.data.pack}" if config.data.pack > 1 else ""
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {parts}: "
            f"optimizer.accumulate={optimizer.accumulate} times mesh data x fsdp={devices}{pack}"
        )


def _without_effect(config: TrainConfig) -> None:
    """Refuse settings that have no effect in this run.

    Raises:
      ValueError: names the setting, and why it has no effect.
    """
    phase, trained = config.phase, trainable(config.phase, config.optimizer)
    lora = config.optimizer.lora
    if lora.rank and phase not in ("connector", "multi_granularity"):
        raise ValueError(
            f"optimizer.lora.rank={lora.rank} has no effect in phase {phase}, which trains {', '.join(trained)}: "
            "leave it at 0; adapters of init_from stay as they are"
        )
    if lora.rank and "encoder_lora" not in trained and any(each.startswith("encoder") for each in lora.chosen):
        raise ValueError(
            f"optimizer.lora.targets={lora.targets} has no effect on the encoder with "
            "optimizer.encoder_learning_rate=0: leave one of them out"
        )
    for component in ("encoder", "connector"):
        name = f"{component}_learning_rate"
        rate = getattr(config.optimizer, name)
        if rate and component not in trained and f"{component}_lora" not in trained:
            raise ValueError(
                f"optimizer.{name}={rate} has no effect in phase {phase}, which trains {', '.join(trained)}: "
                "leave it unset"
            )
    if phase == "rglf" and config.remat != "none":
        raise ValueError(
            f"remat={config.remat} has no effect in phase rglf, which has no backward pass through the model: "
            "leave it at none"
        )
    if config.rglf.feedback and config.rglf.execution != "per_length":
        raise ValueError(
            f"rglf.execution={config.rglf.execution} has no effect with rglf.feedback, whose answers are measured: "
            "leave it unset, or give it to avg-llava feedback"
        )
    if config.evaluate_every and not config.data.validation:
        raise ValueError(f"evaluate_every={config.evaluate_every} has no effect without data.validation: leave it at 0")
    if phase == "grounding" and config.data.pack > 1:
        raise ValueError(
            f"data.pack={config.data.pack} has no effect in phase grounding, which reads no text: leave it at 1"
        )
    if phase == "grounding" and config.granularities:
        raise ValueError(f"granularities={config.granularities} has no effect in phase grounding: leave it unset")


def open_batches(config: TrainConfig, workdir: Path, model: ModelConfig, mesh: jax.sharding.Mesh) -> Batches:
    """This process's rows of the batches, starting with the first batch; writes data.json.

    Raises:
      FileNotFoundError, ValueError: the data cannot be opened, are not those of the run so far, differ between
        processes, or lack feedback.
    """
    planned = plan_batches(config, model, load_tokenizer(workdir / checkpoint.TOKENIZER), mesh)
    _usable(config, planned)
    _same_data(config, workdir, planned)
    if config.rglf.feedback:
        _same_questions(config, planned)
    return Batches(planned, config.data.workers)


def _usable(config: TrainConfig, planned: PlannedBatches) -> None:
    """Check that there is a record to train on.

    Raises:
      ValueError: none of the first records can be used; names the first.
    """
    if next(planned.first(SURVEY), None) is None:
        skipped = planned[0]["skipped"][0]
        raise ValueError(
            f"data.path={config.data.path}: none of the records can be used, the first for {skipped.reason}: "
            f"{skipped.detail}"
        )


def _same_data(config: TrainConfig, workdir: Path, planned: PlannedBatches) -> None:
    """Check that all processes have the same data, and that a resumed run has the data that it began with.

    Changed code is only a warning: a run may resume because a bug was fixed.

    Raises:
      ValueError: names the source that differs.
    """
    named = [(f"data.path {part.path}", part.source) for part in planned.parts]
    if config.data.validation and config.data.validation_share is None:
        held = open_sources(config.data.validation, config.data.validation_images or config.data.images)
        named += [(f"data.validation {part.path}", part.source) for part in held]
    names, now = [name for name, _ in named], [content_digest(source) for _, source in named]
    for process, theirs in enumerate(hosts.gather(now)):
        if theirs != now:
            name = next(name for name, one, other in zip(names, now, theirs, strict=True) if one != other)
            raise ValueError(f"{name} has other content on process {process}: give all processes the same data")
    path, code = workdir / DATA, reuse.code(TRAINING)
    before = json.loads(path.read_text()) if checkpoint.steps(workdir) and path.is_file() else {}
    if before and before["contents"] != now:
        name = next((name for name, one in zip(names, now, strict=True) if one not in before["contents"]), names[0])
        raise ValueError(
            f"{workdir} was trained on other data: {name} has changed since; give another --workdir, or delete {path} "
            "to resume on the data as they are now"
        )
    if before and before["code"] != code:
        logger.warning("%s resumes with other code than it began with", workdir)
    elif hosts.first():
        write_whole(path, json.dumps({"contents": now, "code": code}) + "\n")


def _same_questions(config: TrainConfig, planned: PlannedBatches) -> None:
    """Check that stored feedback covers this data; the run skips the few records that it lacks.

    Raises:
      ValueError: more than `data.max_skipped_share` of the first records have no feedback.
    """
    members = list(planned.first(min(CHECKED, WINDOW * planned.batch_size)))
    missing = [record for record, sample in members if not _is_stored(planned, sample)]
    if len(missing) > config.data.max_skipped_share * len(members):
        raise ValueError(
            f"rglf.feedback={config.rglf.feedback} has no answers to {len(missing)} of the first {len(members)} "
            f"records as they are now, {missing[0]} among them: run avg-llava feedback with this config and folder"
        )


def _is_stored(planned: PlannedBatches, sample: Sample) -> bool:
    try:
        return question_digest(sample) in planned.feedback
    except BadSample:  # its image is missing: it will be skipped for that
        return True


def plan_batches(
    config: TrainConfig, model: ModelConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh | None = None
) -> PlannedBatches:
    """The batches by number, with the rows of this process's devices of the mesh, or all rows without a mesh."""
    share = config.data.validation_share
    if tokenizer.vocab_size > model.language.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, model.language.vocab_size={model.language.vocab_size}"
        )
    parts = open_sources(config.data.path, config.data.images, config.data.max_pixels)
    return PlannedBatches(
        parts=parts,
        tokenizer=tokenizer,
        config=model,
        granularities=packed_granularities(config, model),
        batch_size=config.batch_size,
        seed=config.seed,
        shapes=config.data.shapes,
        saves=saving(config.steps),
        words=config.phase == "grounding",
        rows=None if mesh is None else sharding.process_rows(mesh, config.rows),
        pack=config.data.pack,
        feedback=read_feedback(config.rglf.feedback, model.granularities) if config.rglf.feedback else None,
        kept=None if share is None else tuple(hold_out(len(part.source), share)[0] for part in parts),
    )


def plan_validation(config: TrainConfig, planned: PlannedBatches) -> PlannedBatches | None:
    """`data.validation` as one epoch of batches in the shapes of the training batches; None without validation.

    They have no stored feedback: the frozen model answers them once, see `validation`.
    """
    share = config.data.validation_share
    if share is not None:
        held = tuple(hold_out(len(part.source), share)[1] for part in planned.parts)
        return dataclasses.replace(planned, kept=held, single_epoch=True, feedback=None, shapes_of=planned)
    if not config.data.validation:
        return None
    images = config.data.validation_images or config.data.images
    parts = open_sources(config.data.validation, images, config.data.max_pixels)
    return dataclasses.replace(planned, parts=parts, kept=None, single_epoch=True, feedback=None, shapes_of=planned)


def _same_shapes(params: parameters.Params, wanted: parameters.Params, where: str) -> None:
    theirs, ours = parameters.flat(params), parameters.flat(wanted)
    theirs = {path: leaf for path, leaf in theirs.items() if not adapters.is_leaf(path)}
    for path in sorted(ours.keys() | theirs.keys()):
        there, here = (tree[path].shape if path in tree else None for tree in (theirs, ours))
        if there != here:
            raise ValueError(f"config.model does not fit {where}: {path} is {there} there, {here} is asked for")


def _compare(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare a resumed run's settings with the earlier ones: another phase is an error, other changes warn."""
    if before.get("phase") != now["phase"]:
        raise ValueError(f"{workdir} holds phase {before.get('phase')}: give phase {now['phase']} a workdir of its own")
    before, now = leaves(before), leaves(now)
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and not name.startswith(MAY_CHANGE):
            logger.warning("%s resumes with %s=%s, it began with %s", workdir, name, now[name], before[name])


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"data.path": ...}, with tuples as JSON lists."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = json.loads(json.dumps(value))
    return found
