"""The engine's arrays on the device, and the calls that bring NumPy values to the sizes of the compiled programs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from avg_llava_jax.inference import programs
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.buckets import Ladders, rung
from avg_llava_jax.inference.generate import Sampling
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.parallel import placement


class Part(NamedTuple):
    """A part of a prompt to read: positions from `start` of a slot. `ends`: whether the prompt ends with it."""

    slot: int
    start: int
    ids: np.ndarray
    places: np.ndarray
    ends: bool
    request: Request


class Growing(NamedTuple):
    """An answer of `count` tokens, of which `last` is the newest and not cached, and `limit` the most."""

    slot: int
    last: int
    cached: int
    count: int
    limit: int
    request: Request


def lanes_of(model: AvgLlava) -> int:
    """Parts that the batch axis of the model's mesh has; 1 without a mesh."""
    at = model.params["image_newline"].sharding
    if not isinstance(at, NamedSharding):
        return 1
    return int(np.prod([at.mesh.shape[axis] for axis in placement.MESH_AXES["batch"]]))


def page_bytes(model: AvgLlava) -> int:
    """What the pyramid of one tile takes in the pool."""
    _, pool = jax.eval_shape(lambda params: programs.empty.__wrapped__(model.config, params, 1, 1, 1), model.params)
    return pool.size * pool.dtype.itemsize


class Device:
    """A KV cache and a pool of pyramids. Every method runs one compiled program of a size out of the ladders."""

    def __init__(self, model: AvgLlava, ladders: Ladders):
        self.model, self.ladders = model, ladders
        self._stops = np.array(model.stop_ids, np.int32)
        self.reset()

    def reset(self) -> None:
        """Forget everything: after a failure the donated arrays may be gone."""
        sizes = self.ladders
        arrays = programs.empty(*self._model, sizes.slots, sizes.capacity, sizes.pages)
        # Bound to their devices, as what the programs return is: otherwise those that come first compile twice.
        self._cache, self._pool = jax.device_put(arrays, jax.tree.map(lambda array: array.sharding, arrays))

    @property
    def _model(self) -> tuple:
        return self.model.config, self.model.params

    def warm_up(self) -> int:
        """Run every program once, on rows that write nothing; returns how many there are."""
        sizes, side = self.ladders, self.model.config.vision.image_size
        tile = np.zeros((side, side, 3), np.uint8)
        runs = [
            *(partial(self.see, [tile] * count, [sizes.pages] * count) for count in sizes.tiles),
            *(
                partial(self.route, [[0]] * images, [np.zeros(text, np.int32)] * images)
                for images, text in sizes.routes
            ),
            *(partial(self.prefill, [], chunk, window) for chunk, window in sizes.prefills),
            *(partial(self.decode, [], rows, window, 0) for rows, window in sizes.decodes),
            *(partial(self.copy, 0, 0, window) for window in sizes.windows),
        ]
        for run in tqdm(runs, desc="compiling the engine", unit="program"):
            run()
        jax.block_until_ready((self._cache, self._pool))
        own = sum(map(len, (sizes.tiles, sizes.routes, sizes.prefills, sizes.decodes)))
        return 2 + own + 2 * len(sizes.windows)  # `near` and `copy` have one each

    def see(self, tiles: Sequence[np.ndarray], pages: Sequence[int]) -> None:
        """Encode tiles (H, W, 3), at most the largest rung of them, into pages."""
        count = rung(self.ladders.tiles, len(tiles))
        pixels = np.zeros((count, *tiles[0].shape), np.uint8)
        pixels[: len(tiles)] = tiles
        at = np.full(count, self.ladders.pages, np.int32)
        at[: len(pages)] = pages
        self._pool = programs.see(*self._model, self._pool, pixels, at)

    def route(self, pages: Sequence[Sequence[int]], texts: Sequence[np.ndarray]) -> np.ndarray:
        """Router scores (images, G): of each image the pages of its tiles and the ids of its prompt's text."""
        count = rung(self.ladders.images, len(pages))
        at = np.full((count, self.ladders.image_tiles), -1, np.int32)
        text = np.zeros((count, rung(self.ladders.texts, max(map(len, texts)))), np.int32)
        lengths = np.zeros(count, np.int32)
        for row, (own, ids) in enumerate(zip(pages, texts, strict=True)):
            at[row, : len(own)], text[row, : len(ids)], lengths[row] = own, ids, len(ids)
        scores = programs.route(*self._model, self._pool, at, text, lengths)
        return np.array(scores)[: len(pages)]  # a copy: rows of the device's own array would keep it there

    def prefill(self, parts: Sequence[Part], chunk: int, window: int) -> list[int] | None:
        """Read parts of prompts; the token that follows each of them, None where no prompt ends here."""
        count = self.ladders.lanes
        rows = self._rows([part.slot for part in parts], count)
        slot, start, length = (np.zeros(count, np.int32) for _ in range(3))
        ids, places = np.zeros((count, chunk), np.int32), np.full((count, chunk), programs.TEXT, np.int32)
        for row, part in zip(rows, parts, strict=True):
            slot[row], start[row], length[row] = part.slot, part.start, len(part.ids)
            ids[row, : len(part.ids)], places[row, : len(part.ids)] = part.ids, part.places
        arrays = programs.Chunk(slot, start, length, ids, places)
        before = programs.near(*self._model, self._cache, slot, window) if window else None
        self._cache, logits = programs.prefill(*self._model, self._cache, self._pool, arrays, before)
        if parts and not any(part.ends for part in parts):
            return None  # and the host need not wait
        sampling = _sampling(count, rows, [part.request for part in parts], [1] * len(parts))
        return np.asarray(programs.first(*self._model, logits, sampling))[rows].tolist()

    def decode(self, answers: Sequence[Growing], count: int, window: int, steps: int) -> list[list[int]]:
        """The next tokens of each answer, at most `steps`, in `count` rows."""
        rows = self._rows([answer.slot for answer in answers], count)
        state = np.zeros((4, count), np.int32)
        for row, answer in zip(rows, answers, strict=True):
            state[:, row] = answer.slot, answer.last, answer.cached, answer.count
        sampling = _sampling(count, rows, [a.request for a in answers], [a.limit for a in answers])
        self._cache, tokens, made = programs.decode(
            self.model.config,
            self.model.decoding,
            self._cache,
            programs.Rows(*state),
            sampling,
            self._stops,
            np.int32(steps),
            window,
        )
        tokens, made = jax.device_get((tokens, made))
        return [tokens[row, : made[row]].tolist() for row in rows]

    def copy(self, source: int, target: int, window: int) -> None:
        """The first `window` positions of one slot into another."""
        self._cache = programs.copy(
            *self._model, self._cache, np.array([source], np.int32), np.array([target], np.int32), window
        )

    def _rows(self, slots: list[int], count: int) -> list[int]:
        """The row of each slot among `count`: the slot's own where there are as many."""
        return slots if count == self.ladders.slots else list(range(len(slots)))


def _sampling(count: int, rows: Sequence[int], requests: Sequence[Request], limits: Sequence[int]) -> Sampling:
    """Each row's way to pick tokens; rows without a request generate none."""
    temperature, top_p = np.zeros(count, np.float32), np.ones(count, np.float32)
    top_k, seed, limit = np.zeros(count, np.int32), np.zeros(count, np.uint32), np.zeros(count, np.int32)
    for row, request, most in zip(rows, requests, limits, strict=True):
        temperature[row], top_p[row], top_k[row] = request.temperature, request.top_p, request.top_k
        seed[row], limit[row] = request.seed, most
    return Sampling(temperature, top_p, top_k, seed, limit)
