"""Sharing the questions of a benchmark among the processes of a run.

    answers.jsonl       all records, written by the first process
    answers.1.jsonl     records of process 1 during the run, merged into answers.jsonl at its end or by the next run

Each process has the model on its own devices; processes only wait for each other's files.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from avg_llava_jax.eval.evaluation import Question, answer_all, read_records, settle
from avg_llava_jax.eval.policies import Record
from avg_llava_jax.files import write_whole
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.parallel import hosts

ANSWERS = "answers.jsonl"


def answer_together(
    model: AvgLlava,
    questions: Sequence[Question],
    folder: pathlib.Path,
    max_new_tokens: int,
    slots: int,
    skipped: list[dict[str, str]],
) -> list[Record]:
    """`evaluation.answer_all` by all processes, a share each; every process returns all records.

    folder: shared by all, holds `answers.jsonl`. skipped: gets the questions that any process left out.

    Raises:
      ConnectionError: a process was lost.
    """
    process, processes = hosts.place()
    if hosts.first():
        merge(folder)
    if processes == 1:
        return answer_all(model, questions, folder / ANSWERS, max_new_tokens, slots, skipped=skipped)
    if hosts.first():
        settle(model, questions, folder / ANSWERS, max_new_tokens)
    hosts.wait(f"{folder.name}: to be asked")
    known = read_records(folder / ANSWERS)
    todo = [question for question in questions if question.sample.id not in known]
    own = todo[len(todo) * process // processes : len(todo) * (process + 1) // processes]
    left_out: list[dict[str, str]] = []
    part = folder / f"answers.{process}.jsonl"
    answer_all(model, own, part, max_new_tokens, slots, progress=hosts.first(), skipped=left_out)
    hosts.wait(f"{folder.name}: answered")
    if hosts.first():
        merge(folder)
    skipped += [entry for each in hosts.gather(left_out) for entry in each]  # waits for the merged file as well
    known = read_records(folder / ANSWERS)
    return [known[question.sample.id] for question in questions if question.sample.id in known]


def merge(folder: pathlib.Path) -> None:
    """Merge the records of all processes, of this run or of an interrupted one, into `answers.jsonl`."""
    parts = sorted(folder.glob("answers.*.jsonl"))
    if not parts:
        return
    records: dict[str, Record] = {}
    for path in (folder / ANSWERS, *parts):
        records |= read_records(path)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records.values()]
    write_whole(folder / ANSWERS, "".join(lines))
    for part in parts:
        part.unlink()
