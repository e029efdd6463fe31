"""Templates, labels and tokenizers: against measured conversations, and by reading the text back."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from avg_llava_jax.data.conversation import (
    IGNORE,
    IMAGE,
    LLAMA_3_SYSTEM,
    VICUNA_SYSTEM,
    encode_conversation,
    encode_prompt,
    encode_raw,
    keeps_turns,
    stop_ids,
)
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.tokenizer import load_tokenizer, train_byte_bpe

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "conversations.json").read_text())}
LLAMA_3_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["USER: Who wears 7? ASSISTANT: The player in red.", "What is the weather?", "[INST] a b [/INST]"] * 5


@pytest.fixture(scope="module")
def released():
    return load_tokenizer(GOLDEN / "avg-llava-tiny")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    special = ("<unk>", "<s>", "</s>", *LLAMA_3_SPECIAL, "<|im_start|>", "<|im_end|>")
    return train_byte_bpe(TEXTS, 320, tmp_path_factory.mktemp("small"), special)


@pytest.fixture(scope="module")
def chatml(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    small.save(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return load_tokenizer(folder)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def show(tokens, tokenizer):
    """The text of all tokens, with images and specials spelt out, and the text of the labelled ones."""
    names = {IMAGE: "<image>", **{i: text for text, i in tokenizer.special_tokens.items()}}

    def read(ids):
        out, run = "", []
        for token in [*ids, None]:
            if token in names or token is None:
                out, run = out + tokenizer.decode(run) + names.get(token, ""), []
            else:
                run.append(token)
        return out

    labelled = [label for label in tokens.labels if label != IGNORE]
    assert all(label in (IGNORE, token) for token, label in zip(tokens.ids, tokens.labels, strict=True))
    return read(tokens.ids), read(labelled)


@pytest.mark.parametrize("name", ["single", "multi_turn", "text_only", "newlines_unicode"])
def test_vicuna_matches_the_measured_ids_and_labels(released, name):
    case = CASES[name]
    tokens = encode_conversation(case["conversations"], released, "vicuna_v1", int(case["has_image"]))
    assert tokens.ids == case["input_ids"]
    assert tokens.labels == case["labels"]


def test_an_image_in_the_middle_stays_there(released):
    case = CASES["image_in_middle"]
    ours = encode_conversation(case["conversations"], released, images=1)
    assert ours.ids != case["input_ids"]
    at = ours.ids.index(IMAGE)
    assert released.decode(ours.ids[:at]).endswith("USER: Look ")
    assert released.decode(ours.ids[at + 1 :]).startswith(" here ASSISTANT: ok")
    # The measured text is that with the image moved to the front.
    moved = encode_conversation(case["processed"], released, images=1)
    assert (moved.ids, moved.labels) == (case["input_ids"], case["labels"])


def test_a_role_word_in_an_answer_keeps_the_sample(released):
    case = CASES["contains_role"]
    tokens = encode_conversation(case["conversations"], released, images=1)
    assert tokens.ids == case["input_ids"]
    assert set(case["labels"]) == {IGNORE}
    assert show(tokens, released)[1] == "The ASSISTANT: did.</s>"


def test_the_measured_empty_answer_is_a_prompt(released):
    case = CASES["empty_answer"]
    with pytest.raises(BadSample) as error:
        encode_conversation(case["conversations"], released, images=1)
    assert error.value.reason == "empty_answer"
    tokens = encode_prompt(case["conversations"][:1], released, images=1)
    assert (tokens.ids, tokens.labels) == (case["input_ids"], case["labels"])


def test_raw_text_matches_every_measured_prompt(released):
    files = sorted(GOLDEN.glob("infer_*.npz"))
    assert len(files) == 8
    for path in files:
        arrays = np.load(path)
        assert encode_raw(str(arrays["prompt"]), released).ids == arrays["input_ids"].tolist()


def test_raw_text_of_a_whole_conversation_is_that_conversation(released):
    case = CASES["multi_turn"]
    text = VICUNA_SYSTEM + " "
    for turn in case["conversations"]:
        human_turn = turn["from"] == "human"
        text += f"USER: {turn['value']} ASSISTANT:" if human_turn else f" {turn['value']}</s>"
    tokens = encode_raw(text, released)
    assert tokens.ids == case["input_ids"] and set(tokens.labels) == {IGNORE}


def test_a_prompt_is_the_beginning_of_its_conversation(released, small):
    turns = [human("<image>\nWho?"), gpt("Red."), human("Sure?"), gpt("Yes")]
    for tokenizer, template in [(released, "vicuna_v1"), (released, "mistral_instruct"), (small, "llama_3")]:
        whole = encode_conversation(turns, tokenizer, template, 1)
        for end in (1, 3):
            prompt = encode_prompt(turns[:end], tokenizer, template, 1)
            assert whole.ids[: len(prompt.ids)] == prompt.ids
            assert whole.labels[len(prompt.ids)] == whole.ids[len(prompt.ids)]
            assert set(prompt.labels) == {IGNORE}


TURNS = [human("A <image> b <image>?"), gpt("No: [/INST] USER: 3"), human("Why"), gpt("So.")]


def test_vicuna_reads_back(small):
    text, labelled = show(encode_conversation(TURNS, small, "vicuna_v1", 2), small)
    assert text == (
        f"<s>{VICUNA_SYSTEM} USER: A <image> b <image>? ASSISTANT: No: [/INST] USER: 3</s>USER: Why ASSISTANT: So.</s>"
    )
    assert labelled == " No: [/INST] USER: 3</s> So.</s>"


def test_mistral_instruct_reads_back(small):
    """LLaVA writes a space before the end of an answer (`SeparatorStyle.LLAMA_2`), Mistral does not."""
    for template, after in (("mistral_instruct", " "), ("mistral", "")):
        text, labelled = show(encode_conversation(TURNS, small, template, 2), small)
        first, second = f"No: [/INST] USER: 3{after}</s>", f"So.{after}</s>"
        assert text == f"<s>[INST] A <image> b <image>? [/INST] {first}[INST] Why [/INST] {second}"
        assert labelled == f" {first} {second}"


@pytest.mark.parametrize("name", ["llama_3", "llava_llama_3"])
def test_llama_3_reads_back(small, name):
    text, labelled = show(encode_conversation(TURNS, small, name, 2), small)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
    assert text == "<s>" + head("system", LLAMA_3_SYSTEM) + "".join(
        head("user" if turn["from"] == "human" else "assistant", turn["value"]) for turn in TURNS
    )
    assert labelled == "No: [/INST] USER: 3<|eot_id|>So.<|eot_id|>"


def system(text):
    return {"from": "system", "value": text}


QWEN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
FORMS = {  # template: head, a question with an image in it, one that begins with an image, what ends a turn
    "chatml": ("", "user\nA <image> b <image>?", "user\n<image>\nWhy", "\n"),
    "qwen_1_5": (QWEN, "user\nA <image> b <image>?", "user\n<image>\nWhy", "\n"),
    "llava_onevision": ("", "user \nA <image> b <image>?", "user <image>\nWhy", ""),
}


@pytest.mark.parametrize("name", FORMS)
def test_chatml_reads_back(small, name):
    head, first, second, end = FORMS[name]
    turns = [TURNS[0], TURNS[1], human("<image>\nWhy"), TURNS[3]]
    tokens = encode_conversation(turns, small, name, 3)
    text, labelled = show(tokens, small)
    opened, said = f"<|im_end|>{end}<|im_start|>assistant\n", "No: [/INST] USER: 3"
    assert text == (
        f"<s>{head}<|im_start|>{first}{opened}{said}<|im_end|>{end}<|im_start|>{second}{opened}So.<|im_end|>{end}"
    )
    assert labelled == f"{said}<|im_end|>So.<|im_end|>"
    for count in (1, 3):
        prompt = encode_prompt(turns[:count], small, name, 2 if count == 1 else 3)
        assert tokens.ids[: len(prompt.ids)] == prompt.ids
        assert tokens.labels[len(prompt.ids)] == tokens.ids[len(prompt.ids)]
    gap = " " if name == "llava_onevision" else ""
    text, _ = show(encode_prompt([system("Be brief."), human("Who?")], small, name), small)
    assert text == f"<s><|im_start|>system{gap}\nBe brief.<|im_end|>{end}<|im_start|>user{gap}\nWho?{opened}"
    assert stop_ids(small, name) == (2, small.special_tokens["<|im_end|>"])


@pytest.mark.parametrize("name", ["vicuna_v1", "mistral", "mistral_instruct", "llama_3", "plain", "tokenizer"])
def test_a_system_turn_elsewhere(small, chatml, name):
    """Before the first question, after which the images of a record without placeholders still come first."""
    tokenizer = chatml if name == "tokenizer" else small
    given = [human("Who?"), gpt("Red.")]
    ours = encode_conversation([system("Be brief."), *given], tokenizer, name, 1)
    if name == "tokenizer":
        text, labelled = show(ours, tokenizer)
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWho?")
        assert labelled == "Red.<|im_end|>"
    else:
        assert ours == encode_conversation([human("Be brief.\n\n<image>\nWho?"), given[1]], tokenizer, name, 1)


QWEN3 = (  # as Qwen3's own: the last answer has its thoughts, earlier ones have not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}T\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_prompt_needs_no_labels(small, tmp_path):
    """A template that rewrites earlier turns still prompts; there it is ChatML."""
    small.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(QWEN3)
    tokenizer = load_tokenizer(tmp_path)
    assert not keeps_turns(tokenizer) and tokenizer.takes_system
    prompt = encode_prompt(TURNS[:3], tokenizer, "tokenizer", 2)
    assert prompt.ids == encode_prompt(TURNS[:3], tokenizer, "chatml", 2).ids[1:]  # BOS is the template's affair
    with pytest.raises(ValueError, match="changes earlier turns"):
        encode_conversation(TURNS, tokenizer, "tokenizer", 2)


def test_plain_learns_the_caption_alone(released):
    tokens = encode_conversation([human("Describe this.\n<image>"), gpt("A cat.")], released, "plain", 1)
    caption = released.encode("A cat.\n")
    assert tokens.ids == [released.bos_id, IMAGE, *caption]
    assert tokens.labels == [IGNORE, IGNORE, *caption]
    assert encode_prompt([human("")], released, "plain", 1).ids == [released.bos_id, IMAGE]
    with pytest.raises(BadSample) as error:
        encode_conversation([human("<image>"), gpt("a"), human("b"), gpt("c")], released, "plain", 1)
    assert error.value.reason == "not_plain"


def test_the_tokenizers_own_template_reads_back(chatml):
    text, labelled = show(encode_conversation(TURNS, chatml, "tokenizer", 2), chatml)
    assert text == (
        "<|im_start|>user\nA <image> b <image>?<|im_end|>\n<|im_start|>assistant\nNo: [/INST] USER: 3<|im_end|>\n"
        "<|im_start|>user\nWhy<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    )
    assert labelled == "No: [/INST] USER: 3<|im_end|>So.<|im_end|>"
    prompt = encode_prompt(TURNS[:3], chatml, "tokenizer", 2)
    assert show(prompt, chatml)[0].endswith("Why<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "mistral_instruct", "llama_3", "tokenizer"])
def test_texts_around_images_hold_no_markers(chatml, template):
    """A list of texts is the text with `<image>` between them, except that the word in it is text."""
    marked, listed = "Is <image> larger\nthan <image>?", ["Is ", " larger\nthan ", "?"]
    both = [encode_conversation([human(value), gpt("No.")], chatml, template, 2) for value in (marked, listed)]
    assert both[0] == both[1]
    said = "What is <image> \U000f0000?"
    tokens = encode_prompt([human([said]), gpt([said]), human(["", said])], chatml, template, 1)
    assert tokens.images == 1 and show(tokens, chatml)[0].count(said) == 3
    assert encode_raw([said, said], chatml).images == 1


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "mistral_instruct", "llama_3", "tokenizer"])
def test_a_prompt_may_hold_an_empty_answer(chatml, template):
    """The tokens are those that the model saw and wrote: its prompt, then at once the end of the answer."""
    asked = encode_prompt([human("Hello")], chatml, template).ids
    ids = encode_prompt([human("Hello"), gpt(""), human("And?")], chatml, template).ids
    assert ids[: len(asked)] == asked and ids[len(asked)] in stop_ids(chatml, template)


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "mistral_instruct", "llama_3"])
@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_system_turn_adds_nothing_where_it_stands_in_the_question(chatml, template, blank):
    assert encode_conversation([system(blank), *TURNS], chatml, template, 2) == (
        encode_conversation(TURNS, chatml, template, 2)
    )


GREETINGS = {
    "vicuna_v1": f"<s>{VICUNA_SYSTEM} USER: S\n\n ASSISTANT: Hi</s>USER:  ASSISTANT: A</s>USER: Who? ASSISTANT:",
    "mistral": "<s>[INST] S\n\n [/INST] Hi</s>[INST]  [/INST] A</s>[INST] Who? [/INST]",
    "mistral_instruct": "<s>[INST] S\n\n [/INST] Hi </s>[INST]  [/INST] A </s>[INST] Who? [/INST]",
    "chatml": "<s>|system S|assistant Hi|user |assistant A|user Who?|assistant ",
    "tokenizer": "|system S|assistant Hi|user |assistant A|user Who?|assistant ",
    "alternating": "|user S\n\n|assistant Hi|user |assistant A|user Who?|assistant ",
}
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}" + CHATML.partition("%}")[2]
)


@pytest.mark.parametrize("template", [*GREETINGS, "llama_3"])
def test_a_prompt_may_greet_first_and_ask_nothing(chatml, template, tmp_path):
    """An empty question precedes the greeting where answers follow questions; the system's text stands in it."""
    turns = [system("S"), gpt("Hi"), human(""), gpt("A"), human("Who?")]
    if template == "alternating":
        chatml.save(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(ALTERNATING)
        chatml, template, wanted = load_tokenizer(tmp_path), "tokenizer", GREETINGS[template]
    elif template == "llama_3":
        asked = [human("S\n\n"), *turns[1:]]
        wanted = show(encode_prompt(asked, chatml, template), chatml)[0]
    else:
        wanted = GREETINGS[template]
    text = show(encode_prompt(turns, chatml, template), chatml)[0]
    if "|" in wanted:
        text = re.sub(r"(<\|im_end\|>\n)?<\|im_start\|>(\w+)\n", r"|\2 ", text)
    assert text == wanted
    with_image = encode_prompt(turns[1:], chatml, template, 1)
    assert with_image.images == 1 and with_image == encode_prompt(
        [gpt("Hi"), human("<image>\n"), *turns[3:]], chatml, template, 1
    )


def test_a_template_that_rewrites_earlier_turns_is_refused(small, tmp_path):
    small.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="changes earlier turns"):
        encode_conversation(TURNS, load_tokenizer(tmp_path), "tokenizer", 2)


