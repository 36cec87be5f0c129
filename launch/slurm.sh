#!/usr/bin/env bash
# One run on a SLURM cluster; as it stands here, on 48 nodes of 8 GPUs with a process for each GPU:
#
#     sbatch launch/slurm.sh bloomjax.train --config=configs/bloom_176b.py --workdir=/shared/176b
#     sbatch --nodes=2 --time=2:00:00 launch/slurm.sh ...     (what sbatch is to change comes first)
#
# Five minutes before its time is over the run saves and the job goes back into the queue; so it does,
# up to RESTARTS (9) times, after a crash, a hang, or a lost node. It goes on from its last checkpoint.
# One process a node (--ntasks-per-node=1) works too. DRY_RUN=1, without sbatch, prints what would run.
#
#SBATCH --job-name=bloomjax
#SBATCH --nodes=48
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=20:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
if ! [[ ${1:-} =~ ^[a-z_.]+$ ]]; then
  echo "usage: sbatch [--nodes=N ...] launch/slurm.sh MODULE [--flag=value ...]" >&2
  exit 2
fi
# A bad end of one is the end of all; an early good one is waited for, as the others follow it.
command=(srun --wait=60 --kill-on-bad-exit=1 python -m "$@")
if [ -n "${DRY_RUN:-}" ]; then
  grep '^#SBATCH' "$0"
  printf '%q ' "${command[@]}"
  exit 0
fi

requeue=
# To the tasks, not to srun, which would kill them for it.
trap 'requeue=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
"${command[@]}" &
step=$!
wait $step
status=$?
while kill -0 $step 2>/dev/null; do # the signal ended the wait, not the step
  wait $step
  status=$?
done
# Done, refused, or ended by itself: the same would follow.
[[ $status =~ ^(0|2|3|4|5|130)$ ]] || [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-9}" ] || requeue=1
[ -z "$requeue" ] || scontrol requeue "$SLURM_JOB_ID"
exit $status
