"""The programs that the engine compiles: pure functions of (config, params, arrays), all shapes static.

    pixels --encode--> pool                             pyramids of tiles, one page each, kept for later requests
    pool, text --route--> routing                       one image per row
    cache, pool, ids, places --prefill--> cache, logits a chunk of each row's prompt into its slot
    logits --first--> token                             the first token of answers that are sampled, shaped or scored
    cache --decode--> cache, tokens                     the first slots, several steps
    cache --copy--> cache                               shared prefixes, from slots to slots

The cache (see `models.cache`) and the pool (pages, R, D) are donated and updated in place. Writes of padding rows are
outside of both, and are dropped.

Values of a request (length, temperature, penalties, allowed tokens) are arrays with one entry per row, so that requests
share programs, and a row's tokens do not depend on its neighbours. `params` have their layers unstacked.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avg_llava_jax.config import ModelConfig
from avg_llava_jax.inference import stacked
from avg_llava_jax.inference.requests import TOP
from avg_llava_jax.models import avg_llava, language
from avg_llava_jax.models.avg_llava import Params
from avg_llava_jax.models.cache import Cache, Span, constrain_cache, empty_cache
from avg_llava_jax.models.router import Routing
from avg_llava_jax.parallel import sharding
from avg_llava_jax.placement import constrain

TEXT = -1
"""The place of a text token. Pyramid row r of page p has place p * R + r, the newline has place pages * R."""


NO_DOT_MERGER = {"xla_gpu_dot_merger_threshold_mb": 0}
"""For loops over tokens. XLA for GPUs joins products that share an operand by copying their weights into one array, and
keeps the copies of all layers while the loop runs: 96 MiB a layer of the 7B."""


class Shaping(NamedTuple):
    """How each row's logits change before a token is chosen; neutral values leave them as they are, bit for bit.

    least: int (B,), tokens to generate before a stop id may come; 0 = off.
    repetition: float (B,), 1 = off. Logits of tokens in the prompt or in the answer are divided by it where they are
        positive, and multiplied where they are negative.
    frequency, presence: float (B,), 0 = off. Subtracted from the logits of the answer's tokens, `frequency` once for
        each time that a token occurs.
    bias_at, bias: int and float (B, K), ids and what is added to their logits; an id of V or more adds nothing.
    allowed: uint32 (B, ceil(V / 32)), token t may come where bit t % 32 of word t // 32 is 1.
    history: int (B, H), what the penalties count: the ids of the prompt's text as they are, the answer's plus V, and
        2 V for padding.
    shaped, scored: bool (B,), whether any of these is not neutral, and whether `Scores` are wanted. The program
        skips what no row needs.

    With V = 5, a prompt 3 4 and an answer 4 1 4:    history  3 4 9 6 9 10 10
    """

    least: jax.Array
    repetition: jax.Array
    frequency: jax.Array
    presence: jax.Array
    bias_at: jax.Array
    bias: jax.Array
    allowed: jax.Array
    history: jax.Array
    shaped: jax.Array
    scored: jax.Array


class Sampling(NamedTuple):
    """How each row samples its tokens; every field has shape (B,).

    temperature: float, 0 = greedy. top_p: float in (0, 1], 1 = off. top_k: int, 0 = off.
    min_p: float in [0, 1], 0 = off.
    seed: uint32; the n-th token of a row depends on its seed and n alone.
    limit: int, tokens to generate at most; 0 for a padding row.
    """

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    seed: jax.Array
    limit: jax.Array
    shaping: Shaping


class Scores(NamedTuple):
    """Log-probabilities in nats of generated tokens, from the model's own logits; garbage in rows that are not scored.

    chosen: fp32 (...), of each token. ids, values: int, fp32 (..., TOP), the most likely tokens, best first.
    """

    chosen: jax.Array
    ids: jax.Array
    values: jax.Array


class Chunk(NamedTuple):
    """Chunks of prompts, one per row, at most S positions each.

    slot, start, length: int (B,): row i holds positions start .. start + length - 1 of the prompt in its slot. slot is
        None if row i is slot i. A padding row has a slot or a start outside of the cache.
    ids: int (B, S), token ids where `places` is TEXT. places: int (B, S), see `TEXT`.
    weights: None, or fp32 (B, S, 4) with places int (B, S, 4), where `config.most_tiles` reduces mosaics.
    adapter: int (B,), of each row, see `stacked`; None if the model has none.
    """

    slot: jax.Array | None
    start: jax.Array
    length: jax.Array
    ids: jax.Array
    places: jax.Array
    weights: jax.Array | None = None
    adapter: jax.Array | None = None


class Rows(NamedTuple):
    """Answers to decode: int (B,) each, row i is slot i. A row whose limit is reached writes nothing.

    last: the newest token, not in the cache yet. cached: positions in the cache. count: tokens generated.
    adapter: as in `Chunk`.
    """

    last: jax.Array
    cached: jax.Array
    count: jax.Array
    adapter: jax.Array | None = None


@functools.partial(sharding.jit, static_argnums=(0, 2, 3, 4))
def empty(config: ModelConfig, params: Params, slots: int, capacity: int, pages: int) -> tuple[Cache, jax.Array]:
    """A cache and a pool (pages, R, D) of zeros, in the model's compute dtype."""
    dtype = params["image_newline"].dtype
    slots_of_zeros = empty_cache(config.language, slots, capacity, dtype)
    pool = jnp.zeros((pages, config.pyramid_rows, config.language.width), dtype)
    return constrain_cache(slots_of_zeros), _pooled(pool)


