#!/bin/bash
# JAX and XLA 0.10.2 for NVIDIA GPUs: products with one common operand are joined by copying their weights at run time.
#
# x @ q, x @ k and x @ v in a loop over tokens read the weights q, k and v. XLA's dot merger makes one product of them,
# and for it writes q, k and v side by side into a temporary array, in every step: with four rows of x the loop moves
# three times the bytes of the weights, and holds a second copy of a layer's. It does so for weights of up to 32 MiB.
# The compiler option xla_gpu_dot_merger_threshold_mb=0 leaves them where they are.
# Compiled ahead of time for an H100: no GPU and no driver is needed. Downloads about 1 GB.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/packages" jax==0.10.2 jaxlib==0.10.2 \
  jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 "nvidia-cuda-nvcc-cu12==12.9.*" "nvidia-cudnn-cu12==9.*"
cat > "$T/joined.py" <<'PY'
import os

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 memory_bandwidth: 3352000000000 l2_cache_size: 52428800
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
LAYERS, WIDTH, ROWS, STEPS = 8, 4096, 4, 16


def decode(x, layers):
    def token(_, x):
        for q, k, v in layers:
            x = x + x @ q + jnp.tanh(x @ k) + jnp.sin(x @ v)
        return x

    return jax.lax.fori_loop(0, STEPS, token, x)


device = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100).devices[0]
here = SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=here)
weight = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16, sharding=here)
for options in ({}, {"xla_gpu_dot_merger_threshold_mb": 0}):
    options = {"xla_gpu_enable_triton_gemm": False} | options
    compiled = jax.jit(decode).lower(x, [(weight,) * 3] * LAYERS).compile(compiler_options=options)
    print(compiled.memory_analysis().temp_size_in_bytes // 2**20)
PY
PYTHONPATH="$T/packages" "$PYTHON" "$T/joined.py" 2> "$T/log" > "$T/seen" || { cat "$T/log"; exit 1; }
{ read -r joined; read -r own; } < "$T/seen"
echo "jax 0.10.2, H100, q, k, v of 32 MiB each: temporaries $joined MiB, with the threshold at 0 $own MiB"
[ "$joined" -ge 96 ] && [ "$own" -lt 16 ] || { echo "CHANGED"; exit 1; }
echo "as found: a copy of three weights is written to memory"
