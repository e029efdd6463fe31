#!/bin/bash
# safetensors 0.8.0: a header with one name twice is accepted where both entries are the same.
#
# The format's description: "Duplicate keys are disallowed. Not all parsers may respect this." The library's own reader
# refuses two entries with different places only because the bytes are then not covered once, and says "invalid offset".
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/lib" safetensors==0.8.0 "numpy==2.4.*"
cat > "$T/read.py" <<'PY'
import json, struct, sys
from safetensors import SafetensorError, safe_open

one = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
two = one.replace("[0, 4]", "[4, 8]")
for what, second, size in (("same entry", one, 4), ("other entry", two, 8)):
    header = f'{{"a": {one}, "a": {second}}}'.encode()
    with open(sys.argv[1], "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + bytes(size))
    try:
        with safe_open(sys.argv[1], "np") as file:
            print(f"{what} twice: read, names {list(file.keys())}")
    except SafetensorError as error:
        print(f"{what} twice: refused, {error}")
PY
PYTHONPATH="$T/lib" "$PYTHON" "$T/read.py" "$T/x.safetensors" | tee "$T/seen"
grep -q "same entry twice: read, names \['a'\]" "$T/seen" && grep -q "other entry twice: refused" "$T/seen" || { echo "CHANGED"; exit 1; }
echo "as found: the same entry twice is read"
