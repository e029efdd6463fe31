"""/tokenize: the token ids of a prompt, or of messages with the model's template; fields and reply as vLLM has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avg_llava_jax.data.conversation import IMAGE, encode_raw
from avg_llava_jax.inference.choosing import token_costs
from avg_llava_jax.inference.model import Model
from avg_llava_jax.server import reading
from avg_llava_jax.server.fields import FLAG, TEXT, Field, read_fields
from avg_llava_jax.server.limits import Limits
from avg_llava_jax.server.reading import MODEL, check_characters, check_model

TOKENIZE = (
    MODEL,
    Field("prompt", TEXT, about="a text without a template"),
    Field("add_special_tokens", FLAG, about="whether BOS precedes a prompt; true if absent"),
    Field("return_token_strs", nothing=(False,)),
)
"""Fields of /tokenize with a prompt; with messages they are those of /v1/chat/completions."""


def tokenized(values: Any, model: Model, limits: Limits, served: Sequence[str]) -> dict[str, Any]:
    """{"count", "max_model_len", "tokens", "visual_tokens"} of a body.

    count, tokens: of the text. visual_tokens: {granularity: visual tokens of all images together}.

    Raises Refusal 400, and ValueError as `Model.prepare`.
    """
    visual = {}
    if isinstance(values, dict) and "messages" in values:
        sample = model.prepare(reading.read(values, model.config, limits, served).request).sample
        ids = [token for token in sample.tokens.ids if token != IMAGE]
        totals = token_costs(model.config, sample.sizes).sum(axis=0).tolist()
        visual = dict(zip(map(str, model.config.granularities), totals, strict=True))
    else:
        given = read_fields(values, TOKENIZE, extras=limits.unknown_fields)
        check_model(given, served)
        prompt = reading.required(given, TOKENIZE, "prompt")
        check_characters([prompt], model.config, "prompt")
        ids = encode_raw([prompt], model.tokenizer).ids
        if not given.get("add_special_tokens", True) and ids[:1] == [model.tokenizer.bos_id]:
            ids = ids[1:]
    limit = model.config.language.max_length
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None, "visual_tokens": visual}
