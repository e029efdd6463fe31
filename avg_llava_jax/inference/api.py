"""The Python face: load a model, ask it about images, talk with it.

    model = AvgLlava.load()
    answer = model.answer("photo.png", "Who wears 7?")
    answer.text, answer.granularity, answer.visual_tokens

What runs on the device stands in `generate`, what brings it there in `batching`.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from avg_llava_jax import SHIPPED, checkpoint
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert.quantize import quantized
from avg_llava_jax.data.conversation import PLACEHOLDER, Turn, encode_prompt, encode_raw, stop_ids
from avg_llava_jax.data.images import ImageRef, image_ref
from avg_llava_jax.data.packing import Sample, make_sample
from avg_llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from avg_llava_jax.inference import batching, choosing, generate
from avg_llava_jax.inference.requests import Answer, Granularity, ImageLike, Prepared, Request
from avg_llava_jax.inference.text_stream import TextStream
from avg_llava_jax.models.avg_llava import Params

STEPS_BETWEEN_STOPS = 8
"""Tokens that are generated between two looks for a stop string."""


class Stream:
    """Iterate to get an answer's pieces of text as they come; afterwards `answer` holds all of it."""

    def __init__(self, pieces: Iterator[tuple[list[str], list[Answer] | None]]):
        self._pieces = pieces
        self.answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        for (piece,), answers in self._pieces:
            if piece:
                yield piece
            if answers is not None:
                (self.answer,) = answers


