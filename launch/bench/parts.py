"""A training step and its parts, each as a compiled function that can be timed separately.

Components that the phase trains run forward and backward, the others only forward:

    encode      vision encoder and connector          LMM g       language model at granularity g, answer's NLL
    pool        scaler                                router      router and RGLF loss (phase rglf)
    optimizer   gradients to fp32, clip, AdamW, and the copy in the compute dtype that the next step reads

No part includes text embeddings or the summing of gradients.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from avg_llava_jax import parameters
from avg_llava_jax.config import LanguageConfig, ModelConfig, VisionConfig, from_dict
from avg_llava_jax.configs import jersey
from avg_llava_jax.data.conversation import IGNORE, IMAGE, Tokens
from avg_llava_jax.data.images import image_ref
from avg_llava_jax.data.packing import Sample, Shape, load_tiles, make_sample
from avg_llava_jax.data.pipeline import collate_rows
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.scaler import scale
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import losses, rglf, setup
from avg_llava_jax.training.config import TrainConfig
from avg_llava_jax.training.optimizer import make_optimizer
from avg_llava_jax.training.step import Step

Run = Callable[[], Any]
"""Does the thing once and returns what it computes, before it is computed."""


WARM_UP = 2  # runs before the clock starts: the first compiles


def model_of(shape: str, layers: int | None = None) -> ModelConfig:
    """jersey: as the project ships it. mid: CLIP-B at 336 pixels and 1024 x 8. 7b: AVG-LLaVA."""
    mid = ModelConfig(
        vision=VisionConfig(width=768, layers=12, heads=12, mlp_width=3072),
        language=LanguageConfig(width=1024, layers=8, heads=16, kv_heads=16, head_dim=64, mlp_width=2816),
    )
    model = {"jersey": from_dict(jersey.model().to_dict()), "mid": mid, "7b": ModelConfig()}[shape]
    language = dataclasses.replace(model.language, layers=layers or model.language.layers)
    return dataclasses.replace(model, language=language)


def seconds(runs: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each until its result is ready, timed alternately, so that other load affects all alike."""

    def once(run: Run) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - begin

    for run in runs.values():
        for _ in range(WARM_UP):
            once(run)
    took = [{name: once(run) for name, run in runs.items()} for _ in range(repeats)]
    return {name: [each[name] for each in took] for name in runs}


