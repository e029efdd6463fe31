"""The parameter table: for each parameter its sharding, its component, and its name in released checkpoints.

Sharding, learning rates, weight import and export all use this table. The table is strict: a parameter without a row,
or with another number of axes than its row, is an error that names it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from avg_llava_jax import placement
from avg_llava_jax.config import ModelConfig
from avg_llava_jax.models import avg_llava

Params = dict[str, Any]

COMPONENTS = ("encoder", "connector", "router", "language")
"""The learning-rate groups; `connector` includes the image newline."""

ADAPTERS = {"encoder": "encoder_lora", "language": "language_lora"}
"""The components of low-rank adapters, by the component they stand on, see `adapters`."""

TRAINED_IN = {
    "grounding": ("encoder", "connector", "language"),
    "connector": ("connector",),
    "multi_granularity": ("encoder", "connector", "language"),
    "rglf": ("router",),
}
"""The components that are trained in each phase; a config may freeze some of them.

In `grounding`, of `language` only the embeddings get a gradient (the unembedding, where it is not tied); its layers get
weight decay alone.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: one parameter.

    path: its place in the tree, "language/layers/q/kernel".
    axes: the logical name of each of its axes, see `placement.MESH_AXES`.
    component: one of `COMPONENTS` or of `ADAPTERS`.
    torch: its name in a released checkpoint; `{n}` is the layer, one tensor per index of the first axis. An adapter's
        name is peft's without the prefix `base_model.model.`. Scales of quantized weights (`convert.quantize`) and of
        adapters have none: "".
    form: the layout of the PyTorch tensor (of one layer):
        `same`         the layout of this parameter
        `transposed`   a linear weight, (out, in)
        `patches`      a convolution, (E, 3, p, p); here (p * p * 3, E), rows ordered (row, column, colour)
        `third 0|1|2`  query, key or value, stacked in one (3 D, D) weight or (3 D,) bias
        `column`       (n, 1); here (n,)
    """

    path: str
    axes: tuple[str | None, ...]
    component: str
    torch: str
    form: Literal["same", "transposed", "patches", "third 0", "third 1", "third 2", "column"]

    @property
    def layered(self) -> bool:
        """Whether the first axis runs over layers."""
        return self.axes[0] == "layers"

    @property
    def constant(self) -> bool:
        """Whether it is the scale of an adapter, fp32, which no phase trains."""
        return self.path.endswith("/lora_scale")

    @property
    def spec(self) -> PartitionSpec:
        """The mesh axis of each array axis."""
        return placement.spec(*self.axes)

    def torch_shape(self, shape: tuple[int, ...], patch_size: int) -> tuple[int, ...]:
        """The shape of the PyTorch tensor (of one layer) for this parameter's `shape`.

        "language/layers/q/kernel" of shape (32, 4096, 1024) comes from 32 tensors (1024, 4096).
        """
        if self.layered:
            shape = shape[1:]
        match self.form.split():
            case ["transposed"]:
                return shape[::-1]
            case ["patches"]:
                return shape[1], 3, patch_size, patch_size
            case ["third", _]:
                return 3 * shape[-1], *shape[:-1]
            case ["column"]:
                return *shape, 1
        return shape

    def from_torch(self, tensor: Any) -> Any:
        """Convert a PyTorch tensor (of one layer, as an array) to this parameter's layout; a view where possible."""
        match self.form.split():
            case ["transposed"]:
                return tensor.T
            case ["patches"]:
                return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
            case ["third", which]:
                third = len(tensor) // 3
                return tensor[int(which) * third : (int(which) + 1) * third].T
            case ["column"]:
                return tensor[:, 0]
        return tensor

    def to_torch(self, array: Any, patch_size: int) -> Any:
        """The inverse of `from_torch`; of a `third`, its own rows alone."""
        match self.form.split():
            case ["transposed"] | ["third", _]:
                return array.T
            case ["patches"]:
                return array.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1)
            case ["column"]:
                return array[:, None]
        return array


