"""Store the frozen model's feedback once, to train any number of routers from it.

    avg-llava feedback --config=X --output=DIR

Then train: avg-llava train --config=X --config.rglf.feedback=DIR --workdir=...
After an interruption, the same command resumes. Feedback that DIR holds for these samples and this model is reused.
"""

from absl import flags

from avg_llava_jax.commands import cli

CONFIG = cli.define_config("A config of phase rglf, configs/X.py.")
OUTPUT = flags.DEFINE_string("output", None, "The folder of the feedback.")
FEATURES = flags.DEFINE_bool(
    "features", True, "Store the visual features too; a router then trains without the encoder."
)


def main() -> None:
    from avg_llava_jax.parallel import hosts
    from avg_llava_jax.training import feedback
    from avg_llava_jax.training.config import read

    found = feedback.run(read(CONFIG.value), OUTPUT.value, FEATURES.value)
    if hosts.first():
        print(f"{OUTPUT.value}: {found}; train from it with --config.rglf.feedback={OUTPUT.value}")


def command() -> None:
    cli.run(main, required=["config", "output"], model_flags=())
