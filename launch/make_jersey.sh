#!/usr/bin/env bash
# Trains the checkpoint that the project ships, about an hour on two cores: bash launch/make_jersey.sh [WORKDIR]
# Killed, it goes on where it was. The result replaces avg_llava_jax/assets/jersey.
set -euo pipefail
cd "$(dirname "$0")/.."
work="${1:-workdirs/jersey}"
python=.venv/bin/python
train() { "$python" -m launch.train --config="configs/jersey.py:$1" --workdir="$work/$1" "${@:2}"; }
train grounding
train reading --config.init_from="$work/grounding"
train roster --config.init_from="$work/reading"
train finest --config.init_from="$work/roster"
train full --config.init_from="$work/finest"
"$python" -m launch.publish --checkpoint="$work/full" --output=avg_llava_jax/assets/jersey
