#!/bin/bash
# Pillow 12.3.0 and 13.0.0: Image.resize of one image to one size gives other pixels.
#
# A resize is two passes, and values are rounded to 8 bits between them, so the order of the passes shows. 12.3 resamples
# the width first, always. 13.0 resamples the height first where the height loses more than twice as many pixels as the
# width does. A model trained on pixels of the one sees others of the other. One axis a call, width first, gives
# 12.3's bytes under both.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
cat > "$T/resize.py" <<'PY'
import numpy as np
from PIL import Image

rng, cubic = np.random.default_rng(0), Image.Resampling.BICUBIC
for width, height in ((1000, 300), (500, 375), (3000, 4000), (300, 400), (300, 1000)):
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    once = np.asarray(image.resize((336, 336), cubic)).astype(int)
    other = np.asarray(image.resize((336, height), cubic).resize((336, 336), cubic)).astype(int)
    difference = np.abs(once - other).max()
    print(f"{width}x{height}", "height first, by up to" if difference else "width first", difference or "", end="; ")
PY
for version in 12.3.0 13.0.0; do
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/$version" "pillow==$version" "numpy==2.4.*"
  PYTHONPATH="$T/$version" "$PYTHON" "$T/resize.py" > "$T/seen.$version"
  echo "pillow $version, to 336x336 in one call: $(cat "$T/seen.$version")"
done
order() { tr ';' '\n' < "$T/seen.$1" | awk 'NF { printf "%s ", $2 }'; }
[ "$(order 12.3.0)" = "width width width width width " ] || { echo "CHANGED: 12.3.0"; exit 1; }
[ "$(order 13.0.0)" = "width width width height height " ] || { echo "CHANGED: 13.0.0"; exit 1; }
echo "as found: 13.0.0 takes the height of 300x400 and 300x1000 first"
