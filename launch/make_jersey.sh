#!/usr/bin/env bash
# Trains the checkpoint that the project ships, three quarters of an hour on two cores: bash launch/make_jersey.sh [WORKDIR]
# Killed, it goes on where it was. The result replaces avg_llava_jax/assets/jersey.
set -euo pipefail
cd "$(dirname "$0")/.."
work="${1:-workdirs/jersey}"
python=.venv/bin/python
mkdir -p "$work"
timed() { # NAME COMMAND ...: the seconds of each stage go to seconds.txt
  local begin=$SECONDS
  "${@:2}"
  echo "$1 $((SECONDS - begin)) s" | tee -a "$work/seconds.txt"
}
train() { timed "$1" "$python" -m launch.train --config="configs/jersey.py:$1" --workdir="$work/$1" "${@:2}"; }
train grounding
train reading --config.init_from="$work/grounding"
train roster --config.init_from="$work/reading"
train finest --config.init_from="$work/roster"
train full --config.init_from="$work/finest"
timed feedback "$python" -m launch.feedback --config=configs/jersey.py:router --config.init_from="$work/full" --features \
  --output="$work/feedback"
train router --config.init_from="$work/full" --config.rglf.feedback="$work/feedback"
"$python" -m launch.publish --checkpoint="$work/router" --output=avg_llava_jax/assets/jersey
