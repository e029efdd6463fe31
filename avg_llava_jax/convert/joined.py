"""Joins a decoder folder (Llama, Mistral, Qwen2, Qwen3) and a CLIP or SigLIP folder into one AVG-LLaVA.

Connector, newline and router are untrained.

This module chooses what the two folders do not determine: LLaVA's select layer, its pinpoints in tiles of this tower,
the paper's ladder as far as the grid can be halved, and the template that matches the tokenizer. With a SigLIP, images
are packed as in LLaVA-OneVision, since the library's class of it takes the export.
"""

import pathlib

from avg_llava_jax.config import ModelConfig, ScalerConfig
from avg_llava_jax.convert import decoders, layouts, towers
from avg_llava_jax.convert.tensors import read_json

MODEL_TYPES = tuple(decoders.FAMILIES)
FRESH = ("model.mm_projector.", "model.image_newline", "model.router.")
"""Prefixes, in the released layout, of the tensors that neither folder holds."""

SELECT_LAYER = -2
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Pinpoints as (columns, rows) in tiles."""


def read_config(folder: layouts.Folder, vision_tower: layouts.Folder) -> ModelConfig:
    """Build the model config from a decoder folder's config.json and tokenizer, and a tower's files.

    Raises:
      FileNotFoundError, ValueError: one line that names the folder or field.
    """
    path = pathlib.Path(folder) / "config.json"
    values = read_json(path)
    family = values["model_type"]
    vision, language = towers.read_folder(vision_tower, SELECT_LAYER), decoders.read(path, values, family)
    template = layouts.template(folder, family)
    if vision.grid < 2:
        raise ValueError(f"{vision_tower}: its {vision.grid} x {vision.grid} patches cannot be halved")
    halvings = min(ScalerConfig().halvings, 2 * (vision.grid - 1).bit_length())
    mosaic = layouts.onevision_mosaic(path, "", "anyres_max_9") if vision.encoder == "siglip" else {}
    try:
        return ModelConfig(
            vision=vision,
            scaler=ScalerConfig(halvings),
            language=language,
            pinpoints=tuple((columns * vision.image_size, rows * vision.image_size) for columns, rows in PINPOINTS),
            template=template,
            **mosaic,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
