"""Model configs as frozen dataclasses: everything that a checkpoint records about its model.

Legend of dims, used in every signature and docstring of the project:

    B  samples of a batch           T  tile slots of a sample (all its images)
    I  image slots of a sample      P  patches of a tile (finest granularity)
    G  granularities                R  pyramid rows of a tile, the sum over G
    L  text tokens of a sample      S  packed length: text, visual tokens, newlines
    A  answer tokens of a sample    N  visual tokens of an image, newlines included
    D  width of the language model  E  width of the vision encoder
    V  vocabulary                   M  items of all samples together: tiles, images, patches
    H  height of a tile in pixels   W  width of a tile in pixels
    J  instruction tokens that the router selects

In attention and the KV cache alone:

    Q  query heads                  K  key-value heads, a divisor of Q
    d  features of a head           C  capacity of a slot in positions
    F  first positions of a slot that are attended to, its window

A *granularity* is named by its tokens per tile: 36, 72, 144, 288, 576 for the released
24 x 24 grid. Together they are the *ladder*. Lists of granularities are always ascending.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer whose output is a hidden state before its last layer.

    layers: all layers of the CLIP tower. select_layer: the hidden state to use; -2 is the
    second-last, so the last layer is neither stored nor run.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: float = 1e-5
    select_layer: int = -2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def grid(self) -> int:
        """Patches along one side of a tile (24 for 336/14)."""
        return self.image_size // self.patch_size

    @property
    def used_layers(self) -> int:
        """Layers that are stored and run: hidden state -2 needs all but one."""
        return self.layers + 1 + self.select_layer if self.select_layer < 0 else self.select_layer


@dataclasses.dataclass(frozen=True)
class ScalerConfig:
    """The ladder of granularities: `halvings` average poolings in turn, the first along `first_axis`.

    A 24 x 24 grid, four halvings, width first gives (rows x columns)
    24x24, 24x12, 12x12, 12x6, 6x6: 576, 288, 144, 72, 36 tokens per tile (paper, section 3.2).
    """

    halvings: int = 4
    first_axis: Literal["width", "height"] = "width"

    @property
    def divisor(self) -> int:
        """The grid's side must be a multiple of this: 4 for four halvings, two along each axis."""
        return 2 ** ((self.halvings + 1) // 2)


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """The visual granularity router (paper, section 3.3).

    attention: `tokens` fuses the rows of one tile (paper); `tiles` attends over the tiles of
    one image at each row (released code).
    """

    attention: Literal["tokens", "tiles"] = "tokens"
    text_tokens: int = 32
    heads: int = 8
    dropout: float = 0.1
    norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling: `linear` divides positions by `factor`; `llama3` rescales low frequencies alone."""

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"language.rope_scaling.kind={self.kind!r}: choose linear or llama3")


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """A decoder of the Llama family (Llama 2/3, Vicuna, Mistral without window, SmolLM2)."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp_width: int = 11008
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    tied_embeddings: bool = False
    max_length: int = 4096


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that the meaning of the weights depends on.

    pinpoints: (width, height) in pixels of the AnyRes mosaics an image may be resized to.
    unpad: `exact` crops the mosaic in image geometry, the same region at every granularity;
        `released` takes the aspect ratio in tokens, as the released code does.
    template: the conversation template that the weights were trained with.

    Raises:
      ValueError: a value is unknown, or sizes do not divide; the message names the key.
    """

    vision: VisionConfig = VisionConfig()
    scaler: ScalerConfig = ScalerConfig()
    router: RouterConfig = RouterConfig()
    language: LanguageConfig = LanguageConfig()
    pinpoints: tuple[tuple[int, int], ...] = (
        (336, 672),
        (672, 336),
        (672, 672),
        (1008, 336),
        (336, 1008),
    )
    unpad: Literal["exact", "released"] = "exact"
    template: str = "vicuna_v1"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("vision.activation", self.vision.activation, ("quick_gelu", "gelu")),
            ("scaler.first_axis", self.scaler.first_axis, ("width", "height")),
            ("router.attention", self.router.attention, ("tokens", "tiles")),
            ("unpad", self.unpad, ("exact", "released")),
        ):
            if value not in known:
                raise ValueError(f"model.{name}={value!r}: choose {' or '.join(known)}")
        for whole, size, part, count in (
            ("vision.width", self.vision.width, "vision.heads", self.vision.heads),
            ("language.width", self.language.width, "router.heads", self.router.heads),
            ("language.heads", self.language.heads, "language.kv_heads", self.language.kv_heads),
        ):
            if count < 1 or size % count:
                raise ValueError(f"model.{whole}={size} must be a multiple of {part}={count}")
        if not 1 <= self.vision.used_layers <= self.vision.layers:
            raise ValueError(f"model.vision.select_layer={self.vision.select_layer} of {self.vision.layers} layers")
        grid, side = self.vision.grid, self.vision.image_size
        if side % self.vision.patch_size:
            raise ValueError(
                f"vision.image_size={side} must be a multiple of vision.patch_size={self.vision.patch_size}"
            )
        if grid % self.scaler.divisor:
            raise ValueError(
                f"scaler.halvings={self.scaler.halvings} needs a grid side divisible by {self.scaler.divisor}; "
                f"the vision grid is {grid}"
            )
        for width, height in self.pinpoints:
            if width % side or height % side:
                raise ValueError(f"pinpoint {(width, height)} must be a multiple of the tile side {side}")

    @functools.cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of one tile at each granularity, ascending in tokens.

        >>> ModelConfig().grids
        ((6, 6), (12, 6), (12, 12), (24, 12), (24, 24))
        """
        rows = columns = self.vision.grid
        halve_width = self.scaler.first_axis == "width"
        grids = [(rows, columns)]
        for _ in range(self.scaler.halvings):
            rows, columns = (rows, columns // 2) if halve_width else (rows // 2, columns)
            halve_width = not halve_width
            grids.append((rows, columns))
        return tuple(reversed(grids))

    @functools.cached_property
    def granularities(self) -> tuple[int, ...]:
        """Tokens per tile, ascending: (36, 72, 144, 288, 576) by default."""
        return tuple(rows * columns for rows, columns in self.grids)

    @functools.cached_property
    def pyramid_rows(self) -> int:
        """R: rows of one tile's pyramid, the sum over all granularities (1116 by default)."""
        return sum(self.granularities)

    @functools.cached_property
    def pyramid_offsets(self) -> dict[int, int]:
        """First pyramid row of each granularity: {36: 0, 72: 36, 144: 108, 288: 252, 576: 540}."""
        offsets, at = {}, 0
        for granularity in self.granularities:
            offsets[granularity] = at
            at += granularity
        return offsets


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_dict`. Raises ValueError for an unknown key, and names it."""
    return build(ModelConfig, values, "model")


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass, nested ones included, from the values of its fields; lists become tuples.

    Raises:
      ValueError: a key names no field; the message names it below `where`.
    """
    types = nested(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
    built = {}
    for key, value in values.items():
        if key in types and value is not None:
            value = build(types[key], value, f"{where}.{key}")
        elif isinstance(value, (list, tuple)):
            value = tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)
        built[key] = value
    return cls(**built)


def nested(cls: type) -> dict[str, type]:
    """The fields of a dataclass whose type is a dataclass, or that or None: {"rope_scaling": RopeScaling}."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if kinds:
            found[name] = kinds[0]
    return found
