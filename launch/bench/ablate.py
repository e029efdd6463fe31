"""Ablations of the router's recipe on `jersey`: python -m launch.bench.ablate --workdir=DIR

The frozen model runs once: its feedback on the router's pictures, its answers to the test questions and the features of
their images are stored. Each router of configs/ablations.py trains from the feedback and then only routes. Seeds differ
in initial parameters, order of the data and dropout.

    DIR/exact/, DIR/released/       the frozen model's output, by un-padding: feedback/, answers.jsonl
    DIR/NAME-SEED/                  the run of a router; ablation.json, its recipe and code; outcome.json, its measures
    DIR/table.md, DIR/plots/        means and deviations over seeds, updated after every router

After an interruption, the same command resumes; more seeds or other names are added to the existing runs. A router of
another recipe or other code is set aside in DIR/stale-1, DIR/stale-2, ..., and trained again.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from flax.traverse_util import flatten_dict

from avg_llava_jax import reuse
from avg_llava_jax.commands import cli
from avg_llava_jax.commands import quickstart as sizes
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.configs import ablations
from avg_llava_jax.eval import evaluation, plots, policies, quickstart, routing
from avg_llava_jax.files import around, differing, same_run, write_whole
from avg_llava_jax.inference.api import AvgLlava

BEGIN, END = "<!-- ablations: python -m launch.bench.ablate -->\n", "<!-- end of ablations -->\n"
RANDOM = "random choice"
RECIPE, OUTCOME = "ablation.json", "outcome.json"
COLUMNS = {
    "accuracy": ("accuracy", ".3f"),
    "visual_tokens": ("visual tokens", ".1f"),
    "oracle_gap": ("oracle gap", ".2f"),
    "coarse_cheap": ("coarse to the two coarsest", ".0%"),
    "fine_close": ("fine to the two finest", ".0%"),
    "near_tokens": ("visual tokens of near", ".1f"),
}
PAPER = {
    "full": "71.1 / 66.3 / 1557 / 69.9",
    RANDOM: "69.7 / 56.8 / 1536 / 67.9",
    "no_instruction": "70.1 / 53.9 / 1525 / 69.0",
    "no_rank_loss": "70.1 / 64.8 / 1535 / 68.6",
    "no_ce_loss": "70.2 / 66.3 / 1551 / 69.4",
    "instruction_tuning": "70.5 / 50.9 / 1515 / 68.6",
}
"""ScienceQA / ChartQA / MME / MMBench of the 7B in the paper's ablation study."""

Measures = dict[str, float | None]
Records = list[policies.Record]


class Frozen(NamedTuple):
    """The frozen model's output under one un-padding: feedback (a folder) and records of the test questions."""

    feedback: pathlib.Path
    records: Records


def settings(name: str, seed: int, checkpoint: str, steps: int | None, pictures: int | None) -> Any:
    """The config of one router's run. steps, pictures: None = as in the config."""
    config = quickstart.router_config(checkpoint, steps, pictures, ablations.get_config(name))
    config.seed = seed
    config.data.workers = 0  # features are stored: reading them takes no process of its own
    config.checkpoint_every = config.steps
    return config


def ask(
    model: AvgLlava, unpad: str, config: Any, questions: list[evaluation.Question], workdir: pathlib.Path
) -> Frozen:
    """Run the frozen model under one un-padding."""
    workdir.mkdir(exist_ok=True)
    model = AvgLlava(dataclasses.replace(model.config, unpad=unpad), model.params, model.tokenizer)
    stored = quickstart.collect_feedback(model, config, workdir)
    file = workdir / "answers.jsonl"
    return Frozen(stored, evaluation.answer_all(model, questions, file, quickstart.ANSWER_TOKENS))


def fixed(config: ModelConfig, records: Records) -> dict[str, list[policies.Choice]]:
    """The choices of each fixed granularity."""
    return {f"always {g}": [(g,) * len(record["chosen"]) for record in records] for g in config.granularities}


