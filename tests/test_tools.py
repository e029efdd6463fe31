"""Tools and formats as OpenAI's client asks for them: what the engine is asked, and what comes back."""

import dataclasses
import json

import numpy as np
import openai
import pytest

from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.guides import Matcher
from avg_llava_jax.server.tools import Calls, message_of
from tests.served import Served, user

pytest.importorskip("llguidance")

LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Who wears a shirt",
        "parameters": {
            "type": "object",
            "properties": {"shirt": {"type": "integer"}, "team": {"enum": ["red", "blue"]}},
            "required": ["shirt"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "function", "function": {"name": "nothing"}}
ONE_CALL = '<tool_call>{"name": "look_up", "arguments": {"shirt": 7, "team": "red"}}</tool_call>'
TWO_CALLS = ONE_CALL + '\n<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'


@pytest.fixture(scope="module")
def served(tiny, tokenizer):
    """A server with room for the descriptions of tools."""
    longer = dataclasses.replace(tiny, language=dataclasses.replace(tiny.language, max_length=1024))
    served = Served(AvgLlava(longer, None, tokenizer))
    yield served
    served.close()


@pytest.fixture
def allows(served, tokenizer):
    """Whether the guide of the last request allows a text as a whole answer."""

    def allows(text):
        matcher = Matcher(served.engine.requests[-1].guide, tokenizer, (tokenizer.eos_id,), tokenizer.vocab_size)
        try:
            matcher.read(tokenizer.encode(text))
        except ValueError:
            return False
        return bool(np.unpackbits(matcher.allowed(99, 99).view(np.uint8), bitorder="little")[tokenizer.eos_id])

    return allows


def test_formats_of_openai_and_vllm(served, allows):
    schema = LOOK_UP["function"]["parameters"]
    format_ = {"type": "json_schema", "json_schema": {"name": "shirt", "strict": True, "schema": schema}}
    good, bad = '{"shirt": 7, "team": "red"}', '{"shirt": 7, "team": "green"}'
    for options in (
        {"response_format": format_},
        {"extra_body": {"structured_outputs": {"json": schema}}},
        {"extra_body": {"guided_json": json.dumps(schema)}},
    ):
        served.ask("a b", **options)
        assert allows(good) and allows(" " + good) and not allows(bad) and not allows("a")
    served.ask("a b", response_format={"type": "json_object"})
    assert allows(bad) and not allows("[7]")
    for options in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        served.ask("a b", extra_body=options)
        assert allows("yes") and not allows("maybe")
    served.ask("a b", extra_body={"guided_regex": "[0-9]{3}"})
    assert allows("123") and not allows("12")
    served.ask("a b", extra_body={"structured_outputs": {"grammar": 'root ::= "a" [0-9]'}})
    assert allows("a7") and not allows("a")
    served.ask("a b", response_format={"type": "text"})
    assert served.engine.requests[-1].guide is None


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"guided_regex": "[0-9"}, "guided_regex"),
        ({"structured_outputs": {"regex": "[0-9"}}, "structured_outputs.regex"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "obj"}}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "no JSON"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"tools": [NOTHING], "guided_regex": "a"}, "tools"),
        ({"tools": [NOTHING, NOTHING]}, "tools[1].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": 1}}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [NOTHING], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"n": 3}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"min_p": 2}, "min_p"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(served, fields, param):
    reply = served.post(messages=[user("a b")], **fields)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param, reply.text
    assert "\n" not in reply.json()["error"]["message"]


def test_penalties_and_limits_reach_the_engine(served):
    served.ask(
        "b a",
        frequency_penalty=0.5,
        presence_penalty=-1,
        logit_bias={"5": -100, "7": 2.5},
        max_tokens=9,
        extra_body={"repetition_penalty": 1.2, "min_p": 0.1, "ignore_eos": True},
    )
    request = served.engine.requests[-1]
    assert (request.frequency_penalty, request.presence_penalty, request.repetition_penalty) == (0.5, -1, 1.2)
    assert (request.logit_bias, request.min_p, request.min_tokens) == ({5: -100, 7: 2.5}, 0.1, 9)
    served.ask("b a", extra_body={"min_tokens": 3})
    assert served.engine.requests[-1].min_tokens == 3


