"""Policies that answer at a coarse granularity and, while the answer is not certain enough, again at a finer one.

A policy is a pair (cost_weight, escalate), as in `Request`: the router chooses where to begin at that price of tokens
(infinite: at the coarsest granularity), and an answer whose certainty is below `escalate` is replaced by that of the
next pass, `choosing.FINER` steps finer, up to the finest. Every pass is counted. (w, 0) is the router alone,
(infinite, t) escalation alone; all pairs are both together.

Policies are fitted on one half of the questions and measured on the other, in both directions, so that no question has
a part in the choice of its own policy. Questions about the same images are in the same half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.packing import Sample, tiles_of
from avg_llava_jax.inference.choosing import FINER
from avg_llava_jax.parallel.costs import encoder_flops, language_flops, router_flops

Record = dict[str, Any]

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, float("inf"))
THRESHOLDS = (0.0, *(1 / (1 + np.exp(-np.arange(-2, 14.1, 0.5)))).tolist(), 1.0)


class Policy(NamedTuple):
    """Where the router begins, and the certainty below which it escalates; see the module's docstring."""

    cost_weight: float
    escalate: float


ROUTER = [Policy(weight, 0.0) for weight in WEIGHTS]
ESCALATION = [Policy(WEIGHTS[-1], threshold) for threshold in THRESHOLDS]
COMBINED = [Policy(weight, threshold) for weight in WEIGHTS for threshold in THRESHOLDS]


class Table(NamedTuple):
    """Answers to n questions, all images of a question at one granularity.

    right, certainty, tokens, scores: (n, G), grades, certainties, visual tokens, and mean router scores of the images.
    finest: int (n,), the place of the finest granularity at which the prompt fits. half: int (n,), 0 or 1.
    """

    right: np.ndarray
    certainty: np.ndarray
    tokens: np.ndarray
    scores: np.ndarray
    finest: np.ndarray
    half: np.ndarray


def table(config: ModelConfig, records: Sequence[Record], seed: int = 0) -> Table:
    """The table of records of `evaluation.answer_all`. seed: of the halves."""

    def rows(key: str) -> np.ndarray:
        return np.array([[record[key][g] for g in config.granularities] for record in records], float)

    scores = [np.reshape(record["scores"], (-1, len(config.granularities))) for record in records]
    fits = np.array([[record["answers"][g] is not None for g in config.granularities] for record in records])
    groups: dict[Any, int] = {}
    group = [groups.setdefault(tuple(record["images"]) or record["id"], len(groups)) for record in records]
    halves = np.random.default_rng(seed).permutation(len(groups)) % 2
    return Table(
        rows("right"),
        rows("certainty"),
        rows("visual_tokens"),
        np.array([each.mean(axis=0) if len(each) else each.sum(axis=0) for each in scores]),
        fits.shape[1] - 1 - np.argmax(fits[:, ::-1], axis=1),
        halves[group],
    )


def following(table: Table) -> np.ndarray:
    """Places int (n, G) of the pass that follows one at each granularity; the finest that fits is followed by itself.

    With five granularities that all fit: [2, 3, 4, 4, 4]. If only the first four fit: [2, 3, 3, 3, 4].
    """
    places = np.arange(table.tokens.shape[1])
    return np.maximum(np.minimum(places + FINER, table.finest[:, None]), places)


def begin(table: Table, cost_weight: float) -> np.ndarray:
    """Places int (n,) of the granularities where the router begins at a price of tokens."""
    if np.isinf(cost_weight):
        return np.zeros(len(table.tokens), int)
    shares = table.tokens / np.maximum(table.tokens[:, -1:], 1)
    return np.argmax(table.scores - cost_weight * shares, axis=1)


class Outcome(NamedTuple):
    """The questions under a policy: grades and costs (n,), and the places int (n,) of their last granularities."""

    right: np.ndarray
    cost: np.ndarray
    last: np.ndarray


class Costs(NamedTuple):
    """What answers take, in one unit.

    first_pass: (n, G), answers at each granularity, images included. next_pass: (n, G), the pass that follows one at
    each, see `following`. router: the choice of where to begin.
    """

    first_pass: np.ndarray
    next_pass: np.ndarray
    router: float = 0.0


def token_costs(table: Table) -> Costs:
    """Visual tokens of every pass."""
    return Costs(table.tokens, np.take_along_axis(table.tokens, following(table), axis=1))


def flop_costs(config: ModelConfig, samples: Sequence[Sample], table: Table) -> Costs:
    """FLOPs by formula, in billions: encoder, router and prefill, without the decoding of answers.

    A further pass counts its whole prompt: the text in front of an image, which it may share, is not subtracted.
    """
    tiles = np.array([tiles_of(sample, config) for sample in samples])
    text = np.array([len(sample.tokens.ids) - len(sample.sizes) for sample in samples])
    encoder = np.array([encoder_flops(config, int(count)) for count in tiles])
    prefill = np.vectorize(lambda length: language_flops(config.language, 1, int(length), 1), otypes=[float])
    passes = prefill(text[:, None] + table.tokens) / 1e9
    router = np.mean([router_flops(config, 1, int(count)) for count in tiles])
    further = np.take_along_axis(passes, following(table), axis=1)
    return Costs(encoder[:, None] / 1e9 + passes, further, float(router) / 1e9)


