"""Reads checkpoint folders in the released PyTorch layout: AVG-LLaVA, and LLaVA-NeXT, which has no router.

Strict: a tensor that the model does not know, one that is missing, a wrong shape, and a config value
that this model does not have are errors that name it. Tensors are read one at a time, straight to
the devices that hold them.
"""

import ast
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from avg_llava_jax import parameters, sharding
from avg_llava_jax.config import (
    LanguageConfig,
    ModelConfig,
    RopeScaling,
    RouterConfig,
    ScalerConfig,
    VisionConfig,
)
from avg_llava_jax.models import avg_llava

logger = logging.getLogger(__name__)

Folder = str | os.PathLike[str]

KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": VisionConfig()}
"""Towers whose config needs no folder; their weights still do, unless the checkpoint has them."""

FIXED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "hidden_act": "silu",
    "mlp_bias": False,
}
"""Config fields of which this model has one value only."""

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
TOWER = "model.vision_tower.vision_tower."


def is_released(folder: Folder) -> bool:
    """Whether the folder's config.json says `model_type: llava_llama`."""
    path = pathlib.Path(folder) / "config.json"
    return path.is_file() and _json(path).get("model_type") == "llava_llama"


def load(
    folder: Folder, vision_tower: Folder | None = None, mesh: Mesh | None = None, dtype: Any = None
) -> tuple[ModelConfig, parameters.Params]:
    """The config and the parameters of a released-layout folder.

    Args:
      folder: with config.json and safetensors, single or sharded.
      vision_tower: the CLIP folder that the config names. Its config always counts; its weights count
        unless the checkpoint says `unfreeze_mm_vision_tower: true` and holds the tower itself.
      mesh: where the parameters go; None = the first device.
      dtype: of the parameters; None = as stored.

    A folder without a router gets a fresh one.

    Raises:
      FileNotFoundError, ValueError: one line that names the file, key or field.
    """
    folder = pathlib.Path(folder)
    tensors = Tensors(folder)
    config = read_config(folder, vision_tower, has_router=tensors.has("model.router."))
    tower = _tower_tensors(folder, tensors, vision_tower)
    shapes = parameters.abstract(config)
    fresh = {} if tensors.has("model.router.") else {"router": _fresh_router(config, mesh, dtype)}

    rows = {path: row for path, row in parameters.describe(shapes).items() if not (fresh and row.component == "router")}
    _match(config, shapes, rows, tensors, tower)
    leaves = {}
    for path, row in rows.items():
        source, strip = (tower, TOWER) if row.component == "encoder" and tower is not tensors else (tensors, "")
        shape = parameters.flat(shapes)[path].shape
        at = NamedSharding(mesh, sharding.fitting(mesh, row.spec, shape)) if mesh else _first_device()
        leaves[path] = _place(source, row, row.torch.removeprefix(strip), shape, at, dtype)
    return config, parameters.unflat(leaves) | fresh


def _place(source: "Tensors", row: parameters.Row, name: str, shape: tuple[int, ...], at: Any, dtype: Any) -> jax.Array:
    """One parameter, put together device by device from its PyTorch tensors (one a layer)."""
    dtype = np.dtype(dtype or source.dtype(name.format(n=0)))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not row.layered:
            return np.ascontiguousarray(row.from_torch(source.read(name))[index], dtype)
        layers = range(*index[0].indices(shape[0]))
        stack = None
        for slot, layer in enumerate(layers):
            tensor = row.from_torch(source.read(name.format(n=layer)))[index[1:]]
            if stack is None:
                stack = np.empty((len(layers), *tensor.shape), dtype)
            stack[slot] = tensor
        return stack

    return jax.make_array_from_callback(shape, at, part)


def _first_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _fresh_router(config: ModelConfig, mesh: Mesh | None, dtype: Any) -> parameters.Params:
    logger.info("the checkpoint has no router: a fresh one is made (attention=%s)", config.router.attention)

    def make() -> parameters.Params:
        params = {"router": avg_llava.init(config, jax.random.key(0))["router"]}
        return jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params)

    at = sharding.shardings(mesh, jax.eval_shape(make)) if mesh else None
    return jax.jit(make, out_shardings=at)()["router"]


