"""Plans of decoding with 176B, for hardware that is not here, beside what others published.

    pip install -e '.[plan]' && python benchmarks/decode_plans.py [--only=TEXT]

Compiles the step of the most slots that fit with the real compiler (some minutes each on two
cores), and keeps what `bloomjax.plan --decode --json` says, dated, in benchmarks/results/, with the
model's prediction for the machine and the batches of DeepSpeed-Inference's published runs. Prints
the README's tables.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bloomjax import decode_cost
from bloomjax.config import base_config, freeze
from bloomjax.machines import machine as known

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))
from facts import machine  # noqa: E402

CONFIG = ROOT / "configs/bloom_176b_gpu.py"
# (target, what else the command line says)
PLANS = [
    ("gpu-h200:1x8", []),
    ("tpu-v5p:4x4x2", []),
    ("gpu-h200:1x4", ["--quantize=int8"]),
    # 128 slots do not fit there at 2,048 tokens, but they do at half of that
    ("gpu-h200:1x4", ["--quantize=int8", "--slots=128", "--config.data.sequence_length=1024"]),
]
# DeepSpeed-Inference, float16, 8 x A100-80G: milliseconds a token and sequence by batch; prompts of
# a few tokens, 100 new ones (huggingface/transformers-bloom-inference, bloom-inference-scripts).
PUBLISHED = {1: 44.02, 8: 5.70, 16: 3.01, 32: 1.68, 64: 1.00, 128: 0.69}


def plan(target: str, flags: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bloomjax.plan", f"--config={CONFIG}", f"--target={target}"]
    command += ["--decode", "--json", *flags]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def yardstick() -> list[dict[str, Any]]:
    model, a100 = freeze(base_config("176b")).model, known("gpu-a100-80g")
    rows = []
    for slots, milliseconds in PUBLISHED.items():
        found = decode_cost.search(model, a100, 8, slots=slots, length=128)[0]
        rows.append(
            {
                "batch": slots,
                "published_ms": slots * milliseconds,
                "predicted_ms": 1e3 * found.step_seconds,
                "seconds": found.seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    path = ROOT / f"benchmarks/results/decode-plans-{datetime.date.today()}.json"
    found = json.loads(path.read_text()) if path.exists() else {"plans": {}}
    found |= {"yardstick": yardstick(), "machine": machine("jax", "jaxlib")}
    for target, flags in PLANS:
        name = " ".join([target, *flags])
        if only in name:
            found["plans"][name] = plan(target, flags)
        path.write_text(json.dumps(found, indent=1) + "\n")
    for one in found["plans"].values():
        for row in one["plans"]:
            print(plan_row(one, row))
    print()
    for row in found["yardstick"]:
        share = row["predicted_ms"] / row["published_ms"]
        ms = f"{row['published_ms']:.1f} | {row['predicted_ms']:.1f} | {share:.0%}"
        print(f"| {row['batch']} | {ms} | {bounds(row['seconds'])} |")


def plan_row(one: dict[str, Any], row: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items()) or "one device"
    memory, compiled = f"{sum(row['memory'].values()) / 1e9:.0f}", row["compiled"]
    if compiled:
        memory += f" ({compiled['memory']['total'] / 1e9:.0f} compiled)"
    memory += f" of {one['capacity'] / 1e9:.0f} GB"
    prefill = " / ".join(f"{1e3 * seconds:.0f}" for seconds in row["prefill_seconds"].values())
    weights = {"none": "bf16"}.get(one["quantize"], one["quantize"])
    slots = f"{row['slots']} x {one['context']:,}"
    if not row["fits"]:
        memory += f": does not fit, {row['room']} would"
    cells = one["target"], weights, slots, mesh, row["cache"].replace("bfloat16", "bf16"), memory
    speed = f"{1e3 * row['step_seconds']:.1f} | {row['tokens_per_second']:,.0f}"
    return f"| {' | '.join(cells)} | {speed} | {bounds(row['seconds'])} | {prefill} |"


def bounds(seconds: dict[str, float]) -> str:
    """The parts that make nine tenths of a time, in milliseconds, longest first."""
    said, left = [], 0.9 * sum(seconds.values())
    for part, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if left > 0:
            said.append(f"{part} {1e3 * value:.1f}")
        left -= value
    return ", ".join(said)


if __name__ == "__main__":
    main()
