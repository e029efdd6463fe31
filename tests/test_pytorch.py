"""The adaptive model in PyTorch, from our exports: against ours on mixed batches, and against the released code."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaNextForConditionalGeneration,
)

from avg_llava_jax import SHIPPED, checkpoint
from avg_llava_jax.config import RouterConfig, ScalerConfig
from avg_llava_jax.convert import convert, llava_next
from avg_llava_jax.data.conversation import IMAGE, encode_prompt, encode_raw
from avg_llava_jax.data.images import image_ref
from avg_llava_jax.data.sources import open_source
from avg_llava_jax.data.tiles import make_tiles
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.models.vit import normalise
from tests.differences import agree
from tests.measured_pixels import TALL, measured_tiles
from tests.packed import packed_logits
from tests.random_model import random_model, save_random_model
from tests.test_convert import GOLDEN, SOURCE, TOWER, same_bits

CASES = {case["file"]: case for case in json.loads((GOLDEN / "index.json").read_text()) if "infer" in case["file"]}
PROMPTS = {  # question: sizes of its images; 3, 5 + 3 and 3 tiles, and none; none that Pillow 13 resizes otherwise
    "What colour is it?": [(40, 20)],
    "Which of the two is taller, and what stands beside it? Look twice.": [(31, 29), (7, 15)],
    "Who are you?": [],
    "How many?": [(90, 41)],
}


def load(folder):
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert type(model).__name__ in {style.adaptive for style in llava_next.STYLES.values()} and complete(report)
    return model


def complete(report):
    """No key of the files is unknown to the model, and none of the model's is missing in them."""
    return not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def ask(processor, questions, images, padding_side="left"):
    """Questions, each about some of the images, as the stock processor prepares them."""
    parts = [[{"type": "image"}] * len(about) + [{"type": "text", "text": q}] for q, about in questions.items()]
    texts = [processor.apply_chat_template([{"role": "user", "content": part}]) for part in parts]
    processor.tokenizer.padding_side = padding_side
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


def collapsed(ids, mask, image_token, counts):
    """One row of input_ids as ours: no padding, IMAGE for each run of as many image tokens as an image has."""
    row, counts = ids[mask.bool()].tolist(), list(counts)
    for at in range(len(row)):
        if at < len(row) and row[at] == image_token:
            row[at : at + counts.pop(0)] = [IMAGE]
    return row


@pytest.fixture(scope="module", params=["tokens, exact", "tiles, released"])
def pair(request, tiny, tokenizer, tmp_path_factory):
    """(ours, theirs, processor, export folder, images) of a random model in one of two make-ups."""
    attention, unpad = request.param.split(", ")
    config = dataclasses.replace(
        tiny,
        router=RouterConfig(attention, text_tokens=12, heads=2),
        scaler=ScalerConfig(2, "width" if unpad == "exact" else "height"),
        unpad=unpad,
        language=dataclasses.replace(tiny.language, tied_embeddings=False),  # tied, its logits reach hundreds
    )
    folder = tmp_path_factory.mktemp("pytorch")
    router = random_model(config, tokenizer).params["router"]
    router["voter"] = jax.random.normal(jax.random.key(1), router["voter"].shape)  # as it begins, all rows are alike
    ours = save_random_model(config, tokenizer, folder / "ours")
    convert.export_transformers(folder / "ours", folder / "theirs")
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (h // 3 + 1, w // 3 + 1, 3), np.uint8)).resize((w, h))
        for sizes in PROMPTS.values()
        for w, h in sizes
    ]
    return ours, load(folder / "theirs"), AutoProcessor.from_pretrained(folder / "theirs"), folder / "theirs", images


@pytest.fixture(scope="module")
def requests(pair):
    images = iter(pair[-1])
    return [Request(q, [next(images) for _ in sizes], max_new_tokens=8) for q, sizes in PROMPTS.items()]


