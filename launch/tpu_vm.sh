#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU VM slice that has bloomjax installed, with a process on each:
#
#     launch/tpu_vm.sh my-v5p-128 us-east5-a bloomjax.train --config=configs/X.py --workdir=/shared/run
#
# FOLDER (bloomjax) is the checkout on the hosts. The processes find each other through the metadata
# of the slice, and end with this connection (so call it in tmux); the same command again resumes.
# DRY_RUN=1 prints what would be started.
set -u
if [ $# -lt 3 ] || ! [[ $3 =~ ^[a-z_.]+$ ]]; then
  echo "usage: launch/tpu_vm.sh NAME ZONE MODULE [--flag=value ...]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
there="cd ${FOLDER:-bloomjax} && exec python3 -m $(printf '%q ' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$there")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  exit 0
fi
exec "${command[@]}"
