"""What memory there is, in bytes: of this machine, and of a device."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import jax

_MEMINFO = Path("/proc/meminfo")
# A container's limit and what it uses, as either version of Linux's control groups has them.
_GROUPS = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
    ),
)


class Host(NamedTuple):
    total: int
    free: int  # what processes may still take, without swapping
    limit: int | None  # of this container, if that is less than `total`


def host() -> Host | None:
    """None where the system does not say (Linux does)."""
    try:
        rows = [line.split() for line in _MEMINFO.read_text().splitlines()]
        kilobytes = {row[0]: int(row[1]) for row in rows}
        total, free = (1024 * kilobytes[f"Mem{k}:"] for k in ("Total", "Available"))
    except (OSError, KeyError):
        return None
    limit = None
    for limits, usage, stat in _FILES:
        with contextlib.suppress(OSError, ValueError):  # no such group; "max": no limit
            most, used = (int((_GROUPS / name).read_text()) for name in (limits, usage))
            counts = dict(line.split() for line in (_GROUPS / stat).read_text().splitlines())
            cached = sum(int(counts.get(f"{k}_file", 0)) for k in ("active", "inactive"))
            if most < total:
                limit, free = most, min(free, most - used + cached)
    return Host(total, free, limit)


def free(devices: list[jax.Device]) -> int | None:
    """What each of these devices of this process has left; None if nobody says. CPUs share their
    machine's memory evenly."""
    if devices[0].platform == "cpu":
        found = host()
        return found.free // len(devices) if found else None
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in s for s in stats):
        return None
    return min(s["bytes_limit"] - s.get("bytes_in_use", 0) for s in stats)
