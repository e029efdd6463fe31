"""The price of tokens and the budget: against every combination there is, and on a model."""

import itertools

import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.inference import choosing
from avg_llava_jax.inference.model import visual_tokens
from avg_llava_jax.inference.requests import Request
from tests.random_model import random_model


def brute_force(scores, costs, weight, budget):
    """The best of all combinations, the cheapest of the best."""
    values = scores - weight * costs / costs[:, -1:]
    best, rows = None, range(len(scores))
    for plan in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        tokens = sum(costs[row, place] for row, place in zip(rows, plan, strict=True))
        worth = sum(values[row, place] for row, place in zip(rows, plan, strict=True))
        if (budget is None or tokens <= budget) and worth > -np.inf:
            best = max(best, (worth, -tokens, plan)) if best else (worth, -tokens, plan)
    return best


def test_the_best_within_a_budget_is_the_best_there_is():
    rng = np.random.default_rng(0)
    for _ in range(60):
        images, levels = rng.integers(1, 5), rng.integers(2, 5)
        costs = np.sort(rng.integers(1, 40, (images, levels)), axis=1)
        scores = rng.normal(size=(images, levels))
        scores[0, 1:] = -np.inf if rng.random() < 0.3 else scores[0, 1:]  # asked for
        least = costs[:, 0].sum()
        for budget, weight in itertools.product((None, least, least + 7, 2 * least, 1000), (0.0, 0.7, 5.0)):
            plan = choosing.best_places(scores, costs, weight, budget)
            worth, tokens, _ = brute_force(scores, costs, weight, budget)
            values = scores - weight * costs / costs[:, -1:]
            rows = np.arange(images)
            np.testing.assert_allclose(values[rows, plan].sum(), worth)
            assert costs[rows, plan].sum() == -tokens
        with pytest.raises(ValueError, match="no choice of granularities is within it"):
            choosing.best_places(scores, costs, 0.0, int(least) - 1)


def test_a_tie_goes_to_the_cheapest():
    costs = np.array([[4, 8, 16]] * 2)
    assert choosing.best_places(np.zeros((2, 3)), costs, 0.0, None) == [0, 0]
    assert choosing.best_places(np.array([[0.0, 2, 2]] * 2), costs, 0.0, 24) == [1, 1]


def test_requests_keep_to_their_knobs(tiny, tokenizer):
    model = random_model(tiny, tokenizer)
    rng = np.random.default_rng(1)
    photos = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((32, 32), (16, 30))]
    options = {"max_new_tokens": 2}

    def tokens(*each):
        return sum(visual_tokens(tiny, model.prepare(Request("Who?", photos)).sample, each))

    def chosen(logits, **knobs):
        return choosing.choose(tiny, model.prepare(Request("Who?", photos, **knobs)), np.array(logits))

    costs = choosing.token_costs(tiny, [photo.size for photo in photos])
    logits = [[0.1, 0.0, 2.0], [0.3, 0.0, 0.5]]
    assert chosen(logits) == (16, 16)
    assert chosen(logits, cost_weight=0.5) == (16, 4)
    assert chosen(logits, cost_weight=0.5, granularity=["auto", 8]) == (16, 8)
    for budget in (tokens(4, 4), tokens(4, 8), tokens(8, 8), tokens(16, 16)):
        _, spent, plan = brute_force(np.array(logits), costs, 0.0, budget)
        picked = chosen(logits, max_visual_tokens=budget)
        assert picked == tuple(tiny.granularities[place] for place in plan) and tokens(*picked) == -spent <= budget

    asked = "How many players are there?"
    free = model.answer(photos, asked, **options)
    knobs = ({}, {"cost_weight": 1e6}, {"max_visual_tokens": tokens(4, 4)})
    together = model.answer_batch([Request(asked, photos, **each, **options) for each in knobs])
    assert [answer.granularity for answer in together] == [free.granularity, (4, 4), (4, 4)] != [(4, 4)] * 3

    least = tokens(4, 4)
    with pytest.raises(ValueError, match=f"max_visual_tokens={least - 1}: .* take at least {least} visual tokens"):
        model.prepare(Request("Who?", photos, max_visual_tokens=least - 1))
    with pytest.raises(ValueError, match=f"take at least {tokens(16, 16)} visual tokens"):
        model.prepare(Request("Who?", photos, granularity=16, max_visual_tokens=least))
    for options, message in (
        ({"cost_weight": -1.0}, "cost_weight=-1.0 must be 0"),
        ({"cost_weight": float("nan")}, "cost_weight=nan must be 0"),
        ({"max_visual_tokens": 0}, "max_visual_tokens=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Request("Who?", photos, **options)