CLIP = "model.vision_tower.vision_tower.vision_model"
ROUTER = "model.router"
LAYER = "model.layers.{n}"
EMBED = CLIP + ".embeddings"
CLIP_LAYER = CLIP + ".encoder.layers.{n}"


def _linear(path: str, torch: str, into: str | None, out: str | None, form: str = "transposed") -> tuple[Row, ...]:
    """The rows of a linear layer at `path`: kernel (into, out) and bias (out,)."""
    component, stack = path.split("/")[0], ("layers",) if "{n}" in torch else ()
    weight, bias = (
        (torch + "_weight", torch + "_bias") if form != "transposed" else (torch + ".weight", torch + ".bias")
    )
    bias_axis = None if out == "width" else out
    return (
        Row(path + "/kernel", (*stack, into, out), component, weight, form),
        Row(path + "/bias", (*stack, bias_axis), component, bias, "same" if form == "transposed" else form),
    )


def _norm(path: str, torch: str) -> tuple[Row, ...]:
    """The rows of a norm at `path`: scale and bias; an RMS norm has no bias and leaves that row unused."""
    component, stack = path.split("/")[0], ("layers",) if "{n}" in torch else ()
    return (
        Row(path + "/scale", (*stack, None), component, torch + ".weight", "same"),
        Row(path + "/bias", (*stack, None), component, torch + ".bias", "same"),
    )


def _scales(row: Row) -> Row:
    """The row of a quantized weight's scales, which have all axes of the weight but the one that is summed over."""
    axes = row.axes[:-1] if row.path.endswith("embed") else (*row.axes[:-2], row.axes[-1])
    return Row(row.path + "_scale", axes, row.component, "", "same")


def _adapter(row: Row) -> tuple[Row, ...]:
    """The rows of an adapter on a kernel (into, out): A (into, r), B (r, out) and a scale; s (x @ A) @ B is added."""
    layers, into, out = row.axes
    node, component = row.path.removesuffix("kernel"), ADAPTERS[row.component]
    torch = row.torch.removesuffix("weight")
    return (
        Row(node + "lora_a", (layers, into, None), component, torch + "lora_A.weight", "transposed"),
        Row(node + "lora_b", (layers, None, out), component, torch + "lora_B.weight", "transposed"),
        Row(node + "lora_scale", (layers,), component, "", "same"),
    )


