"""Two checkouts of this project in turn, on what a new user waits for: a table of both, and their ratios.

    python -m launch.bench.side_by_side --old=DIR --runs=3 --figures=table.json
    python -m launch.bench.side_by_side --old=DIR --rows=answer,serve

--old and --new (default: this checkout) are folders; each runs as it is, by the Python of this command. Old and new
alternate, each in a process of its own; the median counts. The first run of a pair has an empty cache folder, the
second finds what the first left there. Nothing else should run on the machine.

    quickstart            launch.quickstart from nothing, and its accuracies; --router_seeds=N: the new one with N
    answer                launch.answer about one picture, the first time and the second
    serve                 launch.serve, from its start until it listens, likewise
    own_data              configs/own_data.py on 4000 pictures with ten questions each: until the first step is done,
                          and a step, the median of --data_steps
    multi_granularity     launch.bench.train at --step_shapes, with as many threads as --cores says: PyTorch's seconds a
    rglf                  sample ("encode once") in ours
"""

import importlib.util
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli
from avg_llava_jax.data.jersey import Jersey
from avg_llava_jax.files import write_json

ROWS = ("quickstart", "answer", "serve", "own_data", "multi_granularity", "rglf")
OLD = flags.DEFINE_string("old", None, "The checkout to compare with.")
NEW = flags.DEFINE_string("new", str(pathlib.Path(__file__).parents[2]), "The checkout to measure.")
CHOSEN = flags.DEFINE_list("rows", list(ROWS), "The rows to measure.")
RUNS = flags.DEFINE_integer("runs", 3, "Runs of each checkout; the median counts.", lower_bound=1)
ROUTER_SEEDS = flags.DEFINE_integer("router_seeds", 1, "Seeds of the quickstart: 0, 1, ...", lower_bound=1)
DATA_STEPS = flags.DEFINE_integer("data_steps", 20, "Steps on own data.", lower_bound=2)
STEP_SHAPES = flags.DEFINE_list("step_shapes", ["jersey", "mid"], "Shapes of launch.bench.train.")
CORES = flags.DEFINE_list("cores", ["1", "2"], "Numbers of CPU cores for launch.bench.train.")
FIGURES = flags.DEFINE_string("figures", None, "JSON file for all figures.")

Figures = dict[str, float]
"""Seconds, or ratios to PyTorch, by the name of a row."""


