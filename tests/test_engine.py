"""The engine: the same answers as one at a time, whatever runs beside them, and nothing compiles."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from avg_llava_jax.inference import programs
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.engine import Cancelled, QueueFull
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.stress import compilations, stress
from avg_llava_jax.parallel import sharding
from tests.random_model import plain
from tests.small_engine import ended, make


def answers(engine, requests):
    """The outcome of each request: an answer less its times, or an error."""
    outcomes = []
    for ticket in ended(engine, requests):
        try:
            outcomes.append(plain(ticket.result(0)))
        except (RuntimeError, ValueError, Cancelled) as error:
            outcomes.append(error)
    return outcomes


def alone(model, request):
    return plain(model.answer_batch([request])[0])


def test_every_answer_is_what_the_model_says_alone(model, engine, photos):
    """Eight requests in four slots: text alone, several images, sampling, prompts of one chunk and of six."""
    requests = [
        Request("Who stands left of 4?", photos[0], max_new_tokens=16),
        Request("What is the weather?", (), max_new_tokens=12),
        Request("What is the team's colour?", photos[1], max_new_tokens=1),
        Request("Compare <image> with <image>: which is larger?", photos[1:3], max_new_tokens=12),
        Request("Compare these.", photos[1:3], granularity=[16, "auto"], max_new_tokens=12),
        Request("Who stands left of 5?", photos[0], temperature=1.0, seed=3, max_new_tokens=12),
        Request("Who?", photos[0], temperature=1.3, seed=4, top_p=0.9, top_k=50, max_new_tokens=16),
        Request("Tell me more of it, " * 5, photos[0], cost_weight=9.0, max_new_tokens=64),
    ]
    with compilations() as compiled:
        together = answers(engine, requests)
        assert compiled() == 0
    assert together == [alone(model, request) for request in requests]
    assert len({answer.text for answer in together}) > 6
    windows = engine.buckets.windows
    prompt = len(model.prepare(requests[-1]).sample.tokens.ids) - 1 + together[-1].visual_tokens
    assert prompt < windows[0] < prompt + len(together[-1].token_ids), "the answer outgrows the smaller window"


def test_the_counter_of_compilations_counts():
    with compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(np.arange(3))
        assert compiled() == 1
    jax.jit(lambda x: x * 5 + 1)(np.arange(3))
    assert compiled() == 1


def test_a_program_compiled_ahead_is_not_compiled_again(model):
    program = sharding.jit(lambda config, params, x: params["image_newline"] + x, static_argnums=0)
    given = model.config, model.params, np.ones(1, np.float32)
    with compilations() as compiled, ThreadPoolExecutor(1) as pool:
        pool.submit(program.compile, *given).result()
        assert compiled() == 1
        program(*given)
        assert compiled() == 1


def test_warm_up_compiles_each_program_once(tiny, tokenizer, engine, capsys):
    assert engine.buckets.programs == 20
    with compilations() as compiled:
        engine.warm_up()
        assert compiled() == 0
    assert "engine: 20 programs" in capsys.readouterr().out


def test_stop_strings_and_end_tokens(model, engine, photos):
    whole = alone(model, Request("Who stands left of 4?", photos[0], max_new_tokens=24))
    stop = whole.text[len(whole.text) // 2 :][:2]
    requests = [
        Request("Who stands left of 4?", photos[0], max_new_tokens=24, stop=[stop, "never"]),
        Request("Who stands left of 4?", photos[0], max_new_tokens=24),
    ]
    cut, again = answers(engine, requests)
    assert again == whole and cut == alone(model, requests[0])
    assert cut.finish == "stop" and len(cut.token_ids) < 24

    ids = whole.token_ids
    other = AvgLlava(model.config, model.params, model.tokenizer)
    other.stop_ids = (ids[5],)
    (ended,) = answers(make(other), requests[1:])
    assert ended.token_ids == ids[: ids.index(ids[5])] and ended.finish == "stop"


def test_a_chat_reads_what_is_new_alone_and_says_the_same(model, photos):
    engine = make(model)
    turns, images = [], []
    shared = []
    for prompt, new in (("What is <image> this?", photos[:1]), ("And <image> this?", photos[1:2]), ("Sure?", [])):
        turns = [*turns, {"from": "human", "value": prompt}]
        images += new
        before = engine.stats().prefix_tokens
        (answer,) = answers(engine, [Request(turns, images, granularity=8, max_new_tokens=10)])
        assert answer == alone(model, Request(turns, images, granularity=8, max_new_tokens=10))
        shared.append(engine.stats().prefix_tokens - before)
        turns = [*turns, {"from": "gpt", "value": answer.text}]
        others = [Request("Something else: " + prompt[:3], photos[3], max_new_tokens=9)]
        assert answers(engine, others) == [alone(model, others[0])]
    assert shared[0] == 0 and 20 < shared[1] < shared[2]
    stats = engine.stats()
    assert (stats.image_hits, stats.image_misses) == (5, 3)
    assert stats.finished == stats.admitted == 6 and stats.granularities[8] >= 5


def test_a_beginning_is_shared_between_slots(model, photos):
    engine = make(model)
    system = "You are a careful referee who looks at shirts and numbers before he says anything at all. "
    requests = [
        Request(system + end, photos[0], granularity=4, max_new_tokens=20) for end in ("Who?", "Which field is it?")
    ]
    first = engine.submit(requests[0])
    while not first._pieces.qsize():
        engine.step()  # the first runs on while the second begins
    second = engine.submit(requests[1])
    while engine.step():
        pass
    assert [plain(ticket.result(0)) for ticket in (first, second)] == [alone(model, request) for request in requests]
    assert engine.stats().prefix_tokens > 40


def test_bad_requests_fail_alone(model, engine, photos):
    good = Request("Who?", photos[0], max_new_tokens=6)
    ticket = engine.submit(good)
    for bad, message in (
        ({"images": b"no image"}, "corrupt_image"),
        ({"images": photos[:1] * 50}, "150 tiles"),
        ({"granularity": 5}, "granularity=5: choose auto, 4, 8, 16"),
        ({"prompt": "long " * 300}, "the model's limit is 256"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            engine.submit(Request(**{"prompt": "Who?", "images": photos[0]} | bad))
        assert "\n" not in str(error.value)
    while engine.step():
        pass
    assert plain(ticket.result(0)) == alone(model, good) and engine.stats().rejected >= 4


def test_a_choice_that_does_not_fit_fails_alone(model, photos):
    """The router's choice decides whether a prompt fits: all but the coarsest do not, and it takes the finest."""
    router = model.params["router"] | {"norm": model.params["router"]["norm"] | {"bias": np.array([0.0, 0.0, 9.0])}}
    fine = AvgLlava(model.config, model.params | {"router": jax.device_put(router, jax.devices()[0])}, model.tokenizer)
    engine, good = make(fine), Request("Who?", photos[0], max_new_tokens=6)
    outcomes = answers(engine, [Request("long " * 85 + "Who?", photos[2:3] * 2), good])
    assert isinstance(outcomes[0], ValueError) and "granularity=4 would fit" in str(outcomes[0])
    assert outcomes[1] == alone(fine, good) and engine.stats().failed == 1


