"""Batches by number: a batch depends only on (data, seed, number), not on the batches before it.

Grain sets the order of the records: reshuffled each epoch, mixed by weight. Batches are planned one
window at a time. The samples of a window are measured (text tokenized, image headers read) and dealt
out to rows, `pack` to a row on average (`share_rows`). The rows are sorted by shape and split into
batches, and the batches are shuffled. So the rows of a batch have similar sizes, and each record is
used once per epoch. Each process then decodes the images of its own rows.

    window w      records w*K*B .. (w+1)*K*B - 1, in Grain's order
    batch b       the (b mod K)-th, in shuffled order, of window b // K: B / pack rows
    a process     the rows of each batch that its devices hold

The position of a pipeline is one number, the next batch, so a run can resume with another number of
workers or processes.
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
from avg_llava_jax.data.feedback import Stored, question_digest
from avg_llava_jax.data.geometry import visual_count
from avg_llava_jax.data.packing import (
    Sample,
    Shape,
    collate,
    collate_words,
    load_tiles,
    merge,
    packed_length,
    row_shape,
    tiles_of,
)
from avg_llava_jax.data.sources import WeightedSource, read_sample
from avg_llava_jax.data.tokenizer import Tokenizer

WINDOW = 16
"""K, batches per window. A larger window means less padding and a longer wait for the first batch."""

REMEMBERED = 4096
"""Records that stay in memory, tokenized: an epoch of a small data set reads what the one before has read."""

SURVEY = 512
"""Records that are measured at the start of a run to choose its batch shapes."""

LEAST_SAVED, COMPILE_STEPS = 0.02, 20
"""The least share of the work that one more batch shape must save, and the steps that its compilation takes the time
of: 15 of the jersey-sized model on two cores."""

EMPTY = Sample("", Tokens([], []))
"""Sample of an empty row: no image, no text, no label; it adds nothing to any loss."""

Batch = dict[str, Any]


class Skipped(NamedTuple):
    """A record that could not be used. record: `path#number`, which is unique; the id in the record need not be."""

    record: str
    id: str
    reason: str
    detail: str


class Member(NamedTuple):
    """A sample and its record, `path#number`."""

    record: str
    sample: Sample


Row = list[Member]
"""The samples of a row, which has at least one."""

EMPTY_ROW: Row = [Member("", EMPTY)]


@dataclasses.dataclass(frozen=True)
class _Window:
    """Rows and shape of each batch of a window, in the order of the batches, and the records that were skipped."""

    batches: list[list[Row]]
    shapes: list[Shape]
    skipped: list[Skipped]


@dataclasses.dataclass(frozen=True)
class PlannedBatches:
    """The batches of this process, by number; a random-access source for Grain.

    parts: the sources and their weights.
    batch_size: B, samples over all processes, a multiple of `pack`.
    pack: how many samples share a row, on average; a batch has B / pack rows.
    shapes: largest number of batch shapes for the surveyed records; each is compiled once.
    saves: see `choose_shapes`.
    words: adds `patch_words` for phase `grounding`.
    feedback: stored feedback by `question_digest`; adds `nll` float32 (rows, G) to the batch, NaN in an empty row,
        and, where features are stored, `features` (rows, T, P, D) in place of `pixels`. A record without feedback is
        skipped.
    rows: rows of each batch that this process reads, ascending; None = all.
    kept: for each part the numbers of the records that are used, ascending; None = all.
    single_epoch: yields every record once, in order and without mixing by weight, then ends; for validation.
    shapes_of: batches whose shapes are reused.
    """

    parts: Sequence[WeightedSource]
    tokenizer: Tokenizer
    config: ModelConfig
    granularities: tuple[int, ...]
    batch_size: int
    seed: int = 0
    shapes: int = 6
    saves: float = LEAST_SAVED
    words: bool = False
    feedback: Mapping[str, Stored] | None = None
    rows: tuple[int, ...] | None = None
    kept: tuple[np.ndarray, ...] | None = None
    single_epoch: bool = False
    shapes_of: PlannedBatches | None = None
    pack: int = 1

    def __len__(self) -> int:
        if self.single_epoch:
            return math.ceil(sum(self.sizes) / self.batch_size)
        return 2**40  # endless: one epoch follows another

    @property
    def sizes(self) -> list[int]:
        """Number of records used of each part."""
        return [len(part.source) if self.kept is None else len(self.kept[at]) for at, part in enumerate(self.parts)]

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`: the arrays of `collate_rows` for this process's rows, and

        records  the record of each sample, `path#number`, "" for an empty row; ids may repeat or be missing
        skipped  list of Skipped: records that planning skipped, distributed evenly over the batches of a window and
                 their rows, so that exactly one process reports each; and samples of this process that cannot be read
        """
        window = self._window(number // WINDOW)
        rows = range(self._rows) if self.rows is None else self.rows
        left_out = window.skipped[number % WINDOW :: len(window.batches)]
        skipped = [one for at, one in enumerate(left_out) if at % self._rows in rows]
        records, samples, stored, tiles, place = [], [], [], [], []
        found = self.rows_of(number)
        for at, row in enumerate([*found, *[EMPTY_ROW] * (len(rows) - len(found))]):
            for record, sample in row:
                try:
                    kept = self._nothing if self.feedback is None or not record else self._stored(sample)
                    pixels = self._tiles(sample, kept)
                except BadSample as bad:  # its place stays, empty
                    skipped.append(Skipped(record, sample.id, bad.reason, bad.detail))
                    record, sample, kept, pixels = "", EMPTY, self._nothing, self._tiles(EMPTY, self._nothing)
                for column, value in zip(
                    (records, samples, stored, tiles, place), (record, sample, kept, pixels, at), strict=True
                ):
                    column.append(value)
        stored = None if self.feedback is None else stored
        shape = self.batch_shape(number)
        batch = collate_rows(
            samples, tiles, shape, self.config, self.granularities, words=self.words, stored=stored, rows=place
        )
        return {**batch, "records": records, "skipped": skipped}

    def upcoming(self, number: int, count: int) -> list[Batch]:
        """A batch without samples for each shape of the `count` batches from `number` on, in their order.

        It looks no further than the window of batch `number`, and decodes nothing.
        """
        shapes = dict.fromkeys(self._window(number // WINDOW).shapes[number % WINDOW :][:count])
        rows = self._rows if self.rows is None else len(self.rows)
        stored = None if self.feedback is None else [self._nothing] * rows
        tiles = [self._tiles(EMPTY, self._nothing)] * rows
        return [
            collate_rows(
                [EMPTY] * rows, tiles, shape, self.config, self.granularities, words=self.words, stored=stored
            )
            for shape in shapes
        ]

    @property
    def _rows(self) -> int:
        """Rows of a batch, over all processes."""
        return self.batch_size // self.pack

    def rows_of(self, number: int) -> list[Row]:
        """This process's rows of batch `number`, without trailing empty rows; decodes nothing."""
        planned = self._window(number // WINDOW).batches[number % WINDOW]
        rows = range(self._rows) if self.rows is None else self.rows
        return [planned[at] for at in rows if at < len(planned)]

    def first(self, count: int) -> Iterator[Member]:
        """The usable records among the first `count`, in Grain's order; from one source at most one epoch."""
        for at in range(min(count, sum(self.sizes)) if self.single_epoch or len(self.parts) == 1 else count):
            member = self._read(at)
            if isinstance(member, Member):
                yield member

    def _tiles(self, sample: Sample, stored: Stored) -> np.ndarray:
        """Tiles of a sample: its pixels, or its stored features."""
        return load_tiles(sample, self.config) if stored.features is None else stored.features

    def _stored(self, sample: Sample) -> Stored:
        """Stored feedback of a sample.

        Raises:
          BadSample: `no_feedback`; `no_answer` if it was measured, but could not be answered.
        """
        try:
            kept = self.feedback[question_digest(sample)]
        except KeyError:
            raise BadSample(
                "no_feedback",
                f"sample {sample.id}, as it is now, is not in rglf.feedback: run avg-llava feedback again",
            ) from None
        if not kept.answered:
            raise BadSample("no_answer", f"sample {sample.id} could not be answered for rglf.feedback: see its images")
        return kept

    @functools.cached_property
    def _nothing(self) -> Stored:
        """Feedback of an empty row."""
        features = None if self.feedback is None else next(iter(self.feedback.values())).features
        nll = np.full(len(self.config.granularities), np.nan, np.float32)
        return Stored(nll, None if features is None else features[:0], "")

    @property
    def ladder(self) -> tuple[Shape, ...]:
        """Batch shapes of this run, cheapest first, chosen by the first SURVEY records; the last one holds them all."""
        return self._survey[0]

    @functools.cached_property
    def _survey(self) -> tuple[tuple[Shape, ...], Shape]:
        """The ladder, and a wide shape for a batch that does not fit it."""
        if self.shapes_of is not None:
            return self.shapes_of._survey
        members = list(self.first(SURVEY))
        rows = self._share(members, -(-len(members) // self.pack)) or [EMPTY_ROW]
        found = collections.Counter(self._need(row) for row in rows)
        wide = merge(self._need(row, close=False) for row in rows)
        return choose_shapes(found, self.shapes, self.saves, self.config, self.granularities), wide

    def batch_shape(self, number: int) -> Shape:
        """The shape of batch `number`: the cheapest of the ladder that holds it; where none does, a wide shape.

        Few of the records that the survey did not see are larger than all that it saw, and those share one more shape.
        """
        return self._window(number // WINDOW).shapes[number % WINDOW]

    def _need(self, row: Row, close: bool = True) -> Shape:
        """What a row needs, see `row_shape`."""
        return row_shape([member.sample for member in row], self.config, self.granularities, close)

    def _fit(self, rows: Sequence[tuple[Row, Shape]]) -> Shape:
        """The shape for these rows, given what each needs, see `batch_shape`."""
        close = merge(need for _, need in rows)
        ladder, wide = self._survey
        for rung in ladder:
            if merge([rung, close]) == rung:
                return rung
        return merge([wide, *(self._need(row, close=False) for row, _ in rows)])

    def _share(self, members: Sequence[Member], most: int) -> list[Row]:
        """At most `most` rows of these samples, none of them empty."""
        if self.pack == 1 or not members:
            return [[member] for member in members]
        finest = self.granularities[-1]
        loads = [
            (tiles_of(sample, self.config), packed_length(sample, self.config, finest), len(sample.tokens.ids))
            for _, sample in members
        ]
        return [[members[at] for at in row] for row in share_rows(np.array(loads), min(most, len(members)))]

    @functools.cached_property
    def _mixture(self) -> tuple[tuple[int, float], ...]:
        """Number of records used, and weight, of each part."""
        return tuple(zip(self.sizes, (part.weight for part in self.parts), strict=True))

    @functools.cached_property
    def _pairs(self) -> list[tuple[int, int]]:
        """Each (source, position) pair once, in order."""
        return [(which, index) for which, size in enumerate(self.sizes) for index in range(size)]

    @functools.cached_property
    def _windows(self) -> collections.OrderedDict[int, _Window]:
        return collections.OrderedDict()

    @functools.cached_property
    def _members(self) -> collections.OrderedDict[tuple[int, int], Member | Skipped]:
        """The records read last, by source and number, without their pixels."""
        return collections.OrderedDict()

    def _read(self, at: int) -> Member | Skipped:
        """The record at a position of Grain's order."""
        which, index = self._pairs[at] if self.single_epoch else _drawn(self._mixture, self.seed, at)
        index = index if self.kept is None else int(self.kept[which][index])
        member = self._members.pop((which, index), None) or self._read_record(self.parts[which], index)
        self._members[which, index] = member
        if len(self._members) > REMEMBERED:
            self._members.popitem(last=False)
        return member

    def _read_record(self, part: WeightedSource, index: int) -> Member | Skipped:
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
        read = [self._read(at) for at in range(start, min(end, sum(self.sizes)) if self.single_epoch else end)]
        shared = self._share([one for one in read if isinstance(one, Member)], count * self._rows)
        rows = [(row, self._need(row)) for row in shared]
        cost = functools.cache(lambda shape: _cost(shape, self.config, self.granularities))
        # A stable sort: rows of the same shape keep their order, which is Grain's without packing.
        rows.sort(key=lambda row: cost(self._fit([row])))
        # Skipped records shorten every batch a little, instead of emptying one.
        ends = [len(rows) * number // count for number in range(count + 1)]
        batches = [rows[start:end] for start, end in itertools.pairwise(ends)]
        random.Random(f"{self.seed}/{window}").shuffle(batches)
        shapes = [self._fit(batch or [(EMPTY_ROW, self._need(EMPTY_ROW))]) for batch in batches]
        skipped = [one for one in read if isinstance(one, Skipped)]
        return _Window([[row for row, _ in batch] for batch in batches], shapes, skipped)


def share_rows(loads: np.ndarray, count: int) -> list[list[int]]:
    """Distributes samples over `count` rows of about equal loads: the numbers of each row's samples, ascending.

    loads: (samples, kinds), not negative; tiles, packed length and text, for example, each relative to its mean. The
    largest samples come first, and each goes where it adds least to the sum over rows and kinds of load ** 4, which the
    fullest rows dominate. Every row gets a sample where there are as many. With one kind:

        loads 5 4 3 3 1, count 2  ->  [0, 3], [1, 2, 4]
    """
    loads = loads / np.maximum(loads.sum(axis=0), 1) * count
    full, rows = np.zeros((count, loads.shape[1])), [[] for _ in range(count)]
    for sample in np.argsort(-loads.sum(axis=1), kind="stable").tolist():
        row = int(np.argmin(((full + loads[sample]) ** 4 - full**4).sum(axis=1)))
        full[row] += loads[sample]
        rows[row].append(sample)
    return [sorted(row) for row in rows]


def hold_out(count: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits `count` records into training and held-out numbers, int (n,) each, ascending, the same in every run.

    Raises:
      ValueError: the share leaves no record to train on.
    """
    held = max(1, round(share * count))
    if held >= count:
        raise ValueError(f"data.validation={share} of {count} records leaves none to train on")
    order = np.random.RandomState(0).permutation(count)  # NumPy never changes this generator's numbers
    return np.sort(order[held:]), np.sort(order[:held])


@functools.lru_cache(maxsize=16)
def _order(mixture: tuple[tuple[int, float], ...], seed: int) -> grain.MapDataset:
    """Endless (source, position of a record among those used) pairs. mixture: number and weight of each source's."""
    orders = []
    for which, (size, _) in enumerate(mixture):
        indices = grain.MapDataset.range(size).seed(seed + which).shuffle().repeat()
        orders.append(indices.map(functools.partial(_pair, which)))
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, [weight for _, weight in mixture])


@functools.lru_cache(maxsize=2**16)  # Grain takes 1.5 ms for each of 24 records (findings/grain_shuffle_of_few.sh)
def _drawn(mixture: tuple[tuple[int, float], ...], seed: int, at: int) -> tuple[int, int]:
    """Pair `at` of `_order`."""
    which, index = _order(mixture, seed)[at]
    return int(which), int(index)


def _pair(source: int, index: int) -> tuple[int, int]:
    return source, index


def _cost(shape: Shape, config: ModelConfig, granularities: Sequence[int]) -> tuple[float, ...]:
    """Approximate cost of a sample of this shape: tokens through the encoder, and through the language model."""
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
    rows: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The arrays of a training batch: those of `packing.collate`, and

    visual       int32 (rows, I, G)         visual tokens of each image at each of `granularities`, 0 = no such image
    patch_words  int32 (rows, T, P, WORDS)  if `words`, of samples with a row each
    nll          float32 (rows, G)          if feedback is `stored`, NaN = none; (rows, K, G) where samples share a row
    features     (rows, T, P, D)            in place of `pixels`, if features are stored: `tiles` holds them

    With `stored` feedback no language model runs, and nothing is packed for it: `index`, `length` and `target_at` are
    empty.
    """
    rows = range(len(samples)) if rows is None else rows
    batch = collate(samples, shape, config, granularities if stored is None else (), tiles, rows)
    count = len(batch["text"])
    batch["visual"] = np.zeros((count, shape.images, len(granularities)), np.int32)
    nll = np.full((count, shape.samples, len(config.granularities)), np.nan, np.float32)
    for row, members in itertools.groupby(range(len(samples)), key=lambda at: rows[at]):
        image = 0
        for place, at in enumerate(members):
            sizes = samples[at].sizes
            for size in sizes:
                batch["visual"][row, image] = [visual_count(size, config.of(len(sizes)), g) for g in granularities]
                image += 1
            if stored is not None:
                nll[row, place] = stored[at].nll
    if words:
        batch["patch_words"] = collate_words(samples, shape.tiles, config)
    if stored is not None:
        batch["nll"] = nll if shape.samples > 1 else nll[:, 0]
        if stored[0].features is not None:
            batch["features"] = batch.pop("pixels")
    return batch


def saving(steps: int) -> float:
    """The share of a run's work that one more batch shape must save, see `choose_shapes`.

    >>> saving(100), saving(5000)
    (0.2, 0.02)
    """
    return max(LEAST_SAVED, COMPILE_STEPS / steps)


def choose_shapes(
    found: dict[Shape, int], limit: int, saves: float, config: ModelConfig, granularities: Sequence[int]
) -> tuple[Shape, ...]:
    """Chooses at most `limit` shapes, cheapest first, such that each shape in `found` fits one with little padding.

    found: number of occurrences of each shape. Starting from all shapes, the pair whose merge adds the least cost is
    merged until `limit` are left and the next merge would add at least the share `saves` of the whole cost. The last is
    the merge of all, so any batch fits.

    Raises ValueError if `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"data.shapes={limit}: at least one shape is needed")
    cost = functools.cache(lambda shape: _cost(shape, config, granularities)[0])
    rungs = dict(found) or {Shape(1, 1, 16, 16, 0.0): 1}
    rungs.setdefault(merge(rungs), 0)
    least = saves * sum(count * cost(shape) for shape, count in rungs.items())
    number, queue = itertools.count(), []  # pairs, those first whose merge costs the least more

    def offer(one: Shape, other: Shape) -> None:
        both = merge((one, other))
        more = rungs[one] * (cost(both) - cost(one)) + rungs[other] * (cost(both) - cost(other))
        heapq.heappush(queue, (more, next(number), one, other, rungs[one], rungs[other], both))

    for one, other in itertools.combinations(list(rungs), 2):
        offer(one, other)
    while len(rungs) > 1:
        more, _, one, other, *counts, both = heapq.heappop(queue)
        if [rungs.get(one), rungs.get(other)] != counts:
            continue  # one of them was merged since
        if len(rungs) <= limit and more >= least:
            break
        del rungs[one], rungs[other]
        rungs[both] = rungs.get(both, 0) + sum(counts)
        for each in list(rungs):
            if each != both:
                offer(both, each)
    return tuple(sorted(rungs, key=lambda shape: _cost(shape, config, granularities)))


class Batches:
    """An endless iterator over `PlannedBatches`; a thread or worker processes prefetch.

    Its state is {"next_batch": n}; `set_state` resumes there.
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
        _ = self.planned.ladder  # computed before the workers copy it, so that they do not survey again
        batches = grain.MapDataset.source(self.planned).slice(slice(start, None))
        # One thread: each window is planned once, and Python code gains nothing from more threads.
        read = batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        if not self.workers:
            return read
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags, which only app.run parses
            flags.FLAGS.mark_as_parsed()
        return read.mp_prefetch(grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2))

    def get_state(self) -> dict[str, int]:
        """Position of the iterator: {"next_batch": n}."""
        return {"next_batch": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Resume at a position that `get_state` returned."""
        self.close()
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Stop prefetching."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None and hasattr(iterator, "close"):
            iterator.close()
