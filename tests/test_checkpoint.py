"""Checkpoint folders: written whole, read back exactly, and damage is named."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avg_llava_jax import checkpoint, parameters
from avg_llava_jax.config import ModelConfig, to_dict
from avg_llava_jax.parallel import sharding
from tests.test_parameters import TINY

TOKENIZER = pathlib.Path(__file__).parent / "data" / "golden" / "avg-llava-tiny"

# Orbax leaves unfinished reads behind when one fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Pipeline:
    """Stands for a data pipeline: its position is JSON or bytes."""

    def __init__(self, state=None):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), leaf.dtype), parameters.abstract(TINY))


@pytest.fixture
def optimizer(params):
    return optax.adamw(1e-3).init(params["router"])


@pytest.fixture
def workdir(tmp_path, params, optimizer):
    """A run that has saved steps 1, 2, 3; the newline of step s is s."""
    checkpoint.save_config(tmp_path, TINY, {"phase": "rglf"}, [16])
    checkpoint.copy_tokenizer(TOKENIZER, tmp_path)
    with checkpoint.Manager(tmp_path) as manager:
        for step in (1, 2, 3):
            manager.save(step, at_step(params, step), optimizer, Pipeline({"next": step}))
    return tmp_path


def at_step(params, step):
    return params | {"image_newline": jnp.full_like(params["image_newline"], step)}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def spoil(folder, how):
    """Damage the largest data file below a folder."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "commit_success.txt")
    path = max(files, key=lambda p: p.stat().st_size)
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


def test_load(workdir, params):
    loaded = checkpoint.load(workdir)
    assert loaded.config == TINY
    same(loaded.params, at_step(params, 3))
    assert (loaded.tokenizer_folder / "tokenizer.model").is_file()
    assert loaded.meta == {"step": 3, "format": 1, "training": {"phase": "rglf"}, "granularities_trained": [16]}


def test_load_on_a_mesh_in_another_dtype(workdir, params):
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    loaded = checkpoint.load(workdir, mesh=mesh, dtype=jnp.bfloat16)
    same(loaded.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), at_step(params, 3)))
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded.params) == sharding.shardings(mesh, params)


def test_parameters_alone_are_a_checkpoint(tmp_path, params):
    """What a project ships."""
    checkpoint.save_config(tmp_path, TINY)
    with checkpoint.Manager(tmp_path) as manager:
        manager.save(7, params)
    same(checkpoint.load(tmp_path).params, params)
    for file in filter(pathlib.Path.is_file, tmp_path.rglob("*")):
        assert str(tmp_path).encode() not in file.read_bytes(), file


def test_any_number_of_processes_goes_on_from_a_checkpoint(workdir, params, optimizer):
    """The position of the data is the same for all of them, and is read from the first one's file."""
    (file,) = (workdir / "checkpoints" / "3" / "data").glob("process_*.json")
    file.rename(file.with_name("process_0-of-64.json"))
    (file.with_name("process_1-of-64.json")).write_text("{}")
    pipeline = Pipeline()
    with checkpoint.Manager(workdir) as manager:
        assert manager.restore(params, optimizer, pipeline).step == 3
    assert pipeline.state == {"next": 3}


def test_resume(workdir, params, optimizer):
    assert checkpoint.steps(workdir) == [2, 3]
    pipeline = Pipeline()
    with checkpoint.Manager(workdir) as manager:
        restored = manager.restore(jax.eval_shape(lambda: params), jax.eval_shape(lambda: optimizer), pipeline)
        assert (restored.step, pipeline.state) == (3, {"next": 3})
        same(restored.params, at_step(params, 3))
        same(restored.optimizer, optimizer)
        assert jax.tree.structure(restored.optimizer) == jax.tree.structure(optimizer)
        for _ in range(2):  # the second time the step is still being written
            manager.save(4, restored.params, restored.optimizer, Pipeline({"next": 9}))
        manager.wait()
        manager.restore(params, optimizer, pipeline)
    assert pipeline.state == {"next": 9}
    assert checkpoint.steps(workdir) == [3, 4]


