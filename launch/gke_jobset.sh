#!/usr/bin/env bash
# One run on Google Kubernetes Engine, as a JobSet with a pod for each host:
#
#     launch/gke_jobset.sh my-run IMAGE tpu-v5p-slice:4x4x8 bloomjax.train --config=... --workdir=...
#     SLICES=2 launch/gke_jobset.sh my-run IMAGE tpu-v6e-slice:8x8 bloomjax.train ...
#     launch/gke_jobset.sh my-run IMAGE nvidia-h100-80gb:4x8 bloomjax.train ...      (nodes x GPUs)
#
# KIND is what GKE calls the accelerator, SHAPE the topology of a TPU slice. IMAGE has bloomjax
# installed; the workdir is to be on a disk that all pods see (VOLUME=CLAIM mounts one at /shared).
# TPU pods find each other through what GKE sets in them, GPU pods through what stands here. Up to
# RESTARTS (9) times all pods start again when one fails, unless the run was refused (exit codes
# 2 to 5). DRY_RUN=1 prints the manifest; without it, kubectl gets it.
set -u
if [ $# -lt 4 ] || ! [[ $1 =~ ^[a-z][-a-z0-9]{0,39}$ && $3 =~ ^[a-z0-9-]+:[0-9]+(x[0-9]+)+$ && $4 =~ ^[a-z_.]+$ ]] ||
  ! [[ ${SLICES:-1} =~ ^[1-9][0-9]*$ && ${RESTARTS:-9} =~ ^[0-9]+$ ]]; then
  echo "usage: [SLICES=N] launch/gke_jobset.sh NAME IMAGE KIND:SHAPE MODULE [--flag=value ...]" >&2
  exit 2
fi
name=$1 image=$2 kind=${3%%:*} shape=${3#*:}
shift 3
quote() { printf '"%s"' "$(sed 's/[\\"]/\\&/g' <<<"$1")"; }
list() { for word in "$@"; do printf ', %s' "$(quote "$word")"; done; }

if [[ $kind == tpu-* ]]; then
  chips=$((${shape//x/*}))
  each=$((chips < 4 ? chips : 4)) # chips of a host of a slice
  [[ $shape != 2x4 || $kind == tpu-v5p-* || $kind == tpu-v4-* ]] || each=8
  hosts=$((chips / each)) resource=google.com/tpu
  selector="cloud.google.com/gke-tpu-accelerator: $kind
                cloud.google.com/gke-tpu-topology: $shape"
  place=""
  # A slice is a node pool, and is this run's alone.
  exclusive='alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool'
else
  [[ ${SLICES:-1} == 1 ]] || { echo "launch/gke_jobset.sh: SLICES is for TPUs: give more nodes" >&2; exit 2; }
  hosts=${shape%%x*} each=${shape#*x} resource=nvidia.com/gpu
  selector="cloud.google.com/gke-accelerator: $kind" exclusive=""
  place="
                - {name: JAX_COORDINATOR_ADDRESS, value: \"$name-slice-0-0.$name:8476\"}
                - {name: JAX_NUM_PROCESSES, value: \"$hosts\"}
                - name: JAX_PROCESS_ID
                  valueFrom:
                    fieldRef:
                      fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"
fi
volume="" mount=""
if [ -n "${VOLUME:-}" ]; then
  volume="
              - {name: shared, persistentVolumeClaim: {claimName: $VOLUME}}"
  mount="
                - {name: shared, mountPath: /shared}"
fi

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations: {$exclusive}
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-9}
    rules:
    - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: slice
    replicas: ${SLICES:-1}
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # Refused, or ended by itself: the same would follow.
          - action: FailJob
            onExitCodes: {operator: In, values: [2, 3, 4, 5]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300 # to save in
            nodeSelector:
                $selector
            volumes:
              - {name: memory, emptyDir: {medium: Memory}}$volume
            containers:
            - name: bloomjax
              image: $(quote "$image")
              command: ["python", "-m"$(list "$@")]
              env:
                - {name: PYTHONUNBUFFERED, value: "1"}$place
              resources:
                limits: {$resource: $each}
              volumeMounts:
                - {name: memory, mountPath: /dev/shm}$mount
YAML
}

if [ -n "${DRY_RUN:-}" ]; then
  manifest "$@"
  exit 0
fi
manifest "$@" | kubectl apply -f -
