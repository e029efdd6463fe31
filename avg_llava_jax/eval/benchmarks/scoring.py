"""Scoring any answers against a benchmark's rows.

A row without an answer scores 0 and counts in every denominator; a metric that depends on the words of an answer
(POPE's recall) takes it as empty.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avg_llava_jax.eval.benchmarks.rows import Row
from avg_llava_jax.eval.benchmarks.tasks import Benchmark

Answers = Sequence[str | None]


def grade(task: Benchmark, rows: Sequence[Row], answers: Answers) -> list[float]:
    """The grade of each answer, in [0, 1].

    Rows are graded in order: where MMMU draws an option for an answer that names none, its draws are those
    of `random.seed(0)`.
    """
    draw = random.Random(0)
    return [
        0.0 if answer is None else task.grade(without_reasoning(answer), task.gold(row.fields), draw)
        for row, answer in zip(rows, answers, strict=True)
    ]


def tally(task: Benchmark, rows: Sequence[Row], answers: Answers, grades: Sequence[float]) -> dict[str, np.ndarray]:
    """Sums per unit, see `metrics`."""
    said = ["" if answer is None else without_reasoning(answer) for answer in answers]
    return task.summary.tally([row.fields for row in rows], said, grades)


def metrics(task: Benchmark, sums: dict[str, np.ndarray]) -> dict[str, float]:
    """The benchmark's metrics by lmms-eval's names."""
    values = task.summary.metrics({name: values.sum() for name, values in sums.items()})
    return {name: float(value) for name, value in values.items()}


def interval(
    task: Benchmark, sums: dict[str, np.ndarray], seed: int = 0, samples: int = 1000, share: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the headline metric: units drawn with replacement, seeded."""
    names = list(sums)
    table = np.stack([sums[name] for name in names], axis=1)  # (units, sums)
    generator = np.random.default_rng(seed)
    totals = np.empty((samples, len(names)))
    for number in range(samples):
        totals[number] = np.bincount(generator.integers(len(table), size=len(table)), minlength=len(table)) @ table
    drawn = task.summary.metrics(dict(zip(names, totals.T, strict=True))).get(task.headline, np.zeros(samples))
    low, high = np.quantile(drawn, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def score(task: Benchmark, rows: Sequence[Row], answers: Answers) -> dict[str, Any]:
    """{"task", "n", "missing", "metrics"}: what `avg-llava score` writes."""
    sums = tally(task, rows, answers, grade(task, rows, answers))
    missing = sum(answer is None for answer in answers)
    return {"task": task.name, "n": len(rows), "missing": missing, "metrics": metrics(task, sums)}


def without_reasoning(answer: str) -> str:
    """An answer as lmms-eval hands it to its scorers: reasoning blocks cut out, stripped.

    >>> without_reasoning("<think>Hm.</think> B"), without_reasoning("Hm.</think> B")
    ('B', 'B')
    """
    for start, end in (("<think>", "</think>"), ("<analysis>", "</analysis>")):
        while start in answer and end in answer[answer.find(start) :]:
            before, _, rest = answer.partition(start)
            answer = before + rest.partition(end)[2]
        if end in answer and start not in answer:
            answer = answer.rpartition(end)[2]
    return answer.strip()


def read_answers(path: str | os.PathLike[str], count: int) -> list[str | None]:
    """Answers by row, None where there is none, from lines `{"index": row, "answer": text or null}`.

    Raises:
      FileNotFoundError, ValueError: no such file, or a line that is wrong, by its number (from 1).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--answers={path}: no such file")
    answers: dict[int, str | None] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(entry, dict) or "index" not in entry or "answer" not in entry:
            raise ValueError(f'{where}: must be {{"index": row of the split, "answer": text}}')
        index, answer = entry["index"], entry["answer"]
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise ValueError(f"{where}: `index` is {index!r}, the split has rows 0 to {count - 1}")
        if index in answers:
            raise ValueError(f"{where}: `index` {index} was answered before")
        if not isinstance(answer, str | None):
            raise ValueError(f"{where}: `answer` is {answer!r}, not a text (null where there is none)")
        answers[index] = answer
    return [answers.get(index) for index in range(count)]
