#!/bin/bash
# JAX 0.10.2 for TPUs: jax.make_mesh takes (8, 2) on a v5e slice of 4 x 4 chips, and refuses it on a v6e slice.
#
# An axis of two on a torus with sides of four needs half a side. jax.make_mesh lets that happen for devices of kind
# "TPU v5 lite" alone; for others it raises NotImplementedError, though jax.experimental.mesh_utils.create_device_mesh
# with allow_split_physical_axes=True places the same axes, each pair on neighbouring chips. A program that asks for two
# devices to a copy of a layer runs on one generation and ends on the next, with the same topology.
# Descriptions of slices come from libtpu: no TPU is needed. Downloads about 200 MB.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/packages" \
  jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
cat > "$T/meshes.py" <<'PY'
import os
import sys

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
import jax
from jax.experimental import mesh_utils, topologies

print("jax", jax.__version__)
found = {}
for slice_of_16 in ("v5e:4x4", "v6e:4x4"):
    chips = topologies.get_topology_desc(slice_of_16, platform="tpu").devices
    try:
        jax.make_mesh((8, 2), ("fsdp", "tensor"), devices=chips)
        found[slice_of_16] = "a mesh"
    except NotImplementedError as error:
        found[slice_of_16] = f"NotImplementedError: {str(error)[:75]} ..."
    print(f"jax.make_mesh of (8, 2) on {slice_of_16} ({chips[0].device_kind}): {found[slice_of_16]}")
pairs = mesh_utils.create_device_mesh((8, 2), chips, allow_split_physical_axes=True)
apart = {sum(abs(a - b) for a, b in zip(one.coords, other.coords)) for one, other in pairs}
print(f"create_device_mesh with allow_split_physical_axes on v6e:4x4: pairs of chips {apart} apart")
same = found["v5e:4x4"] == "a mesh" and found["v6e:4x4"].startswith("NotImplementedError") and apart == {1}
print("as expected" if same else "this has changed")
sys.exit(not same)
PY
PYTHONPATH="$T/packages" "$PYTHON" "$T/meshes.py"
