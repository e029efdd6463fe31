"""A request inside the engine: its images cut into tiles, its prompt packed once granularities are chosen."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

from avg_llava_jax.config import Granularity, ModelConfig
from avg_llava_jax.data.conversation import IMAGE
from avg_llava_jax.data.packing import Sample, Shape, load_tiles, prompt_index, prompt_weight, tile_counts, tiles_of
from avg_llava_jax.inference import choosing
from avg_llava_jax.inference.guides import Matcher
from avg_llava_jax.inference.image_pages import Digest, digest_of
from avg_llava_jax.inference.model import Model, check_length, visual_tokens
from avg_llava_jax.inference.programs import TEXT
from avg_llava_jax.inference.requests import Pass, Prepared, TokenScore
from avg_llava_jax.inference.sampling import Next
from avg_llava_jax.inference.scheduler import Work
from avg_llava_jax.inference.text_stream import TextStream
from avg_llava_jax.inference.tickets import Ticket

Images = list[tuple[Digest, np.ndarray]]
"""Digest and tiles uint8 (t, H, W, 3) of each image of a request."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Job(Work):
    """The engine's state of a request.

    images: digest and tiles of each image. pages: pages of each image's tiles, None while it holds none.
    text: int32 (L,), ids of the prompt without its images. scores: router scores (G,) of the images routed so far.
    cost_weight: the price at which the router chooses. router_skipped: the load is too high to route.
    choice: granularity of each image.
    ids, places: int32 (S,), the packed prompt and its draft, see `programs.Chunk`; with `config.most_tiles` places is
        (S, 4), with weights float32 (S, 4).
    finer: granularities of the pass that follows if this one is not certain enough; empty = none.
    logprobs: log-probability of each of `tokens`. held: text that is held back until its pass is certain.
    passes: earlier passes that were not certain enough.
    matcher: follows the request's guide. token_scores: the scores of the answer's tokens, where they are wanted.
    times: the clock in seconds when it reached each stage.
    """

    prepared: Prepared
    ticket: Ticket
    stream: TextStream
    text: np.ndarray
    images: Images
    matcher: Matcher | None = None
    token_scores: list[TokenScore] = dataclasses.field(default_factory=list)
    pages: list[list[int]] | None = None
    scores: list[np.ndarray] = dataclasses.field(default_factory=list)
    cost_weight: float = 0.0
    router_skipped: bool = False
    choice: tuple[Granularity, ...] = ()
    ids: np.ndarray | None = None
    places: np.ndarray | None = None
    weights: np.ndarray | None = None
    finer: tuple[Granularity, ...] = ()
    logprobs: list[float] = dataclasses.field(default_factory=list)
    held: str = ""
    passes: list[Pass] = dataclasses.field(default_factory=list)
    times: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def digests(self) -> list[Digest]:
        return [digest for digest, _ in self.images]

    @property
    def unrouted(self) -> int:
        """The number of images still to route: if the router chooses for one image, it scores all of them."""
        return len(self.images) - len(self.scores) if None in self.prepared.choice else 0

    @property
    def visual(self) -> int:
        """Visual tokens of its packed prompt."""
        return len(self.ids) - len(self.text) - self.draft

    @property
    def price(self) -> float | None:
        """The price at which granularities were chosen, None if all were requested."""
        return self.cost_weight if self.scores or self.router_skipped else None

    @property
    def price_raised(self) -> bool:
        """Whether the engine's load raised that price."""
        return self.price is not None and self.price > self.prepared.request.cost_weight

    def skip_router(self, config: ModelConfig) -> None:
        """Take the coarsest granularity where the router would choose, unless it has begun or its price is fixed."""
        if self.unrouted == len(self.images) > 0 and not self.prepared.fixed_price:
            choice = tuple(config.granularities[0] if g is None else g for g in self.prepared.choice)
            self.prepared, self.router_skipped = dataclasses.replace(self.prepared, choice=choice), True

    def next(self) -> Next:
        """What its next token depends on."""
        left = self.limit - len(self.tokens)
        allowed = None if self.matcher is None else self.matcher.allowed(left, self.limit)
        return Next(self.prepared.request, self.limit, self.text, self.tokens, allowed)

    def certainty(self, count: int) -> float:
        """The lowest probability of the first `count` tokens, up to the token that causes another pass: see `Pass`."""
        least = 1.0
        for logprob in self.logprobs[:count]:
            least = min(least, math.exp(logprob))
            if self.finer and least < self.prepared.request.escalate:
                break
        return least

    @property
    def spent(self) -> int:
        """Visual tokens of its earlier passes."""
        return sum(each.visual_tokens for each in self.passes)

    def reached(self, stage: str) -> None:
        self.times[stage] = time.perf_counter()

    def timings(self) -> dict[str, float]:
        """Seconds of `queue`, `encode` (and route), `prefill` (and the wait for a slot), `decode` and `total`."""
        stages = ("submitted", "taken", "routed", "first", "ended")
        at = [self.times[stage] for stage in stages]
        names = ("queue", "encode", "prefill", "decode")
        return {name: at[i + 1] - at[i] for i, name in enumerate(names)} | {"total": at[-1] - at[0]}


