"""The training step: its computation, and the sharding of all its inputs and outputs.

It is built from a config and shapes alone, so that the loop can run it and a plan can compile it ahead of time for
devices that are not present.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from avg_llava_jax import parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import phases, setup
from avg_llava_jax.training.config import TrainConfig
from avg_llava_jax.training.optimizer import gradients, make_optimizer, rate_shape, trainable


class Step:
    """One optimizer step as compiled functions of sharded arrays.

    params, state: ShapeDtypeStructs, with shardings, of all parameters and of the optimizer's state. Trained parameters
        are fp32 and cast in each step; frozen ones are held in the compute dtype.
    rows: the sharding of a batch's arrays.
    init: trainable parameters -> state.
    update: (trainable parameters, state, frozen parameters, batch, step int32 ()) -> updated trainable parameters,
        updated state, and metrics; the first two arguments are donated.
    evaluate: (trainable parameters, frozen parameters, batch) -> the loss and its metrics without gradient and without
        dropout, each times its weight, and the weight.
    """

    def __init__(self, config: TrainConfig, model: ModelConfig, mesh: Mesh, adapters: Mapping[str, Any] | None = None):
        """adapters: arrays or shapes by path, None = those that the config trains."""
        settings = config.optimizer
        self._names = trainable(config.phase, settings)
        optimizer = make_optimizer(settings, config.steps)
        trained_at = setup.granularities(config, model)
        loss = phases.make_loss(config.phase, model, trained_at, config.rglf, config.remat, settings.lora.dropout)
        dtype, seed = setup.DTYPES[config.compute_dtype], config.seed

        def update(trained: Any, state: Any, frozen: Any, batch: Any, step: jax.Array) -> tuple[Any, Any, Any]:
            def of_trained(trained: Any, batch: Any, keys: jax.Array) -> Any:
                trained = sharding.constrain(jax.tree.map(lambda x: x.astype(dtype), trained))
                return loss(parameters.merge(trained, frozen), batch, keys)

            batch = phases.with_whole(config.phase, trained_at, batch)
            rng = jax.random.fold_in(jax.random.key(seed), step)
            grads, value, metrics = gradients(of_trained, trained, batch, rng, settings.accumulate)
            rate = settings.learning_rate * rate_shape(settings, config.steps)(step)
            metrics |= {"loss": value, "grad_norm": optax.global_norm(grads), "learning_rate": rate}
            updates, state = optimizer.update(grads, state, trained, loss=value)
            return optax.apply_updates(trained, updates), state, metrics

        whole = setup.abstract(config, model, adapters)
        self.params = sharding.placed(whole, sharding.shardings(mesh, whole))
        trained, frozen = self.split(self.params)
        state = jax.eval_shape(optimizer.init, trained)
        self.state = sharding.placed(state, sharding.state_shardings(mesh, whole, state))
        self.rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        of_trained, of_frozen, of_state = (
            jax.tree.map(lambda x: x.sharding, tree) for tree in (trained, frozen, self.state)
        )

        def evaluate(trained: Any, frozen: Any, batch: Any) -> tuple[Any, Any]:
            trained = sharding.constrain(jax.tree.map(lambda x: x.astype(dtype), trained))
            value, (weight, metrics) = loss(parameters.merge(trained, frozen), batch, None)
            return jax.tree.map(lambda x: weight * x, metrics | {"loss": value}), weight

        self.init = jax.jit(optimizer.init, out_shardings=of_state)
        self.update = jax.jit(
            update,
            in_shardings=(of_trained, of_state, of_frozen, self.rows, everywhere),
            out_shardings=(of_trained, of_state, everywhere),
            donate_argnums=(0, 1),
        )
        self.evaluate = jax.jit(evaluate, in_shardings=(of_trained, of_frozen, self.rows), out_shardings=everywhere)

    def split(self, params: parameters.Params) -> tuple[parameters.Params, parameters.Params]:
        """The parameters that this phase trains, and the frozen ones."""
        return parameters.split(params, self._names)
