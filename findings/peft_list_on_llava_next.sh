#!/bin/bash
# peft 0.21.2 with transformers 5.24.0: target_modules=["q_proj", "v_proj"] on a LLaVA-NeXT adapts its vision tower too,
# and there a layer that LLaVA never runs.
#
# A list matches the ends of module names, and CLIP's attention has the decoder's names. LLaVA-NeXT takes the hidden state
# before the tower's last layer, whose adapters therefore get no gradient: their B stays 0, and they are saved like the
# others. Nothing is said of either. A reader of such a file must expect adapters on layers that do not run.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/packages" \
  "torch==2.13.0" "transformers==5.24.0" "peft==0.21.2"
cat > "$T/adapt.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
config = LlavaNextConfig(
    vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14),
    text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=32),
    image_grid_pinpoints=[[28, 56]],
    image_token_index=31,
)
torch.manual_seed(0)
model = LlavaNextForConditionalGeneration(config)
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
ids = torch.tensor([[1] + [31] * 14 + [2]])  # 4 tokens of the overview, 2 x 4 and 2 newlines of the mosaic
pixels = torch.randn(1, 3, 3, 28, 28)
out = model(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[28, 56]]), labels=ids.where(ids != 31, -100))
out.loss.backward()
tower = {}
for name, value in model.named_parameters():
    if "vision_tower" in name and "lora_B" in name:
        layer = int(name.split(".layers.")[1].split(".")[0])
        tower.setdefault(layer, []).append(value.grad is not None and bool(value.grad.abs().sum() > 0))
print({layer: all(tower[layer]) for layer in sorted(tower)} if all(map(len, tower.values())) else {}, end="")
PY
PYTHONPATH="$T/packages" "$PYTHON" "$T/adapt.py" 2>/dev/null > "$T/seen"
echo "peft 0.21.2, transformers 5.24.0: tower layers with adapters, and whether a loss reaches them: $(cat "$T/seen")"
[ "$(cat "$T/seen")" = "{0: True, 1: True, 2: False}" ] || { echo "CHANGED"; exit 1; }
echo "as found: the list adapts all three layers of the tower, and the last never learns"
