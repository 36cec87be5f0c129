"""Seconds of a training step, part by part: products, what passes through memory, collectives.

Letters as everywhere. Products run at the machine's measured share of its peak, less what their
tiles leave idle; everything between them at the rate of memory; collectives at the rate of the
links that they cross, with only those of weights and gradients hidden behind the rest.
"""

import math

from bloomjax.machines import Machine
from bloomjax.software import Software, Traffic
from bloomjax.traffic import Collective, Layout

# Adam reads parameter, both moments and the gradient, writes three; clipping reads the gradient.
OPTIMIZER_BYTES = 32
# Where half a tile leaves fewer cores idle it is taken, at this share of the rate of a whole one.
HALF_TILE = 0.9


def seconds(
    layout: Layout, machine: Machine, software: Software, found: tuple[Collective, ...]
) -> dict[str, float]:
    """By part; of a pipeline, what the average stage does, then what its stages wait."""
    n, S, L = layout.microbatches, layout.stage, layout.L
    passes, layers = (n, L) if S == 1 else (layout.ticks, layout.slots)

    def took(role: str, *axes: str) -> float:
        return sum(c.seconds for c in found if c.role == role and (not axes or c.axis in axes))

    # Of one layer and one microbatch.
    parts = {
        "products": products_seconds(layout, machine, software),
        "attention": attention_seconds(layout, machine, software),
        "elementwise": elementwise_seconds(layout, machine, software),
        "launches": software.launches,
        "tensor collectives": took("layer", "tensor") / (layers * passes),
        "sequence collectives": took("layer", "sequence") / (layers * passes),
    }
    layer = sum(parts.values())
    ends = took("ends") / passes
    head, dealt = head_seconds(layout, machine, software), layout.dealt(software)
    # Of a step, on the average stage.
    parts = {part: value * n * L / S for part, value in parts.items()}
    parts["tensor collectives"] += ends * n
    parts["head"] = head * n * dealt / S
    moved = took("weights")
    if S == 1:
        parts["weights and gradients"] = moved - software.weights_hidden * min(
            moved, sum(parts.values())
        )
    else:
        transfer = software.transfer_exposed * took("transfer") / passes + took("deal") / n
        parts["stage transfers"] = transfer * n
        tick = [layer * k + ends + transfer for k in layers_of_stages(layout, software)]
        for stage in range(S) if dealt > 1 else (S - 1,):
            tick[stage] += head
        busiest = max(tick)
        parts["imbalance"] = (busiest - sum(tick) / S) * n
        parts["bubble"] = (S - 1) * busiest if software.lockstep else sum(tick) - busiest
        parts["weights and gradients"] = moved
    state = (layers * layout.layer + layout.table) / layout.weight_parts
    state /= 1 if software.gathers_weights else layout.data
    parts["optimizer"] = OPTIMIZER_BYTES * state / machine.memory_rate
    return {part: value for part, value in parts.items() if value > 0}


def layers_of_stages(layout: Layout, software: Software) -> list[int]:
    """Layers of each stage. Where embedding and head are slots, ours takes both from the last
    stage, the seed one from the first and one from the last."""
    S, K = layout.stage, layout.slots
    if software.slots and not software.lockstep:
        K = math.ceil((layout.L + 2) / S)
        return [K - 1, *[K] * (S - 2), layout.L - (K - 1) - K * (S - 2)]
    stages = [min(K, max(layout.L - K * stage, 0)) for stage in range(S)]
    return stages


def product_seconds(machine: Machine, m: float, n: float, k: float, itemsize: int) -> float:
    """Of an [m, k] times a [k, n] matrix: its tiles are dealt to the cores in rounds."""
    best = 0.0
    long, short = machine.tile
    for rows, columns, share in ((long, short, 1.0), (short, short, HALF_TILE)):
        for a, b in ((rows, columns), (columns, rows)):
            rounds = math.ceil(math.ceil(m / a) * math.ceil(n / b) / machine.cores)
            best = max(best, share * (m / a) * (n / b) / (rounds * machine.cores))
    compute = 2 * m * n * k / (machine.gemm_flops * best) * (itemsize / 2)
    return max(compute, (m * k + k * n + m * n) * itemsize / machine.memory_rate)


