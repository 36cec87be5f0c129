"""What a training step costs on a machine that need not be there: FLOPs, memory, bytes, seconds.

Letters as everywhere. The invariant: a step's seconds are the sum of the parts that `Estimate`
names, each made of counts (`traffic`, `software`) and of figures of the machine (`machines`), with
nothing fitted to a layout. `benchmarks/calibration.py` holds the model against BLOOM's own runs.
"""

import dataclasses

from bloomjax.attention import CHUNK
from bloomjax.config import Config
from bloomjax.errors import ConfigError
from bloomjax.loss import LOGITS_BYTES
from bloomjax.machines import Machine
from bloomjax.optim import BatchRamp
from bloomjax.sharding import faults
from bloomjax.software import OURS, Software
from bloomjax.timing import attention_runs, rerun_products, scores, seconds
from bloomjax.traffic import Collective, Layout, collectives


@dataclasses.dataclass(frozen=True)
class Estimate:
    machine: Machine
    devices: int
    layout: Layout
    batch: int  # sequences that a step learns from
    tokens: int  # of those
    model_flops: float  # of a step, all devices; attention counted in full, as PaLM did
    model_flops_causal: float
    flops: dict[str, float]  # part: executed in a step by a device, on average
    memory: dict[str, float]  # part: bytes on the device that needs most
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]  # part: of a step; they add up to `step_seconds`
    bubble: float  # share of the ticks of a pipeline that a stage has no microbatch for
    idle: float  # share of a pipeline's layer slots that hold nothing
    padding: float  # share of the rows computed that are none of the batch's
    budget: int  # tokens of the whole run

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.machine.capacity

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, attention counted in full, as PaLM and Megatron count."""
        return self.model_flops / self.step_seconds / self._peak

    @property
    def mfu_causal(self) -> float:
        return self.model_flops_causal / self.step_seconds / self._peak

    @property
    def hfu(self) -> float:
        """Of what is executed on real rows, recomputation too."""
        executed = sum(flops for part, flops in self.flops.items() if part != "bubble")
        return executed / self.step_seconds / self.machine.peak_flops

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


def estimate(config: Config, machine: Machine, devices: int, software: Software = OURS) -> Estimate:
    """The cost of one full step of `config`, laid out as `config.mesh` says (one axis may be -1).

    ConfigError if the layout does not divide the model or the devices.
    """
    layout = Layout.of(config, devices)
    if software.gathers_weights:
        for fault in faults(config.model, layout.sizes, layout.T):
            raise ConfigError(f"{fault}: change mesh.*, or search for layouts")
    found = collectives(layout, machine, software)
    T, batch = layout.T, config.data.batch_size
    free = max(layout.free - 2, 0) if software.slots else layout.free
    return Estimate(
        machine=machine,
        devices=devices,
        layout=layout,
        batch=batch,
        tokens=batch * T,
        model_flops=config.model.flops_per_token(T, causal=False) * batch * T,
        model_flops_causal=config.model.flops_per_token(T, causal=True) * batch * T,
        flops=flops(layout, software),
        memory=memory(layout),
        collectives=found,
        seconds=seconds(layout, machine, software, found),
        bubble=(layout.stage - 1) / layout.ticks,
        idle=free / (layout.stage * layout.slots),
        padding=1 - batch / layout.batch,
        budget=BatchRamp.of(config)(config.optim.steps)[0] * T,
    )


def flops(layout: Layout, software: Software) -> dict[str, float]:
    """Executed in a step by a device, on average: forward and backward by part, what is computed
    again, and what a pipeline's stages compute on nothing."""
    tokens = layout.tokens * layout.microbatches
    layers = layout.L / layout.stage
    blocks = 6 * layout.layer * tokens * layers
    pairs = scores(layout, software) * layout.microbatches * layers
    H = layout.D // layout.N
    head = 6 * layout.table * tokens / layout.stage
    forwards, firsts = attention_runs(layout, software)
    again = blocks / 3 * rerun_products(layout, software)
    again += H * pairs * (4 * (forwards - 1) + 2 * firsts)
    bubble = (blocks + again + 12 * H * pairs) * (layout.stage - 1) / layout.microbatches
    return {
        "blocks": blocks,
        "attention": 12 * H * pairs,
        "head": head,
        "recomputation": again,
        **({"bubble": bubble} if layout.stage > 1 else {}),
    }


def memory(layout: Layout) -> dict[str, float]:
    """Bytes on the device that needs most, by part; a plan's compiler knows better."""
    c, S, n = layout.itemsize, layout.stage, layout.microbatches
    layers = layout.L if S == 1 else layout.slots
    held = layers * (layout.layer + layout.vectors)
    rest = (held + layout.table) / layout.weight_parts
    stream = layout.tokens * layout.D / layout.stream_parts * c
    wide = layout.tokens * layout.D / layout.tensor * c
    kept = (
        stream
        + {"block": 0, "dots": stream + 9 * wide, "none": 8 * stream + 50 * wide}[layout.remat]
    )
    if S == 1:
        # Two layers' weights are gathered at once, so that one hides behind the other.
        gathered = 2 * layout.layer * c + layout.table * c
        gradients = 4 * rest * (2 if n > 1 else 1) + layout.layer * c + layout.table * 4
        activations = layers * kept
    else:
        gathered = held * c + layout.table * c
        gradients = 4 * (held + layout.table) + 4 * rest
        activations = (2 * S - 1) * layers * kept
    queries = min(CHUNK, layout.T // layout.sequence)
    pairs = layout.rows * layout.N / layout.tensor * queries * layout.T
    logits = min(LOGITS_BYTES, layout.tokens * layout.V / layout.tensor * c)
    layer = 8 * wide + 4 * wide * 4 + 3 * layout.tokens * layout.D * c
    return {
        "parameters": 4 * rest,
        "optimizer": 8 * rest,
        "gradients": gradients,
        "weights in use": gathered,
        "activations": activations,
        "transients": max(layer + pairs * 14, 3 * logits + 2 * layout.tokens * layout.D * 4),
    }
