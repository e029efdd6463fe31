"""Import and export of PyTorch folders, tensor by tensor; the target folder appears only when it is complete.

    PyTorch folder --import_folder--> checkpoint folder --export_released, export_transformers--> PyTorch folder

The table in `parameters` holds the names, layouts and shapes for both directions.
"""

import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from avg_llava_jax import adapters, checkpoint, parameters
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import foreign, layouts, llava_next, model_card, peft, tensors, towers
from avg_llava_jax.data.conversation import stop_ids
from avg_llava_jax.data.tokenizer import Tokenizer, load_tokenizer
from avg_llava_jax.files import whole, write_json

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]

GIB = 2**30
SHARD_SIZE = 5 * GIB
VOCABULARIES = ("model.embed_tokens.weight", "lm_head.weight")


def local_folder(source: Folder) -> pathlib.Path:
    """The folder itself, or the downloaded snapshot of a hub id such as `liuhaotian/llava-v1.6-vicuna-7b`.

    Raises:
      FileNotFoundError: `source` is neither a folder nor a hub id that can be downloaded.
    """
    folder = pathlib.Path(source)
    if folder.is_dir():
        return folder
    if len(folder.parts) != 2 or folder.is_absolute():
        raise FileNotFoundError(f"{source} is neither a folder nor a hub id (OWNER/NAME)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "tokenizer.model", "*.jinja"]
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):  # .bin only where there is no safetensors file
            found = pathlib.Path(snapshot_download(str(source), allow_patterns=[*wanted, weights]))
            if list(found.glob(weights)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{source} is not a local folder, and the hub's answer is: {why}") from None
    return found


def import_folder(
    source: Folder,
    output: Folder,
    vision_tower: Folder | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    seed: int = 0,
) -> ModelConfig:
    """Import a PyTorch folder (or hub id) as a checkpoint folder; returns its config.

    Tensors that the model does not run are kept beside the parameters (`foreign.keep_unused`), so that an
    export loses nothing.

    Args:
      source: PyTorch folder or hub id.
      output: checkpoint folder to write; it must not exist, or be empty.
      vision_tower: as for `checkpoint.load`, or a hub id.
      dtype, mesh, seed: as for `checkpoint.load`.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, key or field.
    """
    source, vision_tower = local_folder(source), vision_tower and local_folder(vision_tower)
    _check_known(source)
    with whole(output) as folder:
        loaded = checkpoint.load(source, vision_tower, mesh, dtype, seed)
        layouts.check_tokenizer(source, loaded.config.language.vocab_size)
        write_checkpoint(loaded, folder)
        foreign.keep_unused(source, folder, vision_tower)
    return loaded.config


def _check_known(source: pathlib.Path) -> None:
    if foreign.is_foreign(source):
        return
    config = source / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{source} has no config.json")
    raise ValueError(
        f"{config}: model_type={tensors.read_json(config).get('model_type')!r} is not supported, only"
        f" {', '.join(foreign.MODEL_TYPES)}"
    )


def write_checkpoint(loaded: checkpoint.Loaded, folder: pathlib.Path) -> None:
    """Write a model as a checkpoint folder without training state: config, tokenizer and parameters.

    A model with a `base` in its meta refers to it and stores the rest.
    """
    base, trained = loaded.meta.get("base"), loaded.meta["granularities_trained"]
    params = adapters.divide(loaded.params)[0] if base else loaded.params
    checkpoint.save_config(folder, loaded.config, loaded.meta["training"], trained, base)
    checkpoint.copy_tokenizer(loaded.tokenizer_folder, folder)
    largest = max(leaf.nbytes for leaf in parameters.flat(params).values())
    with checkpoint.Manager(folder, at_once=1 + largest // 10**9) as manager:
        manager.save(loaded.meta["step"], params)
        manager.wait()
    (folder / checkpoint.LOCK).unlink()


def merge(source: Folder, output: Folder, dtype: Any = None) -> None:
    """Fold the adapters of a checkpoint or of a peft folder into their base: a checkpoint that needs no base.

    dtype: of the parameters, None = as stored. The sum W + s A B is computed in fp32.

    Raises:
      ValueError: the source has neither adapters nor a base.
    """
    loaded = checkpoint.load(source)
    if not loaded.meta.get("base"):
        raise ValueError(f"{source} has no adapters and refers to no base: there is nothing to fold in")
    meta = {key: value for key, value in loaded.meta.items() if key != "base"}
    params = adapters.folded(loaded.params)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    with whole(output) as folder:
        write_checkpoint(loaded._replace(params=params, meta=meta), folder)
        foreign.keep_unused(source if not peft.is_adapter(source) else loaded.meta["base"]["path"], folder)


ADAPTER = "adapter"
"""What `foreign.ORIGIN` says of an adapter that came with a router, beside the config files of its base."""


def import_adapter(source: Folder, base: Folder, output: Folder, vision_tower: Folder | None = None) -> ModelConfig:
    """Import a peft folder, or LLaVA's own adapter, as a checkpoint folder that refers to its base.

    base: a checkpoint or a PyTorch folder. The other arguments, and errors, are those of `import_folder`.
    """
    source, vision_tower = local_folder(source), vision_tower and local_folder(vision_tower)
    if not peft.is_adapter(source):
        raise ValueError(f"{source} has no {peft.CONFIG}: --base is for the adapters of peft and of LLaVA")
    with whole(output) as folder:
        loaded = checkpoint.load_adapter(source, local_folder(base), vision_tower)
        write_checkpoint(loaded, folder)
        foreign.keep_unused(local_folder(base), folder, vision_tower)
        origin = _origin(folder)
        if origin and peft.has_router(source):
            write_json(folder / foreign.ORIGIN, origin | {ADAPTER: {"router": True}})
    return loaded.config


def export_peft(
    source: Folder,
    output: Folder,
    dtype: Any = None,
    shard_size: int = SHARD_SIZE,
    router: bool = True,
    report: Folder | None = None,
) -> None:
    """Export a checkpoint's adapters, connector and router as a folder for the peft library, which loads it onto the
    base in transformers' layout.

    Raises:
      ValueError: the checkpoint has no adapters, or an argument other than `router` is given, which has no effect.
    """
    if dtype is not None or report is not None or shard_size != SHARD_SIZE:
        raise ValueError("--layout=peft takes no --dtype, --shard_size or --report: adapters are fp32, in one file")
    loaded = checkpoint.load(source)
    base = (loaded.meta.get("base") or {}).get("path")
    with whole(output) as folder:
        peft.save(folder, loaded.config, loaded.params, base if base and foreign.is_foreign(base) else None, router)


def dry_run(source: Folder, vision_tower: Folder | None = None) -> str:
    """Check a PyTorch folder's config, tensor names and, if it holds weights, shapes and dtypes; reads no tensor.

    Returns one line for a person. Raises FileNotFoundError, ValueError as `import_folder`.
    """
    folder, vision_tower = local_folder(source), vision_tower and local_folder(vision_tower)
    _check_known(folder)
    if any((folder / name).is_file() for name in tensors.weight_files(folder)):
        opened = foreign.inspect(folder, vision_tower)
        config, count = opened.config, len(opened.catalog.names) - len(opened.unused)
        found = f"{count} tensors match in name, shape and dtype, {len(opened.unused)} more are kept unread"
    else:
        config, count, listed = foreign.match_names(folder, vision_tower)
        found = f"{count} tensors " + ("match in name" if listed else "are what its config asks for") + ", no weights"
    layouts.check_tokenizer(folder, config.language.vocab_size)
    sizes = sum(leaf.size for leaf in parameters.flat(parameters.abstract(config)).values())
    return f"{folder}: {found}; {sizes / 1e9:.3f} G parameters, granularities {list(config.granularities)}"


def export_released(
    source: Folder,
    output: Folder,
    dtype: Any = None,
    shard_size: int = SHARD_SIZE,
    router: bool = True,
    report: Folder | None = None,
) -> None:
    """Export a checkpoint as a folder in the released layout, with every file that the released loader reads.

    The weights include the vision tower (`unfreeze_mm_vision_tower`); a tower whose config is not that of a
    published CLIP is also written to `vision_tower/`. Layers that the model does not run come from the
    imported folder; a model that was not imported gets identity layers.

    Args:
      source: checkpoint folder.
      output: folder to write; it must not exist, or be empty.
      dtype: of every floating-point tensor; None = as stored.
      shard_size: largest file, in bytes.
      router: False omits the router, which gives a LLaVA-NeXT.
      report: report.json of an evaluation, for the model card; None = the one in the checkpoint folder, if any.

    Raises:
      ValueError: the released code cannot run this model; names the field.
    """
    source = pathlib.Path(source)
    config, _ = checkpoint.read_config(source)
    origin = _origin(source)
    tower = pathlib.Path(output).absolute() / "vision_tower"
    values = layouts.released_config(config, origin.get("config", {}), router, str(tower))
    loaded = _folded(source)
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    exported = Exported(config, loaded.params, source / foreign.UNUSED, dtype, router)
    card = model_card.card(loaded, output, "released", router, model_card.read_report(source, report))
    with whole(output) as folder:
        exported.save(folder, shard_size)
        tokenizer.save(folder)
        special = _special_ids(tokenizer, tokenizer.eos_id)
        values = special | values | {"torch_dtype": exported.dtype_name}
        write_json(folder / "config.json", values)
        write_json(
            folder / "generation_config.json", origin.get("generation_config", {"_from_model_config": True} | special)
        )
        preprocessor = origin.get("preprocessor_config", towers.preprocessor(config.vision))
        write_json(folder / "preprocessor_config.json", preprocessor)
        if values["mm_vision_tower"] == str(tower):
            inside = folder / "vision_tower"
            inside.mkdir()
            write_json(inside / "config.json", towers.write(config.vision))
            write_json(inside / "preprocessor_config.json", towers.preprocessor(config.vision))
            exported.save(inside, shard_size, foreign.TOWER)
        (folder / model_card.CARD).write_text(card, encoding="utf-8")


def export_transformers(
    source: Folder,
    output: Folder,
    dtype: Any = None,
    shard_size: int = SHARD_SIZE,
    router: bool = True,
    report: Folder | None = None,
) -> None:
    """Export a checkpoint for the transformers library; the arguments are those of `export_released`.

    `LlavaNextForConditionalGeneration`, or `LlavaOnevisionForConditionalGeneration` where the tower is a SigLIP, always
    runs it at the finest granularity. With `trust_remote_code` the
    folder's own modeling_avg_llava.py adds scaler and router; the router's weights are in `router/`, which the library
    does not read. A LLaVA-NeXT that was imported but not trained is exported without router, as a LLaVA-NeXT.

    The layout needs a token `<image>`. If the tokenizer has none, the token gets the next id. If the embedding has
    no row for it, row 0 is repeated: its logit is that of token 0, and `generate` suppresses it.

    The library's processor decodes transparent images and, under Pillow 13, resizes some tall images in another way
    than `data.images`; a warning and the model card say so.

    Raises:
      ValueError: the library cannot run this model; names the field.
    """
    source = pathlib.Path(source)
    config, _ = checkpoint.read_config(source)
    origin = _origin(source)
    loaded = _folded(source)
    if router and loaded.meta["training"] is None and origin and not _had_router(origin):
        logger.warning("%s: the router was never trained; exporting a LLaVA-NeXT without router", source)
        router = False
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    added = llava_next.placeholders(config, tokenizer)
    rows = max(config.language.vocab_size, *(token + 1 for token in added.values()))
    exported = Exported(config, loaded.params, source / foreign.UNUSED, dtype, router, rows, llava_next.stored_name)
    values = llava_next.to_config(config, origin.get("config", {}), added, rows, router)
    if "vision_use_head" in values["vision_config"]:
        values["vision_config"]["vision_use_head"] = exported.holds(foreign.HEAD)
    processor = llava_next.processor(config)
    card = model_card.card(loaded, output, "transformers", router, model_card.read_report(source, report))
    with whole(output) as folder:
        exported.save(folder, shard_size, leave=(foreign.ROUTER,))
        llava_next.save_tokenizer(folder, tokenizer, added, config.template, processor["processor_class"])
        write_json(folder / "config.json", values | {"dtype": exported.dtype_name})
        stops = stop_ids(tokenizer, config.template)
        stops = stops[0] if len(stops) == 1 else list(stops)
        beyond = list(range(config.language.vocab_size, rows))
        suppressed = {"suppress_tokens": beyond} if beyond else {}
        if origin.get("config", {}).get("model_type") in llava_next.STYLES:
            suppressed = origin.get("generation_config", {})
        write_json(folder / "generation_config.json", _special_ids(tokenizer, stops) | suppressed)
        write_json(folder / "preprocessor_config.json", llava_next.preprocessor(config))
        write_json(folder / "processor_config.json", processor)
        if router:
            beside = folder / llava_next.ROUTER
            beside.mkdir()
            exported.save(beside, SHARD_SIZE, foreign.ROUTER)  # one file: modeling_avg_llava.py reads no more
            shutil.copyfile(llava_next.MODELING, folder / llava_next.MODELING.name)
        (folder / model_card.CARD).write_text(card, encoding="utf-8")
    logger.warning(
        "%s: pass image.convert('RGB') to its processor: newer transformers blend transparency onto white, this model"
        " was trained on the colour under it; Pillow 13 resizes some tall images in another order (%s)",
        output,
        model_card.CARD,
    )


def _folded(source: Folder) -> checkpoint.Loaded:
    """A checkpoint, its adapters folded in."""
    loaded = checkpoint.load(source)
    return loaded._replace(params=adapters.folded(loaded.params))


def _special_ids(tokenizer: Tokenizer, eos: int | list[int]) -> dict[str, Any]:
    """Special token ids of a generation config, as far as the tokenizer has them."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None}


def _origin(source: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Config files that were imported with the weights, by name; {} for a model that was not imported."""
    path = source / foreign.ORIGIN
    return tensors.read_json(path) if path.is_file() else {}


def _had_router(origin: dict[str, dict[str, Any]]) -> bool:
    """Whether the imported weights had a router, in either layout, or the adapter on them."""
    of_base = not {"vis_token_granularity", llava_next.ADAPTIVE}.isdisjoint(origin.get("config", {}))
    return of_base or ADAPTER in origin


class Exported:
    """A model's tensors with PyTorch's names and layouts, created one at a time."""

    def __init__(
        self,
        config: ModelConfig,
        params: parameters.Params,
        unused: pathlib.Path,
        dtype: Any,
        router: bool,
        vocabulary: int | None = None,
        rename: Callable[[str], str] = str,
    ):
        """vocabulary: number of embedding rows, None = unchanged. rename: released name -> name to write."""
        self._patch = config.vision.patch_size
        self._leaves = parameters.flat(params)
        self._parts = parameters.torch_parts(params)
        self._unused = tensors.Tensors(unused.parent, [unused.name]) if unused.is_file() else None
        dtype = np.dtype(dtype) if dtype else None
        model_dtype = dtype or np.dtype(self._leaves["language/embed"].dtype)
        self.dtype_name = str(model_dtype)
        found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for name, shape in foreign.torch_shapes(config, router).items():
            if name in VOCABULARIES:
                shape = (vocabulary or shape[0], *shape[1:])
            found[name] = shape, dtype or np.dtype(self._leaves[self._parts[name][0].row.path].dtype)
        for name in self._unused.names if self._unused else ():
            stored = self._unused.dtype(name, counters=True)
            counter = stored in tensors.COUNTERS.values()
            found[name] = self._unused.shape(name), stored if counter else dtype or stored
        for name, shape in foreign.idle_shapes(config).items():
            found.setdefault(name, (shape, model_dtype))
        self._found = found
        self.tensors = {rename(name): announced for name, announced in found.items()}
        self._released = {rename(name): name for name in found}

    def holds(self, prefix: str) -> bool:
        """Whether a tensor has a name, in the released layout, that begins with `prefix`."""
        return any(name.startswith(prefix) for name in self._found)

    def save(self, folder: pathlib.Path, shard_size: int, prefix: str = "", leave: Sequence[str] = ()) -> None:
        """Write the tensors whose names begin with `prefix`, which is removed, and with none of `leave`."""
        chosen = {
            name.removeprefix(prefix): announced
            for name, announced in self.tensors.items()
            if name.startswith(prefix) and not name.startswith(tuple(leave))
        }
        with tqdm(total=len(chosen), desc="writing", unit="tensor", leave=False, disable=None) as progress:

            def read(name: str) -> np.ndarray:
                progress.update()
                return self._read(self._released[prefix + name])

            tensors.save(folder, chosen, read, shard_size)

    def _read(self, name: str) -> np.ndarray:
        shape, dtype = self._found[name]
        if name in self._parts:
            pieces = []
            for row, layer in self._parts[name]:
                leaf = self._leaves[row.path] if layer is None else self._leaves[row.path][layer]
                pieces.append(row.to_torch(np.asarray(leaf), self._patch))
            if name in VOCABULARIES:
                pieces += [pieces[0][:1]] * (shape[0] - len(pieces[0]))
            return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).astype(dtype, copy=False)
        if self._unused and name in self._unused.names:
            return self._unused.read(name).astype(dtype, copy=False)
        return np.full(shape, float("norm" in name and name.endswith(".weight")), dtype)