@pytest.mark.parametrize(
    ("granularity", "padding_side"), [(None, "left"), (None, "right"), (4, "left"), (8, "right"), (16, "left")]
)
def test_logits_and_granularities(pair, requests, granularity, padding_side):
    ours, theirs, processor, _, images = pair
    inputs = ask(processor, PROMPTS, images, padding_side)
    with torch.no_grad():
        output = theirs(**inputs, granularity=granularity)
    logits, router_logits, choices = packed_logits(ours, requests, granularity, 192)
    assert output.granularities.tolist() == list(choices)
    if granularity is None:
        agree("adaptive in PyTorch: router", router_logits, output.router_logits)
        assert len(set(choices)) > 1
    for packed, row, mask in zip(logits, output.logits, output.attention_mask, strict=True):
        assert np.abs(packed).max() > 1
        agree("adaptive in PyTorch: logits", packed, row[mask, : packed.shape[1]])


def test_answers(pair, requests):
    """Greedy, a batch of mixed make-up, the ids as the library gives them: the prompt, then the answer."""
    ours, theirs, processor, _, images = pair
    inputs = ask(processor, PROMPTS, images)
    answers = ours.answer_batch(requests)
    ids = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for answer, row in zip(answers, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        assert row[: len(answer.token_ids)] == list(answer.token_ids)
        assert answer.finish == "length" or row[len(answer.token_ids)] in ours.stop_ids
    mixed = theirs.generate(**inputs, max_new_tokens=2, granularity=[4, 16, 8, 4], num_beams=2, num_return_sequences=2)
    assert mixed.shape == (8, inputs["input_ids"].shape[1] + 2)


def test_the_shipped_checkpoint(tmp_path):
    """Real weights, tied embeddings, two scenes of one batch and a question about none."""
    convert.export_transformers(SHIPPED, tmp_path / "theirs")
    ours, theirs = AvgLlava.load(), load(tmp_path / "theirs")
    scenes = open_source("jersey?split=test&size=12", "")
    images = [scenes[row]["images"][0].load() for row in (0, 3)]
    questions = {"What is the weather?": [1], "Who are you?": [], "What number is the player in red?": [1]}
    left = iter(images)
    answers = ours.answer_batch([Request(q, [next(left) for _ in n], max_new_tokens=6) for q, n in questions.items()])
    inputs = ask(AutoProcessor.from_pretrained(tmp_path / "theirs"), questions, images)
    with torch.no_grad():
        granularities = theirs(**inputs).granularities.tolist()
    assert granularities == [answer.granularity for answer in answers if answer.granularity]
    ids = theirs.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: len(a.token_ids)] for row, a in zip(ids, answers, strict=True)] == [
        list(a.token_ids) for a in answers
    ]


def test_labels_hide_the_answer_from_the_router(pair):
    """With labels: the loss is that of the answer, and the router reads what has no label."""
    _, theirs, processor, _, images = pair
    inputs = ask(processor, {"What colour is it?": [(40, 20)]}, images[:1])
    answer = torch.tensor([[11, 12, 13]])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    rest = {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}
    with torch.no_grad():
        asked = theirs(**inputs)
        told = theirs(input_ids=ids, labels=labels, **rest)
        read = theirs(input_ids=ids, **rest)
    torch.testing.assert_close(told.router_logits, asked.router_logits)
    assert (told.router_logits - read.router_logits).abs().max() > 1e-3
    nll = torch.nn.functional.cross_entropy(told.logits[0, -4:-1], answer[0])
    torch.testing.assert_close(told.loss, nll)


def test_ids_and_pixels_of_the_stock_processor(pair, requests):
    """The exported tokenizer, chat template and image processor against ours."""
    ours, theirs, processor, _, images = pair
    inputs = ask(processor, PROMPTS, images)
    counts = iter([theirs.processor_count(tuple(size)) for size in inputs["image_sizes"].tolist()])
    for request, ids, mask in zip(requests, inputs["input_ids"], inputs["attention_mask"], strict=True):
        row = collapsed(ids, mask, theirs.config.image_token_index, [next(counts) for _ in request.images])
        assert row == ours.prepare(request).sample.tokens.ids
    for image, tiles in zip(images, inputs["pixel_values"], strict=True):
        pixels = np.moveaxis(np.asarray(normalise(ours.config.vision, make_tiles(image, ours.config))), -1, 1)
        agree("image processor: pixels", pixels, tiles[: len(pixels)], 1e-5)


