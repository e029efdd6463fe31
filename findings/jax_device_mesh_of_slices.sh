#!/bin/bash
# JAX 0.10.2 for TPUs: create_device_mesh of two slices mixes them in every row, or ends in an AssertionError.
#
# Slices are joined by a slow network. On two v5e slices of 2 x 2 chips, a mesh (2, 4) from
# jax.experimental.mesh_utils.create_device_mesh has chips of both slices in each row, without a word: an axis of four
# that was meant for one slice's links crosses the network. On two slices of 4 x 4 the same call raises AssertionError.
# create_hybrid_device_mesh gives each row a slice; jax.make_mesh names it, on the small slices alone.
# Descriptions of slices come from libtpu: no TPU is needed. Downloads about 200 MB.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/packages" \
  jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$T/slices.py" <<'PY'
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
import jax
from jax.experimental import mesh_utils, topologies

print("jax", jax.__version__)
found = []
for name in ("v5e:2x2", "v5e:4x4"):
    chips = topologies.get_topology_desc(name, platform="tpu", num_slices=2).devices
    half = len(chips) // 2
    ways = {
        "create_device_mesh": lambda: mesh_utils.create_device_mesh((2, half), chips),
        "jax.make_mesh": lambda: jax.make_mesh((2, half), ("data", "fsdp"), devices=chips).devices,
        "create_hybrid_device_mesh": lambda: mesh_utils.create_hybrid_device_mesh((1, half), (2, 1), chips),
    }
    for way, make in ways.items():
        try:
            said = f"slices of each row {[sorted({chip.slice_index for chip in row}) for row in make()]}"
        except (AssertionError, ValueError) as error:
            said = type(error).__name__
        found.append(said)
        print(f"2 x {name}, {way}: {said}")
apart, mixed = "slices of each row [[0], [1]]", "slices of each row [[0, 1], [0, 1]]"
same = found == [mixed, "ValueError", apart, "AssertionError", "AssertionError", apart]
print("as expected" if same else "this has changed")
sys.exit(not same)
PY
PYTHONPATH="$T/packages" "$PYTHON" "$T/slices.py" 2> "$T/log" || { tail -3 "$T/log" >&2; exit 1; }