def _table() -> dict[str, Row]:
    rows: list[Row] = [
        Row("encoder/patch_embed/kernel", (None, "width"), "encoder", f"{EMBED}.patch_embedding.weight", "patches"),
        Row("encoder/patch_embed/bias", (None,), "encoder", f"{EMBED}.patch_embedding.bias", "same"),
        Row("encoder/class_token", (None,), "encoder", f"{EMBED}.class_embedding", "same"),
        Row("encoder/position", (None, None), "encoder", f"{EMBED}.position_embedding.weight", "same"),
        *_norm("encoder/pre_norm", f"{CLIP}.pre_layrnorm"),
        *_norm("encoder/layers/norm1", f"{CLIP_LAYER}.layer_norm1"),
        *_linear("encoder/layers/q", f"{CLIP_LAYER}.self_attn.q_proj", "width", "heads"),
        *_linear("encoder/layers/k", f"{CLIP_LAYER}.self_attn.k_proj", "width", "heads"),
        *_linear("encoder/layers/v", f"{CLIP_LAYER}.self_attn.v_proj", "width", "heads"),
        *_linear("encoder/layers/out", f"{CLIP_LAYER}.self_attn.out_proj", "heads", "width"),
        *_norm("encoder/layers/norm2", f"{CLIP_LAYER}.layer_norm2"),
        *_linear("encoder/layers/up", f"{CLIP_LAYER}.mlp.fc1", "width", "mlp"),
        *_linear("encoder/layers/down", f"{CLIP_LAYER}.mlp.fc2", "mlp", "width"),
        *_linear("connector/up", "model.mm_projector.0", "width", "mlp"),
        *_linear("connector/down", "model.mm_projector.2", "mlp", "width"),
        Row("image_newline", (None,), "connector", "model.image_newline", "same"),
        *_linear("router/q", f"{ROUTER}.merger.self_attn.in_proj", "width", "heads", "third 0"),
        *_linear("router/k", f"{ROUTER}.merger.self_attn.in_proj", "width", "heads", "third 1"),
        *_linear("router/v", f"{ROUTER}.merger.self_attn.in_proj", "width", "heads", "third 2"),
        *_linear("router/out", f"{ROUTER}.merger.self_attn.out_proj", "heads", "width"),
        *_norm("router/norm1", f"{ROUTER}.merger.norm1"),
        *_linear("router/linear1", f"{ROUTER}.merger.linear1", "width", "mlp"),
        *_linear("router/linear2", f"{ROUTER}.merger.linear2", "mlp", "width"),
        *_norm("router/norm2", f"{ROUTER}.merger.norm2"),
        *_linear("router/hidden", f"{ROUTER}.router.0", "width", "mlp"),
        *_linear("router/logits", f"{ROUTER}.router.2", "mlp", None),
        Row("router/voter", (None,), "router", f"{ROUTER}.voter", "column"),
        *_norm("router/norm", f"{ROUTER}.norm"),
        Row("language/embed", ("vocab", "width"), "language", "model.embed_tokens.weight", "same"),
        *_norm("language/layers/norm1", f"{LAYER}.input_layernorm"),
        *_linear("language/layers/q", f"{LAYER}.self_attn.q_proj", "width", "heads"),
        *_linear("language/layers/k", f"{LAYER}.self_attn.k_proj", "width", "heads"),
        *_linear("language/layers/v", f"{LAYER}.self_attn.v_proj", "width", "heads"),
        *_norm("language/layers/q_norm", f"{LAYER}.self_attn.q_norm"),
        *_norm("language/layers/k_norm", f"{LAYER}.self_attn.k_norm"),
        *_linear("language/layers/out", f"{LAYER}.self_attn.o_proj", "heads", "width"),
        *_norm("language/layers/norm2", f"{LAYER}.post_attention_layernorm"),
        *_linear("language/layers/gate", f"{LAYER}.mlp.gate_proj", "width", "mlp"),
        *_linear("language/layers/up", f"{LAYER}.mlp.up_proj", "width", "mlp"),
        *_linear("language/layers/down", f"{LAYER}.mlp.down_proj", "mlp", "width"),
        *_norm("language/norm", "model.norm"),
        *_linear("language/unembed", "lm_head", "width", "vocab"),
    ]  # fmt: skip
    rows += [_scales(row) for row in rows if re.fullmatch("language/(.*/kernel|embed)", row.path)]
    linears = [row for row in rows if re.fullmatch("(encoder|language)/layers/.*/kernel", row.path)]
    rows += [each for row in linears for each in _adapter(row)]
    table = {row.path: row for row in rows}
    if len(table) != len(rows):
        raise AssertionError("two rows of the parameter table have the same path")
    return table


TABLE = _table()


Dtype = Any
"""The dtype of parameters: one for all, a mapping from component to dtype, or None = unchanged."""


def _row(path: str) -> Row:
    """A parameter's row. Raises ValueError where it has none."""
    if path not in TABLE:
        raise ValueError(f"parameter {path!r} has no row in the parameter table")
    return TABLE[path]


def dtype_of(path: str, wanted: Dtype, stored: Any) -> Any:
    """The dtype of one parameter; dtype_of("router/voter", {"router": float32, ...}, float16) is float32."""
    row = _row(path)
    return stored if row.constant else (wanted[row.component] if isinstance(wanted, Mapping) else wanted) or stored


@functools.cache  # tracing a 7B takes a second; the tree is shared, so callers must not change it
def _shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: avg_llava.init(config, jax.random.key(0)))


