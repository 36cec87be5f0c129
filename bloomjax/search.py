"""Layouts of a configuration on a machine, ranked by predicted time among those that fit.

Every factorisation of the devices over the mesh's axes that divides the model, with tensor and
sequence inside a node; each with what the backward pass recomputes and with the microbatch's rows.
Where the configured batch does not divide, the nearest that does is taken, and the note says so.
"""

import dataclasses
import math
from collections.abc import Iterator

from bloomjax.config import Config, MeshConfig
from bloomjax.cost import Estimate, estimate, memory
from bloomjax.errors import DoesNotFitError
from bloomjax.machines import Machine
from bloomjax.sharding import AXES, faults, layouts
from bloomjax.software import OURS, Software
from bloomjax.traffic import Layout

REMAT = ("none", "dots", "block")
# A batch other than the one that was asked for has to be this much faster.
RELUCTANCE = 0.01
# Rows of a microbatch on a device that are tried: more only lengthen a pipeline's bubble.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Candidate:
    config: Config  # with mesh, run.remat, run.accumulation and data.batch_size as chosen
    estimate: Estimate
    note: str  # what differs from what was asked: "batch 2,016 in place of 2,048", or ""


def search(
    config: Config, machine: Machine, devices: int, software: Software = OURS
) -> list[Candidate]:
    """All layouts that fit, fastest first: by tokens a second, as batches may differ a little.
    One with another batch than was asked for ranks as if it were a hundredth slower.

    DoesNotFitError if none does, with how much memory the smallest needs.
    """
    asked = config.data.batch_size
    tried = [(m, *split) for m in meshes(config, machine, devices) for split in batches(config, m)]
    found, smallest = _fitting(config, tried, machine, devices, software)
    if not found:  # a device too small to sum the gradients of several microbatches: fewer rows
        tried = [(m, rows * m.data * m.fsdp, 1) for m, _, _ in tried for rows in ROWS]
        tried = [one for one in dict.fromkeys(tried) if one[1] < asked and one[0].stage == 1]
        found, _ = _fitting(config, tried, machine, devices, software)
    if not found:
        raise DoesNotFitError(
            f"no layout fits {devices} x {machine.name}: expected at most "
            f"{machine.capacity / 1e9:.0f} GB a device, found {smallest / 1e9:.0f} GB at least: "
            "take more devices, or a smaller model or batch"
        )

    def rank(candidate: Candidate) -> float:
        return candidate.estimate.tokens_per_second * (1 - RELUCTANCE * bool(candidate.note))

    return sorted(found, key=rank, reverse=True)


def _fitting(
    config: Config,
    tried: list[tuple[MeshConfig, int, int]],
    machine: Machine,
    devices: int,
    software: Software,
) -> tuple[list[Candidate], float]:
    """What fits of (mesh, sequences a step, microbatches), and the least memory that any needs."""
    found, smallest, asked = [], math.inf, config.data.batch_size
    for mesh, batch, n in tried:
        for remat in REMAT:
            candidate = _candidate(config, mesh, batch, n, remat)
            size = sum(memory(Layout.of(candidate, devices)).values())
            smallest = min(smallest, size)
            if size <= machine.capacity:
                note = f"batch {batch:,} in place of {asked:,}" if batch != asked else ""
                cost = estimate(candidate, machine, devices, software)
                found.append(Candidate(candidate, cost, note))
                break  # what recomputes more is slower
    return found, smallest


def meshes(config: Config, machine: Machine, devices: int) -> Iterator[MeshConfig]:
    """Those that divide devices and model, with tensor and sequence inside a node (or a slice)."""
    L, T = config.model.layers, config.data.sequence_length
    for sizes in layouts(devices):
        inner = sizes["sequence"] * sizes["tensor"]
        empty = -L % sizes["stage"]
        if inner > machine.node or T % inner or sizes["sequence"] > 8:
            continue  # else a product would move more than it computes
        if machine.torus and config.model.width % (8 * sizes["fsdp"] * sizes["sequence"]):
            continue  # libtpu all-reduces what does not gather in rows of eight: twice the bytes
        if empty in (0, 2) and not any(faults(config.model, sizes, T)):
            yield MeshConfig(**sizes)


def batches(config: Config, mesh: MeshConfig) -> Iterator[tuple[int, int]]:
    """(sequences a step, microbatches) that leave no row empty, nearest to the configured batch."""
    asked, shards = config.data.batch_size, mesh.data * mesh.fsdp
    seen = set()
    for rows in ROWS:
        n = max(round(asked / (shards * rows)), 1)
        batch = n * rows * shards
        if abs(batch - asked) > asked / 32 or (n == 1 and mesh.stage > 1):
            continue
        if (batch, n) not in seen:
            seen.add((batch, n))
            yield batch, n


def _candidate(config: Config, mesh: MeshConfig, batch: int, n: int, remat: str) -> Config:
    # As many samples as asked for, since the schedule counts them.
    steps = math.ceil(config.optim.steps * config.data.batch_size / batch)
    optim = dataclasses.replace(config.optim, steps=steps)
    if optim.ramp_start >= batch:
        optim = dataclasses.replace(optim, ramp_start=0)
    elif optim.ramp_start:  # its rungs have to reach this batch
        increment = math.gcd(batch - optim.ramp_start, optim.ramp_increment)
        optim = dataclasses.replace(optim, ramp_increment=increment)
    return dataclasses.replace(
        config,
        mesh=mesh,
        data=dataclasses.replace(config.data, batch_size=batch),
        optim=optim,
        run=dataclasses.replace(config.run, remat=remat, accumulation=n),
    )


def mesh_text(mesh: MeshConfig) -> str:
    """stage 12 x fsdp 8 x tensor 4"""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
