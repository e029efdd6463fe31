"""A model on the paper's benchmarks: its answers at every granularity, and the scores of each policy.

    rows --questions_of--> questions --evaluation.answer_all--> records --report--> metrics and tokens by policy
    reports --table.table--> our numbers beside the paper's, as Markdown and CSV

The policies are each fixed granularity, `random`, `adaptive` (the router), `oracle` (the cheapest granularity whose
answer scores best) and `cost weight W` (the router with that price of tokens, see `inference.choosing`). A row that
could not be asked counts as wrong for every policy.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import encode_prompt
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.packing import make_sample
from avg_llava_jax.eval import evaluation, policies, timing
from avg_llava_jax.eval.benchmarks import records, scoring
from avg_llava_jax.eval.benchmarks.letters import Pick, offered
from avg_llava_jax.eval.benchmarks.rows import Row
from avg_llava_jax.eval.benchmarks.tasks import Benchmark
from avg_llava_jax.eval.evaluation import Question
from avg_llava_jax.eval.policies import Choice, Record
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.guides import Guide

Report = dict[str, Any]
Skipped = list[dict[str, str]]


def questions_of(
    task: Benchmark, rows: Sequence[Row], model: AvgLlava, profile: str, guided: bool = False
) -> tuple[list[Question], Skipped]:
    """Each row as a question whose id is its number, and the rows that cannot be asked: `{"id", "reason", "detail"}`.

    guided: whether an answer to a question that asks for the letter of an option must be one.
    Questions about one image are adjacent, so that the image is encoded once.
    """
    questions, skipped = [], []
    order: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(rows):
        try:
            prompt, images = records.ask(task, row, profile)
            turns = [{"from": "human", "value": prompt}]
            tokens = encode_prompt(turns, model.tokenizer, model.config.template, len(images))
            sample = make_sample(str(index), tokens, images, task.title)
            evaluation.check_fits(model.config, sample)
        except BadSample as error:
            skipped.append({"id": str(index), "reason": error.reason, "detail": error.detail})
            continue
        order.setdefault(tuple(image.name for image in images), len(order))
        gold = task.gold(row.fields)
        reference = gold.letter if isinstance(gold, Pick) else str(gold)
        letters = offered(prompt) if guided else []
        guide = Guide.choice(letters) if letters else None
        grade = functools.partial(_grade, task, gold)
        questions.append(Question(sample, prompt, reference, grade, {"index": index}, guide))
    questions.sort(key=lambda question: order[tuple(image.name for image in question.sample.images)])
    return questions, skipped


def _grade(task: Benchmark, gold: Any, answer: str) -> float:
    """The provisional grade of one answer, for the progress bar; `_graded` gives the final ones."""
    return task.grade(scoring.without_reasoning(answer), gold, random.Random(0))


def weighted_choices(
    config: ModelConfig, questions: Sequence[Question], answered: Sequence[Record], weights: Sequence[float]
) -> dict[str, list[Choice]]:
    """Choices by policy, {"cost weight 0.4": ...}: what each cost weight chooses for the answered questions."""
    sizes = {question.sample.id: question.sample.sizes for question in questions}
    of_each = [sizes[record["id"]] for record in answered]
    scores = [np.asarray(record["scores"]) for record in answered]
    return {f"cost weight {each:g}": policies.weighted_choices(config, scores, of_each, each) for each in weights}


def report(
    task: Benchmark,
    config: ModelConfig,
    rows: Sequence[Row],
    answered: Sequence[Record],
    seconds: dict[str, Any] | None = None,
    seed: int = 0,
    weighted: Mapping[str, Sequence[Choice]] | None = None,
) -> Report:
    """The content of report.json for one benchmark.

    answered: records of `answer_all` for the questions of `questions_of`; rows without a record count as wrong.
    seconds: from `timing.seconds_per_answer`. weighted: from `weighted_choices`; choices that give the images of a
        question different granularities must have been answered by `answer_mixed`.

    Values by policy, {"fixed": {g: ...}, "random": ..., "adaptive": ..., "oracle": ...}: `metrics` by name; `score`,
    the headline metric as in the paper's table, and its 95 % `interval`; `accuracy`, the mean grade; `visual_tokens`
    per question and `tokens_an_image`; `token_cut` against the finest granularity; `chosen`, shares of granularities.
    `oracle_gap` is the router's share of the oracle's gain over the best fixed granularity, None if that gain is 0.
    """
    graded = _graded(task, config, rows, answered)
    choices: dict[str, list[Choice]] = {
        str(g): [(g,) * len(record["chosen"]) for record in graded] for g in config.granularities
    }
    choices["random"] = policies.random_choices(config, graded, seed)
    choices["adaptive"] = [tuple(record["chosen"]) for record in graded]
    choices["oracle"] = policies.oracle_choices(config, graded)
    choices |= weighted or {}

    parts = {name: _outcome(task, config, rows, graded, picked, seed) for name, picked in choices.items()}
    finest = parts[str(config.granularities[-1])]["visual_tokens"]
    for part in parts.values():
        part["token_cut"] = 1 - part["visual_tokens"] / finest if finest else 0.0
    best = max(parts[str(g)]["score"] for g in config.granularities)
    ladder = [str(g) for g in config.granularities]
    by_policy = {
        key: {"fixed": {g: parts[g][key] for g in ladder}}
        | {name: part[key] for name, part in parts.items() if name not in ladder}
        for key in parts["adaptive"]
    }
    return {
        "task": task.name,
        "title": task.title,
        "headline": task.headline,
        "full": task.full,
        "n": len(rows),
        "answered": len(answered),
        **by_policy,
        "oracle_gap": policies.oracle_gap(parts["adaptive"]["score"], best, parts["oracle"]["score"]),
        "seconds": {"answer": seconds},
        "speedup": None if seconds is None else seconds["fixed"][ladder[-1]] / seconds["adaptive"],
        "paper": {
            "llava_next": task.paper and task.paper.llava_next,
            "avg_llava": task.paper and task.paper.avg_llava,
            "token_cut": task.paper and task.paper.cut,
            "speedup": task.paper and task.paper.speedup,
        },
    }


def _graded(task: Benchmark, config: ModelConfig, rows: Sequence[Row], answered: Sequence[Record]) -> list[Record]:
    """The records with the grades of `avg-llava score`, which grades all rows in order, for each granularity."""

    def grades(answer: Callable[[Record], str | None]) -> list[float]:
        answers: list[str | None] = [None] * len(rows)
        for record in answered:
            answers[record["index"]] = answer(record)
        return scoring.grade(task, rows, answers)

    fixed = {g: grades(lambda record, g=g: record["answers"][g]) for g in config.granularities}
    adaptive = grades(lambda record: record["answer"])
    return [
        record
        | {"right": {g: fixed[g][record["index"]] for g in config.granularities}}
        | {"adaptive": record["adaptive"] | {"right": adaptive[record["index"]]}}
        for record in answered
    ]


def _outcome(
    task: Benchmark,
    config: ModelConfig,
    rows: Sequence[Row],
    graded: Sequence[Record],
    picked: Sequence[Choice],
    seed: int,
) -> dict[str, Any]:
    """Metrics, confidence interval, tokens and shares of granularities of one policy."""
    outcome = policies.outcome(config, graded, picked)
    answers: list[str | None] = [None] * len(rows)
    grades = [0.0] * len(rows)
    for record, choice in zip(graded, picked, strict=True):
        place = record["index"]
        if list(choice) == record["chosen"]:
            answers[place], grades[place] = record["answer"], record["adaptive"]["right"]
        elif len(set(choice)) > 1:
            answers[place], grades[place] = record["mixed"][choice]["answer"], record["mixed"][choice]["right"]
        else:
            granularity = choice[0]
            answers[place], grades[place] = record["answers"][granularity], record["right"][granularity]
    sums = scoring.tally(task, rows, answers, grades)
    found = scoring.metrics(task, sums)
    images = sum(len(record["chosen"]) for record in graded)
    return {
        "metrics": found,
        "score": task.scale * found.get(task.headline, 0.0),
        "interval": [task.scale * end for end in scoring.interval(task, sums, seed)],
        "accuracy": {"all": float(np.mean(grades))},
        "visual_tokens": outcome["visual_tokens"],
        "tokens_an_image": outcome["visual_tokens"] * len(graded) / max(1, images),
        "chosen": outcome["chosen"]["all"],
    }


def over_tasks(reports: Sequence[Report]) -> dict[str, Any]:
    """Shares of granularities by benchmark, as `plots.choices` draws them; `all` is the mean over benchmarks."""
    chosen = {one["title"]: one["chosen"]["adaptive"] for one in reports}
    mean = {g: float(np.mean([shares[g] for shares in chosen.values()])) for g in reports[0]["score"]["fixed"]}
    return {"chosen": chosen | {"all": mean}}


def seconds(
    model: AvgLlava, questions: Sequence[Question], answered: Sequence[Record], count: int, max_new_tokens: int
) -> dict[str, Any] | None:
    """`timing.seconds_per_answer` over the questions that fit at every granularity; None if there is none."""
    everywhere = {record["id"] for record in answered if None not in record["answers"].values()}
    timed = [question for question in questions if question.sample.id in everywhere]
    return timing.seconds_per_answer(model, timed, count, max_new_tokens) if count and timed else None