def _match(
    config: ModelConfig,
    shapes: parameters.Params,
    rows: dict[str, parameters.Row],
    tensors: "Tensors",
    tower: "Tensors",
) -> None:
    """Every tensor of the model is there in its shape, and every tensor that is there is of the model."""
    wanted: dict[str, tuple[int, ...]] = {}
    for path, row in rows.items():
        shape = parameters.flat(shapes)[path].shape
        for layer in range(shape[0]) if row.layered else (0,):
            wanted[row.torch.format(n=layer)] = row.torch_shape(shape, config.vision.patch_size)
    for name, shape in wanted.items():
        source = tower if name.startswith(TOWER) else tensors
        short = name if source is tensors else name.removeprefix(TOWER)
        if short not in source.names:
            raise ValueError(f"{source.folder}: tensor {short!r} is missing")
        if source.shape(short) != shape:
            raise ValueError(
                f"{source.folder}: tensor {short!r} has shape {source.shape(short)}, its config says {shape}"
            )
        source.dtype(short)
    ignored = set(_ignored(config, tower is not tensors))
    for name in sorted(tensors.names):
        if name not in wanted and not any(name == i or (i.endswith(".") and name.startswith(i)) for i in ignored):
            raise ValueError(f"{tensors.folder}: tensor {name!r} is unknown to this model")


def _ignored(config: ModelConfig, tower_elsewhere: bool) -> Iterator[str]:
    """Tensors that a released folder may hold and this model does not use; a trailing dot means all below."""
    if tower_elsewhere:
        yield TOWER
    vision = TOWER + "vision_model."
    for layer in range(config.vision.used_layers, config.vision.layers):
        yield f"{vision}encoder.layers.{layer}."
    yield f"{vision}post_layernorm."
    yield f"{vision}embeddings.position_ids"
    for layer in range(config.language.layers):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
    if config.language.tied_embeddings:
        yield "lm_head.weight"


def _tower_tensors(folder: pathlib.Path, tensors: "Tensors", vision_tower: Folder | None) -> "Tensors":
    """Where the vision encoder's weights are: the checkpoint itself, or the CLIP folder."""
    values = _json(folder / "config.json")
    inside = tensors.has(TOWER)
    if inside and (values.get("unfreeze_mm_vision_tower") or vision_tower is None):
        return tensors
    if vision_tower is None:
        raise FileNotFoundError(
            f"{folder} does not hold its vision encoder {values.get('mm_vision_tower')!r}:"
            " give that CLIP folder as vision_tower"
        )
    return Tensors(pathlib.Path(vision_tower))


def read_config(folder: Folder, vision_tower: Folder | None, has_router: bool) -> ModelConfig:
    """The model config behind a released config.json and the config of its CLIP folder.

    A released router attends over tiles and knows the released un-padding; without one the defaults
    of this project hold.
    """
    folder = pathlib.Path(folder)
    values = _json(folder / "config.json")
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ValueError(f"{folder}/config.json: {key}={values[key]!r} is not supported, only {only!r}")
    vision = _vision(folder, values, vision_tower)
    if values.get("mm_hidden_size", vision.width) != vision.width:
        raise ValueError(
            f"{folder}/config.json: mm_hidden_size={values['mm_hidden_size']}, but the vision tower has {vision.width};"
            " give the CLIP folder that belongs to the checkpoint as vision_tower"
        )
    ladder = values.get("vis_token_granularity")
    scaler = ScalerConfig() if ladder is None else ScalerConfig(halvings=len(ladder) - 1)
    language = _language(folder, values)
    try:
        config = ModelConfig(
            vision=vision,
            scaler=scaler,
            router=RouterConfig(
                attention="tiles" if has_router else "tokens", text_tokens=values.get("filtered_text_num", 32)
            ),
            language=language,
            pinpoints=_pinpoints(folder, values),
            unpad="released" if has_router else "exact",
            template="vicuna_v1",
        )
    except ValueError as error:
        raise ValueError(f"{folder}/config.json: {error}") from None
    if ladder is not None and tuple(ladder) != config.granularities:
        raise ValueError(
            f"{folder}/config.json: vis_token_granularity={ladder}, but {len(ladder) - 1} halvings of a"
            f" {vision.grid} x {vision.grid} grid give {list(config.granularities)}"
        )
    return config


