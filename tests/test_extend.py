"""docs/extend.md, followed: its made-up encoder is made, chosen, given rows in the table, and trained."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avg_llava_jax import parameters
from avg_llava_jax.data.conversation import IGNORE, IMAGE, Tokens
from avg_llava_jax.data.images import MemoryImage
from avg_llava_jax.data.packing import Sample, collate, shape_of
from avg_llava_jax.models import encoder
from avg_llava_jax.training import losses

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"


def test_another_encoder(tiny, photos, monkeypatch):
    module, line, rows = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(module.splitlines()) <= 45
    monkeypatch.setattr(encoder, "ENCODERS", dict(encoder.ENCODERS))
    scope = {"__name__": "mixer"}
    exec(module, scope)
    exec(line, scope | vars(encoder))
    config = dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, encoder="mixer"))
    with pytest.raises(ValueError, match="'encoder/layers/mix/.*' has no row in the parameter table"):
        parameters.describe(parameters.abstract(config))
    scope = dict(vars(parameters))
    exec(rows, scope)
    for row in scope["ROWS"]:
        monkeypatch.setitem(parameters.TABLE, row.path, row)
    described = parameters.describe(parameters.abstract(config))
    assert described["encoder/layers/mix/kernel"].layered and "encoder/class_token" not in described

    params = jax.jit(lambda: parameters.init(config, jax.random.key(0)))()
    image = photos[0]
    tokens = Tokens([7, IMAGE, 9, 5, 2], [IGNORE, IGNORE, IGNORE, 5, 2])
    sample = Sample("s", tokens, (image.size,), (MemoryImage("i", image),))
    batch = collate([sample, sample], shape_of(sample, config), config)
    loss = jax.jit(jax.grad(lambda p: losses.language_loss(config, p, batch, config.granularities)[0]))
    gradient = loss(params)["encoder"]["layers"]["mix"]["kernel"]
    assert gradient.shape == (1, 16, 16) and float(jnp.abs(gradient).max()) > 0 and np.isfinite(gradient).all()


def test_an_encoder_that_is_not_there(tiny):
    config = dataclasses.replace(tiny, vision=dataclasses.replace(tiny.vision, encoder="resnet"))
    with pytest.raises(ValueError, match="model.vision.encoder='resnet': choose clip or siglip"):
        parameters.abstract(config)
