"""The records of `evaluation.answer_all`, made by continuous batching.

    a question ──▶ asked as the router chooses ──its scores──▶ asked at every other granularity ──▶ its record

A question is asked once with the choice left to the router. That gives the scores, and the answer at the granularity
that was chosen; the others are asked for as soon as the scores are there. So its image is encoded once, as are the
images of the questions before and after it that share it, and what their prompts begin with is read once as far as it
is still in a slot.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

import numpy as np

from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.tiles import tile_count
from avg_llava_jax.eval import evaluation
from avg_llava_jax.eval.evaluation import Question
from avg_llava_jax.eval.policies import Choice, Record, choices
from avg_llava_jax.inference import batching
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.device import page_bytes
from avg_llava_jax.inference.engine import IMAGE_CACHE_BYTES, Engine
from avg_llava_jax.inference.intake import Images, read_images
from avg_llava_jax.inference.requests import Prepared, Request
from avg_llava_jax.inference.tickets import Ticket


def answer_all(
    model: AvgLlava,
    questions: Sequence[Question],
    file: str | os.PathLike[str] | None = None,
    max_new_tokens: int = 16,
    slots: int = 8,
    progress: bool = True,
    skipped: list[dict[str, str]] | None = None,
) -> list[Record]:
    """What `evaluation.answer_all` returns and writes, by an engine of so many slots, in this thread.

    Questions about one image should stand together. One that fits at no granularity is left out as one whose image
    is damaged. Raises RuntimeError where the device fails.
    """
    with evaluation.logged(questions, file, progress, skipped) as log:
        if log.todo:
            _answer(model, log, max_new_tokens, slots)
    return log.records()


def _answer(model: AvgLlava, log: evaluation.Log, max_new_tokens: int, slots: int) -> None:
    config = model.config
    most = max(sum(tile_count(size, config) for size in question.sample.sizes) for question in log.todo)
    # No warm-up: most runs need a part of the programs only, and each compiles once, at its first use.
    engine = Engine(
        model,
        slots,
        image_cache_bytes=max(IMAGE_CACHE_BYTES, most * page_bytes(model)),
        queue=4 * slots + len(config.granularities),
    )
    request = Request("", max_new_tokens=max_new_tokens)
    waiting, asked = deque(log.todo), list[_Asked]()
    images: Images = []
    before: Question | None = None
    while waiting or asked:
        # Twice as many requests as slots: enough that no slot is empty, so few that images need not be encoded again.
        while waiting and sum(each.requests for each in asked) < 2 * slots:
            question = waiting.popleft()
            try:
                evaluation.check_fits(config, question.sample)
                if before is None or before.sample.images != question.sample.images:
                    images, before = read_images(config, question.sample), question
            except BadSample as error:
                log.skip(question, error)
                continue
            asked.append(_Asked(engine, question, request, images))
        engine.step()
        for each in [each for each in asked if each.answered()]:
            asked.remove(each)
            log.add(each.record())


class _Asked:
    """A question on its way through the engine. requests: how many it makes, or will."""

    def __init__(self, engine: Engine, question: Question, request: Request, images: Images):
        self._engine, self._question, self._request, self._images = engine, question, request, images
        granularities = engine.config.granularities if images else engine.config.granularities[:1]
        self._fixed: list[Choice] = [(g,) * len(images) for g in granularities]
        self.requests = len(self._fixed)
        self._free = self._ask((None,) * len(images))
        self._scores: np.ndarray | None = None
        self._tickets: dict[Choice, Ticket | None] = {}  # None where the prompt does not fit

    def _ask(self, choice: tuple[int | None, ...]) -> Ticket:
        sample = self._question.sample
        shape = batching.prompt_shape(sample, self._engine.config)
        return self._engine.submit_prepared(Prepared(self._request, sample, shape, choice), self._images)

    def answered(self) -> bool:
        """Whether every answer is there; asks for those that wait for the router, once it has scored the images."""
        if self._scores is None and self._free.scores is not None:
            config = self._engine.config
            self._scores = np.array(self._free.scores, np.float32).reshape(-1, len(config.granularities))
            (chosen,) = choices(config, [self._scores])
            for choice in dict.fromkeys((chosen, *self._fixed)):
                fits = batching.length_at(config, self._question.sample, choice) <= config.language.max_length
                self._tickets[choice] = None if not fits else self._free if choice == chosen else self._ask(choice)
        return self._free.ended and all(ticket is None or ticket.ended for ticket in self._tickets.values())

    def record(self) -> Record:
        """Raises RuntimeError where the device failed."""
        model = self._engine.model
        if self._scores is None:
            self._free.result(0)
        answers = {
            choice: None if ticket is None else model.tokenizer.decode(list(ticket.result(0).token_ids)).strip()
            for choice, ticket in self._tickets.items()
        }
        return evaluation.make_record(model.config, self._question, self._scores, answers)