def test_two_runs_of_one_process_save_beside_each_other(tmp_path, params):
    """Orbax alone mixes up their temporary folders, see findings/orbax_two_threads.sh."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        checkpoint.save_config(folder, TINY, None, [16])
        checkpoint.copy_tokenizer(TOKENIZER, folder)

    def run(folder):
        with checkpoint.Manager(folder) as manager:
            for step in range(1, 9):
                manager.save(step, at_step(params, step))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, folders))
    for folder in folders:
        assert checkpoint.steps(folder) == [7, 8]
        same(checkpoint.load(folder).params, at_step(params, 8))


def test_a_new_workdir_has_nothing_to_restore(tmp_path, params, optimizer):
    with checkpoint.Manager(tmp_path) as manager:
        assert manager.restore(params, optimizer) is None


@pytest.mark.parametrize(
    ("part", "how"),
    [
        *itertools.product(["params", "optimizer", "data", "checksums"], ["truncated", "gone"]),
        *itertools.product(["params", "optimizer"], ["flipped", "another"]),
    ],
)
def test_damaged_newest_step(workdir, params, optimizer, part, how, caplog):
    if how == "another":  # files that are whole, and not what was saved
        other = workdir.parent / f"{workdir.name}-other"
        with checkpoint.Manager(other) as manager:
            manager.save(3, at_step(params, 4), jax.tree.map(lambda leaf: leaf + 1, optimizer))
        shutil.rmtree(workdir / "checkpoints" / "3" / part)
        shutil.copytree(other / "checkpoints" / "3" / part, workdir / "checkpoints" / "3" / part)
    else:
        spoil(workdir / "checkpoints" / "3" / part, how)
    if part in ("params", "checksums"):
        same(checkpoint.load(workdir).params, at_step(params, 2))
        assert "3 is damaged" in caplog.text
    pipeline = Pipeline()
    with checkpoint.Manager(workdir) as manager:
        restored = manager.restore(params, optimizer, pipeline)
        assert (restored.step, pipeline.state) == (2, {"next": 2})
        assert "checkpoints/3 is damaged; using step 2" in caplog.text
        manager.save(3, restored.params, restored.optimizer, pipeline)
    assert checkpoint.steps(workdir) == [2, 3]
    same(checkpoint.load(workdir).params, at_step(params, 2))


def test_all_steps_damaged(workdir, params, optimizer):
    for step in (2, 3):
        spoil(workdir / "checkpoints" / str(step) / "params", "truncated")
    with pytest.raises(ValueError, match=r"none of the steps \[2, 3\] is readable"):
        checkpoint.load(workdir)
    with (
        checkpoint.Manager(workdir) as manager,
        pytest.raises(ValueError, match=r"none of the steps \[2, 3\] is readable"),
    ):
        manager.restore(params, optimizer)
    assert checkpoint.steps(workdir) == [2, 3]


def test_another_optimizer_is_no_damage(workdir, params):
    with checkpoint.Manager(workdir) as manager, pytest.raises(ValueError, match="another optimizer or phase"):
        manager.restore(params, optax.adamw(1e-3).init(params["connector"]))
    assert checkpoint.steps(workdir) == [2, 3]


def test_config_is_written_whole_and_for_one_model(workdir):
    checkpoint.save_config(workdir, TINY, {"phase": "connector"})
    assert checkpoint.read_config(workdir)[1]["training"] == {"phase": "connector"}
    with pytest.raises(ValueError, match=r"model\.language\.head_dim is 8 there and 128 here"):
        checkpoint.save_config(workdir, ModelConfig())
    assert not list(workdir.glob("*.part"))


def test_config_that_contradicts_the_parameters(workdir):
    values = json.loads((workdir / "config.json").read_text())
    values["model"]["language"]["vocab_size"] = 65
    (workdir / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"step 3: parameter 'language/embed' has shape \(64, 32\), its config says"):
        checkpoint.load(workdir)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"not a checkpoint folder: it has no config\.json"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable as JSON"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not the config of an avg_llava_jax checkpoint"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": to_dict(TINY) | {"colour": 1}}))
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        checkpoint.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "model": to_dict(TINY)}))
    with pytest.raises(FileNotFoundError, match="no complete step"):
        checkpoint.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        checkpoint.copy_tokenizer(tmp_path, tmp_path)


def test_no_tower_for_a_checkpoint_of_ours(workdir):
    with pytest.raises(ValueError, match="drop vision_tower"):
        checkpoint.load(workdir, TOKENIZER)


def test_a_second_run_is_refused(tmp_path):
    """Also while the first is another process; the workdir is free again once that one is killed."""
    holder = f"""
        import time
        from avg_llava_jax import checkpoint
        manager = checkpoint.Manager({str(tmp_path)!r})
        print("held", flush=True)
        time.sleep(600)
    """
    env = dict(os.environ, PYTHONPATH=":".join(sys.path), JAX_PLATFORMS="cpu")
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(holder)], stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match=f"in use by process {process.pid}"):
            checkpoint.Manager(tmp_path)
        process.send_signal(signal.SIGKILL)
    checkpoint.Manager(tmp_path).close()


def test_killed_while_saving(tmp_path):
    """SIGKILL at any moment: what is left under its final name is whole."""
    writer = f"""
        import jax, jax.numpy as jnp, optax
        from test_parameters import TINY
        from avg_llava_jax import checkpoint, parameters
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), parameters.abstract(TINY))
        optimizer = optax.adamw(1e-3).init(params)
        checkpoint.save_config({str(tmp_path)!r}, TINY)
        with checkpoint.Manager({str(tmp_path)!r}) as manager:
            for step in range(1, 10_000):
                manager.save(step, params, optimizer)
                print(step, flush=True)
    """
    env = dict(os.environ, PYTHONPATH=":".join([*sys.path, str(pathlib.Path(__file__).parent)]), JAX_PLATFORMS="cpu")
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(writer)], stdout=subprocess.PIPE, env=env) as process:
        while process.stdout.readline() != b"5\n":
            pass
        time.sleep(0.13)
        process.send_signal(signal.SIGKILL)
    shapes = parameters.abstract(TINY)
    optimizer = jax.eval_shape(optax.adamw(1e-3).init, shapes)
    with checkpoint.Manager(tmp_path) as manager:
        restored = manager.restore(shapes, optimizer)
        manager.save(restored.step + 1, restored.params, restored.optimizer)
    assert not list(tmp_path.glob("checkpoints/*.damaged"))
    assert checkpoint.load(tmp_path).meta["step"] == restored.step + 1
