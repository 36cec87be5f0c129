"""Devices, and how they are joined: one small data file per kind, each figure with its source.

A file beside this one holds `name`, the prefix of JAX's `device_kind`, and `figures`: for each
field of `Machine` a value, where it comes from, and how far to trust it (measured: by the source
named; sheet: the vendor's; estimate). Units are bytes, seconds, and bytes or FLOP a second.
"""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from bloomjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
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
    node: int  # devices that fast links join; TPU: all of a slice, so 0
    torus: int  # dimensions of the links' torus; 0: a switch
    wrap: int  # a torus dimension that is a multiple of this closes to a ring
    link_bytes: float  # a device's links to its node; TPU: one link
    link_share: float  # of link_bytes, that a collective reaches
    link_latency: float  # a hop
    network_bytes: float  # of a node (TPU: of a chip), to other nodes (slices)
    network_share: float
    network_latency: float
    sources: dict[str, tuple[str, str]] = dataclasses.field(compare=False, repr=False)


@functools.cache
def machine(name: str) -> Machine:
    """The machine of this name. ConfigError, with the known ones, if there is none."""
    raise NotImplementedError


def machines() -> tuple[Machine, ...]:
    """All that are known, by name."""
    raise NotImplementedError
