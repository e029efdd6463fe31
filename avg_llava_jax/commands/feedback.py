"""Store the frozen model's answers once, to train routers from them many times.

    avg-llava feedback --config=X --output=DIR

Then, as often as you like: avg-llava train --config=X --config.rglf.feedback=DIR --workdir=...
A killed run resumes where it was.
"""

from absl import flags

from avg_llava_jax.commands import cli

CONFIG = cli.define_config("A config of phase rglf, configs/X.py.")
OUTPUT = flags.DEFINE_string("output", None, "Folder of the feedback.")
FEATURES = flags.DEFINE_bool(
    "features", True, "Keep the visual features too: a router then trains without the encoder."
)


def main() -> None:
    from avg_llava_jax import checkpoint
    from avg_llava_jax.data.tokenizer import load_tokenizer
    from avg_llava_jax.parallel import hosts, sharding
    from avg_llava_jax.training import feedback, setup

    config = CONFIG.value
    if config.phase != "rglf":
        raise ValueError(f"phase={config.phase}: feedback is for phase rglf")
    mesh = sharding.make_mesh(config.mesh)
    setup.check(config, mesh)
    dtype = setup.DTYPES[config.compute_dtype]
    loaded = checkpoint.load(config.init_from, config.vision_tower or None, mesh, dtype)
    model = setup.override(loaded.config, config.model)
    batches = setup.plan_batches(config, model, load_tokenizer(loaded.tokenizer_folder), mesh)
    feedback.measure(model, loaded.params, batches, config.steps, OUTPUT.value, mesh, FEATURES.value)
    if hosts.first():
        print(f"{OUTPUT.value}: train from it with --config.rglf.feedback={OUTPUT.value}")


def command() -> None:
    cli.run(main, required=["config", "output"], model_flags=())