class Checkout:
    """A folder with the project, and an environment in which nothing is cached but in `cache`."""

    def __init__(self, folder: str, cache: pathlib.Path):
        self.folder = pathlib.Path(folder).resolve()
        if not (self.folder / "launch" / "answer.py").is_file():
            raise ValueError(f"{folder} is no checkout of this project: give a folder with launch/answer.py")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        self.env = kept | {"PYTHONPATH": str(self.folder), "XDG_CACHE_HOME": str(cache)}

    def command(self, module: str, *arguments: str, cores: int | None = None) -> list[str]:
        """The command that runs a module of `launch`; of launch/bench, wherever this checkout has it."""
        if module.startswith("bench.") and not (self.folder / "launch" / "bench").is_dir():
            module = module.replace(".", "_")
        limited = [] if cores is None else ["taskset", "--cpu-list", f"0-{cores - 1}"]
        return [*limited, sys.executable, "-m", f"launch.{module}", *arguments]

    def seconds(self, *command: str, cores: int | None = None) -> float:
        """Seconds of a module's run.

        Raises:
          RuntimeError: it failed; with the end of what it said.
        """
        begin = time.perf_counter()
        done = subprocess.run(
            self.command(*command, cores=cores), cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{self.folder}: launch.{command[0]} exits with {done.returncode}: {done.stderr[-300:]}")
        return time.perf_counter() - begin


def quickstart(checkout: Checkout, folder: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Seconds; accuracies of both routers less that of the best fixed granularity, and their shares of its tokens."""
    seedless = not (checkout.folder / "avg_llava_jax" / "commands").is_dir()  # before --seed there was one
    for seed in range(1 if seedless else ROUTER_SEEDS.value):
        work = folder / f"quickstart-{seed}"
        arguments = [f"--workdir={work}"]
        if seed:
            arguments.append(f"--seed={seed}")
        yield f"quickstart, seed {seed}: seconds", checkout.seconds("quickstart", *arguments)
        report = json.loads((work / "report.json").read_text())
        fixed = report["accuracy"]["fixed"]
        best = max(fixed, key=lambda granularity: fixed[granularity]["all"])
        for name in ("adaptive", "adaptive_paper"):
            more = report["accuracy"][name]["all"] - fixed[best]["all"]
            share = report["visual_tokens"][name] / report["visual_tokens"]["fixed"][best]
            yield f"quickstart, seed {seed}: {name}, accuracy above the best fixed", more
            yield f"quickstart, seed {seed}: {name}, share of its tokens", share


def answer(checkout: Checkout, folder: pathlib.Path) -> Iterator[tuple[str, float]]:
    picture = folder / "picture.png"
    Jersey("test")[0]["images"][0].load().save(picture)
    for time_of in ("first", "second"):
        arguments = f"--image={picture}", "--prompt=What is the weather?"
        yield f"answer, {time_of}: seconds", checkout.seconds("answer", *arguments)


def serve(checkout: Checkout, folder: pathlib.Path) -> Iterator[tuple[str, float]]:
    del folder
    for time_of in ("first", "second"):
        begin = time.perf_counter()
        with subprocess.Popen(
            checkout.command("serve", "--port=0"),
            cwd=checkout.folder,
            env=checkout.env,
            stderr=subprocess.PIPE,
            text=True,
        ) as server:
            said = []
            for line in server.stderr:
                said.append(line)
                if " at http" in line:
                    break
            took = time.perf_counter() - begin
            server.send_signal(signal.SIGTERM)
            server.communicate()
        if " at http" not in said[-1]:
            raise RuntimeError(f"{checkout.folder}: the server ends before it listens: {''.join(said)[-300:]}")
        yield f"serve, {time_of}: seconds until it listens", took


def own_data(checkout: Checkout, folder: pathlib.Path) -> Iterator[tuple[str, float]]:
    data, work = shapes_and_colours(folder / "data"), folder / "own_data"
    begin, log = time.time(), work / "metrics.jsonl"
    arguments = [
        f"--config.data.path={data}",
        f"--config.data.images={data.parent}",
        f"--config.steps={DATA_STEPS.value}",
    ]
    command = checkout.command("train", "--config=configs/own_data.py", f"--workdir={work}", *arguments)
    with subprocess.Popen(command, cwd=checkout.folder, env=checkout.env, stderr=subprocess.PIPE, text=True) as train:
        first = None
        while train.poll() is None and first is None:
            time.sleep(0.1)
            if log.is_file() and log.stat().st_size:
                first = time.time() - begin
        said = train.communicate()[1]
    if train.returncode or first is None:
        raise RuntimeError(f"{checkout.folder}: launch.train exits with {train.returncode}: {said[-300:]}")
    took = [json.loads(line)["step_seconds"] for line in log.read_text().splitlines()]
    yield "own data: seconds until the first step is done", first
    yield "own data: seconds a step", statistics.median(took)


def shapes_and_colours(folder: pathlib.Path, pictures: int = 4000) -> pathlib.Path:
    """LLaVA JSON in the manner of easy-vqa: a coloured shape on 64 x 64 pixels, and ten short questions about it."""
    import random

    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    draw, records = random.Random(0), []
    colours = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
    shapes = ("circle", "rectangle", "triangle")
    for number in range(pictures):
        shape, colour, x, y = draw.choice(shapes), draw.choice(colours), draw.randrange(36), draw.randrange(36)
        picture = Image.new("RGB", (64, 64), (draw.randrange(200, 256),) * 3)
        pen, box = ImageDraw.Draw(picture), (x, y, x + 26, y + 26)
        if shape == "triangle":
            pen.polygon(((x, y + 26), (x + 13, y), (x + 26, y + 26)), fill=colour)
        else:
            (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
        picture.save(folder / f"{number}.png")
        asked = [("What shape is in the image?", shape), ("What color is the shape?", colour)]
        for other in draw.sample(colours, 4):
            asked.append((f"Is there a {other} shape in the image?", "yes" if other == colour else "no"))
        for other in (*shapes, draw.choice(shapes)):
            asked.append((f"Does the image contain a {other}?", "yes" if other == shape else "no"))
        turns = []
        for at, (question, reply) in enumerate(asked):
            turns.append({"from": "human", "value": "<image>\n" * (at == 0) + question})
            turns.append({"from": "gpt", "value": reply})
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def against_torch(phase: str, checkout: Checkout, folder: pathlib.Path) -> Iterator[tuple[str, float]]:
    for shape in STEP_SHAPES.value:
        for cores in map(int, CORES.value):
            file = folder / f"{phase}-{shape}-{cores}.json"
            checkout.seconds("bench.train", f"--shape={shape}", f"--phase={phase}", f"--output={file}", cores=cores)
            found = json.loads(file.read_text())["phases"][phase]
            ours = found["step"]["per_length"]["seconds"] / found["batch_size"]
            theirs = found["torch"]["step"]["encode once"] / found["torch"]["batch_size"]
            yield f"{phase}, {shape}, {cores} threads: PyTorch's seconds a sample in ours", theirs / ours


def measure(row: str, checkout: Checkout, folder: pathlib.Path) -> Figures:
    """All figures of a row, by one run of a checkout."""
    ways = {"quickstart": quickstart, "answer": answer, "serve": serve, "own_data": own_data}
    found = ways[row](checkout, folder) if row in ways else against_torch(row, checkout, folder)
    return dict(found)


def table(found: dict[str, dict[str, list[Figures]]]) -> str:
    """Markdown: a line per figure with the medians of the old and the new checkout, and their ratio."""
    lines = ["| | old | new | new / old |", "|---|---|---|---|"]
    for runs in found.values():
        for name in runs["new"][0]:
            new, *old = (
                statistics.median(run[name] for run in runs[which])
                for which in ("new", "old")
                if all(name in run for run in runs[which])
            )
            before = f"{old[0]:.3g}" if old else "–"
            ratio = f"{new / old[0]:.2f}" if old and "accuracy" not in name else "–"
            lines.append(f"| {name} | {before} | {new:.3g} | {ratio} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    unknown = [row for row in CHOSEN.value if row not in ROWS]
    if unknown:
        raise ValueError(f"--rows={unknown[0]}: choose of {', '.join(ROWS)}")
    if {"multi_granularity", "rglf"} & set(CHOSEN.value) and importlib.util.find_spec("torch") is None:
        raise ValueError(
            "rows multi_granularity and rglf need PyTorch: install the extra test, or leave them out of --rows"
        )
    found: dict[str, Any] = {row: {"old": [], "new": []} for row in CHOSEN.value}
    for row in CHOSEN.value:
        for number in range(RUNS.value):
            for which, folder in (("old", OLD.value), ("new", NEW.value)):
                print(f"{row}, run {number + 1} of {RUNS.value}: {which}", file=sys.stderr, flush=True)
                with tempfile.TemporaryDirectory() as work:
                    checkout = Checkout(folder, pathlib.Path(work) / "cache")
                    found[row][which].append(measure(row, checkout, pathlib.Path(work)))
                if FIGURES.value:
                    write_json(FIGURES.value, found)
    print(table(found))


if __name__ == "__main__":
    cli.run(main, required=["old"], model_flags=())
