#!/bin/bash
# orbax-checkpoint 0.12.8 (jax 0.10.2): two CheckpointManagers of two folders, each used by a thread of its own, do not
# save side by side. Saves end in an OSError about a temporary folder of their own checkpoint ("Directory not empty",
# "No such file"), or after five minutes in a TimeoutError, though no file is shared.
# In one thread at a time the same saves succeed, so two trainings in one process must take turns, or be two processes.
# Which of the two fails and how differs from run to run; up to five runs are tried.
# Status: 0 while it is so, 1 when it has changed.
set -euo pipefail
PYTHON=${PYTHON:-python3}
T=$(mktemp -d); trap 'rm -rf "$T"' EXIT
"$PYTHON" -m pip install -qq --disable-pip-version-check --no-warn-conflicts --target "$T/lib" \
    orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat > "$T/save.py" <<'PY'
import pathlib
import sys
import tempfile
import threading

import jax.numpy as jnp
import orbax.checkpoint as ocp

failed = []


def train(folder):
    try:
        with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
            for step in range(30):
                manager.save(step, args=ocp.args.StandardSave({"x": jnp.full(1000, step)}))
            manager.wait_until_finished()
    except OSError as error:
        failed.append(type(error).__name__)


with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
    threads = [threading.Thread(target=train, args=(pathlib.Path(root) / name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
        if sys.argv[1] == "in turn":
            thread.join()
    for thread in threads:
        thread.join()
print(sys.argv[1], "failed" if failed else "saved", *failed)
PY
run() { PYTHONPATH="$T/lib" JAX_PLATFORMS=cpu "$PYTHON" "$T/save.py" "$1" 2>/dev/null | tail -1; }
run "in turn" | tee "$T/seen"
for _ in 1 2 3 4 5; do
    run "side by side" | tee -a "$T/seen"
    grep -q "side by side failed" "$T/seen" && break
done
grep -q "^in turn saved" "$T/seen" && grep -q "side by side failed" "$T/seen" || { echo "CHANGED"; exit 1; }
echo "as found: managers of two folders in two threads end in an error about a temporary folder of their own"
