"""The ablations, with routers of a tiny model that train for two steps, and what each changes of a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import checkpoint
from avg_llava_jax.configs import ablations
from avg_llava_jax.data.jersey import Jersey
from avg_llava_jax.eval import evaluation, policies, quickstart, routing
from avg_llava_jax.inference.api import AvgLlava
from avg_llava_jax.parallel import sharding
from avg_llava_jax.training import rglf, setup
from avg_llava_jax.training.config import read
from launch.bench import ablate
from tests.random_model import random_model, save_random_model

DOCUMENT = "Before.\n\n<!-- ablations: python -m launch.bench.ablate -->\nold\n<!-- end of ablations -->\n\nAfter.\n"
TINY = {"seeds": 1, "steps": 2, "pictures": 16, "questions": 6}


def test_asks_once_trains_many_and_goes_on(tiny, tokenizer, tmp_path, capsys, monkeypatch):
    model = save_random_model(tiny, tokenizer, tmp_path / "model")
    source, workdir, document = str(tmp_path / "model"), tmp_path / "run", tmp_path / "ablations.md"
    document.write_text(DOCUMENT)
    ablate.run(workdir, source, ["no_instruction"], **TINY)
    router = workdir / "no_instruction-0"
    before = checkpoint.steps(router), (router / "outcome.json").read_text()
    (router / "outcome.json").unlink()  # as if it had been killed just then

    asked, trained = [], []
    original = quickstart.train_router

    def train_router(config, stored, folder):
        trained.append((folder.name, stored))
        if config.model.unpad is None:
            return original(config, stored, folder)
        assert (folder / ablate.RECIPE).is_file()
        return model

    def collect_feedback(model, config, folder):
        asked.append((folder.name, model.config.unpad))
        return folder / "feedback"

    monkeypatch.setattr(quickstart, "train_router", train_router)
    monkeypatch.setattr(quickstart, "collect_feedback", collect_feedback)
    capsys.readouterr()
    text = ablate.run(workdir, source, ["no_instruction", "unpad_released"], **TINY, document=str(document))
    out, progress = capsys.readouterr()
    assert asked == [("exact", "exact"), ("released", "released")]
    assert trained == [
        ("no_instruction-0", workdir / "exact" / "feedback"),
        ("unpad_released-0", workdir / "released" / "feedback"),
    ]
    assert "2 routers to train" in out
    assert "2/2 unpad_released, seed 0: accuracy" in progress and "ETA 0:00:00" in progress
    assert (checkpoint.steps(router), (router / "outcome.json").read_text()) == before
    assert checkpoint.read_config(router)[0].router.text_tokens == 0
    start, end = (checkpoint.load(folder).params["router"] for folder in (source, router))
    moved = np.abs(start["logits"]["kernel"] - end["logits"]["kernel"]).max()
    assert moved > 10 * 2 * 4e-3  # further than two steps go: it began anew

    assert document.read_text() == DOCUMENT.replace("old\n", f"\n{text}\n")
    assert (workdir / "table.md").read_text() == text
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[2:]]
    always = [f"always {g}" for g in tiny.granularities]
    assert names == [*always, "oracle", "random choice", "no_instruction", "unpad_released"]
    assert text.count("70.1 / 53.9 / 1525 / 69.0") == 1
    assert (workdir / "plots" / "ablations.png").stat().st_size > 5000
    with pytest.raises(ValueError, match=r"holds answers for steps=2, not 3: use another --workdir"):
        ablate.run(workdir, source, ["full"], **(TINY | {"steps": 3}))
    with pytest.raises(ValueError, match="configs/ablations.py:none: choose full, no_rank_loss"):
        ablate.run(workdir, source, ["none"], **TINY)
    document.write_text("Nothing.\n")
    with pytest.raises(ValueError, match="does not say where the tables go"):
        ablate.run(workdir, source, ["full"], **TINY, document=str(document))


def test_means_and_deviations():
    runs = [dict.fromkeys(ablate.COLUMNS, value) for value in (0.5, 0.7)]
    runs[1]["oracle_gap"] = None
    text = ablate.table({"always 4": runs[1]}, {"full": runs})
    fixed, full = (line.split(" | ") for line in text.splitlines()[2:])
    assert fixed[1:4] == ["0.700", "0.7", ""]
    assert full[1:5] == ["0.600 ± 0.141", "0.6 ± 0.1", "0.50 ± 0.00", "60% ± 14%"]


def test_the_measures(tiny):
    """Two coarse, two fine questions and a near one; the oracle is right on one more than the best fixed."""
    right = {"a": (1, 1, 1), "b": (1, 0, 0), "c": (0, 0, 1), "d": (0, 1, 1), "e": (0, 0, 0)}
    kinds = dict(zip("abcde", ("coarse", "coarse", "fine", "fine", "near"), strict=True))
    records = [
        {
            "id": name,
            "kind": kinds[name],
            "right": dict(zip((4, 8, 16), row, strict=True)),
            "visual_tokens": {4: 8, 8: 16, 16: 32},
            "chosen": [4],
        }
        for name, row in right.items()
    ]
    found = ablate.measure(tiny, records, [(4,), (16,), (16,), (4,), (8,)])
    assert found["accuracy"] == 0.4 and found["visual_tokens"] == (8 + 32 + 32 + 8 + 16) / 5
    assert found["oracle_gap"] == pytest.approx((0.4 - 0.6) / (0.8 - 0.6))
    assert found["coarse_cheap"] == 0.5 and found["fine_close"] == 0.5 and found["near_tokens"] == 16
    assert policies.oracle_gap(0.5, 0.6, 0.6) is None


def test_instruction_tuning_minimises_the_expected_nll():
    """Its gradient is p[g] * (nll[g] - expected nll); no ranking and no ties are in it."""
    rng = np.random.default_rng(0)
    logits, nll = rng.normal(size=(3, 4)), rng.uniform(0, 2, (3, 4))
    valid = jnp.array([True, False, True])
    weights = {"margin": 1.0, "rank_weight": 0.0, "ce_weight": 0.0, "nll_weight": 2.0, "tie_nats": 0.5}
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = (p * nll).sum(axis=1, keepdims=True)
    (value, _), grad = jax.value_and_grad(
        lambda x: rglf.rglf_loss(x, jnp.asarray(nll), valid, **weights), has_aux=True
    )(jnp.asarray(logits))
    np.testing.assert_allclose(value, expected[[0, 2]].sum(), rtol=1e-5)
    by_hand = p * (nll - expected)
    by_hand[1] = 0
    np.testing.assert_allclose(grad, by_hand, atol=1e-6)


def test_every_ablation_changes_one_thing_of_the_recipe():
    full = ablations.get_config().to_dict()
    assert full["fresh"] == ("router",) and "nll_weight" in full["rglf"]
    for name, changes in ablations.ABLATIONS.items():
        leaves, others = (setup.leaves(config) for config in (full, ablations.get_config(name).to_dict()))
        assert {key for key in leaves if leaves[key] != others[key]} == changes.keys(), name


def test_fresh_names_components():
    config = ablations.get_config()
    config.fresh = ("voter",)
    with pytest.raises(ValueError, match="fresh names 'voter': the components are encoder, connector, router"):
        setup.check(read(config), sharding.make_mesh(config.mesh))


@pytest.mark.parametrize("changes", [{"text_tokens": 0}, {"text_tokens": 40}, {"attention": "tiles"}], ids=str)
def test_another_router_over_what_was_seen_once(tiny, tokenizer, changes):
    """Routing from kept encodings is routing anew, for another form of the router and for another ladder."""
    model = random_model(tiny, tokenizer)
    questions, _ = evaluation.read_questions(Jersey("test", 5, paired=True), tokenizer, tiny)
    samples = [question.sample for question in questions]
    seen = list(routing.encode_all(model, samples, 4))
    scaler = dataclasses.replace(tiny.scaler, halvings=3)
    config = dataclasses.replace(tiny, router=dataclasses.replace(tiny.router, **changes), scaler=scaler)
    router = random_model(config, tokenizer).params["router"]
    other = AvgLlava(config, {**model.params, "router": router}, tokenizer)
    kept, anew = routing.route_encoded(other, seen), routing.route_all(other, samples, 4)
    assert len(kept) == 5 and all(row.shape == (1, 4) for row in kept)
    np.testing.assert_allclose(np.stack(kept), np.stack(anew), atol=1e-5)
    assert np.std(np.stack(kept)[:, 0, 0]) > 1e-4
    # Tiles of several images in a batch, and a last one with room.
    pyramids = routing.encode_once(model, samples, batch_size=7)
    assert len(pyramids) == 4 and {len(pyramid) for pyramid in pyramids.values()} >= {3, 5}
    from_host = routing.route_all(other, samples, 4, pyramids)
    np.testing.assert_allclose(np.stack(from_host), np.stack(anew), atol=1e-5)
