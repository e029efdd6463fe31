"""Accuracy and time to the first token against requests/s: python -m launch.bench.load --workdir=OUT

Test questions of `jersey`, two of each three about one picture, arrive at an engine at random times (Poisson, the same
times for every policy). Policies: each of --fixed tokens a tile, the router, and the router with a promise
(--slo_ttft), whose price follows the load. Rates are shares of what the engine answers in a second at the finest
granularity when all questions come at once, measured first. Policies take turns at each rate.

--clock=cpu counts this process's CPU seconds and skips the time in which no request is there, so that what else the
machine does changes nothing: all times and rates are then those of a machine of its own with one core's time.

Writes OUT/load.json, OUT/load.md and OUT/plots/load.png. Times to the first token run from the arrival that was
planned.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax.commands import cli

if TYPE_CHECKING:
    from avg_llava_jax.inference.engine import Engine
    from avg_llava_jax.inference.pricing import Slo

WORKDIR = flags.DEFINE_string("workdir", None, "Where the figures go.")
RATES = flags.DEFINE_list(
    "rates", ["0.5", "0.8", "1", "1.2", "1.5", "2"], "Arrivals, as shares of the finest's capacity."
)
QUESTIONS = flags.DEFINE_integer("questions", 240, "Requests of each policy at each rate.", lower_bound=2)
FIXED = flags.DEFINE_list("fixed", ["4", "16", "64"], "Granularities to compare with.")
SLO_TTFT = flags.DEFINE_float("slo_ttft", 0.5, "The promise, in seconds.", lower_bound=0.0)
CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "What time is; cpu on a busy machine.")
SLOTS = flags.DEFINE_integer("slots", 8, "Answers that decode together.", lower_bound=1)


class Clock:
    """Seconds of the wall or of this process's CPU, which waits without waiting."""

    def __init__(self, kind: str):
        self._cpu, self._skipped = kind == "cpu", 0.0
        self._now = time.process_time if self._cpu else time.perf_counter

    def __call__(self) -> float:
        return self._now() + self._skipped

    def wait(self, seconds: float) -> None:
        if self._cpu:
            self._skipped += seconds
        else:
            time.sleep(seconds)


def run(
    clock: Clock, engine: Engine, asked: list[Any], arrivals: Any, way: int | None, slo: Slo | None
) -> list[dict[str, float]]:
    """Ask every question when it arrives, in seconds from now; returns the measures of each.

    asked: (question, images). way: the granularity, None = the router's choice.
    """
    from avg_llava_jax.eval.evaluation import normalise
    from avg_llava_jax.eval.timing import as_request
    from avg_llava_jax.inference.pricing import Pricing
    from avg_llava_jax.inference.requests import Request

    engine.forget()
    engine._pricing = Pricing(slo) if slo else None
    request, begin, tickets = Request("", max_new_tokens=4), clock(), []
    waiting = deque(zip(asked, arrivals, strict=True))
    busy = False
    while waiting or busy:
        if waiting and not busy:
            clock.wait(max(0.0, begin + waiting[0][1] - clock()))
        while waiting and begin + waiting[0][1] <= clock():
            (question, images), arrival = waiting.popleft()
            late = clock() - begin - arrival
            tickets.append((late, engine.submit_prepared(as_request(question, request, (way,)), images)))
        busy = engine.step()
    found = []
    for (question, _), (late, ticket) in zip(asked, tickets, strict=True):
        answer = ticket.result(0)
        found.append(
            {
                "right": float(normalise(answer.text) == normalise(question.reference)),
                "ttft": late + answer.timings["total"] - answer.timings["decode"],
                "visual_tokens": answer.visual_tokens,
                "cost_weight": answer.cost_weight or 0.0,
            }
        )
    return found


def table(report: dict[str, Any]) -> str:
    """A line per rate and policy."""
    lines = [
        f"At the finest granularity at most {report['capacity']:.1f} questions/s; promise {report['slo_ttft']:g} s.\n",
        "| questions/s | policy | accuracy | visual tokens | λ | ttft, median s | ttft, 95 % s | within the promise |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['rate']:.1f} | {row['policy']} | {row['right']:.3f} | {row['visual_tokens']:.0f} "
            f"| {row['cost_weight']:.2f} | {row['median']:.2f} | {row['late']:.2f} | {row['within']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
    """Accuracy and the 95 % quantile of the time to the first token, against questions/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for policy in dict.fromkeys(row["policy"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["policy"] == policy]
        style = "o-" if policy.startswith("router") else "s:"
        for axis, key in zip(axes, ("right", "late"), strict=True):
            axis.plot([row["rate"] for row in rows], [row[key] for row in rows], style, label=policy)
    axes[1].axhline(report["slo_ttft"], color="black", linewidth=0.8)
    axes[0].set(xlabel="questions/s", ylabel="accuracy")
    axes[1].set(xlabel="questions/s", ylabel="time to the first token, 95 %, s", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    import numpy as np

    from avg_llava_jax.eval import quickstart
    from avg_llava_jax.files import write_whole
    from avg_llava_jax.inference.engine import Engine
    from avg_llava_jax.inference.job import read_images
    from avg_llava_jax.inference.pricing import Slo

    workdir, count = pathlib.Path(WORKDIR.value), QUESTIONS.value
    workdir.mkdir(parents=True, exist_ok=True)
    model = cli.load_model()
    questions = quickstart.test_questions(model, count)
    asked = [(question, read_images(model.config, question.sample)) for question in questions]
    engine = Engine(model, slots=SLOTS.value, max_length=512, queue=count + 1)
    engine.warm_up()
    clock = Clock(CLOCK.value)
    time.perf_counter = clock  # of the engine as well
    finest, slo = model.config.granularities[-1], Slo(SLO_TTFT.value)
    for way in (finest, None):  # the first calls of a program take longer
        run(clock, engine, asked[:40], [0.0] * 40, way, None)
    begin = clock()
    run(clock, engine, asked, [0.0] * count, finest, None)
    capacity = count / (clock() - begin)
    policies: dict[str, tuple[int | None, Slo | None]] = {f"always {g}": (int(g), None) for g in FIXED.value}
    policies |= {"router": (None, None), "router with the promise": (None, slo)}
    rows = []
    for share in map(float, RATES.value):
        gaps = np.random.default_rng(0).exponential(1 / (share * capacity), count)
        for policy, (way, promise) in policies.items():
            found = run(clock, engine, asked, np.cumsum(gaps), way, promise)
            mean = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
            waits = np.array([each["ttft"] for each in found])
            row = {"rate": share * capacity, "policy": policy, **mean, "within": float((waits <= slo.ttft).mean())}
            rows.append(row | {"median": float(np.median(waits)), "late": float(np.quantile(waits, 0.95))})
            print(f"{share:g} x {capacity:.1f}/s, {policy}: {rows[-1]}", flush=True)
    engine.close()
    report = {"clock": CLOCK.value, "capacity": capacity, "slo_ttft": slo.ttft, "rows": rows}
    write_whole(workdir / "load.json", json.dumps(report, indent=1) + "\n")
    write_whole(workdir / "load.md", table(report))
    draw(report, workdir / "plots" / "load.png")
    print(table(report))


if __name__ == "__main__":
    cli.run(main, required=["workdir"])
