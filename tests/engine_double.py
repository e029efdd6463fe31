"""An engine without a device: it answers whatever is asked with the words of the question, backwards."""

import dataclasses
import threading
import time
from collections import Counter

from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.inference.requests import Answer, Pass, TokenScore
from avg_llava_jax.inference.stats import Stats
from avg_llava_jax.inference.tickets import Cancelled, QueueFull, Ticket


class EngineDouble:
    """Takes `places` requests at once. While `held`, answers stop after their first word; while `looks`, before it.

    Where a request escalates, its first pass is at the coarsest granularity with a certainty of .25, its last has .75.
    A question with "crash" in it fails, one with "damaged" has an image that cannot be decoded.
    """

    def __init__(self, model, places=4):
        self.model, self.places, self.held, self.looks = model, places, threading.Event(), threading.Event()
        self.requests, self.ends, self.running, self.open = [], Counter(), 0, True

    def submit_prepared(self, prepared, images):
        request = prepared.request
        if not self.open:
            raise RuntimeError("the engine is closed")
        if self.running >= self.places:
            raise QueueFull("full")
        self.requests.append(request)
        self.running += 1
        ticket = Ticket(lambda: None)
        threading.Thread(target=self._answer, args=(request, ticket), daemon=True).start()
        return ticket

    def _answer(self, request, ticket):
        words = _words(request.prompt)[::-1]
        outcome = None
        if request.escalate and request.images:
            answer = self._answered(request, [])
            levels = self.model.config.granularities
            ticket.dropped(dataclasses.replace(answer, granularity=levels[0], passes=answer.passes[:1]))
            while self.looks.is_set() and self.open and not ticket.cancelled:
                time.sleep(0.005)
        for number, word in enumerate(words[: request.max_new_tokens]):
            while self.held.is_set() and number and self.open and not ticket.cancelled:
                time.sleep(0.005)
            if ticket.cancelled or not self.open:
                outcome = Cancelled()
            elif word in ("crash", "damaged"):
                outcome = RuntimeError("boom") if word == "crash" else BadSample("corrupt_image", "image: damaged")
            if outcome:
                break
            scores = [self._score(request, n, {n: -n / 8, 7: -2.0}) for n in range(number + 1)]
            ticket.show(" " * bool(number) + word, number + 1, [] if request.logprobs is None else scores)
        self.running -= 1
        self.ends[type(outcome).__name__] += 1
        ticket.end(outcome or self._answered(request, words))

    @staticmethod
    def _score(request, n, top):
        """The larger the seed of a sampled answer, the less likely is a token."""
        return TokenScore(n, -n / 8 - (request.seed // 100 if request.temperature else 0), top)

    def _answered(self, request, words):
        model, images = self.model, self.model.prepare(request).sample.sizes
        levels = model.config.granularities
        wanted = request.granularity if isinstance(request.granularity, list) else [request.granularity] * len(images)
        choice = tuple(levels[1] if g == "auto" else g for g in wanted)
        shares = tuple({level: 1 / len(levels) for level in levels} for _ in wanted) if "auto" in wanted else ()
        single = len(choice) == 1
        counts = [visual_count(size, model.config, g) for size, g in zip(images, choice, strict=True)]
        kept = words[: request.max_new_tokens]
        return Answer(
            " ".join(kept),
            (choice[0] if single else choice) if choice else None,
            sum(counts),
            (shares[0] if single and shares else shares) if choice else None,
            {"total": 0.25},
            tuple(range(len(kept))),
            "length" if len(kept) < len(words) else "stop",
            (
                *([Pass(levels[0], 0, 0.25)] if images and request.escalate else []),
                Pass((choice[0] if single else choice) if choice else None, sum(counts), 0.75),
            ),
            () if request.logprobs is None else tuple(self._score(request, n, {7: -2.0}) for n in range(len(kept))),
        )

    def stats(self):
        return Stats(running=self.running, finished=self.ends["NoneType"], cancelled=self.ends["Cancelled"])

    def close(self, drain=True):
        self.open = drain


def _words(prompt):
    """The words of the last question, or of a raw prompt: either is the list of texts around its images."""
    texts = prompt[-1]["value"] if isinstance(prompt[-1], dict) else prompt
    return " ".join(texts).split()
