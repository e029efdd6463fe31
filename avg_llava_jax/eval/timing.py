"""Measured seconds from a prompt to its greedy answer, one after another, for each way to choose."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.eval.evaluation import Question
from avg_llava_jax.inference import batching, generate
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.batching import by_key
from avg_llava_jax.inference.requests import Prepared, Request


def seconds_per_answer(
    model: AvgLlava, questions: Sequence[Question], count: int = 16, max_new_tokens: int = 16
) -> dict[str, Any]:
    """{"fixed": {g: mean}, "adaptive": mean} of `count` questions of `commonest`, compilation left out."""
    config, request = model.config, Request("", max_new_tokens=max_new_tokens)
    subset = commonest(config, questions, count)
    ways: dict[str, list[Prepared]] = {str(g): at_each(config, subset, request, g) for g in config.granularities}
    ways["adaptive"] = at_each(config, subset, request, None)
    seconds = in_turn(model, ways)
    return {"fixed": {str(g): seconds[str(g)] for g in config.granularities}, "adaptive": seconds["adaptive"]}


def commonest(config: ModelConfig, questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions of the commonest static sizes, so that few programs are needed.

    Their kinds in equal parts, as far as they go. Where some do, they fit at every granularity.
    """

    def sizes(question: Question) -> tuple[Any, ...]:
        sample = question.sample
        lengths = [batching.length_at(config, sample, (g,) * len(sample.sizes)) for g in config.granularities]
        limit = config.language.max_length
        rungs = tuple(generate.length_bucket(n, limit) for n in lengths) if max(lengths) <= limit else None
        return batching.prompt_shape(sample, config), bool(sample.sizes), rungs

    rows = max(
        by_key(questions, sizes).values(), key=lambda rows: (sizes(questions[rows[0]])[2] is not None, len(rows))
    )
    of_kind = by_key([questions[row] for row in rows], lambda question: question.sample.kind).values()
    turns = [rows[row] for turn in itertools.zip_longest(*of_kind) for row in turn if row is not None]
    return [questions[row] for row in turns[:count]]


def at_each(
    config: ModelConfig, questions: Sequence[Question], request: Request, granularity: int | None
) -> list[Prepared]:
    """The questions with all of their images at one granularity, None = as the router and the request's knobs say."""
    return [
        as_request(config, question, request, (granularity,) * len(question.sample.sizes)) for question in questions
    ]


def as_request(config: ModelConfig, question: Question, request: Request, choice: tuple[int | None, ...]) -> Prepared:
    """A question, its images chosen for as `Prepared` says, as a request with these options."""
    return Prepared(request, question.sample, batching.prompt_shape(question.sample, config), choice)


def in_turn(model: AvgLlava, ways: Mapping[str, Sequence[Prepared]], rounds: int = 1) -> dict[str, float]:
    """Seconds an answer of each way, the median of so many rounds; in each round every way is timed once.

    Requests of `commonest` at fixed granularities share a program for each; what the router chooses is
    compiled for by answering it once beforehand.
    """
    for requests in ways.values():
        routed = any(None in each.choice for each in requests)
        model.answer_prepared(requests if routed else requests[:1], batch_size=1)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, requests in ways.items():
            begin = time.perf_counter()
            model.answer_prepared(requests, batch_size=1)
            took[name].append((time.perf_counter() - begin) / len(requests))
    return {name: float(np.median(each)) for name, each in took.items()}
