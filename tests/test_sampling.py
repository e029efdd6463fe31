"""Shaped logits and scores, among plain rows, and nothing compiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax.data.conversation import IMAGE
from avg_llava_jax.data.packing import Shape, load_tiles, prompt_index
from avg_llava_jax.inference import programs
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.sampling import Next, sampling_of, shaping_of
from avg_llava_jax.inference.stress import compilations
from avg_llava_jax.models import avg_llava
from tests.random_model import plain
from tests.small_engine import ended
from tests.test_programs import drawn

LOGPROB = 2e-4
"""Difference of log-probabilities: they are those of logits up to 75, where 1e-4 is ten roundings."""


def answers(engine, requests):
    return [ticket.result(0) for ticket in ended(engine, requests)]


def question(**options):
    return Request("Who stands left of 4?", max_new_tokens=12, **options)


shape = jax.jit(programs.shape)


def shaped(logits, requests, text=(), tokens=(), allowed=None):
    """The logits of each request's next token, by the program."""
    rows = [Next(request, 9, np.array(text, np.int32), list(tokens), allowed) for request in requests]
    sampling = shaping_of(len(rows), range(len(rows)), rows, len(logits), 8)
    counts, count = programs.counted(sampling, len(logits)), jnp.full(len(rows), len(tokens))
    return np.asarray(shape(jnp.tile(jnp.float32(logits), (len(rows), 1)), sampling, counts, count, jnp.array([0])))


def test_logits_are_shaped_as_they_are_defined():
    """By hand: a prompt 1 2, an answer 2 3 3, stop id 0."""
    logits = [1.0, 2.0, -3.0, 4.0, 5.0]
    requests = [
        question(),
        question(repetition_penalty=2.0),
        question(frequency_penalty=0.5),
        question(presence_penalty=0.5),
        question(logit_bias={4: -2.5, 0: 7}),
        question(min_tokens=4),
        question(min_tokens=3),
    ]
    assert shaped(logits, requests, (1, 2), (2, 3, 3)).tolist() == [
        logits,
        [1.0, 1.0, -6.0, 2.0, 5.0],
        [1.0, 2.0, -3.5, 3.0, 5.0],
        [1.0, 2.0, -3.5, 3.5, 5.0],
        [8.0, 2.0, -3.0, 4.0, 2.5],
        [-np.inf, 2.0, -3.0, 4.0, 5.0],
        logits,
    ]
    allowed = np.array([0b01010], np.uint32)
    found = shaped(logits, [question(min_tokens=9)], allowed=allowed)  # the guide decides
    assert found.tolist() == [[-np.inf, 2.0, -np.inf, 4.0, -np.inf]]


def test_a_bound_of_any_size_is_no_bound():
    """One request's numbers must not end the batch that it is in."""
    request = question(min_tokens=2**40, top_k=2**40, seed=2**32 - 1)
    rows = [Next(request, 9, np.zeros(0, np.int32), [], None)]
    sampling = sampling_of(1, [0], rows, shaping_of(1, [0], rows, 5, 8))
    assert (sampling.top_k[0], sampling.shaping.least[0], sampling.seed[0]) == (2**31 - 1, 2**31 - 1, 2**32 - 1)


def test_a_plain_row_keeps_its_logits_bit_for_bit():
    logits = np.random.default_rng(0).normal(size=77).astype(np.float32) * 9
    rows = shaped(logits, [question(), question(repetition_penalty=1.7, presence_penalty=1.0)], (1, 2), (5, 6))
    assert rows[0].tobytes() == logits.tobytes() != rows[1].tobytes()


def test_min_p_keeps_what_is_likely_enough():
    assert set(drawn(min_p=0.7)) == {1, 3} and set(drawn(min_p=1.0)) == {1}  # of .1, .4, .05, .3, .15