def read_images(config: ModelConfig, sample: Sample) -> Images:
    """Load a request's images and cut them into tiles. Raises BadSample if one cannot be read."""
    counts = tile_counts(sample, config)
    tiles = np.split(load_tiles(sample, config), np.cumsum(counts)[:-1]) if counts else []
    return [(digest_of(part, size), part) for part, size in zip(tiles, sample.sizes, strict=True)]


def make_job(
    model: Model, prepared: Prepared, images: Images | None, ticket: Ticket, submitted: float, most_tiles: int
) -> Job:
    """Make the job of a checked request. Raises ValueError in one line if it cannot be answered.

    images: the result of `read_images`, None = load them here. submitted: the clock in seconds. most_tiles: pages.
    """
    sample = prepared.sample
    count = tiles_of(sample, model.config)
    if count > most_tiles:
        raise ValueError(f"the images have {count} tiles, the engine holds {most_tiles}: send fewer images")
    guide = prepared.request.guide
    images = read_images(model.config, sample) if images is None else images
    return Job(
        matcher=None if guide is None else model.matcher(guide),
        each_token=guide is not None,  # what may come after a token depends on it
        prepared=prepared,
        ticket=ticket,
        stream=TextStream(model.tokenizer.decode, prepared.request.stop),
        text=np.array([token for token in sample.tokens.ids if token != IMAGE], np.int32),
        images=[(_of_adapter(digest, prepared.adapter), tiles) for digest, tiles in images],
        times={"submitted": submitted},
    )


def _of_adapter(digest: Digest, adapter: int) -> Digest:
    """The digest of an image as an adapter encodes it."""
    return digest + adapter.to_bytes(4, "little") if adapter else digest


def pack(config: ModelConfig, job: Job, pages: int, cost_weight: float = 0.0) -> None:
    """Choose the job's granularities by its scores, and pack its prompt. pages: the number of pages of the pool.

    cost_weight: the lowest price that the engine's load allows.
    Raises ValueError if the prompt is too long at the chosen granularities.
    """
    logits = np.array(job.scores, np.float32).reshape(-1, len(config.granularities))
    own = job.prepared.request.cost_weight
    job.cost_weight = own if job.prepared.fixed_price else max(own, cost_weight)
    job.choice = choosing.choose(config, job.prepared, logits, job.cost_weight)
    check_length(config, job.prepared.sample, job.choice)
    job.finer = choosing.next_choice(config, job.prepared, job.choice) if job.prepared.request.escalate else ()
    _pack(config, job, pages)