def test_several_answers_differ_in_their_seeds(served):
    done = served.ask("c b a", n=3, temperature=0.5, seed=2**32 - 1)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert {choice.message.content for choice in done.choices} == {"a b c"}
    assert [request.seed for request in served.engine.requests[-3:]] == [2**32 - 1, 0, 1]
    assert done.usage.completion_tokens == 9 and done.usage.prompt_tokens < done.usage.total_tokens
    chunks = list(served.ask("c b a", n=2, temperature=0.5, stream=True, stream_options={"include_usage": True}))
    for number in range(2):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == number]
        assert "".join(choice.delta.content or "" for choice in own) == "a b c"
        assert [choice.finish_reason for choice in own][-1] == "stop" and own[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 6


def test_logprobs_and_the_usage_of_every_piece(served, tokenizer):
    done = served.ask("c b a", logprobs=True, top_logprobs=2)
    assert served.engine.requests[-1].logprobs == 2
    whole = done.choices[0].logprobs.content
    assert [entry.logprob for entry in whole] == [0, -0.125, -0.25]
    assert bytes(whole[2].bytes) == tokenizer.bytes_of(2) and whole[2].token == "</s>"
    assert whole[0].top_logprobs[0].token == tokenizer.bytes_of(7).decode()
    options = {"continuous_usage_stats": True, "include_usage": True}
    chunks = list(served.ask("c b a", stream=True, logprobs=True, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [0, 1, 2, 3, 3, 3]
    brought = [chunk.choices[0].logprobs for chunk in chunks[:-1]]
    assert [entry.logprob for each in brought if each for entry in each.content] == [0, -0.125, -0.25]
    assert served.ask("a").choices[0].logprobs is None


def test_tools_are_described_and_calls_follow_their_schemas(served, allows):
    served.ask([{"role": "system", "content": "Be brief."}, user("b a")], tools=[LOOK_UP, NOTHING])
    system, question = served.engine.requests[-1].prompt
    (prompt,) = system["value"]
    assert '"look_up"' in prompt and "Who wears a shirt" in prompt and prompt.endswith("Be brief.")
    assert system["from"] == "system" and question == {"from": "human", "value": ["b a"]}
    wrong = ONE_CALL.replace("red", "green")
    for text, auto, required, single in (
        (ONE_CALL, True, True, True),
        (TWO_CALLS, True, True, False),
        ("Seven, I think: 3 < 7.", True, False, False),
        (wrong, False, False, False),
        (ONE_CALL.replace("look_up", "look_down"), False, False, False),
    ):
        for options, wanted in (
            ({}, auto),
            ({"tool_choice": "required"}, required),
            ({"tool_choice": "required", "parallel_tool_calls": False}, single),
        ):
            served.ask("b a", tools=[LOOK_UP, NOTHING], **options)
            assert allows(text) == wanted, (text, options)
    served.ask("b a", tools=[LOOK_UP, NOTHING], tool_choice={"type": "function", "function": {"name": "nothing"}})
    assert allows('<tool_call>{"name": "nothing", "arguments": {}}</tool_call>') and not allows(ONE_CALL)
    served.ask("b a", tools=[LOOK_UP], tool_choice="none")
    assert served.engine.requests[-1].guide is None and "look_up" not in str(served.engine.requests[-1].prompt)


def test_calls_and_results_in_earlier_messages(served):
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"shirt": 7}'}}
    messages = [
        user("Who wears 7?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "Ann"},
    ]
    served.ask(messages, tools=[LOOK_UP])
    *_, answer, result = served.engine.requests[-1].prompt
    assert answer["value"] == ['<tool_call>{"name": "look_up", "arguments": {"shirt": 7}}</tool_call>']
    assert result == {"from": "human", "value": ["<tool_response>\nAnn\n</tool_response>"]}
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask([messages[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}, messages[2]])
    assert caught.value.param == "messages[1].tool_calls[0].function"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_are_streamed_as_they_come(size):
    """However the pieces are cut, they join to the same calls; braces and tags inside of strings are text."""
    text = TWO_CALLS.replace('"red"', r'"}</tool_call>{\"\\"')
    reader, calls, content = Calls(), [], ""
    for at in range(0, len(text), size):
        for delta in reader.feed(text[at : at + size]):
            (part,) = delta["tool_calls"]
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append([part["function"]["name"], ""])
            else:
                calls[part["index"]][1] += part["function"]["arguments"]
    assert calls == [["look_up", r'{"shirt": 7, "team": "}</tool_call>{\"\\"}'], ["nothing", "{}"]]
    assert json.loads(calls[0][1])["team"] == '}</tool_call>{"\\'
    reader, text = Calls(), "<tool_cat> is text"
    for at in range(0, len(text), size):
        content += "".join(delta["content"] for delta in reader.feed(text[at : at + size]))
    assert content == text


def test_messages_of_whole_answers():
    made = message_of(TWO_CALLS)
    names = [call["function"]["name"] for call in made["tool_calls"]]
    assert made["content"] is None and names == ["look_up", "nothing"]
    assert message_of("No call") == {"content": "No call"} and message_of("") == {"content": ""}
    (cut,) = message_of(ONE_CALL[:60])["tool_calls"]
    assert cut["function"]["arguments"] == ONE_CALL[44:60]


def test_calls_come_back_from_openai_client(served):
    """The double answers with the words of the question, backwards: here they are a call."""
    question = " ".join(ONE_CALL.split()[::-1])
    done = served.ask(question, tools=[LOOK_UP])
    (call,) = done.choices[0].message.tool_calls
    assert done.choices[0].finish_reason == "tool_calls" and done.choices[0].message.content is None
    assert json.loads(call.function.arguments) == {"shirt": 7, "team": "red"} and call.id.startswith("call_")
    with served.openai.chat.completions.stream(model="tiny", messages=[user(question)], tools=[LOOK_UP]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0]
    assert json.loads(final.message.tool_calls[0].function.arguments) == {"shirt": 7, "team": "red"}
    assert final.finish_reason == "tool_calls"
    forced = {"type": "function", "function": {"name": "look_up"}}
    assert served.ask(question, tools=[LOOK_UP], tool_choice=forced).choices[0].finish_reason == "stop"
    assert served.ask("b a", tools=[LOOK_UP], max_tokens=2).choices[0].message.content == "a b"
