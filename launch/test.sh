#!/usr/bin/env bash
# Installs the project with its test extras into .venv and runs the tests, a process a core. Arguments go to pytest.
set -euo pipefail
# The CPU build of torch is enough for the parity tests; where the index offers it under this version, it is small.
source "$(dirname "$0")/install.sh" "torch==2.13.0" -e ".[test]"
.venv/bin/ruff check .
exec env HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
