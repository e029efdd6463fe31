"""From grades to metrics: sums over independent units, and ratios of these sums.

A *unit* is what a bootstrap draws: a question, or questions that are scored together (the two of an MME image, the
rotations of an MMBench question). `tally` computes sums per unit; `metrics` computes the benchmark's metrics from their
totals, either numbers or arrays with one entry per bootstrap sample:

    grades 1 0 1 1                    units 4    {"right": [1 0 1 1], "n": [1 1 1 1]}
    totals {"right": 3, "n": 4}       {"exact_match": 0.75}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from avg_llava_jax.eval.benchmarks.words import pope_verdict

Fields = dict[str, Any]
Sums = dict[str, np.ndarray]


class Summary(NamedTuple):
    """tally(fields of each row, answers, grades) -> sums (units,); metrics(totals) -> values by name."""

    tally: Callable[[Sequence[Fields], Sequence[str], Sequence[float]], Sums]
    metrics: Callable[[dict[str, Any]], dict[str, Any]]


def mean(name: str, digits: int | None = None) -> Summary:
    """The mean grade, rounded where lmms-eval rounds it."""

    def tally(rows: Sequence[Fields], answers: Sequence[str], grades: Sequence[float]) -> Sums:
        return {"right": np.array(grades, float), "n": np.ones(len(grades))}

    def metrics(totals: dict[str, Any]) -> dict[str, Any]:
        value = totals["right"] / totals["n"]
        return {name: value if digits is None else np.vectorize(lambda one: round(float(one), digits))(value)}

    return Summary(tally, metrics)


def chartqa() -> Summary:
    """Relaxed accuracy over all questions, over human-written ones, and over those generated from captions."""
    splits = ("overall", "human_split", "augmented_split")

    def tally(rows: Sequence[Fields], answers: Sequence[str], grades: Sequence[float]) -> Sums:
        human = np.array([fields["type"] == "human_test" for fields in rows])
        sums = {}
        for split, chosen in zip(splits, (np.ones(len(rows)), human, ~human), strict=True):
            sums[f"right {split}"] = np.array(grades, float) * chosen
            sums[f"n {split}"] = chosen.astype(float)
        return sums

    def metrics(totals: dict[str, Any]) -> dict[str, Any]:
        present = [split for split in splits if np.any(totals[f"n {split}"])]
        return {f"relaxed_{split}": _ratio(totals[f"right {split}"], totals[f"n {split}"]) for split in present}

    return Summary(tally, metrics)


def pope() -> Summary:
    """Accuracy, and precision, recall and F1 of "yes".

    Only an answer that is the word "no" is a false negative; the yes ratio is that of the gold answers.
    """

    def tally(rows: Sequence[Fields], answers: Sequence[str], grades: Sequence[float]) -> Sums:
        said = np.array([pope_verdict(answer) for answer in answers])
        yes = np.array([pope_verdict(fields["answer"]) == "yes" for fields in rows])
        return {
            "right": np.array(grades, float),
            "n": np.ones(len(rows)),
            "yes": yes.astype(float),
            "true yes": (yes & (said == "yes")).astype(float),
            "false yes": (~yes & (said == "yes")).astype(float),
            "false no": (yes & (said == "no")).astype(float),
        }

    def metrics(totals: dict[str, Any]) -> dict[str, Any]:
        precision = _ratio(totals["true yes"], totals["true yes"] + totals["false yes"])
        recall = _ratio(totals["true yes"], totals["true yes"] + totals["false no"])
        return {
            "pope_accuracy": totals["right"] / totals["n"],
            "pope_precision": precision,
            "pope_recall": recall,
            "pope_f1_score": _ratio(2 * precision * recall, precision + recall),
            "pope_yes_ratio": totals["yes"] / totals["n"],
        }

    return Summary(tally, metrics)


PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip


def mme() -> Summary:
    """Two questions per image. An image scores 50 per right answer and 100 more for both; a category is their mean."""

    def tally(rows: Sequence[Fields], answers: Sequence[str], grades: Sequence[float]) -> Sums:
        images: dict[tuple[str, Any], list[float]] = {}
        for fields, grade in zip(rows, grades, strict=True):
            images.setdefault((fields["category"], fields["question_id"]), []).append(grade)
        score = np.array([100 * sum(pair) / 2 + 100 * (sum(pair) == 2) for pair in images.values()])
        sums = {}
        for name in dict.fromkeys(category for category, _ in images):
            sums[f"n {name}"] = np.array([float(category == name) for category, _ in images])
            sums[f"score {name}"] = score * sums[f"n {name}"]
        return sums

    def metrics(totals: dict[str, Any]) -> dict[str, Any]:
        categories = [key.removeprefix("n ") for key in totals if key.startswith("n ")]
        values: dict[str, Any] = {}
        for name in categories:
            half = "mme_perception_score" if name in PERCEPTION else "mme_cognition_score"
            values[half] = values.get(half, 0.0) + _ratio(totals[f"score {name}"], totals[f"n {name}"])
        return dict(sorted(values.items(), reverse=True))

    return Summary(tally, metrics)


CIRCLE = 1_000_000
"""MMBench's rotations of a question have its index plus a multiple of this."""


def mmbench() -> Summary:
    """A question counts as right if every rotation of its options is; in per cent."""

    def tally(rows: Sequence[Fields], answers: Sequence[str], grades: Sequence[float]) -> Sums:
        circles: dict[int, list[float]] = {int(fields["index"]): [] for fields in rows if fields["index"] < CIRCLE}
        for fields, grade in zip(rows, grades, strict=True):
            circles.get(int(fields["index"]) % CIRCLE, []).append(grade)
        return {"hit": np.array([float(min(circle)) for circle in circles.values()]), "n": np.ones(len(circles))}

    def metrics(totals: dict[str, Any]) -> dict[str, Any]:
        return {"gpt_eval_score": 100 * totals["hit"] / totals["n"]}

    return Summary(tally, metrics)


def _ratio(part: Any, whole: Any) -> Any:
    """part / whole, 0 where whole is 0."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
