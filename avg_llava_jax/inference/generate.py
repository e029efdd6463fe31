"""Answers on the device: pure, compiled functions of (config, params, arrays) with static shapes.

    pixels, text --see_and_route--> pyramid, routing        (B, T, I, L) are static
    pyramid, text, index --pack--> embeddings               S is one rung of a small ladder
    embeddings --prefill--> last logits, KV cache           cache capacity C = S + N
      where several prompts begin alike, instead
    embeddings --begin--> KV cache                          of each beginning once, U rows of S1
    KV cache, rests --read_on--> last logits, KV cache      B rows, each behind its beginning: C = S1 + S2 + N
    logits --start--> first token --decode--> tokens        a loop on the device, N tokens at most

What varies from request to request (lengths, temperatures, seeds, limits) is an array with one entry
a row, so requests share programs, and a row's tokens do not depend on its neighbours.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava
from avg_llava_jax.models.attention import HeadsFirst, on_one_cpu
from avg_llava_jax.models.language import KeyValues, apart, extend, layer_by_layer, read
from avg_llava_jax.models.router import Routing
from avg_llava_jax.parallel import sharding
from avg_llava_jax.parallel.placement import constrain

SMALLEST_LENGTH, FINER_FROM = 32, 256
SMALLEST_REST = 16
SMALLEST_ROOM = 16


class Sampling(NamedTuple):
    """How each row picks its tokens; every field has shape (B,).

    temperature: float, 0 = greedy. top_p: float in (0, 1], 1 = off. top_k: int, 0 = off.
    seed: uint32; the n-th token of a row depends on its seed and n alone.
    limit: int, tokens to generate at most; 0 for a padding row.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    seed: jax.Array
    limit: jax.Array


class State(NamedTuple):
    """A batch in the middle of its answers.

    cache: capacity C, of which the first `cached` (B,) entries are real; `apart` where the layers that read it are.
    tokens: int (B, N), the first `count` (B,) are generated; a stop id ends a row and is kept.
    done: bool (B,).
    """

    cache: KeyValues | list[HeadsFirst]
    cached: jax.Array
    tokens: jax.Array
    count: jax.Array
    done: jax.Array


def length_bucket(length: int, limit: int, smallest: int = SMALLEST_LENGTH) -> int:
    """The static length S for a packed prompt: 32, 48, 64, 96, ... 256, 320, 384, 448, 512, 640, ..., at most `limit`.

    Two rungs an octave, and four where padding costs more than compiling: above the first rung less than a third, or a
    fifth, is padding.
    smallest: the first rung, a power of two.

    >>> [length_bucket(n, 4096) for n in (1, 65, 97, 400, 3000, 4000)]
    [32, 96, 128, 448, 3072, 4096]
    """
    octave = smallest
    while 2 * octave < length:
        octave *= 2
    step = octave // (4 if octave >= FINER_FROM else 2)
    rung = octave + step * math.ceil(max(0, length - octave) / step)
    return max(length, min(rung, limit))


def room_bucket(new_tokens: int) -> int:
    """The static number of new tokens N: 16, 64, 256, 1024, ..."""
    rung = SMALLEST_ROOM
    while rung < new_tokens:
        rung *= 4
    return rung


@functools.partial(sharding.jit, static_argnums=0)
def see(config: ModelConfig, params: avg_llava.Params, pixels: jax.Array) -> jax.Array:
    """Encode every tile once, where nothing is left to route: uint8 (B, T, H, W, 3) -> pyramid (B, T, R, D)."""
    return avg_llava.pyramid_of(config, params, pixels)


@functools.partial(sharding.jit, static_argnums=0)
def see_and_route(
    config: ModelConfig, params: avg_llava.Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, Routing]:
    """Encode every tile once and score the granularities of every image.

    `batch` holds pixels uint8 (B, T, H, W, 3), tile_image (B, T), first_tile (B, I), text int (B, L) and
    instruction bool (B, L), as `packing.collate` makes them. Returns the pyramid (B, T, R, D) and the routing.
    """
    pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
    text = avg_llava.embed(config, params, batch["text"])
    return pyramid, avg_llava.route(config, params, pyramid, text, batch)


@functools.partial(sharding.jit, static_argnums=0)
def route(config: ModelConfig, params: avg_llava.Params, pyramid: jax.Array, batch: dict[str, jax.Array]) -> Routing:
    """`see_and_route` of images that are encoded already: pyramid (B, T, R, D), the batch without its pixels."""
    return avg_llava.route(config, params, pyramid, avg_llava.embed(config, params, batch["text"]), batch)