def test_less_than_the_models_length(model, photos):
    patient = make(model, max_length=64, chunk=None)
    for prompt, new in (("Who?", 200), ("Who? " * 20, 8)):
        with pytest.raises(ValueError, match=r"prompt and answer take up to \d+ positions, a slot has \d+"):
            patient.submit(Request(prompt, photos[0], max_new_tokens=new))
    engine = make(model, max_length=100)
    (answer,) = answers(engine, [Request("Who?", photos[0], granularity=4, max_new_tokens=200)])
    prompt = len(model.prepare(Request("Who?", photos[0])).sample.tokens.ids) - 1 + answer.visual_tokens
    assert answer.finish == "stop" or prompt + len(answer.token_ids) == 100 + 1
    with pytest.raises(ValueError, match="max_length=300 is over the model's 256"):
        make(model, max_length=300)


def test_a_cancelled_request_frees_its_slot(model, engine, photos):
    one = [Request("Who?", photos[0], max_new_tokens=200, seed=n) for n in range(6)]
    tickets = [engine.submit(request) for request in one]
    for _ in range(12):
        engine.step()
    assert engine.stats().running == 4 and engine.stats().waiting == 2
    before = engine.stats()
    for ticket in (tickets[0], tickets[5]):
        ticket.cancel()
    engine.step()
    assert engine.stats().running == 4 and engine.stats().waiting == 0
    while engine.step():
        pass
    for number, ticket in enumerate(tickets):
        if number in (0, 5):
            with pytest.raises(Cancelled):
                ticket.result(0)
            with pytest.raises(Cancelled):
                list(ticket.pieces())
        else:
            assert plain(ticket.result(0)) == alone(model, one[number])
    assert engine.stats().cancelled == before.cancelled + 2


