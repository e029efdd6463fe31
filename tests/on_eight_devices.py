"""Run by test_mesh.py, since a process chooses its number of devices once: python -m tests.on_eight_devices"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from avg_llava_jax import adapters, parameters
from avg_llava_jax.config import ScalerConfig
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.inference import programs, stacked
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.engine import Engine
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.sampling import sampling_of, shaping_of
from avg_llava_jax.inference.stress import compilations
from avg_llava_jax.models import language
from avg_llava_jax.models.flash import flash_attention
from avg_llava_jax.parallel import sharding
from avg_llava_jax.parallel.costs import collectives
from avg_llava_jax.training.config import OptimizerConfig, TrainConfig
from avg_llava_jax.training.step import Step
from tests.conftest import TOKENIZER
from tests.random_model import random_model
from tests.test_attention import draw, formula
from tests.test_parameters import TINY
from tests.test_stacked import adapted

MODEL = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, layers=2),
    scaler=ScalerConfig(halvings=1),
    language=dataclasses.replace(TINY.language, layers=1, vocab_size=600, max_length=256),
)
ROWS, TILES, TEXT, ANSWER, LENGTH, ROOM = 8, 2, 6, 3, 12, 4


def random_batch():
    draw = np.random.default_rng(0).integers
    table = TEXT + TILES * MODEL.pyramid_rows + 1
    ladder = MODEL.granularities
    return {
        "pixels": draw(0, 256, (ROWS, TILES, 16, 16, 3), np.uint8),
        "tile_image": np.tile(np.array([0, -1], np.int32), (ROWS, 1)),
        "first_tile": np.zeros((ROWS, 1), np.int32),
        "text": draw(0, 64, (ROWS, TEXT), np.int32),
        "instruction": np.ones((ROWS, TEXT), bool),
        "index": {g: draw(0, table, (ROWS, LENGTH), np.int32) for g in ladder},
        "length": {g: np.full(ROWS, LENGTH, np.int32) for g in ladder},
        "targets": draw(0, 64, (ROWS, ANSWER), np.int32),
        "target_at": {g: draw(0, LENGTH, (ROWS, ANSWER), np.int32) for g in ladder},
        "visual": np.ones((ROWS, 1, len(ladder)), np.int32),
    }


def shared(batch):
    """The same batch, its rows shared by two samples: five positions and half of the text, then the rest of them."""
    half = np.repeat(np.int32([[0, 1]]), TEXT // 2, axis=1)
    return batch | {
        "length": {g: np.tile(np.int32([5, LENGTH - 5]), (ROWS, 1)) for g in MODEL.granularities},
        "reach": {g: np.zeros((ROWS, LENGTH - 5), bool) for g in MODEL.granularities},
        "text_sample": np.tile(half, (ROWS, 1)),
        "image_sample": np.arange(ROWS, dtype=np.int32)[:, None] % 2,
    }


def mesh_of(sizes):
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])


def trained(params, batch, phase, sizes, accumulate=1):
    """Metrics and Adam's moments, which are the gradients, after one step; and its traffic."""
    config = TrainConfig(phase=phase, batch_size=ROWS, optimizer=OptimizerConfig(accumulate=accumulate))
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        step = Step(config, MODEL, mesh)
        ours, frozen = step.split(jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, step.params))
        arguments = (jax.tree.map(jnp.copy, ours), step.init(ours), frozen, jax.device_put(batch, step.rows))
        compiled = step.update.lower(*arguments, jnp.int32(0)).compile()
        _, state, metrics = compiled(*arguments, jnp.int32(0))
    return jax.device_get((metrics, state)), collectives(compiled.as_text())


