"""Figures of what a router does, as PNG; each function writes one and returns its path."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.eval import policies
from avg_llava_jax.eval.evaluation import Question
from avg_llava_jax.eval.explain import draw_grid
from avg_llava_jax.inference.requests import Answer

PLOTS = "plots"
KINDS = {"coarse": "tab:green", "near": "tab:blue", "fine": "tab:red", "all": "black"}


def accuracy_against_tokens(report: dict[str, Any], path: Path) -> Path:
    """Accuracy against tokens: the fixed granularities as a curve; router, random choice and oracle as points."""
    accuracy, tokens = report["accuracy"], report["visual_tokens"]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    ladder = list(accuracy["fixed"])
    for kind in accuracy["adaptive"]:
        values = [accuracy["fixed"][g][kind] for g in ladder]
        axis.plot(
            [tokens["fixed"][g] for g in ladder], values, "o-", color=KINDS.get(kind), label=f"fixed, {kind}", alpha=0.6
        )
    markers = {"adaptive": "*", "adaptive_paper": "P", "escalation": "^", "combined": "s", "random": "X", "oracle": "D"}
    for name, marker in markers.items():
        if name in tokens:
            axis.plot(tokens[name], accuracy[name]["all"], marker, color="black", markersize=11, label=f"{name}, all")
    if priced := [name for name in tokens if name.startswith("cost weight")]:
        across, up = [tokens[name] for name in priced], [accuracy[name]["all"] for name in priced]
        axis.plot(across, up, "*--", color="tab:red", label="adaptive, by cost weight")
        for name, x, y in zip(priced, across, up, strict=True):
            axis.annotate(name.split()[-1], (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)
    axis.set(xlabel="visual tokens a question", ylabel="accuracy", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return _save(figure, path)


def ablations(fixed: dict[str, Any], points: dict[str, Any], path: Path) -> Path:
    """Accuracy against tokens: routers trained in different ways, with deviations over seeds, and fixed granularities.

    fixed, points: {name: {"visual_tokens": (mean, deviation), "accuracy": (mean, deviation)}}.
    """
    figure, axis = plt.subplots(figsize=(8.4, 5), layout="constrained")
    tokens, accuracy = ([point[key][0] for point in fixed.values()] for key in ("visual_tokens", "accuracy"))
    axis.plot(tokens, accuracy, "o-", color="black", alpha=0.4, label="fixed")
    for place, (name, point) in enumerate(points.items()):
        (x, x_error), (y, y_error) = point["visual_tokens"], point["accuracy"]
        look = {"color": plt.get_cmap("tab20")(place % 20), "marker": "sD^vP*X"[place % 7]}
        axis.errorbar(x, y, xerr=x_error, yerr=y_error, label=name, linewidth=0.8, markersize=7, **look)
    axis.set(xlabel="visual tokens a question", ylabel="accuracy", ylim=(min(accuracy[1:] or accuracy) - 0.02, 1.0))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def tradeoff(report: dict[str, Any], path: Path) -> Path:
    """Accuracy against visual tokens and against seconds: the cost weights as a curve, with the other policies."""
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.2), sharey=True, layout="constrained")
    curves = {"always": ("o-", "tab:gray"), "cost weight": ("*-", "tab:red")}
    others = {"random": "X", "oracle": "D"}
    points = {point["name"]: point for point in report["points"]}
    for axis, (key, label) in zip(
        axes, (("visual_tokens", "visual tokens a question"), ("seconds", "seconds an answer")), strict=True
    ):
        for name, (style, colour) in curves.items():
            found = [point for point in points.values() if point["name"].startswith(name)]
            across, up = [point[key] for point in found], [point["accuracy"]["all"] for point in found]
            axis.plot(
                across, up, style, color=colour, label="fixed" if name == "always" else "the router, by its price"
            )
            for point, x, y in zip(found, across, up, strict=True):
                axis.annotate(point["name"].split()[-1], (x, y), xytext=(4, -9), textcoords="offset points", fontsize=7)
        for name, marker in others.items():
            axis.plot(points[name][key], points[name]["accuracy"]["all"], marker, color="black", label=name)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(fontsize=8)
    return _save(figure, path)


FRONTIER = {
    "fixed": ("o:", "tab:gray"),
    "random": (":", "tab:brown"),
    "router": ("-", "tab:blue"),
    "escalation": ("-", "tab:green"),
    "combined": ("-", "tab:red"),
    "oracle": ("--", "black"),
}


def frontier(found: dict[str, Any], path: Path) -> Path:
    """Accuracy against each unit of cost, every pass counted, for each curve of `escalation.frontier`.

    found: {unit: frontier}; a point may have the `deviation` of its accuracy.
    """
    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.2), layout="constrained", squeeze=False)
    for axis, (unit, of_unit) in zip(axes[0], found.items(), strict=True):
        for name, points in of_unit["curves"].items():
            style, colour = FRONTIER[name]
            ordered = sorted((point["cost"], point["accuracy"], point.get("deviation", 0.0)) for point in points)
            cost, accuracy, deviation = (np.array(values) for values in zip(*ordered, strict=True))
            axis.plot(cost, accuracy, style, color=colour, label=f"{name}, area {of_unit['areas'][name]:.3f}")
            axis.fill_between(cost, accuracy - deviation, accuracy + deviation, color=colour, alpha=0.15, linewidth=0)
        axis.set(xlabel=f"{unit} a question, every pass counted")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("accuracy")
    return _save(figure, path)


def choices(report: dict[str, Any], path: Path) -> Path:
    """Shares of granularities that the router chose, for each kind of question and in the two controls."""
    shown = [("the router", report["chosen"])]
    shown += [(name.replace("_", " "), report[name]["chosen"]) for name in report if name.startswith("shuffled")]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.4), layout="constrained", squeeze=False)
    for axis, (title, shares) in zip(axes[0], shown, strict=True):
        kinds = [kind for kind in shares if kind != "all"]
        bottom = np.zeros(len(kinds))
        for place, granularity in enumerate(shares["all"]):
            height = np.array([shares[kind][granularity] for kind in kinds])
            colour = plt.get_cmap("viridis")(place / max(1, len(shares["all"]) - 1))
            axis.bar(kinds, height, bottom=bottom, color=colour, label=f"{granularity} a tile")
            bottom += height
        axis.set(title=title, ylim=(0, 1))
    axes[0, 0].set_ylabel("share of questions")
    axes[0, -1].legend(fontsize=7)
    return _save(figure, path)


def voter(config: ModelConfig, weights: np.ndarray, path: Path) -> Path:
    """The voter's weights (R + K,), for each position of the pyramid and for the instruction tokens."""
    limit = float(np.abs(weights).max()) or 1.0
    figure, axes = plt.subplots(
        1, len(config.grids) + 1, figsize=(2.3 * (len(config.grids) + 1), 2.6), layout="constrained"
    )
    for axis, granularity, grid in zip(axes, config.granularities, config.grids, strict=False):
        start = config.pyramid_offsets[granularity]
        image = weights[start : start + math.prod(grid)].reshape(grid)
        drawn = axis.imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(0, 1, 1, 0))
        axis.set(title=f"{granularity} a tile", xticks=[], yticks=[])
    axes[-1].bar(np.arange(config.router.text_tokens), weights[config.pyramid_rows :])
    axes[-1].set(title="instruction", ylim=(-limit, limit), xlabel="by similarity")
    figure.colorbar(drawn, ax=axes[:-1], shrink=0.7)
    return _save(figure, path)


