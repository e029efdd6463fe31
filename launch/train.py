"""Train a phase, or go on with it: python -m launch.train --config=configs/jersey.py --workdir=DIR

Every field of the config can be overridden: --config.optimizer.learning_rate=1e-4

Several processes, on one machine or many, become one run by --coordinator; they share the workdir. Exit codes:
0 done; 2 what was given is wrong, so do not start it again; any other, start it again and it goes on (143 after
SIGTERM, with a checkpoint; 75 where another process was lost).
"""

from absl import flags
from ml_collections import config_flags

from launch import cli, processes

CONFIG = config_flags.DEFINE_config_file("config", None, "The config, configs/X.py.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoint folder of this run; an existing one is gone on with.")
flags.adopt_module_key_flags(processes)


def main() -> None:
    processes.join()
    from avg_llava_jax.training.loop import train

    train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, required=["config", "workdir"], model_flags=())
