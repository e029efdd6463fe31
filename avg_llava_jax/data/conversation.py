"""Conversations in the LLaVA format become token ids: IMAGE marks an image, labels mark the answers.

A conversation is a list of turns `{"from": "human" | "gpt", "value": text}`; the first may be from "system".
`<image>` in a human turn marks the position of an image; in the ids it is IMAGE. Labels equal the ids of the
answers and of the token that ends each answer; every other label is IGNORE.

    vicuna_v1, "<image>\\nWho?" -> "Ann":

    <s> system USER: <image> \\n Who? ASSISTANT: Ann </s>
                                               ~~~~~~~~~~  labelled

    qwen_1_5, the same turns:

    <|im_start|> system \n You are ... <|im_end|> \n <|im_start|> user \n <image> \n Who? <|im_end|> \n
    <|im_start|> assistant \n Ann <|im_end|> \n
                               ~~~~~~~~~~~~~~ labelled

Templates: `vicuna_v1`, `llama_3` (alias `llava_llama_3`), `mistral_instruct`, ChatML in three forms (`chatml`,
`qwen_1_5`, `llava_onevision`; see `CHATML`), `plain` (image and caption, for connector pre-training) and `tokenizer`
(the tokenizer's own chat template). A system turn replaces that of ChatML and goes to the tokenizer's own template,
if it has one; in the other templates its text stands before the first question.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from avg_llava_jax.data.errors import BadSample, half_character
from avg_llava_jax.data.tokenizer import Tokenizer

IMAGE = -200  # id of the placeholder that an image's visual tokens replace
IGNORE = -100  # label of a token that adds nothing to the loss
PLACEHOLDER = "<image>"

Turn = dict[str, str]

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


class ChatML(NamedTuple):
    """A form of ChatML: the system turn where a conversation has none, the text after `user` and after a turn."""

    system: str | None
    user: str
    end: str


CHATML = {
    "chatml": ChatML(None, "", "\n"),
    "qwen_1_5": ChatML("You are a helpful assistant.", "", "\n"),
    "llava_onevision": ChatML(None, " ", ""),
}
"""`chatml` is Qwen3's, `qwen_1_5` Qwen2's and that of LLaVA-OneVision in LLaVA's own code, `llava_onevision` the
transformers library's: `<|im_start|>user <image>\\nWho?<|im_end|><|im_start|>assistant\\n`, images first.
"""
START, END = "<|im_start|>", "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
"""Stop token of GPT-2's and Qwen's tokenizers, beside the template's own."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """ids: n token ids, IMAGE for each image. labels: n ids, IGNORE where no loss is taken."""

    ids: list[int]
    labels: list[int]

    @property
    def images(self) -> int:
        """Number of images."""
        return self.ids.count(IMAGE)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A run of rendered text; the text of a `special` piece is the name of one special token."""

    text: str
    labelled: bool = False
    special: bool = False


def encode_conversation(
    conversations: Sequence[Turn], tokenizer: Tokenizer, template: str = "vicuna_v1", images: int = 0
) -> Tokens:
    """Encodes a training sample: questions and answers that alternate, the last turn an answer.

    images: number of images of the sample. The human turns must contain as many `<image>`; if they
        contain none, all images precede the first question, each on its own line.

    Raises BadSample: `no_turns`, `malformed_turn`, `unknown_role`, `not_human_first`, `bad_order`,
    `ends_on_human`, `empty_question`, `empty_answer`, `image_in_answer`, `image_in_system`, `image_count`; `not_plain`
    where template `plain` gets more than one question and one answer. Raises ValueError for an
    unknown template, and for a special token of the template that the tokenizer lacks.
    """
    turns = _checked(conversations, images, template)
    if turns[-1]["from"] == "human":
        raise BadSample("ends_on_human", "the last turn is a question without an answer")
    return _encode(_render(turns, tokenizer, template), tokenizer, bos=_puts_bos(template))


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, template: str = "vicuna_v1", images: int = 0) -> Tokens:
    """Encodes a prompt: a conversation that ends with a question, up to the start of its answer; no token has a label.

    Raises as `encode_conversation`, but BadSample `ends_on_answer` in place of `ends_on_human`.
    """
    checked = _checked(turns, images, template)
    if checked[-1]["from"] != "human":
        raise BadSample("ends_on_answer", "a prompt must end with a human turn")
    tokens = _encode(_render(checked, tokenizer, template), tokenizer, bos=_puts_bos(template))
    return Tokens(tokens.ids, [IGNORE] * len(tokens.ids))


def encode_raw(text: str, tokenizer: Tokenizer) -> Tokens:
    """Encodes text without a template: `<image>` marks images, special tokens are parsed, BOS precedes the text.

    Raises BadSample `malformed_turn` where the text has half of a surrogate pair.
    """
    _whole(text, "the prompt")
    tokens = _encode(_split_special(text, tokenizer), tokenizer, bos=True)
    return Tokens(tokens.ids, [IGNORE] * len(tokens.ids))


def stop_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """Stop ids, ascending: the token that the template writes after an answer, the tokenizer's EOS, `END_OF_TEXT`."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    stops = {tokenizer.eos_id, tokenizer.special_tokens.get(END_OF_TEXT, tokenizer.eos_id)}
    labelled = [piece for piece in _render(turns, tokenizer, template) if piece.labelled]
    stops.update(_special_id(piece.text, tokenizer) for piece in labelled if piece.special)
    if template == "plain":
        stops.add(tokenizer.encode("b\n")[-1])
    return tuple(sorted(stops))


