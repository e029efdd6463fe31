#!/usr/bin/env bash
# Installs the project into .venv, trains a router live and shows what it chose. Arguments go to launch.quickstart.
set -euo pipefail
source "$(dirname "$0")/install.sh" -r requirements.txt
exec .venv/bin/python -m launch.quickstart "$@"
