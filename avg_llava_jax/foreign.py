"""Reads PyTorch checkpoint folders: AVG-LLaVA as released, and LLaVA-NeXT in its own and in transformers' layout.

Strict: a tensor that the model does not know, one that is missing, a wrong shape, and a config value
that this model does not have are errors that name it. Tensors are read one at a time, straight to
the devices that hold them.
"""

import json
import logging
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from tqdm import tqdm

from avg_llava_jax import layouts, llava_next, parameters, placement, sharding, tensors
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.tensors import Catalog, Tensors, read_json

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]

TOWER = "model.vision_tower.vision_tower."
TOWER_LAYERS = TOWER + "vision_model.encoder.layers."
ROUTER = "model.router."

MODEL_TYPES = ("llava_llama", llava_next.MODEL_TYPE)

UNUSED = "unused.safetensors"
"""In a checkpoint folder of ours: the tensors of its source that the model does not run, for export."""

ORIGIN = "pytorch.json"
"""Beside it: the source's `config`, `generation_config` and `preprocessor_config`, for the fields we do not read."""

ORIGINALS = ("config", "generation_config", "preprocessor_config")


class Opened(NamedTuple):
    """A folder whose config and headers agree; no tensor is read yet.

    rows: of the parameters that the folder holds, by path: all, or all but the router's.
    unused: names in the catalog that the model does not run.
    """

    config: ModelConfig
    shapes: parameters.Params
    rows: dict[str, parameters.Row]
    catalog: Catalog
    unused: list[str]


def is_foreign(folder: Folder) -> bool:
    """Whether the folder's config.json names a model type of `MODEL_TYPES`."""
    path = pathlib.Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") in MODEL_TYPES


def _is_llava_next(folder: pathlib.Path) -> bool:
    return read_json(folder / "config.json").get("model_type") == llava_next.MODEL_TYPE


def _read_config(folder: pathlib.Path, vision_tower: Folder | None, has_router: bool) -> ModelConfig:
    if _is_llava_next(folder):
        return llava_next.read_config(folder)
    return layouts.read_config(folder, vision_tower, has_router)


def inspect(folder: Folder, vision_tower: Folder | None = None) -> Opened:
    """Match a folder's config and the headers of its tensors with the model; the arguments and errors of `load`."""
    folder = pathlib.Path(folder)
    vision_tower = layouts.tower_folder(folder, vision_tower)
    catalog = _catalog(folder, vision_tower)
    has_router = catalog.has(ROUTER)
    config = _read_config(folder, vision_tower, has_router)
    shapes = parameters.abstract(config)
    rows = parameters.describe(shapes)
    if not has_router:
        rows = {path: row for path, row in rows.items() if row.component != "router"}
    return Opened(config, shapes, rows, catalog, _match(folder, config, torch_shapes(config, has_router), catalog))


def load(
    folder: Folder, vision_tower: Folder | None = None, mesh: Mesh | None = None, dtype: parameters.Dtype = None
) -> tuple[ModelConfig, parameters.Params]:
    """The config and the parameters of a PyTorch folder.

    Args:
      folder: with config.json and safetensors, single or sharded.
      vision_tower: the CLIP folder that the config names; without it, the folder's own `vision_tower/`, if
        there is one. Its config always counts; its weights count unless the checkpoint says
        `unfreeze_mm_vision_tower: true` and holds the tower itself.
      mesh: where the parameters go; None = the first device.
      dtype: of the parameters, one for all or one for each component; None = as stored.

    A folder without a router gets a fresh one.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, key or field.
    """
    config, shapes, rows, catalog, _ = inspect(folder, vision_tower)
    leaves = {}
    for path, row in tqdm(rows.items(), desc="reading", unit="parameter", leave=False, disable=None):
        shape = parameters.flat(shapes)[path].shape
        at = NamedSharding(mesh, placement.fitting(mesh, row.spec, shape)) if mesh else _first_device()
        leaves[path] = _place(catalog, row, shape, at, dtype)
    params = parameters.unflat(leaves)
    return config, params if "router" in params else params | {"router": _fresh_router(config, mesh, dtype)}


