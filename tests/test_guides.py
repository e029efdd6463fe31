"""Guides: what an answer must be, with each kind of vocabulary, among free rows, and nothing compiles."""

import json
import re

import numpy as np
import pytest

from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.inference.guides import Guide, Matcher
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.stress import compilations
from tests.test_programs import GOLDEN
from tests.test_sampling import answers, question

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {"left": {"type": "boolean"}, "shirt": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["left", "shirt"],
    "additionalProperties": False,
}


def test_guided_rows_beside_free_ones(model, engine):
    """Each answer is what its guide says and what it is alone; free rows are what they are without guides."""
    requests = [
        question(),
        question(guide=Guide.choice(["the left one", "the right one", "neither"]), logprobs=1),
        question(guide=Guide.regex("[A-F]{3}-[0-9]{1,2}"), temperature=2.0, seed=1),
        Request("Who?", max_new_tokens=60, guide=Guide.json(PERSON)),
        question(guide=Guide.regex("[a-z]{200}")),
        question(guide=Guide.choice(["7"]), min_tokens=5),
        question(temperature=1.0, seed=3),
        question(guide=Guide.json()),
    ]
    with compilations() as compiled:
        together = answers(engine, requests)
        assert compiled() == 0
    assert [one.token_ids for one in together] == [model.answer_batch([one])[0].token_ids for one in requests]
    _, chosen, matched, person, cut, forced, _, json_ = together
    assert isinstance(json.loads(json_.text), dict) and json_.finish == "stop" and len(json_.token_ids) <= 12
    assert chosen.text in ("the left one", "the right one", "neither") and len(chosen.logprobs) == len(chosen.token_ids)
    assert re.fullmatch("[A-F]{3}-[0-9]{1,2}", matched.text) and forced.text == "7"
    assert set(json.loads(person.text)) == {"left", "shirt"}
    assert {one.finish for one in (chosen, matched, person, forced)} == {"stop"}
    assert cut.finish == "length" and len(cut.token_ids) == 12 and re.fullmatch("[a-z]+", cut.text)


def test_a_guided_answer_that_escalates_is_guided_again(model, engine, photos):
    """The finer read starts its guide and its scores over."""
    guide = Guide.choice(["the left one", "neither"])
    asked = Request("Who?", photos[0], granularity=4, max_new_tokens=12, escalate=1.0, guide=guide, logprobs=2)
    (answer,) = answers(engine, [asked])
    assert [read.granularity for read in answer.passes] == [4, 16]
    assert answer.text in ("the left one", "neither") and answer.finish == "stop"
    assert [score.token for score in answer.logprobs] == list(answer.token_ids)


@pytest.mark.parametrize("folder", ["shipped", "llama"])
def test_guides_with_either_kind_of_vocabulary(tokenizer, folder):
    """Byte-level BPE, and a Llama with byte fallback: any text that the guide allows can be written, and no other."""
    tokenizer = tokenizer if folder == "shipped" else load_tokenizer(GOLDEN / "avg-llava-tiny")
    for text in ("Größe 日本\n\t😀", "No 7"):
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.bytes_of, ids)).decode().removeprefix(" ") == text
        for guide in (
            Guide.choice([text, "Nothing"]),
            Guide.regex(r"(G|No)(.|\n){1,12}"),
            Guide.grammar('start: /G[^x]+/ | "No" " " "7"'),
        ):
            matcher = Matcher(guide, tokenizer, (tokenizer.eos_id,), tokenizer.vocab_size + 5)
            for at, token in enumerate(ids):
                bits = np.unpackbits(matcher.allowed(99, 99).view(np.uint8), bitorder="little")
                assert bits[token] and not bits[tokenizer.vocab_size :].any()
                assert not bits[tokenizer.special_tokens["<s>"]]
                matcher.read(ids[: at + 1])
            bits = np.unpackbits(matcher.allowed(99, 99).view(np.uint8), bitorder="little")
            assert bits[tokenizer.eos_id]
    assert matcher.complete
    with pytest.raises(ValueError, match="doesn't satisfy"):
        Matcher(guide, tokenizer, (tokenizer.eos_id,), tokenizer.vocab_size).read(tokenizer.encode("Maybe"))