def test_templates_say_what_they_lack(released, small):
    with pytest.raises(ValueError, match="no chat template"):
        encode_conversation(TURNS, released, "tokenizer", 2)
    with pytest.raises(ValueError, match="start_header_id"):
        encode_conversation(TURNS, released, "llama_3", 2)
    with pytest.raises(ValueError, match="vicuna_v2.*choose from vicuna_v1"):
        encode_conversation(TURNS, small, "vicuna_v2", 2)


def test_stop_ids(released, small, chatml):
    assert stop_ids(released, "vicuna_v1") == stop_ids(released, "mistral_instruct") == (2,)
    assert stop_ids(small, "llama_3") == (2, small.special_tokens["<|eot_id|>"])
    assert stop_ids(chatml, "tokenizer") == (2, chatml.special_tokens["<|im_end|>"])
    assert set(stop_ids(released, "plain")) == {2, released.encode("\n")[-1]}


@pytest.mark.parametrize(
    "turns, images, reason",
    [
        ([], 0, "no_turns"),
        (None, 0, "no_turns"),
        ("hello", 0, "no_turns"),
        (["hello"], 0, "malformed_turn"),
        ([{"from": "human"}], 0, "malformed_turn"),
        ([human(None)], 0, "malformed_turn"),
        ([human("a"), {"from": "bot", "value": "b"}], 0, "unknown_role"),
        ([gpt("a")], 0, "no_turns"),
        ([gpt("a"), human("b"), gpt("c")], 1, "not_human_first"),
        ([human("a"), human("b"), gpt("c")], 0, "bad_order"),
        ([human("a"), gpt("b"), gpt("c")], 0, "bad_order"),
        ([human("a"), gpt("b"), human("c")], 0, "ends_on_human"),
        ([human("a"), gpt(" \n")], 0, "empty_answer"),
        ([human("a"), gpt(""), human("b"), gpt("c")], 0, "empty_answer"),
        ([human("  "), gpt("b")], 0, "empty_question"),
        ([human("a"), gpt("<image>")], 1, "image_in_answer"),
        ([{"from": "system", "value": "<image>"}, human("a"), gpt("b")], 1, "image_in_system"),
        ([{"from": "system", "value": "a"}], 0, "no_turns"),
        ([{"from": "system", "value": "a"}, gpt("b"), human("c"), gpt("d")], 0, "not_human_first"),
        ([human("a"), {"from": "system", "value": "b"}], 0, "unknown_role"),
        ([human("<image> a"), gpt("b")], 0, "image_count"),
        ([human("<image> a"), gpt("b")], 2, "image_count"),
        ([human("<image><image> a"), gpt("b")], 1, "image_count"),
    ],
)
def test_bad_samples_have_a_reason(released, turns, images, reason):
    with pytest.raises(BadSample) as error:
        encode_conversation(turns, released, images=images)
    assert error.value.reason == reason
    again = pickle.loads(pickle.dumps(error.value))
    assert (again.reason, again.detail, str(again)) == (reason, error.value.detail, str(error.value))


