#!/bin/bash
# transformers 5.24.0 (torch 2.13.0, safetensors 0.8.0): from_pretrained does not ask the index which shard holds a tensor.
#
# model.safetensors.index.json maps every tensor to its file (weight_map). Of a tensor that lies in two of the named
# files, the one whose name sorts last is loaded, whatever the map says, and nothing is said. A stale copy wins so.
# With a single model.safetensors beside the index, the single file is read and the shards are not.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/lib" \
  --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 "numpy==2.4.*"
cat > "$T/load.py" <<'PY'
import json, pathlib, sys
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder, name = pathlib.Path(sys.argv[1]), "model.norm.weight"
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="4KB")
listed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
files = sorted(set(listed.values()))


def put(file, value):
    tensors = load_file(folder / file) if (folder / file).is_file() else {}
    save_file(tensors | {name: torch.full((16,), value)}, folder / file, {"format": "pt"})


def loaded():
    return LlamaForCausalLM.from_pretrained(folder).model.norm.weight[0].item()


index = {"metadata": {}, "weight_map": listed | {name: files[0]}}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
put(files[0], 1.0)
put(files[-1], 2.0)  # the stale copy
print(f"map names {files[0]} (1.0), a copy is in {files[-1]} (2.0): loaded {loaded()}")
tensors = {key: tensor for file in files for key, tensor in load_file(folder / file).items()}
save_file(tensors | {name: torch.full((16,), 3.0)}, folder / "model.safetensors", {"format": "pt"})
print(f"single file (3.0) beside index and shards: loaded {loaded()}")
PY
PYTHONPATH="$T/lib" "$PYTHON" "$T/load.py" "$T/model" 2>/dev/null | tee "$T/seen"
grep -q "(2.0): loaded 2.0" "$T/seen" && grep -q "shards: loaded 3.0" "$T/seen" || { echo "CHANGED"; exit 1; }
echo "as found: the copy in the last file wins over weight_map, and a single file over the index"
