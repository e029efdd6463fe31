"""The frontier of policies over routers: python -m launch.bench.frontier --workdir=W --output=OUT

W is a workdir of `python -m launch.bench.ablate --only=full --workdir=W`: the frozen model's answers and a router of
each seed. Each router scores the questions, and `escalation.frontier` compares, in visual tokens, FLOPs and measured
seconds, every pass counted: each fixed granularity, a random one at the same mean cost, the router at all prices,
escalation from the coarsest granularity, both together, and the oracle. Writes means and deviations over the routers:
OUT/frontier.json, OUT/frontier.md and OUT/plots/frontier.png.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli

WORKDIR = flags.DEFINE_string("workdir", None, "A workdir of launch.bench.ablate.")
OUTPUT = flags.DEFINE_string("output", None, "Where the figures go.")
ROUTERS = flags.DEFINE_list("routers", None, "Checkpoints of routers; default: every W/full-SEED.")
TIMED = flags.DEFINE_integer("timed", 16, "Questions that are timed.", lower_bound=1)
CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "cpu"], "How they are timed; cpu on a busy machine.")
BUDGETS = 24


def joined(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over routers of frontiers in one unit, with `deviation` of accuracies and `deviations` of areas.

    Points of a curve are at the mean costs of the points at the same place, where each router's curve is read.
    """
    import numpy as np

    from avg_llava_jax.eval.escalation import accuracy_at

    curves, some = {}, len(found) > 1
    for name in found[0]["curves"]:
        cost = np.mean([[point["cost"] for point in one["curves"][name]] for one in found], axis=0)
        accuracy = np.array([accuracy_at(one["curves"][name], cost) for one in found])
        spread = accuracy.std(axis=0, ddof=1) if some else np.zeros(accuracy.shape[1])
        rows = zip(cost, accuracy.mean(axis=0), spread, strict=True)
        curves[name] = [{"cost": float(c), "accuracy": float(a), "deviation": float(d)} for c, a, d in rows]
    areas = {name: np.array([one["areas"][name] for one in found]) for name in curves}
    return {
        "curves": curves,
        "areas": {name: float(values.mean()) for name, values in areas.items()},
        "deviations": {name: float(values.std(ddof=1)) if some else 0.0 for name, values in areas.items()},
    }


def table(unit: str, found: Sequence[Mapping[str, Any]], budgets: Sequence[float]) -> str:
    """Markdown: a line per curve, its area and its accuracy at some budgets, means ± deviations over routers."""
    import numpy as np

    from avg_llava_jax.eval.escalation import accuracy_at

    lines = [f"| {unit} | area | " + " | ".join(f"{budget:.3g}" for budget in budgets) + " |"]
    lines.append("|---|---:|" + "---:|" * len(budgets))
    for name in found[0]["curves"]:
        of_each = np.array(
            [[one["areas"][name], *accuracy_at(one["curves"][name], np.array(budgets))] for one in found]
        )
        spread = of_each.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(of_each.shape[1])
        cells = [
            f"{mean:.4f} ± {deviation:.4f}" if deviation > 5e-5 else f"{mean:.4f}"
            for mean, deviation in zip(of_each.mean(axis=0), spread, strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import numpy as np

    from avg_llava_jax.eval import escalation, evaluation, plots, quickstart, routing, timing
    from avg_llava_jax.files import write_whole
    from avg_llava_jax.inference.api import AvgLlava
    from avg_llava_jax.inference.requests import Request

    workdir, output = pathlib.Path(WORKDIR.value), pathlib.Path(OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    folders = [pathlib.Path(each) for each in ROUTERS.value or sorted(workdir.glob("full-*"))]
    if not folders:
        raise ValueError(f"--workdir={workdir} has no routers: run launch.bench.ablate --only=full there")
    file = workdir / "exact" / "answers.jsonl"
    answers = {record["id"]: record for record in evaluation.read_records(file).values()}
    if not answers:
        raise ValueError(f"{file} holds no answers: run launch.bench.ablate, or copy those of a quickstart there")
    model = AvgLlava.load(folders[0])
    questions = [each for each in quickstart.test_questions(model, len(answers)) if each.sample.id in answers]
    samples = [question.sample for question in questions]
    records = [answers[sample.id] for sample in samples]
    encoded = list(routing.encode_all(model, samples))

    timed = timing.commonest(model.config, questions, TIMED.value)
    request = Request("", max_new_tokens=quickstart.ANSWER_TOKENS)
    if CLOCK.value == "cpu":
        time.perf_counter = time.process_time
    seconds = timing.in_turn(model, timing.passes(model.config, timed, request), 3)
    first = escalation.table(model.config, records)
    units = {
        "visual tokens": escalation.token_costs(first),
        "GFLOPs": escalation.flop_costs(model.config, samples, first),
        "seconds": timing.pass_costs(model.config, seconds, len(records)),
    }
    found: dict[str, list[dict[str, Any]]] = {unit: [] for unit in units}
    for folder in folders:
        scores = np.array([rows[0] for rows in routing.route_encoded(AvgLlava.load(folder), encoded)])
        for unit, costs in units.items():
            found[unit].append(escalation.frontier(first._replace(scores=scores), costs, BUDGETS))
            print(f"{folder}, {unit}: {found[unit][-1]['areas']}", flush=True)
    report = {"routers": [str(folder) for folder in folders], "clock": CLOCK.value, "seconds": seconds}
    report |= {"frontier": {unit: joined(each) for unit, each in found.items()}}
    write_whole(output / "frontier.json", json.dumps(report, indent=1) + "\n")
    texts = []
    for unit, each in found.items():
        fixed = [point["cost"] for point in each[0]["curves"]["fixed"]]
        texts.append(table(unit, each, np.geomspace(fixed[0], fixed[-1], 7)))
    write_whole(output / "frontier.md", "\n".join(texts))
    plots.frontier(report["frontier"], output / "plots" / "frontier.png")
    print("\n".join(texts))


if __name__ == "__main__":
    cli.run(main, required=["workdir", "output"], model_flags=())
