"""What goes wrong in a long run, done for real: a full disk, losses that are not finite, bits that change."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import checkpoint, stored
from avg_llava_jax.data.conversation import encode_conversation
from avg_llava_jax.models import avg_llava
from avg_llava_jax.training.config import OptimizerConfig, defaults
from avg_llava_jax.training.loop import train
from avg_llava_jax.training.metrics import read_rows
from avg_llava_jax.training.optimizer import make_optimizer
from tests.conftest import TOKENIZER
from tests.test_training import WITHOUT_TORCH, settings

ROOT = Path(__file__).parents[1]

IN_A_SMALL_DISK = """
    mount -t tmpfs -o size=6m tmpfs {disk} || exit 77
    train() {{ {python} -m launch.train --config=configs/jersey.py:tiny --workdir={disk}/run \\
      '--config.granularities=(4,)' --config.batch_size=4 --config.steps=6 --config.checkpoint_every=2; }}
    head -c {filler} /dev/zero > {disk}/filler
    train; echo "exit code $?"
    ls {disk}/run/checkpoints | grep -v tmp  # a thread of Orbax may still write after the failure; see the next `ls`
    rm {disk}/filler
    train; echo "exit code $?"
    ls {disk}/run/checkpoints
"""


FILLER = 4_500_000  # bytes


def test_a_full_disk_says_what_to_free_and_loses_nothing(tmp_path):
    """A file system with room for one checkpoint and a half; then what fills it is removed."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    script = IN_A_SMALL_DISK.format(disk=tmp_path, python=shlex.quote(sys.executable), filler=FILLER)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": WITHOUT_TORCH}
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == 77:
        pytest.skip("this machine mounts no tmpfs")
    assert done.stdout.split("\n") == ["exit code 2", "2", "exit code 0", "4", "6", ""], done
    said = f"error: the disk of {tmp_path}/run is full"
    (error,) = (line for line in done.stderr.splitlines() if said in line)  # after what a thread may have begun to say
    assert "resumes from step 2" in error
    assert "a checkpoint takes" in error and "or more there" in error