def test_every_kind_of_row_at_once(model, engine):
    """Each as it is alone, the plain ones too, and nothing compiles."""
    (first,) = answers(engine, [question()])
    best = first.token_ids[0]
    requests = [
        question(),
        question(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
        question(logit_bias={best: -100.0}),
        question(min_tokens=12, logit_bias={model.tokenizer.eos_id: 50.0}),
        question(logit_bias={model.tokenizer.eos_id: 1000.0}),
        question(temperature=1.5, min_p=0.2, seed=5, logprobs=1),
        question(temperature=1.0, seed=3),
    ]
    with compilations() as compiled:
        together = answers(engine, requests)
        assert compiled() == 0
    assert [plain(answer).token_ids for answer in together] == [
        plain(model.answer_batch([request])[0]).token_ids for request in requests
    ]
    free, penalized, biased, long, ended, *_ = together
    assert free.token_ids == first.token_ids != penalized.token_ids
    assert best not in biased.token_ids and len(long.token_ids) == 12 and ended.token_ids == ()


def test_logprobs_are_those_of_a_full_forward_pass(model, engine, photos):
    """With and without an image, beside rows without scores; penalties and temperature do not change them."""
    requests = [
        question(),
        Request("Who?", photos[0], granularity=8, max_new_tokens=11, logprobs=20),
        question(logprobs=3, temperature=1.2, repetition_penalty=1.5),
    ]
    found = answers(engine, requests)
    assert found[0].logprobs == ()
    for request, answer in zip(requests[1:], found[1:], strict=True):
        wanted = scores_by_forward(model, request, answer.token_ids)
        assert [score.token for score in answer.logprobs] == list(answer.token_ids) != []
        for row, score in zip(wanted, answer.logprobs, strict=True):
            assert score.logprob == pytest.approx(row[score.token], abs=LOGPROB)
            top = sorted(row, reverse=True)[: request.logprobs]
            np.testing.assert_allclose(list(score.top.values()), top, atol=LOGPROB)
            np.testing.assert_allclose([row[token] for token in score.top], top, atol=LOGPROB)
    alone = model.answer_batch([requests[1]])[0]
    np.testing.assert_allclose([s.logprob for s in alone.logprobs], [s.logprob for s in found[1].logprobs], atol=1e-5)


def scores_by_forward(model, request, tokens):
    """Log-probabilities (n, V) at each token of an answer, from one pass over prompt and answer without a cache."""
    config, params = model.config, model.params
    sample = model.prepare(request).sample
    text = np.array([token for token in sample.tokens.ids if token != IMAGE])
    tiles = load_tiles(sample, config) if sample.sizes else np.zeros((1, 16, 16, 3), np.uint8)
    choice = (request.granularity,) * len(sample.sizes)
    index, length = prompt_index(sample, Shape(len(tiles), max(1, len(choice)), len(text), 1, 1.0), config, choice)

    @jax.jit
    def forward(params):
        pyramid = avg_llava.pyramid_of(config, params, tiles[None])
        prompt = avg_llava.embed(config, params, text[None])
        x = avg_llava.assemble(params, pyramid, prompt, index[None, :length])
        x = jnp.concatenate([x, avg_llava.embed(config, params, np.array(tokens[:-1], int)[None])], axis=1)
        logits = avg_llava.unembed(config, params, avg_llava.decoder(config, params, x))
        return jax.nn.log_softmax(logits[0, length - 1 :])

    return np.asarray(forward(params))


def test_sampling_out_of_range_is_one_line(model):
    for options, message in (
        ({"min_p": 1.5}, "min_p=1.5 must be in 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be over 0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must be finite"),
        ({"min_tokens": -1}, "min_tokens=-1 must be"),
        ({"logprobs": 21}, "logprobs=21 must be in 0 .. 20"),
        ({"logit_bias": {n: 0.5 for n in range(301)}}, "at most 300 entries"),
        ({"logit_bias": {600: 1.0}}, "logit_bias=600 is no token: ids are 0 .. 599"),
    ):
        with pytest.raises(ValueError, match=message):
            model.prepare(question(**options))