def _pinpoints(folder: pathlib.Path, values: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints`, a string that holds a list of [width, height]."""
    given = values.get("image_grid_pinpoints")
    try:
        pairs = ast.literal_eval(given) if isinstance(given, str) else given
        return tuple((int(width), int(height)) for width, height in pairs)
    except (TypeError, ValueError, SyntaxError):
        raise ValueError(
            f"{folder}/config.json: image_grid_pinpoints={given!r} is not a list of [width, height]"
        ) from None


def _vision(folder: pathlib.Path, values: dict[str, Any], vision_tower: Folder | None) -> VisionConfig:
    name = values.get("mm_vision_tower")
    select = values.get("mm_vision_select_layer", -2)
    if vision_tower is None:
        if name not in KNOWN_TOWERS:
            raise FileNotFoundError(
                f"{folder}/config.json names the vision tower {name!r}: give that CLIP folder as vision_tower"
            )
        tower = KNOWN_TOWERS[name]
        return VisionConfig(**{**vars(tower), "select_layer": select})

    path = pathlib.Path(vision_tower) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"vision_tower {vision_tower} is not a CLIP folder: it has no config.json")
    clip = _json(path)
    clip = clip.get("vision_config", clip)
    preprocessor = pathlib.Path(vision_tower) / "preprocessor_config.json"
    colours = _json(preprocessor) if preprocessor.is_file() else {}
    default = VisionConfig()
    # The defaults are those of CLIPVisionConfig, whose config.json may leave them out.
    vision = VisionConfig(
        image_size=clip.get("image_size", 224),
        patch_size=clip.get("patch_size", 32),
        width=clip.get("hidden_size", 768),
        layers=clip.get("num_hidden_layers", 12),
        heads=clip.get("num_attention_heads", 12),
        mlp_width=clip.get("intermediate_size", 3072),
        activation=clip.get("hidden_act", "quick_gelu"),
        norm_eps=clip.get("layer_norm_eps", 1e-5),
        select_layer=select,
        mean=tuple(colours.get("image_mean", default.mean)),
        std=tuple(colours.get("image_std", default.std)),
    )
    if vision.activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{path}: hidden_act={vision.activation!r} is not supported, only 'quick_gelu' and 'gelu'")
    return vision


def _language(folder: pathlib.Path, values: dict[str, Any]) -> LanguageConfig:
    # The defaults are those of LlamaConfig, whose config.json may leave them out.
    heads, width = values.get("num_attention_heads", 32), values.get("hidden_size", 4096)
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    return LanguageConfig(
        vocab_size=values.get("vocab_size", 32000),
        width=width,
        layers=values.get("num_hidden_layers", 32),
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or width // heads,
        mlp_width=values.get("intermediate_size", 11008),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=float((rope or {}).get("rope_theta", values.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(folder, rope),
        attention_bias=values.get("attention_bias", False),
        tied_embeddings=values.get("tie_word_embeddings", False),
        max_length=values.get("tokenizer_model_max_length") or values.get("max_position_embeddings", 2048),
    )


def _rope_scaling(folder: pathlib.Path, rope: dict[str, Any] | None) -> RopeScaling | None:
    kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
    try:
        match kind:
            case "default":
                return None
            case "linear":
                return RopeScaling("linear", float(rope["factor"]))
            case "llama3":
                return RopeScaling(
                    "llama3",
                    float(rope["factor"]),
                    float(rope["low_freq_factor"]),
                    float(rope["high_freq_factor"]),
                    int(rope["original_max_position_embeddings"]),
                )
    except KeyError as error:
        raise ValueError(f"{folder}/config.json: rope scaling {kind!r} lacks {error}") from None
    raise ValueError(f"{folder}/config.json: rope scaling {kind!r} is not supported, only 'linear' and 'llama3'")


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if type(values) is not dict:
        raise ValueError(f"{path} does not hold a JSON object")
    return values


class Tensors:
    """The safetensors of a folder, single or sharded, read by name and one at a time.

    Raises:
      FileNotFoundError, ValueError: no safetensors, a shard is missing, or a file is damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        for name in self._shards():
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though the folder's index names it")
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is truncated or damaged: {error}") from None
            self._files |= dict.fromkeys(file.keys(), file)
        self.names = self._files.keys()

    def _shards(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return sorted(set(_json(index).get("weight_map", {}).values()))
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        if list(self.folder.glob("*.bin")):
            raise FileNotFoundError(
                f"{self.folder} holds its weights as .bin only; save it once with transformers'"
                " save_pretrained(safe_serialization=True)"
            )
        raise FileNotFoundError(f"{self.folder} holds no model.safetensors and no model.safetensors.index.json")

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name starts so."""
        return any(name.startswith(prefix) for name in self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header alone."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """From the header alone; a ValueError where it is no float of 16 or 32 bits."""
        stored = self._files[name].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise ValueError(f"{self.folder}: tensor {name!r} has dtype {stored}, not one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str) -> np.ndarray:
        """The tensor."""
        return self._files[name].get_tensor(name)
