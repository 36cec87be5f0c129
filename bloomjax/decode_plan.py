"""Plans of decoding: for every number of slots the layout that is predicted to be fastest.

Decoding lays weights out over `sequence` and `tensor` alone, where they stay. The context that
every slot holds is `data.sequence_length`. What is predicted comes from `decode_cost`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bloomjax import aot, decode_cost
from bloomjax.config import Config
from bloomjax.errors import ConfigError, DoesNotFitError
from bloomjax.machines import Machine


@dataclasses.dataclass(frozen=True)
class Plan:
    target: aot.Target
    estimate: decode_cost.Estimate  # the best for so many slots

    @property
    def fits(self) -> bool:
        return self.estimate.fits

    @property
    def prompts(self) -> list[int]:
        """Lengths of prompts whose prefill is told."""
        length = self.estimate.layout.length
        return sorted({min(512, length), length})


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
    length = config.data.sequence_length
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
        less = "" if quantize == "int4" else ", --quantize=int4" if quantize == "int8" else (
            ", --quantize=int8"
        )
        fewer = f", or --slots={least.room}, which fit" if least.room else ""
        raise DoesNotFitError(
            f"{least.layout.slots} slots of {length:,} tokens on {target}: expected at most "
            f"{_gb(machine.capacity)} a device, found {_gb(least.memory_bytes)}: take more devices"
            f"{less}{fewer}"
        )
    return [Plan(target, one) for one in found]


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
    }


def report(plans: Sequence[Plan]) -> list[str]:
    """Plans for people, a column each."""
    found = [plan.estimate for plan in plans]
    layout, machine = found[0].layout, found[0].machine
    weights = {"none": "bfloat16" if layout.itemsize == 2 else "float32"}

    def row(name: str, *cells: str) -> str:
        return f"  {name:<28}" + "".join(f"{cell:>24}" for cell in cells)

    def each(name: str, cells: Sequence[str]) -> str:
        return row(name, *cells)

    lines = [
        f"decoding with {layout.model.parameter_count / 1e9:.3g}B parameters in "
        f"{weights.get(layout.quantize, layout.quantize)} on {found[0].devices:,} devices, "
        f"{plans[0].target}, {layout.length:,} tokens a slot",
        "",
        each("slots", [f"{one.layout.slots:,}" for one in found]),
        each("layout", [_layout(one.layout) for one in found]),
        each("cache", [one.layout.cache for one in found]),
        "",
        "memory of a device, by count",
    ]
    for part in found[0].memory:
        lines.append(each(part, [_gb(one.memory[part]) for one in found]))
    verdicts = ["fits" if one.fits else "DOES NOT FIT" for one in found]
    lines += [
        each(f"of {_gb(machine.capacity)}", [_gb(one.memory_bytes) for one in found]),
        each("", verdicts),
        each("slots that fit at most", [f"{one.room:,}" for one in found]),
        "",
        "predicted, milliseconds of a step (a token of every slot)",
    ]
    parts = dict.fromkeys(part for one in found for part in one.seconds)
    largest = {part: max(one.seconds.get(part, 0.0) for one in found) for part in parts}
    for part in sorted(parts, key=lambda part: -largest[part]):
        lines.append(each(part, [f"{1e3 * one.seconds.get(part, 0):,.2f}" for one in found]))
    lines += [
        each("in all", [f"{1e3 * one.step_seconds:,.2f}" for one in found]),
        each("tokens/s", [f"{one.tokens_per_second:,.0f}" for one in found]),
        each("bound by", [one.bound_by for one in found]),
        "",
        "predicted, milliseconds to the first token of a prompt",
    ]
    for n in plans[0].prompts:
        lines.append(each(f"{n:,} tokens", [f"{1e3 * one.prefill_seconds(n):,.0f}" for one in found]))
    return lines
