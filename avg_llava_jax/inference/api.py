"""The Python interface: load a model, answer questions about images, chat.

    model = AvgLlava.load()
    answer = model.answer("photo.png", "Who wears 7?")
    answer.text, answer.granularity, answer.visual_tokens

An `Engine` answers requests in the caller's own thread. It is kept, so that a later question about the same images
finds them encoded, and the next turn of a conversation finds its prefix in the cache.
"""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from avg_llava_jax import SHIPPED, checkpoint
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert.quantize import quantized
from avg_llava_jax.data.conversation import PLACEHOLDER, Turn
from avg_llava_jax.data.packing import tiles_of
from avg_llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from avg_llava_jax.inference import stacked
from avg_llava_jax.inference.buckets import STEPS, bucket
from avg_llava_jax.inference.calibration import load_calibration
from avg_llava_jax.inference.device import page_bytes
from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.model import Model, unstacked
from avg_llava_jax.inference.requests import Answer, ImageLike, Prepared, Request
from avg_llava_jax.inference.stacked import Stack
from avg_llava_jax.inference.tickets import Ticket
from avg_llava_jax.models import one_cpu
from avg_llava_jax.models.avg_llava import Params


class Stream:
    """Iterate to get an answer's pieces of text as they are generated; `answer` then holds the whole answer.

    `close` cancels the answer, as does dropping the iterator of a `for` loop.
    """

    def __init__(self, engine: Engine, ticket: Ticket, lock: threading.RLock):
        self._engine, self._ticket, self._lock = engine, ticket, lock
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            while not self._ticket.ended:
                with self._lock:
                    self._engine.step()
                yield from self._ticket.ready()
            yield from self._ticket.ready()
            self.answer = self._ticket.result()
        finally:
            self.close()

    def close(self) -> None:
        if not self._ticket.ended:
            self._ticket.cancel()
            with self._lock:
                self._engine.step()


class AvgLlava(Model):
    """A model with its tokenizer. Made by `load`; public attributes are `config`, `params`, `tokenizer` and `step`."""

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer, step: int = 0):
        super().__init__(config, params, tokenizer, step)
        self._lock = threading.RLock()
        self._engine: Engine | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] = SHIPPED,
        vision_tower: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
        dtype: Any = None,
        quantize: Literal["int8"] | None = None,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> AvgLlava:
        """Load a checkpoint folder of this project, or one in the released layout; see `checkpoint.load`.

        vision_tower: the CLIP folder that a released config names.
        mesh: shards the parameters over devices. dtype: converts them; compute runs in it.
        quantize: "int8" stores the language model's weights as int8, see `convert.quantize`.
        adapters: folders of adapters on this base by the names that `Request.adapter` gives, see `checkpoint.load_own`.

        Raises:
          ValueError: `quantize` is unknown, or a folder cannot be read; the message names the file.
        """
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize={quantize!r}: choose int8 or None")
        loaded = checkpoint.load(path, vision_tower, mesh, dtype)
        own = [checkpoint.load_own(each, path, loaded, vision_tower, mesh) for each in (adapters or {}).values()]
        params = quantized(loaded.params) if quantize else loaded.params
        leaves = stacked.stack(params, own) if own else None
        if not one_cpu.here():  # on one CPU, unstacked layers share the stacked memory
            params, leaves = unstacked(params, free=True), leaves and unstacked(leaves, free=True)
        model = cls(loaded.config, params, load_tokenizer(loaded.tokenizer_folder), loaded.meta["step"])
        model.adapters = Stack(tuple(adapters or ()), leaves)
        try:
            model.calibration = load_calibration(pathlib.Path(path), model.step, quantize)
        except ValueError as error:  # raised when a request needs it
            model.calibration = error
        return model

    def answer(self, images: ImageLike | Sequence[ImageLike], prompt: str | Sequence[Turn], **options: Any) -> Answer:
        """Answer one question about one image, several or none (`()`); `options` are the fields of `Request`."""
        return self.answer_batch([Request(prompt, images, **options)])[0]

    def answer_batch(self, requests: Sequence[Request], batch_size: int = 16) -> list[Answer]:
        """Answer any mixture of requests, each as it would be answered alone. batch_size: the most slots."""
        prepared = []
        for number, request in enumerate(requests):
            if not isinstance(request, Request):
                raise ValueError(f"request {number} is a {type(request).__name__}, not a Request")
            try:
                prepared.append(self.prepare(request))
            except ValueError as error:
                raise error if len(requests) == 1 else ValueError(f"request {number}: {error}") from None
        return self.answer_prepared(prepared, batch_size)

    def answer_prepared(self, prepared: Sequence[Prepared], batch_size: int = 16) -> list[Answer]:
        """`answer_batch` of requests that `prepare` has checked."""
        return [ticket.result() for ticket in self._ended(prepared, batch_size)]

    def first_logits(self, prepared: Sequence[Prepared], batch_size: int = 16) -> list[np.ndarray]:
        """Logits fp32 (V,) of the first answer token of each request."""
        tickets = self._ended(prepared, batch_size, keep_logits=True)
        return [ticket.logits for ticket in tickets if ticket.result()]

    def _ended(self, prepared: Sequence[Prepared], batch_size: int, keep_logits: bool = False) -> list[Ticket]:
        if not prepared:
            return []
        tickets: list[Ticket] = []
        with self._lock:
            engine = self.engine_for(prepared, batch_size)
            try:
                for each in prepared:
                    tickets.append(self._submitted(engine, each, keep_logits=keep_logits))
                while not all(ticket.ended for ticket in tickets):
                    engine.step()
            finally:
                for ticket in tickets:  # after an error or Ctrl+C no request stays in the engine
                    ticket.cancel()
        return tickets

    def stream(self, images: ImageLike | Sequence[ImageLike], prompt: str | Sequence[Turn], **options: Any) -> Stream:
        """Stream the answer to one question; arguments are those of `answer`, errors are raised before iteration."""
        return self.stream_prepared(self.prepare(Request(prompt, images, **options)))

    def stream_prepared(self, prepared: Prepared) -> Stream:
        """`stream` of a request that `prepare` has checked."""
        with self._lock:
            engine = self.engine_for([prepared], 1)
            return Stream(engine, self._submitted(engine, prepared, each_token=True), self._lock)

    def chat(self, **options: Any) -> Chat:
        """Start a conversation; `options` are the fields of `Request`, the same for all of its turns."""
        return Chat(self, options)

    def forget(self) -> None:
        """Forget the encoded images and the prefixes of earlier questions, as before a time is measured.

        Raises RuntimeError while a stream is open.
        """
        with self._lock:
            if self._engine is not None:
                self._engine.forget()

    def engine_for(self, prepared: Sequence[Prepared], batch_size: int) -> Engine:
        """The engine kept from earlier calls, or a larger one if that is too small for these requests.

        It has a slot for each request, at most `batch_size`, with capacity for the longest of them.
        """
        slots = bucket(tuple(2**n for n in range(12)), min(len(prepared), batch_size))
        length = max(map(self.longest, prepared))
        tiles = max(tiles_of(each.sample, self.config) for each in prepared)
        if self._engine is not None:
            have = self._engine.buckets
            if have.slots >= slots and have.capacity >= length and have.pages >= tiles:
                return self._engine
            before = min(have.capacity - STEPS, self.config.language.max_length)
            slots, length = max(slots, have.slots), max(length, before)
        pages = max(tiles, 1) * min(2 * slots, 16)
        self._engine = None  # frees its memory before the next one is made
        self._engine = Engine(self, slots, length, None, pages * page_bytes(self), queue=4 * slots)
        return self._engine

    @staticmethod
    def _submitted(engine: Engine, prepared: Prepared, **options: bool) -> Ticket:
        """Step the engine until the queue has a place, then `Engine.submit_prepared`."""
        while engine.full:
            engine.step()
        return engine.submit_prepared(prepared, **options)


