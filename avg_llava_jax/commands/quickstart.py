"""Train a router on the shipped model, test it, and plot what it chooses.

    avg-llava quickstart --workdir=DIR

The shipped model was trained at every granularity, its router not at all. The quickstart trains the router from
nothing but how well the frozen model answers at each granularity, and tests it on held-out scenes.
"""

import pathlib
import time

from absl import flags

from avg_llava_jax.commands import cli

WORKDIR = flags.DEFINE_string("workdir", "workdirs/quickstart", "The folder of checkpoints, report.json and plots.")
STEPS = flags.DEFINE_integer("steps", None, "Router training steps; default: as in configs/jersey.py:router.")
PICTURES = flags.DEFINE_integer("pictures", None, "Pictures the router trains on; default: as in the config.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the routers' parameters, dropout and order of samples.", lower_bound=0)
QUESTIONS = flags.DEFINE_integer("questions", 1008, "Number of test questions.", lower_bound=6)


def main() -> None:
    from avg_llava_jax.eval import quickstart

    begin = time.perf_counter()
    config = quickstart.router_config(cli.CHECKPOINT.value, STEPS.value, PICTURES.value)
    config.seed = SEED.value
    quickstart.run(pathlib.Path(WORKDIR.value), config, QUESTIONS.value)
    print(f"{WORKDIR.value}/report.json, after {time.perf_counter() - begin:.0f} s")


def command() -> None:
    cli.run(main, required=["workdir"], model_flags=["checkpoint"])
