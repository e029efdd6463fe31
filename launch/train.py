"""Train a phase, or go on with it: python -m launch.train --config=configs/jersey.py --workdir=DIR

Every field of the config can be overridden: --config.optimizer.learning_rate=1e-4
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from avg_llava_jax.training.loop import train

CONFIG = config_flags.DEFINE_config_file("config", None, "The config, configs/X.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoint folder of this run; an existing one is gone on with.")

TRACEBACK = flags.DEFINE_bool("traceback", False, "Where an error happened, not only what it is.")


def main(_: list[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports each file as information
    try:
        train(CONFIG.value, WORKDIR.value)
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        if TRACEBACK.value:
            raise
        sys.exit(f"error: {error} (--traceback shows where)")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
