"""The table of benchmark reports beside the paper's numbers, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Report = dict[str, Any]
Table = list[list[str]]


class Column(NamedTuple):
    """A column: its value of a report, its format, and its entry in the last line: `sum`, mean or nothing."""

    title: str
    value: Callable[[Report], Any]
    form: str = ""
    over_all: Callable[[Sequence[float]], Any] | None = None


def columns(ladder: Sequence[str]) -> list[Column]:
    """The columns of a table whose model has these granularities."""

    def score(title: str, value: Callable[[dict[str, Any]], float]) -> Column:
        return Column(title, lambda report: value(report["score"]), ".1f", np.mean)

    def paper(title: str, key: str, form: str, over_all: Any = None) -> Column:
        return Column(title, lambda report: report["paper"][key], form, over_all)

    def of_router(title: str, key: str, form: str) -> Column:
        return Column(title, lambda report: report[key]["adaptive"], form, np.mean)

    def took(report: Report) -> float | None:
        seconds = report["seconds"]["answer"]
        return seconds and seconds["adaptive"]

    return [
        Column("task", lambda report: report["title"]),
        Column("n", lambda report: report["n"], "d", sum),
        Column("unanswered", lambda report: report["n"] - report["answered"], "d", sum),
        *(score(f"fixed {g}", lambda by, g=g: by["fixed"][g]) for g in ladder),
        score("random", lambda by: by["random"]),
        score("router", lambda by: by["adaptive"]),
        Column("95 % interval", lambda report: "{:.1f} to {:.1f}".format(*report["interval"]["adaptive"])),
        score("oracle", lambda by: by["oracle"]),
        Column("oracle gap", lambda report: report["oracle_gap"], ".2f"),
        of_router("visual tokens", "visual_tokens", ".0f"),
        of_router("an image", "tokens_an_image", ".0f"),
        of_router("token cut", "token_cut", ".1%"),
        Column("seconds", took, ".3f", np.mean),
        Column("speed-up", lambda report: report["speedup"], ".2f", np.mean),
        paper("LLaVA-NeXT-7B", "llava_next", ".1f", np.mean),
        paper("AVG-LLaVA-7B", "avg_llava", ".1f", np.mean),
        paper("its token cut", "token_cut", ".1%"),
        paper("its speed-up", "speedup", ".2f"),
    ]


def table(reports: Sequence[Report]) -> Table:
    """A header, a line per benchmark, and for several the mean, in which MME counts as its share of 2000."""
    shown = columns(list(reports[0]["score"]["fixed"]))
    lines = [[column.title for column in shown]]
    lines += [[_text(column.value(report), column.form) for column in shown] for report in reports]
    if len(reports) > 1:
        alike = [_out_of_100(report) for report in reports]
        lines.append(["mean"] + [_over_all(column, alike) for column in shown[1:]])
    return lines


def _over_all(column: Column, reports: Sequence[Report]) -> str:
    values = [column.value(report) for report in reports]
    return "" if column.over_all is None or None in values else _text(column.over_all(values), column.form)


def _out_of_100(report: Report) -> Report:
    """A report whose scores, and the paper's, are in per cent of the best possible."""
    score, part = report["score"], 100 / report["full"]
    scaled = {name: value * part for name, value in score.items() if name != "fixed"}
    scaled["fixed"] = {g: value * part for g, value in score["fixed"].items()}
    scores = {name: report["paper"][name] for name in ("llava_next", "avg_llava")}
    paper = report["paper"] | {name: None if one is None else one * part for name, one in scores.items()}
    return report | {"score": scaled, "paper": paper}


def _text(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(lines: Table) -> str:
    """A table as Markdown."""
    header, *rest = (f"| {' | '.join(line)} |\n" for line in lines)
    return header + "|" + "---|" * len(lines[0]) + "\n" + "".join(rest)


def comma_separated(lines: Table) -> str:
    """A table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