def _checked(conversations: Sequence[Turn], images: int, template: str) -> list[Turn]:
    """Validated turns: human and gpt alternate after the system, no text is empty, each image has one placeholder."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise BadSample("no_turns", "`conversations` must be a list of turns that is not empty")
    turns = []
    for number, turn in enumerate(conversations):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise BadSample("malformed_turn", f"turn {number} needs the strings `from` and `value`")
        _whole(text, f"turn {number}")
        if role not in ("human", "gpt") and (role, number) != ("system", 0):
            raise BadSample("unknown_role", f"turn {number} is from {role!r}; known are human, gpt, and system first")
        if role == "gpt" and (not turns or turns[-1]["from"] == "system"):
            raise BadSample("not_human_first", "the first turn is an answer")
        if number and role == turns[-1]["from"]:
            raise BadSample("bad_order", f"turns {number - 1} and {number} are both from {role}")
        if role == "system" and PLACEHOLDER in text:
            raise BadSample("image_in_system", f"turn {number} is from the system with {PLACEHOLDER} in it")
        if role == "gpt" and PLACEHOLDER in text:
            raise BadSample("image_in_answer", f"turn {number} is an answer with {PLACEHOLDER} in it")
        if role == "gpt" and not text.strip():
            raise BadSample("empty_answer", f"turn {number} is an answer without text")
        turns.append({"from": role, "value": text})
    first = int(turns[0]["from"] == "system")
    if first == len(turns):
        raise BadSample("no_turns", "the only turn is from the system")
    found = sum(turn["value"].count(PLACEHOLDER) for turn in turns)
    if not found and images:
        turns[first]["value"] = f"{PLACEHOLDER}\n" * images + turns[first]["value"]
    elif found != images:
        raise BadSample("image_count", f"{images} images for {found} {PLACEHOLDER}")
    for number, turn in enumerate(turns):
        if PLACEHOLDER in turn["value"]:
            turn["value"] = turn["value"].strip()  # as the released code does where an image stands
        if turn["from"] == "human" and not turn["value"].strip() and template != "plain":
            raise BadSample("empty_question", f"turn {number} is a question without text")
    if template == "plain" and len(turns) > first + 2:
        raise BadSample("not_plain", f"template plain takes one question and one answer, not {len(turns)} turns")
    return turns


def _without_system(turns: list[Turn]) -> list[Turn]:
    """The turns with the system's text, if any, before the first question."""
    if turns[0]["from"] != "system":
        return turns
    system, question, *others = turns
    return [{"from": "human", "value": f"{system['value']}\n\n{question['value']}"}, *others]


def _whole(text: str, what: str) -> None:
    half = half_character(text)
    if half:
        raise BadSample("malformed_turn", f"{what} has {half}, half of a surrogate pair: write it as valid UTF-8")


