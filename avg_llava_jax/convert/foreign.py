"""Reads PyTorch folders: AVG-LLaVA as released, LLaVA-NeXT and LLaVA-OneVision, and a decoder with a vision tower.

The reader is strict: an unknown tensor, a missing tensor, a wrong shape and an unsupported config value
raise an error that names it. Tensors are read one at a time, directly to the devices that hold them.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from tqdm import tqdm

from avg_llava_jax import parameters, placement
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import joined, layouts, llava_next, tensors
from avg_llava_jax.convert.tensors import Catalog, Tensors, read_json
from avg_llava_jax.models import avg_llava

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]

TOWER = "model.vision_tower.vision_tower."
TOWER_LAYERS = TOWER + "vision_model.encoder.layers."
HEAD = TOWER + "vision_model.head."
"""Prefix of the pooling of a SigLIP, which is not run."""
ROUTER = "model.router."

Layout = Literal["released", "transformers", "language"]

MODEL_TYPES: dict[str, Layout] = {
    **dict.fromkeys(layouts.FAMILIES, "released"),
    **dict.fromkeys(llava_next.STYLES, "transformers"),
    **dict.fromkeys(joined.MODEL_TYPES, "language"),
}
"""`model_type` of a config.json -> layout of the folder; `language` is only a decoder, to join with a CLIP folder."""

UNUSED = "unused.safetensors"
"""File of a checkpoint folder: the tensors of its source that the model does not run, for export."""

ORIGIN = "pytorch.json"
"""File beside it: the source's `config`, `generation_config` and `preprocessor_config`, for fields not read here."""

ORIGINALS = ("config", "generation_config", "preprocessor_config")


class Opened(NamedTuple):
    """A folder whose config and headers agree; no tensor is read yet.

    rows: table rows of the parameters that the folder holds, by path; parameters in `shapes` without a row are
        initialised.
    unused: names in the catalog that the model does not run.
    trained: granularities at which the weights were trained, only the finest for a LLaVA-NeXT; None = none.
    """

    config: ModelConfig
    shapes: parameters.Params
    rows: dict[str, parameters.Row]
    catalog: Catalog
    unused: list[str]
    trained: list[int] | None


def layout_of(folder: Folder) -> Layout | None:
    """Layout of a folder by its config.json; None where `model_type` is not in `MODEL_TYPES`."""
    path = pathlib.Path(folder) / "config.json"
    return MODEL_TYPES.get(str(read_json(path).get("model_type"))) if path.is_file() else None


def is_foreign(folder: Folder) -> bool:
    """Whether the folder is a PyTorch folder that this module reads."""
    return layout_of(folder) is not None


def _read_config(folder: pathlib.Path, vision_tower: Folder | None, has_router: bool) -> ModelConfig:
    match layout_of(folder):
        case "transformers":
            return llava_next.read_config(folder)
        case "language":
            return joined.read_config(folder, vision_tower)
    return layouts.read_config(folder, vision_tower, has_router)


def _tower_folder(folder: pathlib.Path, vision_tower: Folder | None) -> Folder | None:
    """The CLIP folder to read, None = none; raises where the layout needs one or does not take one."""
    layout = layout_of(folder)
    if layout == "transformers" and vision_tower is not None:
        raise ValueError(f"{folder} holds its vision encoder: drop vision_tower")
    vision_tower = layouts.tower_folder(folder, vision_tower)
    if layout == "language" and vision_tower is None:
        raise FileNotFoundError(
            f"{folder} is only a language model: give the CLIP or SigLIP folder to join as vision_tower"
        )
    return vision_tower


def _lacks(folder: pathlib.Path, has_router: bool) -> tuple[str, ...]:
    """Prefixes of the released names of tensors that this folder does not hold."""
    if layout_of(folder) == "language":
        return joined.FRESH
    return () if has_router else (ROUTER,)


