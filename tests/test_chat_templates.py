"""The chat templates that exports write, against the texts that our own templates make."""

import base64
import io
import itertools
import json

import jinja2
import pytest
from PIL import Image
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from avg_llava_jax.convert import llava_next
from avg_llava_jax.convert.chat_templates import chat_template
from avg_llava_jax.data.conversation import CHATML as CHATML_FORMS
from avg_llava_jax.data.conversation import IMAGE as IMAGE_ID
from avg_llava_jax.data.conversation import _checked, _render, encode_prompt
from avg_llava_jax.data.tokenizer import load_tokenizer, train_byte_bpe
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.reading import conversation
from tests.test_conversation import ALTERNATING, CHATML, GOLDEN, TEXTS

TEMPLATES = ("vicuna_v1", "mistral", "mistral_instruct", "llama_3")
IMAGE, WHO = {"type": "image"}, {"type": "text", "text": "Who?"}


def rendered(template, messages, **given):
    (text,), _ = render_jinja_template([messages], chat_template=chat_template(template, ""), eos_token="</s>", **given)
    return text


def ours(template, turns, images):
    tokenizer = load_tokenizer(GOLDEN / "avg-llava-tiny")
    turns = [{"from": role, "value": value} for role, value in turns]
    pieces = _render(_checked(turns, images, template), tokenizer, template)
    return "".join("<image>" if piece.image else piece.text for piece in pieces)


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_the_system_says_stands_before_the_first_question(template):
    for before, said in {
        ("system",): "Be brief.\n\n",
        ("developer",): "Be brief.\n\n",
        ("system", "developer"): "Be brief.\nBe brief.\n\n",
    }.items():
        system = [{"role": role, "content": "Be brief."} for role in before]
        assert rendered(template, [*system, {"role": "user", "content": "Who?"}]) == (
            ours(template, [("human", said + "Who?")], 0)
        )
        assert rendered(template, [*system, {"role": "user", "content": [IMAGE, WHO]}]) == (
            ours(template, [("human", said + "<image>\nWho?")], 1)
        )
    turns = [("human", "Who?"), ("gpt", "Ann"), ("human", "<image>\n<image>\nAnd? ")]
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Ann"}]},
        {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "And? "}]},
    ]
    assert rendered(template, messages) == ours(template, turns, 2)
    late = [*messages[:2], {"role": "system", "content": "Be brief."}, messages[2]]
    assert rendered(template, late) == ours(template, [("human", "Be brief.\n\nWho?"), *turns[1:]], 2)
    assert rendered(template, [*messages[:1]]) == ours(template, turns[:1], 0)


