"""The engine answers requests in rounds; every round encodes, routes, prefills and decodes a little.

    submit ─▶ waiting ─encode, route─▶ routed ─a slot─▶ prefilling ─prefill, chunk by chunk─▶ decoding ─▶ answer

A round assigns free slots, prefills one chunk of the prompts whose next chunk has the same size, encodes one
micro-batch of tiles, routes one micro-batch of images, and decodes a few tokens of every answer. So no request waits
for the whole image or answer of another. Host and device overlap: prompts are packed during a prefill, and decoded
tokens are fetched a round later. `AvgLlava`, the server, evaluation and benchmarks all answer through `Engine`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from avg_llava_jax.inference.buckets import bucket, offline_buckets, server_buckets
from avg_llava_jax.inference.device import (
    Answering,
    Decoded,
    Device,
    Prefilled,
    PromptChunk,
    batch_shards_of,
    page_bytes,
)
from avg_llava_jax.inference.image_pages import ImagePages
from avg_llava_jax.inference.job import Images, Job, make_job, pack, repack_finer
from avg_llava_jax.inference.model import Model, without_end
from avg_llava_jax.inference.pricing import UNROUTED, Pricing, Slo
from avg_llava_jax.inference.requests import Answer, Prepared, Request
from avg_llava_jax.inference.sampling import scored
from avg_llava_jax.inference.scheduler import Admission, Prefill, Scheduler, Work
from avg_llava_jax.inference.stats import Counters, Stats
from avg_llava_jax.inference.tickets import Cancelled, QueueFull, Ticket

IMAGE_CACHE_BYTES = 256 * 2**20
AHEAD = 20
"""Requests encoded and routed before they have a slot, in multiples of slots: enough to find prompts of one size."""


class Engine:
    """Answers many requests at once. `submit` from any thread; `start` a thread that steps, or call `step`.

    slots: answers that decode together. max_length: positions of a slot, prompt and answer together; less than the
        model's saves memory. image_cache_bytes: device memory for encoded images. queue: requests that may wait.
    chunk: prompt positions of one prefill, so that answers keep decoding between the chunks of a long prompt; programs
        are few, and `warm_up` compiles all of them. None = prompts prefill whole, and all of them before answers
        decode, which takes the least time in total; a program is compiled at its first use.
    prompts: with chunk=None, the lengths of the prompts to come, if known, so that few programs compile.
    slo: the promised time to the first token, kept by raising the price of visual tokens under load; None = no promise.

    Raises:
      ValueError: a size is too small, or `max_length` is over the model's; the message names it.
    """

    def __init__(
        self,
        model: Model,
        slots: int = 8,
        max_length: int | None = None,
        chunk: int | None = 256,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        queue: int = 64,
        prompts: Sequence[int] = (),
        slo: Slo | None = None,
    ):
        limit = model.config.language.max_length
        length = limit if max_length is None else max_length
        for name, value, least in (
            ("slots", slots, 1),
            ("chunk", 1 if chunk is None else chunk, 1),
            ("queue", queue, 1),
            ("max_length", length, 2),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if length > limit:
            raise ValueError(f"max_length={length} is over the model's {limit}: lower it")
        pages, batch_shards = image_cache_bytes // page_bytes(model), batch_shards_of(model)
        if chunk is None:
            buckets = offline_buckets(model.config, slots, length, pages, batch_shards, prompts)
        else:
            model = model.limited_to(length)
            buckets = server_buckets(model.config, slots, min(chunk, length), pages, batch_shards)
        self.model, self.config, self.queue, self.buckets = model, model.config, queue, buckets
        self._patient = chunk is None
        self._device = Device(model, buckets)
        self._images = ImagePages(buckets.pages)
        self._scheduler = Scheduler(buckets)
        self._counters = Counters(self.config.granularities)
        self._pricing = None if slo is None else Pricing(slo)
        self._inbox: list[Job] = []  # filled by any thread; only the stepping thread touches the rest
        self._waiting: list[Job] = []
        self._encoding: list[Job] = []
        self._routing: tuple[list[Job], jax.Array] | None = None
        self._routed: list[Job] = []
        self._encoded = False  # whether the last round had a micro-batch to encode or to route
        self._decoding: tuple[list[Work], Decoded] | None = None  # tokens that the device decodes meanwhile
        self._news = threading.Condition()
        self._changed = self._closed = self._abandoned = False
        self._thread: threading.Thread | None = None

    def warm_up(self) -> None:
        """Compile every program of `buckets`, and print their number and the seconds."""
        start = time.perf_counter()
        self._device.warm_up()
        print(f"engine: {self.buckets.programs} programs, ready after {time.perf_counter() - start:.1f} s", flush=True)

    def submit(self, request: Request) -> Ticket:
        """Check a request, load its images, and put it in the queue.

        Raises:
          ValueError: the request cannot be answered, in one line.
          QueueFull: as many requests wait as `queue` allows.
          RuntimeError: the engine is closed.
        """
        return self._submit(lambda: self.model.prepare(request))

    def submit_prepared(
        self, prepared: Prepared, images: Images | None = None, each_token: bool = False, keep_logits: bool = False
    ) -> Ticket:
        """`submit` of a request that `Model.prepare` has checked.

        images: the result of `read_images`, where several requests ask about the same ones; None = load them here.
        each_token: stream token by token. keep_logits: keep the first token's logits in the ticket.
        """
        return self._submit(lambda: prepared, images, each_token, keep_logits)

    def _submit(
        self,
        prepare: Callable[[], Prepared],
        images: Images | None = None,
        each_token: bool = False,
        keep_logits: bool = False,
    ) -> Ticket:
        ticket = Ticket(self._wake)
        ticket.keep_logits = keep_logits
        submitted = time.perf_counter()
        try:
            self._check_open()
            prepared = prepare()
            if self._patient and (need := self.model.longest(prepared)) > self.buckets.capacity:
                raise ValueError(f"prompt and answer take up to {need} positions, a slot has {self.buckets.capacity}")
            job = make_job(self.model, prepared, images, ticket, submitted, self.buckets.pages)
            job.each_token = job.each_token or each_token
            with self._news:
                self._check_open()
                self._inbox.append(job)
        except (ValueError, QueueFull):
            self._counters.add(rejected=1)
            raise
        self._wake()
        return ticket

    def step(self) -> bool:
        """Run one round; False once no request is left in the engine. Only one thread may step."""
        with self._news:
            self._waiting += self._inbox
            self._inbox.clear()
            self._changed = False
        for job in self._jobs():
            if job.ticket.cancelled or self._abandoned:
                self._end(job, Cancelled("the request was cancelled"))
        try:
            self._stream_decoded()
            self._admit(partial=not self._encoded and not self._scheduler.decoding)
            prefills = self._prefill()
            self._encoded = self._encode()
            self._stream_prefilled(prefills)
            self._decode()
        except jax.errors.JaxRuntimeError as error:
            self._start_over(error)
        except BaseException as error:  # Ctrl+C may fall between a call that takes the cache and its result
            self._start_over(error)
            raise
        return bool(self._jobs())

    def start(self) -> None:
        """Start a thread that steps until `close`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True) -> None:
        """Accept no more requests; answer those in the engine (`drain`), or cancel them."""
        with self._news:
            self._closed, self._abandoned = True, not drain
        self._wake()
        if self._thread is not None:
            self._thread.join()
        else:
            self._run()

    @property
    def open(self) -> bool:
        """Whether requests are accepted: not after `close`, nor after an unexpected error ended the thread."""
        return not self._closed

    @property
    def full(self) -> bool:
        """Whether all slots are taken, or soon will be, and `queue` requests wait for them."""
        return self._waiting_count() + self._running_count() >= self.buckets.slots + self.queue

    def forget(self) -> None:
        """Forget encoded images and cached prefixes.

        Raises RuntimeError while a request runs.
        """
        jobs = [*self._inbox, *self._jobs()]
        if not all(job.ticket.cancelled for job in jobs):
            raise RuntimeError("requests run: end them first, and close a stream that is not read to its end")
        if jobs:
            self.step()  # drops the cancelled ones
        self._images.clear()
        self._scheduler.clear()

    def stats(self) -> Stats:
        """A snapshot of the counters."""
        with self._news:
            waiting, running = self._waiting_count(), self._running_count()
        return self._counters.snapshot(
            waiting=waiting,
            running=running,
            cost_weight=self._cost_weight(),
            image_hits=self._images.hits,
            image_misses=self._images.misses,
        )

    def _run(self) -> None:
        try:
            while True:
                if self.step():
                    continue
                with self._news:
                    while not self._changed and not self._closed:
                        self._news.wait()
                    if self._closed and not self._inbox:
                        return
        finally:
            with self._news:
                self._closed = True
                left = [*self._inbox, *self._jobs()]
            for job in left:  # empty, unless an unexpected error ends this thread
                job.ticket.end(RuntimeError("the engine has stopped; its thread says why"))

    def _wake(self) -> None:
        with self._news:
            self._changed = True
            self._news.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self.full:
            raise QueueFull(f"{self.queue} requests wait already: try again later")

    def _waiting_count(self) -> int:
        return len(self._inbox) + len(self._waiting) + len(self._encoding) + len(self._routed)

    def _running_count(self) -> int:
        return len(self._scheduler.prefilling) + len(self._scheduler.decoding)

    def _cost_weight(self) -> float:
        """The lowest price of visual tokens that the load allows now."""
        if self._pricing is None:
            return 0.0
        return self._pricing.cost_weight(self._waiting_count() + len(self._scheduler.prefilling))

    def _jobs(self) -> list[Job]:
        """The requests of the stepping thread, whatever their stage."""
        scheduler = self._scheduler
        return [*self._waiting, *self._encoding, *self._routed, *scheduler.prefilling, *scheduler.decoding]

    def _encode(self) -> bool:
        """Encode a micro-batch of tiles, route one of images, and pack prompts, ahead of free slots.

        The tiles of a micro-batch, and its images, are of one adapter.
        Scores are fetched a round later: the device routes while the host prepares prefills or while they run.

        Returns whether there was a micro-batch to run.
        """
        while self._waiting and len(self._encoding) + len(self._routed) < AHEAD * self.buckets.slots:
            job = self._waiting[0]
            job.pages = self._images.acquire(job.images, job.prepared.adapter)
            if job.pages is None:
                break  # until earlier requests have been prefilled, and free their pages
            job.reached("taken")
            self._encoding.append(self._waiting.pop(0))
        self._fetch_scores()
        most = self.buckets.tiles[-1]
        adapter, missing = self._images.missing(most)
        encode = bool(missing) and (self._eager or len(missing) == most)
        if encode:
            self._device.encode(list(missing.values()), list(missing), adapter)
            self._images.encoded(missing)
        ready = [job for job in self._encoding if self._images.ready(job.digests)]
        price = self._cost_weight()
        if price >= UNROUTED:
            for job in ready:
                job.skip_router(self.config)
        unrouted = [(job, at) for job in ready for at in range(len(job.scores), len(job.scores) + job.unrouted)]
        adapter = unrouted[0][0].prepared.adapter if unrouted else 0
        unrouted = [each for each in unrouted if each[0].prepared.adapter == adapter]
        batch = unrouted[: self.buckets.images[-1]]
        route = bool(batch) and (self._eager or len(batch) == self.buckets.images[-1])
        if route:
            pages, texts = [job.pages[at] for job, at in batch], [job.text for job, _ in batch]
            routing = self._device.route(pages, texts, adapter)
            self._routing = [job for job, _ in batch], routing.logits
        for job in ready:
            if not job.unrouted:
                self._encoding.remove(job)
                self._routed.append(job)
                job.reached("routed")
                job.ticket.scores = list(job.scores)
                try:
                    pack(self.config, job, self.buckets.pages, price)
                    job.ticket.visual_tokens = job.visual
                    self._counters.add(raised=int(job.price_raised))
                except ValueError as error:
                    self._end(job, error)
        return encode or route

    def _fetch_scores(self) -> None:
        """Give the images of the last round's routing their scores."""
        if self._routing is not None:
            jobs, logits = self._routing
            self._routing = None
            for job, scores in zip(jobs, np.array(logits)[:, 0], strict=False):  # a copy, sliced on the host
                job.scores.append(scores)

    @property
    def _eager(self) -> bool:
        """Whether to run a micro-batch that is not full: not while a patient engine has other work."""
        busy = self._routed or self._scheduler.prefilling or self._scheduler.decoding
        return not (self._patient and busy)

    def _admit(self, partial: bool) -> None:
        """Give free slots to routed requests; some wait for a prefix that is being prefilled.

        partial: see `Scheduler.next_group`, which orders the requests of a patient engine.
        """
        copies: dict[int, int] = {}
        longest = 0
        while self._routed and self._scheduler.free:
            group = self._scheduler.next_group(self._routed, partial) if self._patient else list(self._routed)
            admitted = 0
            for job in group:
                place = self._scheduler.admit(job)
                if place is None:
                    continue
                admitted += 1
                self._routed.remove(job)
                self._count(job, place)
                if place.source is not None:
                    # The target of a pending copy does not hold the prefix yet; its source does, if not overwritten.
                    source = copies.get(place.source, place.source)
                    if source in copies:
                        self._copy(copies, longest)
                        copies, longest, source = {}, 0, place.source
                    copies[place.slot] = source
                    longest = max(longest, place.shared)
            self._counters.add(admitted=admitted)
            if not (self._patient and admitted):
                break
            partial = False
        self._copy(copies, longest)

    def _count(self, job: Job, place: Admission) -> None:
        """Count a prompt that got a slot, or one that is packed again in its slot."""
        self._counters.add(visual_tokens=job.visual)
        self._counters.add(prefix_hits=int(place.shared > 1), prefix_tokens=place.shared)
        self._counters.count_granularities(job.choice)

    def _copy(self, copies: dict[int, int], longest: int) -> None:
        """Copy prefixes of up to `longest` positions between slots, {target: source}, in this order."""
        pairs, most = [(source, target) for target, source in copies.items()], self.buckets.prompts[-1]
        for at in range(0, len(pairs), most):
            self._device.copy(pairs[at : at + most], self._window(longest))

    def _window(self, positions: int) -> int:
        return bucket(self.buckets.windows, positions)

    def _prefill(self) -> list[tuple[Prefill, list[PromptChunk], Prefilled]]:
        """Prefill one chunk of the prompts whose next chunk has the same size; a patient engine prefills all prompts.

        Returns the calls, which are in the device's queue: the host waits for none of them.
        """
        calls = []
        while (prefill := self._scheduler.next_prefill(fullest=self._patient)) is not None:
            parts = []
            for job, start, length in zip(prefill.works, prefill.starts, prefill.lengths, strict=True):
                then = job.next() if start + length == len(job.keys) else None
                now = slice(start, start + length)
                weights = None if job.weights is None else job.weights[now]
                adapter = job.prepared.adapter
                parts.append(PromptChunk(job.slot, start, job.ids[now], job.places[now], weights, then, adapter))
            after = self._device.prefill(parts, prefill.prompts, prefill.chunk, prefill.window, prefill.predicted)
            self._scheduler.prefilled(prefill)
            calls.append((prefill, parts, after))
            if not self._patient:
                break
        return calls

    def _stream_prefilled(self, calls: Sequence[tuple[Prefill, list[PromptChunk], Prefilled]]) -> None:
        """Wait for prefills, and stream the tokens that they predict."""
        done = set()
        for prefill, parts, after in calls:
            if not any(prefill.predicts):
                continue  # without waiting for the device
            tokens, logprobs = after.fetch()
            for job, part, row, count in zip(prefill.works, parts, after.rows, prefill.predicts, strict=True):
                if not count or job in done:  # the rest of a draft that is dropped
                    continue
                held = self._scheduler.predicted(job, tokens[row, -count:].tolist())
                job.logprobs += logprobs[row, -count:][:held].tolist()
                if len(job.tokens) <= job.draft:
                    continue  # more of its draft follows
                done.add(job)
                self._counters.add(verified_tokens=job.draft)
                if part.then is not None:
                    job.token_scores += scored(part.then, after.scores, row, job.tokens)
                if self._pricing is not None and not job.passes:
                    self._pricing.first_token(job.times["submitted"], time.perf_counter())
                job.reached("first")
                if job.ticket.keep_logits:
                    job.ticket.logits = np.asarray(after.logits)[row]
                if not job.finer:
                    self._release_images(job)
                self._stream(job)

    def _decode(self) -> None:
        """Start to decode a few tokens of every answer."""
        decode = self._scheduler.next_decode()
        if decode is None:
            return
        answers = [Answering(job.slot, job.cached, job.next(), job.prepared.adapter) for job in decode.works]
        self._decoding = decode.works, self._device.decode(answers, decode.rows, decode.window, decode.steps)

    def _stream_decoded(self) -> None:
        """Wait for the last round's decode, and stream its tokens."""
        if self._decoding is None:
            return
        works, decoded = self._decoding
        self._decoding = None
        for job, tokens, logprobs, scores in zip(works, *decoded.fetch(), strict=True):
            if job not in self._scheduler.decoding:  # cancelled meanwhile
                continue
            self._scheduler.decoded(job, tokens)
            job.logprobs += logprobs
            job.token_scores += scores
            self._stream(job)

    def _stream(self, job: Job) -> None:
        """Stream new text, and end the answer at a stop string, a stop id, the end of its guide or its limit.

        The text of an answer that may escalate is held back until it is whole and certain.
        """
        complete = job.tokens[-1] in self.model.stop_ids
        if job.matcher is not None and not complete:
            try:
                job.matcher.read(job.tokens)
            except ValueError as error:
                self._end(job, error)
                return
            complete = job.matcher.complete
        last = complete or len(job.tokens) >= job.limit
        text = None
        if last or job.each_token or job.prepared.request.stop or not self._patient:
            text = job.stream.feed(without_end(job.tokens, self.model.stop_ids), last)
        ended = last or job.stream.stopped
        certainty = job.certainty(len(job.stream.ids) if job.stream.stopped else len(job.tokens))
        done = self.model.pass_of(job.prepared, job.choice, certainty)
        if job.finer:
            if certainty < job.prepared.request.escalate:
                job.passes.append(done)
                job.ticket.dropped(
                    self.model.answer_of("", (), "stop", job.passes, job.scores, {}, cost_weight=job.price)
                )
                self._escalate(job, ended)
                return
            job.held += text or ""
            text = job.held if ended else None
        if text is not None:
            job.ticket.show(text, len(job.stream.ids), job.token_scores)
        if not ended:
            return
        job.reached("ended")
        stopped = job.stream.stopped or complete
        answer = self.model.answer_of(
            job.stream.text,
            job.stream.ids,
            "stop" if stopped else "length",
            [*job.passes, done],
            job.scores,
            job.timings(),
            job.token_scores,
            job.price,
            job.matcher is not None and job.matcher.closed,
        )
        self._counters.add(
            ttft_seconds=job.times["first"] - job.times["submitted"],
            ttft_count=1,
            token_seconds=job.times["ended"] - job.times["first"],
            token_count=len(job.tokens) - 1,
        )
        self._end(job, answer)

    def _escalate(self, job: Job, ended: bool) -> None:
        """Prefill a job's prompt again at finer granularities, in its slot, from the pages that it holds."""
        self._counters.add(tokens=len(job.tokens))
        repack_finer(self.model, job, self.buckets.pages, ended)
        self._counters.add(escalated=1, draft_tokens=job.draft)
        place = self._scheduler.readmit(job)
        self._count(job, place)
        job.ticket.visual_tokens = job.spent + job.visual
        if place.source is not None:
            self._copy({place.slot: place.source}, place.shared)

    def _end(self, job: Job, outcome: Answer | Exception) -> None:
        """Remove a request from whatever stage it is in, and end its ticket."""
        for stage in (self._waiting, self._encoding, self._routed):
            if job in stage:
                stage.remove(job)
        if job.slot is not None:
            self._scheduler.release(job)
        self._release_images(job)
        how = "finished" if isinstance(outcome, Answer) else "cancelled" if isinstance(outcome, Cancelled) else "failed"
        self._counters.add(tokens=len(job.tokens), **{how: 1})
        job.ticket.end(outcome)

    def _release_images(self, job: Job) -> None:
        """Release the job's images; they may be forgotten once they have no other user."""
        if job.pages is not None:
            self._images.release(job.digests)
            job.pages = None

    def _start_over(self, error: BaseException) -> None:
        """Recover from a failure of the device: requests on it fail, requests that wait on the host continue."""
        what = (str(error) or type(error).__name__).splitlines()[0]
        for job in self._jobs():
            if job not in self._waiting:
                self._end(job, RuntimeError(f"the device failed: {what}"))
        self._routing = self._decoding = None
        self._images.clear()
        self._scheduler.clear()
        self._device.reset()