def inspect(folder: Folder, vision_tower: Folder | None = None) -> Opened:
    """Match a folder's config and tensor headers with the model; arguments and errors as `load`."""
    folder = pathlib.Path(folder)
    vision_tower = _tower_folder(folder, vision_tower)
    catalog = _catalog(folder, vision_tower)
    has_router = catalog.has(ROUTER)
    lacks = _lacks(folder, has_router)
    config = _read_config(folder, vision_tower, has_router)
    wanted = {name: shape for name, shape in torch_shapes(config).items() if not name.startswith(lacks)}
    unused = _match(folder, config, wanted, catalog)
    shapes = parameters.abstract(config)
    rows = {path: row for path, row in parameters.describe(shapes).items() if not row.torch.startswith(lacks)}
    return Opened(config, shapes, rows, catalog, unused, _trained(folder, config, has_router))


def _trained(folder: pathlib.Path, config: ModelConfig, has_router: bool) -> list[int] | None:
    if layout_of(folder) == "language":
        return None
    ladder = has_router or "vis_token_granularity" in read_json(folder / "config.json")
    return list(config.granularities if ladder else config.granularities[-1:])


class Read(NamedTuple):
    """Result of `load`; `trained` as in `Opened`."""

    config: ModelConfig
    params: parameters.Params
    trained: list[int] | None


def load(
    folder: Folder,
    vision_tower: Folder | None = None,
    mesh: Mesh | None = None,
    dtype: parameters.Dtype = None,
    seed: int = 0,
) -> Read:
    """Load the config and the parameters of a PyTorch folder.

    Args:
      folder: with config.json and weights, single or sharded.
      vision_tower: the CLIP folder that the config names, or the one to join with a language model; None = the
        folder's own `vision_tower/`, if any. Its config is always used; its weights are used unless the
        checkpoint says `unfreeze_mm_vision_tower: true` and holds the tower itself.
      mesh: places and shards the parameters; None = the first device.
      dtype: of the parameters, one for all or one for each component; None = as stored.
      seed: for parameters that the folder lacks: the router, or a joined model's connector, newline and router.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, key or field.
    """
    config, shapes, rows, catalog, _, trained = inspect(folder, vision_tower)
    _check_tied(config, catalog)
    shapes = parameters.flat(shapes)

    def place(path: str) -> Sharding:
        row = parameters.TABLE[path]
        return NamedSharding(mesh, placement.fitting(mesh, row.spec, shapes[path].shape)) if mesh else _first_device()

    leaves = {}
    for path, row in tqdm(rows.items(), desc="reading", unit="parameter", leave=False, disable=None):
        # Waiting frees the host buffers of a parameter before the next one is assembled.
        leaves[path] = _place(catalog, row, shapes[path].shape, place(path), dtype).block_until_ready()
    lacking = {path: place(path) for path in shapes.keys() - rows.keys()}
    if lacking:
        leaves |= _fresh(config, lacking, dtype, leaves["language/embed"].dtype, seed)
    return Read(config, parameters.unflat(leaves), trained)


def digest(folder: Folder, vision_tower: Folder | None = None) -> str:
    """A digest of a folder's encoder and language model: name, dtype, shape and every byte; arguments as `load`."""
    _, _, rows, catalog, _, _ = inspect(folder, vision_tower)
    prefixes = {row.torch.partition("{n}")[0] for row in rows.values() if row.component in parameters.ADAPTERS}
    found = hashlib.sha256()
    for name in sorted(name for name in catalog.names if name.startswith(tuple(prefixes))):
        tensor = np.ascontiguousarray(catalog.read(name))
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:32]


