"""The price of visual tokens under load: predictions with a clock of the test's own, and what the engine does."""

import dataclasses

import numpy as np
import pytest

from avg_llava_jax.commands.serve import slo_of
from avg_llava_jax.inference.pricing import EVENTS, Pricing, Slo
from avg_llava_jax.inference.requests import Request
from tests.small_engine import ended

LOOKS = {0.05: 1.0, 0.02: 0.0}
"""Seconds of a close look and of a glance, and the score that a router gives to each."""


def test_the_price_rises_from_half_of_the_promise_to_all_of_it():
    pricing = Pricing(Slo(1.0, 0.5, 4.5))
    assert pricing.cost_weight(1000) == 0.5, "nothing was measured"
    for number in range(2 * EVENTS):  # a pause of 100 s does not count, nor what is older than the last events
        pricing.first_token(100.0 * number, 100.0 * number + (9.0 if number < EVENTS else 0.05))
    found = [pricing.cost_weight(waiting) for waiting in (0, 10, 15, 19, 20, 99)]
    assert found == pytest.approx([0.5, 0.5, 1.5, 4.5, 4.5, 4.5])
    pricing.first_token(50.0, 6300.05)  # two at once: the second took nothing more
    assert pricing.predicted(10) == pytest.approx(10 * 0.05 * (EVENTS - 1) / EVENTS)


def served(rate, slo, seconds=60.0, seed=0):
    """Waits (n,), and whether each request was looked at closely (n,): one server, arrivals at a rate, a fake clock."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds)))
    pricing, now, waits, close = slo and Pricing(slo), 0.0, [], []
    for number, arrived in enumerate(arrivals):
        now = max(now, arrived)
        waiting = np.searchsorted(arrivals, now, side="right") - number
        price = pricing.cost_weight(waiting) if pricing else 0.0
        took = max(LOOKS, key=lambda took: LOOKS[took] - price * took / max(LOOKS))
        now += took
        waits.append(now - arrived)
        close.append(took == max(LOOKS))
        if pricing:
            pricing.first_token(arrived, now)
    return np.array(waits), np.array(close)


def test_a_server_under_load_keeps_its_promise_and_looks_closely_when_it_can():
    slo = Slo(1.0)
    waits, close = served(10, slo)  # half of what close looks allow
    assert close.mean() > 0.99 and np.quantile(waits, 0.95) < 0.5
    for rate in (25, 40):  # more than close looks allow, less than glances
        without, _ = served(rate, None)
        waits, close = served(rate, slo)
        assert np.quantile(without, 0.95) > 5 and np.quantile(waits, 0.95) < 1.1
        assert rate * (0.02 + 0.03 * close.mean()) == pytest.approx(1, abs=0.1), "it looks as closely as time allows"


def test_the_engine_raises_the_price_where_it_may(model, engine, photos, monkeypatch):
    requests = [
        Request("Who?", photos[0], max_new_tokens=1),
        Request("Who?", photos[0], cost_weight=9.0, max_new_tokens=1),
        Request("Who?", photos[0], granularity=16, max_new_tokens=1),
    ]
    plain = [ticket.result(0) for ticket in ended(engine, requests)]
    assert [answer.cost_weight for answer in plain] == [0.0, 9.0, None] and engine.stats().cost_weight == 0
    pricing = Pricing(Slo(1.0, 0.0, 8.0))
    pricing.first_token(0.0, 1e6)
    monkeypatch.setattr(engine, "_pricing", pricing)
    before = engine.stats()
    found = [ticket.result(0) for ticket in ended(engine, requests)]
    assert [answer.cost_weight for answer in found] == [8.0, 9.0, None]
    assert [answer.granularity for answer in found] == [4, 4, 16]
    assert engine.stats().raised - before.raised == 1 and found[0].probabilities is not None
    pricing.slo = Slo(1.0)  # as expensive as can be: the router is not asked
    spared = [ticket.result(0) for ticket in ended(engine, requests)]
    assert [answer.cost_weight for answer in spared] == [100.0, 100.0, None]
    assert [answer.granularity for answer in spared] == [4, 4, 16] and spared[0].probabilities is None
    held = dataclasses.replace(model.prepare(requests[0]), fixed_price=True)  # as a calibrated threshold wants it
    pricing.first_token(0.0, 1e9)
    ticket = engine.submit_prepared(held)
    while engine.step():
        pass
    assert ticket.result(0).cost_weight == 0.0 and ticket.result(0).granularity == plain[0].granularity


def test_promises_that_make_no_sense_are_refused():
    assert slo_of(None, ["0", "2"]) is None and slo_of(0.5, ["0", "2"]) == Slo(0.5, 0.0, 2.0)
    for ttft, weights, named in ((0.0, ["0", "2"], "slo_ttft=0"), (1.0, ["3", "2"], "3,2"), (1.0, ["2"], "2: give")):
        with pytest.raises(ValueError, match=named):
            slo_of(ttft, weights)
