"""A layout in numbers, and every collective of a training step under it.

Letters as everywhere: B batch, T position, D model, N heads, F ffn, V vocabulary, L layers. A
collective is counted as the ring algorithm runs it: of a tensor that is `whole` bytes when
gathered, a device of an axis of n sends whole * (n - 1) / n for an all-gather or a reduce-scatter
and twice that for an all-reduce. The invariant: what stands here is what `parallel`, `loss` and
`pipeline` do, tensor by tensor; an axis of one device sends nothing.
"""

import dataclasses
import functools
import math

from bloomjax.config import Config
from bloomjax.errors import ConfigError
from bloomjax.machines import Machine
from bloomjax.sharding import AXES
from bloomjax.software import Software


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one device has of a training step. Bytes and counts are of one microbatch."""

    stage: int
    data: int
    fsdp: int
    sequence: int
    tensor: int
    microbatches: int
    rows: int  # sequences of a microbatch on a device
    T: int
    D: int
    N: int
    V: int
    L: int
    itemsize: int  # of the compute dtype
    remat: str

    @classmethod
    def of(cls, config: Config, devices: int) -> "Layout":
        """ConfigError if the mesh does not use all devices."""
        sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for axis in [axis for axis, size in sizes.items() if size == -1][:1]:
            sizes[axis] = max(devices // fixed, 1)
        if (used := math.prod(sizes.values())) != devices:
            text = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
            raise ConfigError(
                f"mesh {text}: expected a product of {devices} devices, found {used}: change mesh.*"
            )
        letters, T = config.model.sizes, config.data.sequence_length
        n = config.run.accumulation
        return cls(
            **sizes,
            microbatches=n,
            rows=math.ceil(math.ceil(config.data.batch_size / n) / (sizes["data"] * sizes["fsdp"])),
            T=T,
            D=letters["D"],
            N=letters["N"],
            V=letters["V"],
            L=letters["L"],
            itemsize=4 if config.model.dtype == "float32" else 2,
            remat=config.run.remat,
        )

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def weight_parts(self) -> int:
        """Into how many the width of a weight is split at rest."""
        return self.fsdp * self.sequence

    @property
    def tokens(self) -> int:
        """Of a microbatch on a device, between the products' ends: split over all but `tensor`."""
        return self.rows * self.T // self.sequence

    @property
    def stream_parts(self) -> int:
        """Into how many `tensor` splits the residual stream's positions."""
        return self.tensor if self.T % (self.sequence * self.tensor) == 0 else 1

    @property
    def batch(self) -> int:
        """Sequences that a step computes, padding among them."""
        return self.rows * self.microbatches * self.data * self.fsdp

    @property
    def ticks(self) -> int:
        """Forward passes that a stage runs in a step, those on nothing among them."""
        return self.microbatches + self.stage - 1

    @property
    def slots(self) -> int:
        """Layers of a stage; the last has room for embedding and head where L does not divide."""
        return math.ceil(self.L / self.stage)

    @property
    def free(self) -> int:
        """Slots that hold no layer."""
        return self.stage * self.slots - self.L

    def dealt(self, software: Software) -> int:
        """Over how many stages the head's tokens are spread."""
        return self.stage if software.spreads_head and not self.free else 1

    @property
    def layer(self) -> int:
        """Parameters of a layer's matrices that a device computes with."""
        return 12 * self.D * self.D // self.tensor

    @property
    def vectors(self) -> int:
        """Parameters of a layer's norms and of its biases of width D."""
        return 6 * self.D

    @property
    def table(self) -> int:
        """Parameters of the embedding that a device computes with."""
        return self.V * self.D // self.tensor


@dataclasses.dataclass(frozen=True)
class Collective:
    """`count` calls a step of one collective, by every device of one axis of the mesh, or of
    several joined by "+"."""

    what: str  # which tensors
    kind: str  # all-gather, reduce-scatter, all-reduce, collective-permute
    axis: str
    sent: float  # bytes that each device sends in one call, by the ring algorithm
    count: float
    role: str  # layer, ends (embedding and head), transfer, deal, weights
    seconds: float  # of all calls, were nothing else going on

    @property
    def bytes(self) -> float:
        """That each device sends in a step."""
        return self.sent * self.count