class Chat:
    """A conversation of several turns, each of which may add images.

    Every question is a request with the whole conversation so far: images of earlier turns are packed again and,
    under "auto", routed again by the whole text. Encoded images and cached prefixes are reused.

    turns: questions and answers so far. images: the images of all turns so far, in order.
    """

    def __init__(self, model: AvgLlava, options: dict[str, Any]):
        self.model, self.options = model, options
        self.turns: list[Turn] = []
        self.images: list[ImageLike] = []

    def ask(self, prompt: str, images: ImageLike | Sequence[ImageLike] = (), **options: Any) -> Answer:
        """Ask the next question; `options` override those of the chat for this turn.

        A list of granularities names one for every image of the conversation. A turn that fails, or whose answer is
        empty, is not kept.
        """
        request = self._request(prompt, images, options)
        return self._keep(request, self.model.answer_batch([request])[0])

    def stream(self, prompt: str, images: ImageLike | Sequence[ImageLike] = (), **options: Any) -> Iterator[str]:
        """`ask`, streamed; the turn is kept once the last piece is taken."""
        request = self._request(prompt, images, options)
        stream = self.model.stream_prepared(self.model.prepare(request))

        def pieces() -> Iterator[str]:
            yield from stream
            self._keep(request, stream.answer)

        return pieces()

    def _request(self, prompt: str, images: ImageLike | Sequence[ImageLike], options: dict[str, Any]) -> Request:
        new = Request(prompt, images).images
        if new and PLACEHOLDER not in prompt:
            prompt = f"{PLACEHOLDER}\n" * len(new) + prompt
        turns = [*self.turns, {"from": "human", "value": prompt}]
        return Request(turns, (*self.images, *new), **{**self.options, **options})

    def _keep(self, request: Request, answer: Answer) -> Answer:
        if answer.text:
            text = [answer.text] if PLACEHOLDER in answer.text else answer.text  # a list has no markers
            self.turns = [*request.prompt, {"from": "gpt", "value": text}]
            self.images = list(request.images)
        return answer