@pytest.fixture
def poisoned(tiny, tokenizer, llava_folder):
    """The config of a run from a checkpoint in which the words that only record r5 has are not numbers."""
    records = json.loads((llava_folder / "train.json").read_text(encoding="utf-8"))
    records[5]["conversations"][0]["value"] += " Zebra?"
    (llava_folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    words = [
        set(encode_conversation(r["conversations"], tokenizer, tiny.template, n % 3).ids) for n, r in enumerate(records)
    ]
    only = np.array(sorted(words.pop(5) - set.union(*words)))

    language = dataclasses.replace(tiny.language, tied_embeddings=False)  # else no probability would be a number
    model, start = dataclasses.replace(tiny, language=language), llava_folder / "start"
    params = jax.jit(lambda: avg_llava.init(model, jax.random.key(1)))()
    params["language"]["embed"] = params["language"]["embed"].at[only].set(jnp.nan)
    checkpoint.save_config(start, model)
    checkpoint.copy_tokenizer(TOKENIZER, start)
    with checkpoint.Manager(start) as manager:
        manager.save(1, params)

    config = settings(tiny, llava_folder)
    config.model, config.init_from = defaults().model, str(start)
    config.phase, config.granularities, config.steps, config.checkpoint_every = "connector", (4,), 12, 1
    return config


def test_steps_that_are_not_finite_are_passed_over(poisoned, tmp_path):
    """Two epochs of 24 records: two batches hold the bad one."""
    poisoned.max_bad_steps = 2
    train(poisoned, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    bad = [row for row in rows if "not_finite" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert len(bad) == 2 and all(f"{poisoned.data.path}#5" in row["records"] for row in bad)
    assert all(f"at step {row['step']};" in row["not_finite"] for row in bad)
    assert all(np.isfinite(row["loss"]) for row in rows if row not in bad)
    connector = checkpoint.load(tmp_path / "run").params["connector"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(connector))


def test_one_bad_step_too_many_ends_the_run_however_often_it_is_started(poisoned, tmp_path):
    poisoned.max_bad_steps = 1
    for _ in range(2):  # the second time from the step before, with one bad step behind it
        with pytest.raises(FloatingPointError, match=r"at step \d+; its samples are .*#5[,;].*max_bad_steps=1"):
            train(poisoned, tmp_path / "run")
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert checkpoint.steps(tmp_path / "run")[-1] == steps[-1] < 12


def test_a_step_that_is_not_finite_changes_nothing_but_the_rate(params):
    optimizer = make_optimizer(OptimizerConfig(1e-2, 1e-2, warmup=0.0, weight_decay=0.1), steps=10)
    trained = {"router": params["router"]}
    grads = jax.tree.map(jnp.ones_like, trained)
    update = jax.jit(optimizer.update)
    _, state = update(grads, optimizer.init(trained), trained)
    spoiled = jax.tree.map(jnp.copy, grads)
    spoiled["router"]["logits"]["kernel"] = spoiled["router"]["logits"]["kernel"].at[0, 0].set(jnp.inf)
    for bad, loss in ((grads, jnp.nan), (spoiled, 1.0)):
        updates, after = update(bad, state, trained, loss=loss)
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
        jax.tree.map(np.testing.assert_array_equal, after[:-1], state[:-1])
        assert after[-1].count == 2


def test_host_and_devices_compute_the_same_checksums(monkeypatch):
    draw = jax.random.normal(jax.random.key(0), (3, 2**15))  # more than one piece on the host
    tree = {"a": draw, "b": draw[0].astype(jnp.bfloat16), "c": jnp.arange(9, dtype=jnp.int8), "d": jnp.zeros((0, 4))}
    found = stored.checksums(tree)
    monkeypatch.setattr(stored, "SMALL", -1)
    assert stored.checksums(tree) == found


@pytest.mark.parametrize("small", [stored.SMALL, -1])
def test_a_checksum_knows_every_bit_and_every_place(monkeypatch, small):
    monkeypatch.setattr(stored, "SMALL", small)
    leaf = jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 7

    def of(leaf):
        return stored.checksums({"a": leaf})[f"a {leaf.dtype}"]

    found = {of(leaf), of(leaf.at[2, 3].set(leaf[2, 3] + 1e-7)), of(leaf[::-1]), of(leaf.T), of(-leaf)}
    assert len(found) == 5
    assert of(leaf) == of(jnp.array(np.asarray(leaf)))
    assert isinstance(of(leaf.astype(jnp.bfloat16)), int) and of(jnp.zeros((), jnp.int32)) == 0


ON_OTHER_MESHES = """
    import jax, numpy as np, optax
    from avg_llava_jax import checkpoint, parameters, stored
    from avg_llava_jax.parallel import sharding
    from tests.test_parameters import TINY

    stored.SMALL = -1  # the devices compute the checksums

    def on(devices, sizes):
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)), jax.devices()[:devices])
        shapes = parameters.abstract(TINY)
        state = jax.eval_shape(optax.adamw(1e-3).init, shapes)
        return (sharding.placed(shapes, sharding.shardings(mesh, shapes)),
                sharding.placed(state, sharding.state_shardings(mesh, shapes, state)))

    draw = np.random.default_rng(0)
    meshes = [(8, (8, 1, 1)), (8, (2, 2, 2)), (8, (1, 8, 1)), (1, (1, 1, 1))]
    fill = lambda leaf: jax.device_put(draw.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)
    places = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
    trees = jax.tree.map(fill, on(*meshes[0]))
    want = jax.device_get(trees)
    for step, mesh in enumerate(meshes):
        with checkpoint.Manager({folder!r}) as manager:
            if step:
                targets = on(*mesh)
                restored = manager.restore(*targets)
                trees = restored.params, restored.optimizer
                assert restored.step == step
                assert places(trees) == places(targets)
                jax.tree.map(np.testing.assert_array_equal, jax.device_get(trees), want)
            manager.save(step + 1, *trees)
    print("the same everywhere")
"""


def test_a_checkpoint_restores_on_any_other_mesh(tmp_path):
    """(8, 1, 1) -> (2, 2, 2) -> (1, 8, 1) -> one device, each saved by the one before; values and checksums hold."""
    script = textwrap.dedent(ON_OTHER_MESHES).replace("{folder!r}", repr(str(tmp_path)))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "the same everywhere" in done.stdout, done.stderr
    assert "damaged" not in done.stderr
