"""Graders of answers in words, with grades in [0, 1], equal to lmms-eval's.

A grader takes (answer, gold, draw); `draw` is a seeded generator for the one that guesses (`mmmu`).
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(answer: str, gold: str, draw: random.Random | None = None) -> float:
    """GQA: equal in lower case without ASCII punctuation; articles and inner spaces count.

    >>> exact("Yes.", "yes"), exact("a dog", "dog")
    (1.0, 0.0)
    """
    one, other = (text.lower().translate(_PUNCTUATION) for text in (answer, gold))
    return float(one == other)


def soft(answer: str, gold: Sequence[str], draw: random.Random | None = None) -> float:
    """VQA accuracy (TextVQA, VizWiz): min(1, matches / 3) among all gold answers but one, averaged over that one.

    >>> soft("Two", ["2"] * 3 + ["3"] * 7)  # without a "2" two are left to match
    0.9
    """
    said = vqa_words(answer)
    matches = [vqa_words(one) == said for one in gold]
    found = sum(matches)
    return sum(min(1.0, (found - match) / 3) for match in matches) / len(gold) if gold else 0.0


def anls(answer: str, gold: Sequence[str], draw: random.Random | None = None) -> float:
    """DocVQA: 1 - edit distance / length to the nearest gold answer, 0 where that is under one half.

    The distance ignores case and repeated spaces, the length (of the longer one) does not.
    """
    best = 1.0 - min(_distance(one, answer) for one in gold)
    return best if best >= 0.5 else 0.0


def relaxed(answer: str, gold: str, draw: random.Random | None = None) -> float:
    """ChartQA: numbers within 5 % of the gold one, percentages as fractions; words equal but for case.

    A gold 0 has no 5 % around it, so it is compared as a word.
    """
    one, other = _number(answer), _number(gold)
    if one is not None and other:
        return float(abs(one - other) / abs(other) <= 0.05)
    return float(answer.lower() == gold.lower())


def pope_verdict(answer: str) -> str:
    """POPE compares the whole answer: `Yes.` is neither "yes" nor "no"."""
    return answer.lower().strip()


def mme_verdict(answer: str) -> str:
    """MME compares the first four characters: "yes", "no" or "other".

    >>> [mme_verdict(text) for text in ("Yes, it is.", "N", "I know")]
    ['yes', 'no', 'other']
    """
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def pope(answer: str, gold: str, draw: random.Random | None = None) -> float:
    """POPE: 1 for exactly the gold word."""
    return float(pope_verdict(answer) == gold)


def mme(answer: str, gold: str, draw: random.Random | None = None) -> float:
    """MME: 1 for the right verdict."""
    return float(mme_verdict(answer) == gold)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _distance(gold: str, answer: str) -> float:
    """Edit distance divided by the longer length; 0 for two empty texts."""
    one, other = (" ".join(text.lower().split()) for text in (gold, answer))
    before = list(range(len(other) + 1))
    for at, letter in enumerate(one, 1):
        row = [at]
        for place, seen in enumerate(other):
            row.append(before[place] if letter == seen else 1 + min(before[place], before[place + 1], row[-1]))
        before = row
    length = max(len(gold.upper()), len(answer.upper()))  # upper case may be longer: "ß" is "SS"
    return before[-1] / length if length else 0.0


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_TO_TEN.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
# The apostrophe is put back where exactly one of a word's was left out: dont -> don't, hed've -> he'd've.
_SHORT = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _SHORT.split() for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # as the VQA scorer has it
_PERIOD = re.compile(r"\.(?!\d)")


def vqa_words(text: str) -> str:
    """The VQA scorer's normal form: no articles, most punctuation gone, numbers up to ten as digits.

    A mark that touches a space anywhere in the text is deleted throughout, else it becomes a space.

    >>> vqa_words("The U.S.A., two-fold"), vqa_words("dont know"), vqa_words("3.5 %")
    ('usa 2 fold', "don't know", '3.5 %')
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _MARKS:
        out = out.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    # The original passes a flag where `sub` takes a count; so it deletes at most 32 periods.
    out = _PERIOD.sub("", out, count=int(re.UNICODE))
    words = [_NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