def collectives(layout: Layout, machine: Machine, software: Software) -> tuple[Collective, ...]:
    """All of a training step."""
    found: list[Collective] = []

    def add(role: str, what: str, kind: str, axes: str, whole: float, count: float) -> None:
        sizes = layout.sizes
        names = [axis for axis in axes.split("+") if sizes[axis] > 1]
        n = math.prod(sizes[axis] for axis in names)
        if n > 1 and whole and count:
            rings = "+".join(names)
            found.append(collective(layout, machine, role, what, kind, rings, whole, count))

    c, n, S = layout.itemsize, layout.microbatches, layout.stage
    passes, layers = (n, layout.L) if S == 1 else (layout.ticks, layout.slots)
    stream = layout.tokens * layout.D * c
    split = layout.stream_parts if software.split_stream else 1
    again = 0 if layout.remat != "block" else 2 if software.reruns_all else 1

    # Tensor: a product reads the whole stream and writes its share of a sum to it.
    if split > 1:
        add("layer", "stream into products", "all-gather", "tensor", stream, 2 * layers * passes)
        add("layer", "products to stream", "reduce-scatter", "tensor", stream, 2 * layers * passes)
        add("layer", "stream, again", "reduce-scatter", "tensor", stream, again * layers * passes)
        # Of x for the weights' gradients (a recomputed forward pass shares them), and of dy.
        add("layer", "gradients into products", "all-gather", "tensor", stream, 4 * layers * passes)
        add("layer", "gradients to stream", "reduce-scatter", "tensor", stream, 2 * layers * passes)
    else:
        add("layer", "products", "all-reduce", "tensor", stream, (4 + again) * layers * passes)

    # Sequence: keys and values of all positions.
    keys = 2 * layout.rows * layout.T * layout.D // layout.tensor * c
    times = 1 if layout.remat == "none" else 2
    add("layer", "keys and values", "all-gather", "sequence", keys, times * layers * passes)
    add(
        "layer", "gradients of keys and values", "reduce-scatter", "sequence", keys, layers * passes
    )

    # Embedding and head: V is split over tensor. A pipeline's backward pass looks up again.
    dealt = layout.dealt(software)
    lookups = passes * (1 if S == 1 else 2)
    if split > 1:
        add("ends", "looked up", "reduce-scatter", "tensor", stream, lookups)
        add("ends", "gradients of looked up", "all-gather", "tensor", stream, passes)
        add("ends", "head's tokens", "all-gather", "tensor", stream / dealt, n)
        add("ends", "head's gradients", "reduce-scatter", "tensor", stream / dealt, n)
    else:
        add("ends", "looked up", "all-reduce", "tensor", stream, lookups)
        add("ends", "head's gradients", "all-reduce", "tensor", stream / dealt, n)
    add("ends", "softmax's sums", "all-reduce", "tensor", layout.tokens / dealt * (8 + c), n)

    # Stage: activations forward, their gradients backward.
    piece = stream / (layout.tensor if layout.stream_parts > 1 else 1)
    add("transfer", "activations", "collective-permute", "stage", piece, passes)
    add("transfer", "gradients of activations", "collective-permute", "stage", piece, passes)
    if not software.split_stream and S > 1:
        add("transfer", "activations received", "all-gather", "tensor", stream, 2 * passes)
    if dealt > 1:
        add("deal", "head's tokens", "reduce-scatter", "stage", piece, n)
        add("deal", "head's gradients", "all-gather", "stage", piece, n)

    # Weights, gathered just in time, or inside a pipeline once; and their gradients.
    rest, width, table = "fsdp+sequence", layout.weight_parts, layout.table
    layer = layout.layer + layout.vectors
    g = software.gradient_bytes
    if not software.gathers_weights:
        held = layers * layer
        add("weights", "gradients", "all-reduce", "data", held * g, 1)
        add("weights", "weights", "all-gather", "data", held * c, 1)
        add("weights", "embedding's gradients", "all-reduce", "data", table * g, 1)
        add("weights", "embedding", "all-gather", "data", table * c, 1)
    elif S == 1:
        exchanged = layout.layer * c + layout.vectors * 4
        add("weights", "weights", "all-gather", rest, exchanged, 2 * layers * n)
        add("weights", "gradients", "reduce-scatter", rest, exchanged, layers * n)
        add("weights", "gradients", "all-reduce", "data", exchanged / width, layers * n)
        # The compiler finds that lookups and heads gather the same, once for all microbatches.
        add("weights", "embedding", "all-gather", rest, table * c, 1)
        add("weights", "embedding's gradients", "reduce-scatter", rest, table * 4, 2 * n)
        add("weights", "embedding's gradients", "all-reduce", "data", table * 4 / width, 2 * n)
    else:
        held = layers * layer
        add("weights", "weights", "all-gather", rest, held * c, 1)
        add("weights", "gradients", "reduce-scatter", rest, held * g, 1)
        add("weights", "gradients", "all-reduce", "data", held * g / width, 1)
        add("weights", "embedding", "all-gather", rest, table * c, 1)
        add("weights", "embedding's gradients", "all-reduce", "stage", table * g / width, 1)
        add("weights", "embedding's gradients", "reduce-scatter", rest, table * g, 1)
        add("weights", "embedding's gradients", "all-reduce", "data", table * g / width, 1)
    return tuple(found)


