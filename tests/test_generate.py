"""The compiled functions: against golden greedy tokens, against the full forward pass, and the sampling."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax.data.packing import Shape
from avg_llava_jax.inference import batching, choosing, generate
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.models import avg_llava
from tests.random_model import random_model

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())
SHAPE = Shape(tiles=5, images=1, text=256, answer=1, fill=1.0)  # holds every case
LENGTHS = (512, 1024, 2816)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def golden_model():
    with jax.default_matmul_precision("highest"):
        yield AvgLlava.load(GOLDEN / "avg-llava-tiny", GOLDEN / "vision_tower")


@pytest.mark.parametrize("case", CASES, ids=lambda case: pathlib.Path(case["file"]).stem)
def test_golden_tokens(golden_model, case):
    """Greedy tokens at every granularity and at the router's choice equal those of the released code."""
    model, config = golden_model, golden_model.config
    with np.load(GOLDEN / case["file"]) as file:
        golden = dict(file)
    prepared = model.prepare(Request(case["prompt"], GOLDEN / case["image"], raw=True))
    sample = prepared.sample
    assert sample.tokens.ids == golden["input_ids"].tolist()
    seen = batching.see(config, model.params, [sample], SHAPE)
    (choice,) = choosing.choose(config, prepared, seen.logits(0))
    assert choice == golden["router_choice_granularity"][0]
    stops = np.array(model.stop_ids, np.int32)
    zero = np.zeros(1, np.float32)
    sampling = generate.Sampling(zero, zero + 1, np.zeros(1, int), np.zeros(1, np.uint32), np.array([NEW_TOKENS]))
    for name in (*config.granularities, "router"):
        way = (choice if name == "router" else name,)
        need = batching.length_at(config, sample, way)
        static = next(rung for rung in LENGTHS if rung >= need)
        index, length = batching.packed_index(config, [sample], SHAPE, [way], static=static)
        embeds = generate.pack(config, model.params, seen.pyramid, seen.text, index)
        logits, cache = generate.prefill(config, model.params, embeds, length, NEW_TOKENS)
        np.testing.assert_allclose(logits[0], golden[f"logits.{name}[-1]"], atol=1e-4, rtol=1e-4)
        # Layer by layer, as on one CPU, and by the scan, as everywhere else; `decode` donates its state.
        for params in (model.decoding, model.params):
            state = generate.start(
                config, params, jax.tree.map(jnp.copy, cache), logits, sampling, stops, length, NEW_TOKENS, True
            )
            state = generate.decode(config, params, state, sampling, stops, np.int32(NEW_TOKENS), True)
            assert state.tokens[0].tolist() == golden[f"generate.{name}"][1:].tolist(), name


def test_decoding_with_the_cache_equals_the_full_forward_pass(tiny, tokenizer):
    """Rows of unequal length, and a cache with room that is not used yet."""
    params = random_model(tiny, tokenizer).params
    rng = np.random.default_rng(0)
    lengths, steps = np.array([5, 9], np.int32), 4
    ids = rng.integers(0, 600, (2, 9 + steps))
    language, unembed = (jax.jit(f, static_argnums=0) for f in (avg_llava.language, avg_llava.unembed))
    embeds = avg_llava.embed(tiny, params, jnp.asarray(ids))
    whole = unembed(tiny, params, language(tiny, params, embeds)[0])
    logits, cache = generate.prefill(tiny, params, embeds[:, :9], lengths, steps)
    cached = jnp.asarray(lengths)
    for step in range(steps + 1):
        for row in range(2):
            full = whole[row, lengths[row] + step - 1]
            np.testing.assert_allclose(logits[row], full, atol=2e-4, rtol=2e-4)
        x = embeds[jnp.arange(2), jnp.minimum(lengths + step, ids.shape[1] - 1)][:, None]
        hidden, new = language(tiny, params, x, cached[:, None], cache, cached)
        logits, cache = unembed(tiny, params, hidden[:, 0]), generate.extend(cache, new, cached)
        cached = cached + 1


def sampling(rows, **given):
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "limit": 8} | given
    types = (jnp.float32, jnp.float32, jnp.int32, jnp.uint32, jnp.int32)
    return generate.Sampling(
        *(jnp.broadcast_to(jnp.asarray(v, t), (rows,)) for v, t in zip(values.values(), types, strict=True))
    )


sample = jax.jit(generate.sample, static_argnums=3)
LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))


def drawn(**given):
    """Tokens of 4000 draws from LOGITS."""
    rows = 4000
    many = jnp.broadcast_to(LOGITS, (rows, 5))
    return np.asarray(sample(many, sampling(rows, seed=jnp.arange(rows), **given), jnp.zeros(rows, int), False))


def test_samples_follow_the_distribution():
    shares = np.bincount(drawn(), minlength=5) / 4000
    np.testing.assert_allclose(shares, np.exp(LOGITS), atol=0.03)
    warm = np.bincount(drawn(temperature=2.0), minlength=5) / 4000
    np.testing.assert_allclose(warm, jax.nn.softmax(LOGITS / 2), atol=0.03)


def test_top_k_and_top_p_keep_the_best():
    assert set(drawn(top_k=2)) == {1, 3}
    assert set(drawn(top_p=0.65)) == {1, 3}  # .4 + .3 reaches it
    assert set(drawn(top_p=0.75)) == {1, 3, 4}
    assert set(drawn(top_p=0.5, top_k=2)) == {1}  # of the two, .57 reaches it alone
    assert set(drawn(top_k=1)) == set(drawn(top_p=1e-6)) == set(drawn(temperature=0.0)) == {1}


def test_a_row_depends_on_its_own_seed_and_place_alone():
    one = sample(LOGITS[None], sampling(1, seed=7), jnp.array([3]), False)
    among = sample(
        jnp.stack([LOGITS[::-1], LOGITS, LOGITS]),
        sampling(3, seed=jnp.array([1, 7, 2]), temperature=jnp.array([0.0, 1.0, 1.5])),
        jnp.array([0, 3, 9]),
        False,
    )
    assert one[0] == among[1]
    assert among[0] == 3  # greedy among the sampled
    tokens = {int(sample(LOGITS[None], sampling(1, seed=7), jnp.array([n]), False)[0]) for n in range(20)}
    assert len(tokens) > 1


def test_ladders():
    rungs = sorted({generate.length_bucket(n, 4096) for n in range(1, 4097)})
    assert rungs[:12] == [32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640]
    assert rungs[-1] == 4096 and len(rungs) == 23
    assert all(generate.length_bucket(n, 4096) >= n for n in range(1, 4097))
    assert generate.length_bucket(900, 1000) == 1000
    assert [generate.room_bucket(n) for n in (1, 16, 17, 256)] == [16, 16, 64, 256]