def test_a_failing_device_fails_what_runs_and_nothing_else(model, engine, photos, monkeypatch):
    requests = [Request("Who?", photos[0], max_new_tokens=100 - 90 * (n == 2)) for n in range(3)]
    tickets = [engine.submit(request) for request in requests[:2]]
    for _ in range(5):
        engine.step()

    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand many lines more")

    with monkeypatch.context() as patch:
        patch.setattr(programs, "decode", fail)
        engine.step()
    for ticket in tickets:
        with pytest.raises(RuntimeError, match="^the device failed: RESOURCE_EXHAUSTED: out of memory$"):
            ticket.result(0)
    assert answers(engine, requests[2:]) == [alone(model, requests[2])]


@pytest.mark.parametrize("program", ["encode", "route", "prefill", "decode"])
def test_ctrl_c_at_a_program_leaves_a_model_that_answers(model, photos, monkeypatch, program):
    """Between the call, which takes the cache, and its result."""
    request = Request("Who wears 7?", photos[0], max_new_tokens=6)
    before = model.answer_batch([request])[0].text
    original = getattr(programs, program)

    def interrupted(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    model.forget()
    with monkeypatch.context() as patch:
        patch.setattr(programs, program, interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.answer_batch([request])
    assert model.answer_batch([request])[0].text == before


def test_an_open_stream_is_not_forgotten(model, photos):
    stream = model.stream(photos[0], "Who?", max_new_tokens=20)
    pieces = iter(stream)
    next(pieces)
    with pytest.raises(RuntimeError, match="close a stream that is not read to its end"):
        model.forget()
    pieces.close()
    stream.close()
    model.forget()


def test_a_thread_answers_streams_and_closes(model, photos):
    engine = make(model, queue=3)
    places = engine.buckets.slots + 3  # none is admitted before the first step
    first = [engine.submit(Request("Who?", photos[0], max_new_tokens=12)) for _ in range(places)]
    with pytest.raises(QueueFull, match="3 requests wait already"):
        engine.submit(Request("Who?", photos[0], max_new_tokens=12))
    engine.start()
    assert len({ticket.result().text for ticket in first}) == 1
    pieces = {}

    def ask(number):
        ticket = engine.submit(Request(f"Who wears {number}?", photos[number], max_new_tokens=20))
        pieces[number] = list(ticket.pieces())
        assert "".join(pieces[number]) == ticket.result().text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
        thread.join() if thread is threads[0] else None
    for thread in threads:
        thread.join()
    for number in range(3):
        answer = alone(model, Request(f"Who wears {number}?", photos[number], max_new_tokens=20))
        assert "".join(pieces[number]) == answer.text and len(pieces[number]) > 1
    last = engine.submit(Request("Who?", photos[0], max_new_tokens=12))
    with pytest.raises(TimeoutError):
        engine.submit(Request("Who?", photos[0], max_new_tokens=200)).result(1e-9)
    engine.close()
    assert last.result(0).text and engine.stats().waiting == engine.stats().running == 0
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(Request("Who?"))


def test_closing_without_draining_cancels(model, photos):
    engine = make(model)
    tickets = [engine.submit(Request("Who?", photos[0], max_new_tokens=100)) for _ in range(6)]
    for _ in range(8):
        engine.step()
    engine.close(drain=False)
    for ticket in tickets:
        with pytest.raises(Cancelled):
            ticket.result(0)


def test_stress(model, engine):
    """Sixty requests of every make-up, eight at once; `launch/bench/stress.py` sends as many as one likes."""
    engine = make(model)
    engine.start()
    report = stress(engine, 60, 8, largest=80)
    engine.close()
    assert report.wrong == [] and report.compilations == 0 and report.device_bytes == 0
    assert sum(report.outcomes.values()) == 60 and report.outcomes["answered"] > 45
    assert report.outcomes["malformed"] and report.outcomes["cancelled"]
