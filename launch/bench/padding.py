"""Padding in training batches, and what it costs: python -m launch.bench.padding --pack=1,2,4 --output=padding.json

Records like LLaVA's 665 k, 60 % one question about one image, 28 % several turns about one image, 12 % text alone, with
images of mixed aspect. For each `data.shapes` and `data.pack`, over the same records: the share of packed positions and
of tile slots that hold nothing, over all granularities (phase one, and the language model in RGLF) or at the finest
alone (connector), the programs that are compiled, and the FLOPs of a step for each useful position, as a share of those
of the first `data.pack` (model FLOPs of phase one by `parallel/costs.py`, all pairs of a row in attention).

--phase times the steps of a phase on batches of each shape, all in turn, and weighs them by how often each occurs:
useful positions a second.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import random
import tempfile
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax import ASSETS
from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.config import ModelConfig
    from avg_llava_jax.data.packing import Shape
    from avg_llava_jax.data.pipeline import PlannedBatches

SHAPE = flags.DEFINE_enum("shape", "7b", ["jersey", "mid", "7b"], "Sizes of the model.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Samples in a batch.", 1)
BATCHES = flags.DEFINE_integer("batches", 64, "Batches that are measured.", 1)
SHAPES = flags.DEFINE_list("shapes", ["4", "6", "12"], "Values of data.shapes.")
PACK = flags.DEFINE_list("pack", ["1", "2", "4", "8"], "Values of data.pack.")
PHASE = flags.DEFINE_multi_enum("phase", [], ["rglf", "multi_granularity"], "Phases whose steps are timed.")
REPEATS = flags.DEFINE_integer("repeats", 5, "How often each step is timed; the median counts.", 1)
OUTPUT = flags.DEFINE_string("output", None, "Where the JSON goes.")

SIZES = ((640, 480, 45), (480, 640, 20), (500, 375, 10), (336, 336, 8), (1000, 667, 7), (1200, 400, 5), (400, 1000, 5))
"""Width, height, weight: mostly those of COCO."""

WORDS = tuple("the red team left shirt number player weather sunny rainy what is colour how many".split())  # noqa: SIM905


def record(number: int, draw: random.Random) -> dict:
    """One record; answers are a word or a paragraph, as in the mixture's VQA and its conversations."""

    def said(count: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, round(draw.lognormvariate(0, 0.7) * count))))

    kind = draw.choices(("one", "turns", "text"), (60, 28, 12))[0]
    turns = {"one": 1, "turns": 2 + min(14, int(draw.expovariate(1 / 4))), "text": 1 + min(6, int(draw.expovariate(1)))}
    answer = {"one": draw.choice((2, 2, 60)), "turns": draw.choice((2, 2, 25)), "text": 150}[kind]
    values = {"id": str(number), "conversations": []}
    for turn in range(turns[kind]):
        asked = ("<image>\n" if turn == 0 and kind != "text" else "") + said(40 if kind == "text" else 12)
        values["conversations"] += [{"from": "human", "value": asked}, {"from": "gpt", "value": said(answer)}]
    if kind != "text":
        width, height, _ = draw.choices(SIZES, [weight for *_, weight in SIZES])[0]
        values["image"] = f"{width}x{height}.png"
    return values


def measure(batches: "PlannedBatches") -> dict[str, Any]:
    """Padding, positions used, positions of the language model, FLOPs, and the number of batches of each shape."""
    from avg_llava_jax.data.packing import packed_length, tiles_of
    from avg_llava_jax.parallel import costs

    model, ladder, rows = batches.config, batches.granularities, batches.batch_size // batches.pack
    total, found = collections.Counter(), collections.Counter()
    for number in range(BATCHES.value):
        shape = batches.batch_shape(number)
        found[shape] += 1
        for _, sample in itertools.chain(*batches.rows_of(number)):
            total["tiles used"] += tiles_of(sample, model)
            total["used"] += sum(min(packed_length(sample, model, each), model.language.max_length) for each in ladder)
        total["tiles"] += rows * shape.tiles
        total["positions"] += rows * sum(shape.length(model, each) for each in ladder)
        total["flops"] += sum(costs.step_flops(model, "multi_granularity", ladder, rows, shape).values())
    return {
        "padding": round(1 - total["used"] / total["positions"], 3),
        "padding of tiles": round(1 - total["tiles used"] / total["tiles"], 3),
        "programs": len(found),
        "longest row": max(shape.length(model, ladder[-1]) for shape in found),
        "used": total["used"],
        "flops": total["flops"],
        "found": found,
    }


