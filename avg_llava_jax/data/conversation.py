"""Conversations in the LLaVA format become token ids: IMAGE marks an image, labels mark the answers.

A conversation is a list of turns `{"from": "human" | "gpt", "value": text}`; the first may be from "system".
`<image>` in a human turn marks the position of an image; in the ids it is IMAGE. Where a text may hold that word
itself, the value is the list of texts around the images, in which nothing is a marker:

    "Is <image> larger than <image>?"   the same as   ["Is ", " larger than ", "?"]
    ["What does <image> mean?"]         a text without an image

Labels equal the ids of the answers and of the token that ends each answer; every other label is IGNORE.

    vicuna_v1, "<image>\\nWho?" -> "Ann":

    <s> system USER: <image> \\n Who? ASSISTANT: Ann </s>
                                               ~~~~~~~~~~  labelled

    qwen_1_5, the same turns:

    <|im_start|> system \n You are ... <|im_end|> \n <|im_start|> user \n <image> \n Who? <|im_end|> \n
    <|im_start|> assistant \n Ann <|im_end|> \n
                               ~~~~~~~~~~~~~~ labelled

Templates: `vicuna_v1`, `llama_3` (alias `llava_llama_3`), `mistral_instruct` (LLaVA's, which has a space before the end
of an answer), `mistral` (Mistral's own, which has none), ChatML in three forms (`chatml`, `qwen_1_5`,
`llava_onevision`; see `CHATML`), `plain` (image and caption, for connector pre-training) and `tokenizer` (the
tokenizer's own chat template). A system turn replaces that of ChatML and goes to the tokenizer's own template, if it
has one; in the other templates its text precedes the first question.

A prompt may begin with an answer, such as an assistant's greeting, and its questions may be empty. Templates whose
turns name their roles render both unchanged. vicuna_v1, llama_3 and the two of Mistral, where answers follow questions,
put an empty question before the greeting; so does a tokenizer's own template that otherwise refuses it:

    mistral, "Hello!", "Who?"    <s> [INST]  [/INST] Hello! </s> [INST] Who? [/INST]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from avg_llava_jax.data.errors import BadSample, half_character
from avg_llava_jax.data.tokenizer import Tokenizer

IMAGE = -200  # id of the placeholder that an image's visual tokens replace
IGNORE = -100  # label of a token that adds nothing to the loss
PLACEHOLDER = "<image>"

Turn = dict[str, Any]
"""`from`: human, gpt, or system first. `value`: a text in which `<image>` marks images, or a list, see above."""

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
"""Stop token of GPT-2's and Qwen's tokenizers, in addition to the template's own."""


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
    """A run of rendered text; the text of a `special` piece is the name of one special token, an `image` has none."""

    text: str
    labelled: bool = False
    special: bool = False
    image: bool = False


_IMAGE = _Piece("", image=True)


@dataclasses.dataclass(frozen=True)
class _CheckedTurn:
    """A checked turn. role: system, human or gpt. texts: those around its images, one more than it has images."""

    role: str
    texts: tuple[str, ...]

    @property
    def human(self) -> bool:
        return self.role == "human"

    @property
    def images(self) -> int:
        return len(self.texts) - 1

    def pieces(self, before: str = "", after: str = "") -> Iterable[_Piece]:
        """Its texts and images in order; those of an answer are labelled."""
        texts = list(self.texts)
        texts[0] = before + texts[0]
        texts[-1] += after
        for number, text in enumerate(texts):
            if number:
                yield _IMAGE
            yield _Piece(text, labelled=self.role == "gpt")

    def stripped(self) -> _CheckedTurn:
        first, *rest = self.texts
        texts = [first.lstrip(), *rest]
        texts[-1] = texts[-1].rstrip()
        return dataclasses.replace(self, texts=tuple(texts))


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
    if _greets(turns):
        raise BadSample("not_human_first", "the first turn is an answer")
    for number, turn in enumerate(turns):
        if turn.role == "gpt" and not turn.texts[0].strip():
            raise BadSample("empty_answer", f"turn {number} is an answer without text")
        if turn.human and not turn.images and not turn.texts[0].strip() and template != "plain":
            raise BadSample("empty_question", f"turn {number} is a question without text")
    if turns[-1].human:
        raise BadSample("ends_on_human", "the last turn is a question without an answer")
    return _encode(_render(turns, tokenizer, template), tokenizer, bos=puts_bos(template))


