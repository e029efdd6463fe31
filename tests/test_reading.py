"""The table of fields, and the bodies that real clients send, as requests of the engine."""

import json

import pytest

from avg_llava_jax.data.conversation import IMAGE
from avg_llava_jax.server import reading
from avg_llava_jax.server.fields import ANYTHING
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.refusal import Refusal
from launch.bench import serve_fields
from tests.served import LIMITS, ONE, link, text, user


@pytest.fixture
def ask(tiny):
    """Reads the fields of a body."""

    def ask(limits=LIMITS, **fields):
        return reading.read(json.loads(json.dumps({"messages": ONE, **fields})), tiny, limits, "tiny")

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


def test_unknown_fields_pass_in_every_object(ask):
    """The flag holds for the objects in fields, too: tools, calls, results, formats, options of streams."""
    function = {"name": "f", "parameters": {"type": "object"}, "beams": 4}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}", "beams": 4}, "beams": 4}
    said = [*ONE, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "5", "beams": 4}]
    every = {
        "tools": [{"type": "function", "function": function, "cache_control": {"type": "ephemeral"}}],
        "messages": [*said, user([{**text("a"), "beams": 4}, link(beams=4)])],
        "stream_options": {"include_usage": True, "beams": 4},
    }
    shaped = {"response_format": {"type": "json_object", "beams": 4}, "structured_outputs": {"beams": 4}}
    limits = Limits(unknown_fields=True)
    assert ask(limits, **every).tools
    for name, value in shaped.items():
        ask(limits, **{name: value})
    for name, value in (every | shaped).items():
        with pytest.raises(Refusal, match="unknown field"):
            ask(**{name: value})


def test_numbers_of_other_languages(ask):
    request = ask(max_tokens=5.0, top_k=7.0, seed=3.0, temperature=1).request
    assert (request.max_new_tokens, request.top_k, request.seed, request.temperature) == (5, 7, 3, 1.0)
    assert isinstance(request.max_new_tokens, int) and isinstance(request.top_k, int)
    for many in (4096, 2**53 - 1, 1e20, 10**400):  # cut to what the server gives, JavaScript's largest integer too
        assert ask(max_tokens=many).request.max_new_tokens == LIMITS.new_tokens
        assert ask(top_k=many, temperature=1).request.top_k == 600
    with pytest.raises(Refusal, match="max_tokens=0 must be 1 or more"):
        ask(max_tokens=0)


EMPTY = ["", " ", None, [], [text("")], [text(None)]]


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_answer_does_not_end_the_conversation(ask, unweighted, empty):
    turns = [*ONE, {"role": "assistant", "content": empty}, user("and now?")]
    request = ask(messages=[{"role": "system", "content": empty}, *turns]).request
    assert [turn["value"] for turn in request.prompt] == [["hello"], [""], ["and now?"]]
    (ids,) = (unweighted.prepare(request).sample.tokens.ids,)
    end = unweighted.tokenizer.eos_id
    before = unweighted.prepare(ask().request).sample.tokens.ids  # up to where the model ended its empty answer
    assert ids[: len(before) + 1] == [*before, end]


@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_question_and_a_greeting_are_taken(ask, unweighted, empty):
    turns = [{"role": "assistant", "content": "Hi"}, user(empty), {"role": "assistant", "content": "a"}, user(empty)]
    for messages, wanted in (
        ([user(empty)], [[""]]),
        (turns, [["Hi"], [""], ["a"], [""]]),
        ([{"role": "system", "content": "Be brief."}], [["Be brief."], [""]]),
        (turns[:3], [["Hi"], [""], ["a"], [""]]),
    ):
        request = ask(messages=messages).request
        assert [turn["value"] for turn in request.prompt] == wanted
        unweighted.prepare(request)


def test_no_text_of_a_client_is_a_placeholder(ask, unweighted):
    says = "<image> \U000f0000 <image>"
    turns = [
        {"role": "system", "content": says},
        user([text(says), link()]),
        {"role": "assistant", "content": says},
        user(says),
    ]
    prepared = unweighted.prepare(ask(messages=turns).request)
    assert prepared.sample.tokens.images == 1
    ids = prepared.sample.tokens.ids
    before, after = map(unweighted.tokenizer.decode, (ids[: ids.index(IMAGE)], ids[ids.index(IMAGE) + 1 :]))
    assert before.count("<image>") == 2 and after.count("<image>") == 6


def test_images_stand_where_the_parts_say(ask):
    for parts, around in (
        ([text("a"), link()], ["", "\na"]),  # as in training
        ([link(), text("a"), link()], ["", "\n", "\na"]),
        ([text("Is"), link(), link(), text("it?")], ["Is\n", "\n", "\nit?"]),
        ([link()], ["", "\n"]),
    ):
        (turn,) = ask(messages=[user(parts)]).request.prompt
        assert turn["value"] == around
    prompt = ask(messages=[user([link(), text("a")]), user(" "), user([text("b"), link()])]).request.prompt
    assert [turn["value"] for turn in prompt] == [["", "\na\n", "\nb"]]


def test_shapes_of_messages(ask):
    url = link()["image_url"]["url"]
    messages = [
        {"role": "user", "type": "text", "name": "ann", "content": [{"type": "image_url", "image_url": url}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "tool_calls": [], "audio": None},
        {"role": "user", "content": [{**text("Please."), "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "Be polite."},  # after the last question
    ]
    request = ask(messages=messages).request
    assert [turn["value"] for turn in request.prompt] == [["Be polite."], ["", "\n"], ["No."], ["Please."]]
    detail = {"type": "image_url", "image_url": {"url": url, "detail": "original"}}
    assert ask(messages=[user([detail])]).request.granularity == [16]


def test_the_tables_of_the_page_are_those_of_the_code():
    page = serve_fields.DOCUMENT.read_text(encoding="utf-8")
    assert serve_fields.tables() in page, "python -m launch.bench.serve_fields"
