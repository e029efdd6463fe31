"""Speed of evaluation, many questions at once and one at a time: python -m launch.bench.evaluation

Writes `jersey` as LLaVA JSON with several questions per picture, reads it like `avg-llava evaluate`, and answers it at
every granularity and at the router's choice. Each way runs twice: the first run compiles, the second is timed. Prints
questions per second, and fails if the ways answer any question differently.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.eval.evaluation import Question
    from avg_llava_jax.eval.policies import Record

QUESTIONS = flags.DEFINE_integer("questions", 2000, "How many in all.", lower_bound=1)
IMAGES = flags.DEFINE_integer("images", 500, "How many pictures they are about.", lower_bound=1)
ONE_AT_A_TIME = flags.DEFINE_integer(
    "one_at_a_time", 200, "How many of them, spread over all, are answered one at a time.", lower_bound=1
)
SLOTS = flags.DEFINE_integer("slots", 32, "Answers that grow together in the engine.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "Where the JSON goes.")

Way = Callable[[], "list[Record]"]


def write(folder: pathlib.Path, count: int, images: int) -> pathlib.Path:
    """Write `count` records of one question each about a number of pictures; returns the path of the LLaVA JSON."""
    from avg_llava_jax.data import jersey

    turns = -(-count // images)
    path = jersey.write(jersey.Jersey("test", images, turns=turns), images, folder)
    records = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        said = record["conversations"]
        for turn, (asked, answer) in enumerate(zip(said[::2], said[1::2], strict=True)):
            prompt = asked["value"] if turn == 0 else f"<image>\n{asked['value']}"
            conversation = [{"from": "human", "value": prompt}, answer]
            records.append({"id": f"{record['id']}-{turn}", "image": record["image"], "conversations": conversation})
    path.write_text(json.dumps(records[:count], indent=1), encoding="utf-8")
    return path


def timed(way: Way) -> tuple[list[Record], float, int]:
    """The records of a second run, its seconds, and the number of programs compiled in it."""
    from avg_llava_jax.inference.stress import compilations

    way()
    with compilations() as compiled:
        begin = time.perf_counter()
        records = way()
        return records, time.perf_counter() - begin, compiled()


def differing(some: Sequence[Record], others: Sequence[Record]) -> list[str]:
    """Ids of the questions in `some` whose answers or choices differ from those in `others`."""
    by_id = {record["id"]: record for record in others}
    names = ("answers", "answer", "chosen")
    return [one["id"] for one in some if any(one[name] != by_id[one["id"]][name] for name in names)]


def measure(model: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """{"questions", "ways": {name: {"questions", "seconds", "questions_a_second", "compilations", "differing"}}}."""
    from avg_llava_jax.eval import evaluation

    some = min(ONE_AT_A_TIME.value, len(questions))
    spread = [questions[at * len(questions) // some] for at in range(some)]
    ways: dict[str, Way] = {
        "together": lambda: evaluation.answer_all(model, questions, batch_size=SLOTS.value),
        "one at a time": lambda: evaluation.answer_all(model, spread, batch_size=1),
    }
    report: dict[str, Any] = {"questions": len(questions), "ways": {}}
    batched: list[Record] = []
    for name, way in ways.items():
        records, seconds, compiled = timed(way)
        batched = batched or records
        report["ways"][name] = {
            "questions": len(records),
            "seconds": seconds,
            "questions_a_second": len(records) / seconds,
            "compilations": compiled,
            "differing": differing(records, batched),
        }
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text, a line per way."""
    alone = report["ways"]["one at a time"]["questions_a_second"]
    lines = [f"{'':<16}{'questions':>10}{'seconds':>10}{'a second':>10}{'ratio':>8}"]
    for name, way in report["ways"].items():
        speed = way["questions_a_second"]
        lines.append(f"{name:<16}{way['questions']:>10}{way['seconds']:>10.1f}{speed:>10.2f}{speed / alone:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    from avg_llava_jax.data.sources import open_source
    from avg_llava_jax.eval import evaluation
    from avg_llava_jax.files import write_whole

    model = cli.load_model()
    with tempfile.TemporaryDirectory() as folder:
        path = write(pathlib.Path(folder), QUESTIONS.value, IMAGES.value)
        source = open_source(str(path), str(path.parent / "images"))
        questions, skipped = evaluation.read_questions(source, model.tokenizer, model.config)
        if skipped:
            raise ValueError(f"{len(skipped)} records cannot be used, the first for {skipped[0]['reason']}")
        report = measure(model, questions)
    if OUTPUT.value:
        write_whole(OUTPUT.value, json.dumps(report, indent=1) + "\n")
    print(table(report))
    for name, way in report["ways"].items():
        if ids := way["differing"]:
            raise RuntimeError(f"{name}, {len(ids)} questions are answered otherwise than in batches: {', '.join(ids)}")


if __name__ == "__main__":
    cli.run(main, required=[])