@functools.partial(sharding.jit, static_argnums=0, donate_argnums=2)
def encode(
    config: ModelConfig,
    params: Params,
    pool: jax.Array,
    pixels: jax.Array,
    pages: jax.Array,
    adapter: jax.Array | None = None,
) -> jax.Array:
    """Encode tiles of any images into pages of the pool: pixels uint8 (M, H, W, 3), pages int (M,) -> pool.

    adapter: int (), of all tiles; None if the model has none.
    """
    params = stacked.params_for_rows(params, adapter)
    pyramid = avg_llava.pyramid_of(config, params, pixels[:, None])[:, 0].astype(pool.dtype)
    return _pooled(pool.at[pages].set(constrain(pyramid, None, None, None), mode="drop"))


@functools.partial(sharding.jit, static_argnums=0)
def route(
    config: ModelConfig,
    params: Params,
    pool: jax.Array,
    pages: jax.Array,
    text: jax.Array,
    count: jax.Array,
    adapter: jax.Array | None = None,
) -> Routing:
    """Score the granularities of images, one per row.

    pages: int (B, T), -1 after the image's last tile. text: int (B, L), the prompt's text ids, the first `count` (B,)
    of them real. An image's scores depend on its own tiles and the prompt, so images of one request may be in
    different batches. Shapes of the result are those of `Routing`, with I = 1. adapter: as in `encode`.
    """
    params = stacked.params_for_rows(params, adapter)
    batch = {
        "tile_image": jnp.where(pages < 0, -1, 0),
        "first_tile": jnp.zeros((len(pages), 1), jnp.int32),
        "instruction": jnp.arange(text.shape[1]) < count[:, None],
    }
    pyramid = _taken(pool, pages)
    return avg_llava.route(config, params, pyramid, avg_llava.embed(config, params, text), batch)


