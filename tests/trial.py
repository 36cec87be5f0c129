"""Training runs through the real command line: started, killed, told to stop, and looked at."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from bloomjax import cli, manifests

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "configs" / "tiny.py"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def corpus(folder: Path) -> Path:
    """Twenty files of words that a model can learn something about; an epoch is some 50 steps."""
    rng, folder = random.Random(0), folder / "corpus"
    folder.mkdir()
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(2, 7))) for _ in range(200)]
    for n in range(20):
        text = " ".join(words[min(int(rng.expovariate(0.03)), 199)] for _ in range(80))
        (folder / f"{n}.txt").write_text(text + ".\n")
    return folder


class Trial:
    """Runs of `tests/configs/tiny.py` on one corpus, with one cache of compiled programs."""

    def __init__(self, folder: Path):
        self.corpus = corpus(folder)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def train(self, workdir: Path, *flags: str, config: Path = TINY) -> list[str]:
        """A command line, on this corpus unless `flags` say otherwise."""
        data = f"--config.data.train={self.corpus}"
        module = ["bloomjax.train", f"--config={config}", f"--workdir={workdir}"]
        return [*module, *([data] if config == TINY else []), *flags]

    def start(
        self, command: Sequence[str], count: int = 1, devices: int = 1
    ) -> "list[subprocess.Popen[str]]":
        """`python -m command` (or `python -c ...`) in `count` processes that form one run."""
        env = self.environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        if count > 1:
            # Each compiles for itself: a compiler in less of a hurry to please saves half a minute.
            env["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free.getsockname()[1]}"
            env["JAX_NUM_PROCESSES"] = str(count)
        return [
            subprocess.Popen(
                [sys.executable, *(["-m"] if command[0] != "-c" else []), *command],
                env=env | {"JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for i in range(count)
        ]

    def run(
        self, command: Sequence[str], count: int = 1, devices: int = 1, limit: float = 120
    ) -> list[Ended]:
        return ended(self.start(command, count, devices), limit)

    def one(self, *args: Any, **keywords: Any) -> Ended:
        """Train in one process."""
        (only,) = self.run(self.train(*args, **keywords))
        return only

    def done(self, *args: Any, count: int = 1, devices: int = 1) -> list[Ended]:
        """Train, and see it end well."""
        all_ended = self.run(self.train(*args), count, devices)
        assert [e.code for e in all_ended] == [0] * count, all_ended
        return all_ended


def inside(
    entry: ModuleType, argv: Sequence[str], capfd: pytest.CaptureFixture[str], join: bool = True
) -> Ended:
    """A command line in this very process, for what ends before it is worth one of its own."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.run(entry.main, entry.define, entry.__doc__, argv, join=join)
    return Ended(left.value.code, *capfd.readouterr())  # type: ignore[arg-type]


def ended(children: "list[subprocess.Popen[str]]", limit: float = 60) -> list[Ended]:
    """How they end, which they all must within `limit` seconds."""
    deadline = time.monotonic() + limit
    try:
        return [
            Ended(code=child.returncode, out=out, err=err)
            for child in children
            for out, err in [child.communicate(timeout=max(0.1, deadline - time.monotonic()))]
        ]
    finally:
        kill(children)


def kill(children: "list[subprocess.Popen[str]]") -> None:
    for child in children:
        child.kill()
    for child in children:
        child.wait()


def until(
    condition: Callable[[], object], children: "list[subprocess.Popen[str]]", limit: float = 90
) -> None:
    """Wait while the children run."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline or any(child.poll() is not None for child in children):
            kill(children)
            raise AssertionError([child.communicate()[1] for child in children])
        time.sleep(0.005)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times, and without a line that is being written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    times = ("tokens_per_second", "step_time", "mfu", "mfu_causal")
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def steps(workdir: Path) -> list[dict[str, Any]]:
    return [record for record in metrics(workdir) if "loss" in record]


def saved(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def arrays(workdir: Path, step: int) -> dict[str, Any]:
    """Length and hash of every file that holds a piece of the state."""
    manifest, fault = manifests.read(workdir / "checkpoints" / str(step))
    assert not fault
    return {name: entry for name, entry in manifest["files"].items() if "/c" in name}


def tree(folder: Path) -> dict[str, Any]:
    """Every file with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def refused(end: Ended, code: int, *parts: str) -> None:
    """One line on stderr, nothing on stdout."""
    assert end.code == code, end
    assert end.err.count("\n") == 1 and end.err.startswith("bloomjax: "), end.err
    assert not end.out
    for part in parts:
        assert part in end.err, end.err
