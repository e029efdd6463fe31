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
Where two grids of a ladder have equally many tokens, all names are ROWSxCOLUMNS: "6x12", "12x6".
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Granularity = int | str
"""The name of a granularity: its tokens per tile, or ROWSxCOLUMNS."""

Windows = tuple[tuple[int, int], ...]
"""For each cell along one side of a tile, the patches that it averages: (first, last + 1)."""



def named(text: str) -> Granularity:
    """A granularity from its text, as in JSON keys and flags: "72" -> 72, "12x6" -> "12x6"."""
    return int(text) if text.isdecimal() else text


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer whose output is one of its hidden states.

    layers: all layers of the tower. select_layer: the hidden state to use; -2 is the second-last,
    so the last layer is neither stored nor run. mean, std: of the pixels in 0 .. 1. resample: the
    filter of both resizes. encoder: the architecture, one of `models.encoder.ENCODERS`.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
    norm_eps: float = 1e-5
    select_layer: int = -2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    encoder: str = "clip"

    @property
    def grid(self) -> int:
        """Patches along one side of a tile: 24 for 336/14, 27 for 384/14, whose last 6 pixels are not seen."""
        return self.image_size // self.patch_size

    @property
    def used_layers(self) -> int:
        """Layers that are stored and run: hidden state -2 needs all but one."""
        return self.layers + 1 + self.select_layer if self.select_layer < 0 else self.select_layer