@functools.partial(sharding.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    pool: jax.Array,
    chunk: Chunk,
    window: int,
    predicted: int,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
    """Prefill one chunk of each row's prompt into its slot.

    window: cache positions that are attended to, at least start + S of each row; 0 if every chunk starts its
    prompt, and attends only to itself. predicted: E, how many of each chunk's last positions predict a token: 1, or
    more where the chunk ends in a draft of the answer.

    Returns the cache, the logits (B, V) at each chunk's last position, and for its last E positions the best token
    int (B, E) and its log-probability fp32 (B, E). Where a chunk is shorter than E, only the last ones are real.
    """
    params = stacked.params_for_rows(params, chunk.adapter)
    x = assemble(config, params, pool, chunk)
    span = Span(chunk.start, chunk.slot, window)
    last = jnp.maximum(chunk.length[:, None] - predicted + jnp.arange(predicted), 0)
    hidden, cache = language.decoder(config.language, params["language"], x, cache, span, last)
    logits = avg_llava.unembed(config, params, hidden)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return constrain_cache(cache), logits[:, -1], tokens, log_probability(logits, tokens)


@functools.partial(sharding.jit, static_argnums=0)
def first(
    config: ModelConfig, params: Params, logits: jax.Array, sampling: Sampling, stops: jax.Array
) -> tuple[jax.Array, jax.Array, Scores]:
    """The first token of answers, its log-probability and its scores, (B, 1) each, from the logits (B, V) at the end of
    their prompts."""
    none = jnp.zeros_like(sampling.limit)
    token, scores = choose(logits, sampling, counted(sampling.shaping, logits.shape[1]), none, stops)
    found = token, log_probability(logits, token), scores
    return jax.tree.map(lambda array: array[:, None], found)


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities fp32 (...) of tokens int (...) by logits (..., V) as they are."""
    return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def assemble(config: ModelConfig, params: Params, pool: jax.Array, chunk: Chunk) -> jax.Array:
    """Packed embeddings (B, S, D) of chunks: text by `ids`, visual tokens and newlines by `places`."""
    rows, places = pool.reshape(-1, pool.shape[-1]), chunk.places
    text = avg_llava.embed(config, params, chunk.ids)
    newline = params["image_newline"].astype(text.dtype)[..., None, :]  # (1, D), or each row's own (B, 1, D)
    if chunk.weights is None:
        taken = _taken(rows, places)
    else:
        taken = _taken(rows, places.reshape(len(places), -1)).reshape(*places.shape, -1)
        taken, places = avg_llava.blend(taken, chunk.weights), places[..., 0]
    visual = jnp.where((places == len(rows))[..., None], newline, taken.astype(text.dtype))
    return jnp.where((places == TEXT)[..., None], text, visual)


@functools.partial(sharding.jit, static_argnums=(0, 7, 8, 9), donate_argnums=2, compiler_options=NO_DOT_MERGER)
def decode(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    rows: Rows,
    sampling: Sampling,
    stops: jax.Array,
    steps: jax.Array,
    most: int,
    window: int,
    greedy: bool,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array, Scores | None]:
    """Decode tokens of the first B slots until every row is done, at most `steps` (a traced scalar, up to `most`).

    stops: int (n,), stop ids, which end a row and are kept. window: at least the cached positions and `most` more.
    greedy: every row is greedy and its shaping neutral; the program chooses the best token and computes no scores.

    Returns the cache, tokens int (B, most), their log-probabilities fp32 (B, most), the number of real ones in each row
    int (B,), and their scores (B, most).
    """
    params = stacked.params_for_rows(params, rows.adapter)
    capacity, row = cache[0].capacity, jnp.arange(len(rows.last))

    def unfinished(carry: tuple) -> jax.Array:
        step, _, _, done, *_ = carry
        return (step < steps) & ~jnp.all(done)

    def one_token(carry: tuple) -> tuple:
        step, cache, rows, done, tokens, logprobs, counts, scores = carry
        x = avg_llava.embed(config, params, rows.last)[:, None]
        span = Span(jnp.where(done, capacity, rows.cached), None, window)
        hidden, cache = language.decoder(config.language, params["language"], x, cache, span)
        logits = avg_llava.unembed(config, params, hidden[:, 0])
        made = (~done).astype(jnp.int32)
        if greedy:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token, new = choose(logits, sampling, counts, rows.count, stops)
            counts = Counts(counts.in_prompt, counts.in_answer.at[row, token].add(made))
            scores = jax.tree.map(lambda all_steps, one: all_steps.at[:, step].set(one), scores, new)
        tokens = tokens.at[row, step].set(token)
        logprobs = logprobs.at[row, step].set(log_probability(logits, token))
        last = jnp.where(done, rows.last, token)
        rows = rows._replace(last=last, cached=rows.cached + made, count=rows.count + made)
        done = done | jnp.isin(token, stops) | (rows.count >= sampling.limit)
        return step + 1, cache, rows, done, tokens, logprobs, counts, scores

    done = rows.count >= sampling.limit
    none = jnp.zeros((len(row), most))
    start = jnp.zeros((), jnp.int32), cache, rows, done, none.astype(jnp.int32), none
    counts = None if greedy else counted(sampling.shaping, config.language.vocab_size)
    scores = None if greedy else _no_scores(len(row), most, config.language.vocab_size)
    _, cache, end, _, tokens, logprobs, _, scores = jax.lax.while_loop(unfinished, one_token, (*start, counts, scores))
    return constrain_cache(cache), tokens, logprobs, end.count - rows.count, scores


@functools.partial(sharding.jit, static_argnums=(0, 5), donate_argnums=2)
def copy(
    config: ModelConfig, params: Params, cache: Cache, source: jax.Array, target: jax.Array, window: int
) -> Cache:
    """Copy the first `window` positions of slots `source` (B,) to slots `target` (B,); a target outside is dropped."""
    return constrain_cache(tuple(layer.copied(source, target, window) for layer in cache))


class Counts(NamedTuple):
    """What penalties depend on.

    in_prompt: bool (B, V), whether the prompt has a token. in_answer: int (B, V), how often the answer so far has it.
    """

    in_prompt: jax.Array
    in_answer: jax.Array


def counted(shaping: Shaping, vocabulary: int) -> Counts:
    """The counts of each row's `history`."""
    rows, width = len(shaping.history), 2 * vocabulary
    empty = jnp.zeros((rows, width), jnp.int32)

    def count() -> jax.Array:
        return empty.at[jnp.arange(rows)[:, None], shaping.history].add(1, mode="drop")

    both = jax.lax.cond(jnp.any(shaping.history < width), count, lambda: empty)
    return Counts(both[:, :vocabulary] > 0, both[:, vocabulary:])


def choose(
    logits: jax.Array, sampling: Sampling, counts: Counts, count: jax.Array, stops: jax.Array
) -> tuple[jax.Array, Scores]:
    """One token per row (B,), and its scores, from logits fp32 (B, V). count: int (B,), tokens generated before."""
    shaping = sampling.shaping

    def shaped() -> jax.Array:
        return shape(logits, shaping, counts, count, stops)

    token = sample(jax.lax.cond(jnp.any(shaping.shaped), shaped, lambda: logits), sampling, count)

    def scores() -> Scores:
        shares = jax.nn.log_softmax(logits)
        values, ids = jax.lax.top_k(shares, min(TOP, logits.shape[1]))
        return Scores(jnp.take_along_axis(shares, token[:, None], 1)[:, 0], ids, values)

    none = Scores(*(array[:, 0] for array in _no_scores(len(token), 1, logits.shape[1])))
    return token, jax.lax.cond(jnp.any(shaping.scored), scores, lambda: none)


def shape(
    logits: jax.Array, shaping: Shaping, counts: Counts, count: jax.Array, stops: jax.Array
) -> jax.Array:
    """Logits (B, V) with each row's penalties, biases and bans, see `Shaping`."""
    row, in_answer = jnp.arange(len(logits))[:, None], counts.in_answer
    factor = jnp.where(counts.in_prompt | (in_answer > 0), shaping.repetition[:, None], 1)
    logits = jnp.where(logits > 0, logits / factor, logits * factor)
    logits -= shaping.frequency[:, None] * in_answer + shaping.presence[:, None] * (in_answer > 0)
    logits = logits.at[row, shaping.bias_at].add(shaping.bias, mode="drop")
    ban = jnp.where(count < shaping.least, -jnp.inf, 0)
    logits = logits.at[:, stops].add(ban[:, None], mode="drop")
    bits = shaping.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def sample(logits: jax.Array, sampling: Sampling, count: jax.Array) -> jax.Array:
    """Sample one token per row: logits fp32 (B, V), count int (B,) tokens generated before -> int (B,).

    Temperature applies first, then top_k, then top_p, the smallest set of those whose probability reaches it; min_p
    drops tokens less likely than this share of the best. The vocabulary is sorted only where a temperature is above 0.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(row, temperature, top_p, top_k, min_p, seed, number):
        order = jnp.argsort(-row, stable=True)
        rank = jnp.arange(len(row))
        scores = row[order] / jnp.maximum(temperature, 1e-6)
        likely = scores >= scores[0] + jnp.log(min_p)  # -inf where min_p is 0
        scores = jnp.where((top_k <= 0) | (rank < top_k), scores, -jnp.inf)
        share = jax.nn.softmax(scores)
        before = jnp.cumsum(share) - share
        # The best token is always kept; with top_p off, rounding in the sum must not cut the tail.
        kept = (((before < top_p) | (top_p >= 1)) & likely) | (rank == 0)
        key = jax.random.fold_in(jax.random.key(seed), number)
        return order[jax.random.categorical(key, jnp.where(kept, scores, -jnp.inf))].astype(jnp.int32)

    def drawn() -> jax.Array:
        tokens = jax.vmap(draw)(logits, *sampling[:5], count)
        return jnp.where(sampling.temperature > 0, tokens, best)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, lambda: best)


def _no_scores(rows: int, steps: int, vocabulary: int) -> Scores:
    top = jnp.zeros((rows, steps, min(TOP, vocabulary)))
    return Scores(top[..., 0], top.astype(jnp.int32), top)


def _pooled(pool: jax.Array) -> jax.Array:
    """Constrain the pool (pages, R, D): every device holds all pages, and a part of their width."""
    return constrain(pool, None, None, "width")


def _taken(rows: jax.Array, at: jax.Array) -> jax.Array:
    """Gather rows of the pool at (B, n): sharded by width as the pool is, then replicated, then sharded by sample."""
    taken = rows.at[constrain(jnp.maximum(at, 0), None, None)].get(mode="clip")
    for axes in ((None, "width"), (None, None), ("batch", None)):
        taken = constrain(taken, axes[0], *[None] * (taken.ndim - 2), axes[1])
    return taken
