"""Many processes as one: how each finds its place, joins, and notices that one is lost."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax._src.clusters.cloud_tpu_cluster as tpu
import pytest
from jax._src.clusters import GceTpuCluster, K8sCluster
from trial import ROOT, Ended, Trial, ended, kill, steps, until

from bloomjax import cluster, processes
from bloomjax.errors import ConfigError
from bloomjax.watchdog import Watchdog

ENDLESS = ("--config.optim.steps=1000000", "--config.run.checkpoint_every=1000000")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial(tmp_path_factory.mktemp("runs"))


# ---- the place of a process -----------------------------------------------------------------

TASK = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "jean[07-09],zay1",
    "SLURM_NTASKS": "28",
    "SLURM_STEP_NUM_TASKS": "28",
    "SLURM_STEP_TASKS_PER_NODE": "8(x3),4",
    "SLURM_PROCID": "11",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "3",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
NODE = TASK | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,other", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_NUM_SLICES": "2"}
DEALT = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}  # each sees its own
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "CUDA_VISIBLE_DEVICES": "4,5,6,7",
}
HAND = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
METADATA = {
    "agent-worker-number": "1",
    "worker-network-endpoints": "a:b:127.0.0.1,c:d:127.0.0.2",
    "tpu-env": "",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets variables in an environment that has no other of those that matter."""
    starts = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "CUDA_V", "KUBERNETES_", "JOB_")
    for name in os.environ:
        if name.startswith(starts):
            monkeypatch.delenv(name)

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_all


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (HAND, ("by hand", "h:1", 2, 1, None)),
        (HAND | TASK, ("by hand", "h:1", 2, 1, None)),
        (TASK, ("slurm", "jean07:61441", 28, 11, [3])),
        (NODE, ("slurm", "jean07:61441", 28, 11, None)),  # all eight
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "4(x7)"}, ("slurm", "jean07:61441", 28, 11, [6, 7])),
        (TASK | DEALT, ("slurm", "jean07:61441", 28, 11, None)),
        (TASK | {"CUDA_VISIBLE_DEVICES": "0,1"}, ("slurm", "jean07:61441", 28, 11, None)),
        (TASK | {"JAX_PLATFORMS": "cpu"}, ("slurm", "jean07:61441", 28, 11, None)),
        (TASK | {"JAX_COORDINATOR_PORT": "5"}, ("slurm", "jean07:5", 28, 11, [3])),
        (MPI | {"JAX_COORDINATOR_PORT": "5"}, ("ompi", "10.96.0.1:5", 4, 3, [2, 3])),
    ],
)
def test_places(environment: Any, variables: dict[str, str], expected: tuple[Any, ...]) -> None:
    environment(variables)
    assert cluster.place(1) == cluster.Place(*expected)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},  # one task, in a job of many
        {k: v for k, v in TASK.items() if "STEP" not in k},  # the shell of sbatch, or of salloc
        HAND | {"JAX_NUM_PROCESSES": "1"},
        TASK | {"JAX_NUM_PROCESSES": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod: a notebook, say
    ],
)
def test_alone(environment: Any, variables: dict[str, str]) -> None:
    environment(variables)
    assert cluster.place(1) is None


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({k: v for k, v in HAND.items() if "ID" not in k}, "'JAX_PROCESS_ID'"),
        (HAND | {"JAX_PROCESS_ID": "2"}, "process 2 of 2"),
        (HAND | {"JAX_PROCESS_ID": "two"}, "'two'"),
        (HAND | {"JAX_COORDINATOR_ADDRESS": "h"}, "'h', which is not host:port"),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "3(x9)"}, "3 processes share the 8 GPUs"),
        (TASK | {"SLURM_PROCID": "x"}, "JAX_NUM_PROCESSES=1 to run this process alone"),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, "kubernetes"),
    ],
)
def test_contradictions(environment: Any, variables: dict[str, str], part: str) -> None:
    environment(variables)
    with pytest.raises(ConfigError) as error:
        cluster.place(1)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_places_on_tpu_machines(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Google Kubernetes Engine, one slice and two; VMs, whose metadata server says it."""
    monkeypatch.setattr(tpu, "running_in_cloud_tpu_vm", True)
    environment({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert cluster.place(1) is None
    monkeypatch.setattr(tpu, "get_metadata", lambda key: (METADATA[key], 200))
    environment(GKE)
    assert cluster.place(1) == cluster.Place("gketpu", "localhost:8482", 2, 1, None)
    environment(SLICES | {"MEGASCALE_SLICE_ID": "1"})
    assert cluster.place(1) == cluster.Place("gketpu", "localhost:8482", 4, 3, None)

    for name in (*GKE, *SLICES, "MEGASCALE_SLICE_ID"):
        monkeypatch.delenv(name)
    assert cluster.place(1) == cluster.Place("gcetpu", "127.0.0.1:8482", 2, 1, None)

    def silent(key: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tpu, "get_metadata", silent)
    with pytest.raises(ConfigError, match="no route to host"):
        cluster.place(1)
    assert GceTpuCluster.name == "gcetpu"


def test_place_in_a_kubernetes_job(environment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the API of Kubernetes describes a JobSet."""
    labels = {"jobset.sigs.k8s.io/jobset-name": "localhost", "job-name": "slice-0"}
    owner = types.SimpleNamespace(kind="Job", controller=True)
    pod = types.SimpleNamespace(
        metadata=types.SimpleNamespace(labels=labels, owner_references=[owner], name="p")
    )
    job = types.SimpleNamespace(
        metadata=types.SimpleNamespace(labels=labels, name="slice-0"),
        spec=types.SimpleNamespace(parallelism=4),
    )
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(K8sCluster, "_pod", lambda: pod)
    monkeypatch.setattr(K8sCluster, "_job", lambda: job)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    environment({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "2"})
    expected = cluster.Place("kubernetes", "slice-0-0.localhost:55527", 4, 2, None)
    assert cluster.place(1) == expected


# ---- joining --------------------------------------------------------------------------------

JOIN = """
    import sys, jax
    from bloomjax import cli, processes
    processes.JOIN_SECONDS = int(sys.argv[1])
    cli.run(lambda values: print(jax.process_index(), jax.process_count(), jax.device_count()),
            lambda values: None, "", [])
"""


def join(seconds: int, variables: dict[str, str]) -> "subprocess.Popen[str]":
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_"))}
    env = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | variables
    command = [sys.executable, "-c", textwrap.dedent(JOIN), str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def by_hand(port: int, count: int, index: int) -> dict[str, str]:
    address = f"127.0.0.1:{port}"
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


@pytest.fixture
def ports() -> Iterator[Any]:
    """Free ports; with `busy=True` one on which somebody else listens."""
    listeners = []

    def port(busy: bool = False) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        number = listener.getsockname()[1]
        if busy:
            listeners.append(listener)
        else:
            listener.close()
        return number

    yield port
    for listener in listeners:
        listener.close()


@pytest.mark.slow
def test_tasks_of_slurm_join(ports: Any) -> None:
    tasks = TASK | {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "JAX_COORDINATOR_PORT": str(ports()),
    }
    both = [join(60, tasks | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
    assert [(e.code, e.out) for e in ended(both)] == [(0, "0 2 2\n"), (0, "1 2 2\n")]


@pytest.mark.slow
def test_what_cannot_join_says_so(ports: Any) -> None:
    """At once or in its time, in one line, with the code of a lost process."""
    free, busy, gone, wrong = ports(), ports(busy=True), ports(), ports()
    begun = time.monotonic()
    children = [
        join(60, by_hand(busy, 2, 0)),
        join(9, by_hand(free, 2, 0)),  # the other never comes
        join(9, by_hand(gone, 2, 1)),  # nor does process 0
        join(9, by_hand(busy, 2, 1)),  # somebody else is there
        join(60, by_hand(wrong, 2, 0)),
        join(60, by_hand(wrong, 3, 1)),
    ]
    taken, missing, nobody, foreign, *both = ended(children, 50)
    assert time.monotonic() - begun < 50
    refused_by(taken, "cannot listen at", "choose another port")
    refused_by(missing, "after 9 s", "not all of the others have come")
    refused_by(nobody, "after 9 s", "process 0 is not to be found", "refused")
    refused_by(foreign, "after 9 s", "is not process 0 of this run")
    assert [e.code for e in both] == [2, 2]
    said = "".join(e.err for e in both)
    assert said.count("\n") == 1
    assert "process 1 of 3: expected the number that process 0 has, found 2" in said


def refused_by(end: Ended, *parts: str) -> None:
    assert end.code == 6 and end.err.count("\n") == 1, end
    assert end.err.startswith("bloomjax: process ") and not end.out, end
    for part in parts:
        assert part in end.err, end


# ---- losing one -----------------------------------------------------------------------------


def test_the_limit_follows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def limits(watchdog: Watchdog, seconds: float) -> list[float]:
        seen = []
        for step in range(1, 4):
            watchdog.step(step)
            seen.append(watchdog._state[2])
            clock[0] += seconds
        for what, slow in (("evaluation", False), ("saving", True)):
            clock[0] += 1000  # no part of a step
            watchdog.begin(what, slow)
            seen.append(watchdog._state[2])
        return seen

    with Watchdog(0) as watchdog:
        assert limits(watchdog, 2) == [1800, 60, 60, 60, 1800]
    with Watchdog(0) as watchdog:
        assert limits(watchdog, 20) == [1800, 200, 200, 200, 1800]
    with Watchdog(5) as watchdog:
        assert limits(watchdog, 20) == [1800, 5, 5, 5, 1800]
    with Watchdog(3600) as watchdog:
        assert limits(watchdog, 20) == [3600] * 5


def test_what_progresses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(processes, "stuck", lines.append)
    with Watchdog(2) as watchdog:
        for step in range(8):
            watchdog.step(step)
            time.sleep(0.4)
        assert not lines
        time.sleep(2.8)
    assert "process 0 of 1: no progress in step 7 for 2 s" in lines[0]


def stacks(end: Ended) -> None:
    """All threads of a process that was at its training loop."""
    assert end.code == 6, end
    assert end.err.count("(most recent call first)") > 2 and "in continue_run" in end.err, end
    assert any(line.startswith("bloomjax: process ") for line in end.err.splitlines()), end


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_is_stopped_both_leave(runs: Trial, tmp_path: Path, victim: int) -> None:
    command = runs.train(tmp_path, *ENDLESS, "--config.run.watchdog=5")
    children = runs.start(command, 2)
    until(lambda: len(steps(tmp_path)) > 2, children)
    children[victim].send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    try:
        other = children[1 - victim]
        other.wait(20)
        assert time.monotonic() - begun < 15
        children[victim].send_signal(signal.SIGCONT)
        children[victim].wait(10)
    except subprocess.TimeoutExpired:
        kill(children)
        raise
    both = ended(children)
    for end in both:
        stacks(end)
    assert f"process {1 - victim} of 2: no progress in step" in both[1 - victim].err


HANGS = """
    import jax, sys, time
    from bloomjax import cli, train
    whole, calls = train.eval_step, []
    def eval_step(*args):
        calls.append(None)
        if jax.process_index() and len(calls) > 1:
            time.sleep(1000)
        return whole(*args)
    train.eval_step = eval_step
    cli.run(train.main, train.define, train.__doc__)
"""


@pytest.mark.slow
def test_when_one_of_two_hangs_in_evaluation_both_leave(runs: Trial, tmp_path: Path) -> None:
    flags = ("--config.run.eval_every=3", "--config.run.watchdog=5")
    command = runs.train(tmp_path, *ENDLESS, *flags)
    both = runs.run(["-c", textwrap.dedent(HANGS), *command[1:]], 2, limit=90)
    for end in both:
        stacks(end)
    assert "in eval_step" in both[1].err
    assert any("no progress in evaluation for 5 s" in end.err for end in both)


@pytest.mark.slow
def test_when_process_0_is_killed_the_other_leaves(runs: Trial, tmp_path: Path) -> None:
    children = runs.start(runs.train(tmp_path, *ENDLESS), 2)
    until(lambda: len(steps(tmp_path)) > 2, children)
    children[0].kill()
    _, survivor = ended(children, 20)
    assert survivor.code == 6, survivor
    assert survivor.err.splitlines()[-1].startswith("bloomjax: "), survivor.err
