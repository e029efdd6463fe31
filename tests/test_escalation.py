"""Escalation in the engine: the answer is the last pass's own, token for token; nothing is encoded or compiled."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from avg_llava_jax.eval import explain
from avg_llava_jax.inference import engine as engine_module
from avg_llava_jax.inference.buckets import VERIFIED
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.stress import compilations
from tests.random_model import random_model
from tests.small_engine import ended


def run(engine, requests):
    return [ticket.result(0) for ticket in ended(engine, requests)]


def alone(model, request, granularity):
    """The answer at a granularity, without escalation."""
    return model.answer_batch([dataclasses.replace(request, granularity=granularity, escalate=0.0)])[0]


def test_the_answer_is_that_of_the_finest_granularity(model, engine, photos):
    """Among others in four slots: by the router, several images, sampled, with stop strings, cut by its limit."""
    whole = alone(model, Request("Who stands left of 4?", photos[0], max_new_tokens=24), 16).text
    requests = [
        Request("Who stands left of 4?", photos[0], granularity=4, escalate=1.0, max_new_tokens=24),
        Request("Who stands left of 4?", photos[0], granularity=4, escalate=1.0, max_new_tokens=24, stop=[whole[5:7]]),
        Request("What is the weather?", (), escalate=1.0, max_new_tokens=12),
        Request("Compare <image> with <image>.", photos[1:3], cost_weight=9.0, escalate=1.0, max_new_tokens=12),
        Request("Who?", photos[3], granularity=8, escalate=1.0, temperature=1.3, seed=4, max_new_tokens=16),
        Request("What is the team's colour?", photos[1], granularity=4, escalate=1.0, max_new_tokens=1),
        Request("Tell me more of it, " * 5, photos[0], granularity=4, max_new_tokens=40),
        Request("Who stands left of 5?", photos[2], granularity=4, escalate=1.0, max_new_tokens=200),
    ]
    before = engine.stats()
    with compilations() as compiled:
        together = run(engine, requests)
        assert compiled() == 0
    for request, answer in zip(requests, together, strict=True):
        finest = alone(model, request, 16 if request.escalate else 4)
        assert (answer.token_ids, answer.text, answer.finish) == (finest.token_ids, finest.text, finest.finish)
        assert answer.granularity == finest.granularity
        assert answer.certainty == pytest.approx(finest.certainty, abs=1e-4)
        assert answer.visual_tokens == sum(each.visual_tokens for each in answer.passes)
        escalated = bool(request.images) and request.escalate > 0
        assert len(answer.passes) == 1 + escalated and answer.passes[-1].visual_tokens == finest.visual_tokens
    after = engine.stats()
    assert after.escalated - before.escalated == 6
    assert after.image_misses - before.image_misses == 4, "each picture is encoded once"
    assert after.finished - before.finished == len(requests) == after.admitted - before.admitted


@pytest.mark.parametrize("agreed", [0, 1, 2, VERIFIED - 1, VERIFIED, VERIFIED + 5, 200])
def test_a_draft_is_kept_as_far_as_it_agrees(model, engine, photos, monkeypatch, agreed):
    """Drafts that agree in their first tokens, in a short and in a chunked prompt; the slot serves a next question."""
    prompts = ("Who stands left of 4?", "You are a careful referee. " * 4 + "Who stands left of 4?")
    requests = [Request(p, photos[0], granularity=4, escalate=1.0, max_new_tokens=64) for p in prompts]
    finest = [alone(model, request, 16) for request in requests]
    drafts = {request.prompt: [*answer.token_ids] for request, answer in zip(requests, finest, strict=True)}
    repack_finer = engine_module.repack_finer

    def drafted(config, job, pages, ended):
        right = drafts[job.prepared.request.prompt]
        wrong = [(token + 1) % 600 for token in right[agreed : agreed + 1]]
        job.tokens = right[:agreed] + wrong + [7, 8, 9]
        repack_finer(config, job, pages, False)

    with monkeypatch.context() as patch, compilations() as compiled:
        patch.setattr(engine_module, "repack_finer", drafted)
        before = engine.stats()
        found = run(engine, requests)
        assert compiled() == 0
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in finest]
    kept = [min(agreed, len(answer.token_ids) - 1) for answer in finest]
    assert engine.stats().verified_tokens - before.verified_tokens == sum(kept)
    turns = [{"from": "human", "value": prompts[0]}, {"from": "gpt", "value": found[0].text}]
    follow = Request([*turns, {"from": "human", "value": "Sure?"}], photos[0], granularity=16, max_new_tokens=8)
    assert run(engine, [follow])[0].token_ids == alone(model, follow, 16).token_ids


def test_only_an_uncertain_answer_escalates_at_its_first_uncertain_token(model, engine, photos):
    """Of some questions, one whose first token is not its least certain one."""
    asked = [Request(f"Who wears {number}?", photos[0], granularity=4, max_new_tokens=24) for number in range(6)]
    ones = run(engine, [dataclasses.replace(request, max_new_tokens=1) for request in asked])
    found = zip(asked, ones, run(engine, asked), strict=True)
    request, one, coarse = next(each for each in found if each[1].certainty > 1.01 * each[2].certainty)
    trusted = dataclasses.replace(request, escalate=coarse.certainty * 0.999)
    doubted = dataclasses.replace(request, escalate=min(1.0, coarse.certainty * 1.001))
    kept, dropped = run(engine, [trusted, doubted])
    assert kept.token_ids == coarse.token_ids and kept.granularity == 4 and len(kept.passes) == 1
    assert dropped.granularity == 16 and [each.granularity for each in dropped.passes] == [4, 16]
    assert dropped.passes[0].certainty == pytest.approx(coarse.certainty, rel=1e-4)
    first = run(engine, [dataclasses.replace(request, escalate=1.0)])[0].passes[0].certainty
    assert first == pytest.approx(one.certainty, rel=1e-4)


def test_certainty_is_the_lowest_probability(model, photos):
    prepared = model.prepare(Request("Who?", photos[0], granularity=8, max_new_tokens=1))
    (logits,) = model.first_logits([prepared])
    (answer,) = model.answer_prepared([prepared])
    assert answer.certainty == pytest.approx(float(np.exp(logits.max() - np.logaddexp.reduce(logits))), abs=1e-5)


def test_a_stream_shows_the_last_pass_alone(model, photos):
    options = {"granularity": 4, "max_new_tokens": 24}
    for escalate, granularity in ((1.0, 16), (1e-9, 4)):
        stream = model.stream(photos[0], "Who stands left of 4?", escalate=escalate, **options)
        pieces = list(stream)
        finest = model.answer(photos[0], "Who stands left of 4?", **options | {"granularity": granularity})
        assert "".join(pieces) == finest.text == stream.answer.text
        assert len(pieces) > 1 or granularity == 4, "a pass that may be dropped is shown once it is certain"


def test_all_passes_are_within_the_budget(model, photos):
    request = Request("Who?", photos[0], granularity=4, escalate=1.0, max_new_tokens=4)
    reads = {g: alone(model, request, g).visual_tokens for g in model.config.granularities}
    for budget, granularity in ((reads[4] + reads[16], 16), (reads[4] + reads[16] - 1, 8), (reads[4], 4)):
        answer = model.answer_batch([dataclasses.replace(request, max_visual_tokens=budget)])[0]
        assert answer.granularity == granularity and answer.visual_tokens <= budget
    with pytest.raises(ValueError, match=r"escalate=1.5 must be 0 \(off\), a probability or calibrated"):
        Request("Who?", escalate=1.5)


def test_passes_climb_two_steps_at_a_time(tiny, tokenizer, photos, tmp_path):
    """On a ladder of five: 1, 4, 16, or 2, 8, 16; each pass is kept where it is certain, and drafts the next."""
    ladder = dataclasses.replace(tiny, scaler=dataclasses.replace(tiny.scaler, halvings=4))
    assert ladder.granularities == (1, 2, 4, 8, 16)
    model = random_model(ladder, tokenizer)
    request = Request("Who stands left of 4?", photos[0], escalate=1.0, max_new_tokens=12)
    chains = {1: [1, 4, 16], 2: [2, 8, 16], 4: [4, 16], 8: [8, 16], 16: [16]}
    asked = [dataclasses.replace(request, granularity=g) for g in chains]
    finest = alone(model, request, 16)
    for answer, chain in zip(model.answer_batch(asked), chains.values(), strict=True):
        assert answer.token_ids == finest.token_ids and [each.granularity for each in answer.passes] == chain
        assert answer.visual_tokens == sum(alone(model, request, g).visual_tokens for g in chain)

    glance, look = (alone(model, request, g) for g in (1, 4))
    between = sorted((glance.certainty, look.certainty))
    middle = dataclasses.replace(request, granularity=1, escalate=sum(between) / 2)
    kept = model.answer_batch([middle])[0]
    if glance.certainty < look.certainty:
        assert [each.granularity for each in kept.passes] == [1, 4] and kept.token_ids == look.token_ids
    else:
        assert [each.granularity for each in kept.passes] == [1] and kept.token_ids == glance.token_ids

    tokens = {g: alone(model, request, g).visual_tokens for g in ladder.granularities}
    for budget, chain in (
        (tokens[1] + tokens[4] + tokens[16], [1, 4, 16]),
        (tokens[1] + tokens[4] + tokens[8], [1, 4, 8]),
        (tokens[1] + tokens[4] + tokens[8] - 1, [1, 4]),
        (tokens[1] + tokens[2], [1, 2]),
    ):
        answer = model.answer_batch([dataclasses.replace(asked[0], max_visual_tokens=budget)])[0]
        assert [each.granularity for each in answer.passes] == chain and answer.visual_tokens <= budget

    found = explain.explain(model, dataclasses.replace(request, cost_weight=100.0))
    assert [answer.passes[-1].granularity for answer in found.answers] == [1, 4, 16]
    assert [answer.text for answer in found.answers] == [glance.text, look.text, finest.text]
    explain.draw(found, tmp_path / "three.png")
    assert explain.look_names(3) == ["a glance", "another look", "a close look"]


def test_explain_draws_a_glance_and_a_close_look(model, photos, tmp_path):
    request = Request("Who stands left of 4?", photos[0], cost_weight=9.0, escalate=1.0, max_new_tokens=8)
    found = explain.explain(model, request)
    glance, close = found.answers
    assert (glance.granularity, close.granularity) == (4, 16) and close.text == alone(model, request, 16).text
    assert glance.text == alone(model, request, 4).text
    explain.draw(found, tmp_path / "two.png")
    certain = explain.explain(model, dataclasses.replace(request, escalate=1e-9))
    assert [answer.text for answer in certain.answers] == [glance.text]
    explain.draw(certain, tmp_path / "one.png")
    tall, short = (Image.open(tmp_path / f"{name}.png").height for name in ("two", "one"))
    assert tall == short == 1100
    assert explain.explain(model, dataclasses.replace(request, escalate=0.0)).answers == ()
