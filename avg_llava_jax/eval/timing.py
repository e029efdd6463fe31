"""Measured seconds from a prompt to its greedy answer, one at a time, for each policy."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.packing import tiles_of
from avg_llava_jax.eval.escalation import Costs
from avg_llava_jax.eval.evaluation import Question
from avg_llava_jax.eval.policies import by_key
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.buckets import length_bucket
from avg_llava_jax.inference.choosing import FINER
from avg_llava_jax.inference.model import length_at
from avg_llava_jax.inference.requests import Prepared, Request


def seconds_per_answer(
    model: AvgLlava, questions: Sequence[Question], count: int = 16, max_new_tokens: int = 16
) -> dict[str, Any]:
    """{"fixed": {g: mean}, "adaptive": mean} seconds over `count` questions of `commonest`, without compilation."""
    config, request = model.config, Request("", max_new_tokens=max_new_tokens)
    subset = commonest(config, questions, count)
    ways: dict[str, list[Prepared]] = {str(g): at_each(config, subset, request, g) for g in config.granularities}
    ways["adaptive"] = at_each(config, subset, request, None)
    seconds = in_turn(model, ways)
    return {"fixed": {str(g): seconds[str(g)] for g in config.granularities}, "adaptive": seconds["adaptive"]}


def passes(config: ModelConfig, questions: Sequence[Question], request: Request) -> dict[str, list[Prepared]]:
    """The requests that `pass_costs` needs timed: each granularity, then with all finer passes; the router."""
    coarsest = config.granularities[0]
    further = dataclasses.replace(request, escalate=1.0)
    ways = {f"always {g}": at_each(config, questions, request, g) for g in config.granularities}
    ways |= {f"{g} and finer": at_each(config, questions, further, g) for g in config.granularities[:-1]}
    routed = dataclasses.replace(request, cost_weight=1e9)
    return ways | {f"routed to {coarsest}": at_each(config, questions, routed, None)}


def pass_costs(config: ModelConfig, seconds: Mapping[str, float], count: int) -> Costs:
    """Seconds of `passes`, as costs that are the same for `count` questions. seconds: by policy."""
    ladder = config.granularities
    first = [seconds[f"always {g}"] for g in ladder]
    later = [seconds[f"{g} and finer"] - seconds[f"always {g}"] for g in ladder[:-1]] + [0.0]  # all further passes
    following = [later[place] - later[min(place + FINER, len(ladder) - 1)] for place in range(len(ladder))]
    router = seconds[f"routed to {ladder[0]}"] - first[0]
    return Costs(np.tile(first, (count, 1)), np.tile(following, (count, 1)), max(router, 0.0))


def commonest(config: ModelConfig, questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions of the commonest static sizes, so that few programs are compiled.

    Kinds alternate while they last. Questions that fit at every granularity are preferred.
    """

    def sizes(question: Question) -> tuple[Any, ...]:
        sample = question.sample
        lengths = [length_at(config, sample, (g,) * len(sample.sizes)) for g in config.granularities]
        limit = config.language.max_length
        buckets = tuple(length_bucket(n, limit) for n in lengths) if max(lengths) <= limit else None
        text = length_bucket(len(sample.tokens.ids), limit)
        return tiles_of(sample, config), len(sample.sizes), text, buckets

    rows = max(
        by_key(questions, sizes).values(), key=lambda rows: (sizes(questions[rows[0]])[-1] is not None, len(rows))
    )
    of_kind = by_key([questions[row] for row in rows], lambda question: question.sample.kind).values()
    turns = [rows[row] for turn in itertools.zip_longest(*of_kind) for row in turn if row is not None]
    return [questions[row] for row in turns[:count]]


def at_each(
    config: ModelConfig, questions: Sequence[Question], request: Request, granularity: int | None
) -> list[Prepared]:
    """Requests for the questions with all images at one granularity; None = by the router and the request's options."""
    return [
        as_request(question, request, (granularity,) * len(question.sample.sizes)) for question in questions
    ]


def as_request(question: Question, request: Request, choice: tuple[int | None, ...]) -> Prepared:
    """A question as a request with these options. choice: as in `Prepared`."""
    return question.asked(request, choice)


def in_turn(model: AvgLlava, ways: Mapping[str, Sequence[Prepared]], rounds: int = 1) -> dict[str, float]:
    """Seconds per answer by policy, the median over `rounds`; each round times every policy once.

    A first round, which is not counted, compiles everything. The engine forgets images and prefixes before each answer.
    """
    took: dict[str, list[float]] = {name: [] for name in ways}
    model.engine_for([request for requests in ways.values() for request in requests], 1)  # one that holds them all
    for turn in range(rounds + 1):
        for name, requests in ways.items():
            begin = time.perf_counter()
            for request in requests:
                model.forget()
                model.answer_prepared([request], 1)
            if turn:
                took[name].append((time.perf_counter() - begin) / len(requests))
    return {name: float(np.median(each)) for name, each in took.items()}