def products_seconds(layout: Layout, machine: Machine, software: Software) -> float:
    """Of a layer's four products forward, eight backward, and those that are computed again."""
    M, D, t, c = layout.tokens, layout.D, layout.tensor, layout.itemsize
    qkv, out, up, down = (D, 3 * D // t), (D // t, D), (D, 4 * D // t), (4 * D // t, D)
    again = {"none": (), "dots": (), "block": (qkv, out, up)}[layout.remat]
    again = (*again, down) if again and software.reruns_all else again
    forward = sum(product_seconds(machine, M, j, i, c) for i, j in (qkv, out, up, down, *again))
    backward = sum(
        product_seconds(machine, M, i, j, c) + product_seconds(machine, i, j, M, c)
        for i, j in (qkv, out, up, down)
    )
    return forward + backward


def rerun_products(layout: Layout, software: Software) -> float:
    """Share of a layer's forward products that the backward pass computes again."""
    return 0.0 if layout.remat != "block" else 1.0 if software.reruns_all else 8 / 12


def scores(layout: Layout, software: Software) -> float:
    """Of a layer and a microbatch, those that a device computes."""
    T, C = layout.T, software.chunk
    share = 1.0
    if C and C < T and layout.sequence == 1:
        chunks = [(start, min(start + C, T)) for start in range(0, T, C)]
        share = sum((b - a) * b for a, b in chunks) / T**2
    return layout.rows * layout.N / layout.tensor * (T / layout.sequence) * T * share


def attention_runs(layout: Layout, software: Software) -> tuple[float, float]:
    """(how often the forward pass runs in all, how often its first product alone beside that)."""
    again = 1 if layout.remat == "block" else 0
    chunked = software.chunk and layout.T // layout.sequence > software.chunk
    return 1 + again, 1 if chunked else 0


def attention_seconds(layout: Layout, machine: Machine, software: Software) -> float:
    """Of a layer and a microbatch: its products, or the scores' way through memory if longer."""
    number, H = scores(layout, software), layout.D / layout.N
    forwards, firsts = attention_runs(layout, software)
    traffic = software.scores
    compute = (4 * forwards + 2 * firsts + 8) * H * number
    compute /= machine.gemm_flops * software.attention_share * 2 / layout.itemsize
    moved = traffic.forward + traffic.again * (forwards - 1) + traffic.backward
    return max(compute, moved * number / machine.memory_rate)


def elementwise_seconds(layout: Layout, machine: Machine, software: Software) -> float:
    """Of a layer and a microbatch: norms, sums, GELU, transposes, copies and sums of weights."""

    def moved(traffic: Traffic) -> float:
        again = 0.0 if layout.remat == "none" else traffic.again
        return (traffic.forward + traffic.backward + again) * layout.itemsize / 2

    one = layout.tokens * layout.D
    split = layout.stream_parts if software.split_stream else 1
    total = one / split * moved(software.stream)
    total += one / layout.tensor * (4 * moved(software.ffn) + 3 * moved(software.qkv))
    if layout.stage > 1 or not software.gathers_weights:
        total += layout.layer * software.weight
    else:  # cast and gathered twice; a gradient written, scattered, and added to the others
        added = 12 if layout.microbatches > 1 else 4
        total += layout.layer * (8 + (12 + added) / layout.weight_parts)
    return total / machine.memory_rate


def head_seconds(layout: Layout, machine: Machine, software: Software) -> float:
    """Of a microbatch, of the share of its tokens that a stage takes."""
    M, c = layout.tokens / layout.dealt(software), layout.itemsize
    D, V = layout.D, layout.V // layout.tensor
    total = product_seconds(machine, M, V, D, c) + product_seconds(machine, M, D, V, c)
    total += product_seconds(machine, V, D, M, c)
    return total + (software.logits * M * V + 16 * layout.table) / machine.memory_rate
