"""What a run tells: metrics.jsonl, TensorBoard where it is installed, and lines on stderr.

Only process 0 writes. metrics.jsonl holds each step once: what a resumed run will do again is
dropped from it when the run resumes.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bloomjax.machines import machines


def peak_flops() -> float:
    """FLOP/s that all devices of the run could do: from data sheets, or, for a CPU, what a square
    float32 matrix product reaches here and now. 0.0 where nothing is known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured_cpu_flops()
    known = [m for m in machines() if device.device_kind.startswith(m.device_kind)]
    # "TPU v5 lite" begins as "TPU v5" does: the longest name is meant.
    kind = max(known, key=lambda m: len(m.device_kind), default=None)
    return kind.peak_flops * jax.device_count() if kind else 0.0


def measured_cpu_flops(n: int = 1024) -> float:
    """FLOP/s of the best of a few float32 products of n x n matrices on this host."""
    with jax.default_device(jax.local_devices()[0]), jax.set_mesh(None):
        a = jnp.ones((n, n))
        product = jax.jit(jnp.matmul)
        product(a, a).block_until_ready()
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            product(a, a).block_until_ready()
            seconds.append(time.perf_counter() - start)
    return 2.0 * n**3 / min(seconds)


class Metrics:
    """Writes records of steps; `done` is the step that the run resumes from."""

    def __init__(self, workdir: Path, done: int):
        self._writes = jax.process_index() == 0
        self._board: Any = None
        if not self._writes:
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            _drop_after(path, done)
        self._file = path.open("a")
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=done + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One line of JSON, which has a `step`; each number also goes to TensorBoard."""
        if not self._writes:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, record["step"])

    def say(self, text: str) -> None:
        if self._writes:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            if self._board:
                self._board.close()


def _drop_after(path: Path, done: int) -> None:
    """Keep the lines of steps up to `done`; a line that a kill cut off goes too."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(kept))
    os.replace(fresh, path)


def duration(seconds: float) -> str:
    """75 -> 1m15s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


def amount(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
