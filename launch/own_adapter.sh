#!/usr/bin/env bash
# One GPU and a data set of your own: QLoRA, then a router, then a server with the adapter beside its base.
#
#   BASE=/models/llava-v1.6-vicuna-7b bash launch/own_adapter.sh train.json IMAGES W
#
# trains a 7B in phase one and RGLF (VISION_TOWER=FOLDER if its config names a tower that is elsewhere). Without BASE and
# arguments it trains the shipped model on 1000 drawn pictures, in minutes on a few CPU cores. Killed, the same command
# goes on where it was. TUNE and ROUTE hold more settings of the two runs, SERVE those of the server: SERVE="--port=8001".
set -euo pipefail
cd "$(dirname "$0")/.."
data="${1:-}" images="${2:-}" work="${3:-workdirs/own_adapter}"
run() { "${PYTHON:-.venv/bin/python}" -m "launch.$1" "${@:2}"; }
if [ -n "${BASE:-}" ]; then
  tune=(--config=configs/avg_llava_7b.py --config.batch_size=4 --config.steps=500 --config.checkpoint_every=100
    --config.optimizer.learning_rate=2e-4 --config.optimizer.lora.rank=64
    "--config.optimizer.lora.targets=('language','encoder')") # without the latter, the encoder's rate had no effect
  route=(--config=configs/avg_llava_7b_router.py --config.batch_size=8 --config.steps=500 --config.checkpoint_every=100)
  dtype=(--dtype=bfloat16)
else
  tune=(--config=configs/own_data.py --config.batch_size=4 --config.steps=250 --config.optimizer.learning_rate=5e-3
    --config.optimizer.lora.rank=8)
  route=(--config=configs/own_data.py --config.phase=rglf --config.steps=150 --config.optimizer.learning_rate=2e-3)
  dtype=()
fi
base="${BASE:-avg_llava_jax/assets/jersey}"
tower=() towers=()
[ -z "${VISION_TOWER:-}" ] || { tower=(--vision_tower="$VISION_TOWER") towers=(--config.vision_tower="$VISION_TOWER"); }
if [ -z "$data" ]; then
  data="$work/data/train.json" images="$work/data/images"
  [ -e "$data" ] || run write_jersey --output="$work/data" --source="jersey?turns=4&seed=9" --count=1000
fi
common=(--config.data.path="$data" --config.data.images="$images" --config.quantize=int8)
# shellcheck disable=SC2086
run train "${tune[@]}" "${towers[@]}" --workdir="$work/tuned" --config.init_from="$base" "${common[@]}" ${TUNE:-}
# shellcheck disable=SC2086
run train "${route[@]}" --workdir="$work/router" --config.init_from="$work/tuned" "${common[@]}" ${ROUTE:-}
# shellcheck disable=SC2086
run serve --checkpoint="$base" "${tower[@]}" "${dtype[@]}" --quantize=int8 --adapter=own="$work/router" ${SERVE:-}
