"""The loads of `launch.bench.serve_load` on a server without a model: all answers are right, and nothing is left."""

import asyncio
import dataclasses

import pytest

from launch.bench import serve_load
from tests.served import LIMITS, Served


@pytest.mark.parametrize("load", [serve_load.dropped, serve_load.slow, serve_load.idle])
def test_dropped_slow_and_idle_clients_harm_nobody(unweighted, load, caplog):
    served = Served(unweighted, limits=dataclasses.replace(LIMITS, seconds=120))
    served.engine.places = 72
    bodies = [serve_load.body(f"c b {n}", [serve_load.picture(n, 40, 30)]) for n in range(2)]
    outcomes = asyncio.run(load(served.url, bodies))
    for number, outcome in enumerate(outcomes):
        assert outcome.status == 200 and outcome.first is not None
        left = load is serve_load.dropped and number % 2
        assert outcome.text == (None if left else f"{number % 2} b c")
    served.until(lambda: served.service.running == 0 and served.engine.running == 0)
    served.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
