#!/usr/bin/env bash
# Start N processes of one run on this machine, joined through jax.distributed:
#
#     launch/local.sh 4 bloomjax.train --config=configs/quickstart.py --workdir=runs/four
#     launch/local.sh --restarts=9 4 bloomjax.train ...
#
# Each process sees this machine's devices; on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=K
# gives each K. DRY_RUN=1 prints what would be started. Ctrl-C and SIGTERM reach every process; when
# one fails, the others are ended and its exit code is this script's. With --restarts=R, a run that
# lost a process, hung or crashed is started again, up to R times, and goes on from its last
# checkpoint; one that was stopped or refused is not. Needs bash 5.1.
set -u
restarts=0
if [[ ${1:-} == --restarts=* ]]; then
  restarts=${1#*=}
  shift
fi
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ && $restarts =~ ^[0-9]+$ ]]; then
  echo "usage: launch/local.sh [--restarts=R] N MODULE [--flag=value ...], N of 1 or more" >&2
  exit 2
fi
count=$1 module=$2
shift 2

join() { # a port that is free now, since an earlier life may still hold the last one
  local port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
  export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
}

start() {
  export JAX_PROCESS_ID=$1
  shift
  exec python -m "$@"
}

if [ -n "${DRY_RUN:-}" ]; then
  join
  for ((i = 0; i < count; i++)); do
    echo "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i python -m $module $*"
  done
  exit 0
fi

declare -A running=()
stopped=
all() { [ ${#running[@]} -eq 0 ] || kill "$1" "${!running[@]}" 2>/dev/null; }
trap 'stopped=1; all -TERM' TERM
trap 'stopped=1; all -INT' INT # jobs of a script do not hear the terminal's Ctrl-C

life() { # one life of the run; its exit code is in $status
  status=0
  local executioner='' ended code pids i
  join
  [ -z "$stopped" ] || exit 143 # just now
  for ((i = 0; i < count; i++)); do
    start "$i" "$module" "$@" &
    running[$!]=1
  done
  while [ ${#running[@]} -gt 0 ]; do
    wait -n -p ended "${!running[@]}"
    code=$?
    [ -n "${ended:-}" ] || continue # a trapped signal ended the wait, not a process
    unset "running[$ended]"
    if [ $code -ne 0 ] && [ $status -eq 0 ]; then
      status=$code
      # The others cannot go on without it, and leave by themselves unless they are stuck.
      pids="${!running[*]}"
      (sleep 15 && kill -KILL $pids) >/dev/null 2>&1 &
      executioner=$!
    fi
  done
  [ -z "$executioner" ] || kill "$executioner" 2>/dev/null
}

for ((again = 0; ; again++)); do
  life "$@"
  # Done, refused, ended by itself, or told to end: the same would follow.
  [[ $stopped || $status =~ ^(0|2|3|4|5|130|143)$ ]] || [ $again -eq "$restarts" ] || {
    echo "launch/local.sh: exit code $status: restart $((again + 1)) of $restarts" >&2
    continue
  }
  exit $status
done