class AvgLlava:
    """A model with its tokenizer. Made by `load`; `config`, `params`, `tokenizer` and `step` may be read."""

    def __init__(self, config: ModelConfig, params: Params, tokenizer: Tokenizer, step: int = 0):
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.step = step
        self.stop_ids = stop_ids(tokenizer, config.template)
        if tokenizer.vocab_size > config.language.vocab_size:
            raise ValueError(
                f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} ids, "
                f"the model's vocabulary {config.language.vocab_size}"
            )

    @functools.cached_property
    def decoding(self) -> Params:
        """The parameters as `generate.decode` wants them; they take no memory of their own."""
        return generate.for_decoding(self.params)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] = SHIPPED,
        vision_tower: str | os.PathLike[str] | None = None,
        mesh: Mesh | None = None,
        dtype: Any = None,
        quantize: Literal["int8"] | None = None,
    ) -> AvgLlava:
        """Load a checkpoint folder of ours, or one in the released layout; see `checkpoint.load`.

        vision_tower: the CLIP folder that a released config names.
        mesh: spreads the parameters over devices. dtype: converts them; compute follows it.
        quantize: "int8" holds the language model's weights so, see `weights.quantize`.
        """
        if quantize not in (None, "int8"):
            raise ValueError(f"quantize={quantize!r}: choose int8 or None")
        loaded = checkpoint.load(path, vision_tower, mesh, dtype)
        params = quantized(loaded.params) if quantize else loaded.params
        return cls(loaded.config, params, load_tokenizer(loaded.tokenizer_folder), loaded.meta["step"])

    def answer(self, images: ImageLike | Sequence[ImageLike], prompt: str | Sequence[Turn], **options: Any) -> Answer:
        """Answer one question about one image, several or none (`()`); `options` are the fields of `Request`."""
        return self.answer_batch([Request(prompt, images, **options)])[0]

    def answer_batch(self, requests: Sequence[Request], batch_size: int = 16) -> list[Answer]:
        """Answer requests of any mixture, each as it would be answered alone.

        What runs together is of one static shape, so what a request shares its batch with changes only
        the batch axis. batch_size: rows that run at once at most.
        """
        prepared = []
        for number, request in enumerate(requests):
            try:
                prepared.append(self.prepare(request))
            except ValueError as error:
                raise error if len(requests) == 1 else ValueError(f"request {number}: {error}") from None
        return self.answer_prepared(prepared, batch_size)

    def answer_prepared(self, prepared: Sequence[Prepared], batch_size: int = 16) -> list[Answer]:
        """`answer_batch` of requests that `prepare` has checked."""
        answers: list[Answer | None] = [None] * len(prepared)
        for rows in batching.groups(prepared, lambda p: (p.shape, bool(p.choice), None in p.choice), batch_size):
            group = [prepared[row] for row in rows]
            for _, done in self._run(group, streaming=False):
                if done is not None:
                    for row, answer in zip(rows, done, strict=True):
                        answers[row] = answer
        return answers

    def stream(self, images: ImageLike | Sequence[ImageLike], prompt: str | Sequence[Turn], **options: Any) -> Stream:
        """Answer one question piece by piece; the arguments are those of `answer`, errors come at once."""
        return Stream(self._run([self.prepare(Request(prompt, images, **options))], streaming=True))

    def chat(self, **options: Any) -> Chat:
        """A conversation; `options` are the fields of `Request`, the same for all of its turns."""
        return Chat(self, options)

    def prepare(self, request: Request) -> Prepared:
        """Check and tokenize a request; reads the headers of its images. Raises ValueError in one line."""
        refs = [_ref(image) for image in request.images]
        if request.raw:
            tokens = encode_raw(request.prompt, self.tokenizer)
        else:
            prompt = request.prompt
            turns = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else prompt
            tokens = encode_prompt(turns, self.tokenizer, self.config.template, len(refs))
        if tokens.images != len(refs):
            raise ValueError(f"{len(refs)} images for {tokens.images} {PLACEHOLDER} in the prompt")
        if not tokens.ids:
            raise ValueError("the prompt is empty")
        sample = make_sample("request", tokens, refs)
        choice = self._wanted(request.granularity, len(refs))
        choosing.check_budget(self.config, sample.sizes, choice, request.max_visual_tokens)
        if len(tokens.ids) - len(refs) > self.config.language.max_length or None not in choice:
            batching.check_length(self.config, sample, [g or self.config.granularities[0] for g in choice])
        return Prepared(request, sample, batching.prompt_shape(sample, self.config), choice)

    def _wanted(self, granularity: Granularity | Sequence[Granularity], images: int) -> tuple[int | None, ...]:
        """One entry an image, None for "auto"."""
        each = granularity if isinstance(granularity, (list, tuple)) else [granularity] * images
        if len(each) != images:
            raise ValueError(f"granularity={granularity!r} names {len(each)} for {images} images")
        for one in each or [granularity]:
            if one != "auto" and (isinstance(one, bool) or one not in self.config.granularities):
                ladder = ", ".join(map(str, self.config.granularities))
                raise ValueError(f"granularity={one!r} is none of this model's: auto, {ladder}")
        return tuple(None if one == "auto" else int(one) for one in each)

    def _run(self, group: list[Prepared], streaming: bool) -> Iterator[tuple[list[str], list[Answer] | None]]:
        """Answer requests of one shape; yields each one's new piece of text, and at the end the answers."""
        begin = time.perf_counter()
        samples = [prepared.sample for prepared in group]
        rows, routed = batching.power(len(group)), None in group[0].choice
        seen = batching.see(self.config, self.params, samples, group[0].shape, rows, route=routed)
        jax.block_until_ready(seen.pyramid)
        timings = {"see": time.perf_counter() - begin}

        scores = [seen.logits(row) for row in range(len(group))]
        choices = [choosing.choose(self.config, p, logits) for p, logits in zip(group, scores, strict=True)]
        for prepared, choice in zip(group, choices, strict=True):
            batching.check_length(self.config, prepared.sample, choice)
        limit = self.config.language.max_length

        def bucket(row: int) -> tuple[int, int]:
            length = batching.length_at(self.config, samples[row], choices[row])
            return generate.length_bucket(length, limit), generate.room_bucket(group[row].request.max_new_tokens)

        answers: list[Answer | None] = [None] * len(group)
        for rows in batching.groups(range(len(group)), bucket, len(group)):
            static, room = bucket(rows[0])
            part = Part(self, [group[row].request for row in rows], streaming, room, dict(timings), begin)
            index, lengths = batching.packed_index(
                self.config,
                [samples[row] for row in rows],
                seen.shape,
                [choices[row] for row in rows],
                batching.power(len(rows)),
                static,
            )
            take = np.resize(rows, len(lengths))
            for pieces in part.generate(seen.pyramid[take], seen.text[take], index, lengths):
                whole = [""] * len(group)
                for row, piece in zip(rows, pieces, strict=True):
                    whole[row] = piece
                yield whole, None
            for row, (stream, finish) in zip(rows, part.results(), strict=True):
                answers[row] = self.answer_of(stream, finish, samples[row], choices[row], scores[row], part.timings)
        yield [""] * len(group), answers

    def answer_of(
        self,
        stream: TextStream,
        finish: Literal["stop", "length"],
        sample: Sample,
        choice: tuple[int, ...],
        logits: np.ndarray,
        timings: dict[str, float],
    ) -> Answer:
        """The answer of a request that has ended; `logits` are its router scores (images, G), no rows without."""
        shares = tuple(dict(zip(self.config.granularities, softmax(row), strict=True)) for row in logits)
        return Answer(
            text=stream.text,
            granularity=_single(choice),
            visual_tokens=sum(batching.visual_tokens(self.config, sample, choice)),
            probabilities=_single(shares),
            timings=timings,
            token_ids=tuple(stream.ids),
            finish=finish,
        )


