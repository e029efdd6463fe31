"""Requests and answers."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from PIL import Image

from avg_llava_jax.data.conversation import Turn
from avg_llava_jax.data.images import ImageRef, image_ref
from avg_llava_jax.data.packing import Sample
from avg_llava_jax.inference.guides import Guide

ImageLike = str | os.PathLike[str] | bytes | Image.Image | ImageRef
Granularity = Literal["auto"] | int | str
TOP, BIASES = 20, 300
"""The most log-probabilities and biases of a token that a request may ask for, as in OpenAI's API."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question about images.

    prompt: a question, or a conversation of turns `{"from": "human" | "gpt", "value": text}` that ends
        with a question, which may be empty. `<image>` marks the place of an image; without it the images come
        first. A value that is the list of texts around the images has no markers, see `data.conversation`.
    images: one image or several: paths, encoded bytes, or Pillow images.
    granularity: "auto" (the router chooses for each image), tokens per tile, or a list with one of these
        for each image.
    cost_weight: the price of tokens under "auto": the router takes the g with the largest log p_g - cost_weight *
        (visual tokens of the image at g / those at the finest g). 0 is the paper's choice; a large one is the coarsest.
        An engine under load may raise it, see `pricing`.
    max_visual_tokens: the most visual tokens of all images together, newlines included; None = no bound.
        See `choosing`.
    escalate: a probability, 0 = off. An answer whose certainty (`Pass.certainty`) is below it is dropped, and the
        request is answered again at about four times the tokens, up to the finest granularity at which the prompt fits
        and the tokens of all passes are within `max_visual_tokens`. Only the pass that is kept streams. "calibrated":
        what `avg-llava calibrate` fitted.
    max_new_tokens: tokens to generate at most; fewer where prompt and answer reach the model's `max_length`.
    temperature: 0 = greedy. top_p: in (0, 1], 1 = off. top_k: 0 = off.
    min_p: drop tokens less likely than this share of the best; in [0, 1], 0 = off.
    repetition_penalty: over 0, 1 = off; over 1 makes tokens of the prompt and of the answer so far less likely.
    frequency_penalty, presence_penalty: 0 = off; subtracted from the logits of the answer's tokens, for each
        occurrence of a token, and once. See `programs.Shaping`.
    logit_bias: {token id: what is added to its logit}, at most 300 entries.
    min_tokens: generate no stop id before this many tokens; stop strings still end the answer.
    logprobs: give the log-probability of each token and of this many most likely ones, 0 .. 20; None = off.
    guide: what the answer must be, see `guides.Guide`; it overrides `min_tokens`.
    seed: the same request with the same seed gets the same answer, alone or in any batch.
    stop: strings that end the answer; they are not part of it.
    raw: use `prompt`, one text or the list of texts around the images, as it is, without a conversation template.
    adapter: the name of an adapter that the model was loaded with; None = the base.

    Raises:
      ValueError: a field has another type or is out of range; the message names it and its range.
    """

    prompt: str | Sequence[Turn] | Sequence[str]
    images: ImageLike | Sequence[ImageLike] = ()
    granularity: Granularity | Sequence[Granularity] = "auto"
    cost_weight: float = 0.0
    max_visual_tokens: int | None = None
    escalate: float | Literal["calibrated"] = 0.0
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    min_tokens: int = 0
    logprobs: int | None = None
    guide: Guide | None = None
    seed: int = 0
    stop: str | Sequence[str] = ()
    raw: bool = False
    adapter: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop={self.stop!r}: stop strings must be non-empty texts")
        if self.raw and not all(isinstance(text, str) for text in self.prompt):
            raise ValueError("raw=True takes the prompt as one text, not as turns")
        single = isinstance(self.images, (str, os.PathLike, bytes, Image.Image)) or hasattr(self.images, "load")
        if not single and not isinstance(self.images, Iterable):
            raise ValueError(f"images={self.images!r} must be an image or several, () for none")
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
            ("min_p", 0 <= self.min_p <= 1, "in 0 (off) .. 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "over 0, and finite"),
            ("frequency_penalty", abs(self.frequency_penalty) < float("inf"), "finite"),
            ("presence_penalty", abs(self.presence_penalty) < float("inf"), "finite"),
            ("min_tokens", self.min_tokens >= 0, "0 (off) or more"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= TOP, f"in 0 .. {TOP}, or None"),
            ("seed", 0 <= self.seed < 2**32, "in 0 .. 2**32 - 1"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")
        if len(self.logit_bias) > BIASES or not all(abs(bias) < float("inf") for bias in self.logit_bias.values()):
            raise ValueError(f"logit_bias={self.logit_bias!r} must have at most {BIASES} entries, all finite")

    def _check_types(self) -> None:
        for names, kinds, rule in TYPES:
            for name in names:
                value = getattr(self, name)
                absent = value is None and getattr(Request, name, ...) is None  # its default
                calibrated = name == "escalate" and isinstance(value, str)  # checked with its range
                if isinstance(value, bool) != (kinds is bool) or not (absent or calibrated or isinstance(value, kinds)):
                    raise ValueError(f"{name}={value!r} must be {rule}")


INTEGERS = ("max_visual_tokens", "max_new_tokens", "top_k", "min_tokens", "logprobs", "seed")
NUMBERS = ("cost_weight", "escalate", "temperature", "top_p", "min_p")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
TYPES = (
    (INTEGERS, numbers.Integral, "an integer"),
    ((*NUMBERS, *PENALTIES), numbers.Real, "a number"),
    (("raw",), bool, "True or False"),
    (("stop",), Iterable, "a text or several"),
    (("logit_bias",), Mapping, "{token id: number}"),
    (("guide",), Guide, "a Guide"),
    (("adapter",), str, "the name of an adapter"),
)
"""Fields of a `Request`, their types, and how an error calls them."""


class TokenScore(NamedTuple):
    """The log-probability in nats of a generated token, and {token: log-probability} of the most likely, best first.

    They are the model's own, before temperature, penalties, biases and guides.
    """

    token: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass of a request, at one granularity per image.

    granularity, visual_tokens: as in `Answer`, of this pass alone.
    certainty: the lowest probability that the model gave to a token of the answer, its end included, before temperature
        and the like. A dropped pass ends at the first token below `Request.escalate`.
    """

    granularity: int | str | tuple[int | str, ...] | None
    visual_tokens: int
    certainty: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a request.

    granularity: tokens per tile; a tuple with one entry per image where there are several, None without images.
    visual_tokens: packed tokens of all images and all passes, newlines included.
    probabilities: {granularity: probability} by the router; a tuple of these for several images; None
        where the router did not run, because there is no image or every granularity was requested.
    cost_weight: the price at which the router chose: the request's, or a higher one that the engine's load set (at 100
        the router was skipped). None if every granularity was requested.
    timings: seconds of `queue`, `encode` (load, encode, route), `prefill` (the wait for a slot included), `decode` and
        `total`. The first use of a bucket includes its compilation.
    token_ids: generated ids, without the stop id that ended the answer.
    finish: "stop" (a stop id, a stop string or a complete guide) or "length".
    passes: each pass, coarse to fine; the last one gave the answer.
    logprobs: the score of each of `token_ids`, () if `Request.logprobs` is None.
    closed: whether its guide closed it early, before its tokens ran out; `finish` is "stop" then too.
    """

    text: str
    granularity: int | str | tuple[int | str, ...] | None
    visual_tokens: int
    probabilities: dict[int, float] | tuple[dict[int, float], ...] | None
    timings: dict[str, float]
    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    passes: tuple[Pass, ...]
    logprobs: tuple[TokenScore, ...] = ()
    cost_weight: float | None = None
    closed: bool = False

    @property
    def certainty(self) -> float:
        """The certainty of the answer, see `Pass`."""
        return self.passes[-1].certainty


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A checked, tokenized request, with `escalate` as a number.

    choice: the requested granularity of each image, None if the router chooses. adapter: its number, see `stacked`.
    fixed_price: the engine's load must not raise `cost_weight`: a calibrated threshold holds at its own price alone.
    """

    request: Request
    sample: Sample
    choice: tuple[int | None, ...]
    adapter: int = 0
    fixed_price: bool = False


def as_ref(image: ImageLike) -> ImageRef:
    """A reference to an image of a request. Raises ValueError for a value that is not an image."""
    if isinstance(image, (str, os.PathLike, bytes, Image.Image)):
        return image_ref(image)
    if not (hasattr(image, "load") and hasattr(image, "size")):
        raise ValueError(f"an image is a path, bytes or a Pillow image, not {type(image).__name__}")
    return image