@dataclasses.dataclass(frozen=True)
class ScalerConfig:
    """The ladder of granularities, of a grid of any side.

    halvings: average poolings in turn, the first along `first_axis`. A 24 x 24 grid, four halvings,
        width first gives (rows x columns) 24x24, 24x12, 12x12, 12x6, 6x6: 576, 288, 144, 72, 36 tokens
        per tile (paper, section 3.2). Of an odd side the last cell is alone in its pair, which keeps
        it: 27 gives 14, then 7.
    grids: if given, the ladder itself, each grid pooled from the patches: (27, 14, 7, 4, 2), or
        ((27, 27), (9, 27), (27, 9)) as (rows, columns). Cell i of n averages the patches
        floor(i P / n) .. ceil((i + 1) P / n) - 1 of a side of P, as PyTorch's adaptive pooling.
    """

    halvings: int = 4
    first_axis: Literal["width", "height"] = "width"
    grids: tuple[int | tuple[int, int], ...] = ()

    def ladder(self, side: int) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each granularity of a tile of side x side patches, ascending in tokens, then in rows.

        Raises ValueError, which names the key, where the grid has no such ladder.

        >>> ScalerConfig().ladder(27)
        ((7, 7), (14, 7), (14, 14), (27, 14), (27, 27))
        """
        if self.grids:
            return self._given(side)
        rows = columns = side
        halve_width = self.first_axis == "width"
        grids = [(rows, columns)]
        for _ in range(self.halvings):
            rows, columns = (rows, -(-columns // 2)) if halve_width else (-(-rows // 2), columns)
            halve_width = not halve_width
            if (rows, columns) == grids[-1]:
                raise ValueError(f"scaler.halvings={self.halvings} needs a larger grid than {side} x {side}")
            grids.append((rows, columns))
        return tuple(reversed(grids))

    def _given(self, side: int) -> tuple[tuple[int, int], ...]:
        try:
            given = [(grid, grid) if isinstance(grid, int) else (grid[0], grid[1]) for grid in self.grids]
            bad = [grid for grid in given if not all(1 <= n <= side for n in grid)]
        except (TypeError, IndexError):
            raise ValueError(f"scaler.grids={self.grids!r} must hold sides, or pairs of rows and columns") from None
        if bad or len(set(given)) != len(given) or (side, side) not in given:
            raise ValueError(
                f"scaler.grids={self.grids}: give different grids of 1 to {side} rows and columns, one of them"
                f" {side} x {side}, the patches of a tile"
            )
        return tuple(sorted(given, key=lambda grid: (grid[0] * grid[1], grid[0])))

    def windows(self, side: int, cells: int) -> Windows:
        """The patches that each of `cells` cells along a side of `side` patches averages; see `Windows`.

        >>> ScalerConfig().windows(5, 3), ScalerConfig(grids=(5, 3)).windows(5, 3)
        (((0, 2), (2, 4), (4, 5)), ((0, 2), (1, 4), (3, 5)))
        """
        if self.grids:
            return tuple((i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells))
        size = next(2**n for n in range(side) if -(-side // 2**n) == cells)
        return tuple((i * size, min((i + 1) * size, side)) for i in range(cells))


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
    """A decoder of the Llama family: Llama 2 and 3, Vicuna, Mistral without window, SmolLM2, Qwen2, Qwen2.5, Qwen3.

    head_dim: features of a head; heads * head_dim may differ from width (Qwen3).
    attention_bias: bias on q, k, v and out. qkv_bias: on q, k and v alone (Qwen2).
    qk_norm: RMS norm over the features of each head of q and k, before the rotary embedding (Qwen3).
    """

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
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    max_length: int = 4096


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that the meaning of the weights depends on.

    pinpoints: (width, height) in pixels of the AnyRes mosaics an image may be resized to.
    unpad: `exact` crops the mosaic in image geometry, the same region at every granularity;
        `library` crops it at the finest granularity as the transformers library does, and at the others
        to the cells that hold a part of that; `released` takes the aspect ratio in tokens, as the
        released code does.
    most_tiles: a mosaic with cells for more than this many tiles is reduced to it bilinearly, as
        LLaVA-OneVision's `anyres_max_9` does for 9; 0 = never.
    several: how the images of a prompt with several of them are cut: `anyres` as a single one, `square`
        padded to a square, which is the only tile.
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
    unpad: Literal["exact", "released", "library"] = "exact"
    most_tiles: int = 0
    several: Literal["anyres", "square"] = "anyres"
    template: str = "vicuna_v1"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("vision.activation", self.vision.activation, ("quick_gelu", "gelu", "gelu_tanh")),
            ("vision.resample", self.vision.resample, ("bicubic", "bilinear")),
            ("scaler.first_axis", self.scaler.first_axis, ("width", "height")),
            ("router.attention", self.router.attention, ("tokens", "tiles")),
            ("unpad", self.unpad, ("exact", "released", "library")),
            ("several", self.several, ("anyres", "square")),
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
        side = self.vision.image_size
        if self.vision.encoder == "clip" and side % self.vision.patch_size:
            raise ValueError(
                f"vision.image_size={side} must be a multiple of vision.patch_size={self.vision.patch_size}"
            )
        if self.most_tiles < 0:
            raise ValueError(f"model.most_tiles={self.most_tiles} must not be negative")
        self.scaler.ladder(self.vision.grid)
        for width, height in self.pinpoints:
            if width % side or height % side:
                raise ValueError(f"pinpoint {(width, height)} must be a multiple of the tile side {side}")

    def of(self, images: int) -> ModelConfig:
        """The config by which the images of a prompt with so many are cut and packed; `several` says how."""
        if images < 2 or self.several == "anyres" or not self.pinpoints:
            return self
        return self._untiled

    @functools.cached_property
    def _untiled(self) -> ModelConfig:
        return dataclasses.replace(self, pinpoints=())

    @functools.cached_property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of one tile at each granularity, ascending in tokens.

        >>> ModelConfig().grids
        ((6, 6), (12, 6), (12, 12), (24, 12), (24, 24))
        """
        return self.scaler.ladder(self.vision.grid)

    @functools.cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens per tile at each granularity, ascending: (36, 72, 144, 288, 576) by default."""
        return tuple(rows * columns for rows, columns in self.grids)

    @functools.cached_property
    def granularities(self) -> tuple[Granularity, ...]:
        """The names of the granularities, ascending: (36, 72, 144, 288, 576) by default."""
        if len(set(self.tokens)) == len(self.tokens):
            return self.tokens
        return tuple(f"{rows}x{columns}" for rows, columns in self.grids)

    def grid_at(self, granularity: Granularity) -> tuple[int, int]:
        """(rows, columns) of one tile at a granularity: (12, 6) at 72. Raises ValueError where it is unknown."""
        if granularity not in self.granularities:
            known = ", ".join(map(str, self.granularities))
            raise ValueError(f"granularity {granularity} is not one of this model's: {known}")
        return self.grids[self.granularities.index(granularity)]

    def tokens_at(self, granularity: Granularity) -> int:
        """Tokens per tile at a granularity. Raises ValueError where it is unknown."""
        rows, columns = self.grid_at(granularity)
        return rows * columns

    def ascending(self, granularities: Iterable[Granularity]) -> tuple[Granularity, ...]:
        """Granularities in the ladder's order. Raises ValueError where one is unknown."""
        return tuple(sorted(granularities, key=lambda each: (self.tokens_at(each), self.grid_at(each))))

    @functools.cached_property
    def pyramid_rows(self) -> int:
        """R: rows of one tile's pyramid, the sum over all granularities (1116 by default)."""
        return sum(self.tokens)

    @functools.cached_property
    def pyramid_offsets(self) -> dict[Granularity, int]:
        """First pyramid row of each granularity: {36: 0, 72: 36, 144: 108, 288: 252, 576: 540}."""
        offsets, at = {}, 0
        for granularity, tokens in zip(self.granularities, self.tokens, strict=True):
            offsets[granularity] = at
            at += tokens
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
