"""A request inside the engine: its images cut into tiles, its prompt packed once granularities are chosen."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import IMAGE
from avg_llava_jax.data.packing import Sample, Shape, load_tiles, prompt_index
from avg_llava_jax.data.tiles import tile_count
from avg_llava_jax.inference import choosing
from avg_llava_jax.inference.guides import Matcher
from avg_llava_jax.inference.image_pages import Digest, digest_of
from avg_llava_jax.inference.model import Model, check_length, visual_tokens
from avg_llava_jax.inference.programs import TEXT
from avg_llava_jax.inference.requests import Prepared, TokenScore
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
    choice: granularity of each image. ids, places: int32 (S,), the packed prompt, see `programs.Chunk`.
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
    choice: tuple[int, ...] = ()
    ids: np.ndarray | None = None
    places: np.ndarray | None = None
    times: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def digests(self) -> list[Digest]:
        return [digest for digest, _ in self.images]

    @property
    def unrouted(self) -> int:
        """The number of images to route yet: where the router chooses for one image, it scores all of them."""
        return len(self.images) - len(self.scores) if None in self.prepared.choice else 0

    def next(self) -> Next:
        """What its next token depends on."""
        allowed = None if self.matcher is None else self.matcher.allowed()
        return Next(self.prepared.request, self.limit, self.text, self.tokens, allowed)

    def reached(self, stage: str) -> None:
        self.times[stage] = time.perf_counter()

    def timings(self) -> dict[str, float]:
        """Seconds of `queue`, `encode` (and route), `prefill` (and the wait for a slot), `decode` and `total`."""
        stages = ("submitted", "taken", "routed", "first", "ended")
        at = [self.times[stage] for stage in stages]
        names = ("queue", "encode", "prefill", "decode")
        return {name: at[i + 1] - at[i] for i, name in enumerate(names)} | {"total": at[-1] - at[0]}


def read_images(config: ModelConfig, sample: Sample) -> Images:
    """Load a request's images and cut them into tiles. Raises BadSample where one cannot be read."""
    counts = [tile_count(size, config) for size in sample.sizes]
    tiles = np.split(load_tiles(sample, config), np.cumsum(counts)[:-1]) if counts else []
    return [(digest_of(part, size), part) for part, size in zip(tiles, sample.sizes, strict=True)]


def make_job(
    model: Model, prepared: Prepared, images: Images | None, ticket: Ticket, submitted: float, most_tiles: int
) -> Job:
    """Make the job of a checked request. Raises ValueError in one line where it cannot be answered.

    images: the result of `read_images`, None = load them here. submitted: the clock in seconds. most_tiles: pages.
    """
    sample = prepared.sample
    count = sum(tile_count(size, model.config) for size in sample.sizes)
    if count > most_tiles:
        raise ValueError(f"the images have {count} tiles, the engine holds {most_tiles}: send fewer images")
    guide = prepared.request.guide
    return Job(
        matcher=None if guide is None else model.matcher(guide),
        each_token=guide is not None,  # what may come after a token depends on it
        prepared=prepared,
        ticket=ticket,
        stream=TextStream(model.tokenizer.decode, prepared.request.stop),
        text=np.array([token for token in sample.tokens.ids if token != IMAGE], np.int32),
        images=read_images(model.config, sample) if images is None else images,
        times={"submitted": submitted},
    )


def pack(config: ModelConfig, job: Job, pages: int) -> None:
    """Choose the job's granularities by its scores, and pack its prompt. pages: the number of pages of the pool.

    Raises ValueError where the prompt is too long at the chosen granularities.
    """
    sample = job.prepared.sample
    logits = np.array(job.scores, np.float32).reshape(-1, len(config.granularities))
    job.choice = choosing.choose(config, job.prepared, logits)
    check_length(config, sample, job.choice)
    own = [page for image in job.pages or () for page in image]
    shape = Shape(max(1, len(own)), max(1, len(sample.sizes)), len(job.text), 1, 1.0)
    index, length = prompt_index(sample, shape, config, job.choice)
    job.ids, job.places = places_of(config, index[:length], job.text, own, pages)
    visual = visual_tokens(config, sample, job.choice)
    images = iter(zip(job.digests, job.choice, visual, strict=True))
    keys: list[int] = []
    for token in sample.tokens.ids:
        if token == IMAGE:
            digest, granularity, count = next(images)
            keys += [image_key(digest, granularity)] * count
        else:
            keys.append(token)
    job.keys = np.array(keys, np.int64)
    job.limit = min(job.prepared.request.max_new_tokens, config.language.max_length - length + 1)


def image_key(digest: Digest, granularity: int) -> int:
    """The scheduler's key of an image at a granularity: negative, 63 bits of its digest."""
    return -1 - ((int.from_bytes(digest[:8], "little") ^ granularity * 0x9E3779B97F4A7C15) % 2**63)


def places_of(
    config: ModelConfig, index: np.ndarray, text: np.ndarray, own: list[int], pages: int
) -> tuple[np.ndarray, np.ndarray]:
    """Translate a sample's packed index into text ids and places in a pool of `pages` pages: int32 (n,) each.

    index: int (n,) of `packing`, which counts the sample's own tables: text int (L,), one tile slot per page of `own`
    (at least one), newline.

    With R = 7, two tiles in pages 4 and 2 of 10, and text 7 8 9:

        index     0 1  3      10     17 2        ids      7  8  0   0   0  9
        which is  7 8  tile 0 tile 1 nl 9        places  -1 -1 28  14  70 -1
    """
    stride = config.pyramid_rows
    is_text = index < len(text)
    ids = np.append(text, 0)[np.where(is_text, index, len(text))].astype(np.int32)
    tile, row = np.divmod(index - len(text), stride)
    slots = own or [0]
    page = np.array([*slots, pages])[np.where(is_text, len(slots), tile)]
    places = np.where(is_text, TEXT, page * stride + row).astype(np.int32)
    return ids, places