def _check_tied(config: ModelConfig, catalog: Catalog) -> None:
    """Checks that an unembedding stored beside tied embeddings equals them."""
    embed, unembed = "model.embed_tokens.weight", "lm_head.weight"
    if not config.language.tied_embeddings or unembed not in catalog.names:
        return
    if not np.array_equal(catalog.read(embed), catalog.read(unembed)):
        raise ValueError(f"{catalog.where(unembed)} differs from {embed!r}, but its config says tie_word_embeddings")


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
    """Name and shape of CLIP's tensors that this model does not run: layers after the selected one, and the last norm.

    With zero weights and norms of scale one, such a layer is the identity.
    """
    layer = {name: shape for name, shape in torch_shapes(config, router=False).items() if f"{TOWER_LAYERS}0." in name}
    idle = {
        name.replace(f"{TOWER_LAYERS}0.", f"{TOWER_LAYERS}{n}."): shape
        for n in range(config.vision.used_layers, config.vision.layers)
        for name, shape in layer.items()
    }
    ends = {f"{TOWER}vision_model.post_layernorm.{name}": (config.vision.width,) for name in ("weight", "bias")}
    return idle | ends


def match_names(folder: Folder, vision_tower: Folder | None = None) -> tuple[ModelConfig, int, bool]:
    """For a folder without weights: its config, the number of tensors, and whether an index lists them.

    The names in an index are matched with the model; without an index, the config determines the number.

    Raises ValueError: a tensor in the index is missing or unknown.
    """
    folder = pathlib.Path(folder)
    vision_tower = _tower_folder(folder, vision_tower)
    index = tensors.index_file(folder)
    listed = set(tensors.weight_map(index)) if index else set()
    if layout_of(folder) == "transformers":
        listed = {llava_next.released_name(name) for name in listed}
    has_router = any(name.startswith(ROUTER) for name in listed)
    if not listed:
        has_router = "vis_token_granularity" in read_json(folder / "config.json")
    config = _read_config(folder, vision_tower, has_router)
    wanted = [name for name in torch_shapes(config) if not name.startswith(_lacks(folder, has_router))]
    if listed:
        inside = any(name.startswith(TOWER) for name in listed)
        for name in wanted:
            if name not in listed and (inside or not name.startswith(TOWER)):
                raise ValueError(f"{index}: tensor {name!r} is missing")
        for name in sorted(listed.difference(wanted)):
            if not is_ignored(config, name):
                raise ValueError(f"{index}: tensor {name!r} is unknown to this model")
    return config, len(wanted), bool(listed)


def config_of(folder: Folder, vision_tower: Folder | None = None) -> ModelConfig:
    """The config of a folder, which need not hold the weights yet: where it does, their headers must match it.

    Arguments and errors as `load`.
    """
    folder = pathlib.Path(folder)
    if any((folder / name).is_file() for name in tensors.weight_files(folder)):
        return inspect(folder, vision_tower).config
    return match_names(folder, vision_tower)[0]


