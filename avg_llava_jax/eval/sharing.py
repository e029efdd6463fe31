"""The questions of a benchmark shared out over the processes of a run.

    answers.jsonl       all records, the first process's to write
    answers.1.jsonl     those of process 1 while the run goes on, merged into the other at its end, or by the next run

Each process has the model on its own devices, so they only meet where one of them has to wait for the files of others.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from avg_llava_jax.eval.evaluation import Question, answer_all, read_records
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
    """`evaluation.answer_all` by all processes, each its part; all of them return all records.

    folder: shared by all, with the file `answers.jsonl`. skipped: gets what any of them had to leave out.

    Raises:
      ConnectionError: a process was lost.
    """
    if hosts.first():
        merge(folder)
    process, processes = hosts.place()
    if processes == 1:
        return answer_all(model, questions, folder / ANSWERS, max_new_tokens, slots, skipped=skipped)
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
    """What the processes of this run, or of one that was killed, have answered: all of it in `answers.jsonl`."""
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
