"""The cost model against the runs that BLOOM's makers measured, with one set of constants for all.

    PYTHONPATH=. python benchmarks/calibration.py

Seconds a step from bigscience's train/tr11-176B-ml/chronicles-prequel.md (February 2022) and
chronicles.md, all on A100-80G with sequences of 2,048 and full recomputation. A row's layout, model
and software are those of the run; nothing is fitted to a row. Writes results/calibration-DATE.json.
"""

import dataclasses
import statistics
from typing import Any

from facts import keep, machine

from bloomjax.config import Config, MeshConfig, base_config, freeze
from bloomjax.cost import estimate
from bloomjax.machines import machine as named
from bloomjax.software import MEGATRON, MEGATRON_FP16, Software

BF16, FP16 = MEGATRON, MEGATRON_FP16
SLOTS = dataclasses.replace(FP16, slots=True)
# name; layers, width, heads; data, tensor, stage, microbatch, batch; software; seconds a step
ROWS: list[tuple[str, tuple[int, ...], tuple[int, ...], Software, float]] = [
    ("176B, the run", (70, 14336, 112), (8, 4, 12, 2, 2048), BF16, 105.2),
    ("176B, 112 heads, trial", (70, 14336, 112), (8, 4, 12, 2, 2048), BF16, 104.5),
    ("176B, 64 heads", (70, 14336, 64), (8, 4, 12, 2, 2048), BF16, 102.03),
    ("176B, 128 heads", (70, 14336, 128), (8, 4, 12, 2, 2048), BF16, 105.89),
    ("176B, 64 heads, microbatch 4", (70, 14336, 64), (8, 4, 12, 4, 2048), BF16, 102.27),
    ("176B, 64 heads, TP 8", (70, 14336, 64), (4, 8, 12, 2, 2048), BF16, 121.63),
    ("176B, 24 nodes", (70, 14336, 112), (4, 4, 12, 2, 2048), BF16, 215.8),
    ("176B, 24 nodes, TP 2 PP 24", (70, 14336, 112), (4, 2, 24, 1, 2048), BF16, 199.8),
    ("176B, 36 nodes, TP 1 PP 72", (70, 14336, 112), (4, 1, 72, 1, 2048), BF16, 140.4),
    ("178B, 64 heads", (82, 13312, 64), (8, 4, 12, 2, 2048), BF16, 104.45),
    ("178B, 64 heads, TP 8", (82, 13312, 64), (4, 8, 12, 4, 2048), BF16, 111.79),
    ("195B, 64 heads", (106, 12288, 64), (8, 4, 12, 2, 2048), BF16, 116.54),
    ("195B, 64 heads, float16", (106, 12288, 64), (8, 4, 12, 2, 2048), SLOTS, 110.96),
    ("182B, batch 512, float16", (78, 13824, 96), (8, 4, 12, 2, 512), FP16, 35.77),
    ("182B, batch 1024, float16", (78, 13824, 96), (8, 4, 12, 2, 1024), FP16, 59.65),
    ("182B, batch 1536, float16", (78, 13824, 96), (8, 4, 12, 2, 1536), FP16, 83.11),
    ("182B, batch 2048, float16", (78, 13824, 96), (8, 4, 12, 2, 2048), FP16, 107.12),
    ("182B, 64 heads, float16", (78, 13824, 64), (8, 4, 12, 2, 2048), FP16, 103.51),
    ("181B, 64 heads, TP 8 PP 6, float16", (72, 14336, 64), (8, 8, 6, 4, 2048), FP16, 114.11),
    ("181B, 64 heads, PP 6, float16", (72, 14336, 64), (16, 4, 6, 2, 2048), FP16, 111.71),
    ("18B, one node, float16", (6, 14336, 64), (1, 8, 1, 2, 512), FP16, 119.19),
]


def config_of(model: tuple[int, ...], run: tuple[int, ...]) -> Config:
    """Of a row: `model` is layers, width, heads; `run` data, tensor, stage, microbatch, batch."""
    base = freeze(base_config("176b"))
    layers, width, heads = model
    data, tensor, stage, rows, batch = run
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, layers=layers, width=width, heads=heads),
        data=dataclasses.replace(base.data, batch_size=batch),
        mesh=MeshConfig(stage=stage, data=data, tensor=tensor),
        run=dataclasses.replace(base.run, accumulation=batch // data // rows, remat="block"),
    )


# The efficiency of products if it were the best of many shapes that was measured on an A100 (267.9
# TFLOP/s; S. Bekman, ML Engineering), not what all rows together ask for.
CEILING = 0.859


def calibrate(**figures: float) -> list[dict[str, Any]]:
    """A row of the table each: measured, predicted, error, and the prediction's parts. `figures`
    replace the machine's own."""
    a100, table = dataclasses.replace(named("gpu-a100-80g"), **figures), []
    for name, model, run, software, measured in ROWS:
        data, tensor, stage, rows, batch = run
        found = estimate(config_of(model, run), a100, data * tensor * stage, software)
        table.append(
            {
                "run": name,
                "layout": f"DP{data} TP{tensor} PP{stage}, microbatch {rows}, batch {batch}",
                "software": software.name,
                "measured_s": measured,
                "predicted_s": round(found.step_seconds, 2),
                "error": round(found.step_seconds / measured - 1, 4),
                "parts_s": {part: round(value, 2) for part, value in found.seconds.items()},
            }
        )
    return table


def spread(table: list[dict[str, Any]]) -> dict[str, float]:
    errors = [row["error"] for row in table]
    return {
        "error_of_the_run": errors[0],
        "median_error": statistics.median(errors),
        "median_size_of_error": statistics.median(map(abs, errors)),
        "largest_error": max(errors, key=abs),
    }


if __name__ == "__main__":
    table = calibrate()
    for row in table:
        print(
            f"{row['run']:36} {row['measured_s']:8.2f} {row['predicted_s']:8.2f} "
            f"{100 * row['error']:+6.1f} %"
        )
    sources = named("gpu-a100-80g").sources
    keep(
        "calibration",
        {
            "machine": machine("jax"),
            "all_rows": spread(table),
            f"all_rows_with_gemm_share_{CEILING}": spread(calibrate(gemm_share=CEILING)),
            "figures": {name: list(source) for name, source in sources.items()},
            "rows": table,
        },
    )