def test_an_object_has_the_properties_that_are_named(tokenizer):
    """Unless its schema says otherwise; a property may be called `properties`."""
    number = {"type": "integer"}
    inner = {"type": "object", "properties": {"properties": number}, "required": ["properties"]}
    for schema, good, bad in (
        ({"properties": {"a": number}, "type": "object"}, '{"a": 1}', '{"a": 1, "b'),
        ({"properties": {"a": inner}, "type": "object"}, '{"a": {"properties": 1}}', '{"a": {"properties": 1, "b'),
        ({"type": "array", "items": {"anyOf": [inner]}}, '[{"properties": 1}]', '[{"properties": 1, "b'),
        ({"$ref": "#/$defs/P", "$defs": {"P": inner}}, '{"properties": 1}', '{"properties": 1, "b'),
        ({"properties": {"a": number}, "additionalProperties": number}, '{"a": 1, "b": 2}', '{"a": 1, "b": "c'),
        ({"type": "object"}, '{"a": 1, "b": [2]}', "[1"),
        (
            {"type": "object", "properties": {"kind": number}, "required": ["kind"], "anyOf": [inner, inner]},
            '{"kind": 1, "properties": 2}',
            '{"kind": "x',
        ),
        ({"allOf": [{"properties": {"a": number}}, {"properties": {"b": number}}]}, '{"a": 1, "b": 2}', '{"a": "b'),
    ):
        for text, ends in ((good, True), (bad, False)):
            matcher = Matcher(Guide.json(schema), tokenizer, (tokenizer.eos_id,), tokenizer.vocab_size)
            if ends:
                matcher.read(tokenizer.encode(text))
                assert np.unpackbits(matcher.allowed(99, 99).view(np.uint8), bitorder="little")[tokenizer.eos_id], (
                    schema
                )
            else:
                with pytest.raises(ValueError, match="doesn't satisfy"):
                    matcher.read(tokenizer.encode(text))


SQUAD = {"name": {"type": "string"}, "shirts": {"type": "array", "items": {"enum": ["7", "12"]}, "minItems": 2}}


@pytest.mark.parametrize("schema", [None, {"type": "object", "properties": SQUAD, "required": list(SQUAD)}])
@pytest.mark.parametrize("most", [40, 120])
def test_json_is_closed_before_its_tokens_run_out(tokenizer, schema, most):
    """Whatever a model prefers: here tokens at random, those that open something first, and texts without an end."""
    rng, opens = np.random.default_rng(0), [tokenizer.encode(each)[-1] for each in '{["']
    for taste in ("any", "opens", "texts"):
        matcher, ids = Matcher(Guide.json(schema), tokenizer, (tokenizer.eos_id,), tokenizer.vocab_size), []
        while not matcher.complete and len(ids) < most:
            bits = np.unpackbits(matcher.allowed(most - len(ids), most).view(np.uint8), bitorder="little")
            letters = [token for token in range(60, 90) if bits[token] and taste == "texts"]
            ids.append(
                [*letters, *(t for t in opens if bits[t] and taste == "opens"), rng.choice(bits.nonzero()[0])][0]
            )
            matcher.read(ids)
        assert matcher.complete and (matcher.closed or taste == "any"), tokenizer.decode(ids)
        found = json.loads(tokenizer.decode(ids))
        assert schema is None or (set(found) == set(SQUAD) and set(found["shirts"]) <= {"7", "12"})


def test_a_guide_that_cannot_be_followed_is_one_line():
    for make, value, message in (
        (Guide.regex, "[0-9", "unclosed character class"),
        (Guide.json, {"type": "obje"}, "Invalid type: obje"),
        (Guide.json, {"$ref": "https://host/schema"}, "Default retriever does not fetch"),
        (Guide.json, {"type": "string", "minLength": 5, "maxLength": 3}, "Unsatisfiable schema"),
        (Guide.json, ["a"], "must be an object"),
        (Guide.grammar, "start: b", "unknown name"),
        (Guide.grammar, "root ::= (", "Expected"),
        (Guide.grammar, "", "No 'root' rule"),
        (Guide.choice, [], "none of them empty"),
        (Guide.choice, ["a", " "], "none of them empty"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            make(value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