class Part:
    """Requests whose packed prompts have one static length, on their way through the language model."""

    def __init__(
        self,
        model: AvgLlava,
        requests: Sequence[Request],
        streaming: bool,
        room: int,
        timings: dict[str, float],
        begin: float,
    ):
        self.model, self.requests, self.room = model, requests, room
        self.timings, self._begin = timings, begin
        self._streams = [TextStream(model.tokenizer.decode, request.stop) for request in requests]
        watched = any(request.stop for request in requests)
        self._steps = 1 if streaming else STEPS_BETWEEN_STOPS if watched else room
        self._limits = self._counts = np.zeros(0, np.int32)

    def generate(
        self, pyramid: jax.Array, text: np.ndarray, index: np.ndarray, lengths: np.ndarray
    ) -> Iterator[list[str]]:
        """Prefill, then decode in chunks; yields each request's new piece after every chunk."""
        model, start = self.model, time.perf_counter()
        room_left = model.config.language.max_length - lengths[: len(self.requests)] + 1
        self._limits = np.minimum([request.max_new_tokens for request in self.requests], room_left).astype(np.int32)
        sampling = self._sampling(len(lengths))
        greedy = all(request.temperature == 0 for request in self.requests)
        stops = np.array(model.stop_ids, np.int32)
        embeds = generate.pack(model.config, model.params, pyramid, text, index)
        logits, cache = generate.prefill(model.config, model.params, embeds, lengths, self.room)
        state = generate.start(model.config, model.decoding, cache, logits, sampling, stops, lengths, self.room, greedy)
        jax.block_until_ready(state.tokens)
        self.timings["prefill"] = time.perf_counter() - start
        start = time.perf_counter()
        while True:
            tokens, count, done = jax.device_get((state.tokens, state.count, state.done))
            pieces = [
                stream.feed(batching.without_end(tokens[row, : count[row]].tolist(), model.stop_ids), bool(done[row]))
                for row, stream in enumerate(self._streams)
            ]
            done = done.copy()
            done[: len(self._streams)] |= [stream.stopped for stream in self._streams]
            if done.all():
                break
            yield pieces
            state = state._replace(done=jnp.asarray(done))
            state = generate.decode(model.config, model.decoding, state, sampling, stops, np.int32(self._steps), greedy)
        self._counts = count
        self.timings["decode"] = time.perf_counter() - start
        self.timings["total"] = time.perf_counter() - self._begin
        yield pieces

    def results(self) -> Iterator[tuple[TextStream, Literal["stop", "length"]]]:
        """Each request's text and why it ended."""
        for row, stream in enumerate(self._streams):
            ended = stream.stopped or len(stream.ids) < self._counts[row]
            yield stream, "stop" if ended else "length"

    def _sampling(self, rows: int) -> generate.Sampling:
        spare = rows - len(self.requests)

        def column(values: Sequence[float], dtype: Any, fill: float = 0) -> np.ndarray:
            return np.array([*values, *[fill] * spare], dtype)

        return generate.Sampling(
            temperature=column([request.temperature for request in self.requests], np.float32),
            top_p=column([request.top_p for request in self.requests], np.float32, 1),
            top_k=column([request.top_k for request in self.requests], np.int32),
            seed=column([request.seed for request in self.requests], np.uint32),
            limit=column(self._limits, np.int32),
        )


class Chat:
    """A conversation of several turns, each of which may bring images.

    Every question is put with the whole conversation before it, exactly as if it were asked anew: images
    of earlier turns are packed again, and under "auto" routed again, by all of the text.

    turns: what was said so far. images: all of them so far.
    """

    def __init__(self, model: AvgLlava, options: dict[str, Any]):
        self.model, self.options = model, options
        self.turns: list[Turn] = []
        self.images: list[ImageLike] = []

    def ask(self, prompt: str, images: ImageLike | Sequence[ImageLike] = (), **options: Any) -> Answer:
        """One more question; `options` override those of the chat for this turn.

        A list of granularities names one for every image of the conversation. A question that failed, or
        that got no text for an answer, is not kept.
        """
        request = self._request(prompt, images, options)
        return self._keep(request, self.model.answer_batch([request])[0])

    def stream(self, prompt: str, images: ImageLike | Sequence[ImageLike] = (), **options: Any) -> Iterator[str]:
        """`ask`, piece by piece; the turn is kept once the last piece was taken."""
        request = self._request(prompt, images, options)
        stream = Stream(self.model._run([self.model.prepare(request)], streaming=True))

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
            self.turns = [*request.prompt, {"from": "gpt", "value": answer.text}]
            self.images = list(request.images)
        return answer


def _ref(image: ImageLike) -> ImageRef:
    if isinstance(image, (str, os.PathLike, bytes, Image.Image)):
        return image_ref(image)
    if not (hasattr(image, "load") and hasattr(image, "size")):
        raise ValueError(f"an image is a path, bytes or a Pillow image, not {type(image).__name__}")
    return image


def softmax(scores: np.ndarray) -> list[float]:
    """Probabilities of fp32 scores (G,)."""
    shares = np.exp(scores - scores.max())
    return (shares / shares.sum()).tolist()


def _single(values: tuple[Any, ...]) -> Any:
    """None, the one value, or the tuple."""
    return None if not values else values[0] if len(values) == 1 else values
