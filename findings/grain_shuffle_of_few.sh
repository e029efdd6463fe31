#!/bin/bash
# grain 0.2.18: the fewer records a shuffled MapDataset has, the longer it takes to read one: about 16 ms for each of 2,
# 1.5 ms for each of 24, 0.05 ms for each of 1000, 0.007 ms for each of a million. An epoch of up to 1000 records takes
# about the same 30 to 50 ms. A pipeline that reads ahead through many epochs of a small data set (to choose batch
# shapes, or in tests) spends seconds in nothing but the order, and another thread of the process waits meanwhile.
# Status: 0 while a record of 24 takes at least ten times as long as one of 100 000, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/lib" grain==0.2.18
cat > "$T/order.py" <<'PY'
import sys
import time

import grain

took = {}
for size in (2, 24, 1000, 100_000, 1_000_000):
    order = grain.MapDataset.range(size).seed(0).shuffle().repeat()
    order[0]
    begin = time.perf_counter()
    for at in range(200):
        order[at]
    took[size] = (time.perf_counter() - begin) / 200
    print(f"grain {grain.__version__}: one of {size:>9,} shuffled records takes {took[size] * 1e3:8.4f} ms")
sys.exit(0 if took[24] > 10 * took[100_000] else 1)
PY
if PYTHONPATH="$T/lib" "$PYTHON" "$T/order.py"; then
    echo "the order of few records costs more than that of many, as seen with 0.2.18"
else
    echo "this has changed: few records are no slower"
    exit 1
fi
