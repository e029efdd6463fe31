"""Requests in, tokens out: the engine goes round and round, and every round does a little of everything.

    submit ──▶ waiting ──look: encode, route──▶ seen ──admit: a slot──▶ reading ──chunk by chunk──▶ decoding ──▶ answer

A round encodes one micro-batch of tiles, routes one of images, gives out slots, reads one chunk of a prompt and lets
every answer grow by a few tokens. So a request never waits for another's whole image or answer, and what runs is
always one of the programs that `warm_up` has compiled. Greedy tokens equal those of `AvgLlava.answer`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

import jax

from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.batching import without_end
from avg_llava_jax.inference.buckets import make_ladders, rung
from avg_llava_jax.inference.device import Device, Growing, Part, lanes_of, page_bytes
from avg_llava_jax.inference.image_pages import ImagePages
from avg_llava_jax.inference.intake import Images, Job, pack, take_in
from avg_llava_jax.inference.requests import Answer, Prepared, Request
from avg_llava_jax.inference.scheduler import Scheduler
from avg_llava_jax.inference.stats import Counters, Stats
from avg_llava_jax.inference.tickets import Cancelled, QueueFull, Ticket

IMAGE_CACHE_BYTES = 256 * 2**20


class Engine:
    """A model that answers many requests at once. `submit` from any thread; `start` a thread that steps, or `step`.

    slots: answers that grow at once. max_length: positions of a slot, prompt and answer together; less than the
    model's saves memory. chunk: prompt positions read at once. image_cache_bytes: for encoded images.
    queue: requests that may wait.

    programs: how many programs there are, 0 before `warm_up`.
    """

    def __init__(
        self,
        model: AvgLlava,
        slots: int = 8,
        max_length: int | None = None,
        chunk: int = 256,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        queue: int = 64,
    ):
        limit = model.config.language.max_length
        length = limit if max_length is None else max_length
        for name, value, rule in (
            ("slots", slots, 1),
            ("chunk", chunk, 1),
            ("queue", queue, 1),
            ("max_length", length, 2),
        ):
            if value < rule:
                raise ValueError(f"{name}={value} must be at least {rule}")
        if length > limit:
            raise ValueError(f"max_length={length} is over the model's {limit}")
        if length < limit:
            language = dataclasses.replace(model.config.language, max_length=length)
            config = dataclasses.replace(model.config, language=language)
            model = AvgLlava(config, model.params, model.tokenizer, model.step)
        self.model, self.config, self.queue = model, model.config, queue
        pages = image_cache_bytes // page_bytes(model)
        self.ladders = make_ladders(self.config, slots, min(chunk, length), pages, lanes_of(model))
        self.programs = 0
        self._device = Device(model, self.ladders)
        self._images = ImagePages(self.ladders.pages)
        self._scheduler = Scheduler(self.ladders)
        self._counters = Counters(self.config.granularities)
        self._inbox: list[Job] = []  # of other threads; the rest is the stepping thread's alone
        self._waiting: list[Job] = []
        self._looking: list[Job] = []
        self._seen: list[Job] = []
        self._news = threading.Condition()
        self._changed = self._closed = self._abandoned = False
        self._thread: threading.Thread | None = None

    def warm_up(self) -> None:
        """Compile everything there will ever be, and say how many programs that is."""
        start = time.perf_counter()
        self.programs = self._device.warm_up()
        print(f"engine: {self.programs} programs, ready after {time.perf_counter() - start:.1f} s", flush=True)

    def submit(self, request: Request) -> Ticket:
        """Check a request, read its images, and put it in the queue.

        Raises:
          ValueError: it cannot be answered, in one line. QueueFull. RuntimeError: the engine is closed.
        """
        return self._submit(lambda: self.model.prepare(request), None)

    def submit_prepared(self, prepared: Prepared, images: Images | None = None) -> Ticket:
        """`submit` of what `AvgLlava.prepare` has checked.

        images: of `read_images`, where the same ones are asked about again and again; None = they are read here.
        """
        return self._submit(lambda: prepared, images)

    def _submit(self, prepare: Callable[[], Prepared], images: Images | None) -> Ticket:
        ticket = Ticket(self._wake)
        submitted = time.perf_counter()
        try:
            self._check_open()
            job = take_in(self.model, prepare(), images, ticket, submitted, self.ladders.pages)
            with self._news:
                self._check_open()
                self._inbox.append(job)
        except (ValueError, QueueFull):
            self._counters.add(rejected=1)
            raise
        self._wake()
        return ticket

    def step(self) -> bool:
        """One round; False where there was nothing to do. Only one thread may step."""
        with self._news:
            self._waiting += self._inbox
            self._inbox.clear()
            self._changed = False
        for job in self._jobs():
            if job.ticket.cancelled or self._abandoned:
                self._end(job, Cancelled("the request was cancelled"))
        try:
            self._look()
            self._admit()
            self._read()
            self._decode()
        except jax.errors.JaxRuntimeError as error:
            self._start_over(error)
        return bool(self._jobs())

    def start(self) -> None:
        """Step in a thread of its own until `close`."""
        self._thread = threading.Thread(target=self._go_round, name="engine", daemon=True)
        self._thread.start()

    def close(self, drain: bool = True) -> None:
        """Take no more requests, and answer those that are there, or cancel them."""
        with self._news:
            self._closed, self._abandoned = True, not drain
        self._wake()
        if self._thread is not None:
            self._thread.join()
        else:
            self._go_round()

    @property
    def open(self) -> bool:
        """Whether requests are taken: not after `close`, nor where an error that nobody foresaw ended the thread."""
        return not self._closed

    def stats(self) -> Stats:
        """What was done so far."""
        with self._news:
            waiting, running = self._waiting_count(), len(self._scheduler.reading) + len(self._scheduler.decoding)
        return self._counters.snapshot(
            waiting=waiting, running=running, image_hits=self._images.hits, image_misses=self._images.misses
        )

    def _go_round(self) -> None:
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
            for job in left:  # none, unless an error that nobody foresaw ends this thread
                job.ticket.end(RuntimeError("the engine has stopped; its thread says why"))

    def _wake(self) -> None:
        with self._news:
            self._changed = True
            self._news.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._waiting_count() >= self.queue:
            raise QueueFull(f"{self.queue} requests wait already")

    def _waiting_count(self) -> int:
        return len(self._inbox) + len(self._waiting) + len(self._looking) + len(self._seen)

    def _jobs(self) -> list[Job]:
        """All that the stepping thread knows of."""
        scheduler = self._scheduler
        return [*self._waiting, *self._looking, *self._seen, *scheduler.reading, *scheduler.decoding]

    def _look(self) -> None:
        """Encode a micro-batch of tiles and route one of images; as many requests are looked at as there are slots."""
        while self._waiting and len(self._looking) + len(self._seen) < self.ladders.slots:
            job = self._waiting[0]
            job.pages = self._images.take(job.images)
            if job.pages is None:
                break  # until those before it have been read
            job.reached("looked")
            self._looking.append(self._waiting.pop(0))
        missing = self._images.missing(self.ladders.tiles[-1])
        if missing:
            self._device.see(list(missing.values()), list(missing))
            self._images.encoded(missing)
        ready = [job for job in self._looking if self._images.ready(job.digests)]
        unrouted = [(job, at) for job in ready for at in range(len(job.scores), len(job.scores) + job.unrouted)]
        batch = unrouted[: self.ladders.images[-1]]
        if batch:
            scores = self._device.route([job.pages[at] for job, at in batch], [job.text for job, _ in batch])
            for (job, _), row in zip(batch, scores, strict=True):
                job.scores.append(row)
        for job in ready:
            if not job.unrouted:
                self._looking.remove(job)
                self._seen.append(job)
                job.reached("seen")
                job.ticket.scores = list(job.scores)
                try:
                    pack(self.config, job, self.ladders.pages)
                except ValueError as error:
                    self._end(job, error)

    def _admit(self) -> None:
        """Give out the free slots, in the order in which requests were seen; some wait for what is being read."""
        for job in list(self._seen):
            place = self._scheduler.admit(job)
            if place is None:
                continue
            self._seen.remove(job)
            if place.source is not None:
                self._device.copy(place.source, place.slot, rung(self.ladders.windows, place.shared))
            visual = len(job.ids) - len(job.text)
            self._counters.add(admitted=1, visual_tokens=visual)
            self._counters.add(prefix_hits=int(place.shared > 1), prefix_tokens=place.shared)
            self._counters.read_at(job.choice)

    def _read(self) -> None:
        """Read one chunk of a prompt."""
        reading = self._scheduler.next_reading()
        if reading is None:
            return
        parts = []
        for job, length in zip(reading.works, reading.lengths, strict=True):
            end = job.cached + length
            ids, places = job.ids[job.cached : end], job.places[job.cached : end]
            parts.append(Part(job.slot, job.cached, ids, places, end == len(job.ids), job.prepared.request))
        tokens = self._device.prefill(parts, reading.chunk, reading.window)
        ended = self._scheduler.read(reading)
        for at, job in enumerate(reading.works):
            if job in ended:
                job.tokens.append(tokens[at])
                job.reached("first")
                self._let_go(job)
                self._show(job)

    def _decode(self) -> None:
        """Let all answers grow."""
        decoding = self._scheduler.next_decoding()
        if decoding is None:
            return
        rows = [
            Growing(job.slot, job.tokens[-1], job.cached, len(job.tokens), job.limit, job.prepared.request)
            for job in decoding.works
        ]
        made = self._device.decode(rows, decoding.rows, decoding.window, decoding.steps)
        for job, tokens in zip(decoding.works, made, strict=True):
            self._scheduler.decoded(job, tokens)
            self._show(job)

    def _show(self, job: Job) -> None:
        """Stream what is new, and end the answer where its text, its tokens or its limit say so."""
        last = job.tokens[-1] in self.model.stop_ids or len(job.tokens) >= job.limit
        job.ticket.show(job.stream.feed(without_end(job.tokens, self.model.stop_ids), last))
        if not last and not job.stream.stopped:
            return
        job.reached("ended")
        stopped = job.stream.stopped or len(job.stream.ids) < len(job.tokens)
        answer = self.model.answer_of(
            job.stream, "stop" if stopped else "length", job.prepared.sample, job.choice, job.scores, job.timings()
        )
        self._counters.add(
            ttft_seconds=job.times["first"] - job.times["submitted"],
            ttft_count=1,
            token_seconds=job.times["ended"] - job.times["first"],
            token_count=len(job.tokens) - 1,
        )
        self._end(job, answer)

    def _end(self, job: Job, outcome: Answer | Exception) -> None:
        """Take a request off wherever it stands, and tell its ticket."""
        for stage in (self._waiting, self._looking, self._seen):
            if job in stage:
                stage.remove(job)
        if job.slot is not None:
            self._scheduler.leave(job)
        self._let_go(job)
        how = "finished" if isinstance(outcome, Answer) else "cancelled" if isinstance(outcome, Cancelled) else "failed"
        self._counters.add(tokens=len(job.tokens), **{how: 1})
        job.ticket.end(outcome)

    def _let_go(self, job: Job) -> None:
        """The job's images may be forgotten as far as it is concerned."""
        if job.pages is not None:
            self._images.leave(job.digests)
            job.pages = None

    def _start_over(self, error: jax.errors.JaxRuntimeError) -> None:
        """After a failure of the device: what was on it is lost, what waits on the host goes on."""
        for job in self._jobs():
            if job not in self._waiting:
                self._end(job, RuntimeError(f"the device failed: {str(error).splitlines()[0]}"))
        self._images.clear()
        self._scheduler.clear()
        self._device.reset()
