"""MMMU's parser and grader, for questions with options and without (Yue et al., 2024, and lmms-eval)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from avg_llava_jax.eval.benchmarks.letters import Pick


def grade(answer: str, gold: Pick | str, draw: random.Random) -> float:
    """1 for the right option, or for an open answer that contains the gold text or number."""
    if isinstance(gold, Pick):
        return float(choose(answer, gold.options, draw) == gold.letter)
    right = _normal(gold)
    for said in open_candidates(answer):
        if isinstance(said, float):
            if said in right:
                return 1.0
        elif any(isinstance(text, str) and text in said for text in right):
            return 1.0
    return 0.0


def choose(answer: str, options: Mapping[str, str], draw: random.Random) -> str:
    """The letter that an answer names: `(B)`, else `B `, else `B.`, else in a long answer an option's text.

    Of several letters the last one counts; without any, one is drawn at random, as in MMMU.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in answer]
        if found:
            return max(found, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) > 5:
        found = [letter for letter, text in options.items() if text.lower() in answer.lower()]
        if found:
            return max(found, key=lambda letter: answer.lower().rfind(options[letter].lower()))
    return draw.choice(list(options))


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12, 1.5
)


def open_candidates(answer: str) -> list[str | float]:
    """Candidates of an open answer: the text after words like "so" and "is", and the numbers in it."""
    whole = answer.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", whole)
    tails = []
    for number, part in enumerate(parts, 1):
        keys = (*_KEYS, "=") if number == len(parts) else _KEYS
        tail = ""  # the shortest one; an empty one gives way to the next
        for key in keys:
            if key in part:
                after = part.split(key)[-1].strip()
                tail = after if not tail or len(after) < len(tail) else tail
        if tail and tail not in (":", ",", ".", "!", "?", ";", "'"):
            tails.append(tail)
    tails = tails or [whole]
    numbers = [number for tail in tails for pattern in _NUMBERS for number in re.findall(pattern, tail)]
    return [form for text in (*tails, *numbers) for form in _normal(text)]


def _normal(text: str) -> list[str | float]:
    """A number rounded to two digits; else lower case, a single character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
