"""The Python face: batches, streams, chats, stop strings, seeds and errors."""

import subprocess
import sys

import pytest

from avg_llava_jax import checkpoint
from avg_llava_jax.inference.api import AvgLlava, Request
from avg_llava_jax.models import one_cpu
from tests.conftest import TOKENIZER
from tests.random_model import plain, random_model, save_random_model


@pytest.fixture(scope="module")
def model(tiny, tokenizer):
    return random_model(tiny, tokenizer)


def test_a_batch_gives_what_each_gives_alone(model, photos):
    requests = [
        Request("Who stands left of 4?", photos[0], max_new_tokens=12),
        Request("What is the weather?", (), max_new_tokens=12),
        Request("What is the team's colour?", photos[1], max_new_tokens=5),
        Request("Compare <image> with <image>: which is larger?", photos[1:3], max_new_tokens=12),
        Request("Compare these.", photos[1:3], granularity=[16, "auto"], max_new_tokens=12),
        Request("Who stands left of 4?", photos[0], granularity=4, max_new_tokens=12),
        Request("Who stands left of 5?", photos[0], temperature=1.0, seed=3, max_new_tokens=12),
        Request("Who stands left of 4?", photos[0], temperature=1.3, seed=4, top_p=0.9, top_k=50, max_new_tokens=12),
        Request("Tell me more of it, " * 10, photos[0], max_new_tokens=12),
    ]
    together = [plain(answer) for answer in model.answer_batch(requests)]
    alone = [plain(model.answer_batch([request])[0]) for request in requests]
    assert together == alone

    assert len({answer.text for answer in alone}) > 5
    assert alone[1].granularity is None and alone[1].visual_tokens == 0
    assert isinstance(alone[3].granularity, tuple) and alone[4].granularity[0] == 16
    assert alone[5].granularity == 4 and alone[5].probabilities == ()
    assert alone[2].finish == "stop" or len(alone[2].token_ids) == 5


def test_seeds_repeat_and_differ(model, photos):
    texts = [model.answer(photos[0], "Who?", temperature=2.0, seed=seed, max_new_tokens=12).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stream_joins_to_the_answer(model, photos):
    for options in ({}, {"temperature": 1.5, "seed": 5}):
        answer = model.answer(photos[0], "Who stands left of 4?", max_new_tokens=12, **options)
        stream = model.stream(photos[0], "Who stands left of 4?", max_new_tokens=12, **options)
        pieces = list(stream)
        assert "".join(pieces) == answer.text == stream.answer.text
        assert len(pieces) > 1
        assert plain(stream.answer) == plain(answer)


def test_stop_strings_and_limits(model, photos):
    whole = model.answer(photos[0], "Who stands left of 4?", max_new_tokens=12)
    assert whole.finish == "length" and len(whole.token_ids) == 12
    stop = whole.text[len(whole.text) // 2 :][:2]
    before = whole.text[: whole.text.index(stop)].strip()
    cut = model.answer(photos[0], "Who stands left of 4?", max_new_tokens=12, stop=[stop, "never"])
    assert (cut.text, cut.finish) == (before, "stop")
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    stream = model.stream(photos[0], "Who stands left of 4?", max_new_tokens=12, stop=stop)
    assert "".join(stream) == before and plain(stream.answer) == plain(cut)


def test_an_end_token_ends_the_answer(model, photos):
    whole = model.answer(photos[0], "Who?", max_new_tokens=12)
    last = whole.token_ids[4]
    other = AvgLlava(model.config, model.params, model.tokenizer)
    other.stop_ids = (last,)
    answer = other.answer(photos[0], "Who?", max_new_tokens=12)
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(last)]
    assert answer.finish == "stop"


def test_a_chat_is_the_conversation_asked_anew(model, photos):
    chat = model.chat(max_new_tokens=6)
    first = chat.ask("Hello, who are you?")
    second = chat.ask("What is this?", photos[0])
    third = chat.ask("And this?", photos[1], granularity=8)
    turns = [
        {"from": "human", "value": "Hello, who are you?"},
        {"from": "gpt", "value": first.text},
        {"from": "human", "value": "<image>\nWhat is this?"},
    ]
    assert plain(model.answer(photos[0], turns, max_new_tokens=6)) == plain(second)
    turns += [{"from": "gpt", "value": second.text}, {"from": "human", "value": "<image>\nAnd this?"}]
    assert plain(model.answer(photos[:2], turns, max_new_tokens=6, granularity=8)) == plain(third)
    assert third.granularity == (8, 8)
    streamed = "".join(chat.stream("Sure?"))
    assert chat.turns[-1] == {"from": "gpt", "value": streamed} and len(chat.turns) == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"granularity": 5}, "granularity=5: choose auto, 4, 8, 16"),
        ({"granularity": "36"}, "granularity='36': choose auto, 4, 8, 16"),
        ({"granularity": [4, 8]}, "names 2 for 1 images"),
        ({"prompt": "<image> <image>?"}, "image_count: 1 images for 2 <image>"),
        ({"prompt": "", "images": ()}, "empty_question"),
        ({"prompt": "no image", "raw": True}, "1 images for 0 <image> in the prompt"),
        ({"prompt": "long " * 300}, "the model's limit is 256; no granularity would fit: shorten the prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be an integer"),
        ({"logprobs": True}, "logprobs=True must be an integer"),
        ({"temperature": "a"}, "temperature='a' must be a number"),
        ({"escalate": True}, "escalate=True must be a number"),
        ({"raw": "x"}, "raw='x' must be True or False"),
        ({"stop": 5}, "stop=5 must be a text or several"),
        ({"guide": "x"}, "guide='x' must be a Guide"),
        ({"images": 5}, "images=5 must be an image or several"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be over 0"),
        ({"stop": [""]}, "stop strings must be non-empty texts"),
        ({"images": "nowhere.png"}, "missing_image: nowhere.png: no such file"),
        ({"images": b"no image"}, "corrupt_image"),
        ({"images": [3]}, "an image is a path, bytes or a Pillow image, not int"),
    ],
)
def test_bad_requests_say_what_is_wrong(model, photos, options, message):
    request = {"images": photos[0], "prompt": "Who?"} | options
    with pytest.raises(ValueError) as error:
        model.answer(request.pop("images"), request.pop("prompt"), **request)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_batch_of_other_things_is_refused(model):
    with pytest.raises(ValueError, match="request 0 is a str, not a Request"):
        model.answer_batch(["Who?"])


