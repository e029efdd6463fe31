"""Converts a sentencepiece tokenizer.model to tokenizer.json, which every transformers version reads alike.

Which tokenizer the library builds from a tokenizer.model depends on its version and on the model's type.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"
BPE, NORMAL, UNKNOWN = 2, 1, 2  # of sentencepiece_model.proto: a model type, and types of pieces


def write_tokenizer_json(folder: Path, special_tokens: dict[str, int], legacy: bool) -> None:
    """Write `folder`/tokenizer.json from its tokenizer.model.

    A piece's score is the rank of its merge, so every split of it into two pieces is a merge of that rank.

    special_tokens: text -> id, those of tokenizer.model and those added to it. legacy: every text between special
    tokens begins with a word boundary, not only the first; see `tokenizer`.

    Raises:
      ValueError: tokenizer.model is not a Llama-style BPE model without normalisation, or the ids of added tokens
        leave a gap.
    """
    from sentencepiece import sentencepiece_model_pb2

    path = folder / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    if proto.trainer_spec.model_type != BPE or proto.normalizer_spec.precompiled_charsmap:
        raise ValueError(f"{path}: only a BPE model without normalisation can become a tokenizer.json; add yours")
    ids = {piece.piece: at for at, piece in enumerate(proto.pieces)}
    merges = []
    for piece in (piece for piece in proto.pieces if piece.type == NORMAL):
        halves = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        merges += [(-piece.score, ids[a], ids[b], (a, b)) for a, b in halves if a in ids and b in ids]

    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[pair for *_, pair in sorted(merges)],
            unk_token=next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    in_order = sorted(special_tokens, key=special_tokens.__getitem__)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in in_order])
    for text, token in special_tokens.items():
        if tokenizer.token_to_id(text) != token:
            raise ValueError(f"{folder}: added token {text!r} has id {token}, which leaves a gap before it")
    tokenizer.save(str(folder / "tokenizer.json"))
