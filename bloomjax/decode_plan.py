"""Plans of decoding: for every number of slots the layout that is predicted to be fastest, and what
the compiler makes of the largest.

Decoding lays weights out over `sequence` and `tensor` alone, where they stay. The context that
every slot holds is `data.sequence_length`. What is predicted comes from `decode_cost`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bloomjax import aot, decode_cost
from bloomjax.config import Config, MeshConfig
from bloomjax.decode.programs import round_up
from bloomjax.errors import ConfigError, DoesNotFitError
from bloomjax.machines import Machine

# Prompts whose prefill is told, where they fit.
PROMPTS = (512, 2048)


@dataclasses.dataclass(frozen=True)
class Plan:
    target: aot.Target
    estimate: decode_cost.Estimate  # the best for so many slots
    program: aot.Decoder | None = None  # what was compiled for it

    @property
    def fits(self) -> bool:
        compiled = sum(self.program.memory.values()) if self.program else 0
        return self.estimate.fits and compiled <= self.estimate.machine.capacity

    @property
    def prompts(self) -> list[int]:
        return [n for n in PROMPTS if n <= self.estimate.layout.length]


def plan(
    target: aot.Target,
    machine: Machine,
    config: Config,
    slots: Sequence[int],
    quantize: str,
    fixed: Mapping[str, int],
) -> list[Plan]:
    """One for each of `slots`; `fixed` holds sizes of the mesh's axes that are given.

    ConfigError for a mesh that cannot decode, DoesNotFitError if nothing fits.
    """
    if machine.torus and len(target.shape) > machine.torus:
        raise ConfigError(f"--target={target}: expected one slice to decode on, as {machine.name}")
    length = round_up(config.data.sequence_length)
    found = [
        decode_cost.search(
            config.model,
            machine,
            target.devices,
            slots=n,
            length=length,
            quantize=quantize,
            fixed=fixed,
        )[0]
        for n in slots
    ]
    if not any(one.fits for one in found):
        least = min(found, key=lambda one: one.memory_bytes)
        less = (
            ""
            if quantize == "int4"
            else ", --quantize=int4"
            if quantize == "int8"
            else (", --quantize=int8")
        )
        fewer = f", or --slots={least.room}, which fit" if least.room else ""
        raise DoesNotFitError(
            f"--slots={least.layout.slots} of {length:,} tokens on {target}: expected at most "
            f"{_gb(machine.capacity)} a device, found {_gb(least.memory_bytes)}: take more devices"
            f"{less}{fewer}"
        )
    return [Plan(target, one) for one in found]


def compiled(plan: Plan, devices: Sequence[jax.Device]) -> Plan:
    """The same with what the compiler makes of it. DoesNotFitError where it refuses."""
    layout = plan.estimate.layout
    mesh = MeshConfig(sequence=layout.sequence, tensor=layout.tensor)
    program = aot.compile_decode(
        layout.model,
        mesh,
        devices,
        slots=layout.slots,
        length=layout.length,
        quantize=layout.quantize,
        cache="int8" if layout.cache == "int8" else "auto",
    )
    return dataclasses.replace(plan, program=program)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _layout(layout: decode_cost.Layout) -> str:
    sizes = {"sequence": layout.sequence, "tensor": layout.tensor}
    return " x ".join(f"{a} {n}" for a, n in sizes.items() if n > 1) or "one device"


def record(plans: Sequence[Plan]) -> dict[str, Any]:
    """Plans as JSON: bytes and seconds of one device and one step, unless named otherwise."""
    first = plans[0].estimate
    return {
        "target": str(plans[0].target),
        "devices": first.devices,
        "parameters": first.layout.model.parameter_count,
        "quantize": first.layout.quantize,
        "context": first.layout.length,
        "capacity": first.machine.capacity,
        "plans": [_record(one) for one in plans],
    }


def _record(plan: Plan) -> dict[str, Any]:
    estimate, layout = plan.estimate, plan.estimate.layout
    return {
        "slots": layout.slots,
        "mesh": {axis: n for axis, n in layout.sizes.items() if n > 1},
        "cache": layout.cache,
        "fits": plan.fits,
        "room": estimate.room,
        "memory": estimate.memory,
        "seconds": estimate.seconds,
        "step_seconds": estimate.step_seconds,
        "tokens_per_second": estimate.tokens_per_second,
        "bound_by": estimate.bound_by,
        "prefill_seconds": {str(n): estimate.prefill_seconds(n) for n in plan.prompts},
        "collectives": [
            dataclasses.asdict(one) | {"bytes": one.bytes} for one in estimate.exchanges
        ],
        "compiled": _compiled(plan.program) if plan.program else None,
    }


def _compiled(program: aot.Decoder) -> dict[str, Any]:
    counts = program.counts
    return {
        "memory": program.memory | {"total": sum(program.memory.values())},
        "tokens_per_dispatch": program.tokens,
        "flops": dict(counts.flops),
        "memory_traffic": counts.memory,
        "inner_loop_turns": counts.turns - 1,
        "collectives": [
            {"kind": kind, "axes": axes, "bytes": sent, "calls": counts.calls[kind, axes]}
            for (kind, axes), sent in sorted(counts.collectives.items())
        ],
        "weights_written": list(program.weights_written),
        "cache_written": list(program.cache_written),
        "compile_seconds": program.seconds,
    }


def report(plans: Sequence[Plan]) -> list[str]:
    """Plans for people, a column each."""
    found = [plan.estimate for plan in plans]
    layout, machine = found[0].layout, found[0].machine
    weights = layout.model.dtype if layout.quantize == "none" else layout.quantize

    def row(name: str, cells: Sequence[str]) -> str:
        return f"  {name:<26}" + "".join(f"{cell:>24}" for cell in cells)

    lines = [
        f"{layout.model.parameter_count / 1e9:.3g}B parameters decoding on {found[0].devices:,} "
        f"devices, {plans[0].target}: weights {weights.replace('auto', 'bfloat16')}, "
        f"{layout.length:,} tokens a slot",
        row("slots", [f"{one.layout.slots:,}" for one in found]),
        row("layout", [_layout(one.layout) for one in found]),
        row("cache", [one.layout.cache for one in found]),
        "",
        "memory of a device, by count",
    ]
    for part in found[0].memory:
        lines.append(row(part, [_gb(one.memory[part]) for one in found]))
    lines += [
        row(f"of {_gb(machine.capacity)}", [_gb(one.memory_bytes) for one in found]),
        row("", ["fits" if plan.fits else "DOES NOT FIT" for plan in plans]),
        row("slots that would fit", [f"{one.room:,}" for one in found]),
        "",
        "predicted, milliseconds a step (a token of every slot)",
    ]
    parts = dict.fromkeys(part for one in found for part in one.seconds)
    longest = {part: max(one.seconds.get(part, 0.0) for one in found) for part in parts}
    for part in sorted(parts, key=lambda part: -longest[part]):
        lines.append(row(part, [_ms(one.seconds.get(part, 0.0)) for one in found]))
    lines += [
        row("in all", [_ms(one.step_seconds) for one in found]),
        row("tokens/s", [f"{one.tokens_per_second:,.0f}" for one in found]),
        row("bound by", [one.bound_by for one in found]),
    ]
    if plans[0].prompts:
        lines += ["", "predicted, milliseconds to take in a prompt"]
    for n in plans[0].prompts:
        lines.append(row(f"{n:,} tokens", [_ms(one.prefill_seconds(n)) for one in found]))
    for plan in plans:
        lines += _program(plan) if plan.program else []
    return lines


def _program(plan: Plan) -> list[str]:
    program, estimate = plan.program, plan.estimate
    assert program
    counts, total = program.counts, sum(program.memory.values())
    memory = ", ".join(f"{part} {_gb(size)}" for part, size in program.memory.items() if size > 5e7)
    lines = [
        "",
        f"compiled for {estimate.layout.slots:,} slots in {program.seconds:.0f} s: {_gb(total)} a "
        f"device ({memory}); {_gb(counts.memory)} through memory a step, "
        f"{_gb(estimate.memory['weights'] + estimate.memory['cache'])} at least",
    ]
    expected: dict[tuple[str, str], list[float]] = {}
    for one in estimate.exchanges:
        sums = expected.setdefault((one.kind, one.axis), [0, 0.0])
        sums[0], sums[1] = sums[0] + one.count, sums[1] + one.bytes
    for key in sorted(expected | counts.collectives):
        count, sent = expected.get(key, (0, 0.0))
        lines.append(
            f"  {' over '.join(key):<26}{counts.calls[key]:>8,.0f} calls, "
            f"{counts.collectives[key] / 1e6:,.1f} MB a step; by count {count:,.0f}, "
            f"{sent / 1e6:,.1f} MB"
        )
    if counts.turns > 1:  # the step is a turn itself
        lines.append(
            f"  {counts.turns - 1:,.0f} turns of loops inside a step, which take their time"
        )
    for what, ops in ("weights", program.weights_written), ("the cache", program.cache_written):
        shown = f", as {ops[0]}" if ops else ""
        lines.append(f"  {len(ops)} operations write {what} anew{shown}")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
