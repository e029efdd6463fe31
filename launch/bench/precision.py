"""Gradients in bfloat16 against float32, of the shipped model: python -m launch.bench.precision

For each phase, on one batch of real samples: the relative error |g16 - g32| / |g32| of the gradient of each parameter,
over all its values. g32 is computed in float32 with the same parameters, rounded to bfloat16, so that what differs is
activations, products and sums. Prints a table of the parameters that each phase trains, the worst first. Key biases are
left out: a softmax does not change with them, so that their gradient is zero but for rounding.
"""

from typing import Any

from absl import flags

from avg_llava_jax.commands import cli

PHASES = ("grounding", "multi_granularity", "rglf")
PHASE = flags.DEFINE_multi_enum("phase", PHASES, PHASES, "Give it once for each phase; default: all.")
ROWS = flags.DEFINE_integer("batch_size", 16, "Samples.", lower_bound=1)
LEAST = flags.DEFINE_float("least", 0.0, "Leave out parameters with a smaller error.")


def errors(phase: str, rows: int) -> dict[str, float]:
    """The relative errors of the gradients that a phase computes, by the parameter's path, and of its `loss`."""
    import jax
    import jax.numpy as jnp

    from avg_llava_jax import parameters
    from avg_llava_jax.configs import jersey
    from avg_llava_jax.inference.api import AvgLlava
    from avg_llava_jax.training import config as training_config
    from avg_llava_jax.training import phases, setup
    from avg_llava_jax.training.optimizer import trainable

    model = AvgLlava.load()
    settings = jersey.get_config("grounding" if phase == "grounding" else "full")
    settings.update({"phase": phase, "batch_size": rows})
    config = training_config.read(settings)
    granularities = setup.granularities(config, model.config)
    loss = phases.make_loss(phase, model.config, granularities, config.rglf, "none")
    batch = setup.plan_batches(config, model.config, model.tokenizer)[0]
    batch = {name: batch[name] for name in batch if name not in ("records", "skipped")}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), model.params)
    trained, frozen = parameters.split(params, trainable(phase, config.optimizer))

    @jax.jit
    def gradient(trained: Any, frozen: Any, batch: Any) -> Any:
        return jax.value_and_grad(lambda trained: loss(parameters.merge(trained, frozen), batch, None)[0])(trained)

    def of(dtype: Any) -> dict[str, Any]:
        value, grads = gradient(*jax.tree.map(lambda leaf: leaf.astype(dtype), (trained, frozen)), batch)
        return {"loss": value} | {path: leaf.astype(jnp.float32) for path, leaf in parameters.flat(grads).items()}

    with jax.default_matmul_precision("highest"):
        exact, rounded = of(jnp.float32), of(jnp.bfloat16)
    sizes = {path: float(jnp.linalg.norm(leaf)) for path, leaf in exact.items() if not path.endswith("/k/bias")}
    return {path: float(jnp.linalg.norm(rounded[path] - exact[path])) / size for path, size in sizes.items() if size}


def main() -> None:
    for phase in PHASE.value:
        found = errors(phase, ROWS.value)
        print(f"| {phase} | relative error |\n|---|---:|")
        for path, error in sorted(found.items(), key=lambda each: -each[1]):
            if error >= LEAST.value:
                print(f"| {path} | {error:.2%} |")
        print(flush=True)


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
