#!/usr/bin/env bash
#SBATCH --job-name=avg_llava
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# SLURM, one process for each GPU: starts launch.train on all of them, and queues the job again where that can help.
#
#   sbatch launch/cluster/slurm.sh --config=configs/avg_llava_7b.py --workdir=W --config.init_from=CKPT ...
#
# W lies where all nodes see it. Preempted, or 300 s before its time is over, the run saves and ends with 143.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the folder of the project}"
cancelled=""
trap 'cancelled=1' TERM # scancel signals this shell too, the end of the time only the run
# A node that is lost ends the run by itself; to kill the other tasks at once would hide their exit codes.
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" -m launch.train --coordinator=auto "$@" &
wait $!; code=$?
[ -z "$cancelled" ] || { wait; exit 143; }
case $code in 0 | 2) exit "$code" ;; esac # done, or wrong input, which a new start does not mend
if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then exit "$code"; fi
echo "launch.train ended with $code, queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
