#!/bin/bash
# llguidance 1.9.1 with a Llama's tokenizer.json (tokenizers 0.23.1): a choice bans the token that its text begins with.
#
# Llama's tokenizers put a word boundary before a text: "Yes" is the token U+2581"Yes", and decodes to "Yes" again.
# llguidance counts that token as " Yes", since it knows no place in the text. `start: "Yes" | "No"` so allows neither
# of the tokens that the model was trained to answer with, only those of the middle of a word. A grammar that allows one
# space first, `start: " "? ("Yes" | "No")`, takes both, and decoding drops the space.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/lib" llguidance==1.9.1 tokenizers==0.23.1
cat > "$T/choose.py" <<'PY'
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
trained.decoder = decoders.Sequence(
    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
trained.train_from_iterator(["Yes No", "No Yes", "Yes", "No"] * 50, trainer)
ids = trained.encode("Yes").ids
print("tokens", ascii(trained.encode("Yes").tokens), "decoded", ascii(trained.decode(ids)))
vocabulary = LLTokenizer(trained.to_str(), eos_token=2)
for grammar in ('start: "Yes" | "No"', 'start: " "? ("Yes" | "No")'):
    matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
    print(grammar, "| allowed:", matcher.validate_tokens(ids), "of", len(ids))
PY
PYTHONPATH="$T/lib" "$PYTHON" "$T/choose.py" 2>/dev/null | tee "$T/seen"
grep -qF 'start: "Yes" | "No" | allowed: 0 of 1' "$T/seen" && grep -qF '| "No") | allowed: 1 of 1' "$T/seen" ||
    { echo "CHANGED"; exit 1; }
echo "as found: the tokens that the tokenizer makes of a choice are not allowed, unless a space may come first"