def step_seconds(phase: str, model: "ModelConfig", plans: "dict[str, tuple[PlannedBatches, Any]]") -> dict[str, float]:
    """Seconds of a phase's steps over the measured batches of each plan; all shapes of all plans are timed in turn."""
    import statistics

    import jax
    import jax.numpy as jnp

    from avg_llava_jax import parameters
    from avg_llava_jax.parallel import sharding
    from avg_llava_jax.training import setup
    from avg_llava_jax.training.config import TrainConfig
    from avg_llava_jax.training.feedback import NOT_ARRAYS
    from avg_llava_jax.training.step import Step
    from launch.bench.parts import seconds

    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = TrainConfig(phase=phase, batch_size=BATCH_SIZE.value, compute_dtype=dtype)
    mesh = sharding.make_mesh(dataclasses.asdict(config.mesh))
    with jax.set_mesh(mesh):
        step = Step(config, model, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, step.params)
        fresh = jax.jit(lambda key: parameters.init(model, key, setup.dtypes(config)), out_shardings=places)
        trained, frozen = step.split(fresh(jax.random.key(0)))
        held = [trained, step.init(trained)]

        def run(batch: Any) -> Any:
            def once() -> Any:
                *held[:], metrics = step.update(*held, frozen, batch, jnp.zeros((), jnp.int32))
                return metrics

            return once

        runs, counts = {}, {}
        for name, (batches, found) in plans.items():
            first: dict[Shape, int] = {}
            for number in range(BATCHES.value):
                first.setdefault(batches.batch_shape(number), number)
            for at, (shape, number) in enumerate(first.items()):
                arrays = {key: value for key, value in batches[number].items() if key not in NOT_ARRAYS}
                runs[f"{name}/{at}"] = run(jax.device_put(arrays, step.rows))
                counts[f"{name}/{at}"] = found[shape]
        took = {name: statistics.median(each) for name, each in seconds(runs, REPEATS.value).items()}
    return {
        plan: sum(took[name] * count for name, count in counts.items() if name.rpartition("/")[0] == plan)
        for plan in plans
    }


def main() -> None:

    from PIL import Image

    from avg_llava_jax.data.pipeline import PlannedBatches
    from avg_llava_jax.data.sources import open_sources
    from avg_llava_jax.data.tokenizer import load_tokenizer
    from avg_llava_jax.files import write_json
    from launch.bench.parts import model_of

    report, draw = {}, random.Random(0)
    model = dataclasses.replace(model_of(SHAPE.value), template="mistral_instruct")
    tokenizer = load_tokenizer(ASSETS / "tokenizer")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for width, height, _ in SIZES:
            Image.new("RGB", (width, height)).save(folder / f"{width}x{height}.png")
        records = [record(number, draw) for number in range(BATCHES.value * BATCH_SIZE.value)]
        (folder / "data.json").write_text(json.dumps(records))
        parts = open_sources(str(folder / "data.json"), str(folder))
        for what, ladder in (("all granularities", model.granularities), ("the finest", model.granularities[-1:])):
            for shapes in map(int, SHAPES.value):
                plans, first = {}, None
                for pack in map(int, PACK.value):
                    batches = PlannedBatches(
                        parts, tokenizer, model, ladder, BATCH_SIZE.value, shapes=shapes, pack=pack
                    )
                    found = measure(batches)
                    plans[f"{what}, data.shapes={shapes}, data.pack={pack}"] = batches, found.pop("found")
                    first = first or found
                    found["flops a position"] = round(
                        found["flops"] / found["used"] * first["used"] / first["flops"], 3
                    )
                    report[f"{what}, data.shapes={shapes}, data.pack={pack}"] = found
                    print(f"{what}, data.shapes={shapes}, data.pack={pack}: {found}", flush=True)
                for phase in PHASE.value if what == "all granularities" else ():
                    for plan, took in step_seconds(phase, model, plans).items():
                        report[plan][f"positions a second, {phase}"] = rate = round(report[plan]["used"] / took)
                        print(f"{plan}, {phase}: {rate} useful positions a second", flush=True)
    if OUTPUT.value:
        write_json(OUTPUT.value, report)


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