def test_text_that_is_no_unicode_is_named(released, small):
    """What a shell's argument of other bytes than UTF-8 becomes, and what JSON can spell."""
    for text in ("caf\udce9", "Hello \ud83d"):
        half = f"\\\\u{ord(text[-1]):04x}"
        with pytest.raises(BadSample, match=f"malformed_turn: turn 2 has {half}, half of a surrogate pair"):
            encode_prompt([human("Hi"), gpt("Hello"), human(text)], released)
        with pytest.raises(BadSample, match=f"the prompt has {half}"):
            encode_raw(text, small)


def test_a_prompt_must_end_with_a_question(released):
    with pytest.raises(BadSample) as error:
        encode_prompt([human("a"), gpt("b")], released)
    assert error.value.reason == "ends_on_answer"


def test_images_without_a_placeholder_come_first(released):
    given = [human("Who?"), gpt("Red."), human("And?"), gpt("Blue.")]
    ours = encode_conversation(given, released, images=2)
    assert ours == encode_conversation([human("<image>\n<image>\nWho?"), *given[1:]], released, images=2)
    assert given[0] == human("Who?")  # the caller's turns are not written


def test_text_that_spells_a_special_token_is_text(released, small):
    for tokenizer in (released, small):
        ids = tokenizer.encode("a</s>b<s>")
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == "a</s>b<s>"
        tokens = encode_conversation([human("say </s>"), gpt("</s>")], tokenizer)
        assert tokens.ids.count(tokenizer.eos_id) == 1
        assert show(tokens, tokenizer)[1].strip() == "</s></s>"


