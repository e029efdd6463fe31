"""Plot accuracy against tokens and seconds at several prices, and the frontier of policies.

    avg-llava tradeoff --data=test.json --images=DIR --workdir=OUT

The plot has a point per cost weight (`Request.cost_weight`), the fixed granularities, a random one and the oracle.
Every question is answered once at every granularity, by `avg-llava evaluate` or here; the weights only choose among
these answers. The frontier (`eval.escalation.frontier`) compares the router, escalation and both together at every
budget of visual tokens, FLOPs and measured seconds, every pass counted, with the area under each curve. The outputs
are OUT/tradeoff.json, OUT/plots/tradeoff.png and OUT/plots/frontier.png; an interrupted run resumes.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli, evaluate, pictures

COST_WEIGHTS = flags.DEFINE_list("cost_weights", "0,0.1,0.2,0.4,0.8,1.6,3.2", "Prices of visual tokens, a point each.")
TIMED = flags.DEFINE_integer("timed", 16, "Questions that are timed, of the most common sizes.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "How often they are timed; the median is reported.", lower_bound=1)
flags.adopt_module_key_flags(evaluate)
flags.adopt_module_key_flags(pictures)


def table(report: dict[str, Any]) -> str:
    """The report as text, a line per policy."""
    kinds = list(report["points"][0]["accuracy"])
    lines = [f"{'':<18}" + "".join(f"{kind:>10}" for kind in kinds) + f"{'tokens':>10}{'seconds':>10}"]
    for point in report["points"]:
        shares = "".join(f"{point['accuracy'][kind]:>10.3f}" for kind in kinds)
        lines.append(f"{point['name']:<18}{shares}{point['visual_tokens']:>10.1f}{point['seconds']:>10.4f}")
    return "\n".join(lines)


def frontier_table(unit: str, found: dict[str, Any]) -> str:
    """A frontier as text: a line per curve, its area and its accuracy at the costs of the fixed granularities."""
    from avg_llava_jax.eval.escalation import accuracy_at

    budgets = [point["cost"] for point in found["curves"]["fixed"]]
    lines = [f"{unit:<18}{'area':>10}" + "".join(f"{budget:>10.4g}" for budget in budgets)]
    for name, points in found["curves"].items():
        reached = "".join(f"{accuracy_at(points, budget):>10.3f}" for budget in budgets)
        lines.append(f"{name:<18}{found['areas'][name]:>10.4f}{reached}")
    return "\n".join(lines)


def main() -> None:
    weights = cli.weights_of(COST_WEIGHTS.value)
    import numpy as np

    from avg_llava_jax.eval import escalation, evaluation, plots, policies, timing
    from avg_llava_jax.files import write_whole
    from avg_llava_jax.inference.requests import Request

    workdir, new_tokens = pathlib.Path(evaluate.WORKDIR.value), evaluate.MAX_NEW_TOKENS.value
    model = cli.load_model()
    config = model.config
    questions, records, _ = evaluate.answered(model)
    scores = [np.asarray(record["scores"]) for record in records]
    sizes = [question.sample.sizes for question in questions]
    free = Request("", max_new_tokens=new_tokens)

    # Policies: the choices for every question, and the request with which they are timed.
    ways: dict[str, tuple[list[policies.Choice], Request]] = {}
    for g in config.granularities:
        ways[f"always {g}"] = [(g,) * len(each) for each in sizes], free
    ways["random"] = policies.random_choices(config, records, evaluate.SEED.value), free
    for weight in weights:
        picked = policies.weighted_choices(config, scores, sizes, weight)
        evaluation.answer_mixed(
            model, questions, records, picked, workdir / "mixed.jsonl", new_tokens, evaluate.BATCH_SIZE.value
        )
        ways[f"cost weight {weight:g}"] = picked, Request("", max_new_tokens=new_tokens, cost_weight=weight)
    ways["oracle"] = policies.oracle_choices(config, records), free

    subset = timing.commonest(config, questions, TIMED.value)
    places = [questions.index(question) for question in subset]
    timed = timing.passes(config, subset, free)
    for name, (picked, request) in ways.items():
        routed = name.startswith("cost weight")
        timed[name] = [
            timing.as_request(questions[at], request, (None,) * len(sizes[at]) if routed else picked[at])
            for at in places
        ]
    seconds = timing.in_turn(model, timed, ROUNDS.value)
    answers, samples = escalation.table(config, records), [question.sample for question in questions]
    units = {
        "visual tokens": escalation.token_costs(answers),
        "GFLOPs": escalation.flop_costs(config, samples, answers),
        "seconds": timing.pass_costs(config, seconds, len(records)),
    }
    report = {
        "n": len(records),
        "made_by": model.made_by,
        "timed": len(subset),
        "points": [
            {"name": name, **policies.outcome(config, records, picked), "seconds": seconds[name]}
            for name, (picked, _) in ways.items()
        ],
        "router": policies.temperature(config, records),
        "frontier": {unit: escalation.frontier(answers, costs) for unit, costs in units.items()},
    }
    write_whole(workdir / "tradeoff.json", json.dumps(report, indent=1) + "\n")
    figure = plots.tradeoff(report, workdir / plots.PLOTS / "tradeoff.png")
    plots.frontier(report["frontier"], workdir / plots.PLOTS / "frontier.png")
    print(table(report))
    for unit, found in report["frontier"].items():
        print(frontier_table(unit, found))
    router = report["router"]
    print(
        f"the router's temperature: {router['temperature']:.2f} "
        f"(held-out NLL of the oracle's choice {router['nll']:.3f}, at 1 {router['nll_at_1']:.3f})"
    )
    print(f"{report['n']} questions, {report['timed']} timed; {workdir / 'tradeoff.json'}, {figure}")


def command() -> None:
    cli.run(main, required=["data", "workdir"])