def apply_policy(table: Table, policy: Policy, costs: Costs | None = None) -> Outcome:
    """The questions under a policy. costs: default visual tokens.

    With certainties [[.4, .9], [.8, .9]], tokens [[10, 40], [10, 40]] and the policy (infinite, .5), the first question
    costs 10 + 40 and has the grade of the second column, the second costs 10.
    """
    costs = token_costs(table) if costs is None else costs
    found = escalated(table, begin(table, policy.cost_weight), policy.escalate, costs)
    return found if np.isinf(policy.cost_weight) else found._replace(cost=found.cost + costs.router)


def escalated(table: Table, first: np.ndarray, escalate: float, costs: Costs) -> Outcome:
    """The questions where the first passes are at the places int (n,), and each uncertain pass is followed by another.

    With certainties [.3, .9, .6, .9, .9], all passes from place 0 and a threshold of .7: places 0, 2, 4.
    """
    row, further, last = np.arange(len(first)), following(table), first
    cost = costs.first_pass[row, first]
    while (again := (table.certainty[row, last] < escalate) & (further[row, last] > last)).any():
        cost = cost + np.where(again, costs.next_pass[row, last], 0)
        last = np.where(again, further[row, last], last)
    return Outcome(table.right[row, last], cost, last)


def cross_fitted(of_each: Sequence[Outcome], half: np.ndarray) -> Outcome:
    """The questions of each half (n,) under the policy that was fitted on the other one. of_each: by fitted half."""
    return Outcome(*(np.where(half == 1, *parts) for parts in zip(*of_each, strict=True)))


def means(found: Outcome, rows: np.ndarray) -> tuple[float, float]:
    """Mean grade and mean cost of some questions, bool (n,)."""
    return float(found.right[rows].mean()), float(found.cost[rows].mean())


def cheapest(table: Table, family: Sequence[Policy], half: int) -> Policy:
    """The cheapest policy that is at least as accurate on one half as the best fixed granularity.

    Where there is none, the most accurate.
    """
    rows = table.half == half
    goal = table.right[rows].mean(axis=0).max() if rows.any() else 0.0
    found = [means(apply_policy(table, each), rows) for each in family if rows.any()]
    ranks = [(min(accuracy - goal, 0.0), -cost) for accuracy, cost in found]
    return family[ranks.index(max(ranks))] if ranks else family[-1]


def curve(
    table: Table, family: Sequence[Policy], budgets: Sequence[float], costs: Costs | None = None
) -> list[dict[str, float]]:
    """{"cost", "accuracy"} at each budget: the most accurate policy within it on one half, measured on the other.

    Where no policy is within the budget, the cheapest.
    """
    every = [apply_policy(table, policy, costs) for policy in family]
    on_half = [[means(found, table.half == half) for found in every] for half in (0, 1)]
    points = []
    for budget in budgets:
        best = []
        for found in on_half:
            ranks = [(min(budget - cost, 0.0), accuracy, -cost) for accuracy, cost in found]
            best.append(every[ranks.index(max(ranks))])
        accuracy, cost = means(cross_fitted(best, table.half), np.ones(len(table.half), bool))
        points.append({"cost": cost, "accuracy": accuracy})
    return points


def accuracy_at(points: Sequence[dict[str, float]], cost: float | np.ndarray) -> Any:
    """The accuracy of a curve at one cost or several, linear between its points and constant beyond them."""
    ordered = sorted((point["cost"], point["accuracy"]) for point in points)
    return np.interp(cost, *zip(*ordered, strict=True))


def area(points: Sequence[dict[str, float]], low: float, high: float) -> float:
    """The mean accuracy of a curve between two costs."""
    values = accuracy_at(points, np.linspace(low, high, 1001))
    return float(np.mean((values[1:] + values[:-1]) / 2))


def frontier(table: Table, costs: Costs | None = None, steps: int = 24) -> dict[str, Any]:
    """Accuracy against mean cost: {"curves": {name: points}, "areas": {name: mean accuracy}}.

    fixed: each granularity. random: the router's choices, given to other questions. router, escalation, combined: the
    families above at `steps` budgets, fitted on the other half. oracle: the best granularity of each question, at
    prices. Areas are taken from the cost of the coarsest fixed granularity to that of the finest.
    """
    costs = token_costs(table) if costs is None else costs
    right, mean = table.right, costs.first_pass.mean(axis=0)
    low, high = float(mean[0]), float(mean[-1])
    budgets = np.geomspace(low, high, steps) if low > 0 else np.linspace(low, high, steps)

    def points(chosen: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """One point for each (n, G) of shares."""
        return [
            {
                "cost": float((share * costs.first_pass).sum(axis=1).mean()),
                "accuracy": float((share * right).sum(axis=1).mean()),
            }
            for share in chosen
        ]

    one_hot = np.eye(right.shape[1])
    shares = [one_hot[begin(table, weight)].mean(axis=0)[None] for weight in WEIGHTS]
    prices = np.append(0.0, np.geomspace(1e-3, 10, 40)) / max(high, 1e-9)
    curves = {
        "fixed": points([column[None] for column in one_hot]),
        "random": points(shares),
        "router": curve(table, ROUTER, budgets, costs),
        "escalation": curve(table, ESCALATION, budgets, costs),
        "combined": curve(table, COMBINED, budgets, costs),
        "oracle": points([one_hot[np.argmax(right - (price + 1e-9) * costs.first_pass, axis=1)] for price in prices]),
    }
    return {"curves": curves, "areas": {name: area(found, low, high) for name, found in curves.items()}}