def one_scene(
    config: ModelConfig, image: Image.Image, asked: Sequence[str], answers: Sequence[Answer], path: Path
) -> Path:
    """One picture per question, with the grid of the granularity that the router chose for it."""
    figure, axes = plt.subplots(1, len(asked), figsize=(4.6 * len(asked), 3.4), layout="constrained", squeeze=False)
    for axis, question, answer in zip(axes[0], asked, answers, strict=True):
        draw_grid(axis, config, image, answer.granularity)
        axis.set_title(f"{question}\n{answer.text}   ({answer.visual_tokens} visual tokens)", fontsize=10)
    return _save(figure, path)


def examples(
    config: ModelConfig, questions: Sequence[Question], records: Sequence[policies.Record], path: Path, count: int = 3
) -> Path | None:
    """Questions that were right though cheap, right because fine, and wrong because cheap, each image with its grid.

    records: from `evaluation.answer_all`, for some or all of the questions. Returns None if no question is shown.
    """
    by_id = {question.sample.id: question for question in questions}
    shown = {sort: rows for sort, rows in policies.examples(config, records, count).items() if rows}
    if not shown:
        return None
    figure, axes = plt.subplots(
        len(shown), count, figsize=(4.4 * count, 4 * len(shown)), layout="constrained", squeeze=False
    )
    for line, (sort, rows) in zip(axes, shown.items(), strict=True):
        for axis in line[len(rows) :]:
            axis.set_axis_off()
        for axis, row in zip(line, rows, strict=False):
            record = records[row]
            (granularity,), text = record["chosen"], record["answer"]
            draw_grid(axis, config, by_id[record["id"]].sample.images[0].load(), granularity)
            asked = textwrap.fill(textwrap.shorten(record["question"], 160, placeholder=" ..."), 52)
            said = textwrap.shorten(f"{text}   ({record['adaptive']['visual_tokens']} visual tokens)", 60)
            caption = f"{asked}\n{said}"
            if record["right"][granularity] < 0.5:
                ladder = config.granularities
                finer = next(g for g in ladder[ladder.index(granularity) + 1 :] if record["right"][g] >= 0.5)
                answer = textwrap.shorten(record["answers"][finer], 40, placeholder=" ...")
                caption += f"\nwith {record['visual_tokens'][finer]}: {answer}"
            axis.set_title(caption.replace("$", r"\$"), fontsize=8)
        line[0].set_ylabel(sort)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