def keep_unused(source: Folder, folder: Folder, vision_tower: Folder | None = None) -> None:
    """Copy what an export needs besides the parameters from `source` into the checkpoint `folder`.

    From a PyTorch folder these are the tensors that the model does not run, and the config files; from a
    checkpoint folder the files that an earlier call wrote, if any.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    if not is_foreign(source):
        for name in (UNUSED, ORIGIN):
            if (source / name).is_file() and source.resolve() != folder.resolve():
                shutil.copyfile(source / name, folder / name)
        return
    opened = inspect(source, vision_tower)
    catalog, unused = opened.catalog, opened.unused
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
    """One parameter, assembled shard by shard from its PyTorch tensors (one per layer)."""
    names = [row.torch.format(n=layer) for layer in (range(shape[0]) if row.layered else (0,))]
    stored = {catalog.dtype(name) for name in names}
    one = stored.pop() if len(stored) == 1 else np.float32  # layers of different dtypes are stacked without loss
    dtype = np.dtype(parameters.dtype_of(row.path, dtype, one))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not row.layered:
            return np.array(row.from_torch(catalog.read(names[0]))[index], dtype, order="C")  # not the file's pages
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


def _fresh(
    config: ModelConfig, at: dict[str, Sharding], dtype: parameters.Dtype, stored: Any, seed: int
) -> dict[str, jax.Array]:
    """Initial values of the parameters at these paths, with their shardings; `stored` is the dtype of the others."""
    trees = sorted({path.split("/")[0] for path in at})
    logger.info("initialised %s, which the checkpoint lacks (router.attention=%s)", trees, config.router.attention)

    def make() -> dict[str, jax.Array]:
        leaves = parameters.flat(avg_llava.init(config, jax.random.key(seed)))
        return {path: leaves[path].astype(parameters.dtype_of(path, dtype, stored)) for path in at}

    return jax.jit(make, out_shardings=at)()


def _match(
    folder: pathlib.Path, config: ModelConfig, wanted: dict[str, tuple[int, ...]], catalog: Catalog
) -> list[str]:
    """Checks that no tensor is missing, unknown or of a wrong shape; returns the unused ones."""
    for name, shape in wanted.items():
        if name not in catalog.names:
            spelled = llava_next.stored_name(name) if layout_of(folder) == "transformers" else name
            raise ValueError(f"{folder}: tensor {spelled!r} is missing")
        if catalog.shape(name) != shape:
            raise ValueError(f"{catalog.where(name)} has shape {catalog.shape(name)}, its config says {shape}")
        catalog.dtype(name)
    unused = sorted(catalog.names - wanted.keys())
    for name in unused:
        if not is_ignored(config, name):
            raise ValueError(f"{catalog.where(name)} is unknown to this model")
    return unused


def is_ignored(config: ModelConfig, name: str) -> bool:
    """Whether a released folder may hold this tensor though the model does not run it."""
    return any(name == i or (i.endswith(".") and name.startswith(i)) for i in _ignored(config))


def _ignored(config: ModelConfig) -> Iterator[str]:
    """Names of tensors that a folder may hold and this model does not run; a trailing dot marks a prefix."""
    for layer in range(config.vision.used_layers, config.vision.layers):
        yield f"{TOWER_LAYERS}{layer}."
    yield f"{TOWER}vision_model.post_layernorm."
    yield f"{TOWER}vision_model.embeddings.position_ids"
    if config.vision.encoder == "siglip":
        yield HEAD
    for layer in range(config.language.layers):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
    if config.language.tied_embeddings:
        yield "lm_head.weight"


def _catalog(folder: pathlib.Path, vision_tower: Folder | None) -> Catalog:
    """The folder's tensors and those of the vision encoder, from the checkpoint itself or from the CLIP folder."""
    own = Tensors(folder)
    values = read_json(folder / "config.json")
    if layout_of(folder) == "transformers":
        entries = [(llava_next.released_name(name), own, name) for name in own.names]
        if llava_next.ADAPTIVE in values:
            router = Tensors(folder / llava_next.ROUTER)
            entries += [(ROUTER + name, router, name) for name in router.names]
        return Catalog(entries)
    inside = own.has(TOWER)
    if inside and (values.get("unfreeze_mm_vision_tower") or vision_tower is None):
        return Catalog((name, own, name) for name in own.names)
    if vision_tower is None:
        raise FileNotFoundError(
            f"{folder} does not hold its vision encoder {values.get('mm_vision_tower')!r}:"
            " give that CLIP folder as vision_tower"
        )
    tower = Tensors(pathlib.Path(vision_tower))
    return Catalog(
        [(name, own, name) for name in own.names if not name.startswith(TOWER)]
        + [(TOWER + inner, tower, name) for inner, name in _vision_model(tower.names).items()]
    )


def _vision_model(names: Collection[str]) -> dict[str, str]:
    """Full name -> stored name of a CLIP folder's vision tensors; newer files lack the prefix `vision_model.`."""
    prefixed = {name: name for name in names if name.startswith("vision_model.")}
    return prefixed or {f"vision_model.{name}": name for name in names}
