"""Logits of whole prompts, packed as the model's training packs them: what an export must compute as well."""

import dataclasses
import functools

import jax
import numpy as np

from avg_llava_jax.data.packing import collate, merge, prompt_index, shape_of
from avg_llava_jax.eval import routing
from avg_llava_jax.inference import choosing
from avg_llava_jax.models import avg_llava


@functools.partial(jax.jit, static_argnums=0)
def _read(config, params, batch, index):
    pyramid = avg_llava.pyramid_of(config, params, batch["pixels"])
    x = avg_llava.assemble(params, pyramid, avg_llava.embed(config, params, batch["text"]), index)
    return avg_llava.unembed(config, params, avg_llava.decoder(config, params, x))


def packed_logits(model, requests, granularity, most):
    """Granularities of all images, or None -> logits (S, V) of each prompt, router logits (I, G), the choices.

    most: positions of the longest prompt at least.
    """
    config = model.config
    prepared = [model.prepare(request) for request in requests]
    samples = [each.sample for each in prepared]
    shape = dataclasses.replace(merge(shape_of(s, config) for s in samples), answer=1, fill=1.0)
    with jax.default_matmul_precision("highest"):
        routed = routing.route_all(model, samples)
        wanted = [dataclasses.replace(each, choice=(granularity,) * len(each.choice)) for each in prepared]
        choices = [choosing.choose(config, *each) for each in zip(wanted, routed, strict=True)]
        batch = collate(samples, shape, config, granularities=())
        index, lengths = np.zeros((len(samples), most), np.int32), []
        for row, (sample, choice) in enumerate(zip(samples, choices, strict=True)):
            places, length = prompt_index(sample, shape, config, choice)
            index[row, :length] = places[:length]
            lengths.append(length)
        packed = _read(config, model.params, {key: batch[key] for key in ("pixels", "text")}, index)
    return (
        [row[:length] for row, length in zip(packed, lengths, strict=True)],
        np.concatenate([rows for rows in routed if len(rows)]),
        sum(choices, ()),
    )
