"""The eleven benchmarks, one declaration each: fields of a record, prompt, and grader.

Names, prompts, generation limits and metrics are those of lmms-eval 0.7.3 (profile `lmms_eval`). Profile `paper` is
the version inside the released code, with which AVG-LLaVA was evaluated: only its MMMU prompt differs.
"""

from __future__ import annotations

import ast
import dataclasses
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from avg_llava_jax.eval.benchmarks import letters, metrics, mmmu, words
from avg_llava_jax.eval.benchmarks.letters import Pick, lettered
from avg_llava_jax.eval.benchmarks.metrics import Fields, Summary

_WORD = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."


class Paper(NamedTuple):
    """The paper's numbers of a benchmark.

    llava_next, avg_llava: scores of LLaVA-NeXT-7B and AVG-LLaVA-7B. cut, speedup: the share of visual tokens that
    AVG-LLaVA saves, and its speed against LLaVA-NeXT; None where the paper gives none.
    """

    llava_next: float
    avg_llava: float
    cut: float | None = None
    speedup: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """The declaration of a benchmark.

    name, title: in lmms-eval and in the paper's table. hub, config, split: on the hub.
    fields: what every record must hold: `str`, `int`, `list` (of texts), or `object` for anything but nothing.
    optional: fields that are read where they are there. image_fields: columns of images.
    id: the fields that together tell records apart, as far as they are there.
    prompt: (fields, profile) -> text. gold: fields -> what the grader compares with; ValueError where there is none.
    grade: (answer, gold, draw) -> [0, 1]. summary: from grades to metrics.
    headline: the metric of the paper's table, which holds `scale` times it; `full` is its best possible score there.
    new_tokens: longest answer. paper: the paper's numbers, None for a benchmark that it does not have.
    image_config: where images lie in a config of their own, by `id`.
    images: (fields, profile) -> names of the image fields that the prompt shows, in order.
    text_only: a record may be without its image.
    """

    name: str
    title: str
    hub: str
    split: str
    fields: Mapping[str, type]
    prompt: Callable[[Fields, str], str]
    gold: Callable[[Fields], Any]
    grade: Callable[[str, Any, random.Random], float]
    summary: Summary
    headline: str
    new_tokens: int
    paper: Paper | None = None
    config: str | None = None
    scale: float = 100.0
    full: float = 100.0
    optional: tuple[str, ...] = ()
    id: tuple[str, ...] = ()
    image_fields: tuple[str, ...] = ("image",)
    image_config: str | None = None
    images: Callable[[Fields, str], Sequence[str]] = lambda fields, profile: ("image",)
    text_only: bool = False


def _answer(fields: Fields) -> str:
    if not fields["answer"].strip():
        raise ValueError("`answer` is empty: this is a question without an answer (of a test split?)")
    return fields["answer"]


def _answers(fields: Fields) -> list[str]:
    if not fields["answers"]:
        raise ValueError("`answers` is empty: this is a question without an answer (of a test split?)")
    return fields["answers"]


def _yes_or_no(fields: Fields) -> str:
    word = words.pope_verdict(fields["answer"])
    if word not in ("yes", "no"):
        raise ValueError(f"`answer` is {fields['answer']!r}, neither yes nor no")
    return word


def _numbered(options: str) -> Callable[[Fields], Pick]:
    """The gold letter where `answer` is the index of the right one of `options`."""

    def gold(fields: Fields) -> Pick:
        by_letter = lettered(fields[options])
        try:
            at = int(fields["answer"])
        except ValueError:
            raise ValueError(f"`answer` is {fields['answer']!r}, no number of an option") from None
        if not 0 <= at < len(by_letter):
            raise ValueError(f"`answer` is {at}, but there are {len(by_letter)} `{options}`")
        return Pick(list(by_letter)[at], by_letter)

    return gold


