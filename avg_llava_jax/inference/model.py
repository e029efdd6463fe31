"""The model to answer with: config, parameters, tokenizer and stop ids; it checks and tokenizes requests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from avg_llava_jax import reuse
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import PLACEHOLDER, encode_prompt, encode_raw, stop_ids
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.packing import Sample, make_sample, packed_length
from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.inference import choosing, stacked
from avg_llava_jax.inference.calibration import Calibration
from avg_llava_jax.inference.guides import Guide, Matcher
from avg_llava_jax.inference.requests import Answer, Granularity, Pass, Prepared, Request, TokenScore, as_ref
from avg_llava_jax.inference.stacked import Stack
from avg_llava_jax.models import language
from avg_llava_jax.models.avg_llava import Params


class PromptTooLong(ValueError):
    """A prompt over `max_length`. limit: max_length, in tokens."""

    def __init__(self, message: str, limit: int):
        super().__init__(message)
        self.limit = limit


class Model:
    """A model to answer with: `config`, `params`, `tokenizer` and `step`, the training steps of the parameters.

    stop_ids: tokens that end an answer. calibration: thresholds for `Request.escalate`, or the error of reading them.
    adapters: those that a request may choose.

    Raises:
      ValueError: the tokenizer has more ids than the model's vocabulary.
    """

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer, step: int = 0):
        if tokenizer.vocab_size > config.language.vocab_size:
            raise ValueError(
                f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} ids, "
                f"the model's vocabulary {config.language.vocab_size}: use the tokenizer that it was trained with"
            )
        self.config, self.params, self.tokenizer, self.step = config, params, tokenizer, step
        self.stop_ids = stop_ids(tokenizer, config.template)
        self.calibration: Calibration | ValueError | None = None
        self.adapters = Stack()

    @functools.cached_property
    def unstacked(self) -> Params:
        """The parameters, adapters included, with the language model's layers as a tuple, as programs take them."""
        found = [unstacked(params) for params in (self.params, self.adapters.leaves) if params]
        return functools.reduce(stacked.merge_leaves, found)

    @functools.cached_property
    def made_by(self) -> dict[str, str]:
        """Digests of what determines the answers, see `reuse`."""
        return reuse.made_by(self.config, self.params, self.tokenizer)

    def limited_to(self, max_length: int) -> Model:
        """The same model with `max_length`, in positions of prompt and answer together."""
        if max_length == self.config.language.max_length:
            return self
        shorter = dataclasses.replace(self.config.language, max_length=max_length)
        model = Model(dataclasses.replace(self.config, language=shorter), self.params, self.tokenizer, self.step)
        model.stop_ids, model.calibration, model.adapters = self.stop_ids, self.calibration, self.adapters
        model.__dict__["unstacked"] = self.unstacked
        return model

    def prepare(self, request: Request) -> Prepared:
        """Check and tokenize a request; reads only the headers of its images. Raises ValueError in one line."""
        size, number = self.config.language.vocab_size, self.adapters.number(request.adapter)
        if stranger := [token for token in request.logit_bias if not 0 <= token < size]:
            raise ValueError(f"logit_bias={stranger[0]!r} is no token: ids are 0 .. {size - 1}")
        refs = [as_ref(image) for image in request.images]
        if request.raw:
            tokens = encode_raw(request.prompt, self.tokenizer)
        else:
            prompt = request.prompt
            if isinstance(prompt, str) and not prompt.strip() and not refs:
                raise BadSample("empty_question", "the question has no text and no image")
            turns = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else prompt
            tokens = encode_prompt(turns, self.tokenizer, self.config.template, len(refs))
        if tokens.images != len(refs):
            raise ValueError(f"{len(refs)} images for {tokens.images} {PLACEHOLDER} in the prompt: give one for each")
        if not tokens.ids:
            raise ValueError("the prompt is empty")
        sample = make_sample("request", tokens, refs)
        choice = self._wanted(request.granularity, len(refs))
        calibrated = request.escalate == "calibrated"
        if calibrated:
            request = dataclasses.replace(request, escalate=self._calibrated(request, choice))
        choosing.check_budget(self.config, sample.sizes, choice, request.max_visual_tokens)
        if len(tokens.ids) - len(refs) > self.config.language.max_length or None not in choice:
            check_length(self.config, sample, [g or self.config.granularities[0] for g in choice])
        return Prepared(request, sample, choice, number, fixed_price=calibrated)

    def matcher(self, guide: Guide) -> Matcher:
        """A matcher of an answer that is still empty. Raises ValueError if the guide cannot be followed."""
        return Matcher(guide, self.tokenizer, self.stop_ids, self.config.language.vocab_size)

    def _wanted(self, granularity: Granularity | Sequence[Granularity], images: int) -> tuple[int | None, ...]:
        """The requested granularity of each image, None for "auto"."""
        each = granularity if isinstance(granularity, (list, tuple)) else [granularity] * images
        if len(each) != images:
            raise ValueError(f"granularity={granularity!r} names {len(each)} for {images} images: give one for each")
        for one in each or [granularity]:
            if one != "auto" and (isinstance(one, bool) or one not in self.config.granularities):
                ladder = ", ".join(map(str, self.config.granularities))
                raise ValueError(f"granularity={one!r}: choose auto, {ladder}")
        return tuple(None if one == "auto" else one for one in each)

    def _calibrated(self, request: Request, choice: Sequence[int | None]) -> float:
        """The calibrated threshold of a request that begins at `choice`."""
        if request.adapter is not None:
            raise ValueError(f"escalate=calibrated is known for the base, not for adapter={request.adapter!r}")
        if request.max_visual_tokens is not None:
            raise ValueError("escalate=calibrated holds without max_visual_tokens: give one of them")
        if isinstance(self.calibration, ValueError):
            raise self.calibration
        if self.calibration is None:
            raise ValueError("escalate=calibrated: the checkpoint has no calibration; avg-llava calibrate makes one")
        begins = {"auto" if granularity is None else str(granularity) for granularity in choice}
        known = self.calibration.thresholds
        if len(begins) > 1 or not begins <= known.keys() or ("auto" in begins and request.cost_weight):
            raise ValueError(
                f"escalate=calibrated is known for granularity={' or '.join(known)} of all images with cost_weight=0, "
                f"not for granularity={request.granularity!r} with cost_weight={request.cost_weight:g}"
            )
        return known[begins.pop()] if begins else 0.0

    def longest(self, prepared: Prepared) -> int:
        """The most positions of a request: its prompt at the finest granularities it may get, and its answer."""
        config, finest = self.config, self.config.granularities[-1]
        escalates = bool(prepared.request.escalate)
        prompt = length_at(config, prepared.sample, [finest if escalates else g or finest for g in prepared.choice])
        if None in prepared.choice and prepared.request.max_visual_tokens is not None:
            text = len(prepared.sample.tokens.ids) - len(prepared.choice)
            prompt = min(prompt, text + prepared.request.max_visual_tokens)
        return min(prompt + prepared.request.max_new_tokens, config.language.max_length)

    def answer_of(
        self,
        text: str,
        ids: Sequence[int],
        finish: Literal["stop", "length"],
        passes: Sequence[Pass],
        scores: Sequence[np.ndarray],
        timings: dict[str, float],
        logprobs: Sequence[TokenScore] = (),
        cost_weight: float | None = None,
        closed: bool = False,
    ) -> Answer:
        """The answer of a request that has ended.

        passes: all of them, the one that gave the answer last. scores: router scores (G,) of each image, empty if not
        routed.
        """
        shares = tuple(dict(zip(self.config.granularities, softmax(row), strict=True)) for row in scores)
        return Answer(
            text=text,
            granularity=passes[-1].granularity,
            visual_tokens=sum(each.visual_tokens for each in passes),
            probabilities=_single(shares),
            timings=timings,
            token_ids=tuple(ids),
            finish=finish,
            passes=tuple(passes),
            logprobs=tuple(logprobs[: len(ids)]),
            cost_weight=cost_weight,
            closed=closed,
        )

    def pass_of(self, prepared: Prepared, choice: tuple[int | str, ...], certainty: float) -> Pass:
        """One pass of a request, at one granularity per image."""
        return Pass(_single(choice), sum(visual_tokens(self.config, prepared.sample, choice)), certainty)


