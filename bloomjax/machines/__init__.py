"""Devices, and how they are joined: one small data file per kind, each figure with its source.

A file beside this one holds `name`, the prefix of JAX's `device_kind`, and `figures`: for each
field of `Machine` a value, where it comes from, and how far to trust it (measured: by the source
named; sheet: the vendor's; calibrated: from measured steps, as its source says; estimate). Units
are bytes, seconds, and bytes or FLOP a second.
"""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from bloomjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)  # one object each, so identity is enough
class Machine:
    """One kind of device and the cluster around it. Bandwidths are of one direction."""

    name: str  # as a target names it: gpu-h200, tpu-v5p
    device_kind: str  # what JAX's device_kind begins with
    peak_flops: float  # dense bfloat16
    gemm_share: float  # of the peak, that large products reach
    cores: int  # that share a product: its tiles are dealt to them in rounds
    tile: tuple[int, int]  # of a product's result, that one core works on
    memory_bytes: float
    usable_share: float  # of memory_bytes, for arrays
    memory_bandwidth: float
    memory_share: float  # of the bandwidth, that a pass over memory reaches
    node: int  # devices that fast links join: a GPU node, the largest TPU slice
    torus: int  # dimensions of the links' torus; 0: a switch
    wrap: int  # a torus dimension that is a multiple of this closes to a ring
    link_bytes: float  # a device's links to its node; TPU: one link
    link_share: float  # of link_bytes, that a collective reaches
    link_latency: float  # a hop
    # How small collectives may run: (seconds to start, seconds a hop, share of the links' rate).
    protocols: tuple[tuple[float, float, float], ...]
    launch: float  # seconds from one small kernel of a step to the next
    network_bytes: float  # a device's share of its node's links to other nodes (slices)
    network_share: float
    network_latency: float
    sources: dict[str, tuple[str, str]] = dataclasses.field(repr=False)

    @property
    def gemm_flops(self) -> float:
        """FLOP/s of large products that fill every core."""
        return self.gemm_share * self.peak_flops

    @property
    def memory_rate(self) -> float:
        """Bytes/s of a pass over memory."""
        return self.memory_share * self.memory_bandwidth

    @property
    def capacity(self) -> float:
        """Bytes for arrays."""
        return self.usable_share * self.memory_bytes


@functools.cache
def machines() -> tuple[Machine, ...]:
    """All that are known, by name."""
    folder = importlib.resources.files(__name__)
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(_read(json.loads(file.read_text())) for file in files)


def machine(name: str) -> Machine:
    """The machine of this name. ConfigError, with the known ones, if there is none."""
    for known in machines():
        if known.name == name:
            return known
    names = ", ".join(known.name for known in machines())
    raise ConfigError(f"unknown machine {name!r}: expected one of {names}")


def _read(data: dict[str, Any]) -> Machine:
    figures = data["figures"]
    values = {key: figure["value"] for key, figure in figures.items()}
    return Machine(
        name=data["name"],
        device_kind=data["device_kind"],
        sources={key: (figure["source"], figure["trust"]) for key, figure in figures.items()},
        **values
        | {"tile": tuple(values["tile"]), "protocols": tuple(map(tuple, values["protocols"]))},
    )
