"""Checkpoints: the folder that training writes and every other command reads.

    config.json              {"format": 1, "model": ..., "training": ... | null, "granularities_trained": [...] | null}
    tokenizer/               tokenizer files
    checkpoints/<step>/      Orbax: params, optimizer, data (position of the data pipeline) and checksums (JSON)

A training workdir is such a folder; a published one holds only `params` and `checksums`. Readers use the
newest step. `load` also reads PyTorch folders, see `foreign`.

A run of adapters, or of a router on int8 weights, does not store the frozen weights again (`adapters.divide`). Its
config.json refers to the folder that holds them:

    "base": {"path": ..., "vision_tower": ... | null, "digest": ...}

A relative path counts from the folder of config.json. The digest covers the base's encoder and language model.
"""

import dataclasses
import json
import logging
import os
import pathlib
import shutil
import threading
import time
from typing import Any, NamedTuple, Protocol, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from avg_llava_jax import adapters, parameters, reuse, stored
from avg_llava_jax.config import ModelConfig, from_dict, to_dict
from avg_llava_jax.convert import foreign, peft
from avg_llava_jax.data.tokenizer import load_tokenizer
from avg_llava_jax.files import lock, refuse_buckets, write_whole
from avg_llava_jax.parallel import hosts, sharding

logger = logging.getLogger(__name__)

FORMAT = 1
CONFIG, STEPS, TOKENIZER, LOCK = "config.json", "checkpoints", "tokenizer", ".lock"
KEPT = 2
"""Number of newest steps that a run keeps."""

Folder = str | os.PathLike[str]


class Loaded(NamedTuple):
    """A model as `load` returns it.

    meta: `step` (int), `training` (the config it was trained with, or None), `granularities_trained` (list or None),
        and `base` of a folder that refers to one.
    """

    config: ModelConfig
    params: parameters.Params
    tokenizer_folder: pathlib.Path
    meta: dict[str, Any]


class Stateful(Protocol):
    """A data pipeline that can save its position as JSON values and resume there."""

    def get_state(self) -> Any:
        """The position, as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Resume at a position that `get_state` returned."""
        ...


def save_config(
    folder: Folder,
    config: ModelConfig,
    training: dict[str, Any] | None = None,
    granularities_trained: list[int] | None = None,
    base: dict[str, Any] | None = None,
) -> None:
    """Write config.json atomically; creates the folder. base: as `refer` returns it.

    Raises:
      ValueError: the folder already holds a model of another config; names the first field that differs.
    """
    folder = pathlib.Path(folder)
    path = folder / CONFIG
    if path.exists():
        difference = _difference(to_dict(read_config(folder)[0]), to_dict(config), "model")
        if difference:
            raise ValueError(f"{folder} holds another model: {difference}; use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "format": FORMAT,
        "model": to_dict(config),
        "training": training,
        "granularities_trained": granularities_trained,
    } | ({"base": base} if base else {})
    write_whole(path, json.dumps(values, indent=2) + "\n")