@pytest.mark.parametrize("text", ["", " ", "\n\n", "  two  ", "naïve 你好 😀\t7", "a\x00b", "<image>", "▁"])
def test_any_text_round_trips(released, small, text):
    assert small.decode(small.encode(text)) == text
    if "▁" not in text:  # the word boundary of sentencepiece, which reads back as a space
        assert released.decode(released.encode(text)) == text


def test_legacy_puts_a_word_boundary_after_a_special_token(released, tmp_path):
    assert released.encode("USER", after_special=True) == released.encode("USER")[1:]
    released.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for legacy in (True, None):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": legacy}))
        old = load_tokenizer(tmp_path)
        assert old.encode("USER", after_special=True) == old.encode("USER") == released.encode("USER")
    tokens = encode_conversation([human("a"), gpt("b"), human("c"), gpt("d")], old)
    at = tokens.ids.index(old.eos_id)
    assert tokens.ids[at + 1 :][: len(old.encode("USER:"))] == old.encode("USER:")
    assert show(tokens, old)[1] == "b</s>d</s>"


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_tokenizer_json_after_a_special_token(scheme, tmp_path):
    """What the library makes of `</s>` + text is what comes after a special token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    model.train_from_iterator(TEXTS, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    ours = load_tokenizer(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.bos_id is None  # its post-processor adds none
    for text in ("USER: Who", " The", "red."):
        assert ours.encode(text) == library.encode(text).ids
        assert ours.encode(text, after_special=True) == library.encode("</s>" + text).ids[1:]


def test_saving_and_pickling(released, small, tmp_path):
    for name, tokenizer in {"sentencepiece": released, "json": small}.items():
        tokenizer.save(tmp_path / name)
        for again in (load_tokenizer(tmp_path / name), pickle.loads(pickle.dumps(tokenizer))):
            assert again.encode("Who wears 7?") == tokenizer.encode("Who wears 7?")
            assert again.special_tokens == tokenizer.special_tokens
            assert (again.vocab_size, again.bos_id, again.eos_id, again.pad_id) == (
                tokenizer.vocab_size,
                tokenizer.bos_id,
                tokenizer.eos_id,
                tokenizer.pad_id,
            )


def test_the_trained_tokenizer(small):
    assert (small.bos_id, small.eos_id, small.pad_id) == (1, 2, 0)
    assert small.vocab_size <= 320
    assert len(small.encode("Who wears 7?")) < 8
    assert len(small.encode("1234")) == 4


def test_tokenizers_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not valid JSON"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=100"):
        train_byte_bpe(TEXTS, 100, tmp_path)
    with pytest.raises(ValueError, match="must begin with"):
        train_byte_bpe(TEXTS, 300, tmp_path, ("<s>",))