def unstacked(params: Params, free: bool = False) -> Params:
    """Parameters with the language model's layers, where there are any, as a tuple; see `language.unstack`."""
    if "layers" not in params.get("language", {}):  # adapters of the encoder alone
        return params
    layers = language.unstack(params["language"]["layers"], free)
    return params | {"language": params["language"] | {"layers": layers}}


def length_at(config: ModelConfig, sample: Sample, choice: Sequence[Granularity]) -> int:
    """Packed length of a prompt at one granularity per image; may exceed `max_length`."""
    return len(sample.tokens.ids) - len(sample.sizes) + sum(visual_tokens(config, sample, choice))


def visual_tokens(config: ModelConfig, sample: Sample, choice: Sequence[Granularity]) -> list[int]:
    """Visual tokens, newlines included, of each image."""
    return [visual_count(size, config.of(len(sample.sizes)), g) for size, g in zip(sample.sizes, choice, strict=True)]


def check_length(config: ModelConfig, sample: Sample, choice: Sequence[Granularity]) -> None:
    """Raise PromptTooLong if a prompt exceeds `max_length`; it says which granularity would fit."""
    need, limit = length_at(config, sample, choice), config.language.max_length
    if need <= limit:
        return
    fitting = [g for g in config.granularities if packed_length(sample, config, g) <= limit]
    advice = f"granularity={fitting[-1]} would fit" if fitting else "no granularity would fit: shorten the prompt"
    at = f" at granularity {', '.join(map(str, choice))}" if choice else ""
    raise PromptTooLong(f"the prompt takes {need} tokens{at}, the model's limit is {limit}; {advice}", limit)


def without_end(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Generated ids without the stop id, if they end in one."""
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def softmax(scores: np.ndarray) -> list[float]:
    """Probabilities (G,) of fp32 scores (G,)."""
    shares = np.exp(scores - scores.max())
    return (shares / shares.sum()).tolist()


def _single(values: tuple) -> object:
    """The one value of a tuple, None of an empty one, or the tuple itself."""
    return None if not values else values[0] if len(values) == 1 else values
