"""What the engine compiles: pure functions of (config, params, arrays), every one of static shape.

    pixels --see--> pool                         pyramids of tiles, one page each, kept for later requests
    pool, text --route--> router scores          an image a row
    cache --near--> keys, values                 of a slot's first positions, for the next chunk to be read behind them
    pool, ids, places --prefill--> cache, logits a chunk of a prompt into its slot
    logits --first--> token                      of the answer
    cache --decode--> cache, tokens              several rows, several steps
    cache --copy--> cache                        the beginning that two prompts share, from slot to slot

The KV cache (layers, slots, capacity, kv_heads, head_dim) and the pool (pages, R, D) are donated: updated in place,
never copied. What a padding row writes is dropped. Where there are as many rows as slots, row i is slot i, so that
each device of a mesh reads and writes its own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.inference import generate
from avg_llava_jax.inference.buckets import STEPS
from avg_llava_jax.inference.generate import Sampling
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.attention import on_one_cpu
from avg_llava_jax.models.avg_llava import Params
from avg_llava_jax.models.language import KeyValues, positions_of
from avg_llava_jax.parallel import sharding
from avg_llava_jax.parallel.placement import constrain


class Chunk(NamedTuple):
    """Parts of prompts, one a row (B,), each of at most c positions.

    slot, start, length: int (B,): positions start .. start + length - 1 of this slot's prompt.
    ids: int (B, c) text tokens. places: int (B, c), see `places_of`.
    """

    slot: jax.Array
    start: jax.Array
    length: jax.Array
    ids: jax.Array
    places: jax.Array


class Rows(NamedTuple):
    """Answers in the middle: int (B,) each.

    slot; last: the newest token, which is not in the cache; cached: positions that are; count: tokens generated.
    """

    slot: jax.Array
    last: jax.Array
    cached: jax.Array
    count: jax.Array


TEXT = -1
"""A place that is a text token. Page p's pyramid row r is p * R + r, and pages * R the newline."""


@functools.partial(sharding.jit, static_argnums=(0, 2, 3, 4))
def empty(config: ModelConfig, params: Params, slots: int, capacity: int, pages: int) -> tuple[KeyValues, jax.Array]:
    """A cache and a pool of zeros, of the dtypes that the model computes in."""
    side = config.vision.image_size
    pixels, ids = jnp.zeros((1, 1, side, side, 3), jnp.uint8), jnp.zeros((1, 1), jnp.int32)
    pyramid = jax.eval_shape(functools.partial(avg_llava.pyramid_of, config), params, pixels)
    text = jax.eval_shape(functools.partial(avg_llava.embed, config), params, ids)
    _, new = jax.eval_shape(functools.partial(avg_llava.language, config), params, text)
    cache = (jnp.zeros((part.shape[0], slots, capacity, *part.shape[3:]), part.dtype) for part in new)
    return generate.spread(KeyValues(*cache)), _pooled(jnp.zeros((pages, *pyramid.shape[2:]), pyramid.dtype))


@functools.partial(sharding.jit, static_argnums=0, donate_argnums=2)
def see(config: ModelConfig, params: Params, pool: jax.Array, pixels: jax.Array, pages: jax.Array) -> jax.Array:
    """Encode tiles, of whatever images, into their pages: uint8 (M, H, W, 3), int (M,)."""
    pyramid = avg_llava.pyramid_of(config, params, pixels[:, None])[:, 0]
    return _pooled(pool.at[pages].set(constrain(pyramid, None, None, None), mode="drop"))


@functools.partial(sharding.jit, static_argnums=0)
def route(
    config: ModelConfig, params: Params, pool: jax.Array, pages: jax.Array, text: jax.Array, count: jax.Array
) -> jax.Array:
    """Score the granularities of images, one a row: fp32 (B, G).

    pages: int (B, T), -1 behind the image's last tile. text: int (B, L), all of the prompt's, `count` (B,) real.
    An image is scored by its own tiles and the prompt, so those of one request need not stand together.
    """
    batch = {
        "tile_image": jnp.where(pages < 0, -1, 0),
        "first_tile": jnp.zeros((len(pages), 1), jnp.int32),
        "instruction": jnp.arange(text.shape[1]) < count[:, None],
    }
    pyramid = _taken(pool, pages)
    return avg_llava.route(config, params, pyramid, avg_llava.embed(config, params, text), batch).logits[:, 0]


@functools.partial(sharding.jit, static_argnums=(0, 4))
def near(config: ModelConfig, params: Params, cache: KeyValues, slot: jax.Array, window: int) -> KeyValues:
    """What `prefill` reads of the cache: the first `window` positions of the slots (B,).

    A program of its own: within the one that writes the cache, XLA on a CPU copies all of it.
    """
    return generate.spread(_near(cache, slot, window))


@functools.partial(sharding.jit, static_argnums=0, donate_argnums=2)
def prefill(
    config: ModelConfig,
    params: Params,
    cache: KeyValues,
    pool: jax.Array,
    chunk: Chunk,
    before: KeyValues | None,
) -> tuple[KeyValues, jax.Array]:
    """Read one chunk of each row's prompt into its slot, behind `start` positions that are among those of `near`.

    before: None where prompts are read from their start.

    Returns the cache, and the logits (B, V) at the chunk's last position.
    """
    x = assemble(config, params, pool, chunk.ids, chunk.places)
    behind = () if before is None else (chunk.start[:, None] + jnp.arange(x.shape[1]), before, chunk.start)
    logits, new = generate.last_logits(config, params, x, chunk.length, *behind)
    return _written(cache, new, chunk.slot, chunk.start, chunk.length), logits


