"""Batches by number: every batch is a function of (data, seed, number), and of nothing that came before.

Grain decides the order of the records: shuffled anew each epoch, mixed by weight. Batches are planned
a window at a time. The samples of a window are measured (text tokenized, image headers read), sorted
by shape, cut into batches, and the batches shuffled; so a batch holds samples of like size, and each
record is used once an epoch. Only then are the images decoded, by each process for its own rows.

    window w      records w*K*B .. (w+1)*K*B - 1, in Grain's order
    batch b       the (b mod K)-th, in shuffled order, of window b // K
    a process     the rows of each batch that lie on its devices

The position of a pipeline is therefore one number, the next batch: it can be resumed with another
number of workers, and on another number of processes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import heapq
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.data.conversation import Tokens
from avg_llava_jax.data.errors import BadSample
from avg_llava_jax.data.feedback import Stored, asked
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.packing import Sample, Shape, close_shape, collate, collate_words, load_tiles, merge, shape_of
from avg_llava_jax.data.sources import Part, read_sample
from avg_llava_jax.data.tokenizer import Tokenizer

WINDOW = 16
"""K: batches planned together. More means less padding and a longer wait for the first batch."""

SURVEY = 512
"""Records measured beforehand to choose the batch shapes of a run."""

EMPTY = Sample("", Tokens([], []))
"""Fills a row that has no sample: no image, no text, no label; it adds nothing to any loss."""

Batch = dict[str, Any]


class Skipped(NamedTuple):
    """A record that could not be used. record: `path#number`; the id in it need not be unique."""

    record: str
    id: str
    reason: str
    detail: str


class Member(NamedTuple):
    """A sample, and the record it is made from: `path#number`."""

    record: str
    sample: Sample


@dataclasses.dataclass(frozen=True)
class _Window:
    """Members of each batch, in the order in which the batches come; and who was left out."""

    batches: list[list[Member]]
    skipped: list[Skipped]


@dataclasses.dataclass(frozen=True)
class PlannedBatches:
    """The batches of this process, by number; a random-access source for Grain.

    parts: the sources and their weights.
    batch_size: B, over all processes.
    shapes: at most so many batch shapes, as far as the survey saw them; each is compiled once.
    words: add `patch_words` for phase `grounding`.
    feedback: stored answers by what was asked; adds `nll` float32 (rows, G) to the batch, NaN in an empty row, and
        where features were kept `features` (rows, T, P, D) in place of `pixels`. A record without an answer is skipped.
    rows: which rows of each batch are read, ascending; None = all of them.
    kept: of each part the numbers of the records that are used, ascending; None = all of them.
    once: every record once, in order and without mixing by weight, and then the end; for validation.
    shapes_of: batches whose shapes are taken over.
    """

    parts: Sequence[Part]
    tokenizer: Tokenizer
    config: ModelConfig
    granularities: tuple[int, ...]
    batch_size: int
    seed: int = 0
    shapes: int = 6
    words: bool = False
    feedback: Mapping[str, Stored] | None = None
    rows: tuple[int, ...] | None = None
    kept: tuple[np.ndarray, ...] | None = None
    once: bool = False
    shapes_of: PlannedBatches | None = None

    def __len__(self) -> int:
        if self.once:
            return math.ceil(sum(self.sizes) / self.batch_size)
        return 2**40  # no end: epochs follow one another

    @property
    def sizes(self) -> list[int]:
        """How many records are used of each part."""
        return [len(part.source) if self.kept is None else len(self.kept[at]) for at, part in enumerate(self.parts)]

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`: what `collate_rows` gives for this process's rows, and

        records  the record of each row, `path#number`, "" for an empty row; ids need not be unique, nor be there
        skipped  list of Skipped: what planning left out, spread evenly over the batches of a window and there
                 over the rows, so that one process reports it; and which of these rows cannot be read
        """
        window = self._window(number // WINDOW)
        members = window.batches[number % WINDOW]
        rows = range(self.batch_size) if self.rows is None else self.rows
        left_out = window.skipped[number % WINDOW :: len(window.batches)]
        skipped = [one for at, one in enumerate(left_out) if at % self.batch_size in rows]
        shape = self._fit([member.sample for member in members] or [EMPTY])

        records, samples, stored = [""] * len(rows), [EMPTY] * len(rows), [self._nothing] * len(rows)
        tiles = [self._tiles(EMPTY, self._nothing)] * len(rows)
        for row, (record, sample) in enumerate(self.rows_of(number)):
            try:
                found = self._nothing if self.feedback is None else self._stored(sample)
                tiles[row] = self._tiles(sample, found)
            except BadSample as bad:
                skipped.append(Skipped(record, sample.id, bad.reason, bad.detail))
                continue
            records[row], samples[row], stored[row] = record, sample, found
        stored = None if self.feedback is None else stored
        batch = collate_rows(samples, tiles, shape, self.config, self.granularities, words=self.words, stored=stored)
        return {**batch, "records": records, "skipped": skipped}

    def rows_of(self, number: int) -> list[Member]:
        """What stands in this process's rows of batch `number`, the first rows; nothing is decoded."""
        members = self._window(number // WINDOW).batches[number % WINDOW]
        rows = range(self.batch_size) if self.rows is None else self.rows
        return [members[at] for at in rows if at < len(members)]

    def first(self, count: int) -> Iterator[Member]:
        """The records with which the run starts, in Grain's order, without those that cannot be used."""
        for at in range(min(count, sum(self.sizes)) if self.once else count):
            member = self._read(at)
            if isinstance(member, Member):
                yield member

    def _tiles(self, sample: Sample, stored: Stored) -> np.ndarray:
        """Of all images of a sample: pixels, or the features that are stored."""
        return load_tiles(sample, self.config) if stored.features is None else stored.features

    def _stored(self, sample: Sample) -> Stored:
        """The stored answers to a sample.

        Raises:
          BadSample: there are none.
        """
        try:
            return self.feedback[asked(sample)]
        except KeyError:
            raise BadSample(
                "no_feedback", f"sample {sample.id} is not, as it is now, in rglf.feedback: run launch.feedback again"
            ) from None

    @functools.cached_property
    def _nothing(self) -> Stored:
        """The answers of an empty row."""
        features = None if self.feedback is None else next(iter(self.feedback.values())).features
        nll = np.full(len(self.config.granularities), np.nan, np.float32)
        return Stored(nll, None if features is None else features[:0], "")

    @property
    def ladder(self) -> tuple[Shape, ...]:
        """The batch shapes of this run, cheapest first, by the first SURVEY records. The last holds all of those."""
        return self._survey[0]

    @functools.cached_property
    def _survey(self) -> tuple[tuple[Shape, ...], Shape]:
        """The ladder, and a wide shape for a batch that does not fit it."""
        if self.shapes_of is not None:
            return self.shapes_of._survey
        samples = [member.sample for member in self.first(SURVEY)] or [EMPTY]
        found = collections.Counter(close_shape(sample, self.config, self.granularities) for sample in samples)
        wide = merge(shape_of(sample, self.config, self.granularities) for sample in samples)
        return choose_shapes(found, self.shapes, self.config, self.granularities), wide

    def _fit(self, samples: Sequence[Sample]) -> Shape:
        """The cheapest shape of the ladder that holds these samples; where none does, one that is wide.

        Few of the records that the survey did not see are larger than all that it saw, and those share one more shape.
        """
        close = merge(close_shape(sample, self.config, self.granularities) for sample in samples)
        ladder, wide = self._survey
        for rung in ladder:
            if merge([rung, close]) == rung:
                return rung
        return merge([wide, *(shape_of(sample, self.config, self.granularities) for sample in samples)])

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        """Pairs of a source and the place of a record among those that are used, without end."""
        orders = []
        for which, size in enumerate(self.sizes):
            indices = grain.MapDataset.range(size).seed(self.seed + which).shuffle().repeat()
            orders.append(indices.map(functools.partial(_pair, which)))
        return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [part.weight for part in self.parts])

    @functools.cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        """Each pair once, in order."""
        return [(which, index) for which, size in enumerate(self.sizes) for index in range(size)]

    @functools.cached_property
    def _windows(self) -> collections.OrderedDict[int, _Window]:
        return collections.OrderedDict()

    def _read(self, at: int) -> Member | Skipped:
        """The record at a place of Grain's order."""
        pair = self._pairs[at] if self.once else self._order[at]
        which, index = (int(number) for number in pair)
        index = index if self.kept is None else int(self.kept[which][index])
        part = self.parts[which]
        record = f"{part.path}#{index}"
        try:
            return Member(record, read_sample(part.source, index, self.tokenizer, self.config, self.granularities))
        except BadSample as bad:
            return Skipped(record, part.id(index), bad.reason, bad.detail)

    def _window(self, window: int) -> _Window:
        if window not in self._windows:
            self._windows[window] = self._plan(window)
            if len(self._windows) > 2:
                self._windows.popitem(last=False)
        return self._windows[window]

    def _plan(self, window: int) -> _Window:
        count = min(WINDOW, len(self) - window * WINDOW)
        start, end = (number * WINDOW * self.batch_size for number in (window, window + 1))
        read = [self._read(at) for at in range(start, min(end, sum(self.sizes)) if self.once else end)]
        members = [one for one in read if isinstance(one, Member)]
        # Stable: samples of like shape stay in Grain's order.
        members.sort(key=lambda member: _cost(self._fit([member.sample]), self.config, self.granularities))
        # Where some were left out every batch is a little short, rather than one of them empty.
        ends = [len(members) * number // count for number in range(count + 1)]
        batches = [members[start:end] for start, end in itertools.pairwise(ends)]
        random.Random(f"{self.seed}/{window}").shuffle(batches)
        return _Window(batches, [one for one in read if isinstance(one, Skipped)])


def hold_out(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of `count` records, ascending: those to train on, and a share that is held out, the same in every run.

    Raises:
      ValueError: too few records.
    """
    held = max(1, round(share * count))
    if held >= count:
        raise ValueError(f"data.validation={share} of {count} records leaves none to train on")
    order = np.random.RandomState(0).permutation(count)  # a generator whose numbers NumPy keeps for ever
    return np.sort(order[held:]), np.sort(order[:held])


def _pair(source: int, index: int) -> tuple[int, int]:
    return source, index


def _cost(shape: Shape, config: ModelConfig, granularities: Sequence[int]) -> tuple[float, ...]:
    """What a sample of this shape costs, about: tokens through the encoder, and through the language model."""
    encoder = shape.tiles * config.vision.grid**2 * config.vision.used_layers * config.vision.width**2
    length = sum(shape.length(config, granularity) for granularity in granularities)
    return (encoder + length * config.language.layers * config.language.width**2, *dataclasses.astuple(shape))


def collate_rows(
    samples: Sequence[Sample],
    tiles: Sequence[np.ndarray],
    shape: Shape,
    config: ModelConfig,
    granularities: Sequence[int],
    *,
    words: bool = False,
    stored: Sequence[Stored] | None = None,
) -> dict[str, Any]:
    """The arrays of a training batch: those of `packing.collate`, and

    visual       int32 (rows, I, G)         visual tokens of each image at each of `granularities`, 0 = no such image
    patch_words  int32 (rows, T, P, WORDS)  where `words` is asked for
    nll          float32 (rows, G)          where feedback is `stored`, NaN = none
    features     (rows, T, P, D)            instead of `pixels`, where these are stored too: `tiles` holds them
    """
    batch = collate(samples, shape, config, granularities, tiles)
    batch["visual"] = np.zeros((len(samples), shape.images, len(granularities)), np.int32)
    for row, sample in enumerate(samples):
        for image, size in enumerate(sample.sizes):
            batch["visual"][row, image] = [visual_count(size, config, g) for g in granularities]
    if words:
        batch["patch_words"] = collate_words(samples, shape.tiles, config)
    if stored is not None:
        batch["nll"] = np.stack([one.nll for one in stored])
        if stored[0].features is not None:
            batch["features"] = batch.pop("pixels")
    return batch


def choose_shapes(
    found: dict[Shape, int], limit: int, config: ModelConfig, granularities: Sequence[int]
) -> tuple[Shape, ...]:
    """At most `limit` shapes, cheapest first, so that each one found fits one of them with little padding.

    found: how often each shape occurs. Starting from all of them, those two are merged that cost the
    least more, until few enough are left. The last is the merge of all, so that a batch of any samples fits.
    """
    if limit < 1:
        raise ValueError(f"data.shapes={limit}: at least one shape is needed")
    cost = functools.cache(lambda shape: _cost(shape, config, granularities)[0])
    rungs = dict(found) or {Shape(1, 1, 16, 16, 0.0): 1}
    rungs.setdefault(merge(rungs), 0)
    number, queue = itertools.count(), []  # pairs, those first whose merge costs the least more

    def offer(one: Shape, other: Shape) -> None:
        both = merge((one, other))
        more = rungs[one] * (cost(both) - cost(one)) + rungs[other] * (cost(both) - cost(other))
        heapq.heappush(queue, (more, next(number), one, other, rungs[one], rungs[other], both))

    for one, other in itertools.combinations(list(rungs), 2):
        offer(one, other)
    while len(rungs) > limit:
        _, _, one, other, *counts, both = heapq.heappop(queue)
        if [rungs.get(one), rungs.get(other)] != counts:
            continue  # one of them was merged since
        del rungs[one], rungs[other]
        rungs[both] = rungs.get(both, 0) + sum(counts)
        for each in list(rungs):
            if each != both:
                offer(both, each)
    return tuple(sorted(rungs, key=lambda shape: _cost(shape, config, granularities)))


class Batches:
    """An endless iterator over `PlannedBatches`, read ahead by a thread or by worker processes.

    Its state is {"next_batch": n}; setting it starts the reading anew from there.
    """

    def __init__(self, planned: PlannedBatches, workers: int = 0):
        self.planned, self.workers = planned, workers
        self._next = 0
        self._iterator: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._dataset(self._next))
        batch = next(self._iterator)
        self._next += 1
        return batch

    def _dataset(self, start: int) -> grain.IterDataset:
        _ = self.planned.ladder  # before it goes to the workers, which then need not survey as well
        batches = grain.MapDataset.source(self.planned).slice(slice(start, None))
        # One thread: windows are planned once each, and Python code gains nothing from more.
        read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        if not self.workers:
            return read
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which only app.run parses
            flags.FLAGS.mark_as_parsed()
        return read.mp_prefetch(grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2))

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Stop reading ahead."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "close"):
            iterator.close()
