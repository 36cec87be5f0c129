"""What decoding costs on a machine that need not be there: memory, seconds a step, prefill.

Letters: B slots, S places of a slot in the cache, M rows of a product (B, or the tokens of a chunk
of a prompt); D, N, H, F, V, L as everywhere. Weights are stationary: `tensor` splits N, F and V,
`sequence` splits D, and only activations move. The invariant: seconds are the sum of the parts that
`Estimate` names, each made of counts, of figures of the machine (`machines`) and of the constants
here, with nothing fitted to a layout. What is counted is what `decode.programs` does.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from bloomjax.config import ModelConfig
from bloomjax.decode.programs import CHUNK
from bloomjax.errors import ConfigError
from bloomjax.kernels.packed import GROUP
from bloomjax.machines import Machine
from bloomjax.sharding import AXES, faults
from bloomjax.software import OURS
from bloomjax.timing import product_seconds
from bloomjax.traffic import divisors, hops_of, rate_of

# Rows that a matrix unit takes at once, at least.
ROWS = 8
# Kernels of a layer, and of a step outside of its layers, beside collectives: in the steps that XLA
# compiles for an H200 a layer has 20 for one slot, 15 for 32 and 14 for 128.
KERNELS, KERNELS_OUTSIDE = 16, 15
# Passes over a row's logits to choose a token: most likely, sum, the chosen one.
LOGITS_PASSES = 3

QUANTIZE = ("none", "int8", "int4")
CACHE = ("bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one device has of a model that decodes."""

    model: ModelConfig
    sequence: int
    tensor: int
    slots: int  # B
    length: int  # S
    quantize: str = "none"  # weights: none, int8 (a scale an output), int4 (one a group of inputs)
    cache: str = "bfloat16"  # or int8 (a scale a head and place)

    @property
    def sizes(self) -> dict[str, int]:
        split = {"sequence": self.sequence, "tensor": self.tensor}
        return {axis: split.get(axis, 1) for axis in AXES}

    @property
    def groups_divide(self) -> bool:
        """Whether no group of four-bit inputs is cut."""
        return self.quantize != "int4" or not any(ins % GROUP for _, ins in self.matrices.values())

    @property
    def itemsize(self) -> int:
        """Of the compute dtype."""
        return 4 if self.model.dtype == "float32" else 2

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of a layer's weights, and of the head, which is the embedding too."""
        D, V, q, t = self.model.width, self.model.vocab_size, self.sequence, self.tensor
        return {
            "qkv": (3 * D // t, D // q),
            "out": (D // q, D // t),
            "up": (4 * D // t, D // q),
            "down": (D // q, 4 * D // t),
            "head": (V // t, D // q),
        }

    def times(self, name: str) -> int:
        """How many of `matrices` there are of one name."""
        return 1 if name == "head" else self.model.layers

    def weight_bytes(self, name: str) -> float:
        outs, ins = self.matrices[name]
        if self.quantize == "none":
            return outs * ins * self.itemsize
        return outs * (ins + 4 if self.quantize == "int8" else ins * (0.5 + 4 / GROUP))

    @property
    def rows(self) -> int:
        """Slots of the cache on a device: `sequence` splits them where they divide."""
        return self.slots // self.sequence if self.slots % self.sequence == 0 else self.slots

    @property
    def place(self) -> float:
        """Bytes of a slot's place: keys and values of a layer's heads on a device."""
        heads = self.model.heads // self.tensor
        width = self.model.width // self.model.heads
        return 2 * heads * (width + 4 if self.cache == "int8" else width * self.itemsize)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """`count` collectives of one kind over one axis; seconds are of all of them."""

    what: str
    kind: str
    axis: str
    sent: float  # bytes that each device sends in one, by the ring algorithm
    count: int
    latency: float
    moving: float

    @property
    def bytes(self) -> float:
        return self.sent * self.count


@dataclasses.dataclass(frozen=True)
class Estimate:
    machine: Machine
    layout: Layout
    memory: dict[str, float]  # part: bytes on a device
    exchanges: tuple[Exchange, ...]  # of a step
    seconds: dict[str, float]  # part: of a step, which gives every slot a token

    @property
    def devices(self) -> int:
        return self.layout.sequence * self.layout.tensor

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.machine.capacity

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.layout.slots / self.step_seconds

    @property
    def bound_by(self) -> str:
        """The largest part of the time."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def room(self) -> int:
        """The most slots of this length that fit; 0 where not even the weights do."""
        each, fits, step = self.layout.sequence, 0, 1 << 20
        while step:
            tried = dataclasses.replace(self.layout, slots=(fits + step) * each)
            fits += step if sum(memory(tried).values()) <= self.machine.capacity else 0
            step //= 2
        return fits * each

    def prefill_seconds(self, tokens: int) -> float:
        """To take in a prompt, chunk after chunk, were nothing else running; a step follows."""
        chunks = [min(CHUNK, tokens - at) for at in range(0, tokens, CHUNK)]
        return sum(sum(seconds(self.layout, self.machine, M)[0].values()) for M in chunks)


def estimate(layout: Layout, machine: Machine) -> Estimate:
    """The cost of a step of all slots, each of which holds `length` tokens.

    ConfigError if the layout does not divide the model.
    """
    for fault in faults(layout.model, layout.sizes):
        raise ConfigError(f"{fault}: expected sequence to divide D and tensor N, F and V")
    parts, exchanges = seconds(layout, machine)
    return Estimate(machine, layout, memory(layout), exchanges, parts)


def memory(layout: Layout) -> dict[str, float]:
    """Bytes of a device, by part. Activations: those of a step, or of a chunk of a prompt."""
    model, c, t = layout.model, layout.itemsize, layout.tensor
    D, V, L = model.width, model.vocab_size, model.layers
    weights = sum(layout.times(name) * layout.weight_bytes(name) for name in layout.matrices)
    wide = D * (3 * 4 + 2 * c) + 7 * D // t * c  # of a token: the stream, and what a layer widens
    scores = model.heads // t * layout.length * 14
    step = layout.slots * (3 * 4 * V + wide) + layout.rows * scores
    return {
        "weights": weights + (13 * L + 4) * D * c,
        "cache": L * layout.rows * layout.length * layout.place,
        "activations": max(step, min(CHUNK, layout.length) * (wide + scores)),
    }


def seconds(
    layout: Layout, machine: Machine, chunk: int = 0
) -> tuple[dict[str, float], tuple[Exchange, ...]]:
    """By part, of a step of all slots; or of `chunk` tokens of a prompt, which choose no token."""
    model, c, t = layout.model, layout.itemsize, layout.tensor
    D, H, L = model.width, model.width // model.heads, model.layers
    M, chosen = (chunk, 0) if chunk else (layout.slots, layout.slots)
    parts = {"bytes of weights": 0.0, "FLOPs": 0.0}
    for name, (outs, ins) in layout.matrices.items():
        rows = chosen if name == "head" else M
        if not rows:
            continue
        read = layout.weight_bytes(name) / machine.memory_rate
        # Few rows are split over the cores along the inputs; many are dealt in tiles.
        few = 2 * math.ceil(rows / ROWS) * ROWS * outs * ins / machine.gemm_flops * c / 2
        compute = product_seconds(machine, rows, outs, ins, c) if rows > machine.tile[1] else few
        bound = "FLOPs" if compute > read else "bytes of weights"
        parts[bound] += layout.times(name) * max(compute, read)

    cache = (1 if chunk else layout.rows) * layout.length * layout.place / machine.memory_rate
    queries = chunk or layout.rows
    pairs = queries * (model.heads // t) * layout.length
    compute = 4 * H * pairs / (machine.gemm_flops * OURS.attention_share) if chunk else 0.0
    parts["bytes of the cache"] = L * cache
    parts["attention"] = L * max(compute, OURS.scores.forward * pairs / machine.memory_rate)

    passed = OURS.stream.forward + (4 * OURS.ffn.forward + 3 * OURS.qkv.forward) / t
    parts["elementwise"] = L * M * D * passed * c / 2 / machine.memory_rate
    logits = 4 * chosen * model.vocab_size * (1 + LOGITS_PASSES)
    parts["logits"] = logits / machine.memory_rate
    parts["launches"] = (L * KERNELS + KERNELS_OUTSIDE) * machine.launch

    exchanges = tuple(collectives(layout, machine, chunk))
    parts["latency of collectives"] = sum(e.latency for e in exchanges)
    parts["bytes of collectives"] = sum(e.moving for e in exchanges)
    return {part: value for part, value in parts.items() if value > 0}, exchanges


def collectives(layout: Layout, machine: Machine, chunk: int = 0) -> Iterator[Exchange]:
    """Of a step of all slots, or of `chunk` tokens of one prompt."""
    model, c, q, t = layout.model, layout.itemsize, layout.sequence, layout.tensor
    D, V, L = model.width, model.vocab_size, model.layers
    M, chosen = (chunk, 0) if chunk else (layout.slots, layout.slots)

    def exchange(what: str, kind: str, axis: str, whole: float, count: int) -> Iterator[Exchange]:
        """Of `whole` bytes on a device when all is gathered or summed."""
        n = layout.sizes[axis]
        if n == 1 or not whole:
            return
        times = 2 if kind == "all-reduce" else 1
        sent = times * whole * (n - 1) / n
        (rate, _), hops = rate_of(layout.sizes, machine, axis), hops_of(layout.sizes, machine, axis)
        # Every protocol has a latency and a rate; the library takes the fastest.
        ways = [
            (
                start + times * (hop * hops[0] + machine.network_latency * hops[1]),
                sent / rate / share,
            )
            for start, hop, share in machine.protocols
        ]
        latency, moving = min(ways, key=sum)
        yield Exchange(what, kind, axis, sent, count, count * latency, count * moving)

    for name in ("qkv", "up"):
        outs, _ = layout.matrices[name]
        yield from exchange(f"into {name}", "all-reduce", "sequence", M * outs * c, L)
    if layout.rows < layout.slots:  # of a prompt's slot, all but its device give zeros
        kind = "all-reduce" if chunk else "all-gather"
        yield from exchange("attended", kind, "sequence", M * D // t * c, L)
    for name in ("out", "down"):
        yield from exchange(f"out of {name}", "all-reduce", "tensor", M * D // q * c, L)
        yield from exchange(f"out of {name}", "all-gather", "sequence", M * D * c, L)
    yield from exchange("looked up", "all-reduce", "tensor", M * D // q * c, 1)
    yield from exchange("looked up", "all-gather", "sequence", M * D * c, 1)
    yield from exchange("logits", "all-reduce", "sequence", chosen * V // t * 4, 1)
    yield from exchange("logits", "all-gather", "tensor", chosen * V * 4, 1)


def search(
    model: ModelConfig,
    machine: Machine,
    devices: int,
    *,
    slots: int,
    length: int,
    quantize: str = "none",
    fixed: Mapping[str, int] = MappingProxyType({}),
) -> list[Estimate]:
    """Every layout of the devices that divides the model, best first: those that fit, with the
    cache in bfloat16 before others, by time; then what does not fit, by memory. `fixed` holds axes
    of the mesh whose sizes are given.

    ConfigError if no layout divides the model.
    """
    found = []
    for tensor in divisors(devices):
        for cache in CACHE:
            layout = Layout(model, devices // tensor, tensor, slots, length, quantize, cache)
            asked = all(layout.sizes[axis] == n for axis, n in fixed.items())
            if asked and not any(faults(model, layout.sizes)) and layout.groups_divide:
                found.append(estimate(layout, machine))
    if not found:
        given = " and ".join(f"mesh.{axis} = {n}" for axis, n in fixed.items())
        with_ = f" with {given}" if given else ""
        raise ConfigError(
            f"no layout of {devices} devices{with_} decodes: expected mesh.tensor, which divides "
            f"N = {model.heads} and V = {model.vocab_size:,}, times mesh.sequence, which divides "
            f"D = {model.width}"
        )

    def rank(one: Estimate) -> tuple[bool, float, float]:
        if not one.fits:
            return True, one.memory_bytes, 0.0
        return False, CACHE.index(one.layout.cache), one.step_seconds

    return sorted(found, key=rank)
