"""Why the router chose a granularity: its scores, votes and selected words, as arrays and as a figure.

If the request may escalate, also the answer of each pass and its certainty.
"""

from __future__ import annotations

import dataclasses
import os
import textwrap
from typing import Any

import jax
import numpy as np
from PIL import Image

from avg_llava_jax.config import Granularity, ModelConfig
from avg_llava_jax.data.conversation import IMAGE
from avg_llava_jax.data.geometry import borders
from avg_llava_jax.data.tiles import Size, grid_of, mosaic_box, tile_count
from avg_llava_jax.eval import routing
from avg_llava_jax.inference import choosing
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.model import check_length, length_at, softmax
from avg_llava_jax.inference.requests import Answer, Request


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The router's inputs, votes and scores for one prompt, and the first-token scores at each granularity.

    input_ids: (n,) prompt, IMAGE (-200) for each image.
    seq_len: (G + 1,) packed lengths: with every image at each granularity of the ladder, then as chosen.
    router_logits, router_pre_norm: (images, G).
    router_choice: (images,) index into the ladder. router_choice_granularity: (images,) its names.
    logits: {g or "router": (V,)} at the last position of the prompt, the scores of the first answer token. A
        granularity at which the prompt exceeds the model's length is left out.
    votes: (tiles, R + K, G) per image: each row's voter weight times its logits. The rows are a tile's pyramid,
        coarsest first, then the K selected tokens. Summed over rows and averaged over tiles they are
        router_pre_norm.
    words: for each image, the text of the selected instruction tokens, most similar first; "" = none.
    images: the images, upright.
    escalate: the certainty below which the answer is given again, 0 = never. answers: with it, the answer of each pass:
        at the chosen granularities first, and of those that follow while it is not certain enough.
    """

    config: ModelConfig
    input_ids: np.ndarray
    seq_len: np.ndarray
    router_logits: np.ndarray
    router_pre_norm: np.ndarray
    router_choice: np.ndarray
    router_choice_granularity: np.ndarray
    logits: dict[int | str, np.ndarray]
    votes: list[np.ndarray]
    words: list[list[str]]
    images: list[Image.Image]
    escalate: float = 0.0
    answers: tuple[Answer, ...] = ()

    @property
    def probabilities(self) -> np.ndarray:
        """(images, G)."""
        return np.array([softmax(row) for row in self.router_logits])

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that `save` writes: the fields by name, `logits.g`, and `votes.i`, `words.i` for image i."""
        named = (
            "input_ids",
            "seq_len",
            "router_logits",
            "router_pre_norm",
            "router_choice",
            "router_choice_granularity",
        )
        arrays = {name: getattr(self, name) for name in named}
        arrays |= {f"logits.{g}": row for g, row in self.logits.items()}
        arrays |= {f"votes.{i}": votes for i, votes in enumerate(self.votes)}
        return arrays | {f"words.{i}": np.array(words, dtype=np.str_) for i, words in enumerate(self.words)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays as .npz."""
        with open(path, "wb") as file:
            np.savez_compressed(file, **self.arrays())


def explain(model: AvgLlava, request: Request) -> Explanation:
    """Route a prompt and prefill it at every granularity; with `escalate`, answer it with the request's options.

    Raises:
      ValueError: the prompt has no image, or fits at no granularity.
    """
    config = model.config
    prepared = model.prepare(dataclasses.replace(request, granularity="auto"))
    sample = prepared.sample
    if not sample.sizes:
        raise ValueError("there is no image to explain a granularity for")
    (encoded,) = routing.encode_all(model, [sample], 1)
    routed = jax.device_get(routing.route(config, model.params, encoded.pyramid, encoded.inputs))
    images = len(sample.sizes)
    scores = routed.logits[0, :images]
    choice = choosing.choose(config, prepared, scores)

    ways: dict[int | str, tuple[int, ...]] = {g: (g,) * images for g in config.granularities} | {"router": choice}
    lengths = [length_at(config, sample, way) for way in ways.values()]
    limit = config.language.max_length
    fitting = {name: way for (name, way), need in zip(ways.items(), lengths, strict=True) if need <= limit}
    if not fitting:
        check_length(config, sample, ways[config.granularities[0]])
    one = dataclasses.replace(prepared.request, max_new_tokens=1, escalate=0.0)
    asked = [dataclasses.replace(prepared, request=one, choice=way) for way in fitting.values()]
    logits = dict(zip(fitting, model.first_logits(asked), strict=True))

    threshold, answers = prepared.request.escalate, []
    if threshold and "router" in fitting:
        (last,) = model.answer_prepared([dataclasses.replace(prepared, choice=choice)])
        once = dataclasses.replace(prepared.request, escalate=0.0)
        before = [each.granularity if images > 1 else (each.granularity,) for each in last.passes[:-1]]
        dropped = [dataclasses.replace(prepared, request=once, choice=each) for each in before]
        answers = [*model.answer_prepared(dropped), last]

    votes, at = [], 0
    for size in sample.sizes:
        count = tile_count(size, config.of(images))
        votes.append(routed.votes[0, at : at + count])
        at += count
    text = [token for token in sample.tokens.ids if token != IMAGE]
    selected = routed.text_rows[0, :images]
    return Explanation(
        config=config,
        input_ids=np.array(sample.tokens.ids),
        seq_len=np.array(lengths),
        router_logits=scores,
        router_pre_norm=routed.pre_norm[0, :images],
        router_choice=np.array([config.granularities.index(g) for g in choice]),
        router_choice_granularity=np.array(choice),
        logits=logits,
        votes=votes,
        words=[["" if p < 0 else model.tokenizer.decode([text[p]]) for p in row] for row in selected],
        images=[ref.load() for ref in sample.images],
        escalate=threshold,
        answers=tuple(answers),
    )


def draw(explanation: Explanation, path: str | os.PathLike[str]) -> None:
    """Draw for each image its grid, probabilities and words; below, its votes by position at each granularity.

    Below these, if the request may escalate: the image as each pass saw it, the answer, and its certainty.
    """
    from matplotlib.figure import Figure

    count = len(explanation.images)
    config = explanation.config.of(count)
    levels = config.granularities
    passes = count if explanation.answers else 0
    figure = Figure(figsize=(14, 7 * count + 4 * passes), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(count + passes, 1, height_ratios=[7] * count + [4] * passes))
    for i, part in enumerate(parts[count:]):
        _draw_passes(part, config, explanation, i)
    for part, i in zip(parts, range(count), strict=False):
        above, below = part.subfigures(2, 1, height_ratios=(1.3, 1))
        image, chosen = explanation.images[i], int(explanation.router_choice[i])
        seen, shares, words = above.subplots(1, 3)
        draw_grid(seen, config, image, levels[chosen])
        seen.set_title(f"seen at {levels[chosen]} tokens a tile")
        _bars(shares, [str(g) for g in levels], explanation.probabilities[i], chosen, "probability")
        text = [word.strip() or "(space)" for word in explanation.words[i] if word][:16]
        voted = explanation.votes[i][:, config.pyramid_rows :, chosen].mean(axis=0)[: len(text)]
        _bars(words, text, voted, None, f"instruction: votes for {levels[chosen]}")

        maps = vote_maps(config, image.size, explanation.votes[i][:, :, chosen])
        bound = max(float(np.abs(cells).max()) for cells in maps.values()) or 1.0
        axes = below.subplots(1, len(levels), squeeze=False)[0]
        for axis, (g, cells) in zip(axes, maps.items(), strict=True):
            _backdrop(axis, image.convert("L"))
            y, x = borders(image.size, config, g, whole=True)
            drawn = axis.pcolormesh(x, y, cells, cmap="coolwarm", vmin=-bound, vmax=bound, alpha=0.65)
            axis.set(xlim=(0, image.width), ylim=(image.height, 0), title=f"{g} tokens a tile")
        below.suptitle(f"votes of the image's rows for {levels[chosen]}, by position")
        below.colorbar(drawn, ax=axes, shrink=0.7)
    figure.savefig(path, dpi=100)


def look_names(count: int) -> list[str]:
    """Names of the passes of an answer. Of three: a glance, another look, a close look."""
    return ["a glance", *["another look"] * (count - 2), "a close look"][:count]


def _draw_passes(figure: Any, config: ModelConfig, explanation: Explanation, image: int) -> None:
    """What each pass saw of one image, and its certainty against the threshold."""
    names = look_names(len(explanation.answers))
    first, middle, *others = figure.subplots(1, max(len(names), 2) + 1)
    for axis, name, answer in zip((first, *others), names, explanation.answers, strict=False):
        each = answer.granularity if isinstance(answer.granularity, tuple) else (answer.granularity,)
        draw_grid(axis, config, explanation.images[image], each[image])
        said = textwrap.shorten(answer.text, 40, placeholder=" ...").replace("$", r"\$")
        axis.set_title(f"{name}: {each[image]} tokens a tile, {answer.passes[-1].visual_tokens} in all\n“{said}”")
    _bars(middle, names, np.array([answer.certainty for answer in explanation.answers]), None, "certainty")
    middle.axvline(explanation.escalate, color="tab:red", label=f"escalate below {explanation.escalate:g}")
    middle.set_xlim(0, 1)
    middle.legend(loc="lower right")
    if len(names) == 1:
        others[0].set_axis_off()
        others[0].text(0.5, 0.5, "certain enough:\nno close look", ha="center", va="center")


def vote_maps(config: ModelConfig, size: Size, votes: np.ndarray) -> dict[Granularity, np.ndarray]:
    """votes (tiles, R + K) of one image for one granularity -> {level: votes of the mosaic's cells (rows, columns)}.

    Without pinpoints the mosaic is tile 0.
    """
    rows, columns = grid_of(size, config)
    tiles = votes[1:] if rows else votes[:1]
    rows, columns = max(rows, 1), max(columns, 1)
    maps = {}
    for (height, width), g in zip(config.grids, config.granularities, strict=True):
        offset = config.pyramid_offsets[g]
        cells = tiles[:, offset : offset + height * width].reshape(rows, columns, height, width)
        maps[g] = cells.swapaxes(1, 2).reshape(rows * height, columns * width)
    return maps


def draw_grid(axis: Any, config: ModelConfig, image: Image.Image, granularity: Granularity) -> None:
    """Draw the image, the borders of the cells that one granularity packs, and those of the tiles, on an axis."""
    _backdrop(axis, image)
    top, bottom, left, right = mosaic_box(image.size, config)
    rows, columns = (max(1, n) for n in grid_of(image.size, config))
    ys, xs = borders(image.size, config, granularity)
    if len(xs) > 1 and len(ys) > 1:
        axis.hlines(ys, xs[0], xs[-1], color="white", linewidth=0.6, alpha=0.8)
        axis.vlines(xs, ys[0], ys[-1], color="white", linewidth=0.6, alpha=0.8)
    axis.hlines(np.linspace(top, bottom, rows + 1), left, right, color="black", linewidth=1.2)
    axis.vlines(np.linspace(left, right, columns + 1), top, bottom, color="black", linewidth=1.2)
    axis.set(xlim=(0, image.width), ylim=(image.height, 0))


def _backdrop(axis: Any, image: Image.Image) -> None:
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, image.width, image.height, 0))
    axis.set_xticks([])
    axis.set_yticks([])


def _bars(axis: Any, names: list[str], values: np.ndarray, highlighted: int | None, title: str) -> None:
    places = np.arange(len(names))
    colours = ["tab:orange" if place == highlighted else "tab:blue" for place in places]
    axis.barh(places, values, color=colours)
    # A dollar sign in a word must not start a formula.
    axis.set_yticks(places, [name.replace("$", r"\$") for name in names])
    axis.invert_yaxis()
    axis.set_title(title)
