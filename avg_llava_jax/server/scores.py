"""Log-probabilities in OpenAI's JSON.

A token's text is its bytes as UTF-8, which need not be whole: `bytes` has them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avg_llava_jax.data.tokenizer import Tokenizer
from avg_llava_jax.inference.requests import TokenScore


def chat(scores: Sequence[TokenScore], tokenizer: Tokenizer) -> dict[str, Any]:
    """`logprobs` of a choice in /v1/chat/completions: {"content": [{token, logprob, bytes, top_logprobs}]}."""
    content = [
        _entry(score.token, score.logprob, tokenizer)
        | {"top_logprobs": [_entry(token, logprob, tokenizer) for token, logprob in score.top.items()]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def completion(scores: Sequence[TokenScore], tokenizer: Tokenizer, start: int = 0) -> dict[str, Any]:
    """`logprobs` of a choice in /v1/completions: a list for each of tokens, token_logprobs, top_logprobs, text_offset.

    start: characters of the choice's text before these tokens.
    """
    texts = [_text(tokenizer.bytes_of(score.token)) for score in scores]
    offsets = [start + sum(map(len, texts[:number])) for number in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [{_text(tokenizer.bytes_of(t)): each for t, each in score.top.items()} for score in scores],
        "text_offset": offsets,
    }


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    content = tokenizer.bytes_of(token)
    return {"token": _text(content), "logprob": logprob, "bytes": list(content)}


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")