def test_transparency_is_dropped_as_the_card_says(pair):
    """`image.convert("RGB")` before the stock processor, and ours, see the colour under transparent pixels."""
    ours, _, processor, folder, _ = pair
    values = np.random.default_rng(1).integers(0, 256, (20, 40, 4), np.uint8)
    image, tiles = Image.fromarray(values), make_tiles(image_ref(Image.fromarray(values)).load(), ours.config)
    card = (folder / "README.md").read_text()
    assert 'processor(images=image.convert("RGB")' in card
    assert "apply_chat_template(turns, add_generation_prompt=True)" in card  # an own template needs it
    seen = ask(processor, {"What?": [image.size]}, [image.convert("RGB")])["pixel_values"][0]
    pixels = np.moveaxis(np.asarray(normalise(ours.config.vision, tiles)), -1, 1)
    agree("image processor: pixels", pixels, seen, 1e-5)


def test_one_folder_for_both_classes(pair, tmp_path):
    """Without trust_remote_code a LLaVA-NeXT that knows every key; and so again when PyTorch has saved it."""
    _, theirs, _, folder, _ = pair
    theirs.save_pretrained(tmp_path / "again")
    for place in (folder, tmp_path / "again"):
        plain, report = LlavaNextForConditionalGeneration.from_pretrained(place, output_loading_info=True)
        assert complete(report)
        assert {*theirs.state_dict()} - {*plain.state_dict()} == {f"router.{k}" for k in theirs.router.state_dict()}
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is LlavaNextForConditionalGeneration
    again = load(tmp_path / "again")
    assert all(torch.equal(mine, again.state_dict()[name]) for name, mine in theirs.state_dict().items())
    (tmp_path / "again" / "router" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="router/model.safetensors"):
        load(tmp_path / "again")


def test_comes_back_whole(pair, tmp_path):
    """In again: config, router and tensors; and out once more, file by file."""
    ours, folder = pair[0], pair[3]
    convert.import_folder(folder, tmp_path / "back")
    back = checkpoint.load(tmp_path / "back")
    rows = ours.config.language.vocab_size
    language = dataclasses.replace(back.config.language, vocab_size=rows)
    assert dataclasses.replace(back.config, language=language) == ours.config
    jax.tree.map(np.testing.assert_array_equal, back.params["router"], ours.params["router"])
    np.testing.assert_array_equal(back.params["language"]["embed"][:rows], ours.params["language"]["embed"])
    convert.export_transformers(tmp_path / "back", tmp_path / "out")
    for path in folder.rglob("*.*"):
        other = tmp_path / "out" / path.relative_to(folder)
        if path.suffix == ".safetensors":
            same_bits(load_file(path), load_file(other))
        elif path.suffix == ".json":
            assert json.loads(other.read_text()) == json.loads(path.read_text()), path.name
        elif path.name != "README.md":
            assert other.read_bytes() == path.read_bytes(), path.name
    broken = shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(broken / "router")
    with pytest.raises(FileNotFoundError, match="router holds no model.safetensors"):
        convert.import_folder(broken, tmp_path / "none")


def test_bad_inputs(pair):
    _, theirs, processor, _, images = pair
    inputs = ask(processor, PROMPTS, images)
    with pytest.raises(ValueError, match=r"granularity=5 is not one of this model's: \[4, 8, 16\]"):
        theirs.generate(**inputs, granularity=5)
    with pytest.raises(ValueError, match="names 2 for 4 images"):
        theirs.generate(**inputs, granularity=[4, 8])
    with pytest.raises(ValueError, match="row 0 has 1 image tokens where an image takes"):
        theirs(**inputs | {"input_ids": torch.tensor([[1, 600, 5]]), "attention_mask": None})
    with pytest.raises(ValueError, match="4 of 4 images have no image tokens"):
        theirs(**inputs | {"input_ids": torch.tensor([[1, 5]]), "attention_mask": None})