def random_batch(config: ModelConfig, rows: int, shape: Shape) -> dict[str, Any]:
    """Random samples that fill a shape: each a picture with a mosaic of `shape.tiles` tiles, and text that ends with an
    answer. Only the positions that a shape reserves for newlines are padding.

    Raises:
      ValueError: the model has no mosaic with this number of tiles.
    """
    draw, tile = np.random.default_rng(0), config.vision.image_size**2
    sizes = [(width, height) for width, height in config.pinpoints if 1 + width * height // tile == shape.tiles]
    if not sizes:
        raise ValueError(f"no mosaic of this model makes {shape.tiles} tiles with the overview: {config.pinpoints}")
    width, height = sizes[0]

    def sample(number: int) -> Sample:
        picture = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        ids = draw.integers(0, config.language.vocab_size, shape.text).tolist()
        labels = [IGNORE] * (shape.text - shape.answer) + ids[shape.text - shape.answer :]
        return make_sample(f"random {number}", Tokens([IMAGE, *ids], [IGNORE, *labels]), [image_ref(picture)])

    samples = [sample(number) for number in range(rows)]
    return collate_rows(samples, [load_tiles(each, config) for each in samples], shape, config, config.granularities)


class Whole:
    """The training step, run repeatedly on one batch, in each of the executions to compare.

    The executions share parameters and state, which each run updates; the buffers are donated, as in training.
    """

    def __init__(self, steps: Mapping[str, Step], params: parameters.Params, batch: Any):
        any_step = next(iter(steps.values()))
        self._steps, self._batch = steps, batch
        self.trained, self.frozen = any_step.split(params)
        self.state = any_step.init(self.trained)

    def run(self, name: str) -> Run:
        def once() -> Any:
            step = self._steps[name]
            self.trained, self.state, metrics = step.update(
                self.trained, self.state, self.frozen, self._batch, jnp.zeros((), jnp.int32)
            )
            return self.trained, self.state, metrics

        return once


class Part(NamedTuple):
    """One part of a step: its name, and a function that runs it."""

    name: str
    run: Run


def parts(config: TrainConfig, model: ModelConfig, whole: Whole, batch: Any) -> Iterator[Part]:
    """Yield the parts of a step on the current mesh; run each before requesting the next.

    Phase `rglf` adds two entries that are not parts: all granularities as one program, `per_length` and `vmap`.
    """
    dtype = setup.DTYPES[config.compute_dtype]
    cast = jax.jit(lambda trained: sharding.constrain(jax.tree.map(lambda x: x.astype(dtype), trained)))
    yield from _of_the_model(config, model, parameters.merge(cast(whole.trained), whole.frozen), batch)
    yield Part("optimizer", _optimizer(config, whole))


def _of_the_model(config: TrainConfig, model: ModelConfig, params: parameters.Params, batch: Any) -> Iterator[Part]:
    """The parts of the model, without the optimizer; params in the compute dtype."""
    learns, remat = config.phase != "rglf", config.remat

    def timed(function: Callable[..., Any], *arguments: Any, fixed: Any = None) -> Run:
        """function(*arguments, fixed), with the gradients of its arguments where the phase trains through it."""

        def both(arguments: Any, fixed: Any) -> Any:
            out, back = jax.vjp(lambda *arguments: function(*arguments, fixed), *arguments)
            return out, [sharding.constrain(g) if isinstance(g, dict) else g for g in back(out)]

        compiled = jax.jit(both if learns else lambda arguments, fixed: function(*arguments, fixed))
        return lambda: compiled(arguments, fixed)

    sees = {name: params[name] for name in ("encoder", "connector")}
    speaks = {name: params[name] for name in ("language", "image_newline")}
    encoded = timed(lambda p, pixels: avg_llava.encode_images(model, p, pixels, remat), sees, fixed=batch["pixels"])
    yield Part("encode", encoded)

    features = jax.jit(lambda p, pixels: avg_llava.encode_images(model, p, pixels))(sees, batch["pixels"])
    yield Part("pool", timed(lambda features, _: scale(model, features), features))

    pyramid = jax.jit(lambda features: scale(model, features))(features)
    text = jax.jit(lambda p, ids: avg_llava.embed(model, p, ids))(speaks, batch["text"])
    del features
    for granularity in setup.granularities(config, model):
        fixed = [batch["index"][granularity]], [batch["target_at"][granularity]], batch["targets"]

        def answer(p: Any, pyramid: jax.Array, text: jax.Array, fixed: Any) -> jax.Array:
            return losses.answer_nll(model, p, pyramid, text, *fixed, remat)[0][0]

        yield Part(f"LMM {granularity}", timed(answer, speaks, pyramid, text, fixed=fixed))

    if not learns:
        for execution in ("per_length", "vmap"):
            measured = jax.jit(
                lambda p, pyramid, text, batch, execution=execution: rglf.feedback(
                    model, p, pyramid, text, batch, execution
                )
            )
            yield Part(execution, lambda measured=measured: measured(speaks, pyramid, text, batch))
        yield Part("router", _router(config, model, params["router"], pyramid, text, batch))


def _router(
    config: TrainConfig, model: ModelConfig, router: Any, pyramid: jax.Array, text: jax.Array, batch: Any
) -> Run:
    """Router and RGLF loss, forward and backward, given the frozen model's feedback."""
    weights = {name: getattr(config.rglf, name) for name in ("margin", "rank_weight", "ce_weight", "tie_nats")}

    @jax.jit
    def both(router: Any, pyramid: jax.Array, text: jax.Array, batch: Any) -> Any:
        keys = jax.random.split(jax.random.key(0), len(text))
        nll = jnp.broadcast_to(jnp.linspace(1.0, 2.0, len(model.granularities)), (len(text), len(model.granularities)))

        def loss(router: Any) -> jax.Array:
            logits = avg_llava.route(model, {"router": router}, pyramid, text, batch, keys).logits[:, 0]
            return rglf.rglf_loss(logits, nll, jnp.ones(len(text), bool), **weights)[0]

        return jax.value_and_grad(loss)(router)

    return lambda: both(router, pyramid, text, batch)


def _optimizer(config: TrainConfig, whole: Whole) -> Run:
    """AdamW on the run's own parameters and state, which it updates; both are donated."""
    optimizer, dtype = make_optimizer(config.optimizer, config.steps), setup.DTYPES[config.compute_dtype]
    small = jax.jit(lambda trained: sharding.constrain(jax.tree.map(lambda x: x.astype(dtype) * 1e-3, trained)))
    grads = small(whole.trained)

    def update(trained: Any, state: Any, grads: Any) -> Any:
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        updates, state = optimizer.update(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
        return trained, state, sharding.constrain(jax.tree.map(lambda x: x.astype(dtype), trained))

    places = jax.tree.map(lambda x: x.sharding, (whole.trained, whole.state))
    compiled = jax.jit(update, donate_argnums=(0, 1), out_shardings=(*places, None))

    def once() -> Any:
        whole.trained, whole.state, copy = compiled(whole.trained, whole.state, grads)
        return whole.trained, whole.state, copy

    return once
