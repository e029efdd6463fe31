"""Calibrated thresholds: the guarantee holds over many draws, and would not without the test."""

import numpy as np
import pytest

from avg_llava_jax.eval import calibration


def population(rng, count):
    """Certainties of coarse answers, and whether they lose: the surer, the rarer, yet never impossible."""
    odds = rng.normal(2.0, 2.5, count)
    chance = 0.3 / (1 + np.exp(odds)) + 0.002
    return 1 / (1 + np.exp(-odds)), rng.random(count) < chance


def trusting(certainty, lost):
    """Whether each question loses with a threshold, where one pass may follow: `lost` is of the first."""
    return lambda threshold: lost & (certainty >= threshold)


def test_the_guarantee_holds_and_a_threshold_fitted_without_it_breaks():
    """200 calibration sets of 500 questions: the share whose true risk is over alpha, by both ways."""
    rng, alpha, delta = np.random.default_rng(0), 0.02, 0.1
    certainty, lost = population(rng, 300_000)
    order = np.argsort(-certainty)
    falling, risks = -certainty[order], np.cumsum(lost[order]) / len(lost)

    def risk(threshold):
        trusted = np.searchsorted(falling, -threshold, side="right")
        return risks[trusted - 1] if trusted else 0.0

    broken, naive, fitted = 0, 0, []
    for _ in range(200):
        seen = rng.integers(0, len(lost), 500)
        c, bad = certainty[seen], lost[seen]
        fitted.append(calibration.fit(trusting(c, bad), alpha, delta))
        broken += risk(fitted[-1]) > alpha
        good = [t for t in calibration.THRESHOLDS if np.mean(bad & (c >= t)) <= alpha]
        naive += risk(good[-1]) > alpha
    assert broken / 200 <= delta
    assert naive / 200 > 3 * delta
    assert np.median(fitted) < 0.9, "and it is of use: answers of the coarse granularity are trusted"


def test_what_the_data_cannot_support_is_refused():
    sure, none = np.full(298, 0.9), np.zeros(298, bool)
    with pytest.raises(ValueError, match="298 independent questions cannot support alpha=0.01 .* at least 299"):
        calibration.fit(trusting(sure, none), 0.01, 0.05)
    assert calibration.fit(trusting(np.full(299, 0.9), np.zeros(299, bool)), 0.01, 0.05) == calibration.THRESHOLDS[-1]
    one = np.arange(473) == 5
    assert calibration.fit(trusting(np.full(473, 0.9), one), 0.01, 0.05) == calibration.THRESHOLDS[-1]
    fitted = calibration.fit(trusting(np.full(472, 0.9), one[:472]), 0.01, 0.05)
    assert 0.9 < fitted == pytest.approx(0.9, abs=0.01)
    with pytest.raises(ValueError, match="300 of 500 questions lose .* raise alpha"):
        calibration.fit(trusting(np.ones(500), np.arange(500) < 300), 0.01, 0.05)


@pytest.mark.parametrize("n, p", [(7, 0.3), (299, 0.01), (2000, 0.004)])
def test_the_tail_is_exact(n, p):
    """Against the distribution of a sum of n coins, by convolution."""
    chances = np.array([1.0])
    for _ in range(n):
        chances = np.convolve(chances, [1 - p, p])[:40]
    for most in (0, 1, 3, 6):
        assert calibration.binomial_tail(most, n, p) == pytest.approx(chances[: most + 1].sum(), rel=1e-9)


def test_one_question_of_each_picture():
    groups = ["a", "a", "b", "c", "c", "c"]
    drawn = [tuple(calibration.one_of_each(groups, seed)) for seed in range(30)]
    assert all([groups[row] for row in rows] == ["a", "b", "c"] for rows in drawn) and len(set(drawn)) > 3