def answered(params, batch, sizes):
    """Router scores of images, the prompts' last logits, the cache and the tokens of greedy answers."""
    mesh = mesh_of(sizes)
    params = jax.device_put(params, sharding.shardings(mesh, params))
    params = params | {"language": params["language"] | {"layers": language.unstack(params["language"]["layers"])}}
    rng, ids = np.random.default_rng(1), np.arange(ROWS, dtype=np.int32)
    cache, pool = programs.empty(MODEL, params, ROWS, LENGTH + ROOM, ROWS)
    pool = programs.encode(MODEL, params, pool, batch["pixels"][:, 0], ids)
    routing = programs.route(MODEL, params, pool, ids[:, None], batch["text"], np.full(ROWS, TEXT, np.int32))
    places = rng.integers(-1, ROWS * MODEL.pyramid_rows + 1, (ROWS, LENGTH)).astype(np.int32)
    length = rng.integers(LENGTH // 2, LENGTH, ROWS).astype(np.int32)
    words = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
    # The first half of each prompt from its start, row i in slot i; the rest behind it, in slots by number.
    half = LENGTH // 2
    first = programs.Chunk(None, 0 * ids, 0 * ids + half, words[:, :half], places[:, :half])
    cache, *_ = programs.prefill(MODEL, params, cache, pool, first, 0, 1)
    rest = programs.Chunk(ids, 0 * ids + half, length - half, words[:, half:], places[:, half:])
    cache, logits, tokens, _ = programs.prefill(MODEL, params, cache, pool, rest, LENGTH + ROOM, 1)
    none = sampling_of(ROWS, [], [], shaping_of(ROWS, [], [], MODEL.language.vocab_size, LENGTH + ROOM))
    sampling = none._replace(limit=np.full(ROWS, ROOM, np.int32))
    rows, stops = programs.Rows(tokens[:, 0], length, np.ones(ROWS, np.int32)), np.array([-1], np.int32)
    cache, tokens, _, counts, _ = programs.decode(
        MODEL, params, cache, rows, sampling, stops, np.int32(ROOM), ROOM, LENGTH + ROOM, True
    )
    assert np.all(counts == ROOM - 1)
    return jax.device_get((routing.logits, logits, cache, tokens))


def with_adapter(params, tokenizer):
    """A model, and an adapter `own` beside it."""
    own, _ = adapters.divide(adapted(MODEL, random_model(MODEL, tokenizer).params, 1, 2, ("language", "encoder")))
    model = AvgLlava(MODEL, params, tokenizer)
    model.adapters = stacked.Stack(("own",), stacked.stack(params, [own]))
    return model


def engine_answers(model, sizes):
    """Tokens of four requests by an engine on a mesh, asked twice: what is compiled at first serves ever after."""
    params = jax.device_put(model.params, sharding.shardings(mesh_of(sizes), model.params))
    engine = Engine(with_adapter(params, model.tokenizer), slots=4, chunk=32, image_cache_bytes=2**16)
    for _ in range(2):
        with compilations() as compiled:
            tickets = [engine.submit(request) for request in questions()]
            while engine.step():
                pass
    assert compiled() == 0
    return [ticket.result(0).token_ids for ticket in tickets]


def questions():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    images = [Image.fromarray(pixels + np.uint8(n)) for n in range(3)]
    return [
        Request("who wears " * (1 + 5 * n), image, max_new_tokens=12, adapter=(None, "own")[n % 2])
        for n, image in enumerate([*images, ()])
    ]


def equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), one, other)


def main():
    jax.config.update("jax_num_cpu_devices", 8)
    batch = random_batch()
    params = jax.jit(lambda: parameters.init(MODEL, jax.random.key(0)))()

    for phase in ("multi_granularity", "rglf"):
        one, _ = trained(params, shared(batch), phase, (1, 1, 1))
        assert one[0]["grad_norm"] > 1e-3
        for sizes, accumulate in [((1, 4, 2), 1), ((2, 2, 2), 2)]:
            equal(one, trained(params, shared(batch), phase, sizes, accumulate)[0])
    two, four = (trained(params, batch, "connector", (2, 1, 1), n)[1]["all-reduce"].sent for n in (2, 4))
    assert four < 1.05 * two, f"copies of the model reduce once a step, not once a micro-batch: {two}, {four} bytes"

    one = answered(params, batch, (1, 1, 1))
    for sizes in [(4, 2, 1), (2, 2, 2)]:
        equal(one, answered(params, batch, sizes))

    tokenizer = load_tokenizer(TOKENIZER)
    model = with_adapter(random_model(MODEL, tokenizer).params, tokenizer)
    alone = [model.answer_batch([question])[0].token_ids for question in questions()]
    assert len(set(alone)) == len(alone)
    assert engine_answers(model, (2, 2, 2)) == alone

    arrays = draw(jnp.float32, 140)
    with jax.set_mesh(mesh_of((2, 1, 2))):
        out = jax.jit(lambda *arrays: flash_attention(*arrays, causal=True, interpret=True))(*arrays)
    np.testing.assert_allclose(out, formula(*arrays, True), atol=1e-5)
    print("equal")


if __name__ == "__main__":
    main()
