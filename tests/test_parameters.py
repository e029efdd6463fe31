"""The strict table of parameters, the mesh, and sharded against unsharded."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from avg_llava_jax import parameters, placement
from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig, VisionConfig
from avg_llava_jax.parallel import sharding

TINY = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=4, width=16, layers=3, heads=2, mlp_width=32),
    router=RouterConfig(text_tokens=4, heads=2),
    language=LanguageConfig(vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=64),
    pinpoints=((16, 32), (32, 16)),
)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        TINY,
        dataclasses.replace(
            TINY, language=dataclasses.replace(TINY.language, tied_embeddings=True, attention_bias=True)
        ),
        dataclasses.replace(TINY, language=dataclasses.replace(TINY.language, qkv_bias=True, qk_norm=True)),
    ],
    ids=["7b", "tiny", "tied and biased", "Qwen"],
)
def test_every_parameter_has_a_row(config):
    shapes = parameters.abstract(config)
    rows = parameters.describe(shapes)
    assert rows.keys() == parameters.flat(shapes).keys()
    assert {row.component for row in rows.values()} == set(parameters.COMPONENTS)
    specs = parameters.flat(parameters.partition_specs(shapes))
    for path, leaf in parameters.flat(shapes).items():
        assert len(specs[path]) == len(leaf.shape)
        # Whatever is large is sharded.
        assert leaf.size < 2**22 or "fsdp" in specs[path], path


def test_7b_size():
    sizes = dict.fromkeys(parameters.COMPONENTS, 0)
    shapes = parameters.abstract(ModelConfig())
    for path, row in parameters.describe(shapes).items():
        sizes[row.component] += parameters.flat(shapes)[path].size
    assert sizes["language"] == 6_738_415_616  # Llama 2 7B
    assert round(sizes["router"] / 1e6, 1) == 117.5  # paper: 1.66 % of the model


def test_unknown_parameter_is_named():
    with pytest.raises(ValueError, match="'router/extra' has no row"):
        parameters.describe({"router": {"extra": np.zeros(3)}})
    with pytest.raises(ValueError, match="'image_newline' has shape"):
        parameters.describe({"image_newline": np.zeros((3, 3))})


def test_split_and_merge():
    shapes = parameters.abstract(TINY)
    for trained in parameters.TRAINED_IN.values():
        trainable, frozen = parameters.split(shapes, trained)
        assert set(jax.tree.leaves(parameters.components(trainable))) == set(trained)
        assert set(jax.tree.leaves(parameters.components(frozen))).isdisjoint(trained)
        assert parameters.merge(trainable, frozen) == shapes
    assert list(parameters.split(shapes, ["router"])[0]) == ["router"]
    assert "image_newline" in parameters.split(shapes, ["connector"])[0]
    with pytest.raises(ValueError, match="unknown component 'vision'"):
        parameters.split(shapes, ["vision"])
    with pytest.raises(ValueError, match="is in both halves"):
        parameters.merge(shapes, shapes)


@pytest.mark.parametrize("form", ["same", "transposed", "patches", "third 1", "column"])
def test_shapes_from_torch(form):
    ours = {"same": (6, 2), "transposed": (6, 2), "patches": (12, 5), "third 1": (6, 2), "column": (7,)}[form]
    row = parameters.Row("x", (None,) * len(ours), "router", "x", form)
    torch = np.arange(np.prod(row.torch_shape(ours, 2))).reshape(row.torch_shape(ours, 2))
    assert row.from_torch(torch).shape == ours


def test_patches_are_ordered_row_column_colour():
    torch = np.arange(5 * 3 * 2 * 2).reshape(5, 3, 2, 2)
    ours = parameters.TABLE["encoder/patch_embed/kernel"].from_torch(torch).reshape(2, 2, 3, 5)
    assert ours[1, 0, 2, 4] == torch[4, 2, 1, 0]


def test_mesh():
    assert dict(sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(ValueError, match="does not fit 1 devices"):
        sharding.make_mesh({"data": -1, "fsdp": 3, "tensor": 1})
    with pytest.raises(ValueError, match="at most one is -1"):
        sharding.make_mesh({"data": -1, "fsdp": -1, "tensor": 1})


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU of a slice, as `mesh_utils` sees it."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


@dataclasses.dataclass(frozen=True)
class ChipOfSeveralSlices(Chip):
    """One of a slice alone has no such index."""

    slice_index: int = 0


@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU v5 lite"])
def test_a_mesh_axis_is_half_a_side_of_a_slice(kind):
    """tensor=2 on a slice of 4 x 4: each pair is two neighbours."""
    chips = [Chip(4 * y + x, (x, y, 0), kind) for y in range(4) for x in range(4)]
    mesh = sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 2}, chips)
    assert mesh.shape == {"data": 1, "fsdp": 8, "tensor": 2}
    for one, other in mesh.devices.reshape(8, 2):
        assert sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)) == 1


@pytest.mark.parametrize("data, slices_of_rows", [(2, [{0}, {1}]), (4, [{0}, {0}, {1}, {1}])])
def test_only_data_crosses_from_a_tpu_slice_to_another(data, slices_of_rows):
    places = [(x, y, 0) for y in range(4) for x in range(4)]
    chips = [
        ChipOfSeveralSlices(16 * part + n, at, "TPU v6 lite", slice_index=part)
        for part in (0, 1)
        for n, at in enumerate(places)
    ]
    mesh = sharding.make_mesh({"data": data, "fsdp": -1, "tensor": 2}, chips)
    assert mesh.shape == {"data": data, "fsdp": 16 // data, "tensor": 2}
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices] == slices_of_rows
    with pytest.raises(ValueError, match="on 2 TPU slices: give `data` a multiple of 2"):
        sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, chips)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    assert placement.fitting(mesh, PartitionSpec("fsdp", "tensor"), (64, 5)) == PartitionSpec("fsdp", None)