def test_too_many_tokens_names_a_granularity_that_fits(model, photos):
    with pytest.raises(ValueError, match=r"takes \d+ tokens at granularity 16, 16, 16, .* granularity=8 would fit"):
        model.answer(photos[2:3] * 3, "Who?", granularity=16)
    with pytest.raises(ValueError, match="request 1: granularity=7"):
        model.answer_batch([Request("Who?"), Request("Who?", photos[0], granularity=7)])


def test_an_answer_ends_where_the_model_ends(model, photos):
    """At most `max_length` positions are ever read: 256 here, the prompt included."""
    answer = model.answer((), "a " * 100, max_new_tokens=400)
    prompt = model.prepare(Request("a " * 100)).sample.tokens.ids
    assert answer.finish == "stop" or len(prompt) + len(answer.token_ids) == 256 + 1


def test_a_saved_checkpoint_answers_as_the_model_did(model, photos, tmp_path):
    checkpoint.save_config(tmp_path, model.config)
    checkpoint.copy_tokenizer(TOKENIZER, tmp_path)
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(7, model.params)
    loaded = AvgLlava.load(tmp_path)
    assert loaded.step == 7
    options = {"prompt": "Who stands left of 4?", "max_new_tokens": 12}
    assert plain(loaded.answer(photos[0], **options)) == plain(model.answer(photos[0], **options))


def test_names_load_late():
    code = (
        "import sys, avg_llava_jax, avg_llava_jax.data; assert 'jax' not in sys.modules;"
        "from avg_llava_jax import AvgLlava; assert 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_accelerator_holds_layers_once(tiny, tokenizer, tmp_path, monkeypatch):
    """Where layers are copied to be unstacked, the stacked ones are freed; answers are the same."""
    wanted = save_random_model(tiny, tokenizer, tmp_path / "w").answer((), "Who?", max_new_tokens=4)
    monkeypatch.setattr(one_cpu, "here", lambda: False)
    monkeypatch.setattr(one_cpu, "unstack", lambda layers: None)
    model = AvgLlava.load(tmp_path / "w")
    assert isinstance(model.params["language"]["layers"], tuple)
    assert model.unstacked["language"]["layers"] is model.params["language"]["layers"]
    assert model.answer((), "Who?", max_new_tokens=4).token_ids == wanted.token_ids


def test_more_streams_than_the_queue_holds(model, photos):
    """Streams that nobody has begun to read are worked off when the next one wants a place."""
    streams = [model.stream(photos[0], "Who?", max_new_tokens=3) for _ in range(7)]
    texts = ["".join(stream) for stream in streams]
    assert len(set(texts)) == 1 and texts[0] == streams[-1].answer.text
