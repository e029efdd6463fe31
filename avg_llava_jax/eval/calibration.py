"""Thresholds of certainty with a guarantee, from questions that were answered at several granularities.

An answer is kept where its certainty is at least t; otherwise a finer granularity answers, up to the finest. The risk
of t is the probability that a question loses by it:

    risk(t) = P(the answer that is kept has a lower grade than that of the finest granularity)

so the accuracy is at most risk(t) below that of the finest granularity. `fit` returns a t with risk(t) <= alpha, with
probability 1 - delta over the draw of the n questions, whatever their distribution: "learn then test" (Angelopoulos et
al., 2021, arXiv 2110.01052). Thresholds are tested from the safest to the cheapest, each against risk(t) > alpha by the
exact binomial tail P(Binomial(n, alpha) <= losses), up to the first that is not rejected (fixed-sequence testing), so
that delta needs no correction for their number. Questions must be independent draws: `one_of_each` takes one of each
picture.

With alpha 0.01 and delta 0.05, 299 questions without any loss are the fewest: 0.99^299 < 0.05. One loss takes 473.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

THRESHOLDS = 1 / (1 + np.exp(-np.arange(16, -4.01, -0.1)))
"""What `fit` tests, in this order: probabilities with log-odds of 16, 15.9, ..., -4. It must not depend on the data."""


def fit(lost: Callable[[float], np.ndarray], alpha: float, delta: float) -> float:
    """The lowest threshold whose risk is at most `alpha`, with confidence 1 - delta.

    lost: bool (n,), whether each question loses with a threshold.

    Raises:
      ValueError: there are too few questions, or too many of the most certain answers lose; says so in one line.
    """
    least, count = questions_needed(alpha, delta), len(lost(float(THRESHOLDS[0])))
    if count < least:
        raise ValueError(
            f"{count} independent questions cannot support alpha={alpha:g} with delta={delta:g}: "
            f"at least {least} are needed"
        )
    found = None
    for threshold in THRESHOLDS:
        losses = int(np.sum(lost(float(threshold))))
        if binomial_tail(losses, count, alpha) > delta:
            break
        found = float(threshold)
    if found is None:
        raise ValueError(
            f"{losses} of {count} questions lose though their certainty is over {THRESHOLDS[0]:.7f}: "
            f"no threshold supports alpha={alpha:g} with delta={delta:g}; raise alpha, or give more questions"
        )
    return found


def binomial_tail(most: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= most), for 0 < p < 1.

    >>> round(binomial_tail(1, 3, 0.5), 3)
    0.5
    """

    def log_chance(count: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
        return ways + count * math.log(p) + (n - count) * math.log1p(-p)

    return min(1.0, math.fsum(math.exp(log_chance(count)) for count in range(most + 1)))


def questions_needed(alpha: float, delta: float) -> int:
    """The fewest questions that can support `alpha` with confidence 1 - delta: none of them loses.

    >>> questions_needed(0.01, 0.05)
    299
    """
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def one_of_each(groups: Sequence[Hashable], seed: int = 0) -> list[int]:
    """One row of each group, drawn at random: questions about one picture are not independent. Rows ascend."""
    order = np.random.default_rng(seed).permutation(len(groups))
    drawn = {groups[row]: int(row) for row in order}
    return sorted(drawn.values())
