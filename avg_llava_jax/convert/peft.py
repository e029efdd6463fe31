"""Adapter folders of the peft library, and of LLaVA's own training code: adapters in and out by name.

    adapter_config.json           rank, alpha, targets, the base
    adapter_model.safetensors     or .bin: A (r, in) and B (out, r) of each linear, and modules that were trained whole
    non_lora_trainables.bin       LLaVA alone: connector and newline

Every name begins with `base_model.model.`, then follows the modules of the PyTorch model: those of LLaVA's own class,
or of the transformers library's (`llava_next`). Read are connector, newline and router in either, and adapters on
linears of encoder and language model. Written are the names of transformers 5 for `AvgLlavaForConditionalGeneration`;
the newline and the router's voter are no modules, and stand in the file as peft stores trained embeddings.
"""

import collections
import math
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np

from avg_llava_jax import adapters, parameters, placement
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.convert import foreign, llava_next, tensors
from avg_llava_jax.convert.tensors import read_json
from avg_llava_jax.files import write_json

CONFIG, WHOLE = "adapter_config.json", "non_lora_trainables.bin"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."

MODULES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^(?=multi_modal_projector\.|image_newline)", "model."),
    (r"^model\.router\.", "router."),
)
"""From the stored names of the llava_next layout to the modules of transformers 5."""

WHOLE_MODULES = ("multi_modal_projector", "router.merger", "router.router", "router.norm")
"""Modules that peft copies whole. It wraps each name's ending: "router" would wrap a router inside of a router."""

UNSUPPORTED = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "megatron_config": None}


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (pathlib.Path(folder) / CONFIG).is_file()


def base_of(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The base that an adapter names: a path, absolute, from the adapter's folder or from the working directory.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    folder = pathlib.Path(folder)
    named = str(read_json(folder / CONFIG).get("base_model_name_or_path") or "")
    for path in (folder / named, pathlib.Path(named)):
        if named and path.is_dir():
            return path
    raise FileNotFoundError(
        f"{folder / CONFIG} names the base {named or None!r}, which is no folder: "
        "give it with avg-llava import --source=ADAPTER --base=FOLDER"
    )


def load(folder: str | os.PathLike[str], config: ModelConfig, params: parameters.Params) -> parameters.Params:
    """The parameters of a base with the adapters of a folder, and with what was trained whole beside them.

    Arrays get the shardings of the weights that they replace or stand on; adapters are fp32. Where layers have
    different ranks, smaller ones are filled with zeros.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, key or tensor.
    """
    folder = pathlib.Path(folder)
    settings, stored = _settings(folder), _opened(folder)
    leaves, catalog = parameters.flat(params), _known(folder, stored, config)
    low, whole = {}, collections.defaultdict(dict)
    for name, stored_as in catalog.items():
        match = re.fullmatch(r"(.*)\.lora_([AB])\.weight", name)
        if match:
            low.setdefault(match[1], {})[match[2]] = np.asarray(stored.read(stored_as), np.float32)
        else:
            whole[name] = stored_as
    found = _adapters(folder, config, leaves, low, settings)
    adapters.require(str(folder), found, config)
    return parameters.unflat(leaves | _whole(folder, config, leaves, whole, stored) | found)


def has_router(folder: str | os.PathLike[str]) -> bool:
    """Whether an adapter holds a router."""
    return any("router." in name for name in _opened(pathlib.Path(folder)).names)


def _opened(folder: pathlib.Path) -> tensors.Tensors:
    files = [next((name for name in WEIGHTS if (folder / name).is_file()), None)]
    if files[0] is None:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(WEIGHTS)}")
    return tensors.Tensors(folder, files + ([WHOLE] if (folder / WHOLE).is_file() else []))


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={values.get('peft_type')!r} is not supported, only LORA")
    for key, plain in UNSUPPORTED.items():
        if values.get(key, plain) not in (plain, None):
            raise ValueError(f"{path}: {key}={values[key]!r} is not supported, only {plain!r}")
    init = values.get("init_lora_weights", True)
    if str(init).lower().startswith(("pissa", "olora", "corda", "lora_ga")):
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changed the base too; save it as a plain LoRA (peft's save_pretrained "
            "with path_initial_model_for_weight_conversion)"
        )
    if values.get("alora_invocation_tokens"):
        raise ValueError(f"{path}: alora_invocation_tokens is not supported: the adapter would act on every token")
    if type(values.get("lora_alpha", 8)) not in (int, float):
        raise ValueError(f"{path}: lora_alpha={values['lora_alpha']!r} is not a number")
    return values


