"""The launchers: what they would start, what they start again, and what they leave alone."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from trial import ROOT, Trial, saved, steps

LAUNCH = ROOT / "launch"
TRAIN = ["bloomjax.train", "--config=a.py", "--workdir=two words", 'say="\\hi"']


def launch(
    script: str, *args: str, path: Path | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a launcher; what stands in the folder `path` takes the place of what it calls."""
    search = f"{path or Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [LAUNCH / script, *args],
        env=os.environ | {"PATH": search} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(script: str, *args: str, **variables: str) -> str:
    end = launch(script, *args, DRY_RUN="1", **variables)
    assert (end.returncode, end.stderr) == (0, ""), end
    return end.stdout


def stub(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("script", "args"),
    [
        ("local.sh", []),
        ("local.sh", ["2"]),
        ("local.sh", ["0", "bloomjax.train"]),
        ("local.sh", ["--restarts=many", "2", "bloomjax.train"]),
        ("slurm.sh", []),
        ("slurm.sh", ["--config=a.py"]),
        ("tpu_vm.sh", ["name", "zone"]),
        ("tpu_vm.sh", ["name", "zone", "--config=a.py"]),
        ("gke_jobset.sh", ["name", "image", "tpu-v5p-slice:4x4x4"]),
        ("gke_jobset.sh", ["Name", "image", "tpu-v5p-slice:4x4x4", "bloomjax.train"]),
        ("gke_jobset.sh", ["name", "image", "tpu-v5p-slice", "bloomjax.train"]),
        ("gke_jobset.sh", ["name", "image", "tpu-v5p-slice:64", "bloomjax.train"]),
    ],
)
def test_usage(script: str, args: list[str]) -> None:
    for variables in ({}, {"DRY_RUN": "1"}):
        end = launch(script, *args, **variables)
        assert end.returncode == 2 and not end.stdout
        assert end.stderr.startswith("usage: ") and end.stderr.count("\n") == 1


def test_dry_run_of_local() -> None:
    first, second = dry("local.sh", "--restarts=3", "2", *TRAIN, PORT="1234").splitlines()
    assert first.startswith(
        "JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python -m "
        "bloomjax.train --config=a.py"
    )
    assert second == first.replace("ID=0", "ID=1")


def test_dry_run_of_slurm() -> None:
    *options, command = dry("slurm.sh", *TRAIN).splitlines()
    assert shlex.split(command) == [
        *("srun", "--wait=60", "--kill-on-bad-exit=1", "python", "-m"),
        *TRAIN,
    ]
    wanted = {"--nodes=48", "--gres=gpu:8", "--signal=B:USR1@300", "--requeue"}
    assert wanted <= {option.removeprefix("#SBATCH ") for option in options}


def test_dry_run_of_tpu_vm() -> None:
    command = shlex.split(dry("tpu_vm.sh", "pod", "zone-a", *TRAIN, FOLDER="b"))
    assert command[:-1] == [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-a", "--worker=all")
    ]
    there = command[-1].removeprefix("--command=cd b && exec ")
    assert shlex.split(there) == ["python3", "-m", *TRAIN]


def jobset(*args: str, **variables: str) -> dict[str, Any]:
    manifest = yaml.safe_load(dry("gke_jobset.sh", *args, *TRAIN, **variables))
    assert manifest["kind"] == "JobSet" and manifest["metadata"]["name"] == args[0]
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", *TRAIN] and container["image"] == args[1]
    return {
        "slices": job["replicas"],
        "hosts": spec["parallelism"],
        "node": pod["nodeSelector"],
        "devices": container["resources"]["limits"],
        "env": {v["name"]: v.get("value") for v in container["env"]},
        "restarts": manifest["spec"]["failurePolicy"]["maxRestarts"],
        "exclusive": bool(manifest["metadata"]["annotations"]),
        "mounts": [m["mountPath"] for m in container["volumeMounts"]],
    }


def test_dry_run_of_two_slices() -> None:
    found = jobset("run", "a/b:c", "tpu-v5p-slice:4x4x8", SLICES="2", RESTARTS="5", VOLUME="nfs")
    assert found == {
        "slices": 2,
        "hosts": 32,
        "node": {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
            "cloud.google.com/gke-tpu-topology": "4x4x8",
        },
        "devices": {"google.com/tpu": 4},
        "env": {"PYTHONUNBUFFERED": "1"},
        "restarts": 5,
        "exclusive": True,
        "mounts": ["/dev/shm", "/shared"],
    }
    one_host = jobset("run", "a", "tpu-v6e-slice:2x4")
    assert (one_host["hosts"], one_host["devices"]) == (1, {"google.com/tpu": 8})


