"""Policies that answer twice: their costs, what is fitted where, and the frontier."""

import dataclasses

import numpy as np
import pytest

from avg_llava_jax.eval import escalation, policies, timing
from avg_llava_jax.eval.escalation import Policy


def records(config, count=400, seed=0):
    """Questions whose coarse answer is right where it is certain; a router that knows a part of it."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        hard = rng.random() < 0.5
        coarse, finest = bool(rng.random() < (0.4 if hard else 0.99)), bool(rng.random() < 0.98)
        sure = float(np.clip(rng.normal(0.9 if coarse else 0.5, 0.15), 0.01, 0.999))
        right = dict(zip(config.granularities, (coarse, coarse, finest), strict=True))
        scores = np.array([0.0, -1.0, 1.0 if hard else -1.0]) + 0.7 * rng.normal(size=3)
        found.append(
            {
                "id": str(number),
                "kind": "hard" if hard else "easy",
                "images": [f"picture {number // 2}"],
                "right": right,
                "answers": dict.fromkeys(config.granularities, "x"),
                "certainty": dict(zip(config.granularities, (sure, 0.9, 0.95), strict=True)),
                "visual_tokens": {4: 8, 8: 16, 16: 32},
                "scores": [scores.tolist()],
                "chosen": [config.granularities[int(np.argmax(scores))]],
                "adaptive": {},
            }
        )
    return found


def test_every_pass_is_counted(tiny):
    made = records(tiny, 3)
    for record, sure in zip(made, (0.4, 0.8, 0.4), strict=True):
        record |= {"certainty": {4: sure, 8: 0.3, 16: 0.1}, "right": {4: 0.2, 8: 0.5, 16: 1.0}}
        record["scores"] = [[0.0, 0.0, 1.0]]
    made[2]["answers"] = {4: "x", 8: "x", 16: None}  # it does not fit at the finest
    table = escalation.table(tiny, made)
    found = escalation.apply_policy(table, Policy(float("inf"), 0.5))
    assert found.cost.tolist() == [8 + 32, 8, 8 + 16] and found.right.tolist() == [1.0, 0.2, 0.5]
    assert found.last.tolist() == [2, 0, 1]
    # The router begins at the finest here: there is nothing finer. At a price of 2 it begins at 4, worth -0.5 to -1.0.
    assert escalation.apply_policy(table, Policy(0.0, 1.0)).cost.tolist() == [32, 32, 32]
    assert escalation.apply_policy(table, Policy(2.0, 0.0)).cost.tolist() == [8, 8, 8]
    first, again = np.array([[1.0, 2.0, 5.0]] * 3), np.array([[4.0, 3.5, 0.0]] * 3)
    seconds = escalation.Costs(first, again, router=0.25)  # the router is asked where its price is finite
    assert escalation.apply_policy(table, Policy(float("inf"), 0.5), seconds).cost.tolist() == [5, 1, 5]
    assert escalation.apply_policy(table, Policy(2.0, 0.5), seconds).cost.tolist() == [5.25, 1.25, 5.25]


def test_passes_climb_as_in_the_engine(tiny):
    """Places 0, 2, 4 of a ladder of five, each while the pass before was not certain; timed sums give each pass."""
    ladder = dataclasses.replace(tiny, scaler=dataclasses.replace(tiny.scaler, halvings=4))
    tokens = np.array([[1.0, 2.0, 4.0, 8.0, 16.0]] * 4)
    sure = np.array([[0.3, 0.9, 0.6, 0.9, 0.1], [0.3, 0.9, 0.8, 0.9, 0.1], [0.8, 0, 0, 0, 0], [0.0, 0, 0, 0, 0]])
    right = np.arange(20).reshape(4, 5) / 20
    table = escalation.Table(right, sure, tokens, np.zeros((4, 5)), np.array([4, 4, 4, 3]), np.zeros(4, int))
    assert escalation.following(table).tolist() == [[2, 3, 4, 4, 4]] * 3 + [[2, 3, 3, 3, 4]]
    found = escalation.apply_policy(table, Policy(float("inf"), 0.7))
    assert found.last.tolist() == [4, 2, 0, 3] and found.cost.tolist() == [1 + 4 + 16, 1 + 4, 1, 1 + 4 + 8]
    assert found.right.tolist() == [right[0, 4], right[1, 2], right[2, 0], right[3, 3]]
    costs = {f"always {g}": 1.0 + g for g in ladder.granularities} | {"routed to 1": 2.5}
    costs |= {"1 and finer": 2 + 3 + 10, "2 and finer": 3 + 5 + 10, "4 and finer": 5 + 11, "8 and finer": 9 + 12}
    seconds = timing.pass_costs(ladder, costs, 4)
    assert seconds.next_pass[0].tolist() == [13 - 11, 15 - 12, 11, 12, 0] and seconds.router == 0.5


def test_the_price_is_that_of_the_engine(tiny):
    made = records(tiny, 50)
    table, scores = escalation.table(tiny, made), [np.asarray(record["scores"]) for record in made]
    costs = np.array([[8, 16, 32]])
    for weight in (0.0, 0.5, 3.0):
        wanted = [policies.choosing.best_places(each, costs, weight, None)[0] for each in scores]
        assert escalation.begin(table, weight).tolist() == wanted


def test_what_is_fitted_on_one_half_is_measured_on_the_other(tiny):
    made = records(tiny)
    table = escalation.table(tiny, made)
    for first, second in zip(table.half[::2], table.half[1::2], strict=True):
        assert first == second, "questions about one picture are in one half"
    assert 150 < table.half.sum() < 250
    before = [escalation.cheapest(table, escalation.COMBINED, 0)]
    other = table._replace(right=np.where(table.half[:, None] == 1, 1 - table.right, table.right))
    assert [escalation.cheapest(other, escalation.COMBINED, 0)] == before
    report = policies.report(tiny, made)
    assert set(report["accuracy"]) == {"fixed", "random", "adaptive", "oracle", "escalation", "combined"}
    by_half = [Policy(float("inf"), each["escalate"]) for each in report["fitted"]["escalation"]]
    assert by_half == [escalation.cheapest(table, escalation.ESCALATION, half) for half in (0, 1)]
    parts = [escalation.apply_policy(table, policy) for policy in by_half]
    right = np.where(table.half == 0, parts[1].right, parts[0].right)
    assert report["accuracy"]["escalation"]["all"] == pytest.approx(right.mean())
    tokens = np.where(table.half == 0, parts[1].cost, parts[0].cost)
    assert report["visual_tokens"]["escalation"] == pytest.approx(tokens.mean())
    assert report["visual_tokens_by_kind"]["escalation"]["easy"] < report["visual_tokens_by_kind"]["escalation"]["hard"]


def test_the_frontier(tiny):
    """Together router and certainty are above the router, and above certainty but for the noise of fitting."""
    table = escalation.table(tiny, records(tiny, 2000))
    found = escalation.frontier(table, steps=10)
    areas = found["areas"]
    assert areas["random"] < areas["router"] < areas["combined"] < areas["oracle"]
    assert areas["fixed"] < areas["escalation"] < areas["combined"] + 0.01
    for name in ("router", "escalation", "combined"):
        assert len(found["curves"][name]) == 10
    assert [point["cost"] for point in found["curves"]["fixed"]] == [8, 16, 32]
    line = [{"cost": 0.0, "accuracy": 0.0}, {"cost": 2.0, "accuracy": 1.0}]
    assert escalation.area(line, 0.0, 2.0) == pytest.approx(0.5) and escalation.area(line, 2.0, 4.0) == 1.0


def test_one_question_alone_always_escalates(tiny):
    """There is no other half to fit on."""
    made = records(tiny, 1)
    report = policies.report(tiny, made)
    assert report["visual_tokens"]["escalation"] == 8 + 32
