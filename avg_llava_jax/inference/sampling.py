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
        """Whether `programs.shape` changes its logits."""
        request = self.request
        return bool(request.min_tokens or request.logit_bias or self.penalized) or self.allowed is not None

    @property
    def scored(self) -> bool:
        """Whether the most likely tokens are wanted."""
        return self.request.logprobs is not None

    @property
    def greedy(self) -> bool:
        """Whether its next token is simply the best."""
        return not (self.request.temperature or self.shaped or self.scored)


def sampling_of(count: int, rows: Sequence[int], answers: Sequence[Next], shaping: Shaping) -> Sampling:
    """The `Sampling` of `count` rows for answers in `rows`; other rows have limit 0, and generate nothing."""
    limit = np.zeros(count, np.int32)
    limit[list(rows)] = [answer.limit for answer in answers]
    return Sampling(
        _column(count, rows, answers, 0, np.float32, "temperature"),
        _column(count, rows, answers, 1, np.float32, "top_p"),
        _column(count, rows, answers, 0, np.int32, "top_k"),
        _column(count, rows, answers, 0, np.float32, "min_p"),
        _column(count, rows, answers, 0, np.uint32, "seed"),
        limit,
        shaping,
    )


def shaping_of(
    count: int, rows: Sequence[int], answers: Sequence[Next], vocabulary: int, capacity: int
) -> Shaping:
    """The `Shaping` of `count` rows for answers in `rows`; other rows are neutral.

    vocabulary: V. capacity: H, at least the positions of a prompt and its answer.
    """
    bias_at, bias = np.full((count, BIASES), vocabulary, np.int32), np.zeros((count, BIASES), np.float32)
    allowed = np.full((count, -(-vocabulary // 32)), 2**32 - 1, np.uint32)
    history = np.full((count, capacity), 2 * vocabulary, np.int32)
    least = _column(count, rows, answers, 0, np.int32, "min_tokens")
    shaped, scored = np.zeros((2, count), bool)
    for row, answer in zip(rows, answers, strict=True):
        biases = answer.request.logit_bias
        shaped[row], scored[row] = answer.shaped, answer.scored
        bias_at[row, : len(biases)], bias[row, : len(biases)] = [*biases], [*biases.values()]
        if answer.allowed is not None:
            allowed[row], least[row] = answer.allowed, 0
        if answer.penalized:
            ids = np.append(answer.text, vocabulary + np.array(answer.tokens, np.int32))
            history[row, : len(ids)] = ids
    return Shaping(
        least,
        _column(count, rows, answers, 1, np.float32, "repetition_penalty"),
        _column(count, rows, answers, 0, np.float32, "frequency_penalty"),
        _column(count, rows, answers, 0, np.float32, "presence_penalty"),
        bias_at,
        bias,
        allowed,
        history,
        shaped,
        scored,
    )


def _column(
    count: int, rows: Sequence[int], answers: Sequence[Next], fill: float, kind: type, field: str
) -> np.ndarray:
    """A field of the requests, (count,), `fill` in rows without one; an integer is at most the largest of `kind`."""
    values, largest = np.full(count, fill, kind), np.iinfo(kind).max if issubclass(kind, np.integer) else np.inf
    values[list(rows)] = [min(getattr(answer.request, field), largest) for answer in answers]
    return values


def scored(answer: Next, scores: Scores | None, row: int, tokens: Sequence[int]) -> list[TokenScore]:
    """The scores of an answer's new tokens, from those of all rows (B, n); [] if it wants none."""
    if not answer.scored or scores is None:
        return []
    chosen, ids, values = (np.asarray(array)[row].tolist() for array in scores)
    most = answer.request.logprobs
    return [
        TokenScore(token, one, dict(zip(best[:most], shares[:most], strict=True)))
        for token, one, best, shares in zip(tokens, chosen, ids, values, strict=False)  # more rows than tokens
    ]
