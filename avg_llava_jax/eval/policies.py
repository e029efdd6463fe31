"""Policies, ways to choose granularities (fixed, random, adaptive, oracle), scored from the answers at fixed ones.

`escalation` has those that answer twice; `report` covers both.

Records come from `evaluation.answer_all`. A choice is a tuple of granularities, one per image of a question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from avg_llava_jax.config import Granularity, ModelConfig
from avg_llava_jax.data.tiles import Size
from avg_llava_jax.eval import escalation
from avg_llava_jax.inference import choosing

Record = escalation.Record
Choice = tuple[Granularity, ...]


def by_key(items: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[int]]:
    """Row numbers of the items by key, in order of appearance."""
    found: dict[Any, list[int]] = {}
    for row, item in enumerate(items):
        found.setdefault(key(item), []).append(row)
    return found


def choices(config: ModelConfig, scores: Sequence[np.ndarray]) -> list[Choice]:
    """The router's argmax for each image of each question; a tie goes to the coarser granularity."""
    return [tuple(config.granularities[int(np.argmax(row))] for row in rows) for rows in scores]


def weighted_choices(
    config: ModelConfig, scores: Sequence[np.ndarray], sizes: Sequence[Sequence[Size]], cost_weight: float
) -> list[Choice]:
    """The choices of the router under `Request.cost_weight`. sizes: of the images of each question."""
    costs = [choosing.token_costs(config, each) for each in sizes]
    places = [
        choosing.best_places(np.reshape(rows, cost.shape), cost, cost_weight, None)  # without images no rows
        for rows, cost in zip(scores, costs, strict=True)
    ]
    return [tuple(config.granularities[place] for place in row) for row in places]


def random_choices(config: ModelConfig, records: Sequence[Record], seed: int = 0) -> list[Choice]:
    """One seeded random granularity per question, for all of its images."""
    rng = random.Random(seed)
    drawn = [rng.choice(config.granularities) for _ in records]
    return [(g,) * len(record["chosen"]) for g, record in zip(drawn, records, strict=True)]


def oracle_choices(config: ModelConfig, records: Sequence[Record]) -> list[Choice]:
    """The cheapest granularity with the best grade; where no answer is right, the cheapest of all."""
    picked = [max(config.granularities, key=record["right"].__getitem__) for record in records]
    return [(g,) * len(record["chosen"]) for g, record in zip(picked, records, strict=True)]


def outcome(config: ModelConfig, records: Sequence[Record], picked: Sequence[Choice]) -> dict[str, Any]:
    """Accuracy, mean visual tokens (over all, and by kind) and the share of each granularity by kind.

    picked: the granularities of the images of each question.

    Raises:
      ValueError: a choice with different granularities that neither the router of `answer_all` chose nor `answer_mixed`
        answered.
    """
    right, cost, chosen = [], [], []
    for record, choice in zip(records, picked, strict=True):
        if len(set(choice)) > 1:
            known = record.get("mixed", {}) | {tuple(record["chosen"]): record["adaptive"]}
            if choice not in known:
                raise ValueError(f"question {record['id']} was never answered at granularities {list(choice)}")
            right.append(known[choice]["right"])
            cost.append(known[choice]["visual_tokens"])
        else:
            granularity = choice[0] if choice else config.granularities[0]
            right.append(record["right"][granularity])
            cost.append(record["visual_tokens"][granularity])
        chosen.append(choice)
    return _summary(config, records, right, cost, chosen)


def _summary(
    config: ModelConfig,
    records: Sequence[Record],
    right: Sequence[float],
    cost: Sequence[float],
    chosen: Sequence[Choice],
) -> dict[str, Any]:
    """`outcome` of grades, visual tokens and choices, one of each per record."""
    kinds = _kinds(records)
    shares = {}
    for kind, rows in kinds.items():
        of_kind = [g for row in rows for g in chosen[row]]
        shares[kind] = {str(g): of_kind.count(g) / max(1, len(of_kind)) for g in config.granularities}
    tokens = {kind: float(np.mean([cost[row] for row in rows])) for kind, rows in kinds.items()}
    return {
        "accuracy": {kind: float(np.mean([right[row] for row in rows])) for kind, rows in kinds.items()},
        "visual_tokens": tokens["all"],
        "visual_tokens_by_kind": tokens,
        "chosen": shares,
    }


def examples(config: ModelConfig, records: Sequence[Record], count: int) -> dict[str, list[int]]:
    """Row numbers of instructive questions about one image, at most `count` of each sort, the clearest first.

    right, cheap          right below the finest granularity
    right, fine           right, and wrong at every coarser granularity
    wrong because cheap   wrong, and right at a finer granularity

    A grade of at least 0.5 counts as right.
    """
    found: dict[str, list[tuple[int, int]]] = {"right, cheap": [], "right, fine": [], "wrong because cheap": []}
    for row, record in enumerate(records):
        if len(record["chosen"]) != 1:
            continue
        place = config.granularities.index(record["chosen"][0])
        coarser, (right, *finer) = (
            [record["right"][g] >= 0.5 for g in part]
            for part in (config.granularities[:place], config.granularities[place:])
        )
        if right and finer:
            found["right, cheap"].append((place, row))
        if right and coarser and not any(coarser):
            found["right, fine"].append((-place, row))
        if not right and any(finer):
            found["wrong because cheap"].append((place, row))
    return {sort: [row for _, row in sorted(rows)[:count]] for sort, rows in found.items()}


