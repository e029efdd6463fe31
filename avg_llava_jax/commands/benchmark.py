"""Fill the paper's table for a checkpoint: eleven benchmarks at every granularity.

    avg-llava benchmark --checkpoint=W --task=gqa,pope --data=DIR --workdir=OUT

The engine answers every question at every fixed granularity and at the router's choice. Answers are appended to
OUT/TASK/answers.jsonl, from which an interrupted run resumes and which `avg-llava score` reads; answers of other
weights, prompts, images or code are set aside in OUT/TASK/stale-1, OUT/TASK/stale-2, ... Each finished benchmark
writes OUT/TASK/report.json and plots; OUT/table.md and OUT/table.csv hold our numbers beside the paper's.

With --coordinator several processes share the questions and the workdir, each with the model on its own devices. Exit
codes are those of `avg-llava train`.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags

from avg_llava_jax.commands import cli, pictures, processes

TASK = flags.DEFINE_list("task", None, "Benchmarks by lmms-eval's names, separated by commas; `all` for the eleven.")
DATA = flags.DEFINE_string(
    "data", None, "A data set's folder as downloaded; for several tasks, the folder that holds them, or `hub`."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where answers, reports, plots and the table go.")
PROFILE = flags.DEFINE_enum("profile", "lmms_eval", ["lmms_eval", "paper"], "Prompts of today or of the paper's time.")
SLOTS = flags.DEFINE_integer("slots", 8, "Answers decoded at once.", lower_bound=1)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Length of the longest answer, in tokens; default: the benchmark's.", lower_bound=1
)
LIMIT = flags.DEFINE_integer("limit", None, "Rows of each split, for a quick run; default: all.", lower_bound=1)
GUIDED = flags.DEFINE_bool(
    "guided", False, "Make every answer to a question that asks for the letter of an option one of its letters."
)
TIMED = flags.DEFINE_integer("timed", 16, "Questions that are timed, one at a time; 0 = none.", lower_bound=0)
COST_WEIGHTS = flags.DEFINE_list("cost_weights", "0.1,0.4,1.6", "Prices of visual tokens, each a row of the report.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choice and of the bootstrap.")
flags.adopt_module_key_flags(processes)
flags.adopt_module_key_flags(pictures)


def run_task(model: Any, task: Any, data: str, weights: list[float]) -> dict[str, Any] | None:
    """Run one benchmark; returns the report, which the first process writes, and None on the other processes."""
    from avg_llava_jax.eval import benchmarking, evaluation, plots, sharing
    from avg_llava_jax.eval.benchmarks import records
    from avg_llava_jax.files import same_run, write_whole
    from avg_llava_jax.parallel import hosts

    folder = pathlib.Path(WORKDIR.value) / task.name
    rows = records.read(task, data, max_pixels=pictures.MAX_PIXELS.value)[: LIMIT.value]
    new_tokens = MAX_NEW_TOKENS.value or task.new_tokens
    settings = {
        "checkpoint": str(pathlib.Path(cli.CHECKPOINT.value).resolve()),
        "dtype": cli.DTYPE.value,
        "quantize": cli.QUANTIZE.value,
        "data": str(pathlib.Path(data).resolve()) if pathlib.Path(data).is_dir() else data,
        "profile": PROFILE.value,
        "max_new_tokens": new_tokens,
        "guided": GUIDED.value,
    }
    if hosts.first():
        same_run(folder, "benchmark.json", settings)
        print(f"{task.title}: {len(rows)} questions", flush=True)
    questions, skipped = benchmarking.questions_of(task, rows, model, PROFILE.value, GUIDED.value)
    answered = sharing.answer_together(model, questions, folder, new_tokens, SLOTS.value, skipped)
    if not hosts.first():
        return None
    skipped = [entry | {"where": rows[int(entry["id"])].where} for entry in skipped]
    write_whole(folder / "skipped.jsonl", "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped))
    for entry in skipped[:3]:
        print(f"skipped: {entry['where']}: {entry['reason']}: {entry['detail']}", file=sys.stderr)
    if not answered:
        raise ValueError(f"{task.name}: none of {len(rows)} rows can be asked, see {folder / 'skipped.jsonl'}")
    known = {record["id"] for record in answered}
    questions = [question for question in questions if question.sample.id in known]
    weighted = benchmarking.weighted_choices(model.config, questions, answered, weights)
    for picked in weighted.values():
        evaluation.answer_mixed(model, questions, answered, picked, folder / "mixed.jsonl", new_tokens, SLOTS.value)
    seconds = benchmarking.seconds(model, questions, answered, TIMED.value, new_tokens)
    report = benchmarking.report(task, model.config, rows, answered, seconds, SEED.value, weighted)
    report |= {"profile": PROFILE.value, "made_by": model.made_by}
    write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
    plots.accuracy_against_tokens(report, folder / plots.PLOTS / "accuracy_against_tokens.png")
    plots.examples(model.config, questions, answered, folder / plots.PLOTS / "examples.png")
    return report


def main() -> None:
    from avg_llava_jax.eval import benchmarking, plots
    from avg_llava_jax.eval.benchmarks import records, table, tasks
    from avg_llava_jax.files import write_whole
    from avg_llava_jax.parallel import hosts

    weights = cli.weights_of(COST_WEIGHTS.value)
    names = list(tasks.BENCHMARKS) if TASK.value == ["all"] else TASK.value
    chosen = [tasks.find(name) for name in names]
    processes.join()
    folders = [DATA.value] if len(chosen) == 1 else [records.locate(task, DATA.value) for task in chosen]
    workdir = pathlib.Path(WORKDIR.value)
    model = cli.load_model()
    reports = []
    for task, data in zip(chosen, folders, strict=True):
        report = run_task(model, task, data, weights)
        if report is None:
            continue
        reports.append(report)
        lines = table.table(reports)
        write_whole(workdir / "table.md", table.markdown(lines))
        write_whole(workdir / "table.csv", table.comma_separated(lines))
    if hosts.first():
        plots.choices(benchmarking.over_tasks(reports), workdir / plots.PLOTS / "choices.png")
        print(table.markdown(lines))
        print(workdir / "table.md")
    hosts.wait("everything to be written")


def command() -> None:
    cli.run(main, required=["task", "data", "workdir"])
