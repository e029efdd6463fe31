"""Other data through the commands alone: python -m launch.bench.other_data --workdir=DIR

Writes the two of `data_sets` as LLaVA JSON and runs, for each, the commands that a user runs on own data:

    train (phase one, configs/own_data.py)  feedback  train (phase two)  evaluate  calibrate  tradeoff

DIR/NAME/data holds the data, DIR/NAME/{tuned,feedback,router,held_out,test} what the commands write. What is there
already is kept, so an interrupted run resumes. Each command prints its own table.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

from absl import flags

from avg_llava_jax.commands import cli
from launch.bench.data_sets import SOURCES, write

WORKDIR = flags.DEFINE_string("workdir", None, "Where data and results go.")
ONLY = flags.DEFINE_list("only", ["easy-vqa", "digits"], "Which data sets.")
STEPS = flags.DEFINE_integer("steps", 500, "Steps of each phase.", lower_bound=1)
PICTURES = flags.DEFINE_integer("pictures", 2000, "Pictures to train on.", lower_bound=1)
HELD_OUT = flags.DEFINE_integer("held_out", 500, "Pictures to calibrate on, and as many to test on.", lower_bound=1)


def run(command: str, *arguments: str) -> None:
    """Run `avg-llava command`, and show it."""
    print(f"avg-llava {command} {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", f"launch.{command}", *arguments], check=False)
    if done.returncode:
        raise RuntimeError(f"avg-llava {command} failed with code {done.returncode}")


def measure(name: str, folder: pathlib.Path) -> None:
    """All commands for one data set."""
    data = folder / "data"
    write(name, data, PICTURES.value, HELD_OUT.value)
    own = [
        "--config=configs/own_data.py",
        f"--config.steps={STEPS.value}",
        f"--config.data.images={data}",
        "--config.data.workers=0",
    ]
    run("train", *own, f"--config.data.path={data / 'train.json'}", f"--workdir={folder / 'tuned'}")
    second = [*own, f"--config.data.path={data / 'router.json'}", "--config.phase=rglf"]
    second += [f"--config.init_from={folder / 'tuned'}", "--config.fresh=('router',)"]
    run("feedback", *second, f"--output={folder / 'feedback'}")
    run("train", *second, f"--config.rglf.feedback={folder / 'feedback'}", f"--workdir={folder / 'router'}")
    for command, split in (("evaluate", "test"), ("calibrate", "held_out"), ("tradeoff", "test")):
        asked = [f"--data={data / split}.json", f"--images={data}", f"--workdir={folder / split}"]
        run(command, f"--checkpoint={folder / 'router'}", *asked)


def main() -> None:
    for name in ONLY.value:
        if name not in SOURCES:
            raise ValueError(f"--only={name}: choose {', '.join(SOURCES)}")
        measure(name, pathlib.Path(WORKDIR.value) / name)


if __name__ == "__main__":
    cli.run(main, required=["workdir"], model_flags=())
