#!/usr/bin/env bash
# Start N processes of one run on this machine, joined through jax.distributed:
#
#     launch/local.sh 4 bloomjax.train --config=configs/quickstart.py --workdir=runs/four
#
# Each process sees this machine's devices; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=K
# gives each K. DRY_RUN=1 prints what would be started. Ctrl-C and SIGTERM reach every process; when
# one fails, the others are ended and its exit code is this script's.
set -u
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "usage: launch/local.sh N MODULE [--flag=value ...], N of 1 or more" >&2
  exit 2
fi
count=$1 module=$2
shift 2
port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count

start() {
  export JAX_PROCESS_ID=$1
  shift
  exec python -m "$@"
}

if [ -n "${DRY_RUN:-}" ]; then
  for ((i = 0; i < count; i++)); do
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i python -m $module $*"
  done
  exit 0
fi

pids=()
for ((i = 0; i < count; i++)); do
  start "$i" "$module" "$@" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT # jobs of a script do not hear the terminal's Ctrl-C

status=0 left=$count
while [ "$left" -gt 0 ]; do
  wait -n
  code=$?
  running=($(jobs -rp))
  [ ${#running[@]} -lt "$left" ] || continue # a trapped signal ended the wait, not a process
  left=${#running[@]}
  if [ $code -ne 0 ] && [ $status -eq 0 ]; then
    status=$code
    (sleep 15 && kill -KILL "${pids[@]}" 2>/dev/null) & # the others cannot go on without it
    disown
  fi
done
exit $status