def abstract(config: ModelConfig, dtype: Dtype = None) -> Params:
    """The shapes and dtypes (None = fp32) of a model's parameters as ShapeDtypeStructs; computes nothing."""
    return unflat(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, dtype_of(path, dtype, leaf.dtype))
            for path, leaf in flat(_shapes(config)).items()
        }
    )


def init(config: ModelConfig, rng: jax.Array, dtype: Dtype = None) -> Params:
    """Fresh parameters."""
    return jax.tree.map(lambda leaf, to: leaf.astype(to.dtype), avg_llava.init(config, rng), abstract(config, dtype))


def flat(params: Params) -> dict[str, Any]:
    """{"encoder/class_token": leaf, ...}."""
    return flatten_dict(params, sep="/")


def unflat(leaves: dict[str, Any]) -> Params:
    """The inverse of `flat`."""
    return unflatten_dict(leaves, sep="/")


def describe(params: Params) -> dict[str, Row]:
    """The row of each parameter, by path.

    Raises:
      ValueError: a parameter has no row, or another number of axes than its row.
    """
    described = {}
    for path, leaf in flat(params).items():
        row = _row(path)
        if len(row.axes) != len(leaf.shape):
            raise ValueError(f"parameter {path!r} has shape {leaf.shape}, its row in the table has axes {row.axes}")
        described[path] = row
    return described


class Part(NamedTuple):
    """A parameter, or one layer of stacked ones (None = not stacked), as (part of) a PyTorch tensor."""

    row: Row
    layer: int | None


def torch_parts(params: Params) -> dict[str, list[Part]]:
    """The parameters of each PyTorch tensor, by its name; three where query, key and value are stacked.

    Raises:
      ValueError: the parameters are quantized, or have adapters.
    """
    parts: dict[str, list[Part]] = {}
    leaves = flat(params)
    for path, row in describe(params).items():
        if not row.torch:
            of = "an adapter: fold it in first" if row.constant else "quantized weights: use those they were made from"
            raise ValueError(f"parameter {path!r} belongs to {of}")
        for layer in range(leaves[path].shape[0]) if row.layered else (None,):
            parts.setdefault(row.torch.format(n=layer), []).append(Part(row, layer))
    return {name: sorted(group, key=lambda part: part.row.form) for name, group in parts.items()}


def partition_specs(params: Params) -> Params:
    """A PartitionSpec over the mesh axes `fsdp` and `tensor` for each parameter."""
    return _tree(params, lambda row: row.spec)


def components(params: Params) -> Params:
    """The component of each parameter, as a tree of strings."""
    return _tree(params, lambda row: row.component)


def _tree(params: Params, of: Callable[[Row], Any]) -> Params:
    return unflat({path: of(row) for path, row in describe(params).items()})


def split(params: Params, trainable: Collection[str]) -> tuple[Params, Params]:
    """Split parameters into those of the `trainable` components and the others, two disjoint trees.

    split({"connector": c, "router": r, ...}, ["router"]) -> {"router": r}, {"connector": c, ...}

    The constants of a trainable component are among the others.
    """
    unknown = sorted(set(trainable) - {*COMPONENTS, *ADAPTERS.values()})
    if unknown:
        raise ValueError(f"unknown component {unknown[0]!r}; the components are {', '.join(COMPONENTS)}")
    learns = {path: row.component in trainable and not row.constant for path, row in describe(params).items()}
    leaves = flat(params)
    return (
        unflat({path: leaf for path, leaf in leaves.items() if learns[path]}),
        unflat({path: leaf for path, leaf in leaves.items() if not learns[path]}),
    )


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split`. Raises ValueError for a parameter that is in both."""
    ours, theirs = flat(trainable), flat(frozen)
    both = sorted(ours.keys() & theirs.keys())
    if both:
        raise ValueError(f"parameter {both[0]!r} is in both halves")
    return unflat(theirs | ours)
