"""The engine's cache and pool on the device, and the calls that pad NumPy arrays to the buckets of its programs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from avg_llava_jax import placement
from avg_llava_jax.inference import programs
from avg_llava_jax.inference.buckets import STEPS, Buckets, bucket
from avg_llava_jax.inference.model import Model
from avg_llava_jax.inference.programs import Sampling, Scores, Shaping
from avg_llava_jax.inference.requests import TokenScore
from avg_llava_jax.inference.sampling import Next, sampling_of, scored, shaping_of
from avg_llava_jax.models.router import Routing
from avg_llava_jax.parallel import sharding


class PromptChunk(NamedTuple):
    """A chunk of one prompt to prefill: ids, places int32 (n,), for positions start .. start + n - 1 of a slot.

    weights: None, or float32 (n, 4) with places (n, 4), see `programs.Chunk`.
    then: what its first token depends on; None if more of the prompt follows. adapter: its number, see `stacked`.
    """

    slot: int
    start: int
    ids: np.ndarray
    places: np.ndarray
    weights: np.ndarray | None
    then: Next | None
    adapter: int = 0


class Answering(NamedTuple):
    """An answer to decode further. cached: the number of its cached positions, all but its newest token."""

    slot: int
    cached: int
    then: Next
    adapter: int = 0


class Prefilled(NamedTuple):
    """The result of a prefill: what `programs.prefill` returns for all rows, and the row of each part.

    first: the token of the last position, its log-probability and its scores, if an answer is not greedy.
    """

    logits: jax.Array
    tokens: jax.Array
    logprobs: jax.Array
    first: tuple[jax.Array, jax.Array, Scores] | None
    rows: list[int]

    @property
    def scores(self) -> Scores | None:
        """Scores (prompts, 1) of the last position."""
        return self.first and self.first[2]

    def fetch(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (prompts, predicted) and their log-probabilities, once the device has predicted them."""
        found, first = jax.device_get(((self.tokens, self.logprobs), self.first and self.first[:2]))
        if first is None:
            return found
        return tuple(np.concatenate([part[:, :-1], last], axis=1) for part, last in zip(found, first, strict=True))


class Decoded(NamedTuple):
    """Answers that decode, each in the row of its slot, and what `programs.decode` returns for all rows.

    tokens, logprobs: (rows, STEPS). counts: (rows,), how many of them are real.
    """

    answers: Sequence[Answering]
    tokens: jax.Array
    logprobs: jax.Array
    counts: jax.Array
    scores: Scores | None

    def fetch(self) -> tuple[list[list[int]], list[list[float]], list[list[TokenScore]]]:
        """The tokens of each answer, their log-probabilities and their scores, once the device has decoded them."""
        tokens, logprobs, counts = jax.device_get((self.tokens, self.logprobs, self.counts))
        rows = [answer.slot for answer in self.answers]
        found, likely = ([part[row, : counts[row]].tolist() for row in rows] for part in (tokens, logprobs))
        wanted = [
            scored(answer.then, self.scores, answer.slot, ids) for answer, ids in zip(self.answers, found, strict=True)
        ]
        return found, likely, wanted


def batch_shards_of(model: Model) -> int:
    """The number of parts of the mesh's batch axis, `data` x `fsdp`; 1 without a mesh."""
    at = model.params["image_newline"].sharding
    if not isinstance(at, NamedSharding):
        return 1
    return int(np.prod([at.mesh.shape[axis] for axis in placement.MESH_AXES["batch"]]))


def page_bytes(model: Model) -> int:
    """Bytes of a page of the pool: the pyramid (R, D) of one tile."""
    return model.config.pyramid_rows * model.config.language.width * model.params["image_newline"].dtype.itemsize


class _Compiled(Exception):
    """Ends a call after its program is compiled, so that it does not run."""


