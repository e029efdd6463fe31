"""The granularity of each image of a request, chosen on the host by router scores, a price of tokens and a budget.

The paper takes the argmax over granularities g of the router's probability p_g. Here tokens have a price: image i gets

    argmax over g of  log p_g - cost_weight * tokens_i(g) / tokens_i(finest)

and `max_visual_tokens` bounds the sum of tokens_i(g) over the images of the request: of the choices within the budget,
the one with the largest sum of scores is taken; the cheapest wins a tie. The softmax's denominator is the same for
every g of an image, so logits replace log p_g.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avg_llava_jax.config import Granularity, ModelConfig
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.tiles import Size
from avg_llava_jax.inference.requests import Prepared


def choose(
    config: ModelConfig, prepared: Prepared, logits: np.ndarray, cost_weight: float | None = None
) -> tuple[Granularity, ...]:
    """The granularity of each image: the requested one, or under "auto" the best by scores, price and budget.

    logits: router scores (images, G); may have no rows where every image's granularity was requested.
    cost_weight: the price; None = the request's.
    """
    request, wanted = prepared.request, prepared.choice
    scores = np.full((len(wanted), len(config.granularities)), -np.inf)
    for image, granularity in enumerate(wanted):
        if granularity is None:
            scores[image] = logits[image]
        else:
            scores[image, config.granularities.index(granularity)] = 0.0
    costs = token_costs(config, prepared.sample.sizes)
    price = request.cost_weight if cost_weight is None else cost_weight
    places = best_places(scores, costs, price, request.max_visual_tokens)
    return tuple(config.granularities[place] for place in places)


FINER = 2
"""Steps of the ladder from a pass to the next: about four times the tokens. 36 is followed by 144, and that by 576."""


def next_choice(
    config: ModelConfig, prepared: Prepared, choice: Sequence[Granularity], spent: int = 0
) -> tuple[Granularity, ...]:
    """The granularity of each image for the pass that follows one at `choice`; empty if none follows.

    It is `FINER` steps finer, or fewer if that does not fit into `max_length`, or into `max_visual_tokens` together
    with the passes before. spent: visual tokens of those before `choice`.
    """
    sample, budget, ladder = prepared.sample, prepared.request.max_visual_tokens, config.granularities
    costs = token_costs(config, sample.sizes)
    text = len(sample.tokens.ids) - len(sample.sizes)

    def tokens(each: Sequence[Granularity]) -> int:
        return sum(int(row[ladder.index(g)]) for row, g in zip(costs, each, strict=True))

    for steps in range(FINER, 0, -1):
        found = tuple(ladder[min(ladder.index(g) + steps, len(ladder) - 1)] for g in choice)
        fits = text + tokens(found) <= config.language.max_length
        if fits and (budget is None or spent + tokens(choice) + tokens(found) <= budget):
            return () if found == tuple(choice) else found
    return ()


def check_budget(
    config: ModelConfig, sizes: Sequence[Size], wanted: Sequence[Granularity | None], budget: int | None
) -> None:
    """Raise ValueError if no choice is within `max_visual_tokens`; it says how many tokens the cheapest takes."""
    if budget is None:
        return
    rows = zip(token_costs(config, sizes), wanted, strict=True)
    least = sum(int(row.min() if g is None else row[config.granularities.index(g)]) for row, g in rows)
    if least > budget:
        raise ValueError(f"max_visual_tokens={budget}: the images of this request take at least {least} visual tokens")


def token_costs(config: ModelConfig, sizes: Sequence[Size]) -> np.ndarray:
    """Visual tokens, newlines included, of images of (width, height) pixels at each granularity: int (images, G)."""
    own = config.of(len(sizes))
    counts = [[visual_count(size, own, g) for g in config.granularities] for size in sizes]
    return np.array(counts, np.int64).reshape(len(sizes), len(config.granularities))


def best_places(scores: np.ndarray, costs: np.ndarray, cost_weight: float, budget: int | None) -> list[int]:
    """The column of each row that maximises the sum of scores - cost_weight * costs / costs[:, -1] within `budget`.

    scores: (images, G), -inf where a column must not be chosen. costs: int (images, G).

    With costs [[6, 9], [6, 9]], scores [[0, 1], [0, 3]], weight 0 and a budget of 15, only one image can be fine: the
    front goes from {0: 0} to {6: 0, 9: 1} to {12: 0, 15: 3}, where 6 + 9 (worth 3) beats 9 + 6 (worth 1).

    Raises ValueError if no choice is within the budget (`check_budget` finds that before a request runs).
    """
    values = np.asarray(scores, np.float64) - cost_weight * costs / costs[:, -1:]
    first = [int(np.argmax(row)) for row in values]
    if budget is None or sum(int(row[place]) for row, place in zip(costs, first, strict=True)) <= budget:
        return first
    # Plans for the images so far, by tokens; a plan stays if it is worth more than every cheaper one (a Pareto front).
    front: list[tuple[int, float, list[int]]] = [(0, 0.0, [])]
    for value, cost in zip(values, costs, strict=True):
        longer = [
            (tokens + int(cost[place]), worth + float(value[place]), [*plan, place])
            for tokens, worth, plan in front
            for place in range(len(cost))
            if tokens + cost[place] <= budget and value[place] > -np.inf
        ]
        front = []
        for plan in sorted(longer, key=lambda plan: (plan[0], -plan[1])):
            if not front or plan[1] > front[-1][1]:
                front.append(plan)
    if not front:
        raise ValueError(f"max_visual_tokens={budget}: no choice of granularities is within it; raise it")
    return front[-1][2]