def collective(
    layout: Layout,
    machine: Machine,
    role: str,
    what: str,
    kind: str,
    axes: str,
    whole: float,
    count: float,
) -> Collective:
    """One, of tensors of `whole` bytes when gathered; `axes` are joined by "+"."""
    n = math.prod(layout.sizes[axis] for axis in axes.split("+"))
    steps = {"all-gather": n - 1, "reduce-scatter": n - 1, "all-reduce": 2 * (n - 1)}.get(kind)
    sent = whole if steps is None else whole / n * steps
    rate, hop = rate_of(layout.sizes, machine, axes, ring=steps is not None)
    took = max(sent / rate, hop * (steps or 1))
    return Collective(what, kind, axes, sent, count, role, took * count)


def rate_of(
    sizes: dict[str, int], machine: Machine, axes: str, ring: bool = True
) -> tuple[float, float]:
    """(bytes/s that each device can send along `axes` of a mesh of `sizes`, seconds of a hop).

    Inside a node: its links. Beyond, all rings that leave a node share its network: as many as
    devices of the node stand side by side. On a torus: as many of its dimensions as the axes fill,
    in both directions where the dimension closes.
    """
    return _rate_of(machine, tuple(sizes.values()), axes, ring)


def hops_of(sizes: dict[str, int], machine: Machine, axes: str) -> tuple[int, int]:
    """(hops inside a node or slice, hops between nodes) after which every device of `axes` has
    what every other had.

    Around a ring of devices, node by node; on a torus, along one side after another, both ways
    around where it closes.
    """
    names, n = axes.split("+"), math.prod(sizes[axis] for axis in axes.split("+"))
    if machine.torus:
        return _torus_dimensions(machine, tuple(sizes.values()), names)[2], 0
    stride = math.prod(list(sizes.values())[max(map(AXES.index, names)) + 1 :])
    nodes = math.ceil(n * stride / machine.node)
    return n - nodes, nodes - 1


@functools.cache
def _rate_of(
    machine: Machine, sizes: tuple[int, ...], axes: str, ring: bool
) -> tuple[float, float]:
    names = axes.split("+")
    inner = max(AXES.index(name) for name in names)
    stride = math.prod(sizes[inner + 1 :])
    n = math.prod(sizes[AXES.index(name)] for name in names)
    link = machine.link_bytes * machine.link_share
    inside = stride * n <= machine.node and machine.node % (stride * n) == 0
    if not inside and math.prod(sizes) > machine.node:
        rings = min(stride, machine.node)
        network = machine.network_bytes * machine.network_share * machine.node / rings
        return min(network, link * max(2 * machine.torus, 1)), machine.network_latency
    if not machine.torus or not ring:
        return link, machine.link_latency
    filled, closed, _ = _torus_dimensions(machine, sizes, names)
    return link * filled * (2 if closed else 1), machine.link_latency


@functools.cache
def torus_shape(dimensions: int, devices: int) -> tuple[int, ...]:
    """The slice of so many chips with the least surface, sides in rising order."""
    best: tuple[int, ...] = (1,) * (dimensions - 1) + (devices,)
    for first in divisors(devices):
        for second in divisors(devices // first) if dimensions == 3 else (1,):
            third = devices // first // second
            sides = (first, second, third) if dimensions == 3 else (first, third)
            if sorted(sides) == list(sides) and sum(sides) < sum(best):
                best = sides
    return best


def _torus_dimensions(
    machine: Machine, sizes: tuple[int, ...], names: list[str]
) -> tuple[int, bool, int]:
    """How many whole dimensions of the torus `names` fill, whether they close to rings, and hops
    from end to end.

    Innermost axes are laid out first, each on sides whose product is its size, or on parts of
    some."""
    sides = list(torus_shape(machine.torus, min(math.prod(sizes), machine.node)))
    filled, closed, hops = 0, True, 0
    for axis, n in reversed(list(zip(AXES, sizes, strict=True))):
        used = _sides_of(sides, n) if n > 1 else []
        parts = list(used)
        for _, side in used:
            sides.remove(side)
        while n > 1 and not used and sides and math.gcd(math.prod(sides), n) > 1:
            side = max(sides, key=lambda side: math.gcd(side, n))
            part = math.gcd(side, n)
            sides.remove(side)
            sides.append(side // part)
            parts.append((part, side))
            n //= part
            used = [] if n > 1 else [(part, side)]
        if axis in names:
            whole = [side for part, side in used if part == side]
            filled += len(whole)
            closed &= bool(whole) and all(side % machine.wrap == 0 for side in whole)
            for part, side in parts:
                ring = part == side and side % machine.wrap == 0
                hops += part // 2 if ring else part - 1
    return max(filled, 1), closed and filled > 0, hops


def _sides_of(sides: list[int], n: int) -> list[tuple[int, int]]:
    """Some of `sides` whose product is n, as (part, side) pairs, or none."""
    for mask in range(1, 2 ** len(sides)):
        chosen = [side for i, side in enumerate(sides) if mask >> i & 1 and side > 1]
        if chosen and math.prod(chosen) == n:
            return [(side, side) for side in chosen]
    return []


@functools.cache
def divisors(n: int) -> tuple[int, ...]:
    return tuple(i for i in range(1, n + 1) if n % i == 0)
