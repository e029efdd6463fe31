#!/bin/bash
# transformers 5.24.0: a processor is saved without preprocessor_config.json; 4.57.6 wrote one.
#
# Mean and deviation of the pixels now stand in processor_config.json alone, under `image_processor`. Who reads
# preprocessor_config.json only, as converters and servers do, finds no file and takes defaults: other pixels, no word.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
cat > "$T/save.py" <<'PY'
import json, pathlib, sys
import tokenizers
from transformers import LlavaNextProcessor, PreTrainedTokenizerFast

try:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil as Images
except ImportError:
    from transformers import LlavaNextImageProcessor as Images
folder = pathlib.Path(sys.argv[1])
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "<image>": 1}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens={"image_token": "<image>"})
LlavaNextProcessor(Images(image_mean=[0.5, 0.25, 0.75]), tokenizer).save_pretrained(folder)
for name in ("preprocessor_config.json", "processor_config.json"):
    values = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    print(f"{name}: image_mean {values.get('image_processor', values).get('image_mean')}", end="; ")
PY
for version in 4.57.6 5.24.0; do
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/$version" \
    "transformers==$version" "pillow==12.3.0" "numpy==2.4.*"
  PYTHONPATH="$T/$version" "$PYTHON" "$T/save.py" "$T/saved.$version" 2>/dev/null > "$T/seen.$version"
  echo "$version: $(cat "$T/seen.$version")"
done
mean="image_mean \[0.5, 0.25, 0.75\]; "
grep -q "^preprocessor_config.json: ${mean}processor_config.json: image_mean None; $" "$T/seen.4.57.6" \
  || { echo "CHANGED: 4.57.6"; exit 1; }
grep -q "^preprocessor_config.json: image_mean None; processor_config.json: $mean$" "$T/seen.5.24.0" \
  || { echo "CHANGED: 5.24.0"; exit 1; }
echo "as found: 5.24.0 moved the mean to processor_config.json and writes no preprocessor_config.json"
