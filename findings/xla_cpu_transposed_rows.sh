#!/bin/bash
# jaxlib 0.10.2 on a CPU: the gradient of a kernel, where x has two axes of rows, writes the rows transposed.
#
# y = x @ W with x (batch, length, width), as every transformer has it. For the gradient of W XLA contracts two axes: it
# fuses what comes before (here the derivative of silu) into a loop that writes an array (features, batch * length), one
# element at a time and far apart in memory, and multiplies that. With x.reshape(-1, width) before the product, and the
# result reshaped, there is no such array, and the same gradient takes a fraction of the time.
# Status: 0 while the array is in the first program and not in the second, 1 when that has changed. Times are printed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/packages" \
  jax==0.10.2 jaxlib==0.10.2
cat > "$T/rows.py" <<'PY'
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp

print("jax", jax.__version__)
BATCH, LENGTH, WIDTH, FEATURES = 16, 1870, 96, 256
x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
kernel = jax.random.normal(jax.random.key(1), (WIDTH, FEATURES))


def over_two_axes(kernel, x):
    return jax.nn.silu(x @ kernel).sum()


def over_one_axis(kernel, x):
    return jax.nn.silu((x.reshape(-1, WIDTH) @ kernel).reshape(BATCH, LENGTH, FEATURES)).sum()


found, grads = [], []
for function in (over_two_axes, over_one_axis):
    program, took = jax.jit(jax.grad(function)).lower(kernel, x).compile(), []
    for _ in range(7):
        begin = time.perf_counter()
        grads.append(jax.block_until_ready(program(kernel, x)))
        took.append(time.perf_counter() - begin)
    transposed = re.search(rf"f32\[{FEATURES},{BATCH * LENGTH}\]\{{1,0\}}", program.as_text())
    found.append(transposed is not None)
    print(f"{function.__name__}: rows transposed: {found[-1]}, {1e3 * statistics.median(took):.0f} ms")
print("the gradients differ by", float(jnp.max(jnp.abs(grads[0] - grads[-1])) / jnp.max(jnp.abs(grads[0]))))
same = found == [True, False]
print("as expected" if same else "this has changed")
sys.exit(not same)
PY
JAX_PLATFORMS=cpu PYTHONPATH="$T/packages" "$PYTHON" "$T/rows.py"
