"""The strict table of parameters, the mesh, and sharded against unsharded."""

import dataclasses
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from avg_llava_jax import parameters, placement, sharding
from avg_llava_jax.config import LanguageConfig, ModelConfig, RouterConfig, VisionConfig

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
    ],
    ids=["7b", "tiny", "tied and biased"],
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


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    assert placement.fitting(mesh, PartitionSpec("fsdp", "tensor"), (64, 5)) == PartitionSpec("fsdp", None)


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, optax
    jax.config.update("jax_num_cpu_devices", 8)
    from avg_llava_jax import parameters, sharding
    from avg_llava_jax.models import avg_llava
    from test_parameters import TINY as config

    def forward(params, pixels, batch):
        pyramid = avg_llava.pyramid_of(config, params, pixels)
        text = avg_llava.embed(config, params, batch["text"])
        routing = avg_llava.route(config, params, pyramid, text, batch)
        hidden, _ = avg_llava.language(config, params, avg_llava.assemble(params, pyramid, text, batch["index"]))
        return routing.logits, avg_llava.unembed(config, params, hidden)

    def loss(params, pixels, batch):
        logits, tokens = forward(params, pixels, batch)
        return jnp.mean(logits[..., 0] ** 2) + jnp.mean(jax.nn.logsumexp(tokens, axis=-1)), (logits, tokens)

    both = jax.grad(loss, has_aux=True)
    params = avg_llava.init(config, jax.random.key(0))
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (8, 2, 16, 16, 3), np.uint8)
    batch = {
        "text": draw.integers(0, 64, (8, 6)),
        "instruction": np.ones((8, 6), bool),
        "tile_image": np.tile([0, -1], (8, 1)),
        "first_tile": np.zeros((8, 1), int),
        "index": draw.integers(0, 6 + 2 * config.pyramid_rows + 1, (8, 12)),
    }
    plain = jax.jit(both)(params, pixels, batch)

    for sizes in [(8, 1, 1), (2, 2, 2)]:
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
        places, at = sharding.shardings(mesh, params), sharding.batch_sharding(mesh)
        split = jax.device_put(params, places)
        shard = split["language"]["layers"]["gate"]["kernel"].addressable_shards[0].data
        assert shard.size * sizes[1] * sizes[2] == params["language"]["layers"]["gate"]["kernel"].size
        with jax.set_mesh(mesh):
            compiled = jax.jit(both, in_shardings=(places, at, at), out_shardings=(places, at))
            out = compiled(split, *jax.device_put((pixels, batch), at))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, out)
        state = jax.eval_shape(optax.adamw(1e-3).init, params)
        moments = sharding.state_shardings(mesh, params, state)[0]
        assert moments.mu == places and moments.count == sharding.replicated(mesh)
    print("equal")
"""


def test_sharded_equals_unsharded():
    """On eight forced CPU devices, forward and gradient, at several mesh shapes."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PYTHONPATH": ":".join([*sys.path, str(pathlib.Path(__file__).parent)]),
            "JAX_PLATFORMS": "cpu",
            "PATH": "",
        },
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
