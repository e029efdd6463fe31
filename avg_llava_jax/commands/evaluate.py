"""Evaluate a checkpoint on your own questions, at every granularity and as routed.

    avg-llava evaluate --checkpoint=W --data=test.json --images=DIR --workdir=OUT

The outputs are OUT/report.json, OUT/answers.jsonl (an interrupted run resumes from it), OUT/skipped.jsonl, and
OUT/plots/examples.png: questions that were right though cheap, right because fine, and wrong because cheap.
Answers of other weights, prompts, images or code are set aside in OUT/stale-1, OUT/stale-2, ..., and asked again.
"""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

from avg_llava_jax.commands import cli, pictures

if TYPE_CHECKING:
    from avg_llava_jax.eval.evaluation import Question
    from avg_llava_jax.eval.policies import Record
    from avg_llava_jax.inference.api import AvgLlava

DATA = flags.DEFINE_string("data", None, "A LLaVA JSON or JSONL; a record's `kind` groups the report.")
IMAGES = flags.DEFINE_string("images", "", "Where its images are: a folder, a .zip or a .tar.")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the outputs.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 16, "Length of the longest answer, in tokens.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Slots, the answers decoded at once.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choice.")
MAX_SKIPPED_SHARE = flags.DEFINE_float("max_skipped_share", 0.05, "Largest share of records to skip.", 0.0, 1.0)
flags.adopt_module_key_flags(pictures)


def table(report: dict[str, Any]) -> str:
    """Accuracy by kind, visual tokens and seconds, a line per policy."""
    accuracy, tokens = report["accuracy"], report["visual_tokens"]
    kinds = list(accuracy["adaptive"])
    lines = [f"{'granularity':<12}" + "".join(f"{kind:>10}" for kind in kinds) + f"{'tokens':>10}{'seconds':>10}"]
    seconds = report["seconds"]["answer"]
    rows = [(g, accuracy["fixed"][g], tokens["fixed"][g], seconds["fixed"][g]) for g in accuracy["fixed"]]
    policies = "random", "adaptive", "escalation", "combined", "oracle"
    rows += [(name, accuracy[name], tokens[name], seconds.get(name)) for name in policies]
    for name, right, cost, took in rows:
        shares = "".join(f"{right[kind]:>10.3f}" for kind in kinds)
        lines.append(f"{name:<12}{shares}{cost:>10.1f}" + ("" if took is None else f"{took:>10.4f}"))
    return "\n".join(lines)


def answered(model: AvgLlava) -> tuple[list[Question], list[Record], int]:
    """Answer the questions that the flags name: the answered questions, their records, and the number of skipped ones.

    Records that WORKDIR already holds are not computed again.
    """
    from avg_llava_jax.data.sources import open_source
    from avg_llava_jax.eval import evaluation
    from avg_llava_jax.files import same_run, write_whole

    workdir = pathlib.Path(WORKDIR.value)
    source = open_source(DATA.value, IMAGES.value, pictures.MAX_PIXELS.value)
    same_run(
        workdir,
        "evaluation.json",
        {
            "checkpoint": str(pathlib.Path(cli.CHECKPOINT.value).resolve()),
            "data": DATA.value if DATA.value.startswith("jersey") else str(pathlib.Path(DATA.value).resolve()),
            "max_new_tokens": MAX_NEW_TOKENS.value,
            "quantize": cli.QUANTIZE.value,
        },
    )
    questions, skipped = evaluation.read_questions(source, model.tokenizer, model.config)
    records = evaluation.answer_all(
        model, questions, workdir / "answers.jsonl", MAX_NEW_TOKENS.value, BATCH_SIZE.value, skipped=skipped
    )
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped]
    write_whole(workdir / "skipped.jsonl", "".join(lines))
    if len(skipped) > MAX_SKIPPED_SHARE.value * len(source):
        raise ValueError(
            f"{len(skipped)} of {len(source)} records cannot be used, the first for {skipped[0]['reason']}: "
            f"see {workdir / 'skipped.jsonl'}, or raise --max_skipped_share"
        )
    known = {record["id"] for record in records}
    return [question for question in questions if question.sample.id in known], records, len(skipped)


def main() -> None:
    from avg_llava_jax.eval import plots, policies, timing
    from avg_llava_jax.files import write_whole

    model = cli.load_model()
    questions, records, skipped = answered(model)
    seconds = timing.seconds_per_answer(model, questions, max_new_tokens=MAX_NEW_TOKENS.value)
    report = policies.report(model.config, records, seconds, seed=SEED.value) | {"made_by": model.made_by}
    path = pathlib.Path(WORKDIR.value) / "report.json"
    write_whole(path, json.dumps(report, indent=1) + "\n")
    plots.examples(model.config, questions, records, path.parent / plots.PLOTS / "examples.png")
    print(table(report))
    print(f"{report['n']} questions, {skipped} skipped; {path}")


def command() -> None:
    cli.run(main, required=["data", "workdir"])
