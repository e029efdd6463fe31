"""Train a router live on the shipped model, test it, and draw what it chooses.

    avg-llava quickstart --workdir=DIR

The shipped model has learnt every granularity; its router has not learnt anything. Here it does, from nothing but
how well the frozen model answers at each granularity, and is then tested on scenes that nobody was trained on.
"""

import pathlib
import time

from absl import flags

from avg_llava_jax.commands import cli

WORKDIR = flags.DEFINE_string("workdir", "workdirs/quickstart", "Where checkpoints, report.json and plots go.")
STEPS = flags.DEFINE_integer("steps", None, "Router training steps; default: as in configs/jersey.py:router.")
PICTURES = flags.DEFINE_integer("pictures", None, "Pictures the router learns from; default: likewise.")
QUESTIONS = flags.DEFINE_integer("questions", 1008, "Test questions.", lower_bound=6)


def main() -> None:
    from avg_llava_jax.eval import quickstart

    begin = time.perf_counter()
    config = quickstart.router_config(cli.CHECKPOINT.value, STEPS.value, PICTURES.value)
    quickstart.run(pathlib.Path(WORKDIR.value), config, QUESTIONS.value)
    print(f"{WORKDIR.value}/report.json, after {time.perf_counter() - begin:.0f} s")


def command() -> None:
    cli.run(main, required=["workdir"], model_flags=["checkpoint"])
