#!/bin/bash
# tokenizers 0.23.1, decoder ByteFallback: one byte that is no UTF-8 undoes the characters before it.
#
# Byte tokens in a row are decoded together; where the run is no UTF-8 as a whole, each of its bytes becomes U+FFFD, the
# complete characters among them too. Text that was streamed is so taken back: an answer cut inside a character by its
# length limit loses its last readable ones. sentencepiece 0.2.1 keeps them.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/lib" tokenizers==0.23.1 sentencepiece==0.2.1
cat > "$T/decode.py" <<'PY'
import io, sys
import sentencepiece
from tokenizers import decoders

decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c"] * 9), model_writer=model, vocab_size=264, model_type="bpe", byte_fallback=True,
    minloglevel=9,
)
pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
for content in ("é日".encode(), "é日".encode()[:-1]):
    tokens = [f"<0x{byte:02X}>" for byte in content]
    theirs = pieces.decode([pieces.piece_to_id(token) for token in tokens])
    print(content.hex(" "), "tokenizers:", ascii(decoder.decode(tokens)), "sentencepiece:", ascii(theirs))
PY
PYTHONPATH="$T/lib" "$PYTHON" "$T/decode.py" 2>/dev/null | tee "$T/seen"
grep -qF "c3 a9 e6 97 tokenizers: '\\ufffd\\ufffd\\ufffd\\ufffd' sentencepiece: '\\xe9" "$T/seen" || { echo "CHANGED"; exit 1; }
echo "as found: of c3 a9 e6 97 tokenizers keep nothing, sentencepiece keeps the first character"
