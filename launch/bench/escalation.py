"""The time of an escalated answer: python -m launch.bench.escalation --shape=mid --workdir=OUT

Three ways in turn, side by side in one run, to the same answers of --new_tokens about the same image:

    finest      the finest granularity alone
    agrees      the coarsest first, then every further pass up to the finest: each gives the whole answer of the finest
                and turns out uncertain at its last token
    disagrees   the same passes, each uncertain at its first token, which is another than the finest's

Weights are random, so certainties and drafts are set here; all that the engine computes is computed. Writes
OUT/escalation.json and OUT/escalation.md.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

from absl import flags

from avg_llava_jax.commands import cli
from launch.bench import inference

if TYPE_CHECKING:
    from avg_llava_jax.inference.api import AvgLlava

flags.adopt_module_key_flags(inference)
BOUNDS = {"finest": 1.0, "agrees": 1.1, "disagrees": 1.2}


def timed(
    model: AvgLlava, image: Any, way: str, expected: tuple[int, ...], clock: Any
) -> tuple[float, tuple[int, ...]]:
    """Seconds and token ids of one answer. expected: the finest granularity's tokens, () before they are known."""
    from avg_llava_jax.inference import engine, job
    from avg_llava_jax.inference.choosing import FINER

    repack_finer, coarsest, finest = engine.repack_finer, model.config.granularities[0], model.config.granularities[-1]

    def drafted(model: Any, one: Any, pages: int, ended: bool) -> None:
        one.tokens = list(expected[: len(one.tokens)]) if way == "agrees" else [expected[0] + 1]
        repack_finer(model, one, pages, ended)

    def certainty(one: Any, count: int) -> float:
        last = count >= inference.NEW_TOKENS.value or way == "disagrees"
        return 0.0 if one.finer and last else 1.0

    first = {"granularity": finest} if way == "finest" else {"granularity": coarsest, "escalate": 0.5}
    model.forget()
    with mock.patch.object(engine, "repack_finer", drafted), mock.patch.object(job.Job, "certainty", certainty):
        begin = clock()
        answer = model.answer(image, inference.PROMPT, max_new_tokens=inference.NEW_TOKENS.value, **first)
        seconds = clock() - begin
    if len(answer.passes) != len(model.config.granularities[::-FINER] if way != "finest" else [finest]):
        raise RuntimeError(f"{way}: {len(answer.passes)} passes")
    return seconds, answer.token_ids


def table(report: dict[str, Any]) -> str:
    lines = ["| | seconds | × finest | at most |", "|---|---:|---:|---:|"]
    for way, row in report["ways"].items():
        lines.append(f"| {way} | {row['seconds']:.3f} | {row['ratio']:.3f} | {BOUNDS[way]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    inference.pin(inference.THREADS.value)
    from avg_llava_jax.files import write_whole

    workdir = pathlib.Path(inference.WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    model = inference.model_of(inference.SHAPE.value)
    clock = time.process_time if inference.CLOCK.value == "cpu" else time.perf_counter
    image = inference.photos(model.config, 1, seed=0)[0]
    took: dict[str, list[float]] = {way: [] for way in BOUNDS}
    expected: tuple[int, ...] = ()
    for repeat in range(inference.REPEATS.value + 1):  # in turn; the first compiles
        for way, seconds_of in took.items():
            seconds, tokens = timed(model, image, way, expected, clock)
            if expected and tokens != expected:
                raise RuntimeError(f"{way}: other tokens than the finest granularity's")
            expected = tokens
            if repeat:
                seconds_of.append(seconds)
            print(f"{repeat}/{inference.REPEATS.value}, {way}: {seconds:.3f} s", flush=True)
    finest = statistics.median(took["finest"])
    ways = {
        way: {"seconds": statistics.median(each), "ratio": statistics.median(each) / finest, "all": each}
        for way, each in took.items()
    }
    report = {"shape": inference.SHAPE.value, "clock": inference.CLOCK.value, "ways": ways}
    write_whole(workdir / "escalation.json", json.dumps(report, indent=1) + "\n")
    write_whole(workdir / "escalation.md", table(report))
    print(table(report))


if __name__ == "__main__":
    cli.run(main, required=["workdir"], model_flags=())
