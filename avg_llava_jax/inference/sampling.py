"""The `Sampling` of a program's rows, NumPy arrays made from requests and what has been generated so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from avg_llava_jax.inference.programs import Sampling, Scores, Shaping
from avg_llava_jax.inference.requests import BIASES, Request, TokenScore


class Next(NamedTuple):
    """What the next tokens of an answer depend on.

    limit: tokens to generate at most. text: int32 (L,), ids of the prompt without its images. tokens: generated so far.
    allowed: uint32 (ceil(V / 32),), see `Shaping`, where the request has a guide.
    """

    request: Request
    limit: int
    text: np.ndarray
    tokens: Sequence[int]
    allowed: np.ndarray | None

    @property
    def penalized(self) -> bool:
        request = self.request
        return (request.repetition_penalty, request.frequency_penalty, request.presence_penalty) != (1, 0, 0)

    @property
    def shaped(self) -> bool:
        """Whether `shape` changes its logits, or its scores are wanted."""
        request = self.request
        shaped = request.min_tokens or request.logit_bias or self.penalized
        return bool(shaped) or request.logprobs is not None or self.allowed is not None

    @property
    def greedy(self) -> bool:
        """Whether its next token is simply the best."""
        return not self.request.temperature and not self.shaped


def sampling_of(
    count: int, rows: Sequence[int], answers: Sequence[Next], vocabulary: int, capacity: int
) -> Sampling:
    """The `Sampling` of `count` rows for answers in `rows`; other rows have limit 0, and generate nothing.

    vocabulary: V. capacity: H, at least the positions of a prompt and its answer.
    """

    def column(fill: float, kind: type, field: str) -> np.ndarray:
        values = np.full(count, fill, kind)
        values[list(rows)] = [getattr(answer.request, field) for answer in answers]
        return values

    limit, scored = np.zeros(count, np.int32), np.zeros(count, bool)
    bias_at, bias = np.full((count, BIASES), vocabulary, np.int32), np.zeros((count, BIASES), np.float32)
    allowed = np.full((count, -(-vocabulary // 32)), 2**32 - 1, np.uint32)
    history = np.full((count, capacity), 2 * vocabulary, np.int32)
    least = column(0, np.int32, "min_tokens")
    for row, answer in zip(rows, answers, strict=True):
        request = answer.request
        limit[row], scored[row] = answer.limit, request.logprobs is not None
        if request.logit_bias:
            at = len(request.logit_bias)
            bias_at[row, :at], bias[row, :at] = [*request.logit_bias], [*request.logit_bias.values()]
        if answer.allowed is not None:
            allowed[row], least[row] = answer.allowed, 0
        if answer.penalized:
            ids = np.append(answer.text, vocabulary + np.array(answer.tokens, np.int32))
            history[row, : len(ids)] = ids
    shaping = Shaping(
        least,
        column(1, np.float32, "repetition_penalty"),
        column(0, np.float32, "frequency_penalty"),
        column(0, np.float32, "presence_penalty"),
        bias_at,
        bias,
        allowed,
        history,
        scored,
    )
    return Sampling(
        column(0, np.float32, "temperature"),
        column(1, np.float32, "top_p"),
        column(0, np.int32, "top_k"),
        column(0, np.float32, "min_p"),
        column(0, np.uint32, "seed"),
        limit,
        shaping,
    )


def scored(answer: Next, scores: Scores | None, row: int, tokens: Sequence[int]) -> list[TokenScore]:
    """The scores of an answer's new tokens, from those of all rows (B, n); [] where it asks for none."""
    if answer.request.logprobs is None or scores is None:
        return []
    chosen, ids, values = (np.asarray(array)[row].tolist() for array in scores)
    most = answer.request.logprobs
    return [
        TokenScore(token, one, dict(zip(best[:most], shares[:most], strict=True)))
        for token, one, best, shares in zip(tokens, chosen, ids, values, strict=False)  # more rows than tokens
    ]
