#!/usr/bin/env bash
# One machine, all of its GPUs: starts launch.train, and starts it again where that can help.
#
#   bash launch/cluster/gpu_host.sh --config=configs/avg_llava_7b_router.py --workdir=W --config.init_from=CKPT ...
#
# A spot machine that is taken away sends SIGTERM: the run saves and this ends with 143. To go on when the machine
# comes back, call it from a systemd service (Restart=on-failure, RestartPreventExitStatus=2) or cron's @reboot.
set -uo pipefail
cd "$(dirname "$0")/../.."
stopped=""
child=""
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
for _ in {1..100}; do
  "${PYTHON:-.venv/bin/python}" -m launch.train "$@" &
  child=$!
  wait "$child"; code=$?
  [ -z "$stopped" ] || { wait "$child"; exit $?; } # a signal ends the first wait, not the run
  case $code in 0 | 2) exit "$code" ;; esac # done, or wrong input, which a new start does not mend
  echo "launch.train ended with $code, starting it again in ${PAUSE:=10} s" >&2
  sleep "$PAUSE" & child=$!
  wait "$child"
  [ -z "$stopped" ] || exit 143 # stopped between two runs
done
exit "$code"
