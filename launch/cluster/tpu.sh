#!/usr/bin/env bash
# A Cloud TPU slice by queued resources: asks for it, starts launch.train on all of its hosts, and does both again
# where the slice was taken away.
#
#   TPU=avg-llava ZONE=us-west4-a TYPE=v5litepod-64 bash launch/cluster/tpu.sh --config=configs/avg_llava_7b.py --workdir=W ...
#
# W and the data lie on a file system that every host mounts (Filestore, Lustre). RUNTIME is that of v5e; for others
# see `gcloud compute tpus versions list`. The slice is not deleted at the end: the last line printed says how.
set -uo pipefail
cd "$(dirname "$0")/../.."
: "${TPU:?a name}" "${ZONE:?a zone}" "${TYPE:?an accelerator type, as v5litepod-64}" "${RUNTIME:=v2-alpha-tpuv5-lite}"
at=("$TPU" --zone="$ZONE")
queue() { gcloud compute tpus queued-resources "$1" "${at[@]}" "${@:2}"; }
everywhere() { gcloud compute tpus tpu-vm ssh "${at[@]}" --worker=all --command="$1"; }
copy() {
  everywhere "mkdir -p avg_llava_jax" &&
    gcloud compute tpus tpu-vm scp avg_llava_jax launch pyproject.toml requirements.txt README.md LICENSE \
      "$TPU:avg_llava_jax" --zone="$ZONE" --worker=all --recurse
}
install='cd avg_llava_jax && (. launch/install.sh -r requirements.txt "jax[tpu]")'
printf -v flags ' %q' "$@"
train="cd avg_llava_jax && { .venv/bin/python -m launch.train --coordinator=auto$flags || echo \"launch.train ended with \$?\"; }"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
while true; do
  case $(queue describe --format='value(state.state)' 2>/dev/null) in
    "") # one failed question is no lost slice: it ends here only if there is none after a pause either
      queue create --node-id="$TPU" --accelerator-type="$TYPE" --runtime-version="$RUNTIME" --spot || {
        sleep "${PAUSE:-30}"
        queue describe > /dev/null || exit 1
      }
      ;;
    SUSPENDED | FAILED) queue delete --force --quiet ;;
    ACTIVE)
      # SSH to several hosts has no exit code of theirs, so each says how it ended; 2 is wrong input.
      if copy && everywhere "$install" && everywhere "$train" 2>&1 | tee "$log"; then
        if grep -qw 'ended with 2' "$log"; then exit 2; fi
        if ! grep -q 'ended with' "$log"; then break; fi
      fi
      ;;
  esac
  sleep "${PAUSE:-30}"
done
echo "done; to give the slice back: gcloud compute tpus queued-resources delete ${at[*]} --force"
