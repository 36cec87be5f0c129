"""Layouts of a configuration on a machine, ranked by predicted time among those that fit."""

import dataclasses

from bloomjax.config import Config
from bloomjax.cost import Estimate
from bloomjax.machines import Machine


@dataclasses.dataclass(frozen=True)
class Candidate:
    config: Config  # with mesh, run.remat, run.accumulation and data.batch_size as chosen
    estimate: Estimate
    note: str  # what differs from what was asked: "batch 2,016 in place of 2,048", or ""


def search(config: Config, machine: Machine, devices: int) -> list[Candidate]:
    """All layouts that fit, best first."""
    raise NotImplementedError
