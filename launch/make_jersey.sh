#!/usr/bin/env bash
# Trains the checkpoint that the project ships, about an hour on two cores: bash launch/make_jersey.sh [WORKDIR]
# Killed, it goes on where it was. The result replaces avg_llava_jax/assets/jersey.
set -euo pipefail
cd "$(dirname "$0")/.."
work="${1:-workdirs/jersey}"
python=.venv/bin/python
"$python" -m launch.train --config=configs/jersey.py:grounding --workdir="$work/1-grounding"
"$python" -m launch.train --config=configs/jersey.py:finest --config.init_from="$work/1-grounding" --workdir="$work/2-finest"
"$python" -m launch.train --config=configs/jersey.py --config.init_from="$work/2-finest" --workdir="$work/3-granularities"
"$python" -m launch.publish --checkpoint="$work/3-granularities" --output=avg_llava_jax/assets/jersey