@pytest.mark.parametrize("template", CHATML_FORMS)
def test_chatml_has_a_system_turn(template):
    turns = [("human", "<image>\n<image>\nWho? "), ("gpt", "Ann "), ("human", "And\n <image>?"), ("gpt", "Bo")]
    messages = [
        {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Who? "}]},
        {"role": "assistant", "content": "Ann "},
        {"role": "user", "content": [{"type": "text", "text": "And\n <image>?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Bo"}]},
    ]
    for count, images in ((1, 2), (3, 3), (4, 3)):
        assert rendered(template, messages[:count]) == ours(template, turns[:count], images)
    said = [{"role": role, "content": "Be brief."} for role in ("system", "developer")]
    assert rendered(template, [*said, *messages]) == (ours(template, [("system", "Be brief.\nBe brief."), *turns], 3))


def png():
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


URL = png()
TEXT = {"type": "text", "text": " And?"}
CONTENTS = ("", " \n", "Who? ", None, [], [TEXT], [WHO, TEXT], [{"type": "text", "text": ""}, TEXT])
LOOKING = (
    [IMAGE],
    [IMAGE, WHO],
    [WHO, IMAGE],
    [WHO, IMAGE, TEXT, IMAGE],
    [IMAGE, TEXT, IMAGE, WHO],
    [IMAGE, IMAGE, TEXT],
)
ROLE_ORDERS = [order for n in (1, 2, 3, 4) for order in itertools.product(("system", "user", "assistant"), repeat=n)]


def every_kind_of_messages():
    """Each order of roles up to four messages, with contents that take turns."""
    said, seen = itertools.cycle(CONTENTS), itertools.cycle((*CONTENTS, *LOOKING))
    for order in ROLE_ORDERS:
        yield [{"role": role, "content": next(seen if role == "user" else said)} for role in order]


def as_sent(message):
    """A message of the library as the server takes it."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    sent = {"type": "image_url", "image_url": {"url": URL}}
    return message | {"content": [sent if part is IMAGE else part for part in content]}


def as_served(messages, config):
    """(turns, number of images) that the server makes of messages."""
    turns, images, _ = conversation(dict(enumerate(map(as_sent, messages))), "messages", config, Limits())
    return turns, len(images)


@pytest.mark.parametrize("template", [*TEMPLATES, *CHATML_FORMS])
def test_every_conversation_is_the_servers_prompt(template, tiny):
    """Greetings, empty and blank messages, several of one role, late system messages, images between texts."""
    tokenizer = load_tokenizer(GOLDEN / "avg-llava-tiny")
    for messages in every_kind_of_messages():
        turns, images = as_served(messages, tiny)
        pieces = _render(_checked(turns, images, template), tokenizer, template)
        wanted = "".join("<image>" if piece.image else piece.text for piece in pieces)
        assert rendered(template, messages, add_generation_prompt=True) == wanted, messages


def test_a_greeting_alone_and_with_an_answer():
    hello = {"role": "assistant", "content": "Hello!"}
    asked = [hello, {"role": "user", "content": "Who?"}]
    assert rendered("mistral", [hello]) == "[INST]  [/INST] Hello!</s>"
    assert rendered("mistral", asked) == "[INST]  [/INST] Hello!</s>[INST] Who? [/INST]"
    assert rendered("mistral_instruct", asked) == "[INST]  [/INST] Hello! </s>[INST] Who? [/INST]"
    assert rendered("chatml", [hello]) == "<|im_start|>assistant\nHello!<|im_end|>\n"


SILENT = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
OF_PARTS = CHATML.replace("m.content", "m.content[0].text")


@pytest.mark.parametrize("own", [CHATML, ALTERNATING, SILENT, OF_PARTS])
def test_a_tokenizers_own_template_makes_the_servers_prompt(own, tiny, tmp_path):
    """A template that takes every order of roles, one that needs questions first, one without system, one of parts."""
    assert own == CHATML or own not in CHATML
    train_byte_bpe(TEXTS, 340, tmp_path, ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    (tmp_path / "chat_template.jinja").write_text(own)
    tokenizer = load_tokenizer(tmp_path)
    llava_next.save_tokenizer(tmp_path / "out", tokenizer, {"<image>": tokenizer.vocab_size}, "tokenizer")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for messages in every_kind_of_messages():
        turns, images = as_served(messages, tiny)
        wanted = encode_prompt(turns, tokenizer, "tokenizer", images).ids
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == [tokenizer.vocab_size if token == IMAGE_ID else token for token in wanted], messages


def test_a_tokenizers_own_template_takes_images_too(tmp_path):
    """ChatML as the hub has it takes texts; exported, it takes parts, and makes the ids that we make."""
    tokenizer = train_byte_bpe(TEXTS, 340, tmp_path, ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    tokenizer = load_tokenizer(tmp_path)
    messages = [
        {"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Who? "}]},
        {"role": "assistant", "content": "Ann "},
        {"role": "user", "content": [{"type": "text", "text": " And?"}]},
    ]
    turns = [("human", "<image>\n<image>\nWho? "), ("gpt", "Ann "), ("human", " And?")]
    turns = [{"from": role, "value": value} for role, value in turns]
    image_token, written = tokenizer.vocab_size, []
    for number in (1, 2):  # what went out comes back and goes out again as it was
        folder = tmp_path / f"out{number}"
        llava_next.save_tokenizer(folder, tokenizer, {"<image>": image_token}, "tokenizer")
        theirs = AutoTokenizer.from_pretrained(folder)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        ours = encode_prompt(turns, tokenizer, "tokenizer", images=2).ids
        assert ids == [image_token if token == IMAGE_ID else token for token in ours]
        with pytest.raises(jinja2.exceptions.TemplateError, match="no parts of type 'video'"):
            theirs.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
        written.append((folder / "chat_template.jinja").read_text())
        assert not (folder / "chat_template.json").exists()
        tokenizer = load_tokenizer(folder)
    assert written[0] == written[1]


@pytest.mark.parametrize("template", [*TEMPLATES, "chatml"])
@pytest.mark.parametrize(
    ("messages", "given", "message"),
    [
        (["user", "tool"], {}, "no turns of role 'tool'"),
        (["critic", "user"], {}, "no turns of role 'critic'"),
        (["user"], {"tools": [{"type": "function", "function": {"name": "look"}}]}, "has no tools"),
    ],
)
def test_turns_that_a_template_has_not_are_errors(template, messages, given, message):
    with pytest.raises(jinja2.exceptions.TemplateError, match=f"template {template} .*{message}"):
        rendered(template, [{"role": role, "content": "a"} for role in messages], **given)


@pytest.mark.parametrize("template", TEMPLATES)
def test_parts_and_calls_that_a_template_has_not_are_errors(template):
    with pytest.raises(jinja2.exceptions.TemplateError, match="no parts of type 'video', only text and image"):
        rendered(template, [{"role": "user", "content": [{"type": "video"}, WHO]}])
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    with pytest.raises(jinja2.exceptions.TemplateError, match="no tool calls"):
        rendered(
            template,
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        )
