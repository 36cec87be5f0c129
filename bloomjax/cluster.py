"""Where this process stands among the processes of its run, as the environment tells it.

By hand, or through what JAX itself knows: SLURM, TPU machines of Google Cloud (VMs and Kubernetes,
several slices too), Kubernetes jobs, Open MPI. The one invariant: a process that nobody started
together with others is alone, and looks for nobody.
"""

import glob
import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

from jax._src.clusters import ClusterEnv

from bloomjax.errors import ConfigError

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclass(frozen=True)
class Place:
    kind: str  # "by hand", or JAX's name of the cluster
    address: str  # host:port, where process 0 listens
    count: int
    index: int
    gpus: list[int] | None  # which of the GPUs that it sees are its own; None: all


def place(seconds: int) -> Place | None:
    """The place of this process; None for a run of one. JAX_NUM_PROCESSES=1 asks for that anywhere.

    Waits up to `seconds` for a name server to know process 0. ConfigError where the environment
    says one half, or does not say what it should.
    """
    if os.environ.get("JAX_NUM_PROCESSES") == "1":
        return None
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        try:
            count, index = (int(os.environ[name]) for name in _BY_HAND[1:])
            if not 0 <= index < count:
                raise ValueError(f"process {index} of {count}")
            if not re.fullmatch(r".+:\d+", address):
                raise ValueError(f"{address!r}, which is not host:port")
        except (KeyError, ValueError) as error:
            raise ConfigError(
                "JAX_COORDINATOR_ADDRESS is set: expected it as host:port, and beside it the "
                f"integers JAX_NUM_PROCESSES and JAX_PROCESS_ID below that, found {error}"
            ) from error
        return None if count == 1 else Place("by hand", address, count, index, None)
    try:
        cluster = _cluster()
        if cluster is None:
            return None
        count, index = cluster.get_process_count(), cluster.get_process_id()
        if count == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = cluster.get_coordinator_address(seconds, port)
    except ConfigError:
        raise
    except Exception as error:  # whatever it takes to ask a metadata server or an API
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(
            f"expected a cluster to tell which process this is, found {cause}: set "
            f"{', '.join(_BY_HAND)} by hand, or JAX_NUM_PROCESSES=1 to run this process alone"
        ) from error
    return Place(cluster.name or "kubernetes", address, count, index, _gpus())


def _cluster() -> Any:
    """The first kind of cluster, in JAX's order, that has started this process among others."""
    env = os.environ
    pod = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env  # one of several
    kinds: list[Any] = ClusterEnv._cluster_types
    # Google's virtual machines last: they are told apart by asking a server that may not be there.
    for kind in sorted(kinds, key=lambda kind: kind.name == "gcetpu"):
        # A shell of sbatch or salloc has most of the variables: what counts is a step's tasks.
        alone = kind.name == "slurm" and int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1
        kubernetes = kind.__name__ == "K8sCluster"
        if kind.opt_in_only_method or alone or (kubernetes and not pod):
            continue
        if kubernetes and not importlib.util.find_spec("kubernetes"):
            raise ConfigError(
                "this pod is of an indexed job, and the package kubernetes, which could tell how "
                f"many there are, is not installed: set {', '.join(_BY_HAND)} in the manifest, as "
                "launch/gke_jobset.sh does, or JAX_NUM_PROCESSES=1 to run this pod alone"
            )
        if kind.is_env_present():
            if kind.name == "gketpu" and "MEGASCALE_NUM_SLICES" not in env:
                # Or JAX would ask for the number of slices where nobody answers (Colab, Kaggle).
                return kind if len(kind._get_worker_list_in_slice()) > 1 else None
            return kind
    return None


def _gpus() -> list[int] | None:
    """This process's share of the GPUs that it sees, where others on its machine see the same.

    JAX would take one GPU a process, whatever there is: of a machine with 8 GPUs and one process
    it would use one, and where SLURM has dealt the GPUs already it would look for a missing one.
    """
    env = os.environ
    if "SLURM_LOCALID" in env:
        local, peers = int(env["SLURM_LOCALID"]), _tasks_here()
    elif "OMPI_COMM_WORLD_LOCAL_RANK" in env:
        local = int(env["OMPI_COMM_WORLD_LOCAL_RANK"])
        peers = int(env["OMPI_COMM_WORLD_LOCAL_SIZE"])
    else:
        return None
    names = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
    listed = next((env[name] for name in names if name in env), None)
    seen = len(glob.glob("/dev/nvidia[0-9]*")) if listed is None else len(listed.split(","))
    asked = env.get("JAX_LOCAL_DEVICE_IDS") or env.get("JAX_PLATFORMS") == "cpu"
    dealt = seen < int(env.get("SLURM_GPUS_ON_NODE", 0)) or seen <= 1
    if peers == 1 or asked or dealt:
        return None
    if seen % peers:
        raise ConfigError(
            f"{peers} processes share the {seen} GPUs of this machine: expected a divisor of "
            f"{seen}, such as one process a GPU (--ntasks-per-node={seen}) or one in all"
        )
    each = seen // peers
    return list(range(local * each, (local + 1) * each))


def _tasks_here() -> int:
    """Tasks of this step on this node: "8(x47),4" says 8 on each of 47 nodes, and 4 on the next."""
    counts: list[int] = []
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = part.partition("(x")
        counts += [int(tasks)] * int(times.rstrip(")") or 1)
    return counts[int(os.environ.get("SLURM_NODEID", 0))]
