"""Graders of answers by letter, by the rules of each benchmark."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from avg_llava_jax.eval.benchmarks import words


class Pick(NamedTuple):
    """The gold letter of a question, and its options: {"A": text, ...}."""

    letter: str
    options: Mapping[str, str]


def scienceqa(answer: str, gold: Pick, draw: random.Random | None = None) -> float:
    """ScienceQA: a lone letter in either case, or an upper-case letter and a period first: "B", "b", "B. the sun"."""
    answer = answer.strip()
    if answer.lower() == gold.letter.lower():
        return 1.0
    return float(answer[:1].isupper() and answer[1:2] == "." and answer[0].lower() == gold.letter.lower())


def ai2d(answer: str, gold: Pick, draw: random.Random | None = None) -> float:
    """AI2D: `A.` at the beginning, or only the letter: "A. text", "(a)", but not "A) text"."""
    found = re.match(r"\s*([A-Z])\.", answer)
    return words.exact(found[1] if found else answer, gold.letter)


def mmbench(answer: str, gold: Pick, draw: random.Random | None = None) -> float:
    """MMBench without a judge model: a lone letter, else a lone option text, else the most likely letter."""
    said = _lone_letter(answer) or _lone_text(answer, gold.options) or extract(answer, sorted(gold.options) or LETTERS)
    return float(said == gold.letter)


# How a letter may stand as one word of an answer, in the order in which these are tried.
_DRESSES = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def _lone_letter(answer: str) -> str | None:
    """The only letter A-E in one of the notations; a bare A among other words may be an article."""
    said = answer.split()
    for dress in _DRESSES:
        found = [letter for letter in "ABCDE" if dress.format(letter) in said]
        if len(found) == 1 and not (dress == "{}" and "A" in said and len(said) > 3):
            return found[0]
    return None


def _lone_text(answer: str, options: Mapping[str, str]) -> str | None:
    found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


LETTERS = list("ABCDEFGH")
_PHRASES = (
    [f"{what} is" for what in ("answer", "the answer", "choice", "the choice", "my answer", "my choice")]
    + [f"{before} {what} is" for before in ("correct", "the correct") for what in ("answer", "option", "choice")]
    + [f"{before} {what} is" for before in ("best", "the best") for what in ("answer", "option")]
    + ["i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]
)


def extract(answer: str, letters: Sequence[str]) -> str:
    """The most likely letter of an answer, "" where it has none.

    Best first: at the start, at the end, after a phrase like "the answer is", then `(B)`, `B.`, `B:`, `B)`, `B `,
    and any B at all; of several equal matches the last one in the text.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    found: list[tuple[int, int, str]] = []  # (rank of the form, place, letter)

    for rank, form in enumerate(("{} ", "{})", "{}:", "{}.", "({})"), start=2):
        found += [(rank, text.rfind(form.format(letter)), letter) for letter in letters if form.format(letter) in text]
    for phrase in _PHRASES:
        at = text.lower().find(phrase)
        if at >= 0:
            places = [(text.find(letter, at + len(phrase)), letter) for letter in letters]
            found += [(7, place, letter) for place, letter in places if place >= 0]
    for letter in letters:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            found.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            found.append((9, len(text), letter))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda one: one[:2])[2] if found else ""


def offered(prompt: str) -> list[str]:
    """The letters of the options that a prompt asks to choose from, [] where it asks for no letter.

    Options are lines "A. red", "B) blue" or "(C) green", in order from A, and the prompt has the word "letter".

    >>> offered("Which?\\nA. red\\nB. blue\\nAnswer with the option's letter from the given choices directly.")
    ['A', 'B']
    """
    found = re.findall(r"^\s*(?:\(([A-Z])\)|([A-Z])[.):])\s", prompt, re.MULTILINE)
    letters = [one or other for one, other in found]
    listed = letters == list(string.ascii_uppercase[: len(letters)])
    return letters if len(letters) > 1 and listed and "letter" in prompt.lower() else []


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options by letter, starting with A."""
    return dict(zip(string.ascii_uppercase, options, strict=False))
