#!/usr/bin/env bash
# A repair on a TPU VM pod slice, from a machine with gcloud. In this order:
#
#   export TPU=sinder ZONE=europe-west4-b TYPE=v5litepod-32 IMAGE=v2-alpha-tpuv5-lite
#   scripts/tpu_pod.sh create                 # SPOT=1: cheaper, and may be taken away
#   scripts/tpu_pod.sh setup                  # this clone's last commit, and Python
#   scripts/tpu_pod.sh run --config=giant.py --workdir=gs://BUCKET/runs/giant \
#       --config.checkpoint=gs://BUCKET/giant --config.data=/mnt/imagenet/train
#   scripts/tpu_pod.sh log                    # of every host, its last lines
#   scripts/tpu_pod.sh stop                   # finish the step, save, end
#   scripts/tpu_pod.sh delete
#
# After a preemption: delete, create, setup and the same run again: it resumes.
set -eu

: "${TPU:?the name of the TPU}" "${ZONE:?the zone of the TPU}"

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

command=${1:-}
shift || true

case $command in
  create)
    : "${TYPE:?the accelerator type}" "${IMAGE:?the runtime version}"
    gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" \
      --accelerator-type="$TYPE" --version="$IMAGE" \
      --scopes=https://www.googleapis.com/auth/cloud-platform ${SPOT:+--spot}
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU":sinder.tar.gz \
      --zone="$ZONE" --worker=all
    # The images' own Python is 3.10; uv brings another.
    on_all 'set -e
      mkdir -p sinder && tar -xzf sinder.tar.gz -C sinder && cd sinder
      command -v ~/.local/bin/uv >/dev/null ||
        curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv venv --allow-existing --python 3.11 .venv
      ~/.local/bin/uv pip install --python .venv -c constraints.txt -e ".[tpu]" gcsfs'
    ;;
  run)
    # The hosts find each other. The run outlives this connection; each host starts it
    # again on exit code 75.
    arguments=$(printf '%q ' "$@")
    on_all "cd sinder && { nohup scripts/until_done.sh .venv/bin/python \
      -m experiments.repair $arguments >>~/repair.log 2>&1 </dev/null & } &&
      echo \$! >~/repair.pid"
    ;;
  log)
    on_all 'hostname; tail -n 5 ~/repair.log'
    ;;
  stop)
    # shellcheck disable=SC2016  # the hosts expand it
    on_all 'kill -TERM "$(cat ~/repair.pid)"'
    ;;
  delete)
    gcloud compute tpus tpu-vm delete "$TPU" --zone="$ZONE" --quiet
    ;;
  *)
    echo "usage: $0 create|setup|run|log|stop|delete; see the head of this file" >&2
    exit 2
    ;;
esac