@functools.partial(sharding.jit, static_argnums=0)
def pack(
    config: ModelConfig, params: avg_llava.Params, pyramid: jax.Array, text: jax.Array, index: jax.Array
) -> jax.Array:
    """pyramid (B, T, R, D), text ids (B, L), index (B, S) -> packed embeddings (B, S, D)."""
    return avg_llava.assemble(params, pyramid, avg_llava.embed(config, params, text), index)


@functools.partial(sharding.jit, static_argnums=(0, 4))
def prefill(
    config: ModelConfig, params: avg_llava.Params, embeds: jax.Array, length: jax.Array, room: int
) -> tuple[jax.Array, KeyValues]:
    """Read right-padded prompts: embeddings (B, S, D), real lengths (B,).

    Returns the logits (B, V) at each row's last position, and a KV cache of capacity S + room.
    """
    logits, cache = last_logits(config, params, embeds, length)
    return logits, _with_room(cache, room)


@functools.partial(sharding.jit, static_argnums=0)
def begin(config: ModelConfig, params: avg_llava.Params, embeds: jax.Array) -> KeyValues:
    """Read the right-padded beginnings of prompts, embeddings (U, S1): a KV cache of capacity S1."""
    nowhere = jnp.zeros(len(embeds), jnp.int32)  # no hidden state is asked for
    return spread(read(config.language, params["language"], embeds, nowhere)[1])


