"""The table of fields, and the bodies that real clients send, as requests of the engine."""

import json

import pytest

from avg_llava_jax.server import reading
from avg_llava_jax.server.fields import ANYTHING
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal
from tests.served import LIMITS, ONE


@pytest.fixture
def ask(tiny):
    """Reads the fields of a body."""

    def ask(limits=LIMITS, **fields):
        return reading.read(json.dumps({"messages": ONE, **fields}).encode(), tiny, limits, "tiny")

    return ask


def test_a_field_that_asks_for_nothing_is_as_good_as_absent(ask):
    plain = ask(seed=1).request
    for field in reading.CHAT:
        if field.name in ("messages", "seed"):
            continue
        for value in (None, *(("x", 1, {"a": [None]}) if field.nothing is ANYTHING else field.nothing)):
            assert ask(**{"seed": 1, field.name: value}).request == plain, (field.name, value)


def test_a_field_that_is_not_there_is_refused_by_name(ask):
    for field in reading.CHAT:
        if field.status == "refused":
            with pytest.raises(Refusal) as caught:
                ask(**{field.name: "something"})
            assert caught.value.param == field.name and field.name in caught.value.message


def test_unknown_fields_pass_by_flag_alone(ask):
    with pytest.raises(Refusal, match="unknown field 'beams'"):
        ask(beams=4)
    ask(Limits(unknown_fields=True), beams=4, messages=[{**ONE[0], "colour": "red"}])


def test_numbers_of_other_languages(ask):
    request = ask(max_tokens=5.0, top_k=7.0, seed=3.0, temperature=1).request
    assert (request.max_new_tokens, request.top_k, request.seed, request.temperature) == (5, 7, 3, 1.0)
    assert isinstance(request.max_new_tokens, int) and isinstance(request.top_k, int)
    assert ask(max_tokens=4096).request.max_new_tokens == LIMITS.new_tokens  # cut to what the server gives
