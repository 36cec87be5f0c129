"""Few rows times packed weights on CPU, at the shapes of bloom-560m, beside the machine's bounds.

    pip install .
    python benchmarks/products.py            (6 minutes, 3 GB of memory)

Each kind of weight is multiplied in enough copies that no cache helps, one after another as the
layers of a model are, by `bloomjax.kernels.packed.multiply`: with the kernel and without. Bounds,
measured in the same run: memory, by a matrix-vector product of NumPy's BLAS and by XLA's in
float32 (the faster counts); arithmetic, by XLA's float32 product of 512 rows. `share_of_bound` is
of the larger of the two times that these give. Rounds alternate; medians, the least and the most.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from facts import keep, machine

from bloomjax.kernels import cpu
from bloomjax.kernels.packed import Packed, multiply, unpacked
from bloomjax.kernels.packing import quantise

SHAPES = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (250_880, 1024)]
KINDS = ["float32", "float16", "bfloat16", "int8", "int8 in groups", "int4"]
ROWS = [1, 8]
BYTES, COPIES = 2**27, 64  # at least of the one, at most of the other


@functools.cache
def weights(kind: str, shape: tuple[int, int]) -> Packed:
    w_JI = jax.random.normal(jax.random.key(0), shape)
    if kind in ("int8", "int4"):
        values, scales = jax.jit(quantise, static_argnums=1)(w_JI, kind)
    elif kind == "int8 in groups":
        values, scales = jax.jit(quantise, static_argnums=1)(w_JI, "int4")
        values = jax.jit(unpacked)(values)
    else:
        values, scales = w_JI.astype(kind), None
    return Packed(values, scales, "F", "D", shape[:1])


def copies(kind: str, shape: tuple[int, int]) -> tuple[list[Packed], int]:
    """And the bytes of one."""
    one = weights(kind, shape)
    size = sum(a.nbytes for a in jax.tree.leaves(one))
    return [jax.tree.map(jnp.copy, one) for _ in range(min(COPIES, -(-BYTES // size)))], size


def chained(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """One product after another: each needs a number of the one before it."""

    @jax.jit
    def run(x_MI: jax.Array, all_: list[Any]) -> jax.Array:
        for packed in all_:
            x_MI = x_MI + 1e-30 * product(x_MI, packed)[:, :1]
        return x_MI

    return run


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def bounds(rounds: int) -> dict[str, float]:
    """GB/s and GFLOP/s."""
    w_JI = np.ones((65_536, 1024), np.float32)
    device, x_MI = jnp.asarray(w_JI), jnp.ones((512, 1024))
    run = jax.jit(lambda x, w: jnp.einsum("MI,JI->MJ", x, w))
    vector, few = np.ones(1024, np.float32), device[:4096]
    ways: dict[str, tuple[float, Callable[[], float]]] = {
        "blas_gb": (1e-9 * w_JI.nbytes, lambda: seconds(np.dot, w_JI, vector)),
        "xla_gb": (1e-9 * w_JI.nbytes, lambda: seconds(run, x_MI[:1], device)),
        "gflop": (2e-9 * 512 * few.size, lambda: seconds(run, x_MI, few)),
    }
    for _, way in ways.values():
        way()
    times = {name: [way() for _ in range(rounds)] for name, (_, way) in ways.items()}
    return {name: ways[name][0] / statistics.median(t) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    ways = {"kernel": cpu.kernel(), "XLA": ""}
    before = bounds(rounds)
    table: list[dict[str, Any]] = []
    for shape in SHAPES:
        for kind in KINDS:
            arrays, size = copies(kind, shape)
            for M in ROWS:
                times: dict[str, list[float]] = {}
                runs = {}
                for way, name in ways.items():
                    cpu.kernel = lambda name=name: name  # type: ignore[assignment, misc]
                    product = functools.partial(multiply, dtype=jnp.dtype("float32"))
                    runs[way] = chained(lambda x, packed, product=product: product(x, packed))
                    seconds(runs[way], jnp.ones((M, shape[1])), arrays)
                for _ in range(rounds):
                    for way, run in runs.items():
                        took = seconds(run, jnp.ones((M, shape[1])), arrays)
                        times.setdefault(way, []).append(took / len(arrays))
                row = {"shape": shape, "kind": kind, "M": M, "bytes": size, "seconds": times}
                table.append(row)
                print(row | {"seconds": {w: statistics.median(t) for w, t in times.items()}})
            weights.cache_clear()
    after = bounds(rounds)
    best = {name: max(before[name], after[name]) for name in before}
    for row in table:
        J, I = row["shape"]  # noqa: E741
        memory = 1e-9 * row["bytes"] / max(best["blas_gb"], best["xla_gb"])
        bound = max(memory, 2e-9 * row["M"] * J * I / best["gflop"])
        row["by_way"] = {
            way: {
                "gweights_per_second": 1e-9 * J * I / statistics.median(took),
                "gigabytes_per_second": 1e-9 * row["bytes"] / statistics.median(took),
                "seconds": [min(took), statistics.median(took), max(took)],
                "share_of_bound": bound / statistics.median(took),
            }
            for way, took in row.pop("seconds").items()
        }
    facts = machine("jax", "jaxlib", "numpy")
    keep(
        "products",
        {
            "machine": facts | {"load": os.getloadavg()},
            "bounds": {"before": before, "after": after},
            "products": table,
        },
    )


if __name__ == "__main__":
    main()
