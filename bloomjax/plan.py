"""Say what training will take before launching it: memory, time, traffic, on hardware not there.

    python -m bloomjax.plan --config=configs/X.py --target=gpu-h200:48x8
    python -m bloomjax.plan --config=configs/X.py --target=tpu-v5p:8x8x8 --search --plot=plan.png
    python -m bloomjax.plan --config=configs/X.py --target=gpu-h200:1x8 --decode [--quantize=int8]

The real train step is compiled by the real compiler, without a device; times are predicted from
the machine's data sheet and measured efficiencies. Without a mesh in the config or on the command
line, the best one for the target is taken. The exit code is 4 where the step does not fit.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from bloomjax import aot, cli, cost, decode_cost, decode_plan, machines, picture, search
from bloomjax.config import Config, MeshConfig, base_config, freeze
from bloomjax.errors import ConfigError, DoesNotFitError

# How many of the layouts that a search ranks first are compiled.
COMPILED = 5


def define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    flags.DEFINE_string(
        "target", None, "kind:shape, as tpu-v5p:8x8x8 or gpu-h200:48x8", flag_values=values
    )
    flags.DEFINE_bool(
        "search", False, "rank all layouts, compile the best five", flag_values=values
    )
    flags.DEFINE_string("plot", None, "draw the plan: a .png or .svg", flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object on stdout", flag_values=values)
    flags.DEFINE_bool("decode", False, "plan decoding, not training", flag_values=values)
    flags.DEFINE_enum(
        "quantize", "none", decode_cost.QUANTIZE, "weights of --decode", flag_values=values
    )
    flags.DEFINE_list(
        "slots", "1,32,128", "sequences that --decode runs at once", flag_values=values
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """A layout with what the compiler and the model of the machine say of it."""

    target: aot.Target
    config: Config
    program: aot.Program
    estimate: cost.Estimate
    note: str = ""  # what differs from what was asked

    @property
    def fits(self) -> bool:
        return self.program.memory.total <= self.estimate.machine.capacity


def main(values: flags.FlagValues) -> None:
    if not values.config or not values.target:
        raise ConfigError("expected --config=FILE and --target=KIND:SHAPE (--help lists the flags)")
    if values.plot:
        picture.check(values.plot)
    jax.config.update("jax_platforms", "cpu")  # a plan takes no device from whoever trains here
    target, config = aot.target(values.target), cli.load_config(values)
    machine = machines.machine(target.kind)
    if values.decode:
        decode(values, target, machine, config)
        return
    if values["quantize"].present or values["slots"].present:
        raise ConfigError(
            "--quantize and --slots tell how to decode: expected --decode beside them"
        )
    devices = aot.devices(target)
    given = config.mesh != freeze(base_config()).mesh or any(
        override.startswith("mesh.") for override in values.set
    )
    if values.search or not given:
        candidates = search.search(config, machine, len(devices))
        _say(f"{len(candidates):,} layouts fit by count; the best: {_layout(candidates[0].config)}")
    else:
        estimate = cost.estimate(config, machine, len(devices))
        candidates = [search.Candidate(config, estimate, "")]
    plans, refused = compile_best(target, candidates, devices, values.search)
    if not plans and refused:
        raise refused
    best = next((plan for plan in plans if plan.fits), plans[0])
    if values.json:
        found = {"searched": [record(plan) for plan in plans]} if values.search else {}
        print(json.dumps(record(best) | found))
    else:
        print("\n".join([*(table(plans) if values.search else []), *report(best)]))
    if values.plot:
        picture.draw(values.plot, title(best), best.config, best.program, best.estimate)
        _say(f"drew {values.plot}")
    if not best.fits:
        need, capacity = best.program.memory.total, machine.capacity
        raise DoesNotFitError(
            f"{_layout(best.config)} on {target}: expected at most {_gb(capacity)} a device, found "
            f"{_gb(need)}: let --search choose, or split or recompute more"
        )


def decode(
    values: flags.FlagValues, target: aot.Target, machine: machines.Machine, config: Config
) -> None:
    """The mesh of a config is that of training: of decoding, only what the command line says."""
    if values.search or values.plot:
        raise ConfigError("--decode tries every layout and draws none: leave --search, --plot out")
    if not all(n.isdecimal() and int(n) for n in values.slots):
        given = ",".join(values.slots)
        raise ConfigError(f"--slots={given}: expected numbers of 1 or more, as 1,32,128")
    said = {override.split("=")[0] for override in values.set}
    sizes = {axis: n for axis, n in dataclasses.asdict(config.mesh).items() if n != -1}
    fixed = {axis: n for axis, n in sizes.items() if f"mesh.{axis}" in said}
    slots = [int(n) for n in values.slots]
    plans = decode_plan.plan(target, machine, config, slots, values.quantize, fixed)
    # The largest, whose memory is in question.
    largest = max((p for p in plans if p.fits), key=lambda plan: plan.estimate.layout.slots)
    if aot.has_compiler(target):
        devices = aot.devices(target)
        _say(
            f"compiling the step of {largest.estimate.layout.slots} slots: this takes some minutes"
        )
        made = decode_plan.compiled(largest, devices)
        plans = [made if plan is largest else plan for plan in plans]
    else:
        _say("by count alone: to compile the step too, pip install 'bloomjax[plan]'")
    if values.json:
        print(json.dumps(decode_plan.record(plans)))
    else:
        print("\n".join(decode_plan.report(plans)))
    if not any(plan.fits for plan in plans):
        raise DoesNotFitError("no step fits as compiled: take more devices, or fewer --slots")


def compile_best(
    target: aot.Target,
    candidates: Sequence[search.Candidate],
    devices: Sequence[jax.Device],
    several: bool,
) -> tuple[list[Plan], DoesNotFitError | None]:
    """The best few candidates compiled, or with `several` false, down to the first that fits; and
    what the compiler last refused for want of memory.

    Where it needs more than the count said, candidates that recompute as much, and leave no room
    for that, are passed by.
    """
    plans: list[Plan] = []
    refused, tries, excess = None, 0, dict.fromkeys(search.REMAT, 1.0)
    for candidate in candidates:
        estimate, remat = candidate.estimate, candidate.config.run.remat
        if tries == COMPILED or (plans and plans[-1].fits and not several):
            break
        if tries and excess[remat] * estimate.memory_bytes > estimate.machine.capacity:
            continue
        tries += 1
        _say(f"compiling {_layout(candidate.config)} for {target}: this takes some minutes")
        try:
            program = aot.compile_step(candidate.config, devices)
        except DoesNotFitError as error:
            refused = error
            excess[remat] *= 1.05
            _say(f"{error}")
            continue
        plans.append(Plan(target, candidate.config, program, estimate, candidate.note))
        need = program.memory.total
        excess[remat] = max(excess[remat], need / estimate.memory_bytes)
        _say(f"  {_gb(need)} a device, {_gb(estimate.memory_bytes)} by count")
        for line in program.involuntary:
            _say(f"  a defect of ours, resharding through a full copy: {line}")
    return plans, refused


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _layout(config: Config) -> str:
    n = config.run.accumulation
    return f"{search.mesh_text(config.mesh)}, {n} microbatches, remat {config.run.remat}"


def title(plan: Plan) -> str:
    model = plan.config.model
    size = f"{model.parameter_count / 1e9:.3g}B parameters"
    return f"{size} on {plan.estimate.devices:,} devices, {plan.target}"


def overrides(config: Config) -> str:
    """The flags that make `bloomjax.train` run this layout."""
    mesh = {f.name: getattr(config.mesh, f.name) for f in dataclasses.fields(MeshConfig)}
    chosen: dict[str, Any] = {f"mesh.{axis}": size for axis, size in mesh.items()}
    chosen |= {"run.remat": config.run.remat, "run.accumulation": config.run.accumulation}
    chosen |= {"data.batch_size": config.data.batch_size, "optim.steps": config.optim.steps}
    return " ".join(f"--config.{key}={value}" for key, value in chosen.items())


def record(plan: Plan) -> dict[str, Any]:
    """A plan as JSON: bytes, seconds and FLOPs of one device and one step, unless named otherwise.

    `expected` holds what the analytic model counts, beside what the compiled program has.
    """
    program, estimate, memory = plan.program, plan.estimate, plan.program.memory
    counts = program.counts
    A, B, T = program.batch
    return {
        "target": str(plan.target),
        "devices": estimate.devices,
        "parameters": plan.config.model.parameter_count,
        "mesh": program.mesh,
        "remat": plan.config.run.remat,
        "microbatches": A,
        "microbatch_rows": B,
        "sequence_length": T,
        "batch_size": plan.config.data.batch_size,
        "note": plan.note,
        "flags": overrides(plan.config),
        "fits": plan.fits,
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
        "capacity": estimate.machine.capacity,
        "flops": dict(counts.flops),
        "memory_traffic": counts.memory,
        "collectives": [
            {"kind": kind, "axes": axes, "bytes": sent, "calls": counts.calls[kind, axes]}
            for (kind, axes), sent in sorted(counts.collectives.items())
        ],
        "expected": {
            "memory": estimate.memory,
            "flops": estimate.flops,
            "bytes_by_axis": sent_by_axis(estimate),
        },
        "seconds": estimate.seconds,
        "step_seconds": estimate.step_seconds,
        "bound_by": estimate.bound_by,
        "mfu": estimate.mfu,
        "mfu_causal": estimate.mfu_causal,
        "hfu": estimate.hfu,
        "tokens_per_second": estimate.tokens_per_second,
        "budget_tokens": estimate.budget,
        "days": estimate.days,
        "device_hours": estimate.device_hours,
        "bubble": estimate.bubble,
        "idle": estimate.idle,
        "padding": estimate.padding,
        "compile_seconds": program.seconds,
        "involuntary_rematerialization": list(program.involuntary),
    }


def sent_by_axis(estimate: cost.Estimate) -> dict[str, float]:
    sums: dict[str, float] = {}
    for collective in estimate.collectives:
        sums[collective.axis] = sums.get(collective.axis, 0) + collective.bytes
    return sums


def report(plan: Plan) -> list[str]:
    """A plan for people."""
    config, program, estimate = plan.config, plan.program, plan.estimate
    memory, counts = program.memory, program.counts
    A, B, T = program.batch
    lines = [
        title(plan),
        f"  layout   {search.mesh_text(config.mesh)}; remat {config.run.remat}",
        f"  batch    {config.data.batch_size:,} sequences of {T:,}: {A} microbatches of {B} rows",
        *([f"  note     {plan.note}"] if plan.note else []),
        f"  flags    {overrides(config)}",
        "",
        "memory of a device, as compiled",
    ]
    for name, size in dataclasses.asdict(memory).items():
        if size >= 5e6:
            lines.append(f"  {name:<22}{_gb(size):>14}")
    guessed = ", ".join(
        f"{name} {_gb(size)}"
        for name, size in estimate.memory.items()
        if name not in ("parameters", "optimizer")
    )
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines += [
        f"  {'total':<22}{_gb(memory.total):>14} of {_gb(estimate.machine.capacity)}: {verdict}",
        f"  (temporaries by count: {guessed})",
        "",
        f"{'work of a device in a step':<34}{'compiled':>16}{'by count':>18}",
    ]

    def row(name: str, compiled: str, counted: str = "") -> str:
        return f"  {name:<32}{compiled:>16}{counted:>18}".rstrip()

    if config.model.layers % program.mesh["stage"]:
        lines.append(
            "  (compiled: with both branches where the last stage has the head for layers)"
        )
    for name, flops in sorted(counts.flops.items()):
        lines.append(row(name, f"{flops / 1e12:,.1f} TFLOP"))
    total, expected = sum(counts.flops.values()), sum(estimate.flops.values())
    lines.append(row("all products", f"{total / 1e12:,.1f} TFLOP", f"{expected / 1e12:,.1f} TFLOP"))
    lines.append(row("through memory", _gb(counts.memory)))
    by_axis, expected_by_axis = counts.by_axis(), sent_by_axis(estimate)
    for axes in sorted(by_axis | expected_by_axis):
        sent = by_axis.get(axes, 0), expected_by_axis.get(axes, 0)
        if max(sent) >= 5e6:
            lines.append(row(f"sent over {axes}", *map(_gb, sent)))
    step = estimate.step_seconds
    lines += ["", f"predicted: {step:,.2f} s a step, bound by {estimate.bound_by}"]
    for name, seconds in sorted(estimate.seconds.items(), key=lambda item: -item[1]):
        lines.append(f"  {name:<22}{seconds:>11,.2f} s{100 * seconds / step:>7.1f} %")
    if program.mesh["stage"] > 1:
        shares = ("bubble", estimate.bubble), ("idle slots", estimate.idle)
        text = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)
        lines.append(f"  pipeline: {text}")
    if estimate.padding:
        lines.append(f"  padding: {100 * estimate.padding:.1f} % of the rows")
    lines += [
        f"  MFU {100 * estimate.mfu:.1f} % (full attention), {100 * estimate.mfu_causal:.1f} % "
        f"(causal); with recomputation {100 * estimate.hfu:.1f} % of the peak",
        f"  {estimate.tokens_per_second:,.0f} tokens/s; {estimate.budget / 1e9:,.1f}B tokens take "
        f"{estimate.days:,.1f} days, {estimate.device_hours:,.0f} device-hours",
        f"compiled in {program.seconds:.0f} s, "
        + (f"{len(program.involuntary)} INVOLUNTARY" if program.involuntary else "no involuntary")
        + " rematerializations",
    ]
    return lines


def table(plans: list[Plan]) -> list[str]:
    """What a search compiled, best first."""
    head = f"{'layout':<52}{'batch':>7}{'memory':>12}{'':>6}{'s/step':>9}{'MFU':>7}  bound by"
    lines = [head]
    for plan in plans:
        estimate = plan.estimate
        lines.append(
            f"{_layout(plan.config):<52}{plan.config.data.batch_size:>7,}"
            f"{_gb(plan.program.memory.total):>12}{'fits' if plan.fits else 'NO':>6}"
            f"{estimate.step_seconds:>9,.2f}{100 * estimate.mfu:>6.1f}%  {estimate.bound_by}"
        )
    return [*lines, ""]


if __name__ == "__main__":
    cli.run(main, define, __doc__)