TEXTS = [
    "A chat",
    "What's  this?\n\nTwo\tlines ",
    "é日本 🙂 naïve",
    "US</s>USER: a</s> b",
    "I'm 12345.67%",
    "",
    "a",
    "\n",
]
TURNS = [("human", "Look <image>\nand <image> there"), ("gpt", "It's é."), ("human", " US or them?  ")]


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral_instruct"])
@pytest.mark.parametrize("legacy", [False, True, None])
def test_a_sentencepiece_tokenizer_goes_out_as_json(tmp_path, legacy, template):
    """With every rule for word boundaries: ids, text, and turns by the chat template are those that we make."""
    config = json.loads((SOURCE / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    shutil.copy(SOURCE / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    llava_next.save_tokenizer(tmp_path / "out", ours, {"<image>": 1000}, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = encode_raw(text, ours).ids
        assert theirs(text).input_ids == ids and theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    ids = encode_prompt([{"from": role, "value": value} for role, value in TURNS], ours, template, images=2).ids
    roles = {"human": "user", "gpt": "assistant"}
    rendered = theirs.apply_chat_template([{"role": roles[r], "content": v} for r, v in TURNS], tokenize=False)
    assert theirs(rendered).input_ids == [1000 if token == IMAGE else token for token in ids]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released code's checkpoint, imported and exported: (model, processor, our config)."""
    folder = tmp_path_factory.mktemp("released")
    convert.import_folder(SOURCE, folder / "ours", TOWER)
    convert.export_transformers(folder / "ours", folder / "theirs", shard_size=200_000)
    config, _ = checkpoint.read_config(folder / "ours")
    return load(folder / "theirs"), AutoProcessor.from_pretrained(folder / "theirs"), config


@pytest.mark.parametrize("name", ["500x375_short", "672x336_long", "300x1000_short"])
def test_against_the_released_code(released, name):
    """Its tensors, measured: ids, the router, logits and answers."""
    model, processor, config = released
    case = CASES[f"infer_{name}.npz"]
    golden = np.load(GOLDEN / case["file"])
    question = case["prompt"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
    image = Image.open(GOLDEN / case["image"]).convert("RGB")
    inputs = ask(processor, {question: [image.size]}, [image])
    count = model.processor_count(tuple(inputs["image_sizes"][0].tolist()))
    row = collapsed(inputs["input_ids"][0], inputs["attention_mask"][0], model.config.image_token_index, [count])
    np.testing.assert_array_equal(row, golden["input_ids"])
    seen, picture = inputs["pixel_values"][0], pathlib.Path(case["image"]).name
    if picture == TALL:  # the processor resizes in one call: which axis it takes first is the Pillow release's choice
        overview = normalise(config.vision, measured_tiles(image, config, picture)[0])
        seen[0] = torch.from_numpy(np.moveaxis(np.array(overview), -1, 0))
    agree("image processor: pixels", golden["pixel_values.0[:,:,::16,::16]"], seen[:, :, ::16, ::16], 1e-5)
    for granularity in (None, *model.granularities):
        key = "router" if granularity is None else granularity
        with torch.no_grad():
            output = model(**inputs, granularity=granularity)
        if granularity is None:
            agree("released code: router", golden["router_logits.0"], output.router_logits)
            assert output.granularities.tolist() == golden["router_choice_granularity"].tolist()
        agree("released code: logits", golden[f"logits.{key}[-1]"], output.logits[0, -1, :1000])
        answer = golden[f"generate.{key}"][1:].tolist()  # after BOS
        ids = model.generate(**inputs, granularity=granularity, max_new_tokens=len(answer), do_sample=False)
        assert ids[0, inputs["input_ids"].shape[1] :].tolist() == answer
