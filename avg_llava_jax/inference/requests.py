"""Requests and answers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Literal

from PIL import Image

from avg_llava_jax.data.conversation import Turn
from avg_llava_jax.data.images import ImageRef, image_ref
from avg_llava_jax.data.packing import Sample

ImageLike = str | os.PathLike[str] | bytes | Image.Image | ImageRef
Granularity = Literal["auto"] | int


@dataclasses.dataclass(frozen=True)
class Request:
    """One question about images.

    prompt: a question, or a conversation of turns `{"from": "human" | "gpt", "value": text}` that ends
        with a question. `<image>` marks the place of an image; without it the images come first.
    images: one image or several: paths, encoded bytes, or Pillow images.
    granularity: "auto" (the router chooses for each image), tokens per tile, or a list with one of these
        for each image.
    cost_weight: the price of tokens under "auto": the router takes the g with the largest log p_g - cost_weight *
        (visual tokens of the image at g / those at the finest g). 0 is the paper's choice; a large one is the coarsest.
    max_visual_tokens: the most visual tokens of all images together, newlines included; None = no bound.
        See `choosing`.
    escalate: a probability, 0 = off. An answer whose certainty (`Read.certainty`) is below it is dropped, and the
        request is answered at the finest granularity at which the prompt fits and the tokens of both reads are within
        `max_visual_tokens`. Only the last read streams. "calibrated": what `avg-llava calibrate` fitted.
    max_new_tokens: tokens to generate at most; fewer where prompt and answer reach the model's `max_length`.
    temperature: 0 = greedy. top_p: in (0, 1], 1 = off. top_k: 0 = off.
    seed: the same request with the same seed gets the same answer, alone or in any batch.
    stop: strings that end the answer; they are not part of it.
    raw: use `prompt` as it is, without a conversation template.

    Raises:
      ValueError: a field is out of range; the message names it and its range.
    """

    prompt: str | Sequence[Turn]
    images: ImageLike | Sequence[ImageLike] = ()
    granularity: Granularity | Sequence[Granularity] = "auto"
    cost_weight: float = 0.0
    max_visual_tokens: int | None = None
    escalate: float | Literal["calibrated"] = 0.0
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: str | Sequence[str] = ()
    raw: bool = False

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop={self.stop!r}: stop strings must be non-empty texts")
        if self.raw and not isinstance(self.prompt, str):
            raise ValueError("raw=True takes the prompt as one text, not as turns")
        single = isinstance(self.images, (str, os.PathLike, bytes, Image.Image)) or hasattr(self.images, "load")
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "images", (self.images,) if single else tuple(self.images))
        for name, valid, rule in (
            ("cost_weight", 0 <= self.cost_weight < float("inf"), "0 (off) or more, and finite"),
            ("max_visual_tokens", self.max_visual_tokens is None or self.max_visual_tokens >= 1, "at least 1, or None"),
            (
                "escalate",
                self.escalate == "calibrated" or (not isinstance(self.escalate, str) and 0 <= self.escalate <= 1),
                "0 (off), a probability or calibrated",
            ),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("seed", 0 <= self.seed < 2**32, "in 0 .. 2**32 - 1"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")


@dataclasses.dataclass(frozen=True)
class Read:
    """One granularity at which a request was answered.

    granularity, visual_tokens: as in `Answer`, of this read alone.
    certainty: the lowest probability that the model gave to a token of the answer, its end included, before temperature
        and the like. A read that was dropped ends at the first token below `Request.escalate`.
    """

    granularity: int | tuple[int, ...] | None
    visual_tokens: int
    certainty: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a request.

    granularity: tokens per tile; a tuple with one entry per image where there are several, None without images.
    visual_tokens: packed tokens of all images and all reads, newlines included.
    probabilities: {granularity: probability} by the router; a tuple of these for several images; None
        where the router did not run, because there is no image or every granularity was requested.
    timings: seconds of `queue`, `encode` (load, encode, route), `prefill` (the wait for a slot included), `decode` and
        `total`. The first use of a bucket includes its compilation.
    token_ids: generated ids, without the stop id that ended the answer.
    finish: "stop" (a stop id or a stop string) or "length".
    reads: each read, coarse to fine; the last one gave the answer.
    """

    text: str
    granularity: int | tuple[int, ...] | None
    visual_tokens: int
    probabilities: dict[int, float] | tuple[dict[int, float], ...] | None
    timings: dict[str, float]
    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    reads: tuple[Read, ...]

    @property
    def certainty(self) -> float:
        """The certainty of the answer, see `Read`."""
        return self.reads[-1].certainty


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A checked, tokenized request, with `escalate` as a number.

    choice: the requested granularity of each image, None where the router chooses.
    """

    request: Request
    sample: Sample
    choice: tuple[int | None, ...]


def as_ref(image: ImageLike) -> ImageRef:
    """A reference to an image of a request. Raises ValueError for a value that is not an image."""
    if isinstance(image, (str, os.PathLike, bytes, Image.Image)):
        return image_ref(image)
    if not (hasattr(image, "load") and hasattr(image, "size")):
        raise ValueError(f"an image is a path, bytes or a Pillow image, not {type(image).__name__}")
    return image