def _render(turns: list[Turn], tokenizer: Tokenizer, template: str) -> list[_Piece]:
    """Renders turns as pieces of text. After a final human turn comes the header of the answer."""
    if template in CHATML:
        return list(_chatml(turns, CHATML[template]))
    if template == "tokenizer":
        return list(_own_template(turns, tokenizer))
    turns = _without_system(turns)
    if template == "vicuna_v1":
        return list(_vicuna_v1(turns, tokenizer))
    if template in ("llama_3", "llava_llama_3"):
        return list(_llama_3(turns))
    if template == "mistral_instruct":
        return list(_mistral_instruct(turns, tokenizer))
    if template == "plain":
        return list(_plain(turns))
    known = f"vicuna_v1, llama_3 (llava_llama_3), mistral_instruct, {', '.join(CHATML)}, plain, tokenizer"
    raise ValueError(f"template {template!r} is not known; choose from {known}")


def _puts_bos(template: str) -> bool:
    return template != "tokenizer"  # the tokenizer's own template writes BOS itself


def _vicuna_v1(turns: list[Turn], tokenizer: Tokenizer) -> Iterable[_Piece]:
    yield _Piece(VICUNA_SYSTEM + " ")
    for turn in turns:
        if turn["from"] == "human":
            yield _Piece(f"USER: {turn['value']} ASSISTANT:")
        else:
            yield _Piece(f" {turn['value']}", labelled=True)
            yield _eos(tokenizer)


def _mistral_instruct(turns: list[Turn], tokenizer: Tokenizer) -> Iterable[_Piece]:
    for turn in turns:
        if turn["from"] == "human":
            yield _Piece(f"[INST] {turn['value']} [/INST]")
        else:
            yield _Piece(f" {turn['value']}", labelled=True)
            yield _eos(tokenizer)


def _llama_3(turns: list[Turn]) -> Iterable[_Piece]:
    def header(role: str) -> Iterable[_Piece]:
        yield _Piece("<|start_header_id|>", special=True)
        yield _Piece(role)
        yield _Piece("<|end_header_id|>", special=True)
        yield _Piece("\n\n")

    yield from header("system")
    yield _Piece(LLAMA_3_SYSTEM)
    yield _Piece("<|eot_id|>", special=True)
    for turn in turns:
        answer = turn["from"] == "gpt"
        yield from header("assistant" if answer else "user")
        yield _Piece(turn["value"].strip(), labelled=answer)
        yield _Piece("<|eot_id|>", labelled=answer, special=True)
    if turns[-1]["from"] == "human":
        yield from header("assistant")


def _chatml(turns: list[Turn], form: ChatML) -> Iterable[_Piece]:
    if form.system is not None and turns[0]["from"] != "system":
        turns = [{"from": "system", "value": form.system}, *turns]
    for turn in turns:
        yield _Piece(START, special=True)
        match turn["from"]:
            case "system":
                yield _Piece(f"system{form.user}\n{turn['value']}")
            case "human":
                first = re.match(f"({PLACEHOLDER}\n?)*" if form.user else "", turn["value"])[0]
                images, text = first.replace("\n", ""), turn["value"][len(first) :]
                yield _Piece(f"user{form.user}{images}\n{text}")
            case "gpt":
                yield _Piece("assistant\n")
                yield _Piece(turn["value"], labelled=True)
        yield _Piece(END, labelled=turn["from"] == "gpt", special=True)
        yield _Piece(form.end)
    if turns[-1]["from"] == "human":
        yield _Piece(START, special=True)
        yield _Piece("assistant\n")


def _plain(turns: list[Turn]) -> Iterable[_Piece]:
    """The images and the caption; the text of the question is dropped, as in LLaVA."""
    yield _Piece(PLACEHOLDER * turns[0]["value"].count(PLACEHOLDER))
    if len(turns) > 1:
        yield _Piece(turns[1]["value"] + "\n", labelled=True)


