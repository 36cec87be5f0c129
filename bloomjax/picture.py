"""A picture of a plan: the devices by mesh axis with what each holds, and memory against capacity.

Every square is a device. Stages stand side by side, copies of the weights (data) above each other;
in each, rows are fsdp and columns are sequence and tensor, folded where there are many rows.
"""

import dataclasses
import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

from bloomjax.aot import Program
from bloomjax.config import Config
from bloomjax.cost import Estimate
from bloomjax.errors import ConfigError

FORMATS = (".png", ".svg")
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def check(path: str) -> None:
    """ConfigError, before any work is done, if no picture can be drawn there."""
    if Path(path).suffix not in FORMATS:
        raise ConfigError(f"--plot={path}: expected a name that ends in {' or '.join(FORMATS)}")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"--plot={path}: expected a folder, found none: make it first")
    if not importlib.util.find_spec("matplotlib"):
        raise ConfigError("--plot needs matplotlib: pip install 'bloomjax[plan]'")


def draw(path: str, title: str, config: Config, program: Program, estimate: Estimate) -> None:
    """Write the picture, as PNG or SVG by the name's end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.25))
    figure.suptitle(title, fontsize=14)
    _devices(left, config, program)
    _memory(right, program, estimate)
    figure.savefig(path, dpi=140)


def _devices(axes: Any, config: Config, program: Program) -> None:
    mesh, L = program.mesh, config.model.layers
    stages, copies = mesh["stage"], mesh["data"]
    rows, columns = mesh["fsdp"], mesh["sequence"] * mesh["tensor"]
    # Fold a copy of the weights into strips side by side, so that the whole is wider than high.
    aim = max(1, round(math.sqrt(rows * copies / (columns * stages) / 1.8)))
    strips = next(n for n in range(min(aim, rows), rows + 1) if rows % n == 0)
    height, gap = rows // strips, max(0.3, 0.08 * columns)
    wide = strips * columns + (strips - 1) * gap  # of a stage, in squares
    step, rise = wide + max(1.0, 0.15 * wide), height + max(0.3, 0.1 * height)
    top, slots = (copies - 1) * rise + height, math.ceil(L / stages)
    small = 9 if stages <= 14 else 6
    for stage in range(stages):
        colour = COLOURS[stage % len(COLOURS)]
        for strip in range(strips):
            x = stage * step + strip * (columns + gap)
            for copy in range(copies):
                _block(axes, x, copy * rise, columns, height, colour)
        first, last = stage * slots, min((stage + 1) * slots, L) - 1
        what = f"layers\n{first}-{last}" if stages > 1 else f"layers {first}-{last}"
        if stages == 1:
            what += ", embedding, head"
        elif L % stages and stage == stages - 1:
            what += "\n+ ends"
        axes.text(stage * step + wide / 2, 1.01 * top, what, ha="center", va="bottom", size=small)
    for copy in range(copies if copies > 1 else 0):
        middle = (copies - 1 - copy) * rise + height / 2
        axes.text(-0.02 * stages * step, middle, f"data {copy}", ha="right", va="center", size=9)
    axes.set_xlim(-0.08 * stages * step * (copies > 1) - 0.5, stages * step)
    axes.set_ylim(-0.01 * top, 1.12 * top)
    axes.axis("off")
    A, B, T = program.batch
    lines = [f"{mesh[axis]} {axis}: {text}" for axis, text in _split(config, mesh).items()]
    lines.append(
        f"each device: {B // (rows * copies)} of {B:,} rows of a microbatch, {A} microbatches a "
        f"step, {T // mesh['sequence']:,} of {T:,} positions"
    )
    axes.text(0, -0.03 * top, "\n".join(lines), ha="left", va="top", size=10)


def _split(config: Config, mesh: dict[str, int]) -> dict[str, str]:
    """What the mesh's axes of more than one device split."""
    model, columns = config.model, mesh["tensor"]
    text = {
        "stage": f"{math.ceil(model.layers / mesh['stage'])} layers each, side by side",
        "data": "rows of the batch; weights are copies",
        "fsdp": "rows of the batch, and weights, gradients and moments at rest",
        "sequence": "positions, and weights, gradients and moments at rest",
        "tensor": f"{model.heads // columns} heads, {4 * model.width // columns:,} of the ffn's "
        f"width, {model.vocab_size // columns:,} of the vocabulary each",
    }
    return {axis: what for axis, what in text.items() if mesh[axis] > 1}


def _block(axes: Any, x: float, y: float, columns: int, rows: int, colour: str) -> None:
    """Devices, a square each."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    places = itertools.product(range(columns), range(rows))
    squares = [Rectangle((x + i + 0.06, y + j + 0.06), 0.88, 0.88) for i, j in places]
    axes.add_collection(PatchCollection(squares, facecolor=colour, edgecolor="none", alpha=0.85))


def _memory(axes: Any, program: Program, estimate: Estimate) -> None:
    from matplotlib.patches import Rectangle

    bars = {"as compiled": dataclasses.asdict(program.memory), "by count": estimate.memory}
    names = [name for parts in bars.values() for name, size in parts.items() if size > 5e7]
    colours = dict(zip(dict.fromkeys(names), COLOURS * 2, strict=False))
    for place, parts in enumerate(bars.values()):
        bottom = 0.0
        for name, size in parts.items():
            if name not in colours:
                continue
            axes.bar(place, size / 1e9, 0.62, bottom / 1e9, color=colours[name])
            if size > 0.05 * estimate.machine.capacity:
                middle = (bottom + size / 2) / 1e9
                text = f"{name}\n{size / 1e9:.1f}"
                axes.text(place, middle, text, ha="center", va="center", color="white", size=9)
            bottom += size
        axes.text(place, bottom / 1e9, f"{bottom / 1e9:.1f} GB", ha="center", va="bottom", size=10)
    capacity = estimate.machine.capacity / 1e9
    axes.axhline(capacity, color="black", linestyle="--", linewidth=1)
    axes.text(1.42, capacity, f"capacity {capacity:.0f} GB", ha="right", va="bottom", size=9)
    labels = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes.legend(labels, colours, loc="upper center", ncols=2, fontsize=8, frameon=False)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_xlim(-0.45, 1.45)
    axes.set_ylim(0, 1.2 * max(capacity, program.memory.total / 1e9, estimate.memory_bytes / 1e9))
    axes.set_ylabel("GB of a device")
    axes.spines[["top", "right"]].set_visible(False)
