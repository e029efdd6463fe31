#!/usr/bin/env bash
# Installs the project into .venv, trains a router live and shows what it chose. Arguments go to `avg-llava quickstart`.
set -euo pipefail
source "$(dirname "$0")/install.sh" -e .
exec .venv/bin/avg-llava quickstart "$@"
