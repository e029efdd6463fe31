"""AdamW with a learning rate per component, and gradients over micro-batches."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from avg_llava_jax import parameters
from avg_llava_jax.models import one_cpu
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training.config import OptimizerConfig


def trainable(phase: str, config: OptimizerConfig) -> tuple[str, ...]:
    """The components that a phase trains."""
    if phase not in parameters.TRAINED_IN:
        raise ValueError(f"phase {phase!r} is not known; choose from {', '.join(parameters.TRAINED_IN)}")
    names = parameters.TRAINED_IN[phase]
    if config.lora.rank:
        targets = {target.split("/")[0] for target in config.lora.chosen}
        names = tuple(name for name in names if name not in parameters.ADAPTERS)
        names += tuple(adapter for base, adapter in parameters.ADAPTERS.items() if base in targets)
    may_freeze = ("encoder", "connector", "encoder_lora")
    names = tuple(name for name in names if name not in may_freeze or config.rate(name) != 0)
    if not names:
        raise ValueError(f"phase {phase} would train nothing: optimizer.connector_learning_rate is 0")
    return names


def rate_shape(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Step -> share of the peak learning rate, in [0, 1]."""
    warmup = round(config.warmup * steps)
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else 1.0, 1.0, warmup, max(steps, warmup + 1))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clip, AdamW, and the learning rate of each parameter's component.

    Where a gradient or the optional `loss` of `update` is not finite, the step changes neither parameters nor moments.
    The schedule still advances, so that the learning rate of step n depends only on n.
    """
    shape = rate_shape(config, steps)
    adam = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
    )

    def init(params: parameters.Params) -> tuple[Any, ...]:
        return *adam.init(params), optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(grads: Any, state: tuple[Any, ...], params: Any, *, loss: Any = 0.0) -> tuple[Any, tuple[Any, ...]]:
        *before, schedule = state
        share = shape(schedule.count)
        updates, after = adam.update(grads, tuple(before), params)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.global_norm(grads))
        rates = jax.tree.map(config.rate, parameters.components(updates))
        updates = jax.tree.map(lambda update, rate: jnp.where(finite, -share * rate * update, 0.0), updates, rates)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, tuple(before))
        return updates, (*after, optax.ScaleByScheduleState(optax.safe_increment(schedule.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def _decayed(params: parameters.Params) -> parameters.Params:
    """Which parameters are matrices, not counting the layers axis."""
    rows = parameters.describe(params)
    return parameters.unflat({path: len(row.axes) - row.layered >= 2 for path, row in rows.items()})


Aux = tuple[jax.Array, dict[str, jax.Array]]
Loss = Callable[[parameters.Params, Mapping[str, Any], jax.Array | None], tuple[jax.Array, Aux]]
"""(params, batch, keys) -> mean loss, (weight, metrics). weight: how many items loss and metrics average over.

keys (B,): one per sample, for dropout; None = no dropout.
"""


def gradients(
    loss: Loss, params: parameters.Params, batch: Mapping[str, Any], rng: jax.Array, accumulate: int
) -> tuple[parameters.Params, jax.Array, dict[str, jax.Array]]:
    """Gradients, loss and metrics of a batch, split by rows into `accumulate` micro-batches.

    Micro-batches are averaged by weight, so that the result does not depend on how answer tokens are distributed.
    Row i*k + j of the batch is row i of micro-batch j of k: each device splits its own rows.
    Replicas of the model (mesh axis `data`) accumulate locally and are summed once at the end.
    Row r uses key r of `rng`, so its dropout depends neither on the split nor on the device.
    One CPU device may take more micro-batches, see `one_cpu`.
    """
    rows = len(jax.tree.leaves(batch)[0])
    keys = jax.random.split(rng, rows)
    accumulate = max(accumulate, one_cpu.part_count(rows, one_cpu.TRAINING_ROWS))

    def value_and_grad(params: parameters.Params, batch: Any, keys: jax.Array) -> Any:
        found, grads = jax.value_and_grad(loss, has_aux=True)(params, batch, keys)
        return found, sharding.constrain(grads)

    if accumulate == 1:
        (value, (_, metrics)), grads = value_and_grad(params, batch, keys)
        return grads, value, metrics

    def weighted(params: parameters.Params, batch: Any, keys: jax.Array) -> Any:
        (value, (weight, metrics)), grads = value_and_grad(params, batch, keys)
        return jax.tree.map(lambda x: weight * x, (grads, value, metrics, jnp.ones(())))

    def summed(params: parameters.Params, batch: Any, keys: jax.Array) -> Any:
        # An array may be empty, as the text of grounding is: its rows are not to be inferred from its size.
        parts = jax.tree.map(
            lambda x: x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), (batch, keys)
        )
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(weighted, params, *jax.tree.map(lambda x: x[0], parts)),
        )
        return jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, weighted(params, *part)), None), zeros, parts
        )[0]

    def summed_by_copies(params: parameters.Params, batch: Any, keys: jax.Array) -> Any:
        return jax.lax.psum(summed(params, batch, keys), "data")

    if jax.sharding.get_abstract_mesh().shape.get("data", 1) > 1:
        everywhere, rows = PartitionSpec(), PartitionSpec("data")
        places = {"in_specs": (everywhere, rows, rows), "out_specs": everywhere, "axis_names": {"data"}}
        *sums, weight = jax.shard_map(summed_by_copies, **places, check_vma=False)(params, batch, keys)
    else:
        *sums, weight = summed(params, batch, keys)
    return jax.tree.map(lambda x: x / jnp.maximum(weight, 1.0), tuple(sums))
