"""What the engine compiles: golden greedy tokens through it, and the sampling."""

import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax.inference import buckets, programs
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.device import page_bytes
from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.image_pages import digest_of
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.sampling import sampling_of, shaping_of
from tests.measured_pixels import measured_tiles

GOLDEN = pathlib.Path(__file__).parent / "data" / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def golden():
    """The model and an engine with room for the longest case, so that all of them share programs."""
    with jax.default_matmul_precision("highest"):
        model = AvgLlava.load(GOLDEN / "avg-llava-tiny", GOLDEN / "vision_tower")
        yield model, Engine(model, 6, 2816, None, 40 * page_bytes(model))


@pytest.mark.parametrize("case", CASES, ids=lambda case: pathlib.Path(case["file"]).stem)
def test_golden_tokens(golden, case):
    """Greedy tokens at every granularity and at the router's choice equal those of the released code."""
    model, engine = golden
    with np.load(GOLDEN / case["file"]) as file:
        measured = dict(file)
    path = GOLDEN / case["image"]
    prepared = model.prepare(Request(case["prompt"], path, raw=True, max_new_tokens=NEW_TOKENS))
    assert prepared.sample.tokens.ids == measured["input_ids"].tolist()
    tiles = measured_tiles(prepared.sample.images[0].load(), model.config, path.name)
    images = [(digest_of(tiles, prepared.sample.sizes[0]), tiles)]
    tickets = {
        str(way[0] or "router"): engine.submit_prepared(
            dataclasses.replace(prepared, choice=way), images, keep_logits=True
        )
        for way in [*((g,) for g in model.config.granularities), (None,)]
    }
    while engine.step():
        pass
    assert tickets["router"].result(0).granularity == measured["router_choice_granularity"][0]
    for name, ticket in tickets.items():
        np.testing.assert_allclose(ticket.logits, measured[f"logits.{name}[-1]"], atol=1e-4, rtol=1e-4)
        ids, wanted = list(ticket.result(0).token_ids), measured[f"generate.{name}"][1:].tolist()
        assert ids == wanted[: len(ids)], name
        assert len(ids) == NEW_TOKENS or wanted[len(ids)] in model.stop_ids, name


def sampling(rows, **given):
    """Rows of a vocabulary of five."""
    none = sampling_of(rows, [], [], shaping_of(rows, [], [], 5, 8))
    values = {"temperature": 1.0} | given
    columns = {name: jnp.asarray(value, getattr(none, name).dtype) for name, value in values.items()}
    return none._replace(**{name: jnp.broadcast_to(column, rows) for name, column in columns.items()})


sample = jax.jit(programs.sample)
LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))


def drawn(**given):
    """Tokens of 4000 draws from LOGITS."""
    rows = 4000
    many = jnp.broadcast_to(LOGITS, (rows, 5))
    return np.asarray(sample(many, sampling(rows, seed=jnp.arange(rows), **given), jnp.zeros(rows, int)))


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
    one = sample(LOGITS[None], sampling(1, seed=7), jnp.array([3]))
    among = sample(
        jnp.stack([LOGITS[::-1], LOGITS, LOGITS]),
        sampling(3, seed=jnp.array([1, 7, 2]), temperature=jnp.array([0.0, 1.0, 1.5])),
        jnp.array([0, 3, 9]),
    )
    assert one[0] == among[1]
    assert among[0] == 3  # greedy among the sampled
    tokens = {int(sample(LOGITS[None], sampling(1, seed=7), jnp.array([n]))[0]) for n in range(20)}
    assert len(tokens) > 1


def test_length_buckets():
    sizes = sorted({buckets.length_bucket(n, 4096) for n in range(1, 4097)})
    assert sizes[:12] == [32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640]
    assert sizes[-1] == 4096 and len(sizes) == 23
    assert buckets.length_buckets(4096) == (16, *sizes)
    assert all(buckets.length_bucket(n, 4096) >= n for n in range(1, 4097))
    assert buckets.length_bucket(900, 1000) == 1000


def test_few_buckets_pad_least():
    """Against every choice of sizes."""
    rng, sizes = np.random.default_rng(0), buckets.length_buckets(512)
    for most in (1, 2, 3):
        needs = rng.integers(1, 512, 30).tolist()
        found = buckets.few_buckets(sizes, needs, most)
        assert len(found) <= most and found[-1] >= max(needs)

        def padded(chosen, needs=needs):
            return sum(buckets.bucket(chosen, need) for need in needs)

        options = [c for n in range(1, most + 1) for c in itertools.combinations(sizes, n) if c[-1] >= max(needs)]
        assert padded(found) == min(map(padded, options))