def measure(config: ModelConfig, records: Records, picked: Sequence[policies.Choice]) -> Measures:
    """The measures of one policy, a row of the table."""
    found = policies.outcome(config, records, picked)
    best = max(policies.outcome(config, records, same)["accuracy"]["all"] for same in fixed(config, records).values())
    oracle = policies.outcome(config, records, policies.oracle_choices(config, records))["accuracy"]["all"]
    shares = found["chosen"]
    return {
        "accuracy": found["accuracy"]["all"],
        "visual_tokens": found["visual_tokens"],
        "oracle_gap": policies.oracle_gap(found["accuracy"]["all"], best, oracle),
        "coarse_cheap": sum(shares["coarse"][str(g)] for g in config.granularities[:2]),
        "fine_close": sum(shares["fine"][str(g)] for g in config.granularities[-2:]),
        "near_tokens": found["visual_tokens_by_kind"]["near"],
    }


def spread(runs: Sequence[Measures]) -> dict[str, tuple[float, float] | None]:
    """Mean and standard deviation of each measure over seeds, None where no run has it.

    The deviation of a single run is given as 0.
    """
    found: dict[str, tuple[float, float] | None] = {}
    for key in COLUMNS:
        values = [run[key] for run in runs if run[key] is not None]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        found[key] = (statistics.fmean(values), deviation) if values else None
    return found


def table(reference: dict[str, Measures], routers: dict[str, list[Measures]]) -> str:
    """The Markdown table: policies without a seed, then a line per router with its deviations."""
    titles = ["", *(title for title, _ in COLUMNS.values()), "paper: SQA / ChartQA / MME / MMB"]
    lines = [titles, ["---"] * len(titles)]
    for name, runs in {**{name: [one] for name, one in reference.items()}, **routers}.items():
        cells = [name]
        for key, value in spread(runs).items():
            form = COLUMNS[key][1]
            shown = "" if value is None else format(value[0], form)
            cells.append(f"{shown} ± {format(value[1], form)}" if value and len(runs) > 1 else shown)
        lines.append([*cells, PAPER.get(name, "")])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def recipe_of(config: Any) -> dict[str, str]:
    """Digests of what determines a router, beyond the frozen model: the content of ablation.json."""
    recipe = json.loads(config.to_json_best_effort())
    return {"recipe": reuse.digest(recipe), "code": reuse.code(("training", "models/router.py", "eval/routing.py"))}


def report(
    config: ModelConfig,
    records: Records,
    seeds: int,
    workdir: pathlib.Path,
    document: str,
    recipes: Callable[[str, int], dict[str, str]],
) -> str:
    """Write the table and the plot of all runs that are done with these recipes by name and seed; returns the table."""
    reference = {name: measure(config, records, same) for name, same in fixed(config, records).items()}
    curve = {name: spread([one]) for name, one in reference.items()}
    reference["oracle"] = measure(config, records, policies.oracle_choices(config, records))
    by_chance = [policies.random_choices(config, records, seed) for seed in range(seeds)]
    routers = {RANDOM: [measure(config, records, picked) for picked in by_chance]}
    for name in ablations.ABLATIONS:
        runs = sorted(int(path.name.rpartition("-")[2]) for path in workdir.glob(f"{name}-*") if path.is_dir())
        found = [_done(_folder(workdir, name, seed), recipes(name, seed)) for seed in runs]
        done = [one for one in found if one is not None]
        routers |= {name: done} if done else {}
    text = table(reference, routers)
    write_whole(workdir / "table.md", text)
    if document:
        before, after = around(document, BEGIN, END)
        write_whole(document, before + text + after)
    points = {name: spread(runs) for name, runs in routers.items()}
    plots.ablations(curve, points, workdir / plots.PLOTS / "ablations.png")
    return text


