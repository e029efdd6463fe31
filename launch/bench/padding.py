"""Padding in training batches, by batch shape: python -m launch.bench.padding --output=padding.json

On the host alone: records like LLaVA's 665 k, 60 % one question about one image, 28 % several turns about one image,
12 % text alone, with images of mixed aspect. Prints the share of packed positions and of tile slots that hold nothing,
over all granularities (phase one, and the language model in RGLF) and at the finest alone (connector).
"""

import collections
import json
import pathlib
import random
import tempfile

from absl import flags

from avg_llava_jax import ASSETS
from avg_llava_jax.commands import cli

BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Samples in a batch.", 1)
BATCHES = flags.DEFINE_integer("batches", 64, "Batches that are measured.", 1)
SHAPES = flags.DEFINE_list("shapes", ["4", "6", "12"], "Values of data.shapes.")
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


def measure(folder: pathlib.Path, shapes: int, granularities: tuple[int, ...]) -> list[dict]:
    """Padding of each batch shape and, in the last row, of all of them."""
    from avg_llava_jax.config import ModelConfig
    from avg_llava_jax.data.packing import packed_length
    from avg_llava_jax.data.pipeline import PlannedBatches
    from avg_llava_jax.data.sources import open_sources
    from avg_llava_jax.data.tiles import tile_count
    from avg_llava_jax.data.tokenizer import load_tokenizer

    model, tokenizer = ModelConfig(template="mistral_instruct"), load_tokenizer(ASSETS / "tokenizer")
    parts = open_sources(str(folder / "data.json"), str(folder))
    batches = PlannedBatches(parts, tokenizer, model, granularities, BATCH_SIZE.value, shapes=shapes)
    used, slots = collections.defaultdict(collections.Counter), collections.Counter()
    for number in range(BATCHES.value):
        samples = [member.sample for member in batches.rows_of(number)]
        shape = batches.fit(samples)
        slots[shape] += 1
        for sample in samples:
            used[shape]["tiles"] += sum(tile_count(size, model) for size in sample.sizes)
            for each in granularities:
                used[shape]["positions"] += min(packed_length(sample, model, each), model.language.max_length)
    rows, total = [], collections.Counter()
    for shape, count in sorted(slots.items(), key=lambda item: item[0].length(model, granularities[-1])):
        room = {"tiles": shape.tiles, "positions": sum(shape.length(model, each) for each in granularities)}
        room = {kind: size * count * BATCH_SIZE.value for kind, size in room.items()}
        total.update({"batches": count} | {f"{kind} used": used[shape][kind] for kind in room} | room)
        padding = {kind: round(1 - used[shape][kind] / size, 3) for kind, size in room.items()}
        rows.append(
            {"tiles": shape.tiles, "text": shape.text, "fill": shape.fill, "batches": count, "padding": padding}
        )
    padding = {kind: round(1 - total[f"{kind} used"] / total[kind], 3) for kind in ("tiles", "positions")}
    return [*rows, {"batches": total["batches"], "padding": padding}]


def main() -> None:
    from PIL import Image

    from avg_llava_jax.config import ModelConfig
    from avg_llava_jax.files import write_json

    found, draw = {}, random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for width, height, _ in SIZES:
            Image.new("RGB", (width, height)).save(folder / f"{width}x{height}.png")
        records = [record(number, draw) for number in range(BATCHES.value * BATCH_SIZE.value)]
        (folder / "data.json").write_text(json.dumps(records))
        ladder = ModelConfig().granularities
        for shapes in map(int, SHAPES.value):
            for phase, granularities in (("multi_granularity, rglf", ladder), ("connector", ladder[-1:])):
                rows = measure(folder, shapes, granularities)
                found[f"{phase}, data.shapes={shapes}"] = rows
                print(f"{phase}, data.shapes={shapes}: padding {rows[-1]['padding']}", flush=True)
                for row in rows[:-1]:
                    print("   ", row, flush=True)
    if OUTPUT.value:
        write_json(OUTPUT.value, found)


if __name__ == "__main__":
    cli.run(main, required=[], model_flags=())