def repack_finer(model: Model, job: Job, pages: int, ended: bool) -> None:
    """Pack a job's prompt again at its finer granularities, with its tokens so far as the draft.

    ended: whether they are a complete answer. Only an answer of the best tokens has a draft: a prefill predicts
    without sampling, penalties and guides.
    """
    draft = job.tokens[: len(job.tokens) - ended] if job.next().greedy else []
    job.choice, job.logprobs, job.token_scores, job.held = job.finer, [], [], ""
    job.finer = choosing.next_choice(model.config, job.prepared, job.choice, job.spent)
    job.stream.restart()
    if job.matcher is not None:
        job.matcher = model.matcher(job.prepared.request.guide)
    _pack(model.config, job, pages)
    draft = draft[: job.limit - 1]
    job.keys = np.append(job.keys, np.array(draft, np.int64))
    job.ids = np.append(job.ids, np.array(draft, np.int32))
    text = np.full((len(draft), *job.places.shape[1:]), TEXT, np.int32)
    job.places = np.concatenate([job.places, text])
    if job.weights is not None:
        job.weights = np.concatenate([job.weights, np.zeros(text.shape, np.float32)])  # text has no use for them
    job.draft = len(draft)


def _pack(config: ModelConfig, job: Job, pages: int) -> None:
    """Pack a job's prompt at its granularities: `ids`, `places`, `weights`, `keys` and `limit`."""
    sample = job.prepared.sample
    own = [page for image in job.pages or () for page in image]
    shape = Shape(max(1, len(own)), max(1, len(sample.sizes)), len(job.text), 1, 1.0)
    index, length = prompt_index(sample, shape, config, job.choice)
    job.ids, job.places = places_of(config, index[:length], job.text, own, pages)
    job.weights = prompt_weight(sample, config, job.choice) if config.most_tiles else None
    visual = visual_tokens(config, sample, job.choice)
    images = iter(zip(job.digests, job.choice, visual, strict=True))
    keys: list[int] = []
    for token in sample.tokens.ids:
        if token == IMAGE:
            digest, granularity, count = next(images)
            keys += [image_key(digest, config.pyramid_offsets[granularity])] * count
        else:
            keys.append(token)
    # Adapters share no prefix: every shared one begins at the first position.
    job.keys = np.array(keys, np.int64) + (np.arange(len(keys)) == 0) * (job.prepared.adapter << 32)
    job.limit = min(job.prepared.request.max_new_tokens, config.language.max_length - length + 1)


def image_key(digest: Digest, offset: int) -> int:
    """The scheduler's key of an image at a granularity, given by its first pyramid row: negative, 63 bits."""
    return -1 - ((int.from_bytes(digest[:8], "little") ^ offset * 0x9E3779B97F4A7C15) % 2**63)


def places_of(
    config: ModelConfig, index: np.ndarray, text: np.ndarray, own: list[int], pages: int
) -> tuple[np.ndarray, np.ndarray]:
    """Translate a sample's packed index into text ids and places in a pool of `pages` pages: int32 (n,) each.

    index: int (n,) or (n, 4) of `packing`, which counts the sample's own tables: text int (L,), one tile slot per page
    of `own` (at least one), newline. Places have its shape.

    With R = 7, two tiles in pages 4 and 2 of 10, and text 7 8 9:

        index     0 1  3      10     17 2        ids      7  8  0   0   0  9
        which is  7 8  tile 0 tile 1 nl 9        places  -1 -1 28  14  70 -1
    """
    stride = config.pyramid_rows
    is_text = index < len(text)
    first = index if index.ndim == 1 else index[:, 0]
    ids = np.append(text, 0)[np.minimum(first, len(text))].astype(np.int32)
    tile, row = np.divmod(index - len(text), stride)
    slots = own or [0]
    page = np.array([*slots, pages])[np.where(is_text, len(slots), tile)]
    places = np.where(is_text, TEXT, page * stride + row).astype(np.int32)
    return ids, places
