#!/bin/bash
# transformers 5.0.0 and 5.24.0: an image processor with do_convert_rgb gives a transparent picture other pixels.
#
# Up to 5.0 CLIP's and LLaVA-NeXT's processors drop the alpha channel: a transparent pixel shows the colour stored under
# it. 5.24 blends it onto white. A checkpoint that was trained with the one sees other pictures with the other; there is
# no setting for it. image.convert("RGB") before the processor gives the old pixels under both.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
cat > "$T/process.py" <<'PY'
import numpy as np
import transformers
from PIL import Image

try:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as Processor
except ImportError:
    from transformers import CLIPImageProcessor as Processor
processor = Processor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_normalize=False)
red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))  # transparent everywhere, red stored under it
for name, image in (("RGBA", red), ("convert", red.convert("RGB"))):
    pixels = np.asarray(processor(images=image, return_tensors="np")["pixel_values"])[0]
    print(f"{name}:{','.join(f'{value:.0f}' for value in pixels[:, 4, 4])}", end=" ")
PY
for version in 5.0.0 5.24.0; do
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/$version" "transformers==$version" "pillow==12.3.0"
  PYTHONPATH="$T/$version" "$PYTHON" "$T/process.py" 2>/dev/null > "$T/seen.$version"
  echo "transformers $version, (red, green, blue) of a transparent red pixel: $(cat "$T/seen.$version")"
done
[ "$(cat "$T/seen.5.0.0")" = "RGBA:1,0,0 convert:1,0,0 " ] || { echo "CHANGED: 5.0.0"; exit 1; }
[ "$(cat "$T/seen.5.24.0")" = "RGBA:1,1,1 convert:1,0,0 " ] || { echo "CHANGED: 5.24.0"; exit 1; }
echo "as found: 5.24.0 blends onto white, 5.0.0 dropped alpha"
