"""AVG-LLaVA for PyTorch: a LLaVA that chooses the number of visual tokens per tile for each image.

    processor = AutoProcessor.from_pretrained(FOLDER)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**processor(images=image.convert("RGB"), text=prompt, return_tensors="pt"), max_new_tokens=64)

Lan et al., "AVG-LLaVA: An Efficient Large Multimodal Model with Adaptive Visual Granularity", Findings of ACL 2025.
This file needs only torch and transformers. The weights are those of a `LlavaNextForConditionalGeneration` or a
`LlavaOnevisionForConditionalGeneration`, which reads the same folder and always uses the finest granularity, and the
router's, in a separate file.

The stock processor prepares prompts: it writes the image tokens of the finest granularity, and this model
replaces them by the visual tokens of the granularity that the router chooses:

    input_ids    w w i i i i i i i i i i i i w w w      i: image token, w: text
    packed               w w v v v v n v v n w w w      v: visual token, n: the learned newline

Dims: B prompts, S packed length, T tiles of one image, P patches of a tile, R rows of its pyramid (P + P/2 + ...), D
width of the language model, K text tokens that the router reads, G granularities. A granularity is named by its tokens
per tile, or "ROWSxCOLUMNS" where two have equally many.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    get_anyres_image_grid_shape,
    unpad_image,
)
from transformers.utils import cached_file

ROUTER_FILE = "router/model.safetensors"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
IGNORE = -100

# The files have old tensor names. The library translates them for its own class, but not for a subclass.
# Dots are not escaped, as in the library: some versions write the patterns back as names when they save.
KEY_MAPPING = {
    "^language_model.lm_head": "lm_head",
    "^language_model.model": "model.language_model",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
    "^image_newline": "model.image_newline",
}

Size = tuple[int, int]  # (height, width) in pixels, as the processor's `image_sizes`
Name = int | str
Granularity = Name | Sequence[Name] | None


class Router(nn.Module):
    """The visual granularity router: one transformer layer, scores for each row, and a weighted vote over the rows."""

    def __init__(
        self,
        width: int,
        tokens: Sequence[int],
        attention: str,
        text_tokens: int,
        heads: int,
        dropout: float,
        norm_eps: float,
    ):
        """tokens: per tile, ascending. attention: `tokens` attends over the rows of one tile, `tiles` over the tiles,
        separately for each row."""
        super().__init__()
        self.finest, self.text_tokens = tokens[-1], text_tokens
        rows = sum(tokens) + text_tokens
        self.merger = nn.TransformerEncoderLayer(
            width, heads, width, dropout, layer_norm_eps=norm_eps, batch_first=attention == "tokens"
        )
        self.router = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, len(tokens)))
        self.voter = nn.Parameter(torch.randn(rows, 1) * rows**-0.5)
        self.norm = nn.LayerNorm(len(tokens), eps=norm_eps)

    def forward(self, pyramid: Tensor, text: Tensor) -> Tensor:
        """Pyramid (T, R, D) of one image and text embeddings (n, D) -> scores (G,) in fp32; the highest one wins."""
        x = torch.cat([pyramid, self.select_text(pyramid[0, -self.finest :], text).expand(len(pyramid), -1, -1)], 1)
        opinions = self.router(self.merger(x)).float()
        votes = (self.voter.float() * opinions).sum(1).mean(0)
        return F.layer_norm(votes, votes.shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps)

    def select_text(self, patches: Tensor, text: Tensor) -> Tensor:
        """The K of n text embeddings most similar to the mean of the patches (P, D), zero-padded: (K, D)."""
        similarity = F.normalize(text.float(), dim=-1) @ F.normalize(patches.float(), dim=-1).mean(0)
        best = similarity.topk(min(len(text), self.text_tokens)).indices
        return F.pad(text[best], (0, 0, 0, self.text_tokens - len(best)))


@dataclass
class AvgLlavaOutput(LlavaNextCausalLMOutputWithPast):
    """Output for prompts with images. Logits, labels and mask have the packed length, up to the last text token.

    granularities: int (images,), the granularity of each image; where names are ROWSxCOLUMNS, its place in
    `model.granularities`. router_logits: (images, G), None where granularities
    were given. attention_mask: bool (B, S), False where a shorter row is padded on the left.
    """

    granularities: Tensor | None = None
    router_logits: Tensor | None = None
    attention_mask: Tensor | None = None


class Packed(NamedTuple):
    """A batch for the language model, padded on the left: embeds (B, S, D), mask bool (B, S), labels int (B, S)."""

    embeds: Tensor
    mask: Tensor
    labels: Tensor | None
    granularities: Tensor
    router_logits: Tensor | None


class Adaptive:
    """A scaler and a router for a model class of the library.

    `forward` and `generate` take one more argument, `granularity`: None lets the router choose for each image, a name
    sets it for all images, a list for each image. `config.avg_llava` configures scaler and router.
    """

    _auto_class = "AutoModelForImageTextToText"
    _keys_to_ignore_on_load_missing = (r"^router\.",)  # loaded from ROUTER_FILE

    def __init__(self, config: LlavaNextConfig | LlavaOnevisionConfig):
        super().__init__(config)
        settings, vision = config.avg_llava, config.vision_config
        self.unpad = settings["unpad"]
        self.most_tiles = int(getattr(config, "vision_aspect_ratio", "0").removeprefix("anyres_max_"))
        self.side = vision.image_size // vision.patch_size
        self.given = settings["scaler"].get("grids", [])
        ladder = [(n, n) if isinstance(n, int) else tuple(n) for n in self.given] or self.halved(**settings["scaler"])
        ladder.sort(key=lambda grid: (math.prod(grid), grid))
        tokens = [math.prod(grid) for grid in ladder]
        names = tokens if len(set(tokens)) == len(tokens) else [f"{rows}x{columns}" for rows, columns in ladder]
        self.grids = dict(zip(names, ladder, strict=True))  # granularity -> (rows, columns) of a tile, ascending
        self.granularities = names
        self.router = Router(config.text_config.hidden_size, tokens, **settings["router"])
        self._keys_to_ignore_on_save = [f"router.{name}" for name in self.router.state_dict()]
        self.post_init()

    def halved(self, halvings: int, first_axis: str, **_) -> list[Size]:
        """(rows, columns) of each level, finest first; of an odd side the last row or column is alone in its pair."""
        grids = [(self.side, self.side)]
        for level in range(halvings):
            rows, columns = grids[-1]
            width = (level % 2 == 0) == (first_axis == "width")
            grids.append((rows, -(-columns // 2)) if width else (-(-rows // 2), columns))
        return grids

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        """As the library's, then loads the router from its own file, which a plain LLaVA-NeXT does not read."""
        loaded = super().from_pretrained(folder, *args, **{"key_mapping": KEY_MAPPING} | kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        file = cached_file(folder, ROUTER_FILE, **{key: kwargs[key] for key in HUB_OPTIONS if key in kwargs})
        model.router.load_state_dict(load_file(file))
        return loaded

    def save_pretrained(self, folder, *args, **kwargs):
        """As the library's, then saves the router to its own file."""
        super().save_pretrained(folder, *args, **kwargs)
        path = os.path.join(folder, ROUTER_FILE)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.router.state_dict().items()}
        save_file(weights, path, {"format": "pt"})

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        granularity: Granularity = None,
        batch_num_images: Tensor | None = None,
        **kwargs,
    ) -> LlavaNextCausalLMOutputWithPast:
        """Next-token logits; with `pixel_values`, those of the packed sequence in an `AvgLlavaOutput`.

        Raises ValueError as `pack`, and for videos.
        """
        if kwargs.get("pixel_values_videos") is not None:
            raise ValueError("this model reads images, not videos: give frames as images")
        if pixel_values is None:
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        packed = self.pack(
            input_ids, pixel_values, image_sizes, attention_mask, labels, granularity, batch_num_images
        )
        output = super().forward(
            inputs_embeds=packed.embeds,
            attention_mask=packed.mask,
            position_ids=(packed.mask.long().cumsum(1) - 1).clamp(min=0),
            labels=packed.labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return AvgLlavaOutput(
            **output,
            granularities=packed.granularities,
            router_logits=packed.router_logits,
            attention_mask=packed.mask,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        granularity: Granularity = None,
        batch_num_images: Tensor | None = None,
        **kwargs,
    ):
        """As the library's: token ids that begin with the given `input_ids`. Raises ValueError as `pack`."""
        if pixel_values is None:
            return super().generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        packed = self.pack(
            input_ids, pixel_values, image_sizes, attention_mask, None, granularity, batch_num_images
        )
        output = super().generate(inputs_embeds=packed.embeds, attention_mask=packed.mask, **kwargs)
        new = output if isinstance(output, Tensor) else output.sequences
        whole = torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], 1)
        if isinstance(output, Tensor):
            return whole
        output.sequences = whole
        return output

    def pack(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        image_sizes: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        granularity: Granularity = None,
        batch_num_images: Tensor | None = None,
    ) -> Packed:
        """Encode every image once, choose its granularity, and replace its image tokens by its visual tokens.

        The router reads all text of a row that has no label: with labels, the instruction. batch_num_images: of a
        LLaVA-OneVision, the images of each prompt; several in one are a padded square each, without tiles.

        Raises ValueError where a granularity is not one of the model's, `granularity` has another length than the
        images, or `input_ids` do not have the image tokens of the processor.
        """
        sizes = [tuple(size) for size in torch.as_tensor(image_sizes).tolist()]
        if batch_num_images is not None:
            together = [int(n) for n in batch_num_images for _ in range(int(n))]
            sizes = [size if n == 1 else None for size, n in zip(sizes, together, strict=True)]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[kept.bool()] for ids, kept in zip(input_ids, mask, strict=True)]
        targets = input_ids.new_full(input_ids.shape, IGNORE) if labels is None else labels
        targets = [row[kept.bool()] for row, kept in zip(targets, mask, strict=True)]
        pyramids = self.see(pixel_values, sizes)
        wanted = list(granularity) if isinstance(granularity, (list, tuple)) else [granularity] * len(sizes)
        if len(wanted) != len(sizes):
            raise ValueError(f"granularity={granularity!r} names {len(wanted)} for {len(sizes)} images")

        embeds, packed_targets, scores = [], [], []
        for row, target, places in zip(rows, targets, self.places(rows, sizes), strict=True):
            text = self.get_input_embeddings()(row)
            instruction = text[(row != self.config.image_token_index) & (target == IGNORE)]
            pieces, of_pieces, at = [], [], 0
            for start, stop, image in places:
                levels = pyramids[image]
                if wanted[image] is None:
                    flat = torch.cat([levels[g].flatten(1, 2) for g in self.granularities], 1)
                    scores.append(self.router(flat, instruction))
                    wanted[image] = self.granularities[int(scores[-1].argmax())]
                visual = self.lay_out(self.level(levels, wanted[image]), sizes[image])
                pieces += [text[at:start], visual.to(text.dtype)]
                of_pieces += [target[at:start], target.new_full((len(visual),), IGNORE)]
                at = stop
            embeds.append(torch.cat([*pieces, text[at:]]))
            packed_targets.append(torch.cat([*of_pieces, target[at:]]))

        longest = max(map(len, embeds))
        return Packed(
            embeds=torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in embeds]),
            mask=torch.stack([F.pad(row.new_ones(len(row)), (longest - len(row), 0)) for row in packed_targets]).bool(),
            labels=None
            if labels is None
            else torch.stack([F.pad(row, (longest - len(row), 0), value=IGNORE) for row in packed_targets]),
            granularities=torch.tensor(
                [self.granularities.index(name) if isinstance(name, str) else name for name in wanted],
                device=input_ids.device,
            ),
            router_logits=torch.stack(scores) if len(scores) == len(sizes) else None,
        )

    def see(self, pixel_values: Tensor, sizes: Sequence[Size | None]) -> list[dict[Name, Tensor]]:
        """Encode, project and pool all tiles at once: for each image {granularity: (T, rows, columns, D)}.

        pixel_values: (images, max tiles, 3, H, W); the first T tiles of an image are real, the rest padding. The scaler
        averages pairs of neighbours, alternately along the two axes; or windows of the patches, for a list of grids.
        """
        counts = [1 + math.prod(self.tile_grid(size)) for size in sizes]
        tiles = torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])
        seen = self.model.vision_tower(tiles.to(self.dtype), output_hidden_states=True, return_dict=True)
        patches = seen.hidden_states[self.config.vision_feature_layer]
        if self.config.vision_feature_select_strategy == "default":
            patches = patches[:, 1:]
        level = self.model.multi_modal_projector(patches).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        patches, levels = level, {}
        for name, grid in reversed(self.grids.items()):
            if self.given:
                level = F.adaptive_avg_pool2d(patches, grid)
            elif grid != level.shape[2:]:
                pair = [-(-fine // coarse) for fine, coarse in zip(level.shape[2:], grid, strict=True)]
                level = F.avg_pool2d(level, pair, ceil_mode=True)
            levels[name] = level.permute(0, 2, 3, 1).split(counts)
        return [{name: split[image] for name, split in levels.items()} for image in range(len(sizes))]

    def level(self, levels: dict[Name, Tensor], granularity: Name) -> Tensor:
        """The level of a pyramid at a granularity; raises ValueError, with the known ones, where it has none."""
        if granularity not in levels:
            raise ValueError(f"granularity={granularity!r} is not one of this model's: {self.granularities}")
        return levels[granularity]

    def lay_out(self, tiles: Tensor, size: Size | None) -> Tensor:
        """Tiles (T, rows, columns, D) of an image -> its visual tokens (N, D).

        The overview comes first, row-major, then the mosaic of the other tiles, cropped to the image and reduced where
        it has too many cells, with a newline after each row. One of several images is its overview and a newline.
        """
        newline = self.model.image_newline.to(tiles.dtype)
        if size is None:
            return torch.cat([tiles[0].flatten(0, 1), newline[None]])
        mosaic = tiles[1:].unflatten(0, self.tile_grid(size)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        top, bottom, left, right = self.kept_cells(size, tiles.shape[1:3])
        mosaic = mosaic[top:bottom, left:right]
        small = self.reduced(*mosaic.shape[:2], math.prod(tiles.shape[1:3]))
        if small != mosaic.shape[:2]:
            mosaic = F.interpolate(mosaic.permute(2, 0, 1)[None], small, mode="bilinear")[0].permute(1, 2, 0)
        newlines = newline.expand(len(mosaic), 1, -1)
        return torch.cat([tiles[0].flatten(0, 1), torch.cat([mosaic, newlines], 1).flatten(0, 1)])

    def reduced(self, rows: int, columns: int, tile: int) -> Size:
        """Rows and columns of a mosaic's visual tokens: fewer where it has cells for more than `most_tiles` tiles."""
        factor = math.sqrt(rows * columns / (self.most_tiles * tile)) if self.most_tiles else 0
        return (rows, columns) if factor <= 1.1 else (max(1, int(rows // factor)), max(1, int(columns // factor)))

    def kept_cells(self, size: Size, grid: Size) -> tuple[int, int, int, int]:
        """Cells of a mosaic that un-padding keeps: (top, bottom, left, right), half open; grid: cells of a tile.

        `exact` keeps every cell that holds a pixel of the image, `library` every cell that holds a patch which the
        library keeps. `released` uses the aspect ratio in cells, which crops the image where a cell is not square;
        weights that were trained with it need it.
        """
        tiles = self.tile_grid(size)
        if self.unpad == "released":
            return self.cropped(size, tiles[0] * grid[0], tiles[1] * grid[1], int)
        if self.unpad == "library":
            patches = self.cropped(size, tiles[0] * self.side, tiles[1] * self.side, lambda n: int(round(n, 7)))
        else:
            patches = self.shown(size)
        kept = []
        for axis in range(2):
            first, last = patches[2 * axis : 2 * axis + 2]
            windows = [
                (tile * self.side + start, tile * self.side + end)
                for tile in range(tiles[axis])
                for start, end in self.windows(grid[axis])
            ]
            cells = [i for i, (start, end) in enumerate(windows) if first < last and start < last and end > first]
            kept += [cells[0], cells[-1] + 1] if cells else [0, 0]
        return tuple(kept)

    def windows(self, cells: int) -> list[Size]:
        """The patches that each of `cells` cells along a side of a tile averages: (first, last + 1)."""
        side = self.side
        if self.given:
            return [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        width = next(2**n for n in range(side) if -(-side // 2**n) == cells)
        return [(i * width, min((i + 1) * width, side)) for i in range(cells)]

    def cropped(self, size: Size, rows: int, columns: int, whole: Callable) -> tuple[int, int, int, int]:
        """What the image's aspect ratio leaves of a mosaic, the same cut on both sides; whole: rounds to an int."""
        height, width = size
        if width / height > columns / rows:
            cut = (rows - whole(height * (columns / width))) // 2
            return cut, rows - cut, 0, columns
        cut = (columns - whole(width * (rows / height))) // 2
        return 0, rows, cut, columns - cut

    def shown(self, size: Size) -> tuple[int, int, int, int]:
        """The patches of a mosaic that show a pixel of the image; a tile's last pixels may belong to no patch."""
        (height, width), vision = size, self.config.vision_config
        side, patch = vision.image_size, vision.patch_size
        high, wide = (n * side for n in self.tile_grid(size))
        by_width = wide / width < high / height
        new_height = min(math.ceil(height * (wide / width)), high) if by_width else high
        new_width = wide if by_width else min(math.ceil(width * (high / height)), wide)
        found = []
        for whole, part in ((high, new_height), (wide, new_width)):
            tile, at = divmod((whole - part) // 2, side)
            found.append(tile * self.side + min(at // patch, self.side))
            tile, at = divmod((whole - part) // 2 + part, side)
            found.append(tile * self.side + min(-(-at // patch), self.side))
        return tuple(found)

    def places(self, rows: Sequence[Tensor], sizes: Sequence[Size]) -> list[list[tuple[int, int, int]]]:
        """Positions of the images of each row: (first, last + 1, image), images numbered across the batch.

        Raises ValueError where the image tokens of a row are not those that the processor writes for its images.
        """
        found, left = [], list(range(len(sizes)))
        for row in rows:
            found.append([])
            tokens = (row == self.config.image_token_index).nonzero()[:, 0].tolist()
            while tokens:
                count = self.processor_count(sizes[left[0]]) if left else 0
                if not count or tokens[:count] != list(range(tokens[0], tokens[0] + count)):
                    raise ValueError(
                        f"row {len(found) - 1} has {len(tokens)} image tokens where "
                        + (f"an image takes {count}" if count else f"all {len(sizes)} images have their place")
                        + ": prepare prompts with this folder's processor"
                    )
                found[-1].append((tokens[0], tokens[0] + count, left.pop(0)))
                tokens = tokens[count:]
        if left:
            raise ValueError(
                f"{len(left)} of {len(sizes)} images have no image tokens in input_ids: prepare prompts with this"
                " folder's processor"
            )
        return found

    def processor_count(self, size: Size | None) -> int:
        """Number of image tokens that the processor writes for an image, with the library's rounded un-padding."""
        if size is None:
            return self.side**2 + 1
        down, across = self.tile_grid(size)
        cells = unpad_image(torch.empty(1, down * self.side, across * self.side, device="meta"), size)
        rows, columns = self.reduced(*cells.shape[1:], self.side**2)
        return self.side**2 + rows * (columns + 1)

    def tile_grid(self, size: Size | None) -> tuple[int, int]:
        """Grid (rows, columns) of the tiles in an image's mosaic; none for one of several images."""
        if size is None:
            return 0, 0
        tile = self.config.vision_config.image_size
        return get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, tile)


class AvgLlavaForConditionalGeneration(Adaptive, LlavaNextForConditionalGeneration):
    """`LlavaNextForConditionalGeneration` with a scaler and a router, see `Adaptive`."""


class AvgLlavaOnevisionForConditionalGeneration(Adaptive, LlavaOnevisionForConditionalGeneration):
    """`LlavaOnevisionForConditionalGeneration` with a scaler and a router, see `Adaptive`; without videos."""
