"""Train a phase, or resume a run.

    avg-llava train --config=configs/jersey.py --workdir=DIR

Any field of the config can be overridden: --config.optimizer.learning_rate=1e-4

With --coordinator several processes, on one machine or many, form one run and share the workdir. Exit codes: 0 = done;
2 = the input is wrong, do not restart; any other = restart, and the run resumes (143 after SIGTERM, with a checkpoint;
75 after another process was lost).
"""

from absl import flags

from avg_llava_jax.commands import cli, processes

CONFIG = cli.define_config("The config, configs/X.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoint folder of the run; an existing run resumes.")
flags.adopt_module_key_flags(processes)


def main() -> None:
    processes.join()
    from avg_llava_jax.training.loop import train

    train(CONFIG.value, WORKDIR.value)


def command() -> None:
    cli.run(main, required=["config", "workdir"], model_flags=())
