"""Ask the frozen model once, train routers many times: python -m launch.feedback --config=X --output=DIR

Then, as often as you like: python -m launch.train --config=X --config.rglf.feedback=DIR --workdir=...
Killed, the same command resumes. What DIR holds for these samples and this model is not measured again.
"""

from absl import flags
from ml_collections import config_flags

from launch import cli

CONFIG = config_flags.DEFINE_config_file("config", None, "A config of phase rglf, configs/X.py.", lock_config=True)
OUTPUT = flags.DEFINE_string("output", None, "Folder of the feedback.")
FEATURES = flags.DEFINE_bool(
    "features", True, "Keep the visual features too: a router then trains without the encoder."
)


def main() -> None:
    from avg_llava_jax.parallel import hosts
    from avg_llava_jax.training import feedback
    from avg_llava_jax.training.config import read

    found = feedback.run(read(CONFIG.value), OUTPUT.value, FEATURES.value)
    if hosts.first():
        print(f"{OUTPUT.value}: {found}; train from it with --config.rglf.feedback={OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main, required=["config", "output"], model_flags=())
