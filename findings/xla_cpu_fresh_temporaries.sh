#!/bin/bash
# jaxlib 0.10.2 on a CPU under glibc: a compiled step gets its temporaries anew from the system at every run.
#
# XLA allocates a program's temporaries as one buffer per run. From 32 MiB on, malloc maps such a buffer and unmaps it
# again (M_MMAP_THRESHOLD, which adapts to what a program frees, ends there), so that every run takes a page fault for
# each 4 KiB: a step of 280 MiB pays 70 000 of them, every time, in the system's time and on one thread. The same rows
# one at a time by jax.lax.scan need less than 32 MiB, and hardly a fault after the first run. Accumulating gradients over
# micro-batches, which is thought to cost time and save memory, is therefore faster on a CPU.
# Status: 0 while later runs of the whole batch take a hundred faults and more for each MiB of temporaries, and those of
# the parts less than a twentieth of all that, 1 when that has changed. Times are printed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/packages" \
  jax==0.10.2 jaxlib==0.10.2
cat > "$T/faults.py" <<'PY'
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp

print("jax", jax.__version__)
ROWS, LENGTH, WIDTH, RUNS = 16, 560, 96, 8
x = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))
kernels = jax.random.normal(jax.random.key(1), (6, WIDTH, 4 * WIDTH)) / 10


def loss(kernels, x):
    for kernel in kernels:
        x = x + jax.nn.gelu(x @ kernel) @ kernel.T / 40
    return jnp.sum(x**2)


def whole(kernels, x):
    return jax.grad(loss)(kernels, x)


def in_parts(kernels, x):
    def add(total, row):
        return total + jax.grad(loss)(kernels, row), None

    return jax.lax.scan(add, jnp.zeros_like(kernels), x)[0]


found = []
for function in (whole, in_parts):
    program = jax.jit(function).lower(kernels, x).compile()
    size = program.memory_analysis().temp_size_in_bytes / 2**20
    jax.block_until_ready([program(kernels, x) for _ in range(3)])
    before, took = resource.getrusage(resource.RUSAGE_SELF), []
    for _ in range(RUNS):
        begin = time.perf_counter()
        grads = jax.block_until_ready(program(kernels, x))
        took.append(time.perf_counter() - begin)
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / RUNS
    system = (after.ru_stime - before.ru_stime) / RUNS
    found.append((size, faults))
    print(
        f"{function.__name__}: {size:.0f} MiB of temporaries, {faults:.0f} page faults a run, "
        f"{1e3 * statistics.median(took):.0f} ms, {1e3 * system:.0f} ms of them the system's"
    )
(size, many), (_, few) = found
same = many > 100 * size and few < many / 20
print("as expected" if same else "this has changed")
sys.exit(not same)
PY
JAX_PLATFORMS=cpu PYTHONPATH="$T/packages" "$PYTHON" "$T/faults.py"