def encode_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, template: str = "vicuna_v1", images: int = 0) -> Tokens:
    """Encodes a prompt: a conversation that ends with a question, up to the start of its answer; no token has a label.

    An earlier answer or a question may be empty, and the first turn may be an answer.
    Raises as `encode_conversation` otherwise, but BadSample `ends_on_answer` in place of `ends_on_human`.
    """
    checked = _checked(turns, images, template)
    if not checked[-1].human:
        raise BadSample("ends_on_answer", "a prompt must end with a human turn")
    tokens = _encode(_render(checked, tokenizer, template), tokenizer, bos=puts_bos(template))
    return Tokens(tokens.ids, [IGNORE] * len(tokens.ids))


def encode_raw(prompt: str | Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """Encodes text without a template: special tokens are parsed, BOS precedes the text.

    prompt: a text in which `<image>` marks images, or the list of texts around the images.

    Raises BadSample `malformed_turn` if the text has half of a surrogate pair.
    """
    pieces: list[_Piece] = []
    for number, text in enumerate(_texts(prompt)):
        _whole(text, "the prompt")
        pieces += [_IMAGE] * bool(number) + _split_special(text, tokenizer)
    tokens = _encode(pieces, tokenizer, bos=True)
    return Tokens(tokens.ids, [IGNORE] * len(tokens.ids))


def stop_ids(tokenizer: Tokenizer, template: str) -> tuple[int, ...]:
    """Stop ids, ascending: the token that the template writes after an answer, the tokenizer's EOS, `END_OF_TEXT`."""
    turns = [_CheckedTurn("human", ("a",)), _CheckedTurn("gpt", ("b",))]
    stops = {tokenizer.eos_id, tokenizer.special_tokens.get(END_OF_TEXT, tokenizer.eos_id)}
    labelled = [piece for piece in _render(turns, tokenizer, template) if piece.labelled]
    stops.update(_special_id(piece.text, tokenizer) for piece in labelled if piece.special)
    if template == "plain":
        stops.add(tokenizer.encode("b\n")[-1])
    return tuple(sorted(stops))


def _texts(value: Any) -> tuple[str, ...] | None:
    """The texts around the images of a turn's value; None if it is neither a text nor a list of texts."""
    if isinstance(value, str):
        return tuple(value.split(PLACEHOLDER))
    if isinstance(value, (list, tuple)) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    return None


def _checked(conversations: Sequence[Turn], images: int, template: str) -> list[_CheckedTurn]:
    """Validated turns: human and gpt alternate after the system, and each image has one place."""
    if not isinstance(conversations, Sequence) or isinstance(conversations, str) or not conversations:
        raise BadSample("no_turns", "`conversations` must be a list of turns that is not empty")
    turns: list[_CheckedTurn] = []
    for number, turn in enumerate(conversations):
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        texts = _texts(value)
        if not isinstance(role, str) or texts is None:
            raise BadSample("malformed_turn", f"turn {number} needs the strings `from` and `value`")
        for text in texts:
            _whole(text, f"turn {number}")
        if role not in ("human", "gpt") and (role, number) != ("system", 0):
            raise BadSample("unknown_role", f"turn {number} is from {role!r}; known are human, gpt, and system first")
        said = _CheckedTurn(role, texts)
        if number and role == turns[-1].role:
            raise BadSample("bad_order", f"turns {number - 1} and {number} are both from {role}")
        if role == "system" and said.images:
            raise BadSample("image_in_system", f"turn {number} is from the system with {PLACEHOLDER} in it")
        if role == "gpt" and said.images:
            raise BadSample("image_in_answer", f"turn {number} is an answer with {PLACEHOLDER} in it")
        turns.append(said)
    question = next((number for number, turn in enumerate(turns) if turn.human), None)
    if question is None:
        raise BadSample("no_turns", "no turn is a question")
    found = sum(turn.images for turn in turns)
    if not found and images:
        first, *rest = turns[question].texts
        turns[question] = _CheckedTurn("human", ("", *["\n"] * (images - 1), "\n" + first, *rest))
    elif found != images:
        raise BadSample("image_count", f"{images} images for {found} {PLACEHOLDER}")
    for number, turn in enumerate(turns):
        if turn.images:
            turns[number] = turn.stripped()  # as the released code does where an image stands
    if template == "plain" and (_greets(turns) or len(turns) > question + 2):
        raise BadSample("not_plain", f"template plain takes one question and one answer, not {len(turns)} turns")
    return turns


def _greets(turns: list[_CheckedTurn]) -> bool:
    """Whether an answer precedes all questions."""
    return next(turn.role for turn in turns if turn.role != "system") == "gpt"


def _question_first(turns: list[_CheckedTurn]) -> list[_CheckedTurn]:
    """The turns with an empty question before an answer that precedes all questions."""
    at = int(turns[0].role == "system")
    return [*turns[:at], _CheckedTurn("human", ("",)), *turns[at:]] if _greets(turns) else turns


def _without_system(turns: list[_CheckedTurn]) -> list[_CheckedTurn]:
    """The turns, a question first, with the system's text before it, unless that is blank."""
    turns = _question_first(turns)
    if turns[0].role != "system":
        return turns
    system, question, *others = turns
    first, *rest = question.texts
    if not system.texts[0].strip():
        return [question, *others]
    return [_CheckedTurn("human", (f"{system.texts[0]}\n\n{first}", *rest)), *others]


def _whole(text: str, what: str) -> None:
    half = half_character(text)
    if half:
        raise BadSample("malformed_turn", f"{what} has {half}, half of a surrogate pair: write it as valid UTF-8")


def _render(turns: list[_CheckedTurn], tokenizer: Tokenizer, template: str) -> list[_Piece]:
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
    if template in ("mistral", "mistral_instruct"):
        return list(_mistral(turns, tokenizer, "" if template == "mistral" else " "))
    if template == "plain":
        return list(_plain(turns))
    known = f"vicuna_v1, llama_3 (llava_llama_3), mistral, mistral_instruct, {', '.join(CHATML)}, plain, tokenizer"
    raise ValueError(f"template {template!r} is not known; choose from {known}")


def puts_bos(template: str) -> bool:
    """Whether BOS precedes the text of a template; the tokenizer's own template writes BOS itself."""
    return template != "tokenizer"


def _vicuna_v1(turns: list[_CheckedTurn], tokenizer: Tokenizer) -> Iterable[_Piece]:
    yield _Piece(VICUNA_SYSTEM + " ")
    for turn in turns:
        if turn.human:
            yield from turn.pieces("USER: ", " ASSISTANT:")
        else:
            yield from _after_space(turn)
            yield _eos(tokenizer)


def _mistral(turns: list[_CheckedTurn], tokenizer: Tokenizer, after: str) -> Iterable[_Piece]:
    for turn in turns:
        if turn.human:
            yield from turn.pieces("[INST] ", " [/INST]")
        else:
            yield from _after_space(turn, after)
            yield _eos(tokenizer)


def _after_space(answer: _CheckedTurn, after: str = "") -> Iterable[_Piece]:
    """An answer after a space, and before `after`; an empty one is nothing at all, as the model wrote it."""
    if answer.texts[0].strip():
        yield from answer.pieces(" ", after)


def _llama_3(turns: list[_CheckedTurn]) -> Iterable[_Piece]:
    def header(role: str) -> Iterable[_Piece]:
        yield _Piece("<|start_header_id|>", special=True)
        yield _Piece(role)
        yield _Piece("<|end_header_id|>", special=True)
        yield _Piece("\n\n")

    yield from header("system")
    yield _Piece(LLAMA_3_SYSTEM)
    yield _Piece("<|eot_id|>", special=True)
    for turn in turns:
        yield from header("user" if turn.human else "assistant")
        yield from turn.stripped().pieces()
        yield _Piece("<|eot_id|>", labelled=turn.role == "gpt", special=True)
    if turns[-1].human:
        yield from header("assistant")


def _chatml(turns: list[_CheckedTurn], form: ChatML) -> Iterable[_Piece]:
    if form.system is not None and turns[0].role != "system":
        turns = [_CheckedTurn("system", (form.system,)), *turns]
    for turn in turns:
        yield _Piece(START, special=True)
        match turn.role:
            case "system":
                yield _Piece(f"system{form.user}\n{turn.texts[0]}")
            case "human":
                first, rest = _images_first(turn) if form.user else (0, turn)
                yield _Piece(f"user{form.user}")
                yield from [_IMAGE] * first
                yield from rest.pieces("\n")
            case "gpt":
                yield _Piece("assistant\n")
                yield from turn.pieces()
        yield _Piece(END, labelled=turn.role == "gpt", special=True)
        yield _Piece(form.end)
    if turns[-1].human:
        yield _Piece(START, special=True)
        yield _Piece("assistant\n")


def _images_first(turn: _CheckedTurn) -> tuple[int, _CheckedTurn]:
    """The number of images that a turn begins with, each on its own line or not, and the rest of it."""
    count, texts = 0, list(turn.texts)
    while len(texts) > 1 and not texts[0]:
        count, texts = count + 1, [texts[1].removeprefix("\n"), *texts[2:]]
    return count, dataclasses.replace(turn, texts=tuple(texts))


def _plain(turns: list[_CheckedTurn]) -> Iterable[_Piece]:
    """The images and the caption; the text of the question is dropped, as in LLaVA."""
    yield from [_IMAGE] * turns[0].images
    if len(turns) > 1:
        yield from turns[1].pieces(after="\n")


def _own_template(turns: list[_CheckedTurn], tokenizer: Tokenizer) -> Iterable[_Piece]:
    """An answer is the difference of two renderings: the turns up to and including it, less the turns before it."""
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    if not tokenizer.takes_greeting:
        turns = _question_first(turns)
    if turns[0].role == "system" and not tokenizer.takes_system:
        turns = _without_system(turns)
    mark = _unused("".join(text for turn in turns for text in turn.texts))

    def pieces(text: str, labelled: bool = False) -> list[_Piece]:
        found: list[_Piece] = []
        for number, part in enumerate(text.split(mark)):
            found += [_IMAGE] * bool(number) + _split_special(part, tokenizer)
        return [dataclasses.replace(piece, labelled=True) for piece in found] if labelled else found

    messages = [{"role": names[turn.role], "content": mark.join(turn.texts)} for turn in turns]
    ends_open = turns[-1].human
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=ends_open)
    at = 0
    for number, turn in enumerate(turns):
        if turn.role != "gpt" or ends_open:  # a prompt has no labels
            continue
        before = tokenizer.apply_chat_template(messages[:number], add_generation_prompt=True)
        upto = tokenizer.apply_chat_template(messages[: number + 1])
        empty = not turn.texts[0].strip()
        if not whole.startswith(before) or not whole.startswith(upto) or len(upto) < len(before) + (not empty):
            raise ValueError(
                "the tokenizer's chat template changes earlier turns when later ones are added, "
                "so its answers cannot be found; choose another `template`"
            )
        yield from pieces(whole[at : len(before)])
        answer = pieces(whole[len(before) : len(upto)], labelled=True)
        if len(answer) > 1 and answer[-2].special and not answer[-1].text.strip():
            answer[-1] = dataclasses.replace(answer[-1], labelled=False)  # white space after the end-of-turn token
        yield from answer
        at = len(upto)
    yield from pieces(whole[at:])


def _unused(text: str) -> str:
    """A character that `text` does not contain: it marks images in a template, which takes and gives only text."""
    return next(mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in text)  # a plane of private use


def keeps_turns(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's own template renders earlier turns as before when later ones are added."""
    turns = [_CheckedTurn(role, ("a",)) for role in ("human", "gpt") * 2]
    try:
        return bool(list(_own_template(turns, tokenizer)))
    except ValueError:
        return False


def _split_special(text: str, tokenizer: Tokenizer) -> list[_Piece]:
    """Text and special tokens; `<image>`, a special token of some tokenizers, is text: images have their places."""
    return [
        _Piece(part, special=token is not None and part != PLACEHOLDER) for part, token in tokenizer.split_special(text)
    ]


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
        if piece.image:
            flush()
            ids.append(IMAGE)
            labels.append(IGNORE)
            after_special = False
            continue
        run.append((piece.text, piece.labelled))
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