def test_dry_run_of_gpu_nodes() -> None:
    found = jobset("run", "a/b:c", "nvidia-h100-80gb:4x8")
    assert found["node"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert (found["slices"], found["hosts"]) == (1, 4)
    assert found["devices"] == {"nvidia.com/gpu": 8}
    assert found["env"] == {
        "PYTHONUNBUFFERED": "1",
        "JAX_COORDINATOR_ADDRESS": "run-slice-0-0.run:8476",
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": None,  # from the pod's own index
    }


@pytest.mark.parametrize(
    ("codes", "restarts", "lives", "end"),
    [
        ("137 6 0", 5, 3, 0),  # killed, hung, done
        ("6 6 6 6", 2, 3, 6),
        ("6 0", 0, 1, 6),
        *[(f"{code} 0", 5, 1, code) for code in (0, 2, 3, 4, 5, 130, 143)],
    ],
)
def test_what_local_starts_again(
    tmp_path: Path, codes: str, restarts: int, lives: int, end: int
) -> None:
    """`python` is played by a script that ends with one of `codes` after the other."""
    log = tmp_path / "log"
    stub(
        tmp_path,
        "python",
        f"""
        if [ "$1" = -c ]; then echo $((RANDOM + 1024)); exit; fi
        echo "$JAX_COORDINATOR_ADDRESS" >>{log}.$JAX_PROCESS_ID
        codes=({codes})
        [ $JAX_PROCESS_ID = 0 ] || exit ${{codes[$(wc -l <{log}.1) - 1]}}""",
    )
    ended = launch("local.sh", f"--restarts={restarts}", "2", "m", path=tmp_path)
    assert ended.returncode == end, ended
    begun = Path(f"{log}.1").read_text().splitlines()
    assert Path(f"{log}.0").read_text().splitlines() == begun
    assert len(begun) == len(set(begun)) == lives  # each at a port of its own


@pytest.mark.parametrize(
    ("code", "signal_batch", "count", "requeued"),
    [
        (0, False, 0, False),
        (0, True, 0, True),  # its time is over, and it saved
        (6, False, 0, True),
        (137, False, 8, True),
        (137, False, 9, False),
        (2, False, 0, False),
        (5, False, 0, False),
    ],
)
def test_what_slurm_puts_back(
    tmp_path: Path, code: int, signal_batch: bool, count: int, requeued: bool
) -> None:
    """srun, scancel and scontrol are played by scripts; the scheduler's signal comes from srun."""
    tell = "kill -USR1 $PPID; sleep 0.5" if signal_batch else ":"
    stub(tmp_path, "srun", f"{tell}; exit {code}")
    for name in ("scancel", "scontrol"):
        stub(tmp_path, name, f'echo {name} "$@"')
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(count)}
    end = launch("slurm.sh", *TRAIN, path=tmp_path, **variables)
    assert end.returncode == code, end
    expected = ["scancel --signal=TERM 7"] * signal_batch + ["scontrol requeue 7"] * requeued
    assert end.stdout.splitlines() == expected


@pytest.mark.slow
def test_killed_it_goes_on_by_itself(tmp_path: Path) -> None:
    """kill -9 of process 0 under `--restarts`: nothing is lost but steps since the checkpoint."""
    interval, workdir, log = 20, tmp_path / "run", tmp_path / "log"
    runs = Trial(tmp_path)
    every = f"--config.run.checkpoint_every={interval}"
    command = runs.train(workdir, "--config.optim.steps=1000000", every)
    with log.open("w") as terminal:
        parent = subprocess.Popen(
            [LAUNCH / "local.sh", "--restarts=2", "2", *command],
            env=runs.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stderr=terminal,
            cwd=ROOT,
        )
    try:
        wait(lambda: saved(workdir) and len(steps(workdir)) > saved(workdir)[-1] + 3, parent)
        holder = (workdir / "checkpoints" / "lock").read_text()
        os.kill(int(holder.split()[1]), signal.SIGKILL)
        wait(lambda: "restart 1 of 2" in log.read_text(), parent, 30)
        before, _, _ = log.read_text().partition("launch/local.sh: exit code")
        lost = numbers(before)[-1]
        wait(lambda: numbers(log.read_text())[-1] > lost + 3, parent)
        parent.terminate()
        assert parent.wait(60) == 0, log.read_text()
    finally:
        parent.kill()
    begun = numbers(log.read_text().partition("restart 1 of 2")[2])[0]
    assert 0 <= lost - (begun - 1) <= interval
    assert [r["step"] for r in steps(workdir)] == list(range(1, saved(workdir)[-1] + 1))


def numbers(text: str) -> list[int]:
    """Of the steps that were told."""
    return [int(n) for n in re.findall(r"^step (\d+)/", text, re.MULTILINE)]


def wait(condition: Any, parent: "subprocess.Popen[bytes]", limit: float = 240) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
