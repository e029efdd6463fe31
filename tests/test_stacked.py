"""Several adapters on one base: each row answers as its merged model alone, and the base's rows as the base."""

import collections
import json

import jax
import numpy as np
import pytest

from avg_llava_jax import adapters, checkpoint, parameters
from avg_llava_jax.commands.serve import adapters_of
from avg_llava_jax.convert import convert
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.inference.requests import Request
from avg_llava_jax.inference.stress import compilations
from tests.random_model import save_random_model
from tests.small_engine import ended, make
from tests.test_adapter_files import write

QUESTION = "Who stands left of 4?"


def adapted(config, params, seed, rank, targets):
    """A model with adapters that change its answers, and with a connector, newline and router of its own."""
    leaves = adapters.init(config, targets, rank, 1.5, jax.random.key(seed))
    for number, (path, leaf) in enumerate(leaves.items()):
        if path.endswith("lora_b"):
            leaves[path] = 0.3 * jax.random.normal(jax.random.key(10 * seed + number), leaf.shape)
    own = parameters.flat(params)
    for path in own:
        if parameters.TABLE[path].component in ("connector", "router"):
            own[path] = own[path] + 0.1 * seed * jax.random.normal(jax.random.key(seed), own[path].shape)
    return parameters.unflat(own | leaves)


@pytest.fixture(scope="module")
def root(tiny, tokenizer, tmp_path_factory):
    """A base and two runs of adapters on it, of other ranks and targets: `a`, and `b` as peft's files too."""
    root = tmp_path_factory.mktemp("stacked")
    base = save_random_model(tiny, tokenizer, root / "base")
    reference = checkpoint.refer(root / "base")
    for name, seed, targets in (("a", 1, ("language", "encoder/q")), ("b", 2, ("language/q", "language/up"))):
        params = adapted(tiny, base.params, seed, 1 + seed, targets)
        meta = {"step": seed, "training": None, "granularities_trained": None, "base": reference}
        convert.write_checkpoint(checkpoint.Loaded(tiny, params, tokenizer.folder, meta), root / name)
    convert.export_peft(root / "b", root / "peft")
    return root


@pytest.fixture(scope="module")
def several(root):
    return AvgLlava.load(root / "base", adapters={"a": root / "a", "b": root / "peft"})


def asked(photos, adapter):
    """Two questions, the same of each adapter: prefixes or images that were shared wrongly would show."""
    options = {"max_new_tokens": 12, "adapter": adapter}
    longer = f"Look closely. {QUESTION} And who stands right of it?"
    return [Request(QUESTION, photos[:1], **options), Request(longer, photos[1:2], **options)]


def test_rows_answer_as_merged_models(root, several, photos):
    """Token for token, logits to 1e-4, whatever shares the batch; nothing compiles after the warm-up."""
    engine = make(several, max_length=128)
    engine.warm_up()
    mixed = [request for name in (None, "a", "b") for request in asked(photos, name)]
    with compilations() as compiled:
        again = ended(engine, mixed[::-1])[::-1]
        tickets = [engine.submit_prepared(several.prepare(request), keep_logits=True) for request in mixed]
        while engine.step():
            pass
        assert compiled() == 0
    assert engine.stats().prefix_hits and engine.stats().image_hits  # each shares with itself alone
    said: dict[str | None, list] = collections.defaultdict(list)
    for number, name in enumerate((None, "a", "b")):
        if name is not None:
            convert.merge(root / name, root / f"merged-{name}")
        alone = AvgLlava.load(root / "base" if name is None else root / f"merged-{name}")
        prepared = [alone.prepare(request) for request in asked(photos, None)]
        for row, wanted in enumerate(alone._ended(prepared, 2, keep_logits=True), 2 * number):
            answer = wanted.result()
            for found in (tickets[row].result(), again[row].result()):
                assert (found.token_ids, found.granularity) == (answer.token_ids, answer.granularity)
            # The random model's logits reach 75, where 1e-4 is ten roundings.
            np.testing.assert_allclose(tickets[row].logits, wanted.logits, atol=2e-4, rtol=1e-4)
            said[name].append(answer.token_ids)
    assert said[None] != said["a"] != said["b"] != said[None]  # the adapters do something


def test_bad_adapters(root, tiny, tokenizer, tmp_path):
    """One line each, which names the folder or the name."""

    def load(folder, base=root / "base"):
        return AvgLlava.load(base, adapters={"x": folder})

    base = checkpoint.load(root / "base")
    changed = parameters.flat(base.params)
    changed["language/layers/q/kernel"] *= 1.001
    other = tmp_path / "other"
    convert.write_checkpoint(base._replace(params=parameters.unflat(changed)), other)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (root / "peft").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[: -40 if file.suffix == ".safetensors" else None])
    for folder, on, error, message in (
        (root / "a", other, ValueError, "a was trained on another base than .*other: its own is .*base"),
        (root / "base", root / "base", ValueError, "base holds a whole model, no adapter of one"),
        (root / "b", root / "a", ValueError, "a has adapters itself: serve its base, or fold them in"),
        (damaged, root / "base", ValueError, "adapter_model.safetensors is truncated or damaged"),
        (tmp_path / "gone", root / "base", FileNotFoundError, "gone is not a checkpoint folder"),
    ):
        with pytest.raises(error, match=message) as raised:
            load(folder, on)
        assert "\n" not in str(raised.value)
    unknown = write(tmp_path / "unknown", root / "base", {"base_model.model.lm_head.lora_A.weight": np.zeros((2, 16))})
    with pytest.raises(ValueError, match="lm_head.lora_A.weight' is unknown, or is on a layer that takes no adapter"):
        load(unknown)
    values = json.loads((root / "a" / "config.json").read_text())
    values["model"]["template"] = "vicuna_v1"
    for file in (root / "a").rglob("*"):
        target = tmp_path / "template" / file.relative_to(root / "a")
        target.mkdir(parents=True, exist_ok=True) if file.is_dir() else target.write_bytes(file.read_bytes())
    (tmp_path / "template" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="cannot be served with .*base: model.template is 'vicuna_v1' there"):
        load(tmp_path / "template")


def test_names(several, photos):
    assert adapters_of(["a=A", "b=x=y"], "base") == {"a": "A", "b": "x=y"}
    for texts, message in (
        (["a"], "--adapter=a: write NAME=FOLDER"),
        (["=A"], "--adapter==A: write NAME=FOLDER"),
        (["a=A", "a=B"], "--adapter=a=B: the name 'a' is taken"),
        (["base=A"], "--adapter=base=A: the name 'base' is taken"),
        (["a=gs://b/c"], "gs://b/c"),
    ):
        with pytest.raises(ValueError, match=message):
            adapters_of(texts, "base")
    with pytest.raises(ValueError, match="adapter='c': choose 'a', 'b'"):
        several.prepare(Request(QUESTION, photos[:1], adapter="c"))
    with pytest.raises(ValueError, match="escalate=calibrated is known for the base, not for adapter='a'"):
        several.prepare(Request(QUESTION, photos[:1], adapter="a", escalate="calibrated"))