def _known(folder: pathlib.Path, stored: tensors.Tensors, config: ModelConfig) -> dict[str, str]:
    """Released name -> stored name of every tensor; an adapter's name ends in .lora_A.weight or .lora_B.weight."""
    modules = {name.removesuffix(".weight") for name in _kernels(config)}
    wholes = {name for name in _torch_parts(config) if name.startswith(WHOLE_NAMES)}
    known: dict[str, str] = {}
    for stored_as in stored.names:
        name = stored_as.removeprefix(PREFIX)
        for spelled in (name, llava_next.released_name(name), f"model.{name}"):
            if spelled in wholes or re.sub(r"\.lora_[AB]\.weight$", "", spelled) in modules - {spelled}:
                known[spelled] = stored_as
                break
            if foreign.is_ignored(config, spelled):
                break  # an adapter on a layer of the tower that is not run
        else:
            raise ValueError(f"{folder}: tensor {stored_as!r} is unknown, or is on a layer that takes no adapter here")
    return known


WHOLE_NAMES = ("model.mm_projector.", "model.image_newline", "model.router.")


def _kernels(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Released weight name -> node and layer, of the linears that may have an adapter."""
    counts = {"encoder": config.vision.used_layers, "language": config.language.layers}
    return {
        parameters.TABLE[f"{node}/kernel"].torch.format(n=layer): (node, layer)
        for node in adapters.LINEARS
        for layer in range(counts[node.split("/")[0]])
    }


def _torch_parts(config: ModelConfig) -> dict[str, list[parameters.Part]]:
    return parameters.torch_parts(parameters.abstract(config))


def _adapters(
    folder: pathlib.Path,
    config: ModelConfig,
    base: dict[str, jax.Array],
    low: dict[str, dict[str, np.ndarray]],
    settings: dict[str, Any],
) -> dict[str, jax.Array]:
    """Leaves of the adapters by path, from A and B of each module; a layer without one gets zeros."""
    kernels = {name.removesuffix(".weight"): at for name, at in _kernels(config).items()}
    by_node: dict[str, dict[int, tuple[np.ndarray, np.ndarray, float]]] = collections.defaultdict(dict)
    for module, parts in low.items():
        node, layer = kernels[module]
        for part, other in ("AB", "BA"):
            if part not in parts:
                raise ValueError(f"{folder}: {module} has lora_{other} without lora_{part}")
        rows = parts["A"].shape, parts["B"].shape
        layers, into, out = base[f"{node}/kernel"].shape
        rank = parts["A"].shape[0]
        if rows != ((rank, into), (out, rank)):
            raise ValueError(
                f"{folder}: {module} has A {rows[0]} and B {rows[1]}, on this base they would be "
                f"{(rank, into)} and {(out, rank)}: it was trained on another base"
            )
        alpha = _of_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        by_node[node][layer] = parts["A"].T, parts["B"].T, scale
    leaves = {}
    for node, layers in by_node.items():
        kernel = base[f"{node}/kernel"]
        count, into, out = kernel.shape
        rank = max(a.shape[1] for a, _, _ in layers.values())
        a, b = np.zeros((count, into, rank), np.float32), np.zeros((count, rank, out), np.float32)
        scale = np.full(count, next(iter(layers.values()))[2], np.float32)
        for layer, (own_a, own_b, own_scale) in layers.items():
            a[layer, :, : own_a.shape[1]], b[layer, : len(own_b)], scale[layer] = own_a, own_b, own_scale
        for leaf, array in zip(adapters.LEAVES, (a, b, scale), strict=True):
            path = f"{node}/{leaf}"
            leaves[path] = placement.put(array, kernel, parameters.TABLE[path].spec)
    return leaves


def _of_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's name, as peft finds it."""
    names = module, _module(module)
    for key, value in (pattern or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return default


def _whole(
    folder: pathlib.Path,
    config: ModelConfig,
    base: dict[str, jax.Array],
    whole: dict[str, str],
    stored: tensors.Tensors,
) -> dict[str, jax.Array]:
    """What was trained whole, by path."""
    parts, shapes, leaves = _torch_parts(config), parameters.flat(parameters.abstract(config)), {}
    for name, stored_as in whole.items():
        tensor = np.asarray(stored.read(stored_as))
        for row, _ in parts[name]:
            wanted = row.torch_shape(shapes[row.path].shape, config.vision.patch_size)
            if tensor.shape != wanted:
                raise ValueError(
                    f"{folder}: tensor {stored_as!r} has shape {tensor.shape}, on this base it would have {wanted}"
                )
            array = np.array(row.from_torch(tensor), base[row.path].dtype, order="C")
            leaves[row.path] = jax.device_put(array, base[row.path].sharding)
    return leaves


def _module(name: str) -> str:
    """The name that a released name has among the modules of transformers 5."""
    name = llava_next.stored_name(name)
    for pattern, by in MODULES:
        name = re.sub(pattern, by, name)
    return name


def save(folder: pathlib.Path, config: ModelConfig, params: parameters.Params, base: str | None, router: bool) -> None:
    """Write a model's adapters, connector, newline and router as peft's two files; fp32 as they are trained.

    base: the path or hub id of the PyTorch folder of the base; peft only shows it.

    Raises:
      ValueError: the model has no adapters.
    """
    found = adapters.of(params)
    if not found:
        raise ValueError("the checkpoint has no adapters: export the whole model, --layout=transformers")
    own, _ = adapters.divide(params)
    leaves = parameters.flat(own)
    announced: dict[str, np.ndarray] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path in sorted(found):
        row = parameters.TABLE[path]
        if row.constant:
            continue
        array = np.asarray(leaves[path], np.float32)
        scales = np.asarray(leaves[f"{path.rsplit('/', 1)[0]}/lora_scale"], np.float64)
        for layer, one in enumerate(array):
            name = _module(row.torch.format(n=layer))
            announced[PREFIX + name] = one.T
            if path.endswith("lora_a"):
                ranks[name.removesuffix(".lora_A.weight")] = one.shape[1], float(scales[layer]) * one.shape[1]
    plain = parameters.unflat({path: leaf for path, leaf in leaves.items() if path not in found})
    for name, parts in parameters.torch_parts(plain).items():
        if router or not name.startswith("model.router."):
            pieces = [row.to_torch(np.asarray(leaves[row.path]), config.vision.patch_size) for row, _ in parts]
            announced[PREFIX + _module(name)] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    (rank, alpha), _ = collections.Counter(ranks.values()).most_common(1)[0]
    values = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": "|".join(sorted(map(re.escape, ranks))),
        "rank_pattern": {name: own for name, (own, _) in ranks.items() if own != rank},
        "alpha_pattern": {name: _number(own) for name, (_, own) in ranks.items() if own != alpha},
        "modules_to_save": [name for name in WHOLE_MODULES if router or not name.startswith("router")],
    }
    write_json(folder / CONFIG, values)
    shapes = {name: (array.shape, array.dtype) for name, array in announced.items()}
    tensors.save_file(folder / WEIGHTS[0], shapes, announced.__getitem__)


def _number(value: float) -> int | float:
    """16 for 16.0, as peft writes alpha."""
    return int(value) if value == int(value) else value