class Device:
    """A KV cache and a pool of pyramids. A method pads its arguments to buckets and runs one compiled program."""

    def __init__(self, model: Model, buckets: Buckets):
        self.model, self.buckets = model, buckets
        self._model = model.config, model.unstacked
        self._several = bool(model.adapters.names)
        self._stops = np.array(model.stop_ids, np.int32)
        sizes = {*buckets.prompts, *buckets.rows}
        self._neutral: dict[int, Shaping] = {size: jax.device_put(self._shaping(size)) for size in sizes}
        self.reset()

    def reset(self) -> None:
        """Recreate cache and pool, empty: after a failure the donated arrays may be gone."""
        self._cache = self._pool = None  # frees them before the new ones are made
        sizes = self.buckets
        arrays = programs.empty(*self._model, sizes.slots, sizes.capacity, sizes.pages)
        # Committed to their devices, as the programs' results are: otherwise the first programs compile twice.
        self._cache, self._pool = jax.device_put(arrays, jax.tree.map(lambda array: array.sharding, arrays))

    def warm_up(self) -> None:
        """Compile every program by running it once, on padding rows that write nothing."""
        sizes, side = self.buckets, self.model.config.vision.image_size
        tile = np.zeros((side, side, 3), np.uint8)
        runs = [
            *(partial(self.encode, [tile] * count, [sizes.pages] * count) for count in sizes.tiles),
            *(
                partial(self.route, [[0]] * images, [np.zeros(text, np.int32)] * images)
                for images, text in sizes.routes
            ),
            *(partial(self.prefill, [], *size) for size in sizes.prefills),
            *(partial(self.decode, [], rows, window, 0) for rows, window in sizes.decodes),
            *(partial(self.copy, [], window) for window in sizes.windows),
        ]
        with (
            ThreadPoolExecutor(sharding.COMPILERS) as pool,
            tqdm(total=len(runs), desc="compiling the engine", unit="program") as progress,
        ):
            for _ in pool.map(self._compile, runs):
                progress.update()
        for run in runs:
            run()
        for prompts in sizes.prompts:  # compiled here, since it takes what a prefill returns
            self._first(self.prefill([], prompts, *sizes.prefills[0][1:]).logits, [], [])
        jax.block_until_ready((self._cache, self._pool))

    def _compile(self, run: partial) -> None:
        """Compile the program of a call of one of the methods, without running it."""

        def compile(program: Callable[..., Any], *arguments: Any) -> None:
            program.compile(*self._model, *arguments)
            raise _Compiled

        beside = copy.copy(self)
        beside._call = compile
        with contextlib.suppress(_Compiled):
            run.func.__func__(beside, *run.args)

    def _call(self, program: Callable[..., Any], *arguments: Any) -> Any:
        return program(*self._model, *arguments)

    def encode(self, tiles: Sequence[np.ndarray], pages: Sequence[int], adapter: int = 0) -> None:
        """Encode tiles uint8 (H, W, 3) into pages; there are at most `buckets.tiles[-1]` tiles, all of one adapter."""
        count = bucket(self.buckets.tiles, len(tiles))
        pixels = np.zeros((count, *tiles[0].shape), np.uint8)
        pixels[: len(tiles)] = tiles
        at = np.full(count, self.buckets.pages, np.int32)
        at[: len(pages)] = pages
        self._pool = self._call(programs.encode, self._pool, pixels, at, self._number(adapter))

    def _number(self, adapter: int | np.ndarray) -> np.ndarray | None:
        """What programs take as `adapter`."""
        return np.asarray(adapter, np.int32) if self._several else None

    def route(self, pages: Sequence[Sequence[int]], texts: Sequence[np.ndarray], adapter: int = 0) -> Routing:
        """Score images, one per row: the pages of its tiles and the text ids (n,) of its prompt; all of one adapter.

        Rows after the last image hold garbage.
        """
        count = bucket(self.buckets.images, len(pages))
        at = np.full((count, self.buckets.image_tiles), -1, np.int32)
        text = np.zeros((count, bucket(self.buckets.texts, max(map(len, texts)))), np.int32)
        lengths = np.zeros(count, np.int32)
        for row, (own, ids) in enumerate(zip(pages, texts, strict=True)):
            at[row, : len(own)], text[row, : len(ids)], lengths[row] = own, ids, len(ids)
        return self._call(programs.route, self._pool, at, text, lengths, self._number(adapter))

    def prefill(self, parts: Sequence[PromptChunk], prompts: int, chunk: int, window: int, predicted: int) -> Prefilled:
        """Prefill chunks of prompts.

        prompts, chunk, window: buckets, at least the number of parts, their longest, and their last position + 1.
        predicted: see `Buckets.predicted`.
        """
        # With several shards row i is slot i, so that each device reads and writes its own slots.
        by_slot = self.buckets.batch_shards > 1
        rows = [part.slot for part in parts] if by_slot else list(range(len(parts)))
        slot, start = np.full(prompts, self.buckets.slots, np.int32), np.full(prompts, self.buckets.capacity, np.int32)
        length, adapter = np.zeros((2, prompts), np.int32)
        corners = (4,) if self.model.config.most_tiles else ()
        ids = np.zeros((prompts, chunk), np.int32)
        places = np.full((prompts, chunk, *corners), programs.TEXT, np.int32)
        weights = np.zeros(places.shape, np.float32) if corners else None
        for row, part in zip(rows, parts, strict=True):
            slot[row], start[row], length[row], adapter[row] = part.slot, part.start, len(part.ids), part.adapter
            ids[row, : len(part.ids)], places[row, : len(part.ids)] = part.ids, part.places
            if weights is not None:
                weights[row, : len(part.ids)] = part.weights
        arrays = programs.Chunk(None if by_slot else slot, start, length, ids, places, weights, self._number(adapter))
        self._cache, *found = self._call(programs.prefill, self._cache, self._pool, arrays, window, predicted)
        at, ended = [row for row, part in zip(rows, parts, strict=True) if part.then], [p.then for p in parts if p.then]
        greedy = all(answer.greedy for answer in ended)
        return Prefilled(*found, None if greedy else self._first(found[0], at, ended), rows)

    def _first(
        self, logits: jax.Array, rows: Sequence[int], answers: Sequence[Next]
    ) -> tuple[jax.Array, jax.Array, Scores]:
        return self._call(programs.first, logits, self._sampling(len(logits), rows, answers), self._stops)

    def decode(self, answers: Sequence[Answering], rows: int, window: int, steps: int) -> Decoded:
        """Decode at most `steps` tokens of each answer by the program of the first `rows` slots."""
        at, then = [answer.slot for answer in answers], [answer.then for answer in answers]
        *state, adapter = columns = np.zeros((4, rows), np.int32)
        for answer in answers:
            columns[:, answer.slot] = answer.then.tokens[-1], answer.cached, len(answer.then.tokens), answer.adapter
        sampling = self._sampling(rows, at, then)
        greedy = self.buckets.on_demand and all(answer.greedy for answer in then)
        sizes = STEPS, window, greedy
        self._cache, *decoded = self._call(
            programs.decode,
            self._cache,
            programs.Rows(*state, self._number(adapter)),
            sampling,
            self._stops,
            np.int32(steps),
            *sizes,
        )
        return Decoded(answers, *decoded)

    def _sampling(self, count: int, rows: Sequence[int], answers: Sequence[Next]) -> Sampling:
        plain = not any(answer.shaped or answer.scored for answer in answers)
        shaping = self._neutral[count] if plain else self._shaping(count, rows, answers)
        return sampling_of(count, rows, answers, shaping)

    def _shaping(self, count: int, rows: Sequence[int] = (), answers: Sequence[Next] = ()) -> Shaping:
        return shaping_of(count, rows, answers, self.model.config.language.vocab_size, self.buckets.capacity)

    def copy(self, places: Sequence[tuple[int, int]], window: int) -> None:
        """Copy the first `window` positions of slots to other slots, (source, target) each.

        All sources are read before any target is written.
        """
        source, target = np.zeros((2, self.buckets.prompts[-1]), np.int32)
        target[:] = self.buckets.slots
        for row, pair in enumerate(places):
            source[row], target[row] = pair
        self._cache = self._call(programs.copy, self._cache, source, target, window)
