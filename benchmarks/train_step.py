"""One training step at the shape of bloom-560m on CPU, float32: ours beside torch's.

    pip install . torch==2.13.0 transformers==5.23.0
    python benchmarks/train_step.py            (10 minutes, 16 GB of memory)

A step is forward, backward, clipping of the global norm and AdamW. Torch: transformers'
BloomForCausalLM (eager, no checkpointing), cross_entropy of its logits, fused AdamW. Ours:
`bloomjax.step.train_step`, nothing recomputed. Rounds alternate, each in a process of its own, so
that a drift of the machine meets both and peak memory is one peer's. CPU seconds (of all threads,
the kernel's too) are given beside wall time: they tell more where others use the machine. In the
same process each peer
multiplies the matrices of a block and of the head: from these rates follows the least time that
the step's matrix products take with its library (`bound_s`); MFU counts the products of attention
in full or only their causal half, against the best rate that either library reached.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from facts import keep, machine, peak_memory

LAYERS, WIDTH, HEADS, VOCAB_SIZE = 24, 1024, 16, 250_880
BATCH, TOKENS = 1, 512
# [M, K] x [K, N] of the forward pass: the widest product of a block, and the head.
GEMMS = {"block": (BATCH * TOKENS, WIDTH, 4 * WIDTH), "head": (BATCH * TOKENS, WIDTH, VOCAB_SIZE)}


def flops() -> dict[str, float]:
    """Of one step's matrix products, forward and twice that backward."""
    step = 3 * 2 * BATCH * TOKENS
    attention = step * LAYERS * 2 * TOKENS * WIDTH
    return {
        "block": step * LAYERS * 12 * WIDTH**2,
        "head": step * VOCAB_SIZE * WIDTH,
        "attention": attention,
    }


def batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.RandomState(0).randint(0, VOCAB_SIZE, (BATCH, TOKENS + 1)).astype(np.int32)
    return ids[:, :-1], ids[:, 1:]


def timed(run: Callable[[], Any], times: int) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each call, after one not counted. `run` waits for its work."""
    run()
    wall, cpu = [], []
    for _ in range(times):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return wall, cpu


def gemm_rates(multiply: Callable[[np.ndarray, np.ndarray], Callable[[], Any]]) -> dict[str, float]:
    """GFLOP/s, the median of seven."""
    rates = {}
    for name, (M, K, N) in GEMMS.items():
        run = multiply(np.ones((M, K), np.float32), np.ones((K, N), np.float32))
        rates[name] = 2e-9 * M * K * N / statistics.median(timed(run, 7)[0])
    return rates


def report(
    seconds: list[float], cpu: list[float], losses: list[float], peak: float, gemm: dict[str, float]
) -> dict[str, Any]:
    """What one round of one peer tells."""
    load = os.getloadavg()[0]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "losses": losses,
        "peak_gib": peak,
        "gemm": gemm,
        "load": load,
    }


def ours(steps: int) -> dict[str, Any]:
    import jax

    from bloomjax import step
    from bloomjax.config import base_config, freeze
    from bloomjax.sharding import act, make_mesh, put

    config = base_config("560m")
    config.data.batch_size, config.data.sequence_length = BATCH, TOKENS
    config.optim.ramp_start = 0
    config.run.remat = "none"
    frozen = freeze(config)
    mesh = make_mesh(frozen.mesh, jax.devices()[:1])
    losses = []
    with jax.set_mesh(mesh):
        state = step.init_state(frozen)
        arrays = dict(zip(("tokens", "targets"), batch(), strict=True))
        arrays["weights"] = np.ones((BATCH, TOKENS), np.float32)
        rows = {name: put(a[None], act("ABT"), mesh) for name, a in arrays.items()}

        def run() -> None:
            nonlocal state
            state, report = step.train_step(frozen, state, rows, np.int32(BATCH))
            losses.append(float(report["loss"]))

        seconds, cpu = timed(run, steps)
        memory = peak_memory()
        del state

    def multiply(a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
        product, x, y = jax.jit(lambda x, y: x @ y), jax.numpy.asarray(a), jax.numpy.asarray(b)
        return lambda: product(x, y).block_until_ready()

    rates = gemm_rates(multiply)
    return report(seconds, cpu, losses, memory, rates)


def theirs(steps: int) -> dict[str, Any]:
    import torch
    from transformers import BloomConfig, BloomForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            use_cache=False,
            initializer_range=0.0048,
            attn_implementation="eager",
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-8, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    tokens, targets = (torch.from_numpy(a).long() for a in batch())
    losses = []

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

    seconds, cpu = timed(run, steps)
    memory = peak_memory()

    def multiply(a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
        x, y = torch.from_numpy(a), torch.from_numpy(b)
        return lambda: x @ y

    with torch.no_grad():
        rates = gemm_rates(multiply)
    return report(seconds, cpu, losses, memory, rates)


PEERS = {"ours": ours, "torch": theirs}


def summary(rounds: list[dict[str, Any]], best_rate: float) -> dict[str, Any]:
    """Of one peer. `best_rate` in GFLOP/s is what MFU is counted against."""
    seconds = [s for r in rounds for s in r["seconds"]]
    median, work = statistics.median(seconds), flops()
    rates = {name: statistics.median(r["gemm"][name] for r in rounds) for name in GEMMS}
    bound = 1e-9 * sum(work[name] / rates[name] for name in GEMMS)
    products = work["block"] + work["head"]
    return {
        "median_s": median,
        "least_s": min(seconds),
        "most_s": max(seconds),
        "seconds": seconds,
        "median_cpu_s": statistics.median(s for r in rounds for s in r["cpu_seconds"]),
        "load_average_after_rounds": [r["load"] for r in rounds],
        "tokens_per_second": BATCH * TOKENS / median,
        "gemm_gflops": rates,
        "bound_s": bound,
        "share_of_bound": bound / median,
        "mfu_full": 1e-9 * (products + work["attention"]) / median / best_rate,
        "mfu_causal": 1e-9 * (products + work["attention"] / 2) / median / best_rate,
        "peak_gib": max(r["peak_gib"] for r in rounds),
        "losses": rounds[0]["losses"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=PEERS, help="run this one alone, here")
    args = parser.parse_args()
    if args.peer:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        print(json.dumps(PEERS[args.peer](args.steps)))
        return
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in PEERS}
    load_before = os.getloadavg()
    for _ in range(args.rounds):
        for name, done in rounds.items():
            command = [sys.executable, __file__, f"--peer={name}", f"--steps={args.steps}"]
            command.append(f"--threads={args.threads}")
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            done.append(json.loads(out.splitlines()[-1]))
            print(name, done[-1], file=sys.stderr, flush=True)
    best = max(rate for done in rounds.values() for r in done for rate in r["gemm"].values())
    peers = {name: summary(done, best) for name, done in rounds.items()}
    result = {
        "what": "one training step, float32, batch 1 x 512, at the shape of bloom-560m",
        "shape": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "vocabulary": VOCAB_SIZE},
        "threads": args.threads,
        "flops": flops(),
        **peers,
        "time_ratio_ours_to_torch": peers["ours"]["median_s"] / peers["torch"]["median_s"],
        "cpu_ratio_ours_to_torch": peers["ours"]["median_cpu_s"] / peers["torch"]["median_cpu_s"],
        "memory_ratio_ours_to_torch": peers["ours"]["peak_gib"] / peers["torch"]["peak_gib"],
        "load_average_before": load_before,
        "machine": machine("jax", "flax", "optax", "torch", "transformers", "numpy"),
    }
    keep("train-step-560m", result)


if __name__ == "__main__":
    main()