def oracle_gap(score: float, best_fixed: float, oracle: float) -> float | None:
    """The share of the oracle's gain over the best fixed granularity that a policy achieves, None for no gain."""
    gain = oracle - best_fixed
    return (score - best_fixed) / gain if gain > 1e-9 else None


def report(
    config: ModelConfig,
    records: Sequence[Record],
    seconds: dict[str, Any] | None = None,
    adaptive: Sequence[Choice] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The content of report.json; granularities are strings, shares and accuracies lie in [0, 1].

    adaptive: the choices to report as adaptive; default those of the router in `answer_all`.

    `escalation` begins at the coarsest granularity, `combined` at the router's choice under a cost weight; an answer of
    either that is not certain enough is given again at the finest. `fitted` holds their cost weights (None = coarsest)
    and thresholds: the cheapest that are at least as accurate as the best fixed granularity on one half of the
    questions, measured on the other, in both directions.
    """
    if not records:
        raise ValueError("there is no question to report on")
    adaptive = [tuple(record["chosen"]) for record in records] if adaptive is None else adaptive
    fixed = {
        str(g): outcome(config, records, [(g,) * len(record["chosen"]) for record in records])
        for g in config.granularities
    }
    rest = {
        "random": outcome(config, records, random_choices(config, records, seed)),
        "adaptive": outcome(config, records, adaptive),
        "oracle": outcome(config, records, oracle_choices(config, records)),
    }
    table, fitted = escalation.table(config, records), {}
    for name, family in (("escalation", escalation.ESCALATION), ("combined", escalation.COMBINED)):
        each = [escalation.cheapest(table, family, half) for half in (0, 1)]
        found = escalation.cross_fitted([escalation.apply_policy(table, policy) for policy in each], table.half)
        chosen = [
            (config.granularities[place],) * len(record["chosen"])
            for place, record in zip(found.last, records, strict=True)
        ]
        rest[name] = _summary(config, records, found.right, found.cost, chosen)
        fitted[name] = [
            {"cost_weight": weight if weight < float("inf") else None, "escalate": threshold}
            for weight, threshold in each
        ]

    def both(key: str) -> dict[str, Any]:
        return {"fixed": {g: part[key] for g, part in fixed.items()}} | {name: part[key] for name, part in rest.items()}

    return {
        "accuracy": both("accuracy"),
        "visual_tokens": both("visual_tokens"),
        "visual_tokens_by_kind": both("visual_tokens_by_kind"),
        "chosen": rest["adaptive"]["chosen"],
        "fitted": fitted,
        "seconds": {"answer": seconds},
        "n": len(records),
        "n_by_kind": {kind: len(rows) for kind, rows in _kinds(records).items()},
    }


TEMPERATURES = np.geomspace(0.05, 20, 241)
"""The grid that `temperature` searches, in steps of 2.5 %."""


def temperature(config: ModelConfig, records: Sequence[Record]) -> dict[str, float]:
    """The router's temperature T under which softmax(scores / T) predicts the oracle's choices best.

    T minimises the mean negative log-likelihood (nats per image) of the oracle's choices over every other question;
    the questions between measure it: {"temperature", "nll", "nll_at_1"}. Choosing does not need T, and no checkpoint
    holds it: argmax(scores / T - w cost) = argmax(scores - w T cost), so T only changes the unit of `cost_weight`.
    A weight of w nats of a calibrated router is cost_weight = w * T.

    Raises:
      ValueError: fewer than two questions have images.
    """
    oracle = oracle_choices(config, records)
    rows = [
        (np.asarray(record["scores"]), [config.granularities.index(g) for g in best])
        for record, best in zip(records, oracle, strict=True)
        if best
    ]
    if len(rows) < 2:
        raise ValueError("a temperature is fitted on one half of the questions with images and measured on the other")

    def nll(part: Sequence[tuple[np.ndarray, list[int]]], temperatures: np.ndarray) -> np.ndarray:
        scores = np.concatenate([scores for scores, _ in part]) / temperatures[:, None, None]
        best = np.concatenate([places for _, places in part])
        scores = scores - scores.max(axis=-1, keepdims=True)
        logs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        return -logs[:, np.arange(len(best)), best].mean(axis=-1)

    fitted = float(TEMPERATURES[np.argmin(nll(rows[::2], TEMPERATURES))])
    held_out, plain = nll(rows[1::2], np.array([fitted, 1.0]))
    return {"temperature": fitted, "nll": float(held_out), "nll_at_1": float(plain)}


def _kinds(records: Sequence[Record]) -> dict[str, list[int]]:
    """Row numbers by kind in order of appearance, and `all` of them."""
    kinds = by_key(records, lambda record: record["kind"])
    kinds.pop(None, None)
    return kinds | {"all": list(range(len(records)))}
