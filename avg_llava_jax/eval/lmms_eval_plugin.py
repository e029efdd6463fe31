"""AVG-LLaVA as a model of lmms-eval; with both installed, no further setup is needed:

    lmms-eval --model avg_llava_jax --model_args checkpoint=W,granularity=auto --tasks pope --log_samples ...

lmms-eval finds `MANIFEST` by this package's entry point. The token counts of logged samples include visual tokens,
granularity and seconds; `throughput` in the results has the time and the tokens of all. Answers end at the end token or
at `max_new_tokens`; like LLaVA's own wrapper, this one does not truncate them at `until`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from avg_llava_jax import extras
from avg_llava_jax.config import named
from avg_llava_jax.data.images import MAX_PIXELS, image_ref
from avg_llava_jax.eval.benchmarks.letters import offered
from avg_llava_jax.inference.guides import Guide
from avg_llava_jax.inference.requests import Answer, Request

with extras.required("lmms-eval", "the lmms-eval plugin"):
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from lmms_eval.models.registry_v2 import ModelManifest
    from loguru import logger

MANIFEST = ModelManifest("avg_llava_jax", simple_class_path="avg_llava_jax.eval.lmms_eval_plugin.AvgLlavaForLmmsEval")

NEW_TOKENS = 64
"""The limit for tasks that set none (TextVQA, VizWiz)."""


@dataclasses.dataclass
class Counts(TokenCounts):
    """Token counts of an answer, with visual tokens, granularity and seconds, as in `Answer`."""

    visual_tokens: int = 0
    granularity: int | tuple[int, ...] | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The entry of a logged sample."""
        own = {"visual_tokens": self.visual_tokens, "granularity": self.granularity, "seconds": self.seconds}
        return super().to_dict() | own


class AvgLlavaForLmmsEval(lmms):
    """lmms-eval's model interface. `--model_args` are the arguments except batch_size and device, which lmms-eval sets.

    granularity: "auto", or tokens per tile for every image, one of the model's. checkpoint: default the shipped one.
    batch_size: slots, the answers decoded at once.
    max_pixels: a larger image is not decoded, and its question not answered.
    guided: whether an answer to a question that asks for the letter of an option must be one, see `letters.offered`.

    Raises:
      ValueError: names an argument that the model cannot run with.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str | None = None,
        granularity: str | int = "auto",
        vision_tower: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_pixels: int | str = MAX_PIXELS,
        guided: bool | str = False,
    ):
        super().__init__()
        from avg_llava_jax import SHIPPED
        from avg_llava_jax.inference.api import AvgLlava

        if device is not None:
            logger.info(f"device={device} is for PyTorch; JAX runs where JAX_PLATFORMS says")
        self.batch_size = _positive("batch_size", batch_size)
        self.max_pixels = _positive("max_pixels", max_pixels)
        if str(guided) not in ("True", "False"):
            raise ValueError(f"guided={guided!r} must be True or False")
        self.guided = str(guided) == "True"
        self.model = AvgLlava.load(checkpoint or SHIPPED, vision_tower, dtype=dtype)
        self.granularity = _granularity(granularity, self.model.config.granularities)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """One result per request, in order; an empty text if a prompt is too long for the model.

        Raises:
          ValueError: no request can be answered; gives the reason for the last one.
        """
        results, self._refused, begin = [], [], time.perf_counter()
        window = 8 * self.batch_size  # requests whose images are held at once
        for start in tqdm(range(0, len(requests), window), desc="avg_llava_jax"):
            part = [self._request(*request.args) for request in requests[start : start + window]]
            results += [self._result(answer) for answer in self._answer(part)]
        if self._refused:
            said = (
                f"{len(self._refused)} of {len(requests)} requests are not answered, the last one: {self._refused[-1]}"
            )
            if len(self._refused) == len(requests):
                raise ValueError(said)
            logger.warning(said)
        self._log(results, time.perf_counter() - begin)
        return results

    def _log(self, results: Sequence[GenerationResult], seconds: float) -> None:
        """Add a run to the results' `throughput`: lmms-eval divides by the elapsed time, and averages what is added."""
        counts = [result.token_counts for result in results if result.token_counts is not None]
        tokens = sum(count.output_tokens for count in counts)
        own = {
            "num_requests": len(results),
            "samples_per_second": len(results) / seconds,
            "visual_tokens": sum(count.visual_tokens for count in counts) / len(counts),
        }
        log_metrics(seconds, tokens, tokens / seconds, own)

    def _request(
        self, context: str, options: dict[str, Any], to_images: Any, row: int, task: str, split: str
    ) -> Request:
        letters = offered(context) if self.guided else []
        return Request(
            context,
            [image_ref(image, self.max_pixels) for image in to_images(self.task_dict[task][split][row])],
            granularity=self.granularity,
            max_new_tokens=options.get("max_new_tokens", NEW_TOKENS),
            temperature=(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0,
            top_p=options.get("top_p") or 1.0,
            guide=Guide.choice(letters) if letters else None,
        )

    def _answer(self, requests: Sequence[Request]) -> list[Answer | None]:
        try:
            return list(self.model.answer_batch(requests, self.batch_size))
        except ValueError as error:
            if len(requests) > 1:  # find out which one it is
                return [answer for request in requests for answer in self._answer([request])]
            logger.warning(f"not answered: {error}")
            self._refused.append(error)
            return [None]

    def _result(self, answer: Answer | None) -> GenerationResult:
        if answer is None:
            return GenerationResult("")
        counts = Counts(
            output_tokens=len(answer.token_ids),
            visual_tokens=answer.visual_tokens,
            granularity=answer.granularity,
            seconds=answer.timings,
        )
        return GenerationResult(answer.text, counts)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("avg_llava_jax generates text: choose tasks of type `generate_until`")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("avg_llava_jax answers single questions: choose tasks of type `generate_until`")


def _positive(name: str, value: int | str) -> int:
    """A model argument as a whole number of at least 1, given as a number or as text."""
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    return int(value)


def _granularity(value: int | str, ladder: Sequence[int]) -> int | str:
    """`auto`, or one of the model's granularities: with any other, every question would fail."""
    if value == "auto" or named(str(value)) in ladder:
        return named(str(value))
    raise ValueError(f"granularity={value!r} is not one of this model's: auto, {', '.join(map(str, ladder))}")