def _difference(old: Any, new: Any, where: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            difference = _difference(old.get(key), new.get(key), f"{where}.{key}")
            if difference:
                return difference
        return None
    return None if old == new else f"{where} is {old!r} there and {new!r} here"


def read_config(folder: Folder) -> tuple[ModelConfig, dict[str, Any]]:
    """Read the model config of a checkpoint folder, and the other values of its config.json.

    Raises:
      FileNotFoundError: the folder has no config.json.
      ValueError: config.json is not valid JSON, has another format, or holds an invalid model config.
    """
    path = pathlib.Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint folder: it has no {CONFIG}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT or "model" not in values:
        raise ValueError(f"{path} is not the config of an avg_llava_jax checkpoint of format {FORMAT}")
    try:
        config = from_dict(values.pop("model"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config, values


def copy_tokenizer(source: Folder, folder: Folder) -> None:
    """Copy the tokenizer files of folder `source` into the checkpoint `folder`."""
    load_tokenizer(source).save(pathlib.Path(folder) / TOKENIZER)


def steps(folder: Folder) -> list[int]:
    """Complete steps of a folder, ascending. Orbax renames a step's folder only when it is complete."""
    root = pathlib.Path(folder) / STEPS
    if not root.is_dir():
        return []
    return sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdecimal() and (entry / "params").is_dir())


def load(
    path: Folder,
    vision_tower: Folder | None = None,
    mesh: Mesh | None = None,
    dtype: parameters.Dtype = None,
    seed: int = 0,
) -> Loaded:
    """Load a model from a checkpoint folder (its newest readable step) or from a PyTorch folder.

    Every device reads only its own shards. A folder that refers to a base gives the whole model, adapters included.

    Args:
      path: the folder.
      vision_tower: for a PyTorch folder, the CLIP folder that its config names, or the one to join with a Llama.
      mesh: places and shards the parameters; None = the first device.
      dtype: of the parameters, one for all or one for each component; None = as stored.
      seed: for the initial values of parameters that a PyTorch folder lacks.

    Raises:
      FileNotFoundError: the folder does not exist, or has no complete step.
      ValueError: the folder's files contradict each other, or no step is readable; one line that names what.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist")
    if peft.is_adapter(folder):
        return load_adapter(folder, peft.base_of(folder), vision_tower, mesh, dtype)
    if foreign.is_foreign(folder):
        config, params, trained = foreign.load(folder, vision_tower, mesh, dtype, seed)
        meta = {"step": 0, "training": None, "granularities_trained": trained}
        return Loaded(config, params, folder, meta)
    if vision_tower is not None:
        raise ValueError(f"{folder} is a checkpoint of this project and holds its vision encoder: drop vision_tower")

    config, values = read_config(folder)
    wanted = parameters.abstract(config)
    if not values.get("base"):
        step, params = _newest(folder, config, wanted, False, mesh, dtype)
        return Loaded(config, params, folder / TOKENIZER, {"step": step, **values})
    values["base"] = values["base"] | _base_paths(folder, values["base"])
    wanted, frozen = adapters.divide(wanted)
    step, own = _newest(folder, config, wanted, True, mesh, dtype)
    base = load_base(folder, mesh, dtype)
    stored.require(f"{values['base']['path']}, base of {folder}", parameters.flat(base), parameters.flat(frozen))
    return Loaded(config, parameters.merge(own, base), folder / TOKENIZER, {"step": step, **values})


def _newest(
    folder: pathlib.Path,
    config: ModelConfig,
    wanted: parameters.Params,
    adapted: bool,
    mesh: Mesh | None,
    dtype: parameters.Dtype,
) -> tuple[int, parameters.Params]:
    """The newest readable step and its parameters: those `wanted`, and adapters where they may be (`adapted`)."""
    available = steps(folder)
    if not available:
        raise FileNotFoundError(f"{folder} has no complete step under {STEPS}/")
    for step in reversed(available):
        place = _step(folder, step)
        shapes, sums = stored.shapes(place / "params"), _checksums(place)
        if hosts.agree(shapes is not None and sums is not None):
            where = f"{folder}, step {step}"
            found = {path: leaf for path, leaf in shapes.items() if adapted and adapters.is_leaf(path)}
            adapters.require(where, found, config)
            stored.require(where, shapes, parameters.flat(wanted) | found)
            params = stored.read(place / "params", _targets(shapes, mesh, dtype), sums.get("params", {}))
            if params is not None:
                return step, params
        logger.warning("checkpoint %s is damaged; trying the step before it", _step(folder, step))
    raise ValueError(f"{folder}: none of the steps {available} is readable")


def load_adapter(
    folder: Folder,
    base: Folder,
    vision_tower: Folder | None = None,
    mesh: Mesh | None = None,
    dtype: parameters.Dtype = None,
) -> Loaded:
    """Load a base with the adapter of a peft folder on it; the other arguments are those of `load` for the base.

    Raises:
      FileNotFoundError, ValueError: as `load`, or the adapter is damaged or belongs to another base.
    """
    loaded = load(base, vision_tower, mesh, dtype)
    reference = loaded.meta.get("base") or refer(base, vision_tower)
    params = peft.load(folder, loaded.config, loaded.params)
    return loaded._replace(params=params, meta=loaded.meta | {"step": 0, "training": None, "base": reference})


def load_own(
    folder: Folder,
    base: Folder,
    loaded: Loaded,
    vision_tower: Folder | None = None,
    mesh: Mesh | None = None,
) -> parameters.Params:
    """Load what a folder of adapters holds beside its base (`adapters.divide`), for a base that is loaded.

    folder: a run of adapters, or a folder of peft. base, vision_tower, mesh: those with which `load` gave `loaded`.

    Raises:
      FileNotFoundError, ValueError: as `load`, or the adapters belong to another base; one line.
    """
    folder = pathlib.Path(folder)
    if adapters.of(loaded.params):
        raise ValueError(f"{base} has adapters itself: serve its base, or fold them in with avg-llava merge")
    if peft.is_adapter(folder):
        return adapters.divide(peft.load(folder, loaded.config, loaded.params))[0]
    config, values = read_config(folder)
    if not values.get("base"):
        raise ValueError(f"{folder} holds a whole model, no adapter of one: serve it by itself")
    reference = loaded.meta.get("base") or {"digest": digest(base, vision_tower)}
    if values["base"]["digest"] != reference["digest"]:
        raise ValueError(
            f"{folder} was trained on another base than {base}: its own is {values['base']['path']}, or a copy of it"
        )
    difference = _difference(to_dict(config), to_dict(loaded.config), "model")
    tokenizers = [load_tokenizer(each).digest() for each in (folder / TOKENIZER, loaded.tokenizer_folder)]
    if difference is None and tokenizers[0] != tokenizers[1]:
        difference = "their tokenizers differ"
    if difference:
        raise ValueError(f"{folder} cannot be served with {base}: {difference}")
    return _newest(folder, config, adapters.divide(parameters.abstract(config))[0], True, mesh, None)[1]


def refer(folder: Folder, vision_tower: Folder | None = None) -> dict[str, Any]:
    """The reference to a base for config.json; arguments as `load`.

    Raises:
      ValueError: the folder refers to a base itself.
    """
    towers = vision_tower and str(pathlib.Path(vision_tower).resolve())
    return {"path": str(pathlib.Path(folder).resolve()), "vision_tower": towers, "digest": digest(folder, vision_tower)}


def digest(folder: Folder, vision_tower: Folder | None = None) -> str:
    """A digest of the encoder and the language model as a folder stores them: names, dtypes and every byte.

    Of a checkpoint it is that of the stored checksums, of a PyTorch folder that of its tensors. Arguments as `load`.

    Raises:
      ValueError: a checkpoint refers to a base itself, or was saved without checksums.
    """
    folder = pathlib.Path(folder)
    if foreign.is_foreign(folder):
        return foreign.digest(folder, vision_tower)
    if read_config(folder)[1].get("base"):
        raise ValueError(f"{folder} refers to a base itself: fold its adapters in with avg-llava merge")
    available = steps(folder)
    if not available:
        raise FileNotFoundError(f"{folder} has no complete step under {STEPS}/")
    sums = (_checksums(_step(folder, available[-1])) or {}).get("params", {})
    held = {name: value for name, value in sums.items() if name.split("/")[0] in parameters.ADAPTERS}
    if not held:
        raise ValueError(f"{folder} was saved without checksums: avg-llava publish makes a copy with them")
    return reuse.digest(held)


def _base_paths(folder: pathlib.Path, base: dict[str, Any]) -> dict[str, str]:
    """The paths of a reference to a base, absolute: a copy of it in another folder still means the same."""
    return {key: str((folder / base[key]).resolve()) for key in ("path", "vision_tower") if base.get(key)}


def load_base(folder: Folder, mesh: Mesh | None = None, dtype: parameters.Dtype = None) -> parameters.Params:
    """Load the base that a checkpoint folder refers to: encoder and language model, see `load`.

    Raises:
      FileNotFoundError, ValueError: the base is gone, or is not the one that the folder was trained on.
    """
    folder = pathlib.Path(folder)
    reference = read_config(folder)[1]["base"]
    paths = _base_paths(folder, reference)
    path, towers = pathlib.Path(paths["path"]), paths.get("vision_tower")
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder / CONFIG} refers to its base {path}, which does not exist: put it there, or change base.path"
        )
    if digest(path, towers) != reference["digest"]:
        raise ValueError(
            f"{path} is not the base that {folder} was trained on: its weights are others; give base.path in "
            f"{folder / CONFIG} the right folder"
        )
    return adapters.divide(load(path, towers, mesh, dtype).params)[1]


def stored_adapters(folder: Folder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the adapters in the newest readable step of a checkpoint folder, by path."""
    for step in reversed(steps(folder)):
        shapes = stored.shapes(_step(pathlib.Path(folder), step) / "params")
        if shapes is not None:
            return {path: leaf for path, leaf in shapes.items() if adapters.is_leaf(path)}
    return {}


def _step(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder.resolve() / STEPS / str(step)


def _checksums(place: pathlib.Path) -> dict[str, dict[str, int]] | None:
    """Checksums of a step's trees, by item; {} for a step saved without them, None where they cannot be read."""
    return stored.read_json(place / "checksums" / "metadata") if (place / "checksums").is_dir() else {}


def _targets(saved: dict[str, jax.ShapeDtypeStruct], mesh: Mesh | None, dtype: parameters.Dtype) -> parameters.Params:
    """Shapes, dtypes and shardings with which to restore the stored parameters."""
    shapes = parameters.unflat(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, parameters.dtype_of(path, dtype, leaf.dtype))
            for path, leaf in saved.items()
        }
    )
    if mesh is None:
        return stored.targets(shapes)
    return sharding.placed(shapes, sharding.shardings(mesh, shapes))


class Restored(NamedTuple):
    """Result of `Manager.restore`; the position of the data pipeline is set in place."""

    step: int
    params: parameters.Params
    optimizer: Any


@dataclasses.dataclass
class _Position:
    """A pipeline's position as the text that Grain's handler stores: one file per process, all alike."""

    source: Stateful

    def get_state(self) -> bytes:
        return json.dumps({"state": self.source.get_state()}).encode()

    @staticmethod
    def read(folder: pathlib.Path) -> Any | None:
        """State in a step's folder, saved by any number of processes; None where it cannot be read."""
        for path in (folder / "data").glob("process_0-of-*.json"):
            values = stored.read_json(path)
            if isinstance(values, dict) and "state" in values:
                return values["state"]
        return None


_OPEN: set["Manager"] = set()
_SAVING = threading.Lock()
"""The managers of this process, and who saves: Orbax 0.12.8 mixes up two managers that save at the same time."""


class Manager:
    """Writes the checkpoints of one training run in the background and keeps the two newest.

    Runs beside each other in one process take turns, and wait for their saves.

    Only one process (or one group of `jax.distributed` processes that all call each method) may hold a
    workdir. Use it as a context manager: leaving it waits for the last save and releases the workdir.

    at_once: GB (10^9 bytes) of parameters that are encoded and written concurrently, which takes the same amount of
        memory in addition; must exceed the largest parameter. None = all.

    Raises:
      RuntimeError: another process holds the workdir.
      ValueError: the workdir is a bucket.
    """

    def __init__(self, workdir: Folder, at_once: int | None = None):
        refuse_buckets({"workdir": workdir})
        self.folder = pathlib.Path(workdir).resolve()
        (self.folder / STEPS).mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder / LOCK, self.folder) if hosts.first() else None
        self._clear_unfinished()
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT)
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        if at_once is not None:
            limited = ocp.StandardCheckpointHandler(save_concurrent_gb=at_once)
            handlers.add("params", ocp.args.StandardSave, limited)
            handlers.add("params", ocp.args.StandardRestore, limited)
        self._manager = ocp.CheckpointManager(self.folder / STEPS, options=options, handler_registry=handlers)
        self._last: int | None = None  # the save may still be in progress
        _OPEN.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if error is not None and hosts.lost(error):
            self._release()  # a save in progress would wait for a process that has died
        else:
            self.close()

    def save(self, step: int, params: parameters.Params, optimizer: Any = None, data: Stateful | None = None) -> None:
        """Start saving a step; the arrays are copied before this returns and may then be donated.

        `params` include the frozen ones, except those of a base that config.json refers to. Raises the error of an
        earlier save that failed.
        """
        if step == self._last or step in steps(self.folder):
            return
        self._last = step
        trees = {"params": params} if optimizer is None else {"params": params, "optimizer": optimizer}
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["checksums"] = ocp.args.JsonSave({name: stored.checksums(tree) for name, tree in trees.items()})
        if data is not None:
            import grain.checkpoint  # half a second, for training alone

            items["data"] = grain.checkpoint.CheckpointSave(_Position(data))
        with _SAVING:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
            if len(_OPEN) > 1:
                self._manager.wait_until_finished()

    def restore(self, params: parameters.Params, optimizer: Any, data: Stateful | None = None) -> Restored | None:
        """Restore the newest readable step; None where the workdir has no step.

        `params` and `optimizer` are arrays or ShapeDtypeStructs: each leaf is restored to its dtype and
        sharding (the first device if it has none), whatever the sharding and the number of processes that
        saved it. A damaged step is named in a warning and renamed to `<step>.damaged`, and the step before
        is used.

        Raises:
          ValueError: no step is readable, or a step does not belong to this model.
        """
        available = steps(self.folder)
        damaged = []
        for step in reversed(available):
            restored = self._restore(step, params, optimizer, data)
            if restored is None:
                damaged.append(_step(self.folder, step))
                continue
            if hosts.first():
                for bad in damaged:
                    logger.warning("checkpoint %s is damaged; using step %d", bad, step)
                    aside = bad.with_name(f"{bad.name}.damaged")
                    shutil.rmtree(aside, ignore_errors=True)
                    bad.rename(aside)
            if damaged:
                multihost_utils.sync_global_devices("damaged checkpoints are put aside")
                self._manager.reload()
            return restored
        if available:
            raise ValueError(f"{self.folder}: none of the steps {available} is readable")
        return None

    def _restore(self, step: int, params: Any, optimizer: Any, data: Stateful | None) -> Restored | None:
        place = _step(self.folder, step)
        shapes, moments, sums = stored.shapes(place / "params"), stored.shapes(place / "optimizer"), _checksums(place)
        position = _Position.read(place) if data is not None else {}
        if not hosts.agree(all(part is not None for part in (shapes, moments, sums, position))):
            return None
        stored.require(f"{self.folder}, step {step}", shapes, parameters.flat(params))
        if sorted(leaf.shape for leaf in moments.values()) != sorted(leaf.shape for leaf in jax.tree.leaves(optimizer)):
            raise ValueError(f"{self.folder}, step {step}: its optimizer state belongs to another optimizer or phase")
        trees = {"params": params, "optimizer": optimizer}
        for name, tree in trees.items():
            trees[name] = stored.read(place / name, stored.targets(tree), sums.get(name, {}))
            if trees[name] is None:
                return None
        if data is not None:
            data.set_state(position)
        return Restored(step, trees["params"], trees["optimizer"])

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait for a save in progress."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Block until the last save is on disk; raises its error if it failed."""
        self._manager.wait_until_finished()
        if hosts.first():
            # Orbax checks only that these markers exist; their content names paths of this machine.
            for marker in (self.folder / STEPS).rglob("commit_success.txt"):
                marker.write_text("committed\n")

    def close(self) -> None:
        """Wait for the last save, then release the workdir; remove what a failed save left, since it fills the disk."""
        try:
            self.wait()
        finally:
            try:
                self._manager.close()  # also after a failure: other threads of Orbax may still be writing
            finally:
                self._clear_unfinished()
                self._release()

    def _release(self) -> None:
        _OPEN.discard(self)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear_unfinished(self) -> None:
        """Remove interrupted saves. Orbax would do so in a thread, which complains where a run ends early."""
        if hosts.first():
            for unfinished in (self.folder / STEPS).glob("*.orbax-checkpoint-tmp*"):
                for _ in range(50):  # after a failure, other threads of Orbax may still be writing there
                    shutil.rmtree(unfinished, ignore_errors=True)
                    if not unfinished.exists():
                        break
                    time.sleep(0.1)