def _own_template(turns: list[Turn], tokenizer: Tokenizer) -> Iterable[_Piece]:
    """An answer is the difference of two renderings: the turns up to and including it, less the turns before it."""
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    if not tokenizer.takes_system:
        turns = _without_system(turns)
    messages = [{"role": names[turn["from"]], "content": turn["value"]} for turn in turns]
    ends_open = turns[-1]["from"] == "human"
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=ends_open)
    at = 0
    for number, turn in enumerate(turns):
        if turn["from"] != "gpt" or ends_open:  # a prompt has no labels
            continue
        before = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True)
        upto = tokenizer.apply_chat_template(messages[: number + 1])
        if not whole.startswith(before) or not whole.startswith(upto) or len(upto) <= len(before):
            raise ValueError(
                "the tokenizer's chat template changes earlier turns when later ones are added, "
                "so its answers cannot be found; choose another `template`"
            )
        yield from _split_special(whole[at : len(before)], tokenizer)
        answer = [
            dataclasses.replace(piece, labelled=True)
            for piece in _split_special(whole[len(before) : len(upto)], tokenizer)
        ]
        if len(answer) > 1 and answer[-2].special and not answer[-1].text.strip():
            answer[-1] = dataclasses.replace(answer[-1], labelled=False)  # white space after the end-of-turn token
        yield from answer
        at = len(upto)
    yield from _split_special(whole[at:], tokenizer)


def keeps_turns(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own template renders earlier turns as before when later ones are added."""
    turns = [{"from": role, "value": "a"} for role in ("human", "gpt") * 2]
    try:
        return bool(list(_own_template(turns, tokenizer)))
    except ValueError:
        return False


def _split_special(text: str, tokenizer: Tokenizer) -> list[_Piece]:
    return [_Piece(part, special=token is not None) for part, token in tokenizer.split_special(text)]


def _eos(tokenizer: Tokenizer) -> _Piece:
    return _Piece(tokenizer.eos_token, labelled=True, special=True)


def _special_id(text: str, tokenizer: Tokenizer) -> int:
    if text not in tokenizer.special_tokens:
        raise ValueError(f"the template needs the special token {text!r}, which this tokenizer does not have")
    return tokenizer.special_tokens[text]


def _encode(pieces: Iterable[_Piece], tokenizer: Tokenizer, bos: bool) -> Tokens:
    """Tokenizes each run of text between special tokens and images in one call.

    A run after an image is tokenized like the start of a text, as in the released code.
    """
    has_bos = bos and tokenizer.bos_id is not None
    ids = [tokenizer.bos_id] if has_bos else []
    labels = [IGNORE] * len(ids)
    run: list[tuple[str, bool]] = []
    after_special = False

    def flush() -> None:
        run_ids, run_labels = _encode_run(run, tokenizer, after_special)
        ids.extend(run_ids)
        labels.extend(run_labels)
        run.clear()

    for piece in pieces:
        if piece.special:
            flush()
            token = _special_id(piece.text, tokenizer)
            ids.append(token)
            labels.append(token if piece.labelled else IGNORE)
            after_special = True
            continue
        for number, text in enumerate(piece.text.split(PLACEHOLDER)):
            if number:
                flush()
                ids.append(IMAGE)
                labels.append(IGNORE)
                after_special = False
            run.append((text, piece.labelled))
    flush()
    return Tokens(ids, labels)


def _encode_run(run: list[tuple[str, bool]], tokenizer: Tokenizer, after_special: bool) -> tuple[list[int], list[int]]:
    """One run of adjacent texts -> ids and labels.

    A boundary between two texts follows the tokens that stay the same when the run is cut there: a
    token that crosses the boundary belongs to the later text.
    """
    text = "".join(part for part, _ in run)
    ids = tokenizer.encode(text, after_special=after_special)
    labels = [IGNORE] * len(ids)
    begin = end = 0
    for part, labelled in run:
        end += len(part)
        if labelled:
            first = _common(ids, tokenizer.encode(text[:begin], after_special=after_special)) if begin else 0
            last = _common(ids, tokenizer.encode(text[:end], after_special=after_special))
            labels[first:last] = ids[first:last]
        begin = end
    return ids, labels


def _common(ids: list[int], prefix: list[int]) -> int:
    """Length of the common prefix."""
    for at, (one, other) in enumerate(zip(ids, prefix, strict=False)):
        if one != other:
            return at
    return min(len(ids), len(prefix))
