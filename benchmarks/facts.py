"""What every result carries: machine, versions, date; and where results are kept."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def machine(*packages: str) -> dict[str, Any]:
    """The date, the processor, the threads that we may use, and the versions of `packages`."""
    cpu = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: importlib.metadata.version(name) for name in packages}
    date = datetime.date.today().isoformat()
    return {"date": date, "cpu": cpu, "threads": threads, "versions": versions}


def peak_memory() -> float:
    """GiB: the most that this process has had resident. (Linux's ru_maxrss may be its parent's.)"""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def keep(name: str, result: dict[str, Any]) -> None:
    """Print the result, and write it to results/NAME-DATE.json."""
    text = json.dumps(result, indent=2)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{result['machine']['date']}.json").write_text(text + "\n")
