"""What a training step costs on a machine that need not be there: FLOPs, memory, bytes, seconds.

Skeleton: the interface.
"""

import dataclasses

from bloomjax.config import Config
from bloomjax.machines import Machine


@dataclasses.dataclass(frozen=True)
class Collective:
    """`count` calls a step of one collective, by every device of a mesh axis."""

    what: str  # which tensors
    kind: str  # all-gather, reduce-scatter, all-reduce, collective-permute
    axis: str  # of the mesh; several are joined by "+"
    sent: float  # bytes that each device sends in one call, by the ring algorithm
    count: float
    seconds: float  # of all calls, were nothing else going on

    @property
    def bytes(self) -> float:
        """That each device sends in a step."""
        return self.sent * self.count


@dataclasses.dataclass(frozen=True)
class Estimate:
    machine: Machine
    devices: int
    mesh: dict[str, int]  # axis: size
    batch: int  # sequences a step, of which padding rows are no part
    tokens: int  # of a step
    model_flops: float  # of a step, all devices, attention counted in full (PaLM)
    model_flops_causal: float
    flops: dict[str, float]  # part: executed by the busiest device in a step
    memory: dict[str, float]  # part: bytes a device
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]  # part: of a step; they add up to `step_seconds`
    bubble: float  # share of a pipeline's time in which a stage has nothing to do
    idle: float  # share of a pipeline's layer slots that hold no layer
    padding: float  # share of the batch's rows that are padding
    budget: int  # tokens of the whole run

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.machine.usable_share * self.machine.memory_bytes

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, attention counted in full, as PaLM and Megatron count."""
        return self.model_flops / self.step_seconds / self._peak

    @property
    def mfu_causal(self) -> float:
        return self.model_flops_causal / self.step_seconds / self._peak

    @property
    def hfu(self) -> float:
        """What the busiest device executes, recomputation too, over its peak."""
        return sum(self.flops.values()) / self.step_seconds / self.machine.peak_flops

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def days(self) -> float:
        """For the whole run's tokens."""
        return self.budget / self.tokens_per_second / 86400

    @property
    def device_hours(self) -> float:
        return self.days * 24 * self.devices

    @property
    def bound_by(self) -> str:
        """The largest part of the time."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def _peak(self) -> float:
        return self.machine.peak_flops * self.devices


def estimate(config: Config, machine: Machine, devices: int) -> Estimate:
    """The cost of one full step of `config`, laid out as `config.mesh` says (one axis may be -1).

    ConfigError if the layout does not divide the model or the devices.
    """
    raise NotImplementedError