def run(
    workdir: pathlib.Path,
    checkpoint: str,
    names: Sequence[str] = tuple(ablations.ABLATIONS),
    seeds: int = 3,
    steps: int | None = None,
    pictures: int | None = None,
    questions: int = quickstart.QUESTIONS,
    document: str = "",
) -> str:
    """Run all ablations; returns the table. An interrupted run resumes.

    Raises:
      ValueError: an unknown name, a document without the lines around the table, or a workdir with results of other
        settings, of another frozen model, or of other code.
    """
    if document:
        around(document, BEGIN, END)
    todo = [(name, seed) for seed in range(seeds) for name in names]
    configs = {pair: settings(*pair, checkpoint, steps, pictures) for pair in todo}
    full = settings("full", 0, checkpoint, steps, pictures)
    recipe = flatten_dict(json.loads(full.to_json_best_effort()), sep=".")
    model = AvgLlava.load(checkpoint)
    frozen_by = reuse.made_by_frozen(model.config, model.params, ["training/rglf.py"])
    same_run(workdir, "ablations.json", {"questions": questions, **recipe}, frozen_by)

    def recipes(name: str, seed: int) -> dict[str, str]:
        return recipe_of(settings(name, seed, checkpoint, steps, pictures))

    asked = quickstart.test_questions(model, questions)
    unpads = {pair: config.model.unpad or model.config.unpad for pair, config in configs.items()}
    print("1. asking the frozen model", flush=True)
    wanted = dict.fromkeys([model.config.unpad, *unpads.values()])
    frozen = {unpad: ask(model, unpad, full, asked, workdir / unpad) for unpad in wanted}
    records = frozen[model.config.unpad].records

    todo = [pair for pair in todo if _done(_folder(workdir, *pair), recipes(*pair)) is None]
    print(f"2. {len(todo)} routers to train", flush=True)
    seen = list(routing.encode_all(model, [question.sample for question in asked])) if todo else []
    begin = time.monotonic()
    for done, pair in enumerate(todo, 1):
        name, seed = pair
        feedback, answers = frozen[unpads[pair]]
        folder = _folder(workdir, name, seed)
        if folder.exists() and (other := differing(_read(folder / RECIPE), recipes(name, seed))):
            reuse.set_aside(workdir, [folder.name], f"{folder.name} is of other {other}")
        folder.mkdir(exist_ok=True)
        write_whole(folder / RECIPE, json.dumps(recipes(name, seed)) + "\n")
        router = quickstart.train_router(configs[pair], feedback, folder)
        picked = policies.choices(router.config, routing.route_encoded(router, seen))
        found = measure(router.config, answers, picked)
        write_whole(folder / OUTCOME, json.dumps(found, indent=1) + "\n")
        left = int((time.monotonic() - begin) / done * (len(todo) - done))
        print(
            f"{done}/{len(todo)} {name}, seed {seed}: accuracy {found['accuracy']:.3f} from "
            f"{found['visual_tokens']:.1f} visual tokens  ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}",
            file=sys.stderr,
            flush=True,
        )
        report(model.config, records, seeds, workdir, document, recipes)
    return report(model.config, records, seeds, workdir, document, recipes)


def _folder(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    return workdir / f"{name}-{seed}"


def _done(folder: pathlib.Path, recipe: dict[str, str]) -> Measures | None:
    """The measures of a router that was trained by this recipe; None where there are none."""
    if not (folder / OUTCOME).exists() or differing(_read(folder / RECIPE), recipe):
        return None
    return _read(folder / OUTCOME)


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


flags.adopt_module_key_flags(sizes)
flags.set_default(sizes.WORKDIR, "workdirs/ablations")
ONLY = flags.DEFINE_list("only", list(ablations.ABLATIONS), "Which of configs/ablations.py, separated by commas.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Routers of each.", lower_bound=1)
DOCUMENT = flags.DEFINE_string("document", "", "A Markdown file that the table goes into as well: docs/ablations.md.")


def main() -> None:
    workdir = pathlib.Path(sizes.WORKDIR.value)
    steps, pictures, questions = sizes.STEPS.value, sizes.PICTURES.value, sizes.QUESTIONS.value
    print(run(workdir, cli.CHECKPOINT.value, ONLY.value, SEEDS.value, steps, pictures, questions, DOCUMENT.value))
    print(workdir / "table.md")


if __name__ == "__main__":
    cli.run(main, required=["workdir"])