@functools.partial(sharding.jit, static_argnums=0)
def first(config: ModelConfig, params: Params, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The first token (B,) of answers, by the logits (B, V) at the end of their prompts."""
    return generate.sample(logits, sampling, jnp.zeros_like(sampling.limit), False)


def assemble(config: ModelConfig, params: Params, pool: jax.Array, ids: jax.Array, places: jax.Array) -> jax.Array:
    """Embeddings (B, c, D) of prompt positions: text by `ids`, newlines and visual tokens by `places`."""
    rows = pool.reshape(-1, pool.shape[-1])
    text = avg_llava.embed(config, params, ids)
    newline = params["image_newline"].astype(text.dtype)
    visual = jnp.where((places == len(rows))[..., None], newline, _taken(rows, places).astype(text.dtype))
    return jnp.where((places == TEXT)[..., None], text, visual)


@functools.partial(sharding.jit, static_argnums=(0, 7), donate_argnums=2)
def decode(
    config: ModelConfig,
    params: Params,
    cache: KeyValues,
    rows: Rows,
    sampling: Sampling,
    stops: jax.Array,
    steps: jax.Array,
    window: int,
) -> tuple[KeyValues, jax.Array, jax.Array]:
    """Generate at most `steps` (a traced scalar, up to STEPS) tokens for each row.

    The rows' windows are taken out of the cache once for all steps, and only what is new is written back.
    `window` holds what is cached and STEPS positions more.

    Returns the cache, tokens (B, STEPS), and how many of them are real (B,).
    """
    row = jnp.arange(len(rows.slot))
    tokens = jnp.zeros((len(row), cache.k.shape[2]), jnp.int32).at[row, jnp.maximum(rows.count - 1, 0)].set(rows.last)
    begun = generate.State(
        generate.cache_for(params, _near(cache, rows.slot, window)),
        rows.cached,
        tokens,
        rows.count,
        rows.count >= sampling.limit,
    )
    end = generate.advance(config, params, begun, sampling, stops, steps, False)

    ahead = jnp.arange(STEPS)
    made = end.count - rows.count
    new = positions_of(end.cache, rows.cached[:, None] + ahead)
    tokens = jnp.take_along_axis(end.tokens, rows.count[:, None] + ahead, axis=1, mode="clip")
    return _written(cache, new, rows.slot, rows.cached, made), tokens, made


@functools.partial(sharding.jit, static_argnums=(0, 5), donate_argnums=2)
def copy(
    config: ModelConfig, params: Params, cache: KeyValues, source: jax.Array, target: jax.Array, window: int
) -> KeyValues:
    """The first `window` positions of slot `source` (1,) into slot `target` (1,)."""
    return generate.spread(
        KeyValues(*(part.at[:, target, :window].set(part.at[:, source, :window].get(mode="clip")) for part in cache))
    )


def _in_place(slot: jax.Array, slots: int) -> bool:
    """Whether row i is read and written as slot i; not on one CPU, where that takes five times as long as by number."""
    return len(slot) == slots and not on_one_cpu()


def _near(cache: KeyValues, slot: jax.Array, window: int) -> KeyValues:
    """The first `window` positions of some slots: (layers, B, window, kv_heads, head_dim)."""
    if _in_place(slot, cache.k.shape[1]):
        return KeyValues(cache.k[:, :, :window], cache.v[:, :, :window])
    return KeyValues(*(part.at[:, slot, :window].get(mode="clip") for part in cache))


def _written(cache: KeyValues, new: KeyValues, slot: jax.Array, start: jax.Array, length: jax.Array) -> KeyValues:
    """The cache with the first `length` (B,) of new (layers, B, S, ...) at `start` (B,) of each row's slot."""
    slots, capacity = cache.k.shape[1:3]
    ahead = jnp.arange(new.k.shape[2])
    at = jnp.where(ahead < length[:, None], start[:, None] + ahead, capacity)

    def write(old: jax.Array, fresh: jax.Array) -> jax.Array:
        if _in_place(slot, slots):

            def one(old: jax.Array, fresh: jax.Array, at: jax.Array) -> jax.Array:
                return old.at[:, at].set(fresh, mode="drop")

            return jax.vmap(one, in_axes=(1, 1, 0), out_axes=1)(old, fresh.astype(old.dtype), at)
        return old.at[:, slot[:, None], at].set(fresh.astype(old.dtype), mode="drop")

    return generate.spread(KeyValues(write(cache.k, new.k), write(cache.v, new.v)))


def _pooled(pool: jax.Array) -> jax.Array:
    """Pages lie on every device, each with a part of the width."""
    return constrain(pool, None, None, "width")


def _taken(rows: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of the pool, at (B, n): gathered where they lie, then as a whole, and then each sample where it runs."""
    taken = rows.at[constrain(jnp.maximum(at, 0), None, None)].get(mode="clip")
    for axes in ((None, "width"), (None, None), ("batch", None)):
        taken = constrain(taken, axes[0], *[None] * (taken.ndim - 2), axes[1])
    return taken