def _listed(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def _followed_by(instruction: str, field: str = "question") -> Callable[[Fields, str], str]:
    return lambda fields, profile: f"{fields[field]}\n{instruction}"


GQA = Benchmark(
    name="gqa",
    title="GQA",
    hub="lmms-lab-encoder/GQA",
    config="testdev_balanced_instructions",
    image_config="testdev_balanced_images",
    split="testdev",
    fields={"question": str, "answer": str, "imageId": str},
    id=("id",),
    prompt=_followed_by(_WORD),
    gold=_answer,
    grade=words.exact,
    summary=metrics.mean("exact_match"),
    headline="exact_match",
    new_tokens=16,
    paper=Paper(64.2, 63.0, cut=0.80, speedup=1.14),
)


def _scienceqa_prompt(fields: Fields, profile: str) -> str:
    context = f"Context: {fields['hint']}\n" if fields.get("hint") else ""
    return f"{context}{fields['question']}\n{_listed(lettered(fields['choices']))}\n{_LETTER}"


SCIENCEQA = Benchmark(
    name="scienceqa_img",
    title="ScienceQA",
    hub="lmms-lab-encoder/ScienceQA",
    config="ScienceQA-IMG",
    split="test",
    fields={"question": str, "choices": list, "answer": int},
    optional=("hint",),
    prompt=_scienceqa_prompt,
    text_only=True,
    gold=_numbered("choices"),
    grade=letters.scienceqa,
    summary=metrics.mean("exact_match"),
    headline="exact_match",
    new_tokens=16,
    paper=Paper(70.1, 71.1, cut=0.549, speedup=1.41),
)

VIZWIZ = Benchmark(
    name="vizwiz_vqa_val",
    title="VizWiz",
    hub="lmms-lab-encoder/VizWiz-VQA",
    split="val",
    fields={"question": str, "answers": list},
    id=("question_id",),
    prompt=lambda fields, profile: (
        f"{fields['question'].capitalize()}\nWhen the provided information is insufficient, "
        f"respond with 'Unanswerable'.\n{_WORD}"
    ),
    gold=lambda fields: fields["answers"],  # an empty list is answered wrongly whatever is said
    grade=words.soft,
    summary=metrics.mean("exact_match"),
    headline="exact_match",
    new_tokens=64,
    paper=Paper(57.6, 59.8, cut=0.264, speedup=1.77),
)

TEXTVQA = Benchmark(
    name="textvqa_val",
    title="TextVQA",
    hub="lmms-lab-encoder/textvqa",
    split="validation",
    fields={"question": str, "answers": list},
    id=("question_id",),
    prompt=lambda fields, profile: f"{fields['question'].capitalize()}\n{_WORD}",
    gold=_answers,
    grade=words.soft,
    summary=metrics.mean("exact_match"),
    headline="exact_match",
    new_tokens=64,
    paper=Paper(64.9, 67.1),
)

CHARTQA = Benchmark(
    name="chartqa",
    title="ChartQA",
    hub="lmms-lab-encoder/ChartQA",
    split="test",
    fields={"question": str, "answer": str, "type": str},
    prompt=_followed_by("Answer the question with a single word."),
    gold=_answer,
    grade=words.relaxed,
    summary=metrics.chartqa(),
    headline="relaxed_overall",
    new_tokens=16,
    paper=Paper(54.8, 66.3, cut=0.009, speedup=0.97),
)

DOCVQA = Benchmark(
    name="docvqa_val",
    title="DocVQA",
    hub="lmms-lab-encoder/DocVQA",
    config="DocVQA",
    split="validation",
    fields={"question": str, "answers": list},
    id=("questionId",),
    prompt=_followed_by(_WORD),
    gold=_answers,
    grade=words.anls,
    summary=metrics.mean("anls"),
    headline="anls",
    new_tokens=32,
    paper=Paper(74.4, 74.6),
)

AI2D = Benchmark(
    name="ai2d",
    title="AI2D",
    hub="lmms-lab-encoder/ai2d",
    split="test",
    fields={"question": str, "options": list, "answer": object},
    prompt=lambda fields, profile: f"{fields['question']}\n{_listed(lettered(fields['options']))}\n{_LETTER}",
    gold=_numbered("options"),
    grade=letters.ai2d,
    summary=metrics.mean("exact_match"),
    headline="exact_match",
    new_tokens=16,
    paper=Paper(66.6, 67.3, cut=0.853, speedup=2.53),
)

MME = Benchmark(
    name="mme",
    title="MME",
    hub="lmms-lab-encoder/MME",
    split="test",
    fields={"question": str, "answer": str, "question_id": object, "category": str},
    id=("category", "question_id", "question"),
    prompt=lambda fields, profile: fields["question"].strip().replace(" Please answer yes or no.", "") + f"\n{_WORD}",
    gold=_yes_or_no,
    grade=words.mme,
    summary=metrics.mme(),
    headline="mme_perception_score",
    scale=1.0,
    full=2000.0,
    new_tokens=16,
    paper=Paper(1519.0, 1557.4, cut=0.693, speedup=1.19),
)


def _is_text(value: Any) -> bool:
    """Whether a table holds something here: not nothing, not NaN, and not what it once became as text."""
    return value is not None and value == value and str(value) not in ("", "nan")


def _mmbench_prompt(fields: Fields, profile: str) -> str:
    options = {letter: fields[letter] for letter in "ABCDE" if _is_text(fields.get(letter))}
    hint = "" if fields.get("hint") in (None, "nan") or fields["hint"] != fields["hint"] else f"{fields['hint']} "
    listed = f"There are several options:\n{_listed(options)}".rstrip("\n")
    return f"{hint}{fields['question']} {listed}\n\n{_LETTER}"


def _mmbench_gold(fields: Fields) -> Pick:
    # A column that is not there counts as the text "nan", as it does in lmms-eval.
    given = {letter: fields.get(letter, "nan") for letter in "ABCD"}
    options = {letter: str(text) for letter, text in given.items() if text is not None and text == text}
    if fields["answer"] not in "ABCDE" or fields.get(fields["answer"]) is None:
        raise ValueError(f"`answer` is {fields['answer']!r}, none of the record's options")
    return Pick(fields["answer"], options)


MMBENCH = Benchmark(
    name="mmbench_en_dev",
    title="MMB",
    hub="lmms-lab-encoder/MMBench",
    config="en",
    split="dev",
    fields={"index": int, "question": str, "answer": str},
    optional=("hint", "A", "B", "C", "D", "E"),
    id=("index",),
    prompt=_mmbench_prompt,
    gold=_mmbench_gold,
    grade=letters.mmbench,
    summary=metrics.mmbench(),
    headline="gpt_eval_score",
    scale=1.0,
    new_tokens=1024,
    paper=Paper(67.4, 69.9),
)

POPE = Benchmark(
    name="pope",
    title="POPE",
    hub="lmms-lab-encoder/POPE",
    split="test",
    fields={"question": str, "answer": str},
    id=("category", "question_id"),
    prompt=lambda fields, profile: f"{fields['question'].strip()}\n{_WORD}",
    gold=_yes_or_no,
    grade=words.pope,
    summary=metrics.pope(),
    headline="pope_f1_score",
    new_tokens=128,
    paper=Paper(86.5, 87.4),
)


def _mmmu_options(fields: Fields) -> dict[str, str]:
    """`options` holds the list as Python writes it."""
    try:
        options = ast.literal_eval(fields["options"])
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, list) or not options:
        raise ValueError(f"`options` is {fields['options']!r}, not a Python list with an option in it")
    return lettered([str(option) for option in options])