@functools.partial(sharding.jit, static_argnums=(0, 7))
def read_on(
    config: ModelConfig,
    params: avg_llava.Params,
    begun: KeyValues,
    place: jax.Array,
    cached: jax.Array,
    ids: jax.Array,
    length: jax.Array,
    room: int,
) -> tuple[jax.Array, KeyValues]:
    """What `prefill` returns, of prompts that begin as those that `begin` has read.

    Row b goes on behind the first `cached` (B,) positions of beginning `place` (B,) with the first `length` (B,) of
    its text `ids` (B, S2). The cache returned has capacity S1 + S2 + room.
    """
    before = spread(KeyValues(*(part[:, place] for part in begun)))
    positions = cached[:, None] + jnp.arange(ids.shape[1])
    x = avg_llava.embed(config, params, ids)
    logits, new = last_logits(config, params, x, length, positions, before, cached)
    # A position is taken from where it is: on a CPU `extend` would take nearly as long as the layers.
    behind = jnp.arange(begun.k.shape[2] + ids.shape[1] + room) - cached[:, None]
    within = jnp.clip(behind, 0, ids.shape[1] - 1)[None, :, :, None, None]

    def joined(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.take_along_axis(new, within, axis=2)
        return jnp.where((behind < 0)[None, :, :, None, None], old, new)

    before = _with_room(before, ids.shape[1] + room)
    return logits, spread(KeyValues(*map(joined, before, new)))


def last_logits(
    config: ModelConfig, params: avg_llava.Params, x: jax.Array, length: jax.Array, *behind: Any
) -> tuple[jax.Array, KeyValues]:
    """Logits (B, V) at the last of the `length` (B,) real positions of x (B, S, D), any where it is 0.

    Also the keys and values of these S positions. behind: positions, an earlier cache and how much of it is real, see
    `read`; nothing for prompts from their start.
    """
    last, new = read(config.language, params["language"], x, jnp.maximum(length - 1, 0), *behind)
    return avg_llava.unembed(config, params, last), new


def _with_room(cache: KeyValues, room: int) -> KeyValues:
    spare = [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]
    return spread(KeyValues(*(jnp.pad(part, spare) for part in cache)))


def spread(cache: KeyValues) -> KeyValues:
    """A cache (layers, B, C, kv_heads, head_dim) laid out over the mesh."""
    return KeyValues(*(constrain(part, "layers", "batch", None, "heads", None) for part in cache))


@functools.partial(sharding.jit, static_argnums=(0, 7, 8))
def start(
    config: ModelConfig,
    params: avg_llava.Params,
    cache: KeyValues,
    logits: jax.Array,
    sampling: Sampling,
    stops: jax.Array,
    length: jax.Array,
    room: int,
    greedy: bool,
) -> State:
    """Pick the first token from the prompt's logits (B, V).

    `params` are those that will `decode`: the cache is brought into the form that they want.
    """
    first = sample(logits, sampling, jnp.zeros_like(length), greedy)
    count = jnp.minimum(1, sampling.limit)
    tokens = jnp.zeros((len(logits), room), jnp.int32).at[:, 0].set(first)
    done = (sampling.limit <= 1) | jnp.isin(first, stops)
    return State(cache_for(params, cache), length, tokens, count, done)


def cache_for(params: avg_llava.Params, cache: KeyValues) -> KeyValues | list[HeadsFirst]:
    """A cache in the form that `advance` wants with these parameters."""
    return apart(cache) if isinstance(params["language"]["layers"], tuple) else cache


def for_decoding(params: avg_llava.Params) -> avg_llava.Params:
    """Parameters as `advance` reads them fastest: on one CPU device with the language model's layers apart.

    They lie where the stacked ones do, which must be kept: nothing is copied.
    """
    if not on_one_cpu():
        return params
    language = params["language"]
    stacked = jax.device_get(language["layers"])

    def layer(at: int) -> dict[str, jax.Array]:
        # A slice on the device would be a copy; one of the host's view is none.
        return jax.device_put(jax.tree.map(lambda leaf: leaf[at], stacked), may_alias=True)

    count = len(jax.tree.leaves(stacked)[0])
    return params | {"language": language | {"layers": tuple(map(layer, range(count)))}}


def advance(
    config: ModelConfig,
    params: avg_llava.Params,
    state: State,
    sampling: Sampling,
    stops: jax.Array,
    steps: jax.Array,
    greedy: bool,
) -> State:
    """Generate until every row is done, at most `steps` (a traced scalar) tokens more.

    `params` may be `for_decoding`; `state` is what `start` made for them. `stops`: int (K,), the ids that end a row.
    `greedy`: whether every row is; that program sorts nothing.
    """

    def unfinished(carry: tuple[jax.Array, State]) -> jax.Array:
        step, state = carry
        return (step < steps) & ~jnp.all(state.done)

    def one_token(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        step, (cache, cached, tokens, count, done) = carry
        rows = jnp.arange(len(tokens))
        last = tokens[rows, jnp.maximum(count - 1, 0)]
        x = avg_llava.embed(config, params, last)[:, None]
        if isinstance(cache, list):
            hidden, cache = layer_by_layer(config.language, params["language"], x, cache, cached)
        else:
            hidden, new = avg_llava.language(config, params, x, cached[:, None], cache, cached)
            cache = extend(cache, new, cached)
        token = sample(avg_llava.unembed(config, params, hidden[:, 0]), sampling, count, greedy)

        at = jnp.minimum(count, tokens.shape[1] - 1)
        tokens = tokens.at[rows, at].set(jnp.where(done, tokens[rows, at], token))
        going = (~done).astype(jnp.int32)
        count = count + going
        done = done | jnp.isin(token, stops) | (count >= sampling.limit)
        return step + 1, State(cache, cached + going, tokens, count, done)

    return jax.lax.while_loop(unfinished, one_token, (jnp.zeros((), jnp.int32), state))[1]


decode = sharding.jit(advance, static_argnums=(0, 6), donate_argnums=2)
"""`advance` as a program of its own. The state is donated: its cache is updated in place, and the argument must not be
used again."""


def sample(logits: jax.Array, sampling: Sampling, count: jax.Array, greedy: bool) -> jax.Array:
    """One token a row: logits fp32 (B, V), `count` (B,) tokens were picked before -> int (B,).

    Temperature first, then the top_k best, then of those the smallest set whose probability reaches
    top_p. `greedy` says that every temperature is 0; where it is only found on the device that they are,
    nothing is sorted either.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if greedy:
        return best

    def draw(row, temperature, top_p, top_k, seed, number):
        order = jnp.argsort(-row, stable=True)
        rank = jnp.arange(len(row))
        scores = row[order] / jnp.maximum(temperature, 1e-6)
        scores = jnp.where((top_k <= 0) | (rank < top_k), scores, -jnp.inf)
        share = jax.nn.softmax(scores)
        before = jnp.cumsum(share) - share
        # The best token always stays, and rounding in the sum cuts no tail where top_p is off.
        kept = (before < top_p) | (top_p >= 1) | (rank == 0)
        key = jax.random.fold_in(jax.random.key(seed), number)
        return order[jax.random.categorical(key, jnp.where(kept, scores, -jnp.inf))].astype(jnp.int32)

    def drawn() -> jax.Array:
        tokens = jax.vmap(draw)(logits, sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, count)
        return jnp.where(sampling.temperature > 0, tokens, best)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: best)
