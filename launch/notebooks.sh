#!/usr/bin/env bash
# Runs the notebooks in place, so that they are committed with the outputs of a whole run.
set -euo pipefail
cd "$(dirname "$0")/.."
for name in quickstart evaluate_and_tradeoff train_your_own_data convert_checkpoints adapter_of_your_own; do
    .venv/bin/jupyter execute --inplace "notebooks/$name.ipynb"
done