def _mmmu_text(fields: Fields) -> str:
    choices = f"\n{_listed(_mmmu_options(fields))}" if fields["question_type"] == "multiple-choice" else ""
    return f"{fields['question']}{choices}"


def _mmmu_prompt(fields: Fields, profile: str) -> str:
    several = fields["question_type"] == "multiple-choice"
    if profile == "lmms_eval":  # the marks stay, the images come first
        return f"{_mmmu_text(fields)}\n\n{_LETTER if several else _WORD}"
    instruction = "Answer with the option letter from the given choices directly." if several else _WORD
    return re.sub(r"<image [1-7]>", "<image>", _mmmu_text(fields)) + f"\n{instruction}"


def _mmmu_images(fields: Fields, profile: str) -> list[str]:
    marks = [f"image_{number}" for number in re.findall(r"<image ([1-7])>", _mmmu_text(fields))]
    return sorted(set(marks)) if profile == "lmms_eval" else marks


def _mmmu_gold(fields: Fields) -> Pick | str:
    if fields["question_type"] != "multiple-choice":
        return _answer(fields)
    options = _mmmu_options(fields)
    if fields["answer"] not in options:
        raise ValueError(f"`answer` is {fields['answer']!r}, none of the {len(options)} options")
    return Pick(fields["answer"], options)


MMMU = Benchmark(
    name="mmmu_val",
    title="MMMU",
    hub="lmms-lab-encoder/MMMU",
    split="validation",
    fields={"id": str, "question": str, "options": str, "answer": str, "question_type": str},
    id=("id",),
    image_fields=tuple(f"image_{number}" for number in range(1, 8)),
    prompt=_mmmu_prompt,
    images=_mmmu_images,
    gold=_mmmu_gold,
    grade=mmmu.grade,
    summary=metrics.mean("mmmu_acc", digits=5),
    headline="mmmu_acc",
    new_tokens=128,
    paper=Paper(35.8, 37.4, cut=0.30, speedup=1.87),
)

BENCHMARKS = {
    task.name: task
    for task in (GQA, SCIENCEQA, VIZWIZ, TEXTVQA, CHARTQA, DOCVQA, AI2D, MME, MMBENCH, POPE, MMMU)
}  # fmt: skip
_SHORT = {
    "scienceqa": SCIENCEQA, "vizwiz": VIZWIZ, "textvqa": TEXTVQA, "docvqa": DOCVQA, "mmbench": MMBENCH, "mmmu": MMMU,
}  # fmt: skip


def find(name: str) -> Benchmark:
    """A benchmark by lmms-eval's name, with or without its split (`textvqa`)."""
    task = BENCHMARKS.get(name) or _SHORT.get(name)
    if task is None:
        raise ValueError(f"--task={name}: choose from {', '.join(BENCHMARKS)}")
    return task