def torch_shapes(config: ModelConfig, router: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and shape of every PyTorch tensor that the model runs, in the released layout."""
    shapes = parameters.abstract(config)
    leaves = parameters.flat(shapes)
    return {
        name: parts[0].row.torch_shape(leaves[parts[0].row.path].shape, config.vision.patch_size)
        for name, parts in parameters.torch_parts(shapes).items()
        if router or not name.startswith(ROUTER)
    }


def idle_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors that CLIP has and this model does not run: layers past the one read, last norm.

    With zero weights, and norms of scale one, such a layer returns what it was given.
    """
    layer = {name: shape for name, shape in torch_shapes(config, router=False).items() if f"{TOWER_LAYERS}0." in name}
    idle = {
        name.replace(f"{TOWER_LAYERS}0.", f"{TOWER_LAYERS}{n}."): shape
        for n in range(config.vision.used_layers, config.vision.layers)
        for name, shape in layer.items()
    }
    ends = {f"{TOWER}vision_model.post_layernorm.{name}": (config.vision.width,) for name in ("weight", "bias")}
    return idle | ends


def match_names(folder: Folder, vision_tower: Folder | None = None) -> tuple[ModelConfig, int]:
    """The config, and the number of tensors it asks for, of a folder whose weights are not there.

    Where the folder has model.safetensors.index.json, the names that it lists are matched.
    """
    folder = pathlib.Path(folder)
    vision_tower = layouts.tower_folder(folder, vision_tower)
    index = folder / "model.safetensors.index.json"
    listed = read_json(index).get("weight_map", {}) if index.is_file() else {}
    if _is_llava_next(folder):
        listed = {llava_next.released_name(name): file for name, file in listed.items()}
    has_router = any(name.startswith(ROUTER) for name in listed)
    if not listed:
        has_router = "vis_token_granularity" in read_json(folder / "config.json")
    config = _read_config(folder, vision_tower, has_router)
    wanted = torch_shapes(config, has_router)
    if listed:
        inside = any(name.startswith(TOWER) for name in listed)
        for name in wanted:
            if name not in listed and (inside or not name.startswith(TOWER)):
                raise ValueError(f"{index}: tensor {name!r} is missing")
        for name in sorted(listed.keys() - wanted.keys()):
            if not _is_ignored(config, name):
                raise ValueError(f"{index}: tensor {name!r} is unknown to this model")
    return config, len(wanted)


def keep_unused(source: Folder, folder: Folder, vision_tower: Folder | None = None) -> None:
    """Put what export to PyTorch needs beside the parameters into our checkpoint `folder`.

    From a PyTorch folder: the tensors that the model does not run, and the config files. From a
    checkpoint of ours: the same files, where it has them.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    if not is_foreign(source):
        for name in (UNUSED, ORIGIN):
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
        return
    catalog, unused = inspect(source, vision_tower)[3:]
    if unused:
        tensors.save_file(
            folder / UNUSED,
            {name: (catalog.shape(name), catalog.dtype(name, counters=True)) for name in unused},
            catalog.read,
        )
    files = {name: source / f"{name}.json" for name in ORIGINALS}
    kept = {name: read_json(path) for name, path in files.items() if path.is_file()}
    (folder / ORIGIN).write_text(json.dumps(kept, indent=2) + "\n")


def _place(
    catalog: Catalog, row: parameters.Row, shape: tuple[int, ...], at: Any, dtype: parameters.Dtype
) -> jax.Array:
    """One parameter, put together device by device from its PyTorch tensors (one a layer)."""
    names = [row.torch.format(n=layer) for layer in (range(shape[0]) if row.layered else (0,))]
    stored = {catalog.dtype(name) for name in names}
    one = stored.pop() if len(stored) == 1 else np.float32  # layers that differ are stacked without loss
    dtype = np.dtype(parameters.dtype_of(row.path, dtype, one))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not row.layered:
            return np.ascontiguousarray(row.from_torch(catalog.read(names[0]))[index], dtype)
        chosen, stack = names[index[0]], None
        for slot, name in enumerate(chosen):
            tensor = row.from_torch(catalog.read(name))[index[1:]]
            if stack is None:
                stack = np.empty((len(chosen), *tensor.shape), dtype)
            stack[slot] = tensor
        return stack

    return jax.make_array_from_callback(shape, at, part)


def _first_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _fresh_router(config: ModelConfig, mesh: Mesh | None, dtype: parameters.Dtype) -> parameters.Params:
    logger.info("the checkpoint has no router: a fresh one is made (attention=%s)", config.router.attention)

    def make() -> parameters.Params:
        return {"router": parameters.init(config, jax.random.key(0), dtype)["router"]}

    at = sharding.shardings(mesh, jax.eval_shape(make)) if mesh else None
    return jax.jit(make, out_shardings=at)()["router"]


def _match(
    folder: pathlib.Path, config: ModelConfig, wanted: dict[str, tuple[int, ...]], catalog: Catalog
) -> list[str]:
    """Every tensor of the model is there in its shape, and every tensor that is there is known; those of no use."""
    for name, shape in wanted.items():
        if name not in catalog.names:
            spelled = llava_next.stored_name(name) if _is_llava_next(folder) else name
            raise ValueError(f"{folder}: tensor {spelled!r} is missing")
        if catalog.shape(name) != shape:
            raise ValueError(f"{catalog.where(name)} has shape {catalog.shape(name)}, its config says {shape}")
        catalog.dtype(name)
    unused = sorted(catalog.names - wanted.keys())
    for name in unused:
        if not _is_ignored(config, name):
            raise ValueError(f"{catalog.where(name)} is unknown to this model")
    return unused


def _is_ignored(config: ModelConfig, name: str) -> bool:
    """Whether a released folder may hold this tensor though the model does not run it."""
    return any(name == i or (i.endswith(".") and name.startswith(i)) for i in _ignored(config))


def _ignored(config: ModelConfig) -> Iterator[str]:
    """Tensors that a folder may hold and this model does not run; a trailing dot means all below."""
    for layer in range(config.vision.used_layers, config.vision.layers):
        yield f"{TOWER_LAYERS}{layer}."
    yield f"{TOWER}vision_model.post_layernorm."
    yield f"{TOWER}vision_model.embeddings.position_ids"
    for layer in range(config.language.layers):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
    if config.language.tied_embeddings:
        yield "lm_head.weight"


def _catalog(folder: pathlib.Path, vision_tower: Folder | None) -> Catalog:
    """The folder's tensors, and the vision encoder's: those in the checkpoint itself, or in the CLIP folder."""
    own = Tensors(folder)
    if _is_llava_next(folder):
        return Catalog({llava_next.released_name(name): (own, name) for name in own.names})
    values = read_json(folder / "config.json")
    inside = own.has(TOWER)
    if inside and (values.get("unfreeze_mm_vision_tower") or vision_tower is None):
        return Catalog({name: (own, name) for name in own.names})
    if vision_tower is None:
        raise FileNotFoundError(
            f"{folder} does not hold its vision encoder {values.get('mm_vision_tower')!r}:"
            " give that CLIP folder as vision_tower"
        )
    tower = Tensors(pathlib.Path(vision_tower))
    return Catalog(
        {name: (own, name) for name in own.names if not name.startswith(TOWER)}
        | {TOWER + inner: (tower, name) for inner, name in _vision_model(tower.names).items()}
    )


def _vision_model(names: Collection[str]) -> dict[str, str]:
    """A CLIP folder's vision tensors by their full name; files of newer versions lack the `vision_model.` prefix."""
    prefixed = {name: name for name in names if name.startswith("vision_model.")}
    return prefixed or {f"vision_model.{name}": name for name in names}
